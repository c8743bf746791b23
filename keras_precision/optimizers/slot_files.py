"""Optimizer files in which slots are packed: entries in the optimizer's order, each one variable or the parts of a slot."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_precision.optimizers.packed_slot import PackedSlot
from keras_precision.optimizers.states import STATE_FORMATS

FORMAT = "format"


def reads_packed(store, variables: Sequence[keras.Variable]) -> bool:
    """Reads a file into a plain optimizer's variables if it holds packed slots; returns whether it does."""
    is_packed = any(key.endswith(f".{FORMAT}") for key in store.keys())
    if is_packed:
        read(store, variables)
    return is_packed


def write(store, entries: Sequence[keras.Variable | PackedSlot]) -> None:
    """Writes a variable as "<place>", a slot as "<place>.<part>" and "<place>.format"."""
    for place, entry in enumerate(entries):
        if not isinstance(entry, PackedSlot):
            store[str(place)] = ops.convert_to_numpy(entry)
            continue
        for name, part in entry.parts.items():
            value = ops.convert_to_numpy(part)
            store[f"{place}.{name}"] = value.view("uint8") if value.dtype.itemsize == 1 else value
        store[f"{place}.{FORMAT}"] = np.frombuffer(_description(entry).encode(), "uint8")


def _description(slot):
    shape = ",".join(map(str, slot.shape))
    return (
        f"{slot.state_format.name}/{slot.state_format.block_size}/{'signed' if slot.is_signed else 'unsigned'}/{shape}"
    )


def read(store, entries: Sequence[keras.Variable | PackedSlot]) -> None:
    """Reads a packed file or one of a plain optimizer into variables and slots, packed or not.

    Raises:
        ValueError: the file is for other weights or another optimizer, or says a format that is unknown.
    """
    places = {key.partition(".")[0] for key in store.keys()}
    if places != {str(place) for place in range(len(entries))}:
        raise ValueError(
            f"Expected a file with {len(entries)} entries, the optimizer's variables. Received: one with {len(places)}. "
            "Load the file of an optimizer of the same class for the same weights."
        )
    for place, entry in enumerate(entries):
        if f"{place}.{FORMAT}" not in store.keys():
            _assign(entry, np.asarray(store[str(place)]))
            continue
        description = bytes(np.asarray(store[f"{place}.{FORMAT}"])).decode()
        if isinstance(entry, PackedSlot) and description == _description(entry):
            for name, part in entry.parts.items():
                _assign(
                    part, np.asarray(store[f"{place}.{name}"]).view(entry.state_format.parts(entry.shape)[name].dtype)
                )
            continue
        _assign(entry, _decoded(store, place, description))


def _decoded(store, place, description):
    name, block_size, signs, shape = description.split("/")
    if name not in STATE_FORMATS:
        raise ValueError(f"Expected a state format in {sorted(STATE_FORMATS)}. Received: a file with '{name}'.")
    state_format, shape = STATE_FORMATS[name].with_block_size(int(block_size)), tuple(map(int, shape.split(",")))
    parts = {
        part: ops.convert_to_tensor(np.asarray(store[f"{place}.{part}"]).view(facts.dtype))
        for part, facts in state_format.parts(shape).items()
    }
    return ops.convert_to_numpy(state_format.decode(parts, shape, signs == "signed"))


def _assign(entry, value):
    if tuple(entry.shape) != value.shape:
        raise ValueError(
            f"Expected '{entry.path}' of shape {tuple(entry.shape)}. Received: a file with {value.shape}. "
            "Load the file of an optimizer for the same weights."
        )
    entry.assign(value)
    if isinstance(entry, PackedSlot):
        entry.flush()
