"""8-bit integers, but for features of large activations (Dettmers et al. 2022, LLM.int8())."""

import dataclasses
import re
from dataclasses import dataclass

import numpy as np

from keras_precision.formats.base import register_format
from keras_precision.formats.int8_weight_only import Int8WeightOnly
from keras_precision.kernels import dispatch, reference


@dataclass(frozen=True)
class LLMInt8(Int8WeightOnly):
    """Stores what `Int8WeightOnly` does and multiplies as `Int8`, but features of large activations in 16 bits.

    Attributes:
        threshold: > 0; a feature in which any token's magnitude is greater is
            multiplied in the compute dtype with decoded weights.
    """

    threshold: float = 6.0
    multiplies_codes = True  # a class attribute: no annotation, no field

    def with_option(self, text):
        """Returns this format with the threshold that a mode's text after `/` gives.

        Args:
            text: plain decimal number in its shortest form.

        Raises:
            ValueError: it is no such number, or not positive.

        Example:
            >>> LLM_INT8.with_option("4.5").threshold
            4.5
        """
        # One policy, one name: "6.0", "06" and "6e0" are other names of "6".
        if not re.fullmatch(r"(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", text) or not 0 < float(text) < np.inf:
            raise ValueError(
                f"Invalid quantization mode. Expected '{self.name}/<threshold>' with a number > 0 in its shortest form. "
                f"Received: '{self.name}/{text}'. Pass '{self.name}/6', or '{self.name}', which means the same."
            )
        return dataclasses.replace(self, threshold=float(text))

    def matmul(self, x, parts, shape, dtype):
        """Returns x times the weight, mostly in 8 bits; see `kernels.reference.mixed_integer_matmul`."""
        products = dispatch.integer_products(x, parts["codes"])
        return reference.mixed_integer_matmul(x, parts["codes"], parts["scale"], self.threshold, dtype, products)


LLM_INT8 = register_format(LLMInt8("llm-int8", bits=8))
