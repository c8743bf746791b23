"""Float dtype policies as immutable values."""

import difflib

import keras

from keras_precision.policies import names


class DTypePolicy(keras.dtype_policies.FloatDTypePolicy):
    """Says which dtype stores a layer's weights, which computes, and which it returns.

    Equal to, and usable in place of, the Keras policy of the same name; also
    immutable and hashable, with an output dtype of its own.

    Args:
        name: str, any float policy name: Keras's (`"float32"`,
            `"mixed_bfloat16"`), an alias (`"bf16-true"`, `"O2"`, `"auto"`), or
            jmp's `"params=float32,compute=bfloat16,output=float32"`. None
            takes the global policy's name, or its source's.

    Raises:
        TypeError: `name` is not a string.
        ValueError: no policy has that name; the message gives the nearest.

    Example:
        >>> policy = DTypePolicy("p=f32,c=bf16,o=f32")
        >>> policy.variable_dtype, policy.compute_dtype, policy.output_dtype
        ('float32', 'bfloat16', 'float32')
        >>> DTypePolicy("bf16-mixed") == keras.DTypePolicy("mixed_bfloat16")
        True
    """

    def __init__(self, name: str | None = None):
        dtypes = parse_or_suggest(default_name() if name is None else name)
        self._set_state(name=dtypes.name, dtypes=dtypes)

    def _set_state(self, *, name, dtypes, quantization_mode=None, **extra):
        self.__dict__.update(
            _name=name,
            _compute_dtype=dtypes.compute,
            _variable_dtype=dtypes.variable,
            _output_dtype=dtypes.output,
            _quantization_mode=quantization_mode,
            _is_frozen=True,
            **extra,
        )

    @property
    def output_dtype(self) -> str:
        """The dtype that float outputs of a layer are cast to."""
        return self._output_dtype

    def __setattr__(self, attribute, value):
        if self.__dict__.get("_is_frozen"):
            raise AttributeError(
                f"A policy can't be changed. Received: {attribute}={value!r} for {self!r}. "
                "Make a new policy, and pass it to `keras_precision.set_policy` to convert a model."
            )
        super().__setattr__(attribute, value)

    def __delattr__(self, attribute):
        raise AttributeError(f"A policy can't be changed. Received: del of {attribute} for {self!r}.")

    def __eq__(self, other):
        if not isinstance(other, keras.DTypePolicy):
            return NotImplemented
        return type(other) in _PLAIN_CLASSES and other.name == self.name

    def __hash__(self):
        return hash(self._name)


class FloatDTypePolicy(DTypePolicy):
    """`DTypePolicy` under Keras's second name for it."""


_PLAIN_CLASSES = (DTypePolicy, FloatDTypePolicy, keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy)


def default_name() -> str:
    """Returns the name of the float policy that the global policy, or a global map's default, computes in."""
    policy = keras.config.dtype_policy()
    return float_name(getattr(policy, "default_policy", policy))


def float_name(policy: keras.DTypePolicy) -> str:
    """Returns a float policy's name, and of a quantized policy, Keras's too, its source's."""
    return policy.name.rpartition("_from_")[2]


def parse_or_suggest(name: str, known: list[str] | None = None) -> names.DTypes:
    """Returns the dtypes behind a float policy's name.

    Args:
        name: the name to parse.
        known: names to suggest the nearest of; those of the grammar if None.

    Raises:
        TypeError: `name` is not a string.
        ValueError: unknown name; names the nearest valid one.
    """
    if not isinstance(name, str):
        raise TypeError(
            "'name' must be a string, such as 'mixed_float16'. "
            f"Received: name={name!r} (of type {type(name).__name__}). "
            "Use `keras_precision.get` for other kinds of identifiers."
        )
    try:
        return names.parse(name)
    except ValueError as e:
        if names.split_quantized(name):
            hint = "A float policy's name is expected here; `keras_precision.get` takes quantized ones too."
            raise ValueError(f"{e}. {hint}") from None
        if "=" in name:  # jmp's form: the nearest of the plain names would mislead
            raise ValueError(f"{e}. Pass a name such as 'params=float32,compute=bfloat16,output=float32'.") from None
        nearest = difflib.get_close_matches(name, known or names.builtin_names(), n=1, cutoff=0.4)
        hint = f"Did you mean '{nearest[0]}'?" if nearest else "`keras_precision.list_policies()` gives the valid names."
        raise ValueError(f"{e}. {hint}") from None
