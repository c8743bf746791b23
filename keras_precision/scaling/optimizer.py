"""Wraps an optimizer so that float16 gradients neither underflow nor do harm when they overflow."""

from typing import Any

import keras
from keras import ops

from keras_precision import _bridge_optimizers
from keras_precision.scaling.delegation import DelegatesSettings
from keras_precision.scaling.grad_scaler import SpeaksGradScaler
from keras_precision.scaling.gradients import divided, first_nonfinite
from keras_precision.scaling.loss_scale import DynamicLossScale, LossScaleState
from keras_precision.scaling.replicas import run_update
from keras_precision.scaling.tracing import branch, is_concrete, is_staged
from keras_precision.scaling.usage import ScaleUsage
from keras_precision.scaling.window import Window

# In the saved variables of Keras's LossScaleOptimizer: iteration, learning rate, step_counter, dynamic_scale.
KERAS_STEP_COUNTER, KERAS_SCALE, KERAS_OWN = "2", "3", 4


@keras.saving.register_keras_serializable(package="keras_precision")
class LossScaleOptimizer(DelegatesSettings, SpeaksGradScaler, keras.optimizers.LossScaleOptimizer):
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
        _bridge_optimizers.drop_counters(self)
        own("step_counter", self.add_variable(shape=(), dtype="int", name="step_counter"))
        scale = keras.initializers.Constant(self._machine.initial_scale)
        own("dynamic_scale", self.add_variable((), scale, dtype="float32", name="dynamic_scale"))
        for name in ("bad_steps", "consecutive_skips", "skipped_steps"):
            own(f"_{name}", self.add_variable(shape=(), dtype="int", name=name))
        own("_last_nonfinite", self.add_variable((), keras.initializers.Constant(-1), dtype="int", name="last_nonfinite"))
        own("_saved_state", _bridge_optimizers.SavedVariables(self.own_variables))

    @property
    def _machine(self):
        return DynamicLossScale(
            initial_scale=self.initial_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.dynamic_growth_steps,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
            hysteresis=self.hysteresis,
        )

    @property
    def _state_variables(self):
        return LossScaleState(
            self.dynamic_scale, self.step_counter, self._bad_steps, self._consecutive_skips, self._skipped_steps
        )

    @property
    def own_variables(self) -> list[keras.Variable]:
        """The scale and its counters, without the inner optimizer's variables."""
        return list(self._variables)

    @property
    def loss_scale(self):
        """float32 scalar tensor, what the next loss is multiplied by."""
        return ops.add(self.dynamic_scale.value, 0)  # a value, where convert_to_tensor may give the variable

    @property
    def skipped_steps(self):
        """Integer scalar tensor, steps skipped in all."""
        return ops.add(self._skipped_steps.value, 0)

    @property
    def consecutive_skips(self):
        """Integer scalar tensor, steps skipped in a row up to now."""
        return ops.add(self._consecutive_skips.value, 0)

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
        known = _bridge_optimizers.trained_variables(self)
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
        touched = _bridge_optimizers.trained_variables(self) + self.variables
        first = ops.take(ops.convert_to_tensor(places), ops.argmax(ops.cast(flags, "int32")))
        first = ops.where(found, ops.cast(first, self._last_nonfinite.dtype), self._last_nonfinite.value)
        state, is_last = self._state(), None
        if self._window is None:
            branch(found, lambda: None, update, touched)
        else:
            found, is_last = self._window.step(found, update, touched)
        after = self._machine.update(state, found)
        if is_last is not None:
            after = LossScaleState(*(ops.where(is_last, new, old) for new, old in zip(after, state, strict=True)))
        for variable, value in zip(self._state_variables, after, strict=True):
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
        known = _bridge_optimizers.trained_variables(self)
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

    def raise_if_stuck(self) -> None:
        """Raises once `max_consecutive_skips` steps in a row were skipped.

        Raises:
            FloatingPointError: naming the first weight whose gradient was not finite.
        """
        skips = int(ops.convert_to_numpy(self.consecutive_skips))
        if self.max_consecutive_skips is None or skips < self.max_consecutive_skips:
            return
        raise FloatingPointError(
            f"Expected finite gradients. Received inf or NaN in {skips} steps in a row, with the loss scale down to "
            f"{self.get_scale():g}; the first gradient that is not finite is that of '{self.last_nonfinite}'. Look at "
            "the loss and the data of that step, compute that layer in float32, or pass a larger max_consecutive_skips."
        )

    @property
    def last_nonfinite(self) -> str | None:
        """Path of the first weight whose gradient was not finite at the last overflow; None if there was none."""
        place = int(ops.convert_to_numpy(ops.convert_to_tensor(self._last_nonfinite)))
        if place < 0 or not self.built:
            return None
        variable = _bridge_optimizers.trained_variables(self)[place]
        return getattr(variable, "path", variable.name)

    def _state(self):
        scale, *counters = (variable.value for variable in self._state_variables)
        return LossScaleState(ops.convert_to_tensor(scale), *(ops.cast(counter, "int32") for counter in counters))

    def _require_state(self):
        """Returns whether code is being compiled, and refuses a scale that would be a constant there (D4)."""
        staged = is_staged()
        if staged and keras.backend.backend() == "jax" and is_concrete(self.dynamic_scale.value):
            raise ValueError(
                "Expected the loss scale as an argument of the program that JAX compiles. Received a constant, so the "
                "program would keep today's scale for ever. Pass the values of `optimizer.variables` in, and call "
                "scale_loss within keras.StatelessScope(list(zip(optimizer.variables, values))) and stateless_apply "
                "with them; or carry the state of a keras_precision.scaling.DynamicLossScale."
            )
        return staged

    def _unscaled(self, grads, variables=None):
        scale = ops.convert_to_tensor(self.dynamic_scale)
        # Float8 layers pass new scales as gradients, which are not scaled.
        kept = [getattr(v, "overwrite_with_gradient", False) for v in variables or [None] * len(grads)]
        return [g if g is None or keep else divided(g, scale) for g, keep in zip(grads, kept, strict=True)]

    def set_weights(self, weights):
        """Sets all of `variables`.

        Args:
            weights: list of arrays, in the order of `variables`.

        Raises:
            ValueError: not built, or other arrays than `variables` take.
        """
        variables = self.variables
        if not self.built or len(weights) != len(variables):
            raise ValueError(
                f"Expected {len(variables)} arrays for an optimizer that is {'' if self.built else 'not '}built. "
                f"Received: {len(weights)}. Call `optimizer.build(weights)` before `set_weights`."
            )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store):
        """Writes the inner optimizer's variables as if it were not wrapped; the scale is saved beside them."""
        self.inner_optimizer.save_own_variables(store)

    def load_own_variables(self, store):
        """Reads the variables of a plain optimizer, of this class, or of Keras's LossScaleOptimizer."""
        count = len(self.inner_optimizer.variables)
        if len(store.keys()) == count + KERAS_OWN:
            self.step_counter.assign(store[KERAS_STEP_COUNTER])
            # Keras's scale has no bounds: it may have been saved as 0 or inf.
            self.dynamic_scale.assign(ops.clip(store[KERAS_SCALE], self.min_scale, self.max_scale))
            store = {str(i): store[str(i + KERAS_OWN)] for i in range(count)}
        self.inner_optimizer.load_own_variables(store)

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
