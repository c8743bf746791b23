"""Matmuls with 8-bit integer codes in keras.ops."""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

# As many products of two codes of magnitude 127 still fit in int32: 2**17 * 127**2 < 2**31.
ROWS_PER_SUM = 2**17


def decode_columns(codes, scale, dtype: str):
    """Returns the weight scale * codes.

    Args:
        codes: integer tensor (k, n).
        scale: float32 tensor (n,).
        dtype: float dtype of the result.
    """
    return ops.cast(ops.cast(codes, "float32") * scale, dtype)


def quantize_rows(x, dtype):
    """Returns integer codes in [-127, 127] of activations, and their scales, one a row.

    |x - scale * codes| <= scale / 2, beside float32's rounding. Rows that hold
    inf or NaN get such a scale, so that their products are not finite either.

    Args:
        x: float tensor (..., k).
        dtype: integer dtype of the codes.

    Returns:
        (codes (..., k), float32 (..., 1)).
    """
    x = ops.cast(x, "float32")
    # Some devices' greatest number passes over NaN, but no sum does.
    scale = ops.max(ops.abs(x), axis=-1, keepdims=True) / 127 + 0 * ops.sum(x, axis=-1, keepdims=True)
    is_usable = ops.logical_and(scale > 0, ops.isfinite(scale))
    codes = ops.round(x / ops.where(is_usable, scale, 1))
    return ops.cast(ops.where(is_usable, codes, 0), dtype), scale


def scaled_products(x_codes, x_scale, codes, scale, dtype: str):
    """Returns x_scale * scale * (x_codes times codes), summed exactly, in int32, and scaled in float32.

    Args:
        x_codes: int8 tensor (m, k), in [-127, 127].
        x_scale: float32 tensor (m, 1).
        codes: int8 tensor (k, n), likewise.
        scale: float32 tensor (n,).
        dtype: float dtype of the result.
    """
    sums = 0
    for first in range(0, codes.shape[0], ROWS_PER_SUM):
        rows = slice(first, first + ROWS_PER_SUM)
        sums = sums + ops.cast(ops.matmul(x_codes[:, rows], codes[rows]), "float32")
    return ops.cast(sums * x_scale * scale, dtype)


def times_transposed(x, codes, scale):
    """Returns x (m, n) times the transposed weight scale * codes: (m, k), in x's dtype; see `scaled_products`."""
    return ops.matmul(x, ops.transpose(decode_columns(codes, scale, x.dtype)))


class Products(NamedTuple):
    """What a device multiplies in its own way.

    Attributes:
        scaled: `scaled_products`, or a faster function like it.
        transposed: `times_transposed`, or a faster function like it.
    """

    scaled: Callable = scaled_products
    transposed: Callable = times_transposed


IN_OPERATIONS = Products()


def integer_matmul(x, codes, scale, dtype: str, products: Products = IN_OPERATIONS):
    """Returns x times the weight scale * codes, with x rounded to codes too, a scale per row.

    The gradient with respect to x is that of a product with the decoded weight,
    as if x were not rounded; codes and scale get none.

    Args:
        x: float tensor (..., k).
        codes: int8 tensor (k, n), in [-127, 127].
        scale: float32 tensor (n,).
        dtype: float dtype of the result.
        products: what multiplies.

    Returns:
        Tensor (..., n).
    """
    k, n = codes.shape

    @ops.custom_gradient
    def product(x, codes, scale):
        x_codes, x_scale = quantize_rows(x, codes.dtype)

        def gradient(*arguments, upstream=None):
            (upstream,) = arguments if upstream is None else (upstream,)
            return ops.cast(products.transposed(upstream, codes, scale), x.dtype), None, None

        return products.scaled(x_codes, x_scale, codes, scale, dtype=dtype), gradient

    # Two axes, since Keras 3.15 on TensorFlow sums the products of an int8 vector in int8, where they wrap around.
    rows = product(ops.reshape(x, (-1, k)), codes, scale)
    return ops.reshape(rows, (*ops.shape(x)[:-1], n))


def mixed_integer_matmul(x, codes, scale, threshold: float, dtype: str, products: Products = IN_OPERATIONS):
    """Returns what `integer_matmul` does, but with features of large activations not rounded.

    Args:
        x: float tensor (..., k).
        codes: int8 tensor (k, n), in [-127, 127].
        scale: float32 tensor (n,).
        threshold: a feature in which the magnitude of any row is greater is
            multiplied in `dtype` with the decoded weight.
        dtype: float dtype.
        products: what multiplies codes.

    Returns:
        Tensor (..., n).
    """
    is_large = ops.any(ops.abs(x) > threshold, axis=tuple(range(len(x.shape) - 1)))
    nothing = ops.zeros_like(x)
    small = integer_matmul(ops.where(is_large, nothing, x), codes, scale, dtype, products)
    large = ops.cast(ops.where(is_large, x, nothing), dtype)
    # Shapes can't follow data in compiled code, so that few large features cost as much as many; none cost nothing.
    return small + ops.cond(
        ops.any(is_large),
        lambda: ops.matmul(large, decode_columns(codes, scale, dtype)),
        lambda: ops.zeros_like(small),
    )
