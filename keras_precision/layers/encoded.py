"""A weight stored in a quantized format, whatever its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge, _bridge_variables, dtypes
from keras_precision.formats import Codec


class EncodedWeight:
    """What a layer holds in the place of a float weight: a format's parts, as variables that are not trained.

    The weight counts as a matrix (k, n): the axes that a product contracts,
    flattened, and then the others.

    Args:
        codec: the format.
        shape: of the weight.
        contracted: axes that a product contracts, in the order that they are flattened in.
    """

    def __init__(self, codec: Codec, shape: Sequence[int], contracted: Sequence[int]):
        self.codec = codec
        self.shape = tuple(shape)
        self.contracted = tuple(contracted)
        self.kept = tuple(axis for axis in range(len(self.shape)) if axis not in self.contracted)
        self.matrix_shape = tuple(math.prod(self.shape[axis] for axis in axes) for axes in (self.contracted, self.kept))
        self.variables: dict[str, keras.Variable] = {}
        self.replaced: dict[str, Any] = {}

    def encode(self, weight) -> dict[str, np.ndarray]:
        """Returns the parts of a weight of this shape as arrays.

        Raises:
            ValueError: it holds inf or NaN.
        """
        matrix = ops.transpose(weight, self.contracted + self.kept) if self._is_permuted else weight
        if len(self.shape) != 2:
            matrix = (
                np.reshape(matrix, self.matrix_shape)
                if isinstance(matrix, np.ndarray)
                else ops.reshape(matrix, self.matrix_shape)
            )
        return self.codec.encode(matrix)

    @property
    def _is_permuted(self):
        return self.contracted + self.kept != tuple(range(len(self.shape)))

    def install(self, layer: keras.Layer, variable: keras.Variable, arrays: dict[str, np.ndarray]) -> None:
        """Makes a layer's variables of the parts, laid out over devices as the variable that they stand for."""
        self.replaced = _bridge_variables.facts_of(variable)
        # Flattened axes are contiguous along the first of them, so only its sharding carries over.
        along = {0: next(iter(self.contracted), None), 1: next(iter(self.kept), None), None: None}
        for name, part in self.codec.parts(self.matrix_shape).items():
            axes = [along[axis] for axis in part.axes]
            self.variables[name] = _bridge_variables.add_part(layer, variable, name, arrays[name], axes)

    def assign(self, arrays: dict[str, np.ndarray]) -> None:
        """Stores other parts."""
        for name, variable in self.variables.items():
            variable.assign(arrays[name])

    def _tensors(self):
        values = {name: variable.value for name, variable in self.variables.items()}
        # A tf.Variable is read: arithmetic that starts with a number does not know it.
        return {name: value.read_value() if hasattr(value, "read_value") else value for name, value in values.items()}

    def decode(self, dtype: str):
        """Returns the weight as a tensor of its own shape."""
        return self._decode(self._tensors(), dtype)

    def decoded_from(self, arrays: dict[str, np.ndarray]):
        """Returns the float32 weight that arrays stand for which are not stored yet."""
        return self._decode({name: ops.convert_to_tensor(array) for name, array in arrays.items()}, "float32")

    def _decode(self, tensors, dtype):
        matrix = self.codec.decode(tensors, self.matrix_shape, dtype)
        order = self.contracted + self.kept
        weight = ops.reshape(matrix, tuple(self.shape[axis] for axis in order))
        return ops.transpose(weight, tuple(np.argsort(order))) if self._is_permuted else weight

    def matmul(self, x, dtype: str):
        """Returns x (..., k) times the matrix: (..., n)."""
        return self.codec.matmul(x, self._tensors(), self.matrix_shape, dtype)

    def gather(self, indices, dtype: str):
        """Returns rows of a table (n, k) that is stored as the matrix (k, n): (*indices.shape, k)."""
        return self.codec.gather(self._tensors(), self.matrix_shape, indices, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the live arrays."""
        return sum(math.prod(v.shape) * dtypes.nbytes(_bridge.stored_dtype(v)) for v in self.variables.values())
