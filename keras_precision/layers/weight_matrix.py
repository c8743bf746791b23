"""A weight of any shape as the matrix that a product contracts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from keras import ops


class WeightMatrix:
    """A weight seen as a matrix (k, n): the axes that a product contracts, flattened, and then the others.

    Args:
        shape: of the weight.
        contracted: axes that a product contracts, in the order that they are flattened in.
    """

    def __init__(self, shape: Sequence[int], contracted: Sequence[int]):
        self.shape = tuple(shape)
        self.contracted = tuple(contracted)
        self.kept = tuple(axis for axis in range(len(self.shape)) if axis not in self.contracted)
        self.matrix_shape = tuple(math.prod(self.shape[axis] for axis in axes) for axes in (self.contracted, self.kept))

    @property
    def _is_permuted(self):
        return self.contracted + self.kept != tuple(range(len(self.shape)))

    def to_matrix(self, weight):
        """Returns a weight, an array or a tensor, as the matrix."""
        matrix = ops.transpose(weight, self.contracted + self.kept) if self._is_permuted else weight
        if len(self.shape) == 2:
            return matrix
        reshape = np.reshape if isinstance(matrix, np.ndarray) else ops.reshape
        return reshape(matrix, self.matrix_shape)

    def from_matrix(self, matrix):
        """Returns the tensor of the weight's own shape that a matrix is."""
        order = self.contracted + self.kept
        weight = ops.reshape(matrix, tuple(self.shape[axis] for axis in order))
        return ops.transpose(weight, tuple(np.argsort(order))) if self._is_permuted else weight
