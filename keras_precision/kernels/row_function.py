"""Reads what a function does with one row, as JAX traced it."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from keras_precision.kernels import jaxprs
from keras_precision.kernels.llvm_values import Uncompilable
from keras_precision.kernels.row_operations import OPERATIONS, REDUCTIONS, Reduction, looked_up, merged, repeated

_MOVES = frozenset(("broadcast_in_dim", "reshape", "squeeze"))


@dataclass(eq=False)
class Node:
    """A value of a function of a row.

    Attributes:
        dtype: of its elements.
        width: how many of them a row has; 1 may also stand for as many equal ones.
        write: function of Operands that writes it down; None for arguments, constants and reductions.
        operands: nodes.
        params: of JAX's primitive.
        phase: it is known before (width 1) or while (others) a row is walked
            through for the nth time; -1 if it is the same for all rows.
        value: NumPy array of a constant, else None.
        reduction: what reduces its operand to it, else None.
    """

    dtype: str
    width: int
    write: Callable | None = None
    operands: Sequence[Node] = ()
    params: dict[str, Any] = field(default_factory=dict)
    phase: int = 0
    value: np.ndarray | None = None
    reduction: Reduction | None = None

    @property
    def is_wide(self) -> bool:
        """Whether a row has several elements of it."""
        return self.width > 1

    @property
    def read_in(self) -> int:
        """The walk through a row in which the operands are read."""
        return self.phase - 1 if self.reduction else self.phase


class Result(NamedTuple):
    """A result of a function of a row.

    Attributes:
        node: whose numbers it has.
        width: how many.
        dtype: of them.
    """

    node: Node
    width: int
    dtype: str


class Function(NamedTuple):
    """A function of one row.

    Attributes:
        arguments: nodes, one an array or scalar.
        nodes: all that are computed, operands first.
        results: one an array.
    """

    arguments: list[Node]
    nodes: list[Node]
    results: list[Result]

    @property
    def n_phases(self) -> int:
        """How often a row is walked through."""
        return 1 + max((node.phase for node in [*self.nodes, *self.arguments] if node.is_wide), default=-1)

    @property
    def width(self) -> int:
        """The most elements of a row."""
        return max(node.width for node in [*self.nodes, *self.arguments])


def look_up(table: np.ndarray, places) -> Any:
    """Returns a table's numbers in places, as an operation that `read` knows."""
    import jax

    return _look_up_primitive().bind(jax.numpy.asarray(table), places)


@functools.cache
def _look_up_primitive():
    import jax
    from jax.extend.core import Primitive

    primitive = Primitive("look_up")
    primitive.def_abstract_eval(lambda table, places: jax.core.ShapedArray(places.shape, table.dtype))
    return primitive


def read(function: Callable, rows: Sequence, scalars: Sequence) -> Function:
    """Returns what a function does with one row.

    Args:
        function: of arrays (1, ...) and scalars, which JAX can trace; it
            returns a list of arrays (1, ...).
        rows: arrays (1, ...), or what has their shapes and dtypes.
        scalars: of shape ().

    Raises:
        Uncompilable: it does what no instruction is known for.
    """
    import jax

    closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in [*rows, *scalars]))
    arguments = [Node(str(x.dtype), math.prod(x.shape)) for x in rows]
    arguments += [Node(str(x.dtype), 1, phase=-1) for x in scalars]
    reader = _Reader()
    found = jaxprs.evaluated(closed.jaxpr, closed.consts, arguments, reader.results_of)
    results = [
        Result(_node(x, atom.aval.dtype), math.prod(atom.aval.shape), str(atom.aval.dtype))
        for x, atom in zip(found, closed.jaxpr.outvars, strict=True)
    ]
    function = Function(arguments, reader.nodes, results)
    _postpone(function)
    return function


def _node(value, dtype):
    """Returns the node of an equation's operand."""
    if isinstance(value, Node):
        return value
    flat = np.asarray(value, dtype).reshape(-1)
    if flat.tobytes() == flat[:1].tobytes() * flat.size:  # zeros of both signs are not alike
        flat = flat[:1]
    return Node(str(dtype), flat.size, phase=-1, value=flat)


