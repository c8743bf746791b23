"""Stored codes, two of 4 bits or one of 8 a byte, turned into numbers in a GPU's registers.

A codebook's float32 values lie in a register of each of a warp's lanes, one a lane and all of them twice, and a thread
asks the lane that its code names: a shift and a shuffle a code. Where matrix units are fed, shared memory, which does
the shuffling too, is busy with that; there 16-bit values lie in 8 registers, as high and low bytes, and one instruction
(`prmt`) picks 4 of 8 bytes: 8 codes take 8 look-ups and 8 selects. Whole numbers in a row take less: or-ing a code into
the mantissa of a power of two makes a number of it.
"""

from __future__ import annotations

import numpy as np

# A float of which a code in the low bits of its mantissa makes the power of two plus the code; 1; PTX's name of the pair.
_WHOLE = {"float16": (1024, "f16x2"), "bfloat16": (128, "bf16x2")}
# Words of codes that an instance of a codebook's code decodes: more of them share its constants.
_WORDS = 4


def are_whole(values: tuple[float, ...]) -> bool:
    """Returns whether 16 values are whole numbers in a row, small enough for 16 bits to hold them."""
    return np.array_equal(np.diff(values), np.ones(15)) and values[0] % 1 == 0 and abs(values[0]) <= 64


def asked_for(target: str, values: str, code: str) -> str:
    """Returns PTX, for all lanes of a warp, that takes what the lane has that a code names, of 16 in the own half.

    Args:
        target: register.
        values: register, of which each lane has another value.
        code: register; only the code's four bits count, those above are ignored.
    """
    of_16_lanes, all_lanes = "0x101f", "0xffffffff"
    return f"shfl.sync.idx.b32 {target}, {values}, {code}, {of_16_lanes}, {all_lanes};"


def pairs(packed, values: tuple[float, ...], dtype: str):
    """Returns the two values of each byte, in a Pallas kernel for a GPU.

    Args:
        packed: uint8 tensor whose last axis is a multiple of 16 long.
        values: 16 numbers, those of the codes.
        dtype: "float16" or "bfloat16", to which the values are rounded.

    Returns:
        int32 tensor of the same shape: the bits of the high nibble's value in
        the upper half, those of the low nibble's in the lower half.
    """
    code, words = (_whole(values[0], dtype), 1) if are_whole(values) else (_table(values, dtype), _WORDS)
    return _assembled(code, words, packed, "int32")


def values(packed, codebook: tuple[float, ...] | None, interpret: bool = False) -> list:
    """Returns the float32 values of bytes' codes, in a Pallas kernel for a GPU.

    Args:
        packed: uint8 tensor whose last axis is a multiple of 16 long; int8 if
            there is no codebook.
        codebook: 16 numbers, those of the codes; None for codes that are
            numbers themselves.
        interpret: True for what runs on any device, slowly.

    Returns:
        The high nibbles' values and the low nibbles', or the bytes'.
    """
    import jax.numpy as jnp

    if codebook is None:
        return [packed.astype("float32") if interpret else _assembled(_integers(), 1, packed, "float32")]
    if interpret:
        codes = [packed >> 4, packed & 15]
        return [sum(jnp.where(code == place, value, 0.0) for place, value in enumerate(codebook)) for code in codes]
    return [_assembled(_shuffled(codebook, is_high), _WORDS, packed, "float32") for is_high in (True, False)]


def interpreted(packed, codebook: tuple[float, ...] | None):
    """Returns the float32 values (rows, columns) of a tile's codes, slowly, in a Pallas kernel on any device."""
    import jax.numpy as jnp

    found = values(packed, codebook, interpret=True)
    return jnp.stack(found, axis=1).reshape(-1, packed.shape[1])


def _assembled(code, words, packed, dtype):
    """Returns one result of 32 bits for each byte, as the code makes them of `words` words at a time."""
    import jax
    from jax.experimental.pallas import triton

    (found,) = triton.elementwise_inline_asm(
        code,
        args=[packed],
        # Results are written before all of the arguments are read.
        constraints=",".join(["=&r"] * 4 * words + ["r"] * words),
        pack=4 * words,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, dtype)],
    )
    return found


def unpacked(packed_pairs, dtype: str) -> list:
    """Returns the high nibbles' values and the low nibbles', of what `pairs` returned.

    Args:
        packed_pairs: int32 tensor.
        dtype: of the values in it.
    """
    import jax

    bits = [(packed_pairs >> 16).astype("int16"), packed_pairs.astype("int16")]
    return [jax.lax.bitcast_convert_type(half, dtype) for half in bits]


def _bits(numbers, dtype):
    """Returns the bits of numbers rounded to a 16-bit dtype, uint16."""
    import ml_dtypes  # noqa: F401, which makes NumPy know bfloat16

    return np.asarray(numbers, "float32").astype(dtype).view("uint16")


def _words(numbers, dtype):
    """Returns each number's bits twice over, as PTX writes them."""
    return [f"0x{word:08x}" for word in _bits(numbers, dtype).astype("uint32") * 0x10001]


