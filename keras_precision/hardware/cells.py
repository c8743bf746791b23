"""The support matrix as data: what each class of device does with each dtype.

A status is relative to float32 on the same device. "slow" means that a common
operation takes at least 8 times as long, which is where a user is better off
not asking for the dtype; "emulated" that the arithmetic runs in another dtype,
with conversions around it, between 0.9 and 8 times as long.

Sources, cited in the reasons by their short names:

- Lightning: its table "Precision with Accelerators" (pytorch 1.6 docs, N-Bit
  Precision), which has CPU, GPU and TPU but no capabilities, float8 or int8.
- CUDA guide: CUDA C++ Programming Guide, "Throughput of Native Arithmetic
  Instructions", results per clock per multiprocessor.
- Datasheet: NVIDIA's datasheet of the GPU named; dense, without sparsity.
- TE: NVIDIA Transformer Engine, "Datatype and hardware support matrix".
- Cloud TPU: Google's pages on v5e, v6e and TPU7x.
- Measured: by us, for the columns "cpu" on 2 cores of a Cascade Lake Xeon
  (AVX-512, no AMX) under jax 0.10.2 and TensorFlow 2.21.
"""

from typing import Literal
from typing import NamedTuple

Status = Literal["fast", "supported", "slow", "emulated", "unsupported"]


class Cell(NamedTuple):
    """How a device runs a dtype, compared with float32 on it, and why.

    Attributes:
        status: "fast" (pays over float32), "supported" (correct, no gain),
            "emulated" (correct, computed in another dtype), "slow" (correct,
            at least 8 times slower) or "unsupported".
        reason: One sentence with the number or the source behind the status.
    """

    status: Status
    reason: str


ROWS = ("float16", "bfloat16", "float32", "float64", "float8", "int8")

_REFERENCE = Cell("supported", "The reference that the other rows are compared with.")
_NO_BF16_UNIT = Cell(
    "emulated",
    "No bfloat16 arithmetic before capability 8.0 (CUDA guide); XLA and cuBLAS "
    "convert, and a T4 was over 4 times slower in it (openxla/xla#12429).",
)
_NO_FP8_UNIT = Cell(
    "emulated",
    "No float8 tensor cores before capability 8.9 (TE): it only saves memory.",
)
_HALF_FP64 = "64-bit units at half the float32 rate (CUDA guide: 32 against 64)."

_CPU = {
    "float16": Cell(
        "emulated",
        "Converted to float32 around each operation unless the CPU has AVX512-FP16.",
    ),
    "bfloat16": Cell(
        "emulated",
        "Converted to float32 around each operation unless the CPU has AVX512-BF16.",
    ),
    "float32": _REFERENCE,
    "float64": Cell(
        "supported",
        "Half as many lanes a vector: 2.1 to 5.2 times as long (measured).",
    ),
    "float8": Cell("emulated", "No CPU multiplies float8: it only saves memory."),
    "int8": Cell("supported", "Exact; AVX512-VNNI serves it where a library uses it."),
}

