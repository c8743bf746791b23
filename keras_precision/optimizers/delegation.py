"""Settings of a wrapped optimizer, read and set through its wrapper."""

# What `keras.optimizers.Optimizer.__init__` stores and its `apply` acts on; a wrapper's own copies would act on nothing.
SETTINGS = (
    "clipnorm",
    "clipvalue",
    "ema_momentum",
    "ema_overwrite_frequency",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "loss_scale_factor",
    "use_ema",
    "weight_decay",
)


def _delegated(name):
    def read(self):
        return getattr(self.inner_optimizer, name)

    def write(self, value):
        # Keras's constructor sets its defaults on the wrapper before there is an inner optimizer: nothing to set yet.
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(read, write, doc=f"The inner optimizer's {name}.")


class DelegatesSettings:
    """Gives a wrapper its `inner_optimizer`'s settings, and what else only that has (such as `beta_1`)."""

    def __getattr__(self, name):
        inner = self.__dict__.get("inner_optimizer")
        if inner is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

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

    def scale_loss(self, loss):
        """Returns the loss scaled as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)


for _name in SETTINGS:
    setattr(DelegatesSettings, _name, _delegated(_name))
