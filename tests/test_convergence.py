"""D1: under every float policy training ends where it ends in float32; `benchmarks/convergence.py` in small."""

import functools
import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision.cli import digits

TASK = Path(__file__).parent.parent / "benchmarks" / "digits_task.py"
SPEC = importlib.util.spec_from_file_location(TASK.stem, TASK)
digits_task = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits_task)

OPTIMIZERS = ("SGD", "Adam", "Nadam", "Lion")
POLICIES = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
TRAIN_IMAGES = 704
EPOCHS = 16


@functools.cache
def trial():
    """A dense network and half of the training images; the others are tested on too, so that an image weighs less."""
    keras.utils.set_random_seed(0)
    with kp.policy_scope("float32"):
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(128, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
    split = digits.load_digits_split()
    return digits_task.Trial(
        digits_task.without_dtypes(model),
        [keras.ops.convert_to_numpy(weight) for weight in model.weights],
        split.train_images[:TRAIN_IMAGES],
        split.train_labels[:TRAIN_IMAGES],
        np.concatenate([split.train_images[TRAIN_IMAGES:], split.test_images]),
        np.concatenate([split.train_labels[TRAIN_IMAGES:], split.test_labels]),
        digits_task.make_order(0, EPOCHS, TRAIN_IMAGES),
    )


def outcome(policy, name, prepare=lambda optimizer: optimizer):
    with kp.policy_scope(policy):
        return digits_task.train(trial(), prepare(digits_task.make_optimizer(name, trial().steps)))


@functools.cache
def float32_outcome(name):
    return outcome("float32", name)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_training_ends_where_it_ends_in_float32(name, policy):
    assert float32_outcome(name).accuracy > 0.9
    assert outcome(policy, name).is_as_good_as(float32_outcome(name))


def test_stock_adams_own_maths_misses_the_bar_in_bfloat16():
    stock = outcome("bfloat16", "Adam", kp.optimizers.as_given)
    assert stock.loss > 1 and not stock.is_as_good_as(float32_outcome("Adam"))


@pytest.mark.parametrize(
    "loss, accuracy, passes",
    [
        (0.1, 0.95, True),
        (0.109, 0.941, True),
        (0.091, 0.99, True),
        (0.111, 0.95, False),
        (0.089, 0.95, False),
        (0.1, 0.939, False),
        (float("nan"), 0.95, False),
        (float("inf"), 0.95, False),
    ],
)
def test_the_bar_is_absolute_where_losses_are_small(loss, accuracy, passes):
    reference = digits_task.Outcome(0.1, 0.95)
    assert digits_task.Outcome(loss, accuracy).is_as_good_as(reference) == passes


def test_the_bar_is_relative_where_losses_are_large():
    reference = digits_task.Outcome(1.0, 0.7)
    assert digits_task.Outcome(1.04, 0.7).is_as_good_as(reference)
    assert not digits_task.Outcome(1.06, 0.7).is_as_good_as(reference)


def test_every_optimizer_of_keras_is_in_the_matrix():
    names = digits_task.optimizer_names()
    assert set(digits_task.SETTINGS) <= set(names)
    wrappers = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    classes = {name for name, found in vars(keras.optimizers).items() if isinstance(found, type)}
    assert set(names) == {
        name for name in classes - wrappers if issubclass(getattr(keras.optimizers, name), keras.optimizers.Optimizer)
    }


def test_an_optimizer_without_settings_decays_from_its_default_rate(monkeypatch):
    monkeypatch.delitem(digits_task.SETTINGS, "Adamax")
    optimizer = digits_task.make_optimizer("Adamax", 10)
    schedule = optimizer._learning_rate
    assert [float(schedule(step)) for step in (0, 10)] == pytest.approx([0.001, 0.0], abs=1e-9)
