"""Which variables of Keras's optimizers are states that few bits can hold, and which of those are never negative."""

import keras

optimizers = keras.optimizers

KEPT = frozenset({"average", "gradient_accumulator"})
"""Not states of an optimizer: averages of the weights, and sums of gradients. They stay float32."""

COPIES_OF_WEIGHTS: dict[type, frozenset[str]] = {optimizers.ScheduleFreeAdamW: frozenset({"momentum"})}
"""What begins as the weights and is the sequence that is trained: 8 bits would round the weights themselves."""

UNSIGNED: dict[type, frozenset[str]] = {
    optimizers.Adadelta: frozenset({"accumulated_grad", "accumulated_delta_var"}),
    optimizers.Adafactor: frozenset({"velocity"}),
    optimizers.Adagrad: frozenset({"accumulator"}),
    optimizers.Adam: frozenset({"velocity", "velocity_hat"}),
    optimizers.Adamax: frozenset({"norm"}),
    optimizers.Ftrl: frozenset({"accumulator"}),
    optimizers.Lamb: frozenset({"velocity"}),
    optimizers.Muon: frozenset({"velocity"}),
    optimizers.Nadam: frozenset({"velocity"}),
    optimizers.RMSprop: frozenset({"velocity"}),
    optimizers.ScheduleFreeAdamW: frozenset({"velocity"}),
}
"""Sums and averages of squares, by the class that makes them; all others, and those of classes not here, have signs."""


def is_state(optimizer: keras.Optimizer, name: str) -> bool:
    """Returns whether a slot may be stored in few bits."""
    return name not in KEPT and not _is_in(COPIES_OF_WEIGHTS, optimizer, name)


def is_signed(optimizer: keras.Optimizer, name: str) -> bool:
    """Returns whether a slot can be negative, as far as is known."""
    return not _is_in(UNSIGNED, optimizer, name)


def _is_in(table, optimizer, name):
    return any(name in table.get(cls, ()) for cls in type(optimizer).__mro__)
