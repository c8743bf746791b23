"""4-bit NormalFloat (Dettmers et al. 2023, QLoRA, section 3), plain and with double quantization."""

from keras_precision.formats.base import register_format
from keras_precision.formats.block_scaled import BlockScaled
from keras_precision.formats.codebook import Codebook

# QLoRA, appendix E.
CODEBOOK = Codebook(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )
)  # fmt: skip

NF4 = register_format(BlockScaled("nf4", bits=4, block_size=64, codebook=CODEBOOK))
NF4_DQ = register_format(BlockScaled("nf4-dq", bits=4, block_size=64, codebook=CODEBOOK, has_double_quant=True))
