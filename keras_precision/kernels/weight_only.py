"""Products of some rows of activations with stored codes, and decoding, as Pallas kernels for NVIDIA GPUs (JAX only).

A program works on some columns and some rows of the weight, so that each code is read once: partial sums of several
programs are added up by XLA, which puts what follows (bias, activation) into the same pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import device
from keras_precision.kernels.compiled import jitted, triton_call
from keras_precision.kernels.device import MOST_PROGRAMS_ON_AN_AXIS
from keras_precision.kernels.layout import Layout, scales_at, vectors, with_plain_scales
from keras_precision.kernels.partial_sums import added, places, split

# More rows take more programs, of which each expands double-quantized scales (64 rows: 80 us, 50 with float32 scales).
_LARGEST_BATCH_THAT_EXPANDS = 32
_BITS_OF_TF32 = 11  # significant ones


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        batch: rows of activations, a power of two from 16 on; decoding has
            none.
        columns: of the weight; a power of two.
        rows: of bytes that are read at once; a power of two.
        reads: such reads a step.
        warps: of a program.
        stages: steps that matrix units' operands are fetched ahead.
        decodes_ahead: whether codes are decoded one step before their use, so
            that reading the next ones overlaps it.
        programs: so many run, or fewer; an H100 has 132 multiprocessors.
    """

    batch: int
    columns: int
    rows: int
    reads: int = 1
    warps: int = 4
    stages: int = 1
    decodes_ahead: bool = False
    programs: int = 896

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
    `dtype`; v doesn't count where values are whole numbers. In float32 values
    and x are rounded to TF32, 2 v + v**2 with v = 2**-11 in place of v, if the
    backend multiplies other matrices so, and v is 0 if not.

    Args:
        x: tensor (m, k) of `dtype`.
        codes: uint8 (ceil(k / 2), n), or int8 (k, n).
        scales: float32 (n,) alone, or see `layout.scales_at`; none at all
            multiplies with the codes' values.
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
        scales, layout = with_plain_scales(scales, layout)
    in_tf32 = dtype == "float32" and device.multiplies_in_tf32()
    precision = "highest" if dtype == "float32" and not in_tf32 else "default"
    if in_tf32:  # matrix units would cut the other bits off
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_BITS_OF_TF32 - 1)
        values = layout.values and tuple(map(_in_tf32, layout.values))
        layout = dataclasses.replace(layout, values=values)
    (k, n), (m, _), per_byte = layout.shape, x.shape, layout.codes_per_byte
    step_rows = tile.rows * tile.reads
    steps = -(-layout.byte_rows // step_rows)
    column_programs = -(-n // tile.columns)
    splits, steps_each = split(steps, tile.programs // (column_programs * -(-m // tile.batch)))
    # Rows beyond the last are multiplied with zeros, columns beyond the last are cut off.
    x = jnp.pad(x, ((0, -m % tile.batch), (0, splits * steps_each * step_rows * per_byte - k)))
    batch = x.shape[0]
    x = jnp.moveaxis(x.reshape(batch, -1, per_byte), 2, 0)  # matrix units take the rows of each nibble apart
    per_block = layout.block_size is not None

    def kernel(x_ref, codes_ref, *refs):
        *scale_refs, out_ref = refs
        column_program, part, row_program = (pl.program_id(axis) for axis in range(3))
        columns = places(column_program * tile.columns, tile.columns, n)
        first = part * steps_each
        batch_rows = pl.ds(row_program * tile.batch, tile.batch)

        def fetched(step):
            start = jnp.minimum(step, first + steps_each - 1) * step_rows
            read = []
            for place in range(tile.reads):
                rows = places(start + place * tile.rows, tile.rows, layout.byte_rows)
                read.append(_decoded_first(codes_ref[rows[:, None], columns[None]], layout, dtype, interpret))
            if not per_block:
                return read, None
            block = jax.lax.div(jnp.minimum(start, layout.byte_rows - 1) * per_byte, layout.block_size)
            return read, scales_at(scale_refs, block, columns, layout)

        def multiplied(step, read, scale, total):
            sums = []
            for place_of_read, packed in enumerate(read):
                start = (step * tile.reads + place_of_read) * tile.rows
                products = []
                for place, value in enumerate(_decoded_last(packed, layout, dtype, interpret)):
                    part_of_x = x_ref[place, batch_rows, pl.ds(start, tile.rows)]
                    products.append(jnp.dot(part_of_x, value, precision=precision, preferred_element_type="float32"))
                # Added up a read at a time, this takes fewer registers than one after the other.
                sums.append(functools.reduce(operator.add, products))
            sums = functools.reduce(operator.add, sums)
            return total + (sums if scale is None else sums * scale[None])

        def next_step(step, carry):
            if not tile.decodes_ahead:
                return multiplied(step, *fetched(step), carry)
            now, total = carry
            following = fetched(step + 1)
            return following, multiplied(step, *now, total)

        total = jnp.zeros((tile.batch, tile.columns), "float32")
        carry = (fetched(first), total) if tile.decodes_ahead else total
        carry = jax.lax.fori_loop(first, first + steps_each, next_step, carry)
        total = carry[1] if tile.decodes_ahead else carry
        out_ref[part, batch_rows, pl.ds(column_program * tile.columns, tile.columns)] = total

    grid = (column_programs, splits, batch // tile.batch)
    out_shape = jax.ShapeDtypeStruct((splits, batch, column_programs * tile.columns), "float32")
    run = triton_call(kernel, grid=grid, out_shape=out_shape, warps=tile.warps, stages=tile.stages, interpret=interpret)
    sums = run(x, codes, *(vectors(scales) if per_block else ()))
    return added(sums, (m, n), scales, layout, result)


def _decoded(codes, scales, *, layout, tile, dtype, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    tile = tile.fitted(layout)
    per_byte = layout.codes_per_byte
    byte_rows, n = codes.shape

    def kernel(codes_ref, *refs):
        *scale_refs, out_ref = refs
        column_program, row_program = pl.program_id(0), pl.program_id(1)
        start, columns = row_program * tile.rows, pl.ds(column_program * tile.columns, tile.columns)
        if layout.block_size is None:
            scale = scale_refs[0][columns]
        else:
            block = jax.lax.div(start * per_byte, layout.block_size)
            scale = scales_at(scale_refs, block, columns.start + jnp.arange(tile.columns), layout)
        packed = codes_ref[pl.ds(start, tile.rows), columns]
        for place, value in enumerate(code_values.values(packed, layout.values, interpret)):
            out_ref[pl.ds(start, tile.rows), place, columns] = (value * scale[None]).astype(dtype)

    grid = (n // tile.columns, byte_rows // tile.rows)
    out_shape = jax.ShapeDtypeStruct((byte_rows, per_byte, n), dtype)
    run = triton_call(kernel, grid=grid, out_shape=out_shape, warps=tile.warps, stages=tile.stages, interpret=interpret)
    return run(codes, *vectors(scales)).reshape(byte_rows * per_byte, n)


def _decoded_first(packed, layout, dtype, interpret):
    """Returns what is kept of bytes until their use."""
    if _makes_pairs(layout, dtype, interpret):
        return code_values.pairs(packed, layout.values, dtype)
    return packed


def _decoded_last(packed, layout, dtype, interpret):
    """Returns the values of what `_decoded_first` returned, in `dtype`, a tile for each code of a byte."""
    if _makes_pairs(layout, dtype, interpret):
        return code_values.unpacked(packed, dtype)
    return [value.astype(dtype) for value in code_values.values(packed, layout.values, interpret)]


def _in_tf32(value):
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**_BITS_OF_TF32), exponent - _BITS_OF_TF32)


def _makes_pairs(layout, dtype, interpret):
    return layout.values is not None and dtype != "float32" and not interpret
