"""Two optimizers with one scale, and with one each."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.scaling import LossScaleOptimizer


def made(**kwargs):
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), 8.0, **kwargs)
    optimizer.build([weight])
    return optimizer, weight


def step(optimizer, weight, bad=False):
    scaled = optimizer.scale_loss(ops.ones(()))
    optimizer.apply([ops.full((2,), float("inf")) if bad else ops.ones((2,)) * scaled], [weight])


def test_an_overflow_in_either_lowers_the_one_scale():
    (first, a), (second, b) = made(), made(min_scale=4.0)
    second.share_scale_of(first)
    step(first, a)
    step(second, b, bad=True)
    assert first.get_scale() == second.get_scale() == 4.0
    assert int(first.skipped_steps) == int(second.skipped_steps) == 1
    step(first, a, bad=True)
    assert first.get_scale() == second.get_scale() == 2.0  # the bounds are the owner's
    step(second, b)
    np.testing.assert_array_equal(ops.convert_to_numpy(a), [0.5, 0.5])
    np.testing.assert_array_equal(ops.convert_to_numpy(b), [0.5, 0.5])


def test_growth_counts_the_owners_steps():
    (first, a), (second, b) = made(dynamic_growth_steps=2), made()
    second.share_scale_of(first)
    for expected in (8.0, 16.0, 16.0, 32.0):
        step(second, b)
        step(first, a)
        assert second.get_scale() == expected


def test_scales_of_their_own_do_not_mix():
    (first, a), (second, b) = made(), made()
    step(second, b, bad=True)
    step(first, a)
    assert (first.get_scale(), second.get_scale()) == (8.0, 4.0)


def test_a_scale_is_shared_from_its_owner():
    (first, _), (second, _), (third, _) = made(), made(), made()
    second.share_scale_of(first)
    for other in (second, third):
        with pytest.raises(ValueError, match="scale of its own"):
            third.share_scale_of(other)


def test_several_losses_share_a_scale():
    optimizer, _ = made()
    losses = optimizer.scale_loss({"a": ops.ones(()), "b": 2 * ops.ones(())})
    assert {name: float(loss) for name, loss in losses.items()} == {"a": 8.0, "b": 16.0}
