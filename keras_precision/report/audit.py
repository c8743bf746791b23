"""Audits what a precision policy does to a model, layer by layer."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import keras

from keras_precision import _bridge, _bridge_models, dtypes, hardware
from keras_precision.layers import convert
from keras_precision.policies import registry, resolve
from keras_precision.progress import progress_bar
from keras_precision.report import copies, measure, passes
from keras_precision.report.alignment import unaligned
from keras_precision.report.findings import findings_of
from keras_precision.report.memory import estimate, optimizer_bytes
from keras_precision.report.program import Program, traced
from keras_precision.report.recorder import LayerFailed, Leak, layer_of_scope
from keras_precision.report.result import Audit, LayerAudit

# What a LossScaleOptimizer starts with, for models that are not compiled.
_DEFAULT_LOSS_SCALE = 2.0**15


def audit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    loss: Any = None,
    policy: Any = None,
    *,
    batch_size: int | None = 32,
    verbose: int = 1,
) -> Audit:
    """Runs a model once under a policy and once in float32, and returns what differs, overflows and gets lost.

    Both passes run on copies: the model, its optimizer and all random states
    stay as they are. Dropout and noise are off, so that the passes differ by
    precision alone. With targets the passes are those of a training step:
    forward and backward, batch statistics included; without, those of
    inference. Every value is looked at, in float32 where it still has its
    magnitude, and held against the range of the dtype that the policy
    computes it in. Gradients are multiplied by the loss scale first, as
    training does: that of the model's `LossScaleOptimizer`, else 2**15 if a
    layer computes in float16, brought down as dynamic scaling would do until
    no gradient overflows.

    Memory is estimated from the recorded step: weights as stored, gradients,
    the optimizer's state (if the model is compiled), and activations as XLA
    keeps them, see `report.memory`.

    Args:
        model: a built `keras.Model` whose config can be read: Sequential,
            functional, or subclassed with `get_config`. Quantized or not.
        x: array or structure of arrays, as `fit` takes them.
        y: array or structure of arrays of as many rows; None to audit the
            forward pass alone.
        loss: as `compile` takes it; None for the one that the model is
            compiled with. A custom `train_step` is not run.
        policy: a policy, its name, or a `DTypePolicyMap`, quantized or not;
            None for the policies that the model has now.
        batch_size: int >= 1, rows that are used, from the first on; None for
            all.
        verbose: 0 for no progress bar. There is none in a pipe either.

    Returns:
        An `Audit`, which prints as a table.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: the model is not built or can't be copied; x is empty or y
            has other rows; y without a loss, or a loss without y; an unknown
            policy.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")], name="net")
        >>> x = np.full((2, 8), 3e4, "float32")
        >>> model.layers[0].set_weights([np.ones((8, 4)), np.zeros(4)])
        >>> report = audit(model, x, policy="mixed_float16")
        >>> [(finding.kind, finding.layer, finding.tensor) for finding in report.findings]
        [('overflow', 'net/head', 'activations')]
        >>> report.layers[1].tensors["activations"].largest
        240000.0
    """
    _require_model(model)
    candidate_policy = copies.as_policy(policy)
    batch = _batch(model, x, y, loss, batch_size)
    rows = keras.tree.flatten(batch.x)[0].shape[0]
    with _bridge_models.session_kept(), warnings.catch_warnings(), progress_bar("audit", "passes", verbose) as progress:
        task = progress.add_task("audit", total=3)  # in float32, under the policy, and recorded as a program
        warnings.filterwarnings(
            "ignore", "Expected a dtype that this device", hardware.PrecisionWarning
        )  # it's reported
        candidate = copies.copied(model, candidate_policy)
        weights, optimizer, scale, source = _optimized(model, candidate, candidate_policy)
        reference_copy = copies.copied(model, registry.get("float32"))
        names = [resolve(layer).name for layer in _bridge.flatten_layers(candidate)]
        judged = measure.judged_dtypes(candidate)
        reference = _reference(reference_copy, judged, batch)
        progress.advance(task)
        settled = reference.settled_scale(scale)
        if settled < scale:
            source = f"{source}, brought down from {scale:g} until no gradient overflows"
        measured = _measured(candidate, reference, batch, settled)
        progress.advance(task)
        program = traced(candidate, batch)
        progress.advance(task)
        memory = estimate(program, weights, optimizer, rows)
        dimensions = [unaligned(layer) for layer in _bridge.flatten_layers(candidate)]
    originals = _bridge.flatten_layers(model)
    paths = [_bridge.layer_path(layer) for layer in originals]
    casts, cast_bytes = _casts(program)
    layers = tuple(
        LayerAudit(
            path=paths[place],
            class_name=_bridge.original_class(type(layer)).__name__,
            policy=names[place],
            compute_dtype=judged[place],
            tensors={k: measured.tensors[place, k] for k in measure.kinds_of(measured.tensors, place)},
            sqnr_db=measured.differences[place].sqnr_db if place in measured.differences else None,
            casts=casts[place],
            cast_bytes=cast_bytes[place],
            unaligned=dimensions[place],
        )
        for place, layer in enumerate(originals)
        if not isinstance(layer, keras.layers.InputLayer)
    )
    return Audit(
        model=model.name,
        policy="the policies it has" if candidate_policy is None else candidate_policy.name,
        loss_scale=settled,
        loss_scale_source=source,
        layers=layers,
        order=tuple(paths[place] for place in measured.order),
        memory=memory,
        hardware={dtype: _speed(dtype) for dtype in dict.fromkeys(judged)},
        findings=findings_of(measured, paths, names, dimensions),
    )


def _require_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a keras.Model. Received: {model!r} (of type {type(model).__name__}). Wrap a layer in a "
            "keras.Sequential with an Input."
        )
    for layer in _bridge.flatten_layers(model):
        if not layer.built:
            raise ValueError(
                f"Layer '{_bridge.layer_path(layer)}' is not built, so it has no weights to audit. Call the model on data "
                "first, or load its weights."
            )


def _batch(model, x, y, loss, batch_size):
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"Expected batch_size >= 1 or None. Received: batch_size={batch_size!r}. Pass 32.")
    if y is None and loss is not None:
        raise ValueError(
            "Expected y, which the loss compares outputs with. Received a loss without. Pass y, or no loss."
        )
    arguments = _bridge.compile_arguments(model) if model.compiled else {}
    weights = arguments.get("loss_weights") if loss is None else None
    loss = arguments.get("loss") if loss is None else loss
    if y is not None and loss is None:
        raise ValueError(
            f"Expected a loss for y: model '{model.name}' is not compiled with one. Pass loss, as you would to compile, or "
            "leave y out to audit the forward pass alone."
        )
    rows = _row_counts(x, "x")
    if y is not None and _row_counts(y, "y") != rows:
        raise ValueError(f"Expected as many rows in y as in x. Received: {_row_counts(y, 'y')} and {rows}.")
    x, y = (
        None if data is None else keras.tree.map_structure(lambda one: _tensor(one[:batch_size]), data)
        for data in (x, y)
    )
    return passes.Batch(x, y, loss, weights)


def _tensor(array):
    """Returns what `fit` makes of an array: floats in floatx."""
    dtype = keras.backend.standardize_dtype(array.dtype)
    return keras.ops.convert_to_tensor(array, keras.config.floatx() if keras.backend.is_float_dtype(dtype) else None)


def _row_counts(data, name):
    arrays = keras.tree.flatten(data)
    without = [one for one in arrays if not hasattr(one, "shape") or len(one.shape) == 0]
    if without or not arrays:
        raise ValueError(
            f"Expected arrays with a row for each sample in {name}. Received: {type(without[0] if without else data).__name__}. "
            "Pass NumPy arrays or tensors; of a data set, its first batch."
        )
    counts = {one.shape[0] for one in arrays}
    if len(counts) > 1 or counts == {0}:
        raise ValueError(
            f"Expected arrays of one number of rows, 1 or more, in {name}. Received: {sorted(counts)} rows."
        )
    return counts.pop()


def _optimized(model, candidate, policy):
    """Returns bytes of the candidate's weights and of its optimizer, and the loss scale that it trains with."""
    weights = dtypes.measured_bytes(candidate.variables)
    given = model.optimizer if model.compiled else None
    is_float16 = "float16" in measure.judged_dtypes(candidate)
    if given is None:
        scale = (_DEFAULT_LOSS_SCALE, "the default for float16") if is_float16 else (1.0, "none needed")
        return weights, 0, *scale
    if not (policy is None and given.built):
        plain = _bridge.compile_arguments(model)["optimizer"]
        # Under its own policies, whether the loss is scaled is known: it may have been compiled with auto_scale_loss=False.
        scales = policy is not None or isinstance(given, keras.optimizers.LossScaleOptimizer)
        candidate.compile(optimizer=type(plain).from_config(plain.get_config()), auto_scale_loss=scales)
    used = candidate.optimizer if candidate.compiled else given
    size = optimizer_bytes(used, candidate.trainable_variables)
    if isinstance(used, keras.optimizers.LossScaleOptimizer):
        is_own = isinstance(given, keras.optimizers.LossScaleOptimizer)
        value = float(keras.ops.convert_to_numpy((given if is_own else used).dynamic_scale))
        return weights, size, value, "the model's optimizer" if is_own else "what compile would wrap the optimizer with"
    factor = used.loss_scale_factor
    return weights, size, *((float(factor), "the optimizer's loss_scale_factor") if factor else (1.0, "none"))


