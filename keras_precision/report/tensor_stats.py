"""Where the values of a tensor lie in the range of a dtype."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_precision import dtypes

_EXPONENTS = 256  # values of the 8 bits of float32's exponent
_BIAS = 127


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """Where the values of one or more tensors lie in the range of a dtype.

    The values are those of the float32 pass, gradients times the loss scale,
    so that what is lost in the dtype is still there to be counted.

    Attributes:
        dtype: whose range counts.
        elements: number of values, zeros included.
        zeros: how many are 0 in float32.
        histogram: binary exponent e -> how many finite values have 2**e <= |value| < 2**(e + 1); float32's
            subnormal values count under -127.
        largest: the largest finite |value|.
        overflow: share, of the values that are not 0, that round to inf in the dtype, or are not finite in float32.
        underflow: share of them that round to 0.
        subnormal: share of them that lie between 0 and the smallest normal value, and keep fewer bits.
        nonfinite: share of all values that are inf or NaN as the candidate policy computes them.
    """

    dtype: str
    elements: int
    zeros: int
    histogram: dict[int, int]
    largest: float
    overflow: float
    underflow: float
    subnormal: float
    nonfinite: float = 0.0

    @property
    def exponent_range(self) -> tuple[int, int] | None:
        """The smallest and the largest binary exponent of a finite value that is not 0; None if there is none."""
        return (min(self.histogram), max(self.histogram)) if self.histogram else None


class Counts(NamedTuple):
    """Counts of the values of tensors, which add up.

    Attributes:
        by_exponent: int64 (256,), values by the 8 bits of float32's exponent.
        zeros: values that are 0.
        overflow: values that round to inf in some dtype.
        underflow: values other than 0 that round to 0.
        subnormal: values other than these that lie below the smallest normal one.
        largest: the largest finite |value|.
    """

    by_exponent: np.ndarray
    zeros: int
    overflow: int
    underflow: int
    subnormal: int
    largest: float

    def __add__(self, other: Counts) -> Counts:
        sums = [mine + its for mine, its in zip(self[:-1], other[:-1], strict=True)]
        return Counts(*sums, max(self.largest, other.largest))


def count(tensor: Any, dtype: str, scale: float = 1.0) -> Counts:
    """Returns where the values of a float tensor lie in the range of a dtype.

    Args:
        tensor: of the backend, any shape, on any device.
        dtype: name of the dtype whose range counts.
        scale: a power of 2 that the values are multiplied by first.

    Float64 values are judged as float32 has them.
    """
    bounds = np.asarray(_bounds(dtype, scale), "int32")
    counted = _in_place(_counted)(*_operands(tensor), bounds)
    by_exponent, (zeros, overflow, underflow, subnormal, largest) = (np.asarray(part) for part in counted)
    shift = round(np.log2(scale))
    by_exponent = by_exponent.astype("int64")
    if shift:
        by_exponent = _shifted(by_exponent, shift)
    magnitude = float(np.asarray(largest, "int32").view("float32")) * scale
    return Counts(by_exponent, int(zeros), int(overflow), int(underflow), int(subnormal), magnitude)


def stats(counts: Counts, dtype: str, nonfinite: float = 0.0) -> TensorStats:
    """Returns the shares that counts stand for."""
    elements = int(counts.by_exponent.sum())
    present = max(elements - counts.zeros, 1)
    finite = counts.by_exponent[:-1].copy()
    finite[0] -= counts.zeros
    return TensorStats(
        dtype=dtype,
        elements=elements,
        zeros=counts.zeros,
        histogram={int(place) - _BIAS: int(finite[place]) for place in np.flatnonzero(finite)},
        largest=counts.largest,
        overflow=counts.overflow / present,
        underflow=counts.underflow / present,
        subnormal=counts.subnormal / present,
        nonfinite=nonfinite,
    )


class Difference(NamedTuple):
    """How a tensor differs from the same one in float32.

    Attributes:
        nonfinite: values of it that are inf or NaN where float32's are finite.
        elements: all of its values.
        signal: sum of squares of float32's values that are finite in both, over the largest of them squared.
        noise: sum of squares of the differences, over the same.
    """

    nonfinite: int
    elements: int
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); None where nothing differs, or all is 0."""
        return float(10 * np.log10(self.signal / self.noise)) if self.signal > 0 and self.noise > 0 else None


