"""Wraps an optimizer so that float16 gradients neither underflow nor do harm when they overflow."""

from typing import Any

import keras
from keras import ops

from keras_precision import _bridge_optimizers
from keras_precision.delegation import DelegatesSettings
from keras_precision.scaling.grad_scaler import SpeaksGradScaler
from keras_precision.scaling.gradients import divided, first_nonfinite
from keras_precision.scaling.loss_scale import DynamicLossScale, LossScaleState
from keras_precision.scaling.files import SavedAsPlain
from keras_precision.scaling.replicas import run_update
from keras_precision.scaling.tracing import is_concrete, is_staged, unless
from keras_precision.scaling.usage import ScaleUsage
from keras_precision.scaling.window import Window


@keras.saving.register_keras_serializable(package="keras_precision")
class LossScaleOptimizer(DelegatesSettings, SpeaksGradScaler, SavedAsPlain, keras.optimizers.LossScaleOptimizer):
    """Scales the loss for an inner optimizer, and skips steps whose gradients are not finite.

    A skipped step leaves weights, slots, moving averages, iterations and the
    learning-rate schedule as if it had not been. With gradient accumulation
    the unit is the window: one gradient that is not finite discards its
    window, and the next window begins when it would have begun.

    Settings are the inner optimizer's: `wrapper.clipvalue = 1.0`,
    `wrapper.beta_1` and `wrapper.exclude_from_weight_decay(...)` act there.

    Args:
        inner_optimizer: a `keras.optimizers.Optimizer`, its name or config.
        initial_scale: float within [min_scale, max_scale].
        dynamic_growth_steps: int >= 1, finite steps until the scale grows.
        name: str.
        growth_factor: float > 1.
        backoff_factor: float within (0, 1).
        min_scale: float > 0.
        max_scale: float >= min_scale, finite.
        hysteresis: int >= 1, non-finite steps that it takes to back off.
        max_consecutive_skips: int >= 1 or None. So many skips in a row raise
            a FloatingPointError: at once in eager code; after compiled steps
            when `raise_if_stuck` is called, as `LossScaleMonitor` does.
        **kwargs: what Keras's class takes for old configs, at its defaults.

    Raises:
        ValueError: an argument out of its range; an inner optimizer that
            scales the loss itself.

    Example:
        >>> optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)
        >>> w = keras.Variable(1.0)
        >>> float(optimizer.scale_loss(ops.convert_to_tensor(3.0)))
        24.0
        >>> optimizer.apply([ops.convert_to_tensor(8.0)], [w])
        >>> float(w)
        0.5
    """

    def __init__(
        self,
        inner_optimizer,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
        max_consecutive_skips: int | None = 50,
        **kwargs,
    ):
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError("The optimizer is wrapped in a LossScaleOptimizer already. Pass its `inner_optimizer`.")
        factor = _bridge_optimizers.innermost(inner_optimizer).loss_scale_factor
        if factor is not None:
            raise ValueError(
                "Expected an inner optimizer without a loss scale of its own. Received: loss_scale_factor="
                f"{factor!r}. Pass initial_scale={factor!r} to LossScaleOptimizer instead."
            )
        if max_consecutive_skips is not None and max_consecutive_skips < 1:
            raise ValueError(
                f"Expected max_consecutive_skips >= 1 or None. Received: max_consecutive_skips={max_consecutive_skips}."
            )
        super().__init__(inner_optimizer, initial_scale, dynamic_growth_steps, name=name, **kwargs)
        own = super().__setattr__  # assigned with `=`, these could go to an inner optimizer that has the same ones
        own("growth_factor", growth_factor)
        own("backoff_factor", backoff_factor)
        own("min_scale", min_scale)
        own("max_scale", max_scale)
        own("hysteresis", hysteresis)
        own("max_consecutive_skips", max_consecutive_skips)
        own("_usage", ScaleUsage())
        own("_window", None)
        own("_scale_owner", None)
        _bridge_optimizers.drop_counters(self)
        own("step_counter", self.add_variable(shape=(), dtype="int", name="step_counter"))
        scale = keras.initializers.Constant(self._machine.initial_scale)
        own("dynamic_scale", self.add_variable((), scale, dtype="float32", name="dynamic_scale"))
        counters = [self.add_variable((), dtype="int", name=n) for n in ("bad_steps", "consecutive_skips", "skipped_steps")]
        own("state_variables", LossScaleState(self.dynamic_scale, self.step_counter, *counters))
        own("_last_nonfinite", self.add_variable((), keras.initializers.Constant(-1), dtype="int", name="last_nonfinite"))
        own("_saved_state", _bridge_optimizers.SavedVariables(self.own_variables))

    @property
    def loss_scale_factor(self):
        """None: the wrapper has a scale that changes, and the inner optimizer none."""
        return None

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if value is not None:
            raise ValueError(
                f"Expected loss_scale_factor=None: the loss is scaled already. Received: loss_scale_factor={value!r}. "
                "Pass initial_scale to LossScaleOptimizer."
            )

    @property
    def _machine(self):
        owner = self._scale_owner or self
        return DynamicLossScale(
            initial_scale=owner.initial_scale,
            growth_factor=owner.growth_factor,
            backoff_factor=owner.backoff_factor,
            growth_interval=owner.dynamic_growth_steps,
            min_scale=owner.min_scale,
            max_scale=owner.max_scale,
            hysteresis=owner.hysteresis,
        )

    def share_scale_of(self, other: "LossScaleOptimizer") -> None:
        """Uses another optimizer's scale from now on, as two optimizers of one model may (a GAN's, for instance).

        An overflow in either lowers the scale; only the other's finite steps
        count towards its growth, so that it grows as fast as for one. Call it
        again after loading. Where JAX compiles, both optimizers' `variables`
        have to be in the scope; a `DynamicLossScale` whose state is passed
        along serves any number of optimizers there.

        Args:
            other: the optimizer whose scale, counters and bounds count.

        Raises:
            ValueError: `other` is this optimizer, or shares a scale itself.
        """
        if other is self or other.state_variables[0] is not other.dynamic_scale:
            raise ValueError("Expected an optimizer that has a scale of its own. Pass the one that it shares.")
        super().__setattr__("_scale_owner", other)
        super().__setattr__("state_variables", other.state_variables)

    @property
    def own_variables(self) -> list[keras.Variable]:
        """The scale and its counters, without the inner optimizer's variables."""
        return list(self._variables)

    @property
    def loss_scale(self):
        """float32 scalar tensor, what the next loss is multiplied by."""
        return ops.add(self.state_variables.scale.value, 0)  # a value, where convert_to_tensor may give the variable

    @property
    def skipped_steps(self):
        """Integer scalar tensor, steps skipped in all."""
        return ops.add(self.state_variables.skipped_steps.value, 0)

    @property
    def consecutive_skips(self):
        """Integer scalar tensor, steps skipped in a row up to now."""
        return ops.add(self.state_variables.consecutive_skips.value, 0)

    def build(self, variables):
        """Makes the inner optimizer's slots.

        Args:
            variables: list of `keras.Variable`.
        """
        if self.built:
            return
        variables = list(variables)
        self.inner_optimizer.build(variables)
        for part in getattr(_bridge_optimizers.innermost(self), "optimizers", []):  # of a MultiOptimizer
            if part.gradient_accumulation_steps:
                raise ValueError(
                    "Expected the optimizers of a MultiOptimizer without gradient accumulation: their windows would "
                    f"shift at skipped steps. Received: gradient_accumulation_steps={part.gradient_accumulation_steps}."
                )
        _bridge_optimizers.mark_built(self, variables)
        if self.gradient_accumulation_steps:
            super().__setattr__("_window", Window(self, variables))

    def scale_loss(self, loss):
        """Returns the loss times the scale, in float32.

        Args:
            loss: tensor or structure of tensors.

        Raises:
            ValueError: the loss was scaled already; or the scale would become
                a constant of a program that JAX compiles.
        """
        staged = self._require_state()
        self._usage.scaling(loss, staged)
        scaled = self._machine.scale(self._state(), loss)
        self._usage.scaled(scaled)
        return scaled

    def get_unscaled_gradients(self, grads) -> list:
        """Returns gradients divided by the scale, in float32; the next `apply` then takes them as unscaled.

        Args:
            grads: list of gradients of a scaled loss; None where there is none.
        """
        self._usage.unscaling(self._require_state())
        return self._unscaled(grads)

    def apply(self, grads, trainable_variables=None, unscaled: bool | None = None):
        """Updates the weights, or skips the step if a gradient is not finite.

        Args:
            grads: list of gradients; None where there is none.
            trainable_variables: list of the weights; None for those it was built with.
            unscaled: whether the gradients are unscaled already. None: if
                `get_unscaled_gradients` was called since the last update.

        Raises:
            ValueError: `scale_loss` was not called, see `ScaleUsage`.
            FloatingPointError: `max_consecutive_skips` steps in a row were skipped.
        """
        grads = list(grads)
        if not grads:
            return
        if not self.built:
            if trainable_variables is None:
                raise ValueError("Expected the weights at the first call. Call `optimizer.build(weights)` before.")
            self.build(trainable_variables)
        known = self.trained
        variables = known if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"Expected {len(variables)} gradients, one a weight. Received: {len(grads)}.")
        unscaled = self._usage.applying(self._require_state(), unscaled)
        present = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
        flags = ops.zeros((1,), "bool")
        if present:
            flags = ops.equal(ops.arange(len(present), dtype="int32"), first_nonfinite([g for g, _ in present]))
        places = [_bridge_optimizers.index_of(self, v) for _, v in present] or [-1]
        if not unscaled:
            grads = self._unscaled(grads, variables)
        run_update(self, flags, lambda flags, update: self._step(flags, places, update), grads, variables)

    def _step(self, flags, places, update):
        """Updates or skips, then moves the scale's state on."""
        found = ops.any(flags)
        touched = self.trained + self.variables
        first = ops.take(ops.convert_to_tensor(places), ops.argmax(ops.cast(flags, "int32")))
        first = ops.where(found, ops.cast(first, self._last_nonfinite.dtype), self._last_nonfinite.value)
        state, is_last = self._state(), None
        if self._window is None:
            unless(found, update, touched)
        else:
            found, is_last = self._window.step(found, update, touched)
        after = self._machine.update(state, found)
        # With a shared scale, finite steps are its owner's to count.
        for counts in (is_last, found if self._scale_owner else None):
            if counts is not None:
                after = LossScaleState(*(ops.where(counts, new, old) for new, old in zip(after, state, strict=True)))
        for variable, value in zip(self.state_variables, after, strict=True):
            variable.assign(ops.cast(value, variable.dtype))
        self._last_nonfinite.assign(first)
        if is_concrete(found) and found:
            self.raise_if_stuck()

    def apply_gradients(self, grads_and_vars, unscaled: bool | None = None):
        """Calls `apply` with pairs of gradient and weight; returns the number of updates made."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables, unscaled=unscaled)
        return self.iterations

    def stateless_apply(self, optimizer_variables, grads, trainable_variables, unscaled: bool | None = None):
        """Returns the values of the weights and of `variables` after `apply`.

        Args:
            optimizer_variables: list of tensors, values of `variables`.
            grads: list of gradients, one a weight.
            trainable_variables: list of tensors, values of the weights.
            unscaled: see `apply`.

        Raises:
            ValueError: not built, or lists of other lengths; always on
                TensorFlow, as for every Keras optimizer.
        """
        if keras.backend.backend() == "tensorflow":
            return keras.Optimizer.stateless_apply(self, optimizer_variables, grads, trainable_variables)
        known = self.trained
        for name, values, count in (
            ("optimizer_variables", optimizer_variables, len(self.variables)),
            ("trainable_variables", trainable_variables, len(known)),
        ):
            if not self.built or len(values) != count:
                built = "" if self.built else " The optimizer is not built: call `optimizer.build(weights)`."
                raise ValueError(f"Expected {count} tensors in {name}. Received: {len(values)}.{built}")
        mapping = [*zip(known, trainable_variables), *zip(self.variables, optimizer_variables)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.apply(grads, unscaled=unscaled)
        return [[scope.get_current_value(v) for v in group] for group in (known, self.variables)]

    def raise_if_stuck(self, consecutive_skips: int | None = None) -> None:
        """Raises once `max_consecutive_skips` steps in a row were skipped.

        Args:
            consecutive_skips: how many; None for the present count.

        Raises:
            FloatingPointError: naming the first weight whose gradient was not finite.
        """
        skips = int(ops.convert_to_numpy(self.consecutive_skips)) if consecutive_skips is None else consecutive_skips
        if self.max_consecutive_skips is None or skips < self.max_consecutive_skips:
            return
        raise FloatingPointError(
            f"Expected finite gradients. Received inf or NaN in {skips} steps in a row, with the loss scale down to "
            f"{self.get_scale():g}; the first gradient that is not finite is that of '{self.last_nonfinite}'. Give "
            "fit a keras_precision.BlameCallback() to see what overflows first, compute that layer in float32, or pass a "
            "larger max_consecutive_skips."
        )

    @property
    def trained(self) -> list[keras.Variable]:
        """The weights that the optimizer was built for."""
        return _bridge_optimizers.trained_variables(self)

    @property
    def overflow_place(self):
        """Integer scalar tensor: place in `trained` of the first weight to overflow at the last overflow, -1 for none."""
        return ops.add(self._last_nonfinite.value, 0)

    @property
    def last_nonfinite(self) -> str | None:
        """Path of the first weight whose gradient was not finite at the last overflow; None if there was none."""
        place = int(ops.convert_to_numpy(self.overflow_place))
        if place < 0 or not self.built:
            return None
        return getattr(self.trained[place], "path", self.trained[place].name)

    def _state(self):
        scale, *counters = (variable.value for variable in self.state_variables)
        return LossScaleState(ops.convert_to_tensor(scale), *(ops.cast(counter, "int32") for counter in counters))

    def _require_state(self):
        """Returns whether code is being compiled, and refuses a scale that would be a constant there (D4)."""
        staged = is_staged()
        if staged and keras.backend.backend() == "jax" and is_concrete(self.state_variables.scale.value):
            raise ValueError(
                "Expected the loss scale as an argument of the program that JAX compiles. Received a constant, so the "
                "program would keep today's scale for ever. Pass the values of `optimizer.variables` in, and call "
                "scale_loss within keras.StatelessScope(list(zip(optimizer.variables, values))) and stateless_apply "
                "with them; or carry the state of a keras_precision.scaling.DynamicLossScale."
            )
        return staged

    def _unscaled(self, grads, variables=None):
        scale = ops.convert_to_tensor(self.state_variables.scale)
        # Float8 layers pass new scales as gradients, which are not scaled.
        kept = [getattr(v, "overwrite_with_gradient", False) for v in variables or [None] * len(grads)]
        return [g if g is None or keep else divided(g, scale) for g, keep in zip(grads, kept, strict=True)]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = {**self._machine.get_config(), "max_consecutive_skips": self.max_consecutive_skips}
        config["dynamic_growth_steps"] = config.pop("growth_interval")
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner, **config}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> "LossScaleOptimizer":
        """Returns the optimizer that `get_config` described."""
        return super().from_config(dict(config), custom_objects=custom_objects)
