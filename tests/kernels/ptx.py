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


def of_pairs(operation, dtype):
    def result(*words):
        pairs = (np.array([word], "uint32").view("uint16").view(dtype).astype("float64") for word in words)
        return int(operation(*pairs).astype(dtype).view("uint32")[0])

    return result


def multiplied_and_added(a, b, c):
    return a * b + c


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
    "sub.f32": of_float32(np.subtract),
    "mul.f32": of_float32(np.multiply),
    "cvt.rn.f16x2.f32": cvt_to("float16"),
    "cvt.rn.bf16x2.f32": cvt_to(ml_dtypes.bfloat16),
    "cvt.f32.f16": lambda a: int(np.array([a], "uint16").view("float16").astype("float32").view("uint32")[0]),
    "shr": lambda a, b: a >> b,
    "prmt": prmt,
    "lop3": lop3,
    "fma.f16x2": of_pairs(multiplied_and_added, "float16"),
    "fma.bf16x2": of_pairs(multiplied_and_added, ml_dtypes.bfloat16),
    "mul.f16x2": of_pairs(np.multiply, "float16"),
    "mul.bf16x2": of_pairs(np.multiply, ml_dtypes.bfloat16),
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


def places_of(addresses):
    """Which words of memory are at some addresses; banks don't collide."""
    places = np.array(addresses) // 4
    assert not (np.array(addresses) % 4).any() and len(set(places % 32)) == LANES
    return places


def halves(word):
    """A register's two 16-bit parts, the lower first."""
    return word & 0xFFFF, word >> 16


def executed(code, n_outputs, inputs, memory=None):
    """What an instance of the code leaves in its outputs; these and its inputs are lists of each lane's word.

    Words are read from and stored in `memory`, an array of them.
    """
    registers = {f"${n_outputs + place}": words for place, words in enumerate(inputs)}
    registers |= {"%nctaid.x": [112] * LANES, "%laneid": list(range(LANES))}
    for line in code.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        if access := re.fullmatch(r"(?:ld\.shared\.b32 (\S+), |st\.shared\.b32 )\[(\S+?)(\+\d+)?\](?:, (\S+))?;", line):
            target, base, offset, source = access.groups()
            places = places_of([word + int(offset or 0) for word in registers[base]])
            if target:
                registers[target] = memory[places].tolist()
            else:
                memory[places] = registers[source]
            continue
        if both := re.fullmatch(r"mov.b32 {(\S+), (\S+)}, (\S+);", line):
            lower, upper, source = both.groups()
            registers[lower], registers[upper] = zip(*map(halves, registers[source]), strict=True)
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
