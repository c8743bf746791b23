"""8-bit integers with a scale per output channel, multiplied with 8-bit activations."""

from keras_precision.formats.base import register_format
from keras_precision.formats.int8_weight_only import Int8WeightOnly
from keras_precision.kernels import dispatch, reference


class Int8(Int8WeightOnly):
    """Stores what `Int8WeightOnly` does, multiplied with activations that are quantized to 8 bits, a scale per token."""

    multiplies_codes = True

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight, both in 8 bits; see `kernels.reference.integer_matmul`."""
        products = dispatch.integer_products(x, parts["codes"])
        return reference.integer_matmul(x, parts["codes"], parts["scale"], dtype, products)


INT8 = register_format(Int8("int8", bits=8))
