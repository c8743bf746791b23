"""Searches find small policies, keep their bound on unseen data, and leave the model alone."""

import dataclasses
import importlib.util
import json
import random
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision.cli import digits
from keras_precision.layers.float8 import is_float8
from keras_precision.policies.resolve import attached
from keras_precision.search import measuring as measuring_module
from keras_precision.search import verification
from keras_precision.search.measuring import Measuring
from keras_precision.search.trial import Trial, float_layers

ROOT = Path(__file__).parent.parent.parent
CANDIDATES = ("nf4", "int8-weight-only")


@pytest.fixture(scope="module", autouse=True)
def short_walks():
    """Walks try 5 places, not 10: each compiles a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "STEPS", 5)
        yield


@pytest.fixture(scope="module")
def trained():
    """The digits network after 4 epochs, with images it has not seen: to search on, and others."""
    keras.utils.clear_session()  # or layers' names would go on from those of other tests
    keras.utils.set_random_seed(0)
    split = digits.load_digits_split(0)
    model = digits.build_digits_model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(split.train_images[300:], split.train_labels[300:], batch_size=32, epochs=4, verbose=0)
    searched = np.concatenate([split.test_images, split.train_images[:100]])
    labels = np.concatenate([split.test_labels, split.train_labels[:100]])
    return model, (searched, labels), (split.train_images[100:300], split.train_labels[100:300])


@pytest.fixture(scope="module")
def found(trained):
    model, data, _ = trained
    return kp.search_policy(model, *data, candidates=CANDIDATES, budget="5%")


@pytest.fixture
def small():
    """A model of three layers, the data and the targets that it fits exactly."""
    layers = [keras.layers.Dense(64, activation="relu", name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(4, name="head")], name="net")
    x = np.random.default_rng(0).normal(size=(80, 64)).astype("float32")
    y = model.predict(x, verbose=0) + np.random.default_rng(1).normal(size=(80, 4)).astype("float32")
    return model, x, y


def mean_loss(model, x, y):
    return float(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model.predict(x, verbose=0)))


def no_uniform_policy_is_better(result):
    """Whether every uniform policy of equal or better loss takes more bytes."""
    uniform = [point for point in result.verified if point.name != "search" and point is not result.chosen]
    return all(point.bytes > result.bytes_after for point in uniform if point.loss <= result.chosen.loss)


def test_digits_map_is_smaller_than_any_uniform_policy_of_equal_or_better_loss(found):
    assert {point.name for point in found.verified} == {"as it was", "search", *CANDIDATES}
    assert found.chosen.name == "search" and found.chosen.is_within
    assert no_uniform_policy_is_better(found)
    assert found.bytes_after < 0.26 * found.bytes_before  # int8 everywhere takes 0.258


def test_the_bound_holds_on_data_that_it_did_not_see(trained, found):
    model, _, unseen = trained
    before = mean_loss(model, *unseen)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    report = kp.quantize(copy, found.policy_map, verbose=0)
    assert report.bytes_after == found.bytes_after
    assert mean_loss(copy, *unseen) <= 1.05 * before


def test_map_survives_saving(trained, found, tmp_path):
    model, (x, _), _ = trained
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    found.apply(copy)
    copy.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), copy.predict(x, verbose=0))
    assert kp.deserialize(json.loads(json.dumps(kp.serialize(found.policy_map)))) == found.policy_map


def test_transformer_map_is_smaller_than_any_uniform_policy_of_equal_or_better_loss(monkeypatch):
    spec = importlib.util.spec_from_file_location("text_task", ROOT / "benchmarks" / "text_task.py")
    text_task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(text_task)
    for name, value in {"LENGTH": 16, "WIDTH": 64, "BLOCKS": 1}.items():
        monkeypatch.setattr(text_task, name, value)
    keras.utils.set_random_seed(0)
    text = text_task.standard_library(200_000)
    model = text_task.build_transformer()
    text_task.fit(model, text_task.make_optimizer(100, 3e-3), text.train, 100, seed=0)
    x, y = text_task.batches(text.validation, 8, seed=1)
    result = kp.search_policy(model, x, y, candidates=("nf4", "int8-weight-only"), budget="0.2%")
    assert result.chosen.name == "search" and result.chosen.is_within
    assert no_uniform_policy_is_better(result)
    assert len(result.policy_map) <= 5 < len(result.layers)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    assert kp.quantize(copy, result.policy_map, verbose=0).bytes_after == result.bytes_after


def test_the_model_and_random_states_stay_as_they_are(trained):
    model, data, _ = trained
    weights, optimizer = model.get_weights(), [np.array(v) for v in model.optimizer.variables]
    policies = [attached(layer) for layer in float_layers(model)]
    classes, functions = [type(layer) for layer in model.layers], (model.optimizer, model.loss, model.train_function)
    random.seed(3)
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    kp.search_policy(model, *data, candidates=("int8", "bfloat16"), budget="2%")
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert all(np.array_equal(a, v) for a, v in zip(optimizer, model.optimizer.variables, strict=True))
    assert policies == [attached(layer) for layer in float_layers(model)]
    assert classes == [type(layer) for layer in model.layers]
    assert functions == (model.optimizer, model.loss, model.train_function)
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state


def test_a_seed_makes_it_deterministic(small):
    model, x, y = small
    arguments = {"loss": "mse", "candidates": ("nf4",), "budget": "2%"}
    first, again, other = (kp.search_policy(model, x, y, seed=seed, **arguments) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert first.before.loss != other.before.loss


def test_formats_are_stood_for_by_their_decoded_weights(small):
    model, x, _ = small
    trial = Trial(model, x)
    for index in trial.places():
        policy = trial.policy_for(index, "nf4")
        stood_for, nbytes = trial.judge_alone(index, policy, lambda: trial.model.predict(x, verbose=0))
        trial.give({index: policy})
        # One float32 product of 64 terms, summed in another order: 64 * 2**-24 of numbers up to about 10.
        np.testing.assert_allclose(stood_for, trial.model.predict(x, verbose=0), atol=1e-4)
        assert nbytes == trial.bytes_of(index)
    trial.give({})
    np.testing.assert_array_equal(trial.model.predict(x, verbose=0), model.predict(x, verbose=0))


def test_wrong_sums_are_found_out(trained, monkeypatch):
    model, data, _ = trained
    measured = Measuring.alone

    def harmless(self, index, policy):
        found = measured(self, index, policy)
        return dataclasses.replace(found, loss=dataclasses.replace(found.loss, increase=0.0, increase_variance=0.0))

    monkeypatch.setattr(Measuring, "alone", harmless)
    result = kp.search_policy(model, *data, candidates=("nf4", "int8-weight-only"), budget=1e-3)
    assert [point.is_within for point in result.verified if point.name in ("nf4", "search")][0] is False
    assert result.chosen.is_within and result.chosen.loss_increase <= 1e-3


def test_least_loss_under_a_budget_of_bytes(trained):
    model, data, _ = trained
    result = kp.search_policy(model, *data, candidates=CANDIDATES, budget={"max_bytes": "20%"})
    assert result.minimize == "loss"
    assert result.bytes_after <= 0.2 * result.bytes_before
    fitting = [point for point in result.verified if point.bytes <= 0.2 * result.bytes_before]
    assert result.chosen.loss == min(point.loss for point in fitting)
    assert no_uniform_policy_is_better(result)


def test_a_bound_on_accuracy(trained):
    model, data, _ = trained
    result = kp.search_policy(model, *data, candidates=CANDIDATES, budget={"max_accuracy_drop": 0.05})
    assert result.before.accuracy - result.chosen.accuracy <= 0.05
    assert result.bytes_after < result.bytes_before / 2


def test_seconds_are_measured(small):
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("bfloat16",), budget=1.0, minimize="seconds")
    assert all(point.seconds > 0 for point in result.verified)
    assert all(row.seconds > 0 for row in result.sensitivities)
    assert result.chosen.seconds == min(point.seconds for point in result.verified if point.is_within)


def test_float8_is_searched_where_seconds_count(small, monkeypatch):
    monkeypatch.setattr(Trial, "seconds", lambda self, x: 9.0 - sum(map(is_float8, self.model.layers)))  # as if faster
    model, x, y = small
    arguments = {"loss": "mse", "budget": "5%", "minimize": "seconds"}
    result = kp.search_policy(model, x, y, candidates=("mixed_bfloat16", float8()), **arguments)
    assert (result.chosen.seconds, result.before.seconds) == (7.0, 9.0)
    assert {row.policy for row in result.sensitivities if "head" in row.path} == {"mixed_bfloat16"}  # 4 columns
    assert not any(is_float8(layer) for layer in model.layers)
    before = kp.summary(model).bytes
    result.apply(model)
    assert [is_float8(layer) for layer in model.layers] == [True, True, False]
    assert model.layers[0].dtype_policy == float8()  # its min_features too
    assert kp.summary(model).bytes == result.bytes_after == before


@pytest.mark.parametrize("mode", ["float8", "float8/delayed"])
def test_float8_layers_are_put_back(small, mode):
    model, x, _ = small
    trial = Trial(model, x)
    classes, nbytes = [type(layer) for layer in trial.model.layers], trial.bytes
    index = next(i for i in trial.places() if trial.policy_for(i, float8(mode)) is not None)
    trial.give({index: trial.policy_for(index, float8(mode))})
    assert sum(map(is_float8, trial.model.layers)) == 1
    assert (trial.bytes > nbytes) == (mode == "float8/delayed")  # which keeps amax histories
    assert not np.array_equal(trial.model.predict(x, verbose=0), model.predict(x, verbose=0))
    trial.give({index: trial.policy_for(index, "nf4")})
    trial.give({})
    assert [type(layer) for layer in trial.model.layers] == classes and trial.bytes == nbytes
    np.testing.assert_array_equal(trial.model.predict(x, verbose=0), model.predict(x, verbose=0))


def test_nothing_passes_a_bound_of_zero(small):
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("nf4",), budget=0)
    assert result.chosen is result.before and result.bytes_after == result.bytes_before
    assert "No cheaper choice" in str(result)
    result.apply(model)
    assert not any(layer.dtype_policy.quantization_mode for layer in model.layers)


@pytest.mark.parametrize("limit", [0, 1e-9])
def test_a_time_limit_returns_what_was_verified(small, limit):
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("nf4",), budget="50%", time_limit=limit)
    assert result.chosen is result.before
    assert "time limit" in result.stopped and "time limit" in str(result)


def test_a_time_limit_leaves_time_to_verify(small, monkeypatch):
    class Ticks(measuring_module.Clock):
        def is_over(self, share=1.0):
            self.ticks = getattr(self, "ticks", 0) + 1
            return share < 1 and self.ticks > 1  # one single choice is measured

    monkeypatch.setattr("keras_precision.search.search.Clock", Ticks)
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("int8-weight-only",), budget="50%", time_limit=60)
    assert len(result.sensitivities) == 1 and result.stopped.startswith("the time limit left 2 of 3")
    assert result.bytes_after < result.bytes_before


def test_a_stopped_search_goes_on(small, tmp_path, monkeypatch):
    model, x, y = small
    path = tmp_path / "search.json"
    arguments = {"loss": "mse", "candidates": ("nf4", "bfloat16"), "budget": "50%"}
    whole = kp.search_policy(model, x, y, **arguments)
    compared = Measuring._compared
    calls = []

    def stopping(self, *values):
        calls.append(values)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compared(self, *values)

    monkeypatch.setattr(Measuring, "_compared", stopping)
    with pytest.raises(KeyboardInterrupt):
        kp.search_policy(model, x, y, checkpoint=path, **arguments)
    kept = json.loads(path.read_text())["measured"]
    assert len(kept) == 2 and [p.name for p in tmp_path.iterdir()] == ["search.json"]
    calls[:] = [None] * 4
    assert kp.search_policy(model, x, y, checkpoint=path, **arguments).to_dict() == whole.to_dict()
    measured = len(calls)
    calls[:] = [None] * 4
    assert kp.search_policy(model, x, y, checkpoint=path, **arguments).to_dict() == whole.to_dict()
    assert len(calls) == 4 + 1 < measured  # the model as it was, and nothing else


@pytest.mark.parametrize("change", ["model", "data", "loss"])
def test_a_checkpoint_of_another_search_is_refused(small, tmp_path, change):
    model, x, y = small
    arguments = {"loss": "mse", "candidates": ("nf4",), "checkpoint": tmp_path / "search.json"}
    kp.search_policy(model, x, y, **arguments)
    if change == "model":
        model.layers[0].bias.assign(np.ones(64))
    y, arguments["loss"] = (y + 1 if change == "data" else y), ("mae" if change == "loss" else "mse")
    with pytest.raises(ValueError, match=f"another {change}"):
        kp.search_policy(model, x, y, **arguments)


def test_a_file_that_is_no_checkpoint_is_refused(small, tmp_path):
    model, x, y = small
    (tmp_path / "notes.json").write_text("[1]")
    with pytest.raises(ValueError, match="which is none"):
        kp.search_policy(model, x, y, "mse", checkpoint=tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == "[1]"


def test_skipped_layers_stay(small):
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("nf4",), budget={"max_bytes": 19_400}, skip=("second",))
    assert {row.path.split("/")[-1] for row in result.layers if row.is_changed} == {"first", "head"}
    assert "second" not in {row.path.split("/")[-1] for row in result.sensitivities}


def test_held_out_data_can_be_given(small):
    model, x, y = small
    result = kp.search_policy(model, x, y, "mse", candidates=("nf4",), validation_data=(x[:30], y[:30]), budget="20%")
    assert (result.calibration_samples, result.held_out_samples) == (80, 30)
    assert result.before.loss == pytest.approx(
        float(np.mean((model.predict(x[:30], verbose=0) - y[:30]) ** 2)), rel=1e-5
    )


def test_layers_of_other_policies_keep_their_source():
    with kp.policy_scope("mixed_bfloat16"):
        layers = [keras.layers.Dense(64), keras.layers.LayerNormalization(), keras.layers.Dense(4, dtype="float32")]
        model = keras.Sequential([keras.Input((64,)), *layers])
    x = np.random.default_rng(0).normal(size=(40, 64)).astype("float32")
    result = kp.search_policy(model, x, np.zeros((40, 4)), "mse", candidates=("int8",), budget={"max_bytes": "40%"})
    result.apply(model)
    names = [layer.dtype_policy.name for layer in layers]
    assert names[0] == "int8_from_mixed_bfloat16" and names[2] in ("float32", "int8_from_float32")
    assert kp.summary(model).bytes == result.bytes_after


@keras.saving.register_keras_serializable(package="test_search")
class Subclassed(keras.Model):
    """Built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body, self.head = keras.layers.Dense(64, name="body"), keras.layers.Dense(2, name="head")

    def call(self, inputs):
        return self.head(keras.ops.relu(self.body(inputs)))


