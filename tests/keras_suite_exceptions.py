"""Which of Keras's tests may do otherwise than pass, each with its reason."""

import dataclasses
from collections.abc import Mapping

import pytest

WITHOUT_US = {
    "saving/saving_lib_test.py::SavingBattleTest::test_legacy_load_skips_missing_nested_containers": (
        "reads saving/test_data, which the keras package leaves out"
    ),
}
