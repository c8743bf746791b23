"""Tests of keras_precision.policies.quantized."""

import copy
import pickle

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_precision
from keras_precision import QuantizedDTypePolicy, QuantizedFloat8DTypePolicy
from keras_precision.formats import BLOCK_SIZES, FORMATS
from keras_precision.policies.names import ALIASES, DTypes
from keras_precision.policies.quantized import quantized_policy

# Spelled out by hand from the design: bits, default block size, whether weights stay floats.
EXPECTED_FORMATS = {
    "int8": (8, None, False),
    "int8-weight-only": (8, None, False),
    "llm-int8": (8, None, False),
    "int4": (4, 64, False),
    "int4-dq": (4, 64, False),
    "nf4": (4, 64, False),
    "nf4-dq": (4, 64, False),
    "fp4": (4, 64, False),
    "fp4-dq": (4, 64, False),
    "float8": (8, None, True),
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
BLOCKED = [name for name, (_, block_size, _) in EXPECTED_FORMATS.items() if block_size]
UNBLOCKED = [name for name in EXPECTED_FORMATS if name not in BLOCKED]
THRESHOLDS = ("llm-int8",)
SCALINGS = ("tensor", "row", "delayed")

modes = (
    st.sampled_from(UNBLOCKED)
    | st.sampled_from(BLOCKED)
    | st.builds("{}/{}".format, st.sampled_from(BLOCKED), st.sampled_from(BLOCK_SIZES))
    | st.builds("{}/{:g}".format, st.sampled_from(THRESHOLDS), st.floats(0.01, 100))
    | st.builds("float8/{}".format, st.sampled_from(SCALINGS))
)
sources = st.builds(lambda *dtypes: DTypes(*dtypes).name, *[st.sampled_from(FLOATS)] * 3)


def test_formats_are_those_of_the_design():
    found = {name: (entry.bits, entry.block_size, entry.keeps_weights) for name, entry in FORMATS.items()}
    assert found == EXPECTED_FORMATS


@given(mode=modes, source=sources)
@settings(deadline=None)
def test_attributes_and_config_round_trip(mode, source):
    policy = quantized_policy(mode, source)
    fmt, _, option = mode.partition("/")
    float_policy = keras_precision.DTypePolicy(source)
    assert policy.name == f"{mode}_from_{source}"
    assert policy.quantization_mode == fmt
    assert policy.block_size == (int(option) if option and fmt in BLOCKED else EXPECTED_FORMATS[fmt][1])
    assert policy.format == (FORMATS[fmt].with_option(option) if option else FORMATS[fmt])
    assert policy.source_policy == float_policy
    for attribute in ("compute_dtype", "variable_dtype", "output_dtype"):
        assert getattr(policy, attribute) == getattr(float_policy, attribute)
    config = policy.get_config()
    again = type(policy).from_config(config)
    assert again == policy and hash(again) == hash(policy) and again.get_config() == config
    assert keras_precision.deserialize(keras_precision.serialize(policy)) == policy
    assert keras_precision.get(policy.name) == policy


@pytest.mark.parametrize("alias", ALIASES)
def test_source_may_be_an_alias(alias):
    assert QuantizedDTypePolicy("nf4", alias).name == f"nf4_from_{ALIASES[alias]}"


def test_classes_are_subclasses_of_keras_classes_of_the_same_names():
    assert issubclass(QuantizedDTypePolicy, keras.dtype_policies.QuantizedDTypePolicy)
    assert issubclass(QuantizedFloat8DTypePolicy, keras.dtype_policies.QuantizedFloat8DTypePolicy)
    assert issubclass(QuantizedDTypePolicy, keras_precision.DTypePolicy)
    assert issubclass(QuantizedFloat8DTypePolicy, QuantizedDTypePolicy)


@pytest.mark.parametrize("fmt", EXPECTED_FORMATS)
def test_each_format_gets_its_class(fmt):
    keeps_weights = EXPECTED_FORMATS[fmt][2]
    expected = QuantizedFloat8DTypePolicy if keeps_weights else QuantizedDTypePolicy
    assert type(quantized_policy(fmt, "float32")) is expected


def test_no_source_takes_the_global_policy():
    keras_precision.set_global_policy("mixed_bfloat16")
    assert QuantizedDTypePolicy("nf4").name == "nf4_from_mixed_bfloat16"
    assert QuantizedFloat8DTypePolicy("float8").name == "float8_from_mixed_bfloat16"


def test_no_source_takes_a_global_quantized_policys_source():
    keras_precision.set_global_policy("nf4_from_bfloat16")
    assert QuantizedDTypePolicy("int4").name == "int4_from_bfloat16"


def test_int8_takes_float16():
    """Stock Keras refuses int8 with float16 (D17)."""
    assert QuantizedDTypePolicy("int8", "mixed_float16").compute_dtype == "float16"


@given(first=st.tuples(modes, sources), second=st.tuples(modes, sources))
@settings(deadline=None)
def test_equality_and_hash_are_those_of_mode_and_source(first, second):
    one, two = quantized_policy(*first), quantized_policy(*second)
    assert (one == two) is (two == one) is (first == second)
    if first == second:
        assert hash(one) == hash(two)


def test_amax_history_length_is_part_of_the_value():
    short, long = (QuantizedFloat8DTypePolicy("float8/delayed", "float32", length) for length in (16, 1024))
    assert short != long and long != short
    assert long == QuantizedFloat8DTypePolicy("float8/delayed", "float32")
    assert short.amax_history_length == 16
    again = keras_precision.deserialize(keras_precision.serialize(short))
    assert again == short and again.amax_history_length == 16
    config = {"mode": "float8/delayed", "source_name": "float32", "amax_history_length": 16}
    assert short.get_config() == config | {"min_features": 2048, "strict": False}


def test_float8_options_are_part_of_the_value():
    plain = QuantizedFloat8DTypePolicy("float8", "float32")
    for options in ({"min_features": 16}, {"strict": True}):
        policy = QuantizedFloat8DTypePolicy("float8", "float32", **options)
        assert policy != plain and plain != policy
        assert keras_precision.deserialize(keras_precision.serialize(policy)) == policy
    assert plain.amax_history_length is None and plain.min_features == 2048 and not plain.strict


@pytest.mark.parametrize("mode", ["float8", "float8/row", "float8/tensor"])
def test_a_history_without_delayed_scaling(mode):
    with pytest.raises(ValueError, match=f"'{mode}' .*keeps no history.*=16. Pass 'float8/delayed'"):
        QuantizedFloat8DTypePolicy(mode, "float32", amax_history_length=16)


@pytest.mark.parametrize("text", ["", "x", "Row", "64"])
def test_unknown_scalings(text):
    with pytest.raises(ValueError, match="Expected 'float8/<scaling>' with a scaling of .'tensor', 'row', 'delayed'."):
        QuantizedDTypePolicy(f"float8/{text}", "float32")


def test_keras_policy_of_the_same_name_is_unequal():
    """It selects Keras's implementation, so it is not the same policy."""
    for name in ("int8_from_float32", "float8_from_float32", "int4_from_float32"):
        ours, stock = keras_precision.get(name), keras.dtype_policies.get(name)
        assert ours.name == stock.name
        assert ours != stock and stock != ours
        assert not ours == stock and not stock == ours
    assert QuantizedDTypePolicy("int8", "float32") != keras_precision.DTypePolicy("float32")


@pytest.mark.parametrize(
    "policy", [QuantizedDTypePolicy("nf4/128", "bf16"), QuantizedFloat8DTypePolicy("float8/delayed", "bf16", 8)], ids=repr
)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_equal(duplicate, policy):
    twin = duplicate(policy)
    assert twin == policy and hash(twin) == hash(policy) and twin.get_config() == policy.get_config()
    with pytest.raises(AttributeError, match="can't be changed"):
        twin._source_name = None  # what Keras's DTypePolicyMap.get_config does (D12)


@pytest.mark.parametrize("block_size", [-64, -1, 0, 1, 33, 48, 8192])
@pytest.mark.parametrize("fmt", BLOCKED)
def test_wrong_block_sizes(fmt, block_size):
    with pytest.raises(
        ValueError, match=rf"Expected block_size in \(32, .*Received: block_size={block_size} .*Pass '{fmt}/64'"
    ):
        QuantizedDTypePolicy(f"{fmt}/{block_size}", "float32")


@pytest.mark.parametrize("text", ["", "x", "64/2", "6.4", "064", "+64", " 64", "64 ", "6_4", "٦٤", "64\n"])
def test_block_size_that_is_no_plain_integer(text):
    with pytest.raises(ValueError, match=r"Expected 'nf4/<block_size>' with an integer. Received: 'nf4/"):
        QuantizedDTypePolicy(f"nf4/{text}", "float32")


@pytest.mark.parametrize("text, threshold", [("6", 6.0), ("4.5", 4.5), ("0.25", 0.25), ("10", 10.0)])
def test_threshold_of_large_activations(text, threshold):
    assert QuantizedDTypePolicy(f"llm-int8/{text}", "float32").format.threshold == threshold
    assert QuantizedDTypePolicy("llm-int8", "float32").format.threshold == 6


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "6.0", "06", "+6", "6e0", " 6", "6\n", "inf", "nan", "٦", "9" * 400]
)
def test_wrong_thresholds(text):
    with pytest.raises(ValueError, match="Expected 'llm-int8/<threshold>' with a number > 0 in its shortest form"):
        QuantizedDTypePolicy(f"llm-int8/{text}", "float32")


