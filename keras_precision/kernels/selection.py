"""Updates that are kept only unless a condition holds, which kernels that update in place decide themselves (JAX)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras

_CURRENT: contextvars.ContextVar[Selection | None] = contextvars.ContextVar("selection", default=None)


class Selection:
    """What a block of `unless` has decided so far.

    Attributes:
        condition: bool tensor of shape ().
    """

    def __init__(self, condition):
        self.condition = condition
        self._decided: dict[int, Any] = {}

    def decide(self, variable: keras.Variable) -> None:
        """Notes that a variable's value is what it was before, wherever the condition holds."""
        self._decided[id(variable)] = variable.value

    def has_decided(self, variable: keras.Variable) -> bool:
        """Returns whether that is so, and nothing was assigned to the variable since."""
        return self._decided.get(id(variable), self) is variable.value


@contextlib.contextmanager
def unless(condition) -> Iterator[Selection]:
    """Makes a condition known to what runs in the block.

    Args:
        condition: bool tensor of shape (); where it holds, the block's updates will be undone.

    Example:
        >>> with unless(keras.ops.convert_to_tensor(True)) as selection:
        ...     current() is selection
        True
    """
    selection = Selection(condition)
    token = _CURRENT.set(selection)
    try:
        yield selection
    finally:
        _CURRENT.reset(token)


def current() -> Selection | None:
    """Returns the selection of the innermost block, None outside of all."""
    return _CURRENT.get()
