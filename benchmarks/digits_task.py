"""The digits network, trained with any Keras optimizer under the global policy, on stock Keras as on ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

BATCH_SIZE = 32
# Arguments of each optimizer, the defaults for those not named. None is chosen for a policy: each brings float32 to a
# loss below 0.1 and an accuracy above 95% on JAX and on TensorFlow.
SETTINGS: dict[str, dict[str, float]] = {
    "Adadelta": {"learning_rate": 3.0},
    # Keras 3.15 divides by sqrt(r * c / mean(r)). Where a kernel's row and column have no gradient both are epsilon_1,
    # and with the default of 1e-30 their product is 0 in float32: 0 / 0.
    "Adafactor": {"learning_rate": 0.04, "epsilon_1": 1e-16},
    "Adagrad": {"learning_rate": 0.1},
    "Adam": {"learning_rate": 0.005},
    "AdamW": {"learning_rate": 0.005},
    "Adamax": {"learning_rate": 0.01},
    # Makes the weights from sums that start at zero: of an initial weight the first step keeps 1 - sqrt(a / (a + g**2)),
    # a the accumulator and g the gradient. With the default, a = 0.1, that is so little that the network stays at zero.
    "Ftrl": {"learning_rate": 0.02, "initial_accumulator_value": 1e-10},
    "Lamb": {"learning_rate": 0.01},
    "Lion": {"learning_rate": 0.001},
    "Muon": {"learning_rate": 0.003},
    "Nadam": {"learning_rate": 0.004},
    "RMSprop": {"learning_rate": 0.003},
    "SGD": {"learning_rate": 0.05, "momentum": 0.9},
    "ScheduleFreeAdamW": {"learning_rate": 0.005},
}
# Ftrl's weights are proportional to its rate, so one that decays to zero takes them along.
CONSTANT_RATE = frozenset({"Ftrl"})


class Trial(NamedTuple):
    """What one seed decides, so that nothing but arithmetic differs between those who train it.

    Attributes:
        network: config of a `keras.Sequential`, without dtypes.
        weights: its initial weights, float32.
        train_images: float32 (n, ...).
        train_labels: int32 (n,).
        test_images: float32 (m, ...).
        test_labels: int32 (m,).
        order: int (steps * BATCH_SIZE,), the training images as they follow one another.
    """

    network: dict[str, Any]
    weights: list[np.ndarray]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    order: np.ndarray

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return len(self.order) // BATCH_SIZE


class Outcome(NamedTuple):
    """Where one training ended, or the mean of several.

    Attributes:
        loss: cross-entropy over all training images, in float32 from the model's logits.
        accuracy: on the test images, in [0, 1].
    """

    loss: float
    accuracy: float

    def is_as_good_as(self, reference: Outcome) -> bool:
        """Returns whether the loss is within 5% or 0.01 of the reference's and accuracy at most a point below.

        >>> Outcome(0.039, 0.975).is_as_good_as(Outcome(0.03, 0.98))
        True
        >>> Outcome(0.041, 0.98).is_as_good_as(Outcome(0.03, 0.98))
        False
        """
        is_close = math.isclose(self.loss, reference.loss, rel_tol=0, abs_tol=max(0.05 * reference.loss, 0.01))
        return is_close and self.accuracy >= reference.accuracy - 0.01


def make_trial(seed: int, epochs: int) -> Trial:
    """Returns what the demo trains, so imports keras_precision; stock Keras's process must be given it.

    Args:
        seed: of the split, the initial weights and the order, >= 0.
        epochs: how often each training image comes, >= 1.
    """
    from keras_precision.cli import digits

    keras.utils.set_random_seed(seed)
    model = digits.build_digits_model()
    return Trial(
        without_dtypes(model),
        [keras.ops.convert_to_numpy(weight) for weight in model.weights],
        *digits.load_digits_split(seed),
        order=make_order(seed, epochs, digits.TRAIN_IMAGES),
    )


def make_order(seed: int, epochs: int, images: int) -> np.ndarray:
    """Returns int (epochs * images,), the images shuffled anew for each epoch."""
    shuffle = np.random.default_rng(seed)
    return np.concatenate([shuffle.permutation(images) for _ in range(epochs)])


def optimizer_names() -> list[str]:
    """Returns the names of all optimizers in `keras.optimizers`.

    The base class and the wrappers are left out: they are those that can't be made without arguments.
    """
    return sorted(
        name
        for name, found in vars(keras.optimizers).items()
        if inspect.isclass(found)
        and issubclass(found, keras.optimizers.Optimizer)
        and all(
            p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in inspect.signature(found).parameters.values()
        )
    )


def make_optimizer(name: str, steps: int, make: Callable | None = None) -> keras.optimizers.Optimizer:
    """Returns an optimizer of `SETTINGS` whose rate decays to zero over so many steps, so that the last loss is calm.

    Args:
        name: of a class in `keras.optimizers`.
        steps: int > 0.
        make: what is called in place of the class, with the same arguments.
    """
    optimizer_class = getattr(keras.optimizers, name)
    settings: dict[str, Any] = dict(SETTINGS.get(name, {}))
    if name not in CONSTANT_RATE:
        rate = settings.get("learning_rate", float(optimizer_class().learning_rate))
        settings["learning_rate"] = keras.optimizers.schedules.CosineDecay(rate, steps)
    return (make or optimizer_class)(**settings)


def without_dtypes(model: keras.Sequential) -> dict[str, Any]:
    """Returns a model's config, from which each layer takes the global policy of whoever makes it again."""
    config = model.get_config()
    for layer in config["layers"]:
        layer["config"].pop("dtype", None)
    return {"name": config["name"], "layers": config["layers"]}


