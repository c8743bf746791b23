"""Products of activations with stored codes by Hopper's matrix units (wgmma), a kernel for Mosaic GPU (JAX only).

A program multiplies 128 columns of the weight, or 128 rows where it is transposed, with some rows of x. One warpgroup
fetches; the others decode 64 columns each into registers, from which matrix units take them; x comes from shared
memory. While a part is multiplied the next is decoded, so that neither decoding nor a product waits. (The design is
that of CUTLASS's mixed-input products: Gupta, "Mixed-input matrix multiplication performance optimizations", 2024.)
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
from keras_precision.kernels.weight_tiles import PROGRAM_OUTPUTS, Straight, Transposed

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
            `pairs` times a power of two, of which small weights take less. Of
            a transposed weight, 64 columns each: 2 at least and 4 at most.
        stages: such fetches that are begun before the first is used.
        cluster: programs that read x together.
        pairs: of warpgroups, 1 or 2, that take turns at operands; two have
            registers for a batch of 64.
        programs: so many run, or fewer, where k may be split; an H100 has 132
            multiprocessors.
        looks_up: whether 4-bit codes of whole numbers in a row are looked up,
            as those of codebooks are, or computed.
    """

    batch: int
    parts: int = 2
    stages: int = 4
    cluster: int = 1
    pairs: int = 1
    programs: int = 132
    looks_up: bool = True


def can_run(layout: Layout, dtype: str) -> bool:
    """Returns whether there is a kernel for such a weight, with blocks of a power of two, and activations of a dtype."""
    k, n = layout.shape
    rows = fragments.depth_of(dtype)
    has_blocks = layout.block_size is None or layout.block_size % rows == 0
    return dtype in ("float16", "bfloat16", lanes.INT8) and has_blocks and k % rows == n % PROGRAM_OUTPUTS == 0


def can_run_transposed(layout: Layout, dtype: str) -> bool:
    """Returns whether `transposed_product` multiplies such a weight, with blocks of a power of two, and such activations."""
    return dtype != lanes.INT8 and can_run(layout, dtype) and layout.shape[0] % PROGRAM_OUTPUTS == 0


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
    sum |x| |weight| (v + (k + 3) u), and one more rounding to `dtype`, where
    weights are normal numbers of it; v doesn't count where values are whole
    numbers that have one scale a column.

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


def transposed_product(x, codes, scales: Sequence, layout: Layout, slab: Slab, dtype: str, interpret: Any = None):
    """Returns x times the transposed weight: the gradient of `product` with respect to its x, where x is that of its result.

    With weights as in `product`, scaled in float32 and rounded to `dtype`; an
    element differs from the exact product by at most
    sum |x| |weight| (v + (n + 3) u), and one more rounding to `dtype`, where
    weights are normal numbers of it.

    Args:
        x: tensor (m, n) of `dtype`.
        codes: as in `product`.
        scales: likewise, and at least one.
        layout: of the weight (k, n); see `can_run_transposed`.
        slab: what a program works on.
        dtype: "float16" or "bfloat16".
        interpret: as in `product`.

    Returns:
        Tensor (m, k).
    """
    if layout.block_size is None:  # all rows are one block
        scales, layout = [scales[0][None]], dataclasses.replace(layout, block_size=layout.shape[0])
    static = {"layout": layout, "slab": slab, "result": dtype, "interpret": interpret, "tiling": Transposed}
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


