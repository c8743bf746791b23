"""The grammar of float policy names."""

from functools import lru_cache
from typing import NamedTuple

import keras

from keras_precision import hardware
from keras_precision.formats import FORMATS

# Names of other libraries, each with the Keras name that means the same.
ALIASES: dict[str, str] = {
    # Lightning: `Trainer(precision=...)`.
    "16-mixed": "mixed_float16",
    "bf16-mixed": "mixed_bfloat16",
    "16-true": "float16",
    "bf16-true": "bfloat16",
    "32-true": "float32",
    "64-true": "float64",
    "16": "mixed_float16",
    "32": "float32",
    "64": "float64",
    "bf16": "mixed_bfloat16",
    # jmp: a bare dtype is params, compute and output at once.
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "full": "float32",
    # APEX: O1 patches operations, O2 keeps float32 master weights; with Keras both are
    # float32 variables computed in float16. O3 is float16 throughout.
    "O0": "float32",
    "O1": "mixed_float16",
    "O2": "mixed_float16",
    "O3": "float16",
}

# Names whose meaning depends on the device; each is asked once, when first used.
DEVICE_ALIASES = {
    "auto": hardware.best_policy,
    # jmp's half: bfloat16 on a TPU, float16 elsewhere.
    "half": lambda: "bfloat16" if hardware.device_class() == "tpu" else "float16",
}

MIXED = ("mixed_float16", "mixed_bfloat16")
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_JMP_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "full": "float32"}
_JMP_FIELDS = {
    "p": "variable", "params": "variable",
    "c": "compute", "compute": "compute",
    "o": "output", "output": "output",
}  # fmt: skip


class DTypes(NamedTuple):
    """The three dtypes of a float policy.

    Attributes:
        variable: stores the weights.
        compute: what inputs and weights are cast to.
        output: what a layer's outputs are cast to.
    """

    variable: str
    compute: str
    output: str

    @property
    def name(self) -> str:
        """The canonical name: Keras's where it has one, else jmp's long form."""
        variable, compute, output = self
        if variable == compute == output:
            return compute
        if output == compute and variable == "float32" and f"mixed_{compute}" in MIXED:
            return f"mixed_{compute}"
        return f"params={variable},compute={compute},output={output}"


def parse(name: str) -> DTypes:
    """Returns the dtypes that a float policy's name stands for.

    Args:
        name: a Keras dtype or mixed policy name, an alias of ALIASES or
            DEVICE_ALIASES, or jmp's `params=...,compute=...,output=...`
            (`p`, `c`, `o`; params default to float32, compute to params,
            output to compute).

    Raises:
        ValueError: the name is none of these; the message ends without a
            full stop so that the caller can add the nearest valid name.
    """
    if name == "float":  # Keras's name for floatx, which may change: not cached.
        name = keras.config.floatx()
    return _parse(name)


@lru_cache(maxsize=1024)
def _parse(name):
    name = ALIASES.get(name, name)
    if name in DEVICE_ALIASES:
        name = DEVICE_ALIASES[name]()
    if name in MIXED:
        compute = name.removeprefix("mixed_")
        return DTypes("float32", compute, compute)
    if "=" in name:
        return _parse_jmp(name)
    try:
        dtype = keras.backend.standardize_dtype(name)
    except ValueError as e:
        raise ValueError(f"Cannot convert '{name}' to a DTypePolicy") from e
    return DTypes(dtype, dtype, dtype)


def _parse_jmp(name):
    fields = {}
    for part in name.split(","):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in _JMP_FIELDS or _JMP_FIELDS[key] in fields:
            raise ValueError(
                f"Cannot convert '{name}' to a DTypePolicy. Expected each of params, compute, "
                f"output (or p, c, o) at most once. Received: '{part}'"
            )
        if value == "half":
            value = DEVICE_ALIASES[value]()
        value = _JMP_DTYPES.get(value, value)
        if value not in FLOAT_DTYPES:
            raise ValueError(
                f"Cannot convert '{name}' to a DTypePolicy. Expected a dtype of {FLOAT_DTYPES} "
                f"or a short form of {tuple(_JMP_DTYPES)}. Received: '{part}'"
            )
        fields[_JMP_FIELDS[key]] = value
    variable = fields.get("variable", "float32")
    compute = fields.get("compute", variable)
    return DTypes(variable, compute, fields.get("output", compute))


def split_quantized(name: str) -> tuple[str, str | None] | None:
    """Splits `<format>[/<block_size>][_from_<source>]`.

    Returns:
        (mode, source name or None), or None if the name does not start with
        a registered format.
    """
    mode, separator, source = name.partition("_from_")
    if mode.partition("/")[0] not in FORMATS:
        return None
    return mode, source if separator else None


def builtin_names() -> list[str]:
    """Every name that needs no registration, formats spelled out for the usual sources."""
    sources = [*FLOAT_DTYPES, *MIXED]
    quantized = [f"{fmt}_from_{source}" for fmt in FORMATS for source in sources]
    return [*sources, *ALIASES, *DEVICE_ALIASES, *quantized]
