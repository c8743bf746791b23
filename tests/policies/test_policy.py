"""Tests of keras_precision.policies.policy."""

import copy
import json
import os
import pickle
import subprocess
import sys

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_precision
from keras_precision import DTypePolicy, FloatDTypePolicy
from keras_precision.policies.names import ALIASES, DTypes

FLOATS = ("float16", "bfloat16", "float32", "float64")
KERAS_NAMES = (*FLOATS, "mixed_float16", "mixed_bfloat16", "int8", "int32", "bool", "string")
FOREIGN = "params=float32,compute=bfloat16,output=float32"

KERAS_CLASSES = (keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy)
OUR_CLASSES = (DTypePolicy, FloatDTypePolicy)

every_name = st.builds(lambda *dtypes: DTypes(*dtypes).name, *[st.sampled_from(FLOATS)] * 3)


@pytest.mark.parametrize("name", [*KERAS_NAMES, FOREIGN])
@pytest.mark.parametrize("policy_class", OUR_CLASSES)
def test_attributes(policy_class, name):
    policy = policy_class(name)
    assert policy.name == name
    assert policy.quantization_mode is None
    if name == FOREIGN:
        assert (policy.variable_dtype, policy.compute_dtype, policy.output_dtype) == ("float32", "bfloat16", "float32")
        return
    stock = keras.DTypePolicy(name)
    assert (policy.variable_dtype, policy.compute_dtype) == (stock.variable_dtype, stock.compute_dtype)
    assert policy.output_dtype == stock.compute_dtype


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_gives_the_canonical_name(alias):
    assert DTypePolicy(alias).name == ALIASES[alias]


def test_classes_are_subclasses_of_keras_classes_of_the_same_names():
    assert issubclass(DTypePolicy, keras.DTypePolicy)
    assert issubclass(FloatDTypePolicy, keras.dtype_policies.FloatDTypePolicy)
    assert issubclass(FloatDTypePolicy, DTypePolicy)


def test_repr_is_keras_own():
    for policy_class in OUR_CLASSES:
        assert repr(policy_class("mixed_float16")) == repr(keras.DTypePolicy("mixed_float16"))


@pytest.mark.parametrize("global_policy", ["mixed_bfloat16", FOREIGN])
def test_no_name_takes_the_global_policy(global_policy):
    keras_precision.set_global_policy(global_policy)
    assert DTypePolicy().name == FloatDTypePolicy().name == global_policy


def test_no_name_takes_a_global_maps_default():
    keras_precision.set_global_policy(keras_precision.DTypePolicyMap("mixed_bfloat16", {"head": "float32"}))
    assert DTypePolicy().name == "mixed_bfloat16"


def test_no_name_takes_a_global_quantized_policys_source():
    keras_precision.set_global_policy("nf4_from_mixed_bfloat16")
    assert DTypePolicy().name == "mixed_bfloat16"
    keras.config.set_dtype_policy(keras.dtype_policies.get("int8_from_bfloat16"))
    assert DTypePolicy().name == "bfloat16"


@pytest.mark.parametrize("attribute", ["_name", "_compute_dtype", "_is_frozen", "name", "compute_dtype", "new"])
@pytest.mark.parametrize(
    "policy",
    [DTypePolicy("float32"), keras_precision.get("nf4_from_float32"), keras_precision.get("float8_from_float32")],
    ids=repr,
)
def test_policies_can_not_change(policy, attribute):
    before = dict(vars(policy))
    with pytest.raises(AttributeError, match=f"can't be changed. Received: {attribute}='x'"):
        setattr(policy, attribute, "x")
    with pytest.raises(AttributeError, match=f"can't be changed. Received: del of {attribute}"):
        delattr(policy, attribute)
    assert vars(policy) == before


@given(name=every_name, other=every_name)
@settings(deadline=None)
def test_equality_and_hash_are_those_of_the_name(name, other):
    for policy_class in OUR_CLASSES:
        for other_class in OUR_CLASSES:
            policy, second = policy_class(name), other_class(other)
            assert (policy == second) is (second == policy) is (name == other)
            assert (policy != second) is (name != other)
            if policy == second:
                assert hash(policy) == hash(second)


