"""What a warpgroup's lanes hold of a tile for Hopper's matrix units, in Pallas kernels for Mosaic GPU (JAX only).

A warpgroup has 4 warps, and each works on 16 rows of wgmma's left operand: the lane 4 g + t on rows g and g + 8 (PTX
ISA, "asynchronous warpgroup-level matrix instructions"). These are columns of the weight here, 2 g and 2 g + 1 of a
warp's 16, as they lie side by side in memory: `ldmatrix` brings a lane its codes of both, and it decodes them in place.
"""

from __future__ import annotations

from keras_precision.kernels import codes as code_values
from keras_precision.kernels import byte_table, decoded_words, lanes
from keras_precision.kernels.layout import Layout

OUTPUTS = 64
"""Of a warpgroup: columns of the weight, or rows of it where x is multiplied with its transpose."""


def depth_of(dtype: str) -> int:
    """Returns how many numbers an operand of a dtype contracts: as many as fit in a swizzled row of x."""
    import jax.numpy as jnp

    return lanes.SWIZZLE // jnp.dtype(dtype).itemsize


def decode(codes, scales, table, half, layout: Layout, dtype: str, interpret: bool):
    """Returns the left operand: weights rounded to `dtype`, or int8 codes as they are.

    Args:
        codes: reference to a swizzled tile in shared memory, (byte rows, 128).
        scales: reference to float32 (128,) in shared memory; None to leave them out.
        table: see `decoded_words.codes_of`.
        half: int32 scalar, 0 or 1: which half of the columns.
        layout: what the codes mean.
        dtype: "float16", "bfloat16", or `lanes.INT8`.
        interpret: True for what runs in Pallas's interpreter.

    Returns:
        Array (64, depth_of(dtype)).
    """
    if interpret:
        return _decode_anywhere(codes, scales, half, layout, dtype)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    is_int8 = dtype == lanes.INT8
    operand = plgpu.Layout.WGMMA_8BIT if is_int8 else plgpu.Layout.WGMMA
    shape = (OUTPUTS, depth_of(dtype))

    def in_lanes(context, codes, *others):
        lane, others = lanes.Lane(), iter(others)
        of_columns, of_bytes = (None if given is None else next(others) for given in (scales, table))
        if is_int8:
            registers = _bytes_as_they_are(codes, lane)
        else:
            registers = _decoded(codes, of_columns, of_bytes, lane, layout, dtype)
        return lanes.array(registers, shape, operand.to_mgpu(), dtype)

    references = [codes, *(other for other in (scales, table) if other is not None)]
    types = [plgpu.RefType(transforms("uint8")), *[plgpu.RefType()] * (len(references) - 1)]
    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=operand)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(in_lanes)(*references)


def fill(table, values, warps: int) -> None:
    """Fills a table of a codebook's values; see `byte_table.fill`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def in_lanes(context, table):
        byte_table.fill(table, values, warps)

    plgpu.inline_mgpu(arg_types=[plgpu.RefType()])(in_lanes)(table)


def add_product(sums, operand, of_x, interpret: bool) -> None:
    """Begins to add operand times the transposed x to sums, and waits until the product before this one is complete.

    Args:
        sums: accumulator (64, batch), float32 or int32; a reference to shared memory to be interpreted.
        operand: what `decode` returned.
        of_x: reference to a swizzled tile in shared memory, (batch, depth_of(dtype)).
        interpret: as in `decode`.
    """
    if interpret:  # Pallas's interpreter multiplies references only
        import jax.numpy as jnp

        sums[...] += jnp.dot(operand, of_x[...].T, preferred_element_type=sums.dtype)
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.wgmma(sums, operand, of_x.T)
    plgpu.wgmma_wait(1)


def write(out, sums, half, column_scales, row_scales, n_rows, dtype: str, interpret: bool) -> None:
    """Writes what was accumulated, times scales, where it belongs.

    Args:
        out: reference to (rows of x, 128) of `dtype` in global memory.
        sums: float32 or int32 (64, rows of x), laid out as wgmma leaves it.
        half: as in `decode`.
        column_scales: reference to float32 (128,) in global memory; None for ones.
        row_scales: reference to float32 (rows of x,) in global memory; None for ones.
        n_rows: int32 scalar, how many of the rows exist.
        dtype: "float16", "bfloat16" or "float32".
        interpret: as in `decode`.
    """
    references = [out, *(scales for scales in (column_scales, row_scales) if scales is not None)]
    if interpret:
        _write_anywhere(out, sums, half, column_scales, row_scales, n_rows, dtype)
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def from_lanes(context, *arguments):
        *references, sums, n_rows = arguments
        references = iter(references)
        out, columns, rows = (
            next(references) if is_given else None
            for is_given in (True, column_scales is not None, row_scales is not None)
        )
        _write(out, sums, columns, rows, n_rows, dtype)

    types = [plgpu.RefType()] * len(references) + [plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())]
    plgpu.inline_mgpu(arg_types=types)(from_lanes)(*references, sums, n_rows)


def transforms(dtype: str) -> tuple:
    """Returns how Mosaic GPU stores swizzled rows of a dtype in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, depth_of(dtype))), plgpu.SwizzleTransform(lanes.SWIZZLE)


