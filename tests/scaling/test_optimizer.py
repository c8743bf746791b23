"""The loss-scale optimizer against the optimizer that it wraps, with and without gradients that overflow."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.scaling import LossScaleOptimizer

EXCLUDED = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
OPTIMIZERS = sorted(
    name
    for name, cls in vars(keras.optimizers).items()
    if inspect.isclass(cls) and issubclass(cls, keras.Optimizer) and name not in EXCLUDED
)
SHAPES = ((3, 2), (2,))
SETTINGS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.3},
    "global_clipnorm": {"global_clipnorm": 0.3},
    "clipvalue": {"clipvalue": 0.1},
    "decay": {"weight_decay": 0.01},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema overwriting": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
}


def make(name="Adam", **settings):
    if name == "SGD":
        settings.setdefault("momentum", 0.9)
    return getattr(keras.optimizers, name)(**{"learning_rate": 0.05, **settings})


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(shape).astype("float32") for shape in SHAPES] for _ in range(steps)]


class Run:
    """Two weights that an optimizer trains, in eager or compiled code, with gradients given as those of the plain loss."""

    def __init__(self, optimizer, compiled=False, constraint=None):
        self.weights = [keras.Variable(np.linspace(-1, 1, np.prod(s)).reshape(s), dtype="float32") for s in SHAPES]
        self.weights[0].constraint = constraint
        self.optimizer = optimizer
        self.wrapped = isinstance(optimizer, LossScaleOptimizer)
        optimizer.build(self.weights)
        self.kwargs = {"unscaled": False} if self.wrapped else {}
        self.step = self.compiled() if compiled else self.eager
        self.start = [ops.convert_to_numpy(v.value) for v in self.weights + optimizer.variables]

    def reset(self):
        for variable, value in zip(self.weights + self.optimizer.variables, self.start, strict=True):
            variable.assign(value)
        return self

    def eager(self, grads):
        self.optimizer.apply([ops.convert_to_tensor(g) for g in grads], self.weights, **self.kwargs)

    def compiled(self):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.function(self.eager, reduce_retracing=True)
        import jax

        @jax.jit
        def step(values, grads, weights):
            return self.optimizer.stateless_apply(values, grads, weights, **self.kwargs)

        def run(grads):
            values = [v.value for v in self.optimizer.variables], grads, [w.value for w in self.weights]
            weights, values = step(*values)
            for v, value in zip(self.weights + self.optimizer.variables, weights + values, strict=True):
                v.assign(value)

        return run

    def train(self, steps):
        for grads in steps:
            scale = np.float32(self.optimizer.get_scale() if self.wrapped else 1)
            self.step([ops.convert_to_tensor(g * scale) for g in grads])
        return self

    def state(self):
        inner = self.optimizer.inner_optimizer if self.wrapped else self.optimizer
        return [ops.convert_to_numpy(v.value) for v in self.weights + inner.variables]


def assert_same(states, others):
    for value, other in zip(states, others, strict=True):
        np.testing.assert_array_equal(value, other)


def assert_close(states, others):
    # A few float32 roundings a step, of values near 1: XLA fuses the wrapped update with a select.
    for value, other in zip(states, others, strict=True):
        np.testing.assert_allclose(value, other, rtol=3e-6, atol=3e-6)


def poisoned(steps, at, which, bad):
    steps = [[g.copy() for g in grads] for grads in steps]
    steps[at][which].flat[-1] = bad
    return steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    steps = gradients(3)
    plain = Run(make(name), compiled=True).train(steps)
    run = Run(LossScaleOptimizer(make(name), dynamic_growth_steps=2), compiled=True)
    assert_close(run.train(steps).state(), plain.state())
    assert run.optimizer.get_scale() == 2.0**16  # grown, so the scale did change on the way
    check_faults(run, steps, [(at, which) for at in range(3) for which in range(2)])


def check_faults(run, steps, places):
    """A NaN or inf in any gradient at any step: as if that step had not been."""
    skipping = {at: run.reset().train(steps[:at] + steps[at + 1 :]).state() for at, _ in places}
    for at, which in places:
        run.reset().train(poisoned(steps, at, which, (np.nan, np.inf, -np.inf)[(at + which) % 3]))
        assert int(run.optimizer.skipped_steps) == 1
        assert_same(run.state(), skipping[at])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("accumulation", [None, 2])
def test_equals_the_inner_optimizer_with_every_setting(setting, accumulation):
    kwargs = {**SETTINGS[setting], "gradient_accumulation_steps": accumulation}
    steps = gradients(4)
    plain = Run(make(**kwargs), compiled=True).train(steps)
    run = Run(LossScaleOptimizer(make(**kwargs)), compiled=True).train(steps)
    assert_close(run.state(), plain.state())
    if accumulation is None:
        check_faults(run, steps, [(0, 1), (2, 0)])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, SETTINGS["ema overwriting"]])
def test_eager_steps(settings):
    steps = gradients(4)
    plain = Run(make("SGD", **settings)).train(steps)
    run = Run(LossScaleOptimizer(make("SGD", **settings))).train(steps)
    assert_close(run.state(), plain.state())
    if not run.optimizer.gradient_accumulation_steps:
        check_faults(run, steps, [(1, 0)])


@pytest.mark.parametrize("setting, compiled", [*((setting, True) for setting in SETTINGS), ("ema overwriting", False)])
def test_a_window_that_overflows_is_discarded_whole(setting, compiled):
    length, windows = 3, 3
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)
    kwargs = {**SETTINGS[setting], "gradient_accumulation_steps": length, "learning_rate": schedule}
    run = Run(LossScaleOptimizer(make(**kwargs)), compiled, constraint=keras.constraints.MaxNorm(0.8))
    steps = gradients(length * windows)
    for at in range(length * windows) if compiled else (1, 5):
        first = at // length * length
        expected = run.reset().train(steps[:first] + steps[first + length :]).state()
        run.reset().train(poisoned(steps, at, at % 2, np.inf))
        assert_same(run.state(), expected)
        assert int(run.optimizer.skipped_steps) == 1
        assert int(run.optimizer.iterations) == windows - 1
        assert run.optimizer.get_scale() == 2.0**14


def test_a_window_with_several_overflows_is_one_decision():
    run = Run(LossScaleOptimizer(make(gradient_accumulation_steps=4)))
    steps = gradients(4)
    for at in (1, 3):
        steps = poisoned(steps, at, 0, np.nan)
    run.train(steps[:3])
    assert int(run.optimizer.skipped_steps) == 0
    assert run.optimizer.get_scale() == 2.0**15
    run.train(steps[3:])
    assert int(run.optimizer.skipped_steps) == 1
    assert run.optimizer.get_scale() == 2.0**14


@pytest.mark.parametrize("wrapped", [False, True])
def test_schedules_count_updates(wrapped):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.5])
    optimizer = keras.optimizers.SGD(schedule, gradient_accumulation_steps=3)
    optimizer = LossScaleOptimizer(optimizer) if wrapped else optimizer
    rates = []
    run = Run(optimizer)
    for grads in gradients(9):
        rates.append(float(optimizer.learning_rate))
        run.train([grads])
    assert rates == [1.0] * 6 + [0.5] * 3


def test_the_scale_stays_within_its_bounds():
    kwargs = dict(initial_scale=4.0, min_scale=2.0, max_scale=8.0, dynamic_growth_steps=1, max_consecutive_skips=None)
    run = Run(LossScaleOptimizer(make(), **kwargs))
    steps = gradients(4)
    run.train(steps)
    assert run.optimizer.get_scale() == 8.0
    for at in range(4):
        steps = poisoned(steps, at, 0, np.inf)
    run.train(steps)
    assert run.optimizer.get_scale() == 2.0
    assert int(run.optimizer.consecutive_skips) == int(run.optimizer.skipped_steps) == 4


def test_hysteresis_and_factors_reach_the_state_machine():
    run = Run(LossScaleOptimizer(make(), hysteresis=2, backoff_factor=0.25, growth_factor=4.0, dynamic_growth_steps=1))
    bad = poisoned(gradients(1), 0, 0, np.inf)
    assert run.train(bad).optimizer.get_scale() == 2.0**15
    assert run.train(bad).optimizer.get_scale() == 2.0**13
    assert run.train(gradients(1)).optimizer.get_scale() == 2.0**15


def test_too_many_skips_name_the_weight():
    run = Run(LossScaleOptimizer(make(), max_consecutive_skips=2))
    bad = poisoned(gradients(1), 0, 1, np.nan)
    run.train(bad)
    run.train(gradients(1))
    run.train(bad)
    with pytest.raises(FloatingPointError, match=f"2 steps in a row.*'{run.weights[1].path}'"):
        run.train(bad)


def test_too_many_skips_in_compiled_code_raise_when_asked():
    run = Run(LossScaleOptimizer(make(), max_consecutive_skips=2), compiled=True)
    run.train(poisoned(gradients(1), 0, 1, np.nan))
    run.optimizer.raise_if_stuck()
    run.train(poisoned(gradients(1), 0, 1, np.nan))
    with pytest.raises(FloatingPointError, match=run.weights[1].path):
        run.optimizer.raise_if_stuck()


def test_float16_gradients_do_not_underflow_when_unscaled():
    weight = keras.Variable(np.zeros((2,)), dtype="float32")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(2.0**20))
    optimizer.apply([ops.full((2,), 2.0**-24, "float16")], [weight], unscaled=False)
    np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [-(2.0**-19)] * 2)


def test_none_gradients_are_left_to_the_inner_optimizer():
    run = Run(LossScaleOptimizer(make()))
    before = run.state()[1]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        run.optimizer.apply([ops.ones(SHAPES[0]), None], run.weights, unscaled=False)
    np.testing.assert_array_equal(run.state()[1], before)
    with pytest.raises(ValueError, match="No gradients"):
        run.optimizer.apply([None, None], run.weights, unscaled=False)


def test_sparse_gradients_of_embeddings(backend):
    if backend != "tensorflow":
        pytest.skip("only TensorFlow's gradients of embeddings are sparse unless asked for")
    import tensorflow as tf

    results = []
    for wrap in (False, True):
        table = keras.Variable(np.ones((4, 2)), dtype="float32")
        optimizer = LossScaleOptimizer(make("SGD"), 8.0) if wrap else make("SGD")
        for value in (1.0, np.inf, 2.0) if wrap else (1.0, 2.0):
            factor = optimizer.get_scale() if wrap else 1.0
            rows = tf.IndexedSlices(tf.fill((1, 2), value * factor), tf.constant([2]), tf.constant([4, 2]))
            optimizer.apply([rows], [table], **({"unscaled": False} if wrap else {}))
        results.append(ops.convert_to_numpy(table.value))
    assert_same(*[[r] for r in results])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="wrapped in a LossScaleOptimizer already"):
        LossScaleOptimizer(LossScaleOptimizer(make()))
    with pytest.raises(ValueError, match="loss_scale_factor=8.0"):
        LossScaleOptimizer(make(loss_scale_factor=8.0))
    with pytest.raises(ValueError, match="Expected max_consecutive_skips"):
        LossScaleOptimizer(make(), max_consecutive_skips=0)
    with pytest.raises(ValueError, match="Expected growth_factor"):
        LossScaleOptimizer(make(), growth_factor=0.5)
    with pytest.raises(ValueError, match="does not support `clipnorm`"):
        LossScaleOptimizer(make(), clipnorm=1.0)
    inner = LossScaleOptimizer("sgd", use_ema=False, clipnorm=None).inner_optimizer  # old configs hold these
    assert isinstance(inner, keras.optimizers.SGD)
