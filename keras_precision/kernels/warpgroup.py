"""Products of activations with stored codes by Hopper's matrix units (wgmma), a kernel for Mosaic GPU (JAX only).

A unit of work is 128 columns of the weight, or 128 rows where it is transposed, times some rows of x; a program has one
or several. One warpgroup fetches; the others decode 64 columns each into registers, from which matrix units take them;
x comes from shared memory. While a part is multiplied the next is decoded, so that neither decoding nor a product waits.
(The design is that of CUTLASS's mixed-input products: Gupta, "Mixed-input matrix multiplication performance
optimizations", 2024.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_precision.kernels import fragments, lanes, warpgroup_program
from keras_precision.kernels.compiled import jitted
from keras_precision.kernels.layout import Layout
from keras_precision.kernels.partial_sums import added, split
from keras_precision.kernels.weight_tiles import PROGRAM_OUTPUTS, Straight, Transposed


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
        programs: so many run at once, or as many as the device has
            multiprocessors (an H100 132). Where there are fewer units of work k
            is split, and where there are more a program with one pair takes
            several, if it `stays`.
        tabled: whether codes of a codebook are looked up two at a time where
            that is possible; see `Tiles.has_table` and `byte_table`.
        stays: whether programs take several units of work, and fetch for the
            next one while they write; if not, each has one.
    """

    batch: int
    parts: int = 2
    stages: int = 4
    cluster: int = 1
    pairs: int = 1
    programs: int = 132
    tabled: bool = False
    stays: bool = True


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
    x_scale: Any = None,
    interpret: Any = None,
):
    """Returns x times the weight.

    Weights are computed and rounded to `dtype`, unless they have one scale a
    column, which multiplies sums. Products are exact and added up in float32.
    With u = 2**-24 and v the unit roundoff of `dtype`, an element differs from
    the exact product of x and the weight by at most
    sum |x| |weight| (v + e + (k + 3) u), and one more rounding to `dtype`,
    where weights are normal numbers of it. v doesn't count where values are
    whole numbers that have one scale a column.

    Weights that are rounded are computed in float32 (e = 0: results are those
    of `decoded` weights but for the order of sums), with two exceptions. For
    codebooks, if the slab is `tabled`, e is 2**-11 (1 + v). For whole numbers
    in bfloat16, where v = 2**-8, e is 2**-15 (1 + v), if weights' magnitudes
    are 2**-118 at least and scales' less than 2**121 (from 2**122 on weights
    are NaN).

    Args:
        x: tensor (m, k) of `dtype`.
        codes: uint8 (ceil(k / 2), n), or int8 (k, n).
        scales: see `row_product.product`.
        layout: what the arrays mean; see `can_run`.
        slab: what a program works on.
        dtype: "float16" or "bfloat16".
        result: dtype of the result; None for the same.
        x_scale: float32 (m, 1) that multiplies sums; None for ones.
        interpret: parameters of Pallas's interpreter of such kernels; None to run them.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": layout, "slab": slab, "result": result or dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), x_scale, **static)


def transposed_product(
    x,
    codes,
    scales: Sequence,
    layout: Layout,
    slab: Slab,
    dtype: str,
    result: str | None = None,
    x_scale: Any = None,
    interpret: Any = None,
):
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
        result: as in `product`.
        x_scale: likewise.
        interpret: likewise.

    Returns:
        Tensor (m, k).
    """
    if layout.block_size is None:  # all rows are one block
        scales, layout = [scales[0][None]], dataclasses.replace(layout, block_size=layout.shape[0])
    static = {"layout": layout, "slab": slab, "result": result or dtype, "interpret": interpret, "tiling": Transposed}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), x_scale, **static)


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
    tiles = tiling(layout, x.dtype.name, parts)
    # What is contracted beyond the last is read as zeros.
    splits, steps_each = split(-(-contracted // (depth * parts)), slab.programs // programs)
    if splits > 1:
        sums = warpgroup_program.run(x, codes, scales, None, m, tiles, slab, "float32", interpret, splits, steps_each)
        found = added(sums, (m, outputs), scales, layout, "float32")
        return (found if x_scale is None else found * x_scale).astype(result)
    x_scale = None if x_scale is None else x_scale[:, 0]
    return warpgroup_program.run(x, codes, scales, x_scale, m, tiles, slab, result, interpret, 1, steps_each)[0]
