"""Which products of a model miss the tensor cores, because of their dimensions."""

from __future__ import annotations

import dataclasses

import keras

from keras_precision import _bridge, dtypes
from keras_precision.layers.quantized import is_quantized
from keras_precision.layers.sites import sites_of_class
from keras_precision.policies import resolve

# Tensor cores and matrix units read operands in pieces of 16 bytes: 8 values of 16 bits, 16 of 8 (NVIDIA, "Deep
# Learning Performance: Matrix Multiplication", section "Tensor Core Requirements").
_PIECE_BYTES = 16
# A smaller dimension costs little time either way, and padding it adds a large part: ten classes, three colours.
SMALLEST_THAT_MATTERS = 64


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A dimension of a product that is no multiple of what the hardware reads at once.

    Attributes:
        weight: name of the weight.
        size: the dimension.
        multiple: what it should be a multiple of.
    """

    weight: str
    size: int
    multiple: int

    @property
    def padded(self) -> int:
        """The next size that is one."""
        return -(-self.size // self.multiple) * self.multiple


def unaligned(layer: keras.Layer) -> tuple[Dimension, ...]:
    """Returns the dimensions of a layer's products that are no multiples of 8 (16 where 8-bit values are multiplied).

    Of a convolution these are the channels in and out. float32 needs no alignment, lookups and depthwise convolutions
    are no products.

    Args:
        layer: built; quantized or not.
    """
    sites = sites_of_class(_bridge.original_class(type(layer)))
    if sites is None or not layer.built or _makes_no_products(layer):
        return ()
    found: list[Dimension] = []
    encoded_weights = layer.encoded_weights if is_quantized(layer) else {}
    for site in sites.sites:
        encoded = encoded_weights.get(site.attribute)
        weight = vars(layer).get(site.attribute) if encoded is None else encoded
        multiplies_codes = encoded is not None and encoded.codec.multiplies_codes
        operand_bytes = 1 if multiplies_codes else dtypes.nbytes(resolve(layer).compute_dtype)
        if weight is None or operand_bytes > 2:
            continue
        multiple = _PIECE_BYTES // operand_bytes
        sizes = _dimensions(layer, site, tuple(weight.shape))
        found += [Dimension(site.attribute.removeprefix("_"), size, multiple) for size in sizes if size % multiple]
    return tuple(dict.fromkeys(found))


def _makes_no_products(layer):
    is_lookup = isinstance(layer, keras.layers.Embedding) and not isinstance(layer, keras.layers.ReversibleEmbedding)
    return is_lookup or isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D)


def _dimensions(layer, site, shape):
    if hasattr(layer, "rank"):  # a convolution, contracted over positions too
        return shape[-2:]
    contracted = site.axes(layer)
    sizes = [1, 1]
    for axis, size in enumerate(shape):
        sizes[axis not in contracted] *= size
    return sizes
