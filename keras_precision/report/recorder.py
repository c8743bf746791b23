"""Sees what each layer of a model returns, and what is sent back to it as a gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import keras

from keras_precision import _bridge, _bridge_models
from keras_precision.dtypes import HALF_DTYPES
from keras_precision.policies import registry, resolve

_active: ContextVar[Recorder | None] = ContextVar("keras_precision_recorder", default=None)
_SCOPE = re.compile(r"layer(\d+)_")

# Layers that call others in a loop or vectorized: what is inside is no tensor of the model.
_LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)


class Observed:
    """Shows a layer's outputs to the recorder of the running pass (mixed in by `_bridge.specialise`)."""

    def __call__(self, *args, **kwargs):
        recorder = _active.get()
        if recorder is None:
            return super().__call__(*args, **kwargs)
        with recorder.calling(self, args):
            return recorder.returned(self, super().__call__(*args, **kwargs))


@dataclasses.dataclass
class _Call:
    """A call that is running."""

    layer: keras.Layer
    has_leak: bool = False


@dataclasses.dataclass(frozen=True)
class Leak:
    """A layer that computes in a wider dtype than its policy says.

    Attributes:
        layer: its place among the layers of the model.
        dtype: what it returned or passed on instead; None where it failed.
        error: what it raised, or None.
    """

    layer: int
    dtype: str | None = None
    error: Exception | None = None


class LayerFailed(Exception):
    """A layer raised under the candidate policy.

    Attributes:
        layer: its place in the model.
        error: what it raised.
    """

    def __init__(self, layer: int, error: Exception):
        super().__init__(layer, error)
        self.layer, self.error = layer, error


