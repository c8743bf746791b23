"""Rounding to 8-bit floating point as a Pallas kernel that reads once what it stores twice, straight and transposed.

Where the scale is known before, it can measure in the same pass what the next scale is made of.
"""

from __future__ import annotations

import math

from keras_precision.kernels.compiled import jitted, triton_call
from keras_precision.kernels.device import MOST_PROGRAMS_ON_AN_AXIS

LARGEST_TILE = (32, 128)
"""Rows and columns that one program rounds at most.

On an H200, which copies 4.0 TB/s, 3.27 TB/s of bfloat16 and 3.18 of float32, and with 64 rows 3.22 and 3.00; no other
tile of 11 is faster by 2% (8192 and 4096 x 14336, jax 0.11.2).
"""
_SMALLEST_SIDE = 16
_WARPS = 4


def tile_of(shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns that one program rounds, so that a matrix is made of whole tiles.

    Example:
        >>> tile_of((8192, 4096)), tile_of((48, 2080))
        ((32, 128), (16, 32))
    """
    rows, columns = map(math.gcd, shape, LARGEST_TILE)
    return rows, columns


def can_run(shape: tuple[int, int]) -> bool:
    """Returns whether a matrix is made of whole tiles that aren't small, and not of too many."""
    rows, columns = tile_of(shape)
    return 0 not in shape and min(rows, columns) >= _SMALLEST_SIDE and shape[1] // columns <= MOST_PROGRAMS_ON_AN_AXIS


def cast_transpose(x, scale, column_scale, dtype: str, largest: float, measures: bool = False, interpret: bool = False):
    """Returns the codes of x / scale, those of x / column_scale transposed, and x's greatest magnitude.

    Those of `kernels.float8.rounded`, bit by bit apart from NaN's (JAX only).

    Args:
        x: float tensor (m, k), both multiples of 16; see `can_run`.
        scale: float32 (), or (m, 1).
        column_scale: float32 (1, k); None for `scale`, which is one number then.
        dtype: float8 dtype of the codes.
        largest: the greatest number of that dtype; greater ones become it.
        measures: whether the greatest magnitude is asked for.
        interpret: True to run the kernel on any device, slowly.

    Returns:
        Tensors (m, k) and (k, m), and float32 () or None.
    """
    static = {"dtype": dtype, "largest": largest, "measures": measures, "interpret": interpret}
    return jitted(_cast_transpose, tuple(static))(x, scale, column_scale, **static)


def _cast_transpose(x, scale, column_scale, *, dtype, largest, measures, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    rows, columns = tile_of(x.shape)
    scales = [scale] if column_scale is None else [scale, column_scale]
    specs = [pl.BlockSpec((1,), lambda i, j: (0,))]
    if column_scale is not None:
        specs = [pl.BlockSpec((rows,), lambda i, j: (i,)), pl.BlockSpec((columns,), lambda i, j: (j,))]

    def kernel(x_ref, *refs):
        reciprocals, (codes_ref, transposed_ref, *greatest_refs) = refs[: len(scales)], refs[len(scales) :]
        values = x_ref[...].astype("float32")
        for ref in greatest_refs:
            # As patterns: Triton's greatest float passes over NaN.
            ref[0, 0] = jnp.max(jax.lax.bitcast_convert_type(jnp.abs(values), "int32"))

        def rounded(reciprocal):
            scaled = values * reciprocal
            # Compared so that NaN stays NaN.
            return jnp.where(scaled > largest, largest, jnp.where(scaled < -largest, -largest, scaled)).astype(dtype)

        if column_scale is None:
            codes = of_columns = rounded(reciprocals[0][0])
        else:
            codes, of_columns = rounded(reciprocals[0][...][:, None]), rounded(reciprocals[1][...][None])
        codes_ref[...] = codes
        transposed_ref[...] = of_columns.T

    (m, k), grid = x.shape, (x.shape[0] // rows, x.shape[1] // columns)
    greatest_spec, greatest_shape = pl.BlockSpec((1, 1), lambda i, j: (i, j)), jax.ShapeDtypeStruct(grid, "int32")
    codes, transposed, *greatest = triton_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j)), *specs],
        out_specs=[
            pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            pl.BlockSpec((columns, rows), lambda i, j: (j, i)),
            *[greatest_spec] * measures,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((m, k), dtype),
            jax.ShapeDtypeStruct((k, m), dtype),
            *[greatest_shape] * measures,
        ],
        warps=_WARPS,
        interpret=interpret,
    )(x, *((1 / scale).reshape(-1) for scale in scales))
    if not measures:
        return codes, transposed, None
    # Or XLA makes the reduction part of a concatenation (with a history), where one thread does it: 0.18 ms.
    pattern = jax.lax.optimization_barrier(jnp.max(greatest[0]))
    return codes, transposed, jax.lax.bitcast_convert_type(pattern, "float32")
