"""Precision for Keras: one policy decides which dtype stores, computes and returns each tensor."""

from keras_precision import _bridge, _bridge_optimizers, dtypes, hardware, optimizers, scaling
from keras_precision.dtypes import safe_mask_value
from keras_precision.install import hooks
from keras_precision.layers import (
    QuantizationReport,
    dequantize,
    enable_lora,
    merge_lora,
    quantize,
    register_site,
    set_policy,
)
from keras_precision.policies import (
    SAFE_LAYERS,
    DTypePolicy,
    DTypePolicyMap,
    FloatDTypePolicy,
    QuantizedDTypePolicy,
    QuantizedFloat8DTypePolicy,
    deserialize,
    get,
    global_policy,
    list_policies,
    policy_scope,
    register_policy,
    register_safe_layer,
    resolve,
    serialize,
    set_global_policy,
)
from keras_precision.report.audit import audit
from keras_precision.report.blame import Blame, NonFiniteError, blame
from keras_precision.report.blame_callback import BlameCallback
from keras_precision.report.result import Audit, Finding, LayerAudit
from keras_precision.report.summary import summary
from keras_precision.search import Budget, SearchResult, search_policy

_bridge.install(hooks)
_bridge_optimizers.install(hooks)

# Keras's names for the same.
dtype_policy = global_policy
set_dtype_policy = set_global_policy

__version__ = "0.1.0"

__all__ = [
    "SAFE_LAYERS",
    "Audit",
    "Blame",
    "BlameCallback",
    "Budget",
    "DTypePolicy",
    "DTypePolicyMap",
    "Finding",
    "FloatDTypePolicy",
    "LayerAudit",
    "NonFiniteError",
    "QuantizationReport",
    "QuantizedDTypePolicy",
    "QuantizedFloat8DTypePolicy",
    "SearchResult",
    "audit",
    "blame",
    "dequantize",
    "deserialize",
    "dtype_policy",
    "dtypes",
    "enable_lora",
    "get",
    "global_policy",
    "hardware",
    "list_policies",
    "merge_lora",
    "optimizers",
    "policy_scope",
    "quantize",
    "register_policy",
    "register_safe_layer",
    "register_site",
    "resolve",
    "safe_mask_value",
    "scaling",
    "search_policy",
    "serialize",
    "set_dtype_policy",
    "set_global_policy",
    "set_policy",
    "summary",
]
