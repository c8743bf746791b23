"""The cheapest choice of one option a layer for each total of harm, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Beyond so many states, those whose costs fall into one of as many equal intervals compete for one place.
MAX_STATES = 4096


class Option(NamedTuple):
    """What a layer may be given.

    Attributes:
        cost: in bytes or seconds, of either sign; what costs add up to is minimised.
        harm: increase of the loss, >= 0.
    """

    cost: float
    harm: float


class Allocation(NamedTuple):
    """One option for each layer.

    Attributes:
        cost: sum of the options' costs.
        harm: sum of their harms.
        choice: index of the option, one a layer.
    """

    cost: float
    harm: float
    choice: tuple[int, ...]


def pareto_front(layers: Sequence[Sequence[Option]], max_states: int = MAX_STATES) -> list[Allocation]:
    """Returns the allocations that no other one beats in cost and in harm, by rising cost and falling harm.

    Both are taken for sums over layers (the multiple-choice knapsack problem).
    After each layer only partial allocations that no other one beats are kept,
    so the front is exact while they are at most `max_states`. Beyond, of those
    whose costs lie in the same of `max_states` intervals the one of least harm
    is kept, and the one of least cost of all; a total is then too dear by at
    most one interval a layer.

    Args:
        layers: the options of each layer, at least one.
        max_states: int >= 1.

    Example:
        >>> front = pareto_front([[Option(4, 0.0), Option(1, 0.5)], [Option(8, 0.0), Option(2, 0.1)]])
        >>> [(a.cost, round(a.harm, 1), a.choice) for a in front]
        [(3, 0.6, (1, 1)), (6, 0.1, (0, 1)), (12, 0.0, (0, 0))]
    """
    # A state is (cost, harm, (option, state before it)): a list shared by all allocations that go on from it.
    states = [(0, 0.0, None)]
    for options in layers:
        useful = _undominated([(option.cost, option.harm, index) for index, option in enumerate(options)])
        extended = [
            (cost + own_cost, harm + own_harm, (index, before))
            for cost, harm, before in states
            for own_cost, own_harm, index in useful
        ]
        states = _thinned(_undominated(extended), max_states)
    return [Allocation(cost, harm, _choice(trail)) for cost, harm, trail in states]


def _undominated(states):
    kept = []
    for state in sorted(states, key=lambda state: state[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _thinned(states, max_states):
    if len(states) <= max_states:
        return states
    least, most = states[0][0], states[-1][0]
    width = (most - least) / max_states
    best = {min(int((state[0] - least) / width), max_states - 1): state for state in states}  # the last has least harm
    return _undominated([states[0], *best.values()])


def _choice(trail):
    found = []
    while trail is not None:
        index, trail = trail
        found.append(index)
    return tuple(reversed(found))
