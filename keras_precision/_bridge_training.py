"""Touches what Keras does not document of `fit`: the function that runs a training step, and where its state is."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras

State = list[list[Any]]


class Training:
    """The steps of a running `fit`, which it shows before they run, and can run again from another state.

    On TensorFlow the state is in the variables. On JAX `fit` holds it, and passes it from step to step; the variables
    are empty meanwhile.

    Args:
        model: that is trained; `fit` has made its `train_function`.
        before_step: called with the list of batches that a call of it is about to train on, more than one with
            `steps_per_execution`.

    Attributes:
        logs: what the last step returned, tensors that need not have been computed.
    """

    def __init__(self, model: keras.Model, before_step: Callable[[list[Any]], None]):
        self.logs: dict[str, Any] = {}
        self._model, self._before_step, self._stock = model, before_step, model.train_function
        self._is_jax = keras.backend.backend() == "jax"
        self._passed: State | None = None
        model.train_function = _Seen(self)

    @property
    def optimizer(self) -> keras.Optimizer:
        """What the model is trained with."""
        return self._model.optimizer

    @functools.cached_property
    def variables(self) -> list[list[keras.Variable]]:
        """Trained ones, other ones, the optimizer's and the metrics'; collecting them takes milliseconds."""
        model = self._model
        others = model.non_trainable_variables
        return [model.trainable_variables, others, model.optimizer.variables, model.metrics_variables]

    def called(self, *arguments: Any) -> Any:
        """Stands for the stock function, which gets a state on JAX, and an iterator."""
        *passed, iterator = arguments
        batches = list(itertools.islice(iterator, self._model.steps_per_execution))
        if not batches:
            raise StopIteration
        if self._is_jax:
            self._passed = [list(values) for values in passed[0]]
        elif not self._model.optimizer.built:  # in its first step, that is, when variables can no longer be kept
            self._model._symbolic_build(data_batch=batches[0])
        self._before_step(batches)
        self.step(batches)
        if not self._is_jax:
            return self.logs
        passed, self._passed = self._passed, None
        return self.logs, tuple(passed)

    def step(self, batches: list[Any]) -> None:
        """Trains on batches, from the present state."""
        if not self._is_jax:
            self.logs = self._stock(iter(batches))
            return
        self.logs, state = self._stock(tuple(self._passed), iter(batches))
        self._passed = [list(values) for values in state]

    @contextlib.contextmanager
    def between_epochs(self) -> Iterator[None]:
        """Lets a block run steps where none is about to run: the variables hold the state then, and again after it."""
        if self._is_jax:
            self._passed = self.values()
        try:
            yield
        finally:
            self.show_state()
            self._passed = None

    def values(self) -> State:
        """Returns the present state, which the next step overwrites."""
        return self._passed or [[v.value for v in group] for group in self.variables]

    def value_of(self, variable: keras.Variable) -> Any:
        """Returns the present value of one of the variables."""
        pairs = zip(itertools.chain(*self.variables), itertools.chain(*self.values()), strict=True)
        return next(value for one, value in pairs if one is variable)

    def set(self, values: State) -> None:
        """Goes on from another state."""
        if self._passed is None:
            self._assign(values)
        else:
            self._passed = values

    def _assign(self, values):
        for variable, value in zip(itertools.chain(*self.variables), itertools.chain(*values), strict=True):
            variable.assign(value)

    def whole(self, batch: Any) -> Any:
        """Returns a batch with the parts of all replicas."""
        if self._is_jax:
            return batch
        parts = self._model.distribute_strategy.experimental_local_results
        return keras.tree.map_structure(lambda a: None if a is None else keras.ops.concatenate(parts(a)), batch)

    def show_state(self) -> None:
        """Lets the variables hold the present state, until `hide_state` or the end of `fit`."""
        if self._passed is not None:
            self._assign(self._passed)
            # Or `fit` would overwrite them with its own when it ends with an error.
            self._model._jax_state_synced = True

    def hide_state(self) -> None:
        """Empties the variables that `show_state` has filled, as `fit` had them."""
        if self._passed is not None:
            self._model._jax_state_synced = False
            for variable in itertools.chain(*self.variables):
                variable._value = None


class _Seen:
    """Stands for `train_function`."""

    def __init__(self, training: Training):
        self.training, self.stock = training, training._stock

    def __call__(self, *arguments):
        return self.training.called(*arguments)


def release(model: keras.Model) -> None:
    """Gives a model its own `train_function` back, whatever ended its `fit`."""
    if isinstance(getattr(model, "train_function", None), _Seen):
        model.train_function = model.train_function.stock
