"""Rounds float32 values to a 16-bit dtype: to nearest, stochastically, or with Kahan's compensation."""

import keras
import ml_dtypes
from keras import ops


def nearest(x, dtype: str):
    """Returns `x` rounded to the nearest value of `dtype`, ties to even.

    Args:
        x: float32 tensor of any shape.
        dtype: str, a float dtype.
    """
    return ops.cast(x, dtype)


def random_bits(shape, seed, offset=0):
    """Returns uniform bits that depend on nothing but position and seed.

    Each element's index is hashed with the seed (three rounds of multiply and
    shift with the constants of Wellons' lowbias32), so replicas that hold the
    same tensor draw the same bits, and no generator state has to be kept.

    Args:
        shape: tuple of int.
        seed: uint32 scalar or int; a new one for each draw.
        offset: int, the index of the first element.

    Returns:
        uint32 tensor of `shape`.
    """
    size = 1
    for dimension in shape:
        size *= dimension
    index = ops.cast(ops.reshape(ops.arange(offset, offset + size, dtype="int32"), shape), "uint32")
    seed = _hash(ops.cast(seed, "uint32"))
    return _hash(ops.bitwise_xor(_hash(ops.add(index, seed)), seed))


def _hash(x):
    x = ops.bitwise_xor(x, ops.right_shift(x, _uint32(16)))
    x = ops.multiply(x, _uint32(0x7FEB352D))
    x = ops.bitwise_xor(x, ops.right_shift(x, _uint32(15)))
    x = ops.multiply(x, _uint32(0x846CA68B))
    return ops.bitwise_xor(x, ops.right_shift(x, _uint32(16)))


def _uint32(value):
    return ops.convert_to_tensor(value, dtype="uint32")


def stochastic(x, dtype: str, bits):
    """Returns `x` rounded up or down at random, so that the mean is `x`.

    With neighbours a < x < b in `dtype`, b is taken with probability
    (x - a) / (b - a) (Gupta et al. 2015, "Deep Learning with Limited Numerical
    Precision", section 3). Values of `dtype` stay as they are, NaN and inf
    pass, and values beyond the largest finite one become that one instead of
    inf, which would be a jump by the whole range.

    Args:
        x: float32 tensor.
        dtype: str, "bfloat16" or "float16".
        bits: uint32 tensor of x's shape, uniform; see `random_bits`.

    Returns:
        Tensor of x's shape in `dtype`.

    Raises:
        ValueError: another dtype.

    Example:
        >>> x = ops.full((10000,), 1 + 2**-9)  # a quarter of the way from 1 to 1 + 2**-7
        >>> draws = ops.cast(stochastic(x, "bfloat16", random_bits((10000,), 0)), "float32")
        >>> sorted(set(draws.numpy().tolist() if hasattr(draws, "numpy") else draws.tolist()))
        [1.0, 1.0078125]
        >>> abs(float(ops.mean(draws)) - (1 + 2**-9)) < 2e-4
        True
    """
    if dtype not in _ROUND:
        raise ValueError(f"Expected dtype in {tuple(_ROUND)}. Received: dtype='{dtype}'. Round to nearest instead.")
    pattern = ops.view(x, dtype="uint32")
    magnitude = ops.bitwise_and(pattern, _uint32(0x7FFFFFFF))
    rounded = ops.minimum(_ROUND[dtype](magnitude, bits), float(ml_dtypes.finfo(dtype).max))
    rounded = ops.where(ops.less(x, 0), -rounded, rounded)
    # Zeros keep their sign, and what is not finite passes.
    return ops.cast(ops.where(ops.logical_and(ops.isfinite(x), ops.not_equal(x, 0)), rounded, x), dtype)


def _truncated_with_noise(magnitude, bits, unit):
    """Adds noise below the last kept bit and cuts it off: that carries with probability (x - a) / (b - a)."""
    below = ops.subtract(unit, _uint32(1))
    noisy = ops.add(magnitude, ops.bitwise_and(bits, below))
    return ops.view(ops.bitwise_and(noisy, ops.bitwise_invert(below)), dtype="float32")


def _to_bfloat16(magnitude, bits):
    # bfloat16 is float32's upper half, subnormals included.
    return _truncated_with_noise(magnitude, bits, _uint32(1 << 16))


def _to_float16(magnitude, bits):
    # 13 fraction bits are dropped, and one more for each power of two below float16's smallest normal number, 2**-14,
    # whose exponent field in float32 is 113.
    exponent = ops.cast(ops.right_shift(magnitude, _uint32(23)), "int32")
    dropped = ops.clip(13 + ops.maximum(0, 113 - exponent), 13, 23)
    kept = _truncated_with_noise(magnitude, bits, ops.left_shift(_uint32(1), ops.cast(dropped, "uint32")))
    # Below the smallest subnormal, 2**-24, there is no bit to keep: it is that number with probability x * 2**24.
    uniform = ops.cast(ops.cast(ops.right_shift(bits, _uint32(8)), "int32"), "float32")
    tiny = ops.where(ops.less(uniform * 2.0**-24, ops.view(magnitude, dtype="float32") * 2.0**24), 2.0**-24, 0.0)
    return ops.where(ops.less(exponent, 103), tiny, kept)


_ROUND = {"bfloat16": _to_bfloat16, "float16": _to_float16}


def kahan_add(value, increment, compensation):
    """Adds to a 16-bit sum, keeping in a second 16-bit tensor what rounding lost.

    The error of the sum stays within about one rounding of the total instead
    of one a step (Kahan 1965; Zamirai et al. 2020, "Revisiting BFloat16
    Training", section 3.2).

    Args:
        value: 16-bit tensor, the sum.
        increment: float32 tensor of its shape.
        compensation: 16-bit tensor of its shape, what is still to be added; zeros at first.

    Returns:
        The new sum and the new compensation, both in value's dtype.

    Example:
        >>> total, lost = ops.ones((), "bfloat16"), ops.zeros((), "bfloat16")
        >>> for _ in range(100):
        ...     total, lost = kahan_add(total, ops.full((), 1e-3), lost)
        >>> abs(float(total) + float(lost) - 1.1) < 1e-3  # rounded to nearest each time, it would still be 1
        True
    """
    dtype = keras.backend.standardize_dtype(value.dtype)
    exact = ops.cast(value, "float32") + (increment + ops.cast(compensation, "float32"))
    rounded = ops.cast(exact, dtype)
    return rounded, ops.cast(exact - ops.cast(rounded, "float32"), dtype)
