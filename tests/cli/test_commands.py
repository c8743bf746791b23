"""Commands do to files what they say, print it, and refuse bad input in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision.cli import COMMANDS
from keras_precision.cli import models as models_module
from keras_precision.cli.search import search

ROOT = Path(__file__).parent.parent.parent
SEARCH = ("search", "model.keras", "--data", "validation.npz", "--candidates", "nf4,int8-weight-only")


def example_of(command):
    """The words after `keras-precision` in the example that a command's help ends with."""
    return command.epilog.removeprefix("\b\nExample: keras-precision ")


@pytest.fixture(scope="module")
def launched(trained, tmp_path_factory):
    """What commands, run as a user runs them, exited with and printed: name -> (status, stdout, stderr)."""
    directory = tmp_path_factory.mktemp("launched")
    for path in trained.iterdir():
        (directory / path.name).symlink_to(path)
    commands = {
        "summary": "summary model.keras",
        # The example of its help, its bound replaced by one that some policy keeps: the last of an option counts.
        "search": f"{example_of(search)} --max-loss-increase 5% --candidates nf4,int8-weight-only --plot front.png",
    }
    environment = os.environ | {"KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(ROOT)}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "keras_precision_launcher", *command.split()],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, command in commands.items()
    }
    outputs = {name: process.communicate(timeout=300) for name, process in running.items()}
    return directory, {name: (running[name].returncode, *output) for name, output in outputs.items()}


def accuracy(path, data):
    model = keras.saving.load_model(path)
    arrays = np.load(data)
    return float(np.mean(model.predict(arrays["x"], verbose=0).argmax(axis=1) == arrays["y"]))


