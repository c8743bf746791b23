"""Products of few rows of activations with stored codes by warps' matrix instructions, a kernel for Mosaic GPU (JAX only).

Such products are bound by reading the codes: a thread reads its own and multiplies what it has decoded, and nothing is
exchanged before its sums are complete (`one_thread`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import lanes
from keras_precision.kernels.compiled import jitted
from keras_precision.kernels.layout import Layout, scales_at, vectors
from keras_precision.kernels.one_thread import BYTE_ROWS, DTYPES, Warps, multiply, shared_words
from keras_precision.kernels.partial_sums import added, split
from keras_precision.kernels.threads import Thread


def can_run(layout: Layout, dtype: str) -> bool:
    """Returns whether there is a kernel for such a weight and activations of a dtype."""
    k, n = layout.shape
    rows = BYTE_ROWS * layout.codes_per_byte
    has_blocks = layout.block_size is None or layout.block_size % rows == 0
    return dtype in DTYPES and has_blocks and k % rows == 0 and n % Warps().columns == 0


def product(
    x,
    codes,
    scales: Sequence,
    layout: Layout,
    warps: Warps,
    dtype: str,
    result: str | None = None,
    interpret: Any = None,
):
    """Returns x times the weight.

    The codes' values are rounded to `dtype` (whole numbers are exact), their
    products with x are exact and added up in float32, and scales multiply
    these sums. With u = 2**-24 and v the unit roundoff of `dtype`, an element
    differs from the exact product of x and the weight by at most
    sum |x| |weight| (v + (k + 3) u), and one more rounding to `dtype`, where
    no sum of |x| |value| in a block exceeds float32's range; v doesn't count
    where values are whole numbers.

    Args:
        x: tensor (m, k) of `dtype`; all of its rows are worked on at once,
            so that there should be 16 at most.
        codes: uint8 (k / 2, n), or int8 (k, n).
        scales: see `layout.scales_at`, or float32 (n,), or none for ones.
        layout: what the arrays mean; see `can_run`.
        warps: what a program works on.
        dtype: "float16" or "bfloat16".
        result: dtype of the result; None for the same.
        interpret: parameters of Pallas's interpreter of such kernels; None to run them.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": layout, "warps": warps, "result": result or dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), **static)


def integer_product(x_codes, x_scale, codes, scale, dtype: str, warps: Warps, interpret: Any = None):
    """Returns what `warpgroup.integer_product` does, of at most 16 rows of x.

    Args:
        x_codes: int8 (m, k).
        x_scale: float32 (m, 1).
        codes: int8 (k, n).
        scale: float32 (n,).
        dtype: float dtype of the result.
        warps: what a program works on.
        interpret: as in `product`.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": Layout(tuple(codes.shape)), "warps": warps, "result": dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x_codes, codes, (scale, x_scale[:, 0]), **static)


def parts_of_k(layout: Layout, warps: Warps) -> tuple[int, int]:
    """Returns into how many parts k is split, and how many steps of `BYTE_ROWS` rows of bytes each has at most."""
    rounds = -(-layout.byte_rows // (BYTE_ROWS * warps.sharing))
    parts, each = split(rounds, warps.programs // (layout.shape[1] // warps.columns))
    return parts, each * warps.sharing


def _product(x, codes, scales, *, layout, warps, result, interpret):
    shape, (parts, steps) = (x.shape[0], layout.shape[1]), parts_of_k(layout, warps)
    if parts == 1:
        return _run(x, codes, scales, layout, warps, result, interpret, parts, steps)[0]
    of_blocks = scales if layout.block_size is not None else ()
    sums = _run(x, codes, of_blocks, layout, warps, "float32", interpret, parts, steps)
    found = added(sums, shape, scales, layout, "float32")
    return (found * scales[1][:, None] if len(scales) == 2 else found).astype(result)


def _run(x, codes, scales, layout, warps, result, interpret, parts, steps):
    """Returns sums (parts, m, n) of so many steps each."""
    import jax
    from jax import lax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    n, m, dtype = layout.shape[1], x.shape[0], x.dtype.name
    scales = vectors(scales)

    def kernel(*references, shared):
        place = lax.axis_index("strip"), lax.axis_index("part")
        if interpret is not None:
            _multiply_anywhere(*references, *place, layout=layout, warps=warps, steps=steps)
            return

        def in_threads(context, strip, part, shared, *references):
            place = lanes.scalar(strip), lanes.scalar(part)
            own = {"layout": layout, "warps": warps, "dtype": dtype, "m": m, "result": result, "steps": steps}
            multiply(Thread(), *place, shared, *references, **own)

        types = [*[plgpu.Layout.WG_SPLAT(())] * 2, *[plgpu.RefType()] * (1 + len(references))]
        plgpu.inline_mgpu(arg_types=types)(in_threads)(*place, shared, *references)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, m, n), result),
        grid=(n // warps.columns, parts),
        grid_names=("strip", "part"),
        num_threads=1 if interpret is not None else warps.warps // 4,
        thread_name="warpgroup",
        scratch_types={"shared": plgpu.SMEM((shared_words(layout, warps, m),), "uint32")},
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(x, codes, *scales)


def _multiply_anywhere(x, codes, *references, layout, warps, steps):
    """As `multiply`, for all of a program's threads."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    *scales, out, strip, part = references
    columns = pl.ds(strip * warps.columns, warps.columns)
    values = code_values.interpreted(codes[:, columns], layout.values)
    if scales and layout.block_size is not None:
        blocks, places = jnp.arange(layout.blocks)[:, None], strip * warps.columns + jnp.arange(warps.columns)[None]
        factors = scales_at([array[...] for array in scales], blocks, places, layout)
        values *= jnp.repeat(factors, layout.block_size, axis=0)[: len(values)]
    rows = steps * BYTE_ROWS * layout.codes_per_byte
    is_own = jnp.arange(layout.shape[0]) // rows == part
    found = jnp.dot(jnp.where(is_own, x[...].astype("float32"), 0), values, precision="highest")
    if scales and layout.block_size is None:
        found *= scales[0][columns][None]
    if len(scales) == 2:
        found *= scales[1][...][:, None]
    out[part, :, columns] = found.astype(out.dtype)
