"""Tests of keras_precision.policies.names."""

import itertools

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_precision.formats import FORMATS
from keras_precision.policies import names
from keras_precision.policies.names import DTypes, parse, split_quantized

FLOATS = ("float16", "bfloat16", "float32", "float64")

# Spelled out by hand, from each library's documentation: (library's name, variable, compute).
LIGHTNING = [
    ("16-mixed", "float32", "float16"),
    ("bf16-mixed", "float32", "bfloat16"),
    ("16-true", "float16", "float16"),
    ("bf16-true", "bfloat16", "bfloat16"),
    ("32-true", "float32", "float32"),
    ("64-true", "float64", "float64"),
    ("16", "float32", "float16"),
    ("32", "float32", "float32"),
    ("64", "float64", "float64"),
    ("bf16", "float32", "bfloat16"),
]
JMP_BARE = [("f16", "float16"), ("f32", "float32"), ("f64", "float64"), ("full", "float32")]
APEX = [
    ("O0", "float32", "float32"),
    ("O1", "float32", "float16"),
    ("O2", "float32", "float16"),
    ("O3", "float16", "float16"),
]
KERAS = [
    ("mixed_float16", "float32", "float16"),
    ("mixed_bfloat16", "float32", "bfloat16"),
    *((name, name, name) for name in FLOATS),
    ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e5m2", "float8_e5m2", "float8_e5m2"),
    ("int32", "int32", "int32"),
    ("uint8", "uint8", "uint8"),
    ("bool", "bool", "bool"),
    ("string", "string", "string"),
]

SPELLINGS = {
    "float16": ("float16", "f16"),
    "bfloat16": ("bfloat16", "bf16"),
    "float32": ("float32", "f32", "full"),
    "float64": ("float64", "f64"),
}
FIELD_SPELLINGS = {"variable": ("params", "p"), "compute": ("compute", "c"), "output": ("output", "o")}

every_dtypes = st.builds(DTypes, *[st.sampled_from(FLOATS)] * 3)
spaces = st.sampled_from(["", " ", "  "])


@pytest.mark.parametrize("name, variable, compute", [*KERAS, *LIGHTNING, *APEX])
def test_names_with_two_dtypes(name, variable, compute):
    assert parse(name) == DTypes(variable, compute, compute)


@pytest.mark.parametrize("name, dtype", JMP_BARE)
def test_bare_jmp_dtype_is_all_three(name, dtype):
    assert parse(name) == DTypes(dtype, dtype, dtype)


def test_every_alias_is_tested():
    tested = {name for name, *_ in [*LIGHTNING, *JMP_BARE, *APEX]}
    assert tested == set(names.ALIASES)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16", "float32"])
def test_float_follows_floatx(floatx):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        assert parse("float") == DTypes(floatx, floatx, floatx)
    finally:
        keras.config.set_floatx(before)


@pytest.mark.parametrize("device_class, dtype", [("tpu", "bfloat16"), ("gpu-8.0", "float16"), ("cpu", "float16")])
def test_half_is_bfloat16_on_a_tpu_only(monkeypatch, device_class, dtype):
    monkeypatch.setattr(names.hardware, "device_class", lambda: device_class)
    names._parse.cache_clear()
    try:
        assert parse("half") == DTypes(dtype, dtype, dtype)
        assert parse("p=full,c=half") == DTypes("float32", dtype, dtype)
    finally:
        names._parse.cache_clear()


def test_auto_is_the_best_policy_of_the_device():
    assert parse("auto") == parse(names.hardware.best_policy())


@given(dtypes=every_dtypes)
@settings(deadline=None)
def test_name_of_dtypes_parses_to_them(dtypes):
    assert parse(dtypes.name) == dtypes
    assert parse(dtypes.name).name == dtypes.name


def test_each_combination_has_a_name_of_its_own():
    combinations = [DTypes(*dtypes) for dtypes in itertools.product(FLOATS, repeat=3)]
    assert len({dtypes.name for dtypes in combinations}) == len(combinations) == 64


