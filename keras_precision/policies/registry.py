"""Policies by name: the built-in grammar and what users registered."""

from collections.abc import Iterator

import keras

from keras_precision import _bridge
from keras_precision.policies import names
from keras_precision.policies.policy import DTypePolicy, FloatDTypePolicy, parse_or_suggest
from keras_precision.policies.quantized import quantized_policy

_registered: dict[str, keras.DTypePolicy] = {}
# Names whose policy can't change while the process runs; filled by `get`.
_cache: dict[object, keras.DTypePolicy] = {}
_VARIABLE_NAMES = ("float",)  # follows floatx


def get(identifier=None) -> keras.DTypePolicy:
    """Returns the policy that `identifier` stands for.

    Args:
        identifier: None for the global policy; a policy (Keras's float
            policies become ours, which are equal; other policies are
            returned as they are); str, a name in the grammar, an alias or a
            registered name; int 16, 32 or 64, Lightning's precisions; a
            dtype; or the dict that `serialize` gave.

    Returns:
        A `keras.DTypePolicy`, in all but Keras-only cases one of this package's
        classes.

    Raises:
        TypeError: an identifier of another type.
        ValueError: an unknown name; the message gives the nearest valid one.

    Example:
        >>> get("bf16-true")
        <DTypePolicy "bfloat16">
        >>> get(16)
        <DTypePolicy "mixed_float16">
        >>> get("nf4/128_from_mixed_bfloat16").source_policy
        <DTypePolicy "mixed_bfloat16">
    """
    try:
        return _cache[identifier]
    except (KeyError, TypeError):  # TypeError: unhashable, a dict or a map
        pass
    if isinstance(identifier, str):
        return _from_name(identifier)
    if identifier is None:
        return get(keras.config.dtype_policy())
    if isinstance(identifier, keras.DTypePolicy):
        is_keras_float = type(identifier) in (keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy)
        return DTypePolicy(identifier.name) if is_keras_float else identifier
    if isinstance(identifier, dict):
        return deserialize(identifier)
    if isinstance(identifier, int) and not isinstance(identifier, bool) and str(identifier) in names.ALIASES:
        return _from_name(str(identifier))
    return _from_dtype(identifier)


def _from_name(name):
    if name in _registered:
        return _registered[name]
    split = names.split_quantized(name)
    if split is not None and split[1] is None:  # a bare format: its source is the global policy, so not cached
        return quantized_policy(*split)
    if split is not None:
        policy = quantized_policy(*split)
    elif "_from_" in name and name.partition("_from_")[0].partition("/")[0] in _bridge.quantization_modes():
        policy = _bridge.stock_get(name)  # gptq and awq: Keras alone has them
    else:
        policy = DTypePolicy(parse_or_suggest(name, list_policies()).name)
    if name not in _VARIABLE_NAMES:
        _cache[name] = policy
    return policy


def _from_dtype(identifier):
    try:
        dtype = keras.backend.standardize_dtype(identifier)
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(
            "Cannot interpret `dtype` argument. Expected a policy, its name, a dtype, or a serialized policy. "
            f"Received: {identifier!r} (of type {type(identifier).__name__}). Pass a name such as 'mixed_bfloat16'."
        ) from e
    return DTypePolicy(dtype)  # not `get`, which reads "int8" as the quantized format


def for_keras(identifier) -> keras.DTypePolicy | None:
    """Returns what stock Keras should use for `identifier`; None to leave it to Keras.

    Left to Keras is all that it knows: None, objects, dtypes, its float
    policies' names (which give equal policies), and the quantized names that
    it implements itself.
    """
    if isinstance(identifier, str):
        return None if _keras_parses(identifier) else get(identifier)
    if isinstance(identifier, int) and not isinstance(identifier, bool) and str(identifier) in names.ALIASES:
        return get(identifier)
    return None


def _keras_parses(name):
    if name in _registered:
        return False
    if name.startswith(_bridge.quantization_modes()):
        # Without a source Keras's message fits; with one, what Keras refuses is ours ("float8/row") or a typo of ours.
        return "_from_" not in name or _keras_takes(name)
    try:
        return name in names.MIXED or bool(keras.backend.standardize_dtype(name))
    except ValueError:
        return False


