"""Policies: which dtype stores, computes and returns, for each layer."""

from keras_precision.policies.policy import DTypePolicy, FloatDTypePolicy
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy, QuantizedFloat8DTypePolicy
from keras_precision.policies.registry import deserialize, get, list_policies, register_policy, serialize
from keras_precision.policies.resolve import resolve
from keras_precision.policies.safe_layers import SAFE_LAYERS, register_safe_layer
from keras_precision.policies.scope import global_policy, policy_scope, set_global_policy

__all__ = [
    "SAFE_LAYERS",
    "DTypePolicy",
    "DTypePolicyMap",
    "FloatDTypePolicy",
    "QuantizedDTypePolicy",
    "QuantizedFloat8DTypePolicy",
    "deserialize",
    "get",
    "global_policy",
    "list_policies",
    "policy_scope",
    "register_policy",
    "register_safe_layer",
    "resolve",
    "serialize",
    "set_global_policy",
]
