"""Quantizing whole trained models, and back."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_precision as kp
from keras_precision import _bridge
from keras_precision.layers.quantized import is_quantized


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 64, name="embedding")(tokens)
    normal = layers.LayerNormalization(name="norm")(x)
    x = x + layers.MultiHeadAttention(2, 32, name="attention")(normal, normal)
    x = layers.GlobalAveragePooling1D()(layers.Dense(64, activation="relu", name="hidden")(x))
    return keras.Model(tokens, layers.Dense(3, name="head")(x))


TOKENS = np.random.default_rng(0).integers(0, 20, (8, 6)).astype("int32")


def state(model):
    return {v.path: ops.convert_to_numpy(v).copy() for v in model.variables}


def assert_unchanged(model, before, policies):
    after = state(model)
    assert list(after) == list(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    assert [layer.dtype_policy for layer in model.layers] == policies


def test_a_map_decides_and_the_report_tells(tmp_path):
    model = transformer()
    exact = model.predict(TOKENS, verbose=0)
    policy_map = kp.DTypePolicyMap(
        "nf4_from_float32", {"attention/**": "int8-weight-only_from_float32", "head": "float32"}
    )
    report = kp.quantize(model, policy_map, verbose=0)
    rows = {row.path: row for row in report.layers}
    assert rows["embedding"].format == "nf4" and rows["embedding"].bits_per_parameter == 4.5
    assert rows["attention/query"].format == "int8-weight-only"
    assert rows["attention/query"].bits_per_parameter == 8 + 32 / 64  # a float32 scale for each 64 rows
    assert rows["head"].format == "" and rows["head"].relative_error is None
    assert rows["hidden"].bytes_before == 4 * (64 * 64 + 64)
    assert rows["hidden"].bytes_after == 64 * 64 // 2 + 4 * 64 + 4 * 64
    assert report.bytes_after == sum(ops.convert_to_numpy(v).nbytes for v in model.variables if "seed" not in v.path)
    # nf4's mean square error on normal weights is 0.0083 of theirs; on uniform ones, as here, about the same
    assert 0.07 < rows["hidden"].relative_error < 0.11 and rows["attention/query"].relative_error < 0.006
    assert "bits a parameter" in str(report) and report.to_dict()["layers"][0]["path"] == "embedding"
    quantized = model.predict(TOKENS, verbose=0)
    assert 0 < np.abs(quantized - exact).max() < 0.3 * np.abs(exact).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), quantized)
    kp.dequantize(model)
    assert not any(is_quantized(layer) for layer in model.layers)
    np.testing.assert_allclose(model.predict(TOKENS, verbose=0), quantized, rtol=1e-4, atol=1e-5)
    stock = transformer()
    stock.set_weights(model.get_weights())  # the variables are in Keras's order again
    np.testing.assert_allclose(stock.predict(TOKENS, verbose=0), quantized, rtol=1e-4, atol=1e-5)


def test_a_float_checkpoint_is_quantized_as_it_loads(tmp_path):
    trained = transformer()
    trained.save_weights(tmp_path / "float.weights.h5")
    keras.utils.set_random_seed(1)
    target = transformer()
    kp.quantize(target, "nf4-dq_from_float32", verbose=0)
    target.load_weights(tmp_path / "float.weights.h5")
    kp.quantize(trained, "nf4-dq_from_float32", verbose=0)
    np.testing.assert_array_equal(target.predict(TOKENS, verbose=0), trained.predict(TOKENS, verbose=0))


def test_a_model_that_was_trained_saves_and_loads(tmp_path):
    model = transformer()
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(TOKENS, np.zeros(8), verbose=0)
    kp.quantize(model, "nf4_from_float32", verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")  # a warning of Keras's about its optimizer is an error
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), model.predict(TOKENS, verbose=0))
    assert [v.path for v in loaded.optimizer.variables] == [v.path for v in model.optimizer.variables]


def test_a_compiled_model_goes_on_training_and_predicting():
    model = transformer()
    model.compile("adam", "mse")
    targets = np.zeros((8, 3), "float32")
    model.fit(TOKENS, targets, verbose=0)
    before = model.predict(TOKENS, verbose=0)
    kp.quantize(model, "nf4_from_float32", verbose=0)
    assert np.abs(model.predict(TOKENS, verbose=0) - before).max() > 0  # not the old compiled function
    codes = [ops.convert_to_numpy(v).copy() for v in model.non_trainable_variables]
    loss = model.fit(TOKENS, targets, epochs=8, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    for variable, value in zip(model.non_trainable_variables, codes, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda m: kp.quantize(m, "mixed_bfloat16"), "Expected a quantized policy"),
        (lambda m: kp.quantize(m, None), "Received: None"),
        (lambda m: kp.quantize(m, kp.DTypePolicyMap("float32", {"nowhere": "nf4_from_float32"})), "at least one layer"),
        (lambda m: kp.quantize(m, "nf4_from_float32", skip=["nowhere"]), "'nowhere'"),
        (lambda m: kp.quantize(m, "nf4_from_float32", skip=["**"]), "at least one layer"),
        (lambda m: kp.dequantize(m), "without. Call quantize first"),
        (lambda m: kp.merge_lora(m), "without"),
    ],
)
def test_misuse_says_what_to_do_and_changes_nothing(attempt, message):
    model = transformer()
    before, policies = state(model), [layer.dtype_policy for layer in model.layers]
    with pytest.raises(ValueError, match=message):
        attempt(model)
    assert_unchanged(model, before, policies)


def test_a_weight_with_nan_leaves_the_model_as_it_was():
    model = transformer()
    kernel = model.get_layer("head").kernel  # the last: all others are encoded by then
    value = ops.convert_to_numpy(kernel).copy()
    value[3, 1] = np.nan
    kernel.assign(value)
    before, policies = state(model), [layer.dtype_policy for layer in model.layers]
    with pytest.raises(ValueError, match="'head', weight 'kernel'"):
        kp.quantize(model, "nf4_from_float32")
    assert_unchanged(model, before, policies)


def test_quantizing_twice_and_unbuilt_models_are_refused():
    model = transformer()
    kp.quantize(model, "nf4_from_float32", skip=["head", layers.Embedding], verbose=0)
    assert not is_quantized(model.get_layer("head")) and not is_quantized(model.get_layer("embedding"))
    assert is_quantized(model.get_layer("hidden"))
    with pytest.raises(ValueError, match="quantized already"):
        kp.quantize(model, "nf4_from_float32")
    with pytest.raises(ValueError, match="dequantize"):
        kp.set_policy(model, "bfloat16")
    with pytest.raises(ValueError, match="not built"):
        kp.quantize(keras.Sequential([layers.Dense(4)]), "nf4_from_float32")


@pytest.mark.parametrize(
    "function",
    [lambda x: kp.quantize(x, "nf4_from_float32"), kp.dequantize, lambda x: kp.enable_lora(x, 4), kp.merge_lora],
)
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match="Expected a Keras model or layer. Received: 'model'"):
        function("model")


def test_a_layer_without_a_site_computes_in_the_source_and_the_report_says_so():
    class Bilinear(layers.Layer):
        def build(self, input_shape):
            self.table = self.add_weight(shape=(input_shape[-1], 4), name="table")

        def call(self, inputs):
            return ops.matmul(inputs, self.table)

    model = keras.Sequential([keras.Input((64,)), layers.Dense(64), Bilinear(name="custom")])
    report = kp.quantize(model, "nf4_from_mixed_bfloat16", verbose=0)
    assert {row.path.rpartition("/")[2]: row.note for row in report.layers}["custom"] == "no site"
    assert keras.backend.standardize_dtype(model(np.ones((1, 64))).dtype) == "bfloat16"


def test_shared_layers_are_quantized_once_and_stay_shared():
    shared = layers.Dense(64, name="shared")
    x = keras.Input((64,))
    first, second = keras.Model(x, shared(x)), keras.Model(x, shared(shared(x)))
    both = keras.Sequential([keras.Input((64,)), first, second])
    report = kp.quantize(both, "nf4_from_float32", verbose=0)
    assert len(report.layers) == 1
    data = np.ones((1, 64), "float32")
    np.testing.assert_allclose(ops.convert_to_numpy(second(data)), ops.convert_to_numpy(shared(first(data))), rtol=1e-6)


def test_tied_embeddings_stay_tied():
    tokens = keras.Input((6,), dtype="int32")
    table = layers.ReversibleEmbedding(20, 64, name="table")
    model = keras.Model(tokens, table(table(tokens), reverse=True))
    report = kp.quantize(model, "nf4_from_float32", verbose=0)
    assert [row.parameters for row in report.layers] == [20 * 64]
    weight = ops.convert_to_numpy(table.embeddings)
    np.testing.assert_allclose(model.predict(TOKENS, verbose=0), weight[TOKENS] @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: layers.MultiHeadAttention(4, 16, **kwargs),
        lambda **kwargs: layers.GroupQueryAttention(16, 4, 2, **kwargs),
    ],
    ids=["MultiHeadAttention", "GroupQueryAttention"],
)
@pytest.mark.parametrize("how", ["dtype", "quantize"])
def test_attention_is_quantized_through_its_own_weights(make, how, tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype("float32")
    inputs = keras.Input((5, 64))
    layer = make(dtype="nf4_from_float32", name="attention") if how == "dtype" else make(name="attention")
    model = keras.Model(inputs, layer(inputs, inputs))
    if how == "quantize":
        report = kp.quantize(model, "nf4_from_float32", verbose=0)
        assert {row.path: row.format for row in report.layers} == {
            f"attention/{part}": "nf4" for part in ("query", "key", "value", "attention_output")
        }
    assert sum(map(is_quantized, _bridge.flatten_layers(model))) == 4
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert sum(map(is_quantized, _bridge.flatten_layers(loaded))) == 4
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)


def test_lora_on_a_whole_model_trains_nothing_else(tmp_path):
    model = transformer()
    model.compile("adam", "mse")
    kp.quantize(model, "nf4-dq_from_float32", skip=["head"], verbose=0)
    base = model.predict(TOKENS, verbose=0)
    kp.enable_lora(model, rank=4, lora_alpha=8, skip=[layers.Embedding])
    names = [v.path for v in model.trainable_variables]
    assert len(names) == 2 * 5 and all("lora_kernel" in name for name in names)  # four of the attention's, and hidden
    np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), base)
    before = state(model)
    losses = model.fit(TOKENS, np.ones((8, 3), "float32"), epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    moved = {path for path, value in state(model).items() if not np.array_equal(value, before[path])}
    assert {path for path in moved if "seed" not in path} == set(names)
    tuned = model.predict(TOKENS, verbose=0)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(TOKENS, verbose=0), tuned)
    with pytest.raises(ValueError, match="rank 4 and lora_alpha 8 already"):
        kp.enable_lora(model, 4)
    kp.enable_lora(model, rank=4, lora_alpha=8, skip=[layers.Embedding])  # no more than is there
    np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), tuned)
    kp.merge_lora(model)
    assert not any("lora" in v.path for v in model.variables)
    merged = model.predict(TOKENS, verbose=0)
    assert np.abs(merged - tuned).max() < np.abs(tuned - base).max()


def test_lora_is_refused_where_it_can_not_be():
    model = transformer()
    before, policies = state(model), [layer.dtype_policy for layer in model.layers]
    for attempt, message in (
        (lambda: kp.enable_lora(model, 4), "Call quantize first"),
        (lambda: kp.enable_lora(model, 0), "rank >= 1"),
        (lambda: kp.enable_lora(model, 4, skip=["nowhere"]), "'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert_unchanged(model, before, policies)
    assert all(v.trainable for v in model.trainable_variables)


class Block(keras.Model):
    """A subclassed model that makes its layers itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(64, activation="relu", name="hidden")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs):
        return self.head(self.hidden(inputs))


