"""Steps that decode, update and encode some rows of blocks at a time, against steps on whole tensors."""

import contextlib
import math
import re

import keras
import numpy as np
import pytest
from keras import ops
from row_runners import RUNNERS

from keras_precision.kernels import rows
from keras_precision.kernels.compiled import compiled
from keras_precision.optimizers import LowBit, row_step
from keras_precision.optimizers.states import STATE_FORMATS
from keras_precision.scaling import LossScaleOptimizer


SHAPE = (9, 8, 96)  # 27 rows of 256
pytestmark = pytest.mark.skipif(not RUNNERS, reason="runs on two backends")
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="runs on TensorFlow only")
BY_ROWS = {
    "SGD": lambda: keras.optimizers.SGD(0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 10), weight_decay=0.1),
    "Adamax": lambda: keras.optimizers.Adamax(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "Lion": lambda: keras.optimizers.Lion(0.003),
    # With less epsilon all first momenta have one magnitude: the last bit decides which one, and which sign, makes the scale.
    "RMSprop": lambda: keras.optimizers.RMSprop(0.005, centered=True, momentum=0.5, epsilon=0.01),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.3),
}
BY_LOOP = {("native", "Ftrl")}  # native code has no powers
# Norms, means over rows and columns, and matrix products; the last keeps weights among its states.
BY_TENSOR = {
    "Lamb": lambda: keras.optimizers.Lamb(0.01),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Muon": lambda: keras.optimizers.Muon(0.01),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
}


@pytest.fixture
def done(monkeypatch):
    """What each call of `row_step.update` returned."""
    found, update = [], row_step.update

    def watched(*arguments):
        found.append(update(*arguments))
        return found[-1]

    monkeypatch.setattr(row_step, "update", watched)
    return found


def has_rows(state_format):
    """Returns whether loops take a format: TensorFlow's take no codes of float8."""
    return keras.backend.backend() == "jax" or STATE_FORMATS[state_format].code_dtype == "uint8"


