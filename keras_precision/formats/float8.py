"""8-bit floating point for training: e4m3 forward, e5m2 gradients (Micikevicius et al. 2022)."""

from keras_precision.formats.base import Format, register_format

FLOAT8 = register_format(Format("float8", bits=8, has_amax_history=True))
