"""Keeps the states of any Keras optimizer in few bits."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import keras
from keras import ops

from keras_precision import _bridge, _bridge_optimizers, _bridge_variables
from keras_precision.optimizers import row_step, slot_files, slots, turns
from keras_precision.optimizers.packed_slot import PackedSlot
from keras_precision.optimizers.states import STATE_FORMATS, StateFormat
from keras_precision.optimizers.wrapper import OptimizerWrapper

FLOAT32 = "float32"
_CONSTANTS = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
# Rows of a table get gradients seldom and unevenly, which 8 bits were seen to make unstable (Dettmers et al. 2022, 2.3).
_EMBEDDINGS = (r"embeddings$", FLOAT32)


class _Choice(NamedTuple):
    """How a wrapper wants states stored."""

    state_format: StateFormat
    min_size: int
    overrides: tuple[tuple[str, str], ...]

    def of(self, variable) -> StateFormat | None:
        """Returns the format for a weight's states, None for float32; of overrides the last one that matches counts."""
        for pattern, name in reversed(self.overrides):
            if re.search(pattern, variable.path):
                return None if name == FLOAT32 else STATE_FORMATS[name]
        return self.state_format if math.prod(variable.shape) >= self.min_size else None


class PacksSlots(_bridge_optimizers.DecaysInStep):
    """Makes the slots of an optimizer packed ones (mixed in by `_bridge.specialise`).

    The variables that store them are the optimizer's own, in the places that
    its slots would have, so that gradient accumulation, replicas and compiled
    steps treat them as they would treat those.
    """

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        """Returns a slot for a weight: packed, or a variable as Keras makes it."""
        plain = super().add_variable_from_reference
        if not slots.is_state(self, name):
            return plain(reference_variable, name=name, initializer=initializer)
        vars(self)["_n_states"] = vars(self).get("_n_states", 0) + 1
        state_format = self._choice.of(reference_variable)
        if state_format is None:
            return plain(reference_variable, name=name, initializer=initializer)
        shape, is_signed = tuple(reference_variable.shape), slots.is_signed(self, name)
        initializer = keras.initializers.get(initializer)

        def initial(part):
            def value(shape_of_part, dtype):
                # Blocks of a constant are alike: the whole weight in float32 is not needed.
                if isinstance(initializer, _CONSTANTS):
                    block = state_format.encode_rows(initializer((1, state_format.block_size), "float32"), is_signed)
                    return ops.broadcast_to(ops.reshape(block[part], (-1,))[0], shape_of_part)
                return state_format.encode(initializer(shape, dtype="float32"), is_signed)[part]

            return value

        path = f"{reference_variable.path.replace('/', '_')}_{name}"
        parts = {
            part: self.add_variable(
                shape=facts.shape,
                initializer=initial(part),
                dtype=facts.dtype,
                name=f"{path}_{part}",
                layout=_bridge_variables.layout_along(reference_variable, facts.shape, facts.axes),
            )
            for part, facts in state_format.parts(shape).items()
        }
        slot = PackedSlot(name, path, reference_variable, state_format, is_signed, parts)
        self._packed_slots.append(slot)
        return slot

    def build(self, variables):
        """Makes the slots; what was assigned to them meanwhile is stored."""
        super().build(variables)
        self._flush()

    def update_step(self, gradient, variable, learning_rate):
        """Updates one weight and stores the states that it changed."""
        update = super().update_step

        def step(gradient):
            self.decay_now(variable)
            update(gradient, variable, learning_rate)

        place = _bridge_optimizers.index_of(self, variable)
        slots_of_weight = [x for x in self._packed_slots if _bridge_optimizers.index_of(self, x.weight) == place]
        if not row_step.update(step, gradient, slots_of_weight):
            step(gradient)
            turns.end([*self._flush(), ops.convert_to_tensor(variable)])

    def _flush(self):
        return [tensor for slot in self._packed_slots for tensor in slot.flush()]

    def save_own_variables(self, store):
        """Writes what `slot_files` says."""
        slot_files.write(store, self.entries)

    def load_own_variables(self, store):
        """Reads what this class or a plain optimizer wrote."""
        slot_files.read(store, self.entries)

    @property
    def entries(self) -> list[keras.Variable | PackedSlot]:
        """The optimizer's variables as if none was packed."""
        slot_of = {id(part): slot for slot in self._packed_slots for part in slot.parts.values()}
        found = [slot_of.get(id(variable), variable) for variable in self.variables]
        return list({id(entry): entry for entry in found}.values())


