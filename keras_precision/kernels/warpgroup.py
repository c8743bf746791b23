"""Products of activations with stored codes by Hopper's matrix units (wgmma), a kernel for Mosaic GPU (JAX only).

A program multiplies 128 columns of the weight with some rows of x. One warpgroup fetches; the others decode 64 columns
each into registers, from which matrix units take them; x comes from shared memory. While a part is multiplied the next
is decoded, so that neither decoding nor a product waits. (The design is that of CUTLASS's mixed-input products: Gupta,
"Mixed-input matrix multiplication performance optimizations", 2024.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_precision.kernels import fragments, lanes
from keras_precision.kernels.compiled import jitted
from keras_precision.kernels.layout import Layout, vectors
from keras_precision.kernels.partial_sums import added, split

_COLUMNS = 2 * fragments.COLUMNS
# Of a thread that fetches and of one that multiplies, by pairs of warpgroups; together at most what a program starts
# with: 168 for each of 384 threads, 96 of 640.
_REGISTERS = {1: (40, 232), 2: (24, 112)}


@dataclass(frozen=True)
class Slab:
    """What one program works on at a time.

    Attributes:
        batch: rows of x, a multiple of 8 up to 256.
        parts: operands of matrix units that are fetched at once, of 64 rows
            of the weight each, or 128 where codes are multiplied with codes;
            `pairs` times a power of two, of which small weights take less.
        stages: such fetches that are begun before the first is used.
        cluster: programs that read x together.
        pairs: of warpgroups, 1 or 2, that take turns at operands; two have
            registers for a batch of 64.
        programs: so many run, or fewer, where k may be split; an H100 has 132
            multiprocessors.
    """

    batch: int
    parts: int = 2
    stages: int = 4
    cluster: int = 1
    pairs: int = 1
    programs: int = 132


def can_run(layout: Layout, dtype: str) -> bool:
    """Returns whether there is a kernel for such a weight, with blocks of a power of two, and activations of a dtype."""
    k, n = layout.shape
    rows = fragments.rows_of(dtype)
    has_blocks = layout.block_size is None or layout.block_size % rows == 0
    return dtype in ("float16", "bfloat16", lanes.INT8) and has_blocks and k % rows == n % _COLUMNS == 0


def product(
    x,
    codes,
    scales: Sequence,
    layout: Layout,
    slab: Slab,
    dtype: str,
    result: str | None = None,
    interpret: Any = None,
):
    """Returns x times the weight.

    Weights are computed in float32 and rounded to `dtype`, unless they have one
    scale a column, which multiplies sums. Products are exact and added up in
    float32, so that results are those of `decoded` weights but for the order
    of sums. With u = 2**-24 and v the unit roundoff of `dtype`, an element
    differs from the exact product of x and the weight by at most
    sum |x| |weight| (v + (k + 3) u), and one more rounding to `dtype`; v
    doesn't count where values are whole numbers that have one scale a column.

    Args:
        x: tensor (m, k) of `dtype`.
        codes: uint8 (ceil(k / 2), n), or int8 (k, n).
        scales: see `row_product.product`.
        layout: what the arrays mean; see `can_run`.
        slab: what a program works on.
        dtype: "float16" or "bfloat16".
        result: dtype of the result; None for the same.
        interpret: parameters of Pallas's interpreter of such kernels; None to run them.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": layout, "slab": slab, "result": result or dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), None, **static)


