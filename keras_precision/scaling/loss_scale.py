"""Loss scales as pure state machines."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import keras
from keras import ops


class LossScaleState(NamedTuple):
    """Everything that a loss scale remembers between steps; a pytree of scalar tensors.

    Attributes:
        scale: float32, what the next loss is multiplied by.
        good_steps: int32, finite steps since the scale last changed.
        bad_steps: int32, non-finite steps that hysteresis has let pass since
            the scale last changed.
        consecutive_skips: int32, non-finite steps in a row up to now.
        skipped_steps: int32, non-finite steps in all.
    """

    scale: Any
    good_steps: Any
    bad_steps: Any
    consecutive_skips: Any
    skipped_steps: Any


def found_inf(gradients) -> Any:
    """Returns a bool scalar: whether any value of a structure of gradients is inf or NaN.

    Args:
        gradients: nested structure of tensors, None where there is none.
    """
    found = [ops.logical_not(ops.all(ops.isfinite(g))) for g in keras.tree.flatten(gradients) if g is not None]
    return ops.any(ops.stack(found)) if found else ops.convert_to_tensor(False)


def _scaled(structure, factor):
    """Returns the structure in float32, times a float32 scalar; None stays None."""
    return keras.tree.map_structure(lambda x: None if x is None else ops.cast(x, "float32") * factor, structure)


@dataclass(frozen=True)
class StaticLossScale:
    """Multiplies the loss by a constant, and counts steps whose gradients are not finite.

    Args:
        initial_scale: float > 0, finite.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> loss_scale = StaticLossScale(128.0)
        >>> state = loss_scale.init()
        >>> float(loss_scale.scale(state, ops.convert_to_tensor(2.0)))
        256.0
        >>> float(loss_scale.unscale(state, ops.convert_to_tensor(256.0)))
        2.0
    """

    initial_scale: float = 2.0**15

    def __post_init__(self):
        _require(self, "initial_scale", 0 < self.initial_scale < math.inf, "> 0 and finite")

    def init(self) -> LossScaleState:
        """Returns the state before the first step."""
        zero = ops.zeros((), "int32")
        return LossScaleState(ops.full((), self.initial_scale, dtype="float32"), zero, zero, zero, zero)

    def scale(self, state: LossScaleState, loss):
        """Returns the loss (a structure of tensors) times the scale, in float32."""
        return _scaled(loss, state.scale)

    def unscale(self, state: LossScaleState, gradients):
        """Returns gradients (a structure; None stays None) divided by the scale, in float32.

        In float32 first: a float16 gradient of 2**-24 over a scale of 2**15
        would be 0 in float16.
        """
        return _scaled(gradients, 1.0 / state.scale)

    def update(self, state: LossScaleState, found_inf) -> LossScaleState:
        """Returns the state after a step.

        Args:
            state: the state that the step's loss was scaled with.
            found_inf: bool scalar tensor, whether its gradients hold inf or
                NaN, so that the step is skipped.
        """
        skipped = ops.cast(found_inf, "int32")
        return state._replace(
            consecutive_skips=(state.consecutive_skips + 1) * skipped, skipped_steps=state.skipped_steps + skipped
        )

    def get_config(self) -> dict:
        """Returns the constructor's arguments."""
        return asdict(self)


@dataclass(frozen=True)
class NoLossScale(StaticLossScale):
    """Scales by 1: the null object, for code that takes any loss scale. Counts skipped steps too."""

    initial_scale: float = 1.0

    def __post_init__(self):
        _require(self, "initial_scale", self.initial_scale == 1, "1; use StaticLossScale for another")


@dataclass(frozen=True)
class DynamicLossScale(StaticLossScale):
    """Keeps the loss scale just below where gradients overflow.

    A step with inf or NaN gradients multiplies the scale by `backoff_factor`,
    and `growth_interval` finite steps in a row multiply it by `growth_factor`
    (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). It
    never leaves [min_scale, max_scale].

    Args:
        initial_scale: float within [min_scale, max_scale].
        growth_factor: float > 1.
        backoff_factor: float within (0, 1).
        growth_interval: int >= 1, in steps.
        min_scale: float > 0. At 0 the loss would vanish and 1 / scale would be inf.
        max_scale: float >= min_scale, finite. 2**24 times a loss of 1 is
            far above float16's range already, so a larger scale can only overflow.
        hysteresis: int >= 1, non-finite steps that it takes to back off.
            A step that only counts is still skipped.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> loss_scale = DynamicLossScale(initial_scale=1024.0, growth_interval=2)
        >>> state = loss_scale.update(loss_scale.init(), found_inf(ops.convert_to_tensor([1.0, float("inf")])))
        >>> float(state.scale), int(state.skipped_steps)
        (512.0, 1)
        >>> for _ in range(2):
        ...     state = loss_scale.update(state, ops.convert_to_tensor(False))
        >>> float(state.scale), int(state.good_steps)
        (1024.0, 0)
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 1

    def __post_init__(self):
        _require(self, "min_scale", 0 < self.min_scale < math.inf, "> 0 and finite")
        _require(self, "max_scale", self.min_scale <= self.max_scale < math.inf, ">= min_scale and finite")
        in_range = self.min_scale <= self.initial_scale <= self.max_scale
        _require(self, "initial_scale", in_range, f"within [{self.min_scale}, {self.max_scale}]")
        _require(self, "growth_factor", 1 < self.growth_factor < math.inf, "> 1 and finite")
        _require(self, "backoff_factor", 0 < self.backoff_factor < 1, "within (0, 1)")
        for name in ("growth_interval", "hysteresis"):
            value = getattr(self, name)
            _require(self, name, isinstance(value, int) and value >= 1, "an integer >= 1")

    def update(self, state: LossScaleState, found_inf) -> LossScaleState:
        """Returns the state after a step; see `StaticLossScale.update`."""
        state = super().update(state, found_inf)
        bad = ops.cast(found_inf, "int32")
        good_steps = (state.good_steps + 1) * (1 - bad)
        bad_steps = state.bad_steps + bad
        grows = ops.greater_equal(good_steps, self.growth_interval)
        backs_off = ops.greater_equal(bad_steps, self.hysteresis)
        factor = ops.where(backs_off, self.backoff_factor, ops.where(grows, self.growth_factor, 1.0))
        changed = ops.cast(ops.logical_or(grows, backs_off), "int32")
        return state._replace(
            scale=ops.clip(state.scale * ops.cast(factor, "float32"), self.min_scale, self.max_scale),
            good_steps=good_steps * (1 - changed),
            bad_steps=bad_steps * (1 - changed),
        )


def _require(loss_scale, name, holds, expected):
    if not holds:
        raise ValueError(
            f"Expected {name} {expected} in {type(loss_scale).__name__}. Received: {name}={getattr(loss_scale, name)!r}."
        )
