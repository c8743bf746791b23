"""What an audit has found, as values."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from keras_precision.files import written_whole
from keras_precision.report.alignment import Dimension
from keras_precision.report.memory import Memory
from keras_precision.report.tensor_stats import TensorStats
from keras_precision.rich_text import RichText

Severity = Literal["error", "warning", "info"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may become so, in plain words.

    Attributes:
        kind: "overflow", "underflow", "not_finite", "dtype_leak", "low_sqnr" or "unaligned".
        layer: path of the layer.
        tensor: "weights", "activations", "activation_gradients", "weight_gradients", or the name of a weight.
        message: what is the matter and what to do.
        severity: "error" where training or the outputs break, "warning" where they may suffer, "info" where only time is
            lost.
    """

    kind: str
    layer: str
    tensor: str
    message: str
    severity: Severity


@dataclasses.dataclass(frozen=True)
class LayerAudit:
    """What an audit has found of one layer.

    Attributes:
        path: of the layer.
        class_name: of the layer.
        policy: the name of the candidate policy that it resolved to.
        compute_dtype: of its arithmetic; the range that its tensors are held against.
        tensors: statistics by kind of tensor, of "weights", "activations", "activation_gradients" (with respect to its
            outputs) and "weight_gradients" those that it has.
        sqnr_db: signal-to-quantization-noise ratio of its outputs against float32's, in dB, the errors of the layers
            before it included: 20 dB is a relative error of 0.1. None where they are equal, or not floats.
        casts: how often a step converts between float dtypes in it, its backward pass included.
        cast_bytes: what these read and write.
        unaligned: dimensions of its products that the hardware does not speed up.
    """

    path: str
    class_name: str
    policy: str
    compute_dtype: str
    tensors: dict[str, TensorStats]
    sqnr_db: float | None
    casts: int
    cast_bytes: int
    unaligned: tuple[Dimension, ...]

    @property
    def exponents(self) -> tuple[str, str, str]:
        """Between which exponents weights, activations and gradients lie, as text; "" without values."""
        gradients = self.tensors.get("weight_gradients", self.tensors.get("activation_gradients"))
        return tuple(map(_range, (self.tensors.get("weights"), self.tensors.get("activations"), gradients)))

    @property
    def sqnr(self) -> str:
        """The ratio in dB as text; "" where there is none."""
        return "" if self.sqnr_db is None else f"{self.sqnr_db:.1f}"


@dataclasses.dataclass(frozen=True, repr=False)
class Audit(RichText):
    """What `audit` found.

    Attributes:
        model: the model's name.
        policy: the name of the candidate policy; "the policies it has" where none was given.
        loss_scale: what gradients were multiplied by before they were held against a range.
        loss_scale_source: where that is from, in words.
        layers: one entry a layer, nested ones too, in the order that the model holds them in.
        order: paths in the order in which layers return their outputs.
        memory: of a training step, estimated.
        hardware: computing dtype -> how this device runs it.
        findings: errors first; empty where all is well.
    """

    model: str
    policy: str
    loss_scale: float
    loss_scale_source: str
    layers: tuple[LayerAudit, ...]
    order: tuple[str, ...]
    memory: Memory
    hardware: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def casts(self) -> int:
        """Conversions between float dtypes in a step, of all layers."""
        return sum(layer.casts for layer in self.layers)

    @property
    def cast_bytes(self) -> int:
        """What they read and write."""
        return sum(layer.cast_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit as JSON-ready lists and dicts, totals included; exponents are keys, as strings."""
        data = dataclasses.asdict(self) | {"casts": self.casts, "cast_bytes": self.cast_bytes}
        for layer in data["layers"]:
            for stats in layer["tensors"].values():
                stats["histogram"] = {str(exponent): count for exponent, count in stats["histogram"].items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def plot(self) -> Any:
        """Returns a matplotlib Figure: exponents by layer as a heat map for each kind of tensor, and error by depth.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from keras_precision.report.plots import figure_of

        return figure_of(self)

    def to_html(self) -> str:
        """Returns one self-contained page that a browser opens offline; without matplotlib it holds no plot."""
        from keras_precision.report.page import page_of

        return page_of(self)

    def save_html(self, path: Any) -> None:
        """Writes that page whole, or not at all.

        Args:
            path: of the file; one that exists is replaced.
        """
        with written_whole(path) as partial:
            partial.write_text(self.to_html(), encoding="utf-8")

    def __rich__(self) -> Group:
        return Group(self._layer_table(), self._memory_line(), *self._finding_lines())

    def _layer_table(self):
        table = Table(title=f"Audit of {self.model} under {self.policy}", title_justify="left")
        for heading in ("layer", "class", "computes"):
            table.add_column(heading, overflow="fold")
        for heading in ("weights 2^", "activations 2^", "gradients 2^", "SQNR dB", "casts", "cast bytes"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            if not layer.tensors and not layer.casts:
                continue
            numbers = (*layer.exponents, layer.sqnr, f"{layer.casts:,}", f"{layer.cast_bytes:,}")
            table.add_row(*map(Text, (layer.path, layer.class_name, layer.compute_dtype, *numbers)))
        return table

    def _memory_line(self):
        memory = self.memory
        parts = ", ".join(
            f"{name} {getattr(memory, name):,}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        scale = f"Loss scale {self.loss_scale:g} ({self.loss_scale_source})."
        return Text(
            f"Bytes of a step on {memory.batch_size} rows (estimated): {parts}; {memory.peak:,} at once. "
            f"{self.casts:,} casts of {self.cast_bytes:,} bytes. {scale}"
        )

    def _finding_lines(self):
        for finding in self.findings:
            yield Text(f"{finding.severity}: {finding.message}", style=_STYLES[finding.severity])
        if not self.findings:
            yield Text("Nothing found that this policy would break.", style="green")

    def __repr__(self) -> str:
        return (
            f"<Audit of {self.model!r} under {self.policy}: {len(self.layers)} layers, {len(self.findings)} findings>"
        )


_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def _range(stats):
    """Returns the exponents that values lie between, "" without values."""
    found = stats.exponent_range if stats is not None else None
    return "" if found is None else f"{found[0]}..{found[1]}"
