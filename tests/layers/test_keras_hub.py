"""keras-hub's backbones, made tiny, with random weights."""

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision import _bridge
from keras_precision.layers.quantized import is_quantized

keras_hub = pytest.importorskip("keras_hub", reason="`make test` installs keras-hub, without its own dependencies")

SMALL = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 64, "intermediate_dim": 128}
# Quantized layers: the table, and in each block queries, keys, values, output and two or three matrices of the MLP.
BACKBONES = {
    "GPT2Backbone": ({"num_heads": 2, "max_sequence_length": 8}, 1 + 2 * 6),
    "GemmaBackbone": ({"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, 1 + 2 * 7),
    "LlamaBackbone": ({"num_query_heads": 2, "num_key_value_heads": 1}, 1 + 2 * 7),
}
DRAW = np.random.default_rng(0)
INPUTS = {"token_ids": DRAW.integers(0, 50, (2, 8)).astype("int32"), "padding_mask": np.ones((2, 8), "int32")}


def made(name, **kwargs):
    return getattr(keras_hub.models, name)(**SMALL, **BACKBONES[name][0], **kwargs)


def quantized_inside(model):
    return [layer for layer in _bridge.flatten_layers(model) if is_quantized(layer)]


@pytest.mark.parametrize("how", ["dtype", "quantize"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_are_quantized_saved_and_loaded(name, how, tmp_path):
    if how == "dtype":
        model = made(name, dtype="nf4_from_float32")
    else:
        model = made(name)
        exact = model.predict(INPUTS, verbose=0)
        kp.quantize(model, "nf4_from_float32", verbose=0)
        assert 0 < np.abs(model.predict(INPUTS, verbose=0) - exact).max() < 0.4 * np.abs(exact).max()
    assert len(quantized_inside(model)) == BACKBONES[name][1]
    expected = model.predict(INPUTS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(quantized_inside(loaded)) == BACKBONES[name][1]
    np.testing.assert_array_equal(loaded.predict(INPUTS, verbose=0), expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_train_lora_alone(name, tmp_path):
    model = made(name)
    kp.quantize(model, "nf4-dq_from_float32", verbose=0)
    kp.enable_lora(model, 2)
    assert all("/lora_" in v.path for v in model.trainable_variables)
    assert len(model.trainable_variables) == 2 * BACKBONES[name][1]
    names = [v.path for v in model.trainable_variables]
    model.compile(keras.optimizers.Adam(0.01), "mse")
    target = DRAW.standard_normal((2, 8, 64)).astype("float32")
    losses = model.fit(INPUTS, target, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    tuned = model.predict(INPUTS, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):  # more is trainable than was
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    kp.enable_lora(loaded, 2)
    np.testing.assert_array_equal(loaded.predict(INPUTS, verbose=0), tuned)
    assert [v.path for v in loaded.trainable_variables] == names
