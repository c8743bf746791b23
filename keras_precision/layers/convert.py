"""Converts built models to another policy, in place."""

import warnings

import keras

from keras_precision import _bridge, _bridge_optimizers, _bridge_variables, hardware
from keras_precision.layers import float8
from keras_precision.layers.after_build import after_build
from keras_precision.layers.quantized import is_quantized
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.policies.resolve import attached, resolve


def set_policy(model: keras.Layer, policy) -> None:
    """Converts a model or layer, its sublayers and their variables to a policy, in place.

    Weights keep their values, rounded to nearest where the new dtype is
    narrower. A compiled model is compiled again with the same arguments, its
    optimizer's state kept. Layers with integer or string policies, and
    variables that were given a dtype of their own, stay as they are.

    Args:
        model: a built model or layer.
        policy: a float policy, its name, or a `DTypePolicyMap`.

    Raises:
        TypeError: `model` is no layer.
        ValueError: the model is not built, a layer is quantized, the policy
            is quantized, or the device can't compute in it; the model is
            unchanged then.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> set_policy(model, "bfloat16")
        >>> model.layers[0].kernel.dtype, model.outputs[0].dtype
        ('bfloat16', 'bfloat16')
    """
    require_layer(model)
    if policy is None:
        raise ValueError("Expected a policy, its name, or a DTypePolicyMap. Received: None. Pass 'mixed_bfloat16'.")
    policy = registry.get(policy)
    change_policies(model, policy)
    _bridge.refresh_symbolic_dtypes(model)
    for trainer in _bridge.trainers(model):
        compile_again(trainer)
    if isinstance(policy, DTypePolicyMap):
        report_unmatched(policy)


