"""Tests of keras_precision.policies.scope (D21)."""

import asyncio
import contextlib
import itertools
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import keras_precision
from keras_precision import DTypePolicyMap, get, global_policy, policy_scope, set_global_policy
from keras_precision.policies import scope

FOREIGN = "params=float32,compute=bfloat16,output=float32"
OTHER_THREAD_SECONDS = 60  # a limit for a test that hangs, and no timing


def name():
    """The global policy's name, by every way to ask for it."""
    asked = [
        global_policy(),
        keras.config.dtype_policy(),
        keras_precision.dtype_policy(),
        keras.dtype_policies.get(None),
        get(None),
    ]
    layer = keras.layers.ReLU()
    assert all(policy == asked[0] and asked[0] == policy for policy in asked)
    assert layer.dtype_policy == asked[0]
    (found,) = {policy.name for policy in [*asked, layer.dtype_policy]}
    return found


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(OTHER_THREAD_SECONDS)


@pytest.fixture(autouse=True)
def start_from_float32():
    set_global_policy("float32")


@pytest.fixture
def never_set(monkeypatch):
    """The state of a process in which nobody has set a policy."""
    monkeypatch.setattr(scope, "_process_policy", None)
    keras.utils.clear_session(free_memory=False)
    yield
    keras.utils.clear_session(free_memory=False)


# One policy for the process.


SETTERS = [set_global_policy, keras_precision.set_dtype_policy, keras.config.set_dtype_policy]


@pytest.mark.parametrize(
    "policy",
    ["mixed_bfloat16", "bf16-true", FOREIGN, "nf4_from_mixed_bfloat16", 16, keras.DTypePolicy("float16")],
    ids=repr,
)
@pytest.mark.parametrize("set_policy", SETTERS, ids=lambda function: function.__module__)
def test_set_is_seen_by_keras_and_by_us(set_policy, policy):
    set_policy(policy)
    assert name() == get(policy).name


def test_keras_names_are_the_same_functions():
    assert keras_precision.dtype_policy is global_policy
    assert keras_precision.set_dtype_policy is set_global_policy


@pytest.mark.parametrize("set_policy", SETTERS, ids=lambda function: function.__module__)
def test_set_is_seen_by_new_threads(set_policy):
    set_policy("mixed_bfloat16")
    assert in_another_thread(name) == "mixed_bfloat16"


@pytest.mark.parametrize("set_policy", SETTERS, ids=lambda function: function.__module__)
def test_set_in_a_thread_is_seen_by_all(set_policy):
    in_another_thread(set_policy, "mixed_bfloat16")
    assert name() == "mixed_bfloat16"
    assert in_another_thread(name) == "mixed_bfloat16"


def test_set_is_seen_by_threads_that_already_run():
    with ThreadPoolExecutor(1) as running:
        assert running.submit(name).result(OTHER_THREAD_SECONDS) == "float32"
        set_global_policy("mixed_bfloat16")
        assert running.submit(name).result(OTHER_THREAD_SECONDS) == "mixed_bfloat16"
        running.submit(set_global_policy, "float16").result(OTHER_THREAD_SECONDS)
        assert name() == "float16"


def test_clear_session_keeps_it():
    set_global_policy("mixed_bfloat16")
    keras.utils.clear_session()
    assert name() == "mixed_bfloat16"
    assert in_another_thread(name) == "mixed_bfloat16"


def test_policy_that_nobody_set_is_floatx(never_set):
    before = keras.config.floatx()
    assert name() == in_another_thread(name) == before
    try:
        keras.config.set_floatx("bfloat16")
        keras.utils.clear_session(free_memory=False)
        assert name() == "bfloat16"
    finally:
        keras.config.set_floatx(before)


def test_scope_over_a_policy_that_nobody_set(never_set):
    with policy_scope("mixed_bfloat16"):
        keras.utils.clear_session(free_memory=False)
        assert name() == "mixed_bfloat16"
    assert name() == keras.config.floatx()
    assert scope.current() is None


