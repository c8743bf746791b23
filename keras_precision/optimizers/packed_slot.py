"""A slot variable that is stored in few bits."""

from __future__ import annotations

import keras
from keras import ops

from keras_precision import _bridge_variables
from keras_precision.optimizers import slot_codec, turns
from keras_precision.optimizers.states import StateFormat


class PackedSlot:
    """Stands for a float32 variable in an optimizer's code: decodes when it is read and encodes when it is flushed.

    What is assigned between flushes is kept as a tensor, so that a step reads
    what it has written without rounding, and a compiled step never writes the
    float32 values to memory.

    Args:
        name: of the slot.
        path: of the slot.
        weight: the variable that it is a state of.
        state_format: how it is stored.
        is_signed: False if it is never negative.
        parts: the variables that store it, as `state_format.parts` names them.
    """

    dtype = "float32"
    trainable = False

    def __init__(
        self, name, path, weight, state_format: StateFormat, is_signed: bool, parts: dict[str, keras.Variable]
    ):
        self.name = name
        self.path = path
        self.weight = weight
        self.shape = tuple(weight.shape)
        self.state_format = state_format
        self.is_signed = is_signed
        self.parts = parts
        self._value = None
        self._is_changed = False

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def value(self):
        """float32 tensor."""
        if self._value is None:
            tensors = {
                name: turns.after_the_last(_bridge_variables.tensor_of(part)) for name, part in self.parts.items()
            }
            self._value = slot_codec.decode(self.state_format, tensors, self.shape, self.is_signed)
        return self._value

    def assign(self, value):
        """Sets the value; it is stored at the next `flush`."""
        self._value = ops.broadcast_to(ops.cast(value, self.dtype), self.shape)
        self._is_changed = True
        return self

    def assign_add(self, value):
        """Adds to the value."""
        return self.assign(ops.add(self.value, value))

    def assign_sub(self, value):
        """Subtracts from the value."""
        return self.assign(ops.subtract(self.value, value))

    def scatter_update(self, slices):
        """Sets the rows of tf.IndexedSlices."""
        return self.assign(ops.scatter_update(self.value, ops.expand_dims(slices.indices, 1), slices.values))

    def scatter_add(self, slices):
        """Adds to rows."""
        return self.assign_add(ops.convert_to_tensor(slices))

    def scatter_sub(self, slices):
        """Subtracts from rows."""
        return self.assign_sub(ops.convert_to_tensor(slices))

    def flush(self) -> list:
        """Stores what was assigned, and forgets the float32 values; returns the tensors that were stored."""
        value, is_changed = self._value, self._is_changed
        self.forget()
        encoded = slot_codec.encode(self.state_format, value, self.is_signed) if is_changed else {}
        for name, tensor in encoded.items():
            self.parts[name].assign(tensor)
        return list(encoded.values())

    def forget(self) -> None:
        """Drops what was assigned and not stored."""
        self._value, self._is_changed = None, False

    def numpy(self):
        """Returns the value as a NumPy array."""
        return ops.convert_to_numpy(self.value)

    def __array__(self, dtype=None, copy=None):
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __jax_array__(self):
        return self.value

    def __tf_tensor__(self, dtype=None, name=None):
        return self.value if dtype is None else ops.cast(self.value, dtype)

    def __getitem__(self, index):
        return self.value[index]

    def __repr__(self):
        return f"<PackedSlot path={self.path}, shape={self.shape}, state_format={self.state_format.name}>"


def _operator(name):
    def apply(self, *others):
        return getattr(self.value, name)(*(getattr(o, "value", o) for o in others))

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _prefix in ("__", "__r"):
        setattr(PackedSlot, f"{_prefix}{_name}__", _operator(f"{_prefix}{_name}__"))
for _name in ("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(PackedSlot, _name, _operator(_name))
