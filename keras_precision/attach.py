"""Which wrappers `model.compile` puts around an optimizer."""

import keras

from keras_precision import _bridge
from keras_precision.dtypes import HALF_DTYPES
from keras_precision.optimizers.as_given import is_as_given
from keras_precision.optimizers.low_precision import LowPrecision
from keras_precision.policies.resolve import resolve
from keras_precision.scaling.optimizer import LossScaleOptimizer


def wrapped_for(model: keras.Model, optimizer, auto_scale_loss: bool):
    """Returns the optimizer that a model's layers need, and whether Keras shall still decide on loss scaling.

    - Weights in bfloat16 or float16: `LowPrecision`.
    - Layers that compute in float16: loss scaling, unless `auto_scale_loss` is
      False or the optimizer has a `loss_scale_factor`. It is decided by the
      layers, not by the model's own policy (D9).

    Args:
        model: the model, built or not.
        optimizer: the optimizer that `compile` got, or None.
        auto_scale_loss: what `compile` got.
    """
    if optimizer is None:
        return None, auto_scale_loss
    policies = _policies_of(model)
    if any(policy.variable_dtype in HALF_DTYPES for policy in policies):
        optimizer = _in_low_precision(optimizer)
    is_float16 = any(policy.compute_dtype == "float16" for policy in policies)
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor is not None
    if is_float16 and auto_scale_loss and not is_scaled:
        optimizer = LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer, False


def _policies_of(model):
    layers = [layer for layer in _bridge.flatten_layers(model) if not isinstance(layer, keras.layers.InputLayer)]
    working = [layer for layer in layers if not isinstance(layer, keras.Model)]
    return [resolve(layer) for layer in working or layers]


def _in_low_precision(optimizer):
    if isinstance(optimizer, LowPrecision) or is_as_given(optimizer):
        return optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if not optimizer.built:
            optimizer.inner_optimizer = _in_low_precision(optimizer.inner_optimizer)
        return optimizer
    return LowPrecision(optimizer)
