"""Optimizers that `compile` shall not wrap in LowPrecision."""

import weakref

import keras

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


def is_as_given(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether `as_given` marked the optimizer."""
    return optimizer in _as_given
