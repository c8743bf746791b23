"""Policies that commands are given by name or in a file."""

from __future__ import annotations

import json
from pathlib import Path

import click
import keras

from keras_precision import policies
from keras_precision.cli.output import bad_input
from keras_precision.files import written_whole
from keras_precision.policies.names import split_quantized
from keras_precision.policies.policy import float_name


def read_policy(text: str, model: keras.Model, option: str = "--policy") -> keras.DTypePolicy:
    """Returns the policy that a user means.

    Args:
        text: a policy's name; a bare format, which takes the model's own
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
        return policies.get(f"{text}_from_{float_name(model.dtype_policy)}" if is_bare else text)
    except (TypeError, ValueError) as error:
        raise bad_input(error, option) from error


def write_policy(policy: keras.DTypePolicy, path: Path) -> None:
    """Writes a policy as JSON, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(policies.serialize(policy), indent=2))


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
