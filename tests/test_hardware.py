"""Tests of keras_precision.hardware."""

import dataclasses
import json
import subprocess
import sys
import types
import warnings

import keras
import numpy as np
import pytest

from keras_precision import hardware
from keras_precision.hardware import checks
from keras_precision.hardware import description as description_module

BACKENDS = ("jax", "tensorflow", "torch")
MATRIX = hardware.support_matrix()
IS_JAX = keras.config.backend() == "jax"
IS_TENSORFLOW = keras.config.backend() == "tensorflow"


def machine(backend="jax", kind="cpu", capability=None, flags=(), is_x64=True):
    """Returns the description of a machine that this one need not be."""
    return hardware.HardwareDescription(
        backend=backend,
        backend_version="0",
        devices=((kind, "a device"),),
        compute_capability=capability,
        cpu_flags=flags,
        cpu_name="a processor",
        is_x64_enabled=is_x64,
        default_matmul_precision=None,
    )


AMX = ("amx_bf16", "amx_tile")
MACHINES = [
    # description, its device class, its best policy
    (machine("jax"), "cpu", "float32"),
    (machine("tensorflow"), "cpu", "float32"),
    (machine("jax", flags=AMX), "cpu-amx", "float32"),
    (machine("tensorflow", flags=AMX), "cpu-amx", "mixed_bfloat16"),
    (machine("torch", flags=AMX), "cpu-amx", "float32"),
    (machine("numpy", flags=AMX), "cpu-amx", "float32"),
    (machine("jax", "gpu"), "gpu-other", "float32"),
    (machine("tensorflow", "gpu", None, AMX), "gpu-other", "float32"),
    (machine("jax", "gpu", "5.2"), "gpu-6.1", "float32"),
    (machine("jax", "gpu", "6.0"), "gpu-6.0", "float32"),
    (machine("jax", "gpu", "6.1"), "gpu-6.1", "float32"),
    (machine("tensorflow", "gpu", "6.2", AMX), "gpu-6.1", "float32"),
    (machine("jax", "gpu", "7.0"), "gpu-7.0", "mixed_float16"),
    (machine("tensorflow", "gpu", "7.2"), "gpu-7.0", "mixed_float16"),
    (machine("jax", "gpu", "7.5", AMX), "gpu-7.5", "mixed_float16"),
    (machine("tensorflow", "gpu", "8.0"), "gpu-8.0", "mixed_bfloat16"),
    (machine("jax", "gpu", "8.6"), "gpu-8.6", "mixed_bfloat16"),
    (machine("jax", "gpu", "8.7"), "gpu-8.6", "mixed_bfloat16"),
    (machine("torch", "gpu", "8.9"), "gpu-8.9", "mixed_bfloat16"),
    (machine("jax", "gpu", "9.0"), "gpu-9.0", "mixed_bfloat16"),
    (machine("jax", "gpu", "10.0"), "gpu-10.0", "mixed_bfloat16"),
    (machine("jax", "gpu", "10.3"), "gpu-10.3", "mixed_bfloat16"),
    (machine("jax", "gpu", "11.0"), "gpu-10.3", "mixed_bfloat16"),
    (machine("jax", "gpu", "12.1"), "gpu-12.0", "mixed_bfloat16"),
    (machine("jax", "gpu", "99.0"), "gpu-12.0", "mixed_bfloat16"),
    (machine("jax", "tpu"), "tpu", "mixed_bfloat16"),
    (machine("tensorflow", "tpu", None, AMX), "tpu", "mixed_bfloat16"),
]


@pytest.fixture
def fresh_checks(monkeypatch):
    """Makes check_dtypes forget what it has checked and warned about."""
    monkeypatch.setattr(checks, "_PASSED", set())
    monkeypatch.setattr(checks, "_WARNED", set())


