"""How the loss-scale optimizer is called, set up, saved and loaded."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.optimizers import LowPrecision
from keras_precision.scaling import LossScaleOptimizer


@pytest.fixture
def weight():
    return keras.Variable(np.ones((2,)), dtype="float32", name="w")


def scalar(value):
    return ops.convert_to_tensor(np.float32(value))


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((32, 8)).astype("float32"), rng.integers(0, 3, 32)


def compiled_model(optimizer, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3)])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs)
    return model


def values(optimizer):
    return [ops.convert_to_numpy(v.value) for v in optimizer.variables]


# Misuse.


def test_forgetting_to_scale_raises(weight):
    optimizer = LossScaleOptimizer("sgd")
    with pytest.raises(ValueError, match="scale_loss was not called"):
        optimizer.apply([ops.ones((2,))], [weight])
    optimizer.scale_loss(scalar(1))
    optimizer.apply([ops.ones((2,))], [weight])
    with pytest.raises(ValueError, match="scale_loss was not called"):
        optimizer.apply_gradients([(ops.ones((2,)), weight)])


def test_scaling_twice_raises(weight):
    optimizer = LossScaleOptimizer("sgd")
    with pytest.raises(ValueError, match="not scaled yet"):
        optimizer.scale_loss(optimizer.scale_loss(scalar(1)))


def test_several_losses_share_a_scale(weight):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 8.0)
    total = optimizer.scale_loss(scalar(1)) + optimizer.scale_loss(scalar(2))
    assert float(total) == 24.0
    scaled = optimizer.scale_loss({"a": scalar(1), "b": scalar(2)})
    assert float(scaled["b"]) == 16.0
    optimizer.apply([ops.full((2,), 8.0)], [weight])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [0, 0])


def test_gradients_are_unscaled_once(weight):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 8.0)
    assert float(optimizer.get_scaled_loss(scalar(1))) == 8.0
    (gradient,) = optimizer.get_unscaled_gradients([ops.full((2,), 4.0)])
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), [0.5, 0.5])
    optimizer.apply([ops.clip(gradient, -0.25, 0.25)], [weight])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [0.75, 0.75])


@pytest.mark.parametrize("apart", [False, True])
def test_unscaling_in_compiled_code_and_applying_outside_must_be_said(weight, apart, backend):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 8.0)
    optimizer.build([weight])
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def gradients():
            optimizer.scale_loss(tf.constant(1.0))
            return optimizer.unscale([tf.fill((2,), 4.0)])
    else:
        import jax

        program = jax.jit(lambda state: scaled_and_unscaled(optimizer, state))
        gradients = lambda: program([v.value for v in optimizer.variables])
    if apart:
        with pytest.raises(ValueError, match="Pass unscaled=True"):
            optimizer.apply(gradients(), [weight])
    else:
        optimizer.apply(gradients(), [weight], unscaled=True)
        optimizer.apply(gradients(), [weight], unscaled=True)
        np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [0, 0])


def scaled_and_unscaled(optimizer, state):
    with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
        optimizer.scale_loss(ops.ones(()))
        return optimizer.unscale([ops.full((2,), 4.0)])


def test_a_scale_that_jit_would_bake_in_raises(weight, backend):
    if backend != "jax":
        pytest.skip("TensorFlow reads variables when the program runs")
    import jax

    optimizer = LossScaleOptimizer("sgd")
    optimizer.build([weight])
    for transform in (jax.jit, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        with pytest.raises(ValueError, match="keep today's scale for ever"):
            transform(optimizer.scale_loss)(1.0)
    assert float(jax.grad(optimizer.scale_loss)(1.0)) == 2.0**15  # runs at once: nothing is baked in


def test_a_jax_loop_follows_the_scale(weight, backend):
    if backend != "jax":
        pytest.skip("stateless_apply is for JAX")
    import jax

    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.25), 8.0, dynamic_growth_steps=1)
    optimizer.build([weight])

    @jax.jit
    def step(state, weights):
        def loss(weights):
            with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
                return optimizer.scale_loss(jax.numpy.sum(weights[0]))

        return optimizer.stateless_apply(state, jax.grad(loss)(weights), weights)

    weights, state = [weight.value], [v.value for v in optimizer.variables]
    for _ in range(3):
        weights, state = step(state, weights)
    np.testing.assert_array_equal(weights[0], [0.25, 0.25])
    scale = state[[v.name for v in optimizer.variables].index("dynamic_scale")]
    assert float(scale) == 64.0


# Settings.


def test_settings_are_the_inner_optimizers(weight):
    inner = keras.optimizers.AdamW(0.1, clipvalue=0.5)
    optimizer = LossScaleOptimizer(inner)
    assert (optimizer.clipvalue, optimizer.beta_1, optimizer.weight_decay) == (0.5, 0.9, 0.004)
    optimizer.clipvalue, optimizer.beta_1, optimizer.learning_rate = 0.25, 0.8, 0.5
    assert (inner.clipvalue, inner.beta_1, float(inner.learning_rate)) == (0.25, 0.8, 0.5)
    optimizer.exclude_from_weight_decay(var_names=["w"])
    optimizer.scale_loss(scalar(1))
    optimizer.apply([ops.zeros((2,))], [weight])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [1, 1])
    with pytest.raises(ValueError, match="loss_scale_factor=2"):
        optimizer.loss_scale_factor = 2.0
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = optimizer.nonsense


def test_variables_are_there_once(weight):
    optimizer = LossScaleOptimizer(keras.optimizers.Adam())
    optimizer.build([weight])
    names = [v.path for v in optimizer.variables]
    assert len(set(names)) == len(names)
    assert [v for v in optimizer.variables if v.name == "iteration"] == [optimizer.iterations]
    weights = [np.full(v.shape, i, "float32") for i, v in enumerate(optimizer.variables)]
    optimizer.set_weights(weights)
    np.testing.assert_equal(values(optimizer), weights)
    with pytest.raises(ValueError, match="Expected .* arrays"):
        optimizer.set_weights(weights[:-1])


def test_config_restores_everything():
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(0.5, clipnorm=1.0), 4.0, 3, "name", growth_factor=4.0, backoff_factor=0.25,
        min_scale=0.5, max_scale=16.0, hysteresis=2, max_consecutive_skips=None,
    )  # fmt: skip
    config = keras.saving.serialize_keras_object(optimizer)
    for restored in (keras.saving.deserialize_keras_object(config), keras.optimizers.deserialize(dict(config))):
        assert type(restored) is LossScaleOptimizer
        assert restored.get_config() == optimizer.get_config()


def test_state_dict_speaks_grad_scaler(weight):
    optimizer = LossScaleOptimizer("sgd")
    for gradient in (1.0, np.inf, 1.0):
        optimizer.apply([ops.full((2,), gradient)], [weight], unscaled=True)
    state = optimizer.state_dict()
    assert state["scale"] == 2.0**14 and state["_growth_tracker"] == 1 and state["skipped_steps"] == 1
    other = LossScaleOptimizer("sgd")
    other.load_state_dict(state)
    assert other.state_dict() == state
    settings = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    other.load_state_dict({"scale": 4.0, "_growth_tracker": 7, **settings})
    assert other.get_scale() == 4.0 and int(other.step_counter) == 7
    with pytest.raises(ValueError, match="Expected growth_interval=2000"):
        other.load_state_dict({"scale": 4.0, "growth_interval": 5})


# fit and files.


@pytest.mark.parametrize("kwargs", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}])
def test_fit_equals_unwrapped(kwargs):
    x, y = data()
    results = []
    for wrap in (False, True):
        optimizer = keras.optimizers.Adam(0.01)
        model = compiled_model(LossScaleOptimizer(optimizer) if wrap else optimizer, **kwargs)
        model.fit(x, y, batch_size=16, verbose=0, shuffle=False)
        if not kwargs:
            model.train_on_batch(x, y)
        results.append(model.get_weights())
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # Adam's first steps amplify roundings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of the same two steps by a plain, a wrapped and Keras's wrapped Adam, and what they hold."""
    folder = tmp_path_factory.mktemp("files")
    x, y = data()
    files = {}
    for kind, wrap in (
        ("plain", lambda o: o),
        ("ours", lambda o: LossScaleOptimizer(o, 4.0, dynamic_growth_steps=2)),
        ("keras", lambda o: keras.optimizers.LossScaleOptimizer(o, 4.0, dynamic_growth_steps=2)),
    ):
        model = compiled_model(wrap(keras.optimizers.Adam(0.01)))
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        model.save(folder / f"{kind}.keras")
        model.save_weights(folder / f"{kind}.weights.h5")
        files[kind] = folder / f"{kind}.keras", model
    return files


