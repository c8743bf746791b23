"""Two 4-bit codes a byte, turned into 16-bit numbers in a GPU's registers.

A codebook's values lie in 8 registers, as high and low bytes, and one instruction (`prmt`) picks 4 of 8 bytes: so 8
codes take 8 look-ups and 8 selects. Whole numbers in a row take less: or-ing a code into the mantissa of a power of two
makes a number of it.
"""

from __future__ import annotations

import numpy as np

# A float of which a code in the low bits of its mantissa makes the power of two plus the code; 1; PTX's name of the pair.
_WHOLE = {"float16": (1024, "f16x2"), "bfloat16": (128, "bf16x2")}
# Bytes that an instance of the table's code decodes: more of them share its constants.
_WORDS_OF_TABLE = 4


def are_whole(values: tuple[float, ...]) -> bool:
    """Returns whether 16 values are whole numbers in a row, small enough for 16 bits to hold them."""
    return np.array_equal(np.diff(values), np.ones(15)) and values[0] % 1 == 0 and abs(values[0]) <= 64


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
    import jax
    from jax.experimental.pallas import triton

    is_whole = are_whole(values)
    code, words = (_whole(values[0], dtype), 1) if is_whole else (_table(values, dtype), _WORDS_OF_TABLE)
    (found,) = triton.elementwise_inline_asm(
        code,
        args=[packed],
        constraints=",".join(["=r"] * 4 * words + ["r"] * words),
        pack=4 * words,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, "int32")],
    )
    return found


def unpacked(packed_pairs, dtype: str, result: str) -> list:
    """Returns the high nibbles' values and the low nibbles', of what `pairs` returned.

    Args:
        packed_pairs: int32 tensor.
        dtype: of the values in it.
        result: this dtype or "float32".
    """
    import jax

    if dtype == "bfloat16" and result == "float32":  # whose upper half bfloat16 is
        words = [packed_pairs & np.int32(-65536), packed_pairs << 16]
        return [jax.lax.bitcast_convert_type(word, result) for word in words]
    bits = [(packed_pairs >> 16).astype("int16"), packed_pairs.astype("int16")]
    return [jax.lax.bitcast_convert_type(half, dtype).astype(result) for half in bits]


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


def _table(values, dtype):
    """Returns code for any 16 values."""
    bits = _bits(values, dtype)
    tables = {"H": (bits >> 8).astype("uint8").view("<u4"), "L": (bits & 255).astype("uint8").view("<u4")}
    names = [f"{table}{place}" for table in tables for place in range(4)]
    # 0, which the compiler can't know: it would load constants anew at each use.
    lines = ["mov.u32 zero, %nctaid.x;", "shr.u32 zero, zero, 31;", "mov.b32 low7, 0x7f;"]
    lines += [f"xor.b32 {table}{place}, zero, 0x{tables[table][place]:08x};" for table in tables for place in range(4)]
    for word in range(_WORDS_OF_TABLE):
        codes = f"${4 * _WORDS_OF_TABLE + word}"
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


def _scope(registers, lines):
    return "\n".join(["{", f".reg .b32 {', '.join(registers)};", *lines, "}"])
