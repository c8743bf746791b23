"""Tells whether code runs now or is being compiled, and branches in either case."""

from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_precision.kernels import selection


def is_concrete(tensor) -> bool:
    """Returns whether a tensor has a value now."""
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(tensor, jax.core.Tracer)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly()
    return True


def is_staged() -> bool:
    """Returns whether operations are recorded, to run later and many times (`jax.jit`, `tf.function`).

    Inside `jax.grad` or `jax.vmap` alone they run at once: there, an operation
    on constants gives a constant.
    """
    return not is_concrete(ops.add(ops.zeros(()), 1.0))


def branch(
    condition, on_true: Callable[[], None], on_false: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Runs one of two functions that assign to variables.

    Args:
        condition: bool scalar tensor. If it has a value, that decides in
            Python: side effects inside `jax.lax.cond` leak tracers (D5).
        on_true: function without arguments or result.
        on_false: the same.
        variables: all that the functions may assign to. Where JAX compiles,
            both run and the values are selected: element-wise selects fuse
            into the updates, conditional blocks copy their operands.
    """
    if is_concrete(condition):
        (on_true if condition else on_false)()
    elif keras.backend.backend() == "tensorflow":
        ops.cond(condition, on_true, on_false)
    else:
        before = [v.value for v in variables]
        on_false()
        if_false = [v.value for v in variables]
        for variable, old, new in zip(variables, before, if_false, strict=True):
            if new is not old:
                variable.assign(old)
        on_true()
        for variable, new in zip(variables, if_false, strict=True):
            if variable.value is not new:
                variable.assign(ops.where(condition, variable.value, new))


def unless(condition, update: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Runs an update, or leaves everything as it is where a condition holds.

    Args:
        condition: bool scalar tensor; see `branch`.
        update: function without arguments or result.
        variables: all that it may assign to.
    """
    if is_concrete(condition) or keras.backend.backend() == "tensorflow":
        branch(condition, lambda: None, update, variables)
        return
    before = [v.value for v in variables]
    with selection.unless(condition) as selected:
        update()
    for variable, old in zip(variables, before, strict=True):
        if variable.value is not old and not selected.has_decided(variable):
            variable.assign(ops.where(condition, old, variable.value))