@pytest.fixture
def on(monkeypatch, fresh_checks):
    """Makes the matrix and the checks see another machine than this one."""

    def use(described):
        monkeypatch.setattr(hardware.matrix, "describe", lambda: described)
        monkeypatch.setattr(keras.config, "backend", lambda: described.backend)

    return use


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cell_has_a_status_and_a_reason(backend):
    statuses = {"fast", "supported", "slow", "emulated", "unsupported"}
    rows = {"float16", "bfloat16", "float32", "float64", "float8", "int8"}
    assert set(MATRIX.dtypes) == rows
    for column in MATRIX.device_classes:
        assert set(MATRIX.cells[column]) == rows
        for row in rows:
            cell = MATRIX.lookup(row, column, backend)
            assert cell.status in statuses
            assert len(cell.reason) > 15 and cell.reason.endswith(".")


def test_columns_cover_every_machine():
    assert {column for _, column, _ in MACHINES} == set(MATRIX.device_classes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_the_reference_everywhere(backend):
    for column in MATRIX.device_classes:
        assert MATRIX.lookup("float32", column, backend).status == "supported"


def test_lookup_knows_where_backends_differ():
    def status(*cell):
        return MATRIX.lookup(*cell).status

    assert status("float16", "cpu", "tensorflow") == "slow"
    assert status("float16", "cpu", "jax") == "emulated"
    assert status("bfloat16", "cpu-amx", "tensorflow") == "fast"
    assert status("bfloat16", "cpu-amx", "jax") == "supported"
    assert status("float8", "gpu-9.0", "tensorflow") == "unsupported"
    assert status("float8", "gpu-9.0", "jax") == "fast"
    assert status("float8_e5m2", "gpu-8.0", "jax") == "emulated"
    assert status("float64", "gpu-8.6", "jax") == "slow"
    assert status("float64", "gpu-9.0", "jax") == "supported"


def test_lookup_defaults_to_the_current_backend():
    backend = keras.config.backend()
    assert MATRIX.lookup("float16", "cpu") == MATRIX.lookup("float16", "cpu", backend)
    expected = "slow" if IS_TENSORFLOW else "emulated"
    assert MATRIX.lookup("float16", "cpu").status == expected


def test_lookup_rejects_what_is_not_in_the_matrix():
    with pytest.raises(ValueError, match=r"Expected device_class.*'gpu-1\.0'"):
        MATRIX.lookup("float16", "gpu-1.0")
    with pytest.raises(ValueError, match=r"Expected a dtype.*'int32'"):
        MATRIX.lookup("int32", "cpu")


def test_current_is_the_column_of_this_machine():
    expected = MATRIX.lookup("bfloat16", hardware.device_class())
    assert MATRIX.current("bfloat16") == expected


def test_rows_print_every_status():
    rows = MATRIX.to_rows(backend="tensorflow")
    assert [row["dtype"] for row in rows] == list(MATRIX.dtypes)
    for row in rows:
        assert tuple(row) == ("dtype", *MATRIX.device_classes)
    assert rows[0]["cpu"] == "slow"


@pytest.mark.parametrize(("described", "column", "policy"), MACHINES)
def test_machine_has_its_class_and_best_policy(described, column, policy):
    assert hardware.device_class(described) == column
    assert hardware.best_policy(described) == policy


def test_best_policy_of_this_machine_is_one_that_keras_knows():
    policy = hardware.best_policy()
    assert policy == hardware.best_policy(hardware.describe())
    assert keras.dtype_policies.get(policy).variable_dtype == "float32"


def test_describe_reports_this_machine():
    described = hardware.describe()
    assert described.backend == keras.config.backend()
    assert described.backend_version == sys.modules[described.backend].__version__
    assert {kind for kind, _ in described.devices} <= {"cpu", "gpu", "tpu"}
    assert all(name for _, name in described.devices)
    listed = [one.partition(":")[0] for one in keras.distribution.list_devices()]
    assert described.devices[0][0] in listed
    assert described.cpu_name
    assert json.loads(json.dumps(described.to_dict())) == described.to_dict()
    fields = {one.name for one in dataclasses.fields(described)}
    assert set(described.to_dict()) == fields
    with pytest.raises(dataclasses.FrozenInstanceError):
        described.backend = "numpy"


def test_cpu_flags_are_read_from_cpuinfo(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    one = "model name\t: Some Xeon\nflags\t\t: fpu avx2 amx_bf16 amx_tile sse\n\n"
    file.write_text(one * 2)
    monkeypatch.setattr(description_module, "_CPUINFO", file)
    read = description_module.read_cpu.__wrapped__
    assert read() == ("Some Xeon", ("amx_bf16", "amx_tile", "avx2"))
    monkeypatch.setattr(description_module, "_CPUINFO", tmp_path / "absent")
    assert read()[1] == ()


@pytest.mark.skipif(not IS_JAX, reason="reads JAX devices")
@pytest.mark.parametrize(("reported", "expected"), [("9.0", "9.0"), ("gfx942", None)])
def test_jax_gpus_are_described(monkeypatch, reported, expected):
    import jax

    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="Some GPU", compute_capability=reported
    )
    monkeypatch.setattr(jax, "local_devices", lambda **_: [gpu, gpu])
    described = hardware.describe()
    assert described.devices == (("gpu", "Some GPU"),) * 2
    assert described.compute_capability == expected


@pytest.mark.skipif(not IS_JAX, reason="reads a JAX setting")
def test_default_device_of_jax_counts(monkeypatch):
    import jax

    (cpu, *_) = jax.local_devices(backend="cpu")
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="Some GPU", compute_capability="8.0"
    )

    def local_devices(backend=None):
        return [cpu] if backend == "cpu" else [gpu, cpu]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert hardware.device_class() == "gpu-8.0"
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert hardware.describe().devices[0][0] == "cpu"
            assert hardware.describe().compute_capability is None