def test_saved_models_continue(trained):
    path, model = trained["ours"]
    loaded = keras.saving.load_model(path)
    assert type(loaded.optimizer) is LossScaleOptimizer
    np.testing.assert_equal(values(loaded.optimizer), values(model.optimizer))
    assert loaded.optimizer.get_scale() == 16.0


def test_files_hold_slots_once(trained):
    import io
    import zipfile

    import h5py

    with zipfile.ZipFile(trained["ours"][0]) as archive:
        file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
        found = []
        file["optimizer"].visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    ours = trained["ours"][1].optimizer
    assert len(found) == len(ours.variables)


@pytest.mark.parametrize("source", ["plain", "ours", "keras"])
@pytest.mark.parametrize("target", ["plain", "ours"])
def test_optimizer_state_moves_between_plain_and_wrapped(trained, source, target):
    path, saved = trained[source]
    if (source, target) == ("keras", "plain"):
        pytest.skip("stock Adam reading a file of stock Keras's wrapper")
    import io
    import zipfile

    with zipfile.ZipFile(path) as archive:
        file = path.parent / f"{source}-to-{target}.weights.h5"
        file.write_bytes(io.BytesIO(archive.read("model.weights.h5")).read())
    optimizer = keras.optimizers.Adam(0.01)
    model = compiled_model(LossScaleOptimizer(optimizer) if target == "ours" else optimizer)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(file)
    inner = getattr(saved.optimizer, "inner_optimizer", saved.optimizer)
    np.testing.assert_equal(values(optimizer), values(inner))
    if target == "ours":
        assert model.optimizer.get_scale() == {"plain": 2.0**15, "ours": 16.0, "keras": 16.0}[source]


