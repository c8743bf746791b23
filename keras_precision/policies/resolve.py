"""The one policy that a layer computes by, after maps and safe layers."""

from functools import lru_cache

import keras

from keras_precision import _bridge, hardware
from keras_precision.policies import registry
from keras_precision.policies.policy import DTypePolicy
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.policies.safe_layers import is_safe

# Names of policies that are no maps and hold for every layer on every device. Stock code asks `resolve` 4 to 30 times
# in each layer call, and this spares it 0.6 us each time, 0.2 us of them for isinstance of a map, which is an ABC.
_ALWAYS_KEPT = frozenset({"float32", "bfloat16", "mixed_bfloat16"})


def resolve(layer: keras.Layer) -> keras.DTypePolicy:
    """Returns the policy that decides a layer's dtypes.

    It is the attached policy; of a map, the rule's; and in float16 for a
    layer of `safe_layers.SAFE_LAYERS`, one that computes in float32 and
    returns the attached policy's output dtype. It is right before the layer
    is built too.

    Raises:
        ValueError: it is float64, and JAX has no float64 now.

    Example:
        >>> pool = keras.layers.AveragePooling2D(2, dtype="mixed_float16")
        >>> resolve(pool)
        <DTypePolicy "params=float32,compute=float32,output=float16">
    """
    policy = layer.dtype_policy
    if policy.name in _ALWAYS_KEPT:
        return policy
    policy = attached(layer)
    if "float64" in (policy.compute_dtype, policy.variable_dtype):
        # Here, because stock code asks for the dtype before it casts an input or makes a variable: JAX without x64
        # would make both float32 and go on saying float64 (D23).
        hardware.check_dtypes(("float64",), _bridge.layer_path(layer))
    if policy.compute_dtype == "float16" and is_safe(type(layer)):
        return _computed_in_float32(registry.output_dtype(policy))
    return policy


def attached(layer: keras.Layer) -> keras.DTypePolicy:
    """Returns the layer's own policy, or the one that its map gives to it."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        find = getattr(policy, "resolve", None)
        return policy[_bridge.layer_path(layer)] if find is None else find(layer)
    return policy


@lru_cache(maxsize=None)
def _computed_in_float32(output):
    return DTypePolicy(f"params=float32,compute=float32,output={output}")


def keras_quantization_mode(layer: keras.Layer) -> str | None:
    """Returns the mode of Keras's own quantization; None under our policies, which stock code must not act on."""
    policy = resolve(layer)
    return None if isinstance(policy, QuantizedDTypePolicy) else policy.quantization_mode
