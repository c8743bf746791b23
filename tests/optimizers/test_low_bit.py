"""States in 8 and 4 bits: every optimizer trains as with float32 states, and files, wrappers and errors hold."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_precision as kp
from keras_precision.optimizers import LowBit, aliases, slots
from keras_precision.optimizers.states import STATE_FORMATS

OPTIMIZERS = {
    "SGD-momentum": lambda: keras.optimizers.SGD(0.02, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(0.01),
    "Adamax": lambda: keras.optimizers.Adamax(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "Lamb": lambda: keras.optimizers.Lamb(0.01),
    "Lion": lambda: keras.optimizers.Lion(0.003),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.005, centered=True, momentum=0.5),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(10.0),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.3),
    "Muon": lambda: keras.optimizers.Muon(0.01),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 16)).astype("float32")
Y = np.argmax(X @ RNG.normal(size=(16, 4)), axis=1)


def classifier(dtype="float32"):
    with kp.policy_scope(dtype):
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(4)])
    values = np.random.default_rng(1)
    model.set_weights([0.3 * values.normal(size=weight.shape) for weight in model.weights])
    return model


def trained(optimizer, epochs=10, dtype="float32", model=None):
    """Returns the trained model and the loss of its last epoch."""
    model = model or classifier(dtype)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(X, Y, epochs=epochs, batch_size=32, shuffle=False, verbose=0).history
    return model, history["loss"][-1]


def arrays(variables):
    return [ops.convert_to_numpy(v).copy() for v in variables]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@functools.lru_cache(maxsize=None)
def float32_loss(name):
    return trained(OPTIMIZERS[name]())[1]


# What moves by less than half a code's step in each update stays where it is: 4 bits are for Adam, and Ftrl's sums, of
# which the weights are made, need more than e4m3's 4 significant bits.
GOOD_FOR = {
    "dynamic8": set(OPTIMIZERS),
    "float8": set(OPTIMIZERS) - {"Ftrl"},
    "dynamic4": {"Adam", "AdamW", "Nadam"},
}


@pytest.mark.parametrize("name, state_format", [(name, fmt) for fmt in GOOD_FOR for name in sorted(GOOD_FOR[fmt])])
def test_optimizers_train_as_with_float32_states(name, state_format):
    model, loss = trained(LowBit(OPTIMIZERS[name](), state_format, min_size=64))
    assert model.optimizer.packed_slots
    # 80 steps from one start. Losses below float32's are as good.
    assert loss <= max(1.05 * float32_loss(name), float32_loss(name) + 0.01)


def test_every_format_is_tried():
    assert set(GOOD_FOR) == set(STATE_FORMATS)


def test_every_alias_is_what_it_is_called():
    classes = {"8bit": "dynamic8", "4bit": "dynamic4", "Fp8": "float8"}
    for name, make in aliases.ALIASES.items():
        optimizer = make(learning_rate=0.01, block_size=64, min_size=100)
        ending = next(ending for ending in classes if name.endswith(ending))
        assert type(optimizer.inner_optimizer).__name__ == name.removesuffix(ending)
        assert (optimizer.state_format, optimizer.block_size, optimizer.min_size) == (classes[ending], 64, 100)
        assert getattr(kp.optimizers, name) is make and float(optimizer.learning_rate) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="no_such_argument"):
        kp.optimizers.Adam8bit(no_such_argument=1)


@pytest.mark.parametrize("name, most", [("Adam8bit", 2.04), ("AdamWFp8", 2.04), ("Lion8bit", 1.02), ("AdamW4bit", 1.1)])
def test_bytes_of_the_live_states(name, most):
    weight = keras.Variable(np.zeros((512, 768), "float32"))
    optimizer = aliases.ALIASES[name]()
    optimizer.build([weight])
    states = optimizer.variables[2:]
    assert sum(value.nbytes for value in arrays(states)) / (512 * 768) <= most


@pytest.mark.parametrize("shape", [(4096,), (64, 128), (37, 129)])
def test_adam_stays_with_a_reference_that_is_set_back_each_step(shape):
    """Bitsandbytes' own bar for its 8-bit Adam: mean |weight error| below 6e-5, relative to the weight below 6e-4."""
    draw = np.random.default_rng(0)
    start = (0.1 * draw.standard_normal(shape)).astype("float32")
    exact, packed = keras.Variable(start), keras.Variable(start)
    reference, optimizer = keras.optimizers.Adam(1e-3), kp.optimizers.Adam8bit(1e-3, min_size=0)
    reference.build([exact])
    optimizer.build([packed])
    errors, relative = [], []
    for _ in range(50):
        gradient = ops.convert_to_tensor((0.01 * draw.standard_normal(shape)).astype("float32"))
        reference.apply([gradient], [exact])
        optimizer.apply([gradient], [packed])
        expected, found = ops.convert_to_numpy(exact), ops.convert_to_numpy(packed)
        errors.append(np.abs(expected - found).mean())
        relative.append((np.abs(expected - found) / np.abs(expected).clip(1e-9)).mean())
        packed.assign(expected)
        for slot, state in zip(optimizer.packed_slots, reference.variables[2:], strict=True):
            np.testing.assert_allclose(slot.numpy(), state, atol=0.04 * np.abs(state).max())
    assert np.mean(errors) < 6e-5 and np.median(relative) < 6e-4


