"""Products of activations with stored codes, by whatever is fastest for their shape on this device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import keras
from keras import ops
from keras.backend import standardize_dtype

from keras_precision import dtypes
from keras_precision.kernels import (
    cast_transpose,
    device,
    few_rows,
    float8,
    measured,
    one_thread,
    reference,
    row_product,
    scaled_halves,
    warpgroup,
    weight_only,
    weight_only_transposed,
)
from keras_precision.kernels.layout import Layout


def matmul(x, codes, scales: Sequence, layout: Layout, dtype: str, decode: Callable):
    """Returns x times a stored weight, in `dtype`.

    On NVIDIA GPUs from Ampere on, under JAX, few rows are multiplied by a
    kernel that reads each code once, and more rows with a weight that a kernel
    decodes or, on Hopper, by one that decodes as it multiplies; everywhere
    else, and under `keras.distribution`, with what `decode` gives. Results
    differ from those by no more than `product` of `row_product`,
    `weight_only`, `few_rows`, `warpgroup` and `scaled_halves` tells, beside the
    backend's matmul precision. The gradient with respect to x is a product with the
    transposed weight, by kernels likewise, with what `transposed_product` of
    `warpgroup`, `scaled_halves` and `weight_only_transposed` tells. Codes and
    scales get none.

    Args:
        x: float tensor (..., k).
        codes: see `weight_only.product`.
        scales: likewise.
        layout: what the arrays mean.
        dtype: float dtype.
        decode: function of a dtype that returns the weight (k, n).

    Returns:
        Tensor (..., n).
    """
    x = ops.cast(x, dtype)
    if not can_run(x, codes, layout, dtype):
        return ops.matmul(x, decode(dtype))
    plan = measured.PLANS[layout.kind]

    def decoded(codes, scales, dtype):
        by_xla = (layout.kind, dtype) in measured.DECODED_BY_XLA
        if not by_xla and weight_only.can_decode(layout, plan.decoding):
            return weight_only.decoded(codes, scales, layout, plan.decoding, dtype)
        return decode(dtype)

    rows = math.prod(x.shape[:-1])
    tile = _tile(layout, rows, dtype)

    def product(x, codes, *scales):
        if tile is None:
            return ops.matmul(x, decoded(codes, scales, dtype))
        return product_by(tile)(x, codes, scales, layout, tile, dtype)

    def transposed(x, codes, *scales):
        return _times_transposed(x, codes, scales, layout, decoded)

    def product_elsewhere(x, codes, *scales):
        return ops.matmul(x, decode(dtype))

    def transposed_elsewhere(x, codes, *scales):
        return ops.matmul(x, ops.transpose(decode(standardize_dtype(x.dtype))))

    multiply = _linear(
        device.on_nvidia(product, product_elsewhere),
        device.on_nvidia(transposed, transposed_elsewhere),
    )
    found = multiply(ops.reshape(x, (rows, layout.shape[0])), codes, *scales)
    return ops.reshape(found, (*x.shape[:-1], layout.shape[1]))


def _linear(product: Callable, transposed: Callable) -> Callable:
    """Returns a product as function of (x, codes, *scales), whose gradient with respect to x another one gives."""

    @ops.custom_gradient
    def differentiable(x, codes, *scales):
        def gradient(*arguments, upstream=None):
            (upstream,) = arguments if upstream is None else (upstream,)
            return ops.cast(transposed(upstream, codes, *scales), x.dtype), None, *[None] * len(scales)

        return product(x, codes, *scales), gradient

    return differentiable


_MODULES = {
    row_product.Strip: row_product,
    weight_only.Tile: weight_only,
    warpgroup.Slab: warpgroup,
    one_thread.Warps: few_rows,
    scaled_halves.Halves: scaled_halves,
    weight_only_transposed.TransposedTile: weight_only_transposed,
}

_Tile = (
    row_product.Strip
    | weight_only.Tile
    | warpgroup.Slab
    | one_thread.Warps
    | scaled_halves.Halves
    | weight_only_transposed.TransposedTile
)


def _module(tile):
    """Returns the module of the kernel that works on such tiles."""
    return _MODULES[type(tile)]


def product_by(tile: _Tile) -> Callable:
    """Returns what multiplies with such a tile."""
    return _module(tile).product


def transposed_product_by(tile: _Tile) -> Callable:
    """Returns what multiplies with the transposed weight with such a tile."""
    return _module(tile).transposed_product


def _tile(layout, rows, dtype):
    """Returns what to multiply so many rows by, None if the weight is to be decoded."""
    if dtype == "float32":
        return measured.first_for(rows, _float32_tiles(layout))
    kind = layout.kind if layout.largest_scale is None else f"double-quantized {layout.kind}"
    return _hopper_tile(kind, layout, rows, dtype) or measured.PLANS[layout.kind].product(rows)


def _float32_tiles(layout):
    """Returns which tiles multiply float32 activations."""
    if not device.multiplies_in_tf32():
        return measured.FLOAT32_TILES[layout.kind]
    has_halves = device.has_wgmma() and scaled_halves.can_run(layout, "float32")
    return (measured.HOPPER_TF32_TILES if has_halves else measured.TF32_TILES)[layout.kind]


def _hopper_tile(kind, layout, rows, dtype):
    """Returns the tile of a kind that multiplies so many rows of x of a dtype on Hopper, None elsewhere or if none does."""
    if not device.has_wgmma():
        return None
    tiles = measured.HOPPER_TILES[kind]
    return measured.first_for(rows, tuple(pair for pair in tiles if _module(pair[1]).can_run(layout, dtype)))


def _times_transposed(x, codes, scales, layout, decoded):
    """Returns x (m, n) times the transposed weight, in x's dtype; `decoded` is a function of (codes, scales, dtype)."""
    dtype = standardize_dtype(x.dtype)
    tile = _transposed_tile(layout, x.shape[0], dtype)
    if tile is None:
        return ops.matmul(x, ops.transpose(decoded(codes, scales, dtype)))

    def product(x, codes, *scales):
        return transposed_product_by(tile)(x, codes, scales, layout, tile, dtype)

    # Penalties on gradients differentiate it once more.
    return _linear(product, lambda x, codes, *scales: ops.matmul(x, decoded(codes, scales, dtype)))(x, codes, *scales)


