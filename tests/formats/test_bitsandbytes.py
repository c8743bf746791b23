"""Encoded weights against those that bitsandbytes 0.50.2 made on a CPU, bit for bit.

bitsandbytes' blocks run along rows of (out, in), ours along columns of (in, out): its arrays are those of the
transposed matrix.
"""

from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_precision.formats import FORMATS
from keras_precision.formats.double_quant import dynamic_map

VECTORS = np.load(Path(__file__).parent / "bitsandbytes_4bit.npz")
CASES = sorted(name.removesuffix("/packed") for name in VECTORS.files if name.endswith("/packed"))


def transposed(name, n):
    return VECTORS[name].reshape(n, -1).T


@pytest.mark.parametrize("case", CASES)
def test_equal_to_bitsandbytes(case, tensors):
    name, block_size, shape = case.split("/")
    codec = FORMATS[name].with_option(block_size)
    weight = VECTORS[f"{block_size}/{shape}/weight"].T
    n = weight.shape[1]
    encoded = codec.encode(weight)
    expected = {"codes": transposed(f"{case}/packed", n)}
    if f"{case}/offset" in VECTORS.files:
        expected["scale_codes"] = transposed(f"{case}/absmax_codes", n)
        expected["scale_absmax"] = VECTORS[f"{case}/absmax2"]
        expected["scale_offset"] = VECTORS[f"{case}/offset"]
    else:
        expected["scale"] = transposed(f"{case}/absmax", n)
    assert set(encoded) == set(expected)
    for part, array in expected.items():
        assert encoded[part].dtype == array.dtype and np.array_equal(encoded[part], array), part
    decoded = ops.convert_to_numpy(codec.decode(tensors(codec, weight), weight.shape, "float32"))
    assert np.array_equal(decoded, VECTORS[f"{case}/dequantized"].T)


def test_all_cases_are_here():
    assert {case.split("/")[0] for case in CASES} == {"nf4", "nf4-dq", "fp4", "fp4-dq"} and len(CASES) == 8


def test_dynamic_map():
    assert np.array_equal(dynamic_map(), VECTORS["code2"])
