"""Which values of a step are counted as stored, on programs written out by hand."""

import pytest

from keras_precision.report.memory import estimate
from keras_precision.report.program import Operation, Program


def peak_of(*steps: tuple[str, tuple[int, ...]]) -> int:
    """Returns the values that are live at once, of steps that each make the next value from others; 0 is the argument."""
    operations = tuple(Operation(name, "", reads, (place + 1,)) for place, (name, reads) in enumerate(steps))
    program = Program(operations, {value: (1, 1) for value in range(len(steps) + 1)}, (len(steps),))
    return estimate(program, 0, 0, 1).peak


@pytest.mark.parametrize(("function", "expected"), [("neg", 3), ("erf", 4)])
def test_a_costly_value_is_kept_where_a_product_runs_before_it_is_read_again(function, expected):
    # The products' results 1 and 3 and the operand 5 of the last one are live at once; a costly 2 besides.
    product = "dot_general"
    steps = (product, (0,)), (function, (1,)), (product, (0,)), ("mul", (2, 1)), ("add", (4, 3)), (product, (5,))
    assert peak_of(*steps) == expected


@pytest.mark.parametrize("function", ["neg", "erf"])
def test_a_costly_value_is_not_kept_where_no_product_runs_between(function):
    # First 1 and the operand 3, then 3 and the result.
    assert peak_of(("dot_general", (0,)), (function, (1,)), ("mul", (2, 1)), ("dot_general", (3,))) == 2
