"""Trains 16-bit weights with an optimizer's own maths, computed in float32."""

from typing import Literal

import keras
from keras import ops

from keras_precision import _bridge, _bridge_optimizers, _bridge_variables, rounding
from keras_precision.dtypes import HALF_DTYPES
from keras_precision.optimizers.wrapper import OptimizerWrapper

Rounding = Literal["stochastic", "nearest", "kahan"]
ROUNDINGS = ("stochastic", "nearest", "kahan")


@keras.saving.register_keras_serializable(package="keras_precision")
class LowPrecision(OptimizerWrapper):
    """Wraps any Keras optimizer so that bfloat16 and float16 weights train as float32 ones do.

    The inner optimizer sees float32 weights and gradients: every constant,
    moment and bias correction is float32 (bfloat16 rounds Adam's 0.999 to 1,
    and float16 its epsilon 1e-7 to 1.2e-7 or 1e-8 to 0). What it makes of the
    weights is rounded back to their dtype:

    - "stochastic": up or down at random, right on average (Gupta et al. 2015);
    - "kahan": to nearest, what was lost kept in a second 16-bit tensor and
      added next time (Zamirai et al. 2020);
    - "nearest": to nearest. Updates below half a rounding step are lost.

    Memory beyond the inner optimizer's float32 slots: none for "stochastic"
    and "nearest" on JAX; one float32 copy of the weights on TensorFlow, whose
    optimizers update variables in place, and with `master_weights`; 2 bytes a
    weight for "kahan". Float32 weights are passed through.

    Args:
        inner_optimizer: a `keras.optimizers.Optimizer`, its name or config.
        rounding: "stochastic", "nearest" or "kahan".
        master_weights: keep float32 weights and round them to nearest each
            step, so that nothing is lost; `rounding` must be "nearest" then.
            A weight that was set from outside takes precedence.
        seed: int >= 0; equal seeds give equal training.
        name: str.

    Raises:
        ValueError: an unknown rounding, or one that `master_weights` makes
            pointless.

    Example:
        >>> layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="bfloat16")
        >>> layer.build((None, 1))
        >>> optimizer = LowPrecision(keras.optimizers.SGD(1.0), rounding="kahan")
        >>> for _ in range(100):
        ...     optimizer.apply([ops.full((1, 1), -1e-3)], layer.trainable_variables)
        >>> abs(float(layer.kernel[0, 0]) - 1.1) < 0.005  # stock SGD would leave it at 1
        True
    """

    def __init__(
        self,
        inner_optimizer,
        rounding: Rounding = "stochastic",
        master_weights: bool = False,
        seed: int = 0,
        name: str | None = None,
    ):
        if rounding not in ROUNDINGS:
            raise ValueError(f"Expected rounding in {ROUNDINGS}. Received: rounding={rounding!r}. Pass 'stochastic'.")
        if master_weights and rounding == "kahan":
            raise ValueError("Master weights lose nothing that Kahan's compensation could keep. Pass one of the two.")
        if isinstance(inner_optimizer, LowPrecision):
            raise ValueError("The optimizer is wrapped in LowPrecision already. Pass its `inner_optimizer`.")
        super().__init__(inner_optimizer, name, rounding=rounding, master_weights=master_weights, seed=seed)
        self._undecayed = []
        self._undecayed_names = []

    @property
    def _keeps_float32_weights(self):
        return self.master_weights or keras.backend.backend() == "tensorflow"

    def build(self, variables):
        """Makes the inner optimizer's slots, in float32, for these weights.

        Args:
            variables: list of `keras.Variable`.
        """
        variables = list(variables)
        self._weights = variables
        self._stand_ins = []
        self._compensations = []
        for variable in variables:
            is_half = _bridge.stored_dtype(variable) in HALF_DTYPES
            self._stand_ins.append(_bridge_variables.stand_in(variable, "float32") if is_half else variable)
            compensated = is_half and self.rounding == "kahan"
            self._compensations.append(
                self.add_variable_from_reference(variable, name="compensation") if compensated else None
            )
        if self._undecayed or self._undecayed_names:
            undecayed = [s for v, s in zip(variables, self._stand_ins, strict=True) if _is_in(v, self._undecayed)]
            self.inner_optimizer.exclude_from_weight_decay(undecayed, self._undecayed_names)
        for variable, stand_in in self._halves():  # ScheduleFreeAdamW's slots begin as copies of the weights
            stand_in.assign(ops.cast(variable.value, "float32"))
        super().build(self._stand_ins)
        for _, stand_in in self._halves():
            if not self._keeps_float32_weights:
                _bridge_variables.release(stand_in)
        _bridge_optimizers.mark_built(self, variables)

    def _halves(self):
        return [(v, s) for v, s in zip(self._weights, self._stand_ins, strict=True) if v is not s]

    @property
    def own_variables(self) -> dict[str, keras.Variable]:
        """Compensations and master weights by name."""
        if not self.built:
            return {}
        kept = {f"master_{i}": s for i, (_, s) in enumerate(self._halves())} if self.master_weights else {}
        return {f"compensation_{i}": c for i, c in enumerate(self._compensations) if c is not None} | kept

    @property
    def variables(self):
        """The state: compensations, master weights, and the inner optimizer's variables."""
        return [*self.own_variables.values(), *self.inner_optimizer.variables]

    def _update(self, grads, weights):
        places = [self._place(weight) for weight in weights]
        for place in places:
            self._load(place)
        step = self.inner_optimizer.iterations
        grads = [None if g is None else ops.cast(g, "float32") for g in grads]
        self.inner_optimizer.apply(grads, [self._stand_ins[place] for place in places])
        for place in places:
            self._store(place, step)

    def _place(self, weight):
        for place, known in enumerate(self._weights):
            if known is weight:
                return place
        raise ValueError(
            f"Unknown variable '{weight.path}'. The optimizer was built for other weights: make a new one for these."
        )

    def _load(self, place):
        """Gives the inner optimizer the weight in float32."""
        weight, stand_in = self._weights[place], self._stand_ins[place]
        if weight is stand_in:
            return
        value = ops.cast(weight.value, "float32")
        if self._compensations[place] is not None:
            value = value + ops.cast(self._compensations[place].value, "float32")
        if self.master_weights:
            rounded = rounding.on_grid(stand_in.value, _bridge.stored_dtype(weight))
            value = ops.where(ops.equal(rounded, value), stand_in.value, value)
        stand_in.assign(value)

    def _store(self, place, step):
        """Rounds what the inner optimizer made of the weight back to the weight's dtype."""
        weight, stand_in, compensation = self._weights[place], self._stand_ins[place], self._compensations[place]
        if weight is stand_in:
            return
        value, dtype = stand_in.value, _bridge.stored_dtype(weight)
        if compensation is not None:
            zeros = ops.zeros(weight.shape, dtype)
            rounded, lost = rounding.kahan_add(zeros, value, zeros)
            compensation.assign(lost)
        elif self.rounding == "stochastic" and not self.master_weights:
            bits = rounding.random_bits(tuple(weight.shape), self._seed_of(place, step))
            rounded = rounding.stochastic(value, dtype, bits)
        else:
            rounded = rounding.nearest(value, dtype)
        weight.assign(rounded)
        if not self._keeps_float32_weights:
            _bridge_variables.release(stand_in)

    def _seed_of(self, place, step):
        # Odd multipliers keep the seeds of different weights and steps apart (Knuth's multiplicative hashing).
        base = (self.seed * 0x85EBCA6B + place * 0x9E3779B1) % 2**32
        step = ops.multiply(ops.cast(step, "uint32"), ops.convert_to_tensor(0xC2B2AE35, dtype="uint32"))
        return ops.add(step, ops.convert_to_tensor(base, dtype="uint32"))

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes weights from the inner optimizer's weight decay; before `build`.

        Args:
            var_list: list of `keras.Variable`.
            var_names: list of str, regexes searched in the variables' names.

        Raises:
            ValueError: the optimizer is built.
        """
        if self.built:
            raise ValueError("Expected to be called before the optimizer is built. Make a new one to exclude weights.")
        self._undecayed = list(var_list or [])
        self._undecayed_names = list(var_names or [])

    def finalize_variable_values(self, var_list):
        """Replaces the weights by the inner optimizer's moving averages, if it keeps them, rounded to nearest."""
        places = [self._place(weight) for weight in var_list]
        for place in places:
            self._load(place)
        self.inner_optimizer.finalize_variable_values([self._stand_ins[place] for place in places])
        for weight, stand_in in (pair for pair in self._halves() if _is_in(pair[0], var_list)):
            weight.assign(rounding.nearest(stand_in.value, _bridge.stored_dtype(weight)))


def _is_in(variable, variables):
    """Returns whether a list holds this very variable; `==` would compare values."""
    return any(variable is other for other in variables)