@pytest.mark.parametrize("fmt", sorted({*UNBLOCKED} - {*THRESHOLDS, "float8"}))
def test_formats_without_blocks_refuse_a_block_size(fmt):
    with pytest.raises(ValueError, match=f"'{fmt}' takes no block size. Received: '{fmt}/64'. Pass '{fmt}'"):
        quantized_policy(f"{fmt}/64", "float32")


@pytest.mark.parametrize(
    "wrong, nearest",
    [("nf5", "nf4"), ("NF4", "nf4"), ("int9", "int8"), ("nf4_dq", "nf4-dq"), ("int8-weight", "int8-weight-only")],
)
def test_unknown_mode_raises_with_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"Received: mode={wrong}. Did you mean '{nearest}'\?"):
        QuantizedDTypePolicy(wrong, "float32")


@pytest.mark.parametrize("wrong", [None, 8, b"nf4", keras.DTypePolicy("float32")])
@pytest.mark.parametrize("make", [QuantizedDTypePolicy, QuantizedFloat8DTypePolicy, quantized_policy])
def test_mode_of_another_type(make, wrong):
    with pytest.raises(TypeError, match=r"Expected `mode` to be a string, one of .*Received: mode="):
        make(wrong, "float32")


@pytest.mark.parametrize("wrong", [8, keras.DTypePolicy("float32")])
def test_source_of_another_type(wrong):
    with pytest.raises(TypeError, match="must be a string"):
        QuantizedDTypePolicy("nf4", wrong)


