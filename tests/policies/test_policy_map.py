"""Tests of keras_precision.policies.policy_map, and of what a map does to layers (D11 to D15)."""

import copy
import json
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_precision
from keras_precision import DTypePolicyMap, get
from keras_precision.hardware import PrecisionWarning
from keras_precision.policies import registry

KerasMap = keras.dtype_policies.DTypePolicyMap


@keras.saving.register_keras_serializable(package="tests.policy_map")
class Pair(keras.layers.Layer):
    """A custom layer whose sublayers get names that count up through the process."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4)
        self.second = keras.layers.Dense(3)

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build(self.first.compute_output_shape(input_shape))

    def call(self, inputs):
        return self.second(self.first(inputs))


@keras.saving.register_keras_serializable(package="tests.policy_map")
class Net(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = keras.layers.Dense(4, name="body")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, inputs):
        return self.head(self.body(inputs))


@keras.saving.register_keras_serializable(package="tests.policy_map")
def has_three_units(layer):
    """A registered predicate."""
    return getattr(layer, "units", None) == 3


ROWS = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")


def as_array(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


# The rules as a mapping.

keys = st.sampled_from(
    [
        "a",
        "b",
        "a/b",
        "a/*",
        "**/b",
        ".*/c",
        "[ab]/c",
        "class:Dense",
        keras.layers.Dense,
        keras.layers.ReLU,
        has_three_units,
    ]
)
values = st.sampled_from(["float32", "bf16-true", "nf4", "int8_from_mixed_bfloat16", 16, keras.DTypePolicy("float16")])


def text_of(key):
    if key is has_three_units:
        return "predicate:tests.policy_map>has_three_units"
    return key if isinstance(key, str) else f"class:{key.__name__}"


def policy_of(value):
    return get("nf4_from_mixed_bfloat16") if value == "nf4" else get(value)


@given(steps=st.lists(st.tuples(st.sampled_from(["set", "set", "delete"]), keys, values), max_size=12))
@settings(deadline=None)
def test_map_behaves_as_an_ordered_dict_that_refuses_duplicates(steps):
    rules, expected = DTypePolicyMap("mixed_bfloat16"), {}
    for step, key, value in steps:
        text = text_of(key)
        if step == "delete" and text not in expected:
            with pytest.raises(KeyError):
                del rules[key]
        elif step == "delete":
            del rules[key], expected[text]
        elif text in expected:
            with pytest.raises(ValueError, match="already exist"):
                rules[key] = value
        else:
            rules[key] = value
            expected[text] = policy_of(value)
        assert (key in rules) is (text in expected)
    assert list(rules) == list(expected)
    assert len(rules) == len(expected)
    assert list(rules.items()) == list(expected.items())
    assert rules.unmatched() == list(expected)
    again = DTypePolicyMap.from_config(json.loads(json.dumps(rules.get_config())))
    assert again == rules and list(again) == list(rules)
    assert keras_precision.deserialize(keras_precision.serialize(rules)) == rules


@given(
    steps=st.lists(st.tuples(st.booleans(), keys, values), max_size=10),
    path=st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join),
)
@settings(deadline=None)
def test_a_changed_map_answers_as_a_new_one_of_the_same_rules(steps, path):
    changed = DTypePolicyMap("float32")
    for adds, key, value in steps:
        changed[path]  # what an answer leaves behind must not outlive a change
        if adds and key not in changed:
            changed[key] = value
        elif not adds and key in changed:
            del changed[key]
    assert changed[path] == DTypePolicyMap.from_config(changed.get_config())[path]


def test_map_is_a_keras_map_and_has_its_attributes():
    rules = DTypePolicyMap("p=f32,c=bf16,o=f32", {"a": "float16"})
    assert isinstance(rules, KerasMap)
    assert rules.name == "map_params=float32,compute=bfloat16,output=float32"
    assert (rules.variable_dtype, rules.compute_dtype, rules.output_dtype) == ("float32", "bfloat16", "float32")
    assert rules.quantization_mode is None
    assert rules.default_policy == get("p=f32,c=bf16,o=f32")
    assert repr(rules) == f"<DTypePolicyMap default_policy={rules.default_policy.name}, mapping=[('a', 'float16')]>"


def test_first_match_wins_after_an_exact_path():
    """Stock Keras raises where two patterns match (D15)."""
    rules = DTypePolicyMap("float32", {"encoder/**": "bfloat16", "encoder/.*": "float16", "encoder/norm": "float64"})
    assert rules["encoder/norm"].name == "float64"
    assert rules["encoder/dense"].name == "bfloat16"
    assert rules["decoder/dense"].name == "float32"
    assert (
        DTypePolicyMap("float32", {"encoder/.*": "float16", "encoder/**": "bfloat16"})["encoder/dense"].name
        == "float16"
    )


def test_rules_added_later_come_last():
    rules = DTypePolicyMap("float32")
    assert rules["a/b"].name == "float32"
    rules["a/*"] = "bfloat16"
    assert rules["a/b"].name == "bfloat16"
    rules["*/b"] = "float16"
    assert rules["a/b"].name == "bfloat16"
    del rules["a/*"]
    assert rules["a/b"].name == "float16"


def test_keys_of_all_kinds_decide_for_layers():
    rules = DTypePolicyMap(
        "float32",
        {"late": "float16", has_three_units: "bfloat16", keras.layers.Dense: "mixed_bfloat16", "act*": "float64"},
    )
    assert rules.resolve(keras.layers.Dense(3, name="late")).name == "float16"
    assert rules.resolve(keras.layers.Dense(3)).name == "bfloat16"
    assert rules.resolve(keras.layers.Dense(4)).name == "mixed_bfloat16"
    assert rules.unmatched() == ["act*"]
    assert rules.resolve(keras.layers.ReLU(name="other")).name == "float32"
    assert rules.unmatched() == ["act*"]
    assert rules.resolve(keras.layers.ReLU(name="act_1")).name == "float64"
    assert rules.unmatched() == []


def test_rule_for_takes_another_path_and_notes_nothing():
    rules = DTypePolicyMap("float32", {"net/head": "bfloat16"})
    layer = keras.layers.Dense(2, name="head")
    assert rules.rule_for(layer) is None
    assert rules.rule_for(layer, "net/head") == "net/head"
    assert rules.unmatched() == ["net/head"]


def test_class_and_predicate_keys_give_their_own_policy():
    rules = DTypePolicyMap("float32", {keras.layers.Dense: "bfloat16", has_three_units: "float16"})
    assert rules[keras.layers.Dense].name == rules["class:Dense"].name == "bfloat16"
    assert rules[has_three_units].name == "float16"
    assert all(isinstance(key, str) for key in rules)


@pytest.mark.parametrize("default", ["mixed_bfloat16", "nf4_from_mixed_bfloat16"])
@pytest.mark.parametrize("mode", ["nf4", "int8", "int4/128", "float8"])
def test_bare_format_takes_the_default_policy_as_its_source(mode, default):
    keras_precision.set_global_policy("float16")
    assert DTypePolicyMap(default, {"a": mode})["a"] == get(f"{mode}_from_mixed_bfloat16")


def test_default_none_is_the_global_policy():
    keras_precision.set_global_policy("mixed_bfloat16")
    assert DTypePolicyMap().default_policy == get("mixed_bfloat16")
    keras_precision.set_global_policy(DTypePolicyMap("float16", {"a": "float32"}))
    assert DTypePolicyMap().default_policy == get("float16")


def test_map_loaded_without_a_default_takes_the_global_policy_then():
    config = json.loads(json.dumps(DTypePolicyMap(None, {"a": "float16"}).get_config()))
    assert config["default_policy"] is None
    keras_precision.set_global_policy("bfloat16")
    again = DTypePolicyMap.from_config(config)
    assert (again.default_policy.name, again["a"].name) == ("bfloat16", "float16")


@pytest.mark.parametrize(
    "other",
    [
        DTypePolicyMap("float32", {"b": "float16", "a": "bfloat16"}),  # another order decides differently
        DTypePolicyMap("float16", {"a": "bfloat16", "b": "float16"}),
        DTypePolicyMap("float32", {"a": "bfloat16"}),
        DTypePolicyMap("float32", {"a": "bfloat16", "b": "float32"}),
        DTypePolicyMap("float32", {"a": "bfloat16", "c": "float16"}),
        KerasMap(keras.DTypePolicy("float32"), {"a": keras.DTypePolicy("bfloat16"), "b": keras.DTypePolicy("float16")}),
        get("float32"),
        keras.DTypePolicy("float32"),
        None,
        "float32",
        {"a": "bfloat16", "b": "float16"},
    ],
    ids=lambda other: type(other).__name__,  # Keras's map shows its address, which workers must agree on
)
def test_unequal_maps(other):
    """Stock Keras raises AttributeError here (D15)."""
    rules = DTypePolicyMap("float32", {"a": "bfloat16", "b": "float16"})
    assert rules != other
    assert not rules == other


def test_equal_maps():
    rules = DTypePolicyMap("float32", {"a": "bf16-true", keras.layers.Dense: "nf4"})
    assert rules == DTypePolicyMap(
        keras.DTypePolicy("float32"), {"a": keras.DTypePolicy("bfloat16"), "class:Dense": "nf4_from_float32"}
    )
    assert not rules != copy.copy(rules)
    assert rules == copy.deepcopy(rules)
    with pytest.raises(TypeError, match="unhashable"):
        hash(rules)


def test_predicates_are_part_of_the_value():
    first, second = (lambda layer: True), (lambda layer: True)
    assert DTypePolicyMap("float32", {first: "float16"}) == DTypePolicyMap("float32", {first: "float16"})
    assert DTypePolicyMap("float32", {first: "float16"}) != DTypePolicyMap("float32", {second: "float16"})


def test_copies_change_apart():
    rules = DTypePolicyMap("float32", {"a": "bfloat16"})
    twin = copy.copy(rules)
    assert twin["b"].name == rules["b"].name == "float32"
    twin["b"] = "float16"
    del twin["a"]
    rules[lambda layer: True] = "bfloat16"
    assert (rules["a"].name, rules["b"].name) == ("bfloat16", "float32")
    assert (twin["a"].name, twin["b"].name) == ("float32", "float16")
    assert twin.resolve(keras.layers.ReLU()).name == "float32"


# Bad input.


@pytest.mark.parametrize(
    "wrong", [[("a", "float32")], "float32", 3, get("float32"), KerasMap(keras.DTypePolicy("float32"))]
)
def test_rules_of_another_type(wrong):
    with pytest.raises(TypeError, match=r"`policy_map` must be a dict. Received: policy_map=.*of type "):
        DTypePolicyMap("float32", wrong)


@pytest.mark.parametrize("wrong", [None, 3, int, ("a",)])
def test_key_of_another_type(wrong):
    rules = DTypePolicyMap("float32")
    for use in (
        lambda: rules.__setitem__(wrong, "float32"),
        lambda: rules[wrong],
        lambda: wrong in rules,
        lambda: rules.__delitem__(wrong),
    ):
        with pytest.raises(TypeError, match="Expected a key that is a string"):
            use()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (None, "Expected a policy or its name. Received: None. Leave the rule out"),
        (True, "Received: True .of type bool"),
        (8, "Received: 8 .of type int"),
        ([], "Received: .. .of type list"),
        ("flaot32", "Did you mean 'float32'"),
        ("nf5_from_float32", "Did you mean 'nf4_from_float32'"),
        ("nf4/-64", "Expected block_size in .*Received: block_size=-64"),
        ("nf4/x_from_float32", "with an integer"),
        ("p=f32,p=f16", "at most once"),
        ({"name": "float32"}, "Expected the config of a dtype policy"),
    ],
)
def test_bad_values_name_the_key(wrong, message):
    rules = DTypePolicyMap("float32", {"a": "bfloat16"})
    before = copy.copy(rules)
    with pytest.raises(ValueError, match=f"(?s)Cannot interpret the assigned value of 'net/head'.*{message}"):
        rules["net/head"] = wrong
    with pytest.raises(ValueError, match="Cannot interpret the assigned value of 'predicate:.*has_three_units'"):
        rules[has_three_units] = wrong
    assert rules == before


def maps_of_all_kinds(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    rules = DTypePolicyMap("float32", {"a": "bfloat16"})
    keras_precision.register_policy("by-layer", rules)
    return [rules, KerasMap(keras.DTypePolicy("float32")), keras_precision.serialize(rules), "by-layer"]


def test_maps_do_not_nest(monkeypatch):
    for inner in maps_of_all_kinds(monkeypatch):
        with pytest.raises(ValueError, match=r"assigned value of 'b'.*a map cannot hold a map.*rules to this one"):
            DTypePolicyMap("float32", {"b": inner})
        with pytest.raises(ValueError, match="`default_policy` cannot be a `DTypePolicyMap`"):
            DTypePolicyMap(inner)
    itself = DTypePolicyMap("float32")
    with pytest.raises(ValueError, match="a map cannot hold a map"):
        itself["a"] = itself
    assert not itself


def test_malformed_key_leaves_the_map_as_it_was():
    rules = DTypePolicyMap("float32", {"a": "bfloat16"})
    with pytest.raises(ValueError, match=r"Expected a valid regex in the policy map's key 'b\('"):
        rules["b("] = "float16"
    with pytest.raises(ValueError, match="predicate that is not registered here"):
        rules["predicate:tests>gone"] = "float16"
    assert list(rules) == ["a"] and rules["b"].name == "float32"


def test_duplicate_keys_are_refused():
    rules = DTypePolicyMap("float32", {keras.layers.Dense: "bfloat16"})
    with pytest.raises(
        ValueError, match="class:Dense already exist in the DTypePolicyMap with value .*bfloat16.*Delete the rule"
    ):
        rules["class:Dense"] = "float16"
    assert rules[keras.layers.Dense].name == "bfloat16"


# Configs.


def test_predicates_must_be_registered_to_be_saved():
    def is_wide(layer):
        return True

    for predicate in (is_wide, lambda layer: True):
        rules = DTypePolicyMap("float32", {predicate: "bfloat16"})
        with pytest.raises(ValueError, match=r"predicate .*can't be saved.*register_keras_serializable"):
            rules.get_config()


def test_class_and_predicate_keys_survive_the_config():
    rules = DTypePolicyMap("float32", {has_three_units: "bfloat16", Pair: "float16", keras.layers.Dense: "nf4/128"})
    config = json.loads(json.dumps(rules.get_config()))
    assert list(config["policy_map"]) == [
        "predicate:tests.policy_map>has_three_units",
        "class:tests.policy_map>Pair",
        "class:Dense",
    ]
    again = DTypePolicyMap.from_config(config)
    assert again == rules
    for layer in (keras.layers.Dense(3), keras.layers.Dense(2), Pair(), keras.layers.ReLU()):
        assert again.resolve(layer) == rules.resolve(layer)


def test_predicates_may_come_from_custom_objects():
    def is_wide(layer):
        return getattr(layer, "units", 0) > 8

    config = {"default_policy": "float32", "policy_map": {"predicate:is_wide": "bfloat16"}}
    with pytest.raises(ValueError, match="predicate that is not registered here"):
        DTypePolicyMap.from_config(config)
    again = DTypePolicyMap.from_config(config, custom_objects={"is_wide": is_wide})
    assert again.resolve(keras.layers.Dense(9)).name == "bfloat16"


@pytest.mark.parametrize("default", [None, "mixed_bfloat16"])
@pytest.mark.parametrize("map_class", [DTypePolicyMap, KerasMap])
def test_get_config_changes_no_live_policy(map_class, default):
    """Stock Keras overwrites the names of live policies, the global one included (D12)."""
    default = keras.DTypePolicy(default) if default else None
    live = [
        keras.DTypePolicy("float16"),
        get("bfloat16"),
        keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"),
        get("nf4_from_float32"),
        keras.dtype_policies.get("gptq/4/128_from_float32"),
    ]
    keras.config.set_dtype_policy(live[0])
    in_force = keras.config.dtype_policy()
    rules = map_class(default, {f"layer_{index}": policy for index, policy in enumerate([*live, in_force])})
    watched = [*live, in_force, keras.config.dtype_policy(), *rules.values()]
    before = [dict(vars(policy)) for policy in watched]
    first, second = rules.get_config(), rules.get_config()
    assert [vars(policy) for policy in watched] == before
    assert str(first) == str(second)
    assert [rules[f"layer_{index}"].name for index in range(6)] == [*(policy.name for policy in live), "float16"]
    assert keras_precision.global_policy().name == keras.config.dtype_policy().name == "float16"


def test_from_config_changes_no_config():
    config = DTypePolicyMap("float32", {"a": "nf4", keras.layers.Dense: "float16"}).get_config()
    text = json.dumps(config)
    DTypePolicyMap.from_config(config)
    assert json.dumps(config) == text


# A map as the global policy.


def test_global_map_decides_for_layers():
    keras_precision.set_global_policy(
        DTypePolicyMap("float32", {"head": "mixed_bfloat16", keras.layers.ReLU: "float16"})
    )
    assert keras.layers.Dense(2, name="head").compute_dtype == "bfloat16"
    assert keras.layers.Dense(2, name="body").compute_dtype == "float32"
    assert keras.layers.ReLU().compute_dtype == "float16"


def test_rules_added_to_a_global_map_reach_later_layers_only():
    rules = DTypePolicyMap("float32", {"a": "float16"})
    keras_precision.set_global_policy(rules)
    early = keras.layers.Dense(2)
    rules[lambda layer: True] = "bfloat16"
    assert early.compute_dtype == "float32"
    assert keras.layers.Dense(2).compute_dtype == "bfloat16"


def test_global_map_knows_which_rules_its_layers_matched():
    rules = DTypePolicyMap("float32", {"head": "mixed_bfloat16", "tail": "float16"})
    with keras_precision.policy_scope(rules):
        layer = keras.layers.Dense(2, name="head")
    layer(ROWS)
    assert rules.unmatched() == ["tail"]


# D11: a map with an entry that Keras quantizes.


@pytest.mark.parametrize("map_class", [DTypePolicyMap, KerasMap])
@pytest.mark.parametrize("key", ["path", ".*/head"])
def test_keras_quantized_entry(tmp_path, map_class, key):
    key = "net/head" if key == "path" else key
    quantized = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    rules = map_class(keras.DTypePolicy("float32"), {key: quantized})
    body, head = keras.layers.Dense(4, name="body", dtype=rules), keras.layers.Dense(3, name="head", dtype=rules)
    model = keras.Sequential([body, head], name="net")
    model.build((None, 4))
    assert head.path == "net/head"
    assert (keras.backend.standardize_dtype(head._kernel.dtype), body.kernel.dtype) == ("int8", "float32")
    stateless, _ = head.stateless_call(head.trainable_variables, head.non_trainable_variables, ROWS)
    np.testing.assert_array_equal(as_array(stateless), as_array(head(ROWS)))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[-1].dtype_policy == quantized
    np.testing.assert_array_equal(as_array(again(ROWS)), as_array(model(ROWS)))


# D13: paths change; policies stay.


def test_override_survives_a_new_name_of_the_outer_model():
    rules = DTypePolicyMap("float32", {"outer/head": "mixed_bfloat16"})
    with keras_precision.policy_scope(rules):
        model = Net(name="outer")
    model(ROWS)
    assert (model.head.compute_dtype, model.body.compute_dtype) == ("bfloat16", "float32")
    config = keras.saving.serialize_keras_object(model)
    config["config"]["name"] = "renamed"
    again = keras.saving.deserialize_keras_object(config)
    again(ROWS)
    assert again.head.path != "outer/head"
    assert (again.head.compute_dtype, again.body.compute_dtype) == ("bfloat16", "float32")


def test_override_survives_new_names_of_sublayers(tmp_path):
    inputs = keras.Input((4,))
    pair = Pair(name="pair")
    model = keras.Model(inputs, pair(inputs), name="net")
    rules = DTypePolicyMap(
        "float32", {f"pair/{pair.first.name}": "bfloat16", f"pair/{pair.second.name}": "mixed_bfloat16"}
    )
    keras_precision.set_policy(model, rules)
    assert rules.unmatched() == []
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    loaded = again.get_layer("pair")
    assert loaded.first.path != pair.first.path
    for before, after in ((pair.first, loaded.first), (pair.second, loaded.second), (pair, loaded)):
        assert (after.compute_dtype, after.variable_dtype) == (before.compute_dtype, before.variable_dtype)
    assert (loaded.first.kernel.dtype, loaded.second.kernel.dtype) == ("bfloat16", "float32")
    np.testing.assert_array_equal(as_array(again(ROWS)), as_array(model(ROWS)))


def test_override_by_name_survives_wrapping():
    rules = DTypePolicyMap("float32", {"head": "mixed_bfloat16", "block/body": "bfloat16"})
    for depth, name in enumerate(("block", "outer", "outermost")):
        with keras_precision.policy_scope(rules):
            layers = [keras.layers.Dense(4, name="body"), keras.layers.Dense(4, name="head")]
        model = keras.Sequential(layers, name="block")
        for outer in ("outer", "outermost")[:depth]:
            model = keras.Sequential([model], name=outer)
        model.build((None, 4))
        assert layers[1].path == "/".join(["outermost", "outer", "block"][2 - depth :]) + "/head"
        assert [layer.compute_dtype for layer in layers] == ["bfloat16", "bfloat16"], name
        assert [layer.variable_dtype for layer in layers] == ["bfloat16", "float32"], name


def test_compile_reports_rules_that_matched_no_layer():
    rules = DTypePolicyMap("float32", {"head": "mixed_bfloat16", "haed": "float32", keras.layers.Embedding: "float32"})
    with keras_precision.policy_scope(rules):
        model = keras.Sequential([keras.Input((4,)), Pair(name="head")])
    with pytest.warns(
        PrecisionWarning, match=r"rules \['haed', 'class:Embedding'\] matched no layer.*explain\(model\)"
    ):
        model.compile("sgd", "mse")


def test_compile_is_silent_when_every_rule_matched():
    rules = DTypePolicyMap("float32", {"head": "mixed_bfloat16"})
    with keras_precision.policy_scope(rules):
        model = keras.Sequential([keras.Input((4,)), Pair(name="head")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile("sgd", "mse")


# D14: a map is resolved before the first call.


@pytest.mark.parametrize("map_class", [DTypePolicyMap, KerasMap])
@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: keras.layers.Dense(2, **kwargs),
        lambda **kwargs: keras.layers.Activation("relu", **kwargs),
        lambda **kwargs: keras.layers.Dropout(0.5, **kwargs),
        lambda **kwargs: keras.layers.Flatten(**kwargs),
        lambda **kwargs: keras.layers.LayerNormalization(**kwargs),
    ],
    ids=["Dense", "Activation", "Dropout", "Flatten", "LayerNormalization"],
)
def test_first_call_computes_in_the_rules_dtype(make, map_class):
    rules = map_class(keras.DTypePolicy("float32"), {"head": keras.DTypePolicy("mixed_bfloat16")})
    layer = make(dtype=rules, name="head")
    assert (layer.compute_dtype, layer.variable_dtype) == ("bfloat16", "float32")
    outputs = [keras.backend.standardize_dtype(layer(ROWS).dtype) for _ in range(2)]
    assert outputs == ["bfloat16", "bfloat16"]
    other = make(dtype=rules, name="other")
    assert other.compute_dtype == keras.backend.standardize_dtype(other(ROWS).dtype) == "float32"


def test_first_call_casts_to_the_rules_output_dtype():
    rules = DTypePolicyMap("float32", {"act": "p=f32,c=bf16,o=f32", "head": "p=bf16,c=f32,o=bf16"})
    for name, compute, output in (
        ("act", "bfloat16", "float32"),
        ("head", "float32", "bfloat16"),
        ("x", "float32", "float32"),
    ):
        for layer in (
            keras.layers.Activation("relu", dtype=rules, name=name),
            keras.layers.Dense(2, dtype=rules, name=name),
        ):
            assert layer.compute_dtype == compute
            assert keras.backend.standardize_dtype(layer(ROWS).dtype) == output


def test_sublayers_are_resolved_by_the_path_that_they_will_have():
    rules = DTypePolicyMap("float32", {"net/head": "bfloat16"})
    with keras_precision.policy_scope(rules):
        model = Net(name="net")
    model(ROWS)
    assert [(v.path, v.dtype) for v in model.head.variables] == [
        ("net/head/kernel", "bfloat16"),
        ("net/head/bias", "bfloat16"),
    ]
    assert {v.dtype for v in model.body.variables} == {"float32"}
