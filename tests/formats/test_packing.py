"""Two codes a byte."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from keras_precision.formats import packing

# Few shapes, since JAX compiles for each.
codes = st.sampled_from([(2, 1), (8, 3)]).flatmap(lambda shape: arrays("uint8", shape, elements=st.integers(0, 15)))


@given(codes=codes, is_odd=st.booleans())
@settings(deadline=None)
def test_unpack_inverts_pack(codes, is_odd):
    packed = packing.pack(codes)
    rows = len(codes) - is_odd
    assert packed.shape == (len(codes) // 2, codes.shape[1]) and packed.dtype == np.uint8
    found = ops.convert_to_numpy(packing.unpack(ops.convert_to_tensor(packed), rows))
    assert found.dtype == np.uint8 and np.array_equal(found, codes[:rows])
    assert np.array_equal(ops.convert_to_numpy(packing.pack(ops.convert_to_tensor(codes))), packed)


def test_even_rows_are_in_the_high_nibble():
    assert packing.pack(np.array([[1, 15], [2, 0]], "uint8")).tolist() == [[0x12, 0xF0]]
