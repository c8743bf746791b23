"""Copies of a model under another policy, which an audit runs in the place of the model."""

import keras

from keras_precision import _bridge, _bridge_models, _bridge_variables
from keras_precision.layers import convert, dequantize, float8, quantize
from keras_precision.layers.quantized import is_quantized
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy

# What makes a layer draw random numbers, by attribute: off, so that two passes differ by precision alone. Masks drawn
# from one seed differ where TensorFlow draws them in the dtype of the input.
_NOISE = ("rate", "stddev", "dropout", "recurrent_dropout")
_NOISY = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GRUCell,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.LSTMCell,
    keras.layers.SimpleRNNCell,
)


def copied(model: keras.Model, policy=None) -> keras.Model:
    """Returns a copy of a model with its weights, under another policy, not compiled.

    Args:
        model: built; it is left as it is.
        policy: a policy or map, quantized or not; None for the policies that the model has.

    Raises:
        ValueError: the model can't be copied, or not under that policy.
    """
    copy = _twin(model)
    if policy is not None:
        layers = _bridge.flatten_layers(copy)
        if any(is_quantized(layer) or float8.is_float8(layer) for layer in layers):
            dequantize(copy)
        if any(isinstance(one, QuantizedDTypePolicy) for one in registry.policies_of(policy)):
            quantize(copy, policy, verbose=0)
        else:
            convert.change_policies(copy, policy)  # a layer that fails under it is for the audit to find
    for layer in _bridge.flatten_layers(copy):
        if isinstance(layer, _NOISY):
            for name in _NOISE:
                if isinstance(getattr(layer, name, None), int | float):
                    setattr(layer, name, 0.0)
    return copy


def as_policy(policy):
    """Returns the policy that an identifier stands for; None for None."""
    return policy if policy is None or isinstance(policy, DTypePolicyMap) else registry.get(policy)


def _twin(model):
    classes = {cls.__name__: cls for cls in (_bridge.original_class(type(x)) for x in _bridge.flatten_layers(model))}
    custom = {name: cls for name, cls in classes.items() if not _bridge.is_keras_class(cls)}
    try:
        copy = _bridge_models.twin(model, custom)
        _build_alike(model, copy)
        _copy_weights(model, copy)
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError, KeyError) as e:
        raise ValueError(
            f"Model '{model.name}' can't be copied, and an audit runs a copy so as not to change the model. Give its class "
            f"and those of its layers a get_config() that returns all arguments of __init__, and make all sublayers in "
            f"__init__ or build. The copy failed with {type(e).__name__}: {e}"
        ) from e
    return copy


def _build_alike(model, copy):
    """Builds what its config did not build, sublayer by sublayer with the shapes that the original was built with."""
    for original, layer in _pairs(model, copy):
        if original.built and not layer.built:
            shapes = original.get_build_config()
            if shapes:
                layer.build_from_config(shapes)
    for original, layer in _pairs(model, copy):
        if original.built and not layer.built:
            raise ValueError(f"Layer '{_bridge.layer_path(original)}' is built in the model and not in its copy.")


def _pairs(model, copy):
    originals, layers = _bridge.flatten_layers(model), _bridge.flatten_layers(copy)
    for original, layer in zip(originals, layers, strict=False):
        if _bridge.original_class(type(original)) is not _bridge.original_class(type(layer)):
            raise ValueError(
                f"Layer '{_bridge.layer_path(original)}' of class {type(original).__name__} is a {type(layer).__name__} "
                "in the copy."
            )
        yield original, layer


def _copy_weights(model, copy):
    pairs = list(_pairs(model, copy))
    if len(pairs) != len(_bridge.flatten_layers(model)) or len(pairs) != len(_bridge.flatten_layers(copy)):
        raise ValueError("The copy has another number of layers.")
    for original, layer in pairs:
        layer.trainable = original.trainable
        sources, targets = _bridge.own_variables(original), _bridge.own_variables(layer)
        names = {variable.name: variable for variable in sources}
        if len(names) == len(sources) and set(names) == {variable.name for variable in targets}:
            sources = [names[variable.name] for variable in targets]
        if [tuple(v.shape) for v in sources] != [tuple(v.shape) for v in targets]:
            raise ValueError(f"Layer '{_bridge.layer_path(original)}' has other variables in the copy.")
        for source, target in zip(sources, targets, strict=True):
            target.assign(_bridge_variables.tensor_of(source))
            target.trainable = source.trainable
        finalize = getattr(layer, "finalize_state", None)  # Normalization computes with what it makes of its variables
        if finalize is not None and layer.built:
            finalize()
