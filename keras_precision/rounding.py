"""Rounds float32 values to a 16-bit dtype: to nearest, stochastically, or with Kahan's compensation."""

import keras
import ml_dtypes
from keras import ops

from keras_precision.dtypes import HALF_DTYPES


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
    _require_16_bits(dtype)
    pattern = ops.view(x, dtype="uint32")
    magnitude = ops.bitwise_and(pattern, _uint32(0x7FFFFFFF))
    step = _step(magnitude, dtype)
    # Noise below the last kept bit, cut off again, carries with probability (x - a) / (b - a).
    noise = ops.bitwise_and(bits, ops.subtract(step, _uint32(1)))
    # Where there is no bit to keep, it is the least subnormal with probability x over it.
    uniform = ops.cast(ops.cast(ops.right_shift(bits, _uint32(8)), "int32"), "float32") * 2.0**-24
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    below_least = ops.where(ops.less(uniform * least, ops.abs(x)), least, 0.0)
    rounded = ops.minimum(_carried(magnitude, noise, step, dtype, below_least), float(ml_dtypes.finfo(dtype).max))
    return ops.cast(_like(x, rounded), dtype)


def on_grid(x, dtype: str):
    """Returns `x` rounded to the nearest value of a 16-bit dtype, ties to even, in float32.

    Casting down and up again would say the same and be taken away by XLA on a
    GPU, which may compute more precisely than it is told
    (`xla_allow_excess_precision`), and with it what rounding loses. Integer
    arithmetic on the bits stays.

    Args:
        x: float32 tensor.
        dtype: str, "bfloat16" or "float16".

    Returns:
        float32 tensor of x's shape; inf beyond the dtype's range.

    Raises:
        ValueError: another dtype.

    Example:
        >>> float(on_grid(ops.convert_to_tensor(1.003), "bfloat16")), float(on_grid(ops.convert_to_tensor(1e5), "float16"))
        (1.0, inf)
    """
    _require_16_bits(dtype)
    pattern = ops.view(x, dtype="uint32")
    magnitude = ops.bitwise_and(pattern, _uint32(0x7FFFFFFF))
    step = _step(magnitude, dtype)
    is_odd = ops.cast(ops.not_equal(ops.bitwise_and(magnitude, step), _uint32(0)), "uint32")
    to_even = ops.add(ops.subtract(ops.right_shift(step, _uint32(1)), _uint32(1)), is_odd)
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    below_least = ops.where(ops.greater(ops.abs(x), least / 2), least, 0.0)
    rounded = _carried(magnitude, to_even, step, dtype, below_least)
    rounded = ops.where(ops.greater(rounded, float(ml_dtypes.finfo(dtype).max)), float("inf"), rounded)
    return _like(x, rounded)


def _require_16_bits(dtype):
    if dtype not in HALF_DTYPES:
        raise ValueError(f"Expected dtype in {HALF_DTYPES}. Received: dtype='{dtype}'. Round to nearest instead.")


def _step(magnitude, dtype):
    """Returns how far apart neighbours in `dtype` are, as the difference of float32's bit patterns."""
    if dtype == "bfloat16":  # float32's upper half, subnormals included
        return _uint32(1 << 16)
    # 13 fraction bits are dropped, and one more for each power of two below float16's smallest normal number, 2**-14,
    # whose exponent field in float32 is 113.
    dropped = ops.clip(13 + ops.maximum(0, 113 - _exponent(magnitude)), 13, 23)
    return ops.left_shift(_uint32(1), ops.cast(dropped, "uint32"))


def _exponent(magnitude):
    return ops.cast(ops.right_shift(magnitude, _uint32(23)), "int32")


def _carried(magnitude, increment, step, dtype, below_least):
    """Returns bit patterns plus an increment, cut off at the last bit that `dtype` keeps, as float32."""
    kept = ops.bitwise_and(ops.add(magnitude, increment), ops.bitwise_invert(ops.subtract(step, _uint32(1))))
    kept = ops.view(kept, dtype="float32")
    # Below float16's least subnormal, 2**-24 with exponent field 103, there is no bit to keep.
    return kept if dtype == "bfloat16" else ops.where(ops.less(_exponent(magnitude), 103), below_least, kept)


def _like(x, rounded):
    """Returns rounded magnitudes with the signs of `x`; its zeros keep theirs, and what is not finite passes."""
    rounded = ops.where(ops.less(x, 0), -rounded, rounded)
    return ops.where(ops.logical_and(ops.isfinite(x), ops.not_equal(x, 0)), rounded, x)


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
    rounded = on_grid(exact, dtype)
    return ops.cast(rounded, dtype), ops.cast(exact - rounded, dtype)
