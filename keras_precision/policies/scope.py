"""The global policy: one for the process, and scopes that replace it for a while."""

import contextlib
import inspect
from contextvars import ContextVar

import keras

from keras_precision import hardware
from keras_precision.policies import registry


class _Scope:
    """The policy of one active `policy_scope`, and the scope around it."""

    def __init__(self, policy, outer):
        self.policy = policy
        self.outer = outer


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


class _PolicyScope(contextlib.ContextDecorator):
    """Context manager and decorator that keeps nothing of its own, so that one object can be used again and nested."""

    def __init__(self, policy):
        self._policy = policy

    def __enter__(self):
        _active_scope.set(_Scope(self._policy, _active_scope.get()))
        return self._policy

    def __exit__(self, *exception):
        _active_scope.set(_active_scope.get().outer)

    def __call__(self, function):
        runs_later = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(check(function) for check in runs_later):
            raise TypeError(
                f"Expected a plain function to decorate. Received: {function!r}, whose body runs after the decorator has "
                "left the scope. Write `with policy_scope(...):` inside it."
            )
        return super().__call__(function)


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
        TypeError: it decorates a generator or a coroutine.
        ValueError: unknown name, or the device can't compute in it; raised
            here, not when the scope is entered.

    Example:
        >>> with policy_scope("mixed_bfloat16"):
        ...     layer = keras.layers.Dense(8)
        >>> layer.compute_dtype
        'bfloat16'
    """
    return _PolicyScope(_checked(policy))


def _checked(policy):
    if policy is None:
        raise ValueError(
            "Invalid `policy` argument. Expected a policy or its name, such as 'mixed_bfloat16'. Received: policy=None."
        )
    try:
        policy = registry.get(policy)
    except (TypeError, ValueError) as e:
        raise ValueError(f"Invalid `policy` argument. {e}") from e
    for used in registry.policies_of(policy):
        hardware.check_dtypes((used.compute_dtype, used.variable_dtype, registry.output_dtype(used)))
    return policy


