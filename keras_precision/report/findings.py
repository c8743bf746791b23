"""What is wrong with what an audit has measured, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from keras_precision import dtypes
from keras_precision.report.alignment import SMALLEST_THAT_MATTERS, Dimension
from keras_precision.report.measure import KINDS, Measured
from keras_precision.report.result import Finding, Severity

# Below this the error is a third of the signal, and outputs change in kind. 4-bit weights alone give about 20 dB.
LOW_SQNR_DB = 10.0
# A quarter of the gradients of a layer's weights that round to 0. Of the healthy models of the tests none loses one in
# 100,000 under mixed_float16 with a loss scale of 2**15.
LOST_GRADIENTS = 0.25

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in messages of Keras

_OF = {
    "weights": "its weights",
    "activations": "its outputs",
    "activation_gradients": "the gradients with respect to its outputs",
    "weight_gradients": "the gradients of its weights",
}
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


def findings_of(
    measured: Measured, paths: Sequence[str], policies: Sequence[str], unaligned: Sequence[tuple[Dimension, ...]]
) -> tuple[Finding, ...]:
    """Returns what is wrong, errors first, each in the order of computation.

    Args:
        measured: what two passes have shown.
        paths: of the layers, by place.
        policies: names of their policies.
        unaligned: their dimensions that the hardware does not speed up.
    """
    found = [
        *_leaks(measured, paths, policies),
        *_overflows(measured, paths),
        *_underflows(measured, paths),
        *_inaccurate(measured, paths),
        *_unaligned(unaligned, paths),
    ]
    return tuple(sorted(found, key=lambda finding: _ORDER[finding.severity]))


def _leaks(measured, paths, policies) -> Iterator[Finding]:
    for leak in measured.leaks:
        path, policy = paths[leak.layer], policies[leak.layer]
        if leak.error is not None:
            error = " ".join(_COLOURS.sub("", str(leak.error)).split())
            message = (
                f"Layer '{path}' fails under '{policy}' and runs in float32: it mixes dtypes ({type(leak.error).__name__}: "
                f"{error[:200]}). Make its constants in self.compute_dtype, or give it the policy 'float32'. The rest of "
                "this audit has it in float32."
            )
            yield Finding("dtype_leak", path, "activations", message, "error")
            continue
        message = (
            f"Layer '{path}' computes in {leak.dtype} although its policy '{policy}' says 16 bits: something in its call is "
            f"{leak.dtype}, such as ops.ones(shape), which takes floatx. Make constants with dtype=self.compute_dtype, or "
            "give the layer the policy 'float32' if that is what you want."
        )
        yield Finding("dtype_leak", path, "activations", message, "warning")


def _overflows(measured, paths) -> Iterator[Finding]:
    """Yields every tensor that does not fit, and else the first one that is inf or NaN, which spreads from there."""
    told = set()
    for layer, kind, stats in _in_order(measured):
        path = paths[layer]
        if stats.overflow and stats.dtype != "float32":
            largest, limit = f"{stats.largest:.4g}", f"{dtypes.info(stats.dtype).max:.4g}"
            told.add(_pass_of(kind))
            message = (
                f"In layer '{path}', {stats.overflow:.2%} of {_OF[kind]} do not fit {stats.dtype}: |values| reach {largest}, "
                f"and {stats.dtype} ends at {limit}. Give the layer the policy 'float32' or 'mixed_bfloat16' in a "
                "DTypePolicyMap, or scale its inputs or weights down."
            )
            yield Finding("overflow", path, kind, message, "error")
        elif stats.overflow:
            told.add(_pass_of(kind))
            message = (
                f"In layer '{path}', {stats.overflow:.2%} of {_OF[kind]} are inf or NaN in float32 too, so no policy is to "
                "blame. Look at the data and the learning rate."
            )
            yield Finding("not_finite", path, kind, message, "error")
        elif stats.nonfinite and not told & {"forward", _pass_of(kind)}:
            told.add(_pass_of(kind))
            message = (
                f"In layer '{path}', {stats.nonfinite:.2%} of {_OF[kind]} are inf or NaN in {stats.dtype}, where float32 "
                f"gives up to {stats.largest:.4g}: an intermediate result overflows. Give the layer the policy 'float32' in "
                "a DTypePolicyMap, or register its class with register_safe_layer."
            )
            yield Finding("overflow", path, kind, message, "error")


def _underflows(measured, paths) -> Iterator[Finding]:
    for layer, kind, stats in _in_order(measured):
        if stats.dtype == "float32" or not stats.histogram:
            continue
        lost = dtypes.info(stats.dtype).tiny > stats.largest > 0
        if not lost and (kind != "weight_gradients" or stats.underflow < LOST_GRADIENTS):
            continue
        tiny = f"{dtypes.info(stats.dtype).tiny:.2g}"
        what = "all" if lost else f"{stats.underflow:.0%}"
        below = f"lie below {tiny}, the smallest normal {stats.dtype}" if lost else f"round to 0 in {stats.dtype}"
        is_gradient = kind.endswith("gradients")
        scaled = f" (times a loss scale of {measured.loss_scale:g})" if is_gradient else ""
        remedy = (
            "Train with mixed_bfloat16, which has float32's range, or raise the loss scale (LossScaleOptimizer's "
            "initial_scale)"
            if is_gradient
            else "Give the layer the policy 'float32' or 'mixed_bfloat16' in a DTypePolicyMap, or scale its inputs up"
        )
        message = f"In layer '{paths[layer]}', {what} of {_OF[kind]}{scaled} {below}. {remedy}."
        yield Finding("underflow", paths[layer], kind, message, "error" if lost else "warning")


def _inaccurate(measured, paths) -> Iterator[Finding]:
    for layer in measured.order:
        ratio = measured.differences[layer].sqnr_db if layer in measured.differences else None
        if ratio is None or ratio >= LOW_SQNR_DB:
            continue
        message = (
            f"From layer '{paths[layer]}' on, outputs are far from float32's: {ratio:.1f} dB, a relative error of "
            f"{10 ** (-ratio / 20):.0%}. Give this layer, or the one before it, a policy of more bits in a DTypePolicyMap."
        )
        yield Finding("low_sqnr", paths[layer], "activations", message, "warning")
        return


def _unaligned(unaligned, paths) -> Iterator[Finding]:
    for path, dimensions in zip(paths, unaligned, strict=True):
        for dimension in dimensions:
            if dimension.size < SMALLEST_THAT_MATTERS:
                continue
            message = (
                f"Layer '{path}' multiplies by '{dimension.weight}' with a dimension of {dimension.size}, no multiple of "
                f"{dimension.multiple}: tensor cores and matrix units run slower or not at all. Make it {dimension.padded}."
            )
            yield Finding("unaligned", path, dimension.weight, message, "info")


def _in_order(measured):
    """Yields (layer, kind, statistics) as a step computes them."""
    places = {layer: place for place, layer in enumerate(measured.order)}
    for kind in KINDS:
        order = list(reversed(measured.order)) if kind.endswith("gradients") else measured.order
        others = sorted({layer for layer, its_kind in measured.tensors if its_kind == kind and layer not in places})
        for layer in [*order, *others]:
            if (layer, kind) in measured.tensors:
                yield layer, kind, measured.tensors[layer, kind]


def _pass_of(kind):
    return "backward" if kind.endswith("gradients") else "forward"
