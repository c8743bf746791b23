"""Products of activations with stored codes, by whatever is fastest for their shape on this device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_precision.kernels import device, measured, reference, weight_only
from keras_precision.kernels.weight_only import Layout


def matmul(x, codes, scales: Sequence, layout: Layout, dtype: str, decode: Callable):
    """Returns x times a stored weight, in `dtype`.

    On NVIDIA GPUs from Ampere on, under JAX, few rows are multiplied by a
    kernel that reads each code once and more rows with a weight that a kernel
    decodes; everywhere else, and under `keras.distribution`, with what
    `decode` gives. Results differ from those by no more than
    `weight_only.product` and `weight_only.decoded` tell, beside the backend's
    matmul precision. The gradient with respect to x is that of a product with
    the decoded weight; codes and scales get none.

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
        if weight_only.can_decode(layout, plan.decoding):
            return weight_only.decoded(codes, scales, layout, plan.decoding, dtype)
        return decode(dtype)

    rows = math.prod(x.shape[:-1])
    tile = plan.product(rows) if dtype != "float32" or rows == 1 else None

    @ops.custom_gradient
    def product(x, codes, *scales):
        if tile is None:
            found = ops.matmul(x, decoded(codes, scales, dtype))
        else:
            found = weight_only.product(x, codes, scales, layout, tile, dtype)

        def gradient(*arguments, upstream=None):
            (upstream,) = arguments if upstream is None else (upstream,)
            weight = decoded(codes, scales, keras.backend.standardize_dtype(upstream.dtype))
            return ops.cast(ops.matmul(upstream, ops.transpose(weight)), x.dtype), None, *[None] * len(scales)

        return found, gradient

    found = product(ops.reshape(x, (rows, layout.shape[0])), codes, *scales)
    return ops.reshape(found, (*x.shape[:-1], layout.shape[1]))


def integer_products(x, codes) -> Callable:
    """Returns what multiplies int8 codes with those of x: `reference.scaled_products` or a faster function like it.

    On NVIDIA GPUs from Ampere on, under JAX, few rows are multiplied by the
    kernel of `weight_only`, which sums in float32: then sums above 2**24 are
    rounded, by at most (k + 3) 2**-24 of the sum of magnitudes.

    Args:
        x: float tensor (..., k) that is to be rounded to codes.
        codes: int8 tensor (k, n).
    """
    layout = Layout(tuple(codes.shape))
    if not can_run(x, codes, layout, "bfloat16"):
        return reference.scaled_products
    rows = math.prod(x.shape[:-1])
    tile = measured.PLANS[layout.kind].product(rows)
    if tile is None:
        fits = layout.shape[0] <= reference.ROWS_PER_SUM
        is_large = rows >= measured.ROWS_OF_INTEGER_PARTS
        return scaled_products_in_parts if is_large and fits else reference.scaled_products

    def multiply(x_codes, x_scale, codes, scale, dtype):
        x_codes = ops.cast(x_codes, "bfloat16")  # which holds codes exactly
        found = weight_only.product(x_codes, codes, [scale], layout, tile, "bfloat16", "float32")
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


def can_run(x, codes, layout: Layout, dtype: str) -> bool:
    """Returns whether there are kernels for these arrays here."""
    if keras.backend.backend() != "jax" or keras.distribution.distribution() is not None:
        return False
    has_known_shape = all(isinstance(size, int) for size in (*x.shape, *codes.shape)) and 0 not in x.shape
    is_addressable = math.prod(codes.shape) < 2**31  # kernels count elements in int32
    is_of_kernels = dtype in ("float16", "bfloat16", "float32")
    return has_known_shape and is_addressable and is_of_kernels and device.has_triton()
