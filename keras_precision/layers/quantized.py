"""Layers whose weights are stored in a quantized format."""

from __future__ import annotations

import functools
import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge, _bridge_variables
from keras_precision.formats import Codec
from keras_precision.layers.encoded import EncodedWeight
from keras_precision.layers.sites import LayerSites, sites_of_class
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.policies.resolve import resolve


class QuantizedWeights:
    """Reads, saves and loads weights that are stored in parts (mixed in by `_bridge.specialise`).

    Attributes:
        encoded_weights: attribute of the class -> `EncodedWeight`.
        float_order: names of the variables as the float layer saves them,
            attributes of `encoded_weights` in their places.
    """

    encoded_weights: dict[str, EncodedWeight]
    float_order: tuple[str, ...]

    @classmethod
    def from_config(cls, config):
        """Returns a layer of the class that this one was before its weights were quantized."""
        return _bridge.original_class(cls).from_config(config)

    @property
    def weight_matrix(self):
        """The weight that a product multiplies by."""
        return next(iter(self.encoded_weights.values()))

    def enable_lora(self, rank, *args, **kwargs):
        """Adds trainable low-rank matrices as the layer's class does, and freezes all else (QLoRA, section 3).

        Args:
            rank: >= 1.
            *args: what else the class takes.
            **kwargs: likewise.
        """
        vars(self)["_shows_shapes"] = True
        try:
            super().enable_lora(rank, *args, **kwargs)
        finally:
            del vars(self)["_shows_shapes"]
        self.freeze_base()
        keep_lora_in_policy(self)

    def freeze_base(self):
        """Makes all variables but the low-rank matrices untrainable."""
        matrices = {id(variable) for variable in lora_variables(self).values()}
        for variable in _bridge.own_variables(self):
            if id(variable) not in matrices:
                variable.trainable = False

    def merge_lora(self):
        """Adds the low-rank matrices to the base weight, which is encoded anew, and removes them.

        Raises:
            ValueError: the layer has none.
        """
        if not getattr(self, "lora_enabled", False):
            raise ValueError(
                f"Layer '{_bridge.layer_path(self)}' has no LoRA weights to merge. Call enable_lora first."
            )
        (attribute, encoded), *_ = self.encoded_weights.items()
        matrices = lora_variables(self)
        first, second = (matrices[name] for name in sorted(matrices))  # ..._a, ..._b
        change = ops.matmul(first, second) * (self.lora_alpha / self.lora_rank)
        merged = encoded.encode(encoded.decode("float32") + ops.cast(change, "float32"))
        encoded.assign(merged)
        for name in matrices:
            _bridge_variables.remove_variable(self, name)
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None
        keep_lora_in_policy(self)

    def save_own_variables(self, store):
        """Writes parts under `<weight>.<part>`, other variables under their names, and what tells whether they fit."""
        values = {name: ops.convert_to_numpy(variable) for name, variable in self._saved().items()}
        for name, value in {**values, **self._facts(values)}.items():
            store[name] = value

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote, or a float layer's variables, which are quantized as they come.

        Raises:
            ValueError: the file's variables are others, or of another format, shape or dtype, or damaged.
        """
        keys, variables = set(store.keys()), self._saved()
        if keys and keys <= {str(place) for place in range(len(keys))}:
            self._load_float(store, len(keys))
            return
        facts = self._facts({})
        expected = {*variables, *facts}
        if keys != expected:
            raise ValueError(
                f"Layer '{_bridge.layer_path(self)}' with policy '{self.dtype_policy.name}' can't read this file. "
                f"Missing: {sorted(expected - keys)}. Not expected: {sorted(keys - expected)}. "
                "Load it with the policy that it was saved with."
            )
        saved_as, own = (bytes(np.asarray(found["format"])).decode() for found in (store, facts))
        self._require("weights", saved_as, own)
        values = {}
        for name, variable in variables.items():
            values[name] = np.asarray(store[name])
            self._require(name, values[name].shape, tuple(variable.shape))
            dtype = _bridge.stored_dtype(variable)
            if np.issubdtype(np.dtype(dtype), np.integer):
                self._require(name, values[name].dtype.name, dtype)
            values[name] = values[name].astype(dtype, copy=False)
        if self._facts(values)["crc32"] != np.asarray(store["crc32"]):
            raise ValueError(
                f"Layer '{_bridge.layer_path(self)}' can't read this file: its variables {sorted(values)} are damaged, "
                "their checksum is another. Take the file from where it was copied from, or save the model again."
            )
        if "lora_alpha" in facts:
            self._require("lora_alpha", np.asarray(store["lora_alpha"]).item(), self.lora_alpha)
        for name, variable in variables.items():
            variable.assign(values[name])

    def _facts(self, values):
        """Returns what a file holds beside the variables.

        nf4 and fp4 have the same parts, and HDF5 keeps no checksum of a variable.
        """
        checksum = functools.reduce(lambda crc, value: zlib.crc32(np.ascontiguousarray(value), crc), values.values(), 0)
        facts = {
            "format": np.frombuffer(resolve(self).quantization_mode.encode(), "uint8"),
            "crc32": np.asarray(checksum, "uint32"),
        }
        return facts | ({"lora_alpha": np.asarray(self.lora_alpha)} if getattr(self, "lora_enabled", False) else {})

    def _load_float(self, store, count):
        if count != len(self.float_order):
            raise ValueError(
                f"Layer '{_bridge.layer_path(self)}' expects {len(self.float_order)} float variables "
                f"{list(self.float_order)}. Received a file with {count}. Load it with the policy and the model that it was "
                "saved with."
            )
        others = {v.name: v for v in _bridge.own_variables(self)}
        for place, name in enumerate(self.float_order):
            value = np.asarray(store[str(place)])
            encoded = self.encoded_weights.get(name)
            self._require(name, value.shape, encoded.shape if encoded else tuple(others[name].shape))
            if encoded is None:
                others[name].assign(value)
                continue
            try:
                encoded.assign(encoded.encode(value.astype("float32")))
            except ValueError as e:
                raise ValueError(f"Layer '{_bridge.layer_path(self)}', weight '{name}': {e}") from e
        for name, variable in others.items():
            if name.startswith("lora_") and name.endswith("_b"):  # the file's weight has them merged
                variable.assign(ops.zeros(variable.shape, variable.dtype))

    def _require(self, name, received, expected):
        if received != expected:
            raise ValueError(
                f"Layer '{_bridge.layer_path(self)}' with policy '{self.dtype_policy.name}' expects '{name}' of {expected}. "
                f"Received a file with {received}. Load it with the policy and the model that it was saved with."
            )

    def _saved(self):
        parts = {
            f"{attribute}.{name}": variable
            for attribute, encoded in self.encoded_weights.items()
            for name, variable in encoded.variables.items()
        }
        inside = {id(variable) for variable in parts.values()}
        return parts | {v.name: v for v in _bridge.own_variables(self) if id(v) not in inside}


@functools.cache
def _mixin_for(attributes: tuple[str, ...], product: type | None) -> type:
    """Returns `QuantizedWeights` with a property for each attribute that decodes it, and a product's `call`."""
    bases = (QuantizedWeights,) if product is None else (QuantizedWeights, product)
    return type(
        "QuantizedWeights",
        bases,
        {
            name: property(functools.partial(_read, name=name), functools.partial(_refuse, name=name))
            for name in attributes
        },
    )