def test_small_second_moments_do_not_blow_the_step_up():
    """One gradient of 1e5 in a block of tiny ones: rounded to zero, their moments would make steps of lr / epsilon."""
    gradient = np.full(256, 1e-4, "float32")
    gradient[7] = 1e5
    for name in STATE_FORMATS:
        weight = keras.Variable(np.zeros(256, "float32"))
        optimizer = LowBit(keras.optimizers.Adam(1e-3), name, min_size=0)
        optimizer.build([weight])
        for _ in range(20):
            optimizer.apply([ops.convert_to_tensor(gradient)], [weight])
        assert np.abs(ops.convert_to_numpy(weight)).max() <= 20 * 1.1e-3


def test_small_weights_embeddings_and_overrides_stay_as_told():
    weights = [
        keras.Variable(np.zeros(shape, "float32"), name=name)
        for name, shape in (("bias", (64,)), ("kernel", (64, 128)), ("embeddings", (64, 128)), ("special", (64, 128)))
    ]
    optimizer = LowBit(keras.optimizers.Adam())
    optimizer.register("special", "dynamic4")
    optimizer.register("^kernel$")  # back to float32
    optimizer.build(weights)
    found = {slot.path: slot.state_format.name for slot in optimizer.packed_slots}
    assert found == {"special_momentum": "dynamic4", "special_velocity": "dynamic4"}
    again = LowBit.from_config(optimizer.get_config())
    assert again.overrides == optimizer.overrides and again.get_config() == optimizer.get_config()
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.register("bias", "dynamic8")


def test_nothing_packed_is_the_plain_optimizer_bit_for_bit():
    plain, _ = trained(keras.optimizers.AdamW(0.01), epochs=2)
    passed, _ = trained(LowBit(keras.optimizers.AdamW(0.01), min_size=10**6), epochs=2)
    assert_same(arrays(passed.weights), arrays(plain.weights))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"use_ema": True, "ema_overwrite_frequency": 5},
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.01},
        {"weight_decay": 0.1},
        {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.5)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_inner_optimizer_hold(settings):
    arguments = {"learning_rate": 0.01, **settings}
    plain, expected = trained(keras.optimizers.Adam(**arguments), epochs=4)
    model, loss = trained(LowBit(keras.optimizers.Adam(**arguments), min_size=64), epochs=4)
    assert loss == pytest.approx(expected, rel=0.02)
    moved = [np.abs(a - b).mean() for a, b in zip(arrays(model.weights), arrays(classifier().weights), strict=True)]
    off = [np.abs(a - b).mean() for a, b in zip(arrays(model.weights), arrays(plain.weights), strict=True)]
    assert all(o <= 0.1 * m + 1e-5 for o, m in zip(off, moved, strict=True))
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations)


def test_micro_steps_leave_packed_states_alone():
    weight = keras.Variable(np.zeros((64, 64), "float32"))
    optimizer = LowBit(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), min_size=0)
    optimizer.build([weight])
    parts = [part for slot in optimizer.packed_slots for part in slot.parts.values()]
    for step in range(4):
        before = arrays(parts)
        optimizer.apply([ops.ones((64, 64))], [weight])
        is_changed = any((a != b).any() for a, b in zip(before, arrays(parts), strict=True))
        assert is_changed == (step % 2 == 1)


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_training_goes_on_after_a_reload_as_if_uninterrupted(state_format, tmp_path):
    def optimizer():
        inner = LowBit(keras.optimizers.AdamW(0.01), state_format, min_size=64)
        return kp.scaling.LossScaleOptimizer(kp.optimizers.LowPrecision(inner), initial_scale=2.0**10)

    model, _ = trained(optimizer(), epochs=2, dtype="float16")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(arrays(loaded.optimizer.variables), arrays(model.optimizer.variables))
    for either in (model, loaded):
        either.fit(X, Y, epochs=1, batch_size=32, shuffle=False, verbose=0)
    assert_same(arrays(loaded.weights), arrays(model.weights))


