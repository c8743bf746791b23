"""8-bit integers with a scale per output channel."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_precision.formats import blocks, pieces
from keras_precision.formats.base import Codec, Part, register_format
from keras_precision.kernels import dispatch, reference
from keras_precision.kernels.layout import Layout

_REACH = np.float32(127)


@dataclass(frozen=True)
class Int8WeightOnly(Codec):
    """Stores weight[i, j] as scale[j] * codes[i, j], codes in [-127, 127].

    The scale is the column's greatest magnitude divided by 127, so the error is
    at most half of it, beside float32's rounding. What is multiplied are the
    decoded weights.
    """

    def parts(self, shape):
        """Returns codes int8 (k, n) and scale float32 (n,)."""
        k, n = shape
        return {"codes": Part((k, n), "int8", (0, 1)), "scale": Part((n,), "float32", (1,))}

    def encode(self, weight):
        """Returns the weight's parts; see `Codec.encode`."""
        weight = pieces.as_matrix(weight)
        k, n = weight.shape
        # So few operations take NumPy less time than copying the weight for XLA, unless it lies there already.
        grid = pieces.Grid.of((k, n), 1, is_compiled=not isinstance(weight, np.ndarray))
        grid = dataclasses.replace(grid, block_size=grid.rows)
        absmax = np.empty((blocks.count(k, grid.rows), n), "float32")
        pieces.fill((absmax,), lambda run, grouped: (blocks.absmax_of_piece(run, grouped),), weight, grid)
        pieces.check_finite(absmax, weight, grid.rows)
        scale = blocks.scale_of(absmax.max(axis=0), _REACH)
        codes = np.empty((k, n), "int8")
        reciprocal = blocks.reciprocal(scale)[None]
        pieces.fill((codes,), lambda run, *arguments: (run(_round, *arguments),), weight, grid, (reciprocal,))
        return {"codes": codes, "scale": scale}

    def decode(self, parts, shape, dtype):
        """Returns the weight; see `Codec.decode`."""
        return reference.decode_columns(parts["codes"], parts["scale"], dtype)

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight; see `Codec.matmul` and `kernels.weight_only.product`."""
        arrays = parts["codes"], [parts["scale"]], self.layout(shape)
        return dispatch.matmul(x, *arrays, dtype, lambda to: self.decode(parts, shape, to))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Returns what kernels need to know of a weight (k, n)."""
        return Layout(shape)

    def gather(self, parts, shape, indices, dtype):
        """Returns columns of the weight; see `Codec.gather`."""
        columns = ops.reshape(ops.cast(indices, "int32"), (-1,))
        found = {
            "codes": ops.take(parts["codes"], columns, axis=1),
            "scale": ops.take(parts["scale"], columns),
        }
        return ops.reshape(ops.transpose(self.decode(found, shape, dtype)), (*ops.shape(indices), shape[0]))


def _round(xp, grouped, reciprocal):
    return xp.cast(xp.round(grouped[0] * reciprocal * (np.float32(1) / blocks.UNIT)), "int8")


INT8_WEIGHT_ONLY = register_format(Int8WeightOnly("int8-weight-only", bits=8))
