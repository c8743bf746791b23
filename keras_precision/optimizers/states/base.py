"""The contract of formats that keep an optimizer's slots in few bits."""

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_precision.formats.base import Part
from keras_precision.kernels import rows
from keras_precision.optimizers.states.geometry import Folding

LEAST_BLOCK_SIZE = 16


@dataclass(frozen=True)
class StateFormat(abc.ABC):
    """Stores a slot as codes and one float32 scale a block.

    All of it is elementwise but for one reduction a block, and may be traced.
    Which elements share a block is `Folding`'s matter. Of every format:

    - What is stored of a slot decodes to the same numbers when it was decoded
      and encoded again, bit for bit.
    - A block whose greatest magnitude is below 2**-100 counts as zeros: its
      scale is 0. In all others a positive number of an unsigned slot, a
      subnormal one included, decodes to a positive number: Adam divides by its
      second moment's root (Li et al. 2023, section 4.1, "zero-point problem").
    - A block that holds NaN or inf has the scale NaN and decodes to NaN.
    - In an unsigned slot signs are ignored: its numbers are >= 0.

    Attributes:
        name: key in STATE_FORMATS.
        bits: width of one code.
        block_size: elements that share a scale, a power of two >= 16.
        code_dtype: what stores codes; those of 4 bits take half an element,
            the even column the high one.

    Raises:
        ValueError: another block size.

    Example:
        >>> entry = STATE_FORMATS["dynamic8"]
        >>> moment = keras.ops.convert_to_tensor([[0.0, 0.5, -1e-6, 2.0]])
        >>> parts = entry.encode(moment, is_signed=True)
        >>> found = entry.decode(parts, (1, 4), is_signed=True)
        >>> [round(float(number), 7) for number in found[0]]
        [0.0, 0.4953125, -1.1e-06, 2.0]
        >>> entry.bits_per_parameter((4096, 4096))
        8.125
    """

    name: str
    bits: int
    block_size: int
    code_dtype: str = dataclasses.field(default="uint8", kw_only=True)

    def __post_init__(self):
        size = self.block_size
        if type(size) is not int or size < LEAST_BLOCK_SIZE or size & (size - 1):
            default = STATE_FORMATS[self.name].block_size if self.name in STATE_FORMATS else 256
            raise ValueError(
                f"Expected block_size a power of two, an int >= {LEAST_BLOCK_SIZE}. "
                f"Received: block_size={size!r}. Pass {default}."
            )

    def with_block_size(self, block_size: int) -> "StateFormat":
        """Returns this format with another block size.

        Raises:
            ValueError: it is no power of two, or less than 16.

        Example:
            >>> STATE_FORMATS["dynamic4"].with_block_size(64).bits_per_parameter((4096, 4096))
            4.5
        """
        return dataclasses.replace(self, block_size=block_size)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """Returns what `encode` stores of a slot of this shape, by name.

        Their `axes` are the slot's axes that theirs run along; the last one of
        each runs along the first of the folded axes.

        Args:
            shape: at least one axis, none of length 0.

        Returns:
            "codes": `code_dtype` (*lead, ceil(cols * bits / 8)), and "scale":
            float32 (*lead, n_blocks), with lead, cols and n_blocks of `Folding`.

        Raises:
            ValueError: a scalar, or an axis of length 0.
        """
        folding = self._folding(shape)
        axes = tuple(range(folding.n_lead_axes + 1))
        return {
            "codes": Part((*folding.lead, -(-folding.cols * self.bits // 8)), self.code_dtype, axes),
            "scale": Part((*folding.lead, folding.n_blocks), "float32", axes),
        }

    def encode(self, value, is_signed: bool) -> dict[str, Any]:
        """Returns the tensors that `parts` describes.

        Args:
            value: float32 tensor of the slot's shape.
            is_signed: False for slots whose numbers are >= 0, such as second
                moments.
        """
        folding = self._folding(value.shape)
        codes, scale = self._quantized(folding.split(value), is_signed, rows.ANY)
        return {"codes": self._stored(folding.join(codes)), "scale": scale}

    def decode(self, parts, shape: tuple[int, ...], is_signed: bool):
        """Returns the float32 tensor of this shape that the parts stand for.

        Args:
            parts: tensors, as `parts` describes them.
            shape: of the slot.
            is_signed: as they were encoded.
        """
        folding = self._folding(shape)
        codes = folding.split(self._loaded(parts["codes"], folding.cols))
        values = self._dequantized(codes, parts["scale"][..., None], is_signed, rows.ANY)
        return keras.ops.reshape(folding.join(values), shape)

    def has_rows(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a slot of this shape is rows of whole blocks one after the other, and so are its parts."""
        return self._folding(shape).cols % self.block_size == 0

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part of one block."""
        return {"codes": (self.block_size * self.bits // 8,), "scale": ()}

    def tables(self, is_signed: bool) -> tuple[np.ndarray, ...]:
        """Returns the tables that `decode_rows` looks numbers up in."""
        return ()

    def encode_rows(self, value, is_signed: bool, target: rows.Target = rows.ANY) -> dict[str, Any]:
        """Returns the parts of some blocks: what `encode` does, but for shapes.

        Args:
            value: float32 tensor (n_rows, block_size).
            is_signed: as for `encode`.
            target: what it runs on.

        Returns:
            For each part a tensor (n_rows, *row_shapes[name]).
        """
        codes, scale = self._quantized(value, is_signed, target)
        return {"codes": self._stored(codes), "scale": scale}

    def decode_rows(self, parts, is_signed: bool, target: rows.Target = rows.ANY):
        """Returns what parts stand for that `encode_rows` returned: a float32 tensor (n_rows, block_size).

        Args:
            parts: tensors.
            is_signed: as they were encoded.
            target: what it runs on.
        """
        codes = self._loaded(parts["codes"], self.block_size)
        return self._dequantized(codes, parts["scale"][..., None], is_signed, target)

    def bits_per_parameter(self, shape: tuple[int, ...]) -> float:
        """Returns the bits that one element of a slot of this shape takes, scales included."""
        return sum(part.nbytes for part in self.parts(shape).values()) * 8 / math.prod(shape)

    @abc.abstractmethod
    def _quantized(self, grouped, is_signed, target):
        """Returns codes (*lead, n_blocks, block_size), as `_stored` takes them, and scale (*lead, n_blocks) of blocks."""

    @abc.abstractmethod
    def _dequantized(self, codes, scale, is_signed, target):
        """Returns float32 (*lead, n_blocks, block_size) of codes, as `_loaded` gives them, and scale (*lead, n_blocks, 1)."""

    def _stored(self, codes):
        """Returns codes (*lead, cols) as `parts` describes them."""
        return keras.ops.cast(codes, self.code_dtype)

    def _loaded(self, codes, cols):
        """Returns codes (*lead, cols) from what `_stored` returned."""
        return codes

    def _folding(self, shape):
        return Folding(tuple(shape), self.block_size)


STATE_FORMATS: dict[str, StateFormat] = {}


def register_state_format(entry: StateFormat) -> StateFormat:
    """Adds `entry` to STATE_FORMATS under its name; returns it."""
    if entry.name in STATE_FORMATS:
        raise ValueError(f"State format '{entry.name}' is registered already.")
    STATE_FORMATS[entry.name] = entry
    return entry
