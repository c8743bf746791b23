"""Which rule of a map decides for each layer of a model."""

from dataclasses import dataclass

import keras
from rich.table import Table

from keras_precision import _bridge
from keras_precision.rich_text import RichText


@dataclass(frozen=True)
class ExplainedLayer:
    """One layer's row.

    Attributes:
        path: str, the layer's path.
        layer_class: str, its class's name.
        rule: str, the key that decides; None where the default policy does.
        policy: str, name of the policy.
    """

    path: str
    layer_class: str
    rule: str | None
    policy: str


@dataclass(frozen=True)
class Explanation(RichText):
    """What a map does to a model; prints as a table.

    Attributes:
        rows: one `ExplainedLayer` a layer, in the model's order.
        unmatched: str, keys that decide for no layer of the model.
    """

    rows: tuple[ExplainedLayer, ...]
    unmatched: tuple[str, ...]

    def __rich__(self):
        table = Table(title="policy map", caption=self._caption(), caption_justify="left")
        for heading in ("layer", "class", "rule", "policy"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            table.add_row(row.path, row.layer_class, row.rule or "(default)", row.policy)
        return table

    def _caption(self):
        return f"Rules that match no layer: {', '.join(self.unmatched)}" if self.unmatched else None


def explain(policy_map, model: keras.Layer) -> Explanation:
    """Returns the rule and the policy that `policy_map` gives to each layer of `model`."""
    if not isinstance(model, keras.Layer):
        raise TypeError(f"Expected a Keras model or layer. Received: {model!r} (of type {type(model).__name__}).")
    rows = []
    for layer in _bridge.flatten_layers(model):
        if isinstance(layer, keras.layers.InputLayer):
            continue  # its dtype is the input's, which no policy decides
        path = _bridge.layer_path(layer)
        rule = policy_map.rule_for(layer, path)
        policy = policy_map.default_policy if rule is None else policy_map[rule]
        rows.append(ExplainedLayer(path, type(layer).__name__, rule, policy.name))
    deciding = {row.rule for row in rows}
    return Explanation(tuple(rows), tuple(key for key in policy_map if key not in deciding))
