"""Losses are the user's, one a sample, and data that can't be used is refused."""

import keras
import numpy as np
import pytest

from keras_precision.search.samples import Samples, judged, loss_function, wrong

X = np.linspace(-1, 1, 33 * 4, dtype="float32").reshape(33, 4)
CLASSES = np.arange(33) % 3


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")], name="net")


SparseCrossEntropy = keras.losses.SparseCategoricalCrossentropy


@pytest.mark.parametrize(
    "loss",
    [
        SparseCrossEntropy(from_logits=True),
        lambda y, p: keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True),
        lambda y, p: keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)),
    ],
    ids=["object", "function", "function of one number"],
)
def test_losses_are_those_of_single_samples(model, loss):
    samples = Samples.of(X, CLASSES, batch_size=8)  # 33 samples: the last batch is filled up
    found = judged(model, samples, loss_function(model, loss), has_errors=True)
    outputs = model.predict(X, verbose=0)
    one_by_one = [
        float(SparseCrossEntropy(from_logits=True)(CLASSES[i : i + 1], outputs[i : i + 1])) for i in range(33)
    ]
    np.testing.assert_allclose(found.losses, one_by_one, rtol=1e-5)  # float32 sums of 3 terms
    np.testing.assert_array_equal(found.errors, outputs.argmax(axis=1) != CLASSES)


def test_the_loss_of_each_sample_is_its_mean_over_other_axes(model):
    targets = np.zeros((33, 3), "float32")
    found = judged(model, Samples.of(X, targets, 33), loss_function(model, "mse"), has_errors=False)
    np.testing.assert_allclose(found.losses, (model.predict(X, verbose=0) ** 2).mean(axis=1), rtol=1e-5)
    assert found.errors is None


def test_a_compiled_loss_is_taken_and_not_changed(model):
    loss = SparseCrossEntropy(from_logits=True)
    compiled = keras.models.clone_model(model)
    compiled.compile("sgd", loss)
    found = loss_function(compiled, None)(CLASSES, compiled.predict(X, verbose=0))
    assert found.shape == (33,) and loss.reduction != "none"


def test_inputs_may_be_structures():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    two = keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(keras.layers.Concatenate()([a, b])))
    samples = Samples.of({"a": X, "b": X[:, :2]}, X[:, :1], 10)
    assert judged(two, samples, loss_function(two, "mse"), has_errors=False).losses.shape == (33,)


def test_halves_are_seeded_and_share_nothing():
    samples = Samples.of(np.arange(33)[:, None], np.arange(33), 8)
    first, again, other = (samples.split(seed) for seed in (0, 0, 1))
    assert sorted([*first[0].y, *first[1].y]) == list(range(33))
    assert (first[0].x[:, 0] == first[0].y).all() and (first[0].y == again[0].y).all()
    assert set(first[0].y) != set(other[0].y)


def test_wrong_counts_classes_in_every_place():
    scores = np.eye(3)[[[0, 1], [2, 2]]]
    assert wrong(np.array([[0, 1], [2, 0]]), scores).tolist() == [0.0, 0.5]
    assert wrong(np.eye(3)[[[0, 1], [1, 1]]], scores).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="two classes or more"):
        wrong(np.zeros(4), np.zeros((4, 1)))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (None, CLASSES, ValueError, "x=None"),
        (X, None, ValueError, "y=None"),
        (X, CLASSES[:20], ValueError, r"\[20, 33\] samples"),
        (X[:9], CLASSES[:9], ValueError, "at least 10"),
        (object(), CLASSES, TypeError, "Received: object"),
    ],
)
def test_other_data_is_refused(x, y, error, message):
    with pytest.raises(error, match=message):
        Samples.of(x, y, 8)


def test_a_loss_is_needed(model):
    with pytest.raises(ValueError, match="loss=None and a model without"):
        loss_function(model, None)
    with pytest.raises(ValueError, match="one for each"):
        loss_function(model, {"head": "mse"})
