"""8-bit floating point codes in blocks (Micikevicius et al. 2022, "FP8 Formats for Deep Learning")."""

from dataclasses import dataclass

from keras import ops

from keras_precision import dtypes
from keras_precision.formats.float8 import FLOAT8
from keras_precision.optimizers.states import absmax
from keras_precision.optimizers.states.base import StateFormat, register_state_format

E4M3 = dtypes.info("float8_e4m3fn")


@dataclass(frozen=True)
class Float8(StateFormat):
    """Stores a signed value[i] as scale[block of i] * codes[i], an unsigned one as the square of that.

    The scale is the block's greatest magnitude (unsigned: its root) / 448,
    rounded to 20 significant bits, so that its product with a code's 4 is
    exact. The error of a number or root is at most 2**-4 of itself plus 2**-20
    of the greatest, or, below 2**-6 / 448 of the greatest, 2**-10 / 448 of it.
    e4m3 spans 2**-9 to 448, 5.4 decades, of which roots make 10.7. Zeros stay
    zero; positive numbers of an unsigned slot are raised to the least value,
    4.4e-6 of the greatest root.
    """

    def _quantized(self, grouped, is_signed, target):
        if is_signed:
            scale = _scale(absmax.absmax(grouped, target))
            scaled = grouped * absmax.reciprocal(scale)
        else:
            scale = _scale(ops.sqrt(absmax.absmax(grouped, target)))
            reciprocal = absmax.reciprocal(scale)
            # Roots from 2**-63 have squares that are not subnormal. The cast may round down, by less than half.
            least = ops.maximum(2.0**-62 * reciprocal, E4M3.smallest_subnormal)
            scaled = ops.sqrt(ops.abs(grouped)) * reciprocal
            scaled = ops.where(absmax.is_positive(grouped), ops.maximum(scaled, least), 0.0)
        # Rounding the scale may take the greatest beyond 448, and casts don't saturate: 480 would become NaN.
        return ops.clip(scaled, -E4M3.max, E4M3.max), scale

    def _dequantized(self, codes, scale, is_signed, target):
        product = codes * scale
        return product if is_signed else ops.square(product)

    def _loaded(self, codes, cols):
        # Before blocks are cut: TensorFlow 2.21 pads no float8.
        return ops.cast(codes, "float32")


def _scale(greatest):
    """Returns greatest / 448, rounded to 20 significant bits; 448 times it is finite where `greatest` is.

    Of the largest number, and of its root, the 4 bits dropped are 0100, so that
    it is rounded down.
    """
    pattern = ops.view(greatest * (1 / E4M3.max), "int32")
    kept = ops.view(pattern + 8 & -16, "float32")
    return ops.where(greatest >= 0, kept, greatest)  # the pattern of a GPU's NaN, all ones, would overflow


FLOAT8_STATE = register_state_format(Float8(FLOAT8.name, bits=8, block_size=256, code_dtype="float8_e4m3fn"))
