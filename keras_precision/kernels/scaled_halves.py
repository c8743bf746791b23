"""Products of float32 activations by Hopper's kernels for float16 (JAX only).

float16 has as many significant bits as TF32, half of its bytes and twice its rate. Its range is enough where each row
of x, and the weight, are scaled by powers of two so that their greatest magnitudes just fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_precision.kernels import warpgroup
from keras_precision.kernels.float8 import scale_for
from keras_precision.kernels.layout import Layout, with_plain_scales
from keras_precision.kernels.warpgroup import Slab

_DTYPE = "float16"
_LARGEST_INTEGER = 128  # of int8


@dataclass(frozen=True)
class Halves:
    """What one program works on at a time.

    Attributes:
        slab: of float16 numbers.
    """

    slab: Slab


def can_run(layout: Layout, dtype: str) -> bool:
    """Returns whether `product` multiplies such a weight and such activations; see `warpgroup.can_run`."""
    return dtype == "float32" and warpgroup.can_run(layout, _DTYPE)


def can_run_transposed(layout: Layout, dtype: str) -> bool:
    """Returns whether `transposed_product` multiplies such a weight and such activations."""
    return dtype == "float32" and warpgroup.can_run_transposed(layout, _DTYPE)


def product(x, codes, scales: Sequence, layout: Layout, halves: Halves, dtype: str, interpret: Any = None):
    """Returns x times the weight, with operands of 11 significant bits, as XLA's default for float32 has them.

    With u = 2**-24, v = 2**-11 and e of `warpgroup.product` for float16, an
    element differs from the exact product of x and the weight by at most
    sum |x| |weight| (2 v + v**2 + e + (k + 3) u), and
    k 2**-38 max |row of x| max |weight|, for numbers that are that much less
    than the greatest; and by 2**-94 k, where a row and the weight are so small.

    Args:
        x: float32 tensor (m, k).
        codes: see `warpgroup.product`.
        scales: likewise.
        layout: what the arrays mean; see `can_run`.
        halves: what a program works on.
        dtype: "float32", of the result.
        interpret: as in `warpgroup.product`.

    Returns:
        Tensor (m, n).
    """
    is_scaled_afterwards = layout.block_size is None
    return _product(warpgroup.product, x, codes, scales, layout, halves, is_scaled_afterwards, interpret)


def transposed_product(x, codes, scales: Sequence, layout: Layout, halves: Halves, dtype: str, interpret: Any = None):
    """Returns x times the transposed weight, within the bound of `product` with e = 0 and n in place of k.

    Args:
        x: float32 tensor (m, n).
        codes: see `warpgroup.product`.
        scales: likewise.
        layout: of the weight (k, n); see `can_run_transposed`.
        halves: what a program works on.
        dtype: "float32", of the result.
        interpret: as in `warpgroup.product`.

    Returns:
        Tensor (m, k).
    """
    return _product(warpgroup.transposed_product, x, codes, scales, layout, halves, False, interpret)


def _product(multiply: Callable, x, codes, scales, layout, halves, is_scaled_afterwards, interpret):
    x_scale = scale_for(ops.max(ops.abs(x), axis=1, keepdims=True), _DTYPE)
    x = ops.cast(x * (1 / x_scale), _DTYPE)
    if not is_scaled_afterwards:
        if layout.largest_scale is not None:
            scales, layout = with_plain_scales(scales, layout)
        largest = max(map(abs, layout.values)) if layout.values else _LARGEST_INTEGER
        weight_scale = scale_for(ops.max(ops.abs(scales[0])) * largest, _DTYPE)
        scales, x_scale = [scales[0] * (1 / weight_scale)], x_scale * weight_scale
    return multiply(x, codes, scales, layout, halves.slab, _DTYPE, "float32", x_scale=x_scale, interpret=interpret)
