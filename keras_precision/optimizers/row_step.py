"""One weight's update with the states in few bits, run on some rows of blocks at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras

from keras_precision import _bridge_variables
from keras_precision.kernels import elementwise, rows, selection
from keras_precision.optimizers.packed_slot import PackedSlot


def update(step: Callable, gradient, slots: Sequence[PackedSlot]) -> bool:
    """Runs a step that changes a weight and its slots without ever holding a slot in float32 as a whole.

    The step is Keras's: it is recorded once, and what it does to an element is
    done to each, between decoding and encoding, in one pass over memory.

    Args:
        step: function of the gradient, which reads and assigns.
        gradient: tensor.
        slots: all states of the weight that it changes.

    Returns:
        False if nothing was done: this backend or device can't, blocks lie
        across the ends of rows, the step mixes elements as norms do or assigns
        to other variables, or, on a GPU, the weight stands in for one of 16
        bits or an overflow may undo the step.
    """
    if not slots or not _bridge_variables.assignments_are_traced():
        return False
    weight = slots[0].weight
    stored = (part for slot in slots for part in slot.parts.values())
    if not rows.can_run(gradient, (variable.dtype for variable in (weight, *stored))):
        return False
    if keras.distribution.distribution() is not None:
        return False
    # A kernel can't take along what computes its arguments: they would be written in float32, and read again. And one
    # that selects is no faster there (H100, GPT-2 small in mixed_float16: 23.5 ms a step, 23.2 on whole tensors).
    if rows.writes_in_place() and (_bridge_variables.is_stand_in(weight) or selection.current() is not None):
        return False
    if len({slot.state_format.block_size for slot in slots}) > 1 or not all(
        slot.state_format.has_rows(slot.shape) for slot in slots
    ):
        return False
    try:
        program = _recorded(step, gradient, weight, slots)
    except elementwise.NotElementwise:
        return False
    width = slots[0].state_format.block_size

    def of_rows(changed, read, scalars, target):
        old, *stored = changed
        values = [
            slot.state_format.decode_rows(dict(zip(slot.parts, parts, strict=True)), slot.is_signed, target)
            for slot, parts in zip(slots, _dealt(stored, slots), strict=True)
        ]
        new, *values = program.run([read[0], old, *values, *read[1:]], scalars)
        encoded = [
            slot.state_format.encode_rows(value, slot.is_signed, target)
            for slot, value in zip(slots, values, strict=True)
        ]
        return [new, *(part for parts in encoded for part in parts.values())]

    variables = [weight, *(part for slot in slots for part in slot.parts.values())]
    read = [gradient, *program.tensors]
    row_shapes = [(width,), *(shape for slot in slots for shape in slot.state_format.row_shapes.values())]
    selected = selection.current()
    rows.assign_replaced(
        of_rows,
        variables,
        read,
        [*row_shapes, *[(width,)] * len(read)],
        program.scalars,
        [table for slot in slots for table in slot.state_format.tables(slot.is_signed)],
        keep=None if selected is None else selected.condition,
        same=(program.operations, *((slot.state_format, slot.is_signed) for slot in slots)),
    )
    if selected is not None:
        for variable in variables:
            selected.decide(variable)
    return True


def _recorded(step, gradient, weight, slots):
    """Returns the step as a program of (gradient, weight, *values of slots), leaving all variables as they are."""

    def as_function(gradient, value, *values):
        weight.assign(value)
        for slot, value_of_slot in zip(slots, values, strict=True):
            slot.assign(value_of_slot)
        step(gradient)
        return [weight.value, *(slot.value for slot in slots)]

    values = [keras.KerasTensor(slot.shape, slot.dtype) for slot in slots]
    try:
        with _bridge_variables.assignments_undone() as assigned:
            program = elementwise.Program(as_function, gradient, weight.value, *values)
    finally:
        for slot in slots:
            slot.forget()
    if assigned - {id(weight)}:
        raise elementwise.NotElementwise("assigns to other variables")
    return program


def _dealt(parts, slots):
    """Yields as many of the parts, one after the other, as each slot has."""
    parts = iter(parts)
    for slot in slots:
        yield [next(parts) for _ in slot.parts]
