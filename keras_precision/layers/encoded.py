"""A weight stored in a quantized format, whatever its shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge_variables, dtypes
from keras_precision.formats import Codec
from keras_precision.kernels.compiled import compiled
from keras_precision.layers.weight_matrix import WeightMatrix


class EncodedWeight(WeightMatrix):
    """What a layer holds in the place of a float weight: a format's parts, as variables that are not trained.

    Args:
        codec: the format.
        shape: of the weight.
        contracted: axes that a product contracts, in the order that they are flattened in.
    """

    def __init__(self, codec: Codec, shape: Sequence[int], contracted: Sequence[int]):
        super().__init__(shape, contracted)
        self.codec = codec
        self.variables: dict[str, keras.Variable] = {}
        self.replaced: dict[str, Any] = {}

    def encode(self, weight) -> dict[str, np.ndarray]:
        """Returns the parts of a weight of this shape as arrays.

        Raises:
            ValueError: it holds inf or NaN.
        """
        return self.codec.encode(self.to_matrix(weight))

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
        return {name: _bridge_variables.tensor_of(variable) for name, variable in self.variables.items()}

    def decode(self, dtype: str):
        """Returns the weight as a tensor of its own shape."""
        return self._decode(self._tensors(), dtype)

    def decoded(self, arrays: dict[str, np.ndarray], dtype: str):
        """Returns the weight that other parts, which `encode` returned, stand for."""
        return self._decode({name: ops.convert_to_tensor(array) for name, array in arrays.items()}, dtype)

    def change(self, weight, arrays: dict[str, np.ndarray]) -> tuple[float, float]:
        """Returns the sums of squares of what encoding changed of a weight, and of the weight.

        Args:
            weight: float tensor of this shape.
            arrays: what `encode` made of it.
        """
        sums = _sums(self.codec, self.shape, self.contracted, tuple(arrays))(weight, *arrays.values())
        return float(sums[0]), float(sums[1])

    def _decode(self, tensors, dtype):
        return self.from_matrix(self.codec.decode(tensors, self.matrix_shape, dtype))

    def matmul(self, x, dtype: str):
        """Returns x (..., k) times the matrix: (..., n)."""
        return self.codec.matmul(x, self._tensors(), self.matrix_shape, dtype)

    def gather(self, indices, dtype: str):
        """Returns rows of a table (n, k) that is stored as the matrix (k, n): (*indices.shape, k)."""
        return self.codec.gather(self._tensors(), self.matrix_shape, indices, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the live arrays."""
        return dtypes.measured_bytes(self.variables.values())


@functools.lru_cache(maxsize=None)
def _sums(codec, shape, contracted, names):
    """Returns the compiled function behind `EncodedWeight.change`: JAX takes 0.03 s to compile each operation alone."""
    encoded = EncodedWeight(codec, shape, contracted)

    def squares(values):
        return ops.sum(ops.sum(ops.square(values), axis=0))  # in two steps, since float32 loses what is added to much

    def sums(weight, *tensors):
        weight = ops.cast(weight, "float32")
        decoded = encoded._decode(dict(zip(names, tensors, strict=True)), "float32")
        return squares(decoded - weight), squares(weight)

    return compiled(sums)
