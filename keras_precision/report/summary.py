"""A table of the precision and the memory of each layer of a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keras_precision import _bridge, policies
from keras_precision.dtypes import measured_bytes
from keras_precision.layers.float8 import is_float8
from keras_precision.policies.registry import output_dtype
from keras_precision.rich_text import RichText


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer's precision and the memory of the variables it owns itself.

    Attributes:
        path: where the layer is in the model.
        class_name: of the layer.
        policy: the name of the policy the layer resolved to.
        compute_dtype: of the layer's arithmetic; the format's name where products have fewer bits than the rest.
        variable_dtype: of its float variables, as the policy says.
        output_dtype: of what it returns.
        parameters: elements in its own variables; None until the layer is built.
        bytes: what these variables take, from the dtype of each live array; None until built.
    """

    path: str
    class_name: str
    policy: str
    compute_dtype: str
    variable_dtype: str
    output_dtype: str
    parameters: int | None
    bytes: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(RichText):
    """The precision and the memory of a model, layer by layer.

    Attributes:
        model: the model's name.
        layers: one entry a layer, nested ones too; a shared layer or variable counts once.
    """

    model: str
    layers: tuple[LayerSummary, ...]

    @classmethod
    def of(cls, model: keras.Layer) -> Summary:
        """Returns the summary of `model` without printing it."""
        counted: set[int] = set()
        rows = []
        for layer in _bridge.flatten_layers(model):
            if isinstance(layer, keras.layers.InputLayer):
                continue  # stores and computes nothing
            variables = [v for v in _bridge.own_variables(layer) if id(v) not in counted]
            counted.update(map(id, variables))
            rows.append(_summarize(layer, variables))
        return cls(model.name, tuple(rows))

    @property
    def parameters(self) -> int:
        """Elements in the variables of all built layers."""
        return sum(layer.parameters or 0 for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the variables of all built layers."""
        return sum(layer.bytes or 0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON-ready lists and dicts, totals included."""
        return dataclasses.asdict(self) | {"parameters": self.parameters, "bytes": self.bytes}

    def __rich__(self) -> Table:
        table = Table(title=f"Precision of {self.model}", show_footer=True)
        table.add_column("layer", footer="total", overflow="fold")
        for heading in ("class", "policy", "computes", "stores", "returns"):
            table.add_column(heading, overflow="fold")
        table.add_column("parameters", justify="right", footer=f"{self.parameters:,}")
        table.add_column("bytes", justify="right", footer=f"{self.bytes:,}")
        for layer in self.layers:
            table.add_row(*map(_cell, dataclasses.astuple(layer)))
        return table

    def __repr__(self) -> str:
        return (
            f"<Summary of {self.model!r}: {len(self.layers)} layers, "
            f"{self.parameters:,} parameters, {self.bytes:,} bytes>"
        )


def summary(model: keras.Layer) -> Summary:
    """Prints each layer's policy, dtypes, parameters and measured bytes, and returns them.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="bfloat16", name="head")], name="net")
    >>> report = summary(model)  # doctest: +NORMALIZE_WHITESPACE
                                        Precision of net
    ┏━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━┓
    ┃ layer    ┃ class      ┃ policy   ┃ computes ┃ stores   ┃ returns  ┃ parameters ┃ bytes ┃
    ┡━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━┩
    │ net      │ Sequential │ float32  │ float32  │ float32  │ float32  │          0 │     0 │
    │ net/head │ Dense      │ bfloat16 │ bfloat16 │ bfloat16 │ bfloat16 │         10 │    20 │
    ├──────────┼────────────┼──────────┼──────────┼──────────┼──────────┼────────────┼───────┤
    │ total    │            │          │          │          │          │         10 │    20 │
    └──────────┴────────────┴──────────┴──────────┴──────────┴──────────┴────────────┴───────┘
    >>> report.parameters, report.bytes
    (10, 20)

    Args:
        model: a model or a layer; layers that are not built yet show '-' for their variables.

    Returns:
        The figures printed, as a `Summary`.
    """
    report = Summary.of(model)
    console = Console()
    if console.is_terminal or console.is_jupyter:
        console.print(report)
    else:
        print(report)  # a pipe has no edge to fold at, where rich would take 80 columns
    return report


def _summarize(layer: keras.Layer, variables: list[keras.Variable]) -> LayerSummary:
    policy = policies.resolve(layer)
    known = layer.built or bool(variables)
    return LayerSummary(
        path=_bridge.layer_path(layer),
        class_name=type(layer).__name__,
        policy=policy.name,
        compute_dtype=policy.quantization_mode if is_float8(layer) else policy.compute_dtype,
        variable_dtype=policy.variable_dtype,
        output_dtype=output_dtype(policy),
        parameters=sum(math.prod(v.shape) for v in variables) if known else None,
        bytes=measured_bytes(variables) if known else None,
    )


def _cell(value: str | int | None) -> Text:
    if value is None:
        return Text("-")
    # Text, since rich would take a name like "block[bold]" for markup.
    return Text(f"{value:,}" if isinstance(value, int) else value)
