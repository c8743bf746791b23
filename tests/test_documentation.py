"""Every example that users can read runs as printed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import keras_precision

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(keras_precision.__path__, "keras_precision."))


@pytest.mark.parametrize("name", ["keras_precision_launcher", "keras_precision", *MODULES])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"keras": importlib.import_module("keras")})
    assert failed == 0, "the examples printed above gave other results"


def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files that they write
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
