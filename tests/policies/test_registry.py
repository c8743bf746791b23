"""Tests of keras_precision.policies.registry."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_precision
from keras_precision import DTypePolicy, deserialize, get, list_policies, register_policy, serialize
from keras_precision.policies import registry

FOREIGN = "params=float32,compute=bfloat16,output=float32"


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """Undoes what a test registers."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.parametrize("name", list_policies())
def test_every_listed_name_gives_a_policy_of_ours(name):
    policy = get(name)
    assert isinstance(policy, (DTypePolicy, keras_precision.QuantizedDTypePolicy))
    assert get(policy.name) == policy
    assert get(policy) is policy
    assert deserialize(json.loads(json.dumps(serialize(policy)))) == policy


@pytest.mark.parametrize("name", [n for n in list_policies() if not n.startswith(("int8_", "int4_", "float8_"))])
def test_every_listed_name_that_keras_does_not_quantize_reaches_layers(name):
    policy = keras.layers.Dense(2, dtype=name).dtype_policy
    assert policy == get(name) and get(name) == policy


def test_list_is_sorted_and_complete():
    names = list_policies()
    assert names == sorted(set(names))
    expected = {"float32", "mixed_bfloat16", "bf16-true", "16", "f16", "full", "half", "auto", "O2"}
    expected |= {"nf4-dq_from_mixed_bfloat16", "int8-weight-only_from_float16", "float8_from_bfloat16"}
    assert expected <= set(names)


@pytest.mark.parametrize("precision, name", [(16, "mixed_float16"), (32, "float32"), (64, "float64")])
def test_lightnings_integers(precision, name):
    assert get(precision) == get(name)
    assert keras.dtype_policies.get(precision) == get(name)


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int8", "int32", "uint8", "bool"])
def test_numpy_dtypes(name):
    dtype = np.dtype(name)
    for spelling in (dtype, dtype.type):
        policy = get(spelling)
        assert type(policy) is DTypePolicy
        assert (policy.name, policy.compute_dtype, policy.quantization_mode) == (name, name, None)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_ml_dtypes(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    assert get(dtype) == get(dtype.type) == DTypePolicy(name)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("module", ["jax.numpy", "tensorflow"])
def test_backend_dtypes(module, name):
    namespace = pytest.importorskip(module)
    assert get(getattr(namespace, name)) == DTypePolicy(name)


def test_python_types():
    assert get(float) == get(keras.config.floatx())
    assert get(bool) == DTypePolicy("bool")


def test_int8_name_is_the_format_and_int8_policy_the_dtype():
    assert get("int8").quantization_mode == "int8"
    for plain in (keras.DTypePolicy("int8"), DTypePolicy("int8")):
        assert get(plain) == DTypePolicy("int8")
        assert get(plain).quantization_mode is None


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "int8"])
@pytest.mark.parametrize("stock_class", [keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy])
def test_keras_policies_become_ours(stock_class, name):
    stock = stock_class(name)
    policy = get(stock)
    assert type(policy) is DTypePolicy
    assert policy == stock and hash(policy) == hash(DTypePolicy(name))


@pytest.mark.parametrize(
    "name", ["int8_from_float32", "float8_from_float32", "int4/128_from_float32", "gptq/4/128_from_float32"]
)
def test_keras_quantized_policies_stay(name):
    stock = keras.dtype_policies.get(name)
    assert get(stock) is stock


@pytest.mark.parametrize("name", ["float8/row_from_mixed_bfloat16", "int8_from_mixed_float16"])
def test_quantized_names_that_keras_refuses_are_ours(name):
    assert type(keras.dtype_policies.get(name)).__module__.startswith("keras_precision")
    assert keras.dtype_policies.get(name) == get(name) == keras.layers.Dense(1, dtype=name).dtype_policy


def test_users_policies_stay():
    class Tagged(keras.DTypePolicy):
        """A policy with a meaning of its own."""

    tagged = Tagged("float32")
    assert get(tagged) is tagged


