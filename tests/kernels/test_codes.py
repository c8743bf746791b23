"""PTX that decodes stored codes, run for a warp by a small interpreter of the few instructions in it."""

import re

import ml_dtypes
import numpy as np
import pytest

from keras_precision.formats import FORMATS
from keras_precision.kernels import codes

CODEBOOKS = {name: FORMATS[name].codebook.values for name in ("nf4", "fp4", "int4")}
CODEBOOKS["random"] = tuple(np.random.default_rng(0).standard_normal(16).tolist())


def prmt(a, b, selector):
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    picked = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = source[nibble & 7]
        picked |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * place
    return picked


def lop3(a, b, c, table):
    """Table's bit number 4 a + 2 b + c, for each bit."""
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def fma_of(dtype):
    def fma(*words):
        a, b, c = (np.array([word], "uint32").view("uint16").view(dtype).astype("float64") for word in words)
        return int((a * b + c).astype(dtype).view("uint32")[0])

    return fma


def add_float32(a, b):
    a, b = (np.array([word], "uint32").view("float32") for word in (a, b))
    return int((a + b).view("uint32")[0])


# Of one lane's words; what a shuffle does takes all of them.
INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "add.f32": add_float32,
    "shr": lambda a, b: a >> b,
    "prmt": prmt,
    "lop3": lop3,
    "fma.f16x2": fma_of("float16"),
    "fma.bf16x2": fma_of(ml_dtypes.bfloat16),
    "setp.ne": lambda a, b: int(a != b),
    "selp": lambda a, b, predicate: a if predicate else b,
}
LANES = 32


def number(text):
    """What an operand that is no register stands for; floats are written as their bits after 0f."""
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0)


def shuffled(values, sources, control):
    """shfl.sync.idx of all lanes, as the PTX manual defines it."""
    segment = control >> 8 & 31
    return [values[(lane & segment) | (source & 31 & ~segment)] for lane, source in enumerate(sources)]


def executed(code, n_outputs, inputs):
    """What an instance of the code leaves in its outputs; these and its inputs are lists of each lane's word."""
    registers = {f"${n_outputs + place}": words for place, words in enumerate(inputs)}
    registers |= {"%nctaid.x": [112] * LANES, "%laneid": list(range(LANES))}
    for line in code.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        name, target, *operands = re.fullmatch(r"(\S+) (.*);", line).expand(r"\1, \2").split(", ")
        values = [registers[x] if x in registers else [number(x)] * LANES for x in operands]
        if name == "shfl.sync.idx.b32":
            assert values[3] == [0xFFFFFFFF] * LANES
            registers[target] = shuffled(*values[:2], values[2][0])
            continue
        family, *middle, kind = name.split(".")
        keys = (family, f"{family}.{kind}", ".".join([family, *middle[:1]]))
        (function,) = {INSTRUCTIONS[key] for key in keys if key in INSTRUCTIONS}
        registers[target] = [function(*operands) for operands in zip(*values, strict=True)]
    return [registers[f"${place}"] for place in range(n_outputs)]


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
