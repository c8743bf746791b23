"""Facts that name a quantized storage format."""

from dataclasses import dataclass

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that a block-scaled format may take, in elements along the contraction axis."""


@dataclass(frozen=True)
class Format:
    """A storage format as policies name it.

    Attributes:
        name: what stands before `_from_` in a policy's name.
        bits: width of one code, in bits.
        default_block_size: elements that share one scale unless the policy's
            name says otherwise; None where scales are per channel or per
            tensor, so that no block size can be given.
        has_amax_history: True for formats that train with scales kept from
            earlier steps, whose policies carry `amax_history_length`.
    """

    name: str
    bits: int
    default_block_size: int | None = None
    has_amax_history: bool = False

    def check_block_size(self, block_size: int | None, given: str) -> None:
        """Raises ValueError unless this format can use `block_size`.

        Args:
            block_size: elements a block, or None for the default.
            given: the text that the user wrote, for the message.
        """
        if block_size is None:
            return
        if self.default_block_size is None:
            raise ValueError(
                f"Invalid quantization mode. Format '{self.name}' takes no block size. "
                f"Received: '{given}'. Pass '{self.name}'."
            )
        if block_size not in BLOCK_SIZES:
            raise ValueError(
                f"Invalid quantization mode. Expected block_size in {BLOCK_SIZES}. "
                f"Received: block_size={block_size} in '{given}'. "
                f"Pass '{self.name}/{self.default_block_size}'."
            )


FORMATS: dict[str, Format] = {}


def register_format(entry: Format) -> Format:
    """Adds `entry` to FORMATS under its name; returns it."""
    if entry.name in FORMATS:
        raise ValueError(f"Format '{entry.name}' is registered already.")
    FORMATS[entry.name] = entry
    return entry
