"""What happens to each layer once it has built: checks, and what its policy asks of its outputs and losses."""

import functools

import keras

from keras_precision import _bridge, hardware
from keras_precision.dtypes import HALF_DTYPES
from keras_precision.layers import float8
from keras_precision.layers.float32_inside import ComputesInFloat32, in_float32
from keras_precision.layers.quantized import quantize_built
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.resolve import attached, resolve
from keras_precision.policies.safe_layers import is_safe


class CastsOutputs:
    """Makes a layer return its policy's output dtype (mixed in by `_bridge.specialise`)."""

    def call(self, *args, **kwargs):
        return keras.tree.map_structure(functools.partial(_cast_float, self), super().call(*args, **kwargs))

    def compute_output_spec(self, *args, **kwargs):
        outputs = super().compute_output_spec(*args, **kwargs)
        return keras.tree.map_structure(functools.partial(_cast_float, self), outputs)


def _cast_float(layer, output):
    dtype = registry.output_dtype(resolve(layer))
    current = getattr(output, "dtype", None)
    if current is None or not keras.backend.is_float_dtype(current) or keras.backend.standardize_dtype(current) == dtype:
        return output
    if isinstance(output, keras.KerasTensor):
        return keras.KerasTensor(output.shape, dtype=dtype, sparse=output.sparse, name=output.name)
    return keras.ops.cast(output, dtype)


def after_build(layer: keras.Layer) -> None:
    """Applies a layer's policy to what stock Keras leaves alone.

    Raises:
        ValueError: the device can't compute in the policy's dtypes, or not in its format and the policy is strict, or
            a weight can't be stored as it says; names the layer's path.
    """
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    if is_map and not _bridge.is_placed(layer):
        # Built in its constructor: which rule holds is known when it is called, so prepare for all of them.
        if is_safe(type(layer)) or any(_casts_outputs(candidate) for candidate in registry.policies_of(policy)):
            _cast_outputs(layer)
        return
    if is_map and len(_bridge.flatten_layers(layer)) == 1:
        own = attached(layer)
        if isinstance(policy, DTypePolicyMap) or own.quantization_mode is not None:
            # From here on the rule's policy is the layer's own and no longer depends on the path. Keras's own map
            # stays, since Keras's setter writes into it, unless it quantizes: `stateless_call` then needs the mode.
            _bridge.attach_policy(layer, own)
    policy = resolve(layer)
    path = _bridge.layer_path(layer)
    hardware.check_dtypes((policy.compute_dtype, policy.variable_dtype, registry.output_dtype(policy)), path)
    quantize_built(layer, policy)
    float8.follow(layer, policy)
    if _casts_outputs(policy):
        _cast_outputs(layer)
    if policy.compute_dtype in HALF_DTYPES or policy.variable_dtype in HALF_DTYPES:
        _regularize_in_float32(layer)


def _casts_outputs(policy):
    return registry.output_dtype(policy) != policy.compute_dtype


def _cast_outputs(layer):
    # A model returns what its layers return. A recurrent cell's outputs are its next step's states,
    # whose dtype must not change within the loop; the layer around it casts.
    is_cell = hasattr(layer, "state_size") and not isinstance(layer, keras.layers.RNN)
    if not isinstance(layer, keras.Model) and not is_cell:
        _bridge.specialise(layer, CastsOutputs)


def _regularize_in_float32(layer):
    """Makes the layer's activity and weight regularizers sum in float32."""
    layer.activity_regularizer = _summing_in_float32(layer.activity_regularizer)
    for variable in _bridge.own_variables(layer):
        variable.regularizer = _summing_in_float32(variable.regularizer)


def _summing_in_float32(regularizer):
    if isinstance(regularizer, keras.regularizers.Regularizer):
        _bridge.specialise(regularizer, ComputesInFloat32)
        return regularizer
    return None if regularizer is None else in_float32(regularizer)
