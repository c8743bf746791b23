"""4-bit floating point, plain and with double quantization."""

from keras_precision.formats.base import Format, register_format

FP4 = register_format(Format("fp4", bits=4, default_block_size=64))
FP4_DQ = register_format(Format("fp4-dq", bits=4, default_block_size=64))
