"""Layers that multiply in 8-bit floating point and train."""

import json
import warnings
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_precision as kp
from keras_precision import hardware
from keras_precision.kernels import float8
from keras_precision.layers import sites
from keras_precision.layers.float8 import DELAYED_VARIABLES, is_float8
from keras_precision.optimizers import Adam8bit

MODES = ("float8", "float8/row", "float8/delayed")
SOURCES = ("mixed_bfloat16", "mixed_float16", "float32", "bfloat16")
draw = np.random.default_rng(0)
X = draw.standard_normal((64, 32)).astype("float32")
Y = np.tanh(X @ draw.standard_normal((32, 16)).astype("float32") * 0.2)


def policy_of(mode="float8", source="mixed_bfloat16", **options):
    return kp.QuantizedFloat8DTypePolicy(mode, source, **{"min_features": 16, **options})


def network(policy, width=64):
    hidden, head = (
        layers.Dense(n, activation=a, dtype=policy, name=name)
        for n, a, name in [(width, "relu", "hidden"), (16, None, "head")]
    )
    return keras.Sequential([keras.Input((32,)), hidden, head])


def fitted(model, epochs=4, optimizer=None):
    model.compile(optimizer or keras.optimizers.Adam(3e-3), "mse")
    return model.fit(X, Y, batch_size=16, epochs=epochs, verbose=0, shuffle=False).history["loss"]


def arrays(model):
    return [ops.convert_to_numpy(v).copy() for v in model.variables]


@pytest.mark.parametrize(
    "mode, source", [*((MODES[0], source) for source in SOURCES), *((m, SOURCES[0]) for m in MODES[1:])]
)
def test_training_follows_the_source(mode, source):
    """Codes have 3 or 2 bits after the point, so a loss that falls by half is 3% off at most (measured: 1.1%)."""
    policy = policy_of(mode, source)
    keras.utils.set_random_seed(1)
    model = network(policy)
    assert all(is_float8(layer) for layer in model.layers)
    found = fitted(model)
    keras.utils.set_random_seed(1)
    expected = fitted(network(source))
    assert found[-1] < 0.6 * found[0]
    np.testing.assert_allclose(found, expected, rtol=0.03)
    assert found != expected
    assert model.layers[0].kernel.dtype == policy.variable_dtype
    assert keras.backend.standardize_dtype(model(X).dtype) == policy.compute_dtype


def test_a_layer_computes_its_products_as_documented():
    layer = layers.Dense(64, activation="relu", dtype=policy_of(source="float32"))
    found = layer(X)
    expected = ops.relu(float8.matmul(X, ops.convert_to_numpy(layer.kernel), "float32") + layer.bias)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(expected))


def test_weights_are_rounded_from_their_own_dtype():
    """A float32 weight just above a tie in e4m3 would be on it, and rounded to even, if bfloat16 came before."""
    layer = layers.Dense(16, use_bias=False, dtype=policy_of())
    layer.build((None, 16))
    layer.kernel.assign(np.full((16, 16), 1 + 2.0**-4 + 2.0**-12))
    ones = np.eye(16, dtype="float32")
    assert (ops.convert_to_numpy(ops.cast(layer(ones), "float32")).max(axis=0) == 1.125).all()


