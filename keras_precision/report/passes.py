"""Forward and backward passes of a copy of a model, op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_precision import _bridge, _bridge_models
from keras_precision.report.recorder import Recorder, observe


class Batch(NamedTuple):
    """What a model is run on.

    Attributes:
        x: structure of arrays, as the model takes them.
        y: structure of arrays, as its loss takes them; None to run the forward pass alone, as in inference.
        loss: as `compile` takes it.
        loss_weights: likewise.
    """

    x: Any
    y: Any = None
    loss: Any = None
    loss_weights: Any = None


def prepare(model: keras.Model, batch: Batch) -> None:
    """Compiles and builds a copy for the loss of a batch, and makes its layers show what they return.

    Raises:
        LayerFailed: a layer raised.
    """
    observe(model)
    if batch.y is not None:
        model.compile(optimizer=None, loss=batch.loss, loss_weights=batch.loss_weights)
        recorder = Recorder(model)
        with recorder.running(), recorder.failures():
            _bridge_models.build_for(model, batch.x, batch.y)


def trained(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights whose gradients a pass gives."""
    return list(model.trainable_variables)


def trained_names(model: keras.Model) -> list[tuple[int, str]]:
    """Returns (place of the layer, name of the weight) of each of them."""
    owners = {
        id(v): (place, v.name)
        for place, layer in enumerate(_bridge.flatten_layers(model))
        for v in _bridge.own_variables(layer)
    }
    return [owners[id(v)] for v in trained(model)]


def run(model: keras.Model, batch: Batch, recorder: Recorder, loss_scale: float) -> list[Any] | None:
    """Runs a copy forward and, if the batch has targets, backward, one operation after the other.

    Args:
        model: a copy that `prepare` was called with.
        batch: what to run on.
        recorder: sees what the layers return.
        loss_scale: what the loss is multiplied by before it is differentiated.

    Returns:
        The gradients of the scaled loss with respect to `trained(model)`, None where there is none; None without targets.

    Raises:
        LayerFailed: a layer raised.
    """
    with recorder.running(), recorder.failures():
        if batch.y is None:
            _forward(model, batch)
            return None
        return _BACKWARD[keras.backend.backend()](model, lambda: _loss(model, batch) * loss_scale)


def _forward(model, batch):
    kwargs = {"training": batch.y is not None} if _bridge_models.takes_training(model) else {}
    return model(keras.tree.map_structure(keras.ops.convert_to_tensor, batch.x), **kwargs)


def loss_or_output(model: keras.Model, batch: Batch) -> Any:
    """Returns the float32 loss of a batch, or the outputs where it has no targets."""
    return _forward(model, batch) if batch.y is None else _loss(model, batch)


def _loss(model, batch):
    targets = keras.tree.map_structure(keras.ops.convert_to_tensor, batch.y)
    return keras.ops.cast(_bridge_models.loss_of(model, batch.x, targets, _forward(model, batch)), "float32")


def _backward_jax(model, loss):
    import jax

    return jax.grad(pure(model, loss))(*values(model))


def pure(model: keras.Model, loss: Callable[[], Any]) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """Returns a function of the values of a model's variables, trained ones first, that gives what `loss()` does."""
    weights, others = _variables(model)

    def with_values(weight_values, other_values):
        mapping = [*zip(weights, weight_values, strict=True), *zip(others, other_values, strict=True)]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            return loss()

    return with_values


def values(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """Returns what that function takes."""
    weights, others = _variables(model)
    return [v.value for v in weights], [v.value for v in others]


def _variables(model):
    weights = trained(model)
    known = {id(v) for v in weights}
    return weights, [v for v in model.variables if id(v) not in known]


def _backward_tensorflow(model, loss):
    import tensorflow as tf

    weights = [v.value for v in trained(model)]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        total = loss()
    gradients = tape.gradient(total, weights)
    return [None if g is None else tf.convert_to_tensor(g) for g in gradients]


_BACKWARD = {"jax": _backward_jax, "tensorflow": _backward_tensorflow}


def own_weights(model: keras.Model) -> list[list[keras.Variable]]:
    """Returns, for each layer of a model in order, the float variables that it owns and computes with in its dtype."""
    return [
        [
            v
            for v in _bridge.own_variables(layer)
            if keras.backend.is_float_dtype(_bridge.stored_dtype(v)) and (v.trainable or _bridge_models.is_autocast(v))
        ]
        for layer in _bridge.flatten_layers(model)
    ]
