"""Quantized dtype policies as immutable values."""

import difflib

import keras

from keras_precision.formats import FORMATS, Format
from keras_precision.kernels.measured import FEATURES_OF_FLOAT8
from keras_precision.policies.policy import DTypePolicy, default_name, parse_or_suggest

MULTIPLE_OF_FEATURES = 16
"""What float8 matrix units ask of a product's sizes: 16 bytes."""


@keras.saving.register_keras_serializable(package="keras_precision")
class QuantizedDTypePolicy(DTypePolicy, keras.dtype_policies.QuantizedDTypePolicy):
    """Stores a layer's weights in a quantized format and computes in a source policy.

    Args:
        mode: str, `"<format>"` or `"<format>/<option>"`, where the option is
            what the format takes: a block size or a threshold; see
            `keras_precision.formats.FORMATS`.
        source_name: str, name of the float policy that layers without a
            quantizable weight compute in, and that the decoded weights are
            computed in. None takes the global policy's.
        lora_rank: int >= 1, rank of the low-rank matrices that a layer trains
            beside its quantized weight; None for none. `enable_lora` gives
            layers such policies, so that files hold what it did.
        lora_alpha: number, by which over the rank their product is
            multiplied; None for the rank.

    Raises:
        TypeError: `mode` or `source_name` is not a string.
        ValueError: unknown format, one that keeps weights, an option that the format can't have,
            a source that is no float policy, or a rank that is no integer >= 1.

    Example:
        >>> policy = QuantizedDTypePolicy("nf4/128", "bf16-mixed")
        >>> policy.name, policy.quantization_mode, policy.block_size
        ('nf4/128_from_mixed_bfloat16', 'nf4', 128)
        >>> policy.source_policy.name
        'mixed_bfloat16'
    """

    def __init__(
        self,
        mode: str,
        source_name: str | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
    ):
        if lora_rank is not None and not (isinstance(lora_rank, int) and lora_rank >= 1):
            raise ValueError(f"Expected lora_rank to be an integer >= 1 or None. Received: lora_rank={lora_rank!r}.")
        alpha = lora_rank if lora_alpha is None else lora_alpha
        self._set_quantized_state(mode, source_name, _lora_rank=lora_rank, _lora_alpha=lora_rank and alpha)
        if self.format.keeps_weights:
            raise ValueError(
                f"Expected a format that stores weights. Received: mode={mode}, which keeps them. "
                "Use QuantizedFloat8DTypePolicy."
            )

    def _set_quantized_state(self, mode, source_name, **extra):
        entry = _parse_mode(mode)
        dtypes = parse_or_suggest(default_name() if source_name is None else source_name)
        if not dtypes.compute.startswith(("float", "bfloat")):
            raise ValueError(
                f"Cannot convert '{source_name}' to the source of a quantized policy. "
                "Expected a float policy. Pass 'float32' or 'mixed_bfloat16'."
            )
        self._set_state(
            name=f"{mode}_from_{dtypes.name}",
            dtypes=dtypes,
            quantization_mode=entry.name,
            _mode=mode,
            _source_name=dtypes.name,
            _format=entry,
            **extra,
        )

    @property
    def format(self) -> Format:
        """The format, with the block size or other option that the mode gives."""
        return self._format

    @property
    def block_size(self) -> int | None:
        """Elements that share one scale; None where scales are per channel or per tensor."""
        return self._format.block_size

    @property
    def lora_rank(self) -> int | None:
        """Rank of the low-rank matrices that are trained, None for none."""
        return self._lora_rank

    @property
    def lora_alpha(self) -> float | None:
        """What their product is multiplied by, over the rank."""
        return self._lora_alpha

    def with_lora(self, rank: int | None, alpha: float | None = None) -> "QuantizedDTypePolicy":
        """Returns the same policy with low-rank matrices, or without if the rank is None."""
        return type(self)(**{**self.get_config(), "lora_rank": rank, "lora_alpha": alpha})

    @property
    def source_policy(self) -> DTypePolicy:
        """The float policy that computes."""
        return DTypePolicy(self._source_name)

    def _value(self):
        return (self._name, self._lora_rank, self._lora_alpha)

    def __eq__(self, other):
        if not isinstance(other, keras.DTypePolicy):
            return NotImplemented
        # Keras's policy of the same name selects Keras's implementation, so it isn't equal.
        return type(other) is type(self) and other._value() == self._value()

    def __hash__(self):
        return hash(self._value())

    def get_config(self) -> dict:
        """Returns the constructor's arguments."""
        lora = {"lora_rank": self._lora_rank, "lora_alpha": self._lora_alpha} if self._lora_rank else {}
        return {"mode": self._mode, "source_name": self._source_name, **lora}


