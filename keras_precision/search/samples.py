"""Data that a model is judged on, and its loss and error for each sample."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

# A mean and a standard error of fewer tell nothing.
MIN_SAMPLES = 10


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs with their targets, cut into batches of one size, so that a model is compiled once.

    Attributes:
        x: an array (n, ...), or a list, tuple or dict of them.
        y: likewise.
        batch_size: int, 1 to n.
    """

    x: Any
    y: Any
    batch_size: int

    @classmethod
    def of(cls, x, y, batch_size: int, name: str = "x, y") -> Samples:
        """Returns the samples of what a user passed.

        Raises:
            TypeError: it holds what is no array.
            ValueError: nothing was passed, numbers of samples differ, or there are too few.
        """
        if x is None or y is None:
            raise ValueError(
                f"Expected {name} with inputs and targets to measure the loss on. Received: "
                f"{'x' if x is None else 'y'}=None. Pass some of the data that the model was validated on."
            )
        x, y = (keras.tree.map_structure(_array, part) for part in (x, y))
        counts = {len(array) if array.ndim else 0 for array in keras.tree.flatten((x, y))}
        if len(counts) != 1 or min(counts) < MIN_SAMPLES:
            raise ValueError(
                f"Expected {name} with the same number of samples, at least {MIN_SAMPLES}, in each array. "
                f"Received: {sorted(counts)} samples."
            )
        return cls(x, y, max(1, min(batch_size, *counts)))

    def __len__(self) -> int:
        return len(keras.tree.flatten(self.x)[0])

    def split(self, seed: int) -> tuple[Samples, Samples]:
        """Returns two halves, drawn without replacement by a seed."""
        order = np.random.default_rng(seed).permutation(len(self))
        return tuple(self._taken(half) for half in np.array_split(order, 2))

    def _taken(self, order):
        x, y = (keras.tree.map_structure(lambda array: array[order], part) for part in (self.x, self.y))
        return Samples(x, y, min(self.batch_size, len(order)))

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """Yields inputs, targets and how many of them count: the last batch is filled up with first samples."""
        n = len(self)
        for start in range(0, n, self.batch_size):
            order = np.arange(start, start + self.batch_size) % n
            taken = self._taken(order)
            yield taken.x, taken.y, min(self.batch_size, n - start)

    def arrays(self) -> list[np.ndarray]:
        """Returns all arrays."""
        return keras.tree.flatten((self.x, self.y))


def _array(value):
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(
            f"Expected arrays of numbers. Received: {type(value).__name__}. "
            "Pass NumPy arrays, or lists or dicts of them."
        )
    return array


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a model got on some samples.

    Attributes:
        losses: float64 (n,).
        errors: float64 (n,) in [0, 1], the share of wrong classes in each sample; None where not asked for.
    """

    losses: np.ndarray
    errors: np.ndarray | None


def judged(model: keras.Model, samples: Samples, loss: Callable, has_errors: bool) -> Judged:
    """Returns the loss, and the share of wrong classes, of each sample.

    Args:
        model: called by `predict_on_batch`.
        samples: n of them.
        loss: what `loss_function` returned.
        has_errors: whether to count errors.
    """
    losses, errors = [], []
    for x, y, count in samples.batches():
        outputs = model.predict_on_batch(x)
        losses.append(loss(y, outputs)[:count])
        if has_errors:
            errors.append(wrong(y, outputs)[:count])
    return Judged(np.concatenate(losses), np.concatenate(errors) if has_errors else None)


def loss_function(model: keras.Model, loss) -> Callable[[Any, Any], np.ndarray]:
    """Returns a function of targets and outputs (n, ...) that gives the loss of each sample, float64 (n,).

    Args:
        model: whose compiled loss is taken where `loss` is None.
        loss: a `keras.Loss`, its name, or a function of targets and outputs
            that gives a value, or several, for each sample; several are
            averaged. A function that gives one number for all is called once
            a sample.

    Raises:
        ValueError: there is none, or Keras doesn't know its name.
    """
    loss = getattr(model, "loss", None) if loss is None else loss
    if loss is None:
        raise ValueError(
            "Expected a loss to measure, or a model compiled with one. Received: loss=None and a model without. "
            "Pass loss='sparse_categorical_crossentropy', a keras.losses object, or a function of targets and outputs."
        )
    if isinstance(loss, list | tuple | dict):
        raise ValueError(
            "Expected one loss for all outputs. Received: one for each. "
            "Pass loss=function, which gets the targets and the outputs and returns a value a sample."
        )
    loss = keras.losses.get(loss)
    if isinstance(loss, keras.Loss):
        loss = copy.copy(loss)
        loss.reduction = "none"

    def losses(y, outputs):
        outputs = keras.tree.map_structure(lambda array: ops.convert_to_tensor(array, "float32"), outputs)
        n = len(keras.tree.flatten(y)[0])
        values = ops.convert_to_numpy(loss(y, outputs)).astype("float64")
        if values.ndim == 0:
            values = np.array([float(loss(*_row((y, outputs), place))) for place in range(n)])
        if len(values) != n:
            raise ValueError(
                f"Expected a loss with a value for each of {n} samples. Received: values of shape {values.shape}. "
                "Return one a sample, or one for all."
            )
        return values.reshape(n, -1).mean(axis=1)

    return losses


def _row(arrays, place):
    return keras.tree.map_structure(lambda array: array[place : place + 1], arrays)


def wrong(y, outputs) -> np.ndarray:
    """Returns the share of wrong classes in each sample, float64 (n,).

    Args:
        y: classes as integers (n, ...), or one-hot (n, ..., classes).
        outputs: scores (n, ..., classes).

    Raises:
        ValueError: these are no classes.
    """
    if isinstance(outputs, list | tuple | dict) or outputs.ndim < 2 or outputs.shape[-1] < 2:
        raise ValueError(
            "Expected one output with a score for each of two classes or more to count accuracy. Received: another. "
            "Bound the loss, or pass as `loss` a function that counts errors."
        )
    y = np.asarray(y)
    if y.shape == outputs.shape:
        y = y.argmax(axis=-1)
    y = y.reshape(outputs.shape[:-1])
    return (outputs.argmax(axis=-1) != y).reshape(len(y), -1).mean(axis=1)
