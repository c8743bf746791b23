"""D1, D2: 16-bit weights train as float32 ones do, with every optimizer's own maths in float32."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_precision as kp
from keras_precision.optimizers import LowPrecision

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "SGD-momentum": lambda: keras.optimizers.SGD(0.02, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01),
    "Adamax": lambda: keras.optimizers.Adamax(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "Lamb": lambda: keras.optimizers.Lamb(0.01),
    "Lion": lambda: keras.optimizers.Lion(0.003),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.005),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(10.0),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.3),
    "Muon": lambda: keras.optimizers.Muon(0.01),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 16)).astype("float32")
Y = np.argmax(X @ RNG.normal(size=(16, 4)), axis=1)


def classifier(policy):
    with kp.policy_scope(policy):
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])
    values = np.random.default_rng(1)
    model.set_weights([0.3 * values.normal(size=weight.shape) for weight in model.weights])
    return model


def train(policy, optimizer, epochs=10, **compile_arguments):
    """Returns the trained model, and loss and accuracy of its last epoch."""
    model = classifier(policy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **compile_arguments)
    history = model.fit(X, Y, epochs=epochs, batch_size=32, shuffle=False, verbose=0).history
    return model, history["loss"][-1], history["accuracy"][-1]


@functools.lru_cache(maxsize=None)
def float32_result(name):
    return train("float32", OPTIMIZERS[name]())[1:]


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_16_bit_weights_as_float32_ones(name, policy):
    expected, expected_accuracy = float32_result(name)
    model, loss, accuracy = train(policy, OPTIMIZERS[name]())
    assert {keras.backend.standardize_dtype(w.value.dtype) for w in model.weights} == {policy}
    # 80 steps with 16-bit activations: the losses differ by noise of a few percent; of 256 samples 2% may flip.
    assert loss == pytest.approx(expected, rel=0.06, abs=0.015)
    assert accuracy == pytest.approx(expected_accuracy, abs=0.02)


def test_stock_adam_moves_no_bfloat16_weight_and_compile_leaves_it_if_told():
    optimizer = kp.optimizers.as_given(keras.optimizers.Adam(0.01))
    model, *_ = train("bfloat16", optimizer, epochs=1)
    assert model.optimizer is optimizer
    before = classifier("bfloat16")
    for old, new in zip(before.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(old.value), ops.convert_to_numpy(new.value))


def test_compile_attaches_what_the_weights_and_the_arithmetic_need():
    cases = {
        "float32": (keras.optimizers.Adam,),
        "mixed_bfloat16": (keras.optimizers.Adam,),
        "bfloat16": (LowPrecision, keras.optimizers.Adam),
        "mixed_float16": (kp.scaling.LossScaleOptimizer, keras.optimizers.Adam),
        "float16": (kp.scaling.LossScaleOptimizer, LowPrecision, keras.optimizers.Adam),
    }
    for policy, expected in cases.items():
        model = classifier(policy)
        model.compile("adam", "mse")
        found, optimizer = [], model.optimizer
        while optimizer is not None:
            found.append(type(optimizer))
            optimizer = optimizer.__dict__.get("inner_optimizer")
        assert len(found) == len(expected) and all(map(issubclass, found, expected)), policy


def test_loss_scaling_is_decided_by_the_layers_not_by_the_models_policy():
    scaled = keras.optimizers.LossScaleOptimizer

    def compiled(*dtypes, **arguments):
        layers = [keras.layers.Dense(2, dtype=dtype) for dtype in dtypes]
        model = keras.Sequential([keras.Input((2,)), *layers])
        model.compile("sgd", "mse", **arguments)
        return model.optimizer

    assert isinstance(compiled("float32", "mixed_float16"), scaled)
    assert not isinstance(compiled("float32", "mixed_float16", auto_scale_loss=False), scaled)
    assert not isinstance(compiled("float32", "mixed_bfloat16"), scaled)
    with kp.policy_scope("mixed_float16"):
        assert not isinstance(compiled("float32", "bfloat16"), scaled)
    assert isinstance(compiled(kp.DTypePolicyMap("float32", {"dense*": "mixed_float16"})), scaled)
    model = classifier("mixed_float16")
    static = keras.optimizers.SGD(loss_scale_factor=128.0)
    model.compile(static, "mse")
    assert model.optimizer is static
    given = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model = classifier("mixed_float16")
    model.compile(given, "mse")
    assert model.optimizer is given


def weight_of(dtype, value=1.0, shape=(1000,)):
    layer = keras.layers.Layer(dtype=dtype)
    return layer.add_weight(shape=shape, initializer=keras.initializers.Constant(value), name="weight")


def numbers(variable):
    return ops.convert_to_numpy(ops.cast(variable.value, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arguments", [{}, {"rounding": "kahan"}, {"rounding": "nearest", "master_weights": True}])
def test_small_updates_are_not_lost(arguments, dtype):
    weight = weight_of(dtype)
    optimizer = LowPrecision(keras.optimizers.SGD(1.0), **arguments)
    for _ in range(100):
        optimizer.apply([ops.full((1000,), -1e-3)], [weight])
    # To nearest each value is within half a step, 2**-8 in bfloat16. Drawn, each step adds a variance of at most
    # (2**-7 / 2)**2; over 100 steps and 1000 weights the mean's standard error is 1.3e-3, of which 4 are allowed.
    assert abs(numbers(weight).mean() - 1.1) < 2**-8 + 4 * 1.3e-3
    nearest = weight_of(dtype)
    stock = LowPrecision(keras.optimizers.SGD(1.0), rounding="nearest")
    for _ in range(100):
        stock.apply([ops.full((1000,), -2.0**-12)], [nearest])
    assert numbers(nearest).mean() == 1.0


def test_zero_gradients_in_float16_with_epsilon_1e_8_change_nothing():
    weight = weight_of("float16")
    optimizer = LowPrecision(keras.optimizers.Adam(0.1, epsilon=1e-8))
    for _ in range(3):
        optimizer.apply([ops.zeros((1000,), "float16")], [weight])
    np.testing.assert_array_equal(numbers(weight), 1.0)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_slots_are_float32_and_equal_the_float32_optimizers(rounding):
    weight, reference = weight_of("bfloat16"), weight_of("float32")
    inner, plain = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    optimizer = LowPrecision(inner, rounding)
    for step in range(5):
        gradient = ops.full((1000,), 0.001 * (step + 1))
        optimizer.apply([gradient], [weight])
        plain.apply([gradient], [reference])
    for ours, theirs in zip(inner.variables, plain.variables, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.value), ops.convert_to_numpy(theirs.value))


def test_equal_seeds_give_equal_training_and_others_do_not():
    def run(seed):
        weight = weight_of("bfloat16")
        optimizer = LowPrecision(keras.optimizers.SGD(1.0), seed=seed)
        for _ in range(3):
            optimizer.apply([ops.full((1000,), 1e-3)], [weight])
        return numbers(weight)

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()


def test_two_weights_and_two_steps_draw_differently():
    weights = [weight_of("bfloat16"), weight_of("bfloat16")]
    optimizer = LowPrecision(keras.optimizers.SGD(1.0))
    gradient = ops.full((1000,), -(2.0**-9))
    optimizer.apply([gradient, gradient], weights)
    first = [numbers(weight) for weight in weights]
    assert (first[0] != first[1]).any()
    for weight in weights:
        weight.assign(ops.ones((1000,)))
    optimizer.apply([gradient, gradient], weights)
    assert (numbers(weights[0]) != first[0]).any()


def test_float32_weights_pass_through_untouched():
    weight, reference = weight_of("float32"), weight_of("float32")
    LowPrecision(keras.optimizers.SGD(0.3)).apply([ops.full((1000,), 0.1)], [weight])
    keras.optimizers.SGD(0.3).apply([ops.full((1000,), 0.1)], [reference])
    np.testing.assert_array_equal(numbers(weight), numbers(reference))


def test_missing_gradients_leave_their_weights():
    weights = [weight_of("bfloat16"), weight_of("bfloat16", 2.0)]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        LowPrecision(keras.optimizers.SGD(1.0)).apply([ops.ones((1000,)), None], weights)
    assert numbers(weights[0]).mean() == 0 and numbers(weights[1]).mean() == 2


def test_clipping_decay_constraint_and_exclusion_act():
    weight = weight_of("bfloat16", 4.0, shape=(4,))
    weight.constraint = keras.constraints.NonNeg()
    optimizer = LowPrecision(keras.optimizers.SGD(1.0))
    optimizer.clipvalue = 1.0
    assert optimizer.inner_optimizer.clipvalue == 1.0
    optimizer.apply([ops.convert_to_tensor([2.0, 0.5, -3.0, 0.0])], [weight])
    np.testing.assert_array_equal(numbers(weight), [3.0, 3.5, 5.0, 4.0])
    optimizer.apply([ops.full((4,), 100.0)] * 1, [weight])
    for _ in range(5):
        optimizer.apply([ops.full((4,), 100.0)], [weight])
    assert (numbers(weight) == 0).all()
    decayed, kept = weight_of("bfloat16"), weight_of("bfloat16")
    optimizer = LowPrecision(keras.optimizers.AdamW(0.5, weight_decay=0.5))
    assert optimizer.weight_decay == 0.5 and optimizer.beta_1 == 0.9
    optimizer.exclude_from_weight_decay(var_list=[kept])
    optimizer.apply([ops.zeros((1000,)), ops.zeros((1000,))], [decayed, kept])
    assert numbers(decayed).mean() == 0.75 and numbers(kept).mean() == 1.0


def test_accumulation_rounds_once_a_window():
    weight = weight_of("bfloat16")
    optimizer = LowPrecision(keras.optimizers.SGD(1.0, gradient_accumulation_steps=4))
    for step in range(4):
        assert (numbers(weight) == 1).all()
        optimizer.apply([ops.full((1000,), 0.5)], [weight])
    assert (numbers(weight) == 0.5).all()
    assert int(optimizer.iterations) == 1


def test_moving_averages_replace_the_weights_at_the_end():
    model = classifier("bfloat16")
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    model.fit(X, np.ones((256, 4), "float32"), epochs=2, batch_size=64, verbose=0)
    averages = [v for v in model.optimizer.variables if v.path.endswith("average")]
    assert len(averages) == len(model.weights)
    for average, weight in zip(averages, model.weights, strict=True):
        rounded = ops.convert_to_numpy(ops.cast(ops.cast(average.value, "bfloat16"), "float32"))
        np.testing.assert_array_equal(numbers(weight), rounded)


def test_master_weights_follow_weights_set_from_outside():
    weight = weight_of("bfloat16")
    optimizer = LowPrecision(keras.optimizers.SGD(1.0), rounding="nearest", master_weights=True)
    optimizer.apply([ops.full((1000,), -1e-3)], [weight])
    weight.assign(ops.full((1000,), 3.0))
    optimizer.apply([ops.full((1000,), -1.0)], [weight])
    assert (numbers(weight) == 4.0).all()


def test_memory_beyond_the_slots(backend):
    def state_bytes(**arguments):
        weight = weight_of("bfloat16")
        optimizer = LowPrecision(keras.optimizers.SGD(1.0), **arguments)
        optimizer.apply([ops.ones((1000,))], [weight])
        return sum(v.value.nbytes if backend == "jax" else v.numpy().nbytes for v in optimizer.variables if len(v.shape))

    assert state_bytes() == 0
    assert state_bytes(rounding="kahan") == 2000
    assert state_bytes(rounding="nearest", master_weights=True) == 4000


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_float16"])
def test_training_goes_on_after_a_reload_as_if_uninterrupted(policy, tmp_path):
    model, *_ = train(policy, "adam", epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a.value), ops.convert_to_numpy(b.value))
    histories = [m.fit(X, Y, batch_size=32, shuffle=False, verbose=0).history["loss"] for m in (model, loaded)]
    assert histories[0] == histories[1]


def test_config_round_trip():
    optimizer = LowPrecision(keras.optimizers.Adam(0.5, beta_1=0.8), rounding="kahan", seed=3, name="low")
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert copy.get_config() == optimizer.get_config()
    assert (type(copy), copy.inner_optimizer.beta_1, copy.rounding, copy.seed) == (LowPrecision, 0.8, "kahan", 3)


def test_bad_input():
    with pytest.raises(ValueError, match="Expected rounding in .*Pass 'stochastic'"):
        LowPrecision(keras.optimizers.SGD(), rounding="up")
    with pytest.raises(ValueError, match="Pass one of the two"):
        LowPrecision(keras.optimizers.SGD(), rounding="kahan", master_weights=True)
    with pytest.raises(ValueError, match="wrapped in LowPrecision already"):
        LowPrecision(LowPrecision(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match="Expected the weights at the first call"):
        LowPrecision(keras.optimizers.SGD()).apply([ops.ones((2,))])
    optimizer = LowPrecision(keras.optimizers.SGD())
    optimizer.build([weight_of("bfloat16")])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([ops.ones((1000,))], [weight_of("bfloat16")])


def test_slots_that_begin_as_copies_of_the_weights_do():
    """ScheduleFreeAdamW averages from where the weights start."""
    weight = keras.Variable(np.array([1.5, -2.0]), dtype="bfloat16")
    optimizer = LowPrecision(keras.optimizers.ScheduleFreeAdamW(0.1))
    optimizer.build([weight])
    (momentum,) = [v for v in optimizer.variables if v.name.endswith("momentum")]
    np.testing.assert_array_equal(ops.convert_to_numpy(momentum), [1.5, -2.0])
