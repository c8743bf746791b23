"""What every format that keeps an optimizer's slots must do."""

import functools
import math
import pickle

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_precision.formats.double_quant import dynamic_map
from keras_precision.kernels import rows
from keras_precision.optimizers.states import STATE_FORMATS, dynamic4, dynamic8, register_state_format
from keras_precision.optimizers.states.geometry import Folding

SHAPES = [(1,), (255,), (256,), (257,), (3, 5), (64, 256), (300, 7), (2, 3, 128), (1000,)]
LARGEST = float(np.finfo("float32").max)
# Half an ulp for each of: scale, quotient, decoded number, and the root's three, twice since it is squared.
ROUNDING = 12 * 2.0**-24
SMALLEST = 2.0**-100
MAPS = {"signed": dynamic8.SIGNED, "unsigned": dynamic8.UNSIGNED, "4 bits": dynamic4.SIGNED}


def pytest_generate_tests(metafunc):
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize("entry", STATE_FORMATS.values(), ids=STATE_FORMATS)
    if "is_signed" in metafunc.fixturenames:
        metafunc.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])


def random(shape, is_signed, seed=0):
    """Normal numbers, or their squares, over some decades."""
    generator = np.random.default_rng(seed)
    value = generator.standard_normal(shape) * 10.0 ** generator.uniform(-4, 0, shape)
    return (value if is_signed else value**2).astype("float32")


def numpy(parts):
    return {name: ops.convert_to_numpy(part) for name, part in parts.items()}


def decoded(entry, value, is_signed):
    _, found = there_and_back(entry, value.shape, is_signed)(ops.convert_to_tensor(value))
    return ops.convert_to_numpy(found)


@functools.cache
def there_and_back(entry, shape, is_signed):
    """Encodes and decodes: on JAX compiled, since it would compile every operation for itself."""

    def function(value):
        parts = entry.encode(value, is_signed)
        return parts, entry.decode(parts, shape, is_signed)

    return staged(function) if keras.backend.backend() == "jax" else function


def staged(function):
    """Makes a function run compiled by XLA."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def as_graph(function):
    """Makes a function run as TensorFlow's graph, without XLA."""
    import tensorflow as tf

    return tf.function(function, autograph=False)


COMPILERS = [staged, as_graph] if keras.backend.backend() == "tensorflow" else [staged]


def absmax(entry, value):
    """float64, of value's shape: the greatest magnitude in each number's block, 0 where it counts as zeros."""
    folding = Folding(value.shape, entry.block_size)
    flat = np.abs(value.astype("float64")).ravel()
    grouped = np.pad(flat, (0, -flat.size % entry.block_size)).reshape(-1, entry.block_size)
    assert len(grouped) == math.prod(folding.lead) * folding.n_blocks
    greatest = np.repeat(grouped.max(axis=1), entry.block_size)[: flat.size].reshape(value.shape)
    return np.where(greatest < SMALLEST, 0, greatest)


def half_gap(values):
    """Half of the widest gap among values; at -1, which is none, an end of the map is as far as that."""
    return np.diff(np.array(values)).max() / 2


def step_of_float8(number):
    """The most that e4m3 is off, of numbers up to 448: half of 2**-3 of the number's power of two, or of 2**-9."""
    return np.maximum(np.exp2(np.floor(np.log2(np.maximum(number, 2.0**-6)))) * 2.0**-4, 2.0**-10)


def root_bound(entry, value, greatest):
    """The most that the root of each number of an unsigned slot is off, in the units of the greatest root."""
    root = np.sqrt(value.astype("float64") / np.where(greatest == 0, np.inf, greatest))
    if entry.name == "dynamic4":
        return np.where(root < 1 / 16, 1 / 16, 1 / 32)
    # What is raised to 2**-9 is off by more than half of a step. The scale has 20 bits.
    step = np.where(root * 448 < 2.0**-9, 2.0**-9, step_of_float8(root * 448))
    return np.where(root > 0, step / 448, 0) + 2.0**-20