def test_canonical_name_is_keras_own_where_keras_has_one():
    keras_names = {
        dtypes.name for dtypes in map(DTypes._make, itertools.product(FLOATS, repeat=3)) if "=" not in dtypes.name
    }
    assert keras_names == {*FLOATS, "mixed_float16", "mixed_bfloat16"}
    assert DTypes("bfloat16", "float32", "float16").name == "params=bfloat16,compute=float32,output=float16"


@st.composite
def jmp_names(draw):
    """A name in jmp's grammar, and the dtypes that it gives to its fields."""
    fields = draw(st.permutations(["variable", "compute", "output"]))[: draw(st.integers(1, 3))]
    given_dtypes = {field: draw(st.sampled_from(FLOATS)) for field in fields}
    parts = []
    for field, dtype in given_dtypes.items():
        key, value = draw(st.sampled_from(FIELD_SPELLINGS[field])), draw(st.sampled_from(SPELLINGS[dtype]))
        parts.append("".join([draw(spaces), key, draw(spaces), "=", draw(spaces), value, draw(spaces)]))
    return ",".join(parts), given_dtypes


@given(name_and_fields=jmp_names())
@settings(deadline=None)
def test_jmp_names(name_and_fields):
    name, fields = name_and_fields
    found = parse(name)
    # jmp.get_policy: params default to float32, compute to params, output to compute.
    assert found.variable == fields.get("variable", "float32")
    assert found.compute == fields.get("compute", found.variable)
    assert found.output == fields.get("output", found.compute)


@pytest.mark.parametrize(
    "name, received",
    [
        ("p=f32,params=f16", "params=f16"),
        ("compute=f16,compute=f16", "compute=f16"),
        ("p=f32,c=f16,o=f32,o=f32", "o=f32"),
        ("params=float32,", ""),
        ("p=f32,,c=f16", ""),
        ("width=float32", "width=float32"),
        ("P=f32", "P=f32"),
        ("=f32", "=f32"),
        ("p=", "p="),
        ("p==f32", "p==f32"),
        ("p=f33", "p=f33"),
        ("p=int8", "p=int8"),
        ("p=mixed_float16", "p=mixed_float16"),
        ("c=auto", "c=auto"),
    ],
)
def test_malformed_jmp_names_say_which_field(name, received):
    with pytest.raises(ValueError) as raised:
        parse(name)
    assert f"Cannot convert '{name}' to a DTypePolicy. Expected " in str(raised.value)
    assert str(raised.value).endswith(f"Received: '{received}'")


@pytest.mark.parametrize(
    "name", ["", " ", "floatx", "o1", "Float32", "float32 ", "mixed_float32", "bf16_mixed", "8-true"]
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"^Cannot convert '{name}' to a DTypePolicy$"):
        parse(name)


mode_texts = st.builds(
    lambda fmt, block: fmt if block is None else f"{fmt}/{block}",
    st.sampled_from(sorted(FORMATS)),
    st.none() | st.integers(-10, 5000),
)


@given(
    mode=mode_texts, source=st.sampled_from([*FLOATS, *names.ALIASES, *names.MIXED, "p=f32,c=bf16,o=f32", "x_from_y"])
)
def test_quantized_names_split_at_the_first_from(mode, source):
    assert split_quantized(f"{mode}_from_{source}") == (mode, source)
    assert split_quantized(mode) == (mode, None)


@pytest.mark.parametrize(
    "name",
    ["", "float32", "_from_float32", "nf5_from_float32", "NF4", "nf", "nf4_fromfloat32", "gptq/4/128_from_float32"],
)
def test_other_names_do_not_split(name):
    assert split_quantized(name) is None


def test_an_empty_source_is_no_missing_source():
    mode = next(iter(FORMATS))
    assert split_quantized(f"{mode}_from_") == (mode, "")
