"""4-bit integers with a scale per block, plain and with double quantization."""

from keras_precision.formats.base import register_format
from keras_precision.formats.block_scaled import BlockScaled
from keras_precision.formats.codebook import Codebook

# weight = scale * (codes - 8). Scales are such that 7 and -7 reach a block's greatest magnitude, so -8 isn't used.
CODEBOOK = Codebook(tuple(float(code - 8) for code in range(16)))

INT4 = register_format(BlockScaled("int4", bits=4, block_size=64, codebook=CODEBOOK))
INT4_DQ = register_format(BlockScaled("int4-dq", bits=4, block_size=64, codebook=CODEBOOK, has_double_quant=True))
