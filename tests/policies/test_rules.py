"""Tests of keras_precision.policies.rules."""

import re

import keras
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keras_precision.policies import rules
from keras_precision.policies.rules import Matcher, canonical_key, glob_to_regex, kind_and_text


class Head(keras.layers.Dense):
    """An unregistered subclass of a Keras layer."""


@keras.saving.register_keras_serializable(package="tests.rules")
class RegisteredHead(Head):
    """A registered subclass of a subclass."""


@keras.saving.register_keras_serializable(package="tests.rules")
def is_narrow(layer):
    """A registered predicate."""
    return getattr(layer, "units", 99) < 3


LAYERS = (Head(2), RegisteredHead(4), keras.layers.Dense(2), keras.layers.Dense(4), keras.layers.ReLU())
CLASSES = (Head, RegisteredHead, keras.layers.Dense, keras.layers.ReLU, keras.layers.Embedding, keras.Layer)
PREDICATES = (is_narrow, lambda layer: True, lambda layer: False, lambda layer: isinstance(layer, Head))


# The slow and obvious reference.


def starts(path):
    return [0, *(index + 1 for index, character in enumerate(path) if character == "/")]


def glob_matches(glob, text):
    """Whether a glob stands for a whole text, by trying every way to split it."""
    if not glob:
        return not text
    if glob.startswith("**/"):
        return any(glob_matches(glob[3:], text[start:]) for start in starts(text))
    if glob.startswith("**"):
        return any(glob_matches(glob[2:], text[cut:]) for cut in range(len(text) + 1))
    if glob.startswith("*"):
        return any(glob_matches(glob[1:], text[cut:]) for cut in range(len(text) + 1) if "/" not in text[:cut])
    if not text:
        return False
    if glob.startswith("?"):
        return text[0] != "/" and glob_matches(glob[1:], text[1:])
    if glob.startswith("[") and "]" in glob[1:] and not glob.startswith("[]"):
        inside, _, rest = glob[1:].partition("]")
        negated, members = (True, inside[1:]) if inside.startswith("!") and inside != "!" else (False, inside)
        return text[0] != "/" and (text[0] in members) is not negated and glob_matches(rest, text[1:])
    return text[0] == glob[0] and glob_matches(glob[1:], text[1:])


def holds(key, path, layer):
    """Whether one key, in its original form, stands for a layer."""
    if isinstance(key, type):
        return layer is not None and isinstance(layer, key)
    if callable(key):
        return layer is not None and bool(key(layer))
    kind, text = key.partition(":")[::2]
    if kind == "regex":
        return any(re.compile(text).fullmatch(path, start) for start in starts(path))
    if kind == "glob":
        return any(glob_matches(text, path[start:]) for start in starts(path))
    return any(text == path[start:] for start in starts(path))


def first_key(keys, path, layer):
    for key in keys:
        if key == f"path:{path}":
            return canonical_key(key)
    for key in keys:
        if holds(key, path, layer):
            return canonical_key(key)
    return None


components = st.sampled_from(["a", "b", "q", "dense", "dense_1", "A", "a.b"])
paths = st.lists(components, min_size=1, max_size=4).map("/".join)

glob_pieces = st.sampled_from(
    ["*", "**", "**/", "/", "?", "[ab]", "[!a]", "[/b]", "[^a]", "a", "b", "q", "dense", "_1", ".", "a/b", "[", "[]"]
)
globs = st.lists(glob_pieces, min_size=1, max_size=5).map("".join)

regex_atoms = st.sampled_from(
    [
        "a",
        "b",
        "q",
        "dense",
        "/",
        ".",
        r"\w",
        r"\w+",
        ".*",
        "[^/]+",
        "[ab]",
        r"(?i:A)",
        "(?=b)b",
        "(?<=/)q",
        "(?<!b/)a",
        "^",
        "$",
        r"\b",
        r"\.",
        r"a\.b",
        "[^a]",
        "q|dense",
        "(?:q|dense)",
        "(a|b|)",
    ]
)


def is_regex(source):
    try:
        re.compile(source)
    except re.error:
        return False  # two quantifiers in a row
    return True


