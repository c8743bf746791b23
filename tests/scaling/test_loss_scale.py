"""The loss-scale state machines against a plain-Python model."""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.scaling import DynamicLossScale, LossScaleState, NoLossScale, StaticLossScale, found_inf


class Model:
    """What DynamicLossScale should do, written as one would say it."""

    def __init__(self, config):
        self.config = config
        self.scale = config.initial_scale
        self.good = self.bad = self.consecutive = self.skipped = 0

    def update(self, found):
        if found:
            self.good = 0
            self.bad += 1
            self.consecutive += 1
            self.skipped += 1
            if self.bad == self.config.hysteresis:
                self.scale = max(self.scale * self.config.backoff_factor, self.config.min_scale)
                self.bad = 0
        else:
            self.consecutive = 0
            self.good += 1
            if self.good == self.config.growth_interval:
                self.scale = min(self.scale * self.config.growth_factor, self.config.max_scale)
                self.good = self.bad = 0


configs = st.builds(
    DynamicLossScale,
    initial_scale=st.sampled_from([1.0, 256.0, 2.0**15]),
    growth_factor=st.sampled_from([2.0, 4.0]),
    backoff_factor=st.sampled_from([0.5, 0.25]),
    growth_interval=st.integers(1, 4),
    min_scale=st.sampled_from([2.0**-10, 1.0]),
    max_scale=st.sampled_from([2.0**15, 2.0**24]),
    hysteresis=st.integers(1, 3),
)


def values(state):
    return [float(state.scale), *(int(counter) for counter in state[1:])]


@hypothesis.given(configs, st.lists(st.booleans(), max_size=40))
@hypothesis.settings(max_examples=30, deadline=None)
def test_dynamic_follows_the_model(config, steps):
    state, model = config.init(), Model(config)
    for found in steps:
        state = config.update(state, ops.convert_to_tensor(found))
        model.update(found)
        assert values(state) == [model.scale, model.good, model.bad, model.consecutive, model.skipped]
        assert config.min_scale <= float(state.scale) <= config.max_scale


@pytest.mark.parametrize("loss_scale", [StaticLossScale(8.0), NoLossScale()])
def test_static_scales_never_change_and_count(loss_scale):
    state = loss_scale.init()
    for found in (True, True, False, True):
        state = loss_scale.update(state, ops.convert_to_tensor(found))
    assert values(state) == [loss_scale.initial_scale, 0, 0, 1, 3]


def test_unscaling_is_float32_and_keeps_structure():
    loss_scale = StaticLossScale(2.0**15)
    state = loss_scale.init()
    gradients = {"kernel": ops.full((2,), 2.0**-24, "float16"), "frozen": None}
    result = loss_scale.unscale(state, gradients)
    assert result["frozen"] is None
    assert keras.backend.standardize_dtype(result["kernel"].dtype) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(result["kernel"]), [2.0**-39] * 2)


def test_scaling_a_float16_loss_does_not_overflow():
    loss_scale = DynamicLossScale()
    scaled = loss_scale.scale(loss_scale.init(), ops.full((), 100.0, "float16"))
    assert float(scaled) == 100 * 2.0**15


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_found_inf_looks_at_every_gradient(bad):
    finite = {"a": ops.ones((3,)), "b": [None, ops.ones((2, 2), "float16")]}
    assert not bool(found_inf(finite))
    assert not bool(found_inf([None]))
    assert bool(found_inf({**finite, "b": [None, ops.convert_to_tensor([[1.0, 1.0], [1.0, bad]])]}))


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: StaticLossScale(0.0), "initial_scale"),
        (lambda: StaticLossScale(float("inf")), "initial_scale"),
        (lambda: NoLossScale(2.0), "initial_scale"),
        (lambda: DynamicLossScale(initial_scale=2.0**30), "initial_scale"),
        (lambda: DynamicLossScale(growth_factor=1.0), "growth_factor"),
        (lambda: DynamicLossScale(backoff_factor=1.0), "backoff_factor"),
        (lambda: DynamicLossScale(growth_interval=0), "growth_interval"),
        (lambda: DynamicLossScale(growth_interval=2.0), "growth_interval"),
        (lambda: DynamicLossScale(min_scale=0.0), "min_scale"),
        (lambda: DynamicLossScale(max_scale=0.5), "max_scale"),
        (lambda: DynamicLossScale(hysteresis=0), "hysteresis"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"Expected {name} "):
        make()


def test_config_holds_every_field():
    loss_scale = DynamicLossScale(64.0, 4.0, 0.25, 3, 0.5, 128.0, 2)
    assert DynamicLossScale(**loss_scale.get_config()) == loss_scale
    assert list(loss_scale.get_config().values()) == [64.0, 4.0, 0.25, 3, 0.5, 128.0, 2]


def test_state_is_a_pytree_under_compilation(backend):
    loss_scale = DynamicLossScale(growth_interval=2)
    founds = [False, False, True, False]
    eager = loss_scale.init()
    for found in founds:
        eager = loss_scale.update(eager, ops.convert_to_tensor(found))
    if backend == "jax":
        import jax

        leaves, structure = jax.tree.flatten(loss_scale.init())
        state, update = jax.tree.unflatten(structure, leaves), jax.jit(loss_scale.update)
    else:
        import tensorflow as tf

        state = tf.nest.pack_sequence_as(loss_scale.init(), tf.nest.flatten(loss_scale.init()))
        update = tf.function(loss_scale.update)
    for found in founds:
        state = update(state, ops.convert_to_tensor(found))
    assert type(state) is LossScaleState
    assert values(state) == values(eager)