def test_map():
    rules = DTypePolicyMap("float32", {"head": "mixed_bfloat16"})
    set_global_policy(rules)
    assert global_policy() == keras.config.dtype_policy() == rules
    assert keras.layers.Dense(2, name="head").compute_dtype == "bfloat16"
    assert in_another_thread(lambda: keras.layers.Dense(2, name="head").compute_dtype) == "bfloat16"


def test_what_keras_renames_is_a_copy():
    """Stock Keras's DTypePolicyMap.get_config writes into live policies, the global one included (D12)."""
    stock = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    keras.config.set_dtype_policy(stock)
    keras.config.dtype_policy()._name = None
    assert name() == stock.name == "int8_from_float32"


# Scopes.


def test_scope_ends_with_the_block():
    with policy_scope("mixed_bfloat16") as policy:
        assert policy == get("mixed_bfloat16")
        assert name() == "mixed_bfloat16"
    assert name() == "float32"


def test_scope_ends_when_the_block_raises():
    with pytest.raises(KeyError), policy_scope("mixed_bfloat16"), policy_scope("float16"):
        raise KeyError
    assert name() == "float32"


def test_scopes_nest():
    with policy_scope("mixed_bfloat16"):
        with policy_scope("float16"):
            with policy_scope("mixed_bfloat16"):
                assert name() == "mixed_bfloat16"
            assert name() == "float16"
        assert name() == "mixed_bfloat16"
    assert name() == "float32"


def test_the_scope_holds_when_it_is_entered_and_not_when_it_is_made():
    waiting = policy_scope("mixed_bfloat16")
    assert name() == "float32"
    set_global_policy("float16")
    with waiting:
        assert name() == "mixed_bfloat16"
    assert name() == "float16"


@pytest.mark.parametrize("set_policy", SETTERS, ids=lambda function: function.__module__)
def test_set_inside_a_scope_ends_with_it(set_policy):
    with policy_scope("mixed_bfloat16"):
        with policy_scope("float16"):
            set_policy("bfloat16")
            assert name() == "bfloat16"
            assert in_another_thread(name) == "float32"
        assert name() == "mixed_bfloat16"
    assert name() == "float32"


def test_scope_outlives_clear_session():
    with policy_scope("mixed_bfloat16"):
        keras.utils.clear_session()
        assert name() == "mixed_bfloat16"
    assert name() == "float32"


def test_layers_keep_the_policy_of_the_scope_they_were_made_in():
    with policy_scope(FOREIGN):
        layer = keras.layers.Dense(2)
    assert layer.dtype_policy == get(FOREIGN)
    assert layer.compute_dtype == "bfloat16"


