"""What each thread of a program does with registers and memory, in kernels for Mosaic GPU written thread by thread (JAX only).

Registers are MLIR's int32 values, also where they hold floats or pairs of 16-bit floats; offsets are bytes. Tests run
kernels with an object of the same methods that computes with arrays, an element a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras_precision.kernels import lanes


class Thread:
    """A thread; its methods add operations to the kernel that is lowered.

    Attributes:
        index: int32, the thread's number in its program.
    """

    def __init__(self):
        self.index = lanes.thread_index()

    add, times, shift_right = map(staticmethod, (lanes.add, lanes.times, lanes.shift_right))
    bits_and, exclusive_or = map(staticmethod, (lanes.bits_and, lanes.exclusive_or))
    quotient, remainder, least = map(staticmethod, (lanes.quotient, lanes.remainder, lanes.least))
    expanded_scale = staticmethod(lanes.expanded_scale)

    def is_less(self, value, end):
        """Returns 1 where value < end, 0 elsewhere."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        found = arith.cmpi(arith.CmpIPredicate.slt, lanes.integer(value), lanes.integer(end))
        return arith.extui(ir.IntegerType.get_signless(32), found)

    def load(self, reference, offset, constant: int, words: int, exists=None, keeps: bool = False) -> list:
        """Returns words of global memory that no one writes.

        Args:
            reference: to memory.
            offset: int32.
            constant: to be added to the offset.
            words: 1, 2 or 4, to whose size offsets are multiples.
            exists: 0 for zeros, in place of memory; None for 1.
            keeps: whether what is read stays in the cache next to the
                multiprocessor.
        """
        kind = "ld.global.nc" + ("" if keeps else ".L1::no_allocate.L2::256B") + {1: "", 2: ".v2", 4: ".v4"}[words]
        targets = ", ".join(f"${place}" for place in range(words))
        line = f"{kind}.b32 {f'{{{targets}}}' if words > 1 else targets}, [${words} + {constant}];"
        inputs = [lanes.pointer(reference, offset)]
        if exists is None:
            lines = [line]
        else:
            inputs.append(exists)
            lines = [".reg .pred exists;", f"setp.ne.s32 exists, ${words + 1}, 0;"]
            lines += [f"mov.b32 ${place}, 0;" for place in range(words)]
            lines += [f"@exists {line}"]
        found = lanes.assembly(lines, inputs, words, has_side_effects=True)
        return list(found)

    def permute(self, a, b, selector: int):
        """Returns 4 of the 8 bytes of a and b, the lowest named by the selector's lowest 4 bits."""
        return lanes.assembly([f"prmt.b32 $0, $1, $2, {selector};"], [lanes.integer(a), lanes.integer(b)], 1)[0]

    def pairs_subtracted(self, a, b, dtype: str):
        """Returns the differences of pairs of 16-bit floats."""
        return lanes.assembly([f"sub.rn.{lanes.PAIRS[dtype]} $0, $1, $2;"], [a, lanes.integer(b)], 1)[0]

    def multiplied(self, a, b):
        """Returns the product of float32 numbers."""
        return lanes.assembly(["mul.rn.f32 $0, $1, $2;"], [a, b], 1)[0]

    def added(self, a, b):
        """Returns the sum of float32 numbers."""
        return lanes.assembly(["add.rn.f32 $0, $1, $2;"], [a, b], 1)[0]

    def multiplied_and_added(self, a, b, c):
        """Returns a * b + c of float32 numbers, rounded once."""
        return lanes.assembly(["fma.rn.f32 $0, $1, $2, $3;"], [a, b, c], 1)[0]

    def choose(self, numbers: list[float], lane):
        """Returns the one of 16 float32 numbers whose place `lane` modulo 16 is."""
        return lanes.as_integer(lanes.choose(numbers, lane))

    def from_lane(self, value, lane):
        """Returns what a lane of the same warp has."""
        line = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return lanes.assembly([line], [value, lane], 1, has_side_effects=True)[0]

    def pair_of(self, low, high, dtype: str):
        """Returns two float32 numbers as a pair of 16-bit floats."""
        return lanes.assembly([f"cvt.rn.{lanes.PAIRS[dtype]}.f32 $0, $2, $1;"], [low, high], 1)[0]

    def zero(self):
        """Returns 0, as int32 and as float32."""
        return lanes.integer(0)

    def matrix_product(self, sums: list, a: list, b: list, dtype: str) -> list:
        """Returns sums (16, 8) + a (16, 16) times b (16, 8), which a warp's threads hold together.

        Of floats the thread 4 g + t has the pairs 2 t, 2 t + 1 of row g and of
        row g + 8 of a, and those 8 columns further of both, and the same pairs
        of column g of b; of int8 numbers, 4 t to 4 t + 3 of these rows and of
        this column. It has sums 2 t, 2 t + 1 of row g and of row g + 8, float32
        or int32 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
        """
        kinds = {"float16": "f32.f16.f16.f32", "bfloat16": "f32.bf16.bf16.f32", lanes.INT8: "s32.s8.s8.s32"}
        places = iter(range(4 + len(a) + len(b) + len(sums)))
        groups = (f"{{{', '.join(f'${next(places)}' for _ in group)}}}" for group in (sums, a, b, sums))
        line = f"mma.sync.aligned.m16n8k16.row.col.{kinds[dtype]} {', '.join(groups)};"
        return list(lanes.assembly([line], [*a, *b, *sums], 4))

    def number_of(self, integer):
        """Returns an int32 number as float32."""
        return lanes.assembly(["cvt.rn.f32.s32 $0, $1;"], [integer], 1)[0]

    def load_shared(self, reference, offset, constant: int = 0):
        """Returns a word of shared memory."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        place = lanes.further(lanes.pointer(reference, offset), constant)
        return llvm.load(ir.IntegerType.get_signless(32), place)

    def store_shared(self, reference, offset, value, constant: int = 0) -> None:
        """Stores a word in shared memory."""
        from jaxlib.mlir.dialects import llvm

        llvm.store(value, lanes.further(lanes.pointer(reference, offset), constant))

    def barrier(self) -> None:
        """Waits for all of the program's threads."""
        from jaxlib.mlir.dialects import gpu

        gpu.barrier()

    def loop(self, count: int, body: Callable[[Any, list], list], carried: list) -> list:
        """Returns what body(round, carried) makes of int32 numbers after so many rounds."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import scf

        if count == 1:
            return body(lanes.integer(0), carried)
        rounds = scf.ForOp(lanes.integer(0), lanes.integer(count), lanes.integer(1), carried)
        with ir.InsertionPoint(rounds.body):
            scf.YieldOp(body(rounds.induction_variable, list(rounds.inner_iter_args)))
        return list(rounds.results)

    def store_pair(self, reference, offset, numbers: list, exists, dtype: str) -> None:
        """Stores two float32 numbers side by side in global memory, rounded to a dtype, where exists is 1."""
        lanes.store_pair(numbers, lanes.pointer(reference, offset), lanes.integer(0), exists, dtype)