def test_files_move_between_float32_and_packed_states(tmp_path):
    def with_optimizer(optimizer, path=None):
        model = classifier()
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        if path:
            model.load_weights(path)
        return model

    def states(optimizer):
        return {
            slot.path.partition("_kernel")[2]: slot.numpy() for slot in optimizer.packed_slots if "kernel" in slot.path
        }

    plain, _ = trained(keras.optimizers.Adam(0.01), epochs=2)
    plain.save(tmp_path / "plain.keras")
    store = {}
    plain.optimizer.save_own_variables(store)
    packed = with_optimizer(LowBit(keras.optimizers.Adam(0.01), min_size=64)).optimizer
    packed.load_own_variables(store)
    assert int(packed.iterations) == int(plain.optimizer.iterations)
    for entry, variable in zip(packed.inner_optimizer.entries, plain.optimizer.variables, strict=True):
        expected = ops.convert_to_numpy(variable)
        np.testing.assert_allclose(ops.convert_to_numpy(entry), expected, atol=0.0072 * np.abs(expected).max())
    # And back: the plain optimizer gets exactly what the packed one decodes.
    store = {}
    packed.save_own_variables(store)
    back = with_optimizer(keras.optimizers.Adam(0.01)).optimizer
    back.load_own_variables(store)
    for entry, variable in zip(packed.inner_optimizer.entries, back.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), ops.convert_to_numpy(entry))
    # Another format or block size decodes and encodes.
    other = with_optimizer(LowBit(keras.optimizers.Adam(0.01), "float8", block_size=32, min_size=64)).optimizer
    other.load_own_variables(store)
    for name, value in states(other).items():
        np.testing.assert_allclose(value, states(packed)[name], rtol=0.14, atol=1e-4 * np.abs(value).max())
    store.pop("3.codes")
    store.pop("3.scale")
    store.pop("3.format")
    with pytest.raises(ValueError, match="Expected a file with"):
        packed.load_own_variables(store)


def test_an_overflow_leaves_packed_states_as_they_were():
    weight = keras.Variable(np.ones((64, 64), "float32"))
    inner = LowBit(keras.optimizers.Adam(0.01), min_size=0)
    optimizer = kp.scaling.LossScaleOptimizer(inner, initial_scale=4.0)
    optimizer.build([weight])
    good = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((64, 64)).astype("float32"))
    bad = ops.where(ops.equal(good, ops.max(good)), float("nan"), good)
    optimizer.apply([good], [weight], unscaled=True)
    before = arrays([weight, *inner.variables])
    optimizer.apply([bad], [weight], unscaled=True)
    assert_same(arrays([weight, *inner.variables]), before)
    optimizer.apply([good], [weight], unscaled=True)
    assert (ops.convert_to_numpy(weight) != before[0]).all()


@pytest.mark.default_xla
def test_eager_and_compiled_steps_agree():
    start = np.random.default_rng(0).standard_normal((64, 96)).astype("float32")
    gradients = [np.random.default_rng(i).standard_normal((64, 96)).astype("float32") for i in range(5)]

    def made():
        weight, optimizer = keras.Variable(start), LowBit(keras.optimizers.Adam(0.01), min_size=0)
        optimizer.build([weight])
        return weight, optimizer

    weight, optimizer = made()
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient)], [weight])
    other, compiled = made()
    if keras.backend.backend() == "jax":
        import jax

        step = jax.jit(lambda weights, state, gradient: compiled.stateless_apply(state, [gradient], weights))
        weights, state = [other.value], [v.value for v in compiled.variables]
        for gradient in gradients:
            weights, state = step(weights, state, gradient)
        other.assign(weights[0])
        for variable, value in zip(compiled.variables, state, strict=True):
            variable.assign(value)
    else:
        import tensorflow as tf

        step = tf.function(lambda gradient: compiled.apply([gradient], [other]))
        for gradient in gradients:
            step(tf.constant(gradient))
    # XLA contracts products and sums; where that moves a state over a midpoint its code is the next one.
    np.testing.assert_allclose(ops.convert_to_numpy(other), ops.convert_to_numpy(weight), atol=5 * 1e-4)
    for one, two in zip(compiled.packed_slots, optimizer.packed_slots, strict=True):
        different = np.mean(ops.convert_to_numpy(one.parts["codes"]) != ops.convert_to_numpy(two.parts["codes"]))
        assert different < 0.01


