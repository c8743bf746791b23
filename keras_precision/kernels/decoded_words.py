"""PTX that turns the codes in a word into pairs of 16-bit weights, in kernels for Mosaic GPU (JAX only).

Numbers are float32, multiplied by scales as such, and rounded once.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import lanes
from keras_precision.kernels.layout import Layout


class Codes(abc.ABC):
    """Codes in words, counted from the lowest bits.

    Attributes:
        operands: registers of a lane that decoding takes beside the word.
        takes_all_lanes: whether all lanes of a warp decode at once.
    """

    operands: Sequence[Any] = ()
    takes_all_lanes = False

    @abc.abstractmethod
    def prepared(self, word: str) -> list[str]:
        """Returns what is done once with a word."""

    @abc.abstractmethod
    def number(self, target: str, place: int, word: str, operands: Sequence[str]) -> list[str]:
        """Returns what makes a number of a code.

        Args:
            target: register.
            place: of the code.
            word: as given to `prepared`.
            operands: names of `operands`.
        """


class Bytes(Codes):
    """int8 codes."""

    def prepared(self, word):
        return [".reg .b32 codes;", f"xor.b32 codes, {word}, 0x80808080;"]

    def number(self, target, place, word, operands):
        return _of_byte(target, "codes", place, 128)


class WholeNibbles(Codes):
    """4-bit codes of numbers in a row, computed: that leaves shared memory's unit, which looks up too, to matrix units."""

    def __init__(self, least: float):
        self.least = int(least)

    def prepared(self, word):
        lines = [".reg .b32 low, high;", f"and.b32 low, {word}, 0x0f0f0f0f;"]
        return [*lines, f"shr.u32 high, {word}, 4;", "and.b32 high, high, 0x0f0f0f0f;"]

    def number(self, target, place, word, operands):
        return _of_byte(target, ("low", "high")[place % 2], place // 2, -self.least)


class LookedUpNibbles(Codes):
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
        # Only the code's four bits count; those above are ignored.
        of_16_lanes, all_lanes = "0x101f", "0xffffffff"
        look_up = f"shfl.sync.idx.b32 {target}, {operands[0]}, code, {of_16_lanes}, {all_lanes};"
        return [f"shr.u32 code, {word}, {4 * place};", look_up]


def codes_of(layout: Layout, lane, looks_up: bool) -> Codes:
    """Returns how a weight's codes are decoded.

    Args:
        layout: of the weight.
        lane: `lanes.Lane`.
        looks_up: whether 4-bit codes are looked up if they can be computed too.
    """
    if layout.values is None:
        return Bytes()
    if code_values.are_whole(layout.values) and not looks_up:
        return WholeNibbles(layout.values[0])
    return LookedUpNibbles(layout.values, lane)


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
        for target, (place, scale) in zip(("first", "second"), pair, strict=True):
            lines += codes.number(target, place, names[0], own)
            lines += [f"mul.f32 {target}, {target}, {factors[scale]};"] if factors else []
        lines += [f"cvt.rn.{lanes.PAIRS[dtype]}.f32 ${result}, second, first;"]
    return lanes.assembly(lines, inputs, len(pairs), has_side_effects=codes.takes_all_lanes)


def _of_byte(target, word, byte, bias):
    """Returns what makes a number of a byte less a bias."""
    # With the byte in its mantissa's low bits it is 2**23 and the byte, of which 2**23 and the bias are taken.
    constant = np.float32(-(2**23) - bias).view("uint32")
    return [f"prmt.b32 {target}, {word}, 0x4b000000, 0x744{byte};", f"add.f32 {target}, {target}, 0f{constant:08x};"]
