"""How policies travel in configs: what a layer resolved to is what a file holds."""

import collections
import contextlib

import keras

from keras_precision import _bridge
from keras_precision.layers.convert import change_policy, has_float_policy
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.policies.resolve import attached
from keras_precision.policies.scope import policy_scope

# Stands where a policy's class name would; read by `loading` only.
SAVED_POLICIES = "SavedPolicies"


def saved_dtype(layer: keras.Layer) -> dict | None:
    """Returns the `dtype` entry of a layer's config, or None for Keras's own.

    - A layer without sublayers holds its resolved policy, never a map.
    - A Keras layer that passes its map on to sublayers (MultiHeadAttention),
      or whose sublayers we quantized each in its own way, holds a map of their
      names, which are fixed.
    - A custom layer whose sublayers differ from it holds their policies in
      order, because their names may change; a quantized sublayer is named
      instead, because it must know its policy before it builds.
    """
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    if is_map and not _bridge.is_placed(layer):
        return None
    inner = [child for child in _bridge.flatten_layers(layer)[1:] if has_float_policy(child)]
    is_keras_class = _bridge.is_keras_class(type(layer))
    own = attached(layer)
    policies = [attached(child) for child in inner]
    if not is_map and is_keras_class and not any(isinstance(p, QuantizedDTypePolicy) for p in (own, *policies)):
        return None
    if all(policy == own for policy in policies):
        return registry.serialize(own) if is_map else None
    if is_keras_class or any(policy.quantization_mode for policy in policies):
        return registry.serialize(_map_by_name(layer, own, zip(inner, policies, strict=True)))
    return {
        "class_name": SAVED_POLICIES,
        "module": "keras_precision",
        "registered_name": f"keras_precision>{SAVED_POLICIES}",
        "config": {
            "own": registry.serialize(own),
            "inner": [registry.serialize(policy) for policy in policies],
        },
    }


def _map_by_name(layer, own, inner):
    # Paths from the layer on: a loaded model builds its layers outside of its own name scope, as a functional one always.
    inside, inner = f"{_bridge.layer_path(layer)}/", list(inner)
    names = collections.Counter(child.name for child, _ in inner)
    rules = {}
    for child, policy in inner:
        path = _bridge.layer_path(child)
        key = path.removeprefix(inside) if path.startswith(inside) or names[child.name] > 1 else child.name
        key = f"path:{key}"
        if rules.setdefault(key, policy) != policy:
            raise ValueError(
                f"Layer '{_bridge.layer_path(layer)}' holds two layers '{key.removeprefix('path:')}' with different "
                f"policies, {rules[key].name} and {policy.name}, which a file can't tell apart. "
                "Give its sublayers different names."
            )
    # A key matches the end of a path too, so "block/hidden" comes before "hidden", which it may be an exception from.
    # What needs no rule gets none: Keras numbers the names of layers that were given none.
    others = [key.removeprefix("path:") for key, policy in rules.items() if policy != own]
    needed = {k: p for k, p in rules.items() if p != own or any(k.endswith(f"/{other}") for other in others)}
    return DTypePolicyMap(own, dict(sorted(needed.items(), key=lambda rule: -rule[0].count("/"))))


def loading(config):
    """Prepares the loading of one serialized object.

    The sublayers that a custom layer makes in its constructor take the global
    policy, which the loading process has not set; so they are made under the
    layer's own policy, and then given the policies that were saved.

    Args:
        config: what Keras is about to deserialize.

    Returns:
        The config to deserialize, a context to do it in, and a function to
        call with the object.
    """
    inner = config.get("config") if isinstance(config, dict) else None
    if not isinstance(inner, dict) or not config.get("registered_name") or not inner.get("dtype"):
        return config, contextlib.nullcontext(), _nothing
    dtype = inner["dtype"]
    saved = []
    if isinstance(dtype, dict) and dtype.get("class_name") == SAVED_POLICIES:
        saved = [registry.deserialize(policy) for policy in dtype["config"]["inner"]]
        dtype = dtype["config"]["own"]
        config = {**config, "config": {**inner, "dtype": dtype}}
    policy = _float_policy(dtype)
    if policy is None or _is_keras_map(policy):
        return config, contextlib.nullcontext(), _nothing
    return config, policy_scope(policy), lambda loaded: _give(loaded, saved)


def _float_policy(dtype):
    """Returns the policy of a config's dtype entry; None if it is no float policy that this process knows."""
    try:
        policy = registry.get(dtype)
    except (TypeError, ValueError):
        return None  # an object of another kind, whose own code will read it or complain
    return policy if keras.backend.is_float_dtype(policy.compute_dtype) else None


def _is_keras_map(policy):
    """Keras's own map can't be a global policy: Keras makes policies from the global policy's name."""
    return isinstance(policy, keras.dtype_policies.DTypePolicyMap) and not isinstance(policy, DTypePolicyMap)


def _nothing(loaded):
    """Null object: most objects need no finishing."""


def _give(layer, saved):
    if not saved:
        return
    inner = [child for child in _bridge.flatten_layers(layer)[1:] if has_float_policy(child)]
    if len(inner) != len(saved):
        raise ValueError(
            f"Layer '{_bridge.layer_path(layer)}' was saved with policies for {len(saved)} sublayers and has "
            f"{len(inner)} after loading. Its class must make all its sublayers in `__init__` or `build`, as it did "
            "when it was saved."
        )
    for child, policy in zip(inner, saved, strict=True):
        change_policy(child, policy)
