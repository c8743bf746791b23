"""A small interpreter of PTX: the few instructions that decode codes, run for a warp."""

import re

import ml_dtypes
import numpy as np


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


def of_float32(operation):
    def result(a, b):
        a, b = (np.array([word], "uint32").view("float32") for word in (a, b))
        return int(operation(a, b).view("uint32")[0])

    return result


def cvt_to(dtype):
    def cvt(upper, lower):
        return int(np.array([lower, upper], "uint32").view("float32").astype(dtype).view("uint32")[0])

    return cvt


# Of one lane's words; what a shuffle does takes all of them.
INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "add.f32": of_float32(np.add),
    "mul.f32": of_float32(np.multiply),
    "cvt.rn.f16x2.f32": cvt_to("float16"),
    "cvt.rn.bf16x2.f32": cvt_to(ml_dtypes.bfloat16),
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
        keys = (name, family, f"{family}.{kind}", ".".join([family, *middle[:1]]))
        (function,) = {INSTRUCTIONS[key] for key in keys if key in INSTRUCTIONS}
        registers[target] = [function(*operands) for operands in zip(*values, strict=True)]
    return [registers[f"${place}"] for place in range(n_outputs)]