@pytest.mark.parametrize("name", KERAS_NAMES)
@pytest.mark.parametrize("stock_class", KERAS_CLASSES)
@pytest.mark.parametrize("policy_class", OUR_CLASSES)
def test_equal_to_keras_policies_from_both_sides(policy_class, stock_class, name):
    policy, stock, other = policy_class(name), stock_class(name), stock_class("float8_e5m2")
    assert policy == stock and stock == policy
    assert not policy != stock and not stock != policy
    assert policy != other and other != policy
    assert not policy == other and not other == policy


@pytest.mark.parametrize(
    "other",
    [
        None,
        "float32",
        32,
        keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"),
        keras_precision.get("nf4_from_float32"),
    ],
    ids=repr,
)
def test_unequal_to_everything_else(other):
    policy = DTypePolicy("float32")
    assert policy != other and other != policy
    assert not policy == other and not other == policy


def test_subclass_of_the_user_is_unequal():
    class Tagged(keras.DTypePolicy):
        """A policy with a meaning of its own."""

    assert DTypePolicy("float32") != Tagged("float32")
    assert Tagged("float32") != DTypePolicy("float32")


@pytest.mark.parametrize("name", ["mixed_float16", FOREIGN])
@pytest.mark.parametrize("policy_class", OUR_CLASSES)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_equal_and_frozen(duplicate, policy_class, name):
    policy = policy_class(name)
    twin = duplicate(policy)
    assert type(twin) is policy_class and twin == policy and hash(twin) == hash(policy)
    assert twin.output_dtype == policy.output_dtype
    with pytest.raises(AttributeError, match="can't be changed"):
        twin._name = "float16"


@given(name=every_name)
@settings(deadline=None)
def test_config_round_trip(name):
    policy = DTypePolicy(name)
    config = policy.get_config()
    assert config == {"name": name}
    again = DTypePolicy.from_config(config)
    assert again == policy and again.output_dtype == policy.output_dtype
    assert config == {"name": name}


def test_get_config_gives_a_new_dict():
    policy = DTypePolicy("mixed_float16")
    policy.get_config()["name"] = "float32"
    assert policy.get_config() == {"name": "mixed_float16"}


def test_stock_keras_reads_what_serialize_gives():
    """A process that never imports us must read the policies that Keras knows."""
    configs = [keras_precision.serialize(policy_class(name)) for name in KERAS_NAMES for policy_class in OUR_CLASSES]
    program = (
        "import json, sys, keras\n"
        "policies = [keras.dtype_policies.deserialize(c) for c in json.loads(sys.argv[1])]\n"
        "assert 'keras_precision' not in sys.modules\n"
        "print(json.dumps([[type(p).__module__, p.name, p.variable_dtype, p.compute_dtype] for p in policies]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(configs)],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    stock = [stock_class(name) for name in KERAS_NAMES for stock_class in KERAS_CLASSES]
    expected = [[keras.DTypePolicy.__module__, p.name, p.variable_dtype, p.compute_dtype] for p in stock]
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize(
    "wrong", [16, 1.5, True, b"float32", ["float32"], {"name": "float32"}, keras.DTypePolicy("float32")]
)
def test_name_of_another_type(wrong):
    with pytest.raises(TypeError, match=r"must be a string.*Received: name=.*keras_precision\.get"):
        DTypePolicy(wrong)


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("flaot32", "float32"),
        ("mixed_flaot16", "mixed_float16"),
        ("mixed_bf16", "mixed_bfloat16"),
        ("bf16-mix", "bf16-mixed"),
        ("16_true", "16-true"),
        ("fp5_from_float32", "fp4_from_float32"),
        ("autoo", "auto"),
    ],
)
def test_unknown_name_raises_with_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=f"^Cannot convert '{wrong}' to a DTypePolicy. Did you mean '{nearest}'\\?$"):
        DTypePolicy(wrong)


def test_name_like_no_other_points_to_the_list():
    with pytest.raises(ValueError, match=r"Cannot convert 'qqq' to a DTypePolicy.*list_policies\(\)"):
        DTypePolicy("qqq")


def test_quantized_name_points_to_get():
    with pytest.raises(
        ValueError, match=r"Cannot convert 'nf4_from_float32'.*float policy's name.*keras_precision\.get"
    ):
        DTypePolicy("nf4_from_float32")


def test_malformed_jmp_name_gets_an_example_instead_of_a_near_name():
    with pytest.raises(ValueError, match=r"Received: 'o=f31'\. Pass a name such as 'params=") as raised:
        DTypePolicy("p=f32,o=f31")
    assert "Did you mean" not in str(raised.value)