@pytest.mark.parametrize("name", ["gptq/4/128_from_float32", "awq/4/-1_from_float32"])
def test_formats_that_keras_alone_has(name):
    assert get(name) == keras.dtype_policies.get(name)
    assert type(get(name)).__module__.startswith("keras.")


def test_none_is_the_global_policy():
    for name in ("mixed_bfloat16", FOREIGN, "nf4_from_float32"):
        keras_precision.set_global_policy(name)
        assert get(None) == get() == get(name)


@pytest.mark.parametrize("name", ["nf4", "int8", "float8", "int4/128"])
def test_bare_format_follows_the_global_policy(name):
    for source in ("mixed_bfloat16", "float32"):
        keras_precision.set_global_policy(source)
        assert get(name) == get(f"{name}_from_{source}")


def test_float_follows_floatx():
    before = keras.config.floatx()
    try:
        for floatx in ("bfloat16", "float32"):
            keras.config.set_floatx(floatx)
            assert get("float").name == floatx
    finally:
        keras.config.set_floatx(before)


def test_same_name_gives_the_same_object():
    for name in ("bf16-true", "nf4_from_float32", FOREIGN):
        assert get(name) is get(name)


def test_dicts():
    assert get(serialize(get(FOREIGN))) == get(FOREIGN)
    assert get({"class_name": "DTypePolicy", "config": {"name": "bf16-true"}}) == get("bfloat16")
    assert get(keras.dtype_policies.serialize(keras.DTypePolicy("mixed_float16"))) == get("mixed_float16")


@pytest.mark.parametrize("name", ["float32", "mixed_bfloat16", "int8"])
@pytest.mark.parametrize("policy_class", [DTypePolicy, keras_precision.FloatDTypePolicy])
def test_float_policies_are_serialized_as_keras_own(policy_class, name):
    stock_class = getattr(keras.dtype_policies, policy_class.__name__)
    assert serialize(policy_class(name)) == keras.dtype_policies.serialize(stock_class(name))
    assert serialize(policy_class(name))["module"] == "keras"


def test_quantized_policies_are_serialized_as_ours():
    config = serialize(get("int8_from_float32"))
    assert config["registered_name"] == "keras_precision>QuantizedDTypePolicy"
    stock = keras.dtype_policies.get("int8_from_float32")
    assert serialize(stock)["module"] == "keras.dtype_policies"
    assert deserialize(serialize(stock)) == stock


def test_serialize_and_deserialize_change_nothing():
    policy = get("nf4/128_from_mixed_bfloat16")
    before, config = dict(vars(policy)), serialize(policy)
    text = json.dumps(config)
    deserialize(config)
    assert vars(policy) == before and json.dumps(config) == text


def test_deserialize_takes_custom_objects():
    class Tagged(keras.DTypePolicy):
        """A policy with a meaning of its own."""

    again = deserialize(serialize(Tagged("float32")), custom_objects={"Tagged": Tagged})
    assert again == Tagged("float32")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"name": "float32"}, [], "float32", None, keras.layers.serialize(keras.layers.ReLU()), 3],
    ids=lambda wrong: type(wrong).__name__,
)
def test_deserialize_of_no_policy(wrong):
    with pytest.raises(
        ValueError, match=r"(?s)Expected the config of a dtype policy. Received: .*Pass what `serialize` returned"
    ):
        deserialize(wrong)


@pytest.mark.parametrize(
    "wrong",
    [True, False, 8, 0, -16, 16.0, 1j, [], ("float32",), object(), b"float32", np.float32(3), keras.layers.ReLU],
)
def test_get_of_something_else(wrong):
    with pytest.raises(ValueError, match=r"(?s)Cannot interpret `dtype` argument.*Received: .*of type .*Pass a name"):
        get(wrong)


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("mixed_flaot16", "mixed_float16"),
        (" float32", "float32"),
        ("bf-16-mixed", "bf16-mixed"),
        ("int8-weightonly_from_float32", "int8-weight-only_from_float32"),
        ("float8-e4m3_from_float32", "float8_from_float32"),
        ("NF4_from_float32", "nf4_from_float32"),
        ("nf4_fron_float32", "nf4_from_float32"),
        ("team-defualt", "team-default"),
    ],
)
def test_unknown_name_raises_with_the_nearest(wrong, nearest):
    register_policy("team-default", "bfloat16")
    with pytest.raises(ValueError, match=rf"Cannot convert '{wrong}' to a DTypePolicy. Did you mean '{nearest}'\?"):
        get(wrong)