def test_subclassed_models_are_searched(small):
    model, (_, x, y) = Subclassed(name="sub"), small
    model(x[:1])
    result = kp.search_policy(model, x, y[:, :2], "mse", candidates=("nf4",), budget={"max_bytes": "50%"})
    assert kp.quantize(model, result.policy_map, verbose=0).bytes_after == result.bytes_after


def test_result_prints_plots_and_is_json(found, tmp_path, capfd):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["bytes_after"] == found.bytes_after
    assert kp.deserialize(data["policy_map"]) == found.policy_map
    costs = [point["bytes"] for point in data["front"]]
    losses = [point["loss"] for point in data["front"]]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    text = str(found)
    for expected in ("conv2d_1", "int8-weight-only", "chosen", "held-out", "95%", f"{found.bytes_after:,}"):
        assert expected in text
    assert repr(found).startswith("<SearchResult: 143,656 to")
    figure = found.plot()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "bytes of all weights"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn["chosen"] == [[found.bytes_after, found.chosen.loss]]
    assert found.plot(axes=axes) is figure
    assert capfd.readouterr().err == ""  # no progress bar in a pipe


def float8(mode="float8", **options):
    return kp.QuantizedFloat8DTypePolicy(mode, "mixed_bfloat16", **{"min_features": 16, **options})


