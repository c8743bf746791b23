"""D11, D13: files hold the policies that layers resolved to."""

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

import keras_precision as kp

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """Makes its sublayers without names and without passing its dtype on, as most custom layers do."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units)
        self.relu = keras.layers.Activation("relu")
        self.second = keras.layers.Dense(units)

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build((*input_shape[:-1], self.units))

    def call(self, inputs):
        return self.second(self.relu(self.first(inputs)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(4)
        self.head = keras.layers.Dense(2)

    def call(self, inputs):
        return self.head(self.block(inputs))


def functional():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4, name="hidden")(inputs)
    hidden = keras.layers.Activation("relu", name="relu")(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))


def nested():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="hidden"), Block(4)], name="inner")
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(inner(inputs)))


def subclassed():
    model = Subclassed()
    model(X)
    return model


MODELS = {"functional": functional, "nested": nested, "subclassed": subclassed}
POLICIES = {
    "mixed_bfloat16": lambda: "mixed_bfloat16",
    "bfloat16": lambda: "bfloat16",
    "mixed_float16": lambda: "mixed_float16",
    "output": lambda: "params=float32,compute=bfloat16,output=float32",
    "map": lambda: kp.DTypePolicyMap("mixed_bfloat16", {"head": "float32", keras.layers.Activation: "float16"}),
    "predicate": lambda: kp.DTypePolicyMap("float32", {lambda layer: layer.name == "head": "mixed_bfloat16"}),
}


def dtypes_of(model):
    """Returns what every layer computes, stores and returns, and what every weight really is stored in."""
    layers = [layer for layer in model._flatten_layers() if not isinstance(layer, (keras.Model, keras.layers.InputLayer))]
    policies = [kp.resolve(layer) for layer in layers]
    return (
        [(type(layer).__name__, p.compute_dtype, p.variable_dtype, kp.get(p).output_dtype) for layer, p in zip(layers, policies)],
        [keras.backend.standardize_dtype(weight.value.dtype) for weight in model.weights],
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MODELS)
def test_reload_gives_the_same_policies_and_predictions(kind, policy, tmp_path):
    with kp.policy_scope(POLICIES[policy]()):
        model = MODELS[kind]()
    expected = ops.convert_to_numpy(model(X))
    model.save(tmp_path / "model.keras")
    assert keras.config.dtype_policy().name == "float32"
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert dtypes_of(loaded) == dtypes_of(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(X)), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "map"])
def test_a_reloaded_model_reloads(policy, tmp_path):
    with kp.policy_scope(POLICIES[policy]()):
        model = subclassed()
    once = _reloaded(model, tmp_path)
    twice = _reloaded(once, tmp_path)
    assert dtypes_of(twice) == dtypes_of(model)


def _reloaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def test_per_layer_policies_reload(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, dtype="mixed_bfloat16"),
            keras.layers.Dense(4, dtype="bf16-true"),
            keras.layers.Dense(4, dtype="p=f32,c=bf16,o=f32"),
            keras.layers.Dense(4, dtype=kp.DTypePolicyMap("float32", {"dense*": "float16"})),
        ]
    )
    loaded = _reloaded(model, tmp_path)
    assert dtypes_of(loaded) == dtypes_of(model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_attention_under_a_map_reloads_inside_another_model(tmp_path):
    policies = kp.DTypePolicyMap("float32", {"attention/query": "bfloat16", "attention/attention_output": "mixed_bfloat16"})
    inputs = keras.Input((5, 4))
    outputs = keras.layers.MultiHeadAttention(2, 2, dtype=policies, name="attention")(inputs, inputs)
    model = keras.Model(inputs, outputs, name="net")
    loaded = _reloaded(model, tmp_path)
    assert dtypes_of(loaded) == dtypes_of(model)
    attention = loaded.get_layer("attention")
    assert [attention.query_dense.variable_dtype, attention.key_dense.variable_dtype] == ["bfloat16", "float32"]
    x = np.ones((2, 5, 4), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_custom_layer_with_sublayers_of_their_own_policies_reloads(tmp_path):
    with kp.policy_scope("float32"):
        block = Block(4, dtype="mixed_bfloat16")  # its sublayers are made under float32
    model = keras.Sequential([keras.Input((4,)), block])
    loaded = _reloaded(model, tmp_path)
    assert dtypes_of(loaded) == dtypes_of(model)
    assert loaded.layers[0].dtype_policy == kp.get("mixed_bfloat16")
    assert loaded.layers[0].first.compute_dtype == "float32"


def test_changed_sublayers_are_refused_by_name(tmp_path):
    block = Block(4, dtype="mixed_bfloat16", name="changed")
    config = keras.saving.serialize_keras_object(keras.Sequential([keras.Input((4,)), block]))
    text = json.dumps(config)
    assert text.count('"inner": [') == 1
    layers = config["config"]["layers"]
    layers[1]["config"]["dtype"]["config"]["inner"].pop()
    with pytest.raises(ValueError, match="'changed' was saved with policies for 2 sublayers and has 3"):
        keras.saving.deserialize_keras_object(config)


def test_policies_that_keras_knows_are_saved_for_stock_keras(tmp_path):
    with kp.policy_scope("bf16-mixed"):
        model = functional()
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = archive.read("config.json").decode()
    assert "keras_precision" not in config
    script = "import sys, keras; model = keras.saving.load_model(sys.argv[1]); print(model.layers[1].dtype_policy.name)"
    assert _run(script, tmp_path / "model.keras") == "mixed_bfloat16"


def test_fresh_process_needs_only_the_import(tmp_path):
    policies = kp.DTypePolicyMap("mixed_bfloat16", {"head": "params=float32,compute=float32,output=bfloat16"})
    with kp.policy_scope(policies):
        model = functional()
    expected = ops.convert_to_numpy(model(X))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", X)
    script = (
        "import sys, keras, numpy, keras_precision; folder = sys.argv[1];"
        "model = keras.saving.load_model(folder + '/model.keras');"
        "output = keras.ops.convert_to_numpy(model(numpy.load(folder + '/x.npy')));"
        "print(output.astype('float32').tolist())"
    )
    assert json.loads(_run(script, tmp_path)) == expected.astype("float32").tolist()


def _run(script, argument):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(argument)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_keras_quantized_rule_survives_stateless_call_and_reload(tmp_path):
    int8 = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    layer = keras.layers.Dense(4, dtype=kp.DTypePolicyMap("float32", {"dense": int8}), name="dense")
    model = keras.Sequential([keras.Input((4,)), layer])
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "int8"
    stateless, _ = layer.stateless_call(
        [v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables], ops.array(X)
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(stateless), ops.convert_to_numpy(layer(X)))
    loaded = _reloaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_weights_move_between_policies(tmp_path):
    with kp.policy_scope("mixed_bfloat16"):
        source = functional()
    source.save_weights(tmp_path / "model.weights.h5")
    target = functional()
    target.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_own_map_is_pure():
    policies = keras.dtype_policies.DTypePolicyMap(
        policy_map={"a": kp.get("bfloat16"), "b": keras.DTypePolicy("float16"), "c": keras.config.dtype_policy()}
    )
    first = policies.get_config()
    assert [policy.name for policy in policies.values()] == ["bfloat16", "float16", "float32"]
    assert keras.config.dtype_policy().name == "float32"
    assert policies.get_config() == first
