"""The command line answers users and machines, and refuses bad input in one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner

from keras_precision import hardware
from keras_precision.cli import digits, main
from keras_precision import attach
from keras_precision.cli.demo import FIGURE_NAME, _notes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run():
    """Runs the command line in this process; gives its exit code and outputs."""
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def short_run():
    """One float32 epoch of the digits task."""
    return digits.train("float32", epochs=1, seed=0)


def launch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_precision_launcher", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_demo_as_a_user_runs_it(tmp_path, backend):
    done = launch("demo", "--epochs", "1", "--policies", "float32", "--output", str(tmp_path), KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "float32" in line)
    assert "trains" in row
    assert "143,656" in row  # 35,914 float32 parameters
    assert f"Loss curves: {tmp_path / FIGURE_NAME}" in done.stdout
    assert (tmp_path / FIGURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert "steps" not in done.stderr  # no progress bar in a pipe


def test_launcher_switches_the_backend(backend):
    other = {"jax": "tensorflow", "tensorflow": "jax"}[backend]
    done = launch("--backend", other, "doctor", "--json", KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"]["backend"] == other


def test_launcher_names_a_backend_that_is_not_installed(tmp_path):
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError(\"No module named 'jax'\", name='jax')\n")
    done = launch("--backend=jax", "doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Expected an installed Keras backend. Received: KERAS_BACKEND=jax" in done.stderr


def test_launcher_refuses_an_unknown_backend():
    done = launch("doctor", KERAS_BACKEND="theano")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "theano" in done.stderr


def test_demo_refuses_float64_where_jax_would_make_it_float32(run, backend):
    if backend != "jax":
        pytest.skip("only JAX has a switch for float64")
    done = run("demo", "--policies", "float64")
    assert done.exit_code == 2
    assert "jax_enable_x64" in done.stderr


def test_demo_json(run, tmp_path, backend):
    done = run("demo", "--json", "--epochs", "1", "--policies", "float32, auto", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["backend"], report["epochs"], report["seed"]) == (backend, 1, 0)
    assert [r["requested"] for r in report["runs"]] == ["float32", "auto"]
    assert report["runs"][1]["policy"] == hardware.best_policy()
    for result in report["runs"]:
        assert result["status"] == "trains"
        assert 0 < result["final_loss"] < result["initial_loss"]
        assert result["step_ms"] > 0


def test_doctor_json(run, backend):
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["hardware"]["backend"] == backend
    assert report["recommended_policy"] == hardware.best_policy()
    assert report["support_matrix"] == hardware.support_matrix().to_rows()
    assert report["dtypes"]["float32"]["status"] == "supported"


def test_doctor_prints_the_same(run, backend):
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert f"{hardware.device_class()} (here)" in done.output
    assert done.output.splitlines()[-1].endswith(hardware.best_policy())
    for row in hardware.support_matrix().to_rows():
        assert row["dtype"] in done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("demo", "--policies", "float23"), "float23"),
        (("demo", "--policies", "float32,int32"), "int32"),
        (("demo", "--policies", "nf4_from_float32"), "nf4_from_float32"),
        (("demo", "--policies", " , "), "at least one policy"),
        (("demo", "--output", os.devnull + "/inside"), "--output"),
        (("demo", "--epochs", "0"), "x>=1"),
        (("demo", "--seed", "-1"), "x>=0"),
        (("train",), "train"),
        (("--backend", "numpy", "doctor"), "numpy"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, expected):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ")
    assert expected in done.stderr


def test_a_loaded_backend_cannot_be_changed(run, backend):
    other = {"jax": "tensorflow", "tensorflow": "jax"}[backend]
    done = run("--backend", other, "doctor")
    assert done.exit_code == 2
    assert f"KERAS_BACKEND={other}" in done.stderr


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_16_bit_weights_train(policy):
    result = digits.train(policy, epochs=1)
    assert (result.status, result.moved) == ("trains", True)
    assert _notes([result]) == []


def test_a_run_that_fails_is_shown_to_fail(monkeypatch):
    # Stock Adam under bfloat16: its bias correction is 0, and so is every update (D1).
    monkeypatch.setattr(attach, "_in_low_precision", lambda optimizer: optimizer)
    result = digits.train("bfloat16", epochs=1)
    assert (result.status, result.moved) == ("does not train", False)
    assert _notes([result]) == ["bfloat16: does not train. No weight changed."]


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("doctor", "--help")])
def test_help_has_an_example(run, arguments):
    done = run(*arguments)
    assert done.exit_code == 0
    assert "Example: keras-precision" in done.output


def test_no_command_gives_help(run):
    done = run()
    assert done.exit_code == 0
    assert "Usage" in done.output


def test_split_is_seeded_and_disjoint():
    first, again, other = (digits.load_digits_split(seed) for seed in (0, 0, 1))
    assert first.train_images.shape == (1408, 8, 8, 1)
    assert first.test_images.shape == (389, 8, 8, 1)
    assert (first.train_images == again.train_images).all()
    assert not (first.train_images == other.train_images).all()
    assert first.train_images.min() == 0
    assert first.train_images.max() == 1


def test_run_is_reproducible(short_run):
    again = digits.train("float32", epochs=1, seed=0)
    # The same operations in the same order; only threads may sum in another one.
    assert again.final_loss == pytest.approx(short_run.final_loss, rel=1e-3)


def test_run_measures_live_variables(short_run):
    with_biases = digits.build_digits_model().count_params()
    assert short_run.weight_bytes == 4 * with_biases
    # Adam: two float32 slots a parameter, then an iteration counter and a learning rate.
    assert 0 < short_run.optimizer_bytes - 2 * 4 * with_biases <= 16


def test_on_batch_is_called_once_a_step():
    calls = []
    digits.train("float32", epochs=1, on_batch=lambda: calls.append(None))
    assert len(calls) == digits.STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("final_loss", "epoch_losses", "status"),
    [
        (0.1, (1.0, 0.1), "trains"),
        (2.3, (2.3, 2.3), "does not train"),
        (2.2, (2.3, 2.2), "does not train"),
        (math.nan, (math.nan,), "NaN loss"),
        (math.inf, (2.0,), "NaN loss"),
        (0.1, (math.nan, 0.1), "NaN loss"),
    ],
)
def test_status_is_decided_by_the_losses(final_loss, epoch_losses, status):
    result = digits.RunResult(
        requested="float32",
        policy="float32",
        test_accuracy=0.5,
        initial_loss=2.3,
        final_loss=final_loss,
        epoch_losses=epoch_losses,
        step_ms=1.0,
        weight_bytes=4,
        optimizer_bytes=8,
        moved=True,
    )
    assert result.status == status
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["status"] == status


def test_cross_entropy_is_the_negative_log_likelihood():
    logits = keras.random.normal((6, 10), seed=1)
    labels = np.array([0, 1, 2, 3, 4, 9])
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
    found = digits.cross_entropy(keras.ops.convert_to_numpy(logits).astype("float64"), labels)
    # One float32 log-softmax of 10 terms: a few times 2**-24.
    assert found == pytest.approx(float(expected), rel=1e-5)
