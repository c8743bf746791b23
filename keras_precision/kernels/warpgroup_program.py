"""What a program of `warpgroup` does: one warpgroup fetches, the others decode and multiply (Mosaic GPU, JAX only)."""

from __future__ import annotations

import functools

from keras_precision.kernels import byte_table, device, fragments, lanes, stored_scales
from keras_precision.kernels.layout import vectors
from keras_precision.kernels.weight_tiles import PROGRAM_OUTPUTS

# Of a thread that fetches and of one that multiplies, by pairs of warpgroups; together at most what a program starts
# with: 168 for each of 384 threads, 96 of 640.
_REGISTERS = {1: (40, 232), 2: (32, 112)}


def _loaded(sums, place):
    """Returns sums as matrix units lay them out."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        return plgpu.load(sums.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
    except TypeError:  # jax 0.10 takes the place apart
        return plgpu.load(sums, (place,), layout=plgpu.Layout.WGMMA, optimized=False)


def run(x, codes, scales, x_scale, m, tiles, slab, result, interpret, splits, steps):
    """Returns sums, scaled where there is but one part of them or a block has a scale.

    Args:
        x: tensor (m or more, contracted).
        codes: see `warpgroup.product`.
        scales: likewise.
        x_scale: float32 (m,) that multiplies sums; None for ones.
        m: rows of x.
        tiles: what steps fetch.
        slab: `warpgroup.Slab`.
        result: dtype of the result.
        interpret: as in `warpgroup.product`.
        splits: of what is contracted.
        steps: of each of them.

    Returns:
        Tensor (splits, m, outputs).
    """
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, dtype, parts, depth = tiles.layout, tiles.dtype, tiles.parts, tiles.depth
    batch, pairs = slab.batch, slab.pairs
    outputs = layout.shape[tiles.axes[1]]
    programs = outputs // PROGRAM_OUTPUTS
    total_dtype, interpreted = "int32" if dtype == lanes.INT8 else "float32", interpret is not None
    cluster = slab.cluster if programs % slab.cluster == 0 else 1
    per_block = layout.block_size is not None
    # Programs that stay begin to fetch what they need next while they write results.
    blocks, groups = -(-m // batch), programs // cluster
    at_once = max(1, min(slab.programs, device.multiprocessors()) // cluster)
    is_staying = slab.stays and splits == pairs == 1 and groups * blocks > at_once
    grid = (at_once, 1, 1) if is_staying else (groups, splits, blocks)
    stages = min(slab.stages, steps * (groups * blocks // at_once if is_staying else 1))
    has_table = slab.tabled and not interpreted and tiles.has_table
    with_columns, with_rows = splits == 1 and not per_block and bool(scales), x_scale is not None
    scales = vectors(scales) if per_block or with_columns else []
    arrays = [x, codes, *scales, *([x_scale] if with_rows else ())]

    def kernel(
        *refs,
        x_tiles,
        code_tiles,
        full,
        empty,
        scale_tiles=None,
        others_sums=None,
        complete=None,
        all_sums=None,
        table=None,
        filled=None,
    ):
        refs = iter(refs)
        x_ref, codes_ref = next(refs), next(refs)
        scales_ref, *factors = [next(refs) for _ in scales] or [None]
        row_scales = next(refs) if with_rows else None
        out_ref = next(refs)
        warpgroup, part = map(lax.axis_index, ("warpgroup", "part"))
        own_unit = lax.axis_index("group") * grid[2] + lax.axis_index("block")
        own_units = lax.div(groups * blocks - own_unit + grid[0] - 1, grid[0]) if is_staying else 1
        first = part * steps

        def for_units(body, state):
            """Returns what body(turn, which 128 outputs, first row of x, state) makes of a state, a turn a unit."""

            def one(turn, state):
                group, block = (f(own_unit + turn * grid[0], blocks) for f in (lax.div, lax.rem))
                program = group * cluster + lax.axis_index("cluster") if cluster > 1 else group
                return body(turn, program, block * batch, state)

            return lax.fori_loop(0, own_units, one, state) if is_staying else one(0, state)

        def stored(program, step):
            """Returns what is stored of a step's scales, where these are to be expanded."""
            if not factors:
                return []
            return tiles.stored_scales(scales_ref, factors, first + step, program, interpreted)

        def fetch(program, row, before, offset, step, own):
            count, place = before + step, first + step
            slot = lax.rem(count, stages)
            # What is stored of a step's scales is read during the step before, and expanded before there is room.
            expanded = tiles.expanded_scales(own, offset, factors[2], interpreted) if factors else []
            following = stored(program, step + 1)

            @pl.when(count >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            def copy(source, target, together=None):
                plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=together)

            of_x = x_ref.at[pl.ds(row, batch), pl.ds(place * parts * depth, parts * depth)]
            copy(of_x, x_tiles.at[slot], "cluster" if cluster > 1 else None)
            for i, place_of_codes in enumerate(tiles.codes_at(place, program)):
                copy(codes_ref.at[place_of_codes], code_tiles.at[slot, i])
            if factors:
                for place_of_scales, scale in expanded:
                    scale_tiles[slot, *place_of_scales] = scale
                stored_scales.synchronize(interpreted)
                plgpu.barrier_arrive(full.at[slot])
            elif per_block:
                copy(scales_ref.at[tiles.scales_at(place, program)], scale_tiles.at[slot])
            return following

        @pl.when(warpgroup == 2 * pairs)
        def _():
            plgpu.set_max_registers(_REGISTERS[pairs][0], action="decrease")
            offset = factors[1][0] if factors else None

            def fetch_all(turn, program, row, _):
                each = functools.partial(fetch, program, row, turn * steps, offset)
                lax.fori_loop(0, steps, each, stored(program, 0))

            for_units(fetch_all, None)
            # A program may not end while another of its cluster tells it what is empty; and Pallas's interpreter wants
            # to see each phase awaited.
            count = own_units * steps
            lax.fori_loop(
                count, count + stages, lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]), None
            )

        half = lax.rem(warpgroup, 2)

        def after(slot):
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def decoded(slot, place):
            scales = scale_tiles.at[slot] if per_block else None
            return tiles.operand(code_tiles.at[slot], scales, table, place, half, interpreted)

        def multiply(own, program, row, first_slot, sums):
            own_places = range(own, parts, pairs)

            def step(i, state, is_last=False):
                slot, before, operand = state
                following = after(slot)
                for place in own_places:
                    of_x = x_tiles.at[slot, :, pl.ds(place * depth, depth)]
                    fragments.add_product(sums, operand, of_x, interpreted)
                    if place == own:

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[before])

                    if place + pairs < parts:
                        operand = decoded(slot, place + pairs)
                    elif not is_last:
                        plgpu.barrier_wait(full.at[following])
                        operand = decoded(following, own)
                return following, slot, operand

            # Registers that are being multiplied can't take the next operand, so that two take turns.
            turns = 2 if len(own_places) % 2 else 1

            def several(i, state):
                return functools.reduce(lambda state, turn: step(i * turns + turn, state), range(turns), state)

            plgpu.barrier_wait(full.at[first_slot])
            rounds = (steps - 1) // turns
            # Slots are counted, as a remainder takes a tenth of what decoding an operand does.
            state = lax.fori_loop(0, rounds, several, (first_slot, first_slot, decoded(first_slot, own)))
            for i in range(rounds * turns, steps):
                state = step(i, state, is_last=i == steps - 1)
            next_slot, last_slot, _ = state
            found = sums[...]
            plgpu.barrier_arrive(empty.at[last_slot])
            if own > 0:
                others_sums[half] = found
                plgpu.commit_smem()
                plgpu.barrier_arrive(complete)
                return next_slot
            if pairs > 1:
                plgpu.barrier_wait(complete)
                found += others_sums[half] if interpreted else _loaded(others_sums, half)
            own_outputs, own_rows = pl.ds(program * PROGRAM_OUTPUTS, PROGRAM_OUTPUTS), pl.ds(row, batch)
            fragments.write(
                out_ref.at[part, own_rows, own_outputs],
                found,
                half,
                scales_ref.at[own_outputs] if with_columns else None,
                row_scales.at[own_rows] if with_rows else None,
                m - row,
                result,
                interpreted,
            )
            return next_slot

        for own in range(pairs):

            @pl.when(lax.div(warpgroup, 2) == own)
            def _(own=own):
                plgpu.set_max_registers(_REGISTERS[pairs][1], action="increase")
                if has_table:
                    fragments.fill(table, layout.values, 8 * pairs)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(filled)
                    plgpu.barrier_wait(filled)

                def unit(turn, program, row, slot):
                    task = functools.partial(multiply, own, program, row, slot)
                    if not interpreted:
                        return pl.run_scoped(task, plgpu.ACC((fragments.OUTPUTS, batch), total_dtype))
                    all_sums[warpgroup] = jnp.zeros((fragments.OUTPUTS, batch), total_dtype)
                    return task(all_sums.at[warpgroup])

                for_units(unit, jnp.int32(0))

    empty = plgpu.Barrier
    if cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, m, outputs), result),
        grid=grid,
        grid_names=("group", "part", "block"),
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
            **({"table": plgpu.SMEM(byte_table.SHAPE, "float32")} if has_table else {}),
            **({"filled": plgpu.Barrier(num_arrivals=2 * pairs)} if has_table else {}),
            **({"complete": plgpu.Barrier(num_arrivals=2)} if pairs > 1 else {}),
        },
        # What is read is awaited by barriers of our own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
    )
    return call(*arrays)