def integer_product(x_codes, x_scale, codes, scale, dtype: str, slab: Slab, interpret: Any = None):
    """Returns x_scale * scale * (x_codes times codes), added up in int32.

    For few rows and columns several programs share k: their sums are rounded to
    float32 and added up, which is exact up to 2**24, and beyond to
    (parts + 1) 2**-24 of the sum of magnitudes.

    Args:
        x_codes: int8 (m, k).
        x_scale: float32 (m, 1).
        codes: int8 (k, n).
        scale: float32 (n,).
        dtype: float dtype of the result.
        slab: what a program works on.
        interpret: as in `product`.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": Layout(tuple(codes.shape)), "slab": slab, "result": dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x_codes, codes, (scale,), x_scale, **static)


def _product(x, codes, scales, x_scale, *, layout, slab, result, interpret):
    import jax.numpy as jnp

    (k, n), m = layout.shape, x.shape[0]
    rows = fragments.rows_of(x.dtype.name)
    # Rows of x are copied eight at a time, and read as zeros beyond the last.
    multiple = slab.batch if interpret is not None else 8 if m > 8 else 1
    x = jnp.pad(x, ((0, -m % multiple), (0, 0)))
    programs = -(-m // slab.batch) * n // _COLUMNS
    parts = slab.parts
    while parts > slab.pairs and -(-k // (rows * parts)) * programs < slab.programs:
        parts //= 2
    slab = dataclasses.replace(slab, parts=parts)
    # Rows of the weight beyond the last are read as zeros.
    splits, steps_each = split(-(-k // (rows * parts)), slab.programs // programs)
    if splits > 1:
        sums = _run(x, codes, scales, None, m, layout, slab, "float32", interpret, splits, steps_each)
        found = added(sums, (m, n), scales, layout, "float32")
        return (found if x_scale is None else found * x_scale).astype(result)
    x_scale = None if x_scale is None else x_scale[:, 0]
    return _run(x, codes, scales, x_scale, m, layout, slab, result, interpret, 1, steps_each)[0]


def _loaded(sums, place):
    """Returns sums as matrix units lay them out."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        return plgpu.load(sums.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
    except TypeError:  # jax 0.10 takes the place apart
        return plgpu.load(sums, (place,), layout=plgpu.Layout.WGMMA, optimized=False)


