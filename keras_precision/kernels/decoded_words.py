"""PTX that turns the codes in a word into pairs of 16-bit weights, in kernels for Mosaic GPU (JAX only).

Numbers are float32, multiplied by scales as such, and rounded once; or, where that takes less time, 16-bit floats, two
a register, multiplied by scales of two bfloat16 parts.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_precision.kernels import byte_table, lanes
from keras_precision.kernels import codes as code_values
from keras_precision.kernels.layout import Layout


class Codes(abc.ABC):
    """Codes in words, counted from the lowest bits.

    Attributes:
        operands: registers of a lane that `numbers` takes beside the word.
        takes_all_lanes: whether all lanes of a warp decode at once.
    """

    operands: Sequence[Any] = ()
    takes_all_lanes = False

    @abc.abstractmethod
    def prepared(self, word: str) -> list[str]:
        """Returns what is done once with a word."""

    @abc.abstractmethod
    def numbers(self, targets: Sequence[str], places: Sequence[int], word: str, operands: Sequence[str]) -> list[str]:
        """Returns what makes float32 numbers of the codes of a pair.

        Args:
            targets: registers.
            places: of the codes.
            word: as given to `prepared`.
            operands: names of `operands`.
        """


class SingleCodes(Codes):
    """Codes that are decoded one by one."""

    def numbers(self, targets, places, word, operands):
        pairs = zip(targets, places, strict=True)
        return [line for target, place in pairs for line in self.number(target, place, word, operands)]

    @abc.abstractmethod
    def number(self, target: str, place: int, word: str, operands: Sequence[str]) -> list[str]:
        """Returns what makes a number of one code."""


class WholeNumbers(SingleCodes):
    """Codes of numbers in a row, computed: that leaves shared memory's unit, which looks up too, to matrix units.

    Attributes:
        bias: what a code is more than its number.
        registers: two that `prepared` leaves, with a code a byte.
        zero: what makes `prmt` of them pick a byte of zeros.
    """

    bias: int
    registers: tuple[str, str]
    zero: int

    def __init__(self):
        self.operands = [lanes.kept(int(np.float32(2**23).view("uint32")))]

    @abc.abstractmethod
    def source(self, place: int) -> tuple[int, int]:
        """Returns which of the registers has a code, and in which byte."""

    def number(self, target, place, word, operands):
        # With the code in its mantissa's low bits it is 2**23 and the code, of which 2**23 and the bias are taken.
        which, byte = self.source(place)
        constant = np.float32(-(2**23) - self.bias).view("uint32")
        combine = f"prmt.b32 {target}, {self.registers[which]}, {operands[0]}, 0x744{byte};"
        return [combine, f"add.f32 {target}, {target}, 0f{constant:08x};"]


class Bytes(WholeNumbers):
    """int8 codes."""

    bias, registers, zero = 128, ("codes", "0"), 4

    def prepared(self, word):
        return [".reg .b32 codes;", f"xor.b32 codes, {word}, 0x80808080;"]

    def source(self, place):
        return 0, place


class WholeNibbles(WholeNumbers):
    """4-bit codes."""

    registers, zero = ("low", "high"), 8  # the sign, of a byte less than 16

    def __init__(self, least: float):
        super().__init__()
        self.bias = -int(least)

    def prepared(self, word):
        lines = [".reg .b32 low, high;", f"and.b32 low, {word}, 0x0f0f0f0f;"]
        return [*lines, f"shr.u32 high, {word}, 4;", "and.b32 high, high, 0x0f0f0f0f;"]

    def source(self, place):
        return place % 2, place // 2


class LookedUpNibbles(SingleCodes):
    """4-bit codes of a codebook, whose value lies in the lane whose number modulo 16 is the code.

    Two lookups in bytes of registers take a third more instructions (H100, 16
    rows: 27 us, 21 with lanes), and half of each no less.
    """

    takes_all_lanes = True

    def __init__(self, values: Sequence[float], lane):
        self.operands = [lanes.choose([float(value) for value in values], lane.lane)]

    def prepared(self, word):
        return [".reg .b32 code;"]

    def number(self, target, place, word, operands):
        return [f"shr.u32 code, {word}, {4 * place};", code_values.asked_for(target, operands[0], "code")]


class TabledNibbles(Codes):
    """4-bit codes of a codebook, both of a byte looked up at once; see `byte_table`.

    Words come from reads that keep their order (`Lane.matrices`), after the
    table is filled, so that lookups come after that too.
    """

    def __init__(self, table, lane):
        self.operands = byte_table.place(table, lane)

    def prepared(self, word):
        return [".reg .b32 entry; .reg .b16 lower, upper;"]

    def numbers(self, targets, places, word, operands):
        (byte,) = {place // 2 for place in places}
        return byte_table.looked_up(targets if places[0] % 2 else targets[::-1], word, byte, operands)


def codes_of(layout: Layout, lane, table=None) -> Codes:
    """Returns how a weight's codes are decoded.

    Args:
        layout: of the weight.
        lane: `lanes.Lane`.
        table: reference to what `byte_table.fill` has filled; None if nothing was.
    """
    if layout.values is None:
        return Bytes()
    if code_values.are_whole(layout.values):
        return WholeNibbles(layout.values[0])
    return LookedUpNibbles(layout.values, lane) if table is None else TabledNibbles(table, lane)


def rounded_pairs(codes: Codes, word, pairs: Sequence[tuple], scales: Sequence, dtype: str) -> list:
    """Returns registers of two weights each, rounded to `dtype`, the first in the lower half.

    Args:
        codes: what the word has.
        word: int32.
        pairs: of weights, each of which is (place of its code, place of its
            scale among `scales`).
        scales: float32 registers; none for ones.
        dtype: "float16" or "bfloat16".
    """
    inputs = [word, *codes.operands, *scales]
    names = [f"${len(pairs) + place}" for place in range(len(inputs))]
    own, factors = names[1 : 1 + len(codes.operands)], names[1 + len(codes.operands) :]
    lines = [".reg .f32 first, second;", *codes.prepared(names[0])]
    for result, pair in enumerate(pairs):
        targets = "first", "second"
        lines += codes.numbers(targets, [place for place, _ in pair], names[0], own)
        for target, (_, scale) in zip(targets, pair, strict=True):
            lines += [f"mul.f32 {target}, {target}, {factors[scale]};"] if factors else []
        lines += [f"cvt.rn.{lanes.PAIRS[dtype]}.f32 ${result}, second, first;"]
    return lanes.assembly(lines, inputs, len(pairs), has_side_effects=codes.takes_all_lanes)


# By what to multiply a 16-bit float in whose lowest bits a whole number stands, and how many times less than the number
# that is. (Also subnormal ones, which those are, are multiplied exactly.)
_POWERS = {"float16": (2.0**15, 2.0**9), "bfloat16": (2.0**127, 2.0**6)}


def multiplies_pairs(codes: Codes, dtype: str, has_scales: bool) -> bool:
    """Returns whether `multiplied_pairs` is for such codes: float16 hasn't the range for parts of any scale."""
    return isinstance(codes, WholeNumbers) and (dtype == "bfloat16" or not has_scales)


