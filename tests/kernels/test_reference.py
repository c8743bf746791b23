"""Integer matmuls against float64 arithmetic."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.kernels import reference


def weight_and_activations(rows, k, n, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (k, n)).astype("int8")
    return codes, rng.uniform(0.5, 2, n).astype("float32"), rng.standard_normal((rows, k), dtype="float32")


def run(function, x, codes, scale, *arguments):
    tensors = [ops.convert_to_tensor(array) for array in (x, codes, scale)]
    return ops.convert_to_numpy(ops.cast(function(*tensors, *arguments), "float32"))


def rounded(x):
    """float64 values of activations after rounding to 255 values, and the step between them."""
    step = np.abs(x).max(axis=-1, keepdims=True).astype("float64") / 127
    return np.rint(x / np.where(step == 0, 1, step)) * step, step


def test_rows_are_rounded_to_nearest():
    exponents = np.arange(-25, 25)[:, None]
    x = np.ldexp(np.random.default_rng(0).standard_normal((50, 33), dtype="float32"), exponents)
    x[7] = 0
    codes, scale = (ops.convert_to_numpy(part) for part in reference.quantize_rows(ops.convert_to_tensor(x), "int8"))
    assert codes.dtype == np.int8 and scale.shape == (50, 1) and not codes[7].any()
    assert (np.abs(codes[np.arange(50) != 7]).max(axis=1) == 127).all()
    assert (np.abs(x - codes * scale.astype("float64")) <= scale * (0.5 + 127 * 2.0**-23)).all()


def test_integer_matmul_is_exact_but_for_rounding_activations():
    codes, scale, x = weight_and_activations(9, 70, 11)
    x[3] = 0
    expected = rounded(x)[0] @ (codes * scale.astype("float64"))
    found = run(reference.integer_matmul, x, codes, scale, "float32")
    # Sums are exact; the scales, their product with them and each factor round once. A tie of x may round either way.
    np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-24, atol=1e-5)
    assert not found[3].any()


def test_sums_beyond_int32():
    """127 * 127 * 2**18 is 2**32 and wraps to about 0."""
    k = 2**18 + 3
    codes, scale, x = np.full((k, 2), 127, "int8"), np.ones(2, "float32"), np.full((3, k), 2, "float32")
    np.testing.assert_allclose(run(reference.integer_matmul, x, codes, scale, "float32"), 2.0 * 127 * k, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_rank_changes_nothing(shape):
    codes, scale, x = weight_and_activations(int(np.prod(shape)), 200, 5)
    found = run(reference.integer_matmul, x.reshape(*shape, 200), codes, scale, "float32")
    assert np.array_equal(found, run(reference.integer_matmul, x, codes, scale, "float32").reshape(*shape, 5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [reference.integer_matmul, reference.mixed_integer_matmul])
def test_what_is_not_finite_stays_so(function, value):
    codes, scale, x = weight_and_activations(3, 40, 5)
    x[1, 7] = value
    arguments = ("float32",) if function is reference.integer_matmul else (6.0, "float32")
    found = run(function, x, codes, scale, *arguments)
    assert not np.isfinite(found[1]).any()
    if function is reference.integer_matmul:
        assert np.isfinite(found[[0, 2]]).all()


def test_large_features_are_not_rounded():
    codes, scale, x = weight_and_activations(6, 64, 7)
    x[2, 5], x[4, 60] = 70, -6.5
    large = [5, 60]
    small = np.delete(x, large, axis=1)
    weight = codes * scale.astype("float64")
    expected = rounded(small)[0] @ np.delete(weight, large, axis=0) + x[:, large].astype("float64") @ weight[large]
    found = run(reference.mixed_integer_matmul, x, codes, scale, 6.0, "float32")
    # Numbers of up to 70 * 127 * 2 in sums of 64, each rounded to 2**-24.
    np.testing.assert_allclose(found, expected, rtol=0, atol=70 * 254 * 66 * 2.0**-24)
    plain = run(reference.integer_matmul, x, codes, scale, "float32")
    exact = x.astype("float64") @ weight
    assert np.abs(found - exact).max() < np.abs(plain - exact).max() / 4


def test_threshold_is_exclusive_and_decides():
    codes, scale, x = weight_and_activations(4, 30, 3)
    x = np.clip(x, -3, 3)
    x[0, 0] = 3
    plain = run(reference.integer_matmul, x, codes, scale, "float32")
    assert np.array_equal(run(reference.mixed_integer_matmul, x, codes, scale, 3.0, "float32"), plain)
    assert not np.array_equal(run(reference.mixed_integer_matmul, x, codes, scale, 2.9, "float32"), plain)


@pytest.mark.parametrize("function", [reference.integer_matmul, reference.mixed_integer_matmul])
def test_batches_of_unknown_size(function):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow traces shapes that it does not know")
    import tensorflow as tf

    codes, scale, x = weight_and_activations(6, 20, 3)
    arguments = ("float32",) if function is reference.integer_matmul else (1.0, "float32")
    signature = [tf.TensorSpec((None, None, 20))]
    traced = tf.function(lambda x: function(x, codes, scale, *arguments), input_signature=signature)
    found = traced(tf.constant(x.reshape(2, 3, 20))).numpy()
    np.testing.assert_allclose(found.reshape(6, 3), run(function, x, codes, scale, *arguments), rtol=1e-6, atol=1e-4)
