"""8-bit integers with a scale per output channel."""

import dataclasses
import re
from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_precision.formats import blocks, pieces
from keras_precision.formats.base import Codec, Part, register_format
from keras_precision.kernels import reference

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

    def gather(self, parts, shape, indices, dtype):
        """Returns columns of the weight; see `Codec.gather`."""
        columns = ops.reshape(ops.cast(indices, "int32"), (-1,))
        found = {
            "codes": ops.take(parts["codes"], columns, axis=1),
            "scale": ops.take(parts["scale"], columns),
        }
        return ops.reshape(ops.transpose(self.decode(found, shape, dtype)), (*ops.shape(indices), shape[0]))


class Int8(Int8WeightOnly):
    """The same, multiplied with activations that are quantized to 8 bits, a scale per token."""

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight, both in 8 bits; see `kernels.reference.integer_matmul`."""
        return reference.integer_matmul(x, parts["codes"], parts["scale"], dtype)


@dataclass(frozen=True)
class LLMInt8(Int8WeightOnly):
    """The same, except that features of large activations are multiplied in 16 bits (Dettmers et al. 2022, LLM.int8()).

    Attributes:
        threshold: > 0; a feature in which any token's magnitude is greater is
            multiplied in the compute dtype with decoded weights.
    """

    threshold: float = 6.0

    def with_option(self, text):
        """Returns this format with the threshold that a mode's text after `/` gives.

        Args:
            text: plain decimal number in its shortest form.

        Raises:
            ValueError: it is no such number, or not positive.

        Example:
            >>> LLM_INT8.with_option("4.5").threshold
            4.5
        """
        # One policy, one name: "6.0", "06" and "6e0" are other names of "6".
        if not re.fullmatch(r"(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", text) or not 0 < float(text) < np.inf:
            raise ValueError(
                f"Invalid quantization mode. Expected '{self.name}/<threshold>' with a number > 0 in its shortest form. "
                f"Received: '{self.name}/{text}'. Pass '{self.name}/6', or '{self.name}', which means the same."
            )
        return dataclasses.replace(self, threshold=float(text))

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight, mostly in 8 bits; see `kernels.reference.mixed_integer_matmul`."""
        return reference.mixed_integer_matmul(x, parts["codes"], parts["scale"], self.threshold, dtype)


def _round(xp, grouped, reciprocal):
    return xp.cast(xp.round(grouped[0] * reciprocal * (np.float32(1) / blocks.UNIT)), "int8")


INT8 = register_format(Int8("int8", bits=8))
INT8_WEIGHT_ONLY = register_format(Int8WeightOnly("int8-weight-only", bits=8))
LLM_INT8 = register_format(LLMInt8("llm-int8", bits=8))
