"""LLVM instructions of JAX's elementwise operations: one line each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_precision.kernels.llvm_values import (
    Uncompilable,
    address_of,
    bits,
    call,
    constant,
    llvm_type,
    shuffled,
    splat,
)

_CONTRACT = ("contract",)  # a product and a sum may be rounded once, as in what XLA compiles for a CPU
_MOST_FACTORS = 8
_FLOAT, _SIGNED, _UNSIGNED = range(3)
_WIDTHS = (8, 16, 32, 64)
_KINDS = {"float32": _FLOAT, "bool": _UNSIGNED}
_KINDS |= {f"int{width}": _SIGNED for width in _WIDTHS} | {f"uint{width}": _UNSIGNED for width in _WIDTHS}


class Operands(NamedTuple):
    """What an operation is written with.

    Attributes:
        build: llvmlite's builder.
        values: LLVM values, all scalars or all vectors of one length.
        dtypes: of the values, and of the result last.
        params: of JAX's primitive.
    """

    build: Any
    values: Sequence[Any]
    dtypes: Sequence[str]
    params: dict[str, Any]


def _kind(dtype):
    """Returns which instructions compute with a dtype."""
    if dtype not in _KINDS:
        raise Uncompilable(f"arithmetic in {dtype}")
    return _KINDS[dtype]


def _named(of_floats, of_integers):
    """An instruction of floats or one of integers."""

    def write(x):
        if _kind(x.dtypes[0]) == _FLOAT:
            return getattr(x.build, of_floats)(*x.values, flags=_CONTRACT)
        return getattr(x.build, of_integers)(*x.values)

    return write


def _of_floats(write):
    def checked(x):
        if _kind(x.dtypes[0]) != _FLOAT:
            raise Uncompilable(f"an operation of floats on {x.dtypes[0]}")
        return write(x)

    return checked


def _of_integers(name):
    def write(x):
        if _kind(x.dtypes[0]) == _FLOAT:
            raise Uncompilable(f"{name} of {x.dtypes[0]}")
        return getattr(x.build, name)(*x.values)

    return write


def _intrinsic(name):
    """An intrinsic function of floats that returns their type."""
    return _of_floats(lambda x: call(x.build, name, x.values, x.values[0].type, [x.values[0].type]))


def _extreme(*names):
    """An intrinsic function of floats, one of signed integers or one of unsigned ones."""

    def write(x):
        type_, kind = x.values[0].type, _kind(x.dtypes[0])
        # Which of two zeros is greater takes more instructions to tell than all else.
        return call(x.build, names[kind], x.values, type_, [type_], ("nsz",) if kind == _FLOAT else ())

    return write


def _compare(sign):
    def write(x):
        of_floats = x.build.fcmp_unordered if sign == "!=" else x.build.fcmp_ordered  # NaN differs from all numbers
        compare = of_floats, x.build.icmp_signed, x.build.icmp_unsigned
        return compare[_kind(x.dtypes[0])](sign, *x.values)

    return write


def _absolute(x):
    (value,), kind = x.values, _kind(x.dtypes[0])
    if kind == _FLOAT:
        return call(x.build, "llvm.fabs", [value], value.type, [value.type])
    if kind == _UNSIGNED:
        return value
    is_negative = x.build.icmp_signed("<", value, constant(value.type, 0))
    return x.build.select(is_negative, x.build.neg(value), value)


def _shifted(name):
    """JAX defines what is left when all bits are shifted out; LLVM doesn't."""

    def write(x):
        value, count = x.values
        last = constant(value.type, bits(x.dtypes[0]) - 1)
        is_within = x.build.icmp_unsigned("<=", count, last)
        shifted = getattr(x.build, name)(value, x.build.select(is_within, count, last))
        return shifted if name == "ashr" else x.build.select(is_within, shifted, constant(value.type, 0))

    return write