@pytest.mark.skipif(not IS_TENSORFLOW, reason="reads TensorFlow devices")
def test_tensorflow_gpus_are_described(monkeypatch):
    import tensorflow as tf

    devices = [
        types.SimpleNamespace(device_type=kind, name=kind) for kind in ("CPU", "GPU")
    ]
    details = {"device_name": "Some GPU", "compute_capability": (7, 5)}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: devices)
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda _: dict(details)
    )
    described = hardware.describe()
    assert [kind for kind, _ in described.devices] == ["gpu", "cpu"]
    assert described.devices[0][1] == "Some GPU"
    assert described.compute_capability == "7.5"
    assert described.default_matmul_precision in ("tensorfloat32", "float32")
    del details["compute_capability"]
    assert hardware.device_class() == "gpu-other"
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        assert hardware.device_class() in ("cpu", "cpu-amx")


@pytest.mark.parametrize(
    ("hip", "has_cuda", "has_mps", "kind", "capability"),
    [
        (None, True, False, "gpu", "8.9"),
        ("6.0", True, False, "gpu", None),
        (None, False, True, "gpu", None),
        (None, False, False, "cpu", None),
    ],
)
def test_torch_devices_are_described(
    monkeypatch, hip, has_cuda, has_mps, kind, capability
):
    mps = types.SimpleNamespace(is_available=lambda: has_mps)
    torch = types.ModuleType("torch")
    torch.__version__ = "2.0"
    torch.version = types.SimpleNamespace(hip=hip)
    torch.backends = types.SimpleNamespace(mps=mps)
    torch.get_float32_matmul_precision = lambda: "highest"
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: has_cuda,
        device_count=lambda: 1,
        get_device_name=lambda index: f"GPU {index}",
        get_device_capability=lambda index: (8, 9),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    described = hardware.describe()
    assert described.devices[0][0] == kind
    assert described.devices[-1][0] == "cpu"
    assert described.compute_capability == capability
    assert described.backend_version == "2.0"


def test_float32_and_what_does_not_float_pass_without_a_look_at_the_device(
    monkeypatch, fresh_checks
):
    def fail():
        raise AssertionError("looked at the device")

    monkeypatch.setattr(hardware.matrix, "describe", fail)
    hardware.check_dtypes(["float32", "int8", "bool", "string", None, np.int32])
    with pytest.raises(AssertionError, match="looked"):
        hardware.check_dtypes(["float16"])


