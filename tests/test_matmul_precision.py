"""How float32 matrices are multiplied: what is set reaches the programs, and `describe` tells it."""

import re

import keras
import numpy as np
import pytest

from keras_precision import hardware

IS_JAX = keras.backend.backend() == "jax"


@pytest.fixture(autouse=True)
def restored():
    yield
    hardware.set_matmul_precision("default")


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_programs_ask_for_what_is_set(precision):
    hardware.set_matmul_precision(precision)
    if IS_JAX:
        import jax

        dense = keras.layers.Dense(4)
        dense.build((None, 8))
        text = jax.jit(lambda x: dense(x)).lower(np.ones((2, 8), "float32")).as_text()
        assert re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", text) == [precision.upper()] * 2  # one for each operand
    else:
        import tensorflow as tf

        assert tf.config.experimental.tensor_float_32_execution_enabled() == (precision != "highest")


def test_compiled_functions_follow():
    if not IS_JAX:
        pytest.skip("TensorFlow's kernels ask each time")
    import jax

    traced = []

    @jax.jit
    def product(x):
        traced.append(jax.config.jax_default_matmul_precision)
        return x @ x

    for precision in ("default", "highest", "highest"):
        hardware.set_matmul_precision(precision)
        product(np.eye(3, dtype="float32"))
    assert traced == [None, "highest"]


def test_description_tells_it():
    before = hardware.describe().default_matmul_precision
    hardware.set_matmul_precision("highest")
    assert hardware.describe().default_matmul_precision == ("highest" if IS_JAX else "float32")
    hardware.set_matmul_precision("default")
    assert hardware.describe().default_matmul_precision == before


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="Expected a precision in .* Received: precision='medium'"):
        hardware.set_matmul_precision("medium")


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ValueError, match="'numpy', which has no such setting"):
        hardware.set_matmul_precision("high")