def _sign(x):
    (value,) = x.values
    zero, one = (constant(value.type, number) for number in (0, 1))
    signed = call(x.build, "llvm.copysign", [one, value], value.type, [value.type])
    # Zeros and NaN are their own.
    return x.build.select(x.build.fcmp_ordered("!=", value, zero), signed, value)


def _negative(x):
    return x.build.fneg(*x.values) if _kind(x.dtypes[0]) == _FLOAT else x.build.neg(*x.values)


def _square(x):
    return OPERATIONS["mul"](x._replace(values=[*x.values, *x.values]))


def _power(x):
    exponent = x.params["y"]
    if not 1 <= exponent <= _MOST_FACTORS:
        raise Uncompilable(f"a power of {exponent}")
    return functools.reduce(lambda *two: OPERATIONS["mul"](x._replace(values=two)), x.values * exponent)


def _reciprocal_root(x):
    root = OPERATIONS["sqrt"](x)
    return x.build.fdiv(constant(root.type, 1), root, flags=_CONTRACT)


def _clamped(x):
    least, value, most = x.values
    dtypes = x.dtypes[:2]
    value = OPERATIONS["max"](x._replace(values=[least, value], dtypes=dtypes))
    return OPERATIONS["min"](x._replace(values=[value, most], dtypes=dtypes))


def _selected(x):
    if x.dtypes[0] != "bool" or len(x.values) != 3:
        raise Uncompilable("a choice among more than two")
    which, if_false, if_true = x.values
    return x.build.select(which, if_true, if_false)


def _finite(x):
    (value,) = x.values
    magnitude = call(x.build, "llvm.fabs", [value], value.type, [value.type])
    return x.build.fcmp_ordered("<", magnitude, constant(value.type, np.inf))


def _viewed(x):
    if bits(x.dtypes[0]) != bits(x.dtypes[-1]):
        raise Uncompilable(f"{x.dtypes[0]} viewed as {x.dtypes[-1]}")
    (value,) = x.values
    return x.build.bitcast(value, _with_elements(value.type, x.dtypes[-1]))


def _with_elements(type_, dtype):
    return llvm_type(dtype, getattr(type_, "count", 1))


def _converted(x):
    (value,), (source, target) = x.values, x.dtypes
    type_ = _with_elements(value.type, target)
    if source == target:
        return value
    if source in _FLOATS:
        wide = _FLOATS[source][0](x.build, value)
        return wide if target == "float32" else _converted(x._replace(values=[wide], dtypes=["float32", target]))
    if target in _FLOATS:
        if source != "float32":
            value = _converted(x._replace(dtypes=[source, "float32"]))
        return _FLOATS[target][1](x.build, value)
    if target == "bool":
        return OPERATIONS["ne"](x._replace(values=[value, constant(value.type, 0)], dtypes=[source]))
    if _kind(source) == _FLOAT:
        name = "llvm.fptosi.sat" if _kind(target) == _SIGNED else "llvm.fptoui.sat"
        return call(x.build, name, [value], type_, [type_, value.type])
    is_signed = _kind(source) == _SIGNED
    if _kind(target) == _FLOAT:
        return (x.build.sitofp if is_signed else x.build.uitofp)(value, type_)
    if bits(target) <= bits(source):
        return x.build.trunc(value, type_) if bits(target) < bits(source) else value
    return (x.build.sext if is_signed else x.build.zext)(value, type_)


def _from_float16(build, value):
    return build.fpext(value, _with_elements(value.type, "float32"))


def _rounded_to_float16(build, value):
    return build.fptrunc(value, _with_elements(value.type, "float16"))


def _from_bfloat16(build, pattern):
    wide = build.zext(pattern, _with_elements(pattern.type, "uint32"))
    return build.bitcast(build.shl(wide, constant(wide.type, 16)), _with_elements(pattern.type, "float32"))


