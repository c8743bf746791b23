"""8-bit scales."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_precision.formats import double_quant

LARGEST = np.float32(3e38)  # 2**127 is less


def decoded(parts, n_blocks, **arguments):
    tensors = {name: ops.convert_to_tensor(part) for name, part in parts.items()}
    return ops.convert_to_numpy(double_quant.decode(tensors, n_blocks, LARGEST, **arguments))


def test_map_is_dynamic():
    values = double_quant.dynamic_map()
    assert values.shape == (256,) and values.dtype == np.float32 and (np.diff(values) > 0).all()
    assert values[127] == 0 and values[255] == 1 and np.array_equal(values[:127], -values[128:255][::-1])
    for decade in range(7):
        inside = (values >= np.float32(10.0 ** (decade - 7))) & (values < np.float32(10.0 ** (decade - 6)))
        assert inside.sum() == 2**decade


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (257, 1), (3, 100), (700, 90)])
def test_codes_are_nearest(shape):
    """Against all 256 distances, but for the grid of 2 / 65535 that numbers are rounded to before."""
    scale = np.random.default_rng(0).uniform(0.1, 3, shape).astype("float32")
    parts = double_quant.encode(scale)
    distance = (scale.T.ravel() - parts["scale_offset"]).astype("float64")
    groups = np.split(distance, range(256, distance.size, 256))
    absmax = np.array([np.abs(group).max() for group in groups])
    assert np.array_equal(parts["scale_absmax"], absmax.astype("float32"))
    normalised = np.concatenate([group / np.maximum(most, 1e-30) for group, most in zip(groups, absmax, strict=True)])
    codes = parts["scale_codes"].T.ravel()
    all_distances = np.abs(normalised[:, None] - double_quant.dynamic_map().astype("float64"))
    found = all_distances[np.arange(codes.size), codes]
    assert (found <= all_distances.min(axis=1) + 2.1 / 65535).all()
    assert parts["scale_offset"] == np.float32(scale.mean(dtype="float64"))


@given(value=st.floats(0, 2.0**127, width=32, allow_subnormal=False))
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("shape", [(1, 1), (40, 7)])
def test_equal_scales_are_exact(shape, value):
    scale = np.full(shape, value, "float32")
    parts = double_quant.encode(scale)
    assert not parts["scale_absmax"].any() and np.array_equal(decoded(parts, shape[0]), scale)


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (100, 7)])
def test_error(shape):
    scale = np.random.default_rng(0).uniform(0.1, 3, shape).astype("float32")
    bound = 0.00704 * np.abs(scale - scale.mean()).max() + 3 * 2.0**-23
    assert np.abs(decoded(double_quant.encode(scale), shape[0]) - scale).max() <= bound


def test_no_scale_exceeds_the_largest():
    scale = np.full((64, 8), 2.9e38, "float32")
    scale[::2] = 1e38
    scale[0] = LARGEST
    found = decoded(double_quant.encode(scale), 64)
    assert np.isfinite(found).all() and found.max() <= LARGEST


def test_columns():
    scale = np.random.default_rng(0).uniform(0.1, 3, (70, 11)).astype("float32")
    parts = double_quant.encode(scale)
    columns = ops.convert_to_tensor([10, 0, 3], "int32")
    assert np.array_equal(decoded(parts, 70, columns=columns), decoded(parts, 70)[:, [10, 0, 3]])
