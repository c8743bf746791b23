"""What the arrays of a stored weight mean, and how kernels read its scales (JAX only)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from keras_precision.kernels import codes as code_values

SCALES_PER_BLOCK = 256
"""Double-quantized scales that share a factor, in the order of the transposed matrix."""


@dataclass(frozen=True)
class Layout:
    """What the arrays of a stored weight mean.

    The weight is scale[i // block_size, j] * values[codes[i, j]], or
    scale[j] * codes[i, j] where codes are numbers.

    Attributes:
        shape: (k, n).
        values: 16 numbers that 4-bit codes stand for, two codes a byte, the
            even row in the high nibble; None for int8 codes.
        block_size: rows that share a scale; None for one scale a column.
        largest_scale: what no double-quantized scale exceeds; None for float32
            scales.
    """

    shape: tuple[int, int]
    values: tuple[float, ...] | None = None
    block_size: int | None = None
    largest_scale: float | None = None

    @property
    def codes_per_byte(self) -> int:
        """Rows of the weight that a row of bytes holds."""
        return 1 if self.values is None else 2

    @property
    def kind(self) -> str:
        """What decides how codes are decoded: "bytes", "whole" (16 numbers a step of 1 apart) or "table"."""
        if self.values is None:
            return "bytes"
        return "whole" if code_values.are_whole(self.values) else "table"

    @property
    def blocks(self) -> int:
        """Blocks of rows; with a block size."""
        return -(-self.shape[0] // self.block_size)

    @property
    def byte_rows(self) -> int:
        """Rows of bytes."""
        return -(-self.shape[0] // self.codes_per_byte)


def vectors(scales) -> list:
    """Returns the arrays with at least one axis: kernels take no others."""
    return [scale.reshape(scale.shape or (1,)) for scale in scales]


def scales_at(arrays, block, column, layout: Layout):
    """Returns the float32 scales of blocks of rows.

    Args:
        arrays: of shape (n_blocks, n), float32; or uint8 codes, float32
            (n_groups,), (1,) and the (256,) table of double quantization. In a
            kernel, references to them.
        block: int32 tensor, of a shape that goes with that of `column`.
        column: int32 tensor, likewise.
        layout: what the arrays mean; with a block size.
    """
    codes, *others = arrays
    if layout.largest_scale is None:
        return codes[block, column]
    absmax, offset, table = others
    product = table[codes[block, column].astype("int32")] * absmax[group_of_scale(block, column, layout)]
    return expanded(product, offset[0], layout)


def expanded(product, offset, layout: Layout):
    """Returns float32 scales of double quantization, as `formats.double_quant.decode` makes them.

    Args:
        product: of the codes' values and their factors.
        offset: what was subtracted from all.
        layout: of the weight.
    """
    import jax.numpy as jnp

    largest = layout.largest_scale
    return jnp.maximum(jnp.minimum(product, largest - offset), -largest - offset) + offset


def group_of_scale(block, column, layout: Layout):
    """Returns which factor a double-quantized scale has."""
    return (column * layout.blocks + block) // SCALES_PER_BLOCK


def group_in_registers(t, block, column, layout: Layout):
    """Returns what `group_of_scale` does, of numbers that `t` computes with: `lanes`, or a `Thread`."""
    return t.shift_right(t.add(t.times(column, layout.blocks), block), SCALES_PER_BLOCK.bit_length() - 1)


def with_plain_scales(scales, layout: Layout):
    """Returns float32 (n_blocks, n) scales, and the layout of a weight that has them, of double-quantized ones."""
    import jax.numpy as jnp

    arrays = vectors(scales)
    n_blocks, n = arrays[0].shape
    found = scales_at(arrays, jnp.arange(n_blocks)[:, None], jnp.arange(n)[None], layout)
    return (found,), dataclasses.replace(layout, largest_scale=None)
