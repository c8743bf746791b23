"""Touches what Keras does not document of variables: their dtype, their layout, and the layer that tracks them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import AutocastScope


def value_of(variable: keras.Variable) -> Any:
    """Returns a variable's value as a tensor, computed now if it is still to be initialized.

    While a model is built symbolically, variables wait for their initializers
    to run and operations would be recorded.
    """
    with _outside_of_graphs():
        if variable._value is None:
            return keras.ops.convert_to_tensor(variable._initializer(variable.shape, dtype=variable._dtype))
        return keras.ops.convert_to_tensor(variable._value)


def _outside_of_graphs():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    import jax

    return jax.ensure_compile_time_eval()


def remove_variable(layer: keras.Layer, attribute: str) -> keras.Variable:
    """Removes a variable from a layer and returns it; unlike `del layer.attribute` without collecting garbage."""
    variable = vars(layer)[attribute]
    layer._untrack_variable(variable)
    super(keras.Layer, layer).__delattr__(attribute)
    return variable


def add_part(
    layer: keras.Layer, of: keras.Variable, name: str, value: Any, axes: Sequence[int | None]
) -> keras.Variable:
    """Returns a new variable of a layer that is not trained, holding one part of what another variable held.

    Args:
        layer: built or being built.
        of: the variable that is stored in parts, still laid out as it was.
        name: of the part.
        value: array.
        axes: for each axis of the array, the axis of `of` that it runs along, or None.
    """
    variable = keras.Variable(
        lambda shape, dtype: keras.ops.convert_to_tensor(value, dtype),
        shape=value.shape,
        dtype=str(value.dtype),
        trainable=False,
        autocast=False,
        name=f"{of.name}_{name}",
        layout=layout_along(of, value.shape, axes),
    )
    variable._path = f"{of.path}_{name}"
    track(layer, variable)
    return variable


def add_overwritten(layer: keras.Layer, of: keras.Variable, name: str, shape: Sequence[int], initializer: str) -> None:
    """Gives a layer a float32 variable that optimizers overwrite by its gradient, as Keras's float8 layers have them.

    Args:
        layer: built or being built.
        of: the weight that it belongs to.
        name: of the variable and of the layer's attribute.
        shape: of the variable.
        initializer: name of one of Keras's.
    """
    with _unlocked(layer):
        variable = layer.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
            overwrite_with_gradient=True,
        )
        variable._path = f"{of.path.rpartition('/')[0]}/{name}"
        setattr(layer, name, variable)


def layout_along(of, shape, axes):
    """Returns the layout of a part of a variable: as the axes of the variable that it runs along, where they divide evenly."""
    layout = of._layout
    if not isinstance(layout, keras.distribution.TensorLayout):
        return None
    mesh = layout.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    along = [None if axis is None else layout.axes[axis] for axis in axes]
    kept = [name if name and size % sizes[name] == 0 else None for name, size in zip(along, shape, strict=True)]
    return keras.distribution.TensorLayout(kept, mesh)


def add_variable_like(layer: keras.Layer, attribute: str, value: Any, like: dict[str, Any]) -> keras.Variable:
    """Gives a layer a variable in the place of parts: the inverse of `remove_variable` and `add_part`.

    Args:
        layer: built.
        attribute: that the layer's class reads.
        value: tensor.
        like: what `facts_of` returned of the variable that was there.
    """
    facts = dict(like)
    path, regularizer, constraint = (facts.pop(name) for name in ("path", "regularizer", "constraint"))
    variable = keras.Variable(value, **facts)
    variable._path, variable.regularizer, variable.constraint = path, regularizer, constraint
    with _unlocked(layer):
        setattr(layer, attribute, variable)
    return variable


def facts_of(variable: keras.Variable) -> dict[str, Any]:
    """Returns what `add_variable_like` needs to know of a variable apart from its value."""
    return {
        "dtype": variable._dtype,
        "trainable": variable.trainable,
        "name": variable.name,
        "layout": variable._layout,
        "path": variable.path,
        "regularizer": variable.regularizer,
        "constraint": variable.constraint,
    }


def track(layer: keras.Layer, variable: keras.Variable) -> None:
    """Makes a variable one of a layer's own, built or not."""
    with _unlocked(layer):
        layer._track_variable(variable)


@contextlib.contextmanager
def _unlocked(layer) -> Iterator[None]:
    """Lets a layer that has built take variables."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    yield
    if locked:
        layer._tracker.lock()


def untrack(layer: keras.Layer, variable: keras.Variable) -> None:
    """Makes a variable none of a layer's own any longer."""
    layer._untrack_variable(variable)


def convert_variable(variable: keras.Variable, dtype: str) -> None:
    """Stores a variable in another dtype, keeping the object, its place and its sharding."""
    value = variable._value
    variable._dtype = keras.backend.standardize_dtype(dtype)
    if value is None:  # its initializer will run in the new dtype
        return
    if keras.backend.backend() == "tensorflow":
        # A tf.Variable's dtype is fixed, so the Keras variable gets a new one.
        variable._value = None
        variable._initialize(keras.ops.cast(keras.ops.convert_to_tensor(value), dtype))
    else:
        variable._value = keras.ops.cast(value, dtype)


def stand_in(variable: keras.Variable, dtype: str) -> keras.Variable:
    """Returns a variable that an optimizer takes for `variable`, in another dtype, its value not set yet.

    It has the same name, path, constraint and layout, so that slots are named and sharded alike.
    """
    twin = keras.Variable("zeros", shape=variable.shape, dtype=dtype, name=variable.name, layout=variable._layout)
    twin._path = variable.path
    twin.constraint = variable.constraint
    twin._stands_in = True
    return twin


def is_stand_in(variable: keras.Variable) -> bool:
    """Returns whether `stand_in` made a variable."""
    return getattr(variable, "_stands_in", False)


def release(variable: keras.Variable) -> None:
    """Frees a variable's array until the next assignment; only where arrays are values, not on TensorFlow."""
    variable._value, variable._initializer = None, keras.initializers.Zeros()


def tensor_of(variable: keras.Variable) -> Any:
    """Returns a variable's value as a tensor: on TensorFlow of the replica that asks, where `value` is a tf.Variable."""
    value = variable.value
    return value.read_value() if hasattr(value, "read_value") else value


def stored_tensor_of(variable: keras.Variable) -> Any:
    """Returns what `tensor_of` does, in the dtype that it is stored in, where layers' calls read it in the compute dtype."""
    with AutocastScope(None):
        return tensor_of(variable)


def assignments_are_traced() -> bool:
    """Returns whether compiled code may assign here: on JAX in a StatelessScope, on TensorFlow outside."""
    return in_stateless_scope() == (keras.backend.backend() == "jax")


@contextlib.contextmanager
def assignments_undone() -> Iterator[set[int]]:
    """Undoes what a block assigned in a StatelessScope, at its end; yields what will be the ids of those variables."""
    scope, assigned = get_stateless_scope(), set()
    if scope is None:
        yield assigned
        return
    before = dict(scope.state_mapping)
    try:
        yield assigned
    finally:
        assigned.update(key for key, value in scope.state_mapping.items() if before.get(key) is not value)
        scope.state_mapping = before
