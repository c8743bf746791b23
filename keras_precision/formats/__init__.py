"""The registry of quantized formats: one import line each."""

from keras_precision.formats import float8 as _float8  # noqa: F401
from keras_precision.formats import fp4 as _fp4  # noqa: F401
from keras_precision.formats import int4 as _int4  # noqa: F401
from keras_precision.formats import int8 as _int8  # noqa: F401
from keras_precision.formats import int8_weight_only as _int8_weight_only  # noqa: F401
from keras_precision.formats import llm_int8 as _llm_int8  # noqa: F401
from keras_precision.formats import nf4 as _nf4  # noqa: F401
from keras_precision.formats.base import BLOCK_SIZES, FORMATS, Codec, Format, Part, register_format

__all__ = ["BLOCK_SIZES", "FORMATS", "Codec", "Format", "Part", "register_format"]
