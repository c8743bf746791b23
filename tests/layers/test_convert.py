"""D22: set_policy converts built, trained and compiled models in place."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_precision as kp

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Nested(keras.Model):
    """Embeds a functional model and an attention layer in a subclassed one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 3)
        self.norm = keras.layers.BatchNormalization()
        inputs = keras.Input((6, 4))
        self.inner = keras.Model(inputs, keras.layers.Dense(4, name="inner_dense")(inputs))
        self.rnn = keras.layers.GRU(3)
        self.head = keras.layers.Dense(2)

    def call(self, inputs, training=None):
        hidden = self.norm(self.attention(inputs, inputs), training=training)
        return self.head(self.rnn(self.inner(hidden)))


def functional():
    inputs = keras.Input((6, 4))
    hidden = keras.layers.Dense(5, name="hidden")(inputs)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    hidden = hidden + 1.0  # an operation node
    hidden = keras.layers.GlobalMaxPooling1D()(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))


def subclassed():
    model = Nested()
    model(X)
    return model


MODELS = {"functional": functional, "subclassed": subclassed}


def stored(model):
    return {keras.backend.standardize_dtype(weight.value.dtype) for weight in model.weights}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16", "p=bf16,c=f32,o=f32"])
@pytest.mark.parametrize("kind", MODELS)
def test_children_and_variables_follow_and_weights_are_rounded(kind, policy):
    model = MODELS[kind]()
    before = [ops.convert_to_numpy(weight.value) for weight in model.weights]
    variables = list(model.weights)
    expected = kp.get(policy)
    kp.set_policy(model, policy)
    layers = [layer for layer in model._flatten_layers() if not isinstance(layer, keras.layers.InputLayer)]
    assert {layer.compute_dtype for layer in layers} == {expected.compute_dtype}
    assert stored(model) == {expected.variable_dtype}
    assert all(a is b for a, b in zip(model.weights, variables, strict=True))
    for old, weight in zip(before, model.weights, strict=True):
        rounded = ops.convert_to_numpy(ops.cast(ops.cast(old, expected.variable_dtype), "float32"))
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(weight.value, "float32")), rounded)
    output = model(X)
    assert keras.backend.standardize_dtype(output.dtype) == expected.output_dtype
    assert np.isfinite(ops.convert_to_numpy(ops.cast(output, "float32"))).all()


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_gives_the_rounded_weights(kind):
    model = MODELS[kind]()
    reference = ops.convert_to_numpy(model(X))
    kp.set_policy(model, "mixed_bfloat16")
    kp.set_policy(model, "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(model(X)), reference)  # float32 variables all the way
    kp.set_policy(model, "bfloat16")
    kp.set_policy(model, "float32")
    # Weights rounded to 8 bits; activations of order 1 after three layers.
    np.testing.assert_allclose(ops.convert_to_numpy(model(X)), reference, atol=0.1)


def test_symbolic_outputs_follow():
    model = functional()
    kp.set_policy(model, "mixed_bfloat16")
    assert model.output.dtype == "bfloat16"
    inputs = keras.Input((6, 4))
    assert keras.Model(inputs, model(inputs)).output.dtype == "bfloat16"


def test_a_map_converts_each_layer_by_its_rule():
    model = functional()
    kp.set_policy(model, kp.DTypePolicyMap("mixed_bfloat16", {"head": "float32", "hidden": "bfloat16"}))
    dtypes = {layer.name: (layer.compute_dtype, layer.variable_dtype) for layer in model.layers}
    assert dtypes["hidden"] == ("bfloat16", "bfloat16")
    assert dtypes["norm"] == ("bfloat16", "float32")
    assert dtypes["head"] == ("float32", "float32")
    assert model.get_layer("hidden").kernel.value.dtype == ops.zeros((), "bfloat16").dtype


def test_a_map_reaches_into_attention_and_reloads(tmp_path):
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs))
    kp.set_policy(model, kp.DTypePolicyMap("float32", {"attention/query": "bfloat16"}))
    attention = model.get_layer("attention")
    assert (attention.query_dense.variable_dtype, attention.key_dense.variable_dtype) == ("bfloat16", "float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_unmatched_rules_are_reported():
    with pytest.warns(kp.hardware.PrecisionWarning, match=r"\['tail'\] matched no layer"):
        kp.set_policy(functional(), kp.DTypePolicyMap("mixed_bfloat16", {"tail": "float32"}))


def test_compile_reports_rules_that_matched_no_layer():
    policies = kp.DTypePolicyMap("float32", {"dense": "mixed_bfloat16", "missing": "float16"})
    layer = keras.layers.MultiHeadAttention(1, 2, dtype=policies)
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, keras.layers.Dense(2, dtype=policies, name="dense")(layer(inputs, inputs)))
    with pytest.warns(kp.hardware.PrecisionWarning, match=r"\['missing'\] matched no layer"):
        model.compile("sgd", "mse")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_compiled_model_keeps_training_with_its_optimizer_state(policy):
    model = functional()
    y = np.ones((8, 2), "float32")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse", metrics=["mae"])
    model.fit(X, y, epochs=2, verbose=0)
    momentum = [ops.convert_to_numpy(v) for v in model.optimizer.variables if "momentum" in v.path]
    steps = int(model.optimizer.iterations)
    assert steps == 2 and any(m.any() for m in momentum)
    kp.set_policy(model, policy)
    assert int(model.optimizer.iterations) == steps
    kept = [v for v in model.optimizer.variables if "momentum" in v.path]
    for old, new in zip(momentum, kept, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new.value), old)  # slots are float32 under every policy
    history = model.fit(X, y, epochs=3, verbose=0).history
    assert np.isfinite(history["loss"]).all() and "mae" in history
    assert int(model.optimizer.iterations) == steps + 3