@pytest.mark.parametrize("source", ["int8", "uint8", "bool", "string", "complex64"])
def test_source_must_be_float(source):
    with pytest.raises(ValueError, match=rf"'{source}'.*float policy"):
        QuantizedDTypePolicy("nf4", source)


@pytest.mark.parametrize("source", ["", "flaot32", "nf4_from_float32", "p=int8"])
def test_unknown_source(source):
    with pytest.raises(ValueError, match=f"Cannot convert '{source}' to a DTypePolicy"):
        QuantizedDTypePolicy("nf4", source)


@pytest.mark.parametrize("wrong", [True, 1.0, "16"])
@pytest.mark.parametrize("name", ["amax_history_length", "min_features"])
def test_float8_options_of_another_type(name, wrong):
    with pytest.raises(TypeError, match=f"`{name}` must be an integer. Received: {name}="):
        QuantizedFloat8DTypePolicy("float8/delayed", "float32", **{name: wrong})


@pytest.mark.parametrize(
    "name, wrong, least", [("amax_history_length", 0, 1), ("amax_history_length", -1, 1), ("min_features", 15, 16)]
)
def test_float8_options_that_are_too_small(name, wrong, least):
    with pytest.raises(ValueError, match=f"Expected {name} >= {least}. Received: {name}={wrong}. Pass 1024"):
        QuantizedFloat8DTypePolicy("float8/delayed", "float32", **{name: wrong})


@pytest.mark.parametrize("fmt", [name for name, (*_, keeps_weights) in EXPECTED_FORMATS.items() if not keeps_weights])
def test_format_that_stores_weights(fmt):
    with pytest.raises(
        ValueError, match=rf"Expected a format that keeps weights, one of \['float8'\].*Received: mode={fmt}"
    ):
        QuantizedFloat8DTypePolicy(fmt, "float32")


def test_format_that_keeps_weights():
    with pytest.raises(ValueError, match="Received: mode=float8/row, which keeps them. Use QuantizedFloat8DTypePolicy"):
        QuantizedDTypePolicy("float8/row", "float32")


def test_lora_is_part_of_the_value():
    plain = QuantizedDTypePolicy("nf4", "float32")
    policy = plain.with_lora(8, 16)
    assert (policy.lora_rank, policy.lora_alpha, policy.name) == (8, 16, plain.name)
    assert policy != plain and policy == plain.with_lora(8, 16) != plain.with_lora(8)
    assert plain.with_lora(8).lora_alpha == 8 and policy.with_lora(None) == plain
    assert keras_precision.deserialize(keras_precision.serialize(policy)) == policy and "lora_rank" not in plain.get_config()
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match="lora_rank to be an integer"):
            plain.with_lora(rank)
