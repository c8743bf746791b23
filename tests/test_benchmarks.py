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
    assert scripts - {"timing", "quantize"} == set(CASES)


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


def test_quantize_prints_a_row_for_each_format(backend):
    measured = [("ours", "nf4-dq"), ("ours", "int8"), ("Keras", "int4")]
    arguments = ["--rows", "130", "--columns", "70", "--samples", "1", "--only", ",".join(map(":".join, measured))]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quantize.py", "--backends", backend, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if f"│ {backend} " in line]
    assert [(row[2], row[3]) for row in rows] == measured
    assert all(float(row[4]) >= 0 and float(row[10]) >= 0 for row in rows)
    assert float(rows[0][7]) > 0 and not rows[1][7]  # times as fast as Keras's of as many bits
