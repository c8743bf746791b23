"""Decodes and encodes whole slots, on a CPU in code that XLA compiles also where TensorFlow compiles nothing else."""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_precision.kernels import device, rows
from keras_precision.kernels.compiled import compiled
from keras_precision.optimizers.states import StateFormat


def decode(state_format: StateFormat, parts: dict[str, Any], shape: tuple[int, ...], is_signed: bool):
    """Returns what `StateFormat.decode` does."""
    if _compiles_here():
        return _decoder(state_format, shape, is_signed)(*parts.values())
    return state_format.decode(parts, shape, is_signed)


def encode(state_format: StateFormat, value, is_signed: bool) -> dict[str, Any]:
    """Returns what `StateFormat.encode` does."""
    if _compiles_here():
        return _encoder(state_format, is_signed)(value)
    return state_format.encode(value, is_signed)


def _compiles_here():
    if keras.backend.backend() != "tensorflow" or device.platform() != "cpu":
        return False
    import tensorflow as tf

    return not rows.is_in_xla_context() and not tf.distribute.has_strategy()


@functools.lru_cache(maxsize=None)
def _decoder(state_format, shape, is_signed):
    names = state_format.parts(shape)
    return compiled(lambda *parts: state_format.decode(dict(zip(names, parts, strict=True)), shape, is_signed))


@functools.lru_cache(maxsize=None)
def _encoder(state_format, is_signed):
    return compiled(lambda value: state_format.encode(value, is_signed))
