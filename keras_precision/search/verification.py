"""The walk along a predicted front to the cheapest choice whose bound holds on held-out data."""

from __future__ import annotations

from collections.abc import Callable

# The most choices that one walk tries: 2**10 is more than any front has of practical difference.
STEPS = 10
# A walk under a bound on cost tries the best that is predicted and some cheaper ones, which may do better.
CHEAPER = 3


def cheapest_within(
    size: int, start: int, is_within: Callable[[int], bool], is_over: Callable[[], bool] = lambda: False
) -> int:
    """Returns the cheapest place of a front that was found to be within; `size` if none was.

    From `start` the walk goes to cheaper places while the bound holds, else
    to dearer ones: the most harmful choices are undone first, since harm
    falls along the front. Its stride doubles until one place within and one
    that is not are known, and then halves.

    Args:
        size: places of the front, by rising cost; `size` itself stands for the model as it was, which is within.
        start: in [0, size].
        is_within: called for at most `STEPS` places.
        is_over: asked before each place; True ends the walk.

    Example:
        >>> cheapest_within(100, start=30, is_within=lambda place: place >= 37)
        37
    """
    below, above = -1, size
    stride, place = max(1, size // 64), min(start, size - 1)
    for _ in range(STEPS):
        if above - below <= 1 or is_over():
            break
        if is_within(place):
            above = place
        else:
            below = place
        if below == -1:
            place, stride = max(above - stride, 0), 2 * stride
        elif above == size:
            place, stride = min(below + stride, size - 1), 2 * stride
        else:
            place = (below + above) // 2
    return above


def best_below(size: int, last: int) -> list[int]:
    """Returns places of a front to try under a bound on cost: the dearest that fits and some cheaper ones.

    Args:
        size: places of the front.
        last: the dearest that fits.
    """
    stride = max(1, size // 64)
    return sorted({max(last - stride * (2**step - 1), 0) for step in range(CHEAPER + 1)}, reverse=True)
