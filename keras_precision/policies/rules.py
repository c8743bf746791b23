"""Keys of a policy map: which layers a key stands for, and in which order keys win."""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import keras

# Marks that give a string key a meaning outside plain paths. Layer names can't hold ":" before a rule's text,
# so `kind:` prefixes are free to name the kind where a bare string would be read otherwise.
_REGEX_MARKS = re.compile(r"[\\^$+(){}|\[\]]|\.[*+?]")
# As a regex each of these is an error or matches nothing that a path contains, so they can only be globs.
_GLOB_MARKS = re.compile(r"/\*|\*\*|^\*")
_GLOB_PART = re.compile(r"(?P<wildcard>\*\*/|\*\*|\*|\?)|\[(?P<negated>!?)(?P<members>[^]]+)\]|.", re.DOTALL)
_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
# The parts of a simple regex: a literal, or what stands for other texts, which a literal before a quantifier, a set,
# and a group without groups and sets inside do. Flags, look-arounds and a `|` outside groups are no such part.
_REGEX_PART = re.compile(
    r"(?P<literal>[\w/ -]|\\[^\w\s])(?![*+?{])"
    r"|[\w/ .^$-]|\\[^\w\s]|\\[bBdDsSwW]|[*+?]|\{[\d,]*\}"
    r"|\[\^?[^][\\]+\]|\((?:\?:|(?!\?))(?:[^()[\]\\]|\\[dDsSwW])*\)"
)
_PREFIXES = ("path", "glob", "regex", "class", "predicate")


def canonical_key(key) -> str:
    """Returns the text that stands for a key of a map.

    Args:
        key: str, a path, glob or regex; a layer class; or a predicate over
            layers.

    Raises:
        TypeError: none of these.
    """
    if isinstance(key, str):
        return key
    if isinstance(key, type) and issubclass(key, keras.Layer):
        return f"class:{keras.saving.get_registered_name(key)}"
    if callable(key) and not isinstance(key, type) and isinstance(key, Hashable):
        return f"predicate:{_predicate_name(key)}"
    raise TypeError(
        "Expected a key that is a string (a path, a glob such as 'encoder/**', a regex such as '.*/dense_.*'), "
        f"a layer class, or a function from a layer to bool. Received: {key!r} (of type {type(key).__name__})."
    )


def _predicate_name(function):
    if inspect.isfunction(function) and keras.saving.get_registered_name(function) != function.__name__:
        return keras.saving.get_registered_name(function)
    # The address keeps unregistered predicates of one name apart; they can't be saved, see `require_registered`.
    return f"{getattr(function, '__name__', type(function).__name__)}@{id(function):x}"


def require_registered(key: str, predicate: Callable) -> None:
    """Raises ValueError if a file could not name the predicate."""
    if keras.saving.get_registered_object(key.removeprefix("predicate:")) is not predicate:
        raise ValueError(
            f"A map with the predicate {predicate!r} can't be saved, because a file can't hold its code. "
            "Define it with `def` and decorate it with `@keras.saving.register_keras_serializable()` "
            "before you use it as a key."
        )


def find_predicate(key: str) -> Callable:
    """Returns the registered predicate that a saved key names."""
    predicate = keras.saving.get_registered_object(key.removeprefix("predicate:"))
    if predicate is None:
        raise ValueError(
            f"The map's key '{key}' names a predicate that is not registered here. Import the module that "
            "registers it, or pass it in `custom_objects`, before you load."
        )
    return predicate


def kind_and_text(key: str) -> tuple[str, str]:
    """Splits a key's text into its kind (path, glob, regex, class or predicate) and the rest."""
    prefix, colon, text = key.partition(":")
    if colon and prefix in _PREFIXES:
        return prefix, text
    if _GLOB_MARKS.search(key) and not re.search(r"\.[*+?]", key):
        return "glob", key
    if _REGEX_MARKS.search(key):
        return "regex", key
    return ("glob" if "*" in key or "?" in key else "path"), key


def glob_to_regex(glob: str) -> str:
    """Returns the regex of a glob: `**` crosses path components, `*`, `?`, `[ab]` and `[!ab]` stay within one."""
    return _GLOB_PART.sub(_part_to_regex, glob)


