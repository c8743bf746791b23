"""What a search may spend: loss, accuracy, bytes or seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from keras_precision.search.paired import Paired

Amount = float | str


@dataclasses.dataclass(frozen=True)
class Budget:
    """The one thing that a search has to keep within; what it minimises follows from it.

    An amount is a number, or a string with a percent sign for a share of what
    the model takes as it is: `max_loss_increase="1%"` is a hundredth of its
    loss, `max_bytes="40%"` two fifths of its bytes.

    Args:
        max_loss_increase: >= 0, mean increase of the loss a sample.
        max_accuracy_drop: >= 0, decrease of the accuracy, in [0, 1]; 0.01 is
            a point.
        max_bytes: > 0, of all weights.
        max_seconds: > 0, of a prediction of one batch.

    Raises:
        TypeError: an amount is neither a number nor a string.
        ValueError: not exactly one is given, or it is out of range.

    Example:
        >>> Budget(max_loss_increase="1%").resolved(0.5)
        0.005
    """

    max_loss_increase: Amount | None = None
    max_accuracy_drop: Amount | None = None
    max_bytes: Amount | None = None
    max_seconds: Amount | None = None

    def __post_init__(self):
        if len(self._given) != 1:
            names = ", ".join(field.name for field in dataclasses.fields(self))
            raise ValueError(f"Expected exactly one of {names}. Received: {self._given}. Pass one, such as '1%'.")
        _parsed(self.name, self.amount, at_least_zero=self.bounds_quality)

    @classmethod
    def of(cls, budget: Budget | Amount | Mapping[str, Amount]) -> Budget:
        """Returns the budget that a mapping of its arguments, or a bare amount of loss, stands for."""
        if isinstance(budget, cls):
            return budget
        if isinstance(budget, Mapping):
            known = [field.name for field in dataclasses.fields(cls)]
            unknown = sorted(set(budget) - set(known))
            if unknown:
                raise ValueError(f"Expected a budget with one of {known}. Received: {unknown}.")
            return cls(**budget)
        return cls(max_loss_increase=budget)

    @property
    def _given(self):
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def name(self) -> str:
        """The argument that was given."""
        return next(iter(self._given))

    @property
    def amount(self) -> Amount:
        """Its value."""
        return self._given[self.name]

    @property
    def bounds_quality(self) -> bool:
        """Whether it bounds loss or accuracy, so that cost is minimised; else cost is bounded and loss minimised."""
        return self.name in ("max_loss_increase", "max_accuracy_drop")

    @property
    def bounds_accuracy(self) -> bool:
        """Whether it bounds accuracy."""
        return self.name == "max_accuracy_drop"

    def resolved(self, base: float) -> float:
        """Returns the amount as a number, given what the model takes as it is."""
        share, number = _parsed(self.name, self.amount, at_least_zero=self.bounds_quality)
        return share * base + number

    def excess(self, paired: Paired, confidence: float) -> float:
        """Returns by how much an upper confidence limit of the increase, or of the drop, is above the bound.

        Args:
            paired: of losses; under a bound on accuracy, of errors.
            confidence: one-sided, in (0.5, 1).
        """
        share, number = _parsed(self.name, self.amount, at_least_zero=True)
        if self.bounds_accuracy:
            # A share is one of the accuracy; errors are 1 - accuracy.
            number += share * (1 - paired.base)
            return paired.excess(confidence, is_share=True) - number
        return paired.excess(confidence, share) - number

    def to_dict(self) -> dict[str, Amount]:
        """Returns the argument that was given."""
        return {self.name: self.amount}

    def __str__(self) -> str:
        return f"{self.name}={self.amount}"


def _parsed(name, amount, at_least_zero):
    """Returns (share of what the model takes, number)."""
    if isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise TypeError(f"Expected {name} to be a number or a string such as '1%'. Received: {name}={amount!r}.")
    is_share = isinstance(amount, str) and amount.strip().endswith("%")
    try:
        number = float(amount.strip().removesuffix("%")) if isinstance(amount, str) else float(amount)
    except ValueError as e:
        raise ValueError(
            f"Expected {name} to be a number or a string such as '1%'. Received: {name}={amount!r}."
        ) from e
    if not math.isfinite(number) or number < 0 or (number == 0 and not at_least_zero):
        raise ValueError(f"Expected {name} {'>= 0' if at_least_zero else '> 0'}. Received: {name}={amount!r}.")
    return (number / 100, 0.0) if is_share else (0.0, number)
