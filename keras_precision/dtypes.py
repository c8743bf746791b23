"""Facts about each dtype that a Keras program stores or computes in."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class DTypeInfo:
    """The range and the resolution of one floating dtype.

    Attributes:
        name: Keras name of the dtype.
        bits: Width of one element, in bits.
        significand: Bits of the significand, the hidden one included, so that
            `eps == 2 ** (1 - significand)`.
        max: Largest finite value. The smallest is `-max`.
        tiny: Smallest positive normal value.
        smallest_subnormal: Smallest positive value.
        eps: Gap between 1 and the next larger value. Rounding to nearest is
            off by at most `eps / 2`, relative, for normal values.

    Example:

    >>> from keras_precision import dtypes
    >>> dtypes.info("float16").max
    65504.0
    """

    name: str
    bits: int
    significand: int
    max: float
    tiny: float
    smallest_subnormal: float
    eps: float


# IEEE 754-2019 for float64, float32 and float16; bfloat16 is float32 with 16
# significand bits fewer; float8: Micikevicius et al., "FP8 Formats for Deep
# Learning" (arXiv:2209.05433), table 1. e4m3fn has no infinity, and its largest
# exponent still holds numbers, so that its maximum is 448 and not 240.
_INFOS = (
    DTypeInfo(
        name="float64",
        bits=64,
        significand=53,
        max=(2 - 2.0**-52) * 2.0**1023,
        tiny=2.0**-1022,
        smallest_subnormal=2.0**-1074,
        eps=2.0**-52,
    ),
    DTypeInfo(
        name="float32",
        bits=32,
        significand=24,
        max=(2 - 2.0**-23) * 2.0**127,
        tiny=2.0**-126,
        smallest_subnormal=2.0**-149,
        eps=2.0**-23,
    ),
    DTypeInfo(
        name="bfloat16",
        bits=16,
        significand=8,
        max=(2 - 2.0**-7) * 2.0**127,
        tiny=2.0**-126,
        smallest_subnormal=2.0**-133,
        eps=2.0**-7,
    ),
    DTypeInfo(
        name="float16",
        bits=16,
        significand=11,
        max=65504.0,
        tiny=2.0**-14,
        smallest_subnormal=2.0**-24,
        eps=2.0**-10,
    ),
    DTypeInfo(
        name="float8_e4m3fn",
        bits=8,
        significand=4,
        max=448.0,
        tiny=2.0**-6,
        smallest_subnormal=2.0**-9,
        eps=2.0**-3,
    ),
    DTypeInfo(
        name="float8_e5m2",
        bits=8,
        significand=3,
        max=57344.0,
        tiny=2.0**-14,
        smallest_subnormal=2.0**-16,
        eps=2.0**-2,
    ),
)

DTYPES: dict[str, DTypeInfo] = {one.name: one for one in _INFOS}

# The 16-bit dtypes that weights and activations are kept in.
HALF_DTYPES = ("float16", "bfloat16")

_NUMBER = re.compile(r"(?:u?int(?:2|4|8|16|32|64)|complex(?:64|128))")
_WITHOUT_RANGE = ("bool", "string")


def name(dtype: Any) -> str:
    """Returns the Keras name of a dtype.

    Args:
        dtype: A name, or a dtype of NumPy, ml_dtypes, JAX, TensorFlow or
            PyTorch.

    Returns:
        The name: "float32", "bfloat16", "float8_e4m3fn", "uint8", "bool", ...

    Raises:
        TypeError: If `dtype` is no dtype. Python's `float` and `int` are none
            either: NumPy takes them as 64 bits wide, and Keras as `floatx()`.
        ValueError: If it is a dtype that is not in our tables.

    Example:

    >>> import numpy as np
    >>> from keras_precision import dtypes
    >>> dtypes.name(np.float16)
    'float16'
    """
    found = _spell(dtype)
    if found in DTYPES or found in _WITHOUT_RANGE or _NUMBER.fullmatch(found):
        return found
    raise ValueError(
        f"Expected one of {', '.join(DTYPES)}, an integer, complex, bool or "
        f"string dtype. Received: dtype={dtype!r}. Pass one of these names."
    )


def _spell(dtype: Any) -> str:
    """Returns how a dtype of any library spells its name, known to us or not."""
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        return np.dtype(dtype).name
    if isinstance(dtype, np.dtype):
        return dtype.name
    if hasattr(dtype, "as_numpy_dtype"):  # tf.DType
        return dtype.name
    # jnp.float32 is no dtype but carries one.
    if isinstance(getattr(dtype, "dtype", None), np.dtype):
        return dtype.dtype.name
    if type(dtype).__module__ == "torch" and type(dtype).__name__ == "dtype":
        return str(dtype).removeprefix("torch.")
    raise TypeError(
        "Expected a dtype name or a dtype of NumPy, ml_dtypes, JAX, TensorFlow "
        f"or PyTorch. Received: dtype={dtype!r} of type "
        f'{type(dtype).__name__}. Pass a name such as "float32".'
    )


def info(dtype: Any) -> DTypeInfo:
    """Returns the facts of a floating dtype.

    Args:
        dtype: A name or a dtype object, as in `name`.

    Returns:
        The `DTypeInfo`.

    Raises:
        TypeError: If `dtype` is no dtype.
        ValueError: If it is not one of `DTYPES`.

    Example:

    >>> from keras_precision import dtypes
    >>> dtypes.info("bfloat16").eps
    0.0078125
    """
    found = name(dtype)
    if found not in DTYPES:
        raise ValueError(
            f"Expected a floating dtype, one of {', '.join(DTYPES)}. "
            f"Received: dtype={dtype!r}. Pass one of these names."
        )
    return DTYPES[found]


def is_float(dtype: Any) -> bool:
    """Returns whether a dtype is one of the floating dtypes of `DTYPES`.

    Args:
        dtype: A name or a dtype object, as in `name`.

    Returns:
        True for floating dtypes, False for integers, complex, bool and string.

    Raises:
        TypeError: If `dtype` is no dtype.
        ValueError: If it is a dtype that is not in our tables.

    Example:

    >>> from keras_precision import dtypes
    >>> dtypes.is_float("float8_e5m2"), dtypes.is_float("int32")
    (True, False)
    """
    return name(dtype) in DTYPES


def nbytes(dtype: Any) -> int:
    """Returns the bytes that one element takes in an unpacked array.

    Integers narrower than a byte take a whole one, as in NumPy; how a format
    packs several of them into one byte is the format's business.

    Args:
        dtype: A name or a dtype object, as in `name`.

    Returns:
        Bytes per element, >= 1.

    Raises:
        TypeError: If `dtype` is no dtype.
        ValueError: If it is not in our tables, or is "string", which has no
            fixed size.

    Example:

    >>> from keras_precision import dtypes
    >>> dtypes.nbytes("bfloat16"), dtypes.nbytes("int32"), dtypes.nbytes("bool")
    (2, 4, 1)
    """
    found = name(dtype)
    if found == "string":
        raise ValueError(
            "Expected a dtype whose elements have a fixed size. Received: "
            f"dtype={dtype!r}. Leave strings out of memory accounts."
        )
    if found == "bool":
        return 1
    if found in DTYPES:
        return DTYPES[found].bits // 8
    return math.ceil(int(re.sub(r"\D", "", found)) / 8)


def safe_mask_value(dtype: Any) -> float:
    """Returns the value to add to attention logits that masks them out.

    The value is `-max / 4`. For logits of magnitude at most `L = max / 16`
    (float16: 4094) it holds, in this dtype, that

    - a masked logit is finite, also under two masks (causal plus padding):
      `2 * max / 4 + L = 9 / 16 * max`, and `10 / 16 * max` after softmax has
      subtracted the maximum of its row;
    - a masked position gets a probability of exactly 0 beside an unmasked one:
      the two differ by at least `max / 4 - 2 * L = max / 8`, and
      `exp(-max / 8)` is below half the smallest subnormal in every dtype of
      `DTYPES` (the tightest is float8_e4m3fn: exp(-56) < 2 ** -10);
    - a row masked everywhere is finite, and uniform where `|logit| <
      max * eps / 16` (float16: 4), since the logits are then lost in rounding.

    The customary -1e9 is -inf in float16: such a row becomes NaN.

    Args:
        dtype: The floating dtype in which the mask is added.

    Returns:
        A negative float, exactly representable in `dtype`.

    Raises:
        TypeError: If `dtype` is no dtype.
        ValueError: If it is not one of `DTYPES`.

    Example:

    >>> from keras_precision import dtypes
    >>> dtypes.safe_mask_value("float16")
    -16376.0
    """
    return -info(dtype).max / 4


def measured_bytes(variables: Iterable[Any]) -> int:
    """Returns the bytes of the live arrays behind `variables`, each variable counted once."""
    unique = {id(variable): variable for variable in variables}
    return sum(math.prod(v.shape) * nbytes(v.value.dtype) for v in unique.values())
