"""PTX that decodes stored codes, interpreted for a warp."""

import numpy as np
import pytest
from ptx import LANES, executed

from keras_precision.formats import FORMATS
from keras_precision.kernels import codes

CODEBOOKS = {name: FORMATS[name].codebook.values for name in ("nf4", "fp4", "int4")}
CODEBOOKS["random"] = tuple(np.random.default_rng(0).standard_normal(16).tolist())


def decoded(code, n_words, packed):
    """uint32 (lanes, bytes): what the code makes of each lane's bytes, some words at a time."""
    found = []
    for words in np.split(packed.view("uint32"), packed.shape[1] // 4 // n_words, axis=1):
        found += executed(code, 4 * n_words, words.T.tolist())
    return np.ascontiguousarray(np.array(found, "uint32").T)


def all_bytes():
    """uint8 (lanes, 256): all bytes, in another order in each lane."""
    draw = np.random.default_rng(1)
    return np.stack([draw.permutation(256) for _ in range(LANES)]).astype("uint8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_pairs_of_all_bytes(name, dtype):
    values = CODEBOOKS[name]
    is_whole = codes.are_whole(values)
    assert is_whole == (name == "int4")
    code, words = (codes._whole(values[0], dtype), 1) if is_whole else (codes._table(values, dtype), 4)
    packed = all_bytes()
    halves = decoded(code, words, packed).view("uint16").view(dtype)
    rounded = np.array(values, "float32").astype(dtype)
    np.testing.assert_array_equal(halves[:, 1::2], rounded[packed >> 4])
    np.testing.assert_array_equal(halves[:, ::2], rounded[packed & 15])


@pytest.mark.parametrize("is_high", [True, False])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_float32_values_of_all_bytes(name, is_high):
    packed = all_bytes()
    found = decoded(codes._shuffled(CODEBOOKS[name], is_high), 4, packed).view("float32")
    expected = np.array(CODEBOOKS[name], "float32")[packed >> 4 if is_high else packed & 15]
    np.testing.assert_array_equal(found, expected)


def test_all_integers():
    packed = all_bytes()
    found = decoded(codes._integers(), 1, packed).view("float32")
    np.testing.assert_array_equal(found, packed.view("int8").astype("float32"))


def test_whole_numbers_must_fit():
    assert codes.are_whole(tuple(range(-8, 8)))
    assert not codes.are_whole(tuple(range(100, 116)))  # 128 + 100 + 15 has no bits left in bfloat16
    assert not codes.are_whole(tuple(x + 0.5 for x in range(16)))
    assert not codes.are_whole(tuple(range(0, 32, 2)))
