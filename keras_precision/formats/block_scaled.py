"""4-bit codes of a codebook with a scale per block."""

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_precision.formats import blocks, double_quant, packing, pieces
from keras_precision.formats.base import Codec, Part
from keras_precision.formats.codebook import Codebook
from keras_precision.kernels import dispatch
from keras_precision.kernels.layout import Layout


@dataclass(frozen=True, kw_only=True)
class BlockScaled(Codec):
    """Stores weight[i, j] as scale[i // block_size, j] * codebook[codes[i, j]].

    The scale is the block's greatest magnitude divided by the codebook's, so
    the error is at most half of the codebook's widest gap times the scale,
    beside float32's rounding. Where values reach farther below zero than above,
    the scale has the sign that takes the number of greatest magnitude there;
    then the error at the other end is at most the difference of the two ends.
    Codes are packed as in `packing.py`; k is padded
    to an even number with the code of zero.

    Attributes:
        codebook: values of the codes.
        has_signed_scale: True if their least is farther from zero than their
            greatest.
        has_double_quant: True to store the scales as 8-bit codes; see
            `double_quant.py` for their error.
    """

    codebook: Codebook
    has_signed_scale: bool = False
    has_double_quant: bool = False

    def parts(self, shape):
        """Returns codes uint8 (ceil(k / 2), n) and scale float32 (n_blocks, n), or what `double_quant` makes of it."""
        k, n = shape
        scale_shape = (blocks.count(k, self.block_size), n)
        codes = Part((-(-k // 2), n), "uint8", (0, 1))
        if self.has_double_quant:
            return {"codes": codes, **double_quant.parts(scale_shape)}
        return {"codes": codes, "scale": Part(scale_shape, "float32", (0, 1))}

    def encode(self, weight):
        """Returns the weight's parts; see `Codec.encode`."""
        weight = pieces.as_matrix(weight)
        k, n = weight.shape
        # All of k may lie in one block, and then the rest of it is not worth working on.
        block_size = min(self.block_size, 2 * -(-k // 2))
        codes = np.empty((-(-k // 2), n), "uint8")
        scale = np.empty((blocks.count(k, block_size), n), "float32")

        def encode_piece(run, grouped):
            own_scale = blocks.scale_of(blocks.absmax_of_piece(run, grouped), self._reach)
            if self.has_signed_scale:
                own_scale = np.where(np.asarray(run(blocks.leans_up, grouped)), 0 - own_scale, own_scale)
            return run(self.codebook.encode_packed, grouped, blocks.reciprocal(own_scale)), own_scale

        pieces.fill((codes, scale), encode_piece, weight, pieces.Grid.of((k, n), block_size, k * n >= pieces.LARGE))
        pieces.check_finite(scale, weight, block_size)
        return {"codes": codes, **(double_quant.encode(scale) if self.has_double_quant else {"scale": scale})}

    @property
    def _reach(self):
        """The magnitude of a code's value that a block's greatest magnitude gets."""
        return -self.codebook.array.min()

    def decode(self, parts, shape, dtype):
        """Returns the weight; see `Codec.decode`."""
        return self._decode(parts["codes"], self._scale(parts, shape), shape[0], dtype)

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight; see `Codec.matmul` and `kernels.weight_only.product`."""
        arrays = parts["codes"], double_quant.arrays(parts), self.layout(shape)
        return dispatch.matmul(x, *arrays, dtype, lambda to: self.decode(parts, shape, to))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Returns what kernels need to know of a weight (k, n)."""
        largest = float(blocks.largest_scale(self._reach)) if self.has_double_quant else None
        return Layout(shape, self.codebook.values, self.block_size, largest)

    def gather(self, parts, shape, indices, dtype):
        """Returns columns of the weight; see `Codec.gather`."""
        columns = ops.reshape(ops.cast(indices, "int32"), (-1,))
        codes = ops.take(parts["codes"], columns, axis=1)
        found = self._decode(codes, self._scale(parts, shape, columns), shape[0], dtype)
        return ops.reshape(ops.transpose(found), (*ops.shape(indices), shape[0]))

    def _scale(self, parts, shape, columns=None):
        if self.has_double_quant:
            n_blocks, largest = blocks.count(shape[0], self.block_size), blocks.largest_scale(self._reach)
            return double_quant.decode(parts, n_blocks, largest, columns)
        return parts["scale"] if columns is None else ops.take(parts["scale"], columns, axis=1)

    def _decode(self, packed, scale, k, dtype):
        values = self.codebook.decode(packing.unpack(packed, k))
        return ops.cast(values * blocks.spread(scale, self.block_size, k), dtype)