def _transposed_tile(layout, rows, dtype):
    """Returns what to multiply so many rows with a transposed weight by, None if it is to be decoded."""
    hopper_tile = _hopper_transposed_tile(layout, rows, dtype)
    if hopper_tile is not None or not weight_only_transposed.can_run(layout, dtype):
        return hopper_tile
    return measured.first_for(rows, measured.transposed_tiles(layout.kind, dtype))


def _hopper_transposed_tile(layout, rows, dtype):
    """Returns what multiplies so many rows with a transposed weight on Hopper, None elsewhere or if nothing does."""
    if not device.has_wgmma():
        return None
    slabs = measured.TRANSPOSED_SLABS[layout.kind]
    slab = measured.first_for(rows, slabs)
    if warpgroup.can_run_transposed(layout, dtype):
        return slab
    if device.multiplies_in_tf32() and scaled_halves.can_run_transposed(layout, dtype):
        return scaled_halves.Halves(slab or slabs[-1][1])  # decoding first would end in a product in float32
    return None


def integer_products(x, codes) -> reference.Products:
    """Returns what multiplies int8 codes with those of x, and gradients with the weight that they stand for.

    Under JAX Hopper GPUs run a kernel of their own. On other NVIDIA GPUs from
    Ampere on few rows are multiplied by the kernel of `weight_only`, which sums
    in float32: then sums above 2**24 are rounded, by at most (k + 3) 2**-24 of
    the sum of magnitudes.

    Args:
        x: float tensor (..., k) that is to be rounded to codes.
        codes: int8 tensor (k, n).
    """
    layout = Layout(tuple(codes.shape))
    if not can_run(x, codes, layout, "bfloat16"):
        return reference.IN_OPERATIONS

    def decoded(codes, scales, dtype):
        return reference.decode_columns(codes, *scales, dtype)

    def transposed(x, codes, scale):
        return _times_transposed(x, codes, [scale], layout, decoded)

    return reference.Products(
        device.on_nvidia(_scaled_products(x, codes, layout), reference.scaled_products),
        device.on_nvidia(transposed, reference.times_transposed),
    )


def _scaled_products(x, codes, layout):
    """Returns the first of `integer_products`."""
    rows = math.prod(x.shape[:-1])
    fits = layout.shape[0] <= reference.ROWS_PER_SUM
    hopper_tile = _hopper_tile("integers", layout, rows, standardize_dtype(codes.dtype))
    if fits and hopper_tile is not None:
        product = _module(hopper_tile).integer_product
        return lambda *arrays, dtype: product(*arrays, dtype, hopper_tile)
    tile = measured.PLANS[layout.kind].product(rows)
    if tile is None:
        is_large = rows >= measured.ROWS_OF_INTEGER_PARTS
        return scaled_products_in_parts if is_large and fits else reference.scaled_products

    def multiply(x_codes, x_scale, codes, scale, dtype):
        x_codes = ops.cast(x_codes, "bfloat16")  # which holds codes exactly
        found = product_by(tile)(x_codes, codes, [scale], layout, tile, "bfloat16", "float32")
        return ops.cast(found * x_scale, dtype)

    return multiply


