"""The audit's command prints what the audit found and writes its page."""

import json
from pathlib import Path

import numpy as np
import pytest

AUDIT = ("audit", "model.keras", "--data", "validation.npz")


def test_audit_prints_writes_a_page_and_json(run, workplace):
    done = run(*AUDIT, "--policy", "mixed_float16", "--html", "audit.html")
    assert done.exit_code == 0, done.stderr
    assert "conv2d_1" in done.stdout and "Page: audit.html" in done.stdout
    page = Path("audit.html").read_text()
    assert "<html" in page and "conv2d_1" in page
    done = run(*AUDIT, "--policy", "mixed_float16", "--html", "audit.html")
    assert done.exit_code == 2 and "--overwrite" in done.stderr
    report = json.loads(run(*AUDIT, "--json").stdout)
    assert "conv2d_1" in json.dumps(report)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*AUDIT, "--policy", "mixed_float17"), "mixed_float17"),
        ((*AUDIT, "--policy", "float8_from_mixed_bfloat16"), "min_features=2048. Pass"),
        ((*AUDIT, "--html", "page.txt"), "ends in .html"),
        (("audit", "model.keras", "--data", "empty.npz"), "Expected arrays"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, workplace, arguments, expected):
    np.savez("empty.npz")
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert expected in done.stderr
