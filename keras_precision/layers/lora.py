"""Low-rank adapters on quantized models (QLoRA: Dettmers et al. 2023, section 3)."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_precision import _bridge
from keras_precision.layers import convert
from keras_precision.layers.quantized import QuantizedWeights
from keras_precision.policies.policy_map import layers_matching


def enable_lora(model: keras.Layer, rank: int, lora_alpha: float | None = None, skip: Iterable = ()) -> None:
    """Adds trainable low-rank matrices to a model's quantized layers and freezes all else, in place.

    A weight (k, n) counts as itself plus `lora_alpha / rank` times the product
    of a (k, rank) and a (rank, n) matrix, the second of zeros at first. Layers
    whose class has no `enable_lora` in Keras (recurrent cells, depthwise
    convolutions) stay frozen. A compiled model is compiled again, with a new
    optimizer. `layer.enable_lora(rank)` does the same to one layer.

    Layers that have matrices of this rank already keep them, so a model of a
    class that makes its layers itself (keras-hub's), whose files do not say
    what is frozen, is frozen again by calling this after loading.

    Args:
        model: a model or layer.
        rank: >= 1.
        lora_alpha: None for the rank.
        skip: keys as in a `DTypePolicyMap` of layers to leave without.

    Raises:
        TypeError: `model` is no model or layer.
        ValueError: the rank is less than 1, a layer has LoRA weights of
            another rank or factor, or no quantized layer can have them; the model is unchanged then.

    Example:
        >>> from keras_precision import quantize
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
        >>> report = quantize(model, "nf4_from_float32")
        >>> enable_lora(model, rank=4)
        >>> [variable.name for variable in model.trainable_variables]
        ['lora_kernel_a', 'lora_kernel_b']
    """
    convert.require_layer(model)
    if rank < 1:
        raise ValueError(f"Expected rank >= 1. Received: rank={rank}.")
    layers = _bridge.flatten_layers(model)
    kept = set(layers_matching(layers, skip, "skip"))
    able = [
        x
        for x in layers
        if isinstance(x, QuantizedWeights) and x not in kept and hasattr(super(QuantizedWeights, x), "enable_lora")
    ]
    if not able:
        raise ValueError(
            "Expected a model with quantized layers that can have LoRA weights. Received one without. Call quantize first."
        )
    wanted = rank, rank if lora_alpha is None else lora_alpha
    for layer in able:
        if layer.lora_enabled and (layer.lora_rank, layer.lora_alpha) != wanted:
            raise ValueError(
                f"Layer '{_bridge.layer_path(layer)}' has LoRA weights of rank {layer.lora_rank} and lora_alpha "
                f"{layer.lora_alpha} already. Received: rank={rank}, lora_alpha={lora_alpha}. Call merge_lora(model) first."
            )
    for layer in able:
        if not layer.lora_enabled:
            layer.enable_lora(rank, lora_alpha=lora_alpha)
        layer.freeze_base()  # again, if `model.trainable = True` was set since
    for layer in layers:
        if not set(able) & set(_bridge.flatten_layers(layer)):
            layer.trainable = False  # a setting that files keep
        elif layer not in able:
            for variable in _bridge.own_variables(layer):
                variable.trainable = False
    convert.refresh(model)


def merge_lora(model: keras.Layer) -> None:
    """Adds the LoRA weights of a model's quantized layers to their base weights, encoded anew, and removes them.

    Args:
        model: a model or layer.

    Raises:
        TypeError: `model` is no model or layer.
        ValueError: no quantized layer in it has LoRA weights.
    """
    convert.require_layer(model)
    layers = [
        x
        for x in _bridge.flatten_layers(model)
        if isinstance(x, QuantizedWeights) and getattr(x, "lora_enabled", False)
    ]
    if not layers:
        raise ValueError("Expected a model with LoRA weights on quantized layers. Received one without.")
    for layer in layers:
        layer.merge_lora()
    convert.refresh(model)