def test_compiled_model_gets_and_loses_loss_scaling_with_its_policy():
    model = functional()
    model.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.hardware.PrecisionWarning)
        kp.set_policy(model, "mixed_float16")
    assert model.dtype_policy.name == "mixed_float16"
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    kp.set_policy(model, "float32")
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def test_layers_and_variables_with_dtypes_of_their_own_stay():
    class Counts(keras.layers.Layer):
        def build(self, input_shape):
            self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
            self.exact = self.add_weight(shape=(), dtype="float16", initializer="zeros", trainable=False)
            self.factor = self.add_weight(shape=(), initializer="ones")

        def call(self, inputs):
            return inputs * self.factor

    lookup = keras.layers.Hashing(8)
    model = keras.Sequential([keras.Input((4,)), Counts()])
    kp.set_policy(model, "bfloat16")
    layer = model.layers[0]
    assert [layer.count.dtype, layer.exact.dtype, layer.factor.dtype] == ["int32", "float16", "bfloat16"]
    before = lookup.dtype_policy
    kp.set_policy(keras.Sequential([lookup, keras.layers.CategoryEncoding(8)]), "float32") if lookup.built else None
    assert lookup.dtype_policy == before


def test_shared_layers_and_tied_variables_convert_once():
    dense = keras.layers.Dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense(dense(inputs)))
    kernel = dense.kernel
    kp.set_policy(model, "bfloat16")
    assert model.layers[1].kernel is kernel and kernel.dtype == "bfloat16"


def test_normalization_statistics_follow():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Normalization(mean=2.0, variance=4.0)])
    kp.set_policy(model, "mixed_bfloat16")
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(model(np.full((1, 4), 4.0)), "float32")), np.ones((1, 4)))


def test_a_single_layer_converts():
    layer = keras.layers.Dense(2)
    layer.build((None, 4))
    kp.set_policy(layer, "bfloat16")
    assert (layer.kernel.dtype, layer(np.ones((1, 4))).dtype) == ("bfloat16", ops.zeros((), "bfloat16").dtype)


def test_bad_input_names_the_layer_and_changes_nothing(backend):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="built")])
    unbuilt = keras.Sequential([keras.layers.Dense(2, name="unbuilt")])
    for bad, error, match in [
        (None, ValueError, "Expected a policy"),
        ("flaot16", ValueError, "Did you mean 'float16'"),
        ("int32", ValueError, "Expected a float policy for layer"),
        ("nf4_from_float32", ValueError, "Expected a float policy for layer"),
        (keras.dtype_policies.get("int8_from_float32"), ValueError, "Keras's `layer.quantize`"),
    ]:
        with pytest.raises(error, match=match):
            kp.set_policy(model, bad)
    with pytest.raises(ValueError, match="Layer '.*' is not built"):
        kp.set_policy(unbuilt, "mixed_bfloat16")
    with pytest.raises(TypeError, match="Expected a Keras model or layer"):
        kp.set_policy("model", "mixed_bfloat16")
    if backend == "jax":
        with pytest.raises(ValueError, match="jax_enable_x64"):
            kp.set_policy(model, "float64")
    assert model.layers[0].dtype_policy.name == "float32" and stored(model) == {"float32"}
    model.layers[0].quantize("int8")
    with pytest.raises(ValueError, match="built' holds weights that Keras quantized"):
        kp.set_policy(model, "mixed_bfloat16")
