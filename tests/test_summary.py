"""The summary counts each variable once, by its live dtype."""

import json

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision.dtypes import measured_bytes
from keras_precision.report.summary import Summary


def mlp(**kwargs):
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="body", **kwargs), keras.layers.Dense(2, name="head")],
        name="mlp",
    )


def row(report, name):
    return next(layer for layer in report.layers if layer.path.split("/")[-1] == name)


@pytest.mark.parametrize(
    ("policy", "computes", "stores", "returns", "bytes_each"),
    [
        ("float32", "float32", "float32", "float32", 4),
        ("mixed_bfloat16", "bfloat16", "float32", "bfloat16", 4),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16", 2),
        ("params=float32,compute=bfloat16,output=float32", "bfloat16", "float32", "float32", 4),
    ],
)
def test_row_shows_the_policy_and_the_measured_bytes(policy, computes, stores, returns, bytes_each):
    body = row(Summary.of(mlp(dtype=policy)), "body")
    assert (body.class_name, body.policy) == ("Dense", policy)
    assert (body.compute_dtype, body.variable_dtype, body.output_dtype) == (computes, stores, returns)
    assert (body.parameters, body.bytes) == (4 * 8 + 8, (4 * 8 + 8) * bytes_each)


def test_totals_are_the_sum_of_the_rows_and_what_keras_counts():
    model = mlp(dtype="bfloat16")
    report = Summary.of(model)
    assert report.parameters == model.count_params() == sum(layer.parameters for layer in report.layers)
    assert report.bytes == sum(layer.bytes for layer in report.layers) == 2 * 40 + 4 * 18
    assert report.bytes == measured_bytes(model.weights)


def test_nested_models_are_walked():
    inner = mlp()
    outer = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(3, name="last")], name="outer")
    report = Summary.of(outer)
    assert {"body", "head", "last"} <= {layer.path.split("/")[-1] for layer in report.layers}
    assert report.parameters == outer.count_params()


def test_sublayers_own_their_variables():
    inputs = keras.Input((5, 8))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs))
    report = Summary.of(model)
    assert row(report, "attention").parameters == 0
    assert report.parameters == model.count_params() > 0


def test_a_shared_layer_counts_once():
    inputs = keras.Input((4,))
    shared = keras.layers.Dense(4, name="shared")
    model = keras.Model(inputs, shared(shared(inputs)))
    report = Summary.of(model)
    assert sum(layer.path.endswith("shared") for layer in report.layers) == 1
    assert report.parameters == 4 * 4 + 4


def test_a_shared_variable_counts_once():
    class Tied(keras.layers.Layer):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def call(self, inputs):
            return keras.ops.matmul(inputs, self.kernel)

    first = keras.layers.Dense(4, use_bias=False)
    first.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), first, Tied(first.kernel)])
    assert Summary.of(model).parameters == model.count_params() == 4 * 4


def test_unbuilt_layers_show_a_dash():
    model = keras.Sequential([keras.layers.Dense(8, name="body")], name="later")
    report = Summary.of(model)
    body = row(report, "body")
    assert body.parameters is None
    assert body.bytes is None
    assert report.parameters == report.bytes == 0
    body_line = next(line for line in str(report).splitlines() if "body" in line)
    assert body_line.count(" - ") == 2


def test_a_bare_layer_has_a_summary():
    layer = keras.layers.Dense(2, name="alone")
    layer.build((None, 3))
    assert Summary.of(layer).parameters == 8


def test_summary_prints_what_it_returns(capsys):
    report = kp.summary(mlp(dtype="mixed_bfloat16"))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    for expected in ("mlp", "body", "mixed_bfloat16", f"{report.parameters:,}", f"{report.bytes:,}"):
        assert expected in printed


def test_names_are_no_markup():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="block[bold]")], name="net[red]")
    assert "block[bold]" in str(Summary.of(model))
    assert "net[red]" in str(Summary.of(model))


def test_to_dict_is_json_with_totals():
    report = Summary.of(mlp())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["model"] == "mlp"
    assert (data["parameters"], data["bytes"]) == (report.parameters, report.bytes)
    assert [layer["path"] for layer in data["layers"]] == [layer.path for layer in report.layers]


def test_repr_is_one_line():
    assert repr(Summary.of(mlp())).startswith("<Summary of 'mlp': ")


def test_measured_bytes_follows_the_array_not_the_policy():
    model = mlp(dtype="float32")
    before = measured_bytes(model.weights)
    model.layers[0].dtype_policy = keras.DTypePolicy("mixed_float16")
    assert measured_bytes(model.weights) == before == 4 * 58


def test_measured_bytes_counts_a_variable_once():
    variable = keras.Variable(np.zeros((3, 5)), dtype="float16")
    assert measured_bytes([variable, variable]) == 30
