"""Each benchmark runs in its smallest setting and reports every case; what it measures is not asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = {"import_time": 1, "get_policy": 1, "resolve_rules": 3, "layer_call": 8}


def test_every_benchmark_is_run_here():
    scripts = {script.stem for script in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - {"timing"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_benchmark_prints_a_row_for_each_case(name, backend):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--backends", backend, "--pairs", "1", "--samples", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"│ {backend} ")]
    assert len(rows) == CASES[name]
    for row in rows:
        assert re.search(r"<= .*│ +(yes|NO) ", row), row
        assert float(row.split("│")[5]) > 0  # ours / Keras
