"""Functions of tensors recorded as elementwise operations, and run on parts."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.kernels.compiled import compiled
from keras_precision.kernels.elementwise import NotElementwise, Program

pytestmark = pytest.mark.skipif(
    keras.backend.backend() not in ("jax", "tensorflow"), reason="records what two backends trace"
)

SHAPE = (6, 8)


def array(seed, shape=SHAPE):
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype("float32")


FUNCTIONS = {
    "arithmetic": lambda x, y: [x * y - x / y, ops.sqrt(x) + 2.0],
    "comparison": lambda x, y: [ops.where(x > y, x, -y), ops.maximum(x, 1.0)],
    "powers": lambda x, y: [ops.power(x, 3), ops.exp(-ops.square(x)) * ops.sign(y - 1)],
    "casts": lambda x, y: [ops.cast(ops.cast(x, "bfloat16"), "float32") * y],
    "constants": lambda x, y: [ops.zeros_like(x) + 3, ops.full(SHAPE, 2.0), y],
    "a number for all": lambda x, y: [x, 1.5],
    "one element": lambda x, y: [x * ops.reshape(ops.convert_to_tensor(2.0), (1, 1))],
    "clip": lambda x, y: [ops.clip(x, 0.7, 1.2)],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_parts_are_what_the_whole_is_there(function):
    x, y = array(0), array(1)
    program = Program(function, x, y)
    flat = [values.reshape(3, 16)[1:, 5:9] for values in (x, y)]
    found = program.run([ops.convert_to_tensor(part) for part in flat], program.scalars)
    for part, whole in zip(found, function(ops.convert_to_tensor(x), ops.convert_to_tensor(y)), strict=True):
        whole = np.broadcast_to(ops.convert_to_numpy(whole), SHAPE).reshape(3, 16)[1:, 5:9]
        np.testing.assert_allclose(ops.convert_to_numpy(part), whole, rtol=2e-7)


def test_what_is_closed_over_becomes_tensors_and_scalars():
    @compiled
    def run(x, other, rate):
        decayed = rate * 0.5
        program = Program(lambda x: [x * ops.power(decayed, 2) + other * other], x)
        assert [value.shape for value in program.tensors] == [SHAPE]
        assert all(value.shape == () for value in program.scalars) and program.scalars
        halves = [program.run([x[rows], other[rows]], program.scalars)[0] for rows in (slice(3), slice(3, None))]
        return ops.concatenate(halves)

    x, other = array(0), array(1)
    found = ops.convert_to_numpy(run(x, other, np.float32(4)))
    np.testing.assert_allclose(found, x * 4 + other * other, rtol=1e-6)


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x: [x / ops.sum(x)],
        lambda x: [x - ops.mean(x, axis=0)],
        lambda x: [ops.matmul(x, ops.transpose(x))],
        lambda x: [ops.flip(x)],
        lambda x: [ops.cumsum(x, axis=0)],
        lambda x: [x + ops.arange(8, dtype="float32")],
        lambda x: [x / ops.norm(x)],
        lambda x: [ops.transpose(ops.reshape(x, (8, 6)))],
    ],
)
def test_functions_that_mix_elements_are_refused(mixes):
    with pytest.raises(NotElementwise):
        Program(mixes, array(0))


def test_square_shapes_do_not_hide_a_transposition():
    with pytest.raises(NotElementwise):
        Program(lambda x: [ops.transpose(x)], array(0, (4, 4)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="variables are values elsewhere")
def test_assignments_are_what_is_read_afterwards_and_never_run():
    import tensorflow as tf

    variable, rate = tf.Variable(array(1)), tf.Variable(0.5)

    def function(x):
        variable.assign_sub(x * rate)
        variable.assign_add(tf.square(variable))
        return [variable]

    def with_argument(x, value):
        variable.assign(value)
        return function(x)

    @tf.function(jit_compile=True)
    def run(x):
        program = Program(with_argument, x, variable)
        return program.run([x[1:], variable[1:]], program.scalars)[0]

    x, before = array(0), array(1)
    after = before - x * 0.5
    np.testing.assert_allclose(run(x), (after + after**2)[1:], rtol=1e-6)
    np.testing.assert_array_equal(variable, before)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="has no effects that are recorded elsewhere")
@pytest.mark.parametrize("name", ["assigns", "draws", "prints", "calls"])
def test_functions_with_other_effects_are_refused(name):
    import tensorflow as tf

    other = tf.Variable(1.0)
    functions = {
        "assigns": lambda x: [x * other.assign_add(1.0)],
        "draws": lambda x: [x * tf.random.normal(())],
        "prints": lambda x: [x, tf.print(x)][:1],
        "calls": lambda x: [tf.function(lambda y: y / tf.reduce_sum(y))(x)],
    }
    with pytest.raises(NotElementwise):
        Program(functions[name], array(0))
    assert other.numpy() == 1
