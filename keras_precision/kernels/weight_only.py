"""Products of activations with stored codes, and decoding, as Pallas kernels for NVIDIA GPUs (JAX only).

A program works on some columns and some rows of the weight, so that each code is read once: partial sums of several
programs are added up by XLA, which puts what follows (bias, activation) into the same pass.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from keras_precision.kernels import nibbles
from keras_precision.kernels.compiled import jitted
from keras_precision.kernels.device import MOST_PROGRAMS_ON_AN_AXIS

# Programs that fill an H100, which runs 132 times several at once: 7 for each of its multiprocessors. Measured.
_PROGRAMS = 896
# More rows take more programs, of which each expands double-quantized scales (64 rows: 80 us, 50 with float32 scales).
_LARGEST_BATCH_THAT_EXPANDS = 32
SCALES_PER_BLOCK = 256
"""Double-quantized scales that share a factor, in the order of the transposed matrix."""


@dataclass(frozen=True)
class Layout:
    """What the arrays of a stored weight mean.

    The weight is scale[i // block_size, j] * values[codes[i, j]], or
    scale[j] * codes[i, j] where codes are numbers.

    Attributes:
        shape: (k, n).
        values: 16 numbers that 4-bit codes stand for, two codes a byte, the
            even row in the high nibble; None for int8 codes.
        block_size: rows that share a scale; None for one scale a column.
        largest_scale: what no double-quantized scale exceeds; None for float32
            scales.
    """

    shape: tuple[int, int]
    values: tuple[float, ...] | None = None
    block_size: int | None = None
    largest_scale: float | None = None

    @property
    def codes_per_byte(self) -> int:
        """Rows of the weight that a row of bytes holds."""
        return 1 if self.values is None else 2

    @property
    def kind(self) -> str:
        """What decides how codes are decoded: "bytes", "whole" (16 numbers a step of 1 apart) or "table"."""
        if self.values is None:
            return "bytes"
        return "whole" if nibbles.are_whole(self.values) else "table"

    @property
    def byte_rows(self) -> int:
        """Rows of bytes."""
        return -(-self.shape[0] // self.codes_per_byte)


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        batch: rows of activations: 1 multiplies number by number, more (a
            power of two from 16 on) use matrix units.
        columns: of the weight; a power of two.
        rows: of bytes that are read at once; a power of two.
        reads: such reads a step.
        warps: of a program.
        stages: steps that matrix units' operands are fetched ahead.
        decodes_ahead: whether codes are decoded one step before their use, so
            that reading the next ones overlaps it.
    """

    batch: int
    columns: int
    rows: int
    reads: int = 1
    warps: int = 4
    stages: int = 1
    decodes_ahead: bool = False

    def fitted(self, layout: Layout) -> Tile:
        """Returns the tile with as many rows a step as share a scale."""
        if layout.block_size is None:
            return self
        in_block = max(1, layout.block_size // layout.codes_per_byte)
        rows = min(self.rows, in_block)
        return dataclasses.replace(self, rows=rows, reads=min(self.reads, in_block // rows))


def product(
    x,
    codes,
    scales: Sequence,
    layout: Layout,
    tile: Tile,
    dtype: str,
    result: str | None = None,
    interpret: bool = False,
):
    """Returns x times the weight.

    Values are rounded to `dtype`, multiplied with x exactly and added up in
    float32, where scales multiply partial sums. With u = 2**-24 and v the unit
    roundoff of `dtype`, an element differs from the exact product of x and the
    weight by at most sum |x| |weight| (v + (k + 3) u), and one more rounding to
    `dtype`; v doesn't count where values are whole numbers.

    Args:
        x: tensor (m, k) of `dtype`.
        codes: uint8 (ceil(k / 2), n), or int8 (k, n).
        scales: float32 (n_blocks, n) or (n,) alone; or uint8 (n_blocks, n),
            float32 (n_groups,), float32 () and the float32 (256,) table of
            double quantization; none at all multiplies with the codes' values.
        layout: what the arrays mean.
        tile: what a program works on.
        dtype: "float16", "bfloat16" or "float32".
        result: dtype of the result; None for the same.
        interpret: True to run the kernel on any device, slowly.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": layout, "tile": tile, "dtype": dtype, "result": result or dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), **static)


def decoded(codes, scales: Sequence, layout: Layout, tile: Tile, dtype: str, interpret: bool = False):
    """Returns the weight (k, n), computed in float32 and rounded to `dtype`.

    For 16-bit results values are rounded to float16 first, so that an element
    differs from the weight by at most (v + 2**-11) of it, v being the unit
    roundoff of `dtype`; whole numbers and int8 codes are not rounded before.

    Args:
        codes: as in `product`, with a multiple of the tile's rows and columns.
        scales: as in `product`.
        layout: what the arrays mean.
        tile: what a program works on.
        dtype: float dtype of the result.
        interpret: True to run the kernel on any device, slowly.
    """
    static = {"layout": layout, "tile": tile, "dtype": dtype, "interpret": interpret}
    return jitted(_decoded, tuple(static))(codes, tuple(scales), **static)


def can_decode(layout: Layout, tile: Tile) -> bool:
    """Returns whether the weight is made of whole tiles, as `decoded` needs it, and not of too many."""
    tile = tile.fitted(layout)
    k, n = layout.shape
    is_whole = not (k % layout.codes_per_byte or layout.byte_rows % tile.rows or n % tile.columns)
    return is_whole and layout.byte_rows // tile.rows <= MOST_PROGRAMS_ON_AN_AXIS


def _product(x, codes, scales, *, layout, tile, dtype, result, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    tile = tile.fitted(layout)
    if layout.largest_scale is not None and tile.batch > _LARGEST_BATCH_THAT_EXPANDS:
        scales, layout = _expanded_before(scales, layout)
    (k, n), (m, _), per_byte = layout.shape, x.shape, layout.codes_per_byte
    step_rows = tile.rows * tile.reads
    steps = -(-layout.byte_rows // step_rows)
    column_programs = -(-n // tile.columns)
    splits = max(1, min(steps, _PROGRAMS // (column_programs * -(-m // tile.batch))))
    steps_each = -(-steps // splits)
    splits = -(-steps // steps_each)
    # Rows beyond the last are multiplied with zeros, columns beyond the last are cut off.
    x = jnp.pad(x, ((0, -m % tile.batch), (0, splits * steps_each * step_rows * per_byte - k)))
    batch = x.shape[0]
    if tile.batch > 1:
        x = jnp.moveaxis(x.reshape(batch, -1, per_byte), 2, 0)  # matrix units take the rows of each nibble apart
    per_block = layout.block_size is not None
    factor = "float32" if tile.batch == 1 else dtype
    constants = _constants(layout)

    def kernel(x_ref, codes_ref, *refs):
        *scale_refs, values_ref, out_ref = refs
        column_program, split, row_program = (pl.program_id(axis) for axis in range(3))
        columns = _places(column_program * tile.columns, tile.columns, n)
        first = split * steps_each
        batch_rows = pl.ds(row_program * tile.batch, tile.batch)

        def fetched(step):
            start = jnp.minimum(step, first + steps_each - 1) * step_rows
            read = []
            for part in range(tile.reads):
                rows = _places(start + part * tile.rows, tile.rows, layout.byte_rows)
                read.append(_decoded_first(_tile_of(codes_ref, rows, columns), layout, dtype, interpret))
            block = jax.lax.div(jnp.minimum(start, layout.byte_rows - 1) * per_byte, layout.block_size or 1)
            return read, _scale(scale_refs, block, columns, column_program, layout, tile) if per_block else None

        def added(step, read, scale, total):
            sums = []
            for part, packed in enumerate(read):
                start = (step * tile.reads + part) * tile.rows
                values = _decoded_last(packed, values_ref, layout, dtype, factor, interpret)
                products = []
                for place, value in enumerate(values):
                    if tile.batch == 1:
                        rows = per_byte * (start + jnp.arange(tile.rows)) + place
                        products.append(value * x_ref[row_program, rows].astype(factor)[:, None])
                    else:
                        part_of_x = x_ref[place, batch_rows, pl.ds(start, tile.rows)]
                        precision = "highest" if dtype == "float32" else None
                        product = jnp.dot(part_of_x, value, precision=precision, preferred_element_type="float32")
                        products.append(product)
                # Added up a read at a time, this takes fewer registers than one after the other.
                sums.append(functools.reduce(operator.add, products))
            sums = functools.reduce(operator.add, sums)
            return total + (sums if scale is None else sums * scale[None])

        def next_step(step, carry):
            if not tile.decodes_ahead:
                return added(step, *fetched(step), carry)
            now, total = carry
            following = fetched(step + 1)
            return following, added(step, *now, total)

        total = jnp.zeros((tile.rows if tile.batch == 1 else tile.batch, tile.columns), "float32")
        carry = (fetched(first), total) if tile.decodes_ahead else total
        carry = jax.lax.fori_loop(first, first + steps_each, next_step, carry)
        total = carry[1] if tile.decodes_ahead else carry
        out = pl.ds(column_program * tile.columns, tile.columns)
        if tile.batch == 1:
            out_ref[split, row_program, out] = jnp.sum(total, axis=0)
        else:
            out_ref[split, batch_rows, out] = total

    grid = (column_programs, splits, batch // tile.batch)
    out_shape = jax.ShapeDtypeStruct((splits, batch, column_programs * tile.columns), "float32")
    sums = _call(kernel, grid, out_shape, tile, interpret)(
        x, codes, *(_vectors(scales) if per_block else ()), constants
    )
    total = jnp.sum(sums, axis=0)[:m, :n]
    return (total if per_block or not scales else total * scales[0]).astype(result)


def _decoded(codes, scales, *, layout, tile, dtype, interpret):
    import jax
    from jax.experimental import pallas as pl

    tile = tile.fitted(layout)
    per_byte = layout.codes_per_byte
    byte_rows, n = codes.shape

    def kernel(codes_ref, *refs):
        *scale_refs, values_ref, out_ref = refs
        column_program, row_program = pl.program_id(0), pl.program_id(1)
        start, columns = row_program * tile.rows, pl.ds(column_program * tile.columns, tile.columns)
        packed = codes_ref[pl.ds(start, tile.rows), columns]
        if _uses_registers(layout, dtype, interpret):
            values = nibbles.unpacked(nibbles.pairs(packed, layout.values, "float16"), "float16", "float32")
        else:
            values = _looked_up(packed, values_ref, layout)
        block = jax.lax.div(start * per_byte, layout.block_size or layout.shape[0])
        scale = _scale(scale_refs, block, columns, column_program, layout, tile)[None]
        for place, value in enumerate(values):
            out_ref[pl.ds(start, tile.rows), place, columns] = (value * scale).astype(dtype)

    grid = (n // tile.columns, byte_rows // tile.rows)
    out_shape = jax.ShapeDtypeStruct((byte_rows, per_byte, n), dtype)
    weight = _call(kernel, grid, out_shape, tile, interpret)(codes, *_vectors(scales), _constants(layout))
    return weight.reshape(byte_rows * per_byte, n)


def _call(kernel, grid, out_shape, tile, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    parameters = None if interpret else triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, grid=grid, out_shape=out_shape, interpret=interpret, compiler_params=parameters)


def _vectors(scales):
    """Returns the arrays with at least one axis: kernels take no others."""
    return [scale.reshape(scale.shape or (1,)) for scale in scales]


def _constants(layout):
    """Returns the values of codes as an array: kernels take no other constants."""
    import jax.numpy as jnp

    return jnp.asarray(layout.values if layout.values is not None else (0.0,) * 16, "float32")


def _places(start, size, end):
    """Returns the indices start..start + size; where `end` is no multiple of the size, those beyond are the last one."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    if end % size == 0:
        return pl.ds(start, size)
    return jnp.minimum(start + jnp.arange(size), end - 1)


def _tile_of(ref, rows, columns):
    """Returns rows and columns of a matrix, each a slice or indices."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    if isinstance(rows, pl.Slice) and isinstance(columns, pl.Slice):
        return ref[rows, columns]
    rows, columns = (
        places.start + jnp.arange(places.size) if isinstance(places, pl.Slice) else places for places in (rows, columns)
    )
    return ref[rows[:, None], columns[None, :]]


def _scale(refs, block, columns, column_program, layout, tile):
    """Returns the float32 scales of a block of rows."""
    import jax.numpy as jnp

    if layout.block_size is None:
        return refs[0][columns]
    if layout.largest_scale is None:
        return refs[0][block, columns]
    codes_ref, *others = refs
    column = jnp.minimum(column_program * tile.columns + jnp.arange(tile.columns), codes_ref.shape[1] - 1)
    return _expanded(codes_ref[block, columns], block, column, codes_ref.shape[0], *others, layout)


def _expanded(codes, block, column, n_blocks, absmax, offset, table, layout):
    """Returns the scales of double-quantized codes in these places; see `formats.double_quant.decode`."""
    import jax.numpy as jnp

    largest, offset = layout.largest_scale, offset[0]
    product = table[codes.astype("int32")] * absmax[(column * n_blocks + block) // SCALES_PER_BLOCK]
    return jnp.maximum(jnp.minimum(product, largest - offset), -largest - offset) + offset


def _expanded_before(scales, layout):
    """Returns all float32 scales and the layout of a weight that has them."""
    import jax.numpy as jnp

    codes, *others = _vectors(scales)
    n_blocks, n = codes.shape
    found = _expanded(codes, jnp.arange(n_blocks)[:, None], jnp.arange(n)[None], n_blocks, *others, layout)
    return (found,), dataclasses.replace(layout, largest_scale=None)


def _uses_registers(layout, dtype, interpret):
    return layout.values is not None and dtype != "float32" and not interpret


def _decoded_first(packed, layout, dtype, interpret):
    """Returns what is kept of bytes until their use."""
    if _uses_registers(layout, dtype, interpret):
        return nibbles.pairs(packed, layout.values, dtype)
    return packed


def _decoded_last(packed, values_ref, layout, dtype, result, interpret):
    """Returns the values of what `_decoded_first` returned, rounded to `dtype`, a tile for each code of a byte."""
    if _uses_registers(layout, dtype, interpret):
        return nibbles.unpacked(packed, dtype, result)
    return [value.astype(dtype).astype(result) for value in _looked_up(packed, values_ref, layout)]


def _looked_up(packed, values_ref, layout):
    """Returns the float32 values of bytes."""
    if layout.values is None:
        return [packed.astype("float32")]
    packed = packed.astype("int32")
    return [values_ref[packed >> 4], values_ref[packed & 15]]