def error_bound(entry, value, is_signed):
    """float64, of value's shape: the most that `decode` may be off, derived from the values that codes have."""
    greatest = absmax(entry, value)
    magnitude = np.abs(value.astype("float64"))
    rounding = greatest * ROUNDING + np.where(greatest == 0, SMALLEST, 0)
    if entry.name == "dynamic8":
        values = (dynamic8.SIGNED if is_signed else dynamic8.UNSIGNED).values
        # Or by what is nearer to zero: gaps within a decade are 0.9 of it at most, and below it there is the next; what
        # is above zero may be raised to the least value.
        own = 0.45 / 0.55 * magnitude + 4e-7 * greatest
        return np.minimum(half_gap(values) * greatest, own) + rounding
    if is_signed and entry.name == "dynamic4":
        return half_gap(dynamic4.SIGNED.values) * greatest + rounding
    if is_signed:
        scale = np.where(greatest == 0, np.inf, greatest / 448)
        return step_of_float8(magnitude / scale) * greatest / 448 + greatest * 2.0**-19 + rounding
    # |a**2 - b**2| <= e * (2 * a + e) of roots that are e apart.
    error = root_bound(entry, value, greatest) * np.sqrt(greatest)
    return error * (2 * np.sqrt(magnitude) + error) + rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_and_error(entry, is_signed, shape):
    value = random(shape, is_signed)
    encoded = numpy(there_and_back(entry, shape, is_signed)(ops.convert_to_tensor(value))[0])
    parts = entry.parts(shape)
    assert list(encoded) == list(parts) == ["codes", "scale"]
    for name, part in parts.items():
        dtype = ml_dtypes.float8_e4m3fn if part.dtype == "float8_e4m3fn" else part.dtype
        assert (encoded[name].shape, encoded[name].dtype) == (part.shape, dtype), name
        assert part.axes == tuple(range(len(part.shape)))
        assert part.shape[:-1] == shape[: len(part.shape) - 1]
    found = decoded(entry, value, is_signed)
    assert (found.shape, found.dtype) == (shape, "float32")
    assert (np.abs(found.astype("float64") - value) <= error_bound(entry, value, is_signed)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_decoded_stays_as_it_is(entry, is_signed, shape):
    """For the greatest number of a block is stored exactly, or, in float8, a product that isn't rounded."""
    value = random(shape, is_signed) * np.exp2(np.random.default_rng(1).integers(-30, 30, shape)).astype("float32")
    once = decoded(entry, value, is_signed)
    assert np.array_equal(decoded(entry, once, is_signed).view("uint32"), once.view("uint32"))


@pytest.mark.parametrize("exponent", [-99, -96, -80, 60, 125])
def test_what_was_decoded_stays_as_it_is_at_the_ends_of_the_range(entry, is_signed, exponent):
    value = np.ldexp(np.clip(random((64, 256), is_signed), -1.9, 1.9), exponent)
    once = decoded(entry, value, is_signed)
    assert np.isfinite(once).all()
    assert np.array_equal(decoded(entry, once, is_signed), once)


@pytest.mark.default_xla
@pytest.mark.parametrize("compile", COMPILERS)
@pytest.mark.parametrize("shape", [(257,), (64, 256), (300, 7)])
def test_compiled_gives_the_same_bits(entry, is_signed, shape, compile):
    value = random(shape, is_signed)
    value.ravel()[::50] = 1e-41
    tensor = ops.convert_to_tensor(value)
    plain = entry.encode(tensor, is_signed)
    compiled = compile(lambda value: entry.encode(value, is_signed))(tensor)
    for name in plain:
        assert np.array_equal(numpy(plain)[name].view("uint8"), numpy(compiled)[name].view("uint8")), name
    found = compile(lambda parts: entry.decode(parts, shape, is_signed))(plain)
    expected = entry.decode(plain, shape, is_signed)
    assert np.array_equal(*(ops.convert_to_numpy(x).view("uint32") for x in (found, expected)))


def test_zeros(entry, is_signed):
    assert not decoded(entry, np.zeros((3, 256), "float32"), is_signed).any()
    value = random((4, 256), is_signed)
    value[1] = 0
    value[:, 7], value[:, 9] = 0, -0.0
    found = decoded(entry, value, is_signed)
    assert not found[1].any()
    if is_signed or entry.name != "dynamic4":
        assert not found[:, [7, 9]].any()
    else:  # whose least value is 1/16 of the greatest root
        greatest = np.maximum(absmax(entry, value)[:, [7]], 0)
        np.testing.assert_allclose(found[:, [7, 9]], np.repeat(greatest / 256, 2, axis=1), rtol=ROUNDING)


def test_positive_numbers_of_unsigned_slots_stay_positive(entry):
    for greatest in (2.0**-100, 1e-25, 1.0, 3e38):
        value = np.full((2, 256), greatest, "float32")
        value[:, 1::2] = np.float32(1e-30)
        value[:, 1::4] = np.float32(1e-45)
        value[:, 3::8] = np.float32(2.0**-126)
        value = np.minimum(value, np.float32(greatest))
        found = decoded(entry, value, False)
        assert (found >= np.finfo("float32").tiny).all() and np.isfinite(found).all()
        assert (found[:, ::2] >= greatest * (1 - 2.0**-18)).all()


@pytest.mark.parametrize("value", [1e-45, 1e-38, 2.0**-101])
def test_blocks_of_numbers_near_the_smallest_become_zeros(entry, is_signed, value):
    parts, found = there_and_back(entry, (2, 256), is_signed)(ops.full((2, 256), value))
    assert not numpy(parts)["scale"].any()
    assert not ops.convert_to_numpy(found).any()


def test_smallest_block_that_counts(entry, is_signed):
    value = np.full((1, 256), SMALLEST, "float32")
    np.testing.assert_allclose(decoded(entry, value, is_signed), value, rtol=2.0**-18)


def test_largest_numbers(entry, is_signed):
    value = np.clip(random((4, 256), is_signed).astype("float64") * 2e38, -LARGEST, LARGEST).astype("float32")
    value[0, 0], value[1, 0] = LARGEST, -LARGEST if is_signed else LARGEST
    value[2] = LARGEST
    value[3] = 3e38
    found = decoded(entry, value, is_signed)
    assert np.isfinite(found).all()
    assert (np.abs(found.astype("float64") - value) <= error_bound(entry, value, is_signed)).all()


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape, place", [((300,), 299), ((4, 256), 500)])
def test_what_is_not_finite_is_not_hidden(entry, is_signed, wrong, shape, place):
    value = random(shape, is_signed)
    value.ravel()[place] = wrong
    found = decoded(entry, value, is_signed).ravel()
    start = place // entry.block_size * entry.block_size
    block = slice(start, start + entry.block_size)
    assert np.isnan(found[block]).all()
    assert np.isfinite(np.delete(found, np.arange(found.size)[block])).all()


@pytest.mark.parametrize("number", [5.0, -5.0])
def test_greatest_number_of_a_block_is_kept(entry, number):
    """Though -1 is not among dynamic values: then the scale is negative."""
    value = np.clip(random((2, 256), True), -1, 1)
    value[:, 100] = number
    np.testing.assert_allclose(decoded(entry, value, True)[:, 100], number, rtol=2.0**-19)


def test_blocks_do_not_depend_on_each_other(entry, is_signed):
    value = random((4, 512), is_signed)
    alone = decoded(entry, value[2, 256:], is_signed)
    assert np.array_equal(decoded(entry, value, is_signed)[2, 256:], alone)


@pytest.mark.parametrize("shape", [(4096, 4096), (4096 * 4096,)])
def test_bits_per_parameter(entry, shape):
    assert entry.bits_per_parameter(shape) == {8: 8.125, 4: 4.25}[entry.bits]


@pytest.mark.parametrize("block_size", [16, 64, 2048])
@pytest.mark.parametrize("shape", [(15,), (3, 48), (2, 2048)])
def test_other_block_sizes(entry, is_signed, block_size, shape):
    other = entry.with_block_size(block_size)
    assert other.block_size == block_size and other.name == entry.name
    value = random(shape, is_signed)
    assert (np.abs(decoded(other, value, is_signed) - value) <= error_bound(other, value, is_signed)).all()


@pytest.mark.parametrize("block_size", [0, 8, 48, -64, True, 64.0, None, "64"])
def test_wrong_block_sizes_are_refused(entry, block_size):
    expected = rf"Expected block_size a power of two.* Received: block_size={block_size!r}. Pass {entry.block_size}."
    with pytest.raises(ValueError, match=expected):
        entry.with_block_size(block_size)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_slots_without_elements_or_axes_are_refused(entry, shape):
    with pytest.raises(ValueError, match="Expected the shape of a slot.* Keep such a slot in float32"):
        entry.parts(shape)


def test_formats_are_values(entry):
    twin = pickle.loads(pickle.dumps(entry))
    assert twin == entry and hash(twin) == hash(entry)
    assert entry.with_block_size(64) != entry
    with pytest.raises(ValueError, match="registered already"):
        register_state_format(entry)


@pytest.mark.parametrize(
    "shape, block_size, lead, cols, n_blocks",
    [
        ((1,), 256, (), 1, 1),
        ((64, 256), 256, (64,), 256, 1),
        ((4, 3, 128), 128, (4, 3), 128, 1),
        ((5, 2, 3, 128), 256, (5,), 768, 3),
        ((2, 3, 128), 512, (), 768, 2),
        ((300, 7), 256, (), 2100, 9),
        ((8, 1, 1), 16, (), 8, 1),
    ],
)
def test_folding(shape, block_size, lead, cols, n_blocks):
    folding = Folding(shape, block_size)
    assert (folding.lead, folding.cols, folding.n_blocks) == (lead, cols, n_blocks)
    assert folding.n_lead_axes == len(lead)


@pytest.mark.parametrize("decades, signed, unsigned", [(1, 0.062, 0.033), (2, 0.11, 0.062), (3, 0.18, 0.11)])
def test_relative_error_of_8_bits(is_signed, decades, signed, unsigned):
    """As documented: half of the first gap of the lowest decade, 0.45 / 2**p of 0.1 + 0.9 / 2**p."""
    value = np.geomspace(10.0**-decades, 1, 2_000 * 256, dtype="float32").reshape(-1, 256)
    value[:, 0] = 1
    found = decoded(STATE_FORMATS["dynamic8"], value, is_signed)
    most = signed if is_signed else unsigned
    assert 0.9 * most < (np.abs(found - value) / value).max() <= most


def test_even_columns_lie_in_high_nibbles():
    value = np.array([1.0, 0, -0.2, 0.9, 0.4], "float32")
    codes = numpy(STATE_FORMATS["dynamic4"].encode(ops.convert_to_tensor(value), True))["codes"]
    values = dynamic4.SIGNED.array
    assert values[codes >> 4].tolist() == [1, *values[[3, 12]]]
    assert values[codes[:2] & 15].tolist() == [0, values[14]]


def test_dynamic_values():
    """Of bitsandbytes and torchao."""
    assert np.array_equal(dynamic8.SIGNED.array, dynamic_map())
    for values, count in ((dynamic8.SIGNED, 256), (dynamic8.UNSIGNED, 256), (dynamic4.SIGNED, 16)):
        assert len(set(values.array)) == count and (np.diff(values.array) > 0).all()
        assert values.array[-1] == 1 and values.array[values.zero] == 0
    unsigned = dynamic8.UNSIGNED.array
    np.testing.assert_allclose(unsigned[1:4], [3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-6)
    np.testing.assert_allclose(unsigned[-2], 1 - 0.45 / 128, rtol=1e-6)
    # What unsigned decades have, signed ones have one decade lower, but for the first.
    halves = dynamic8.SIGNED.array[129:255]
    np.testing.assert_allclose(unsigned[1:127], halves / 10, rtol=3e-7)


@pytest.mark.parametrize("name", MAPS)
def test_computed_values_are_those_of_the_table(name):
    dynamic = MAPS[name]
    codes = np.arange(len(dynamic.values), dtype="uint8")
    found = ops.convert_to_numpy(dynamic.decode(codes, rows.ANY._replace(computes=True)))
    np.testing.assert_allclose(found, dynamic.array, rtol=2**-19, atol=0)
    again = ops.convert_to_numpy(dynamic.nearest(found[None] * 3, ops.array([3.0], "float32")))[0]
    np.testing.assert_array_equal(again, codes)


def nearest(dynamic, number, scale=1.0):
    scale = ops.full((1,), scale)
    return ops.convert_to_numpy(dynamic.nearest(ops.convert_to_tensor(number[None]), scale))[0]


def excess(dynamic, number, scale=1.0):
    """How much farther than the nearest value the chosen one is from each number / scale, as multiple of that."""
    scaled = (number * np.float32(scale)).astype("float32")
    codes = nearest(dynamic, scaled, scale)
    number = scaled.astype("float64") / np.float64(np.float32(scale))
    assert ((codes >= 0) & (codes < len(dynamic.values))).all()
    values = np.array(dynamic.values)
    above = np.clip(np.searchsorted(values, number), 1, len(values) - 1)
    least = np.minimum(np.abs(values[above] - number), np.abs(values[above - 1] - number))
    distance = np.abs(values[codes] - number)
    return np.where(distance == least, 0, (distance - least) / np.maximum(np.abs(number), 1e-300))


@pytest.mark.parametrize("dynamic", MAPS.values(), ids=MAPS)
def test_nearest_values(dynamic):
    """Against brute force, also one ulp beside each value and each middle, and at each value exactly."""
    array = dynamic.array
    middles = ((array[:-1].astype("float64") + array[1:]) / 2).astype("float32")
    around = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    generator = np.random.default_rng(0)
    spread = (10.0 ** generator.uniform(-9, 0, 200_000)).astype("float32")
    even = generator.uniform(0, 1, 200_000).astype("float32")
    number = np.concatenate([array, middles, *around, spread, even, [0]]).astype("float32")
    number = np.concatenate([number, -number]) if dynamic.zero else number[number >= 0]
    for scale in (1.0, 0.3, 7e20):
        assert excess(dynamic, number, scale).max() <= 2.0**-18
    assert np.array_equal(nearest(dynamic, array), np.arange(len(array)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=64, max_size=64))
def test_nearest_values_of_any_numbers(numbers):
    assert excess(dynamic8.SIGNED, np.array(numbers, "float32")).max() <= 2.0**-18
    assert excess(dynamic8.UNSIGNED, np.abs(np.array(numbers, "float32"))).max() <= 2.0**-18


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=300, max_size=300), st.booleans())
def test_8_bits_against_brute_force(numbers, is_signed):
    value = np.array(numbers, "float32")
    value = value if is_signed else np.abs(value)
    dynamic = dynamic8.SIGNED if is_signed else dynamic8.UNSIGNED
    entry = STATE_FORMATS["dynamic8"]
    parts = numpy(entry.encode(ops.convert_to_tensor(value), is_signed))
    scale = np.repeat(parts["scale"].astype("float64"), entry.block_size)[: value.size]
    assert np.array_equal(np.abs(scale), absmax(entry, value))
    wanted = scale[:, None] * np.array(dynamic.values)
    if not is_signed:  # zero is for zeros only
        wanted = np.where((value[:, None] > 0) & (wanted == 0) & (scale[:, None] > 0), np.inf, wanted)
    found = decoded(entry, value, is_signed)
    least = np.abs(wanted - value[:, None]).min(axis=1)
    # Beside `nearest`, half an ulp each of the quotient and of the product.
    bound = least + (2.0**-18 + 2.0**-23) * np.maximum(np.abs(value), np.abs(found.astype("float64")))
    assert (np.abs(found.astype("float64") - value)[scale != 0] <= bound[scale != 0]).all()
    assert not found[scale == 0].any()