class Recorder:
    """Follows the calls of one pass.

    Args:
        model: a copy that `observe` was called with.
        on_activation: called with (layer, call, output) numbers and the tensor, in the order of computation.
        on_gradient: likewise with the gradient of the loss, in the order in which backpropagation comes to them.
        summary: what of a tensor those are given in its place; None for all of it.

    Attributes:
        facts: (dtype, elements) of each tensor that was seen.
        loss: what the pass returned, times the loss scale; 0 where it was one of inference.
        leaks: `Leak`s found.
        failed: layer that raised, and what; None if none did.
    """

    def __init__(
        self,
        model: keras.Model,
        on_activation: Callable[[tuple[int, int, int], Any], None] | None = None,
        on_gradient: Callable[[tuple[int, int, int], Any], None] | None = None,
        summary: Callable[[Any], Any] | None = None,
    ):
        layers = _bridge.flatten_layers(model)
        self.place_of = {id(layer): place for place, layer in enumerate(layers)}
        self.leaks: list[Leak] = []
        self.failed: tuple[int, Exception] | None = None
        self.facts: dict[tuple[int, int, int], tuple[str, int]] = {}
        self.loss: Any = 0.0
        self._summary = summary
        self._on_activation, self._on_gradient = on_activation, on_gradient
        self._collected: dict[tuple[int, int, int], Any] | None = None
        self._probes: list[Any] | None = None
        self._stack: list[_Call] = []
        self._calls: dict[int, int] = {}
        self._known: dict[int, Any] = {}  # tensors by id, which they keep while they are here

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sees the calls made in a block."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self._known.clear()
            self._stack.clear()

    def begin(self) -> None:
        """Counts calls from the first one again."""
        self._calls.clear()

    @contextlib.contextmanager
    def collecting(self, probes: list[Any] | None = None) -> Iterator[dict[tuple[int, int, int], Any]]:
        """Yields what will hold the outputs of layers by place, while a program is traced.

        Args:
            probes: zeros that are added to them in turn, gradients with respect to which are theirs; None for none.
        """
        self.begin()
        self._collected, self._probes = {}, probes
        try:
            yield self._collected
        finally:
            self._collected = self._probes = None

    def summaries(self, tensors: list[Any]) -> list[Any]:
        """Returns the summary of each tensor, None for None."""
        return [t if t is None or self._summary is None else self._summary(t) for t in tensors]

    def tell(self, places: list[tuple[int, int, int]], outputs: list[Any], gradients: list[Any]) -> None:
        """Passes on the values, or the summaries, of what was collected."""
        for place, output in zip(places, outputs, strict=True):
            if self._on_activation is not None:
                self._on_activation(place, output)
        for place, gradient in reversed(list(zip(places, gradients, strict=False))):
            if self._on_gradient is not None:
                self._on_gradient(place, gradient)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Names the layer in what a block raises.

        Raises:
            LayerFailed: a layer raised.
        """
        try:
            yield
        except Exception as e:
            if self.failed is None:
                raise
            raise LayerFailed(*self.failed) from e

    @contextlib.contextmanager
    def calling(self, layer: keras.Layer, args: tuple) -> Iterator[None]:
        """Sees one call of a layer."""
        self._look_at_inputs(layer, args)
        self._stack.append(_Call(layer))
        try:
            with _named(f"layer{self.place_of[id(layer)]}_"):
                yield
        except Exception as e:
            if self.failed is None:
                self.failed = self.place_of[id(layer)], e
            raise
        finally:
            done = self._stack.pop()
            if self._stack:
                self._stack[-1].has_leak |= done.has_leak

    def returned(self, layer: keras.Layer, outputs: Any) -> Any:
        """Takes the outputs of a call; returns what the model goes on with."""
        place = self.place_of[id(layer)]
        number = self._calls[place] = self._calls.get(place, -1) + 1
        self._look_at_outputs(layer, place, outputs)
        if _bridge_models.is_graph_of_layers(layer):
            return outputs
        seen = iter(range(len(keras.tree.flatten(outputs))))
        outputs = keras.tree.map_structure(lambda x: self._seen(x, (place, number, next(seen))), outputs)
        for tensor in keras.tree.flatten(outputs):
            self._known[id(tensor)] = tensor
        return outputs

    def _seen(self, tensor, place):
        if self._collected is not None and is_float(tensor):
            probed = tensor if self._probes is None else tensor + self._probes[len(self._collected)]
            self._collected[place] = tensor
            self._note_facts(place, tensor)
            _bridge_models.carry_mask(tensor, probed)
            return probed
        if not is_float(tensor) or not _is_eager(tensor):
            return tensor
        self._note_facts(place, tensor)
        if self._on_activation is not None:
            self._on_activation(place, *self.summaries([value_of(tensor)]))
        if self._on_gradient is None:
            return tensor
        tapped = _tapped(tensor, lambda gradient: self._on_gradient(place, *self.summaries([value_of(gradient)])))
        _bridge_models.carry_mask(tensor, tapped)
        return tapped

    def _note_facts(self, place, tensor):
        self.facts[place] = keras.backend.standardize_dtype(tensor.dtype), math.prod(tensor.shape)

    def _look_at_inputs(self, layer, args):
        parent = self._stack[-1].layer if self._stack else None
        for tensor in keras.tree.flatten(args):
            known = id(tensor) in self._known
            self._known.setdefault(id(tensor), tensor)
            is_made_inside = parent is not None and not known and not _bridge_models.is_graph_of_layers(parent)
            if is_made_inside and is_custom(parent) and is_wider(tensor) and _is_half(parent):
                self._leak(self.place_of[id(parent)], tensor)

    def _look_at_outputs(self, layer, place, outputs):
        if _bridge_models.is_graph_of_layers(layer) or self._stack[-1].has_leak:
            return
        for tensor in keras.tree.flatten(outputs):
            if id(tensor) not in self._known and is_wider(tensor) and _is_half(layer):
                self._leak(place, tensor)

    def _leak(self, place, tensor):
        self._stack[-1].has_leak = True
        if all(leak.layer != place for leak in self.leaks):
            self.leaks.append(Leak(place, keras.backend.standardize_dtype(tensor.dtype)))


def observe(model: keras.Model) -> None:
    """Makes the layers of a copy show what they return while a recorder runs."""
    hidden = {
        id(inner)
        for layer in _bridge.flatten_layers(model)
        if isinstance(layer, _LOOPS)
        for inner in _bridge.flatten_layers(layer)[1:]
    }
    for layer in _bridge.flatten_layers(model):
        if id(layer) not in hidden and not isinstance(layer, keras.layers.InputLayer):
            _bridge.specialise(layer, Observed)


def layer_of_scope(name: str) -> int | None:
    """Returns the place of the innermost layer that an operation was made in, by the name of its scope."""
    found = _SCOPE.findall(name)
    return int(found[-1]) if found else None


def is_custom(layer: keras.Layer) -> bool:
    """Returns whether a layer's class is not Keras's."""
    return not _bridge.is_keras_class(_bridge.original_class(type(layer)))


def is_float(tensor: Any) -> bool:
    """Returns whether something is a tensor of a real dtype."""
    return keras.ops.is_tensor(tensor) and keras.backend.is_float_dtype(tensor.dtype)


def is_wider(tensor: Any) -> bool:
    """Returns whether something is a float tensor of 32 bits or more."""
    return is_float(tensor) and keras.backend.standardize_dtype(tensor.dtype) not in HALF_DTYPES


def _is_half(layer):
    """Returns whether a layer's policy, and those of all layers in it, say that it returns 16 bits."""
    return all(registry.output_dtype(resolve(inner)) in HALF_DTYPES for inner in _bridge.flatten_layers(layer))


def _named(name):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.name_scope(name)
    import jax

    return jax.named_scope(name)


def _is_eager(tensor):
    """Returns whether a tensor has values now: not while a program is traced, nor inside a loop that is."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly() and not hasattr(tensor, "flat_values")
    import jax

    return _value(tensor) is not None and not isinstance(_value(tensor), jax.core.Tracer)


def _value(tensor):
    """Returns what JAX computes with, beneath the tracers of differentiation; a tracer or None inside other ones."""
    import jax

    while isinstance(tensor, jax.core.Tracer):
        tensor = getattr(tensor, "primal", None)
    return tensor


def _tapped(tensor, on_gradient):
    """Returns the same tensor, whose gradient is shown."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def identity(x):
            def backward(gradient):
                on_gradient(gradient)
                return gradient

            return tf.identity(x), backward

        return identity(tensor)
    import jax

    @jax.custom_vjp
    def identity(x):
        return x

    def backward(_, gradient):
        on_gradient(gradient)
        return (gradient,)

    identity.defvjp(lambda x: (x, None), backward)
    return identity(tensor)


def value_of(tensor: Any) -> Any:
    """Returns a tensor that has values, without what differentiation wraps around it."""
    return _value(tensor) if keras.backend.backend() == "jax" else tensor
