"""The global policy: one for the process, and scopes that replace it for a while."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import keras

from keras_precision import hardware
from keras_precision.policies import registry


class _Scope:
    """The policy of one active `policy_scope`."""

    def __init__(self, policy):
        self.policy = policy


_process_policy: keras.DTypePolicy | None = None
_active_scope: ContextVar[_Scope | None] = ContextVar("keras_precision_policy_scope", default=None)


def current() -> keras.DTypePolicy | None:
    """Returns the policy of the innermost scope, else the process's; None if none was ever set."""
    scope = _active_scope.get()
    return _process_policy if scope is None else scope.policy


def replace(policy: keras.DTypePolicy) -> None:
    """Makes `policy` the innermost scope's for the rest of that scope; outside scopes, the process's."""
    global _process_policy
    scope = _active_scope.get()
    if scope is None:
        _process_policy = policy
    else:
        scope.policy = policy


def global_policy() -> keras.DTypePolicy:
    """Returns the policy of layers that are given none.

    It is the one that `set_global_policy` last set in any thread, or that of
    the innermost `policy_scope` of this thread; a policy of
    `keras.config.floatx()` if none was set.
    `keras.config.dtype_policy()` returns an equal one.

    Example:
        >>> with policy_scope("mixed_bfloat16"):
        ...     global_policy()
        <DTypePolicy "mixed_bfloat16">
    """
    return registry.get(keras.config.dtype_policy())


def set_global_policy(policy) -> None:
    """Sets the policy of layers that are given none, for every thread.

    `keras.utils.clear_session` does not undo it. Inside a `policy_scope` it
    replaces that scope's policy until the scope ends.

    Args:
        policy: a policy, a `DTypePolicyMap`, or anything that
            `keras_precision.get` takes except None.

    Raises:
        ValueError: unknown name, or the device can't compute in it.

    Example:
        >>> before = global_policy()
        >>> set_global_policy("mixed_float16")
        >>> keras.layers.Dense(8).compute_dtype
        'float16'
        >>> set_global_policy(before)
    """
    keras.config.set_dtype_policy(_checked(policy))


@contextlib.contextmanager
def _entered(policy) -> Iterator[keras.DTypePolicy]:
    token = _active_scope.set(_Scope(policy))
    try:
        yield policy
    finally:
        _active_scope.reset(token)


def policy_scope(policy) -> contextlib.AbstractContextManager:
    """Makes `policy` the global policy inside a `with` block or a decorated function.

    Scopes nest, end with the block even when it raises, and are seen by their
    own thread only.

    Args:
        policy: as for `set_global_policy`.

    Returns:
        A context manager that gives the policy, and that also decorates
        functions.

    Raises:
        ValueError: unknown name, or the device can't compute in it; raised
            here, not when the scope is entered.

    Example:
        >>> with policy_scope("mixed_bfloat16"):
        ...     layer = keras.layers.Dense(8)
        >>> layer.compute_dtype
        'bfloat16'
    """
    return _entered(_checked(policy))


def _checked(policy):
    if policy is None:
        raise ValueError(
            "Invalid `policy` argument. Expected a policy or its name, such as 'mixed_bfloat16'. Received: policy=None."
        )
    policy = registry.get(policy)
    for used in registry.policies_of(policy):
        hardware.check_dtypes((used.compute_dtype, used.variable_dtype, registry.output_dtype(used)))
    return policy


