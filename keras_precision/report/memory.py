"""How much memory a training step needs, estimated from the operations that it consists of."""

from __future__ import annotations

import bisect
import collections
import dataclasses

import keras

from keras_precision import _bridge_optimizers, dtypes
from keras_precision.report.program import Program

# A cheap value is stored where what it is computed from takes more bytes than this many of its own: a sum of two
# tensors (2), not a normalized one, which needs its input and a mean and deviation for each row (1 and a little).
_KEEP_FEWER = 1.5


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs, by what they hold.

    Attributes:
        weights: of all variables of the model, as stored.
        gradients: of the trained weights, as the backward pass returns them.
        optimizer: of the optimizer's state; 0 where the model is compiled without one.
        activations: the most that all else takes at once: what the forward pass keeps for the backward pass, gradients
            of activations, and 16-bit copies of weights.
        peak: the most that is live at once. Less than the sum of the parts, because activations are freed while
            gradients of the weights come in.
        batch_size: rows of x that activations are counted for.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    batch_size: int


def estimate(program: Program, weights: int, optimizer: int, batch_size: int) -> Memory:
    """Returns what a step needs.

    Args:
        program: the step; its first result is the loss, the others are gradients.
        weights: bytes of the model's variables.
        optimizer: bytes of the optimizer's.
        batch_size: rows that the program was recorded for.
    """
    gradients = sum(program.bytes_of(value) for value in set(program.results[1:]))
    activations, live = _most_live(program)
    return Memory(weights, gradients, optimizer, activations, weights + optimizer + live, batch_size)


def _most_live(program: Program) -> tuple[int, int]:
    """Returns the most bytes that a program's values take at once, without its results and with them.

    A value is stored from the operation that makes it to the last one that reads it. Not all are stored: XLA computes
    elementwise operations within those that read them, in the backward pass again, so such a value counts only where an
    operation that does not compute its operands itself, a product for instance, reads it. What it is computed from
    counts for as long as it is needed to do so. Costly functions are not computed again once a product has run between:
    GELU's erf and its derivative's exp are kept by the forward pass. Arguments count as weights. Operations run in the
    order in which they were recorded.
    """
    stored = _stored(program)
    costly = {value for op in program.operations if op.behaviour == "costly" for value in op.outputs} - stored
    first, last, _ = _lives(program, stored | costly)
    products = [time for time, op in enumerate(program.operations) if op.behaviour == "stores"]
    kept = {v for v in costly if bisect.bisect_left(products, last[v]) > bisect.bisect_right(products, first[v])}
    first, last, sources = _lives(program, stored | kept)
    results = {source for value in program.results for source in sources.get(value, ())}
    return tuple(
        _peak(
            [
                (program.bytes_of(v), first[v], end if v in results else last[v])
                for v in first
                if keeps or v not in results
            ]
        )
        for keeps, end in ((False, 0), (True, len(program.operations)))
    )


def _lives(program, stored):
    """Returns when each stored value is made and last read, and the stored values that each value is computed from."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    sources: dict[int, frozenset[int]] = {}
    for time, op in enumerate(program.operations):
        read = frozenset().union(*(sources.get(value, ()) for value in op.inputs))
        last.update(dict.fromkeys(read, time))
        needed = sum(map(program.bytes_of, read))
        for value in op.outputs:
            is_alias = op.behaviour == "alias" and len(read) == 1
            if value in stored or (not is_alias and needed > _KEEP_FEWER * program.bytes_of(value)):
                sources[value] = frozenset((value,))
                first[value] = last[value] = time
            else:
                sources[value] = read
    return first, last, sources


def _peak(intervals):
    """Returns the most bytes live at once, of (bytes, first, last) of each value."""
    changes: collections.Counter[int] = collections.Counter()
    for size, start, end in intervals:
        changes[start] += size
        changes[end + 1] -= size
    peak = live = 0
    for time in sorted(changes):
        live += changes[time]
        peak = max(peak, live)
    return peak


def _stored(program: Program) -> set[int]:
    """Returns the values that an operation stores or has to read stored."""
    makers = {value: op for op in program.operations for value in op.outputs}
    found = set(program.results)
    for op in program.operations:
        if op.behaviour in ("reduces", "stores"):
            found.update(op.outputs)
        if op.behaviour == "stores":
            for value in op.inputs:
                found.add(_source(value, makers))
    return {value for value in found if value in makers}


def _source(value, makers):
    """Returns the value whose bytes these are, other shapes of it seen through."""
    while value in makers and makers[value].behaviour == "alias" and makers[value].inputs:
        value = makers[value].inputs[0]
    return value


def optimizer_bytes(optimizer: keras.Optimizer | None, weights: list[keras.Variable]) -> int:
    """Returns the bytes of an optimizer's state for some weights, which it is built for if it has not been."""
    if optimizer is None:
        return 0
    if not optimizer.built:
        optimizer.build(weights)
    layers = [optimizer, *_bridge_optimizers.wrapped(optimizer)]
    return dtypes.measured_bytes(v for one in layers for v in one.variables)
