"""The digits task: a small convolutional network trained once under a given policy."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_precision.dtypes import measured_bytes
from keras_precision.policies import policy_scope

BATCH_SIZE = 32
# 44 whole batches: no odd last batch, so that a step is compiled only once.
TRAIN_IMAGES = 44 * BATCH_SIZE
STEPS_PER_EPOCH = TRAIN_IMAGES // BATCH_SIZE
# On 389 test images float32 gets 97% or more after 12 epochs on JAX and TensorFlow; 15 leave a margin.
DEFAULT_EPOCHS = 15
# A run whose loss has not lost a tenth of its first value has learned nothing of use:
# one float32 epoch takes this task from 2.31 to below 1.6.
LEARNED = 0.9

Status = Literal["trains", "does not train", "NaN loss"]


class DigitsSplit(NamedTuple):
    """Images float32 (n, 8, 8, 1) in [0, 1] with their labels int32 (n,) in 0..9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one training run under one policy measured.

    Attributes:
        requested: the policy as it was asked for, `"auto"` for instance.
        policy: the name of the policy it resolved to.
        test_accuracy: on the held-out images, in [0, 1].
        initial_loss: cross-entropy over the training images before the first step.
        final_loss: the same after the last step.
        epoch_losses: the mean training loss that `fit` reported for each epoch.
        step_ms: median wall time of a training step, in ms, as `fit` sees it;
            the first step, which compiles, is left out.
        weight_bytes: bytes of the model's live weights.
        optimizer_bytes: bytes of the optimizer's live variables.
        moved: whether training changed any weight.
    """

    requested: str
    policy: str
    test_accuracy: float
    initial_loss: float
    final_loss: float
    epoch_losses: tuple[float, ...]
    step_ms: float
    weight_bytes: int
    optimizer_bytes: int
    moved: bool

    @property
    def status(self) -> Status:
        """Whether the run learned, judged by its measured losses alone."""
        if not all(map(math.isfinite, (self.final_loss, *self.epoch_losses))):
            return "NaN loss"
        if self.final_loss > LEARNED * self.initial_loss:
            return "does not train"
        return "trains"

    def to_dict(self) -> dict[str, Any]:
        """Returns the result for JSON: non-finite numbers, which JSON lacks, become None."""
        fields = dataclasses.asdict(self) | {"status": self.status}
        fields["epoch_losses"] = [_finite_or_none(loss) for loss in self.epoch_losses]
        for name in ("initial_loss", "final_loss"):
            fields[name] = _finite_or_none(fields[name])
        return fields


def load_digits_split(seed: int = 0) -> DigitsSplit:
    """Returns scikit-learn's 1,797 digits as 1,408 training and 389 test images, stratified by label."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    labels = digits.target.astype("int32")
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, train_size=TRAIN_IMAGES, random_state=seed, stratify=labels
    )
    return DigitsSplit(train_images, train_labels, test_images, test_labels)


def build_digits_model() -> keras.Model:
    """Returns an untrained convolutional network of stock layers, 35,914 parameters, that gives logits (n, 10)."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ],
        name="digits",
    )


def train(
    policy: str,
    epochs: int = DEFAULT_EPOCHS,
    seed: int = 0,
    on_batch: Callable[[], object] | None = None,
) -> RunResult:
    """Trains the digits network once with Adam under `policy`, as a user of stock Keras would.

    Losses and accuracy are computed here, in float64 from the model's logits,
    so that no run is judged by metrics of its own precision.

    Args:
        policy: any policy name or alias.
        epochs: passes over the training images, >= 1.
        seed: of the split, the initial weights and the order of the batches, >= 0.
        on_batch: called after each training step.

    Returns:
        The measurements of the run.
    """
    split = load_digits_split(seed)
    keras.utils.set_random_seed(seed)
    with policy_scope(policy):
        model = build_digits_model()
        model.compile("adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        initial_weights = model.get_weights()
        initial_loss = cross_entropy(_logits(model, split.train_images), split.train_labels)
        clock = _StepClock(on_batch or (lambda: None))
        history = model.fit(
            split.train_images,
            split.train_labels,
            batch_size=BATCH_SIZE,
            epochs=epochs,
            verbose=0,
            callbacks=[clock],
        )
    predictions = _logits(model, split.test_images).argmax(axis=-1)
    return RunResult(
        requested=policy,
        policy=model.dtype_policy.name,
        test_accuracy=float(np.mean(predictions == split.test_labels)),
        initial_loss=initial_loss,
        final_loss=cross_entropy(_logits(model, split.train_images), split.train_labels),
        epoch_losses=tuple(float(loss) for loss in history.history["loss"]),
        step_ms=statistics.median(clock.seconds[1:]) * 1e3,
        weight_bytes=measured_bytes(model.weights),
        optimizer_bytes=measured_bytes(model.optimizer.variables),
        moved=any(
            not np.array_equal(before, after)
            for before, after in zip(initial_weights, model.get_weights(), strict=True)
        ),
    )


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy of logits float (n, classes) against labels int (n,), NaN if any logit is."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_normalizer = np.log(np.exp(shifted).sum(axis=-1))
    return float(np.mean(log_normalizer - shifted[np.arange(len(labels)), labels]))


class _StepClock(keras.callbacks.Callback):
    """Times each training step and reports it."""

    def __init__(self, on_batch: Callable[[], object]) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._on_batch = on_batch
        self._started = 0.0

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # JAX returns before the step is done; reading its loss waits for it.
        float((logs or {})["loss"])
        self.seconds.append(time.perf_counter() - self._started)
        self._on_batch()


def _logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return model.predict(images, verbose=0).astype("float64")


def _finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
