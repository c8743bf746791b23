"""Layers that compute in float32 where their policy says float16."""

from functools import lru_cache

import keras

# Each class sums, squares or rescales values that users feed it unscaled; float16 ends at 65504.
# Layers that Keras itself computes in float32 (LayerNormalization, BatchNormalization, ...) need no row.
SAFE_LAYERS: dict[type, str] = {
    keras.layers.UnitNormalization: "sums squares: inputs above 256 overflow, and the output becomes 0",
    keras.layers.Normalization: "takes raw features; a mean or variance above 65504 becomes inf",
    keras.layers.Rescaling: "takes raw values; inputs above 65504 become inf before they are scaled down",
    keras.layers.AveragePooling1D: "sums the window before it divides",
    keras.layers.AveragePooling2D: "sums the window before it divides",
    keras.layers.AveragePooling3D: "sums the window before it divides",
    keras.layers.GlobalAveragePooling1D: "sums all steps before it divides, and counts a mask in the same dtype",
    keras.layers.GlobalAveragePooling2D: "sums all positions before it divides",
    keras.layers.GlobalAveragePooling3D: "sums all positions before it divides",
}


def register_safe_layer(layer_class: type, reason: str) -> None:
    """Adds a layer class, and so its subclasses, to those computed in float32 under float16.

    Inputs are cast to float32 instead of float16, variables are stored in
    float32, and outputs are cast to the policy's output dtype.

    Args:
        layer_class: a subclass of `keras.Layer`.
        reason: str, what float16 does wrong, for the reader of the table.

    Raises:
        TypeError: `layer_class` is no layer class.

    Example:
        >>> class Energy(keras.layers.Layer):
        ...     def call(self, inputs):
        ...         return keras.ops.sum(keras.ops.square(inputs), axis=-1)
        >>> register_safe_layer(Energy, "sums squares")
        >>> Energy(dtype="mixed_float16").compute_dtype
        'float32'
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(f"Expected a subclass of keras.Layer. Received: {layer_class!r}. Pass the class, not a layer.")
    SAFE_LAYERS[layer_class] = reason
    is_safe.cache_clear()


@lru_cache(maxsize=None)
def is_safe(layer_class: type) -> bool:
    """Returns whether layers of this class compute in float32 under float16."""
    return any(base in SAFE_LAYERS for base in layer_class.__mro__)
