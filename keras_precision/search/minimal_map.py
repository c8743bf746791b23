"""A policy map with few rules that gives each layer the policy that was chosen for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import keras

from keras_precision.policies import rules
from keras_precision.policies.policy_map import DTypePolicyMap

Accepts = Callable[[int, keras.DTypePolicy], bool]


def minimal_map(
    layers: Sequence[keras.Layer],
    paths: Sequence[str],
    classes: Sequence[type],
    chosen: Sequence[keras.DTypePolicy],
    accepts: Accepts,
) -> DTypePolicyMap:
    """Returns the map of fewest rules that a greedy cover finds, whose rules hold in any order.

    Keys are names, ends of paths, both with `*` for numbers, all of a layer
    (`block/**`), or classes; each matches only layers that its policy suits.
    Of two maps with equally many rules the one whose default suits more
    layers is taken.

    Args:
        layers: all layers that policies are meant for.
        paths: theirs.
        classes: theirs, before anything specialised them.
        chosen: the policy of each.
        accepts: (index, policy) -> whether the layer does the same under it.
    """
    keys = _keys(layers, paths, classes)
    found = []
    for default in dict.fromkeys(chosen):
        others = {index for index in range(len(layers)) if not accepts(index, default)}
        found.append((default, _cover(keys, others, chosen, accepts), len(others)))
    default, cover, _ = min(found, key=lambda entry: (len(entry[1]), entry[2], entry[0].name))
    return DTypePolicyMap(default, cover)


def _cover(keys, others, chosen, accepts):
    """Returns key -> policy, so that each of the other layers has a rule and none has a wrong one."""
    suited = []
    for key, matched in keys.items():
        for policy in dict.fromkeys(chosen[index] for index in sorted(matched & others)):
            if all(accepts(index, policy) for index in matched):
                suited.append((key, policy, matched))
    cover, left = {}, set(others)
    while left:
        key, policy, matched = max(suited, key=lambda entry: (len(entry[2] & left), -_complexity(entry[0])))
        cover[key] = policy
        left -= matched
    return cover


def _complexity(key):
    return 100 * (rules.kind_and_text(key)[0] != "path") + len(key)


def _keys(layers, paths, classes):
    """Returns key -> indices of the layers that it matches, for all keys that could serve."""
    texts = {f"path:{path}": None for path in paths}
    for path, cls in zip(paths, classes, strict=True):
        texts |= dict.fromkeys(_texts(path))
        texts[rules.canonical_key(cls)] = None
    keys = {}
    for text in texts:
        matcher = rules.Matcher([text], {})
        keys[text] = {index for index, layer in enumerate(layers) if matcher.find(paths[index], layer) is not None}
    return keys


def _texts(path) -> Iterator[str]:
    parts = path.split("/")
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            literal = "/".join(parts[start:end])
            for text in (literal, re.sub(r"\d+", "*", literal), f"{re.sub(r'_?[0-9]+$', '', literal)}*"):
                whole = text if end == len(parts) else f"{text}/**"
                kind = "path" if text == literal and end == len(parts) else "glob"
                if kind == "glob" and re.search(r"[?\[\]]", literal):
                    continue  # would stand for something else
                yield whole if rules.kind_and_text(whole) == (kind, whole) else f"{kind}:{whole}"
