"""4-bit NormalFloat (Dettmers et al. 2023, QLoRA, section 3), plain and with double quantization."""

from keras_precision.formats.base import Format, register_format

NF4 = register_format(Format("nf4", bits=4, default_block_size=64))
NF4_DQ = register_format(Format("nf4-dq", bits=4, default_block_size=64))
