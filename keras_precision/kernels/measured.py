"""Which kernel multiplies how many rows fastest, as measured by `benchmarks/tune_matmul.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from keras_precision.kernels.one_thread import Warps
from keras_precision.kernels.row_product import Strip
from keras_precision.kernels.scaled_halves import Halves
from keras_precision.kernels.warpgroup import Slab
from keras_precision.kernels.weight_only import Tile
from keras_precision.kernels.weight_only_transposed import TransposedTile


@dataclass(frozen=True)
class Plan:
    """What to run for weights of one width of codes.

    Attributes:
        products: (greatest number of rows of activations, tile), ascending;
            more rows are multiplied with the decoded weight.
        decoding: the tile that decodes.
    """

    products: tuple[tuple[int, Strip | Tile], ...]
    decoding: Tile

    def product(self, rows: int) -> Strip | Tile | None:
        """Returns the tile for so many rows, None if the weight is to be decoded."""
        return first_for(rows, self.products)


def first_for(rows: int, products: tuple) -> Any:
    """Returns the tile of the first pair (greatest number of rows, tile) that goes so far, None if none does."""
    return next((tile for greatest, tile in products if rows <= greatest), None)


# One H100 80GB, jax 0.11.2, bfloat16, 2026-11-23. Other devices that have Triton use the same, unmeasured.
PLANS = {
    "whole": Plan(
        (
            (1, Strip(256, 4, 2, 4, 4)),
            (16, Tile(16, 128, 32, stages=3)),
            (32, Tile(32, 128, 32, stages=3, decodes_ahead=True)),
            (64, Tile(64, 64, 32, stages=3, decodes_ahead=True)),
            (128, Tile(128, 64, 32, stages=3, programs=224)),
        ),
        Tile(1, 128, 16),
    ),
    "table": Plan(
        (
            (1, Strip(256, 4, 2, 4, 4)),
            (16, Tile(16, 128, 32, stages=3)),
            (32, Tile(32, 128, 32, stages=3, decodes_ahead=True)),
            (64, Tile(64, 64, 32, stages=3, decodes_ahead=True)),
            (128, Tile(128, 64, 32, stages=3, programs=224)),
        ),
        Tile(1, 256, 16, warps=8),
    ),
    "bytes": Plan(
        (
            (1, Strip(256, 4, 2, 4, 4)),
            (16, Tile(16, 128, 32, stages=3, decodes_ahead=True)),
            (32, Tile(32, 128, 32, stages=3)),
            (64, Tile(64, 64, 32, stages=3)),
            (128, Tile(128, 128, 32, stages=3, programs=224)),
        ),
        Tile(1, 256, 32),
    ),
}

_FROM_17_ROWS = ((32, Slab(32, 4, 5, pairs=2)), (64, Slab(64, 4, 3, pairs=2)), (128, Slab(128, 2, 5)))
_BY_TABLE = ((32, Slab(32, 4, 4, pairs=2, tabled=True)), (64, Slab(64, 2, 5, pairs=2, tabled=True)))
_TO_128_ROWS = _FROM_17_ROWS[-1:]  # for which a table is no faster: nf4 31.6 us, 31.4 without
HOPPER_TILES = {
    "whole": ((16, Warps()), *_FROM_17_ROWS, (math.inf, Slab(256, 2, 3, cluster=2))),
    "table": ((16, Warps()), *_BY_TABLE, *_TO_128_ROWS, (math.inf, Slab(256, 1, 4, cluster=2, tabled=True))),
    "bytes": (
        (16, Warps(64, 8, 8, programs=264)),
        (64, Slab(64, 2, 5)),
        (128, Slab(128, 2, 4)),
        (math.inf, Slab(256, 1, 4, cluster=2)),
    ),
    "integers": (
        (16, Warps(64, 8, 8, programs=264)),
        (64, Slab(64, 1, 6)),
        (128, Slab(128, 1, 5)),
        (2048, Slab(256, 1, 4, cluster=2)),
        (math.inf, Slab(256, 1, 4, cluster=2, stays=False)),  # 1 to 3% less time at 4,096 rows, 2% more at 1,024
    ),
}
"""What Hopper multiplies 16-bit activations by, where it can, before any plan.

Kinds are those of `Layout`, those with double-quantized scales, and "integers", int8 codes times int8 codes.

Chosen by the kernel's time in profiles and in turn, from fewer candidates than a plan's: one H100 80GB, jax 0.11.2,
4096 x 14336, bfloat16, 2026-11-24. (In float16 nf4 takes 0.99 and 1.05 of a bfloat16 weight's time for 256 and 4,096
rows by the same, and without tables 1.03 and 1.13.)
"""
# With 16 rows nf4-dq takes 20.0 us so, and 23.1 by `Warps`.
_DOUBLE_QUANTIZED = ((8, Warps()), (16, Slab(16, 4, 4, pairs=2, tabled=True)))
HOPPER_TILES |= {
    f"double-quantized {kind}": (*_DOUBLE_QUANTIZED, *HOPPER_TILES[kind][1:]) for kind in ("whole", "table")
}

_ONE_ROW = ((1, Strip(256, 4, 2, 4, 4)),)
_FLOAT32 = (
    *_ONE_ROW,
    (16, Tile(16, 128, 32, stages=3, decodes_ahead=True)),
    (64, Tile(32, 128, 32, stages=3, decodes_ahead=True)),
)
FLOAT32_TILES = {"whole": _FLOAT32, "table": _FLOAT32, "bytes": _FLOAT32}
"""What multiplies float32 activations where the matmul precision is "highest"; see `TF32_TILES`.