def test_signs_of_slots_are_those_that_training_gives_them():
    names = sorted({name for table in slots.UNSIGNED.values() for name in table})
    for optimizer_name, make in OPTIMIZERS.items():
        optimizer = trained(make(), epochs=1)[0].optimizer
        unsigned = tuple(f"_{name}" for name in names if not slots.is_signed(optimizer, name))
        for variable in optimizer.variables:
            if variable.name.endswith(unsigned):
                assert ops.convert_to_numpy(variable).min() >= 0, (optimizer_name, variable.name)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LowBit("adam", "nf8"), r"Expected state_format in \['dynamic4', 'dynamic8', 'float8'\]"),
        (lambda: LowBit("adam", block_size=48), "power of two"),
        (lambda: LowBit("adam", block_size=True), "power of two"),
        (lambda: LowBit("adam", min_size=-1), "min_size"),
        (lambda: LowBit(LowBit("adam")), "not wrapped"),
        (lambda: LowBit(kp.optimizers.LowPrecision("adam")), "not wrapped"),
        (lambda: LowBit("adam").register("kernel", "int3"), "state_format"),
        (lambda: LowBit("sgd").build([keras.Variable(np.zeros(4, "float32"))]), "SGD, which has none"),
        (lambda: LowBit("adam").build([keras.Variable([1], dtype="int32", name="counts")]), "'counts' of dtype int32"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_that_is_built_is_refused():
    built = keras.optimizers.Adam()
    built.build([keras.Variable(np.zeros(4, "float32"))])
    with pytest.raises(ValueError, match="not built yet"):
        LowBit(built)


SHARDED = """
import jax
import keras
import numpy as np

import keras_precision as kp

assert len(jax.devices()) == 4
x = np.random.default_rng(0).standard_normal((64, 64)).astype("float32")
results = []
devices = keras.distribution.DeviceMesh((4,), ["model"])
layouts = keras.distribution.LayoutMap(devices)
layouts[".*kernel"] = ("model", None)
parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="model")
for distribution in (None, keras.distribution.DataParallel(), parallel):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    model.compile(kp.optimizers.Adam8bit(0.01), "mse")
    model.fit(x, np.tile(x, (1, 4)), batch_size=16, epochs=3, verbose=0, shuffle=False)
    codes = model.optimizer.packed_slots[0].parts["codes"].value
    scale = model.optimizer.packed_slots[0].parts["scale"].value
    assert codes.shape == (64, 256) and scale.shape == (64, 1)
    if distribution is parallel:  # sharded as their weight
        assert tuple(codes.sharding.spec)[:1] == ("model",), codes.sharding
        assert tuple(scale.sharding.spec)[:1] == ("model",), scale.sharding
    results.append(np.asarray(model.layers[0].kernel.value))
for other in results[1:]:
    np.testing.assert_allclose(other, results[0], atol=2e-3)  # sums in another order move states over midpoints
"""

MIRRORED = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras

import keras_precision as kp

gradients = np.random.default_rng(0).standard_normal((10, 2, 64, 64)).astype("float32")


def train(strategy):
    with strategy.scope():
        weight = keras.Variable(np.ones((64, 64), "float32"))
        optimizer = kp.optimizers.AdamW8bit(0.01)
        optimizer.build([weight])

    @tf.function
    def step(gradient):
        def replica_step(gradient):
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            parts = gradient[here : here + 1] if strategy.num_replicas_in_sync == 2 else gradient
            optimizer.apply([tf.reduce_sum(parts, 0)], [weight])

        strategy.run(replica_step, args=(gradient,))

    for gradient in gradients:
        step(tf.constant(gradient))
    parts = [part for slot in optimizer.packed_slots for part in slot.parts.values()]
    return [[local.numpy() for local in strategy.experimental_local_results(v.value)] for v in (weight, *parts)]


one = train(tf.distribute.OneDeviceStrategy("CPU:0"))  # with a strategy, as without one XLA would round otherwise
two = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
assert len(one) == 5
for single, both in zip(one, two, strict=True):
    np.testing.assert_array_equal(both[0], both[1])  # the same bits on each replica
    np.testing.assert_array_equal(both[0], single[0])  # a sum of two gradients is exact in any order
assert np.abs(one[0][0] - 1).max() > 0.02
"""


def test_several_devices_agree(backend):
    script, devices = (SHARDED, 4) if backend == "jax" else (MIRRORED, 1)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
