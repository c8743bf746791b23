"""Loss scaling: keeps float16 gradients from underflowing."""

from keras_precision.scaling.loss_scale import (
    DynamicLossScale,
    LossScaleState,
    NoLossScale,
    StaticLossScale,
    found_inf,
)

__all__ = ["DynamicLossScale", "LossScaleState", "NoLossScale", "StaticLossScale", "found_inf"]
