"""LLVM's types, constants and vectors, as llvmlite builds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

ALIGNMENT = 64
"""Of what code keeps for itself, in bytes."""


class Uncompilable(Exception):
    """No instruction is known for what a function does."""


def bits(dtype: str) -> int:
    """Returns the width of a dtype's numbers in operations.

    >>> bits("bool"), bits("bfloat16"), bits("float8_e4m3fn")
    (1, 16, 8)
    """
    return 1 if dtype == "bool" else 8 * itemsize(dtype)


def itemsize(dtype: str) -> int:
    """Returns the bytes that a number takes in memory."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def llvm_type(dtype: str, lanes: int = 1) -> Any:
    """Returns LLVM's type of `lanes` numbers; booleans are one bit, and what LLVM or llvmlite has no type of its patterns."""
    from llvmlite import ir

    element = {"float32": ir.FloatType(), "float16": ir.HalfType()}.get(dtype) or ir.IntType(bits(dtype))
    return element if lanes == 1 else ir.VectorType(element, lanes)


def patterns(numbers: np.ndarray) -> np.ndarray:
    """Returns what stands for numbers: integers for those that LLVM or llvmlite has no type of."""
    is_native = numbers.dtype.kind in "biuf"
    return numbers if is_native else numbers.view(f"uint{bits(str(numbers.dtype))}")


def in_memory(dtype: str, lanes: int = 1) -> Any:
    """Returns LLVM's type of `lanes` numbers in memory, where booleans take a byte."""
    return llvm_type("uint8" if dtype == "bool" else dtype, lanes)


def call(build, name: str, values: Sequence, result_type, overloads: Sequence, flags: Sequence[str] = ()) -> Any:
    """Returns what an intrinsic function of LLVM makes of values.

    Args:
        build: llvmlite's builder.
        name: of it, without types.
        values: its arguments.
        result_type: of what it returns.
        overloads: the types that its name ends with.
        flags: what LLVM may do with floats.
    """
    from llvmlite import ir

    name = ".".join([name, *map(_suffix, overloads)])
    function = build.module.globals.get(name)
    if function is None:
        function = ir.Function(build.module, ir.FunctionType(result_type, [x.type for x in values]), name)
    return build.call(function, values, fastmath=flags)


def _suffix(type_):
    from llvmlite import ir

    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_suffix(type_.element)}"
    return {"float": "f32", "half": "f16", "ptr": "p0"}.get(str(type_), str(type_))


def constant(type_, number) -> Any:
    """Returns LLVM's constant of a number in a type's every lane."""
    from llvmlite import ir

    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [constant(type_.element, number)] * type_.count)
    return ir.Constant(type_, int(number) if isinstance(type_, ir.IntType) else float(number))


def opaque(address) -> Any:
    """Returns an address of llvmlite's as LLVM has them since version 15, without what lies there."""
    from llvmlite import ir

    address.type = ir.PointerType()
    return address


def splat(build, value, lanes: int) -> Any:
    """Returns a vector of a scalar in each lane; the scalar if there is but one."""
    return value if lanes == 1 else shuffled(build, value, [0] * lanes)


def shuffled(build, value, places: Iterable[int]) -> Any:
    """Returns a vector of a vector's, or a scalar's, numbers in places; of one place a scalar."""
    from llvmlite import ir

    i32, places = ir.IntType(32), list(places)
    if not isinstance(value.type, ir.VectorType):
        vector = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
        value = build.insert_element(vector, value, ir.Constant(i32, 0))
    if len(places) == 1:
        return build.extract_element(value, ir.Constant(i32, places[0]))
    return build.shuffle_vector(value, value, ir.Constant(ir.VectorType(i32, len(places)), places))


def address_of(module, numbers: np.ndarray) -> Any:
    """Returns where a module keeps constant numbers (n,)."""
    from llvmlite import ir

    element = in_memory(str(numbers.dtype))
    type_ = ir.ArrayType(element, len(numbers))
    values = ir.Constant(type_, [constant(element, x) for x in patterns(numbers).tolist()])
    for known in module.global_values:
        if isinstance(known, ir.GlobalVariable) and str(known.initializer) == str(values):
            return known
    variable = ir.GlobalVariable(module, type_, f"numbers{len(module.globals)}")
    variable.global_constant, variable.initializer = True, values
    variable.linkage, variable.align = "internal", ALIGNMENT
    return opaque(variable)
