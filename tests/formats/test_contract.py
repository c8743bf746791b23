"""What every format that encodes must do."""

import pickle
import re

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_precision.formats import FORMATS, Format, pieces

# Of the codebook, in multiples of its reach: half of the widest gap; int4 has 7 steps at one end and 8 at the other.
HALF_GAPS = {
    "nf4": (1 - 0.6961928) / 2,
    "fp4": (1 - 2 / 3) / 2,
    "int4": 1 / 8,
    "int8": 0.5 / 127,
    "int8-weight-only": 0.5 / 127,
    "llm-int8": 0.5 / 127,
}
# Mean |error| on N(0, 1) in blocks of 64, the first two as published for bitsandbytes; of int8 on 4096 rows, a quarter
# of the scale, E[max of 4096 |N|] / 127 = 3.85 / 127.
GOLDEN_ERRORS = {"nf4": 0.0728, "fp4": 0.0965, "int4": 0.0805, "int8": 0.0076}
SIZES = [(1, 1), (1, 65), (2, 3), (3, 2), (63, 64), (64, 63), (65, 1), (127, 128), (129, 127), (4097, 2), (200, 2050)]
LARGEST = float(np.finfo("float32").max)
# Half an ulp for each of: scale, its reciprocal, product, decoded scale, value, decoded weight.
ROUNDING = 6 * 2.0**-24


def base(codec):
    return codec.name.removesuffix("-dq")


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def decoded(codec, weight, dtype="float32"):
    parts = {name: ops.convert_to_tensor(part) for name, part in codec.encode(weight).items()}
    return ops.convert_to_numpy(ops.cast(codec.decode(parts, weight.shape, dtype), "float32"))


def absmax(codec, weight):
    """float64 (k, n): the greatest magnitude in each number's block."""
    k = len(weight)
    block = codec.block_size or k
    padded = np.pad(np.abs(weight.astype("float64")), ((0, -k % block), (0, 0)))
    return np.repeat(padded.reshape(-1, block, weight.shape[1]).max(axis=1), block, axis=0)[:k]


def scale_error(codec, weight):
    """The most that 8-bit scales are off, in the units of absmax: half of the map's widest gap, 0.0140625."""
    if not codec.name.endswith("-dq"):
        return 0
    scales = absmax(codec, weight)
    if base(codec) == "int4":
        return 2 * 0.00704 * scales.max() + scales.max() * 2.0**-15  # some scales are negative
    return 0.00704 * np.abs(scales - scales.mean()).max() + np.abs(scales).max() * 2.0**-15


def error_bound(codec, weight):
    scales = absmax(codec, weight)
    # Scales that might overflow when they are multiplied are made less by 2**-20.
    rounding = np.where(scales > LARGEST * (1 - 2**-19), 2.0**-20, 0) + ROUNDING
    return scales * (HALF_GAPS[base(codec)] + rounding) + scale_error(codec, weight) * 1.0001 + 2.0**-110


@pytest.mark.parametrize("shape", SIZES)
def test_parts_and_error(codec, shape):
    weight = random(shape)
    encoded, parts = codec.encode(weight), codec.parts(shape)
    assert list(encoded) == list(parts)
    for name, part in parts.items():
        assert type(encoded[name]) is np.ndarray
        assert (encoded[name].shape, encoded[name].dtype) == (part.shape, part.dtype), name
        assert len(part.axes) == len(part.shape) and set(part.axes) <= {0, 1, None}
        for size, axis in zip(part.shape, part.axes, strict=True):
            if axis == 1:
                assert size == shape[1]
            elif axis == 0:
                groups = [g for g in (1, 2, codec.block_size) if g]
                assert size in [-(-shape[0] // group) for group in groups]
    assert (np.abs(decoded(codec, weight) - weight) <= error_bound(codec, weight)).all()


def test_columns_do_not_depend_on_each_other(codec):
    """What stands beside a column, or pads a block, must not reach it; but double quantization shares an offset."""
    weight = random((100, 7))
    encoded = codec.encode(weight)
    for part in set(encoded) & {"codes", "scale"}:
        alone = codec.encode(weight[:, 3:4])[part]
        assert np.array_equal(alone[..., -1], encoded[part][..., 3])


def test_padding_does_not_reach_results(codec):
    """Zeros below a matrix, which complete its last block, leave its decoded rows as they are."""
    weight = random((67, 5))
    if not codec.name.endswith("-dq"):
        padded = np.concatenate([weight, np.zeros((61, 5), "float32")])
        assert np.array_equal(decoded(codec, padded)[:67], decoded(codec, weight))


def test_zeros_stay_zero(codec):
    assert not decoded(codec, np.zeros((130, 5), "float32")).any()
    weight = random((192, 6))
    weight[64:128] = 0
    weight[:, 2] = 0
    weight[:3] = -0.0
    found = decoded(codec, weight)
    assert not found[64:128].any() and not found[:, 2].any() and not found[:3].any()


@pytest.mark.parametrize("exponent", [-100, -40, 60, 120])
def test_powers_of_two_change_no_code(codec, exponent):
    """Also where a scale's reciprocal would be subnormal, 2**-126 and less, or its square overflow."""
    weight = random((130, 9))
    plain, scaled = codec.encode(weight), codec.encode(np.ldexp(weight, exponent))
    for name, part in plain.items():
        expected = np.ldexp(part, exponent) if part.dtype == "float32" else part
        assert np.array_equal(scaled[name], expected), name


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.1e-38, 1e-35])
def test_blocks_of_numbers_near_the_smallest_become_zeros(codec, value):
    weight = np.float32(value) * np.sign(random((70, 4)))
    assert not decoded(codec, weight).any()
    if not codec.name.endswith("-dq"):
        assert not codec.encode(weight)["scale"].any()


