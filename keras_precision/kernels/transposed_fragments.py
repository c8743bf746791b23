"""What a warpgroup's lanes hold of a transposed weight's tile for Hopper's matrix units (JAX only; see `fragments`).

The left operand's rows g and g + 8 are rows 2 g and 2 g + 1 of a warp's 16 here: a byte has the 4-bit codes of both. Its
columns are the weight's, of which a lane t has 2 t and 2 t + 1 of each 8: two bytes side by side.
"""

from __future__ import annotations

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import decoded_words, fragments, lanes
from keras_precision.kernels.layout import Layout


def decode(codes, scales, half, first: int, layout: Layout, dtype: str, interpret: bool):
    """Returns the left operand: half of a tile's rows by 64 of its columns, rounded to `dtype`.

    Args:
        codes: reference to a swizzled tile in shared memory, 128 rows of the
            weight by 128 columns.
        scales: reference to float32 (64,) in shared memory, of the columns.
        half: int32 scalar, 0 or 1.
        first: of the columns, 0 or 64.
        layout: what the codes mean.
        dtype: "float16" or "bfloat16".
        interpret: True for what runs in Pallas's interpreter.

    Returns:
        Array (64, 64).
    """
    if interpret:
        return _decode_anywhere(codes, scales, half, first, layout, dtype)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, operand = (fragments.OUTPUTS, fragments.depth_of(dtype)), plgpu.Layout.WGMMA

    def in_lanes(context, codes, scales):
        registers = _decoded(codes, scales, lanes.Lane(), first, layout, dtype)
        return lanes.array(registers, shape, operand.to_mgpu(), dtype)

    types = [plgpu.RefType(fragments.transforms("uint8")), plgpu.RefType()]
    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=operand)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(in_lanes)(codes, scales)


def _decode_anywhere(codes, scales, half, first, layout, dtype):
    """As `decode`, with the rows in their order."""
    from jax.experimental import pallas as pl

    rows = fragments.OUTPUTS // layout.codes_per_byte
    packed = codes[pl.ds(half * rows, rows), pl.ds(first, fragments.depth_of(dtype))]
    return (code_values.interpreted(packed, layout.values) * scales[...][None]).astype(dtype)


# What a lane makes of two bytes: pairs of a row, of which each weight is (place of its code, its column).
_PAIRS_OF_NIBBLES = [((1, 0), (3, 1)), ((0, 0), (2, 1))]
_PAIRS_OF_BYTES = [((0, 0), (1, 1))]


def _decoded(tile, scales, lane, first, layout, dtype):
    """Returns the registers of `decode`, in wgmma's order: 8 columns, of which each row's pair."""
    codes = decoded_words.codes_of(layout, lane)
    pairs = _PAIRS_OF_NIBBLES if layout.codes_per_byte == 2 else _PAIRS_OF_BYTES
    rows, registers = 2 // len(pairs), []
    for column in range(0, fragments.depth_of(dtype), 8):
        factors = lane.pair(scales, lanes.add(lanes.shift_left(lane.t, 1), column))
        for row in range(rows):
            word = lane.two_bytes(tile, first + column, rows, row)
            registers += decoded_words.rounded_pairs(codes, word, pairs, factors, dtype)
    return registers