@keras.saving.register_keras_serializable(package="keras_precision")
class LowBit(OptimizerWrapper):
    """Wraps any Keras optimizer and keeps its moments in 8 or 4 bits (Dettmers et al. 2022, 8-bit optimizers).

    A step decodes a weight's states, runs the inner optimizer's own maths on
    them in float32, and encodes what it made of them, weight by weight. Of the
    states only codes and one float32 scale a block are kept. Averages of the
    weights and sums of accumulated gradients stay float32, as do slots of
    small weights and of embeddings.

    Args:
        inner_optimizer: a `keras.optimizers.Optimizer`, its name or config,
            not built yet.
        state_format: key of `STATE_FORMATS`: "dynamic8", "float8" or "dynamic4".
        block_size: elements that share a scale, a power of two; None for the
            format's own, 256 in 8 bits and 128 in 4.
        min_size: int >= 0; states of weights with fewer elements stay float32.
        overrides: (pattern, state format) pairs as `register` takes them.
        name: str.

    Raises:
        ValueError: an unknown format, a bad block size, an optimizer that is
            built or wrapped already; from `build`, an optimizer without
            states, or a weight that is not of floats.

    Example:
        >>> optimizer = LowBit(keras.optimizers.Adam(0.01))
        >>> layer = keras.layers.Dense(64, use_bias=False)
        >>> layer.build((None, 64))
        >>> optimizer.build(layer.trainable_variables)
        >>> [(v.dtype, tuple(v.shape)) for v in optimizer.variables[2:]]
        [('uint8', (4096,)), ('float32', (16,)), ('uint8', (4096,)), ('float32', (16,))]
    """

    def __init__(
        self,
        inner_optimizer,
        state_format: str = "dynamic8",
        block_size: int | None = None,
        min_size: int = 4096,
        overrides: list | tuple = (_EMBEDDINGS,),
        name: str | None = None,
    ):
        entry = _format(state_format)
        if block_size is not None:
            entry = entry.with_block_size(block_size)
        if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
            raise ValueError(f"Expected min_size to be an integer >= 0. Received: min_size={min_size!r}. Pass 4096.")
        inner = keras.optimizers.get(inner_optimizer)
        if isinstance(inner, PacksSlots) or _bridge_optimizers.wrapped(inner):
            raise ValueError(
                f"Expected an optimizer that is not wrapped. Received: {type(inner).__name__}. LowBit goes inside of "
                "LowPrecision and LossScaleOptimizer: pass their `inner_optimizer`, and wrap what comes of it."
            )
        if inner.built:
            raise ValueError("Expected an optimizer that is not built yet. Pass a new one; load its state afterwards.")
        settings = {"state_format": state_format, "block_size": block_size, "min_size": min_size}
        super().__init__(inner, name, **settings, overrides=[])
        self._entry = entry
        for pattern, override in overrides:
            self.register(pattern, override)

    def register(self, pattern: str, state_format: str = FLOAT32) -> None:
        """Overrides how the states of some weights are stored, whatever their size; before `build`.

        Args:
            pattern: regex searched in the weight's path.
            state_format: key of `STATE_FORMATS`, or "float32". Of patterns
                that match a weight the one registered last counts.

        Raises:
            ValueError: an unknown format, or the optimizer is built.
        """
        if self.built:
            raise ValueError("Expected to be called before the optimizer is built. Make a new one to register weights.")
        if state_format != FLOAT32:
            _format(state_format)
        self.overrides.append([pattern, state_format])

    def build(self, variables):
        """Makes the inner optimizer's slots for these weights.

        Args:
            variables: list of `keras.Variable`.
        """
        if self.built:
            return
        variables = list(variables)
        for variable in variables:
            if not keras.backend.is_float_dtype(variable.dtype):
                raise ValueError(
                    f"Expected weights of floats. Received: '{variable.path}' of dtype {variable.dtype}. "
                    "Leave it out: optimizers can't train it."
                )
        inner = self.inner_optimizer
        _bridge.specialise(inner, PacksSlots)
        vars(inner)["_packed_slots"] = []
        vars(inner)["_choice"] = _Choice(self._entry, self.min_size, tuple(map(tuple, self.overrides)))
        super().build(variables)
        if variables and not vars(inner).get("_n_states"):
            raise ValueError(
                f"Expected an optimizer with states. Received: {type(inner).__name__}, which has none as it is set. "
                "Use it without LowBit, or give it a momentum."
            )

    @property
    def packed_slots(self) -> list[PackedSlot]:
        """The states that are stored in few bits."""
        return list(vars(self.inner_optimizer).get("_packed_slots", ()))


def _format(name):
    if name not in STATE_FORMATS:
        raise ValueError(f"Expected state_format in {sorted(STATE_FORMATS)}. Received: state_format={name!r}.")
    return STATE_FORMATS[name]
