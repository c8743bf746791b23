"""Forward and backward passes of a copy of a model."""

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
        y: structure of arrays, as its loss takes them.
        loss: as `compile` takes it.
        loss_weights: likewise.
        sample_weight: as `fit` takes it.
        is_trained_on: whether to run the loss and the backward pass; None for whether there is a y.
    """

    x: Any
    y: Any = None
    loss: Any = None
    loss_weights: Any = None
    sample_weight: Any = None
    is_trained_on: bool | None = None

    @property
    def trains(self) -> bool:
        """Whether the pass is one of training, forward and backward, rather than of inference."""
        return self.y is not None if self.is_trained_on is None else self.is_trained_on


def prepare(model: keras.Model, batch: Batch) -> None:
    """Compiles and builds a copy for the loss of a batch, and makes its layers show what they return.

    Raises:
        LayerFailed: a layer raised.
    """
    observe(model)
    if batch.trains:
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
    """Runs a copy forward and, if the batch has targets, backward.

    Args:
        model: a copy that `prepare` was called with.
        batch: what to run on.
        recorder: sees what the layers return.
        loss_scale: what the loss is multiplied by before it is differentiated.

    Returns:
        The gradients of the scaled loss with respect to `trained(model)`, or the recorder's summaries of them, None where
        there is none; None without targets.

    Raises:
        LayerFailed: a layer raised.
    """
    with recorder.running(), recorder.failures():
        return _RUNNERS[keras.backend.backend()](model, batch, recorder, loss_scale)


def _forward(model, batch):
    kwargs = {"training": batch.trains} if _bridge_models.takes_training(model) else {}
    return model(keras.tree.map_structure(keras.ops.convert_to_tensor, batch.x), **kwargs)


def loss_or_output(model: keras.Model, batch: Batch) -> Any:
    """Returns the float32 loss of a batch, or the outputs where it has no targets."""
    return _loss(model, batch) if batch.trains else _forward(model, batch)


def _loss(model, batch):
    targets, sample_weight = (
        keras.tree.map_structure(lambda a: None if a is None else keras.ops.convert_to_tensor(a), data)
        for data in (batch.y, batch.sample_weight)
    )
    outputs = _forward(model, batch)
    return keras.ops.cast(_bridge_models.loss_of(model, batch.x, targets, outputs, sample_weight), "float32")


# Rounds where the program says so, which XLA otherwise leaves out between operations that it fuses; and compiles in less
# time. Not with level 0: there a value that two loops compute has other bits in each (jaxlib 0.10), so that a maximum
# over an axis finds none of its inputs equal to it, and its gradient is 0 / 0.
_XLA_OPTIONS = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 1}


# Layers for each shape that they return, from which on operations run one by one: JAX compiles each once for each shape
# that it meets, and one program as long as it is. Seconds of an audit on 2 CPU cores, JAX 0.10.2, one run, as a program
# and one by one: 8 transformer blocks (29 layers a shape) 10.2 and 14.8, 16 blocks (59) 24.0 and 17.2; Dense layers
# alone, 32 of them 2.3 and 3.7, 128 of them 10.6 and 10.7.
_LAYERS_A_SHAPE = 40


def _run_jax(model, batch, recorder, loss_scale):
    """Runs one compiled program, or operations one by one where many layers are alike."""
    import jax

    places: list[tuple[int, int, int]] = []

    def scaled(weight_values, other_values, probes):
        with recorder.collecting(probes) as collected:
            found = pure(model, lambda: loss_or_output(model, batch))(weight_values, other_values)
        places[:] = collected
        # Without targets there is nothing to differentiate.
        return (found * loss_scale if batch.trains else 0.0), list(collected.values())

    def step(weight_values, other_values):
        if not batch.trains:
            return None, [], recorder.summaries(scaled(weight_values, other_values, None)[1]), 0.0
        probes = [jax.numpy.zeros(shape.shape, shape.dtype) for shape in shapes]  # constants: they take no memory
        (loss, outputs), (weight_gradients, output_gradients) = jax.value_and_grad(
            scaled, argnums=(0, 2), has_aux=True
        )(weight_values, other_values, probes)
        return (
            recorder.summaries(weight_gradients),
            recorder.summaries(output_gradients),
            recorder.summaries(outputs),
            loss,
        )

    arguments = values(model)
    shapes = jax.eval_shape(lambda *v: scaled(*v, None)[1], *arguments)
    if len(shapes) >= _LAYERS_A_SHAPE * len({(shape.shape, shape.dtype) for shape in shapes}):
        return _run_jax_eagerly(model, batch, recorder, loss_scale)
    options = _XLA_OPTIONS if jax.default_backend() == "cpu" else {"xla_allow_excess_precision": False}
    weight_gradients, output_gradients, outputs, recorder.loss = jax.jit(step, compiler_options=options)(*arguments)
    recorder.tell(places, outputs, output_gradients)
    return weight_gradients


def _run_jax_eagerly(model, batch, recorder, loss_scale):
    import jax

    recorder.begin()
    if not batch.trains:
        _forward(model, batch)
        return None
    scaled = pure(model, lambda: _loss(model, batch) * loss_scale)
    recorder.loss, weight_gradients = jax.value_and_grad(scaled)(*values(model))
    return recorder.summaries(weight_gradients)


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


def _run_tensorflow(model, batch, recorder, loss_scale):
    """Runs one operation after the other."""
    import tensorflow as tf

    if not batch.trains:
        _forward(model, batch)
        return None
    weights = [v.value for v in trained(model)]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        total = _loss(model, batch) * loss_scale
    recorder.loss = total
    gradients = tape.gradient(total, weights)
    return recorder.summaries([None if g is None else tf.convert_to_tensor(g) for g in gradients])


_RUNNERS = {"jax": _run_jax, "tensorflow": _run_tensorflow}


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