def _rounded_to_bfloat16(build, value):
    """Rounds to the nearest bfloat16, ties to even."""
    pattern = build.bitcast(value, _with_elements(value.type, "uint32"))
    is_odd = build.and_(build.lshr(pattern, constant(pattern.type, 16)), constant(pattern.type, 1))
    rounded = build.add(build.add(pattern, constant(pattern.type, 0x7FFF)), is_odd)
    is_nan = build.fcmp_unordered("!=", value, value)
    rounded = build.select(is_nan, constant(pattern.type, 0x7FC00000), rounded)
    return build.trunc(build.lshr(rounded, constant(pattern.type, 16)), _with_elements(value.type, "bfloat16"))


def _rounded_to_float8(build, value):
    """Rounds to the nearest float8_e4m3fn, ties to even; beyond 464 it is NaN."""
    pattern = build.bitcast(value, _with_elements(value.type, "int32"))

    def number(integer):
        return constant(pattern.type, integer)

    magnitude = build.and_(pattern, number(0x7FFFFFFF))
    # Below 2**-6 codes count units of 2**-9, which the last bits of a sum with 2**14 are.
    large = constant(value.type, 2.0**14)
    units = build.bitcast(build.fadd(build.bitcast(magnitude, value.type), large), pattern.type)
    units = build.sub(units, build.bitcast(large, pattern.type))
    is_odd = build.and_(build.lshr(magnitude, number(20)), number(1))
    code = build.lshr(build.add(build.add(magnitude, number(0x7FFFF)), is_odd), number(20))
    code = build.sub(code, number((127 - 7) << 3))
    code = build.select(build.icmp_signed("<", magnitude, number((127 - 6) << 23)), units, code)
    code = build.select(build.icmp_signed(">", code, number(0x7F)), number(0x7F), code)
    sign = build.lshr(build.and_(pattern, number(-0x80000000)), number(24))
    return build.trunc(build.or_(code, sign), _with_elements(value.type, "uint8"))


def _from_float8(build, code):
    wide = build.zext(code, _with_elements(code.type, "int32"))

    def number(integer):
        return constant(wide.type, integer)

    magnitude = build.and_(wide, number(0x7F))
    shifted = build.add(build.shl(magnitude, number(20)), number((127 - 7) << 23))
    shifted = build.select(build.icmp_signed("==", magnitude, number(0x7F)), number(0x7FC00000), shifted)
    type_ = _with_elements(code.type, "float32")
    units = build.fmul(build.sitofp(magnitude, type_), constant(type_, 2.0**-9))
    value = build.select(build.icmp_signed("<", magnitude, number(8)), build.bitcast(units, wide.type), shifted)
    sign = build.shl(build.and_(wide, number(0x80)), number(24))
    return build.bitcast(build.or_(value, sign), type_)


_FLOATS = {
    "bfloat16": (_from_bfloat16, _rounded_to_bfloat16),
    "float16": (_from_float16, _rounded_to_float16),
    "float8_e4m3fn": (_from_float8, _rounded_to_float8),
}
"""Floats that are only converted: what makes float32 of them, and what makes them of float32."""

OPERATIONS: dict[str, Callable[[Operands], Any]] = {
    "abs": _absolute,
    "add": _named("fadd", "add"),
    "and": _of_integers("and_"),
    "bitcast_convert_type": _viewed,
    "ceil": _intrinsic("llvm.ceil"),
    "clamp": _clamped,
    "convert_element_type": _converted,
    "copy": lambda x: x.values[0],
    "copy_p": lambda x: x.values[0],
    "div": _of_floats(lambda x: x.build.fdiv(*x.values, flags=_CONTRACT)),
    "eq": _compare("=="),
    "floor": _intrinsic("llvm.floor"),
    "ge": _compare(">="),
    "gt": _compare(">"),
    "integer_pow": _power,
    "is_finite": _finite,
    "le": _compare("<="),
    "lt": _compare("<"),
    "max": _extreme("llvm.maximum", "llvm.smax", "llvm.umax"),
    "min": _extreme("llvm.minimum", "llvm.smin", "llvm.umin"),
    "mul": _named("fmul", "mul"),
    "ne": _compare("!="),
    "neg": _negative,
    "not": lambda x: x.build.not_(*x.values),
    "or": _of_integers("or_"),
    "rsqrt": _of_floats(_reciprocal_root),
    "select_n": _selected,
    "shift_left": _shifted("shl"),
    "shift_right_arithmetic": _shifted("ashr"),
    "shift_right_logical": _shifted("lshr"),
    "sign": _of_floats(_sign),
    "sqrt": _intrinsic("llvm.sqrt"),
    "square": _square,
    "sub": _named("fsub", "sub"),
    "xor": _of_integers("xor"),
}
"""By the names of JAX's primitives, functions of Operands that return an LLVM value."""