def change_policies(model: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Gives all layers of a model a policy and converts their variables; the layers are not called.

    Raises:
        ValueError: as `set_policy`; nothing is changed then.
    """
    layers = [layer for layer in _bridge.flatten_layers(model) if has_float_policy(layer)]
    new_policies = [(layer, _policy_for(policy, layer)) for layer in layers]
    for layer, new_policy in new_policies:
        _require_convertible(layer, new_policy)
    for layer, new_policy in new_policies:
        keeps_map = policy is not new_policy and len(_bridge.flatten_layers(layer)) > 1
        change_policy(layer, new_policy, attach=policy if keeps_map else new_policy)


def require_layer(model) -> None:
    """Raises a TypeError unless it is given a model or layer."""
    if not isinstance(model, keras.Layer):
        raise TypeError(f"Expected a Keras model or layer. Received: {model!r} (of type {type(model).__name__}).")


def has_float_policy(layer: keras.Layer) -> bool:
    """Returns whether a layer computes in floats, so that policies are meant for it."""
    return keras.backend.is_float_dtype(attached(layer).compute_dtype)


def _policy_for(policy, layer):
    return policy.resolve(layer) if isinstance(policy, DTypePolicyMap) else policy


def _require_convertible(layer, policy):
    path = _bridge.layer_path(layer)
    if not layer.built:
        raise ValueError(
            f"Layer '{path}' is not built, so it has no variables to convert. "
            "Build the model or call it on data first, or make it under `policy_scope`."
        )
    if _bridge.is_quantized(layer):
        raise ValueError(
            f"Layer '{path}' holds weights that Keras quantized ('{layer.dtype_policy.name}'), which a float policy "
            "can't convert. Load the float model and convert that."
        )
    if is_quantized(layer):
        raise ValueError(
            f"Layer '{path}' stores its weights as '{layer.dtype_policy.name}', which a float policy can't convert. "
            "Call keras_precision.dequantize(model) first."
        )
    if isinstance(policy, QuantizedDTypePolicy) or policy.quantization_mode is not None:
        raise ValueError(
            f"Expected a float policy for layer '{path}'. Received: {policy!r}. "
            "keras_precision.quantize stores weights quantized; Keras's `layer.quantize` is for Keras's own policies."
        )
    if not keras.backend.is_float_dtype(policy.compute_dtype):
        raise ValueError(f"Expected a float policy for layer '{path}'. Received: {policy!r}. Pass 'float32'.")
    hardware.check_dtypes((policy.compute_dtype, policy.variable_dtype, registry.output_dtype(policy)), path)


def change_policy(layer: keras.Layer, policy: keras.DTypePolicy, attach: keras.DTypePolicy | None = None) -> None:
    """Gives one layer a float policy and converts the variables that it owns.

    Args:
        layer: the layer; its sublayers are left alone.
        policy: the policy that will decide its dtypes.
        attach: what to attach instead, a map that resolves to `policy`.
    """
    before = resolve(layer).variable_dtype
    _bridge.attach_policy(layer, policy if attach is None else attach)
    after = resolve(layer).variable_dtype
    if after != before:
        for variable in _bridge.own_variables(layer):
            if _bridge.stored_dtype(variable) == before:
                _bridge_variables.convert_variable(variable, after)
    if layer.built:
        after_build(layer)
        finalize = getattr(layer, "finalize_state", None)  # Normalization keeps its statistics in the compute dtype
        if finalize is not None:
            finalize()


def takes_policy(layer: keras.Layer, policy: keras.DTypePolicy) -> bool:
    """Attaches a quantized policy or a map of ours that a layer is given by assignment; returns whether it was one.

    A built layer's own weights are stored as the policy says, as those of a layer that builds under it. A model's
    layers keep theirs.

    Raises:
        ValueError: the layer is quantized already.
    """
    if is_quantized(layer) and policy != layer.dtype_policy:
        raise ValueError(
            f"Layer '{_bridge.layer_path(layer)}' stores its weights as '{layer.dtype_policy.name}', which another policy "
            "can't change. Call keras_precision.dequantize(layer) first."
        )
    if not isinstance(policy, QuantizedDTypePolicy | DTypePolicyMap):
        if float8.is_float8(layer):
            float8.leave(layer)
        return False
    _bridge.attach_policy(layer, policy)
    if layer.built:
        after_build(layer)
    return True


def refresh(model: keras.Layer, keeps_state: bool = False) -> None:
    """Makes a model's symbolic tensors, compiled functions and optimizer follow its layers, whose variables changed.

    Args:
        model: whose layers changed.
        keeps_state: see `compile_again`.
    """
    _bridge.refresh_symbolic_dtypes(model)
    for layer in _bridge.flatten_layers(model):
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
    for trainer in _bridge.trainers(model):
        compile_again(trainer, keeps_state)


def compile_again(model: keras.Model, keeps_state: bool = True) -> None:
    """Compiles a model with the arguments of its last `compile`.

    Args:
        model: compiled.
        keeps_state: whether the new optimizer goes on with the old one's
            variables, which needs the same weights to be trained.
    """
    old = model.optimizer
    arguments = _bridge.compile_arguments(model)
    optimizer = arguments.get("optimizer")
    if optimizer is not None:
        arguments["optimizer"] = type(optimizer).from_config(optimizer.get_config())
    model.compile(**arguments)
    if old is not None and old.built:
        # Built where the old one was: Keras builds the optimizer of a file that it loads, whatever was saved.
        model.optimizer.build(model.trainable_variables)
        if keeps_state:
            _carry_state(old, model)


def _carry_state(old, model):
    """Copies an optimizer's variables into the model's new one, cast to the new dtypes."""
    old, new = _bridge_optimizers.innermost(old), _bridge_optimizers.innermost(model.optimizer)
    for source, target in zip(old.variables, new.variables, strict=True):
        target.assign(keras.ops.cast(source.value, target.dtype))


def report_unmatched(policy_map: DTypePolicyMap) -> None:
    """Warns of rules that have decided for no layer."""
    unmatched = policy_map.unmatched()
    if unmatched:
        warnings.warn(
            f"The policy map's rules {unmatched} matched no layer, so they changed nothing. "
            "`policy_map.explain(model)` shows each layer's path and the rule that decided.",
            hardware.PrecisionWarning,
            stacklevel=3,
        )


def report_unmatched_of(model: keras.Model) -> None:
    """Warns of rules that have decided for no layer, in the maps that a built model's layers hold."""
    layers = _bridge.flatten_layers(model)
    if all(layer.built for layer in layers):
        maps = list(
            {id(p): p for p in (layer.dtype_policy for layer in layers) if isinstance(p, DTypePolicyMap)}.values()
        )
        while maps:
            # Inputs hold copies of a global map. A rule has decided if it did in one of them.
            alike = [other for other in maps if other == maps[0]]
            maps = [other for other in maps if other != maps[0]]
            report_unmatched(min(alike, key=lambda policy_map: len(policy_map.unmatched())))
