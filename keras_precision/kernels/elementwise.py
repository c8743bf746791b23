"""Records a function that treats all elements of its tensors alike, so that it can run on parts of them (JAX only)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Operations that make one element of the result of one element of each operand. Those for which kernels on GPUs have no
# instruction are not among them.
_ELEMENTWISE = frozenset(
    "abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem rsqrt select_n sign sin sqrt "
    "square sub tanh xor".split()
)
_BROADCASTS = frozenset(("broadcast_in_dim", "reshape"))
_CALLS = {"closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


class NotElementwise(Exception):
    """An element of a result depends on more than the elements in its place."""


class _Tensor(NamedTuple):
    """A value of the full shape, by its place among those that `run` knows."""

    place: int


class _Scalar(NamedTuple):
    """A value of one element, by its place among the scalars."""

    place: int


class _Step(NamedTuple):
    primitive: Any  # None for a copy of its operand to the full shape
    params: dict[str, Any]
    operands: list[_Tensor | _Scalar]
    result: int


class Program:
    """The elementwise operations that a function of tensors of one shape consists of.

    What depends on scalars alone, a decayed learning rate for instance, is
    computed while the function is recorded.

    Args:
        function: of `len(arguments)` tensors, returning such tensors. What it
            closes over may be traced by JAX.
        *arguments: tensors, or their ShapeDtypeStructs, of one shape with more
            than one element.

    Attributes:
        tensors: those of the full shape that the function closed over.
        scalars: tensors of shape () that its operations need.

    Raises:
        NotElementwise: it sums, multiplies matrices, or mixes elements in
            another way.

    Example:
        >>> from jax import numpy as jnp
        >>> program = Program(lambda x: [jnp.sqrt(x) * 2], jnp.zeros((64, 64)))
        >>> [x.tolist() for x in program.run([jnp.array([4.0, 9.0])], program.scalars)]
        [[4.0, 6.0]]
    """

    def __init__(self, function: Callable, *arguments):
        import jax

        self.tensors: list[Any] = []
        self.scalars: list[Any] = []
        self._shape = tuple(arguments[0].shape)
        self._steps: list[_Step] = []
        self._n_arguments = self._n_values = len(arguments)
        self._given = list(range(len(arguments)))  # the places of the arguments, and of `tensors` after them
        closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments))
        results = self._record(closed.jaxpr, closed.consts, [_Tensor(place) for place in self._given])
        self._results = [self._operand(result) for result in results]
        self.scalars = [jax.numpy.reshape(value, ()) for value in self.scalars]

    def run(self, values: Sequence, scalars: Sequence) -> list:
        """Returns the function's results for parts of its tensors.

        Args:
            values: the same part of each argument and then of each of
                `tensors`, in any one shape.
            scalars: what `self.scalars` are where this runs.
        """
        from jax import lax

        shape = values[0].shape
        known = dict(zip(self._given, values, strict=True))

        def value(operand):
            if isinstance(operand, _Tensor):
                return known[operand.place]
            return lax.broadcast_in_dim(scalars[operand.place], shape, ())

        for primitive, params, operands, result in self._steps:
            found = [value(operand) for operand in operands]
            known[result] = found[0] if primitive is None else primitive.bind(*found, **params)
        return [value(result) for result in self._results]

    def _record(self, jaxpr, consts, arguments):
        """Returns the results of a jaxpr: a _Tensor each, or the value of a scalar."""
        from jax.extend.core import Literal

        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def value(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._results_of(equation, [value(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _results_of(self, equation, operands):
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            called = params[_CALLS[name]]
            return self._record(called.jaxpr, called.consts, operands)
        if not any(self._is_full(x) for x in [*equation.invars, *equation.outvars]):
            found = equation.primitive.bind(*operands, **params)
            return found if equation.primitive.multiple_results else [found]
        if any(not self._is_full(x) and math.prod(x.aval.shape) != 1 for x in [*equation.invars, *equation.outvars]):
            raise NotElementwise(name)
        if not all(map(self._is_full, equation.outvars)) or name not in _ELEMENTWISE | _BROADCASTS:
            raise NotElementwise(name)
        primitive = None if name in _BROADCASTS else equation.primitive
        self._steps.append(_Step(primitive, params, [self._operand(x) for x in operands], self._n_values))
        self._n_values += 1
        return [_Tensor(self._n_values - 1)]

    def _is_full(self, atom):
        return atom.aval.shape == self._shape

    def _operand(self, value):
        """Returns what a step reads: tensors and scalars that were closed over become the program's."""
        from jax import numpy as jnp

        if isinstance(value, _Tensor):
            return value
        is_full = jnp.shape(value) == self._shape
        known = self.tensors if is_full else self.scalars
        place = next((i for i, other in enumerate(known) if other is value), len(known))
        if place == len(known):
            known.append(value)
            if is_full:
                self._given.append(self._n_values)
                self._n_values += 1
        return _Tensor(self._given[self._n_arguments + place]) if is_full else _Scalar(place)
