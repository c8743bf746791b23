"""Weights as formats store them, the numbers that they stand for, and what they are multiplied with."""

import functools
import os
import secrets

import numpy as np
from keras import ops

from keras_precision.formats import FORMATS, double_quant

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoffs."""
SEED = int(os.environ.get("KP_SEED") or secrets.randbits(32))
"""Of activations: another one in each run, which a test that fails prints."""


@functools.cache
def stored(name, k, n):
    """(codec, its parts, the weight that they stand for in float64), of a format with or without an option."""
    base, _, option = name.partition("/")
    codec = FORMATS[base].with_option(option) if option else FORMATS[base]
    parts = codec.encode(np.random.default_rng(k).standard_normal((k, n), dtype="float32"))
    return codec, parts, numbers(codec.decode(tensors(parts), (k, n), "float32"))


def tensors(parts):
    """The parts as tensors."""
    return {name: ops.convert_to_tensor(array) for name, array in parts.items()}


def scales_of(parts):
    """What kernels take as scales."""
    return double_quant.arrays(tensors(parts)) if "scale_codes" in parts else [parts["scale"]]


def activations(rows, width, dtype):
    """Random activations, or gradients."""
    print(f"KP_SEED={SEED}")
    return ops.convert_to_tensor(
        np.random.default_rng((SEED, rows)).standard_normal((rows, width), dtype="float32"), dtype
    )


def numbers(tensor):
    """A tensor in float64."""
    return np.asarray(ops.convert_to_numpy(tensor)).astype("float64")
