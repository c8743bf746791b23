"""The contract of quantized storage formats."""

import abc
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from keras import ops

from keras_precision import dtypes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that a block-scaled format may take, in elements along the contraction axis."""


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded weight.

    Attributes:
        shape: of the array.
        dtype: of the array.
        axes: for each axis of the array, the axis of the matrix (k, n) that it
            runs along: 0 (contracted), 1 (output), or None for neither, so
            that what shards the matrix shards its parts.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * dtypes.nbytes(self.dtype)


@dataclass(frozen=True)
class Format:
    """A storage format as policies name it.

    Attributes:
        name: what stands before `/` or `_from_` in a policy's name.
        bits: width of one code, in bits.
        block_size: elements along the contraction axis that share one scale;
            None where scales are per channel or per tensor, so that no block
            size can be given.
        keeps_weights: True for formats that only multiply in fewer bits, so
            that weights stay as they are and are trained, and whose policies
            are `QuantizedFloat8DTypePolicy`.
    """

    name: str
    bits: int
    block_size: int | None = None
    keeps_weights: bool = False

    def with_option(self, text: str) -> "Format":
        """Returns this format as a mode's text after `/` specifies it: here, with that block size.

        Args:
            text: plain decimal integer.

        Raises:
            ValueError: the format takes no block size, or not this one.

        Example:
            >>> FORMATS["nf4"].with_option("128").block_size
            128
        """
        if self.block_size is None:
            raise ValueError(
                f"Invalid quantization mode. Format '{self.name}' takes no block size. "
                f"Received: '{self.name}/{text}'. Pass '{self.name}'."
            )
        # int() also takes "064", "6_4" and " 64": one policy, many names
        if not re.fullmatch("0|-?[1-9][0-9]*", text):
            raise ValueError(
                f"Invalid quantization mode. Expected '{self.name}/<block_size>' with an integer. "
                f"Received: '{self.name}/{text}'."
            )
        block_size = int(text)
        if block_size not in BLOCK_SIZES:
            raise ValueError(
                f"Invalid quantization mode. Expected block_size in {BLOCK_SIZES}. "
                f"Received: block_size={block_size} in '{self.name}/{text}'. "
                f"Pass '{self.name}/{self.block_size}'."
            )
        return dataclasses.replace(self, block_size=block_size)


class Codec(Format, abc.ABC):
    """A format that stores matrices as codes and scales.

    All matrices are (k, n): axis 0 is the one that a matmul contracts. The
    weight is approximately scale * (codes - zero_point), or
    scale * codebook[codes]. What is decoded has a tensor's dtype and may be
    traced; what is encoded are NumPy arrays.

    Attributes:
        multiplies_codes: whether `matmul` multiplies the codes themselves, with activations that it quantizes too.
    """

    multiplies_codes: ClassVar[bool] = False

    @abc.abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Returns what `encode` stores of a matrix of this shape, by name."""

    @abc.abstractmethod
    def encode(self, weight) -> dict[str, Any]:
        """Returns the NumPy arrays that `parts` describes.

        Blocks, or columns, whose greatest magnitude is below 2**-100 count as
        zeros; see `blocks.py`.

        Args:
            weight: float array or tensor (k, n), k and n > 0; read piece by
                piece, so that a memory-mapped file never lies in memory as a
                whole.

        Raises:
            ValueError: the weight is no such matrix, or holds inf or NaN.
        """

    @abc.abstractmethod
    def decode(self, parts, shape: tuple[int, int], dtype: str):
        """Returns the tensor (k, n) that the parts stand for.

        Computed in float32 and rounded to `dtype` once.

        Args:
            parts: tensors, as `parts` describes them.
            shape: (k, n).
            dtype: float dtype of the result.
        """

    @abc.abstractmethod
    def gather(self, parts, shape: tuple[int, int], indices, dtype: str):
        """Returns columns of what `decode` gives, without decoding the others.

        An embedding table is the matrix (dim, vocabulary).

        Args:
            parts: tensors, as `parts` describes them.
            shape: (k, n).
            indices: integer tensor of any shape, in [0, n).
            dtype: float dtype of the result.

        Returns:
            Tensor of shape (*indices.shape, k).
        """

    def matmul(self, x, parts, shape: tuple[int, int], dtype: str):
        """Returns x times the weight, in `dtype`.

        Args:
            x: float tensor (..., k).
            parts: tensors, as `parts` describes them.
            shape: (k, n).
            dtype: float dtype that it is computed in.

        Returns:
            Tensor (..., n).
        """
        return ops.matmul(ops.cast(x, dtype), self.decode(parts, shape, dtype))

    def bits_per_parameter(self, shape: tuple[int, int]) -> float:
        """Returns the bits that one element of a matrix of this shape takes, scales included."""
        return sum(part.nbytes for part in self.parts(shape).values()) * 8 / math.prod(shape)


FORMATS: dict[str, Format] = {}


def register_format(entry: Format) -> Format:
    """Adds `entry` to FORMATS under its name; returns it."""
    if entry.name in FORMATS:
        raise ValueError(f"Format '{entry.name}' is registered already.")
    FORMATS[entry.name] = entry
    return entry
