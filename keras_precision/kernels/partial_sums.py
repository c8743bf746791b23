"""A product whose k is split among programs of a kernel, and whose partial sums XLA adds up (JAX only)."""

from __future__ import annotations

from collections.abc import Sequence

from keras_precision.kernels.layout import Layout


def split(steps: int, programs: int) -> tuple[int, int]:
    """Returns into how many parts to split some steps, and how many of them each part has; together they may be more.

    Args:
        steps: > 0.
        programs: how many parts there are to be, if there are as many steps.

    Example:
        >>> split(10, 4), split(10, 0), split(3, 8)
        ((4, 3), (1, 10), (3, 1))
    """
    each = -(-steps // max(1, min(steps, programs)))
    return -(-steps // each), each


def places(start, size: int, end: int):
    """Returns the indices start..start + size; where `end` is no multiple of the size, those beyond are the last one.

    Kernels read such clamped columns one by one.
    """
    import jax.numpy as jnp

    found = start + jnp.arange(size)
    return found if end % size == 0 else jnp.minimum(found, end - 1)


def added(sums, shape: tuple[int, int], scales: Sequence, layout: Layout, dtype: str):
    """Returns the product of partial sums, scaled where a column has one scale.

    Args:
        sums: float32 tensor (parts, at least m, at least n).
        shape: (m, n).
        scales: of the weight; see `row_product.product`.
        layout: of the weight.
        dtype: of the result.
    """
    import jax.numpy as jnp

    m, n = shape
    total = jnp.sum(sums, axis=0)[:m, :n]
    is_scaled = layout.block_size is not None or not scales
    return (total if is_scaled else total * scales[0]).astype(dtype)
