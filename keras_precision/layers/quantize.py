"""Quantizes trained models in place, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras
from rich.table import Table

from keras_precision import _bridge, _bridge_variables, dtypes
from keras_precision.formats import Codec
from keras_precision.layers import convert, float8
from keras_precision.layers.quantized import (
    commit,
    has_sites,
    is_quantized,
    keep_lora_in_policy,
    prepare,
    restore,
)
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap, layers_matching
from keras_precision.policies.quantized import MULTIPLE_OF_FEATURES, QuantizedDTypePolicy
from keras_precision.policies.resolve import attached
from keras_precision.progress import progress_bar
from keras_precision.rich_text import RichText


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One row of a report.

    Attributes:
        path: of the layer.
        format: mode of its policy, or "" for a layer that keeps float weights.
        bytes_before: of the layer's own weights, measured from the live arrays.
        bytes_after: likewise.
        parameters: elements of the weights that were quantized; of all, where none was.
        bits_per_parameter: of the quantized weights, scales included; of all, where none was quantized.
        relative_error: Frobenius norm of the change of the quantized weights over that of the weights; None where
            none was quantized.
        note: why a layer with matrices was left as it is, or "".
    """

    path: str
    format: str
    bytes_before: int
    bytes_after: int
    parameters: int
    bits_per_parameter: float
    relative_error: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class QuantizationReport(RichText):
    """What `quantize` did.

    Attributes:
        layers: rows of all layers that own weights.
    """

    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights before."""
        return sum(row.bytes_before for row in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights after."""
        return sum(row.bytes_after for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        rows = [dataclasses.asdict(row) for row in self.layers]
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "layers": rows}

    def __rich__(self) -> Table:
        table = Table("layer", "format", title=f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after")
        for heading in ("bytes before", "bytes after", "bits a parameter", "relative error"):
            table.add_column(heading, justify="right")
        table.add_column("note")
        for row in self.layers:
            error = "" if row.relative_error is None else f"{row.relative_error:.4f}"
            numbers = (f"{row.bytes_before:,}", f"{row.bytes_after:,}", f"{row.bits_per_parameter:.3f}", error)
            table.add_row(row.path, row.format, *numbers, row.note)
        return table


def quantize(model: keras.Layer, policy, skip: Iterable = (), verbose: int = 1) -> QuantizationReport:
    """Stores a trained model's weights quantized, in place, and returns what that did.

    All is encoded before anything is replaced, so that a failure leaves the
    model as it was. Layers without a weight that can be quantized compute in
    the policy's source. A compiled model is compiled again, with a new
    optimizer: quantized weights are not trained. A
    `QuantizedFloat8DTypePolicy` leaves weights as they are and makes layers
    train with 8-bit products, so that the optimizer keeps its state.

    Args:
        model: a built model or layer.
        policy: a quantized policy, its name (a bare format takes the global
            policy for its source), or a `DTypePolicyMap` that gives at least
            one layer a quantized policy.
        skip: keys as in a `DTypePolicyMap` (names, globs, classes,
            predicates) of layers to leave as they are.
        verbose: 0 for no progress bar. There is none in a pipe either.

    Raises:
        TypeError: `model` is no layer.
        ValueError: it is not built; a layer is quantized already; no layer is
            given a quantized policy, or none of those has a weight for it; a
            weight holds inf or NaN. The model is unchanged then.

    Example:
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="head")])
        >>> report = quantize(model, "nf4_from_float32")
        >>> report.layers[0].bits_per_parameter, model.layers[0].dtype_policy.name
        (4.5, 'nf4_from_float32')
    """
    convert.require_layer(model)
    policy_map = _as_map(policy)
    layers = [layer for layer in _bridge.flatten_layers(model) if convert.has_float_policy(layer)]
    _require_convertible(layers)
    kept = set(layers_matching(layers, skip, "skip"))
    chosen = [(layer, policy_map.resolve(layer)) for layer in layers if layer not in kept]
    quantized = [(layer, p) for layer, p in chosen if _codec(p) is not None and has_sites(layer)]
    obstacles = {
        id(layer): float8.obstacle(layer, p) for layer, p in chosen if float8.is_asked(p) and float8.sites_of(layer)
    }
    if not quantized and all(obstacles.values()):
        reason = next(iter(obstacles.values()), "")
        hint = ""
        if reason:
            hint = (
                f" {reason[0].upper()}{reason[1:]}. Pass a QuantizedFloat8DTypePolicy with "
                f"min_features={MULTIPLE_OF_FEATURES} to multiply by all weights that 8-bit products can have."
            )
        raise ValueError(
            f"Expected a policy that quantizes at least one layer with a weight to quantize. Received: {policy!r}, by "
            "which none is. `DTypePolicyMap.explain(model)` shows which rule decides for each layer." + hint
        )
    before = {id(layer): dtypes.measured_bytes(_bridge.own_variables(layer)) for layer in layers}
    prepared, errors = {}, {}
    with progress_bar("quantize", "layers", verbose) as progress:
        task = progress.add_task("quantize", total=len(quantized))
        for layer, p in quantized:
            prepared[id(layer)] = prepare(layer, _codec(p))
            errors[id(layer)] = _error_of(prepared[id(layer)])
            progress.advance(task)
    for layer, p in chosen:
        obstacle = obstacles.get(id(layer))
        if obstacle:
            p = p.source_policy
        elif obstacle is not None:
            errors[id(layer)] = float8.rounding_error(layer)
        if id(layer) in prepared:
            commit(prepared.pop(id(layer)))
        inside = len(_bridge.flatten_layers(layer)) > 1
        convert.change_policy(layer, p, attach=policy_map if inside and isinstance(policy, DTypePolicyMap) else p)
        if is_quantized(layer):
            keep_lora_in_policy(layer)
    convert.refresh(model, keeps_state=not quantized)
    if isinstance(policy, DTypePolicyMap):
        convert.report_unmatched(policy)
    rows = [
        _row(layer, before[id(layer)], errors.get(id(layer)), "skipped" if layer in kept else obstacles.get(id(layer)))
        for layer in layers
        if before[id(layer)]
    ]
    return QuantizationReport(tuple(rows))


def dequantize(model: keras.Layer) -> None:
    """Gives a model's quantized layers plain float weights again, of the values that they compute with, in place.

    Their policies become the sources. LoRA weights stay as they are. A
    compiled model is compiled again, with a new optimizer.

    Args:
        model: a model or layer.

    Raises:
        TypeError: `model` is no layer.
        ValueError: no layer in it is quantized.

    Example:
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
        >>> report = quantize(model, "nf4_from_float32")
        >>> dequantize(model)
        >>> model.layers[0].dtype_policy.name, model.layers[0].kernel.dtype
        ('float32', 'float32')
    """
    convert.require_layer(model)
    layers = _bridge.flatten_layers(model)
    stored = [layer for layer in layers if is_quantized(layer)]
    if not stored and not any(float8.is_float8(layer) for layer in layers):
        raise ValueError("Expected a model with quantized layers. Received one without. Call quantize first.")
    for layer in layers:
        if is_quantized(layer):
            restore(layer)
        own = attached(layer)
        if isinstance(own, QuantizedDTypePolicy):
            convert.change_policy(layer, own.source_policy)
    convert.refresh(model, keeps_state=not stored)


def _as_map(policy):
    if policy is None:
        raise ValueError(
            "Expected a policy, its name, or a DTypePolicyMap. Received: None. Pass a quantized policy's name."
        )
    if isinstance(policy, DTypePolicyMap):
        return policy
    policy = registry.get(policy)
    if not isinstance(policy, QuantizedDTypePolicy):
        raise ValueError(f"Expected a quantized policy. Received: {policy!r}. set_policy converts to float policies.")
    return DTypePolicyMap(policy)


def _codec(policy):
    codec = getattr(policy, "format", None)
    return codec if isinstance(codec, Codec) else None


def _require_convertible(layers):
    for layer in layers:
        path = _bridge.layer_path(layer)
        if not layer.built:
            raise ValueError(
                f"Layer '{path}' is not built, so it has no weights to quantize. Call the model on data first."
            )
        if is_quantized(layer) or float8.is_float8(layer) or _bridge.is_quantized(layer):
            raise ValueError(
                f"Layer '{path}' is quantized already ('{layer.dtype_policy.name}'). Call dequantize(model) first; that "
                "gives the weights it computes with, not those of before."
            )


def _error_of(prepared):
    """Returns the relative error of a layer's encoded weights, one at a time in memory."""
    sums = [
        encoded.change(_bridge_variables.value_of(vars(prepared.layer)[attribute]), arrays)
        for attribute, (encoded, arrays) in prepared.weights.items()
    ]
    change, norm = (sum(column) for column in zip(*sums, strict=True))
    return (change / norm) ** 0.5 if norm else 0.0


def _row(layer, bytes_before, error, obstacle):
    own = _bridge.own_variables(layer)
    parameters, nbytes = sum(math.prod(v.shape) for v in own), dtypes.measured_bytes(_bridge.own_variables(layer))
    note = ""
    if float8.is_float8(layer):
        weight = layer.weight_matrix.variable
        parameters, stored = math.prod(weight.shape), dtypes.measured_bytes([weight])
    elif is_quantized(layer):
        encoded = layer.encoded_weights.values()
        parameters, stored = sum(math.prod(e.shape) for e in encoded), sum(e.nbytes for e in encoded)
    else:
        stored = nbytes
        if any(len(v.shape) > 1 for v in own):
            note = obstacle or ("no site" if isinstance(attached(layer), QuantizedDTypePolicy) else "")
    is_changed = is_quantized(layer) or float8.is_float8(layer)
    mode = layer.dtype_policy.name.partition("_from_")[0] if is_changed else ""
    return QuantizedLayer(
        _bridge.layer_path(layer), mode, bytes_before, nbytes, parameters, stored * 8 / parameters, error, note
    )
