"""Losses, metrics and regularizers that compute 16-bit values in float32."""

import functools
from collections.abc import Callable

import keras

from keras_precision import _bridge
from keras_precision.dtypes import HALF_DTYPES
from keras_precision.policies import scope


def to_float32(value):
    """Returns `value` in float32 if it is a float16 or bfloat16 tensor, else as it is."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (keras.ops.is_tensor(value) or isinstance(value, (keras.KerasTensor, keras.Variable))):
        return value
    return keras.ops.cast(value, "float32") if keras.backend.standardize_dtype(dtype) in HALF_DTYPES else value


def in_float32(function: Callable) -> Callable:
    """Returns `function`, its float16 and bfloat16 arguments cast to float32 (lists and dicts looked into).

    float16 ends at 65504, so the square of a difference of 256 overflows, and
    bfloat16 sums of more than 256 equal terms stop growing.

    Example:
        >>> total = in_float32(lambda x: keras.ops.sum(keras.ops.square(x)))
        >>> float(total(keras.ops.full((4,), 300.0, dtype="float16")))
        360000.0
    """

    @functools.wraps(function)
    def computed_in_float32(*args, **kwargs):
        args, kwargs = keras.tree.map_structure(_keeping_mask, (args, kwargs))
        return function(*args, **kwargs)

    return computed_in_float32


def _keeping_mask(value):
    converted = to_float32(value)
    mask = getattr(value, "_keras_mask", None)
    if converted is not value and mask is not None:
        converted._keras_mask = mask
    return converted


class ComputesInFloat32:
    """Makes a regularizer compute 16-bit tensors in float32 (mixed in by `_bridge.specialise`)."""

    def __call__(self, x):
        return super().__call__(to_float32(x))


class ReturnsRequestedDType:
    """Makes a loss or metric that computes in float32 return the 16-bit dtype it was made for (mixed in)."""

    def __call__(self, *args, **kwargs):
        return self._requested(super().__call__(*args, **kwargs))

    def result(self):
        return self._requested(super().result())

    def get_config(self):
        config = super().get_config()
        return {**config, "dtype": self.requested_dtype} if "dtype" in config else config

    def _requested(self, outputs):
        return keras.tree.map_structure(
            lambda x: keras.ops.cast(x, self.requested_dtype) if keras.ops.is_tensor(x) else x, outputs
        )


def compute_in_float32(loss_or_metric: keras.Loss | keras.Metric, dtype: str | None) -> None:
    """Makes a loss or metric of a 16-bit dtype compute and accumulate in float32, and in float64 if all else does.

    Its values keep the dtype that it was made for, but for losses in float16,
    which stay float32: what overflows there would stop training. In float16
    the sum of a metric ends at 65504, and a count stops at 2048, where
    2048 + 1 == 2048. Under a global float64 policy, one that was given no
    dtype takes float64: Keras would round predictions to float32.

    Args:
        loss_or_metric: just made.
        dtype: what its constructor was given, or None.
    """
    requested = loss_or_metric.dtype
    chosen = scope.current()
    if dtype is None and chosen is not None and chosen.compute_dtype == "float64":
        _bridge.set_dtype(loss_or_metric, "float64")
        return
    if requested not in HALF_DTYPES:
        return
    _bridge.set_dtype(loss_or_metric, "float32")
    if not (isinstance(loss_or_metric, keras.Loss) and requested == "float16"):
        _bridge.specialise(loss_or_metric, ReturnsRequestedDType)
        loss_or_metric.requested_dtype = requested