def test_subclassed_models(tmp_path):
    model, x = Block(), np.random.default_rng(0).standard_normal((2, 64)).astype("float32")
    model(x)
    report = kp.quantize(model, "nf4_from_float32", skip=["head"], verbose=0)
    assert [row.format for row in report.layers] == ["nf4", ""]
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    with keras.utils.custom_object_scope({"Block": Block}):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert is_quantized(loaded.hidden) and not is_quantized(loaded.head)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)


def test_a_layer_with_lora_is_quantized_and_saved_with_its_factor(tmp_path):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64, name="hidden")])
    hidden, x = model.get_layer("hidden"), np.random.default_rng(0).standard_normal((2, 64)).astype("float32")
    hidden.enable_lora(2, lora_alpha=8)
    hidden.lora_kernel_b.assign(0.1 * np.ones(hidden.lora_kernel_b.shape))
    exact = model.predict(x, verbose=0)
    kp.quantize(model, "nf4_from_float32", verbose=0)
    quantized = model.predict(x, verbose=0)
    assert 0 < np.abs(quantized - exact).max() < 0.2 * np.abs(exact).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), quantized)
    assert loaded.get_layer("hidden").dtype_policy.lora_alpha == 8
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.Sequential([keras.Input((64,)), layers.Dense(64, name="hidden", dtype="nf4_from_float32")])
    kp.enable_lora(other, 2)
    with pytest.raises(ValueError, match="'lora_alpha' of 2.*with 8"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_training_with_lora_goes_on_after_a_reload(tmp_path):
    def made():
        model = transformer()
        kp.quantize(model, "nf4_from_float32", verbose=0)
        kp.enable_lora(model, 2)
        model.compile("adam", "mse")
        return model

    targets = np.ones((8, 3), "float32")
    keras.utils.set_random_seed(0)
    straight = made()
    straight.fit(TOKENS, targets, batch_size=8, epochs=4, verbose=0)
    keras.utils.set_random_seed(0)
    broken = made()
    broken.fit(TOKENS, targets, batch_size=8, epochs=2, verbose=0)
    broken.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in resumed.trainable_variables] == [v.path for v in broken.trainable_variables]
    resumed.fit(TOKENS, targets, batch_size=8, epochs=2, verbose=0)
    np.testing.assert_allclose(
        resumed.predict(TOKENS, verbose=0), straight.predict(TOKENS, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_parts_of_an_attention_can_be_left_out(tmp_path):
    model = transformer()
    kp.quantize(model, "nf4_from_float32", skip=["attention/key"], verbose=0)
    expected = model.predict(TOKENS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not is_quantized(loaded.get_layer("attention").key_dense)
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), expected)