@pytest.mark.parametrize(
    "equation, inputs, output, bias",
    [("abc,cde->abde", (5, 32), (None, 4, 8), "de"), ("...x,xy->...y", (5, 32), 48, "y"),
     ("abcd,cde->abe", (5, 4, 8), (None, 48), "e")],
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_einsum_layers(equation, inputs, output, bias, mode):
    x = draw.standard_normal((2, *inputs)).astype("float32")
    policy = policy_of(mode, "float32")
    layer = layers.EinsumDense(equation, output_shape=output, bias_axes=bias, dtype=policy)
    plain = layers.EinsumDense(equation, output_shape=output, bias_axes=bias, dtype="float32")
    plain.build(x.shape)
    found = layer(x)
    assert is_float8(layer)
    for mine, other in zip((plain.kernel, plain.bias), (layer.kernel, layer.bias), strict=True):
        mine.assign(other)
    expected = ops.convert_to_numpy(plain(x))
    error = np.linalg.norm(ops.convert_to_numpy(found) - expected) / np.linalg.norm(expected)
    assert 0.001 < error < 0.05  # two roundings of 2**-4 at most each, 0.026 in the mean


def test_attention_projections_and_a_map():
    inputs = keras.Input((6, 32))
    dtype = kp.DTypePolicyMap(
        "mixed_bfloat16", {"attention/query": policy_of(), "attention/value": policy_of("float8/row")}
    )
    attention = layers.MultiHeadAttention(2, 16, name="attention", dtype=dtype)
    model = keras.Model(inputs, attention(inputs, inputs))
    names = {layer.name: is_float8(layer) for layer in attention._flatten_layers(include_self=False)}
    assert names["query"] and names["value"] and not names["key"] and not names["attention_output"]
    model.compile("adam", "mse")
    x = draw.standard_normal((8, 6, 32)).astype("float32")
    losses = model.fit(x, x, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_models_are_saved_and_go_on(mode, tmp_path):
    model = network(policy_of(mode, amax_history_length=8 if mode.endswith("delayed") else None))
    fitted(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.dtype_policy for layer in again.layers] == [layer.dtype_policy for layer in model.layers]
    np.testing.assert_array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    for one in (model, again):
        one.fit(X, Y, batch_size=16, epochs=1, verbose=0, shuffle=False)
    for one, other in zip(arrays(model), arrays(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_files_of_keras_float8_layers_load_and_the_other_way(tmp_path):
    stock = network("float32")
    for layer in stock.layers:
        layer.quantize("float8")
    fitted(stock)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours = network(policy_of("float8/delayed", "float32"))
    ours.load_weights(tmp_path / "stock.weights.h5")
    for layer, twin in zip(ours.layers, stock.layers, strict=True):
        for name in ("kernel", "bias", *DELAYED_VARIABLES):
            np.testing.assert_array_equal(getattr(layer, name), getattr(twin, name))
        assert float(layer.inputs_scale) != 1 and float(layer.outputs_grad_scale) != 1
    # x / scale there and x * (1 / scale) here may fall on two sides of a tie.
    found, expected = ours.predict(X, verbose=0), stock.predict(X, verbose=0)
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)
    current = network(policy_of(source="float32"))  # has no use for the history
    current.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(current.layers[0].kernel, stock.layers[0].kernel)
    fitted(ours, epochs=1)
    ours.save_weights(tmp_path / "ours.weights.h5")
    stock.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_array_equal(stock.layers[0].kernel_amax_history, ours.layers[0].kernel_amax_history)


def test_files_of_keras_float8_attention_load(tmp_path):
    def attention(policy):
        x = keras.Input((4, 32))
        return keras.Model(x, layers.MultiHeadAttention(2, 16, dtype=policy)(x, x))

    def projections(model):
        found = model.layers[1]
        return found.query_dense, found.key_dense, found.value_dense, found.output_dense

    stock, ours = attention("float32"), attention(policy_of("float8/delayed", "float32"))
    for layer in projections(stock):
        layer.quantize("float8")
    x = X.reshape(16, 4, 32)
    stock.compile("sgd", "mse")
    stock.fit(x, 0.5 * x, batch_size=8, epochs=1, verbose=0)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")
    for layer, twin in zip(projections(ours), projections(stock), strict=True):
        for name in ("kernel", "bias", *DELAYED_VARIABLES):
            np.testing.assert_array_equal(getattr(layer, name), getattr(twin, name))
        assert float(layer.inputs_scale) != 1
    found, expected = ours.predict(x, verbose=0), stock.predict(x, verbose=0)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_files_of_float_layers_load_and_the_other_way(tmp_path):
    plain = network("mixed_bfloat16")
    plain.save_weights(tmp_path / "plain.weights.h5")
    for mode in MODES:
        model = network(policy_of(mode))
        if mode.endswith("delayed"):
            model.layers[0].inputs_scale.assign(7.0)
        model.load_weights(tmp_path / "plain.weights.h5")
        np.testing.assert_array_equal(model.layers[0].kernel, plain.layers[0].kernel)
        if mode.endswith("delayed"):
            assert float(model.layers[0].inputs_scale) == 1
            with pytest.raises(ValueError, match="expected 2 variables, but received 8"):
                model.save_weights(tmp_path / "float8.weights.h5")
                plain.load_weights(tmp_path / "float8.weights.h5")
        else:
            model.save_weights(tmp_path / "float8.weights.h5")
            plain.load_weights(tmp_path / "float8.weights.h5")


def test_a_history_of_another_length_is_refused(tmp_path):
    network(policy_of("float8/delayed", amax_history_length=8)).save_weights(tmp_path / "short.weights.h5")
    with pytest.raises(ValueError, match="'inputs_amax_history' of shape .1024.*Pass amax_history_length=8"):
        network(policy_of("float8/delayed")).load_weights(tmp_path / "short.weights.h5")


OBSTACLES = {
    "small": (lambda p: layers.Dense(64, dtype=p), {"min_features": 65}, "is 32 x 64 as a matrix, .* min_features=65"),
    "default": (lambda p: layers.Dense(64, dtype=p), {"min_features": 2048}, "min_features=2048"),
    "odd": (lambda p: layers.Dense(60, dtype=p), {}, "32 x 60 .* multiples of 16"),
    "equation": (lambda p: layers.EinsumDense("ab,b->ab", 32, dtype=p), {}, "'ab,b->ab' is no product"),
    "call": (lambda p: OwnCall(64, dtype=p), {}, "OwnCall has a call of its own"),
}


class OwnCall(layers.Dense):
    def call(self, inputs):
        return ops.matmul(inputs, ops.abs(self.kernel))


@pytest.mark.parametrize("name", OBSTACLES)
def test_layers_that_stay_in_the_source_are_reported(name):
    make, options, message = OBSTACLES[name]
    layer, plain = make(policy_of(**options)), make("mixed_bfloat16")
    layer.name = "left"
    with pytest.warns(
        hardware.PrecisionWarning, match=f"'left' computes in 'mixed_bfloat16', not in 'float8': .*{message}"
    ):
        layer.build((None, 32))
    plain.build((None, 32))
    plain.set_weights(layer.get_weights())
    assert not is_float8(layer)
    one, other = (ops.convert_to_numpy(ops.cast(of(X), "float32")) for of in (layer, plain))
    np.testing.assert_array_equal(one, other)


def test_layers_without_a_product_are_not_warned_of():
    with warnings.catch_warnings(), kp.policy_scope("float8_from_mixed_bfloat16"):
        warnings.simplefilter("error")
        model = keras.Sequential([layers.Embedding(8, 16), layers.LayerNormalization(), layers.Conv1D(16, 1)])
        outputs = model(np.zeros((2, 3), "int32"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


def test_strict_asks_for_a_device():
    with pytest.raises(ValueError, match="'head'.* strict=True, and no device here .* Pass strict=False"):
        layers.Dense(64, dtype=policy_of(strict=True), name="head").build((None, 32))


@pytest.mark.parametrize("mode", MODES)
def test_quantize_and_back_keep_weights_and_optimizer_state(mode):
    model = network("mixed_bfloat16")
    fitted(model)
    before = [ops.convert_to_numpy(v).copy() for v in [*model.weights, *model.optimizer.variables]]
    report = kp.quantize(model, policy_of(mode), skip=["head"])
    hidden, head = report.layers
    assert (hidden.format, hidden.note, hidden.parameters, hidden.bits_per_parameter) == (mode, "", 32 * 64, 32)
    assert 0.01 < hidden.relative_error < 2**-4  # e4m3's mean is 0.026
    assert (head.format, head.note, head.relative_error) == ("", "skipped", None)
    assert is_float8(model.layers[0]) and not is_float8(model.layers[1])
    with pytest.raises(ValueError, match="quantized already"):
        kp.quantize(model, policy_of())
    kp.dequantize(model)
    assert not is_float8(model.layers[0]) and model.layers[0].dtype_policy.name == "mixed_bfloat16"
    after = [ops.convert_to_numpy(v) for v in [*model.weights, *model.optimizer.variables]]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    model.fit(X, Y, epochs=1, verbose=0)


def test_quantize_goes_on_training_and_reports_what_it_leaves():
    model = network("mixed_bfloat16", width=48)
    losses = fitted(model)
    report = kp.quantize(
        model, kp.DTypePolicyMap("mixed_bfloat16", {"hidden": policy_of(), "head": policy_of(min_features=32)})
    )
    assert report.layers[1].note.startswith("its weight is 48 x 16") and report.layers[0].format == "float8"
    assert model.layers[1].dtype_policy.name == "mixed_bfloat16"
    assert model.optimizer.iterations == 16
    assert model.fit(X, Y, batch_size=16, epochs=1, verbose=0).history["loss"][0] < losses[-1]
    assert json.dumps(report.to_dict())


def test_quantize_with_no_layer_that_fits_says_why():
    model = network("mixed_bfloat16")
    with pytest.raises(ValueError, match="Its weight is 32 x 64 as a matrix, and the policy has min_features=2048."):
        kp.quantize(model, "float8_from_mixed_bfloat16")
    assert model.layers[0].dtype_policy.name == "mixed_bfloat16"


def test_policies_given_later():
    model = network("mixed_bfloat16")
    layer = model.layers[0]
    layer.dtype_policy = policy_of("float8/delayed")
    assert is_float8(layer) and len(layer.trainable_variables) == 8
    layer.dtype_policy = policy_of("float8/delayed")  # the same: histories stay
    layer.dtype_policy = policy_of()
    assert is_float8(layer) and len(layer.trainable_variables) == 2
    layer.dtype_policy = keras.dtype_policies.get("mixed_bfloat16")
    assert not is_float8(layer)
    layer.dtype_policy = policy_of()
    kp.set_policy(model, "float32")
    assert not is_float8(layer) and layer.dtype_policy.name == "float32"
    assert fitted(model)[-1] > 0


@pytest.mark.parametrize("mode", MODES)
def test_lora_over_float8(mode, tmp_path):
    layer = layers.Dense(64, dtype=policy_of(mode, "float32"))
    model = keras.Sequential([keras.Input((32,)), layer, layers.Dense(16)])
    layer.enable_lora(4)
    base = ops.convert_to_numpy(layer.variables[0]).copy()
    losses = fitted(model, optimizer=keras.optimizers.SGD(0.3))
    assert losses[-1] < losses[0] and np.abs(layer.lora_kernel_b).max() > 0
    np.testing.assert_array_equal(base, layer.variables[0])
    before = model.predict(X, verbose=0)
    model.save_weights(tmp_path / "merged.weights.h5")
    model.load_weights(tmp_path / "merged.weights.h5")  # as Keras has it: the file's kernel has them merged
    after = model.predict(X, verbose=0)
    assert np.linalg.norm(after - before) < 0.1 * np.linalg.norm(before)


WRAPPED = {
    "low bit": (Adam8bit(3e-3, min_size=16), "mixed_bfloat16"),
    "clipped": (keras.optimizers.Adam(3e-3, global_clipnorm=1.0), "mixed_bfloat16"),
    "scaled": (keras.optimizers.Adam(3e-3), "mixed_float16"),
    "rounded": (keras.optimizers.Adam(3e-3), "bfloat16"),
    "rounded and scaled": (keras.optimizers.Adam(3e-3), "float16"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_optimizers_overwrite_delayed_scales(name):
    optimizer, source = WRAPPED[name]
    model = network(policy_of("float8/delayed", source, amax_history_length=4))
    losses = fitted(model, optimizer=type(optimizer).from_config(optimizer.get_config()))
    assert losses[-1] < 0.8 * losses[0]
    for layer in model.layers:
        for state, dtype in zip(
            ("inputs", "kernel", "outputs_grad"), (float8.FORWARD, float8.FORWARD, float8.GRADIENT)
        ):
            history, scale = (np.asarray(getattr(layer, f"{state}_{part}")) for part in ("amax_history", "scale"))
            assert (history > 0).all() and np.isfinite(history).all()
            # The scale is of the history before the last step.
            largest = kp.dtypes.info(dtype).max
            assert history.min() / largest / 4 < scale < history.max() / largest * 4
        assert np.isclose(np.abs(X[-16:]).max(), model.layers[0].inputs_amax_history[0], rtol=2**-7)


def test_a_skipped_step_leaves_delayed_scales():
    model = network(policy_of("float8/delayed", "mixed_float16"))
    model.compile(keras.optimizers.Adam(), "mse")
    model.train_on_batch(X, Y)
    before = [ops.convert_to_numpy(v).copy() for v in model.weights]
    broken = X.copy()
    broken[3, 5] = np.inf
    model.train_on_batch(broken, Y)
    for one, other in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_summaries_show_what_multiplies():
    model = network(policy_of(), width=64)
    rows = {row.path.rpartition("/")[2]: row for row in kp.summary(model).layers}
    assert rows["hidden"].compute_dtype == "float8" and rows["hidden"].output_dtype == "bfloat16"


def test_a_small_transformer_ends_within_a_percent():
    """Every projection in 8 bits, on tokens that it has not seen."""

    def loss_of(policy):
        keras.utils.set_random_seed(3)
        with kp.policy_scope(policy):
            tokens = keras.Input((32,), dtype="int32")
            x = layers.Embedding(32, 64)(tokens)
            normal = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(2, 32)(normal, normal, use_causal_mask=True)
            x = x + layers.Dense(64)(layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x)))
            model = keras.Model(tokens, layers.Dense(32)(layers.LayerNormalization()(x)))
        assert sum(map(is_float8, model._flatten_layers())) == (7 if policy != "mixed_bfloat16" else 0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(3e-3), loss)
        text = np.cumsum(np.random.default_rng(1).integers(1, 4, (1088, 33)), axis=1).astype("int32") % 32
        model.fit(text[64:, :-1], text[64:, 1:], batch_size=16, verbose=0, shuffle=False)
        return model.evaluate(text[:64, :-1], text[:64, 1:], verbose=0)

    # The three next tokens that are possible are equally probable: no model can go below log 3.
    found, expected = loss_of(policy_of()), loss_of("mixed_bfloat16")
    assert np.log(3) < expected < 1.1 * np.log(3)
    assert found < 1.01 * expected


@pytest.mark.parametrize("mode", MODES)
def test_clones_multiply_alike(mode):
    model = network(policy_of(mode))
    for twin in (keras.models.clone_model(model), network(policy_of(mode)).from_config(model.get_config())):
        assert all(is_float8(layer) for layer in twin.layers)
        twin.set_weights(model.get_weights())
        np.testing.assert_array_equal(twin.predict(X, verbose=0), model.predict(X, verbose=0))


def test_a_layer_with_another_site(monkeypatch):
    class Gated(layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.gate = self.add_weight(shape=(16, 16), name="gate")

    monkeypatch.setattr(sites, "SITES", dict(sites.SITES))  # other tests count what is registered
    kp.register_site(Gated, "gate", contracted=(0,))
    layer = Gated(64, dtype=policy_of(), name="gated")
    layer.build((None, 32))
    assert is_float8(layer) and layer.weight_matrix.variable is layer.kernel


def test_files_name_our_policy(tmp_path):
    model = network(policy_of())
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        config = json.loads(file.read("config.json"))
    dtype = config["config"]["layers"][1]["config"]["dtype"]
    assert dtype["registered_name"] == "keras_precision>QuantizedFloat8DTypePolicy"