# Other wrappers.


def test_low_precision_inside():
    inner = keras.optimizers.AdamW(0.01, clipnorm=1.0)
    optimizer = LossScaleOptimizer(LowPrecision(inner), max_scale=2.0**20)
    assert (optimizer.clipnorm, optimizer.beta_1, optimizer.rounding) == (1.0, 0.9, "stochastic")
    optimizer.beta_1 = 0.8
    assert inner.beta_1 == 0.8
    weight = keras.Variable(np.ones((2,)), dtype="float16")
    optimizer.build([weight])
    before = values(optimizer.inner_optimizer)
    optimizer.apply([ops.full((2,), np.nan, "float16")], [weight], unscaled=False)
    np.testing.assert_equal(values(optimizer.inner_optimizer), before)
    np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), [1, 1])
    optimizer.apply([ops.ones((2,), "float16")], [weight], unscaled=False)
    np.testing.assert_allclose(ops.convert_to_numpy(weight.value), [0.99, 0.99], atol=2e-3)  # two float16 steps


def test_multi_optimizer_inside():
    parts = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*kernel": keras.optimizers.Adam(0.1)})
    weights = [keras.Variable(np.ones((2,)), dtype="float32", name=name) for name in ("kernel", "bias")]
    optimizer = LossScaleOptimizer(keras.optimizers.MultiOptimizer(parts), 8.0)
    for value in (8.0, np.inf):
        optimizer.apply([ops.full((2,), 8.0), ops.full((2,), value)], weights, unscaled=False)
    for weight in weights:
        np.testing.assert_allclose(ops.convert_to_numpy(weight.value), [0.9, 0.9], rtol=1e-5)  # Adam's epsilon
    assert optimizer.last_nonfinite == weights[1].path
    parts = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="without gradient accumulation"):
        LossScaleOptimizer(keras.optimizers.MultiOptimizer(parts)).build(weights)
