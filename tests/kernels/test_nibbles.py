"""PTX that decodes nibbles, run by a small interpreter of the few instructions in it."""

import re

import ml_dtypes
import numpy as np
import pytest

from keras_precision.formats import FORMATS
from keras_precision.kernels import nibbles

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


INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "add": lambda a, b: (a + b) & 0xFFFFFFFF,
    "shr": lambda a, b: a >> b,
    "prmt": prmt,
    "lop3": lop3,
    "fma.f16x2": fma_of("float16"),
    "fma.bf16x2": fma_of(ml_dtypes.bfloat16),
}


def executed(code, n_outputs, inputs):
    """What an instance of the code leaves in its outputs."""
    registers = {f"${n_outputs + place}": value for place, value in enumerate(inputs)} | {"%nctaid.x": 112}
    for line in code.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        name, target, *operands = re.fullmatch(r"(\S+) (.*);", line).expand(r"\1, \2").split(", ")
        family, *_, kind = name.split(".")
        values = [registers[x] if x in registers else int(x, 0) for x in operands]
        function = INSTRUCTIONS[f"{family}.{kind}" if family == "fma" else family]
        registers[target] = function(*values)
    return [registers[f"${place}"] for place in range(n_outputs)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_all_bytes_decode_to_their_values(name, dtype):
    values = CODEBOOKS[name]
    is_whole = nibbles.are_whole(values)
    assert is_whole == (name == "int4")
    code, words = (nibbles._whole(values[0], dtype), 1) if is_whole else (nibbles._table(values, dtype), 4)
    packed = np.random.default_rng(1).permutation(256).astype("uint8")
    found = []
    for inputs in packed.view("uint32").reshape(-1, words):
        found += executed(code, 4 * words, [int(word) for word in inputs])
    halves = np.array(found, "uint32").view("uint16").view(dtype).reshape(-1, 2)
    rounded = np.array(values, "float32").astype(dtype)
    np.testing.assert_array_equal(halves[:, 1], rounded[packed >> 4])
    np.testing.assert_array_equal(halves[:, 0], rounded[packed & 15])


def test_whole_numbers_must_fit():
    assert nibbles.are_whole(tuple(range(-8, 8)))
    assert not nibbles.are_whole(tuple(range(100, 116)))  # 128 + 100 + 15 has no bits left in bfloat16
    assert not nibbles.are_whole(tuple(x + 0.5 for x in range(16)))
    assert not nibbles.are_whole(tuple(range(0, 32, 2)))