def compiled_apply(optimizer, weights, by_xla=True, **settings):
    """Returns what applies gradients, compiled by XLA or, on TensorFlow, as a graph."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        run = tf.function(lambda *gradients: optimizer.apply(list(gradients), weights, **settings), jit_compile=by_xla)
        return lambda *gradients: run(*map(tf.convert_to_tensor, gradients))
    import jax

    step = jax.jit(lambda w, s, g: optimizer.stateless_apply(s, g, w, **settings))

    def run(*gradients):
        found, state = step([w.value for w in weights], [v.value for v in optimizer.variables], gradients)
        for variable, value in zip((*weights, *optimizer.variables), (*found, *state), strict=True):
            variable.assign(value)

    return run


def steps(make, state_format="dynamic8", shape=SHAPE, count=3, dtype="float32", by_xla=True, **settings):
    """Returns the weight and the state after some compiled steps."""
    draw = np.random.default_rng(0)
    weight = keras.Variable(draw.standard_normal(shape).astype("float32"))
    optimizer = LowBit(make(), state_format, min_size=0, **settings)
    optimizer.build([weight])
    apply = compiled_apply(optimizer, [weight], by_xla)
    for _ in range(count):
        apply(ops.cast(draw.standard_normal(shape), dtype))
    return [ops.convert_to_numpy(x) for x in (weight, *optimizer.variables)]


def assert_agree(found, expected):
    """Codes may be the next ones where XLA rounds a product and a sum once."""
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.dtype == "uint8":
            assert np.mean(one != other) < 1e-3
        else:
            np.testing.assert_allclose(one.astype("float32"), other.astype("float32"), rtol=1e-5, atol=1e-6)


def each_way(monkeypatch, runners, *arguments, **settings):
    """Yields what `steps` returns on whole tensors, then with each runner on rows."""
    for table in ({}, *(rows._RUNNERS | {"cpu": RUNNERS[runner]} for runner in runners)):
        with monkeypatch.context() as patch:
            patch.setattr(rows, "_RUNNERS", table)
            yield steps(*arguments, **settings)


@pytest.mark.default_xla
@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_are_what_whole_tensors_are(name, monkeypatch, done):
    runners = [runner for runner in RUNNERS if (runner, name) not in BY_LOOP]
    expected, *by_rows = each_way(monkeypatch, runners, BY_ROWS[name])
    assert done == [False, *[True] * len(runners)]  # traced once each
    for found in by_rows:
        assert_agree(found, expected)


@pytest.mark.default_xla
@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_format_and_gradients_of_16_bits(state_format, dtype, monkeypatch, done):
    expected, *by_rows = each_way(monkeypatch, RUNNERS, BY_ROWS["AdamW"], state_format, dtype=dtype)
    assert done == [False, *[has_rows(state_format)] * len(RUNNERS)]
    for found in by_rows:
        assert_agree(found, expected)


@on_tensorflow
@pytest.mark.parametrize("name", BY_ROWS)
def test_a_graph_has_parts_that_xla_compiles(name, done):
    found, expected = (steps(BY_ROWS[name], by_xla=by_xla) for by_xla in (False, True))
    assert done == [True, True]
    assert_agree(found, expected)


@on_tensorflow
def test_fit_has_them(done):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256), keras.layers.Dense(2)])
    model.compile(LowBit("adam"), "mse")
    assert not model.jit_compile  # Keras's choice where there is no accelerator
    before = ops.convert_to_numpy(model.layers[0].kernel)
    model.fit(np.ones((8, 64)), np.ones((8, 2)), epochs=2, batch_size=4, verbose=0)
    assert True in done and not np.array_equal(ops.convert_to_numpy(model.layers[0].kernel), before)


@on_tensorflow
def test_weights_that_are_updated_alike_share_a_part():
    import tensorflow as tf

    draw = np.random.default_rng(0)
    shapes, names = [(16, 256)] * 3 + [(8, 256)], ["first", "second", "kept", "other"]
    values = [draw.standard_normal(shape).astype("float32") for shape in shapes]
    gradients = [tf.constant(draw.standard_normal(shape).astype("float32")) for shape in shapes]

    def trained(chosen):
        weights = [keras.Variable(values[i], name=names[i]) for i in chosen]
        optimizer = LowBit(keras.optimizers.AdamW(0.1, weight_decay=0.5), min_size=0)
        optimizer.exclude_from_weight_decay(var_names=["kept"])
        optimizer.build(weights)
        run = tf.function(lambda: optimizer.apply([gradients[i] for i in chosen], weights))
        for _ in range(2):
            run()
        called = [x for x in run.get_concrete_function().graph.get_operations() if "PartitionedCall" in x.type]
        return [x.get_attr("f").name for x in called], list(map(ops.convert_to_numpy, weights))

    functions, together = trained(range(4))
    first, second, kept, other = functions
    assert first == second and len({first, kept, other}) == 3
    for i, found in enumerate(together):  # none takes another's numbers
        np.testing.assert_array_equal(found, trained([i])[1][0])


@pytest.mark.parametrize("name", BY_TENSOR)
def test_what_mixes_elements_is_done_on_whole_tensors(name, monkeypatch, done):
    expected, found = each_way(monkeypatch, ["loop"], BY_TENSOR[name], shape=(32, 64))
    assert done == [False, False]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_blocks_that_lie_across_rows_are_done_on_whole_tensors(monkeypatch, done):
    expected, found = each_way(monkeypatch, ["loop"], BY_ROWS["Adam"], shape=(37, 129))
    assert done == [False, False]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_what_is_not_finite_stays_in_its_block_and_is_seen(state_format, wrong, runner, monkeypatch):
    monkeypatch.setitem(rows._RUNNERS, "cpu", RUNNERS[runner])
    gradient = np.random.default_rng(0).standard_normal((4, 512)).astype("float32")
    gradient[2, 100] = wrong
    weight, optimizer = keras.Variable(np.ones((4, 512), "float32")), LowBit("adam", state_format, min_size=0)
    optimizer.build([weight])
    compiled_apply(optimizer, [weight])(gradient)
    found = ops.convert_to_numpy(weight)
    assert (~np.isfinite(found)).sum() == 1 and not np.isfinite(found[2, 100])
    block = STATE_FORMATS[state_format].block_size
    for slot in optimizer.packed_slots:
        spoiled = ~np.isfinite(ops.convert_to_numpy(slot.value))
        assert spoiled[2, 100] and spoiled.sum() == block


@on_jax
@pytest.mark.default_xla
def test_a_step_holds_no_slot_in_float32():
    """Of what the compiled program allocates beside its arguments, less than 5% of the states."""
    import jax

    weight, optimizer = keras.Variable(np.zeros((8192, 4096), "float32")), LowBit(keras.optimizers.AdamW(0.01))
    optimizer.build([weight])
    state = [v.value for v in optimizer.variables]
    run = jax.jit(lambda w, s, g: optimizer.stateless_apply(s, [g], w), donate_argnums=(0, 1))
    memory = run.lower([weight.value], state, weight.value).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * sum(value.nbytes for value in state)


@on_tensorflow
@pytest.mark.parametrize(
    "state_format, shape, by_xla",
    [
        ("dynamic8", (256, 4096), True),
        ("dynamic8", (256, 4096), False),
        ("dynamic8", (3989, 256), True),
        ("dynamic4", (256, 4096), True),
    ],
)
@pytest.mark.parametrize("name", BY_ROWS)
def test_a_program_copies_no_array_that_it_updates(name, state_format, shape, by_xla, monkeypatch):
    """Whether XLA compiles the whole step or a part of it."""
    import tensorflow as tf

    most = rows._ELEMENTS_OF_A_LOOP
    assert math.prod(shape) > 3 * most
    weight, optimizer = keras.Variable(np.zeros(shape, "float32")), LowBit(BY_ROWS[name](), state_format)
    optimizer.build([weight])
    run, inputs = tf.function(lambda gradient: optimizer.apply([gradient], [weight]), jit_compile=by_xla), None
    if by_xla:
        inputs = [tf.zeros(weight.shape)]
    else:
        made, make = [], rows._compiled_part
        monkeypatch.setattr(rows, "_compiled_part", lambda *given: made.append(make(*given)) or made[-1])
        run.get_concrete_function(tf.zeros(weight.shape))
        (run,) = made
        (specification,) = (x.structured_input_signature[0] for x in run._list_all_concrete_functions())
        inputs = tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), specification)
        inputs[0][:] = [weight.value, *(part.value for slot in optimizer.packed_slots for part in slot.parts.values())]
    program = run.experimental_get_compiler_ir(*inputs)("optimized_hlo")
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", program)
    assert copied and all(math.prod(map(int, filter(None, lengths.split(",")))) <= most for lengths in copied)
    assert "dynamic-update-slice" in program


def test_excluded_weights_are_not_decayed(done):
    weights = [keras.Variable(np.ones((16, 256), "float32"), name=name) for name in ("decayed", "kept")]
    optimizer = LowBit(keras.optimizers.SGD(0.5, momentum=0.9, weight_decay=0.1), min_size=0)
    optimizer.exclude_from_weight_decay(var_names=["kept"])
    optimizer.build(weights)
    compiled_apply(optimizer, weights)(*[np.zeros((16, 256), "float32")] * 2)
    assert done == [True, True]
    np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), 0.95, rtol=1e-6)
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), 1)


def test_recording_a_step_leaves_everything_as_it_is():
    """Also where the step turns out not to be elementwise, after it has assigned to everything."""
    weight, other = keras.Variable(np.ones((2, 256), "float32")), keras.Variable(0.0)
    optimizer = LowBit("adam", min_size=0)
    optimizer.build([weight])

    def run(gradient):
        def step(gradient):
            optimizer.packed_slots[0].assign(gradient)
            weight.assign(gradient / ops.sum(gradient))
            other.assign(3.0)

        with keras.StatelessScope() if keras.backend.backend() == "jax" else contextlib.nullcontext():
            assert not row_step.update(step, gradient, optimizer.packed_slots)
            assert not any(slot._is_changed for slot in optimizer.packed_slots)
            return ops.copy(weight), ops.copy(other)

    found = compiled(run)(np.ones((2, 256), "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(found[0]), np.ones((2, 256)))
    assert found[1] == 0


class Noisy(keras.optimizers.SGD):
    """Adds noise to gradients, and so assigns to its generator's state in each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = keras.random.SeedGenerator(0)

    def update_step(self, gradient, variable, learning_rate):
        noise = keras.random.normal(gradient.shape, seed=self.generator)
        super().update_step(gradient + noise, variable, learning_rate)