def _product(x, codes, scales, x_scale, *, layout, slab, result, interpret, tiling=Straight):
    import jax.numpy as jnp

    m, (contracted, outputs) = x.shape[0], (layout.shape[axis] for axis in tiling.axes)
    depth = fragments.depth_of(x.dtype.name)
    # Rows of x are copied eight at a time, and read as zeros beyond the last.
    multiple = slab.batch if interpret is not None else 8 if m > 8 else 1
    x = jnp.pad(x, ((0, -m % multiple), (0, 0)))
    programs = -(-m // slab.batch) * outputs // PROGRAM_OUTPUTS
    parts = max(slab.parts, tiling.least_parts)
    while parts > max(slab.pairs, tiling.least_parts) and -(-contracted // (depth * parts)) * programs < slab.programs:
        parts //= 2
    tiles = tiling(layout, x.dtype.name, parts, slab.looks_up)
    # What is contracted beyond the last is read as zeros.
    splits, steps_each = split(-(-contracted // (depth * parts)), slab.programs // programs)
    if splits > 1:
        sums = _run(x, codes, scales, None, m, tiles, slab, "float32", interpret, splits, steps_each)
        found = added(sums, (m, outputs), scales, layout, "float32")
        return (found if x_scale is None else found * x_scale).astype(result)
    x_scale = None if x_scale is None else x_scale[:, 0]
    return _run(x, codes, scales, x_scale, m, tiles, slab, result, interpret, 1, steps_each)[0]


def _loaded(sums, place):
    """Returns sums as matrix units lay them out."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        return plgpu.load(sums.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
    except TypeError:  # jax 0.10 takes the place apart
        return plgpu.load(sums, (place,), layout=plgpu.Layout.WGMMA, optimized=False)


def _run(x, codes, scales, x_scale, m, tiles, slab, result, interpret, splits, steps):
    """Returns sums (splits, m, outputs), scaled where there is but one part of them or a block has a scale."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, dtype, parts, depth = tiles.layout, tiles.dtype, tiles.parts, tiles.depth
    batch, pairs, stages = slab.batch, slab.pairs, min(slab.stages, steps)
    outputs = layout.shape[tiles.axes[1]]
    programs = outputs // PROGRAM_OUTPUTS
    total_dtype, interpreted = "int32" if dtype == lanes.INT8 else "float32", interpret is not None
    cluster = slab.cluster if programs % slab.cluster == 0 else 1
    per_block = layout.block_size is not None
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
        program = lax.axis_index("program")
        if cluster > 1:
            program = program * cluster + lax.axis_index("cluster")
        own_outputs = pl.ds(program * PROGRAM_OUTPUTS, PROGRAM_OUTPUTS)
        rows_of_x = pl.ds(row_program * batch, batch)
        first = part * steps

        def fetch(step, _):
            slot, place = lax.rem(step, stages), first + step
            # Read before there is room for them, so that it takes no time once there is.
            expanded = tiles.expanded_scales(scales_ref, factors, place, program, interpreted) if factors else []

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            def copy(source, target, together=None):
                plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=together)

            for i, place_of_codes in enumerate(tiles.codes_at(place, program)):
                copy(codes_ref.at[place_of_codes], code_tiles.at[slot, i])
            if factors:
                for place_of_scales, scale in expanded:
                    scale_tiles[slot, *place_of_scales] = scale
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[slot])
            elif per_block:
                copy(scales_ref.at[tiles.scales_at(place, program)], scale_tiles.at[slot])
            of_x = x_ref.at[rows_of_x, pl.ds(place * parts * depth, parts * depth)]
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
            scales = scale_tiles.at[slot] if per_block else None
            return tiles.operand(code_tiles.at[slot], scales, place, half, interpreted)

        def multiply(own, sums):
            own_places = range(own, parts, pairs)

            def step(i, operand, is_last=False):
                slot, following = lax.rem(i, stages), lax.rem(i + 1, stages)
                for place in own_places:
                    of_x = x_tiles.at[slot, :, pl.ds(place * depth, depth)]
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
                out_ref.at[part, rows_of_x, own_outputs],
                found,
                half,
                scales_ref.at[own_outputs] if with_columns else None,
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
                    pl.run_scoped(functools.partial(multiply, own), plgpu.ACC((fragments.OUTPUTS, batch), total_dtype))
                    return
                all_sums[warpgroup] = jnp.zeros((fragments.OUTPUTS, batch), total_dtype)
                multiply(own, all_sums.at[warpgroup])

    empty = plgpu.Barrier
    if cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, m, outputs), result),
        grid=(programs // cluster, splits, -(-m // batch)),
        grid_names=("program", "part", "row_program"),
        num_threads=2 * pairs + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_tiles": plgpu.SMEM((stages, batch, parts * depth), x.dtype, transforms=fragments.transforms(dtype)),
            "code_tiles": plgpu.SMEM(
                (stages, *tiles.code_tiles), codes.dtype, transforms=fragments.transforms("uint8")
            ),
            "full": plgpu.Barrier(num_arrivals=tiles.code_tiles[0] + 1 + per_block, num_barriers=stages),
            "empty": empty(num_arrivals=2 * pairs, num_barriers=stages),
            **({"scale_tiles": plgpu.SMEM((stages, *tiles.scale_tile), "float32")} if per_block else {}),
            **({"others_sums": plgpu.SMEM((2, fragments.OUTPUTS, batch), total_dtype)} if pairs > 1 else {}),
            **({"all_sums": plgpu.SMEM((2 * pairs, fragments.OUTPUTS, batch), total_dtype)} if interpreted else {}),
            **({"complete": plgpu.Barrier(num_arrivals=2)} if pairs > 1 else {}),
        },
        # What is read is awaited by barriers of our own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
    )
    return run(*arrays)