def test_layers_report_unknown_names_too():
    with pytest.raises(ValueError, match=r"Cannot convert 'bf17' to a DTypePolicy. Did you mean 'bf16'\?"):
        keras.layers.Dense(2, dtype="bf17")
    with pytest.raises(ValueError, match=r"Cannot convert 'bf17' to a DTypePolicy. Did you mean 'bf16'\?"):
        keras.config.set_dtype_policy("bf17")


@pytest.mark.parametrize(
    "policy", ["bf16-true", FOREIGN, "nf4/128_from_mixed_bfloat16", 16, keras.DTypePolicy("float16")], ids=repr
)
@pytest.mark.parametrize("name", ["team-default", "Team 1", "int8-team", "float8-recipe", "nf4-team"])
def test_registered_name_works_wherever_names_do(name, policy):
    assert register_policy(name, policy) == get(policy)
    assert get(name) == get(policy)
    assert name in list_policies()
    assert keras.layers.ReLU(dtype=name).dtype_policy == get(policy)
    assert keras_precision.DTypePolicyMap("float32", {"a": name})["a"] == get(policy)
    with keras_precision.policy_scope(name) as entered:
        assert entered == get(policy) == keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    assert keras_precision.global_policy() == get(policy)


def test_registered_map():
    rules = keras_precision.DTypePolicyMap("float32", {"head": "bfloat16"})
    register_policy("by-layer", rules)
    assert get("by-layer") == rules
    assert keras.layers.ReLU(dtype="by-layer", name="head").compute_dtype == "bfloat16"


def test_files_hold_the_policy_and_not_the_registered_name():
    register_policy("team-default", FOREIGN)
    config = keras.layers.serialize(keras.layers.Dense(2, dtype="team-default"))
    assert "team-default" not in json.dumps(config)
    registry._registered.clear()
    assert keras.layers.deserialize(config).dtype_policy == get(FOREIGN)


def test_registering_the_same_again_is_fine_and_another_is_not():
    register_policy("team-default", "bfloat16")
    register_policy("team-default", "bf16-true")
    with pytest.raises(ValueError, match=r"'team-default' already stands for .*bfloat16.*by another name"):
        register_policy("team-default", "float16")
    assert get("team-default") == get("bfloat16")


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "O1", "16", "bf16", "int32", "nf4", "int8", "nf4/128"])
def test_names_that_mean_something_can_not_be_taken(name):
    with pytest.raises(ValueError, match=f"'{name}' already stands for"):
        register_policy(name, FOREIGN)
    assert get(name) != get(FOREIGN)


@pytest.mark.parametrize("name", ["", " ", "a_from_b", "a=b", "a,b", "nf4_from_float32"])
def test_malformed_names_can_not_be_registered(name):
    with pytest.raises(ValueError, match=r"Expected a non-empty name without '_from_', '=' and ','. Received: name="):
        register_policy(name, "float32")


@pytest.mark.parametrize("name", [None, 16, b"team", keras.DTypePolicy("float32")])
def test_only_strings_can_be_registered(name):
    with pytest.raises(TypeError, match="Expected `name` to be a string. Received: name="):
        register_policy(name, "float32")


@pytest.mark.parametrize(
    "policy, message",
    [(None, "Expected a policy for name 'team'"), ("flaot32", "Did you mean 'float32'"), (3, "Cannot interpret")],
)
def test_only_policies_can_be_registered(policy, message):
    with pytest.raises(ValueError, match=message):
        register_policy("team", policy)
    assert "team" not in list_policies()


def test_layers_name_the_nearest_format_for_a_typo_behind_a_mode_of_keras():
    with pytest.raises(ValueError, match="int8-weight-only"):
        keras.layers.Dense(2, dtype="int8-weightonly_from_float32")
