"""8-bit floating point for training: e4m3 forward, e5m2 gradients (Micikevicius et al. 2022)."""

import dataclasses
from dataclasses import dataclass

from keras_precision.formats.base import Format, register_format
from keras_precision.kernels.float8 import SCALINGS


@dataclass(frozen=True)
class Float8(Format):
    """Weights stay as they are; products round them, activations and gradients to 8 bits.

    Attributes:
        scaling: name of one of `kernels.float8.SCALINGS`: "tensor", one scale a tensor from its own greatest magnitude;
            "row", one for each row that a product contracts; "delayed", one a tensor from those of earlier steps.
    """

    scaling: str = "tensor"

    @property
    def has_amax_history(self):
        """Whether scales are made of the greatest magnitudes of earlier steps."""
        return self.scaling == "delayed"

    def with_option(self, text):
        """Returns this format with the scaling that a mode's text after `/` names.

        Raises:
            ValueError: it is none of `SCALINGS`.

        Example:
            >>> FLOAT8.with_option("delayed").has_amax_history
            True
        """
        if text not in SCALINGS:
            raise ValueError(
                f"Invalid quantization mode. Expected '{self.name}/<scaling>' with a scaling of {list(SCALINGS)}. "
                f"Received: '{self.name}/{text}'. Pass '{self.name}', which means '{self.name}/{self.scaling}'."
            )
        return dataclasses.replace(self, scaling=text)


FLOAT8 = register_format(Float8("float8", bits=8, keeps_weights=True))
