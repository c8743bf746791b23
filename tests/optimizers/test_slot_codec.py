"""Whole slots decoded and encoded in code that XLA compiles, against operation by operation."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.kernels.compiled import compiled
from keras_precision.optimizers import LowBit, slot_codec
from keras_precision.optimizers.states import STATE_FORMATS

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="compiles on TensorFlow only")


def traced(function):
    """The function in a graph that XLA does not compile."""
    import tensorflow as tf

    return tf.function(function)


@pytest.mark.parametrize("shape", [(16, 256), (37, 129)])
@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("state_format", STATE_FORMATS.values(), ids=STATE_FORMATS)
def test_slots_are_what_the_format_makes_of_them(state_format, is_signed, shape, backend):
    draw = np.random.default_rng(0)
    value = ops.convert_to_tensor(draw.standard_normal(shape) * 10.0 ** draw.integers(-9, 9, shape), "float32")
    value = value if is_signed else ops.abs(value)
    expected = state_format.encode(value, is_signed)
    decoded = state_format.decode(expected, shape, is_signed)
    for call in (lambda function: function, *([traced] if backend == "tensorflow" else [])):
        found = call(lambda value: slot_codec.encode(state_format, value, is_signed))(value)
        assert list(found) == list(expected)
        np.testing.assert_allclose(found["scale"], expected["scale"], rtol=1e-6)
        # Codes may be the next ones where XLA rounds a product and a sum once.
        assert np.mean(np.asarray(found["codes"]).view("uint8") != np.asarray(expected["codes"]).view("uint8")) < 1e-3
        back = call(lambda parts: slot_codec.decode(state_format, parts, shape, is_signed))(expected)
        np.testing.assert_allclose(back, decoded, rtol=1e-6)


def test_compiles_where_nothing_else_does(backend, monkeypatch):
    found = [slot_codec._compiles_here()]
    compiled(lambda x: found.append(slot_codec._compiles_here()) or x)(np.zeros(3))
    if backend == "tensorflow":
        import tensorflow as tf

        traced(lambda x: found.append(slot_codec._compiles_here()) or x)(tf.zeros(3))
        with tf.distribute.OneDeviceStrategy("CPU").scope():
            found.append(slot_codec._compiles_here())
        monkeypatch.setattr(slot_codec.device, "platform", lambda: "gpu")
        found.append(slot_codec._compiles_here())
    assert found == ([True, False, True, False, False] if backend == "tensorflow" else [False, False])


@on_tensorflow
@pytest.mark.parametrize("call", [traced, lambda function: function], ids=["graph", "eager"])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("make", [keras.optimizers.Lamb, keras.optimizers.Adam])
def test_steps_are_as_without(make, state_format, call, monkeypatch):
    draw = np.random.default_rng(0)
    value, *gradients = (draw.standard_normal((32, 256)).astype("float32") for _ in range(4))
    results = []
    for is_compiled in (True, False):
        monkeypatch.setattr(slot_codec, "_compiles_here", lambda is_compiled=is_compiled: is_compiled)
        weight, optimizer = keras.Variable(value), LowBit(make(0.01), state_format, min_size=0)
        optimizer.build([weight])
        step = call(optimizer.apply)
        for gradient in gradients:
            step([ops.convert_to_tensor(gradient)])
        results.append(ops.convert_to_numpy(weight))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
    assert np.abs(results[0] - value).max() > 1e-3


@on_tensorflow
def test_weights_of_one_shape_share_what_is_compiled():
    state_format = STATE_FORMATS["dynamic8"].with_block_size(64)  # which no other test has
    before = slot_codec._decoder.cache_info().currsize, slot_codec._encoder.cache_info().currsize
    weights = [keras.Variable(np.ones(shape, "float32")) for shape in ((8, 64), (8, 64), (4, 64))]
    made = LowBit("adam", "dynamic8", block_size=64, min_size=0)
    made.build(weights)
    made.apply([ops.ones_like(w) for w in weights])
    assert all(slot.state_format == state_format for slot in made.packed_slots)
    after = slot_codec._decoder.cache_info().currsize, slot_codec._encoder.cache_info().currsize
    assert after == (before[0] + 4, before[1] + 2)  # signed and unsigned; of two shapes
