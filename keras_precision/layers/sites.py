"""Which weights of which layers can be stored quantized, and along which axes they are contracted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras

from keras_precision.layers.products import DenseProduct, EinsumProduct, EmbeddingProduct

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A weight of a layer class.

    Attributes:
        attribute: where the class keeps the variable; left out where a layer has none.
        contracted: the axes that a product contracts, or what gives them for a layer.
    """

    attribute: str
    contracted: Axes | Callable[[keras.Layer], Axes]

    def axes(self, layer: keras.Layer) -> Axes:
        """Returns the axes that a product of this layer contracts."""
        return self.contracted(layer) if callable(self.contracted) else self.contracted


@dataclass(frozen=True)
class LayerSites:
    """All sites of a layer class.

    Attributes:
        sites: the weights.
        product: mixin whose `call` multiplies without decoding the whole
            weight, where the class's own `call` is in use; None to run that
            on the decoded weight.
    """

    sites: tuple[Site, ...]
    product: type | None = None


def _einsum_axes(layer):
    kernel, _, output = layer.equation.split(",")[1].partition("->")
    return tuple(place for place, letter in enumerate(kernel) if letter not in output)


def _spatial_and_input(layer):
    return tuple(range(layer.rank + 1))


def _spatial(layer):
    return tuple(range(layer.rank))


def _spatial_and_last(layer):  # transposed convolutions keep their filters before their input channels
    return (*range(layer.rank), layer.rank + 1)


_CELL = LayerSites((Site("kernel", (0,)), Site("recurrent_kernel", (0,))))
_CONV = LayerSites((Site("_kernel", _spatial_and_input),))
_CONV_TRANSPOSE = LayerSites((Site("kernel", _spatial_and_last),))
_DEPTHWISE = LayerSites((Site("kernel", _spatial),))
_SEPARABLE = LayerSites((Site("depthwise_kernel", _spatial), Site("pointwise_kernel", _spatial_and_input)))

# MultiHeadAttention, GroupQueryAttention and recurrent layers hold layers of these classes.
SITES: dict[type, LayerSites] = {
    keras.layers.Dense: LayerSites((Site("_kernel", (0,)),), DenseProduct),
    keras.layers.EinsumDense: LayerSites((Site("_kernel", _einsum_axes),), EinsumProduct),
    keras.layers.Embedding: LayerSites((Site("_embeddings", (1,)),), EmbeddingProduct),
    keras.layers.ReversibleEmbedding: LayerSites(
        (Site("_embeddings", (1,)), Site("reverse_embeddings", (0,))), EmbeddingProduct
    ),
    keras.layers.Conv1D: _CONV,
    keras.layers.Conv2D: _CONV,
    keras.layers.Conv3D: _CONV,
    keras.layers.Conv1DTranspose: _CONV_TRANSPOSE,
    keras.layers.Conv2DTranspose: _CONV_TRANSPOSE,
    keras.layers.Conv3DTranspose: _CONV_TRANSPOSE,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
    keras.layers.SimpleRNNCell: _CELL,
    keras.layers.LSTMCell: _CELL,
    keras.layers.GRUCell: _CELL,
}


def register_site(layer_class: type, attribute: str, contracted: Axes) -> None:
    """Makes a weight of a layer class quantizable.

    Args:
        layer_class: a subclass of `keras.Layer`; its subclasses inherit the site.
        attribute: where the class keeps the variable that `add_weight` gave.
        contracted: axes of the weight that a product contracts; the others
            get scales of their own.

    Raises:
        ValueError: no layer class, or the attribute is a site already.

    Example:
        >>> class Scaled(keras.layers.Layer):
        ...     def build(self, input_shape):
        ...         self.table = self.add_weight(shape=(input_shape[-1], 4))
        ...     def call(self, inputs):
        ...         return keras.ops.matmul(inputs, self.table)
        >>> register_site(Scaled, "table", contracted=(0,))
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise ValueError(f"Expected a subclass of keras.Layer. Received: {layer_class!r}.")
    present = sites_of_class(layer_class)
    known = present.sites if present else ()
    if any(site.attribute == attribute for site in known):
        raise ValueError(f"'{attribute}' of {layer_class.__name__} is a site already.")
    own = LayerSites((*known, Site(attribute, tuple(contracted))), present.product if present else None)
    SITES[layer_class] = own


def sites_of_class(layer_class: type) -> LayerSites | None:
    """Returns the sites of a layer class, its own or its nearest base's; None if it has none."""
    return next((SITES[cls] for cls in layer_class.__mro__ if cls in SITES), None)