def test_a_step_that_assigns_to_what_the_optimizer_does_not_list_is_run_once(done):
    weight = keras.Variable(np.ones((16, 256), "float32"))
    optimizer = LowBit(Noisy(0.1, momentum=0.9), min_size=0)
    optimizer.build([weight])
    state = optimizer.inner_optimizer.generator.state
    first = np.array([7, 0], "uint32")

    def run(gradient):
        if keras.backend.backend() == "tensorflow":
            state.assign(first)
            optimizer.apply([gradient], [weight])
            return ops.copy(weight), ops.copy(state)
        with keras.StatelessScope([(state, first)]) as scope:
            optimizer.apply([gradient], [weight])
            return scope.get_current_value(weight), scope.get_current_value(state)

    found, seed = map(ops.convert_to_numpy, compiled(run)(np.zeros((16, 256), "float32")))
    assert done == [False]
    noise = compiled(lambda like: keras.random.normal(like.shape, seed=7))(np.zeros((16, 256)))
    np.testing.assert_array_equal(seed, [7, 1])
    np.testing.assert_allclose(found, 1 - 0.1 * ops.convert_to_numpy(noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("constraint", [None, "non_neg"])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_an_overflow_leaves_everything_as_it_was(state_format, constraint, runner, monkeypatch, done):
    """Decided in the kernel on JAX; a constraint, applied after it, is undone by a select."""
    monkeypatch.setitem(rows._RUNNERS, "cpu", RUNNERS[runner])
    draw = np.random.default_rng(0)
    weight = keras.Variable(draw.standard_normal((16, 256)).astype("float32"))
    weight.constraint = keras.constraints.get(constraint)
    optimizer = LossScaleOptimizer(LowBit("adam", state_format, min_size=0), initial_scale=8.0)
    optimizer.build([weight])
    apply = compiled_apply(optimizer, [weight], unscaled=False)
    good, bad = (draw.standard_normal((16, 256)).astype("float32") for _ in range(2))
    bad[3, 7] = np.inf
    states = []
    for gradient in (good, bad, good):
        apply(gradient)
        states.append([np.array(ops.convert_to_numpy(x)) for x in (weight, *optimizer.inner_optimizer.variables)])
    assert done == [has_rows(state_format)]
    before, after, last = states
    for found, wanted in zip(after, before, strict=True):
        np.testing.assert_array_equal(found.reshape(-1).view("uint8"), wanted.reshape(-1).view("uint8"))
    assert not np.array_equal(last[0], before[0])
    assert (after[0] >= 0).all() == (constraint is not None)


@on_jax
def test_no_select_is_made_of_what_a_kernel_decided(monkeypatch):
    import jax

    monkeypatch.setitem(rows._RUNNERS, "cpu", RUNNERS["kernel"])
    weight = keras.Variable(np.ones((16, 256), "float32"))
    optimizer = LossScaleOptimizer(LowBit("adam", min_size=0))
    optimizer.build([weight])
    run = jax.make_jaxpr(lambda w, s, g: optimizer.stateless_apply(s, [g], w, unscaled=False))
    program = run([weight.value], [v.value for v in optimizer.variables], weight.value)
    shapes = [eqn.outvars[0].aval.shape for eqn in program.eqns if "where" in str(eqn.params.get("name", ""))]
    assert shapes.count(()) > 1 and len([shape for shape in shapes if shape]) == 1  # of the check itself


@on_jax
def test_stand_ins_of_16_bits_are_left_to_the_compiler(monkeypatch, done):
    """In a kernel they would be written in float32; a loop takes them."""
    import jax

    from keras_precision.optimizers import LowPrecision

    for runner, taken in ((rows._by_kernel, False), (rows._by_loop, True)):
        monkeypatch.setitem(rows._RUNNERS, "cpu", runner)
        weight = keras.Variable(np.ones((16, 256)), dtype="bfloat16")
        optimizer = LowPrecision(LowBit("adam", min_size=0))
        optimizer.build([weight])
        state = [v.value for v in optimizer.variables]
        found, _ = jax.jit(lambda w, s, g: optimizer.stateless_apply(s, [g], w))([weight.value], state, weight.value)
        assert done.pop() is taken
        assert found[0].dtype == "bfloat16" and (np.asarray(found[0], "float32") < 1).any()


@on_jax
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_kernels_lower_for_gpus_unless_an_overflow_may_undo_them(state_format, monkeypatch, done):
    import jax

    monkeypatch.setitem(rows._RUNNERS, "cpu", rows._by_kernel)
    for is_scaled in (False, True):
        weight = keras.Variable(np.ones((16, 256), "float32"))
        optimizer = LowBit("adam", state_format, min_size=0)
        settings = {}
        if is_scaled:
            optimizer, settings = LossScaleOptimizer(optimizer), {"unscaled": False}
        optimizer.build([weight])
        step = jax.jit(lambda w, s, g: optimizer.stateless_apply(s, [g], w, **settings))  # noqa: B023
        state = [v.value for v in optimizer.variables]
        program = step.trace([weight.value], state, weight.value).lower(lowering_platforms=("cuda",)).as_text()
        assert ("triton" in program) is not is_scaled
    assert done == [True, False]