def scaled_products_in_parts(x_codes, x_scale, codes, scale, dtype: str):
    """Returns what `reference.scaled_products` does, some rows at a time (JAX only).

    cuBLAS multiplies int8 fastest where both operands' last axis is the one
    that is contracted, so that the weight is transposed first.
    """
    import jax

    transposed = jax.lax.optimization_barrier(ops.transpose(codes))
    found = []
    for first in range(0, x_codes.shape[0], measured.ROWS_OF_INTEGER_PARTS):
        rows = slice(first, first + measured.ROWS_OF_INTEGER_PARTS)
        contracted = (((1,), (1,)), ((), ()))
        sums = jax.lax.dot_general(x_codes[rows], transposed, contracted, preferred_element_type="int32")
        found.append(ops.cast(ops.cast(sums, "float32") * x_scale[rows] * scale, dtype))
    return ops.concatenate(found)


def multiplies_float8() -> bool:
    """Returns whether JAX's default device multiplies float8 matrices as such; on TensorFlow none does."""
    return keras.backend.backend() == "jax" and device.has_float8()


def float8_steps() -> float8.Steps:
    """Returns how `float8.matmul` rounds and multiplies here: with float8 matrix units, or as the reference does."""
    if not multiplies_float8():
        return float8.EMULATION
    return float8.Steps(
        device.on_nvidia(_round_both, float8.round_both), device.on_nvidia(_multiply_float8, float8.multiply)
    )


def _round_both(x, scale, column_scale, dtype, measures=False):
    is_whole = all(isinstance(size, int) for size in x.shape) and cast_transpose.can_run(tuple(x.shape))
    if is_whole and device.has_triton() and keras.distribution.distribution() is None:
        return cast_transpose.cast_transpose(x, scale, column_scale, dtype, dtypes.info(dtype).max, measures)
    return float8.round_both(x, scale, column_scale, dtype, measures)


def _multiply_float8(a, b, dtype, is_forward):
    """Multiplies on float8 matrix units (JAX only).

    Forward they may add up with fewer bits ("fast accumulation"; DeepSeek-V3,
    section 3.3.2, has 14): with k = 4096 and normal numbers an error of 2.5 to
    4% of the root mean square, as much as e4m3's own; 1024: 0.8%. Gradients,
    whose k may be the number of tokens, are added up in float32: 0.04%, and
    such a product takes 11% more time. Unscaled sums are rounded to bfloat16
    where that is the result's dtype, as float32 results took a fifth more of a
    training step, and to float32 else, as they may exceed float16's range.
    (H100, jax 0.11.2)
    """
    import jax

    # Named algorithms also spare XLA from trying out others: a minute for each layer's shape where none is named.
    # One row is multiplied number by number, which knows of none.
    algorithms = jax.lax.DotAlgorithmPreset
    algorithm = algorithms.ANY_F8_ANY_F8_F32_FAST_ACCUM if is_forward else algorithms.ANY_F8_ANY_F8_F32
    sums = jax.lax.dot_general(
        a.codes,
        b.codes,
        (((1,), (1,)), ((), ())),
        precision=None if 1 in (a.codes.shape[0], b.codes.shape[0]) else algorithm,
        preferred_element_type="bfloat16" if dtype == "bfloat16" else "float32",
    )
    return ops.cast(ops.cast(sums, "float32") * a.scale * ops.transpose(b.scale), dtype)


def can_run(x, codes, layout: Layout, dtype: str) -> bool:
    """Returns whether there are kernels for these arrays here."""
    if keras.backend.backend() != "jax" or keras.distribution.distribution() is not None:
        return False
    has_known_shape = all(isinstance(size, int) for size in (*x.shape, *codes.shape)) and 0 not in x.shape
    is_addressable = math.prod(codes.shape) < 2**31  # kernels count elements in int32
    is_of_kernels = dtype in ("float16", "bfloat16", "float32")
    return has_known_shape and is_addressable and is_of_kernels and device.has_triton()
