"""Tests of keras_precision.policies.explain."""

import keras
import numpy as np
import pytest

from keras_precision import DTypePolicyMap, policy_scope, resolve
from keras_precision.policies.explain import ExplainedLayer, Explanation

ROWS = np.ones((2, 4), "float32")


class Block(keras.layers.Layer):
    """A layer of layers, named against the alphabet to show the order."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.second = keras.layers.Dense(4, name="z_first")
        self.act = keras.layers.ReLU(name="a_second")

    def call(self, inputs):
        return self.act(self.second(inputs))


class Net(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(name="block")
        self.head = keras.layers.Dense(1, name="head")

    def call(self, inputs):
        return self.head(self.block(inputs))


def is_single(layer):
    """An unregistered predicate, which need not be saved to be explained."""
    return getattr(layer, "units", None) == 1


def test_subclassed_model():
    model = Net(name="net")
    model(ROWS)
    rules = DTypePolicyMap(
        "float32",
        {"nothing": "float64", "block/z_first": "bfloat16", is_single: "mixed_bfloat16", keras.layers.Dense: "float16"},
    )
    explanation = rules.explain(model)
    predicate = next(key for key in rules if key.startswith("predicate:"))
    assert explanation == Explanation(
        rows=(
            ExplainedLayer("net", "Net", None, "float32"),
            ExplainedLayer("net/block", "Block", None, "float32"),
            ExplainedLayer("net/block/z_first", "Dense", "block/z_first", "bfloat16"),
            ExplainedLayer("net/block/a_second", "ReLU", None, "float32"),
            ExplainedLayer("net/head", "Dense", predicate, "mixed_bfloat16"),
        ),
        unmatched=("nothing", "class:Dense"),
    )


def test_nested_functional_models_and_inputs_are_left_out():
    def part(name, *layers):
        return keras.Sequential([keras.Input((4,)), *layers], name=name)

    inner = part("inner", keras.layers.Dense(4, name="dense"))
    inputs = keras.Input((4,), name="rows")
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(inner(inputs)), name="outer")
    rules = DTypePolicyMap("bfloat16", {"inner/*": "float32", "rows": "float16"})
    explanation = rules.explain(model)
    assert {(row.path.rpartition("/")[2], row.rule, row.policy) for row in explanation.rows} >= {
        ("dense", "inner/*", "float32"),
        ("head", None, "bfloat16"),
        ("outer", None, "bfloat16"),
    }
    assert "InputLayer" not in {row.layer_class for row in explanation.rows}
    assert explanation.unmatched == ("rows",)


def test_explanation_agrees_with_what_layers_get():
    rules = DTypePolicyMap("float32", {"head": "bfloat16", "block/*": "mixed_bfloat16", keras.layers.ReLU: "float16"})
    with policy_scope(rules):
        model = Net(name="net")
    model(ROWS)
    found = {row.path.rpartition("/")[2]: row.policy for row in rules.explain(model).rows}
    layers = [model, model.block, model.block.second, model.block.act, model.head]
    assert {layer.name: resolve(layer).name for layer in layers} == found
    assert found == {
        "net": "float32",
        "block": "float32",
        "z_first": "mixed_bfloat16",
        "a_second": "mixed_bfloat16",
        "head": "bfloat16",
    }
    assert set(rules.unmatched()) == set(rules.explain(model).unmatched) == {"class:ReLU"}


def test_explaining_changes_nothing():
    model = Net(name="net")
    model(ROWS)
    rules = DTypePolicyMap("float32", {"head": "bfloat16"})
    assert rules.explain(model).rows[-1].rule == "head"
    assert rules.unmatched() == ["head"]
    assert model.head.compute_dtype == "float32" and model.head.dtype_policy.name == "float32"


def test_shared_layer_has_one_row():
    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(shared(inputs)))
    assert [row.path for row in DTypePolicyMap("float32").explain(model).rows].count("shared") == 1


def test_a_single_layer_before_it_is_built():
    layer = keras.layers.Dense(2, name="head")
    explanation = DTypePolicyMap("float32", {"head": "nf4"}).explain(layer)
    assert explanation == Explanation((ExplainedLayer("head", "Dense", "head", "nf4_from_float32"),), ())


def test_prints_a_table():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, name="head"), keras.layers.ReLU(name="act")], name="net"
    )
    text = str(
        DTypePolicyMap("mixed_bfloat16", {"head": "float32", "tail": "float16", "*_9": "float16"}).explain(model)
    )
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    head, act = (
        next(path for path in lines if path.endswith("head")),
        next(path for path in lines if path.endswith("act")),
    )
    assert lines[head] == ["Dense", "head", "float32"]
    assert lines[act] == ["ReLU", "(default)", "mixed_bfloat16"]
    assert "Rules that match no layer: tail, *_9" in text


def test_table_without_unmatched_rules_says_nothing_of_them():
    assert "match no layer" not in str(
        DTypePolicyMap("float32", {"head": "bfloat16"}).explain(keras.layers.Dense(1, name="head"))
    )


@pytest.mark.parametrize("wrong", [None, 3, keras.layers.Dense, "net", [keras.layers.ReLU()]])
def test_of_something_else(wrong):
    with pytest.raises(TypeError, match=r"(?s)Expected a Keras model or layer. Received: .*of type "):
        DTypePolicyMap("float32").explain(wrong)
