"""Names the first tensor of a training step that is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import keras
from keras import ops

from keras_precision import _bridge, _bridge_models, dtypes
from keras_precision.policies import resolve
from keras_precision.report import passes
from keras_precision.report.recorder import Observed, Recorder

Kind = Literal["input", "weight", "activation", "loss", "activation gradient", "weight gradient", "update"]

# What to do, by what is not finite first: in float16, and in other dtypes; or in any.
_LOWER = "lower the learning rate or clip gradients (clipnorm=1.0)"
_POLICY = "Give the layer the policy 'float32' or 'mixed_bfloat16' in a DTypePolicyMap, or"
_ADVICE: dict[Kind, str | tuple[str, str]] = {
    "input": "Clean that sample, or leave it out.",
    "weight": (
        f"{_POLICY} keep its weights small (weight_decay).",
        f"Load or initialise the weights again; if they grew step by step, {_LOWER}.",
    ),
    "activation": (
        f"{_POLICY} scale its inputs or weights down.",
        f"Look for a division by 0, a logarithm of 0 or a root of a negative number there; if values grew step by step, {_LOWER}.",
    ),
    "loss": "Let the loss take logits (from_logits=True), or keep what it takes a logarithm of or divides by from 0.",
    "activation gradient": (
        f"{_POLICY} let a LossScaleOptimizer find a loss scale that fits.",
        f"Look for a function without a derivative there, such as a root at 0; if gradients grew step by step, {_LOWER}.",
    ),
    "weight gradient": (
        f"{_POLICY} let a LossScaleOptimizer find a loss scale that fits.",
        f"If gradients grew step by step, {_LOWER}.",
    ),
    "update": f"The gradients are finite, so the optimizer made it: {_LOWER[0].upper()}{_LOWER[1:]}, or raise its epsilon.",
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One tensor of a step.

    Attributes:
        kind: what it is.
        layer: path of the layer that it belongs to; the model's own for data and the loss.
        class_name: of that layer.
        name: of the weight or of the data, "" for others.
        dtype: of the tensor.
        largest_finite: the greatest magnitude of its finite values, 0.0 if it has none.
        infinities: how many of its values are inf or -inf.
        nans: how many are NaN.
        elements: how many it has.
    """

    kind: Kind
    layer: str
    class_name: str
    name: str
    dtype: str
    largest_finite: float
    infinities: int
    nans: int
    elements: int

    @property
    def is_finite(self) -> bool:
        """Whether all values are."""
        return not (self.infinities or self.nans)

    def __str__(self) -> str:
        what = {
            "activation": "output",
            "activation gradient": "gradient of the output",
            "update": "weight after the update",
        }
        noun = what.get(self.kind, self.kind)
        name = f" '{self.name}'" if self.name else ""
        return f"{noun}{name} of layer '{self.layer}' ({self.class_name}, {self.dtype})"


