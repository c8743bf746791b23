"""Optimizers for weights and states of few bits."""

from keras_precision.optimizers.as_given import as_given
from keras_precision.optimizers.low_precision import LowPrecision

__all__ = ["LowPrecision", "as_given"]
