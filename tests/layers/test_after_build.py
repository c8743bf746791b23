"""D19 and output dtypes: what a policy asks of a layer beyond what stock Keras does."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_precision as kp


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


# Layer, an input that overflows in float16, the output in exact arithmetic.
OVERFLOWING = {
    "UnitNormalization": (lambda dtype: keras.layers.UnitNormalization(dtype=dtype), np.full((2, 4), 3e4), 0.5),
    "Normalization": (
        lambda dtype: keras.layers.Normalization(mean=1e5, variance=1e10, dtype=dtype),
        np.full((2, 4), 3e5),
        2.0,
    ),
    "Rescaling": (lambda dtype: keras.layers.Rescaling(2**-17, dtype=dtype), np.full((2, 4), 2.0**17), 1.0),
    "AveragePooling1D": (lambda dtype: keras.layers.AveragePooling1D(4, dtype=dtype), np.full((2, 4, 1), 6e4), 6e4),
    "AveragePooling2D": (lambda dtype: keras.layers.AveragePooling2D(2, dtype=dtype), np.full((2, 2, 2, 1), 6e4), 6e4),
    "AveragePooling3D": (
        lambda dtype: keras.layers.AveragePooling3D(2, dtype=dtype),
        np.full((2, 2, 2, 2, 1), 6e4),
        6e4,
    ),
    "GlobalAveragePooling2D": (
        lambda dtype: keras.layers.GlobalAveragePooling2D(dtype=dtype),
        np.full((2, 9, 9, 1), 6e4),
        6e4,
    ),
}


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("case", OVERFLOWING)
def test_safe_layers_compute_in_float32_and_return_float16(case, policy):
    make, x, expected = OVERFLOWING[case]
    layer = make(policy)
    assert layer.compute_dtype == "float32"  # before the first call too
    output = layer(x.astype("float32"))
    assert dtype_of(output) == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(output), expected, rtol=2**-10)  # one rounding to float16
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, make(policy)(inputs))
    assert model.output.dtype == "float16"
    predicted = model.predict(x.astype("float32"), verbose=0)
    assert predicted.dtype == np.float16
    np.testing.assert_allclose(predicted, expected, rtol=2**-10)


def test_safe_layers_follow_other_policies():
    for policy in ("float32", "mixed_bfloat16", "bfloat16"):
        layer = keras.layers.AveragePooling2D(2, dtype=policy)
        assert layer.compute_dtype == keras.DTypePolicy(policy).compute_dtype
        assert type(layer) is keras.layers.AveragePooling2D


def test_adapted_normalization_keeps_statistics_beyond_float16():
    layer = keras.layers.Normalization(dtype="float16")
    layer.adapt(np.array([[1e5], [3e5]], "float32"))
    np.testing.assert_allclose(ops.convert_to_numpy(layer(np.array([[3e5]], "float32"))), [[1.0]], rtol=2**-10)


def test_safe_layer_under_a_map_is_resolved_where_it_is_called():
    policies = kp.DTypePolicyMap("float32", {"pool": "mixed_float16"})
    layer = keras.layers.AveragePooling1D(4, dtype=policies, name="pool")
    output = layer(np.full((1, 4, 1), 6e4, "float32"))
    assert (dtype_of(output), float(output[0, 0, 0])) == ("float16", 6e4)
    other = keras.layers.AveragePooling1D(4, dtype=policies, name="other")
    assert dtype_of(other(np.full((1, 4, 1), 6e4, "float32"))) == "float32"


def test_registered_safe_layer_and_its_subclasses_compute_in_float32():
    class Energy(keras.layers.Layer):
        def call(self, inputs):
            return ops.sum(ops.square(inputs), axis=-1)

    class Root(Energy):
        def call(self, inputs):
            return ops.sqrt(super().call(inputs))

    kp.register_safe_layer(Energy, "sums squares")
    try:
        output = Root(dtype="mixed_float16")(np.full((1, 4), 300.0))
        assert (dtype_of(output), float(output[0])) == ("float16", 600.0)
    finally:
        del kp.SAFE_LAYERS[Energy]
    with pytest.raises(TypeError, match="Expected a subclass of keras.Layer"):
        kp.register_safe_layer("Energy", "a name is no class")


OUTPUT_FLOAT32 = "params=float32,compute=bfloat16,output=float32"


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: keras.layers.Dense(3, dtype=OUTPUT_FLOAT32), (2, 4)),
        (lambda: keras.layers.Activation("relu", dtype=OUTPUT_FLOAT32), (2, 4)),
        (lambda: keras.layers.LSTM(3, return_sequences=True, return_state=True, dtype=OUTPUT_FLOAT32), (2, 5, 4)),
        (lambda: keras.layers.GRU(3, dtype=OUTPUT_FLOAT32), (2, 5, 4)),
        (lambda: keras.layers.Conv1D(3, 2, dtype=OUTPUT_FLOAT32), (2, 5, 4)),
        (lambda: keras.layers.Bidirectional(keras.layers.LSTM(3, dtype=OUTPUT_FLOAT32), dtype=OUTPUT_FLOAT32), (2, 5, 4)),
        (lambda: keras.layers.BatchNormalization(dtype=OUTPUT_FLOAT32), (2, 4)),
    ],
)
def test_outputs_have_the_policys_output_dtype(make, shape):
    layer = make()
    outputs = keras.tree.flatten(layer(np.ones(shape, "float32")))
    assert {dtype_of(output) for output in outputs} == {"float32"}
    assert layer.compute_dtype == "bfloat16"
    symbolic = keras.tree.flatten(make()(keras.Input(shape[1:])))
    assert {tensor.dtype for tensor in symbolic} == {"float32"}


def test_attention_with_an_output_dtype_trains():
    inputs = keras.Input((5, 8))
    outputs = keras.layers.MultiHeadAttention(2, 4, dtype=OUTPUT_FLOAT32)(inputs, inputs)
    model = keras.Model(inputs, outputs)
    assert outputs.dtype == "float32"
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"]).all()


def test_integer_outputs_are_not_cast():
    class ArgMax(keras.layers.Layer):
        def call(self, inputs):
            return ops.argmax(inputs, axis=-1)

    assert "int" in dtype_of(ArgMax(dtype=OUTPUT_FLOAT32)(np.ones((2, 3))))


def test_specialised_layer_is_still_its_class():
    layer = keras.layers.Dense(3, dtype=OUTPUT_FLOAT32)
    layer.build((None, 4))
    assert isinstance(layer, keras.layers.Dense)
    assert keras.saving.serialize_keras_object(layer)["class_name"] == "Dense"
    assert repr(layer) == repr(keras.layers.Dense(3, name=layer.name)).replace("built=False", "built=True")


def test_stateless_call_follows_the_output_dtype():
    layer = keras.layers.Dense(3, dtype=OUTPUT_FLOAT32)
    layer.build((None, 4))
    output, _ = layer.stateless_call([v.value for v in layer.trainable_variables], [], ops.ones((2, 4), "bfloat16"))
    assert dtype_of(output) == "float32"


def test_float64_without_x64_raises_and_names_layer_and_remedy(backend):
    layer = keras.layers.Dense(3, dtype="float64", name="wide")
    if backend != "jax":
        assert dtype_of(layer(np.ones((2, 4)))) == "float64"
        return
    with pytest.raises(ValueError, match="(?s)jax_enable_x64.*wide"):
        layer(np.ones((2, 4)))
    for name in ("float64", "64-true", 64):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            kp.set_global_policy(name)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            kp.policy_scope(name)


def test_layers_without_a_quantizable_weight_compute_in_the_source_policy():
    with kp.policy_scope("nf4_from_mixed_bfloat16"):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Activation("relu"), keras.layers.LayerNormalization()])
    outputs, _ = model.stateless_call(
        [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables], ops.ones((2, 4))
    )
    assert dtype_of(outputs) == "bfloat16"
    assert model.predict(np.ones((2, 4)), verbose=0).shape == (2, 4)


def test_keras_quantized_names_keep_keras_implementation():
    layer = keras.layers.Dense(3, dtype="int8_from_float32")
    layer.build((None, 4))
    assert type(layer.dtype_policy) is keras.dtype_policies.QuantizedDTypePolicy
    assert dtype_of(layer.kernel) == "int8"
