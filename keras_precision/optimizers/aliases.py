"""Familiar names for Keras's optimizers with states in few bits: one line each."""

from __future__ import annotations

from collections.abc import Callable

import keras

from keras_precision.optimizers.low_bit import LowBit
from keras_precision.optimizers.states.dynamic4 import DYNAMIC4
from keras_precision.optimizers.states.dynamic8 import DYNAMIC8
from keras_precision.optimizers.states.float8 import FLOAT8_STATE

optimizers = keras.optimizers


ALIASES: dict[str, Callable[..., LowBit]] = {}


def _alias(name: str, optimizer_class: type, state_format: str, **defaults) -> Callable[..., LowBit]:
    def make(*args, block_size: int | None = None, min_size: int = 4096, **kwargs) -> LowBit:
        inner = optimizer_class(*args, **{**defaults, **kwargs})
        return LowBit(inner, state_format, block_size=block_size, min_size=min_size)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"Returns `LowBit(keras.optimizers.{optimizer_class.__name__}(...), {state_format!r})`.\n\n"
        f"    Args:\n        *args: as `keras.optimizers.{optimizer_class.__name__}` takes them.\n"
        "        block_size: see `LowBit`.\n        min_size: see `LowBit`.\n"
        f"        **kwargs: as the class takes them{''.join(f'; {k}={v} by default' for k, v in defaults.items())}.\n    "
    )
    ALIASES[name] = make
    return make


Adam8bit = _alias("Adam8bit", optimizers.Adam, DYNAMIC8.name)
AdamW8bit = _alias("AdamW8bit", optimizers.AdamW, DYNAMIC8.name)
Lion8bit = _alias("Lion8bit", optimizers.Lion, DYNAMIC8.name)
SGD8bit = _alias("SGD8bit", optimizers.SGD, DYNAMIC8.name, momentum=0.9)
RMSprop8bit = _alias("RMSprop8bit", optimizers.RMSprop, DYNAMIC8.name)
Adagrad8bit = _alias("Adagrad8bit", optimizers.Adagrad, DYNAMIC8.name)
Lamb8bit = _alias("Lamb8bit", optimizers.Lamb, DYNAMIC8.name)
Adam4bit = _alias("Adam4bit", optimizers.Adam, DYNAMIC4.name)
AdamW4bit = _alias("AdamW4bit", optimizers.AdamW, DYNAMIC4.name)
AdamWFp8 = _alias("AdamWFp8", optimizers.AdamW, FLOAT8_STATE.name)
