"""Touches what Keras does not document of its optimizers, and adds to `compile` and `fit`."""

import functools
import inspect
from collections.abc import Sequence

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers.trainer import Trainer
from keras.src.utils import tracking

from keras_precision.hooks import Hooks

Schedule = keras.optimizers.schedules.LearningRateSchedule


def install(hooks: Hooks) -> None:
    """Patches Keras's optimizers, `compile` and `fit`, once."""
    if hasattr(BaseOptimizer._get_current_learning_rate, "__wrapped__"):
        return
    _install_schedules()
    _install_files(hooks)
    _install_compile(hooks)
    _install_fit(hooks)


def _install_schedules():
    """Makes learning-rate schedules count updates, not the micro-steps of gradient accumulation (D25).

    Checked on Keras 3.14.0 and 3.15.1; not needed if `BaseOptimizer` passed
    `iterations` to its schedule.
    """
    stock = BaseOptimizer._get_current_learning_rate

    @functools.wraps(stock)
    def _get_current_learning_rate(self):
        if isinstance(self._learning_rate, Schedule):
            return self._learning_rate(self.iterations)
        return stock(self)

    BaseOptimizer._get_current_learning_rate = _get_current_learning_rate


def _install_files(hooks):
    """Lets plain optimizers read files in which others packed their states."""
    stock = BaseOptimizer.load_own_variables

    @functools.wraps(stock)
    def load_own_variables(self, store):
        if not hooks.reads_packed(store, self.variables):
            stock(self, store)

    BaseOptimizer.load_own_variables = load_own_variables


def _install_compile(hooks):
    stock_compile = Trainer.compile

    @functools.wraps(stock_compile)
    def compile(self, optimizer="rmsprop", *args, auto_scale_loss=True, **kwargs):
        given = keras.optimizers.get(optimizer)
        optimizer, auto_scale_loss = hooks.before_compile(self, given, auto_scale_loss)
        stock_compile(self, optimizer, *args, auto_scale_loss=auto_scale_loss, **kwargs)
        # As Keras does with its own wrapper: the file names what the user gave, and loading wraps it again.
        self._compile_config.config["optimizer"] = given

    Trainer.compile = compile


def _install_fit(hooks):
    stock_fit = keras.Model.fit
    signature = inspect.signature(stock_fit)

    @functools.wraps(stock_fit)
    def fit(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.arguments["callbacks"] = hooks.fit_callbacks(self, call.arguments.get("callbacks"))
        try:
            return stock_fit(*call.args, **call.kwargs)
        finally:
            hooks.after_fit(self)

    keras.Model.fit = fit


def wrapped(optimizer: keras.Optimizer) -> list[keras.Optimizer]:
    """Returns the optimizers inside a wrapper, the outermost first."""
    found = []
    while isinstance(vars(optimizer).get("inner_optimizer"), keras.Optimizer):
        optimizer = optimizer.inner_optimizer
        found.append(optimizer)
    return found


def innermost(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer inside all wrappers, itself if it is none."""
    return [optimizer, *wrapped(optimizer)][-1]


def micro_steps(optimizer: keras.Optimizer) -> keras.Variable:
    """Returns the variable that counts calls of `apply`."""
    return optimizer._iterations


def accumulators(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the sums of gradient accumulation."""
    return [a for a in optimizer._accumulated_gradients if a is not None]


def averages(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the moving averages of the weights, empty if the optimizer keeps none."""
    return [a for a in optimizer._model_variables_moving_average if a is not None] if optimizer.use_ema else []


def drop_counters(wrapper: keras.Optimizer) -> None:
    """Stops tracking the iteration and learning rate that every optimizer makes and a wrapper never uses."""
    wrapper._untrack_variable(wrapper._iterations)
    wrapper._untrack_variable(wrapper._learning_rate)


def mark_built(wrapper: keras.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Notes what a wrapper was built for, without slots of its own."""
    with tracking.DotNotTrackScope():
        wrapper._trainable_variables = list(variables)
        wrapper._trainable_variables_indices = {wrapper._var_key(v): i for i, v in enumerate(variables)}
    wrapper.built = True


def trained_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)


def index_of(optimizer: keras.Optimizer, variable: keras.Variable) -> int:
    """Returns a variable's place among those that the optimizer was built for, or -1."""
    return optimizer._trainable_variables_indices.get(optimizer._var_key(variable), -1)


class SavedVariables(KerasSaveable):
    """Saves variables by their names, in a group of their own; a file without them leaves them as they are.

    Args:
        variables: list of `keras.Variable` with different names.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.by_name = {variable.name: variable for variable in variables}

    def _obj_type(self):
        return "Optimizer"  # one of the kinds that Keras's saving code knows

    def save_own_variables(self, store) -> None:
        """Writes the variables."""
        for name, variable in self.by_name.items():
            store[name] = keras.ops.convert_to_numpy(variable.value)

    def load_own_variables(self, store) -> None:
        """Reads those variables that the file holds."""
        saved = set(store.keys())
        for name, variable in self.by_name.items():
            if name in saved:
                variable.assign(store[name])


class DecaysInStep:
    """Makes an optimizer decay each weight when it updates it, not all before (mixed in by `_bridge.specialise`).

    For optimizers that call `decay_now` in their `update_step`. Replicas decay
    together, before.
    """

    def _apply_weight_decay(self, variables):
        backend = keras.backend.backend()
        if backend == "jax" or backend == "tensorflow" and not _has_strategy():
            vars(self)["_to_decay"] = {self._var_key(variable): variable for variable in variables}
        else:
            super()._apply_weight_decay(variables)

    def decay_now(self, variable):
        """Decays a weight if the optimizer decays this one."""
        to_decay = vars(self).get("_to_decay", {}).get(self._var_key(variable))
        if to_decay is not None:
            super()._apply_weight_decay([to_decay])


def _has_strategy():
    import tensorflow as tf

    return tf.distribute.has_strategy()
