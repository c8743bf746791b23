"""What a warpgroup's lanes hold of a tile for Hopper's matrix units, in Pallas kernels for Mosaic GPU (JAX only).

A warpgroup has 4 warps, and each works on 16 rows of wgmma's left operand: the lane 4 g + t on rows g and g + 8 (PTX ISA,
"asynchronous warpgroup-level matrix instructions"). These are columns of the weight here, 2 g and 2 g + 1 of a warp's
16, as they lie side by side in memory: `ldmatrix` brings a lane its codes of both, and it decodes them in place.
"""

from __future__ import annotations


import numpy as np

from keras_precision.kernels.layout import Layout

COLUMNS = 64
"""Columns of the weight that a warpgroup works on."""
SWIZZLE = 128
"""Bytes of a row in shared memory, whose parts of 16 bytes change places from row to row so that banks don't collide."""

_PAIRS = {"float16": "f16x2", "bfloat16": "bf16x2"}
_EVERY_LANE = "0xffffffff"
_WITHIN_16_LANES = "0x101f"


def rows_of(dtype: str) -> int:
    """Returns how many rows of the weight an operand of a dtype has: those of a swizzled row of x."""
    return SWIZZLE // np.dtype("uint8" if dtype == "int8" else "uint16").itemsize


def decode(codes, scales, warpgroup, layout: Layout, dtype: str, interpret: bool):
    """Returns the left operand: weights rounded to `dtype`, or int8 codes as they are.

    Args:
        codes: reference to a swizzled tile in shared memory, (byte rows, 128).
        scales: reference to float32 (128,) in shared memory; None to leave them out.
        warpgroup: int32 scalar, 0 or 1: which half of the columns.
        layout: what the codes mean.
        dtype: "float16", "bfloat16", or "int8".
        interpret: True for what runs in Pallas's interpreter.

    Returns:
        Array (64, rows_of(dtype)).
    """
    if interpret:
        return _decode_anywhere(codes, scales, warpgroup, layout, dtype)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    is_int8 = dtype == "int8"
    operand = plgpu.Layout.WGMMA_8BIT if is_int8 else plgpu.Layout.WGMMA
    shape = (COLUMNS, rows_of(dtype))

    def in_lanes(context, codes, *scales):
        registers = _bytes_as_they_are(codes) if is_int8 else _decoded(codes, scales, layout, dtype)
        return _array(registers, shape, operand.to_mgpu(), dtype)

    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=operand)
    references = [codes] if scales is None else [codes, scales]
    types = [plgpu.RefType(transforms("uint8")), plgpu.RefType()][: len(references)]
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(in_lanes)(*references)


def add_product(sums, operand, of_x, interpret: bool) -> None:
    """Begins to add operand times the transposed x to sums, and waits until the product before this one is complete.

    Args:
        sums: accumulator (64, batch), float32 or int32; a reference to shared memory to be interpreted.
        operand: what `decode` returned.
        of_x: reference to a swizzled tile in shared memory, (batch, rows_of(dtype)).
        interpret: as in `decode`.
    """
    if interpret:  # Pallas's interpreter multiplies references only
        import jax.numpy as jnp

        sums[...] += jnp.dot(operand, of_x[...].T, preferred_element_type=sums.dtype)
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.wgmma(sums, operand, of_x.T)
    plgpu.wgmma_wait(1)


