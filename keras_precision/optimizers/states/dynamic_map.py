"""Dynamic codes, whose values lie evenly within each decade (Dettmers et al. 2022, "8-bit Optimizers", section 1.3)."""

import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from keras import ops

from keras_precision.kernels.rows import ANY, Target
from keras_precision.optimizers.states import absmax

# Numbers are divided by scales in multiples of 1 / 16: the reciprocal of one above 2**126 is subnormal.
_UNIT = 16.0
_EXPONENT = 0xFF << 23
_DOWN = (
    2.0**23 - 0.5
)  # added to a float32 in [1, 2**22), it leaves the integer part in the sum's last bits; of 3 it makes 2
_INTEGERS = int(np.float32(2**23).view("int32"))
_ONE = int(np.float32(1).view("int32"))
_LATE = 0.2  # by how much F is above 2**p where K becomes 2**p


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

    so that the nearest to a magnitude m among them is the integer part of

        F(m) = m * 10**(q - p) * 2**p / 0.9 + 8 / 9 * 2**p.

    As m grows the lines of the decades get flatter, and each crosses the next
    one before the middle between their decades: F is the least of all lines,
    whichever decade m is in. That middle, where K becomes 2**p, has the F
    2**p + 0.2, as values of two decades are farther apart than those of one.
    In the first decade, whose least value has zero below it, F is another line
    that has the same F in its first two middles.

    Attributes:
        values: ascending, as `dynamic_values` gives them, of at least 3 bits
            if signed: one decade alone has but one middle.
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

    @cached_property
    def _lines(self) -> list[tuple[float, float]]:
        """Slope and F(0) of each decade's F, from its first two middles; decade 0 has but one, and the next decade's."""
        lines = []
        for decade in self._decades:
            left, right = (self._midpoint(2**decade + i) for i in range(2))
            rise = 1 - _LATE if decade else 1.0
            slope = rise / (right - left)
            lines.append((slope, 2**decade + _LATE - slope * left))
        return lines

    def nearest(self, grouped, scale):
        """Returns the code of the value nearest to each number divided by its block's scale.

        The distance is at most the least one plus 2**-18 of the number: F(m) of
        m comes of four roundings of its first summand, s, one of the second
        and one of the sum, which are at most 8 * s and 9 * s, so that the middle
        between two values is missed by 2**-24 * (4 + 8 + 9) of m, of values
        rounded to float32 by 2**-24 * 5 more, and the distance is greater by
        twice that. Compiled code may round a product and a sum once, so that it
        may choose the other of two values as near.

        Args:
            grouped: float32 tensor (..., block_size); signs are ignored if the
                map is unsigned.
            scale: float32 tensor (...), as `absmax.py` makes them.

        Returns:
            int32 tensor (..., block_size); of NaN any number.
        """
        scaled = grouped * absmax.reciprocal(scale, _UNIT)
        magnitude = ops.abs(scaled)
        # The less of two floats, which is NaN if one is, takes a CPU three instructions, of their patterns one.
        pattern = functools.reduce(
            ops.minimum, (ops.view(magnitude * slope + start, "int32") for slope, start in self._lines)
        )
        found = ops.view(pattern, "float32")
        is_early = found - ops.view(pattern & _EXPONENT, "float32") < _LATE
        position = ops.view(found + _DOWN, "int32") - ops.cast(is_early, "int32")
        # Past the last decade's values is the one of 1, which no negative number has.
        end = self._midpoint(2 * 2 ** self._decades[-1])
        is_last = (scaled if self.zero else magnitude) > end
        position = position + ops.cast(is_last, "int32") - _INTEGERS
        if not self.zero:
            return position - self._decades[0]
        sign = ops.right_shift(ops.view(scaled, "int32"), 31)
        return (position ^ sign) - sign + (self.zero - self._decades[0])

    def decode(self, codes, target: Target = ANY):
        """Returns the float32 values of a tensor of codes, computed ones within 2**-19 of themselves."""
        # XLA on a CPU looks up 3.6e9 a second, and computes 3.1e9 (2 cores, jax 0.10.2, 4M codes). Vector instructions
        # look up 3.7e9 a second and core, and compute 9e9.
        return self._computed(codes) if target.computes else target.look_up(self.array, codes)

    def _computed(self, codes):
        """Returns the values by the greatest of the decades' lines: past the next decade each is below that one's."""
        position = ops.cast(codes, "int32") - (self.zero - self._decades[0])
        magnitude = ops.cast(ops.abs(position) if self.zero else position, "float32")
        # Patterns are compared for the reason that `nearest` gives; those of negative numbers are negative.
        patterns = (ops.view(magnitude * slope + start, "int32") for slope, start in self._value_lines)
        pattern = functools.reduce(ops.maximum, patterns, ops.zeros_like(position))
        value = ops.view(ops.minimum(pattern, _ONE), "float32")
        return ops.where(position < 0, -value, value) if self.zero else value

    @cached_property
    def _value_lines(self) -> list[tuple[float, float]]:
        """Slope and value(0) of each decade's line."""
        last = self._decades[-1]
        return [
            (0.9 / 2**decade * 10.0 ** (decade - last), (0.45 / 2**decade - 0.8) * 10.0 ** (decade - last))
            for decade in self._decades
        ]
