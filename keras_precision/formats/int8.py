"""8-bit integers, one scale per output channel, with activations quantized too or not."""

from keras_precision.formats.base import Format, register_format

INT8 = register_format(Format("int8", bits=8))
INT8_WEIGHT_ONLY = register_format(Format("int8-weight-only", bits=8))