def difference(tensor: Any, reference: Any) -> Difference:
    """Returns how a tensor differs from another one of the same shape, the float32 one."""
    nonfinite, signal, noise = _in_place(_compared)(*_operands(tensor, reference))
    return Difference(int(nonfinite), int(np.prod(tensor.shape)), float(signal), float(noise))


@functools.cache
def _bounds(dtype, scale):
    """Returns the bits of float32 from which on |values| overflow, up to which they are 0, and below which subnormal.

    |values| compare as their bits do, and bits are compared because XLA takes float32's subnormal values for 0. Rounding
    to nearest gives inf from max + ulp / 2 on, and 0 up to half of the smallest subnormal, a tie to even.
    """
    facts = dtypes.info(dtype)
    if facts.bits >= 32:
        overflows, vanishes, tiny = np.inf, 0.0, 2.0**-126
    else:
        ulp = facts.eps * 2.0 ** np.floor(np.log2(facts.max))
        overflows, vanishes, tiny = facts.max + ulp / 2, facts.smallest_subnormal / 2, facts.tiny
    with np.errstate(over="ignore", under="ignore"):
        bits = np.asarray([overflows, vanishes, tiny], "float64") / scale
        return tuple(int(b) for b in bits.astype("float32").view("int32"))


def _shifted(by_exponent, shift):
    moved = np.zeros_like(by_exponent)
    moved[0], moved[-1] = by_exponent[0], by_exponent[-1]
    for place in np.flatnonzero(by_exponent[1:-1]) + 1:
        moved[min(max(place + shift, 1), _EXPONENTS - 2)] += by_exponent[place]
    return moved


def _magnitude_bits(xp, values):
    """Returns the bits of the float32 |values|, int32."""
    if xp is np:
        return np.ascontiguousarray(values, "float32").reshape(-1).view("int32") & 0x7FFFFFFF
    import jax

    return jax.lax.bitcast_convert_type(values.astype("float32").reshape(-1), "int32") & 0x7FFFFFFF


def _counted(xp, values, bounds):
    bits = _magnitude_bits(xp, values)
    exponents = bits >> 23
    by_exponent = np.bincount(exponents, minlength=256) if xp is np else xp.bincount(exponents, length=_EXPONENTS)
    overflows, vanishes, tiny = bounds
    zeros = xp.sum(bits == 0)
    underflow = xp.sum(bits <= vanishes) - zeros
    below = xp.sum(bits < tiny) - zeros - underflow
    largest = xp.max(xp.where(exponents < _EXPONENTS - 1, bits, 0), initial=0)
    return by_exponent, xp.stack([zeros, xp.sum(bits >= overflows), underflow, below, largest])


def _compared(xp, values, reference):
    values, reference = values.astype("float32"), reference.astype("float32")
    is_finite = xp.isfinite(values) & xp.isfinite(reference)
    largest = xp.max(xp.where(is_finite, xp.abs(reference), 0), initial=0)
    unit = xp.where(largest > 0, largest, xp.asarray(1, "float32"))  # squares of 1e20 overflow float32
    signal = xp.where(is_finite, reference / unit, 0)
    noise = xp.where(is_finite, values / unit - reference / unit, 0)
    nonfinite = xp.sum(~xp.isfinite(values) & xp.isfinite(reference))
    return nonfinite, xp.sum(signal * signal), xp.sum(noise * noise)


def _operands(*tensors):
    if _is_on_accelerator():
        return tensors
    return tuple(np.asarray(keras.ops.convert_to_numpy(tensor)) for tensor in tensors)


@functools.cache
def _in_place(function):
    """Returns a function of arrays that runs where they are.

    Compiled for an accelerator, else NumPy, which reads the host's arrays in place: XLA takes 0.15 s to compile for
    each shape.
    """
    if not _is_on_accelerator():
        return functools.partial(_silently, function)
    import jax

    return jax.jit(functools.partial(function, jax.numpy))


def _silently(function, *arguments):
    with np.errstate(all="ignore"):
        return function(np, *arguments)


@functools.cache
def _is_on_accelerator():
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() != "cpu"
