"""Products of few rows: each thread's part computed with arrays, an element a thread, as a GPU would; lowered."""

import dataclasses

import keras
import ml_dtypes
import numpy as np
import pretended
import pytest
from keras import ops
from interpreting import interpreter
from stored_weights import UNIT, numbers, scales_of, stored, tensors

from keras_precision.kernels import device, dispatch, few_rows, measured, one_thread, reference, warpgroup
from keras_precision.kernels.layout import Layout, expanded
from keras_precision.kernels.one_thread import Warps

NO_WARP, MANY_WARPS = -1, -2
pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("float32")}


def words(numbers_of_threads):
    """Float32 numbers as registers."""
    return np.asarray(numbers_of_threads, "float32").view("uint32")


def floats(registers):
    """Registers as float32 numbers."""
    return np.ascontiguousarray(registers, "uint32").view("float32")


def halves(registers, dtype):
    """Registers as pairs of 16-bit floats, in float32."""
    return np.ascontiguousarray(registers, "uint32").view(DTYPES[dtype]).reshape(-1, 2).astype("float32")


def packed(pairs, dtype):
    """Pairs of numbers as registers, rounded."""
    return np.ascontiguousarray(pairs.astype(DTYPES[dtype])).view("uint32")[:, 0]


class Threads:
    """A program's threads: what `threads.Thread` does, done by arrays of all of them.

    Between two barriers no warp may read what another stores, nor store what another reads or stores.
    """

    def __init__(self, count, shared_words):
        self.index = np.arange(count)
        self.stored = np.zeros(shared_words, bool)
        # The warp that did so since the last barrier, or one of the others.
        self.storing, self.reading = (np.full(shared_words, NO_WARP) for _ in range(2))

    bits_and, exclusive_or, shift_right = map(staticmethod, (np.bitwise_and, np.bitwise_xor, np.right_shift))
    remainder, quotient, least = (staticmethod(f) for f in (np.remainder, np.floor_divide, np.minimum))

    def add(self, a, b):
        return self._of_32_bits(np.add(a, b))

    def times(self, a, b):
        return self._of_32_bits(np.multiply(a, b))

    def _of_32_bits(self, number):
        number = np.asarray(number)
        assert number.dtype == np.uint32 or (np.abs(number) < 2**31).all()
        return number

    def is_less(self, a, b):
        return np.less(a, b).astype(int) + np.zeros_like(self.index)

    def load(self, reference, offset, constant, words, exists=None, keeps=False):
        exists = np.ones_like(self.index) if exists is None else exists
        offset = np.where(exists, offset + constant, 0)
        assert not (offset % (4 * words)).any()  # else the GPU raises
        assert (0 <= offset).all() and (offset + 4 * words <= reference.size).all()
        return [np.where(exists, reference.view("uint32")[offset // 4 + i], 0) for i in range(words)]

    def permute(self, a, b, selector):
        sources = [np.broadcast_to(np.asarray(x, "uint32"), self.index.shape) for x in (a, b)]
        of_both = [x >> 8 * byte & 255 for x in sources for byte in range(4)]
        chosen = [of_both[selector >> 4 * place & 7] for place in range(4)]
        return sum(byte.astype("uint32") << 8 * place for place, byte in enumerate(chosen)).astype("uint32")

    def pairs_subtracted(self, a, b, dtype):
        return packed(halves(a, dtype) - halves(np.broadcast_to(np.asarray(b, "uint32"), a.shape), dtype), dtype)

    def multiplied(self, a, b):
        return words(floats(a) * floats(b))

    def added(self, a, b):
        return words(floats(a) + floats(b))

    def multiplied_and_added(self, a, b, c):
        return words(floats(a).astype("float64") * floats(b) + floats(c))

    def expanded_scale(self, value, factor, offset, largest):
        layout = Layout((1, 1), largest_scale=largest)
        return words(expanded(ops.convert_to_tensor(floats(value) * floats(factor)), floats(offset), layout))

    def choose(self, values, lane):
        return words(np.array(values, "float32")[lane % 16])

    def from_lane(self, value, lane):
        return value[self.index // 32 * 32 + lane]

    def pair_of(self, low, high, dtype):
        return packed(np.stack([floats(low), floats(high)], axis=1), dtype)

    def zero(self):
        return np.zeros(self.index.shape, "uint32")

    def matrix_product(self, sums, a, b, dtype):
        """As PTX's manual shows who has what."""
        warps = len(self.index) // 32
        g, t = np.divmod(np.arange(32), 4)
        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        in_word = 4 if dtype == "int8" else 2
        assert (len(a), len(b)) == ((2, 1) if dtype == "int8" else (4, 2))

        def parts(register):
            found = register.view("int8") if dtype == "int8" else halves(register, dtype)
            return found.reshape(warps, 32, in_word)

        for j in range(in_word):
            for i, register in enumerate(a):
                left[:, g + 8 * (i % 2), in_word * t + j + 8 * (i // 2)] = parts(register)[:, :, j]
            for i, register in enumerate(b):
                right[:, in_word * t + j + 8 * i, g] = parts(register)[:, :, j]
        product = left @ right
        found = [product[:, g + 8 * (i // 2), 2 * t + i % 2].ravel() for i in range(4)]
        if dtype == "int8":
            return [own + added.astype("int64").astype("uint32") for own, added in zip(sums, found, strict=True)]
        return [words(floats(own) + added) for own, added in zip(sums, found, strict=True)]

    def number_of(self, integer):
        return words(integer.view("int32"))

    def load_shared(self, reference, offset, constant=0):
        place, warp = (offset + constant) // 4, self.index // 32
        assert self.stored[place].all() and np.isin(self.storing[place], [NO_WARP]).all()
        is_alone = (self.reading[place] == NO_WARP) | (self.reading[place] == warp)
        self.reading[place] = np.where(is_alone, warp, MANY_WARPS)
        return reference[place]

    def store_shared(self, reference, offset, value, constant=0):
        place, warp = (offset + constant) // 4, self.index // 32
        assert len(set(place)) == len(place)
        for others in (self.storing[place], self.reading[place]):
            assert ((others == NO_WARP) | (others == warp)).all()
        reference[place] = value
        self.stored[place], self.storing[place] = True, warp

    def barrier(self):
        self.storing[:] = self.reading[:] = NO_WARP

    def loop(self, count, body, carried):
        for turn in range(count):
            carried = body(turn, carried)
        return carried

    def store_pair(self, reference, offset, numbers, exists, dtype):
        size = DTYPES[dtype].itemsize
        both = np.stack([floats(x) for x in numbers], axis=1).astype(DTYPES[dtype])
        for place in range(2):
            at = (offset // size + place)[exists == 1]
            assert np.isnan(reference[at].astype("float32")).all()  # nothing is written twice
            reference[at] = both[exists == 1, place]


def computed(x, codes, scales, layout, warps, dtype, result):
    """What a kernel's programs store together, one after the other; parts of k are added up."""
    n, m, (parts, steps) = layout.shape[1], len(x), few_rows.parts_of_k(layout, warps)
    out = np.full(parts * m * n, np.nan, DTYPES[result])
    flat = [np.ascontiguousarray(array).view("uint8").ravel() for array in (x, codes, *scales)]
    own = {"layout": layout, "warps": warps, "dtype": dtype, "m": m, "result": result, "steps": steps}
    for strip in range(n // warps.columns):
        for part in range(parts):
            shared = np.zeros(one_thread.shared_words(layout, warps, m), "uint32")
            threads = Threads(32 * warps.warps, len(shared))
            one_thread.multiply(threads, strip, part, shared, *flat, out, **own)
    return out.reshape(parts, m, n).astype("float64").sum(axis=0)


# Each width, warps that share k and not, k split among programs, more k than fits, more steps ahead, 1 to 16 rows.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name, rows, shape, warps",
    [
        ("nf4", 1, (1024, 128), Warps(programs=1)),
        ("nf4", 9, (576, 256), Warps(width=16, warps=4, programs=1)),
        ("nf4-dq", 1, (1024, 128), Warps(programs=1)),
        ("nf4-dq", 10, (2624, 128), Warps(width=16, warps=4, programs=3)),
        ("int4/128", 16, (640, 128), Warps(programs=4)),
        ("int4/128", 16, (192, 128), Warps()),
        ("fp4", 3, (192, 128), Warps(64, 8, 4, 2, programs=8)),
        ("int8-weight-only", 5, (352, 128), Warps(64, 8, 8, programs=2)),
        ("int8-weight-only", 8, (1024, 128), Warps(64, 8, 8, 2, programs=6)),
    ],
)
def test_each_threads_part(name, rows, shape, warps, dtype):
    codec, parts, weight = stored(name, *shape)
    layout = codec.layout(shape)
    assert few_rows.can_run(layout, dtype)
    x = np.random.default_rng(rows).standard_normal((rows, shape[0])).astype(DTYPES[dtype])
    scales = [np.asarray(ops.convert_to_numpy(scale)) for scale in scales_of(parts)]
    codes = np.asarray(ops.convert_to_numpy(parts["codes"]))
    is_scaled_later = layout.block_size is None and few_rows.parts_of_k(layout, warps)[0] > 1
    found = computed(x, codes, [] if is_scaled_later else scales, layout, warps, dtype, "float32")
    found, x = found * (scales[0] if is_scaled_later else 1), x.astype("float64")
    # The bound that `product` documents.
    unit = UNIT[dtype] if layout.kind == "table" else 0
    bound = np.abs(x) @ np.abs(weight) * (unit + (shape[0] + 3) * 2.0**-24)
    assert (np.abs(found - x @ weight) <= bound + UNIT["float32"] * np.abs(x @ weight)).all()


def test_all_int8_codes_are_exact():
    """Each of the 256 codes, in each place of a word."""
    codes = np.random.default_rng(0).permuted(np.tile(np.arange(-128, 128, dtype="int8"), (128, 1)), axis=1).T
    for dtype in ("bfloat16", "float16"):
        x = np.eye(8, 256, k=3).astype(DTYPES[dtype])
        found = computed(x, codes, [], Layout((256, 128)), Warps(64, 8, 4, programs=1), dtype, "float32")
        np.testing.assert_array_equal(found, codes[3:11])


def test_integer_products_are_exact():
    draw = np.random.default_rng(0)
    x, codes = (draw.integers(-127, 128, shape).astype("int8") for shape in [(9, 1056), (1056, 128)])
    of_columns, of_rows = (draw.uniform(0.5, 2, size).astype("float32") for size in (128, 9))
    layout, exact = Layout(codes.shape), (x.astype(int) @ codes.astype(int)).astype("float64")
    assert few_rows.can_run(layout, "int8")
    found = computed(x, codes, [], layout, Warps(64, 8, 8, programs=8), "int8", "float32")
    np.testing.assert_array_equal(found, exact)
    found = computed(x, codes, [of_columns, of_rows], layout, Warps(64, 8, 8, programs=1), "int8", "float32")
    np.testing.assert_allclose(found, exact * of_columns * of_rows[:, None].astype("float64"), rtol=3e-7)


def test_interpreted_integer_products():
    _, parts, _ = stored("int8", 416, 256)
    draw = np.random.default_rng(0)
    x, x_scale = draw.integers(-127, 128, (9, 416)).astype("int8"), draw.uniform(0.5, 2, (9, 1)).astype("float32")
    arguments = *map(ops.convert_to_tensor, (x, x_scale)), *map(tensors(parts).get, ("codes", "scale")), "float32"
    for programs in (1, 8):
        warps = Warps(64, 8, 8, programs=programs)
        found = few_rows.integer_product(*arguments, warps, interpret=interpreter())
        np.testing.assert_allclose(numbers(found), numbers(reference.scaled_products(*arguments)), rtol=1e-6)


def test_results_are_rounded_to_their_dtype():
    codec, parts, weight = stored("nf4", 256, 128)
    x = np.random.default_rng(0).standard_normal((2, 256)).astype(DTYPES["bfloat16"])
    arguments = x, np.asarray(ops.convert_to_numpy(parts["codes"])), scales_of(parts), codec.layout((256, 128))
    whole, rounded = (computed(*arguments, Warps(programs=1), "bfloat16", dtype) for dtype in ("float32", "bfloat16"))
    np.testing.assert_array_equal(rounded, whole.astype(DTYPES["bfloat16"]).astype("float64"))


@pytest.mark.parametrize("name, programs", [("nf4", 1), ("nf4", 6), ("nf4-dq", 6)])
def test_interpreted(name, programs):
    """What surrounds the threads' parts: strips, parts of k, and sums of them."""
    codec, parts, weight = stored(name, 1088, 256)
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((3, 1088), dtype="float32"), "bfloat16")
    warps = Warps(programs=programs)
    arrays = parts["codes"], scales_of(parts), codec.layout((1088, 256))
    found = few_rows.product(x, *arrays, warps, "bfloat16", "float32", interpret=interpreter())
    np.testing.assert_allclose(numbers(found), numbers(x) @ weight, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "name, most, function",
    [("nf4", 16, "product"), ("nf4-dq", 8, "product"), ("int4-dq", 8, "product"), ("int8", 16, "integer_product")],
)
def test_dispatch(monkeypatch, name, most, function):
    """Few rows take this kernel on Hopper, and more rows another."""
    codec, parts, weight = stored(name, 128, 128)
    calls = []

    def record(module):
        run = getattr(module, function)

        def recorded(*arguments):
            calls.append(module)
            return run(*arguments, interpret=interpreter())

        monkeypatch.setattr(module, function, recorded)

    record(few_rows)
    record(warpgroup)
    pretended.on_nvidia(monkeypatch, hopper=True)
    for rows in (1, most, most + 1):
        x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((rows, 128), dtype="float32"), "bfloat16")
        found = codec.matmul(x, tensors(parts), (128, 128), "bfloat16")
        np.testing.assert_allclose(numbers(found), numbers(x) @ weight, rtol=0.02, atol=0.5)
    assert calls == [few_rows, few_rows, warpgroup]


def test_a_kernel_that_cannot_run_is_left_out(monkeypatch):
    """Rows of an int8 weight that are a multiple of 32 are enough for few rows, not for more."""
    layout = Layout((160, 128))
    monkeypatch.setattr(device, "has_wgmma", lambda: True)
    assert isinstance(dispatch._hopper_tile("integers", layout, 16, "int8"), Warps)
    assert dispatch._hopper_tile("integers", layout, 17, "int8") is None
    assert dispatch._hopper_tile("bytes", layout, 1, "float32") is None
    monkeypatch.setattr(device, "has_wgmma", lambda: False)
    assert dispatch._hopper_tile("integers", layout, 16, "int8") is None


@pytest.mark.parametrize("wrong", [{"columns": 256}, {"columns": 64, "width": 16}, {"width": 4}, {"warps": 12}])
def test_bad_tiles(wrong):
    with pytest.raises(ValueError, match="Expected `columns` 64 or 128"):
        Warps(**wrong)


def test_what_can_run():
    plain = Layout((4096, 14336), (0.0,) * 16, 64)
    assert few_rows.can_run(plain, "bfloat16") and few_rows.can_run(Layout((96, 128)), "float16")
    assert few_rows.can_run(dataclasses.replace(plain, largest_scale=1.0), "bfloat16")
    assert not few_rows.can_run(plain, "float32")
    assert not any(few_rows.can_run(Layout(shape), "bfloat16") for shape in [(100, 128), (128, 100)])
    assert not few_rows.can_run(Layout((4096, 128), (0.0,) * 16, 32), "bfloat16")


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int4", "int8-weight-only", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [256, 14336])
def test_lowers_for_cuda(name, dtype, n):
    import jax

    codec, parts, _ = stored(name, 128, 256)
    layout = dataclasses.replace(codec.layout((128, 256)), shape=(4096, n))
    kind = {"int8": "integers", "nf4-dq": "double-quantized table"}.get(name, layout.kind)
    tile = measured.first_for(8, measured.HOPPER_TILES[kind])

    def shaped(array):
        shapes = {2: lambda: (array.shape[0] * 32, n), 1: lambda: (n,), 0: tuple}
        return jax.ShapeDtypeStruct(shapes[array.ndim](), array.dtype)

    def products(codes, *scales):
        if name == "int8":
            ones = [(jax.numpy.ones((m, 4096), "int8"), jax.numpy.ones((m, 1))) for m in (1, 9)]
            return [few_rows.integer_product(*of_x, codes, *scales, dtype, tile) for of_x in ones]
        return [few_rows.product(jax.numpy.ones((m, 4096), dtype), codes, scales, layout, tile, dtype) for m in (1, 9)]

    arrays = map(shaped, (parts["codes"], *scales_of(parts)))
    text = jax.jit(products).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