@dataclasses.dataclass(frozen=True)
class Blame:
    """The first tensor of a step that holds inf or NaN.

    Attributes:
        first: it.
        before: up to three tensors that were computed just before it, the nearest first: how values grew.
        loss_scale: what the loss was multiplied by, 1.0 for nothing.
        epoch: of `fit`, from 0; None outside of it.
        batch: of the epoch, from 0; None outside of `fit`.
        was_skipped: whether loss scaling skipped the step, so that its weights are not lost.
        ruined: path of the first weight, or moving average, that the step made inf or NaN; None if none.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="head")], name="net")
        >>> model.layers[0].set_weights([np.array([[3e38]]), np.zeros(1)])
        >>> model.compile("sgd", "mse")
        >>> found = blame(model, np.full((2, 1), 10.0), np.zeros((2, 1)))
        >>> found.first.kind, found.first.layer, found.first.infinities
        ('activation', 'net/head', 2)
    """

    first: Seen
    before: tuple[Seen, ...] = ()
    loss_scale: float = 1.0
    epoch: int | None = None
    batch: int | None = None
    was_skipped: bool = False
    ruined: str | None = None

    @property
    def limit(self) -> float:
        """The largest finite value of the tensor's dtype."""
        return dtypes.info(self.first.dtype).max

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready lists and dicts."""
        return {
            **dataclasses.asdict(self),
            "before": [dataclasses.asdict(one) for one in self.before],
            "limit": self.limit,
        }

    def __str__(self) -> str:
        first = self.first
        where = "" if self.batch is None else f" in batch {self.batch} of epoch {self.epoch}"
        counts = " and ".join(
            f"{count:,} {name}" for count, name in ((first.infinities, "inf"), (first.nans, "NaN")) if count
        )
        lines = [
            f"Not finite first{where}: the {first}: {counts} of {first.elements:,} values. Its largest finite value is "
            f"{first.largest_finite:.4g}; {first.dtype} ends at {self.limit:.4g}."
        ]
        if self.before:
            told = ", ".join(f"{one.largest_finite:.4g} in the {one}" for one in self.before)
            lines.append(f"Just before, the largest were {told}.")
        if self.loss_scale != 1.0:
            lines.append(f"The loss was multiplied by {self.loss_scale:g}.")
        if self.ruined is not None:
            skipped = ", though loss scaling skipped the update" if self.was_skipped else ""
            lines.append(f"The step made '{self.ruined}' inf or NaN{skipped}.")
        elif self.was_skipped:
            lines.append("Loss scaling skipped the step and lowers the scale: nothing is lost unless this goes on.")
        advice = _ADVICE[first.kind]
        is_of_dtype = first.dtype == "float16" and not (first.kind == "weight" and first.nans)
        lines.append(advice if isinstance(advice, str) else advice[0 if is_of_dtype else 1])
        return " ".join(lines)


class NonFiniteError(FloatingPointError):
    """Training has made inf or NaN.

    Attributes:
        blame: what was not finite first; None if that could not be told.
    """

    def __init__(self, message: str, blame: Blame | None = None):
        super().__init__(message)
        self.blame = blame


def blame(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, *, loss_scale: float = 1.0
) -> Blame | None:
    """Returns the first tensor that is not finite in a training step on a batch, or None if all are.

    Runs the model's forward pass, loss and backward pass as they are, with the
    policies, weights and random seeds that it has, and looks at every layer's
    outputs and gradients. Nothing is updated. The order is that of
    computation: data, weights, activations, the loss, gradients from the
    output backwards.

    Args:
        model: compiled with a loss, or making its own with `add_loss`; built.
        x: array or structure of arrays, as `fit` takes them; all of it is one
            batch.
        y: likewise.
        sample_weight: likewise.
        loss_scale: what the loss is multiplied by, > 0.

    Raises:
        ValueError: the model is not compiled.

    Example: see `Blame`.
    """
    if not model.compiled:
        raise ValueError(
            "Expected a compiled model, whose loss is differentiated. Call model.compile(loss=...) before."
        )
    batch = passes.Batch(x, y, sample_weight=sample_weight, is_trained_on=True)
    if not model.built:
        _bridge_models.build_for(model, x, y)
    return _first_of(_seen_in(model, batch, loss_scale), loss_scale)


def _first_of(seen: Iterator[Seen], loss_scale: float) -> Blame | None:
    before: list[Seen] = []
    for one in seen:
        if not one.is_finite:
            return Blame(one, tuple(before[-3:][::-1]), loss_scale)
        if one.kind not in ("input", "weight", "loss"):
            before.append(one)
    return None


def _seen_in(model: keras.Model, batch: passes.Batch, loss_scale: float) -> Iterator[Seen]:
    """Yields the tensors of a step in the order of computation; the pass runs when data and weights have been taken."""
    layers = _bridge.flatten_layers(model)
    named = [described(layer) for layer in layers]
    for name in ("x", "y", "sample_weight"):
        for one in keras.tree.flatten(getattr(batch, name)):
            if one is not None and keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype)):
                yield seen("input", *named[0], name, ops.convert_to_tensor(one))
    for place, weights in enumerate(passes.own_weights(model)):
        for weight in weights:
            # As the layer computes with it: 1e5 is finite in float32, and inf where it is cast to float16.
            value = ops.cast(ops.convert_to_tensor(weight.value), computed_dtype(layers[place], weight))
            yield seen("weight", *named[place], weight.name, value)
    activations: list[tuple[tuple[int, int, int], Any]] = []
    gradients: list[tuple[tuple[int, int, int], Any]] = []
    recorder = Recorder(
        model,
        on_activation=lambda *found: activations.append(found),
        on_gradient=lambda *found: gradients.append(found),
        summary=_counted,
    )
    counted = _run(model, batch, recorder, loss_scale)
    for place, counts in activations:
        yield _seen("activation", *named[place[0]], "", *recorder.facts[place], counts)
    yield seen("loss", *named[0], "", ops.convert_to_tensor(recorder.loss))
    of_weights: dict[int, list[Seen]] = {}
    for (place, name), weight, counts in zip(passes.trained_names(model), passes.trained(model), counted, strict=True):
        if counts is not None:
            facts = (computed_dtype(layers[place], weight), math.prod(weight.shape))
            of_weights.setdefault(place, []).append(_seen("weight gradient", *named[place], name, *facts, counts))
    remaining = Counter(place[0] for place, _ in gradients)
    for place, counts in gradients:
        yield _seen("activation gradient", *named[place[0]], "", *recorder.facts[place], counts)
        remaining[place[0]] -= 1
        if not remaining[place[0]]:  # the last of its calls to be differentiated
            yield from of_weights.pop(place[0], ())
    for left in of_weights.values():
        yield from left


def computed_dtype(layer: keras.Layer, weight: keras.Variable) -> str:
    """Returns the dtype that a layer computes with a weight in."""
    dtype = resolve(layer).compute_dtype if _bridge_models.is_autocast(weight) else weight.dtype
    return keras.backend.standardize_dtype(dtype)


def described(layer: keras.Layer) -> tuple[str, str]:
    """Returns a layer's path and the name of its class."""
    return _bridge.layer_path(layer), _bridge.original_class(type(layer)).__name__


