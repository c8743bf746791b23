"""Which wrappers `model.compile` puts around an optimizer."""

import weakref

import keras

from keras_precision import _bridge
from keras_precision.optimizers.low_precision import HALF_DTYPES, LowPrecision
from keras_precision.policies.resolve import resolve

_as_given: weakref.WeakSet = weakref.WeakSet()


def as_given(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer, which `compile` will now not wrap in `LowPrecision`.

    Example:
        >>> optimizer = as_given(keras.optimizers.SGD(0.1))
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="bfloat16")])
        >>> model.compile(optimizer, "mse")
        >>> model.optimizer is optimizer
        True
    """
    _as_given.add(optimizer)
    return optimizer


def wrapped_for(model: keras.Model, optimizer, auto_scale_loss: bool):
    """Returns the optimizer that a model's layers need, and whether Keras shall still decide on loss scaling.

    - Weights in bfloat16 or float16: `LowPrecision`.
    - Layers that compute in float16: loss scaling, unless `auto_scale_loss` is
      False. It is decided by the layers, not by the model's own policy (D9).

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
    if is_float16 and auto_scale_loss and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer, False


def _policies_of(model):
    layers = [layer for layer in _bridge.flatten_layers(model) if not isinstance(layer, keras.layers.InputLayer)]
    working = [layer for layer in layers if not isinstance(layer, keras.Model)]
    return [resolve(layer) for layer in working or layers]


def _in_low_precision(optimizer):
    if isinstance(optimizer, LowPrecision) or optimizer in _as_given:
        return optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if not optimizer.built:
            optimizer.inner_optimizer = _in_low_precision(optimizer.inner_optimizer)
        return optimizer
    return LowPrecision(optimizer)
