"""Policies by layer: ordered rules, each a key and a policy."""

from collections.abc import Callable, Iterable, Mapping

import keras

from keras_precision import _bridge
from keras_precision.policies import registry, rules
from keras_precision.policies.names import split_quantized
from keras_precision.policies.policy import float_name
from keras_precision.policies.quantized import quantized_policy


@keras.saving.register_keras_serializable(package="keras_precision")
class DTypePolicyMap(keras.dtype_policies.DTypePolicyMap):
    """Gives each layer the policy of the first rule that matches it.

    An exact path comes first; then rules are tried in order. Keys are

    - paths or names: `"encoder/dense"`, `"dense"`;
    - globs: `"encoder/*"` (one level), `"encoder/**"` (all levels);
    - regexes, matched whole: `".*/attention/.*"`;
    - layer classes, which cover their subclasses: `keras.layers.Embedding`;
    - functions from a layer to bool; registered with
      `keras.saving.register_keras_serializable` if the map shall be saved.

    A string says its kind by a prefix where it would be read otherwise:
    `"glob:..."`, `"regex:..."`, `"path:..."`, `"class:Dense"`. String keys
    match from the path's start or from after any `/`.

    Args:
        default_policy: the policy of layers that no rule matches; None takes
            the global policy, and a loaded map takes the one in force then.
        policy_map: dict of keys to policies or their names. A bare format
            name takes the default policy as its source.

    Raises:
        TypeError: `policy_map` is not a dict, or a key of a wrong type.
        ValueError: an unknown policy, a malformed regex, or a map inside the
            map.

    Example:
        >>> policies = DTypePolicyMap("mixed_bfloat16", {keras.layers.Softmax: "float32", "head": "float32"})
        >>> policies["head"].name, policies["body/dense"].name
        ('float32', 'mixed_bfloat16')
    """

    __hash__ = None  # rules can be added

    def __init__(self, default_policy=None, policy_map: Mapping | None = None):
        default = registry.get(default_policy)
        if default_policy is not None and isinstance(default, keras.dtype_policies.DTypePolicyMap):
            raise ValueError(
                "`default_policy` cannot be a `DTypePolicyMap`. Pass a policy or its name, and give the other "
                "map's rules to this one."
            )
        if policy_map is not None and not isinstance(policy_map, dict):
            raise TypeError(
                "If specified, `policy_map` must be a dict. "
                f"Received: policy_map={policy_map!r} of type {type(policy_map).__name__}"
            )
        self._default_policy_arg = default_policy
        self._default_policy = getattr(default, "default_policy", default)  # the global policy may be a map
        self._policy_map: dict[str, keras.DTypePolicy] = {}
        self._predicates: dict[str, Callable] = {}
        self._matcher: rules.Matcher | None = None
        self._matched: set[str] = set()
        for key, policy in (policy_map or {}).items():
            self[key] = policy

    @property
    def default_policy(self) -> keras.DTypePolicy:
        """The policy of layers that no rule matches."""
        return self._default_policy

    @property
    def name(self) -> str:
        return f"map_{self.default_policy.name}"

    @property
    def output_dtype(self) -> str:
        """The default policy's output dtype."""
        return registry.output_dtype(self.default_policy)

    def __getitem__(self, path: str) -> keras.DTypePolicy:
        """Returns a key's own policy, else what string rules give to a path; `resolve` tries all kinds of rules."""
        text = rules.canonical_key(path)
        key = text if text in self._policy_map else self._find(text)
        return self.default_policy if key is None else self._policy_map[key]

    def __setitem__(self, key, policy):
        text = rules.canonical_key(key)
        if text in self._policy_map:
            raise ValueError(
                f"{text} already exist in the DTypePolicyMap with value {self._policy_map[text]!r}. "
                "Delete the rule first, or order the rules so that the first match is the one you want."
            )
        predicates = dict(self._predicates)
        if rules.kind_and_text(text)[0] == "predicate":
            predicates[text] = rules.find_predicate(text) if isinstance(key, str) else key
        policy = self._policy_of(text, policy)
        rules.Matcher([text], predicates)  # a malformed regex is refused before the map changes
        self._policy_map[text] = policy
        self._predicates = predicates
        self._matcher = None

    def _policy_of(self, text, policy):
        if policy is None:
            raise ValueError(
                f"Cannot interpret the assigned value of '{text}'. Expected a policy or its name. Received: None. "
                "Leave the rule out to use the default policy."
            )
        try:
            bare = split_quantized(policy) if isinstance(policy, str) else None
            if bare is not None and bare[1] is None:
                return quantized_policy(bare[0], float_name(self.default_policy))
            policy = registry.get(policy)
        except (TypeError, ValueError) as e:
            raise ValueError(f"Cannot interpret the assigned value of '{text}'. {e}") from e
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            raise ValueError(
                f"Cannot interpret the assigned value of '{text}': a map cannot hold a map. "
                "Add the inner map's rules to this one, their keys prefixed with the path."
            )
        return policy

    def __delitem__(self, key):
        text = rules.canonical_key(key)
        del self._policy_map[text]
        self._predicates.pop(text, None)
        self._matched.discard(text)
        self._matcher = None

    def __contains__(self, key):
        return rules.canonical_key(key) in self._policy_map

    def __eq__(self, other):
        if not isinstance(other, DTypePolicyMap):
            return False
        return (
            self.default_policy == other.default_policy
            and list(self._policy_map.items()) == list(other._policy_map.items())
            and self._predicates == other._predicates
        )

    def __copy__(self):
        """Returns a map whose rules change apart from this one's; both note which rules have matched."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, _policy_map=dict(self._policy_map), _predicates=dict(self._predicates))
        return twin

    def _find(self, path, layer=None):
        if self._matcher is None:
            self._matcher = rules.Matcher(self._policy_map, self._predicates)
        return self._matcher.find(path, layer)

    def rule_for(self, layer: keras.Layer, path: str | None = None) -> str | None:
        """Returns the key that decides for a layer; None where the default policy does.

        Args:
            layer: the layer, built or not.
            path: str, the layer's path if it is to be taken for another one.
        """
        return self._find(_bridge.layer_path(layer) if path is None else path, layer)

    def resolve(self, layer: keras.Layer) -> keras.DTypePolicy:
        """Returns the policy of a layer, and remembers that its rule matched."""
        key = self.rule_for(layer)
        if key is None:
            return self.default_policy
        self._matched.add(key)
        return self._policy_map[key]

    def unmatched(self) -> list[str]:
        """Returns the keys that have decided for no layer so far, in order."""
        return [key for key in self._policy_map if key not in self._matched]

    def explain(self, model: keras.Layer):
        """Returns which rule decides for each layer of a model, and the rules that match none.

        Args:
            model: a model or layer, built or not; it need not use this map.

        Returns:
            An `Explanation`, which prints as a table.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")], name="net")
            >>> explanation = DTypePolicyMap("mixed_bfloat16", {"head": "float32", "tail": "float32"}).explain(model)
            >>> [(row.path, row.rule, row.policy) for row in explanation.rows if row.rule]
            [('net/head', 'head', 'float32')]
            >>> explanation.unmatched
            ('tail',)
        """
        from keras_precision.policies.explain import explain

        return explain(self, model)

    def get_config(self) -> dict:
        """Returns the constructor's arguments, JSON-ready; changes nothing."""
        for key, predicate in self._predicates.items():
            rules.require_registered(key, predicate)
        default = self._default_policy_arg
        return {
            "default_policy": None if default is None else registry.serialize(self._default_policy),
            "policy_map": {key: registry.serialize(policy) for key, policy in self._policy_map.items()},
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "DTypePolicyMap":
        """Returns the map that `get_config` described."""
        with keras.saving.custom_object_scope(custom_objects or {}):
            return cls(
                default_policy=config["default_policy"],
                policy_map={key: registry.get(policy) for key, policy in config["policy_map"].items()},
            )

    def __repr__(self):
        mapping = [(key, policy.name) for key, policy in self._policy_map.items()]
        return f"<DTypePolicyMap default_policy={self.default_policy.name}, mapping={mapping}>"


def layers_matching(layers: Iterable[keras.Layer], keys: Iterable, argument: str) -> list[keras.Layer]:
    """Returns the layers that one of some keys matches, in their order.

    Args:
        layers: to choose from.
        keys: as in a `DTypePolicyMap`.
        argument: what the user calls the keys.

    Raises:
        ValueError: a key matches none.
    """
    chosen = DTypePolicyMap("float32", {key: "float32" for key in keys})
    rules_of = {layer: chosen.rule_for(layer) for layer in layers}
    idle = sorted(set(chosen) - set(rules_of.values()))
    if idle:
        raise ValueError(f"Expected keys that match layers in {argument}. Received: {idle}, which match none.")
    return [layer for layer, rule in rules_of.items() if rule is not None]
