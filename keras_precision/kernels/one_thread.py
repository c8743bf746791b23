"""One thread's part in a product of few rows of activations with stored codes (JAX only).

A thread reads 8 or 16 bytes of each of its rows, some rows ahead, and decodes them where the instruction `mma` wants
them: which columns of the weight are rows of its left operand, and in which order k is added up, is free. A byte's two
values are looked up at once in shared memory, where each lane has a table in a bank of its own. Values are multiplied
with x before scales are, a block at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from keras_precision.kernels import byte_table, lanes
from keras_precision.kernels.layout import Layout, group_in_registers

BYTE_ROWS = 32
"""Rows of bytes that a warp works on between scales."""
_LANES = 32
_EIGHT = 8  # rows of x that one instruction multiplies, and threads that read a row of bytes side by side
_OF_SCALES = 1  # which of the two tables that share entries
DTYPES = ("float16", "bfloat16", lanes.INT8)


@dataclass(frozen=True)
class Warps:
    """What one program works on.

    Attributes:
        columns: of the weight, 64 or 128.
        width: bytes of a row that a thread reads at once, 8 or 16; eight
            threads side by side do, so that a warp has 8 times as many
            columns, which must be a program's or fewer.
        warps: 4, 8 or 16, of which those that have the same columns share k.
        ahead: times 32 rows of bytes that each warp reads before it needs them.
        programs: so many run, or fewer, where k may be split; an H100 has 132
            multiprocessors.
    """

    columns: int = 128
    width: int = 8
    warps: int = 16
    ahead: int = 1
    programs: int = 132

    def __post_init__(self):
        is_known = self.columns in (64, 128) and self.width in (8, 16) and self.warps in (4, 8, 16)
        if not is_known or self.columns % (_EIGHT * self.width):
            raise ValueError(
                "Invalid `Warps`. Expected `columns` 64 or 128, `width` 8 or 16 and at most an eighth of them, and "
                f"`warps` 4, 8 or 16. Received: {self}."
            )

    @property
    def sharing(self) -> int:
        """Warps that have the same columns."""
        return self.warps * _EIGHT * self.width // self.columns


def _has_tables(layout):
    return layout.values is not None or layout.largest_scale is not None


def shared_words(layout, warps, m):
    """Returns the words of shared memory: the table, in whose place sums are later."""
    sums = warps.warps * _LANES * warps.width * 2 * -(-m // _EIGHT)
    return max(sums, 256 * byte_table.ENTRY_BYTES // 4 if _has_tables(layout) else 0)


def multiply(
    t: Any,
    strip,
    part,
    shared,
    x,
    codes,
    *references,
    layout: Layout,
    warps: Warps,
    dtype: str,
    m: int,
    result: str,
    steps: int,
) -> None:
    """Does one thread's part.

    Args:
        t: `Thread`, or an object that computes in its place.
        strip: int32, which columns are the program's.
        part: int32, which part of k is.
        shared: reference to words of shared memory, as many as `shared_words`.
        x: reference to (m, k) of `dtype`.
        codes: reference to the codes.
        *references: to scales, if there are any: as `layout.scales_at` takes
            them, or float32 ones of columns and, after these, of rows of x;
            and to the result (parts, m, n).
        layout: of the weight.
        warps: what the program works on.
        dtype: "float16", "bfloat16" or `lanes.INT8`.
        m: rows of x.
        result: dtype of the result.
        steps: of a part, `BYTE_ROWS` rows of bytes each.
    """
    *scales, out = references
    threads = _Places(t, strip, part, layout, warps, m, steps, 1 if dtype == lanes.INT8 else 2)
    per_block = bool(scales) and layout.block_size is not None
    read = functools.partial(_read, t, threads, x, codes, scales if per_block else [])
    places = [(place, half) for place in range(warps.ahead) for half in range(2)]
    first = [read(0, *place) for place in places]
    tables = _filled(t, shared, None if layout.largest_scale is None else scales[-1], threads, dtype)
    # Of all scales, what double quantization subtracted.
    offset = t.load(scales[2], 0, 0, 1)[0] if layout.largest_scale is not None else None
    n_sums = 2 * warps.width * threads.row_groups

    def step(turn, carried):
        carried = iter(carried)
        sums = [next(carried) for _ in range(n_sums)]
        held = [_Half(*([next(carried) for _ in group] for group in half)) for half in first]
        for i, place in enumerate(places):
            following = read(t.add(turn, 1), *place)  # before what was read is used: nf4 takes 14.4 us, else 17.5
            if i % 2 == 0:
                of_columns = _scales(t, held[i + 1].scales, offset, threads, tables)
            sums = _added(t, sums, held[i], of_columns, threads, dtype, tables)
            held[i] = following
        return [*sums, *_flat(held)]

    pairs = _pairs_to_write(t, threads, n_sums, [] if per_block else scales)
    zeros = [t.zero()] * n_sums
    sums = t.loop(threads.rounds, step, [*zeros, *_flat(first)])[:n_sums]
    _write(t, shared, out, sums, pairs, threads, dtype, result)


class _Half(NamedTuple):
    """What a thread has read of a half of a step, and with the second half the scales of both."""

    words: list
    of_x: list
    scales: list


def _flat(halves):
    return [word for half in halves for group in half for word in group]


class _Places:
    """Where a thread's numbers are, of which most are the same in each round."""

    def __init__(self, t, strip, part, layout, warps, m, steps, x_bytes):
        (k, self.n), self.layout, self.warps, self.m = layout.shape, layout, warps, m
        self.row_groups = -(-m // _EIGHT)
        self.pairs = warps.width // 2  # of columns that a thread has
        self.rows = BYTE_ROWS * layout.codes_per_byte
        self.rounds = -(-steps // (warps.sharing * warps.ahead))
        self.warp, self.lane = t.shift_right(t.index, 5), t.bits_and(t.index, _LANES - 1)
        self.g, self.quarter = t.shift_right(self.lane, 2), t.bits_and(self.lane, 3)
        group, self.own = t.quotient(self.warp, warps.sharing), t.remainder(self.warp, warps.sharing)
        self.first_warp = t.times(group, warps.sharing)
        of_group = t.add(t.times(group, _EIGHT * warps.width), t.times(self.g, warps.width))
        self.column = t.add(t.times(strip, warps.columns), of_group)
        self.part, first_step = part, t.times(part, steps)
        self.step = t.add(first_step, self.own)
        self.end = t.least(t.add(first_step, steps), k // self.rows)
        # Each quarter of a warp has 4 rows of bytes that follow each other.
        byte_row = t.add(t.times(self.step, BYTE_ROWS), t.times(self.quarter, 4))
        self.code = t.add(t.times(byte_row, self.n), self.column)
        # Words of x that a thread multiplies with 4 rows of bytes, and its bytes for each of them.
        self.words_of_x = x_bytes * layout.codes_per_byte
        self.row_bytes = x_bytes * k
        self.of_x = t.add(t.times(self.g, self.row_bytes), t.times(byte_row, self.words_of_x))


def _read(t, threads, x, codes, scales, turn, place, half):
    """Returns what a thread needs of a half of a step, zeros beyond the last."""
    warps, layout, n, words_of_x = threads.warps, threads.layout, threads.n, threads.words_of_x
    steps_on = t.times(turn, warps.ahead * warps.sharing)
    byte_rows = place * warps.sharing * BYTE_ROWS + half * BYTE_ROWS // 2  # further
    step = t.add(t.add(threads.step, steps_on), place * warps.sharing)
    exists = t.is_less(step, threads.end)
    at = t.add(threads.code, t.times(steps_on, BYTE_ROWS * n))
    words = [word for j in range(4) for word in t.load(codes, at, (byte_rows + j) * n, warps.width // 4, exists)]
    at = t.add(threads.of_x, t.times(steps_on, BYTE_ROWS * words_of_x))
    of_x, of_blocks = [], []
    for group in range(threads.row_groups):
        is_row = t.is_less(t.add(threads.g, _EIGHT * group), threads.m)
        offset = group * _EIGHT * threads.row_bytes + words_of_x * byte_rows
        of_x += t.load(x, at, offset, words_of_x, t.bits_and(exists, is_row), keeps=True)
    if scales and half == 1:
        block = t.quotient(step, layout.block_size // threads.rows)
        first = t.add(t.times(block, n), threads.column)
        if layout.largest_scale is None:
            at = t.times(first, 4)
            of_blocks = [word for i in range(0, warps.width, 4) for word in t.load(scales[0], at, 4 * i, 4, exists)]
        else:
            of_blocks = t.load(scales[0], first, 0, warps.width // 4, exists)
            for i in range(warps.width):
                group = group_in_registers(t, block, t.add(threads.column, i), layout)
                of_blocks += t.load(scales[1], t.times(group, 4), 0, 1, exists, keeps=True)
    return _Half(words, of_x, of_blocks)


def _scales(t, words, offset, threads, tables):
    """Returns the float32 scales of a thread's columns, none if sums are scaled at the end."""
    largest, width = threads.layout.largest_scale, threads.warps.width
    if largest is None:
        return words
    codes, factors = words[:-width], words[-width:]
    values = [_looked_up(t, codes[i // 4], i % 4, tables, _OF_SCALES) for i in range(width)]
    return [t.expanded_scale(*both, offset, largest) for both in zip(values, factors, strict=True)]


def _added(t, sums, half, scales, threads, dtype, tables):
    """Returns sums, for each group of rows of x 4 for each pair of columns, and what a half of a step adds."""
    found, width = [], threads.warps.width
    operands = [_operands(t, half.words, pair, width, threads.layout, dtype, tables) for pair in range(threads.pairs)]
    each = threads.words_of_x // len(operands[0])
    for group in range(threads.row_groups):
        of_x = half.of_x[threads.words_of_x * group :]
        for pair in range(threads.pairs):
            own = sums[len(found) : len(found) + 4]
            total = [t.zero()] * 4 if scales else own
            for place, operand in enumerate(operands[pair]):
                total = t.matrix_product(total, operand, of_x[each * place : each * (place + 1)], dtype)
            if scales:
                of_columns = [scales[2 * pair + i // 2] for i in range(4)]
                total = map(t.multiplied_and_added, total, of_columns, own)
            found += total
    return found


class _Pair(NamedTuple):
    """Two columns of a row of x whose sums a thread adds up: which of a warp's sums, where they belong, what scales them."""

    register: Any
    row: Any
    column: Any
    exists: Any
    factors: list


def _pairs_to_write(t, threads, n_sums, scales):
    """Returns what of the result a thread will write; scales are read now, when there is time."""
    found, units, sharing = [], n_sums // 2, threads.warps.sharing
    for first in range(0, units, sharing):
        unit = t.add(threads.own, first)
        exists = t.is_less(unit, units)
        unit = t.least(unit, units - 1)
        which, odd = t.shift_right(unit, 1), t.bits_and(unit, 1)
        row = t.add(t.add(t.times(t.quotient(which, threads.pairs), _EIGHT), t.times(threads.quarter, 2)), odd)
        column = t.add(threads.column, t.times(t.remainder(which, threads.pairs), 2))
        exists = t.bits_and(exists, t.is_less(row, threads.m))
        factors = [t.load(array, t.times(column, 4), 0, 2) for array in scales[:1]]
        factors += [t.load(array, t.times(row, 4), 0, 1, exists) * 2 for array in scales[1:]]
        found.append(_Pair(t.add(t.times(which, 4), odd), row, column, exists, factors))
    return found


def _write(t, shared, out, sums, pairs, threads, dtype, result):
    """Adds up what warps have of the same columns, and stores it."""
    word_bytes = 4 * _LANES
    of_lane = t.times(threads.lane, 4)
    t.barrier()  # no one needs the table any longer
    own = t.add(t.times(threads.warp, len(sums) * word_bytes), of_lane)
    for place, value in enumerate(sums):
        t.store_shared(shared, own, value, place * word_bytes)
    t.barrier()
    for pair in pairs:
        register = t.add(t.times(threads.first_warp, len(sums)), pair.register)
        offset = t.add(t.times(register, word_bytes), of_lane)
        numbers = []
        for column in range(2):
            places = range(2 * column, threads.warps.sharing * len(sums), len(sums))
            parts = [t.load_shared(shared, offset, place * word_bytes) for place in places]
            if dtype == lanes.INT8:
                numbers.append(t.number_of(functools.reduce(t.add, parts)))
            else:
                numbers.append(functools.reduce(t.added, parts))
        for factors in pair.factors:
            numbers = list(map(t.multiplied, numbers, factors))
        row = t.add(pair.row, t.times(threads.part, threads.m))
        size = 4 if result == "float32" else 2
        t.store_pair(out, t.times(t.add(t.times(row, threads.n), pair.column), size), numbers, pair.exists, result)


def _operands(t, words, pair, width, layout, dtype, tables):
    """Returns left operands of a pair of columns: both columns' weights in two rows of bytes, 4 registers, or twice that."""
    per_row = width // 4
    rows = [words[row * per_row + pair // 2] for row in range(4)]
    bytes_of_pair = [2 * (pair % 2), 2 * (pair % 2) + 1]
    if layout.values is None:
        # Bytes of two rows side by side, of both columns.
        (a, b), (c, d) = bytes_of_pair, [4 + byte for byte in bytes_of_pair]
        selector = a | c << 4 | b << 8 | d << 12
        both = [t.permute(rows[first], rows[first + 1], selector) for first in (0, 2)]
        if dtype == lanes.INT8:
            return [[t.permute(*both, chosen) for chosen in (0x5410, 0x7632)]]
        return [[_of_bytes(t, of_rows, place, dtype) for of_rows in both for place in (0, 2)]]
    values = [[_looked_up(t, word, byte, tables) for byte in bytes_of_pair] for word in rows]
    return [[*values[0], *values[1]], [*values[2], *values[3]]]


def _of_bytes(t, both, place, dtype):
    """Returns the pair of floats of the int8 codes in a word's bytes `place` and the next."""
    if dtype == "float16":  # 1024 + 128 + code, less that
        found = t.permute(t.exclusive_or(both, 0x80808080), 0x64646464, 0x4040 | place | place + 1 << 8)
        return t.pairs_subtracted(found, 0x64806480, dtype)
    # 128 + the code's low 7 bits, less 128, or 256 where the code is negative.
    found = t.permute(both, 0x43434343, 0x4040 | place | place + 1 << 8)
    return t.pairs_subtracted(t.bits_and(found, 0xFF7FFF7F), t.bits_and(found, 0xFF80FF80), dtype)


def _looked_up(t, word, byte, tables, which=0):
    """Returns what a table has for a byte of a word: a pair of values, the high nibble's in the lower half, or a scale."""
    shared, places = tables
    return t.load_shared(shared, t.permute(word, places[which], byte_table.selector(byte)))


def _filled(t, shared, scale_table, threads, dtype):
    """Fills each lane's tables of bytes' values; returns what `_looked_up` reads, None if there are none."""
    layout, warps = threads.layout, threads.warps
    if not _has_tables(layout):
        return None
    places = [t.add(t.times(threads.lane, 4), which * byte_table.ENTRY_BYTES // 2) for which in range(2)]
    of_warp = t.times(threads.warp, byte_table.ENTRY_BYTES)
    own = t.choose([float(value) for value in layout.values], threads.lane) if layout.values is not None else None
    for first in range(0, 256, warps.warps):
        byte, entry = t.add(threads.warp, first), first * byte_table.ENTRY_BYTES
        if layout.values is not None:
            high, low = (t.from_lane(own, code) for code in (t.shift_right(byte, 4), t.bits_and(byte, 15)))
            t.store_shared(shared, t.add(of_warp, places[0]), t.pair_of(high, low, dtype), entry)
        if scale_table is not None:
            (scale,) = t.load(scale_table, t.times(byte, 4), 0, 1, keeps=True)
            t.store_shared(shared, t.add(of_warp, places[_OF_SCALES]), scale, entry)
    t.barrier()
    return shared, places
