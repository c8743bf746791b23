"""Matmuls that round their operands to 8-bit floating point, in the product and in both of its gradients.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning": e4m3 for activations and weights, e5m2 for gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_precision import dtypes

FORWARD = "float8_e4m3fn"
GRADIENT = "float8_e5m2"
SMALLEST_SCALE = dtypes.info("float32").tiny  # 1 over it is finite
LARGEST_POWER = 2.0**127


class Operand(NamedTuple):
    """A matrix that stands for scale * codes.

    Attributes:
        codes: float8 (rows, contracted); matrix units want the contracted axis last.
        scale: float32 () or (rows, 1).
    """

    codes: Any
    scale: Any


class Steps(NamedTuple):
    """What a device does in its own way.

    Attributes:
        round_both: `round_both`, or a faster function like it.
        multiply: `multiply`, or a faster function like it.
    """

    round_both: Callable
    multiply: Callable


def scale_for(greatest, dtype: str):
    """Returns the least power of two at which a magnitude is in a dtype's range, as float32.

    Floating point codes lose nothing by it, and scaling is exact then, also in
    bfloat16. Inf and NaN stay, so that what they scale is not finite either.

    Args:
        greatest: float tensor, >= 0.
        dtype: float dtype of less than 32 bits.
    """
    least = ops.cast(greatest, "float32") / dtypes.info(dtype).max
    power = ops.view(ops.view(least, "int32") + 0x7FFFFF & -0x800000, "float32")
    return ops.where(least <= LARGEST_POWER, ops.maximum(power, SMALLEST_SCALE), least)


def rounded(x, scale, dtype: str):
    """Returns the codes of x / scale, saturated; NaN stays NaN.

    |x - scale * code| <= 2**-4 |x| (e4m3) or 2**-3 |x| (e5m2), or, where that
    is more, scale * 2**-10 or scale * 2**-17; beside float32's rounding.

    Args:
        x: float tensor.
        scale: float32, of a shape that goes with it.
        dtype: float8 dtype.
    """
    largest = dtypes.info(dtype).max
    # Casts don't saturate: 480 in e4m3 is NaN.
    return ops.cast(ops.clip(ops.cast(x, "float32") * (1 / scale), -largest, largest), dtype)


def round_both(x, scale, column_scale, dtype: str, measures: bool = False):
    """Returns the codes of x / scale, those of x / column_scale transposed, and x's greatest magnitude or None.

    Args:
        x: float tensor (m, k).
        scale: float32 (), or (m, 1).
        column_scale: float32 (1, k); None for `scale`, which is one number then.
        dtype: float8 dtype.
        measures: whether the greatest magnitude is asked for, a float32 ().
    """
    codes = rounded(x, scale, dtype)
    of_columns = codes if column_scale is None else rounded(x, column_scale, dtype)
    return codes, ops.transpose(of_columns), ops.cast(_greatest(x), "float32") if measures else None


def multiply(a: Operand, b: Operand, dtype: str, is_forward: bool):
    """Returns the product (m, n) of operands (m, k) and (n, k), in `dtype`, on devices without float8 matmuls.

    Codes are float32 numbers of at most 4 bits here, whose products all
    devices' matmuls compute exactly, in whatever precision; sums are float32.
    """
    sums = ops.matmul(ops.cast(a.codes, "float32"), ops.transpose(ops.cast(b.codes, "float32")))
    return ops.cast(sums * a.scale * ops.transpose(b.scale), dtype)


EMULATION = Steps(round_both, multiply)


def _greatest(x, axis=None):
    """Returns the greatest magnitude, 0 of an empty batch."""
    return ops.max(ops.abs(x), axis=axis, keepdims=axis is not None, initial=0)


def _by_tensor(x, dtype, steps, state):
    """One scale, from x itself (current scaling)."""
    scale = scale_for(_greatest(x), dtype)
    codes, transposed, _ = steps.round_both(x, scale, None, dtype=dtype)
    return Operand(codes, scale), Operand(transposed, scale), ()


def _by_row(x, dtype, steps, state):
    """One scale for each row of each operand, from x itself: what is transposed has other rows, hence other codes."""
    row_scale, column_scale = (scale_for(_greatest(x, axis), dtype) for axis in (1, 0))
    codes, transposed, _ = steps.round_both(x, row_scale, column_scale, dtype=dtype)
    return Operand(codes, row_scale), Operand(transposed, ops.transpose(column_scale)), ()


def _delayed(x, dtype, steps, state):
    """One scale, known before x: made of the greatest magnitudes of earlier steps."""
    scale, history = state
    codes, transposed, greatest = steps.round_both(x, scale, None, dtype=dtype, measures=True)
    # What Keras does, but an inf in the history, of a step that was skipped, doesn't stop the scale from following.
    seen = ops.max(ops.where(ops.isfinite(history), history, 0.0))
    next_scale = ops.where(seen > 0, ops.maximum(seen / dtypes.info(dtype).max, SMALLEST_SCALE), scale)
    next_history = ops.concatenate([ops.reshape(greatest, (1,)), ops.roll(history, -1)[1:]])
    return Operand(codes, scale), Operand(transposed, scale), (next_scale, next_history)


SCALINGS: dict[str, Callable] = {"tensor": _by_tensor, "row": _by_row, "delayed": _delayed}
"""How scales are chosen: (x, dtype, steps, state) -> operand of x, operand of x transposed, next state."""


def matmul(x, weight, dtype: str, scaling: str = "tensor", states=((), (), ()), steps: Steps = EMULATION):
    """Returns x times a weight, both rounded to e4m3; their gradients are products with the gradient rounded to e5m2.

    Args:
        x: float tensor (m, k).
        weight: float tensor (k, n).
        dtype: float dtype of the result.
        scaling: name of one of `SCALINGS`.
        states: for "delayed", (scale float32 (), history float32 (length,))
            for x, the weight and the gradient; what comes next of each is
            returned as its gradient, as Keras's optimizers expect it.
        steps: what the device does in its own way.

    Returns:
        Tensor (m, n).
    """
    operands = SCALINGS[scaling]

    @ops.custom_gradient
    def product(x, weight, *flat):
        x_state, weight_state, gradient_state = (flat[i : i + 2] for i in (0, 2, 4))
        x_rows, x_columns, next_x = operands(x, FORWARD, steps, x_state)
        weight_rows, weight_columns, next_weight = operands(weight, FORWARD, steps, weight_state)

        def gradient(*arguments, upstream=None):
            (upstream,) = arguments if upstream is None else (upstream,)
            rows, columns, next_gradient = operands(upstream, GRADIENT, steps, gradient_state)
            to_x = steps.multiply(rows, weight_rows, dtype=dtype, is_forward=False)
            to_weight = steps.multiply(x_columns, columns, dtype=dtype, is_forward=False)
            return ops.cast(to_x, x.dtype), ops.cast(to_weight, weight.dtype), *next_x, *next_weight, *next_gradient

        return steps.multiply(x_rows, weight_columns, dtype=dtype, is_forward=True), gradient

    return product(x, weight, *(part for state in states for part in state))
