"""Touches what Keras does not document of whole models: how they are copied, built for a loss, and run op by op."""

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state, masking
from keras.src.models import Functional
from keras.src.saving import serialization_lib

_NAMES, _SEED = "object_name_uids", "global_seed_generator"


@contextlib.contextmanager
def session_kept() -> Iterator[None]:
    """Gives back, at the end of a block, what making and running layers changes: names still free, and random states."""
    names = copy.copy(global_state.get_global_attribute(_NAMES))
    generator = global_state.get_global_attribute(_SEED)
    seed = None if generator is None else keras.ops.convert_to_numpy(generator.state)
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        global_state.set_global_attribute(_NAMES, names)
        global_state.set_global_attribute(_SEED, generator)
        if generator is not None:
            generator.state.assign(seed)
        random.setstate(states[0])
        np.random.set_state(states[1])


def twin(model: keras.Layer, classes: dict[str, type]) -> keras.Layer:
    """Returns a new model made from a model's config, not compiled; its weights are new.

    Args:
        model: built.
        classes: name -> class, of the layers in it.

    Raises:
        NotImplementedError, TypeError, ValueError: the config can't be had or read.
    """
    stand_in = object.__new__(type(model))  # what `compile` got need not be serializable
    stand_in.__dict__.update(vars(model), compiled=False)
    config = serialization_lib.serialize_keras_object(stand_in)
    with keras.saving.custom_object_scope(classes):
        # In process, of a live model: its lambdas are no stranger's code.
        return serialization_lib.deserialize_keras_object(_uncompiled(config), safe_mode=False)


def _uncompiled(config):
    if isinstance(config, dict):
        return {key: _uncompiled(value) for key, value in config.items() if key != "compile_config"}
    return [_uncompiled(value) for value in config] if isinstance(config, list) else config


def build_for(model: keras.Model, x: Any, y: Any) -> None:
    """Builds a model, and the losses it is compiled with, for a batch."""
    model._symbolic_build(data_batch=(x, y))


def loss_of(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    """Returns the loss that a compiled model trains on: that of its outputs, and those that its layers add."""
    return model._compute_loss(x, y, y_pred, sample_weight, training=True)


def takes_training(model: keras.Layer) -> bool:
    """Returns whether `call` has a `training` argument."""
    return bool(model._call_has_training_arg)


def is_graph_of_layers(layer: keras.Layer) -> bool:
    """Returns whether a layer only calls other layers: functional and sequential models."""
    return isinstance(layer, Functional | keras.Sequential)


def carry_mask(source: Any, target: Any) -> None:
    """Gives a tensor the mask of another one."""
    mask = masking.get_keras_mask(source)
    if mask is not None:
        masking.set_keras_mask(target, mask)


def is_autocast(variable: keras.Variable) -> bool:
    """Returns whether layers read a variable in the dtype that they compute in."""
    return bool(variable._autocast)
