"""The text task: a character-level transformer on the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

LENGTH = 128
BATCH = 32
WIDTH = 128
BLOCKS = 2
HEADS = 4
LEARNING_RATE = 5e-4
# What occurs in texts: newline and printable ASCII. All other characters are left out.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


class Text(NamedTuple):
    """Characters as int32 indices into ALPHABET, (n,) each; validation is the last tenth of the files."""

    train: np.ndarray
    validation: np.ndarray


@functools.cache
def standard_library(characters: int = 2_000_000) -> Text:
    """Returns the documentation strings of the modules at the top of this Python's standard library.

    Args:
        characters: the most to take, whole files in the order of their names.
    """
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts.append("\n\n".join(filter(None, strings)))
        if sum(map(len, texts)) >= characters:
            break
    return Text(encode("\n\n".join(texts[: -len(texts) // 10])), encode("\n\n".join(texts[-len(texts) // 10 :])))


def encode(text: str) -> np.ndarray:
    """Returns a text's characters as int32 indices into ALPHABET."""
    place = {character: index for index, character in enumerate(ALPHABET)}
    return np.array([place[character] for character in text if character in place], "int32")


def batches(text: np.ndarray, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows drawn at random and the characters that follow each, int32 (steps * BATCH, LENGTH)."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, steps * BATCH)
    windows = text[starts[:, np.newaxis] + np.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


@keras.saving.register_keras_serializable(package="text_task")
class TokenAndPosition(keras.layers.Layer):
    """Adds the embedding of a character to that of its place: int32 (n, LENGTH) -> (n, LENGTH, WIDTH)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = keras.layers.Embedding(len(ALPHABET), WIDTH, name="tokens", dtype=self.dtype_policy)
        self.positions = keras.layers.Embedding(LENGTH, WIDTH, name="positions", dtype=self.dtype_policy)

    def call(self, inputs):
        return self.tokens(inputs) + self.positions(keras.ops.arange(keras.ops.shape(inputs)[1]))

    def compute_output_shape(self, input_shape):
        return (*input_shape, WIDTH)


def build_transformer() -> keras.Model:
    """Returns an untrained transformer of stock layers, about 440,000 parameters, that gives logits (n, LENGTH, 96)."""
    layers = keras.layers
    characters = keras.Input((LENGTH,), dtype="int32")
    x = TokenAndPosition(name="embedding")(characters)
    for block in range(BLOCKS):
        normal = layers.LayerNormalization(name=f"attention_norm_{block}")(x)
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{block}")
        x = layers.Add()([x, attention(normal, normal, use_causal_mask=True)])
        normal = layers.LayerNormalization(name=f"mlp_norm_{block}")(x)
        hidden = layers.Dense(4 * WIDTH, activation="gelu", name=f"mlp_in_{block}")(normal)
        x = layers.Add()([x, layers.Dense(WIDTH, name=f"mlp_out_{block}")(hidden)])
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(characters, layers.Dense(len(ALPHABET), name="head")(x), name="text")


def make_optimizer(steps: int, learning_rate: float | None = None) -> keras.optimizers.Optimizer:
    """Returns AdamW with the rate of `rate_over`."""
    return keras.optimizers.AdamW(rate_over(steps, learning_rate or LEARNING_RATE), weight_decay=0.01)


def rate_over(steps: int, greatest: float) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns a learning rate that rises for a twentieth of the steps and then decays to zero."""
    return keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=greatest, warmup_steps=steps // 20)


def fit(model: keras.Model, optimizer: keras.optimizers.Optimizer, text: np.ndarray, steps: int, seed: int) -> None:
    """Trains a model on windows drawn at random from a text."""
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs, targets = batches(text, steps, seed)
    model.fit(inputs, targets, batch_size=BATCH, verbose=0, shuffle=False)


def validation_loss(model: keras.Model, text: np.ndarray, windows: int = 512) -> float:
    """Returns the cross-entropy in nats a character, in float64, over windows spread evenly over a text."""
    starts = np.linspace(0, len(text) - LENGTH - 1, windows).astype(int)
    taken = text[starts[:, np.newaxis] + np.arange(LENGTH + 1)]
    logits = model.predict(taken[:, :-1], batch_size=BATCH, verbose=0).astype("float64")
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(axis=-1))
    told = np.take_along_axis(shifted, taken[:, 1:, np.newaxis], axis=-1)[..., 0]
    return float(np.mean(normalizer - told))
