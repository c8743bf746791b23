"""The dynamic programme finds what trying everything finds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_precision.search.allocation import Option, pareto_front

WHOLE = st.integers(-20, 20)
# Quarters, whose sums are exact.
HARM = st.integers(0, 40).map(lambda number: number / 4)
LAYERS = st.lists(st.lists(st.builds(Option, WHOLE, HARM), min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(layers):
    """(cost, harm) of all allocations that no other one beats, by rising cost."""
    totals = sorted(
        (sum(option.cost for option in chosen), sum(option.harm for option in chosen))
        for chosen in itertools.product(*layers)
    )
    return [total for i, total in enumerate(totals) if all(total[1] < harm for _, harm in totals[:i])]


@given(LAYERS)
def test_front_is_that_of_all_allocations(layers):
    front = pareto_front(layers)
    assert [(found.cost, found.harm) for found in front] == brute_force(layers)


@given(LAYERS)
def test_choices_add_up_to_what_is_said(layers):
    for found in pareto_front(layers):
        chosen = [options[number] for options, number in zip(layers, found.choice, strict=True)]
        assert (found.cost, found.harm) == (sum(o.cost for o in chosen), sum(o.harm for o in chosen))


@given(LAYERS, st.integers(1, 8))
def test_few_states_lose_at_most_an_interval_a_layer(layers, max_states):
    front = pareto_front(layers, max_states)
    reached = sum(max(o.cost for o in options) - min(o.cost for o in options) for options in layers)
    slack = len(layers) * reached / max_states
    assert len(front) <= max_states + 1
    for cost, harm in brute_force(layers):
        assert any(found.harm <= harm and found.cost <= cost + slack for found in front)


def test_many_layers_take_little_time():
    # 300 layers with 4 options each, costs that hardly ever add up to the same: without the limit 4**300 states.
    layers = [[Option((7 * i + 1) * 8**-j + i / 3, (j + i % 5) / 8) for j in range(4)] for i in range(300)]
    front = pareto_front(layers, max_states=512)
    assert front[0].cost == pytest.approx(sum(min(o.cost for o in options) for options in layers))
    assert all(a.cost < b.cost and a.harm > b.harm for a, b in itertools.pairwise(front))