def in_float8():
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, dtype=float8())])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": keras.Sequential([keras.layers.Dense(2)])}, ValueError, "is not built"),
        ({"model": "model.keras"}, TypeError, "Expected a Keras model"),
        ({"candidates": ("nf5",)}, ValueError, "Received: 'nf5'"),
        ({"candidates": ("nf4", "float8_from_mixed_bfloat16")}, ValueError, "keeps weights .* minimize='seconds'"),
        ({"candidates": ("float8",), "minimize": "seconds"}, ValueError, "float8 takes .* of 2,048 rows"),
        ({"candidates": (float8(), float8(strict=True)), "minimize": "seconds"}, ValueError, "of different names"),
        ({"candidates": ("float8",), "minimize": "seconds", "model": in_float8()}, ValueError, r"Call .*dequantize\("),
        ({"candidates": (kp.DTypePolicyMap("float32"),)}, ValueError, "Expected candidates"),
        ({"candidates": ()}, ValueError, "at least one candidate"),
        ({"candidates": "nf4"}, TypeError, r"Pass \('nf4',\)"),
        ({"candidates": ("float32",)}, ValueError, "can change at least one layer"),
        ({"x": None}, ValueError, "x=None"),
        ({"loss": None}, ValueError, "Expected a loss"),
        ({"budget": {"max_bytes": 100}}, ValueError, "the least that they reach is [0-9,]+"),
        ({"budget": {"max_bytes": 100}, "minimize": "bytes"}, ValueError, r"one of \('loss',\)"),
        ({"minimize": "loss"}, ValueError, "'bytes', 'seconds'"),
        ({"confidence": 1.5}, ValueError, "between 0.5 and 1"),
        ({"skip": ("tail",)}, ValueError, "tail"),
        ({"validation_data": 3}, ValueError, "validation_data="),
    ],
)
def test_wrong_arguments_are_refused(small, change, error, message):
    model, x, y = small
    arguments = {"model": model, "x": x, "y": y, "loss": "mse", "candidates": ("nf4",), **change}
    with pytest.raises(error, match=message):
        kp.search_policy(**arguments)


def test_the_least_that_is_reachable_is_reached(small):
    model, x, y = small
    with pytest.raises(ValueError) as refused:
        kp.search_policy(model, x, y, "mse", candidates=("nf4", "nf4-dq"), budget={"max_bytes": 100})
    least = int(str(refused.value).partition("reach is ")[2].partition(".")[0].replace(",", ""))
    result = kp.search_policy(model, x, y, "mse", candidates=("nf4", "nf4-dq"), budget={"max_bytes": least})
    assert result.bytes_after == least


def test_quantized_models_are_refused(small):
    model, x, y = small
    kp.quantize(model, "nf4", verbose=0)
    with pytest.raises(ValueError, match="Search on the float model"):
        kp.search_policy(model, x, y, "mse")


def test_a_loss_that_is_not_finite_is_refused(small):
    model, x, y = small
    with pytest.raises(ValueError, match="finite loss"):
        kp.search_policy(model, x, y * np.nan, "mse")
