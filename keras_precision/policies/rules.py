"""Keys of a policy map: which layers a key stands for, and in which order keys win."""

import inspect
import re
from collections.abc import Callable, Hashable, Iterable

import keras

# Marks that give a string key a meaning outside plain paths. Layer names can't hold ":" before a rule's text,
# so `kind:` prefixes are free to name the kind where a bare string would be read otherwise.
_REGEX_MARKS = re.compile(r"[\\^$+(){}|\[\]]|\.[*+?]")
# As a regex each of these is an error or matches nothing that a path contains, so they can only be globs.
_GLOB_MARKS = re.compile(r"/\*|\*\*|^\*")
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
    """Returns the regex of a glob: `*` and `?` stay within one path component, `**` crosses them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", glob)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wildcards[part] if part in wildcards else part if part.startswith("[") else re.escape(part) for part in parts
    )


class Matcher:
    """Finds the first key of an ordered list that a layer matches.

    A key that is exactly the layer's path comes before all others. Other
    string keys match from the path's start or from after any `/`, so that
    `dense` finds a layer by its name and `attention/query` still finds it
    when the model was wrapped in another one.

    Paths are one dictionary look-up and all regexes one alternation, so that
    a look-up costs about the same for 2 keys and for 200.

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
        sources = []
        for index, key in enumerate(self._keys):
            kind, text = kind_and_text(key)
            if kind == "path":
                self._paths.setdefault(text, index)
            elif kind == "class":
                self._classes.setdefault(text, index)
            elif kind == "predicate":
                self._predicates.append((index, predicates[key]))
            else:
                sources.append((index, key, glob_to_regex(text) if kind == "glob" else text))
        self._regexes = list(_combined(sources))

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
        best = last
        start = 0
        while start >= 0:
            best = min(best, self._paths.get(path[start:], last))
            start = path.find("/", start) + 1 or -1
        for regex, indices in self._regexes:
            if indices[0] > best:
                continue
            match = regex.fullmatch(path)
            if match:
                best = min(best, indices[match.lastindex - 1] if len(indices) > 1 else indices[0])
        return best


def _holds(predicate, layer, path):
    try:
        return bool(predicate(layer))
    except Exception as e:
        e.add_note(f"Raised by the policy map's predicate {predicate!r} for layer '{path}'.")
        raise


def _combined(sources):
    """Compiles (index, key, source) triples, plain ones into one alternation; yields (regex, indices)."""
    plain = []
    for index, key, source in sources:
        anchored = f"(?:.*/)?(?:{source})"
        try:
            compiled = re.compile(source)
            if compiled.groups or compiled.flags != re.compile("").flags:
                # Groups would shift the alternation's numbers, and inline flags would reach the other keys.
                flags = compiled.flags
                body = re.sub(r"^\(\?[a-zA-Z]+\)", "", source)
                yield re.compile(f"(?:.*/)?(?:{body})", flags), [index]
            else:
                plain.append((index, f"({anchored})"))
        except re.error as e:
            raise ValueError(
                f"Expected a valid regex in the policy map's key '{key}'. Received: {e}. "
                f"Write 'glob:{key}' if it is a glob."
            ) from e
    if plain:
        yield re.compile("|".join(source for _, source in plain)), [index for index, _ in plain]