_GPU_6_0 = {
    "float16": Cell(
        "supported",
        "Vector units at twice the float32 rate (CUDA guide: 128 against 64) but no "
        "tensor cores: matrix products summed in float32 gain nothing.",
    ),
    "bfloat16": _NO_BF16_UNIT,
    "float32": _REFERENCE,
    "float64": Cell("supported", _HALF_FP64),
    "float8": _NO_FP8_UNIT,
    "int8": Cell("emulated", "No DP4A instruction before capability 6.1 (CUDA guide)."),
}
_GPU_6_1 = {
    **_GPU_6_0,
    "float16": Cell(
        "emulated",
        "Native rate 1/64 of float32 (CUDA guide: 2 against 128), so libraries "
        "convert to float32: it only saves memory.",
    ),
    "float64": Cell("slow", "1/32 of the float32 rate (CUDA guide: 4 against 128)."),
    "int8": Cell("supported", "DP4A, but no tensor cores, and XLA does not use it."),
}
_GPU_7_0 = {
    **_GPU_6_0,
    "float16": Cell(
        "fast",
        "Tensor cores: V100 125 TFLOP/s against 15.7 in float32 (Datasheet).",
    ),
    "int8": Cell("supported", "DP4A, but no int8 tensor cores before 7.5."),
}
_GPU_7_5 = {
    **_GPU_7_0,
    "float16": Cell(
        "fast", "Tensor cores: T4 65 TFLOP/s against 8.1 in float32 (Datasheet)."
    ),
    "float64": Cell("slow", "1/32 of the float32 rate (CUDA guide: 2 against 64)."),
    "int8": Cell("fast", "Tensor cores: T4 130 TOP/s (Datasheet)."),
}
_GPU_8_0 = {
    "float16": Cell(
        "fast",
        "Tensor cores: A100 312 TFLOP/s against 156 in TF32 (Datasheet).",
    ),
    "bfloat16": Cell(
        "fast",
        "Tensor cores: A100 312 TFLOP/s against 156 in TF32 (Datasheet), with the "
        "range of float32, so no loss scaling.",
    ),
    "float32": _REFERENCE,
    "float64": Cell("supported", "Tensor cores: A100 19.5 TFLOP/s (Datasheet)."),
    "float8": _NO_FP8_UNIT,
    "int8": Cell("fast", "Tensor cores: A100 624 TOP/s (Datasheet)."),
}
_GPU_8_6 = {
    **_GPU_8_0,
    "float16": Cell(
        "fast", "Tensor cores: A10 125 TFLOP/s, 31 in float32 (Datasheet)."
    ),
    "bfloat16": Cell(
        "fast", "Tensor cores: A10 125 TFLOP/s, 31 in float32 (Datasheet)."
    ),
    "float64": Cell("slow", "1/64 of the float32 rate (CUDA guide: 2 against 128)."),
    "int8": Cell("fast", "Tensor cores: A10 250 TOP/s (Datasheet)."),
}
_GPU_8_9 = {
    **_GPU_8_6,
    "float16": Cell("fast", "Tensor cores: L4 121 TFLOP/s, 30 in float32 (Datasheet)."),
    "bfloat16": Cell(
        "fast", "Tensor cores: L4 121 TFLOP/s, 30 in float32 (Datasheet)."
    ),
    "float8": Cell(
        "fast",
        "Tensor cores at twice the bfloat16 rate (TE: from 8.9), if both operands "
        "hold the contraction axis last.",
    ),
    "int8": Cell("fast", "Tensor cores: L4 242 TOP/s (Datasheet)."),
}
_GPU_9_0 = {
    **_GPU_8_9,
    "float16": Cell("fast", "Tensor cores: H100 989 TFLOP/s, 495 in TF32 (Datasheet)."),
    "bfloat16": Cell(
        "fast",
        "Tensor cores: H100 989 TFLOP/s, 495 in TF32 (Datasheet); measured 806.",
    ),
    "float64": Cell("supported", "Tensor cores: H100 67 TFLOP/s (Datasheet)."),
    "float8": Cell(
        "fast",
        "Measured on an H100, 8192x4096x14336: 1602 TFLOP/s against 806 in bfloat16 "
        "if both operands hold the contraction axis last, else 920.",
    ),
    "int8": Cell(
        "fast",
        "Measured on an H100, 8192x4096x14336: 1495 TOP/s against 806 in bfloat16 if "
        "both operands hold the contraction axis last, else 888.",
    ),
}
_BLACKWELL_16 = Cell(
    "fast", "Tensor cores: B200 about 2250 TFLOP/s, half that in TF32 (Datasheet)."
)
_GPU_10_0 = {
    **_GPU_9_0,
    "float16": _BLACKWELL_16,
    "bfloat16": _BLACKWELL_16,
    "float64": Cell("supported", "About half the float32 rate on a B200 (Datasheet)."),
    "float8": Cell("fast", "Tensor cores at twice the bfloat16 rate (TE, Datasheet)."),
    "int8": Cell(
        "fast", "Tensor cores at twice the bfloat16 rate on a B200 (Datasheet)."
    ),
}
_GPU_10_3 = {
    **_GPU_10_0,
    "float64": Cell("slow", "1/64 of the float32 rate: B300 1.2 TFLOP/s (Datasheet)."),
    "int8": Cell(
        "supported", "B300 cut its int8 rate far below bfloat16's (Datasheet)."
    ),
}
_GPU_12_0 = {
    **_GPU_8_9,
    "float16": Cell("fast", "Tensor cores of consumer Blackwell (TE: 12.0)."),
    "bfloat16": Cell("fast", "Tensor cores of consumer Blackwell (TE: 12.0)."),
    "int8": Cell("fast", "Tensor cores of consumer Blackwell."),
}

_UNTRIED_GPU = (
    "Not an NVIDIA GPU (ROCm, Metal, ...): runs, but we have measured no gain, so "
    '"auto" does not choose it.'
)