def _read(layer, name):
    encoded = layer.encoded_weights[name]
    if vars(layer).get("_shows_shapes"):  # enable_lora asks for no more, and says that it is not trained
        return SimpleNamespace(shape=encoded.shape, trainable=False)
    return encoded.decode(resolve(layer).compute_dtype)


def _refuse(layer, value, name):
    raise AttributeError(
        f"'{name}' of layer '{_bridge.layer_path(layer)}' is stored as '{layer.dtype_policy.name}' and can't be assigned. "
        "Call keras_precision.dequantize(model) first."
    )


class Prepared(NamedTuple):
    """What will replace a layer's float weights, encoded already.

    Attributes:
        layer: still as it was.
        weights: attribute -> (the new weight, its parts as arrays).
        product: mixin for the layer's call, or None.
    """

    layer: keras.Layer
    weights: dict[str, tuple[EncodedWeight, dict[str, np.ndarray]]]
    product: type | None


def lora_variables(layer):
    """Returns attribute -> low-rank matrix."""
    return {name: v for name, v in vars(layer).items() if name.startswith("lora_") and isinstance(v, keras.Variable)}


def is_quantized(layer: keras.Layer) -> bool:
    """Returns whether a layer holds weights that we store quantized."""
    return isinstance(layer, QuantizedWeights)


def has_sites(layer: keras.Layer) -> bool:
    """Returns whether a layer has float weights now that can be stored quantized."""
    return bool(present(layer, sites_of_class(_bridge.original_class(type(layer)))))


def present(layer, sites: LayerSites | None):
    """Returns the sites of a layer whose weights it has, as floats."""
    found = sites.sites if sites else ()
    return [site for site in found if isinstance(vars(layer).get(site.attribute), keras.Variable)]


