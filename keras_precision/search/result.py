"""What a search found."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
from rich.console import Group
from rich.table import Table
from rich.text import Text

from keras_precision.layers import quantize, set_policy
from keras_precision.policies import registry
from keras_precision.policies.policy_map import DTypePolicyMap
from keras_precision.policies.quantized import QuantizedDTypePolicy
from keras_precision.rich_text import RichText
from keras_precision.search.budget import Budget


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What one layer was given.

    Attributes:
        path: of the layer.
        policy: its policy's name.
        is_changed: whether that is another one than it had.
        bytes_before: of its own weights.
        bytes_after: likewise.
        loss_increase: mean a sample on the calibration data while only this
            layer had the policy; 0.0 for a layer that keeps its own.
    """

    path: str
    policy: str
    is_changed: bool
    bytes_before: int
    bytes_after: int
    loss_increase: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What one candidate did to one layer alone, on the calibration data.

    Attributes:
        path: of the layer.
        policy: the candidate's name.
        bytes: of the layer's own weights.
        loss_increase: mean a sample.
        standard_error: of it.
        seconds: of a prediction of one batch; None where time did not count.
    """

    path: str
    policy: str
    bytes: int
    loss_increase: float
    standard_error: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Verified:
    """A choice of policies for all layers, measured on the held-out data.

    Attributes:
        name: "as it was", a candidate that all layers were given, or "search".
        bytes: of all weights.
        seconds: of a prediction of one batch; None where time did not count.
        loss: mean a sample.
        loss_increase: over the model as it was.
        standard_error: of the increase.
        accuracy: in [0, 1]; None unless the budget bounds it.
        predicted_increase: sum of the layers' own increases with their standard errors; None for those not allocated.
        is_within: whether the budget holds, with the safety margin.
    """

    name: str
    bytes: int
    seconds: float | None
    loss: float
    loss_increase: float
    standard_error: float
    accuracy: float | None
    predicted_increase: float | None
    is_within: bool


@dataclasses.dataclass(frozen=True, repr=False)
class SearchResult(RichText):
    """The policy of each layer that a search chose, and all that it measured.

    Attributes:
        policy_map: gives each layer its policy; pass it to `keras_precision.quantize`, or call `apply`.
        chosen: what it got on the held-out data.
        verified: all choices that were measured on the held-out data, the model as it was first.
        layers: what each layer with weights of its own was given.
        sensitivities: what each candidate did to each layer alone.
        predicted_front: (bytes or seconds, sum of the layers' own loss increases and standard errors) of the choices
            that no other beats by these sums, by rising cost.
        budget: what was asked for.
        minimize: "bytes", "seconds" or "loss".
        confidence: one-sided, that the bound holds; see `search_policy`.
        calibration_samples: that single layers were judged on.
        held_out_samples: that choices were verified on.
        seed: of the split.
        stopped: why the search ended early, or "".
    """

    policy_map: DTypePolicyMap
    chosen: Verified
    verified: tuple[Verified, ...]
    layers: tuple[LayerChoice, ...]
    sensitivities: tuple[Sensitivity, ...]
    predicted_front: tuple[tuple[float, float], ...]
    budget: Budget
    minimize: str
    confidence: float
    calibration_samples: int
    held_out_samples: int
    seed: int
    stopped: str

    @property
    def before(self) -> Verified:
        """The model as it was."""
        return self.verified[0]

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights of the model as it was."""
        return self.before.bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights under `policy_map`."""
        return self.chosen.bytes

    @property
    def counts_time(self) -> bool:
        """Whether seconds, not bytes, are what the search saves."""
        return self.chosen.seconds is not None

    def cost(self, point: Verified) -> float:
        """Returns a point's bytes, or its seconds where the search saves time."""
        return point.seconds if self.counts_time else point.bytes

    @property
    def front(self) -> tuple[Verified, ...]:
        """The verified choices that no other one beats in cost and in loss, by rising cost."""
        kept: list[Verified] = []
        for point in sorted(self.verified, key=lambda point: (self.cost(point), point.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return tuple(kept)

    def apply(self, model: keras.Model) -> None:
        """Gives a model the policies, in place: by `quantize` where any stores weights quantized, else by `set_policy`.

        Args:
            model: the one that was searched, or another of the same layers.
        """
        if any(isinstance(p, QuantizedDTypePolicy) for p in registry.policies_of(self.policy_map)):
            quantize(model, self.policy_map, verbose=0)
        else:
            set_policy(model, self.policy_map)

    def plot(self, axes=None):
        """Returns a matplotlib figure of loss against cost: what was verified, its Pareto front, and the sums' front.

        Args:
            axes: of matplotlib, to draw on; None makes a figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from keras_precision.search.plot import plot

        return plot(self, axes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result for JSON, numbers that are not finite as None; `policy_map` as `serialize` writes it."""
        fields = {name: value for name, value in vars(self).items() if name not in ("policy_map", "budget", "chosen")}
        return _finite(
            {
                "policy_map": registry.serialize(self.policy_map),
                "rules": {"default": self.policy_map.default_policy.name, **_rules(self.policy_map)},
                "budget": self.budget.to_dict(),
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
                "chosen": dataclasses.asdict(self.chosen),
                **{name: _plain(value) for name, value in fields.items()},
                "front": [dataclasses.asdict(point) for point in self.front],
            }
        )

    def __rich__(self) -> Group:
        saved = 1 - self.bytes_after / self.bytes_before
        title = f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after ({saved:.1%} less)"
        layers = Table(title=title, title_justify="left")
        for heading in ("layer", "policy"):
            layers.add_column(heading, overflow="fold")
        for heading in ("bytes before", "bytes after", "loss increase alone"):
            layers.add_column(heading, justify="right")
        for row in self.layers:
            alone = f"{row.loss_increase:+.2e}" if row.is_changed else ""
            name = Text(row.policy, style="" if row.is_changed else "dim")
            layers.add_row(Text(row.path), name, f"{row.bytes_before:,}", f"{row.bytes_after:,}", alone)
        return Group(layers, self._verified_table(), Text(self._conclusion()))

    def _verified_table(self):
        table = Table(title=f"Measured on {self.held_out_samples} held-out samples", title_justify="left")
        table.add_column("policies")
        headings = ["bytes", "loss", "increase", "standard error"]
        headings += ["seconds a batch"] * self.counts_time + ["accuracy"] * self.budget.bounds_accuracy
        for heading in headings:
            table.add_column(heading, justify="right")
        table.add_column("within the budget")
        for point in self.verified:
            cells = [
                f"{point.bytes:,}",
                f"{point.loss:.5f}",
                f"{point.loss_increase:+.2e}",
                f"{point.standard_error:.1e}",
            ]
            cells += [f"{point.seconds:.5f}"] if self.counts_time else []
            cells += [f"{point.accuracy:.2%}"] if self.budget.bounds_accuracy else []
            is_chosen = point is self.chosen
            within = ("yes" if point.is_within else "no") + (", chosen" if is_chosen else "")
            table.add_row(Text(point.name), *cells, within, style="bold" if is_chosen else "")
        return table

    def _conclusion(self):
        rules = "".join(f"\n    {key}: {policy}" for key, policy in _rules(self.policy_map).items())
        lines = [f"Policy map: {self.policy_map.default_policy.name} but for{rules}"] if rules else []
        lines = lines or [f"Policy map: {self.policy_map.default_policy.name} everywhere"]
        if self.budget.bounds_quality:
            lines.append(
                f"{self.budget} holds on data like the held-out samples with a confidence of {self.confidence:.0%}."
            )
        if self.chosen is self.before:
            lines.append(
                f"No cheaper choice kept {self.budget} with that confidence on {self.held_out_samples} held-out "
                "samples. Allow more, add candidates, or pass more data."
            )
        if self.stopped:
            lines.append(f"Stopped early: {self.stopped}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<SearchResult: {self.bytes_before:,} to {self.bytes_after:,} bytes, "
            f"loss {self.before.loss:.5f} to {self.chosen.loss:.5f}, {self.budget}>"
        )


def _rules(policy_map):
    return {key: policy_map[key].name for key in policy_map}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
