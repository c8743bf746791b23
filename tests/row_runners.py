"""What may run functions of rows on the backend of the tests, kernels interpreted."""

import functools

import keras

from keras_precision.kernels import rows

RUNNERS = {
    "jax": {"native": rows._by_native_code, "loop": rows._by_loop, "kernel": functools.partial(rows._by_kernel, interpret=True)},
    "tensorflow": {"loop": rows._by_loop},
}.get(keras.backend.backend(), {})