def write(out, sums, warpgroup, column_scales, row_scales, n_rows, dtype: str, interpret: bool) -> None:
    """Writes what was accumulated, times scales, where it belongs.

    Args:
        out: reference to (rows of x, 128) of `dtype` in global memory.
        sums: float32 or int32 (64, rows of x), laid out as wgmma leaves it.
        warpgroup: as in `decode`.
        column_scales: reference to float32 (128,) in global memory; None for ones.
        row_scales: reference to float32 (rows of x,) in global memory; None for ones.
        n_rows: int32 scalar, how many of the rows exist.
        dtype: "float16", "bfloat16" or "float32".
        interpret: as in `decode`.
    """
    references = [out, *(scales for scales in (column_scales, row_scales) if scales is not None)]
    if interpret:
        _write_anywhere(out, sums, warpgroup, column_scales, row_scales, n_rows, dtype)
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

    return plgpu.TilingTransform((8, SWIZZLE // np.dtype(_NUMPY.get(dtype, dtype)).itemsize)), plgpu.SwizzleTransform(
        SWIZZLE
    )


_NUMPY = {"bfloat16": "uint16"}


def _decode_anywhere(codes, scales, warpgroup, layout, dtype):
    """As `decode`, with the columns in their order."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    columns = pl.ds(warpgroup * COLUMNS, COLUMNS)
    packed = codes[:, columns]
    if dtype == "int8":
        return packed.T
    if layout.values is None:
        values = packed.astype("float32")
    else:
        table = [jnp.float32(value) for value in layout.values]
        found = [
            sum(jnp.where(nibbles == place, value, 0.0) for place, value in enumerate(table))
            for nibbles in (packed >> 4, packed & 15)
        ]
        values = jnp.stack(found, axis=1).reshape(-1, COLUMNS)
    return (values if scales is None else values * scales[columns][None]).astype(dtype).T


def _write_anywhere(out, sums, warpgroup, column_scales, row_scales, n_rows, dtype):
    from jax.experimental import pallas as pl

    columns = pl.ds(warpgroup * COLUMNS, COLUMNS)
    found = sums.astype("float32").T
    if column_scales is not None:
        found *= column_scales[columns][None]
    for row in range(found.shape[0]):

        @pl.when(row < n_rows)
        def _(row=row):
            scale = 1 if row_scales is None else row_scales[row]
            out[row, columns] = (found[row] * scale).astype(dtype)


def _decoded(codes, scales, layout, dtype):
    """Returns the registers of `decode` for a 16-bit operand, in wgmma's order: 8 rows, of which each column's pair."""
    lane = _Lane()
    pair = lane.pair(scales[0], lane.column) if scales else None
    factors = [_extract(pair, place) for place in range(2)] if scales else []
    is_packed = layout.values is not None
    own = lane.choose([float(value) for value in layout.values]) if is_packed else None
    registers = []
    for first in range(0, rows_of(dtype) // layout.codes_per_byte, 32):
        for word in lane.matrices(codes, first, lane.row_of_nibbles if is_packed else lane.row_of_bytes):
            registers += _of_nibbles(word, own, factors, dtype) if is_packed else _of_bytes(word, factors, dtype)
    return registers


def _of_nibbles(word, own, factors, dtype):
    """Returns the pairs of weights of 4 bytes: those of both columns, and of both again 8 rows further.

    A codebook's value lies in the lane whose number modulo 16 is the code: two
    lookups in bytes of registers take a third more instructions (H100, 16 rows:
    27 us, 21 with lanes), and half of each no less.
    """
    lines = [".reg .b32 code;", ".reg .f32 even, odd;"]
    for byte in range(4):
        for name, shift in (("even", 8 * byte + 4), ("odd", 8 * byte)):
            lines += [f"shr.u32 code, $4, {shift};"]
            # Only the code's four bits count; those above are ignored.
            lines += [f"shfl.sync.idx.b32 {name}, $5, code, {_WITHIN_16_LANES}, {_EVERY_LANE};"]
            lines += [f"mul.f32 {name}, {name}, ${6 + byte % 2};"] if factors else []
        lines += [f"cvt.rn.{_PAIRS[dtype]}.f32 ${byte}, odd, even;"]
    return _assembly(lines, [word, own, *factors], 4)


def _of_bytes(word, factors, dtype):
    """Returns the pairs of weights of 4 int8 codes, which are those of both columns in two rows."""
    # A float32 with the code in its mantissa's low bits is 2**23 + 128 + the code, of which 2**23 + 128 is taken.
    lines = [".reg .b32 codes;", ".reg .f32 even, odd;", "xor.b32 codes, $2, 0x80808080;"]
    for column in range(2):
        for name, byte in (("even", column), ("odd", 2 + column)):
            lines += [f"prmt.b32 {name}, codes, 0x4b000000, 0x744{byte};", f"add.f32 {name}, {name}, 0fcb000080;"]
            lines += [f"mul.f32 {name}, {name}, ${3 + column};"] if factors else []
        lines += [f"cvt.rn.{_PAIRS[dtype]}.f32 ${column}, odd, even;"]
    return _assembly(lines, [word, *factors], 2)


def _bytes_as_they_are(codes):
    """Returns the registers of `decode` for an int8 operand: 4 rows of a column each."""
    lane = _Lane()
    selectors = lane.if_upper_half(0x6420, 0x2064), lane.if_upper_half(0x7531, 0x3175)
    registers = []
    for first in range(0, rows_of("int8"), 32):
        words = lane.matrices(codes, first, lane.row_of_quads)
        for left, right in zip(words[::2], words[1::2], strict=True):
            for selector in selectors:
                registers += _assembly(["prmt.b32 $0, $1, $2, $3;"], [left, right, selector], 1)
    return registers


def _write(out, sums, column_scales, row_scales, n_rows, dtype):
    from jaxlib.mlir import ir

    lane = _Lane()
    float32, int32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    (n_rows,) = n_rows.registers.flat
    size = 4 if dtype == "float32" else 2
    row_bytes = ir.MemRefType(out.type).get_strides_and_offset()[0][0] * size
    twice_t = _shift_left(lane.t, 1)
    first = _pointer(out, _add(_times(lane.column, size), _times(twice_t, row_bytes)))
    columns = None
    if column_scales is not None:
        pair = lane.pair(column_scales, lane.column)
        columns = [_extract(pair, place) for place in range(2)]
    for eight, registers in enumerate(sums.registers.reshape(-1, 2)):
        for place in range(2):
            row = _add(twice_t, 8 * eight + place)
            numbers = [_extract(register, place) for register in registers]
            if numbers[0].type == int32:
                numbers = [_operation("sitofp", float32, number) for number in numbers]
            if columns is not None:
                numbers = [_operation("mulf", a, b) for a, b in zip(numbers, columns, strict=True)]
            if row_scales is not None:
                scale = _load(row_scales, _operation("minsi", row, _operation("subi", n_rows, _integer(1))))
                numbers = [_operation("mulf", number, scale) for number in numbers]
            _store(numbers, _further(first, (8 * eight + place) * row_bytes), row, n_rows, dtype)


class _Lane:
    """The place of a thread: numbers that are the same in each round of a loop, which the compiler finds out."""

    def __init__(self):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, gpu

        thread = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
        self.warp = _and(_shift_right(thread, 5), 7)  # of the two warpgroups of a pair
        self.lane = _and(thread, 31)
        self.t = _and(thread, 3)
        g = _shift_right(self.lane, 2)
        self.column = _add(_shift_left(self.warp, 4), _shift_left(g, 1))

    def matrices(self, codes, first, row_of):
        """Returns words of 4 matrices of 8 rows and 16 bytes, a byte pair of each of two rows a word.

        Args:
            codes: swizzled tile.
            first: of 32 rows.
            row_of: function of (matrix, place of a row in it), which returns
                the row of these 32 that is to be there. Its 8 rows must differ
                modulo 8, or banks collide.
        """
        row = row_of(_shift_right(self.lane, 3), _and(self.lane, 7))
        part = _xor(self.warp, _and(row, 7))
        offset = _add(_shift_left(row, 7), _shift_left(part, 4))
        address = _as_integer(_pointer(codes, _add(offset, first * SWIZZLE)))
        text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
        return _assembly([text], [address], 4, has_side_effects=True)

    def row_of_bytes(self, matrix, place):
        """Two rows after each other make a pair."""
        return _add(_shift_left(matrix, 3), place)

    def row_of_nibbles(self, matrix, place):
        """A byte is a pair itself; the next row of a lane is 4 bytes, 8 rows of the weight, further."""
        return _add(_shift_left(matrix, 3), _add(_shift_right(place, 1), _shift_left(_and(place, 1), 2)))

    def row_of_quads(self, matrix, place):
        """A lane t needs rows 4 t to 4 t + 3 of 16 in two matrices; where t > 1 the first has the latter two."""
        t = _shift_right(place, 1)
        is_swapped = _xor(_and(matrix, 1), _shift_right(t, 1))
        in_16 = _add(_add(_shift_left(t, 2), _and(place, 1)), _shift_left(is_swapped, 1))
        return _add(_shift_left(_shift_right(matrix, 1), 4), in_16)

    def choose(self, numbers):
        """Returns the one of 16 floats whose place the lane's number modulo 16 is."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        left = [arith.constant(ir.F32Type.get(), number) for number in numbers]
        for bit in range(4):
            is_odd = _is_set(self.lane, 1 << bit)
            left = [arith.select(is_odd, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
        return left[0]

    def if_upper_half(self, no, yes):
        """Returns one of two ints, by whether t > 1."""
        from jaxlib.mlir.dialects import arith

        return arith.select(_is_set(self.lane, 2), _integer(yes), _integer(no))

    def pair(self, reference, place):
        """Returns two float32 numbers that follow each other in memory, as a vector."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        return llvm.load(ir.VectorType.get((2,), ir.F32Type.get()), _pointer(reference, _shift_left(place, 2)))


def _array(registers, shape, layout, dtype):
    """Returns Mosaic GPU's array of 32-bit registers, in the order of its layout."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    element = utils.dtype_to_ir_type(np.dtype(dtype) if dtype != "bfloat16" else _bfloat16())
    vector = ir.VectorType.get((32 // utils.bitwidth(element),), element)
    found = np.array([utils.bitcast(register, vector) for register in registers], dtype=object)
    return mgpu.FragmentedArray(
        _registers=found.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=True if dtype == "int8" else None,
    )


def _bfloat16():
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _assembly(lines, inputs, n_results, has_side_effects=False):
    """Returns 32-bit results of PTX, in which $0 is the first result and inputs follow the results."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    int32 = ir.IntegerType.get_signless(32)
    kinds = {int32: "r", ir.F32Type.get(): "f"}
    constraints = ["=&r"] * n_results + [kinds.get(x.type, "l") for x in inputs]
    results = {0: ir.Type.parse("!llvm.void"), 1: int32}.get(n_results) or llvm.StructType.get_literal(
        [int32] * n_results
    )
    text = "\n".join(["{", *lines, "}"])
    found = llvm.inline_asm(results, inputs, text, ",".join(constraints), has_side_effects=has_side_effects)
    if n_results > 1:
        return [llvm.extractvalue(int32, found, [place]) for place in range(n_results)]
    return [found][:n_results]


def _store(numbers, pointer, row, n_rows, dtype):
    """Stores two float32 numbers side by side, rounded, if row < n_rows."""
    text = ".reg .pred exists; .reg .b32 both; setp.lt.s32 exists, $3, $4;"
    if dtype == "float32":
        text += "@exists st.global.v2.f32 [$0], {$1, $2};"
    else:
        text += f"cvt.rn.{_PAIRS[dtype]}.f32 both, $2, $1; @exists st.global.b32 [$0], both;"
    _assembly([text], [pointer, *numbers, row, n_rows], 0, has_side_effects=True)


def _load(reference, place):
    """Returns a float32 number of global memory."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.load(ir.F32Type.get(), _pointer(reference, _shift_left(place, 2)))


def _pointer(reference, offset):
    """Returns the address so many bytes into a reference."""
    from jax.experimental.mosaic.gpu import utils

    return _further(utils.memref_ptr(reference), offset)


def _further(pointer, offset):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    dynamic = -(2**31)  # MLIR's mark for an index that is an operand
    byte = ir.IntegerType.get_signless(8)
    return llvm.getelementptr(pointer.type, pointer, [_integer(offset)], [dynamic], byte, llvm.GEPNoWrapFlags.none)


def _as_integer(pointer):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def _extract(register, place):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([place]))


def _integer(value):
    """Returns an int32 of the program."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.constant(ir.IntegerType.get_signless(32), value) if isinstance(value, int) else value


def _operation(name, *operands):
    from jaxlib.mlir.dialects import arith

    return getattr(arith, name)(*operands)


def _is_set(value, bit):
    from jaxlib.mlir.dialects import arith

    return arith.cmpi(arith.CmpIPredicate.ne, _and(value, bit), _integer(0))


def _of_integers(name):
    return lambda a, b: _operation(name, _integer(a), _integer(b))


_add, _times, _and, _xor = map(_of_integers, ("addi", "muli", "andi", "xori"))
_shift_left, _shift_right = map(_of_integers, ("shli", "shrui"))
