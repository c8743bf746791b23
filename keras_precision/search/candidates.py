"""The policies that a search tries on each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_precision.layers import float8
from keras_precision.policies import registry
from keras_precision.policies.names import split_quantized
from keras_precision.policies.policy import float_name
from keras_precision.policies.quantized import QuantizedDTypePolicy, quantized_policy


def known_candidates(candidates: Iterable, counts_time: bool) -> list:
    """Returns the candidates in order, each once.

    Args:
        candidates: policies, their names, or bare formats.
        counts_time: whether seconds count, not bytes.

    Raises:
        TypeError: a single string, or no sequence.
        ValueError: there is none, one is unknown or of no use, or two go by one name.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise TypeError(f"Expected a sequence of candidates. Received: {candidates!r}. Pass ({candidates!r},).")
    found: dict[str, Any] = {}
    policies: dict[str, keras.DTypePolicy] = {}
    for candidate in candidates:
        policy = candidate_policy(candidate, keras.DTypePolicy("float32"))
        if float8.is_asked(policy) and not counts_time:
            raise ValueError(
                f"Expected candidates that can save bytes. Received: '{policy.name}', which keeps weights as they are "
                "and saves time alone. Leave it out, or save seconds: pass minimize='seconds' with a bound on loss or "
                "accuracy, or a budget of max_seconds."
            )
        name = getattr(candidate, "name", candidate)
        found.setdefault(name, candidate)
        if policies.setdefault(name, policy) != policy:
            raise ValueError(
                f"Expected candidates of different names, by which results tell them apart. Received: '{name}' twice, "
                "with different options. Search with one of them at a time."
            )
    if not found:
        raise ValueError("Expected at least one candidate. Received: none. Leave the argument out for the usual ones.")
    return list(found.values())


def candidate_policy(candidate, base: keras.DTypePolicy) -> keras.DTypePolicy:
    """Returns the policy that a candidate means for a layer.

    Args:
        candidate: a policy, its name, or a bare format, which takes the
            layer's own policy for its source.
        base: the layer's policy now.

    Raises:
        ValueError: unknown, a map, a format of Keras's own, or no float policy.
    """
    try:
        bare = split_quantized(candidate) if isinstance(candidate, str) else None
        is_bare = bare is not None and bare[1] is None
        policy = quantized_policy(bare[0], float_name(base)) if is_bare else registry.get(candidate)
    except (TypeError, ValueError) as e:
        raise ValueError(f"Expected candidates that are policies or formats. Received: {candidate!r}. {e}") from e
    is_ours = isinstance(policy, QuantizedDTypePolicy)
    is_float = policy.quantization_mode is None and keras.backend.is_float_dtype(policy.compute_dtype)
    if candidate is None or isinstance(policy, keras.dtype_policies.DTypePolicyMap) or not (is_ours or is_float):
        raise ValueError(
            f"Expected candidates that are float policies or formats of this library. Received: {candidate!r}. "
            "Pass names such as 'bfloat16' or formats of keras_precision.formats.FORMATS."
        )
    return policy
