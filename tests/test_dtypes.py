"""Tests of keras_precision.dtypes."""

import importlib
import math

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_precision import dtypes

FLOATS = tuple(dtypes.DTYPES)


def numpy_dtype(name):
    """Returns the NumPy dtype of a name, ml_dtypes' ones included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def softmax(logits):
    """Returns the softmax with every step rounded to the dtype of `logits`."""
    shifted = logits - logits.max()
    powers = np.exp(shifted).astype(logits.dtype)
    total = powers.astype("float32").sum()
    return (powers.astype("float32") / total).astype(logits.dtype)


@pytest.mark.parametrize("name", FLOATS)
def test_facts_equal_finfo(name):
    finfo = ml_dtypes.finfo(numpy_dtype(name))
    found = dtypes.info(name)
    assert found.bits == finfo.bits
    assert found.significand == finfo.nmant + 1
    assert found.max == float(finfo.max)
    assert found.tiny == float(finfo.smallest_normal)
    assert found.smallest_subnormal == float(finfo.smallest_subnormal)
    assert found.eps == float(finfo.eps) == 2.0 ** (1 - found.significand)


@pytest.mark.parametrize("name", [*FLOATS, "bool", "uint8", "int32", "complex64"])
def test_numpy_spellings_name_the_same_dtype(name):
    dtype = numpy_dtype(name if name != "bool" else "bool_")
    assert dtypes.name(dtype) == name
    assert dtypes.name(dtype.type) == name
    assert dtypes.nbytes(dtype) == np.zeros(1, dtype).nbytes


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("module", ["jax.numpy", "tensorflow"])
def test_backend_spellings_name_the_same_dtype(module, name):
    pytest.importorskip(module.partition(".")[0])
    assert dtypes.name(getattr(importlib.import_module(module), name)) == name


def test_integers_narrower_than_a_byte_take_one():
    assert dtypes.nbytes(ml_dtypes.int4) == np.zeros(1, ml_dtypes.int4).nbytes == 1


def test_only_floating_dtypes_are_float():
    for name in FLOATS:
        assert dtypes.is_float(name)
    for name in ("bool", "int8", "uint32", "complex64", "string"):
        assert not dtypes.is_float(name)


@pytest.mark.parametrize("wrong", [None, float, 3, object()])
@pytest.mark.parametrize("function", [dtypes.info, dtypes.is_float, dtypes.nbytes])
def test_no_dtype_raises_type_error(function, wrong):
    with pytest.raises(TypeError, match=r"(?s)Expected a dtype.*Received: dtype="):
        function(wrong)


@pytest.mark.parametrize("wrong", ["flaot32", "int7", "float", ""])
@pytest.mark.parametrize("function", [dtypes.info, dtypes.is_float, dtypes.nbytes])
def test_unknown_name_raises_value_error(function, wrong):
    with pytest.raises(ValueError, match=r"(?s)Expected one of.*Received: dtype="):
        function(wrong)


def test_dtypes_without_the_fact_raise_value_error():
    with pytest.raises(ValueError, match="Expected a floating dtype"):
        dtypes.info("int32")
    with pytest.raises(ValueError, match="Expected a floating dtype"):
        dtypes.safe_mask_value("bool")
    with pytest.raises(ValueError, match="fixed size"):
        dtypes.nbytes("string")


@pytest.mark.parametrize("name", FLOATS)
def test_safe_mask_value_is_exact_and_leaves_room(name):
    mask = dtypes.safe_mask_value(name)
    found = dtypes.info(name)
    assert float(np.asarray(mask, numpy_dtype(name))) == mask
    # Two masks, the lowest logit of the documented range, and the maximum of
    # the row subtracted: still finite.
    assert -2 * mask + 2 * (found.max / 16) <= found.max
    # The least distance below an unmasked logit: exp rounds to 0. In logarithms,
    # since float64 itself can't hold half its smallest subnormal.
    zero = math.log(found.smallest_subnormal) - math.log(2)
    assert mask + 2 * (found.max / 16) < zero


@st.composite
def attention_rows(draw, name):
    """Draws logits of the documented range and which of them are masked."""
    bound = dtypes.info(name).max / 16
    size = draw(st.integers(2, 8))
    logits = [draw(st.floats(-bound, bound)) for _ in range(size)]
    masks = [draw(st.integers(0, 2)) for _ in range(size)]
    dtype = numpy_dtype(name)
    # Rounding may leave the range: clip to its last value inside.
    rounded = np.clip(np.asarray(logits, dtype).astype("float64"), -bound, bound)
    return rounded.astype(dtype), np.asarray(masks)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@given(data=st.data())
def test_masked_positions_get_probability_zero(name, data):
    logits, masks = data.draw(attention_rows(name))
    value = np.asarray(dtypes.safe_mask_value(name), logits.dtype)
    masked = logits
    for count in (1, 2):
        masked = np.where(masks >= count, masked + value, masked).astype(logits.dtype)
    probabilities = softmax(masked).astype("float32")
    assert np.isfinite(masked.astype("float64")).all()
    assert np.isfinite(probabilities).all()
    if (masks == 0).any():
        assert (probabilities[masks > 0] == 0).all()
        # 8 terms, each rounded once, of a sum that is 1: off by 8 * eps / 2.
        assert abs(probabilities.sum() - 1) <= 4 * dtypes.info(name).eps


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@given(data=st.data())
def test_row_masked_everywhere_is_uniform(name, data):
    found = dtypes.info(name)
    bound = found.max * found.eps / 16 * 0.99
    logits = data.draw(st.lists(st.floats(-bound, bound), min_size=4, max_size=4))
    dtype = numpy_dtype(name)
    value = np.asarray(dtypes.safe_mask_value(name), dtype)
    masked = np.asarray(logits, dtype) + value
    assert (softmax(masked).astype("float32") == 0.25).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_softmax_of_the_backend_masks_exactly(name):
    logits = keras.ops.cast([[1.0, 2.0, 3.0, 2.5]] * 2, name)
    masks = keras.ops.cast([[0, 1, 1, 0], [1, 1, 1, 1]], name)
    masked = logits + masks * dtypes.safe_mask_value(name)
    assert keras.backend.standardize_dtype(masked.dtype) == name
    row, empty = keras.ops.convert_to_numpy(
        keras.ops.cast(keras.ops.softmax(masked), "float32")
    )
    assert row[1] == row[2] == 0 and row[0] > 0 and row[3] > 0
    assert (empty == 0.25).all()


def test_customary_mask_is_what_fails_in_float16():
    with np.errstate(over="ignore", invalid="ignore"):
        row = softmax(np.full(4, -1e9, "float16"))
    assert np.isnan(row).all()
