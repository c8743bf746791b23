"""A copy of a model on which policies of single layers are tried."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_precision import _bridge, _bridge_variables, dtypes, hardware
from keras_precision.formats import Codec
from keras_precision.layers import convert, float8
from keras_precision.layers.quantized import commit as store_quantized
from keras_precision.layers.quantized import has_sites, is_quantized, prepare, restore
from keras_precision.policies import registry
from keras_precision.policies.policy import float_name
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.policies.resolve import attached
from keras_precision.search.candidates import candidate_policy

# Predictions of one batch, of which the fastest counts.
TIMED_CALLS = 10


def float_layers(model: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that policies are meant for, in an order that copies of the model share."""
    layers = _bridge.flatten_layers(model)
    return [x for x in layers if convert.has_float_policy(x) and not isinstance(x, keras.layers.InputLayer)]


def require_float_model(model) -> None:
    """Raises unless it is given a built model whose weights are floats.

    Raises:
        TypeError: it is no model.
        ValueError: it is not built, or holds quantized layers or such as multiply in 8 bits.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a Keras model. Received: {model!r} (of type {type(model).__name__}).")
    for layer in _bridge.flatten_layers(model):
        path = _bridge.layer_path(layer)
        if not layer.built:
            raise ValueError(f"Layer '{path}' is not built, so it has no weights. Call the model on data first.")
        if is_quantized(layer) or _bridge.is_quantized(layer):
            raise ValueError(
                f"Layer '{path}' is quantized already ('{layer.dtype_policy.name}'). Search on the float model."
            )
        if float8.is_float8(layer):
            raise ValueError(
                f"Layer '{path}' multiplies in 8 bits already ('{layer.dtype_policy.name}'), and a search starts from "
                "float policies. Call keras_precision.dequantize(model) first; the weights stay as they are."
            )


class Trial:
    """A copy of a model whose layers take other policies and give them back.

    Args:
        model: left as it is.
        x: a batch of inputs, on which a model is called that its config does
            not build.

    Attributes:
        model: the copy.
        paths: of the model's layers that policies are meant for.
        bases: their own policies.
        base_bytes: of the weights that each owns itself, under its own policy.
    """

    def __init__(self, model: keras.Model, x):
        self._originals = float_layers(model)
        self.paths = [_bridge.layer_path(layer) for layer in self._originals]
        # Ours, which are equal to Keras's and hashable; of a quantized policy that changes nothing, its source.
        self.bases = [registry.get(float_name(attached(layer))) for layer in self._originals]
        self.model = _copy(model, x)
        self._layers = float_layers(self.model)
        for index in range(len(self._layers)):
            self._take_values(index)
        self._given: dict[int, keras.DTypePolicy] = {}
        self.base_bytes = [self.bytes_of(index) for index in range(len(self._layers))]

    def places(self) -> list[int]:
        """Returns the indices of layers with weights of their own."""
        return [index for index, layer in enumerate(self._layers) if _bridge.own_variables(layer)]

    def policy_for(self, index: int, candidate) -> keras.DTypePolicy | None:
        """Returns what a candidate means for a layer; None where it would do nothing that its source doesn't."""
        policy = candidate_policy(candidate, self.bases[index])
        return None if policy == self.bases[index] or self._is_source_enough(index, policy) else policy

    def uniform_policy(self, index: int, candidate) -> keras.DTypePolicy:
        """Returns what a layer does under a candidate that the whole model is given."""
        policy = candidate_policy(candidate, self.bases[index])
        return self._effective(index, policy)

    def _effective(self, index, policy):
        return policy.source_policy if self._is_source_enough(index, policy) else policy

    def _is_source_enough(self, index, policy):
        if not isinstance(policy, QuantizedDTypePolicy):
            return False
        layer = self._originals[index]
        return not (float8.can_follow(layer, policy) if float8.is_asked(policy) else has_sites(layer))

    def bytes_of(self, index: int) -> int:
        """Returns the bytes of a layer's own weights as they are now."""
        return dtypes.measured_bytes(_bridge.own_variables(self._layers[index]))

    @property
    def bytes(self) -> int:
        """Bytes of all weights of the copy as they are now."""
        layers = _bridge.flatten_layers(self.model)
        return dtypes.measured_bytes(v for layer in layers for v in _bridge.own_variables(layer))

    def give(self, policies: dict[int, keras.DTypePolicy]) -> None:
        """Gives layers policies, and all others their own back."""
        changed = {i for i in {*policies, *self._given} if policies.get(i) != self._given.get(i)}
        if not changed:
            return
        with warnings.catch_warnings():
            # A dtype that is slow here is tried all the same.
            warnings.simplefilter("ignore", hardware.PrecisionWarning)
            for index in sorted(changed):
                self._give_back(index)
                if index in policies:
                    self._give(index, policies[index])
            convert.refresh(self.model)

    def _give(self, index, policy):
        layer = self._layers[index]
        if isinstance(policy, QuantizedDTypePolicy) and isinstance(policy.format, Codec):
            store_quantized(prepare(layer, policy.format))
        convert.change_policy(layer, policy)
        self._given[index] = policy

    def _give_back(self, index):
        if self._given.pop(index, None) is None:
            return
        layer = self._layers[index]
        if is_quantized(layer):
            restore(layer)
        convert.change_policy(layer, self.bases[index])
        self._take_values(index)

    def _take_values(self, index):
        original, layer = self._originals[index], self._layers[index]
        for source, target in zip(_bridge.own_variables(original), _bridge.own_variables(layer), strict=True):
            # A copy: on JAX a prediction gives its model's buffers away, and the user's model would lose its own.
            target.assign(keras.ops.copy(_bridge_variables.value_of(source)))

    def judge_alone(self, index: int, policy: keras.DTypePolicy, judge: Callable[[], Any]) -> tuple[Any, int]:
        """Returns what is judged while one layer has a policy and all others their own, and the layer's bytes.

        A format that multiplies by the decoded weight is stood for by that
        weight, rounded to the layer's dtype, so that nothing is compiled again.
        """
        if not self._is_decoded(index, policy):
            self.give({index: policy})
            return judge(), self.bytes_of(index)
        self.give({})
        layer = self._layers[index]
        prepared = prepare(layer, policy.format)
        nbytes = self.bytes_of(index)
        for attribute, (encoded, arrays) in prepared.weights.items():
            variable = vars(layer)[attribute]
            nbytes += sum(array.nbytes for array in arrays.values()) - dtypes.measured_bytes([variable])
            variable.assign(encoded.decoded(arrays, _bridge.stored_dtype(variable)))
        try:
            return judge(), nbytes
        finally:
            self._take_values(index)

    def _is_decoded(self, index, policy):
        has_codec = isinstance(policy, QuantizedDTypePolicy) and isinstance(policy.format, Codec)
        return has_codec and not policy.format.multiplies_codes and policy.source_policy == self.bases[index]

    def seconds(self, x) -> float:
        """Returns the seconds of a prediction of one batch, the least of several after one that compiles."""
        self.model.predict_on_batch(x)
        taken = []
        for _ in range(TIMED_CALLS):
            start = time.perf_counter()
            self.model.predict_on_batch(x)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def accepts(self, index: int, policy: keras.DTypePolicy, chosen: keras.DTypePolicy) -> bool:
        """Returns whether a layer does under a policy what it does under the chosen one."""
        return self._effective(index, policy) == chosen

    def require_gives(self, policy_map: DTypePolicyMap, chosen: Sequence[keras.DTypePolicy]) -> None:
        """Asserts that a map gives each layer of the user's model what was tried on the copy."""
        for index, layer in enumerate(self._originals):
            rule = policy_map.rule_for(layer)
            policy = policy_map.default_policy if rule is None else policy_map[rule]
            assert self.accepts(index, policy, chosen[index]), (self.paths[index], policy, chosen[index])

    def classes(self) -> list[type]:
        """Returns each layer's class, before anything specialised it."""
        return [_bridge.original_class(type(layer)) for layer in self._originals]

    def weights_crc(self, crc: Callable[[bytes | memoryview], None]) -> None:
        """Feeds the paths, policies and values of the user's weights to a checksum."""
        for path, base, layer in zip(self.paths, self.bases, self._originals, strict=True):
            crc(f"{path} {base.name}".encode())
            for variable in _bridge.own_variables(layer):
                value = keras.ops.convert_to_numpy(_bridge_variables.value_of(variable))
                crc(f"{value.shape} {value.dtype}".encode())
                crc(np.ascontiguousarray(value).tobytes())


def _copy(model, x):
    """Returns a model of the same layers; initializers of it leave the state of Python's random numbers as it was."""
    state = random.getstate()
    try:
        copy = keras.models.clone_model(model)
        if not all(layer.built for layer in _bridge.flatten_layers(copy)):
            copy.predict_on_batch(x)
        for layer in _bridge.flatten_layers(copy):
            if isinstance(layer, keras.Model):
                layer.compiled = False  # no optimizer to make anew whenever a policy changes
    except Exception as e:
        raise ValueError(
            f"Expected a model that can be copied from its config. Received: '{model.name}', for which Keras says: "
            f"{e}. Give its class a get_config, and register its custom layers with "
            "keras.saving.register_keras_serializable."
        ) from e
    finally:
        random.setstate(state)
    sizes = [
        [math.prod(v.shape) for layer in float_layers(m) for v in _bridge.own_variables(layer)] for m in (model, copy)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"Expected a model whose config makes the same layers. Received: '{model.name}', whose copy has others. "
            "Its class must make all its layers in `__init__` or `build`."
        )
    return copy