plain_regexes = st.recursive(
    regex_atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        inner.map("(?:{})?".format),
        inner.map("({})".format),
        st.builds("{}{}".format, inner, st.sampled_from(["?", "*", "+", "*?", "{2}", "{0}", "{,1}", "{x}"])),
    ),
    max_leaves=5,
).filter(is_regex)
regexes = st.one_of(
    plain_regexes,
    plain_regexes.map("(?i){}".format),
    plain_regexes.map("(?i)(?s){}".format),
    plain_regexes.map("(?x) {}  # a comment".format),
    plain_regexes.map(r"(\w)/\1|{}".format),
    plain_regexes.map(r"(?P<name>\w)/(?P=name)(?:/{})?".format),
    plain_regexes.map(r"(a/)?(?(1)b|(?:{}))".format),
)
string_keys = st.one_of(paths.map("path:{}".format), globs.map("glob:{}".format), regexes.map("regex:{}".format))
keys_of_all_kinds = st.lists(
    st.one_of(string_keys, st.sampled_from(CLASSES), st.sampled_from(PREDICATES)), max_size=6, unique_by=canonical_key
)


def matcher_of(keys):
    return Matcher(map(canonical_key, keys), {canonical_key(key): key for key in keys if callable(key)})


@given(keys=keys_of_all_kinds, path=paths, layer=st.sampled_from([None, *LAYERS]))
@settings(deadline=None, max_examples=500)
@example(keys=["regex:.*", "path:a/b"], path="a/b", layer=None)  # the exact path, though it comes later
@example(keys=["regex:.*", "path:b"], path="a/b", layer=None)  # a name is no exact path
@example(keys=["regex:(a)/b", "regex:a|b", "regex:(b)"], path="q/b", layer=None)  # groups before and after plain ones
@example(keys=["regex:(?i)B", "regex:b"], path="b", layer=None)
@example(keys=["regex:x", "regex:B"], path="b", layer=None)  # one key's flags don't reach the others
@example(keys=["glob:[!a]"], path="b", layer=None)
@example(keys=["glob:a[!b]c"], path="a/c", layer=None)
@example(keys=[keras.layers.Dense, Head], path="a", layer=LAYERS[0])
@example(keys=[Head, keras.layers.Dense], path="a", layer=LAYERS[2])
def test_find_agrees_with_the_reference(keys, path, layer):
    matcher = matcher_of(keys)
    expected = first_key(keys, path, layer)
    assert matcher.find(path, layer) == expected
    assert matcher.find(path, layer) == expected  # and again, from the cache of paths


@given(glob=globs, path=paths)
@settings(deadline=None, max_examples=300)
def test_globs_agree_with_the_reference(glob, path):
    assert bool(re.fullmatch(glob_to_regex(glob), path)) is glob_matches(glob, path)


