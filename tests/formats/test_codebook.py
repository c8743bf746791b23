"""The nearest code against all sixteen distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_precision.formats import fp4, host, int4, nf4
from keras_precision.formats.blocks import UNIT

CODEBOOKS = {"fp4": fp4.CODEBOOK, "int4": int4.CODEBOOK, "nf4": nf4.CODEBOOK}
by_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)


def nearest(codebook, numbers):
    grouped = np.asarray(numbers, "float32").reshape(1, 1, -1)
    return codebook.encode(host, grouped, np.full((1, grouped.size), UNIT))[0]


def distances(codebook, numbers):
    return np.abs(np.asarray(numbers, "float64")[..., None] - codebook.array.astype("float64"))


def assert_nearest(codebook, numbers):
    """No value is nearer, but for the rounding of midpoints to float32."""
    codes = nearest(codebook, numbers).astype(int)
    all_distances = distances(codebook, numbers)
    found = np.take_along_axis(all_distances, codes[:, None], axis=1)[:, 0]
    assert (found <= all_distances.min(axis=1) + np.abs(codebook.array).max() * 2.0**-24).all()


@by_codebook
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_nearest_of_any_numbers(codebook, data):
    anywhere = st.floats(-1, 1, width=32).map(lambda number: number * float(-codebook.array.min()))
    near_midpoints = st.sampled_from([float(m) for m in codebook.midpoints]).map(lambda m: m * (1 + 2.0**-22))
    assert_nearest(codebook, data.draw(st.lists(anywhere | near_midpoints, min_size=1, max_size=50)))


@by_codebook
def test_nearest_of_many_numbers(codebook):
    numbers = np.random.default_rng(0).uniform(codebook.array.min(), -codebook.array.min(), 100_000).astype("float32")
    order = np.argsort(codebook.array, kind="stable")
    brute_force = order[distances(codebook, numbers)[:, order].argmin(axis=1)]
    found = nearest(codebook, numbers)
    assert np.array_equal(codebook.array[found], codebook.array[brute_force])


@by_codebook
def test_ties_take_the_lesser_value(codebook):
    ascending = np.sort(codebook.array)
    exact = (ascending[:-1].astype("float64") + ascending[1:]) / 2 == codebook.midpoints
    found = codebook.array[nearest(codebook, codebook.midpoints)]
    assert np.array_equal(found[exact], ascending[:-1][exact])
    above = codebook.array[nearest(codebook, np.nextafter(codebook.midpoints, np.float32(np.inf)))]
    assert np.array_equal(above, ascending[1:])


@by_codebook
def test_values_are_their_own_codes(codebook):
    codes = nearest(codebook, codebook.array)
    assert np.array_equal(codebook.array[codes], codebook.array)
    decoded = ops.convert_to_numpy(codebook.decode(ops.convert_to_tensor(np.arange(16, dtype="uint8"))))
    assert np.array_equal(decoded, codebook.array) and decoded.dtype == np.float32


def test_codes_of_zeros():
    """fp4 has two: bitsandbytes gives the second to positive numbers, the first to zeros and negative ones."""
    numbers = [0.0, -0.0, 1e-30, -1e-30, 1e-42, -1e-42]
    assert nearest(fp4.CODEBOOK, numbers).tolist() == [0, 0, 8, 0, 0, 0]
    assert nearest(nf4.CODEBOOK, numbers).tolist() == [7] * 6
    assert nearest(int4.CODEBOOK, numbers).tolist() == [8] * 6


def test_values_of_fp4():
    """A sign, two bits of exponent, one of mantissa, scaled to a greatest value of 1."""
    magnitudes = [0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
    np.testing.assert_allclose(fp4.CODEBOOK.array, [*magnitudes, *(-m for m in magnitudes)], rtol=1e-7)
    assert not np.signbit(fp4.CODEBOOK.array[8])


def test_values_of_nf4_are_quantiles():
    """QLoRA's equation 4, up to the offset that its code uses: means of neighbouring quantiles of N(0, 1)."""
    from statistics import NormalDist

    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    inverse = NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*positive, 0, *negative])
    np.testing.assert_allclose(nf4.CODEBOOK.array, values / values.max(), atol=2e-7)