def test_scope_is_seen_by_its_own_thread_only():
    entered, seen = threading.Barrier(2, timeout=OTHER_THREAD_SECONDS), queue.Queue()

    def run(policy):
        with policy_scope(policy):
            entered.wait()
            seen.put((policy, name()))
            entered.wait()
        seen.put((policy, name()))

    threads = [threading.Thread(target=run, args=(policy,)) for policy in ("mixed_bfloat16", "float16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(OTHER_THREAD_SECONDS)
    results = [seen.get_nowait() for _ in range(4)]
    assert sorted(results[:2]) == [("float16", "float16"), ("mixed_bfloat16", "mixed_bfloat16")]
    assert sorted(results[2:]) == [("float16", "float32"), ("mixed_bfloat16", "float32")]
    assert name() == "float32"


def test_set_in_another_thread_does_not_reach_into_a_scope():
    with policy_scope("mixed_bfloat16"):
        in_another_thread(set_global_policy, "float16")
        assert name() == "mixed_bfloat16"
    assert name() == "float16"


def test_many_threads_at_once():
    policies = ["float32", "mixed_bfloat16", "float16", "bfloat16", FOREIGN]

    def run(start):
        for policy in itertools.islice(itertools.cycle(policies), start, start + 20):
            with policy_scope(policy), policy_scope(policies[start]):
                if name() != policies[start]:
                    return False
            if name() != "float32":
                return False
        return True

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(run, range(5)))


def test_coroutines_have_scopes_of_their_own():
    async def run(policy, pause):
        with policy_scope(policy):
            for _ in range(3):
                await asyncio.sleep(0)
                assert name() == policy
            await pause.wait()
            assert name() == policy
        return name()

    async def both():
        pause = asyncio.Event()
        tasks = [asyncio.create_task(run(policy, pause)) for policy in ("mixed_bfloat16", "float16")]
        await asyncio.sleep(0)
        assert name() == "float32"
        pause.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == ["float32", "float32"]


def test_scope_inside_a_generator_ends_with_it():
    def layers():
        with policy_scope("mixed_bfloat16"):
            yield keras.layers.Dense(2)

    assert [layer.compute_dtype for layer in layers()] == ["bfloat16"]
    assert name() == "float32"


def test_one_scope_object_serves_again_and_nested():
    scope_object = policy_scope("mixed_bfloat16")
    for _ in range(2):
        with scope_object, policy_scope("float16"), scope_object:
            assert name() == "mixed_bfloat16"
        assert name() == "float32"


# Decorated functions.


def test_functions_whose_body_runs_later_are_refused():
    def generator():
        yield

    async def coroutine():
        return None

    async def asynchronous_generator():
        yield

    for function in (generator, coroutine, asynchronous_generator):
        with pytest.raises(TypeError, match=f"{function.__name__}.*Write `with policy_scope"):
            policy_scope("float16")(function)


def test_decorator():
    @policy_scope("mixed_bfloat16")
    def build(units, *, activation):
        """Builds."""
        assert name() == "mixed_bfloat16"
        return keras.layers.Dense(units, activation=activation)

    assert name() == "float32"
    for _ in range(2):
        assert build(2, activation="relu").compute_dtype == "bfloat16"
        assert name() == "float32"
    assert (build.__name__, build.__doc__) == ("build", "Builds.")


def test_decorated_functions_recurse():
    @policy_scope("mixed_bfloat16")
    def count_down(steps):
        assert name() == "mixed_bfloat16"
        with policy_scope("float16"):
            if steps:
                count_down(steps - 1)
            assert name() == "float16"
        assert name() == "mixed_bfloat16"

    count_down(3)
    assert name() == "float32"


def test_decorated_functions_run_in_many_threads():
    entered = threading.Barrier(3, timeout=OTHER_THREAD_SECONDS)

    @policy_scope("mixed_bfloat16")
    def run(_):
        entered.wait()
        return name()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == ["mixed_bfloat16"] * 3
    assert name() == "float32"


def test_decorated_function_that_raises():
    @policy_scope("mixed_bfloat16")
    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert name() == "float32"


# Bad input.

NO_POLICIES = [
    (None, "Expected a policy or its name.*Received: policy=None"),
    ("flaot32", "Did you mean 'float32'"),
    ("nf4/-1_from_float32", "Expected block_size in"),
    (8, "Cannot interpret"),
    (True, "Cannot interpret"),
    ([], "Cannot interpret"),
]


@pytest.mark.parametrize("wrong, message", NO_POLICIES)
@pytest.mark.parametrize("use", [policy_scope, set_global_policy])
def test_no_policy_raises_at_once(use, wrong, message):
    with pytest.raises(ValueError, match=message):
        use(wrong)
    assert name() == "float32"


# JAX without x64 has no float64, TensorFlow computes in no float8: (dtype, what the error says of it).
LACKING = {
    "jax": ("float64", r"jax_enable_x64 is off. Received: dtype='float64'.*enable_float64\(\)"),
    "tensorflow": (
        "float8_e5m2",
        r"that this device computes in. Received: dtype='float8_e5m2'.*Use bfloat16 or float32",
    ),
}


def policies_with(dtype):
    yield dtype
    yield keras.DTypePolicy(dtype)
    yield DTypePolicyMap(dtype)
    yield DTypePolicyMap("float32", {"head": dtype})
    if dtype == "float64":  # jmp's form and sources have no float8
        yield from ("p=f32,c=f64,o=f32", "p=f64,c=f32,o=f32", "p=f32,c=f32,o=f64", "nf4_from_float64")


@pytest.mark.parametrize("use", [policy_scope, set_global_policy])
def test_dtype_that_the_device_lacks_raises_at_once(backend, use):
    """Stock Keras on JAX claims float64 and computes float32 (D23)."""
    if backend not in LACKING:
        pytest.skip(f"no dtype that {backend} lacks on every device is known")
    dtype, message = LACKING[backend]
    for policy in policies_with(dtype):
        with pytest.raises(ValueError, match=message):
            use(policy)
        assert name() == "float32", policy


# All operations in any order, against a model of plain Python.

policies = st.sampled_from(
    [
        "float32",
        "mixed_bfloat16",
        "bf16-true",
        "O2",
        FOREIGN,
        16,
        "nf4_from_bfloat16",
        keras.DTypePolicy("float16"),
        get("bfloat16"),
        keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"),
        DTypePolicyMap("float32", {"head": "bfloat16"}),
    ]
)


class GlobalPolicyMachine(RuleBasedStateMachine):
    """Two threads, a stack of policies for each; the bottom of both is the process's policy."""

    @initialize()
    def start(self):
        set_global_policy("float32")
        self.process = get("float32")
        self.mine, self.others = [], []  # policies of the scopes, outermost first
        self.my_scopes, self.other_scopes = contextlib.ExitStack(), contextlib.ExitStack()
        self.pool = ThreadPoolExecutor(1)

    def in_other(self, function, *args):
        return self.pool.submit(function, *args).result(OTHER_THREAD_SECONDS)

    def write(self, stack, policy):
        if stack:
            stack[-1] = get(policy)
        else:
            self.process = get(policy)

    @rule(policy=policies, by_keras=st.booleans())
    def set(self, policy, by_keras):
        (keras.config.set_dtype_policy if by_keras else set_global_policy)(policy)
        self.write(self.mine, policy)

    @rule(policy=policies, by_keras=st.booleans())
    def set_in_other(self, policy, by_keras):
        self.in_other(keras.config.set_dtype_policy if by_keras else set_global_policy, policy)
        self.write(self.others, policy)

    @rule(policy=policies)
    def enter(self, policy):
        assert self.my_scopes.enter_context(policy_scope(policy)) == get(policy)
        self.mine.append(get(policy))

    @rule(policy=policies)
    def enter_in_other(self, policy):
        self.in_other(lambda: self.other_scopes.enter_context(policy_scope(policy)))
        self.others.append(get(policy))

    @precondition(lambda self: self.mine)
    @rule(raises=st.booleans())
    def leave(self, raises):
        self._leave(self.my_scopes, raises)
        self.mine.pop()

    @precondition(lambda self: self.others)
    @rule(raises=st.booleans())
    def leave_in_other(self, raises):
        self.in_other(self._leave, self.other_scopes, raises)
        self.others.pop()

    @staticmethod
    def _leave(stack, raises):
        leave = stack._exit_callbacks.pop()[1]
        leave(*((KeyError, KeyError(), None) if raises else (None, None, None)))

    @rule(policy=policies)
    def call_decorated(self, policy):
        @policy_scope(policy)
        def run():
            found = global_policy(), keras.config.dtype_policy()
            set_global_policy("float32")
            return found

        assert run() == (get(policy), get(policy))

    @rule(wrong=st.sampled_from([wrong for wrong, _ in NO_POLICIES]), use=st.sampled_from([policy_scope, *SETTERS]))
    def fail(self, wrong, use):
        with pytest.raises(ValueError):
            use(wrong)

    @rule()
    def clear_session(self):
        keras.utils.clear_session(free_memory=False)

    @invariant()
    def agree(self):
        def ask():
            return global_policy(), keras.config.dtype_policy(), keras.layers.ReLU(name="x").dtype_policy

        assert ask() == ((self.mine or [self.process])[-1],) * 3
        assert self.in_other(ask) == ((self.others or [self.process])[-1],) * 3

    def teardown(self):
        if hasattr(self, "pool"):
            self.my_scopes.close()
            self.in_other(self.other_scopes.close)
            self.pool.shutdown()


def test_all_operations_in_any_order():
    run_state_machine_as_test(
        GlobalPolicyMachine, settings=settings(deadline=None, max_examples=60, stateful_step_count=25)
    )
