"""Fixtures that every test gets."""

import gc
import os

import fast_compilation

# TensorFlow's C++ start-up notices would drown the test report.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Also for the processes that tests start. Set it to "" to run those marked `default_xla`.
os.environ.setdefault("XLA_FLAGS", fast_compilation.xla_flags(os.environ.get("KERAS_BACKEND")))

import keras
import pytest

import keras_precision


def pytest_collection_finish():
    """Takes the half a million objects of imported modules out of what each garbage collection looks at."""
    gc.freeze()


@pytest.fixture(autouse=True)
def precision_state():
    """Seeds every test alike, and gives the next one the global policy that this one found."""
    before = keras_precision.global_policy()
    keras.utils.set_random_seed(0)
    yield
    keras_precision.set_global_policy(before)


@pytest.fixture
def backend() -> str:
    """The name of the Keras backend that this run tests."""
    return keras.backend.backend()