def _reference(model, judged, batch):
    try:
        passes.prepare(model, batch)
        return measure.Reference(model, judged, batch)
    except LayerFailed as e:
        raise e.error from e  # the model and its data don't fit, whatever the policy


def _measured(candidate, reference, batch, scale):
    """Compares the passes; a layer that only float32 can run is given float32, and told of."""
    failed: list[Leak] = []
    while True:
        try:
            passes.prepare(candidate, batch)
            measured = measure.compare(candidate, reference, batch, scale)
        except LayerFailed as e:
            layer = _bridge.flatten_layers(candidate)[e.layer]
            if any(leak.layer == e.layer for leak in failed):
                raise e.error from e
            failed.append(Leak(e.layer, error=e.error))
            for inner in _bridge.flatten_layers(layer):
                convert.change_policy(inner, registry.get("float32"))
            continue
        measured.leaks[:0] = failed
        return measured


def _casts(program: Program):
    casts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for operation in program.operations:
        if operation.casts is not None:
            layer = layer_of_scope(operation.scope) or 0  # the loss belongs to the model
            casts[layer] += operation.times
            moved = sum(program.bytes_of(value) for value in (*operation.inputs, *operation.outputs))
            sizes[layer] += operation.times * moved
    return casts, sizes


def _speed(dtype):
    if dtype not in hardware.support_matrix().dtypes:
        return "not known"
    cell = hardware.support_matrix().current(dtype)
    return f"{cell.status}: {cell.reason}"
