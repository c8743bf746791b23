"""Other libraries' words for what the loss-scale optimizer does."""

from typing import Any

from keras import ops


class SpeaksGradScaler:
    """Methods named as in torch's GradScaler and in Keras 2's LossScaleOptimizer."""

    def get_scaled_loss(self, loss):
        """The same as `scale_loss`."""
        return self.scale_loss(loss)

    def unscale(self, grads) -> list:
        """The same as `get_unscaled_gradients`."""
        return self.get_unscaled_gradients(grads)

    def get_scale(self) -> float:
        """Returns the scale as a Python number."""
        return float(ops.convert_to_numpy(self.loss_scale))

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale, its counters and settings as Python numbers, in the keys of torch's GradScaler and ours."""
        numbers = {name: ops.convert_to_numpy(value).item() for name, value in self._state()._asdict().items()}
        return {
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.dynamic_growth_steps,
            "_growth_tracker": numbers.pop("good_steps"),
            **numbers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets what `state_dict`, or torch's GradScaler's, returned.

        Args:
            state: dict; of what it lacks, settings stay and counters start at 0.

        Raises:
            ValueError: settings other than the optimizer's: compiled steps could not follow them.
        """
        for key, ours in self.state_dict().items():
            if key in ("growth_factor", "backoff_factor", "growth_interval") and state.get(key, ours) != ours:
                raise ValueError(f"Expected {key}={ours}. Received: {key}={state[key]}. Pass it to the constructor.")
        counters = {**state, "good_steps": state.get("_growth_tracker", 0)}
        for name, variable in self.state_variables._asdict().items():
            variable.assign(counters["scale"] if name == "scale" else counters.get(name, 0))
