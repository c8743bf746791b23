"""A float32 pass and one with the candidate policy, compared tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras

from keras_precision import _bridge, dtypes
from keras_precision.policies import resolve
from keras_precision.report import passes
from keras_precision.report.recorder import Leak, Recorder
from keras_precision.report.tensor_stats import Counts, Difference, TensorStats, count, difference, stats

KINDS = ("weights", "activations", "activation_gradients", "weight_gradients")


@dataclasses.dataclass
class Measured:
    """What two passes have shown.

    Attributes:
        tensors: (layer, kind) -> statistics, layers by their places in the model.
        differences: layer -> of its outputs from float32's.
        order: layers by when they first return something.
        gradient_order: layers by when backpropagation first comes to them.
        leaks: layers that compute in a wider dtype than their policy says, or fail because they mix dtypes.
        loss_scale: what the loss was multiplied by.
    """

    tensors: dict[tuple[int, str], TensorStats] = dataclasses.field(default_factory=dict)
    differences: dict[int, Difference] = dataclasses.field(default_factory=dict)
    order: list[int] = dataclasses.field(default_factory=list)
    gradient_order: list[int] = dataclasses.field(default_factory=list)
    leaks: list[Leak] = dataclasses.field(default_factory=list)
    loss_scale: float = 1.0


class Reference:
    """The float32 pass, kept to be compared with.

    Args:
        model: the float32 copy, prepared.
        judged: dtype, by layer, whose range its values are held against.
        batch: what to run on.
    """

    def __init__(self, model: keras.Model, judged: list[str], batch: passes.Batch):
        self.model, self.judged = model, judged
        self.outputs: dict[tuple[int, int, int], Any] = {}
        self.output_gradients: dict[tuple[int, int, int], Any] = {}
        recorder = Recorder(
            model,
            on_activation=self.outputs.__setitem__,
            on_gradient=self.output_gradients.__setitem__,
        )
        found = passes.run(model, batch, recorder, 1.0) or []
        self.weight_gradients = dict(zip(passes.trained_names(model), found, strict=False))

    def counts(self, loss_scale: float, kept: set[tuple[int, str]]) -> dict[tuple[int, str], Counts]:
        """Returns where all values lie, by layer and kind; gradients of the weights in `kept` alone."""
        found: dict[tuple[int, str], Counts] = {}

        def add(layer, kind, tensor, scale=1.0):
            counted = count(tensor, self.judged[layer], scale)
            found[layer, kind] = found[layer, kind] + counted if (layer, kind) in found else counted

        for place, tensor in self.outputs.items():
            add(place[0], "activations", tensor)
        for place, tensor in self.output_gradients.items():
            add(place[0], "activation_gradients", tensor, loss_scale)
        for layer, variables in enumerate(passes.own_weights(self.model)):
            for variable in variables:
                add(layer, "weights", keras.ops.convert_to_tensor(variable.value))
                gradient = self.weight_gradients.get((layer, variable.name))
                if gradient is not None and (layer, variable.name) in kept:
                    add(layer, "weight_gradients", gradient, loss_scale)
        return found

    def settled_scale(self, start: float) -> float:
        """Returns the scale that dynamic loss scaling comes down to where float16 gradients overflow, at least 1.

        Half of the largest power of 2 at which none does: sums inside a layer may be a little larger than their result.
        """
        if "float16" not in self.judged:
            return start
        largest = [
            counted.largest
            for (layer, kind), counted in self.counts(1.0, set(self.weight_gradients)).items()
            if kind.endswith("gradients") and self.judged[layer] == "float16"
        ]
        highest = max([value for value in largest if value > 0], default=0.0)
        if not highest:
            return start
        return min(start, max(1.0, 2.0 ** math.floor(math.log2(dtypes.info("float16").max / 2 / highest))))


def compare(model: keras.Model, reference: Reference, batch: passes.Batch, loss_scale: float) -> Measured:
    """Runs the candidate and returns how it compares with the float32 pass.

    Raises:
        LayerFailed: a layer raised that float32 runs.
    """
    measured = Measured(loss_scale=loss_scale)
    outside: dict[tuple[int, str], list[int]] = {}

    def note(kind, place, value, expected, scale):
        layer = place[0]
        order = measured.order if kind == "activations" else measured.gradient_order
        if layer not in order:
            order.append(layer)
        if expected is None or tuple(expected.shape) != tuple(value.shape):
            return
        found = difference(value, expected if scale == 1 else expected * scale)
        nonfinite = outside.setdefault((layer, kind), [0, 0])
        nonfinite[0] += found.nonfinite
        nonfinite[1] += found.elements
        if kind == "activations":
            before = measured.differences.get(layer)
            measured.differences[layer] = found if before is None else _sum(before, found)

    recorder = Recorder(
        model,
        on_activation=lambda place, t: note("activations", place, t, reference.outputs.get(place), 1),
        on_gradient=lambda place, t: note(
            "activation_gradients", place, t, reference.output_gradients.get(place), loss_scale
        ),
    )
    gradients = passes.run(model, batch, recorder, loss_scale)
    weights = dict(zip(passes.trained_names(model), gradients or [], strict=False))
    for (layer, name), gradient in weights.items():
        expected = reference.weight_gradients.get((layer, name))
        if gradient is not None and expected is not None:
            note("weight_gradients", (layer, 0, 0), gradient, expected, loss_scale)
    for (layer, kind), counted in reference.counts(loss_scale, set(weights)).items():
        nonfinite, elements = outside.get((layer, kind), (0, 0))
        measured.tensors[layer, kind] = stats(counted, reference.judged[layer], nonfinite / max(elements, 1))
    measured.leaks += recorder.leaks
    return measured


def judged_dtypes(model: keras.Model) -> list[str]:
    """Returns the dtype that each layer of a copy computes in, float32 where that is no float dtype."""
    computed = (resolve(layer).compute_dtype for layer in _bridge.flatten_layers(model))
    return [dtype if dtype in dtypes.DTYPES else "float32" for dtype in computed]


def _sum(first: Difference, second: Difference) -> Difference:
    return Difference(*(a + b for a, b in zip(first, second, strict=True)))


def kinds_of(tensors: Iterable[tuple[int, str]], layer: int) -> list[str]:
    """Returns which kinds of tensors a layer has, in the order of KINDS."""
    present = set(tensors)
    return [kind for kind in KINDS if (layer, kind) in present]
