"""Searches the policy of each layer under a budget."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Sequence

import keras

from keras_precision.formats.searched import SEARCHED
from keras_precision.policies.policy_map import layers_matching
from keras_precision.progress import progress_bar
from keras_precision.search import allocation, verification
from keras_precision.search.budget import Amount, Budget
from keras_precision.search.candidates import known_candidates
from keras_precision.search.checkpoint import Checkpoint, Measurement, fingerprint
from keras_precision.search.measuring import SENSITIVITY_SHARE, Clock, Measuring
from keras_precision.search.minimal_map import minimal_map
from keras_precision.search.result import LayerChoice, SearchResult, Sensitivity, Verified
from keras_precision.search.samples import Samples, loss_function
from keras_precision.search.trial import Trial, float_layers, require_float_model

CANDIDATES = (*SEARCHED, "bfloat16")
Policies = tuple[keras.DTypePolicy, ...]


def search_policy(
    model: keras.Model,
    x,
    y=None,
    loss=None,
    *,
    candidates: Sequence = CANDIDATES,
    budget: Budget | Amount | dict = "1%",
    minimize: str | None = None,
    validation_data: tuple | None = None,
    skip: Iterable = (),
    confidence: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
    time_limit: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    verbose: int = 1,
) -> SearchResult:
    """Returns the policy of each layer that takes the fewest bytes within a bound on loss, or the reverse.

    Works on a copy; the model stays as it is. In three steps:

    1. Each candidate is given to each layer alone, and the increase of the
       loss is measured on calibration data.
    2. The increases, each with its standard error, count as adding up. The
       choices that no other beats in cost and in that sum are found by dynamic
       programming.
    3. Along these, choices are measured on held-out data, from the one that
       is predicted to fit on: to cheaper ones while the bound holds, to dearer
       ones, which undo the most harmful policies, while it doesn't. So are all
       policies given to the whole model, and the best of all is returned.

    What a bound on loss or accuracy means: a choice passes if a one-sided
    upper confidence limit of its mean increase, from the standard error of the
    differences sample by sample, is below the bound. The limit's confidence is
    divided over all choices that may be tried (Bonferroni), so that with
    `confidence` the one that is returned keeps the bound on average over the
    data that the held-out samples were drawn from. That takes independent
    samples, as many as make their mean about normal; it promises nothing for
    data of another kind, nor for single samples. Give data that the model was
    not trained on: where it has learned the data by heart, losses there say
    little of others. Where nothing passes, the model's own policies come back.

    A bound on bytes is exact. Seconds are measured, so they are as
    reproducible as the machine; all else is deterministic under a seed.

    Args:
        model: built, with float weights.
        x: inputs, an array (n, ...) or a list or dict of them; half of the
            samples, drawn by `seed`, calibrate and half are held out.
        y: targets (n, ...), likewise.
        loss: `keras.Loss`, its name, or a function of targets and outputs
            (lower is better); None takes the model's compiled one.
        candidates: policies, their names, or bare formats, which take a
            layer's own policy as their source. A float8 policy keeps weights
            as they are, so it is a candidate only where seconds count.
        budget: a `Budget`, a dict of its arguments, or an amount of loss: a
            number, or `"1%"` of the model's loss.
        minimize: "bytes" (the default) or "seconds" of a prediction under a
            bound on loss or accuracy; "loss" under one on bytes or seconds.
        validation_data: (x, y) to hold out; then all of `x` calibrates.
        skip: keys as in a `DTypePolicyMap` of layers to leave as they are.
        confidence: one-sided, in (0.5, 1), that a bound on loss or accuracy
            holds.
        batch_size: int, samples of one prediction.
        seed: int, of the split.
        time_limit: seconds, checked after each measurement; the best that was
            verified until then is returned, and `stopped` says so.
        checkpoint: path of a JSON file that keeps all measurements, so that
            the same search goes on where it was stopped, and another budget
            takes little.
        verbose: 0 for no progress bar. There is none in a pipe either.

    Raises:
        TypeError: `model` is no model, or an argument has a wrong type.
        ValueError: the model is not built or quantized already; there is no
            loss or too little data; a candidate is unknown; no policies fit
            the budget (says the least that is reachable); the checkpoint is
            of another search.

    Example:
        >>> import keras_precision, numpy as np
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="body"), keras.layers.Dense(4)])
        >>> x, y = np.random.default_rng(0).normal(size=(64, 64)), np.arange(64) % 4
        >>> result = search_policy(model, x, model.predict(x, verbose=0), "mse", budget={"max_bytes": "30%"})
        >>> result.bytes_after <= 0.3 * result.bytes_before
        True
        >>> report = keras_precision.quantize(model, result.policy_map)
    """
    require_float_model(model)
    budget = Budget.of(budget)
    counts_time = _counts_time(budget, minimize)
    if not 0.5 < confidence < 1:
        raise ValueError(f"Expected confidence between 0.5 and 1. Received: confidence={confidence}. Pass 0.95.")
    candidates = known_candidates(candidates, counts_time)
    calibration, held_out = _split(x, y, validation_data, batch_size, seed)
    measure_loss = loss_function(model, loss)
    clock = Clock(time_limit)
    trial = Trial(model, next(calibration.batches())[0])
    skipped = layers_matching(float_layers(model), skip, "skip")
    kept = {i for i, layer in enumerate(float_layers(model)) if layer in skipped}
    settings = {"loss": _name(model, loss), "accuracy": budget.bounds_accuracy, "seconds": counts_time}
    store = Checkpoint(checkpoint, fingerprint(trial, calibration, held_out, **settings))
    space = _Space(trial, kept, candidates)
    with progress_bar("search", "measurements", verbose) as progress:
        steps = verification.STEPS if budget.bounds_quality else verification.CHEAPER + 1
        task = progress.add_task("search", total=space.size + len(space.uniform) + steps)
        measuring = Measuring(
            trial,
            calibration,
            held_out,
            measure_loss,
            budget.bounds_accuracy,
            counts_time,
            store,
            lambda: progress.advance(task),
        )
        search = _Search(space, measuring, budget, confidence, counts_time, clock)
        search.measure_layers()
        search.verify()
    return search.result(model, minimize, len(calibration), len(held_out), seed)


def _counts_time(budget, minimize):
    allowed = ("bytes", "seconds") if budget.bounds_quality else ("loss",)
    if minimize not in (None, *allowed):
        raise ValueError(
            f"Expected minimize to be one of {allowed} under a bound of {budget.name}. Received: minimize={minimize!r}."
        )
    return minimize == "seconds" or budget.name == "max_seconds"


def _split(x, y, validation_data, batch_size, seed):
    samples = Samples.of(x, y, batch_size)
    if validation_data is not None:
        if not isinstance(validation_data, tuple | list) or len(validation_data) != 2:
            raise ValueError(f"Expected validation_data=(x, y). Received: {type(validation_data).__name__}.")
        return samples, Samples.of(*validation_data, batch_size, name="validation_data")
    halves = samples.split(seed)
    return [Samples.of(half.x, half.y, batch_size, name="x, y, of which half is held out,") for half in halves]


def _name(model, loss):
    """Returns what tells a loss from another one in a checkpoint."""
    loss = getattr(model, "loss", None) if loss is None else loss
    if isinstance(loss, keras.Loss):
        return type(loss).__name__, {k: v for k, v in vars(loss).items() if isinstance(v, str | int | float)}
    return getattr(loss, "__qualname__", loss)


class _Space:
    """What there is to choose from.

    Attributes:
        trial: copy of the model.
        options: for each layer that may change, its index -> the policies it may have, its own first.
        uniform: candidate's name -> policies of all layers, where each that can has the candidate.
    """

    def __init__(self, trial: Trial, kept: set[int], candidates: Sequence):
        places = [i for i in trial.places() if i not in kept]
        self.trial = trial
        self.options = {
            i: [trial.bases[i], *filter(None, (trial.policy_for(i, c) for c in candidates))] for i in places
        }
        # The largest first: under a time limit they matter most.
        self.options = dict(sorted(self.options.items(), key=lambda item: (-trial.base_bytes[item[0]], item[0])))
        self.uniform: dict[str, Policies] = {}
        for candidate in candidates:
            if any(trial.policy_for(i, candidate) for i in places):
                given = {i: trial.uniform_policy(i, candidate) for i in range(len(trial.bases)) if i not in kept}
                self.uniform[getattr(candidate, "name", str(candidate))] = self.filled(given)
        if not self.uniform:
            raise ValueError(
                "Expected candidates that can change at least one layer. "
                f"Received: {list(candidates)}, which leave all as they are. "
                "Pass a quantized format for Dense, Embedding or convolutional layers, or 'bfloat16'; float8 takes "
                "Dense and EinsumDense layers of 2,048 rows and columns or more, or of the "
                "QuantizedFloat8DTypePolicy's min_features."
            )

    @property
    def size(self) -> int:
        """Number of measurements of single layers."""
        return sum(len(policies) - 1 for policies in self.options.values())

    def filled(self, given: dict[int, keras.DTypePolicy]) -> Policies:
        """Returns the policies of all layers, their own where none is given."""
        return tuple(given.get(i, base) for i, base in enumerate(self.trial.bases))


class _Search:
    """The three steps of a search, and their results."""

    def __init__(self, space, measuring, budget, confidence, counts_time, clock):
        self._space, self._measuring, self._budget, self._clock = space, measuring, budget, clock
        self._confidence, self._counts_time = confidence, counts_time
        tried = len(space.uniform) + verification.STEPS
        self._confidence_each = 1 - (1 - confidence) / tried
        self._alone: dict[tuple[int, keras.DTypePolicy], Measurement] = {}
        self._verified: list[tuple[Policies, Verified, Measurement]] = []
        self._front: list[allocation.Allocation] = []
        self._stopped = ""
        self._add(space.trial.bases, "as it was", measuring.base, predicted=0.0)

    def measure_layers(self):
        """Measures what each candidate does to each layer alone."""
        for number in range(max(map(len, self._space.options.values()))):
            for index, policies in self._space.options.items():
                if 0 < number < len(policies):
                    if self._clock.is_over(SENSITIVITY_SHARE):
                        missing = self._space.size - len(self._alone)
                        self._stopped = (
                            f"the time limit left {missing} of {self._space.size} single choices unmeasured."
                        )
                        return
                    self._alone[index, policies[number]] = self._measuring.alone(index, policies[number])

    def verify(self):
        """Measures choices for all layers on the held-out data."""
        options = {
            i: [policies[0], *(p for p in policies[1:] if (i, p) in self._alone)]
            for i, policies in self._space.options.items()
        }
        self._front = allocation.pareto_front([[self._option(i, p) for p in options[i]] for i in options])
        rest = self._cost(self._measuring.base) - sum(self._own_cost(i) for i in options)

        def policies_at(place):
            chosen = zip(options.items(), self._front[place].choice, strict=True)
            return self._space.filled({i: policies[number] for (i, policies), number in chosen})

        def is_within(place):
            return self._try(policies_at(place), "search", self._front[place].harm)

        self._front = [a._replace(cost=a.cost + rest) for a in self._front]
        if self._budget.bounds_quality:
            limit = self._budget.resolved(self._measuring.base.loss.base)
            fits = (place for place, found in enumerate(self._front) if found.harm <= limit)
            start = len(self._front) // 2 if self._budget.bounds_accuracy else next(fits, len(self._front))
            verification.cheapest_within(len(self._front), start, is_within, self._is_over)
        else:
            last = bisect.bisect_right([found.cost for found in self._front], self._limit()) - 1
            if last < 0:
                raise self._unreachable(self._front[0].cost)
            for place in verification.best_below(len(self._front), last):
                if not self._is_over():
                    is_within(place)
        for name, policies in self._space.uniform.items():
            if not self._is_over():
                self._try(policies, name, predicted=None)

    def _is_over(self):
        is_over = self._clock.is_over()
        if is_over and not self._stopped:
            self._stopped = "the time limit was over before all choices were tried."
        return is_over

    def _try(self, policies, name, predicted):
        return self._add(policies, name, self._measuring.together(policies), predicted)

    def _add(self, policies, name, measured, predicted):
        name = next((uniform for uniform, given in self._space.uniform.items() if given == tuple(policies)), name)
        paired = measured.error if self._budget.bounds_accuracy else measured.loss
        if self._budget.bounds_quality:
            is_base = not self._verified
            is_within = is_base or self._budget.excess(paired, self._confidence_each) <= 0
        else:
            is_within = self._cost(measured) <= self._limit()
        entry = Verified(
            name,
            measured.bytes,
            measured.seconds,
            measured.loss.value,
            measured.loss.increase,
            measured.loss.standard_error,
            1 - measured.error.value if measured.error else None,
            predicted,
            is_within,
        )
        if all(policies != known for known, _, _ in self._verified):
            self._verified.append((tuple(policies), entry, measured))
        return is_within

    def _cost(self, measured):
        return measured.seconds if self._counts_time else measured.bytes

    def _own_cost(self, index):
        return self._measuring.base.seconds if self._counts_time else self._space.trial.base_bytes[index]

    def _limit(self):
        return self._budget.resolved(self._cost(self._measuring.base))

    def _option(self, index, policy):
        found = self._alone.get((index, policy))
        if found is None:
            return allocation.Option(self._own_cost(index), 0.0)
        # An increase below zero is chance. The standard error counts, as it will in the verified bound; that errors of
        # independent layers add up to less only makes the walk start early.
        return allocation.Option(self._cost(found), max(found.loss.increase, 0.0) + found.loss.standard_error)

    def _unreachable(self, least):
        unit = "seconds" if self._counts_time else "bytes"
        least = f"{least:.6g}" if self._counts_time else f"{round(least):,}"
        return ValueError(
            f"Expected a budget that these candidates can keep. Received: {self._budget}, which is "
            f"{self._limit():,.6g} {unit}; the least that they reach is {least}. "
            "Allow that much, or add smaller candidates."
        )

    def _best(self):
        within = [entry for entry in self._verified if entry[1].is_within]
        if not within:
            raise self._unreachable(min(self._cost(measured) for _, _, measured in self._verified))
        if self._budget.bounds_quality:
            return min(within, key=lambda entry: (self._cost(entry[2]), entry[2].loss.value))
        return min(within, key=lambda entry: (entry[2].loss.value, self._cost(entry[2])))

    def result(self, model, minimize, calibration_samples, held_out_samples, seed) -> SearchResult:
        """Returns what was found."""
        trial = self._space.trial
        policies, chosen, _ = self._best()
        policy_map = minimal_map(
            float_layers(model), trial.paths, trial.classes(), policies, lambda i, p: trial.accepts(i, p, policies[i])
        )
        trial.require_gives(policy_map, policies)
        layers, names = [], trial.paths
        for index in trial.places():
            alone = self._alone.get((index, policies[index]))
            before = trial.base_bytes[index]
            is_changed = policies[index] != trial.bases[index]
            after, increase = (alone.bytes, alone.loss.increase) if alone else (before, 0.0)
            layers.append(LayerChoice(names[index], policies[index].name, is_changed, before, after, increase))
        sensitivities = [
            Sensitivity(names[i], p.name, m.bytes, m.loss.increase, m.loss.standard_error, m.seconds)
            for (i, p), m in sorted(self._alone.items(), key=lambda item: item[0][0])
        ]
        return SearchResult(
            policy_map,
            chosen,
            tuple(entry for _, entry, _ in self._verified),
            tuple(layers),
            tuple(sensitivities),
            tuple((found.cost, found.harm) for found in self._front),
            self._budget,
            minimize or ("bytes" if self._budget.bounds_quality else "loss"),
            self._confidence,
            calibration_samples,
            held_out_samples,
            seed,
            self._stopped,
        )
