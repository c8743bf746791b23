"""Makes a compiled step of TensorFlow update one weight after the other, so that few slots are decoded at a time."""

from __future__ import annotations

from collections.abc import Iterable

import keras
from keras import ops

_TOKENS = "keras_precision/turns"
_INTEGERS = {"float32": "int32", "uint8": "uint8"}


def after_the_last(tensor):
    """Returns a part of a slot, for XLA to depend on what `end` was called with in this graph.

    XLA orders operations by data alone, and by itself decodes all slots of an
    optimizer before it encodes the first: all moments in float32 at once.

    Args:
        tensor: float32, uint8, or of another dtype, which is returned as it is.
    """
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype not in _INTEGERS or not _are_taken():
        return tensor
    import tensorflow as tf

    tokens = tf.compat.v1.get_collection(_TOKENS)
    if not tokens:
        return tensor
    integers = ops.view(tensor, _INTEGERS[dtype])
    return ops.view(ops.bitwise_or(integers, ops.cast(tokens[-1], integers.dtype)), dtype)


def end(results: Iterable) -> None:
    """Ends the update of a weight.

    Args:
        results: tensors, all that it stored.
    """
    if not _are_taken():
        return
    import tensorflow as tf

    numbers = [ops.cast(ops.reshape(result, (-1,))[-1], "float32") for result in results]
    total = sum(numbers[1:], start=numbers[0])
    # Zero of every number and of NaN, which XLA doesn't see.
    tf.compat.v1.add_to_collection(_TOKENS, ops.cast(ops.logical_and(total == total, total != total), "uint8"))


def _are_taken():
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and tf.distribute.get_strategy().num_replicas_in_sync == 1