def train(trial: Trial, optimizer: keras.optimizers.Optimizer, smoothing: float = 0.0) -> Outcome:
    """Trains a trial's network and returns where it ended.

    Args:
        trial: the network, its data and their order.
        optimizer: what `compile` gets.
        smoothing: share of each label that is spread over all classes, in [0, 1).
    """
    return outcome(trial, fit(trial, optimizer, smoothing), smoothing)


def build(trial: Trial) -> keras.Sequential:
    """Returns a trial's network with its initial weights, under the global policy."""
    model = keras.Sequential.from_config(trial.network)
    model.set_weights(trial.weights)
    return model


def fit(trial: Trial, optimizer: keras.optimizers.Optimizer, smoothing: float = 0.0) -> keras.Sequential:
    """Returns a trial's network trained under the global policy with `fit`, as a user would.

    Args:
        trial: the network, its data and their order.
        optimizer: what `compile` gets.
        smoothing: see `train`.
    """
    keras.utils.set_random_seed(0)
    model = build(trial)
    loss, labels = cross_entropy(trial.train_labels, smoothing)
    model.compile(optimizer, loss)
    images, labels = trial.train_images[trial.order], labels[trial.order]
    model.fit(images, labels, batch_size=BATCH_SIZE, shuffle=False, verbose=0)
    return model


def cross_entropy(labels: np.ndarray, smoothing: float, **settings) -> tuple[keras.losses.Loss, np.ndarray]:
    """Returns the loss of logits, and the labels as it takes them.

    Args:
        labels: int (n,).
        smoothing: see `train`.
        **settings: of the loss.
    """
    if not smoothing:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **settings), labels
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, **settings)
    return loss, np.eye(labels.max() + 1, dtype="float32")[labels]


def outcome(trial: Trial, model: keras.Model, smoothing: float = 0.0) -> Outcome:
    """Returns a model's loss and accuracy on a trial's images.

    Args:
        trial: whose images.
        model: gives logits.
        smoothing: see `train`.
    """
    every_image = np.concatenate([trial.train_images, trial.test_images])
    logits = model.predict(every_image, batch_size=len(every_image), verbose=0).astype("float32")
    train_logits, test_logits = np.split(logits, [len(trial.train_images)])
    loss, labels = cross_entropy(trial.train_labels, smoothing, dtype="float32")
    return Outcome(
        loss=float(loss(labels, train_logits)),
        accuracy=float(np.mean(test_logits.argmax(axis=-1) == trial.test_labels)),
    )