def test_a_checked_dtype_is_not_checked_again(monkeypatch, on):
    on(machine(keras.config.backend(), "tpu"))
    hardware.check_dtypes(["bfloat16"])
    monkeypatch.setattr(hardware.matrix, "describe", None)
    hardware.check_dtypes(["bfloat16"])


def test_float64_on_jax_without_x64_raises_every_time(on):
    on(machine("jax", is_x64=False))
    for path in ("model/dense", "model/dense_1"):
        with pytest.raises(ValueError, match="Received: dtype='float64'") as caught:
            hardware.check_dtypes(["float32", "float64"], layer_path=path)
        message = str(caught.value)
        for part in (f"'{path}'", "jax_enable_x64", "JAX_ENABLE_X64=1", "float32"):
            assert part in message
        assert "keras_precision.hardware.enable_float64()" in message
    assert MATRIX.current("float64").status == "unsupported"


@pytest.mark.skipif(not IS_JAX, reason="sets a JAX flag")
def test_enable_float64_lets_jax_keep_float64(fresh_checks):
    import jax

    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", False)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            hardware.check_dtypes(["float64"])
        hardware.enable_float64()
        hardware.check_dtypes(["float64"])
        assert hardware.describe().is_x64_enabled
        dtype = keras.backend.standardize_dtype(keras.ops.zeros(1, "float64").dtype)
        assert dtype == "float64"
        jax.config.update("jax_enable_x64", False)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            hardware.check_dtypes(["float64"])
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.skipif(IS_JAX, reason="JAX has a flag to set")
def test_float64_needs_nothing_elsewhere(on):
    hardware.enable_float64()
    on(machine(keras.config.backend()))
    hardware.check_dtypes(["float64"])


def test_dtype_without_a_kernel_raises(on):
    on(machine("tensorflow", "gpu", "9.0"))
    with pytest.raises(ValueError, match=r"'float8_e4m3fn' in layer 'a/b'.*MatMul"):
        hardware.check_dtypes(["float8_e4m3fn"], layer_path="a/b")


@pytest.mark.skipif(not IS_TENSORFLOW, reason="a limit of TensorFlow")
def test_tensorflow_multiplies_no_float8():
    import tensorflow as tf

    x = tf.cast(tf.ones((2, 2)), tf.dtypes.experimental.float8_e4m3fn)
    # The day this fails, the cells of float8 on TensorFlow are out of date.
    with pytest.raises((TypeError, tf.errors.OpError)):
        tf.matmul(x, x)


def test_slow_dtype_warns_once_a_process(on):
    on(machine("tensorflow"))
    match = "'conv'.*Use float32, or mixed_bfloat16"
    with pytest.warns(hardware.PrecisionWarning, match=match) as seen:
        hardware.check_dtypes(["float16"], layer_path="conv")
        hardware.check_dtypes(["float16"], layer_path="conv_1")
        hardware.check_dtypes([np.dtype("float16")])
    assert len(seen) == 1
    with pytest.warns(hardware.PrecisionWarning, match="float64"):
        on(machine("tensorflow", "gpu", "8.6"))
        hardware.check_dtypes(["float64"])


def test_warning_as_an_error_is_raised_once(on):
    on(machine("tensorflow"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(hardware.PrecisionWarning):
            hardware.check_dtypes(["float16"])
        hardware.check_dtypes(["float16"])


@pytest.mark.parametrize("described", [one for one, _, _ in MACHINES])
def test_best_policy_never_warns(on, described):
    on(described)
    policy = hardware.best_policy(described)
    hardware.check_dtypes([policy.removeprefix("mixed_"), "float32"])


def test_import_starts_no_device_and_no_backend():
    code = (
        "import sys, types\n"
        "sys.modules['keras'] = types.ModuleType('keras')\n"
        # A bare package in place of ours: only these modules are under test.
        "package = types.ModuleType('keras_precision')\n"
        f"package.__path__ = {list(sys.modules['keras_precision'].__path__)!r}\n"
        "sys.modules['keras_precision'] = package\n"
        "import keras_precision.dtypes, keras_precision.hardware\n"
        "loaded = {'jax', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
