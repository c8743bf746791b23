"""4-bit integers with a scale per block, plain and with double quantization."""

from keras_precision.formats.base import register_format
from keras_precision.formats.block_scaled import BlockScaled
from keras_precision.formats.codebook import Codebook

# weight = scale * (codes - 8). Of the greatest magnitude of a block, positive or negative, -8 times the scale is made.
CODEBOOK = Codebook(tuple(float(code - 8) for code in range(16)))
_FACTS = {"bits": 4, "block_size": 64, "codebook": CODEBOOK, "has_signed_scale": True}

INT4 = register_format(BlockScaled("int4", **_FACTS))
INT4_DQ = register_format(BlockScaled("int4-dq", **_FACTS, has_double_quant=True))
