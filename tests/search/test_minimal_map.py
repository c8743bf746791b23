"""Maps have few rules, and each layer's policy is the chosen one."""

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_precision as kp
from keras_precision import _bridge
from keras_precision.search.minimal_map import minimal_map
from keras_precision.search.trial import Trial, float_layers


def blocks():
    layers = keras.layers
    x = inputs = keras.Input((8, 16))
    for number in range(3):
        x = layers.MultiHeadAttention(2, 8, name=f"attention_{number}")(x, x)
        x = layers.Dense(16, name=f"mlp_in_{number}")(x)
        x = layers.LayerNormalization(name=f"norm_{number}")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="net")


@pytest.fixture(scope="module")
def trial():
    return Trial(blocks(), None)


def mapped(trial, given):
    """The map of policies that are given by index."""
    chosen = [given.get(i, base) for i, base in enumerate(trial.bases)]
    model = trial.model

    def accepts(index, policy):
        return trial.accepts(index, policy, chosen[index])

    found = minimal_map(float_layers(model), trial.paths, trial.classes(), chosen, accepts)
    trial.require_gives(found, chosen)
    return found


def with_sites(trial):
    return [i for i in trial.places() if trial.policy_for(i, "nf4") is not None]


def rules(policy_map):
    return {key: policy_map[key].name for key in policy_map}


@pytest.mark.parametrize(
    ("match", "default", "expected"),
    [
        (lambda path: True, "nf4_from_float32", {}),
        (lambda path: path != "head", "nf4_from_float32", {"head": "float32"}),
        (lambda path: path == "head", "float32", {"head": "nf4_from_float32"}),
        (lambda path: "query" in path, "float32", {"query": "nf4_from_float32"}),
        (lambda path: "mlp_in" in path, "float32", {"mlp_in*": "nf4_from_float32"}),
        (lambda path: "attention" in path, "nf4_from_float32", {"class:Dense": "float32"}),
        (lambda path: "attention_1" in path, "float32", {"attention_1/**": "nf4_from_float32"}),
    ],
    ids=["all", "all but one", "one", "a name", "a number", "a class", "a block"],
)
def test_rules_are_as_a_person_would_write_them(trial, match, default, expected):
    chosen = {i: kp.get("nf4_from_float32") for i in with_sites(trial) if match(trial.paths[i].removeprefix("net/"))}
    found = mapped(trial, chosen)
    assert (found.default_policy.name, rules(found)) == (default, expected)


NAMES = ("float32", "nf4_from_float32", "int8_from_float32", "bfloat16")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_choice_has_a_map(trial, data):
    places = with_sites(trial)
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=len(places), max_size=len(places)))
    found = mapped(trial, dict(zip(places, map(kp.get, names), strict=True)))  # which asserts what it gives
    assert len(found) <= len(places)
    assert kp.deserialize(kp.serialize(found)) == found


def test_names_with_marks_stand_for_themselves():
    layers = [keras.layers.Dense(4, name=name) for name in ("a[0]", "a0", "b*", "bc")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    trial = Trial(model, None)
    wanted = {i: kp.get("nf4_from_float32") for i in trial.places() if trial.paths[i].endswith(("a[0]", "b*"))}
    found = mapped(trial, wanted)
    given = {layer.name for layer in float_layers(model) if found.resolve(layer).quantization_mode}
    assert given == {"a[0]", "b*"}, _bridge.layer_path(layers[0])
