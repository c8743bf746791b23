"""Keeps or discards whole windows of gradient accumulation."""

import keras
from keras import ops

from keras_precision import _bridge_optimizers
from keras_precision.scaling.tracing import branch


class Window:
    """Follows the windows of an optimizer that accumulates gradients.

    Keras averages weights (EMA), overwrites them by their averages and
    constrains them at every micro-step, so whatever of that applies is copied
    at a window's start, to be put back if the window is discarded.

    Args:
        wrapper: the optimizer that owns the new variables, built.
        variables: the weights.
    """

    def __init__(self, wrapper: keras.Optimizer, variables: list[keras.Variable]):
        self._optimizer = _bridge_optimizers.innermost(wrapper)
        self._overflowed = wrapper.add_variable(shape=(), dtype="int", name="window_overflowed")
        kept = list(_bridge_optimizers.averages(self._optimizer))
        if self._optimizer.use_ema and self._optimizer.ema_overwrite_frequency:
            kept += variables
        else:
            kept += [v for v in variables if getattr(v, "constraint", None) is not None]
        self._copies = [(v, wrapper.add_variable_from_reference(v, name="window_start")) for v in kept]

    def step(self, found_inf, update, variables: list[keras.Variable]) -> tuple:
        """Applies a micro-step, or discards its window.

        Args:
            found_inf: bool scalar tensor, whether this micro-step's gradients hold inf or NaN.
            update: applies the micro-step's gradients.
            variables: all that `update` may assign to.

        Returns:
            bool scalar tensors: whether the window is discarded, and whether this was its last micro-step.
        """
        steps = self._optimizer.gradient_accumulation_steps
        position = ops.mod(_bridge_optimizers.micro_steps(self._optimizer).value, steps)
        is_last = ops.equal(position, steps - 1)
        if self._copies:
            copies = [copy for _, copy in self._copies]
            branch(ops.equal(position, 0), self._remember, lambda: None, copies)
        discarded = ops.logical_or(found_inf, ops.greater(self._overflowed.value, 0))
        branch(discarded, lambda: self._discard(is_last), update, variables)
        overflowed = ops.logical_and(discarded, ops.logical_not(is_last))
        self._overflowed.assign(ops.cast(overflowed, self._overflowed.dtype))
        return discarded, is_last

    def _remember(self):
        for variable, copy in self._copies:
            copy.assign(variable.value)

    def _discard(self, is_last):
        for variable, copy in self._copies:
            variable.assign(copy.value)
        for accumulator in _bridge_optimizers.accumulators(self._optimizer):
            accumulator.assign(ops.zeros(accumulator.shape, accumulator.dtype))
        # The window goes on to its end, where the count goes back to its start: an update that was never made.
        count = _bridge_optimizers.micro_steps(self._optimizer)
        change = ops.where(is_last, 1 - self._optimizer.gradient_accumulation_steps, 1)
        count.assign_add(ops.cast(change, count.dtype))
