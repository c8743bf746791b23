"""What is written down of a function whose operations are elementwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops


class NotElementwise(Exception):
    """An element of a result depends on more than the elements in its place."""


class Tensor(NamedTuple):
    """A value of the full shape, by its place among those that `run` knows."""

    place: int


class Scalar(NamedTuple):
    """A value of one element, by its place among the scalars."""

    place: int


class Step(NamedTuple):
    """One operation: a function of tensors, what it is called with, and the place of what it returns."""

    function: Callable
    operands: list[Tensor | Scalar]
    result: int


class Recording:
    """Elementwise operations on tensors of one shape.

    Args:
        shape: of the tensors, with more than one element.
        n_arguments: how many of them the function has.

    Attributes:
        shape: the same.
        arguments: the function's arguments, a Tensor each.
        tensors: those of the full shape that were closed over.
        scalars: tensors of shape () that the operations need.
    """

    def __init__(self, shape: Sequence[int], n_arguments: int):
        self.shape = tuple(shape)
        self.arguments = [Tensor(place) for place in range(n_arguments)]
        self.tensors: list[Any] = []
        self.scalars: list[Any] = []
        self._steps: list[Step] = []
        self._n_values = n_arguments
        self._given = list(range(n_arguments))  # the places of the arguments, and of `tensors` after them

    def add(self, function: Callable, values: Sequence) -> Tensor:
        """Adds an operation.

        Args:
            function: of as many tensors, elementwise; it may be called with parts of the full shape.
            values: as `operand` takes them.
        """
        self._steps.append(Step(function, [self.operand(value) for value in values], self._n_values))
        self._n_values += 1
        return Tensor(self._n_values - 1)

    def operand(self, value) -> Tensor | Scalar:
        """Returns what an operation reads: tensors and scalars that were closed over become the recording's.

        Args:
            value: Tensor, or a tensor of the full shape or of one element.
        """
        if isinstance(value, Tensor):
            return value
        is_full = tuple(np.shape(value)) == self.shape
        known = self.tensors if is_full else self.scalars
        place = next((i for i, other in enumerate(known) if other is value), len(known))
        if place == len(known):
            known.append(value)
            if is_full:
                self._given.append(self._n_values)
                self._n_values += 1
        return Tensor(self._given[len(self.arguments) + place]) if is_full else Scalar(place)

    def described(self, results: Sequence[Tensor | Scalar]) -> str:
        """Returns what `replay` does, in words that are equal only for recordings that do the same.

        They have functions' addresses, so that this holds while the recordings exist.
        """
        return repr((self._given, self._steps, results))

    def replay(self, results: Sequence[Tensor | Scalar], values: Sequence, scalars: Sequence) -> list:
        """Returns results for the same part, in any one shape, of each argument and then of each of `tensors`."""
        shape = tuple(values[0].shape)
        known = dict(zip(self._given, values, strict=True))

        def value(operand):
            if isinstance(operand, Tensor):
                return known[operand.place]
            return ops.broadcast_to(scalars[operand.place], shape)

        for function, operands, result in self._steps:
            known[result] = function(*map(value, operands))
        return [value(result) for result in results]
