"""Rounding to 8-bit floating point as a Pallas kernel that reads once what it stores twice, straight and transposed.

Where the scale is known before, it can measure in the same pass what the next scale is made of.
"""

from __future__ import annotations

from keras_precision.kernels.compiled import jitted, triton_call
from keras_precision.kernels.device import MOST_PROGRAMS_ON_AN_AXIS

TILE = (64, 128)
"""Rows and columns that one program rounds: 2.3 to 2.6 TB/s on an H100, of bfloat16 and of float32."""
_WARPS = 4


def can_run(shape: tuple[int, int]) -> bool:
    """Returns whether a matrix is made of whole tiles, and not of too many."""
    rows, columns = shape
    is_whole = rows > 0 and not (rows % TILE[0] or columns % TILE[1])
    return is_whole and columns // TILE[1] <= MOST_PROGRAMS_ON_AN_AXIS


def cast_transpose(x, scale, dtype: str, largest: float, measures: bool = False, interpret: bool = False):
    """Returns the codes of x / scale, those codes transposed, and x's greatest magnitude.

    Those of `kernels.float8.rounded`, bit by bit apart from NaN's (JAX only).

    Args:
        x: float tensor (m, k), both made of whole tiles; see `can_run`.
        scale: float32 ().
        dtype: float8 dtype of the codes.
        largest: the greatest number of that dtype; greater ones become it.
        measures: whether the greatest magnitude is asked for.
        interpret: True to run the kernel on any device, slowly.

    Returns:
        Tensors (m, k) and (k, m), and float32 () or None.
    """
    static = {"dtype": dtype, "largest": largest, "measures": measures, "interpret": interpret}
    return jitted(_cast_transpose, tuple(static))(x, scale, **static)


def _cast_transpose(x, scale, *, dtype, largest, measures, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def kernel(x_ref, reciprocal_ref, codes_ref, transposed_ref, *greatest_refs):
        values = x_ref[...].astype("float32")
        for ref in greatest_refs:
            # As patterns: Triton's greatest float passes over NaN.
            ref[0, 0] = jnp.max(jax.lax.bitcast_convert_type(jnp.abs(values), "int32"))
        scaled = values * reciprocal_ref[0]
        # Compared so that NaN stays NaN.
        scaled = jnp.where(scaled > largest, largest, jnp.where(scaled < -largest, -largest, scaled))
        codes = scaled.astype(dtype)
        codes_ref[...] = codes
        transposed_ref[...] = codes.T

    rows, columns = TILE
    (m, k), grid = x.shape, (x.shape[0] // rows, x.shape[1] // columns)
    greatest_spec, greatest_shape = pl.BlockSpec((1, 1), lambda i, j: (i, j)), jax.ShapeDtypeStruct(grid, "int32")
    codes, transposed, *greatest = triton_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(TILE, lambda i, j: (i, j)), pl.BlockSpec((1,), lambda i, j: (0,))],
        out_specs=[
            pl.BlockSpec(TILE, lambda i, j: (i, j)),
            pl.BlockSpec(TILE[::-1], lambda i, j: (j, i)),
            *[greatest_spec] * measures,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((m, k), dtype),
            jax.ShapeDtypeStruct((k, m), dtype),
            *[greatest_shape] * measures,
        ],
        warps=_WARPS,
        interpret=interpret,
    )(x, (1 / scale).reshape(1))
    if not measures:
        return codes, transposed, None
    # Or XLA makes the reduction part of a concatenation (with a history), where one thread does it: 0.18 ms.
    pattern = jax.lax.optimization_barrier(jnp.max(greatest[0]))
    return codes, transposed, jax.lax.bitcast_convert_type(pattern, "float32")
