"""Products of some rows with the transposed stored weight, as Pallas kernels for NVIDIA GPUs (JAX only).

They are gradients with respect to activations. A program works on some rows of the weight and some columns at a time,
so that each code is read once; partial sums of several programs are added up by XLA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import device
from keras_precision.kernels.compiled import jitted, triton_call
from keras_precision.kernels.layout import Layout, scales_at, vectors, with_plain_scales
from keras_precision.kernels.partial_sums import places, split

_LEAST_ROWS = 16  # of a matrix unit's operand
_HALF_OF_TF32, _BITS_OF_TF32 = 0x1000, -0x2000


@dataclass(frozen=True)
class TransposedTile:
    """What one program works on at a time.

    Attributes:
        batch: rows of x, a power of two from 16 on.
        rows: of bytes, a power of two from 16 on; fewer where fewer share a
            scale.
        columns: of the weight that are read at once, a power of two from 16 on.
        warps: of a program.
        stages: steps that matrix units' operands are fetched ahead.
        programs: so many run, or fewer; an H100 has 132 multiprocessors.
    """

    batch: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    programs: int = 896

    def fitted(self, layout: Layout) -> TransposedTile:
        """Returns the tile with as many rows as share a scale."""
        if layout.block_size is None:
            return self
        return dataclasses.replace(self, rows=min(self.rows, layout.block_size // layout.codes_per_byte))


def can_run(layout: Layout, dtype: str) -> bool:
    """Returns whether matrix units multiply such activations, and enough rows of the weight share a scale."""
    if dtype == "float32" and not device.multiplies_in_tf32():
        return False
    return layout.block_size is None or layout.block_size % (_LEAST_ROWS * layout.codes_per_byte) == 0


def transposed_product(
    x, codes, scales: Sequence, layout: Layout, tile: TransposedTile, dtype: str, interpret: bool = False
):
    """Returns x times the transposed weight, as gradients with respect to a product's activations are.

    The weight is what decoding gives, computed in float32 and rounded to
    `dtype`. With u = 2**-24 and v the unit roundoff of `dtype`, an element
    differs from the exact product of x and the weight by at most
    sum |x| |weight| (v + (n + 3) u), and one more rounding to `dtype`. In
    float32 the weight and x are rounded to TF32: 2 v + v**2 with v = 2**-11 in
    place of v.

    Args:
        x: tensor (m, n) of `dtype`.
        codes: see `weight_only.product`.
        scales: likewise.
        layout: of the weight (k, n); see `can_run`.
        tile: what a program works on.
        dtype: "float16", "bfloat16" or "float32".
        interpret: True to run the kernel on any device, slowly.

    Returns:
        Tensor (m, k).
    """
    static = {"layout": layout, "tile": tile, "dtype": dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), **static)


def _product(x, codes, scales, *, layout, tile, dtype, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    tile = tile.fitted(layout)
    if layout.largest_scale is not None:  # which each program would expand anew
        scales, layout = with_plain_scales(scales, layout)
    (k, n), (m, _), per_byte = layout.shape, x.shape, layout.codes_per_byte
    row_programs, steps = -(-layout.byte_rows // tile.rows), -(-n // tile.columns)
    splits, steps_each = split(steps, tile.programs // (row_programs * -(-m // tile.batch)))
    # Columns beyond the last are multiplied with zeros, rows beyond the last are cut off.
    x = jnp.pad(x, ((0, -m % tile.batch), (0, splits * steps_each * tile.columns - n)))
    if dtype == "float32":
        x = _in_tf32(x)
    batch = x.shape[0]

    def kernel(x_ref, codes_ref, *refs):
        *scale_refs, out_ref = refs
        row_program, part, batch_program = (pl.program_id(axis) for axis in range(3))
        rows = places(row_program * tile.rows, tile.rows, layout.byte_rows)
        batch_rows = pl.ds(batch_program * tile.batch, tile.batch)

        def next_step(step, totals):
            start = step * tile.columns
            columns = places(jnp.minimum(start, n - 1), tile.columns, n)
            packed = codes_ref[rows[:, None], columns[None]]
            if layout.block_size is None:
                scale = scale_refs[0][columns]
            else:
                block = jax.lax.div(row_program * tile.rows * per_byte, layout.block_size)
                scale = scales_at(scale_refs, block, columns, layout)
            part_of_x = x_ref[batch_rows, pl.ds(start, tile.columns)]
            found = []
            for total, value in zip(totals, code_values.values(packed, layout.values, interpret), strict=True):
                weight = value * scale[None]
                weight = _in_tf32(weight) if dtype == "float32" else weight.astype(dtype)
                product = jnp.dot(part_of_x, weight.T, precision="default", preferred_element_type="float32")
                found.append(total + product)
            return found

        totals = [jnp.zeros((tile.batch, tile.rows), "float32")] * per_byte
        totals = jax.lax.fori_loop(part * steps_each, (part + 1) * steps_each, next_step, totals)
        for place, total in enumerate(totals):
            out_ref[part, place, batch_rows, pl.ds(row_program * tile.rows, tile.rows)] = total

    grid = (row_programs, splits, batch // tile.batch)
    out_shape = jax.ShapeDtypeStruct((splits, per_byte, batch, row_programs * tile.rows), "float32")
    run = triton_call(kernel, grid=grid, out_shape=out_shape, warps=tile.warps, stages=tile.stages, interpret=interpret)
    sums = jnp.sum(run(x, codes, *vectors(scales)), axis=0)
    return jnp.moveaxis(sums, 0, 2).reshape(batch, -1)[:m, :k].astype(dtype)


def _in_tf32(numbers):
    """Returns float32 numbers rounded to TF32: matrix units would cut the other bits off."""
    import jax

    bits = jax.lax.bitcast_convert_type(numbers, "int32")
    rounded = jax.lax.bitcast_convert_type((bits + _HALF_OF_TF32) & _BITS_OF_TF32, "float32")
    return jax.numpy.where(numbers == numbers, rounded, numbers)  # a GPU's NaN, all ones, would become -0
