"""Reads the programs that JAX traces functions to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from keras_precision.kernels.recording import NotElementwise, Recording

# Operations that make one element of the result of one element of each operand. Those for which kernels on GPUs have no
# instruction are not among them.
_ELEMENTWISE = frozenset(
    "abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem rsqrt select_n sign sin sqrt "
    "square sub tanh xor".split()
)
_BROADCASTS = frozenset(("broadcast_in_dim", "reshape"))
_CALLS = {"closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


def record(recording: Recording, function, arguments) -> list:
    """Adds a function's operations to a recording.

    Args:
        recording: for as many arguments.
        function: of tensors, returning such tensors.
        arguments: tensors, or what has their shapes and dtypes.

    Returns:
        The results, as `recording.operand` takes them.

    Raises:
        NotElementwise: an operation mixes elements.
    """
    import jax

    closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments))
    return evaluated(closed.jaxpr, closed.consts, recording.arguments, _Recorder(recording).results_of)


def evaluated(jaxpr, consts: Sequence, arguments: Sequence, results_of: Callable[[Any, list], Sequence]) -> list:
    """Returns the results of a jaxpr and of those that it calls.

    Args:
        jaxpr: of JAX.
        consts: the values of its `constvars`.
        arguments: what stands for its `invars`.
        results_of: function of an equation and of what stands for its operands (a literal's value for a literal), which
            returns what stands for its results.
    """
    from jax.extend.core import Literal

    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(atom):
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        if equation.primitive.name in _CALLS:
            called = equation.params[_CALLS[equation.primitive.name]]
            results = evaluated(called.jaxpr, called.consts, operands, results_of)
        else:
            results = results_of(equation, operands)
        known.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


class _Recorder:
    def __init__(self, recording):
        self._recording = recording

    def results_of(self, equation, operands):
        """Returns the results of an equation: a Tensor each, or the value of a scalar."""
        primitive, params = equation.primitive, equation.params
        if not any(self._is_full(x) for x in [*equation.invars, *equation.outvars]):
            found = primitive.bind(*operands, **params)
            return found if primitive.multiple_results else [found]
        if any(not self._is_full(x) and math.prod(x.aval.shape) != 1 for x in [*equation.invars, *equation.outvars]):
            raise NotElementwise(primitive.name)
        if not all(map(self._is_full, equation.outvars)) or primitive.name not in _ELEMENTWISE | _BROADCASTS:
            raise NotElementwise(primitive.name)
        is_broadcast = primitive.name in _BROADCASTS
        return [self._recording.add(_only if is_broadcast else functools.partial(primitive.bind, **params), operands)]

    def _is_full(self, atom):
        return atom.aval.shape == self._recording.shape


def _only(operand):
    """Returns its operand, which scalars are broadcast for already."""
    return operand
