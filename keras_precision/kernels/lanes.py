"""A thread's place in a warpgroup, and what it does with registers and memory, written in MLIR and PTX (JAX only).

Functions are called while a Pallas kernel for Mosaic GPU is lowered, and add operations to it. They take and return
values of MLIR; int32 where nothing else is said.
"""

from __future__ import annotations

import numpy as np

PAIRS = {"float16": "f16x2", "bfloat16": "bf16x2"}
"""PTX's names of two 16-bit floats in a register, the first in the lower half."""
INT8 = np.dtype(np.int8).name
"""The dtype of codes that are multiplied with codes."""
SWIZZLE = 128
"""Bytes of a row in shared memory, whose parts of 16 change places from row to row so that banks don't collide."""


class Lane:
    """The place of a thread: numbers that are the same in each round of a loop, which the compiler finds out."""

    def __init__(self):
        thread = thread_index()
        self.warp = bits_and(shift_right(thread, 5), 7)  # of the two warpgroups of a pair
        self.lane = bits_and(thread, 31)
        self.t = bits_and(thread, 3)
        g = shift_right(self.lane, 2)
        self.column = add(shift_left(self.warp, 4), shift_left(g, 1))

    def matrices(self, codes, first, row_of):
        """Returns words of 4 matrices of 8 rows and 16 bytes, a byte pair of each of two rows a word.

        Args:
            codes: swizzled tile.
            first: of 32 rows.
            row_of: function of (matrix, place of a row in it), which returns
                the row of these 32 that is to be there. Its 8 rows must differ
                modulo 8, or banks collide.
        """
        row = row_of(shift_right(self.lane, 3), bits_and(self.lane, 7))
        part = exclusive_or(self.warp, bits_and(row, 7))
        offset = add(shift_left(row, 7), shift_left(part, 4))
        address = _as_integer(pointer(codes, add(offset, first * SWIZZLE)))
        text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
        return assembly([text], [address], 4, has_side_effects=True)

    def two_bytes(self, codes, column, rows, which):
        """Returns what a lane t has of 8 columns, bytes 2 t and 2 t + 1, as an int32.

        Args:
            codes: swizzled tile.
            column: the first of the 8.
            rows: that a lane has, 1 or 2, side by side: 8 or 16 a warp.
            which: of them.
        """
        row = add(times(add(shift_left(self.warp, 3), shift_right(self.lane, 2)), rows), which)
        part = exclusive_or(bits_and(row, 7), column >> 4)
        offset = add(add(shift_left(row, 7), shift_left(part, 4)), shift_left(self.t, 1))
        address = _as_integer(pointer(codes, add(offset, column & 15)))
        lines = [".reg .b16 both;", "ld.shared.b16 both, [$1];", "cvt.u32.u16 $0, both;"]
        return assembly(lines, [address], 1, has_side_effects=True)[0]

    def row_of_bytes(self, matrix, place):
        """Two rows after each other make a pair."""
        return add(shift_left(matrix, 3), place)

    def row_of_nibbles(self, matrix, place):
        """A byte is a pair itself; the next row of a lane is 4 bytes, 8 rows of the weight, further."""
        return add(shift_left(matrix, 3), add(shift_right(place, 1), shift_left(bits_and(place, 1), 2)))

    def row_of_quads(self, matrix, place):
        """A lane t needs rows 4 t to 4 t + 3 of 16 in two matrices; where t > 1 the first has the latter two."""
        t = shift_right(place, 1)
        is_swapped = exclusive_or(bits_and(matrix, 1), shift_right(t, 1))
        in_16 = add(add(shift_left(t, 2), bits_and(place, 1)), shift_left(is_swapped, 1))
        return add(shift_left(shift_right(matrix, 1), 4), in_16)

    def if_upper_half(self, no, yes):
        """Returns one of two ints, by whether t > 1."""
        from jaxlib.mlir.dialects import arith

        return arith.select(_is_set(self.lane, 2), integer(yes), integer(no))

    def pair(self, reference, place):
        """Returns two float32 numbers that follow each other in memory."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        both = llvm.load(ir.VectorType.get((2,), ir.F32Type.get()), pointer(reference, shift_left(place, 2)))
        return [extract(both, which) for which in range(2)]


def thread_index():
    """Returns a thread's number in its program."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, gpu

    return arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))


