"""Lets the settings of a wrapper around an optimizer be those of the optimizer inside."""

from keras_precision import _bridge_optimizers


def _delegated(name):
    def get(self):
        if "inner_optimizer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(_bridge_optimizers.innermost(self), name)

    def set(self, value):
        if "inner_optimizer" in self.__dict__:  # before that, it's the base class writing its defaults
            setattr(_bridge_optimizers.innermost(self), name, value)

    return property(get, set, doc=f"The inner optimizer's `{name}`.")


class DelegatesSettings:
    """Reads and sets on the inner optimizer what a wrapper does not have itself; comes before the optimizer class."""

    weight_decay = _delegated("weight_decay")
    clipnorm = _delegated("clipnorm")
    global_clipnorm = _delegated("global_clipnorm")
    clipvalue = _delegated("clipvalue")
    use_ema = _delegated("use_ema")
    ema_momentum = _delegated("ema_momentum")
    ema_overwrite_frequency = _delegated("ema_overwrite_frequency")
    gradient_accumulation_steps = _delegated("gradient_accumulation_steps")

    loss_scale_factor = _delegated("loss_scale_factor")

    def __getattr__(self, name):
        owner = None if name.startswith("_") else self._owner(name)
        if owner is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(owner, name)

    def __setattr__(self, name, value):
        is_own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        owner = None if is_own else self._owner(name)
        if owner is None:
            super().__setattr__(name, value)
        else:
            setattr(owner, name, value)

    def _owner(self, name):
        """Returns the one of the optimizers inside that has an attribute itself, or None."""
        for inner in _bridge_optimizers.wrapped(self):
            if name in vars(inner) or hasattr(type(inner), name):
                return inner
        return None

    def __dir__(self):
        # Keras saves the saveable objects that it finds here; the inner optimizer's variables are saved as ours.
        return [name for name in super().__dir__() if name != "inner_optimizer"]

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes weights from the inner optimizer's weight decay; see `keras.Optimizer`."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)
