"""Double-quantized scales that a warpgroup reads and expands, in Pallas kernels for Mosaic GPU (JAX only).

Reading and expanding are apart, so that a kernel has begun to read long before it expands: a read of global memory takes
as long as matrix units multiply with 64 rows of the weight.
"""

from __future__ import annotations

from keras_precision.kernels import lanes
from keras_precision.kernels import layout as layouts

COLUMNS = 128
"""Whose scales are read at once, each by a thread."""


def read(codes, factors, block, column, layout: layouts.Layout, interpret: bool) -> list:
    """Returns what is stored of the scales of 128 columns in a block of rows, which are double-quantized.

    Args:
        codes: reference to uint8 (n_blocks, n) in global memory.
        factors: references to the other arrays of double quantization; see
            `layouts.scales_at`.
        block: int32 scalar, of rows; beyond the last, the last.
        column: int32 scalar, the first of the columns; beyond the last, the last 128.
        layout: of the weight.
        interpret: True for what runs in Pallas's interpreter.

    Returns:
        Arrays (128,): int32 codes, and the float32 factors of their groups.
    """
    import jax.numpy as jnp

    block, column = jnp.minimum(block, layout.blocks - 1), jnp.minimum(column, layout.shape[1] - COLUMNS)
    if interpret:
        columns = column + jnp.arange(COLUMNS)
        return [
            codes[...][block, columns].astype("int32"),
            factors[0][...][layouts.group_of_scale(block, columns, layout)],
        ]
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def in_lanes(context, block, column, codes, absmax):
        block, column = (lanes.scalar(number) for number in (block, column))
        column = lanes.add(column, lanes.bits_and(lanes.thread_index(), COLUMNS - 1))
        code = lanes.load_byte(codes, lanes.add(lanes.times(block, layout.shape[1]), column))
        factor = lanes.load(absmax, layouts.group_in_registers(lanes, block, column, layout))
        return [_of_threads(code, "int32"), _of_threads(lanes.as_integer(factor), "float32")]

    types = [plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WG_SPLAT(()), plgpu.RefType(), plgpu.RefType()]
    results = [plgpu.ShapeDtypeStruct((COLUMNS,), dtype, layout=_per_thread()) for dtype in ("int32", "float32")]
    return plgpu.inline_mgpu(arg_types=types, return_type=results)(in_lanes)(block, column, codes, factors[0])


def expanded(stored, offset, table, layout: layouts.Layout, interpret: bool):
    """Returns the float32 scales (128,) that `read` has found.

    Args:
        stored: what it returned.
        offset: float32 scalar, of all scales.
        table: reference to float32 (256,) in global memory.
        layout: as there.
        interpret: as in `read`.
    """
    code, factor = stored
    if interpret:
        return layouts.expanded(table[...][code] * factor, offset, layout)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def in_lanes(context, code, factor, offset, table):
        code, factor = (lanes.extract(lanes.scalar(array), 0) for array in (code, factor))
        numbers = lanes.load(table, code), factor, lanes.scalar(offset)
        return _of_threads(lanes.expanded_scale(*numbers, layout.largest_scale), "float32")

    types = [_per_thread(), _per_thread(), plgpu.Layout.WG_SPLAT(()), plgpu.RefType()]
    result = plgpu.ShapeDtypeStruct((COLUMNS,), "float32", layout=_per_thread())
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(in_lanes)(code, factor, offset, table)


def synchronize(interpret: bool) -> None:
    """Waits until all threads of a warpgroup have written to shared memory what others' threads read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret:
        plgpu.commit_smem()
        return
    # Copies and matrix units would need a fence, which waits for reads of global memory as well.
    plgpu.inline_mgpu()(lambda context: lanes.synchronize())()


def _per_thread():
    """Returns the layout of 128 numbers of which each thread has one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=1)


def _of_threads(number, dtype):
    return lanes.array([number], (COLUMNS,), _per_thread().to_mgpu(), dtype)