def _keras_takes(name):
    try:
        return bool(_bridge.stock_get(name))
    except ValueError:
        return False


def register_policy(name: str, policy) -> keras.DTypePolicy:
    """Makes `name` stand for `policy` in `dtype=`, `get`, maps, scopes and `set_policy`.

    Files hold the policy itself, never the registered name, so they load
    without the registration.

    Args:
        name: str, not a name that already means something else, and without
            `_from_`, `=` or `,`, which the grammar uses.
        policy: what `get` takes except None.

    Returns:
        The policy.

    Raises:
        TypeError: `name` is not a string.
        ValueError: the name is taken or malformed, or the policy is unknown.

    Example:
        >>> register_policy("team-default", "params=float32,compute=bfloat16,output=float32")
        <DTypePolicy "params=float32,compute=bfloat16,output=float32">
        >>> get("team-default").output_dtype
        'float32'
    """
    if not isinstance(name, str):
        raise TypeError(f"Expected `name` to be a string. Received: name={name!r} (of type {type(name).__name__}).")
    if not name.strip() or any(mark in name for mark in ("_from_", "=", ",")):
        raise ValueError(
            "Expected a non-empty name without '_from_', '=' and ','. "
            f"Received: name={name!r}. Pass a name such as 'team-default'."
        )
    if policy is None:
        raise ValueError(f"Expected a policy for name '{name}'. Received: None. Pass a policy or its name.")
    policy = get(policy)
    if _meaning(name) not in (None, policy):
        raise ValueError(f"Name '{name}' already stands for {_meaning(name)!r}. Register {policy!r} by another name.")
    _registered[name] = policy
    return policy


def _meaning(name):
    if name in _registered:
        return _registered[name]
    try:
        return get(name)
    except ValueError:
        return None


def list_policies() -> list[str]:
    """Returns every name that `get` takes, sorted: built-in, aliases, registered.

    Formats are listed with the usual sources; block sizes and jmp's
    combinations are left out, being too many.

    Example:
        >>> "mixed_bfloat16" in list_policies()
        True
    """
    return sorted({*names.builtin_names(), *_registered})


def serialize(policy: keras.DTypePolicy) -> dict:
    """Returns the JSON-ready dict that `deserialize` turns back into an equal policy.

    Float policies are written as Keras's own, so that files stay readable
    without this package where Keras knows the policy.

    Example:
        >>> deserialize(serialize(get("mixed_bfloat16")))
        <DTypePolicy "mixed_bfloat16">
    """
    return keras.dtype_policies.serialize(policy)


def deserialize(config: dict, custom_objects: dict | None = None) -> keras.DTypePolicy:
    """Returns the policy that `serialize` wrote.

    Args:
        config: dict with `class_name` and `config`.
        custom_objects: classes by name, for policies of your own.

    Raises:
        ValueError: `config` describes no policy.
    """
    is_config = isinstance(config, dict) and {"class_name", "config"} <= config.keys()
    policy = keras.dtype_policies.deserialize(config, custom_objects) if is_config else None
    if not isinstance(policy, keras.DTypePolicy):
        raise ValueError(f"Expected the config of a dtype policy. Received: {config}. Pass what `serialize` returned.")
    return get(policy)


def output_dtype(policy: keras.DTypePolicy) -> str:
    """Returns the policy's output dtype; Keras's own policies return what they compute in."""
    return getattr(policy, "output_dtype", policy.compute_dtype)


def policies_of(policy: keras.DTypePolicy) -> Iterator[keras.DTypePolicy]:
    """Yields the policies that `policy` may give to a layer: itself, or those of a map."""
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        yield policy.default_policy
        yield from policy.values()
    else:
        yield policy


_bridge.share_keras_name(DTypePolicy, keras.DTypePolicy)
_bridge.share_keras_name(FloatDTypePolicy, keras.dtype_policies.FloatDTypePolicy)