def looked_up(table: np.ndarray) -> Callable[[Operands], Any]:
    """Returns what writes down a table's (n,) numbers in places."""

    def write(x):
        from llvmlite import ir

        (places,), i64 = x.values, ir.IntType(64)
        element, lanes = llvm_type(str(table.dtype)), getattr(places.type, "count", 1)
        numbers = address_of(x.build.module, table)
        wide = ir.VectorType(i64, lanes) if lanes > 1 else i64
        places = (x.build.sext if _kind(x.dtypes[0]) == _SIGNED else x.build.zext)(places, wide)
        if lanes == 1:
            return x.build.load(x.build.gep(numbers, [places], source_etype=element), typ=element)
        # llvmlite makes no vector of addresses of an address and places.
        addresses = x.build.add(
            splat(x.build, x.build.ptrtoint(numbers, i64), lanes), x.build.mul(places, constant(wide, table.itemsize))
        )
        addresses = x.build.inttoptr(addresses, ir.VectorType(ir.PointerType(), lanes))
        result, mask = ir.VectorType(element, lanes), constant(ir.VectorType(ir.IntType(1), lanes), 1)
        arguments = [addresses, ir.Constant(ir.IntType(32), table.itemsize), mask, constant(result, 0)]
        return call(x.build, "llvm.masked.gather", arguments, result, [result, addresses.type])

    return write


def repeated(times: int) -> Callable[[Operands], Any]:
    """Returns what writes down so many of each number one after the other."""

    def write(x):
        (value,) = x.values
        return shuffled(x.build, value, [i // times for i in range(getattr(value.type, "count", 1) * times)])

    return write


def merged(write: Callable[[Operands], Any], run: int) -> Callable[[Operands], Any]:
    """Returns what writes down an operation of each run of neighbours."""

    def write_all(x):
        (value,) = x.values
        parts = [shuffled(x.build, value, range(first, value.type.count, run)) for first in range(run)]
        return functools.reduce(lambda total, part: write(x._replace(values=[total, part])), parts)

    return write_all


class Reduction(NamedTuple):
    """How numbers are reduced to one.

    Attributes:
        combine: name of the operation of two.
        of_floats: LLVM's intrinsic function of a vector; None if there is none that works in any order.
        signed: likewise, of integers.
        unsigned: likewise.
    """

    combine: str
    of_floats: str | None
    signed: str
    unsigned: str

    def start(self, dtype: str) -> float | int:
        """Returns what changes nothing."""
        if self.combine == "add":
            return 0
        return -np.inf if _kind(dtype) == _FLOAT else int(np.iinfo(dtype).min)

    def horizontal(self, dtype: str) -> str | None:
        """Returns the intrinsic function for a dtype."""
        return (self.of_floats, self.signed, self.unsigned)[_kind(dtype)]


_REDUCE = "llvm.vector.reduce."
REDUCTIONS = {
    "reduce_max": Reduction("max", _REDUCE + "fmaximum", _REDUCE + "smax", _REDUCE + "umax"),
    "reduce_sum": Reduction("add", None, _REDUCE + "add", _REDUCE + "add"),
}
"""By the names of JAX's primitives."""
