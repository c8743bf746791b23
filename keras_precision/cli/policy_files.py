"""Policies that commands are given by name or in a file."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import click
import keras

from keras_precision import _bridge, policies
from keras_precision.files import written_whole
from keras_precision.formats import FORMATS
from keras_precision.layers import convert
from keras_precision.policies.names import split_quantized
from keras_precision.policies.policy import float_name
from keras_precision.policies.resolve import attached


def read_policy(text: str, model: keras.Model, option: str = "--policy") -> keras.DTypePolicy:
    """Returns the policy that a user means.

    Args:
        text: a policy's name; a bare format, which takes each layer's own
            policy as its source; or a .json file with what `write_policy` or
            `search --json` wrote.
        model: that it is for.
        option: what the user calls it.

    Raises:
        click.BadParameter: there is no such policy, or the file holds none.
    """
    if text.endswith(".json"):
        return _from_file(Path(text), option)
    try:
        bare = split_quantized(text)
        is_bare = bare is not None and bare[1] is None
        return _by_layer(text, model) if is_bare else policies.get(text)
    except (TypeError, ValueError) as error:
        formats = ", ".join(FORMATS)
        raise click.BadParameter(
            f"Expected a policy's name or a format, one of {formats}. Received: {text!r}.", param_hint=option
        ) from error


def write_policy(policy: keras.DTypePolicy, path: Path) -> None:
    """Writes a policy as JSON, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(policies.serialize(policy), indent=2))


def _by_layer(text, model):
    """Returns the map that gives each layer a format from its own policy, which is most often the default's source."""
    layers = [layer for layer in _bridge.flatten_layers(model) if convert.has_float_policy(layer)]
    sources = {_bridge.layer_path(x): float_name(attached(x)) for x in layers if _bridge.own_variables(x)}
    common = collections.Counter(sources.values()).most_common(1)
    default = common[0][0] if common else float_name(model.dtype_policy)
    others = {f"path:{path}": f"{text}_from_{own}" for path, own in sources.items() if own != default}
    return policies.DTypePolicyMap(f"{text}_from_{default}", others)


def _from_file(path, option):
    try:
        found = json.loads(path.read_text())
        return policies.deserialize(found.get("policy_map", found))
    except OSError as error:
        raise click.BadParameter(
            f"Expected a file. Received: '{path}'. {error.strerror}.", param_hint=option
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise click.BadParameter(
            f"Expected a policy that `search --save-policy` wrote. Received: '{path}', which holds none.",
            param_hint=option,
        ) from error