# Columns. A GPU belongs to the last column whose capability is not above its own.
CELLS: dict[str, dict[str, Cell]] = {
    "cpu": _CPU,
    "cpu-amx": {
        **_CPU,
        "bfloat16": Cell(
            "supported", "AMX multiplies it; not measured on this backend."
        ),
    },
    "gpu-6.0": _GPU_6_0,
    "gpu-6.1": _GPU_6_1,
    "gpu-7.0": _GPU_7_0,
    "gpu-7.5": _GPU_7_5,
    "gpu-8.0": _GPU_8_0,
    "gpu-8.6": _GPU_8_6,
    "gpu-8.9": _GPU_8_9,
    "gpu-9.0": _GPU_9_0,
    "gpu-10.0": _GPU_10_0,
    "gpu-10.3": _GPU_10_3,
    "gpu-12.0": _GPU_12_0,
    "gpu-other": {
        "float16": Cell("supported", _UNTRIED_GPU),
        "bfloat16": Cell("supported", _UNTRIED_GPU),
        "float32": _REFERENCE,
        "float64": Cell("supported", "ROCm runs it; Metal has no float64."),
        "float8": Cell("emulated", _UNTRIED_GPU),
        "int8": Cell("supported", _UNTRIED_GPU),
    },
    "tpu": {
        "float16": Cell(
            "supported",
            "Stored as such, but matrix units multiply bfloat16: no gain over it, and "
            "a smaller range. Lightning: no.",
        ),
        "bfloat16": Cell(
            "fast",
            "The matrix units' own dtype: 197 TFLOP/s on v5e, 918 on v6e (Cloud TPU).",
        ),
        "float32": Cell(
            "supported",
            "The reference; matrix products round their operands to bfloat16 unless "
            'the matmul precision is "highest".',
        ),
        "float64": Cell(
            "slow",
            "Emulated by pairs of float32, and some operations are missing "
            "(jax-ml/jax#19769). Lightning: no.",
        ),
        "float8": Cell(
            "supported",
            "At the bfloat16 rate up to v6e (918 TFLOP/s both), at twice it on TPU7x "
            "(4614 against 2307) (Cloud TPU).",
        ),
        "int8": Cell(
            "fast",
            "Twice the bfloat16 rate from v5e on (393 TOP/s against 197) (Cloud TPU).",
        ),
    },
}

_TENSORFLOW_CPU_FLOAT16 = Cell(
    "slow",
    "Convolutions take up to 50 times as long as in float32, their gradients at "
    "least 13 times; dense layers take 1.1 times as long (measured).",
)

# What a backend does with a column differently. The device class None stands
# for every column that has no entry of its own.
BACKEND_CELLS: dict[tuple[str, str | None, str], Cell] = {
    ("tensorflow", "cpu", "float16"): _TENSORFLOW_CPU_FLOAT16,
    ("tensorflow", "cpu-amx", "float16"): _TENSORFLOW_CPU_FLOAT16,
    ("tensorflow", "cpu", "bfloat16"): Cell(
        "emulated",
        "Without AVX512-BF16 or AMX: matrix products take 3.5 times as long as in "
        "float32, convolutions 2.6 (measured).",
    ),
    ("tensorflow", "cpu-amx", "bfloat16"): Cell(
        "fast", "Matrix products 5.6 times faster than in float32, by AMX (measured)."
    ),
    ("tensorflow", "cpu", "int8"): Cell(
        "slow",
        "tf.matmul into int32 takes 7 to 9 times as long as float32 (measured, 1024 "
        "and 2048 square).",
    ),
    ("tensorflow", "cpu-amx", "int8"): Cell(
        "slow", "tf.matmul into int32 has the same kernel with and without AMX."
    ),
    ("tensorflow", None, "float8"): Cell(
        "unsupported",
        "TensorFlow 2.21 stores and casts float8, but MatMul and Conv2D reject it.",
    ),
    ("torch", None, "float8"): Cell(
        "unsupported", "PyTorch stores and casts float8, but torch.matmul rejects it."
    ),
    ("jax", "cpu", "float16"): Cell(
        "emulated",
        "XLA converts to float32 around products; 1.2 times as long for matrix "
        "products and 3x3 convolutions (measured).",
    ),
    ("jax", "cpu", "bfloat16"): Cell(
        "emulated",
        "XLA converts to float32 around products; 1.2 times as long for matrix "
        "products and 3x3 convolutions (measured).",
    ),
    ("jax", "cpu-amx", "bfloat16"): Cell(
        "supported", "Slower than float32 although the CPU has AMX (measured)."
    ),
    ("jax", "cpu", "float8"): Cell(
        "emulated", "XLA converts: 0.9 to 1.3 times as long (measured)."
    ),
}

# JAX turns float64 into float32 unless told not to, on any device.
X64_IS_OFF = Cell(
    "unsupported", "JAX makes float64 float32 while jax_enable_x64 is off."
)
