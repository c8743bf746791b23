"""Writes machine code of a function of rows down for LLVM."""

from __future__ import annotations

import math
from typing import Any

from keras_precision.kernels.llvm_values import (
    ALIGNMENT,
    Uncompilable,
    address_of,
    call,
    constant,
    in_memory,
    itemsize,
    llvm_type,
    opaque,
    patterns,
    splat,
)
from keras_precision.kernels.row_function import Function
from keras_precision.kernels.row_operations import OPERATIONS, Operands

_LANES = 16  # float32 numbers of the widest vectors there are; LLVM splits them where a CPU's are narrower


def write(function: Function, module, name: str) -> Any:
    """Adds a function to an LLVM module that does this with rows; returns it.

    It goes through the rows one after the other, and through a row once and
    then again after each reduction, some numbers at a time. All of a row's
    numbers are read before any of the same place are written.

    Args:
        function: of a row.
        module: llvmlite's.
        name: of the function in it, which is called with the address of the
            pointers to the arguments' data and, after them, the results'
            (which may be the same), the first row and the row after the last.

    Raises:
        Uncompilable: no instruction is known for an operation with such
            dtypes, or widths don't divide each other.
    """
    return _Writer(function, module, name).function


class _Writer:
    def __init__(self, function, module, name):
        from llvmlite import ir

        self._read = function
        self._i64, self._pointer = ir.IntType(64), ir.PointerType()
        signature = ir.FunctionType(ir.VoidType(), [self._pointer, self._i64, self._i64])
        self.function = ir.Function(module, signature, name)
        self.function.linkage = "internal"
        self._build = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._lanes = math.gcd(_LANES, function.width)  # of the widest
        self._narrow = {}  # LLVM values by the nodes of width 1
        self._kept = self._rooms()
        self._write()

    def _rooms(self):
        """Returns rooms, by nodes, for what a walk through a row leaves to later ones."""
        kept = {}
        for node in self._read.nodes:
            for x in node.operands:
                if x.is_wide and x.value is None and x.phase < node.read_in and x not in kept:
                    kept[x] = opaque(self._build.alloca(in_memory(x.dtype), x.width))
                    kept[x].align = ALIGNMENT
        return kept

    def _write(self):
        build, (pointers, start, stop) = self._build, self.function.args
        n_arguments = len(self._read.arguments)
        data = [
            build.load(build.gep(pointers, [self._i64(i)], source_etype=self._pointer), typ=self._pointer)
            for i in range(n_arguments + len(self._read.results))
        ]
        self._arguments = list(zip(self._read.arguments, data[:n_arguments], strict=True))
        self._results = list(zip(self._read.results, data[n_arguments:], strict=True))
        for node, pointer in self._arguments:
            if node.phase < 0:
                self._narrow[node] = self._loaded(pointer, 0, node.dtype)
        self._write_narrow(-1)
        entry, head, body, end = build.block, *map(self.function.append_basic_block, ("rows", "row", "end"))
        build.branch(head)
        build.position_at_end(head)
        row = build.phi(self._i64)
        row.add_incoming(start, entry)
        build.cbranch(build.icmp_signed("<", row, stop), body, end)
        build.position_at_end(body)
        self._write_row(row)
        row.add_incoming(build.add(row, self._i64(1)), build.block)
        build.branch(head)
        build.position_at_end(end)
        build.ret_void()

    def _write_row(self, row):
        for node, pointer in self._arguments:
            if node.phase == 0 and not node.is_wide:
                self._narrow[node] = self._loaded(pointer, row, node.dtype)
        for phase in range(self._read.n_phases):
            self._write_narrow(phase)
            self._write_walk(phase, row)
        self._write_narrow(self._read.n_phases)
        for result, pointer in self._results:
            if result.width == 1:
                self._store(self._scalar(result.node), pointer, row, result.dtype)

    def _write_narrow(self, phase):
        for node in self._read.nodes:
            if node.phase == phase and not node.is_wide and not node.reduction:
                self._narrow[node] = self._computed(node, map(self._scalar, node.operands))

    def _write_walk(self, phase, row):
        """Writes a loop through a row's numbers."""
        build, before = self._build, self._build.block
        body, after = (self.function.append_basic_block(f"{x}{phase}") for x in ("walk", "walked"))
        build.branch(body)
        build.position_at_end(body)
        step = build.phi(self._i64)
        step.add_incoming(self._i64(0), before)
        totals = self._begun_totals(phase, before)
        place = _Place(self, row, step, phase)
        for node in self._read.nodes:
            if node.is_wide and node.phase == phase:
                place.known[node] = self._computed(node, (place.vector(x, node.width) for x in node.operands))
        for node, room in self._kept.items():
            if node.phase == phase:
                self._store(place.known[node], room, place.offset(node.width), node.dtype)
        for result, pointer in self._results:
            if result.width > 1 and max(result.node.phase, 0) == phase:
                here = place.in_array(result.width)
                self._store(place.vector(result.node, result.width), pointer, here, result.dtype)
        ends = {}
        for node, total in totals.items():
            (operand,) = node.operands
            both = [total, place.vector(operand, operand.width)]
            ends[node] = OPERATIONS[node.reduction.combine](Operands(build, both, [node.dtype] * 3, {}))
            total.add_incoming(ends[node], body)
        following = build.add(step, self._i64(1))
        step.add_incoming(following, body)
        build.cbranch(build.icmp_signed("<", following, self._i64(self._read.width // self._lanes)), body, after)
        build.position_at_end(after)
        for node, total in ends.items():
            name, is_vector = node.reduction.horizontal(node.dtype), self.lanes_of(node.operands[0].width) > 1
            self._narrow[node] = call(build, name, [total], total.type.element, [total.type]) if is_vector else total

    def _begun_totals(self, phase, before):
        """Returns the reductions of a walk, with what they come to so far."""
        totals = {}
        for node in self._read.nodes:
            if node.reduction and node.read_in == phase:
                type_ = llvm_type(node.dtype, self.lanes_of(node.operands[0].width))
                totals[node] = self._build.phi(type_)
                totals[node].add_incoming(constant(type_, node.reduction.start(node.dtype)), before)
        return totals

    def lanes_of(self, width):
        """Returns how many numbers of so wide a node are worked on at a time."""
        if width * self._lanes % self._read.width:
            raise Uncompilable(f"rows of {width} and of {self._read.width} numbers")
        return width * self._lanes // self._read.width

    def _computed(self, node, values):
        dtypes = [*(x.dtype for x in node.operands), node.dtype]
        return node.write(Operands(self._build, list(values), dtypes, node.params))

    def _scalar(self, node):
        return self._narrow[node] if node.value is None else constant(llvm_type(node.dtype), patterns(node.value)[0])

    def _address(self, pointer, place, dtype):
        place = self._i64(place) if isinstance(place, int) else place
        return self._build.gep(pointer, [place], source_etype=in_memory(dtype))

    def _loaded(self, pointer, place, dtype, lanes=1):
        address = self._address(pointer, place, dtype)
        value = self._build.load(address, typ=in_memory(dtype, lanes), align=itemsize(dtype))
        return self._build.trunc(value, llvm_type(dtype, lanes)) if dtype == "bool" else value

    def _store(self, value, pointer, place, dtype):
        if dtype == "bool":
            value = self._build.zext(value, in_memory(dtype, getattr(value.type, "count", 1)))
        self._build.store(value, self._address(pointer, place, dtype), align=itemsize(dtype))


class _Place:
    """Where a walk through a row is.

    Attributes:
        known: vectors of the numbers in this place, by their nodes.
    """

    def __init__(self, writer, row, step, phase):
        self._writer, self._row, self._step = writer, row, step
        self.known = {}
        for node, pointer in writer._arguments:
            if node.is_wide and phase == 0:
                self.known[node] = self._loaded(pointer, self.in_array(node.width), node)

    def offset(self, width):
        """Returns the place in a row of so many numbers."""
        return self._writer._build.mul(self._step, self._writer._i64(self._writer.lanes_of(width)))

    def in_array(self, width):
        """Returns the place in an array of such rows."""
        build = self._writer._build
        return build.add(build.mul(self._row, self._writer._i64(width)), self.offset(width))

    def vector(self, node, width):
        """Returns a node's numbers, for a node of so many."""
        writer = self._writer
        if not node.is_wide:
            return splat(writer._build, writer._scalar(node), writer.lanes_of(width))
        if node not in self.known:
            is_constant = node.value is not None
            numbers = address_of(writer._build.module, node.value) if is_constant else writer._kept[node]
            self.known[node] = self._loaded(numbers, self.offset(node.width), node)
        return self.known[node]

    def _loaded(self, pointer, place, node):
        return self._writer._loaded(pointer, place, node.dtype, self._writer.lanes_of(node.width))
