"""How a slot of any shape is cut into blocks without crossing more of its axes than it must."""

import math
from dataclasses import dataclass
from functools import cached_property

from keras import ops


@dataclass(frozen=True)
class Folding:
    """A slot seen as (*lead, cols), with blocks along its last axis.

    Trailing axes are folded into one until its length is a multiple of
    block_size. The axes before it stay, so that what shards them shards codes
    and scales alike. If no product of trailing axes is such a multiple, all of
    them are folded and the last block is short.

    Attributes:
        shape: of the slot; at least one axis, none of length 0.
        block_size: elements a block, > 0.

    Raises:
        ValueError: a scalar, or an axis of length 0.

    Example:
        >>> Folding((64, 3, 128), 64).lead, Folding((64, 3, 128), 256).lead, Folding((3, 5), 256).n_blocks
        ((64, 3), (), 1)
    """

    shape: tuple[int, ...]
    block_size: int

    def __post_init__(self):
        if not math.prod(self.shape) or not self.shape:
            raise ValueError(
                "Expected the shape of a slot, with at least one axis and none of length 0. "
                f"Received: shape={self.shape}. Keep such a slot in float32."
            )

    @cached_property
    def n_lead_axes(self) -> int:
        """How many of the slot's axes are not folded; the first that is folded has this index."""
        for axis in reversed(range(len(self.shape))):
            if math.prod(self.shape[axis:]) % self.block_size == 0:
                return axis
        return 0

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that are not folded."""
        return self.shape[: self.n_lead_axes]

    @property
    def cols(self) -> int:
        """Elements along the folded axes."""
        return math.prod(self.shape[self.n_lead_axes :])

    @property
    def n_blocks(self) -> int:
        """Blocks along the folded axes."""
        return -(-self.cols // self.block_size)

    def split(self, x):
        """Returns a tensor with as many elements as the slot as (*lead, n_blocks, block_size), zeros in what is short."""
        # Only a slot without leading axes can have a short block.
        missing = self.n_blocks * self.block_size - self.cols
        if missing:
            x = ops.pad(ops.reshape(x, (self.cols,)), [[0, missing]])
        return ops.reshape(x, (*self.lead, self.n_blocks, self.block_size))

    def join(self, grouped):
        """Returns what `split` made as (*lead, cols)."""
        return ops.reshape(grouped, (*self.lead, self.n_blocks * self.block_size))[..., : self.cols]
