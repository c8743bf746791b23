"""Loss scaling: keeps float16 gradients from underflowing."""

from keras_precision.scaling.loss_scale import (
    DynamicLossScale,
    LossScaleState,
    NoLossScale,
    StaticLossScale,
    found_inf,
)
from keras_precision.scaling.monitor import LossScaleMonitor
from keras_precision.scaling.optimizer import LossScaleOptimizer

__all__ = [
    "DynamicLossScale",
    "LossScaleMonitor",
    "LossScaleOptimizer",
    "LossScaleState",
    "NoLossScale",
    "StaticLossScale",
    "found_inf",
]
