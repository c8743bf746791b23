"""What tests of several formats share."""

from collections.abc import Callable

import keras
import pytest
from keras import ops

from keras_precision.formats import FORMATS, Codec

CODECS = [name for name, entry in FORMATS.items() if isinstance(entry, Codec)]


def pytest_generate_tests(metafunc):
    """Runs a test that has the fixture `codec` for every format that encodes."""
    if "codec" in metafunc.fixturenames:
        metafunc.parametrize("codec", [FORMATS[name] for name in CODECS], ids=CODECS)


@pytest.fixture
def tensors() -> Callable:
    """Encodes a weight and returns its parts as tensors."""
    return lambda codec, weight: {name: ops.convert_to_tensor(part) for name, part in codec.encode(weight).items()}


@pytest.fixture
def staged() -> Callable:
    """Makes a function run compiled by XLA."""

    def stage(function):
        if keras.backend.backend() == "jax":
            import jax

            return jax.jit(function)
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)

    return stage