def prepare(layer: keras.Layer, codec: Codec) -> Prepared | None:
    """Encodes a layer's weights and changes nothing; None if it has no weight to quantize.

    Raises:
        ValueError: a weight holds inf or NaN; names it.
    """
    cls = _bridge.original_class(type(layer))
    sites = sites_of_class(cls)
    weights = {}
    for site in present(layer, sites):
        variable = vars(layer)[site.attribute]
        encoded = EncodedWeight(codec, variable.shape, site.axes(layer))
        try:
            arrays = encoded.encode(_bridge_variables.value_of(variable))
        except ValueError as e:
            raise ValueError(f"Layer '{_bridge.layer_path(layer)}', weight '{variable.name}': {e}") from e
        weights[site.attribute] = encoded, arrays
    if not weights:
        return None
    product = sites.product if sites.product and calls_stock(cls, sites.product.stock_class) else None
    return Prepared(layer, weights, product)


def calls_stock(cls, stock_class):
    """Returns whether a class calls as Keras's does: its own `call` must not be passed over."""
    return next(c for c in cls.__mro__ if "call" in vars(c)).__module__ == stock_class.__module__ or (
        issubclass(cls, keras.layers.ReversibleEmbedding) and cls.call is keras.layers.ReversibleEmbedding.call
    )


def commit(prepared: Prepared) -> None:
    """Replaces a layer's float weights by what was prepared; from here on its class reads them decoded."""
    layer = prepared.layer
    lora = {id(variable) for variable in lora_variables(layer).values()}
    attribute_of = {id(vars(layer)[attribute]): attribute for attribute in prepared.weights}
    order = [attribute_of.get(id(v), v.name) for v in _bridge.own_variables(layer) if id(v) not in lora]
    encoded_weights: dict[str, EncodedWeight] = {}
    for attribute, (encoded, arrays) in prepared.weights.items():
        variable = _bridge_variables.remove_variable(layer, attribute)
        encoded.install(layer, variable, arrays)
        encoded_weights[attribute] = encoded
    # Past Keras's tracking, which would take the parts for sublayers' state.
    vars(layer)["encoded_weights"], vars(layer)["float_order"] = encoded_weights, tuple(order)
    _bridge.specialise(layer, _mixin_for(tuple(prepared.weights), prepared.product))
    if lora:
        layer.freeze_base()


def quantize_built(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Stores the weights of a layer that has just built as its policy says; does nothing if they are already.

    Raises:
        ValueError: a weight holds inf or NaN.
    """
    if not isinstance(policy, QuantizedDTypePolicy) or not isinstance(policy.format, Codec) or is_quantized(layer):
        return
    prepared = prepare(layer, policy.format)
    if prepared is None:
        return
    commit(prepared)
    if policy.lora_rank is not None and hasattr(layer, "lora_enabled"):
        if not layer.lora_enabled:
            layer.enable_lora(policy.lora_rank, lora_alpha=policy.lora_alpha)
        layer.lora_alpha = policy.lora_alpha  # Dense and Embedding build with the rank instead, whatever their config says
    keep_lora_in_policy(layer)


def keep_lora_in_policy(layer: keras.Layer) -> None:
    """Makes a quantized layer's policy tell of its LoRA weights: a file has no other place for a layer within a layer."""
    policy = layer.dtype_policy
    if isinstance(policy, QuantizedDTypePolicy):
        rank, alpha = (layer.lora_rank, layer.lora_alpha) if getattr(layer, "lora_enabled", False) else (None, None)
        if (rank, alpha) != (policy.lora_rank, policy.lora_alpha):
            _bridge.attach_policy(layer, policy.with_lora(rank, alpha))


def restore(layer: keras.Layer) -> None:
    """Gives a layer float variables of what its parts stand for, in the places and with the names that they had."""
    encoded_weights: dict[str, Any] = vars(layer).pop("encoded_weights")
    names = vars(layer).pop("float_order")
    dtype = resolve(layer).variable_dtype
    values = {attribute: encoded.decode(dtype) for attribute, encoded in encoded_weights.items()}
    _bridge.despecialise(layer, QuantizedWeights)
    for attribute, encoded in encoded_weights.items():
        for variable in encoded.variables.values():
            _bridge_variables.untrack(layer, variable)
        _bridge_variables.add_variable_like(layer, attribute, values[attribute], {**encoded.replaced, "dtype": dtype})
    # Stock code reads files by position: as before, encoded weights in their places among the others.
    own = {**{v.name: v for v in _bridge.own_variables(layer)}, **{a: vars(layer)[a] for a in encoded_weights}}
    for name in names:
        _bridge_variables.untrack(layer, own[name])
    for name in names:
        _bridge_variables.track(layer, own[name])
