"""The walk along a front ends at its cheapest place within the bound."""

from hypothesis import given
from hypothesis import strategies as st

from keras_precision.search.verification import STEPS, best_below, cheapest_within


@given(st.integers(1, 400), st.data())
def test_walk_finds_the_threshold(size, data):
    threshold = data.draw(st.integers(0, size))
    start = data.draw(st.integers(0, size))
    tried = []

    def is_within(place):
        tried.append(place)
        return place >= threshold

    found = cheapest_within(size, start, is_within)
    assert len(tried) <= STEPS and len(set(tried)) == len(tried)
    assert found == size or found in tried
    assert found >= threshold
    assert len(tried) == STEPS or found == threshold  # a walk that had steps left has found it


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.data())
def test_walk_ends_within_where_the_sums_mislead(within, data):
    found = cheapest_within(len(within), data.draw(st.integers(0, len(within))), lambda place: within[place])
    assert found == len(within) or within[found]


def test_walk_stops_when_time_is_over():
    tried = []
    assert cheapest_within(50, 10, lambda place: tried.append(place) or True, is_over=lambda: len(tried) == 2) < 10
    assert len(tried) == 2


@given(st.integers(1, 400), st.data())
def test_places_below_fit(size, data):
    last = data.draw(st.integers(0, size - 1))
    places = best_below(size, last)
    assert places[0] == last and all(0 <= place <= last for place in places)