In us, with 16, 32 and 64 rows: nf4 96, 135 and 265, decoded first 198, 262 and 279, a float32 weight 102, 169 and 185;
int4 98, - and 266; int8 87, 123 and 231, decoded by XLA 139, 234 and 287.
"""
_TF32 = (
    *_ONE_ROW,
    (16, Tile(16, 128, 32, stages=3)),
    (32, Tile(32, 128, 32, stages=3)),
    (64, Tile(64, 64, 32, stages=3)),
    (128, Tile(128, 64, 32, stages=3)),
)
TF32_TILES = {"whole": _TF32, "table": _TF32, "bytes": _ONE_ROW}
"""What multiplies float32 activations else; where there is no tile, the weight is decoded first.

The same device and shape, in us, with 16, 32, 64 and 128 rows: nf4 34, -, 98 and 126, int4 36, 60, 93 and 132, decoded
first 181 to 187, a float32 weight 82 to 89; int8 39, 51, 86 and 116, decoded by XLA 33, 44, 56 and 115.
"""
DECODED_BY_XLA = (("bytes", "float32"),)
"""Kinds of codes, and dtypes, that XLA decodes as fast as a kernel or faster, up to 64 rows while it multiplies.

int8 in TF32: 174 us with 256 rows, 432 with 1,024 and 1,426 with 4,096, decoded by a kernel 205, 430 and 1,420.
"""
HOPPER_TF32_TILES = {
    kind: (*_ONE_ROW, *((rows, Halves(tile)) for rows, tile in HOPPER_TILES[kind] if isinstance(tile, Slab)))
    for kind in PLANS
}
"""What Hopper multiplies them by: nf4 28 us with 32 rows, 33 with 64, 44 with 128, 62 with 256 (a float32 weight 98)."""

TRANSPOSED_SLABS = {
    "whole": (
        (16, Slab(16, 4, 5, pairs=2)),
        (64, Slab(64, 4, 3, pairs=2)),
        (128, Slab(128, 2, 4, cluster=2)),
        (2048, Slab(256, 2, 3, cluster=2)),
    ),
    "table": (
        (16, Slab(16, 4, 5, pairs=2)),
        (64, Slab(64, 4, 3, pairs=2)),
        (128, Slab(128, 2, 4, cluster=2)),
        (1024, Slab(256, 2, 3, cluster=2)),
    ),
    "bytes": (
        (16, Slab(16, 4, 3)),
        (64, Slab(64, 2, 5)),
        (256, Slab(128, 2, 4, cluster=2)),
        (1024, Slab(256, 2, 2, cluster=2)),
    ),
}
"""What Hopper multiplies 16-bit activations with a transposed weight by, where it can, and so gradients.

Chosen among 2 to 4 slabs for each number of rows by the time of 24 products in one function, on the same device. Decoding
first takes 100 us for 16 rows of nf4, 107 for 64, 110 for 256, 208 for 1,024 (with these 24, 29, 55, 189), and less than
the kernel for 2,048: 352, 363 (int4: 342, 324); int8 takes 212 for 1,024 (188) and 663 for 4,096 (728).
"""

_TRANSPOSED = (
    (16, TransposedTile(16, 32, 64, stages=1)),
    (32, TransposedTile(32, 32, 128)),
    (64, TransposedTile(64, 32, 64)),
)
_TRANSPOSED_BYTES = (
    (16, TransposedTile(16, 64, 128)),
    (32, TransposedTile(32, 64, 128)),
    (64, TransposedTile(64, 64, 128)),
)
TRANSPOSED_TILES = {"whole": _TRANSPOSED, "table": _TRANSPOSED, "bytes": _TRANSPOSED_BYTES}
"""What multiplies 16-bit activations with a transposed weight where no slab does, or the weight is decoded first.

In us, with 16, 32, 64 and 128 rows: nf4 45, 66, 65 and 85, decoded first 75, 77, 80 and 81; int4 the same; int8 49, 57, 66
and 94, decoded first 79, 81, 84 and 84; a bfloat16 weight 33, 35, 38 and 39. (H200, jax 0.11.2, 2026-11-30)
"""
_TRANSPOSED_TF32 = ((32, TransposedTile(16, 32, 128, stages=1)),)
TRANSPOSED_TF32_TILES = {"whole": _TRANSPOSED_TF32, "table": _TRANSPOSED_TF32, "bytes": ()}
"""The same of float32 activations.

In us, with 16, 32 and 64 rows: nf4 and int4 61, 120 and 166, decoded first 133, 134 and 142, a float32 weight 60, 63 and 68;
int8 69, 88 and 82, decoded by XLA 39, 42 and 53.
"""


def transposed_tiles(kind: str, dtype: str) -> tuple:
    """Returns pairs (greatest number of rows, tile) for a kind of codes and x of a dtype."""
    return (TRANSPOSED_TF32_TILES if dtype == "float32" else TRANSPOSED_TILES)[kind]


ROWS_OF_INTEGER_PARTS = 1024
"""From so many rows on int8 codes are multiplied in parts of so many rows (4096 rows: 1,094 us whole and, in another run, 496 so)."""

# k and n from which a layer's three products and the rounding of their operands take less time in float8 than in
# bfloat16. H100, 8,192 rows, jax 0.11.2, 2026-11-22, times faster: 1024 x 1024 0.80, 3072 x 768 0.80, 1024 x 4096 0.95,
# 4096 x 1040 0.86, 2048 x 2048 0.99, 2048 x 8192 1.23, 4096 x 4096 1.24, 4096 x 14336 1.48.
FEATURES_OF_FLOAT8 = 2048
