"""Runs the tests that ship inside the keras package, with keras_precision imported first.

Each must do what it does without us; keras_suite_exceptions.py has what may
differ, and why. Three runs: all tests with us; those that need float64, with
x64 on JAX; and the policy tests with our classes in place of Keras's.

For a new version of Keras, `--baseline` runs the tests without us and lists
those that fail: the table WITHOUT_US.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import fast_compilation

TESTS = Path(__file__).resolve().parent
BACKENDS = ("jax", "tensorflow")

POLICY_TESTS = (
    "keras.src.dtype_policies.dtype_policy_test",
    "keras.src.dtype_policies.dtype_policy_map_test",
)
SAVING_API_TESTS = ("keras.src.saving.saving_api_test",)
ALL_TESTS = (
    *POLICY_TESTS,
    *SAVING_API_TESTS,
    "keras.src.saving.file_editor_test",
    "keras.src.saving.object_registration_test",
    "keras.src.saving.saving_lib_test",
    "keras.src.saving.serialization_lib_test",
    "keras.src.layers.attention.multi_head_attention_test",
    "keras.src.layers.core.dense_test",
    "keras.src.layers.core.einsum_dense_test",
    "keras.src.layers.core.embedding_test",
    "keras.src.layers.layer_test",
)

US = ("keras_precision",)
WORKERS = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
ONE_PROCESS = ("-p", "no:xdist")

ENVIRONMENT = {
    # The tables were recorded on the CPU.
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    # XLA compiles each small operation of these tests; unoptimized, JAX's run takes 325 s of CPU time for 553 s,
    # and 187 s with XLA_FLAGS as `start` sets them.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Run:
    """One invocation of pytest per backend.

    Attributes:
        rules: key of `keras_suite_exceptions.RULES`.
        modules: test modules.
        plugins: pytest plugins, imported in this order before Keras's tests.
        backends: that it makes sense for.
        environment: variables besides ENVIRONMENT.
        processes: pytest's arguments that say how many there are.
    """

    rules: str
    modules: tuple[str, ...]
    plugins: tuple[str, ...]
    backends: tuple[str, ...] = BACKENDS
    environment: dict[str, str] = field(default_factory=dict)
    processes: tuple[str, ...] = ONE_PROCESS


BASELINE = Run("baseline", ALL_TESTS, plugins=(), processes=WORKERS)
MAIN = Run("main", ALL_TESTS, plugins=US, processes=WORKERS)
# Each takes some 10 s, most of it to start up; they run side by side.
SMALL = (
    Run("float64", SAVING_API_TESTS, plugins=US, backends=("jax",), environment={"JAX_ENABLE_X64": "1"}),
    Run("in-place", POLICY_TESTS, plugins=(*US, "keras_in_place")),
)


def start(run: Run, backend: str, fast: bool, **popen) -> subprocess.Popen:
    """Starts a run's pytest on one backend."""
    site = Path(importlib.util.find_spec("keras").submodule_search_locations[0]).parent
    plugins = [argument for plugin in (*run.plugins, "keras_suite_exceptions") for argument in ("-p", plugin)]
    # Keras's tests are no part of our project: neither its pytest settings nor its conftest.py apply to them.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(site), *plugins]
    command += ["--rules", run.rules, *(["--fast"] if fast else []), *run.processes]
    command += ["-p", "no:cacheprovider", "-q", "-rfExs", "--tb=short", "-W", "ignore", "--pyargs", *run.modules]
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "XLA_FLAGS": fast_compilation.xla_flags(backend),
        **run.environment,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.Popen(command, env=environment, cwd=TESTS.parent, **popen)


def run_all(backends: list[str], baseline: bool, fast: bool) -> bool:
    """Returns whether every run passed."""
    passed = []
    large = BASELINE if baseline else MAIN
    for backend in backends:
        print(f"== {large.rules}, {backend}", flush=True)
        passed.append(start(large, backend, fast).wait() == 0)
    small = [(run, backend) for run in SMALL for backend in backends if backend in run.backends and not baseline]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for (run, backend), process in [(key, start(*key, fast, **piped)) for key in small]:
        print(f"== {run.rules}, {backend}\n{process.communicate()[0]}", end="", flush=True)
        passed.append(process.returncode == 0)
    return all(passed)


def main() -> int:
    """Returns the exit status: 0 if Keras's tests do with us what they do without."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="both if not given")
    parser.add_argument("--baseline", action="store_true", help="run without us, to see which tests fail then")
    parser.add_argument("--fast", action="store_true", help="leave the tests of the table SLOW out")
    arguments = parser.parse_args()
    return 0 if run_all(arguments.backend or list(BACKENDS), arguments.baseline, arguments.fast) else 1


if __name__ == "__main__":
    sys.exit(main())