def choose(numbers, lane):
    """Returns the one of 16 floats whose place the lane's number modulo 16 is."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    left = [arith.constant(ir.F32Type.get(), number) for number in numbers]
    for bit in range(4):
        is_odd = _is_set(lane, 1 << bit)
        left = [arith.select(is_odd, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
    return left[0]


def array(registers, shape, layout, dtype):
    """Returns Mosaic GPU's array of 32-bit registers, in the order of its layout."""
    import jax.numpy as jnp
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    element = utils.dtype_to_ir_type(jnp.dtype(dtype))
    vector = ir.VectorType.get((32 // utils.bitwidth(element),), element)
    found = np.array([utils.bitcast(register, vector) for register in registers], dtype=object)
    return mgpu.FragmentedArray(
        _registers=found.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=True if jnp.issubdtype(dtype, jnp.integer) else None,
    )


def assembly(lines, inputs, n_results, has_side_effects=False):
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


def kept(constant: int):
    """Returns an int32 whose value compilers don't know: they copy known ones to a register before each use."""
    # No program has so many threads.
    lines = ["shr.u32 $0, $1, 16;", f"or.b32 $0, $0, {constant:#x};"]
    return assembly(lines, [thread_index()], 1)[0]


def store_pair(numbers, pointer, row, n_rows, dtype):
    """Stores two float32 numbers side by side, rounded, if row < n_rows."""
    text = ".reg .pred exists; .reg .b32 both; setp.lt.s32 exists, $3, $4;"
    if dtype == "float32":
        text += "@exists st.global.v2.f32 [$0], {$1, $2};"
    else:
        text += f"cvt.rn.{PAIRS[dtype]}.f32 both, $2, $1; @exists st.global.b32 [$0], both;"
    assembly([text], [pointer, *numbers, row, n_rows], 0, has_side_effects=True)


def expanded_scale(value, factor, offset, largest: float):
    """Returns the bits of the float32 scale that `layout.expanded` makes of a double-quantized one, as an int32."""
    bits = f"0f{np.float32(largest).view('uint32'):08x}"
    lines = [".reg .f32 above, below;", "mul.rn.f32 $0, $1, $2;"]
    lines += [f"sub.rn.f32 above, {bits}, $3;", "min.NaN.f32 $0, $0, above;"]
    lines += [f"neg.f32 below, {bits};", "sub.rn.f32 below, below, $3;", "max.NaN.f32 $0, $0, below;"]
    lines += ["add.rn.f32 $0, $0, $3;"]
    return assembly(lines, [value, factor, offset], 1)[0]


def load(reference, place):
    """Returns a float32 number of global memory."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.load(ir.F32Type.get(), pointer(reference, shift_left(place, 2)))


def load_byte(reference, place):
    """Returns a byte of global memory as an int32."""
    # LLVM would widen it by an instruction of its own, which waits for it.
    return assembly(["ld.global.u8 $0, [$1];"], [pointer(reference, place)], 1)[0]


def synchronize():
    """Waits for all threads of the warpgroup, whose writes to shared memory are then seen by each."""
    from jax.experimental.mosaic.gpu import utils

    utils.warpgroup_barrier()


def scalar(array):
    """Returns the one number of Mosaic GPU's array."""
    (register,) = array.registers.flat
    return register


def as_integer(number):
    """Returns an int32 with the bits of a float32 number."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.bitcast(number, ir.IntegerType.get_signless(32))


def pointer(reference, offset):
    """Returns the address so many bytes into a reference."""
    from jax.experimental.mosaic.gpu import utils

    return further(utils.memref_ptr(reference), offset)


def further(pointer, offset):
    """Returns the address so many bytes after another."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    dynamic = -(2**31)  # MLIR's mark for an index that is an operand
    byte = ir.IntegerType.get_signless(8)
    return llvm.getelementptr(pointer.type, pointer, [integer(offset)], [dynamic], byte, llvm.GEPNoWrapFlags.none)


def address(reference):
    """Returns where a reference to shared memory begins in it."""
    return _as_integer(pointer(reference, 0))


def _as_integer(pointer):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def extract(register, place):
    """Returns an element of a vector."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([place]))


def integer(value):
    """Returns an int32 of the program, of an int its lowest 32 bits."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    if not isinstance(value, int):
        return value
    return arith.constant(ir.IntegerType.get_signless(32), (value + 2**31) % 2**32 - 2**31)


def operation(name, *operands):
    """Returns what an operation of MLIR's dialect arith makes."""
    from jaxlib.mlir.dialects import arith

    return getattr(arith, name)(*operands)


def _is_set(value, bit):
    from jaxlib.mlir.dialects import arith

    return arith.cmpi(arith.CmpIPredicate.ne, bits_and(value, bit), integer(0))


def _of_integers(name):
    return lambda a, b: operation(name, integer(a), integer(b))


add, times, bits_and, exclusive_or = map(_of_integers, ("addi", "muli", "andi", "xori"))
quotient, remainder, least = map(_of_integers, ("divui", "remui", "minsi"))
shift_left, shift_right = map(_of_integers, ("shli", "shrui"))