def _whole(least, dtype):
    """Returns code for values that start at `least` and go up by one."""
    power, pair = _WHOLE[dtype]
    base, one, offset = _words([power, 1, least - power], dtype)
    lines = [f"mov.b32 one, {one};", f"mov.b32 offset, {offset};", "shr.b32 high, $4, 4;"]
    for byte in range(4):
        # Bytes: low nibble's, the same again, high nibble's, the same again; what is not a code is masked.
        selector = byte | byte << 4 | (4 + byte) << 8 | (4 + byte) << 12
        lines += [
            f"prmt.b32 bits, $4, high, 0x{selector:04x};",
            f"lop3.b32 bits, bits, 0x000f000f, {base}, 0xEA;",  # (a & b) | c
            f"fma.rn.{pair} ${byte}, bits, one, offset;",
        ]
    return _scope(["high", "bits", "one", "offset"], lines)


def _shuffled(values, is_high):
    """Returns code for the float32 values of the high nibbles of words, or of the low ones."""
    # Each lane selects the value whose place its number ends with: the odd or the even one of pairs, of pairs of these...
    lines = ["mov.u32 code, %laneid;"]
    left = [f"0x{word:08x}" for word in np.asarray(values, "float32").view("uint32")]
    registers = []
    for bit in range(4):
        lines += [f"and.b32 chosen, code, {1 << bit};", f"setp.ne.u32 is_odd{bit}, chosen, 0;"]
    for bit in range(4):
        found = [f"left{bit}_{place}" for place in range(len(left) // 2)]
        lines += [
            f"selp.b32 {target}, {odd}, {even}, is_odd{bit};"
            for target, even, odd in zip(found, left[::2], left[1::2], strict=True)
        ]
        registers, left = registers + found, found
    (own,) = left
    for word in range(_WORDS):
        for byte in range(4):
            shift = 8 * byte + 4 * is_high
            lines += [f"shr.u32 code, ${4 * _WORDS + word}, {shift};", asked_for(f"${4 * word + byte}", own, "code")]
    return _scope(["code", "chosen", *registers], lines, [f"is_odd{bit}" for bit in range(4)])


def _table(values, dtype):
    """Returns code for any 16 values."""
    bits = _bits(values, dtype)
    tables = {"H": (bits >> 8).astype("uint8").view("<u4"), "L": (bits & 255).astype("uint8").view("<u4")}
    names = [f"{table}{place}" for table in tables for place in range(4)]
    # 0, which the compiler can't know: it would load constants anew at each use.
    lines = ["mov.u32 zero, %nctaid.x;", "shr.u32 zero, zero, 31;", "mov.b32 low7, 0x7f;"]
    lines += [f"xor.b32 {table}{place}, zero, 0x{tables[table][place]:08x};" for table in tables for place in range(4)]
    for word in range(_WORDS):
        codes = f"${4 * _WORDS + word}"
        # A selector's fourth bit asks for the sign of a byte instead; the table's upper half is looked up on its own.
        lines += [f"and.b32 s0, {codes}, 0x77777777;", "shr.b32 s1, s0, 16;"]
        lines += [f"and.b32 m0, {codes}, 0x88888888;", "shr.b32 m1, m0, 16;"]
        for half in "01":
            # 0xff where the code is in the lower half: 0x7f picked, or its sign, 0; and the eighth bit from the seventh.
            lines += [f"prmt.b32 m{half}, low7, low7, m{half};", f"add.u32 bits, m{half}, m{half};"]
            lines += [f"or.b32 m{half}, m{half}, bits;"]
            for table in tables:
                lines += [f"prmt.b32 lower, {table}0, {table}1, s{half};"]
                lines += [f"prmt.b32 upper, {table}2, {table}3, s{half};"]
                lines += [f"lop3.b32 {table}x{half}, m{half}, lower, upper, 0xCA;"]  # m ? lower : upper
        for byte in range(4):
            half, selector = byte // 2, ("0x5140", "0x7362")[byte % 2]
            lines += [f"prmt.b32 ${4 * word + byte}, Lx{half}, Hx{half}, {selector};"]
    work = ["zero", "low7", "s0", "s1", "m0", "m1", "bits", "lower", "upper", "Hx0", "Hx1", "Lx0", "Lx1"]
    return _scope([*work, *names], lines)


def _integers():
    """Returns code for the float32 values of a word's int8 codes; instructions that convert them are slower."""
    lines = ["xor.b32 codes, $4, 0x80808080;"]
    for byte in range(4):
        # 2**23 + 128 + the code, of which 2**23 + 128 is taken.
        lines += [f"prmt.b32 bits, codes, 0x4b000000, 0x744{byte};", f"add.f32 ${byte}, bits, 0fcb000080;"]
    return _scope(["codes", "bits"], lines)


def _scope(registers, lines, predicates=()):
    declared = [f".reg .b32 {', '.join(registers)};"]
    declared += [f".reg .pred {', '.join(predicates)};"] if predicates else []
    return "\n".join(["{", *declared, *lines, "}"])
