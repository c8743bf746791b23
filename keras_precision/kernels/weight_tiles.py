"""What of a stored weight a program of `warpgroup` fetches in a step, and which operands that makes (JAX only).

A program has 128 outputs: columns of the weight, or rows of it where x is multiplied with the transposed weight. A step
takes as many rows, or columns, as its operands contract.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from keras_precision.kernels import byte_table, fragments, lanes, stored_scales, transposed_fragments
from keras_precision.kernels.layout import Layout

PROGRAM_OUTPUTS = 2 * fragments.OUTPUTS
"""Of a program: each of a pair of warpgroups has half of them."""


@dataclass(frozen=True)
class Tiles(abc.ABC):
    """What steps take.

    Steps count what `parts` operands contract, from 0, and programs count
    128 outputs each.

    Attributes:
        layout: of the weight.
        dtype: of what it is multiplied with.
        parts: operands a step, at least `least_parts`.
        axes: of the weight: the one that is contracted, the one that is left.
        depth: what an operand contracts.
        code_tiles: how many tiles of codes a step fetches, and their shape.
        scale_tile: the shape of its scales, blocks and columns; with blocks.
    """

    layout: Layout
    dtype: str
    parts: int
    axes: ClassVar[tuple[int, int]]
    least_parts: ClassVar[int]

    @property
    def has_table(self) -> bool:
        """Whether codes may be looked up in a `byte_table`."""
        return False

    @property
    def depth(self) -> int:
        return fragments.depth_of(self.dtype)

    @property
    @abc.abstractmethod
    def code_tiles(self) -> tuple[int, int, int]: ...

    @property
    @abc.abstractmethod
    def scale_tile(self) -> tuple[int, int]: ...

    @abc.abstractmethod
    def codes_at(self, step, program) -> list[tuple]:
        """Returns where the codes of each tile are."""

    @abc.abstractmethod
    def first_scale(self, step, program) -> tuple:
        """Returns the first block and the first column whose scales a step needs."""

    @abc.abstractmethod
    def operand(self, codes, scales, table, part: int, half, interpret: bool):
        """Returns the left operand of a product.

        Args:
            codes: reference to a step's tiles of codes.
            scales: reference to its scales; None to leave them out.
            table: see `decoded_words.codes_of`.
            part: which of the step's operands.
            half: int32 scalar, 0 or 1: which half of the outputs.
            interpret: True for what runs in Pallas's interpreter.
        """

    def scales_at(self, step, program) -> tuple:
        """Returns where the scales are that a step needs."""
        from jax.experimental import pallas as pl

        return tuple(map(pl.ds, self.first_scale(step, program), self.scale_tile))

    def stored_scales(self, codes, factors, step, program, interpret: bool) -> list[list]:
        """Returns what is stored of those scales, of double-quantized ones; see `stored_scales.read`.

        Args:
            codes: see there.
            factors: likewise.
            step: int32 scalar; beyond the last, something that exists.
            program: int32 scalar.
            interpret: as in `operand`.
        """
        block, column = self.first_scale(step, program)
        return [
            stored_scales.read(codes, factors, block + i, column + first, self.layout, interpret)
            for i, first in self._places_of_scales()
        ]

    def expanded_scales(self, stored, offset, table, interpret: bool) -> list[tuple]:
        """Returns what `stored_scales` found expanded: pairs (where they belong in the tile, 128 scales)."""
        from jax.experimental import pallas as pl

        return [
            ((i, pl.ds(first, PROGRAM_OUTPUTS)), stored_scales.expanded(own, offset, table, self.layout, interpret))
            for (i, first), own in zip(self._places_of_scales(), stored, strict=True)
        ]

    def _places_of_scales(self):
        n_blocks, n_columns = self.scale_tile
        return [(i, first) for i in range(n_blocks) for first in range(0, n_columns, PROGRAM_OUTPUTS)]


class Straight(Tiles):
    """For products with the weight."""

    axes, least_parts = (0, 1), 1

    @property
    def has_table(self):
        return self.layout.kind == "table" and byte_table.can_hold(self.layout.values)

    @property
    def code_tiles(self):
        return 1, self.parts * self._byte_rows, PROGRAM_OUTPUTS

    @property
    def scale_tile(self):
        # Blocks lie within a step, or steps within a block.
        return max(1, self.parts * self.depth // self.layout.block_size), PROGRAM_OUTPUTS

    def codes_at(self, step, program):
        from jax.experimental import pallas as pl

        rows = self.parts * self._byte_rows
        return [(pl.ds(step * rows, rows), pl.ds(program * PROGRAM_OUTPUTS, PROGRAM_OUTPUTS))]

    def first_scale(self, step, program):
        from jax import lax

        return lax.div(step * self.parts * self.depth, self.layout.block_size), program * PROGRAM_OUTPUTS

    def operand(self, codes, scales, table, part, half, interpret):
        from jax.experimental import pallas as pl

        own = codes.at[0, pl.ds(part * self._byte_rows, self._byte_rows)]
        of_block = None if scales is None else scales.at[part * self.scale_tile[0] // self.parts]
        return fragments.decode(own, of_block, table, half, self.layout, self.dtype, interpret)

    @property
    def _byte_rows(self):
        return self.depth // self.layout.codes_per_byte


class Transposed(Tiles):
    """For products with the transposed weight, which has blocks."""

    axes, least_parts = (1, 0), 2  # 128 bytes, a swizzled row of codes

    @property
    def code_tiles(self):
        return self.parts * self.depth // lanes.SWIZZLE, PROGRAM_OUTPUTS // self.layout.codes_per_byte, lanes.SWIZZLE

    @property
    def scale_tile(self):
        return max(1, PROGRAM_OUTPUTS // self.layout.block_size), self.parts * self.depth

    def codes_at(self, step, program):
        from jax.experimental import pallas as pl

        count, rows, columns = self.code_tiles
        return [(pl.ds(program * rows, rows), pl.ds((step * count + i) * columns, columns)) for i in range(count)]

    def first_scale(self, step, program):
        from jax import lax

        return lax.div(program * PROGRAM_OUTPUTS, self.layout.block_size), step * self.parts * self.depth

    def operand(self, codes, scales, table, part, half, interpret):
        from jax.experimental import pallas as pl

        columns = pl.ds(part * self.depth, self.depth)
        tile, first = divmod(part * self.depth, lanes.SWIZZLE)
        of_columns = scales.at[half if self.scale_tile[0] > 1 else 0, columns]
        return transposed_fragments.decode(codes.at[tile], of_columns, half, first, self.layout, self.dtype, interpret)