@given(data=st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_regexes_find_what_they_match(data):
    """Paths made from one of the regexes, since random ones rarely match."""
    sources = data.draw(st.lists(plain_regexes, min_size=1, max_size=4, unique=True))
    keys = [f"regex:{source}" for source in sources]
    path = data.draw(st.from_regex(data.draw(st.sampled_from(sources)), fullmatch=True, alphabet="abdeqnsx{}/._1A"))
    path = data.draw(st.sampled_from(["", "net/", "a/b/"])) + path
    assert matcher_of(keys).find(path) == first_key(keys, path, None)


def test_one_matcher_answers_for_many_paths():
    keys = [f"layer_{index}" for index in range(50)] + [f"regex:block_{index}/.*" for index in range(50)]
    matcher = matcher_of(keys)
    for index in range(50):
        assert matcher.find(f"net/layer_{index}") == f"layer_{index}"
        assert matcher.find(f"net/block_{index}/dense") == f"regex:block_{index}/.*"
    assert matcher.find("net/block_50/dense") is None


def test_string_keys_match_whole_components():
    matcher = matcher_of(["dense", "attention/query"])
    assert matcher.find("dense") == matcher.find("net/block/dense") == "dense"
    assert matcher.find("net/attention/query") == "attention/query"
    for path in ("my_dense", "dense_1", "dense/inner", "self_attention/query", "query"):
        assert matcher.find(path) is None


def test_regexes_match_whole():
    matcher = matcher_of(["regex:block_."])
    assert matcher.find("net/block_1") == "regex:block_."
    for path in ("net/block_1/dense", "net/block_12", "myblock_1"):
        assert matcher.find(path) is None


def test_caret_is_the_paths_start():
    matcher = matcher_of(["^encoder/.*"])
    assert matcher.find("encoder/dense") == "^encoder/.*"
    assert matcher.find("net/encoder/dense") is None


def test_predicates_behind_the_winner_are_not_called():
    def never(layer):
        raise AssertionError("called")

    matcher = matcher_of(["dense", never])
    assert matcher.find("net/dense", LAYERS[2]) == "dense"


def test_predicates_are_asked_each_time():
    layer, wanted = keras.layers.Dense(2), []
    matcher = matcher_of([lambda candidate: candidate in wanted])
    assert matcher.find("dense", layer) is None
    wanted.append(layer)
    assert matcher.find("dense", layer) is not None


def test_error_of_a_predicate_names_the_layer():
    def broken(layer):
        return layer.no_such_attribute

    with pytest.raises(AttributeError) as raised:
        matcher_of([broken]).find("net/dense", LAYERS[2])
    (note,) = raised.value.__notes__
    assert "broken" in note and "layer 'net/dense'" in note


@pytest.mark.parametrize(
    "key, kind",
    [
        ("dense", "path"),
        ("encoder/dense_1", "path"),
        ("a.b/c-d", "path"),
        ("odd:name", "path"),
        ("encoder/*", "glob"),
        ("encoder/**", "glob"),
        ("*", "glob"),
        ("**/dense", "glob"),
        ("dense_?", "glob"),
        ("dense*", "glob"),
        ("block_[0-9]/*", "glob"),
        (".*/dense", "regex"),
        ("encoder/.*", "regex"),
        ("encoder/.*/query", "regex"),
        ("dense_.?", "regex"),
        (r"dense_\d", "regex"),
        ("block_[0-9]", "regex"),
        ("a|b", "regex"),
        ("^a", "regex"),
        ("a$", "regex"),
        ("a+", "regex"),
        ("(a)", "regex"),
        ("a{2}", "regex"),
    ],
)
def test_kind_of_bare_strings(key, kind):
    assert kind_and_text(key) == (kind, key)


@pytest.mark.parametrize("kind", ["path", "glob", "regex", "class", "predicate"])
@pytest.mark.parametrize("text", ["a*b", ".*", "path:a", "", "a"])
def test_prefix_says_the_kind(kind, text):
    assert kind_and_text(f"{kind}:{text}") == (kind, text)


@pytest.mark.parametrize("prefix", ["regex:", ""])
@pytest.mark.parametrize("source", ["a(", "a[", "(?P<n>a)(?P<n>b)", r"(\2)", "+(", "(?i"])
def test_malformed_regex(source, prefix):
    key = prefix + source
    with pytest.raises(ValueError) as raised:
        matcher_of(["dense", key])
    assert str(raised.value).startswith(f"Expected a valid regex in the policy map's key '{key}'. Received: ")
    assert str(raised.value).endswith(f"Write 'glob:{source}' if it is a glob.")
    assert isinstance(raised.value.__cause__, re.error)


def test_malformed_glob():
    with pytest.raises(
        ValueError, match=r"Expected a valid glob in the policy map's key 'glob:\[b-a\]'.*Mend the brackets"
    ):
        matcher_of(["glob:[b-a]"])


@pytest.mark.parametrize("literal", ["a.b", "a+b", "(a)", "a|b", "^a$", "a{2}", "a\\d", "[", "a[", "[]", "[]a]"])
def test_globs_escape_what_regexes_read(literal):
    assert re.fullmatch(glob_to_regex(literal), literal)
    assert not re.fullmatch(glob_to_regex(literal), literal + "x")
    assert not re.fullmatch(glob_to_regex("a.b"), "axb")


def test_canonical_keys():
    assert canonical_key("net/dense") == "net/dense"
    assert canonical_key(keras.layers.Dense) == "class:Dense"
    assert canonical_key(Head) == "class:Head"
    assert canonical_key(RegisteredHead) == "class:tests.rules>RegisteredHead"
    assert canonical_key(is_narrow) == "predicate:tests.rules>is_narrow"


def test_unregistered_predicates_of_one_name_stay_apart():
    first, second = (lambda layer: True), (lambda layer: True)
    assert canonical_key(first) != canonical_key(second)
    assert canonical_key(first) == canonical_key(first)


@pytest.mark.parametrize(
    "wrong", [None, 3, 1.5, b"dense", ("a",), ["a"], int, object, keras.DTypePolicy, keras.DTypePolicy("float32")]
)
def test_keys_of_other_types(wrong):
    with pytest.raises(TypeError, match=r"Expected a key that is a string .*Received: .*of type "):
        canonical_key(wrong)


def test_saved_predicates_are_found_again():
    assert rules.find_predicate(canonical_key(is_narrow)) is is_narrow
    with pytest.raises(
        ValueError, match=r"key 'predicate:tests>gone' names a predicate that is not registered here.*before you load"
    ):
        rules.find_predicate("predicate:tests>gone")


def test_unregistered_predicates_can_not_be_saved():
    rules.require_registered(canonical_key(is_narrow), is_narrow)

    def forgotten(layer):
        return True

    with pytest.raises(ValueError, match=r"forgotten.*can't be saved.*register_keras_serializable"):
        rules.require_registered(canonical_key(forgotten), forgotten)
