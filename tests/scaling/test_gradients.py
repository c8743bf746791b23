"""The first gradient that is not finite, found by rows, against looking at each."""

import numpy as np
import pytest
from keras import ops

from keras_precision.scaling import gradients

# Scalars, vectors, kernels whose last axes are shorter than a row, single rows and columns, more than _SMALL or less.
SHAPES = [(3,), (128, 12, 64), (300, 40), (12, 64, 70), (5, 5, 64, 64), (1, 9000), (9000, 1), (20000,), ()]


def drawn():
    draw = np.random.default_rng(0)
    return [np.asarray(draw.standard_normal(shape), "float32") for shape in SHAPES]


def first(arrays):
    return int(gradients.first_nonfinite([ops.convert_to_tensor(array) for array in arrays]))


def test_finite_gradients_have_none():
    largest = float(np.finfo("float32").max)
    assert first(drawn()) == len(SHAPES)
    assert first([np.full(shape, largest, "float32") for shape in SHAPES]) == len(SHAPES)  # their sum would be inf


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_one_value_anywhere_is_found(place, bad):
    for position in (0, -1):
        arrays = drawn()
        arrays[place].flat[position] = bad
        assert first(arrays) == place
        arrays[-1] = np.asarray(bad, "float32")  # a later one does not hide it
        assert first(arrays) == place