def test_smallest_numbers_among_others(codec):
    weight = random((128, 4))
    weight[::2] = np.float32(1e-40)
    weight[1::4] = np.float32(-1e-44)
    assert (np.abs(decoded(codec, weight) - weight) <= error_bound(codec, weight)).all()


def test_largest_numbers(codec):
    weight = np.clip(random((130, 9)).astype("float64") * 2e38, -LARGEST, LARGEST).astype("float32")
    weight[0, 0], weight[5, 0], weight[0, 1] = LARGEST, -LARGEST, -LARGEST
    weight[:, 2] = LARGEST
    found = decoded(codec, weight)
    assert np.isfinite(found).all()
    assert (np.abs(found.astype("float64") - weight) <= error_bound(codec, weight)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("large", [False, True])
def test_what_is_not_finite_is_refused(codec, value, large, monkeypatch):
    if large:
        monkeypatch.setattr(pieces, "LARGE", 1)
    weight = random((130, 70))
    weight[67, 69] = value
    with pytest.raises(ValueError, match=rf"finite in float32. Received: {value} at \[67, 69\]"):
        codec.encode(weight)


def test_what_overflows_float32_is_refused(codec):
    weight = np.ones((3, 2))
    weight[1, 0] = -1e39
    with pytest.raises(ValueError, match=r"finite in float32. Received: -1e\+39 at \[1, 0\]"):
        codec.encode(weight)


@pytest.mark.parametrize(
    "weight", [np.ones(3), np.ones((2, 2, 2)), np.ones((0, 3)), np.ones((3, 0)), np.ones((2, 2), int), np.float32(1)]
)
def test_what_is_no_float_matrix_is_refused(codec, weight):
    received = re.escape(f"Received: shape={weight.shape}, dtype={weight.dtype}")
    with pytest.raises(ValueError, match=rf"Expected a float weight of shape \(k, n\), k and n > 0. {received}"):
        codec.encode(weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_float_dtypes(codec, dtype):
    weight = random((66, 5)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    same(codec.encode(weight), codec.encode(weight.astype("float32")))


def same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("large", [False, True])
def test_where_a_weight_lies_changes_nothing(codec, large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(pieces, "LARGE", 1)
    weight = random((130, 37))
    expected = codec.encode(weight)
    np.save(tmp_path / "weight.npy", weight)
    variable = keras.Variable(weight)
    for other in (
        np.load(tmp_path / "weight.npy", mmap_mode="r"),
        np.asfortranarray(weight),
        np.repeat(weight, 2, axis=1)[:, ::2],
        ops.convert_to_tensor(weight),
        variable,
    ):
        same(codec.encode(other), expected)


def test_tensors_of_an_accelerator_are_encoded_there(codec, monkeypatch):
    """This one has the CPU's memory; what is cut are tensors all the same."""
    weight = random((300, 170))
    expected = codec.encode(weight)
    monkeypatch.setattr(pieces.hardware, "device_class", lambda: "gpu-9.0")
    monkeypatch.setattr(pieces, "LARGE", 1)
    for dtype in ("float32", "bfloat16"):
        tensor = ops.cast(weight, dtype)
        assert ops.is_tensor(pieces.as_matrix(tensor))
        same(codec.encode(tensor), expected if dtype == "float32" else codec.encode(ops.convert_to_numpy(tensor)))
    wrong = weight.copy()
    wrong[299, 160] = np.nan
    with pytest.raises(ValueError, match=r"finite in float32. Received: nan at \[299, 160\]"):
        codec.encode(ops.convert_to_tensor(wrong))


@pytest.mark.default_xla
@pytest.mark.parametrize("shape", [(65, 1), (300, 513), (1000, 1100)])
def test_compiled_and_plain_encoding_agree(codec, shape, monkeypatch):
    weight = random(shape) * np.exp2(np.random.default_rng(1).integers(-140, 126, shape[1]), dtype="float32")
    weight[np.random.default_rng(2).random(shape) < 0.01] = 1e-42
    weight[np.random.default_rng(3).random(shape) < 0.01] = -0.0
    monkeypatch.setattr(pieces, "LARGE", weight.size + 1)
    plain = codec.encode(weight)
    monkeypatch.setattr(pieces, "LARGE", 1)
    same(codec.encode(weight), plain)


@pytest.mark.default_xla
@pytest.mark.parametrize("is_compiled", [False, True])
def test_one_piece_and_many_agree(codec, is_compiled, monkeypatch):
    weight = random((1100, 90))
    monkeypatch.setattr(pieces, "LARGE", 1 if is_compiled else 2**40)
    elements = "_COMPILED_ELEMENTS" if is_compiled else "_HOST_ELEMENTS"
    monkeypatch.setattr(pieces, elements, 2**22)
    whole = codec.encode(weight)
    monkeypatch.setattr(pieces, elements, 2**12)
    monkeypatch.setattr(pieces, "_COLUMNS", 32)
    same(codec.encode(weight), whole)


def test_small_weights_are_not_compiled(codec, monkeypatch):
    """200 layers of different shapes would take XLA half a minute."""
    monkeypatch.setattr(pieces, "compiled", lambda work: pytest.fail("compiled"))
    pieces._compiled.cache_clear()
    codec.encode(random((700, 1000)))


@pytest.mark.default_xla
@pytest.mark.parametrize("shape, dtype", [((65, 9), "float32"), ((128, 16), "bfloat16")])
def test_decoding_gives_the_same_bits_when_compiled(codec, shape, dtype, staged, tensors):
    parts = tensors(codec, random(shape))
    eager = codec.decode(parts, shape, dtype)
    assert keras.backend.standardize_dtype(eager.dtype) == dtype
    compiled = staged(lambda parts: codec.decode(parts, shape, dtype))(parts)
    assert np.array_equal(*(ops.convert_to_numpy(ops.cast(found, "float32")) for found in (eager, compiled)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decoding_rounds_once(codec, dtype, tensors):
    weight = random((130, 9))
    parts = tensors(codec, weight)
    in_float32 = codec.decode(parts, weight.shape, "float32")
    found = codec.decode(parts, weight.shape, dtype)
    assert np.array_equal(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (ops.cast(in_float32, dtype), found)))


@pytest.mark.parametrize(
    "k, indices, dtype",
    [(1, 3, "int32"), (63, [0], "uint8"), (64, [8, 0, 0, 4], "int64"), (130, [[1, 2], [8, 7], [2, 2]], "int32")],
)
def test_gathering_gives_decoded_columns(codec, k, indices, dtype, tensors):
    dtype = "int32" if keras.backend.backend() == "jax" else dtype  # which warns of what it has not
    shape = (k, 9)
    parts = tensors(codec, random(shape))
    found = codec.gather(parts, shape, ops.convert_to_tensor(indices, dtype), "bfloat16")
    expected = ops.convert_to_numpy(ops.cast(codec.decode(parts, shape, "bfloat16"), "float32")).T[np.array(indices)]
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert np.array_equal(ops.convert_to_numpy(ops.cast(found, "float32")), expected)


@pytest.mark.default_xla
def test_gathering_is_traceable(codec, staged, tensors):
    shape = (70, 40)
    parts, indices = tensors(codec, random(shape)), ops.convert_to_tensor([[3, 39], [0, 3]], "int32")
    found = staged(lambda parts, indices: codec.gather(parts, shape, indices, "float32"))(parts, indices)
    expected = codec.gather(parts, shape, indices, "float32")
    assert np.array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(expected))


@pytest.mark.parametrize(
    "leading, dtype, is_staged",
    [((), "float32", False), ((5,), "bfloat16", False), ((2, 1, 4), "float32", False), ((2, 3), "bfloat16", True)],
)
def test_matmul(codec, leading, dtype, is_staged, staged, tensors):
    """|error| <= |x| |w| (k + 4) u of float32 for the sum, 3 u of dtype for x, w and the result, and int8's of x."""
    shape = (130, 17)
    weight, x = random(shape), random((*leading, shape[0]), 1)
    parts = tensors(codec, weight)
    as_stored = ops.convert_to_numpy(codec.decode(parts, shape, "float32")).astype("float64")
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    bound = np.abs(x) @ np.abs(as_stored) * ((shape[0] + 4) * 2.0**-24 + 3.1 * unit)
    if "matmul" in type(codec).__dict__:  # x is rounded to the nearest of 255 values
        step = np.abs(x).max(axis=-1, keepdims=True) / 127 * (1 + 300 * unit)
        bound = bound + step / 2 * np.abs(as_stored).sum(axis=0)

    def matmul(x, parts):
        return codec.matmul(x, parts, shape, dtype)

    found = (staged(matmul) if is_staged else matmul)(ops.convert_to_tensor(x, dtype), parts)
    assert keras.backend.standardize_dtype(found.dtype) == dtype and tuple(found.shape) == (*leading, shape[1])
    assert (np.abs(ops.convert_to_numpy(ops.cast(found, "float32")) - x @ as_stored) <= bound).all()


def test_gradient_of_matmul_is_that_of_the_decoded_weight(codec, tensors):
    shape = (70, 5)
    parts, x, upstream = tensors(codec, random(shape)), random((3, 70), 1), random((3, 5), 2)
    expected = upstream @ ops.convert_to_numpy(codec.decode(parts, shape, "float32")).T

    def loss(x):
        return ops.sum(codec.matmul(x, parts, shape, "float32") * upstream)

    if keras.backend.backend() == "jax":
        import jax

        found = jax.grad(loss)(ops.convert_to_tensor(x))
    else:
        import tensorflow as tf

        variable = tf.Variable(x)
        with tf.GradientTape() as tape:
            value = loss(variable)
        found = tape.gradient(value, variable)
    # Five products and sums of numbers below 4 * 4.
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=0, atol=5 * 16 * 2.0**-23)


def test_encoding_what_was_decoded_gives_the_same_codes(codec):
    weight = random((130, 9))
    once = decoded(codec, weight)
    # Of double quantization the scales drift: their offset is the mean of what 8 bits made of them.
    if not codec.name.endswith("-dq"):
        again = decoded(codec, once)
        # int8 and int4 divide the greatest magnitude by 127 or 8 again.
        np.testing.assert_allclose(again, once, rtol=2.0**-22, atol=0)
    assert np.array_equal(nonzero_codes(codec, once), nonzero_codes(codec, weight))


def nonzero_codes(codec, weight):
    """The codes, but of two for zero the first: positive numbers near zero get the second of fp4, and zero the first."""
    codes = codec.encode(weight)["codes"]
    if base(codec) != "fp4":
        return codes
    high, low = (np.where(nibble == 8, 0, nibble) for nibble in (codes >> 4, codes & 15))
    return high * 16 + low


def test_mean_error_on_normal_numbers(codec):
    weight = random((4096, 256))
    error = np.abs(decoded(codec, weight) - weight).mean()
    golden = GOLDEN_ERRORS["int8" if "int8" in codec.name else base(codec)]
    # The standard error of a million numbers' mean is below 0.0001; 8-bit scales add 0.0001 at most.
    assert abs(error - golden) < 0.0003


@pytest.mark.parametrize(
    "block_size, plain, double", [(32, 5, 4.254), (64, 4.5, 4.127), (128, 4.25, 4.0635), (4096, 4.0078, 4.002)]
)
def test_bits_per_parameter(codec, block_size, plain, double):
    shape = (8192, 8192)
    if codec.block_size is None:
        assert abs(codec.bits_per_parameter(shape) - (codec.bits + 32 / 8192)) < 1e-9
    else:
        expected = double if codec.name.endswith("-dq") else plain
        assert abs(codec.with_option(str(block_size)).bits_per_parameter(shape) - expected) < 0.0006


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("k", [31, 32, 4097, 130])
def test_other_block_sizes(codec, block_size, k, tensors):
    if codec.block_size is None:
        return
    codec = codec.with_option(str(block_size))
    assert codec.block_size == block_size and isinstance(codec, Format)
    weight = random((k, 3))
    assert (np.abs(decoded(codec, weight) - weight) <= error_bound(codec, weight)).all()
    assert {name: part.shape for name, part in codec.encode(weight).items()} == {
        name: part.shape for name, part in codec.parts(weight.shape).items()
    }


def test_formats_are_values(codec):
    twin = pickle.loads(pickle.dumps(codec))
    assert twin == codec and hash(twin) == hash(codec)
    assert all(other != codec for name, other in FORMATS.items() if name != codec.name)
    if codec.block_size:
        assert codec.with_option("2048") != codec == codec.with_option("64")


@pytest.mark.parametrize("sign", [1, -1])
def test_int4_keeps_the_greatest_number_of_a_block_whatever_its_sign(sign):
    weight = np.linspace(-0.9, 0.9, 64, dtype="float32")[:, None] * np.ones((1, 3), "float32")
    weight[17] = sign * 1.0
    parts = FORMATS["int4"].encode(weight)
    assert (np.sign(parts["scale"]) == -sign).all()
    found = decoded(FORMATS["int4"], weight)
    assert (found[17] == sign).all() and np.abs(found - weight).max() <= 1 / 16 + 1 / 40  # 0.9 counts as 7 / 8
