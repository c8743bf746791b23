"""Dynamic codes, whose values lie evenly within each decade (Dettmers et al. 2022, "8-bit Optimizers", section 1.3)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from keras import ops

from keras_precision.kernels.rows import ANY, Target
from keras_precision.optimizers.states import absmax

# Numbers are divided by scales in multiples of 1 / 16: the reciprocal of one above 2**126 is subnormal.
_UNIT = 16.0
_MANTISSA_BITS = 23
_EXPONENT_OF_HALF = 126 << _MANTISSA_BITS
_TAGS = 8  # decades that a slope's last bits can tell apart
_LAST = int(np.float32(10 / 9 - 2.0**-21).view("int32"))  # the pattern of what is below 2 with 8 / 9


def dynamic_values(bits: int, is_signed: bool) -> tuple[float, ...]:
    """Returns the 2**bits values of dynamic codes, ascending.

    With n = bits - 1 decades, p counts them from 0 if signed and from 1 if
    not, to q, the last. The values of decade p are 10**(p - q) times the
    middles of the 2**p equal intervals of [0.1, 1]; signed codes have them with
    both signs. 0 and 1 complete them; -1 is none of them.

    Example:
        >>> [round(value, 4) for value in dynamic_values(4, is_signed=True)][7:]
        [0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
        >>> [round(value, 4) for value in dynamic_values(3, is_signed=False)]
        [0.0, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    """
    first = 0 if is_signed else 1
    decades = range(first, first + bits - 1)
    values = [0.0, 1.0]
    for decade in decades:
        middles = 0.1 + 0.9 * (np.arange(2**decade) + 0.5) / 2**decade
        middles = (middles * 10.0 ** (decade - decades[-1])).tolist()
        values += middles + [-middle for middle in middles if is_signed]
    return tuple(sorted(values))


@dataclass(frozen=True)
class DynamicMap:
    """Finds the nearest of dynamic values, computed rather than searched.

    Counted from zero, with K = code - code of zero (plus 1 if unsigned), the
    values of decade p are those of K = 2**p to 2**(p + 1) - 1, and

        value(K) = 10**(p - q) * (0.1 + 0.9 * (K - 2**p + 0.5) / 2**p),

    so that the nearest to a magnitude m among them is

        K = floor(m * 10**(q - p) * 2**p / 0.9 + 8 / 9 * 2**p),

    cut off at the decade's last.

    Attributes:
        values: ascending, as `dynamic_values` gives them.
    """

    values: tuple[float, ...]

    @cached_property
    def array(self) -> np.ndarray:
        """float32: the values in the order of the codes."""
        return np.array(self.values, "float32")

    @property
    def zero(self) -> int:
        """The code of zero."""
        return self.values.index(0.0)

    @cached_property
    def _decades(self) -> range:
        first = 0 if self.zero else 1
        return range(first, first + len(self.values).bit_length() - 2)

    def _midpoint(self, position):
        """The middle between the values of K = position - 1 and K = position, in the units of scaled numbers."""
        code = position + self.zero - self._decades[0]
        return (self.values[code - 1] + self.values[code]) / 2 * _UNIT

    def _slope(self, magnitude, decades):
        """Returns float32 10**(q - p) / 0.9 for the decade p of each magnitude, chosen among `decades` by halves.

        Its last 3 bits, which make it wrong by 2**-20 at most, are q - p.
        """
        if len(decades) == 1:
            behind = self._decades[-1] - decades[0]
            pattern = np.float32(10.0**behind / 0.9 / _UNIT).view("int32") + _TAGS // 2 & -_TAGS | behind
            return ops.convert_to_tensor(pattern.view("float32").item(), "float32")
        half = len(decades) // 2
        lower, upper = (self._slope(magnitude, part) for part in (decades[:half], decades[half:]))
        return ops.where(magnitude > self._midpoint(2 ** decades[half]), upper, lower)

    def nearest(self, grouped, scale):
        """Returns the code of the value nearest to each number divided by its block's scale.

        The distance is at most the least one plus 2**-18 of the number: of m in
        [0.1, 1] of its decade, K / 2**p = m / 0.9 + 8 / 9 comes of four roundings
        and `_slope` in the first summand and one rounding of the sum, so that the
        middle between two values is missed by 2**-24 * (5 + 16 + 0.8 / m) <=
        29 * 2**-24 of m, and the distance is greater by twice that.

        Args:
            grouped: float32 tensor (..., block_size); signs are ignored if the
                map is unsigned.
            scale: float32 tensor (...), as `absmax.py` makes them.

        Returns:
            int32 tensor (..., block_size).
        """
        first, last = self._decades[0], self._decades[-1]
        scaled = grouped * absmax.reciprocal(scale, _UNIT)
        magnitude = ops.abs(scaled)
        # The decade below the first one has no values of its own: its K / 2**p are below 2, and its K that of zero or less.
        slope = self._slope(magnitude, range(first - 1, last + 1))
        # The less of two floats, which is NaN if one is, takes a CPU three instructions, of their patterns one. XLA
        # contracts a product and a sum into one operation that rounds once, which it can't do with this between them.
        summand = ops.view(ops.minimum(ops.view(magnitude * slope, "int32"), _LAST), "float32")
        # K / 2**p, in [1, 2): K are the first bits of its mantissa. Below the first decade it is less than 1.
        mantissa = ops.view(summand + 8 / 9, "int32") - _EXPONENT_OF_HALF
        position = ops.right_shift(mantissa, (ops.view(slope, "int32") & (_TAGS - 1)) + (_MANTISSA_BITS - last))
        end = self._midpoint(2 * 2**last)
        if not self.zero:
            return ops.maximum(ops.where(magnitude > end, 2 * 2**last, position) - first, 0)
        position = ops.where(scaled > end, 2 * 2**last, position)
        sign = ops.right_shift(ops.view(scaled, "int32"), 31)
        return (position ^ sign) - sign + (self.zero - first)

    def decode(self, codes, target: Target = ANY):
        """Returns the float32 values of a tensor of codes."""
        # 3.6e9 a second from the table, 3.1e9 computed from K (2 CPU cores, jax 0.10.2, 4M codes).
        return target.look_up(self.array, codes)
