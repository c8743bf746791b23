"""Reads and writes a loss-scale optimizer's variables so that files of other optimizers fit."""

from keras import ops

# In the saved variables of Keras's LossScaleOptimizer: iteration, learning rate, step_counter, dynamic_scale.
KERAS_STEP_COUNTER, KERAS_SCALE, KERAS_OWN = "2", "3", 4


class SavedAsPlain:
    """Saves the inner optimizer as if it were not wrapped, so that checkpoints move between precisions (D3)."""

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
        is_keras = all(key.isdigit() for key in store.keys())  # the names of packed slots are no numbers
        if is_keras and len(store.keys()) == count + KERAS_OWN:
            self.step_counter.assign(store[KERAS_STEP_COUNTER])
            # Keras's scale has no bounds: it may have been saved as 0 or inf.
            self.dynamic_scale.assign(ops.clip(store[KERAS_SCALE], self.min_scale, self.max_scale))
            store = {str(i): store[str(i + KERAS_OWN)] for i in range(count)}
        self.inner_optimizer.load_own_variables(store)
