"""Optimizers for weights and states of few bits."""

from keras_precision.optimizers.attach import as_given
from keras_precision.optimizers.low_precision import LowPrecision

__all__ = ["LowPrecision", "as_given"]
