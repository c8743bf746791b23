"""An optimizer around another one, whose settings, counts and state are those of the inner one."""

import keras

from keras_precision import _bridge_optimizers
from keras_precision.delegation import DelegatesSettings


_OWN = "wrapper."  # in the names of a file's entries, where Keras's are numbers


class OptimizerWrapper(DelegatesSettings, keras.optimizers.Optimizer):
    """Forwards to an inner optimizer what a subclass does not change.

    Args:
        inner_optimizer: a `keras.optimizers.Optimizer`, its name or config.
        name: str.
        **settings: the subclass's other arguments, which become attributes and config entries.
    """

    def __init__(self, inner_optimizer, name: str | None = None, **settings):
        super().__init__(learning_rate=0.0, name=name)
        self._settings = tuple(settings)
        for setting, value in settings.items():  # before there is an inner optimizer that could have the same ones
            setattr(self, setting, value)
        self.inner_optimizer = keras.optimizers.get(inner_optimizer)

    @property
    def learning_rate(self):
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """The inner optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables."""
        return self.inner_optimizer.variables

    def scale_loss(self, loss):
        """Returns the loss scaled as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    def build(self, variables):
        """Makes the inner optimizer's slots for these weights.

        Args:
            variables: list of `keras.Variable`.
        """
        self.inner_optimizer.build(list(variables))
        _bridge_optimizers.mark_built(self, variables)

    def apply(self, grads, trainable_variables=None):
        """Updates the weights.

        Args:
            grads: list of gradients; None where there is none.
            trainable_variables: list of the weights; None for those it was built with.
        """
        if not self.built:
            if trainable_variables is None:
                raise ValueError("Expected the weights at the first call. Call `optimizer.build(weights)` before.")
            self.build(list(trainable_variables))
        known = _bridge_optimizers.trained_variables(self)
        self._update(grads, known if trainable_variables is None else list(trainable_variables))

    def _update(self, grads, weights):
        self.inner_optimizer.apply(grads, weights)

    def finalize_variable_values(self, var_list):
        """Replaces the weights by the inner optimizer's moving averages, if it keeps them."""
        self.inner_optimizer.finalize_variable_values(var_list)

    @property
    def own_variables(self) -> dict[str, keras.Variable]:
        """The wrapper's own state by name, to be saved beside the inner optimizer's."""
        return {}

    def save_own_variables(self, store):
        """Writes the inner optimizer's variables as if it were not wrapped, and the wrapper's beside them."""
        self.inner_optimizer.save_own_variables(store)
        for name, variable in self.own_variables.items():
            store[f"{_OWN}{name}"] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Reads a file of this class or of the inner optimizer alone; then the wrapper's own state stays as it is."""
        keys = list(store.keys())
        for name, variable in self.own_variables.items():
            if f"{_OWN}{name}" in keys:
                variable.assign(store[f"{_OWN}{name}"])
        self.inner_optimizer.load_own_variables({key: store[key] for key in keys if not key.startswith(_OWN)})

    def get_config(self) -> dict:
        """Returns the constructor's arguments."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner, **{name: getattr(self, name) for name in self._settings}}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None):
        """Returns the optimizer that `get_config` described."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        return cls(inner, **config)
