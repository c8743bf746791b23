"""A codebook's values by bytes, in shared memory: a lane looks up both of a byte's values at once (JAX only).

Values are float16. Each lane has a table in a bank of its own, so that lanes never wait for each other, and entries are
256 bytes apart, so that one instruction (`prmt`) makes an address of a byte in a word and a lane's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import lanes

ENTRY_BYTES = 256
SHAPE = 256, ENTRY_BYTES // 4
"""Of float32 words, 64 KiB: a lane has the first half's word of its number in an entry."""


def selector(byte: int) -> int:
    """Returns what makes `prmt` of a word and a lane's place the address of the entry of one of the word's bytes."""
    return 0x7704 | byte << 4


def can_hold(values: Sequence[float]) -> bool:
    """Returns whether float16 differs from no value by more than 2**-11 of it."""
    magnitudes = np.abs(np.array(values))
    info = np.finfo(np.float16)
    return bool(np.all((magnitudes == 0) | (magnitudes >= info.tiny) & (magnitudes <= info.max)))


def fill(table, values: Sequence[float], warps: int) -> None:
    """Fills a table; a share of it is done by each warp of the calling warpgroups.

    Args:
        table: reference to shared memory of `SHAPE`.
        values: 16 numbers.
        warps: that call this, the program's first ones.
    """
    lane = lanes.Lane()
    warp = lanes.shift_right(lanes.thread_index(), 5)
    own = lanes.choose([float(value) for value in values], lane.lane)
    first, of_lane = place(table, lane)
    address = lanes.add(lanes.add(first, of_lane), lanes.times(warp, ENTRY_BYTES))
    lines = [".reg .b32 code, both; .reg .f32 high, low;"]
    for byte in range(0, SHAPE[0], warps):
        lines += [f"add.u32 code, $2, {byte};", code_values.asked_for("low", "$1", "code")]
        lines += ["shr.u32 code, code, 4;", code_values.asked_for("high", "$1", "code")]
        lines += ["cvt.rn.f16x2.f32 both, low, high;", f"st.shared.b32 [$0+{byte * ENTRY_BYTES}], both;"]
    lanes.assembly(lines, [address, own, warp], 0, has_side_effects=True)


def place(table, lane) -> list:
    """Returns where a table is, and where a lane's place is in an entry: what `looked_up` takes."""
    return [lanes.address(table), lanes.shift_left(lane.lane, 2)]


def looked_up(targets: Sequence[str], word: str, byte: int, operands: Sequence[str]) -> list[str]:
    """Returns PTX that looks up a byte of a word; it uses registers `entry` (32 bits), `upper` and `lower` (16 bits).

    Args:
        targets: float32 registers for the high nibble's value and the low one's.
        word: register.
        byte: which of it.
        operands: registers with what `place` returns.
    """
    first, of_lane = operands
    lines = [f"prmt.b32 entry, {word}, {of_lane}, {selector(byte):#x};", f"add.u32 entry, entry, {first};"]
    lines += ["ld.shared.b32 entry, [entry];", "mov.b32 {lower, upper}, entry;"]
    return lines + [f"cvt.f32.f16 {target}, {half};" for target, half in zip(targets, ("lower", "upper"), strict=True)]