def _broadcast(value, shape):
    """Returns an array with axes of length 1 repeated, as operations of JAX do from 0.10 on."""
    is_array = not isinstance(value, Node) and np.size(value) > 1 and np.ndim(value) == len(shape)
    return np.broadcast_to(value, shape) if is_array else value


class _Reader:
    def __init__(self):
        self.nodes = []

    def results_of(self, equation, operands):
        """Returns the results of an equation: nodes, or arrays if it has no other operands."""
        import jax

        primitive, params = equation.primitive, equation.params
        if any(isinstance(x, jax.core.Tracer) for x in operands):
            raise Uncompilable("it closes over what isn't known yet")
        if not any(isinstance(x, Node) for x in operands):
            with jax.ensure_compile_time_eval():
                found = primitive.bind(*operands, **params)
            return found if primitive.multiple_results else [found]
        if primitive.multiple_results:
            raise Uncompilable(primitive.name)
        shapes, out = [x.aval.shape for x in equation.invars], equation.outvars[0].aval
        operands = [
            _node(_broadcast(x, out.shape), atom.aval.dtype) for x, atom in zip(operands, equation.invars, strict=True)
        ]
        return [self._result(primitive.name, params, operands, shapes, out)]

    def _result(self, name, params, operands, shapes, out):
        size = math.prod(out.shape)
        if name in _MOVES:
            return self._moved(name, params, operands[0], shapes[0], out.shape)
        if name == "look_up":
            return self._added(out.dtype, size, looked_up(operands[0].value), operands[1:], {})
        if name in REDUCTIONS:
            return self._reduced(name, params, operands[0], shapes[0], size)
        if name not in OPERATIONS:
            raise Uncompilable(name)
        return self._added(out.dtype, size, OPERATIONS[name], operands, params)

    def _added(self, dtype, size, write, operands, params):
        if any(x.width not in (1, size) for x in operands):
            raise Uncompilable(f"operands of {[x.width for x in operands]} numbers for {size}")
        phase = max(x.phase for x in operands)
        # What a row's every element has the same of is computed once.
        width = max(x.width for x in operands)
        self.nodes.append(Node(str(dtype), width, write, operands, params, phase if width == 1 else max(phase, 0)))
        return self.nodes[-1]

    def _moved(self, name, params, operand, shape, new_shape):
        size, new_size = math.prod(shape), math.prod(new_shape)
        if operand.width == 1 or size == new_size:
            return operand
        places = np.arange(size).reshape(
            [
                shape[params["broadcast_dimensions"].index(axis)] if axis in params["broadcast_dimensions"] else 1
                for axis in range(len(new_shape))
            ]
        )
        times = new_size // size
        if (np.broadcast_to(places, new_shape).reshape(-1) != np.arange(new_size) // times).any():
            raise Uncompilable(f"{name} of {shape} to {new_shape}")
        self.nodes.append(Node(operand.dtype, new_size, repeated(times), [operand], phase=operand.phase))
        return self.nodes[-1]

    def _reduced(self, name, params, operand, shape, size):
        reduction = REDUCTIONS[name]
        if operand.width == 1 or tuple(params["axes"]) != (len(shape) - 1,):
            raise Uncompilable(name)
        if size == 1:
            if reduction.horizontal(operand.dtype) is None:
                raise Uncompilable(f"{name} of {operand.dtype}")
            node = Node(operand.dtype, 1, None, [operand], phase=operand.phase + 1, reduction=reduction)
        else:
            write = merged(OPERATIONS[reduction.combine], shape[-1])
            node = Node(operand.dtype, size, write, [operand], phase=operand.phase)
        self.nodes.append(node)
        return node


def _postpone(function):
    """Computes what only a later walk through a row reads in that walk, unless more would have to be kept for it."""
    read_in = collections.defaultdict(list)
    results = {result.node for result in function.results}
    for node in reversed(function.nodes):  # what reads a node comes after it
        wide = {x for x in node.operands if x.is_wide and x.value is None}
        may_wait = node.is_wide and node not in results and not node.reduction and len(wide) <= 1
        if may_wait and read_in[node]:
            node.phase = max(node.phase, min(read_in[node]))
        for operand in node.operands:
            read_in[operand].append(node.read_in)
