"""Compiled steps of TensorFlow, which update one weight after the other."""

import keras
import numpy as np
import pytest

from keras_precision.optimizers import LowBit
from keras_precision.optimizers.states import STATE_FORMATS

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="runs on TensorFlow only")


def make(state_format="dynamic8", shape=(16, 256)):
    """Returns an optimizer and its three weights."""
    draw = np.random.default_rng(0)
    weights = [keras.Variable(draw.standard_normal(shape).astype("float32")) for _ in range(3)]
    optimizer = LowBit("adam", state_format, min_size=0)
    optimizer.build(weights)
    return optimizer, weights


def ancestors(operation):
    """Returns all operations whose results an operation depends on."""
    found, pending = set(), [operation]
    while pending:
        for tensor in pending.pop().inputs:
            if tensor.op not in found:
                found.add(tensor.op)
                pending.append(tensor.op)
    return found


def test_a_weight_waits_for_the_one_before():
    import tensorflow as tf

    shape = (16, 250)  # no rows of blocks, so that whole tensors are decoded
    optimizer, weights = make(shape=shape)
    gradients = [tf.ones(shape) for _ in weights]
    step = tf.function(lambda: optimizer.apply(gradients, weights), jit_compile=True)
    graph = step.get_concrete_function().graph
    decoded = [operation for operation in graph.get_operations() if operation.type == "GatherV2"]
    assert len(decoded) == 2 * len(weights)
    for i, one in enumerate(decoded):
        before = ancestors(one)
        assert [other in before for other in decoded] == [j // 2 < i // 2 for j in range(len(decoded))]


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_weights_do_not_depend_on_what_the_others_are(state_format, jit_compile, wrong):
    import tensorflow as tf

    draw = np.random.default_rng(1)
    gradients = [draw.standard_normal((16, 256)).astype("float32") for _ in range(3)]
    expected = []
    for number in (0.0, wrong):
        optimizer, weights = make(state_format)
        given = [gradients[0] + np.float32(number), *gradients[1:]]
        step = tf.function(lambda: optimizer.apply(given, weights), jit_compile=jit_compile)  # noqa: B023
        for _ in range(2):
            step()
        parts = [
            part for slot in optimizer.packed_slots if slot.weight is not weights[0] for part in slot.parts.values()
        ]
        found = [np.asarray(keras.ops.convert_to_numpy(x)).view("uint8") for x in (*weights[1:], *parts)]
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