def _part_to_regex(part):
    if part["wildcard"]:
        return _WILDCARDS[part["wildcard"]]
    if part["members"]:
        members = re.escape(part["members"]).replace(r"\-", "-")
        return f"(?!/)[{'^' if part['negated'] else ''}{members}]"
    return re.escape(part[0])


class Matcher:
    """Finds the first key of an ordered list that a layer matches.

    A key that is exactly the layer's path comes before all others. Other
    string keys match from the path's start or from after any `/`, so that
    `dense` finds a layer by its name and `attention/query` still finds it
    when the model was wrapped in another one.

    Paths are a dictionary look-up. A regex is tried only where the path holds
    a text that each of its matches holds, the rarest one among the keys,
    since `in` takes 0.03 us and a regex that fails 1 us.

    Args:
        keys: str, canonical keys in order.
        predicates: the functions behind keys of kind predicate.
    """

    def __init__(self, keys: Iterable[str], predicates: dict[str, Callable]):
        self._keys = list(keys)
        self._paths: dict[str, int] = {}
        self._classes: dict[str, int] = {}
        self._predicates: list[tuple[int, Callable]] = []
        self._found_by_path: dict[str, int] = {}
        patterns: list[tuple[int, re.Pattern]] = []
        for index, key in enumerate(self._keys):
            kind, text = kind_and_text(key)
            if kind == "path":
                self._paths.setdefault(text, index)
            elif kind == "class":
                self._classes.setdefault(text, index)
            elif kind == "predicate":
                self._predicates.append((index, predicates[key]))
            else:
                patterns.append((index, _compiled(key, kind, text)))
        required = [_required_texts(pattern.pattern) for _, pattern in patterns]
        shared = Counter(itertools.chain(*required))
        rarest = [min(texts, key=lambda text: (shared[text], -len(text)), default="") for texts in required]
        self._patterns = [(index, text, pattern) for (index, pattern), text in zip(patterns, rarest, strict=True)]

    def find(self, path: str, layer: keras.Layer | None = None) -> str | None:
        """Returns the key that decides for a path (and the layer there), or None.

        Args:
            path: str, `outer/inner/name`.
            layer: the layer, for classes and predicates; None to try string
                keys only.
        """
        last = len(self._keys)
        exact = self._paths.get(path)
        if exact is not None:
            return self._keys[exact]
        best = self._found_by_path.get(path)
        if best is None:
            best = self._found_by_path[path] = self._find_path(path, last)
        if layer is not None:
            if self._classes:
                names = (keras.saving.get_registered_name(base) for base in type(layer).__mro__)
                best = min([best, *(self._classes[name] for name in names if name in self._classes)])
            for index, predicate in self._predicates:
                if index > best:
                    break
                if _holds(predicate, layer, path):
                    best = index
        return self._keys[best] if best < last else None

    def _find_path(self, path, last):
        starts = [0, *(slash.end() for slash in re.finditer("/", path))]
        best = min(self._paths.get(path[start:], last) for start in starts)
        for index, text, pattern in self._patterns:
            if index > best:
                break
            if text in path and any(map(pattern.fullmatch, itertools.repeat(path), starts)):
                return index
        return best


def _holds(predicate, layer, path):
    try:
        return bool(predicate(layer))
    except Exception as e:
        e.add_note(f"Raised by the policy map's predicate {predicate!r} for layer '{path}'.")
        raise


def _compiled(key, kind, text):
    try:
        return re.compile(glob_to_regex(text) if kind == "glob" else text)
    except re.error as e:
        hint = "Mend the brackets." if kind == "glob" else f"Write 'glob:{text}' if it is a glob."
        raise ValueError(f"Expected a valid {kind} in the policy map's key '{key}'. Received: {e}. {hint}") from e


def _required_texts(regex: str) -> list[str]:
    """Returns texts that each match of a regex holds; none where a simple look does not tell."""
    parts = list(_REGEX_PART.finditer(regex))
    if "".join(part[0] for part in parts) != regex:
        return []
    return "".join((part["literal"] or "\n")[-1] for part in parts).split()