def parts_of(scale) -> list:
    """Returns two registers, each with a bfloat16 number twice, that add up to a scale times 64, but for 2**-16 of it.

    Args:
        scale: float32; of magnitudes from 2**-124 to 2**121 this is true, and NaN and zero stay.
    """
    unit = np.float32(_POWERS["bfloat16"][1]).view("uint32")
    lines = [".reg .f32 scaled, rest;", ".reg .b32 upper;", f"mul.f32 scaled, $2, 0f{unit:08x};"]
    lines += ["cvt.rn.bf16x2.f32 $0, scaled, scaled;", "and.b32 upper, $0, 0xffff0000;"]
    lines += ["sub.f32 rest, scaled, upper;", "cvt.rn.bf16x2.f32 $1, rest, rest;"]
    return lanes.assembly(lines, [scale], 2)


def multiplied_pairs(codes: WholeNumbers, word, pairs: Sequence[tuple], scales: Sequence, dtype: str) -> list:
    """Returns what `rounded_pairs` does, of weights that may differ before they are rounded.

    By at most 2**-15 of themselves, from magnitudes of 2**-118 on; without
    scales they are exact.

    Args:
        codes: see `multiplies_pairs`.
        word: int32.
        pairs: as in `rounded_pairs`, but both weights of a pair have the same scale.
        scales: what `parts_of` makes of them.
        dtype: "float16" or "bfloat16".
    """
    kind, (power, unit) = lanes.PAIRS[dtype], _POWERS[dtype]
    factors = [f"${len(pairs) + 1 + place}" for place in range(2 * len(scales))]
    lines = [".reg .b32 both, power, bias, unit;", *codes.prepared(f"${len(pairs)}")]
    constants = {"power": power, "bias": -codes.bias / unit} | ({} if scales else {"unit": unit})
    lines += [f"mov.b32 {name}, {_twice(constant, dtype)};" for name, constant in constants.items()]
    for result, ((first, scale), (second, _)) in enumerate(pairs):
        low, high = (4 * which + byte for which, byte in map(codes.source, (first, second)))
        selector = low | codes.zero << 4 | high << 8 | codes.zero << 12
        lines += [f"prmt.b32 both, {', '.join(codes.registers)}, {selector:#x};"]
        lines += [f"fma.rn.{kind} both, both, power, bias;"]
        if not scales:
            lines += [f"mul.rn.{kind} ${result}, both, unit;"]
            continue
        upper, rest = factors[2 * scale : 2 * scale + 2]
        lines += [f"mul.rn.{kind} ${result}, both, {rest};", f"fma.rn.{kind} ${result}, both, {upper}, ${result};"]
    return lanes.assembly(lines, [word, *(part for parts in scales for part in parts)], len(pairs))


def _twice(number, dtype):
    """Returns the bits of two 16-bit floats."""
    import jax.numpy as jnp

    return f"{int(np.full(2, number, jnp.dtype(dtype)).view('uint32')[0]):#x}"
