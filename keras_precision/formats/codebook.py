"""Sixteen values and the nearest of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from keras import ops

from keras_precision.formats import packing
from keras_precision.formats.blocks import TINY, UNIT


@dataclass(frozen=True)
class Codebook:
    """The values that 4-bit codes stand for.

    Attributes:
        values: 16 float32 numbers in the order of the codes, zero among them.
    """

    values: tuple[float, ...]

    @cached_property
    def array(self) -> np.ndarray:
        """float32 (16,): the values."""
        return np.array(self.values, "float32")

    @cached_property
    def order(self) -> np.ndarray:
        """uint8 (16,): codes by ascending value; of equal values the lesser code comes first."""
        return np.argsort(self.array, kind="stable").astype("uint8")

    @cached_property
    def midpoints(self) -> np.ndarray:
        """float32 (15,): half of the sum of each two neighbouring values, ascending."""
        ascending = self.array[self.order]
        return (ascending[:-1] + ascending[1:]) / np.float32(2)

    def encode(self, xp, grouped, reciprocal):
        """Returns the code of the value nearest to each number; of two as near that of the lesser.

        Of two zeros positive numbers get the code of the second, if they are
        normal.

        Args:
            xp: `keras.ops` or `host`.
            grouped: float32 array or tensor (n_blocks, block_size, n).
            reciprocal: float32 (n_blocks, n), `blocks.UNIT` divided by what a
                value of 1 stands for.

        Returns:
            uint8 array or tensor (n_blocks * block_size, n).
        """
        scaled = grouped * reciprocal[:, None]
        # XLA makes one pass of these 15 comparisons; a search or a table would read memory for each number.
        codes = self.order[0]
        for midpoint, step in zip(self.midpoints * UNIT, np.diff(self.order), strict=True):
            is_above = xp.cast(scaled > midpoint if midpoint else grouped >= TINY, "uint8")
            codes = codes + (is_above if step == 1 else is_above * step)  # modulo 256
        return xp.reshape(codes, (-1, grouped.shape[-1]))

    def encode_packed(self, xp, grouped, reciprocal):
        """Returns what `encode` does, two codes a byte; see `packing.py`."""
        return packing.pack(self.encode(xp, grouped, reciprocal))

    def decode(self, codes):
        """Returns the float32 values of a uint8 tensor of codes."""
        return ops.take(ops.convert_to_tensor(self.array), ops.cast(codes, "int32"))
