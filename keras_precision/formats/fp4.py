"""4-bit floating point as bitsandbytes has it, plain and with double quantization."""

from keras_precision.formats.base import register_format
from keras_precision.formats.block_scaled import BlockScaled
from keras_precision.formats.codebook import Codebook

# A sign, two bits of exponent and one of mantissa, divided by the greatest value, 12; 0.0625 stands for the subnormal.
_MAGNITUDES = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
CODEBOOK = Codebook((*_MAGNITUDES, *(-value if value else value for value in _MAGNITUDES)))

FP4 = register_format(BlockScaled("fp4", bits=4, block_size=64, codebook=CODEBOOK))
FP4_DQ = register_format(BlockScaled("fp4-dq", bits=4, block_size=64, codebook=CODEBOOK, has_double_quant=True))
