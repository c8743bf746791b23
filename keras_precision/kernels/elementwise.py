"""Records a function that treats all elements of its tensors alike, so that it can run on parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_precision.kernels import func_graphs, jaxprs
from keras_precision.kernels.recording import NotElementwise as NotElementwise
from keras_precision.kernels.recording import Recording

_RECORDERS = {"jax": jaxprs.record, "tensorflow": func_graphs.record}


class Program:
    """The elementwise operations that a function of tensors of one shape consists of.

    What depends on scalars alone, a decayed learning rate for instance, is
    computed while the function is recorded.

    Args:
        function: of `len(arguments)` tensors, returning such tensors. What it
            closes over may be traced. On TensorFlow it may assign to those
            variables that are among the arguments; they stay as they are.
        *arguments: tensors, or what has their shapes and dtypes, of one shape
            with more than one element.

    Attributes:
        tensors: those of the full shape that the function closed over.
        scalars: tensors of shape () that its operations need.
        operations: what it does with them; equal for programs that do the same.

    Raises:
        NotElementwise: it sums, multiplies matrices, or mixes elements in
            another way.

    Example:
        >>> program = Program(lambda x: [ops.sqrt(x) * 2], ops.zeros((64, 64)))
        >>> [x.tolist() for x in map(ops.convert_to_numpy, program.run([ops.array([4.0, 9.0])], program.scalars))]
        [[4.0, 6.0]]
    """

    def __init__(self, function: Callable, *arguments):
        self._recording = Recording(arguments[0].shape, len(arguments))
        results = _RECORDERS[keras.backend.backend()](self._recording, function, arguments)
        self._results = [self._recording.operand(result) for result in results]
        self.tensors: list[Any] = self._recording.tensors
        self.scalars: list[Any] = [ops.reshape(value, ()) for value in self._recording.scalars]
        self.operations: str = self._recording.described(self._results)

    def run(self, values: Sequence, scalars: Sequence) -> list:
        """Returns the function's results for parts of its tensors.

        Args:
            values: the same part of each argument and then of each of
                `tensors`, in any one shape.
            scalars: what `self.scalars` are where this runs.
        """
        return self._recording.replay(self._results, values, scalars)
