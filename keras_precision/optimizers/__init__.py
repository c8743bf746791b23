"""Optimizers for weights and states of few bits."""

from keras_precision.optimizers.aliases import (
    Adagrad8bit,
    Adam4bit,
    Adam8bit,
    AdamW4bit,
    AdamW8bit,
    AdamWFp8,
    Lamb8bit,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
)
from keras_precision.optimizers.as_given import as_given
from keras_precision.optimizers.low_bit import LowBit
from keras_precision.optimizers.low_precision import LowPrecision
from keras_precision.optimizers.states import STATE_FORMATS

__all__ = [
    "STATE_FORMATS",
    "Adagrad8bit",
    "Adam4bit",
    "Adam8bit",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "Lamb8bit",
    "Lion8bit",
    "LowBit",
    "LowPrecision",
    "RMSprop8bit",
    "SGD8bit",
    "as_given",
]