def test_summary_as_a_user_runs_it(launched):
    status, stdout, stderr = launched[1]["summary"]
    assert status == 0, stderr
    row = next(line for line in stdout.splitlines() if "conv2d_1" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["Conv2D", "float32"]
    assert "18,496" in row and "73,984" in row  # parameters, bytes
    assert "143,656" in stdout.splitlines()[-2]


def test_quantize_makes_a_smaller_model_that_is_as_good(run, workplace):
    done = run("quantize", "model.keras", "--policy", "int8-weight-only", "-o", "int8.keras")
    assert done.exit_code == 0, done.stderr
    assert "143,656 bytes before, 37,104 after" in done.stdout and "Output: int8.keras" in done.stdout
    assert "layers" not in done.stderr  # no progress bar in a pipe
    small = keras.saving.load_model("int8.keras")
    assert kp.summary(small).bytes == 37_104
    before = accuracy("model.keras", "validation.npz")
    assert accuracy("int8.keras", "validation.npz") >= before - 0.01


def test_search_as_a_user_runs_it(launched):
    directory, results = launched
    status, stdout, stderr = results["search"]
    assert status == 0, stderr
    before, after = re.search(r"([\d,]+) bytes before, ([\d,]+) after", stdout).groups()
    assert before == "143,656"
    searched = keras.saving.load_model(directory / "small.keras")
    assert kp.summary(searched).bytes == int(after.replace(",", "")) < 37_104  # int8 everywhere
    assert "max_loss_increase=5% holds" in stdout and "Policy map: " in stdout
    assert (directory / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "measurements" not in stderr


def test_bench_times_products_and_steps(run, backend):
    done = run("bench", "--size", 64, "--samples", 2, "--policies", "bfloat16,nf4", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["hardware"]["backend"] == backend
    entries = {entry["policy"]: entry for entry in report["times"]}
    assert list(entries) == ["float32", "bfloat16", "nf4_from_float32"]
    assert [entry["bytes"] for entry in entries.values()] == [4 * 64**2, 2 * 64**2, 64**2 // 2 + 4 * 64]
    assert all(ms > 0 for entry in entries.values() for ms in entry["product_ms"])
    assert entries["bfloat16"]["step_ms"] > 0 and entries["nf4_from_float32"]["step_ms"] is None


NEW = [command for command in COMMANDS if command.name not in ("doctor", "demo")]


@pytest.mark.parametrize("command", NEW, ids=lambda command: command.name)
def test_the_example_of_help_runs(run, workplace, command):
    help_text = " ".join(run(command.name, "--help").stdout.split())
    assert help_text.partition("Example: keras-precision ")[2] == example_of(command)
    if command is not search:  # `launched` runs it
        done = run(*example_of(command).split())
        assert done.exit_code == 0, done.stderr


def test_every_command_takes_json():
    for command in COMMANDS:
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, command.name


def test_json_of_summary_and_quantize(run, workplace):
    report = json.loads(run("quantize", "model.keras", "--policy", "nf4", "-o", "small.keras", "--json").stdout)
    assert (report["bytes_before"], report["bytes_after"], report["output"]) == (143_656, 21_040, "small.keras")
    summary = json.loads(run("summary", "small.keras", "--json").stdout)
    assert summary["bytes"] == 21_040
    assert {"nf4_from_float32"} == {row["policy"] for row in summary["layers"]} - {"float32"}


def test_a_searched_policy_can_be_applied_later(run, workplace):
    done = run(*SEARCH, "--max-bytes", "20%", "--save-policy", "policy.json", "--checkpoint", "c.json", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_after"] <= 0.2 * found["bytes_before"] and found["saved_policy"] == "policy.json"
    assert json.loads(Path("c.json").read_text())["measured"]
    Path("found.json").write_text(done.stdout)
    for policy in ("policy.json", "found.json"):
        done = run("quantize", "model.keras", "--policy", policy, "-o", "small.keras", "--overwrite", "--json")
        assert json.loads(done.stdout)["bytes_after"] == found["bytes_after"], done.stderr


def test_inputs_and_targets_may_be_two_files(run, workplace):
    arguments = ("search", "model.keras", "--data", "x.npy", "--targets", "y.npy", "--candidates", "int8-weight-only")
    done = run(*arguments, "--max-accuracy-drop", "0.1", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["chosen"]["accuracy"] > 0.5


@pytest.fixture
def bad_files(workplace):
    """Files of every kind that is refused."""
    images = np.load("x.npy")
    Path("text.keras").write_text("no model")
    Path("notes.txt").write_text("no model")
    np.savez("no_y.npz", x=images)
    np.savez("no_x.npz", images=images, y=np.zeros(len(images)))
    np.savez("shape.npz", x=images[:, :4], y=np.zeros(len(images)))
    np.savez("lengths.npz", x=images, y=np.zeros(5))
    np.savez("objects.npz", x=np.array([{}, {}]), y=np.zeros(2))
    np.savez("strings.npz", x=np.full(images.shape, "a"), y=np.zeros(len(images)))
    Path("damaged.npz").write_bytes(Path("validation.npz").read_bytes()[:1000])
    Path("policy.json").write_text("[]")
    Path("broken.py").write_text("import nothing_of_that_name")
    Path("there.keras").write_text("precious")
    return workplace


def search_on(data, *options):
    return ("search", "model.keras", "--data", data, "--max-loss-increase", "1%", *options)


def quantized(*options, output="small.keras"):
    return ("quantize", "model.keras", "-o", output, "--policy", *options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("summary", "missing.keras"), "'missing.keras', which does not exist"),
        (("summary", "text.keras"), "Expected a Keras model"),
        (("summary", "notes.txt"), "Expected a Keras model"),
        (("summary",), "Missing argument 'MODEL'"),
        (("summary", "model.keras", "--custom-objects", "nowhere.to.be.found"), "--custom-objects"),
        (("summary", "model.keras", "--custom-objects", "broken.py"), "nothing_of_that_name"),
        (quantized("nf5"), "one of float8, fp4"),
        (quantized("float32"), "Expected a quantized policy"),
        (quantized("policy.json"), "which holds none"),
        (quantized("nowhere.json"), "nowhere.json"),
        (quantized("float8_from_mixed_bfloat16"), "min_features=2048. Pass"),
        (search_on("validation.npz", "--candidates", "float8"), "keeps weights as they are"),
        (quantized("nf4", "--skip", "tail"), "tail"),
        (quantized("nf4", output="small.h5"), "ends in .keras"),
        (quantized("nf4", output="nowhere/small.keras"), "a directory that exists"),
        (quantized("nf4", output="there.keras"), "Pass --overwrite"),
        (search_on("missing.npz"), "'missing.npz', which does not exist"),
        (search_on("notes.txt"), ".npz or .npy"),
        (search_on("no_y.npz"), "targets 'y' too"),
        (search_on("no_x.npz"), "['images', 'y']"),
        (search_on("shape.npz"), "Expected inputs of shape (n, 8, 8, 1)"),
        (search_on("lengths.npz"), "as many targets as inputs"),
        (search_on("objects.npz"), "Expected arrays written by NumPy"),
        (search_on("strings.npz"), "Expected numbers"),
        (search_on("damaged.npz"), "Expected arrays written by NumPy"),
        (search_on("validation.npz", "--max-bytes", "1"), "Received: 2 of them"),
        (SEARCH, "Received: 0 of them"),
        ((*SEARCH, "--max-bytes", "10"), "the least that they reach is"),
        (search_on("validation.npz", "--candidates", "nf5"), "'nf5'"),
        (search_on("validation.npz", "--loss", "crossed_entropy"), "crossed_entropy"),
        (search_on("validation.npz", "--plot", "front.txt"), "ends in .png"),
        (("bench", "--policies", "nf5"), "nf5"),
        (("bench", "--policies", ","), "at least one policy"),
        (("bench", "--policies", "float8"), "Pass --size 2048"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, bad_files, arguments, expected):
    before = {path.name for path in bad_files.iterdir()}
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ") and expected in done.stderr
    assert {path.name for path in bad_files.iterdir()} == before and Path("there.keras").read_text() == "precious"


CUSTOM = """
import keras

class Doubling(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs
"""


def test_custom_objects_are_asked_for_and_taken(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("doubling.py").write_text(CUSTOM)
    names = {}
    exec(CUSTOM, names)
    model = keras.Sequential([keras.Input((4,)), names["Doubling"](), keras.layers.Dense(2)])
    model.save("model.keras")
    done = run("summary", "model.keras")
    assert done.exit_code == 2 and "'Doubling'. Pass --custom-objects" in done.stderr
    done = run("summary", "model.keras", "--custom-objects", "doubling.py")
    assert done.exit_code == 0 and "Doubling" in done.stdout
    monkeypatch.syspath_prepend(tmp_path)
    done = run("quantize", "model.keras", "--custom-objects", "doubling", "--policy", "nf4", "-o", "small.keras")
    assert done.exit_code == 0, done.stderr


def test_code_in_a_file_is_run_only_if_told(run, tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: 2 * x), keras.layers.Dense(2)]).save(path)
    done = run("summary", path)
    assert done.exit_code == 2 and "pass --unsafe" in done.stderr
    assert run("summary", path, "--unsafe").exit_code == 0


def test_models_that_were_saved_unbuilt_are_refused(run, tmp_path):
    path = tmp_path / "model.keras"
    with pytest.warns(UserWarning, match="not yet been built"):
        keras.Sequential([keras.layers.Dense(2)]).save(path)
    done = run("summary", path)
    assert done.exit_code == 2 and "not built" in done.stderr


def test_named_inputs_are_taken_from_the_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = keras.Input((64,), name="a"), keras.Input((64,), name="b")
    model = keras.Model([a, b], keras.layers.Dense(2, name="head")(keras.layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    model.save("model.keras")
    x = np.random.default_rng(0).normal(size=(30, 64)).astype("float32")
    np.savez("data.npz", a=x, b=x, y=np.zeros((30, 2)))
    arguments = ("search", "model.keras", "--data", "data.npz", "--candidates", "nf4", "--max-bytes", "50%", "--json")
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rules"]["default"] == "nf4_from_float32"
    np.savez("data.npz", x=x, y=np.zeros((30, 2)))
    assert "Expected an array for each input, ['a', 'b']" in run(*arguments).stderr


def test_an_output_is_written_whole_or_not_at_all(run, workplace, monkeypatch):
    Path("small.keras").write_text("precious")

    def fails(model, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", fails)
    before = {path.name for path in workplace.iterdir()}
    done = run("quantize", "model.keras", "--policy", "nf4", "-o", "small.keras", "--overwrite")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "Error: No space left on device")
    assert Path("small.keras").read_text() == "precious"
    assert {path.name for path in workplace.iterdir()} == before


def test_overwrite_replaces(run, workplace):
    Path("small.keras").write_text("old")
    done = run("quantize", "model.keras", "--policy", "nf4", "-o", "small.keras", "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert models_module.load_model(Path("small.keras")).name == "digits"


def test_a_bare_format_keeps_what_the_model_computes_in(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kp.policy_scope("mixed_bfloat16"):
        keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)]).save("model.keras")
    done = run("quantize", "model.keras", "--policy", "nf4", "-o", "small.keras")
    assert done.exit_code == 0, done.stderr
    assert "nf4_from_mixed_bfloat16" in run("summary", "small.keras").stdout


def test_float8_policies_keep_weights(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="body"), keras.layers.Dense(4)])
    model.save("model.keras")
    Path("float8.json").write_text(json.dumps(kp.serialize(kp.QuantizedFloat8DTypePolicy("float8", min_features=16))))
    done = run("quantize", "model.keras", "--policy", "float8", "-o", "small.keras")
    assert done.exit_code == 2 and "min_features=2048" in done.stderr and not Path("small.keras").exists()
    done = run("quantize", "model.keras", "--policy", "float8.json", "-o", "float8.keras", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes_after"] == report["bytes_before"] == kp.summary(model).bytes
    assert [layer.dtype_policy.name for layer in models_module.load_model(Path("float8.keras")).layers] == [
        "float8_from_float32",
        "float32",
    ]
    np.savez("data.npz", x=np.ones((20, 64), "float32"), y=np.ones((20, 4), "float32"))
    done = run("audit", "model.keras", "--data", "data.npz", "--loss", "mse", "--policy", "float8.json", "--json")
    assert done.exit_code == 0, done.stderr
    policies = {row["path"].split("/")[-1]: row["policy"] for row in json.loads(done.stdout)["layers"]}
    assert policies["body"] == "float8_from_float32"
