"""Looks at single gradients, sparse ones included."""

import keras
from keras import ops

from keras_precision.dtypes import HALF_DTYPES


def has_inf(gradient):
    """Returns a bool scalar tensor: whether a gradient (a tensor, or tf.IndexedSlices) holds inf or NaN."""
    values = gradient.values if hasattr(gradient, "indices") and hasattr(gradient, "values") else gradient
    return ops.logical_not(ops.all(ops.isfinite(values)))


def divided(gradient, scale):
    """Returns a gradient over the loss scale, in float32 at least: 2**-24 / 2**15 is 0 in float16.

    Args:
        gradient: tensor or tf.IndexedSlices.
        scale: float32 scalar tensor, > 0.
    """
    if keras.backend.standardize_dtype(gradient.dtype) in HALF_DTYPES:
        gradient = ops.cast(gradient, "float32")
    return ops.divide(gradient, scale)