def _decode_anywhere(codes, scales, half, layout, dtype):
    """As `decode`, with the columns in their order."""
    from jax.experimental import pallas as pl

    columns = pl.ds(half * OUTPUTS, OUTPUTS)
    packed = codes[:, columns]
    if dtype == lanes.INT8:
        return packed.T
    values = code_values.interpreted(packed, layout.values)
    return (values if scales is None else values * scales[columns][None]).astype(dtype).T


def _write_anywhere(out, sums, half, column_scales, row_scales, n_rows, dtype):
    from jax.experimental import pallas as pl

    columns = pl.ds(half * OUTPUTS, OUTPUTS)
    found = sums.astype("float32").T
    if column_scales is not None:
        found *= column_scales[columns][None]
    for row in range(found.shape[0]):

        @pl.when(row < n_rows)
        def _(row=row):
            scale = 1 if row_scales is None else row_scales[row]
            out[row, columns] = (found[row] * scale).astype(dtype)


# What a lane makes of a word: pairs of two rows, of which each weight is (place of its code, its column).
_PAIRS_OF_NIBBLES = [((2 * byte + 1, byte % 2), (2 * byte, byte % 2)) for byte in range(4)]
_PAIRS_OF_BYTES = [((column, column), (2 + column, column)) for column in range(2)]


def _decoded(tile, scales, table, lane, layout, dtype):
    """Returns the registers of `decode` for a 16-bit operand, in wgmma's order: 8 rows, of which each column's pair."""
    codes = decoded_words.codes_of(layout, lane, table)
    factors = [] if scales is None else lane.pair(scales, lane.column)
    make = decoded_words.rounded_pairs
    if decoded_words.multiplies_pairs(codes, dtype, bool(factors)):
        factors, make = [decoded_words.parts_of(factor) for factor in factors], decoded_words.multiplied_pairs
    is_packed = layout.codes_per_byte == 2
    pairs, row_of = (_PAIRS_OF_NIBBLES, lane.row_of_nibbles) if is_packed else (_PAIRS_OF_BYTES, lane.row_of_bytes)
    registers = []
    for first in range(0, depth_of(dtype) // layout.codes_per_byte, 32):
        for word in lane.matrices(tile, first, row_of):
            registers += make(codes, word, pairs, factors, dtype)
    return registers


def _bytes_as_they_are(codes, lane):
    """Returns the registers of `decode` for an int8 operand: 4 rows of a column each."""
    selectors = lane.if_upper_half(0x6420, 0x2064), lane.if_upper_half(0x7531, 0x3175)
    registers = []
    for first in range(0, depth_of(lanes.INT8), 32):
        words = lane.matrices(codes, first, lane.row_of_quads)
        for left, right in zip(words[::2], words[1::2], strict=True):
            for selector in selectors:
                registers += lanes.assembly(["prmt.b32 $0, $1, $2, $3;"], [left, right, selector], 1)
    return registers


def _write(out, sums, column_scales, row_scales, n_rows, dtype):
    from jaxlib.mlir import ir

    lane = lanes.Lane()
    float32, int32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    n_rows = lanes.scalar(n_rows)
    size = 4 if dtype == "float32" else 2
    row_bytes = ir.MemRefType(out.type).get_strides_and_offset()[0][0] * size
    twice_t = lanes.shift_left(lane.t, 1)
    first = lanes.pointer(out, lanes.add(lanes.times(lane.column, size), lanes.times(twice_t, row_bytes)))
    columns = None
    if column_scales is not None:
        columns = lane.pair(column_scales, lane.column)
    for eight, registers in enumerate(sums.registers.reshape(-1, 2)):
        for place in range(2):
            row = lanes.add(twice_t, 8 * eight + place)
            numbers = [lanes.extract(register, place) for register in registers]
            if numbers[0].type == int32:
                numbers = [lanes.operation("sitofp", float32, number) for number in numbers]
            if columns is not None:
                numbers = [lanes.operation("mulf", a, b) for a, b in zip(numbers, columns, strict=True)]
            if row_scales is not None:
                scale = lanes.load(row_scales, lanes.least(row, lanes.add(n_rows, -1)))
                numbers = [lanes.operation("mulf", number, scale) for number in numbers]
            lanes.store_pair(numbers, lanes.further(first, (8 * eight + place) * row_bytes), row, n_rows, dtype)