@keras.saving.register_keras_serializable(package="keras_precision")
class QuantizedFloat8DTypePolicy(QuantizedDTypePolicy, keras.dtype_policies.QuantizedFloat8DTypePolicy):
    """A policy whose layers train with 8-bit floating point products (Micikevicius et al. 2022).

    Dense and EinsumDense layers, those of attention included, round inputs
    and weights to e4m3, and gradients to e5m2, for all three products of a
    training step. Weights are stored as the source says.

    Args:
        mode: str, "float8" for one scale a tensor, from its own greatest
            magnitude; "float8/row" for one for each row that is contracted;
            "float8/delayed" for one a tensor from the greatest magnitudes of
            earlier steps, with the variables that Keras's float8 layers have,
            so that their checkpoints load; a layer may be called once a step
            then, as in Keras: the new scales of its calls are added up.
        source_name: str, name of the float policy; None takes the global one's.
        amax_history_length: int > 0, steps that "float8/delayed" looks back;
            None for 1024 there. Other modes take none.
        min_features: int >= 16; layers whose weight is, as a matrix, smaller
            than that on either side, or no multiple of 16, compute as the
            source says. Smaller ones than the default are no faster in float8.
        strict: bool, True to raise where the device has no float8 products,
            which are emulated there, with the same results and no speed.

    Raises:
        TypeError: an argument of another type.
        ValueError: one that is not in its range, or a mode that stores
            weights or keeps no history.

    Example:
        >>> QuantizedFloat8DTypePolicy("float8/delayed", "mixed_bfloat16").amax_history_length
        1024
    """

    def __init__(
        self,
        mode: str,
        source_name: str | None = None,
        amax_history_length: int | None = None,
        min_features: int = FEATURES_OF_FLOAT8,
        strict: bool = False,
    ):
        if amax_history_length is not None:
            _require_integer("amax_history_length", amax_history_length, 1)
        _require_integer("min_features", min_features, MULTIPLE_OF_FEATURES)
        options = {"_min_features": min_features, "_strict": bool(strict)}
        lora = {"_lora_rank": None, "_lora_alpha": None}
        self._set_quantized_state(mode, source_name, _amax_history_length=amax_history_length, **options, **lora)
        if not self.format.keeps_weights:
            keeping = [name for name, entry in FORMATS.items() if entry.keeps_weights]
            raise ValueError(
                f"Invalid quantization mode. Expected a format that keeps weights, one of {keeping}. "
                f"Received: mode={mode}. Use QuantizedDTypePolicy."
            )
        if amax_history_length is not None and not self.format.has_amax_history:
            raise ValueError(
                f"Mode '{mode}' takes its scales from the tensors themselves and keeps no history. "
                f"Received: amax_history_length={amax_history_length}. Pass '{self.quantization_mode}/delayed'."
            )

    @property
    def amax_history_length(self) -> int | None:
        """Steps that delayed scaling looks back; None for other scalings."""
        return (self._amax_history_length or self.default_amax_history_length) if self.format.has_amax_history else None

    @property
    def min_features(self) -> int:
        """Least number of rows and of columns of a weight that is multiplied in 8 bits."""
        return self._min_features

    @property
    def strict(self) -> bool:
        """Whether devices without float8 products are refused."""
        return self._strict

    def _value(self):
        return (self._name, self.amax_history_length, self._min_features, self._strict)

    def get_config(self) -> dict:
        """Returns the constructor's arguments."""
        history = {"amax_history_length": self.amax_history_length} if self.format.has_amax_history else {}
        options = {"min_features": self._min_features, "strict": self._strict}
        return {"mode": self._mode, "source_name": self._source_name, **history, **options}


def _require_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}. Pass {max(least, 1024)}.")
    if value < least:
        raise ValueError(f"Expected {name} >= {least}. Received: {name}={value}. Pass {max(least, 1024)}.")


def quantized_policy(mode: str, source_name: str | None = None) -> QuantizedDTypePolicy:
    """Returns the policy of the class that the format asks for.

    Args:
        mode: str, `"<format>"` or `"<format>/<option>"`.
        source_name: str, name of the float policy; None takes the global one's.
    """
    policy_class = QuantizedFloat8DTypePolicy if _parse_mode(mode).keeps_weights else QuantizedDTypePolicy
    return policy_class(mode, source_name)


def _parse_mode(mode):
    if not isinstance(mode, str):
        raise TypeError(
            f"Expected `mode` to be a string, one of {list(FORMATS)}. Received: mode={mode!r} "
            f"(of type {type(mode).__name__})."
        )
    name, slash, option = mode.partition("/")
    entry = FORMATS.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name.lower(), FORMATS, n=1, cutoff=0.4)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ValueError(
            f"Invalid quantization mode. Expected one of {list(FORMATS)}. Received: mode={mode}.{hint}"
        )
    return entry.with_option(option) if slash else entry