def _run(x, codes, scales, x_scale, m, layout, slab, result, interpret, splits, steps):
    """Returns sums (splits, m, n), scaled where there is but one part of them or a block has a scale."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    n, dtype = layout.shape[1], x.dtype.name
    batch, parts, pairs, stages = slab.batch, slab.parts, slab.pairs, min(slab.stages, steps)
    rows = fragments.rows_of(dtype)
    byte_rows = rows // layout.codes_per_byte
    column_programs = n // _COLUMNS
    total_dtype, interpreted = "int32" if dtype == lanes.INT8 else "float32", interpret is not None
    cluster = slab.cluster if column_programs % slab.cluster == 0 else 1
    per_block = layout.block_size is not None
    # Blocks lie within a step, or steps within a block.
    blocks = max(1, rows * parts // layout.block_size) if per_block else 1
    with_columns, with_rows = splits == 1 and not per_block and bool(scales), x_scale is not None
    scales = vectors(scales) if per_block or with_columns else []
    arrays = [x, codes, *scales, *([x_scale] if with_rows else ())]

    def kernel(
        *refs, x_tiles, code_tiles, full, empty, scale_tiles=None, others_sums=None, complete=None, all_sums=None
    ):
        refs = iter(refs)
        x_ref, codes_ref = next(refs), next(refs)
        scales_ref, *factors = [next(refs) for _ in scales] or [None]
        row_scales = next(refs) if with_rows else None
        out_ref = next(refs)
        warpgroup, part, row_program = map(lax.axis_index, ("warpgroup", "part", "row_program"))
        column_program = lax.axis_index("column_program")
        if cluster > 1:
            column_program = column_program * cluster + lax.axis_index("cluster")
        columns = pl.ds(column_program * _COLUMNS, _COLUMNS)
        rows_of_x = pl.ds(row_program * batch, batch)
        first = part * steps

        def fetch(step, _):
            slot, place = lax.rem(step, stages), first + step
            block = lax.div(place * parts * rows, layout.block_size) if per_block else 0
            column = column_program * _COLUMNS
            # Read before there is room for them, so that it takes no time once there is.
            of_blocks = [
                fragments.expanded_scales(scales_ref, factors, block + i, column, layout, interpreted)
                for i in range(blocks if factors else 0)
            ]

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            def copy(source, target, together=None):
                plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=together)

            copy(codes_ref.at[pl.ds(place * parts * byte_rows, parts * byte_rows), columns], code_tiles.at[slot])
            if factors:
                for i, scale in enumerate(of_blocks):
                    scale_tiles[slot, i] = scale
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[slot])
            elif per_block:
                copy(scales_ref.at[pl.ds(block, blocks), columns], scale_tiles.at[slot])
            of_x = x_ref.at[rows_of_x, pl.ds(place * parts * rows, parts * rows)]
            copy(of_x, x_tiles.at[slot], "cluster" if cluster > 1 else None)

        @pl.when(warpgroup == 2 * pairs)
        def _():
            plgpu.set_max_registers(_REGISTERS[pairs][0], action="decrease")
            lax.fori_loop(0, steps, fetch, None)
            if cluster > 1:  # a program may not end while another tells it what is empty
                lax.fori_loop(
                    steps, steps + stages, lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]), None
                )

        half = lax.rem(warpgroup, 2)

        def decoded(step, place):
            slot = lax.rem(step, stages)
            tile = code_tiles.at[slot, pl.ds(place * byte_rows, byte_rows)]
            scale = scale_tiles.at[slot, place * blocks // parts] if per_block else None
            return fragments.decode(tile, scale, half, layout, dtype, interpreted)

        def multiply(own, sums):
            own_places = range(own, parts, pairs)

            def step(i, operand, is_last=False):
                slot, following = lax.rem(i, stages), lax.rem(i + 1, stages)
                for place in own_places:
                    of_x = x_tiles.at[slot, :, pl.ds(place * rows, rows)]
                    fragments.add_product(sums, operand, of_x, interpreted)
                    if place == own:

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(i + stages - 1, stages)])

                    if place + pairs < parts:
                        operand = decoded(i, place + pairs)
                    elif not is_last:
                        plgpu.barrier_wait(full.at[following])
                        operand = decoded(i + 1, own)
                return operand

            # Registers that are being multiplied can't take the next operand, so that two take turns.
            turns = 2 if len(own_places) % 2 else 1

            def several(i, operand):
                return functools.reduce(lambda operand, turn: step(i * turns + turn, operand), range(turns), operand)

            plgpu.barrier_wait(full.at[0])
            rounds = (steps - 1) // turns
            operand = lax.fori_loop(0, rounds, several, decoded(0, own))
            for i in range(rounds * turns, steps):
                operand = step(i, operand, is_last=i == steps - 1)
            found = sums[...]
            if cluster > 1:
                plgpu.barrier_arrive(empty.at[(steps - 1) % stages])
            if own > 0:
                others_sums[half] = found
                plgpu.commit_smem()
                plgpu.barrier_arrive(complete)
                return
            if pairs > 1:
                plgpu.barrier_wait(complete)
                found += others_sums[half] if interpreted else _loaded(others_sums, half)
            fragments.write(
                out_ref.at[part, rows_of_x, columns],
                found,
                half,
                scales_ref.at[columns] if with_columns else None,
                row_scales.at[rows_of_x] if with_rows else None,
                m - row_program * batch,
                result,
                interpreted,
            )

        for own in range(pairs):

            @pl.when(lax.div(warpgroup, 2) == own)
            def _(own=own):
                plgpu.set_max_registers(_REGISTERS[pairs][1], action="increase")
                if not interpreted:
                    pl.run_scoped(functools.partial(multiply, own), plgpu.ACC((fragments.COLUMNS, batch), total_dtype))
                    return
                all_sums[warpgroup] = jnp.zeros((fragments.COLUMNS, batch), total_dtype)
                multiply(own, all_sums.at[warpgroup])

    empty = plgpu.Barrier
    if cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, m, n), result),
        grid=(column_programs // cluster, splits, -(-m // batch)),
        grid_names=("column_program", "part", "row_program"),
        num_threads=2 * pairs + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_tiles": plgpu.SMEM((stages, batch, parts * rows), x.dtype, transforms=fragments.transforms(dtype)),
            "code_tiles": plgpu.SMEM(
                (stages, parts * byte_rows, _COLUMNS), codes.dtype, transforms=fragments.transforms("uint8")
            ),
            "full": plgpu.Barrier(num_arrivals=3 if per_block else 2, num_barriers=stages),
            "empty": empty(num_arrivals=2 * pairs, num_barriers=stages),
            **({"scale_tiles": plgpu.SMEM((stages, blocks, _COLUMNS), "float32")} if per_block else {}),
            **({"others_sums": plgpu.SMEM((2, fragments.COLUMNS, batch), total_dtype)} if pairs > 1 else {}),
            **({"all_sums": plgpu.SMEM((2 * pairs, fragments.COLUMNS, batch), total_dtype)} if interpreted else {}),
            **({"complete": plgpu.Barrier(num_arrivals=2)} if pairs > 1 else {}),
        },
        # What is read is awaited by barriers of our own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
    )
    return run(*arrays)
