"""4-bit integers with a scale per block."""

from keras_precision.formats.base import Format, register_format

INT4 = register_format(Format("int4", bits=4, default_block_size=64))