def seen(kind: Kind, layer: str, class_name: str, name: str, tensor: Any) -> Seen:
    """Returns what there is to say of a tensor that has values."""
    dtype, elements = keras.backend.standardize_dtype(tensor.dtype), math.prod(tensor.shape)
    return _seen(kind, layer, class_name, name, dtype, elements, _counted(tensor))


def _seen(kind, layer, class_name, name, dtype, elements, counts):
    largest, infinities, nans = (ops.convert_to_numpy(count).item() for count in counts)
    return Seen(kind, layer, class_name, name, dtype, float(largest), int(infinities), int(nans), elements)


def _counted(tensor):
    """Returns the greatest magnitude of the finite values, and how many are infinite or NaN."""
    if not math.prod(tensor.shape):
        return ops.zeros(()), ops.zeros((), "int32"), ops.zeros((), "int32")
    if keras.backend.standardize_dtype(tensor.dtype) != "float64":
        tensor = ops.cast(tensor, "float32")
    magnitudes = ops.where(ops.isfinite(tensor), ops.abs(tensor), 0)
    infinities, nans = (ops.sum(ops.cast(test(tensor), "int32")) for test in (ops.isinf, ops.isnan))
    return ops.max(magnitudes), infinities, nans


def _run(model, batch, recorder, loss_scale):
    """Runs the pass, and leaves the model as it was: TensorFlow's changes random seeds, moving averages and metrics."""
    changed = [*model.non_trainable_variables, *model.metrics_variables]
    before = [ops.convert_to_numpy(v.value) for v in changed]
    passes.observe(model)
    try:
        with _bridge_models.session_kept():
            return passes.run(model, batch, recorder, loss_scale)
    finally:
        for layer in _bridge.flatten_layers(model):
            _bridge.despecialise(layer, Observed)
        for variable, value in zip(changed, before, strict=True):
            variable.assign(value)
