"""Pytest plugin that knows which of Keras's tests may do otherwise than pass, each with its reason."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import keras
import pytest

# The version that the tables below were recorded with. Under another one, entries that match no test or whose
# test passes are let be; under this one they are errors.
RECORDED_WITH = "3.15.1"

# Each table maps a pattern (of `fnmatch`, for a test's id after "keras/src/") to a reason.

WITHOUT_US = {
    "saving/saving_lib_test.py::SavingBattleTest::test_legacy_load_skips_missing_nested_containers": (
        "fails without us too: it reads saving/test_data, which the keras package leaves out"
    ),
}

_FLOAT64 = "JAX without x64 turns float64 into float32 in silence; with us the layer raises (D23). Run under x64 below"
FLOAT64_ON_JAX = {
    "saving/saving_api_test.py::LoadModelTests::test_basic_load_float64": _FLOAT64,
    "saving/saving_api_test.py::LoadWeightsTests::test_load_weights_*_float64": _FLOAT64,
    "saving/saving_api_test.py::LoadWeightsTests::test_load_weights_*_float64_*": _FLOAT64,
}

SLOW = {
    "saving/saving_lib_test.py::SavingTest::test_weights_sharding_efficientnet_b0_*": (
        "builds EfficientNetB0, a tenth of the whole time, to count weight shards; left out with --fast"
    ),
}

_INT8_FLOAT16 = "D17: Keras refuses int8 with float16; with us it is a policy like the others"
_FLOAT8_DELAYED = (
    "'float8' means Keras's scales from a history there; with us 'float8/delayed' does, and other modes take no "
    "amax_history_length rather than ignore it"
)
IN_PLACE = {
    **{
        f"dtype_policies/dtype_policy_test.py::QuantizedDTypePolicyTest::{test}": _FLOAT8_DELAYED
        for test in (
            "test_get_config_from_config",
            "test_properties",
            "test_python_serialization_float8_from_mixed_bfloat16",
        )
    },
    "dtype_policies/dtype_policy_test.py::QuantizedDTypePolicyTest::"
    "test_initialization_with_invalid_compute_dtype_int8_from_float16": _INT8_FLOAT16,
    "dtype_policies/dtype_policy_test.py::QuantizedDTypePolicyTest::"
    "test_initialization_with_invalid_compute_dtype_int8_from_mixed_float16": _INT8_FLOAT16,
    "dtype_policies/dtype_policy_test.py::DTypePolicyGlobalFunctionsTest::test_get_invalid_policy_quantized": (
        "wording: 'int8_abc_' is a ValueError with us too, which suggests the nearest name"
    ),
    "dtype_policies/dtype_policy_map_test.py::DTypePolicyMapTest::test_basic_usage": (
        "compares our int8 policy with the one that Keras's `Model.quantize` attaches: it selects Keras's "
        "implementation, so the two are not equal"
    ),
    "dtype_policies/dtype_policy_map_test.py::DTypePolicyMapTest::test_default_policy": (
        "D12: a map without a default turns its entries into the global policy of the loading process"
    ),
    "dtype_policies/dtype_policy_map_test.py::DTypePolicyMapTest::test_get": (
        "D15: a path that two rules match is an error; with us the first rule holds"
    ),
}


@dataclass(frozen=True)
class Rules:
    """What a run does with the tests of each table.

    Attributes:
        expected_failures: fail.
        skipped: are not run.
        only: if not empty, no test but these is run.
    """

    expected_failures: Mapping[str, str]
    skipped: Mapping[str, str]
    only: Mapping[str, str]


RULES = {
    ("baseline", "jax"): Rules({}, {}, {}),
    ("baseline", "tensorflow"): Rules({}, {}, {}),
    ("main", "jax"): Rules(WITHOUT_US, FLOAT64_ON_JAX, {}),
    ("main", "tensorflow"): Rules(WITHOUT_US, {}, {}),
    ("float64", "jax"): Rules({}, {}, FLOAT64_ON_JAX),
    ("in-place", "jax"): Rules(IN_PLACE, {}, {}),
    ("in-place", "tensorflow"): Rules(IN_PLACE, {}, {}),
}


def pytest_addoption(parser):
    parser.addoption("--rules", choices=sorted({run for run, _ in RULES}), required=True)
    parser.addoption("--fast", action="store_true", help="leave the tests of the table SLOW out")


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own mark, true of both backends")


def pytest_collection_modifyitems(config, items):
    rules = RULES[config.getoption("rules"), keras.backend.backend()]
    skipped = {**rules.skipped, **(SLOW if config.getoption("fast") else {})}
    _check_patterns({**rules.expected_failures, **skipped, **rules.only}, items)
    if rules.only:
        config.hook.pytest_deselected(items=[item for item in items if not _patterns(rules.only, item)])
        items[:] = [item for item in items if _patterns(rules.only, item)]
    for item in items:
        for pattern in _patterns(rules.expected_failures, item):
            strict = keras.__version__ == RECORDED_WITH
            item.add_marker(pytest.mark.xfail(reason=rules.expected_failures[pattern], strict=strict))
        for pattern in _patterns(skipped, item):
            item.add_marker(pytest.mark.skip(reason=skipped[pattern]))


def pytest_runtest_setup(item):
    # Keras's tests count on clear_session to undo the global policy that the test before set; with us it does not
    # (D21). Each gets a new object, because some write into it.
    keras.config.set_dtype_policy(keras.DTypePolicy(keras.config.floatx()))


def _check_patterns(patterns, items):
    files = {_test_id(item).partition("::")[0] for item in items}
    used = {pattern for item in items for pattern in _patterns(patterns, item)}
    stale = [p for p in patterns if p not in used and p.partition("::")[0] in files]
    if stale and keras.__version__ == RECORDED_WITH:
        raise pytest.UsageError(f"Expected patterns of tests of Keras {RECORDED_WITH}. Received: {stale}. Remove them.")


def _patterns(table, item):
    return [pattern for pattern in table if fnmatch.fnmatchcase(_test_id(item), pattern)]


def _test_id(item):
    return item.nodeid.rpartition("keras/src/")[2]
