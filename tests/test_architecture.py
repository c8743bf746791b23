"""Tests of how the package is put together, read from its source."""

import ast
import fnmatch
import sys
from pathlib import Path

import pytest

from keras_precision.formats import FORMATS

PACKAGE = Path(__file__).parent.parent / "keras_precision"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in MODULES}
MAX_LINES = 400

# The top first; a module imports from its own package and from rows below, so packages of one row don't import each
# other. The command line stands on the public names, and importing those doesn't import it.
LAYERS = (
    ("cli",),
    ("__init__",),
    ("install",),
    ("attach",),
    ("search",),
    ("report",),
    ("layers", "optimizers", "scaling", "autocast"),
    ("policies",),
    ("formats",),
    ("kernels",),
    ("hardware", "rounding", "delegation"),
    (
        "dtypes",
        "_bridge",
        "_bridge_models",
        "_bridge_optimizers",
        "_bridge_training",
        "_bridge_variables",
        "rich_text",
        "progress",
        "files",
    ),
    ("hooks",),
)
RANKS = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}

# Formats may be named where they are, and in the table of what devices do with dtypes, some of which are formats.
NAMES_FORMATS = ("formats/*", "hardware/cells.py")
BRIDGES = ("_bridge.py", "_bridge_models.py", "_bridge_optimizers.py", "_bridge_training.py", "_bridge_variables.py")
# Public in spite of the underscore: Keras documents the first, the standard library those of named tuples. All others
# are Keras's, unless a module of ours other than the bridge defines them.
DOCUMENTED = {"_keras_mask", "_asdict", "_fields", "_make", "_replace"}


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path):
    """The part of the package that a file belongs to: a subpackage or a module at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(tree):
    """(line, unit) of each import from our own package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = [node.module] if node.module != "keras_precision" else []
            names = parts or [f"keras_precision.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["keras_precision.(relative)"]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "keras_precision":
                yield node.lineno, name.split(".")[1] if "." in name else "__init__"


def is_upward(unit, imported):
    """Whether a unit must not import another one."""
    return unit != imported and RANKS[imported] <= RANKS[unit]


def docstrings(tree):
    """The nodes that hold docstrings, those of attributes and constants included: all bare strings."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def format_literals(tree):
    """(line, text) of each string literal that is a format's name, alone or at the start of a policy's name."""
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            if node.value.partition("_from_")[0].partition("/")[0] in FORMATS:
                yield node.lineno, node.value


def private_names(tree):
    """Underscore names that a module gives to its own functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:  # __dict__.update(_name=...)
            yield node.arg


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


OURS = {
    name for path, tree in TREES.items() if relative(path) not in BRIDGES for name in private_names(tree) if is_private(name)
}


def foreign_private_attributes(tree):
    """(line, name) of underscore attributes of other objects, read, set or named in getattr, that are not ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            name = node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
        ):
            name = node.args[1].value
        else:
            continue
        if is_private(name) and name not in OURS | DOCUMENTED:
            yield node.lineno, name


def keras_internals(tree):
    """Lines that import or name keras.src."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.startswith("keras.src") for alias in node.names):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name.startswith("keras.src") for name in names):
                yield node.lineno
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "src"
            and isinstance(node.value, ast.Name)
            and node.value.id == "keras"
        ):
            yield node.lineno


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path):
    unit = unit_of(path)
    assert unit in RANKS, f"{unit} has no place in the order of imports; give it one here and in the design"
    upward = [(line, imported) for line, imported in imported_units(TREES[path]) if is_upward(unit, imported)]
    assert not upward, f"{relative(path)} imports what stands above or beside it: {upward}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_file_is_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines. Split it by what its parts are about."


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if not any(fnmatch.fnmatch(relative(p), allowed) for allowed in NAMES_FORMATS)],
    ids=relative,
)
def test_formats_are_not_named(path):
    found = list(format_literals(TREES[path]))
    assert not found, f"{relative(path)} names formats: {found}. Ask the registry for what the format can do."


@pytest.mark.parametrize("path", [p for p in MODULES if relative(p) not in BRIDGES], ids=relative)
def test_only_the_bridge_touches_what_keras_does_not_document(path):
    assert not list(keras_internals(TREES[path])), f"{relative(path)} uses keras.src; go through _bridge"
    found = list(foreign_private_attributes(TREES[path]))
    assert not found, f"{relative(path)} uses private attributes that are not ours: {found}; go through _bridge"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstring_of_the_module_is_one_sentence(path):
    docstring = ast.get_docstring(TREES[path])
    assert docstring, f"{relative(path)} has no docstring"
    first_line, _, rest = docstring.partition("\n")
    assert first_line.endswith("."), f"{relative(path)}: the docstring's first line is no sentence: {first_line!r}"
    assert not rest or rest.startswith("\n"), f"{relative(path)}: no blank line after {first_line!r}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_are_named_for_what_they_hold(path):
    assert not {*path.relative_to(PACKAGE).with_suffix("").parts} & {"utils", "helpers", "common", "misc", "tools"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_names_shown_to_users_are_in_all_and_exist(path):
    declared = [
        ast.literal_eval(node.value)
        for node in TREES[path].body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    if not declared:
        return
    bound = {name for node in TREES[path].body for name in _bound(node)}
    assert set(declared[0]) <= bound
    assert declared[0] == sorted(declared[0], key=_all_order), "ruff's order: constants, classes, functions"


def _bound(node):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if hasattr(node, "name") else []


def _all_order(name):
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


# The checks themselves: each must find what it is for.


@pytest.mark.parametrize(
    "unit, source, found",
    [
        ("policies", "from keras_precision.layers.convert import set_policy", ["layers"]),
        ("policies", "def f():\n    from keras_precision import layers", ["layers"]),
        ("policies", "import keras_precision.report.summary", ["report"]),
        ("policies", "import keras_precision", ["__init__"]),
        ("layers", "from keras_precision.optimizers import x", ["optimizers"]),
        ("dtypes", "from keras_precision import _bridge", ["_bridge"]),
        ("policies", "from keras_precision.policies.names import parse\nfrom keras_precision import hardware", []),
        ("install", "from keras_precision.layers.convert import set_policy", []),
        ("policies", "from keras import layers\nimport os", []),
        ("__init__", "from keras_precision import cli", ["cli"]),
        ("cli", "import keras_precision", []),
    ],
)
def test_import_check_finds(unit, source, found):
    assert [imported for _, imported in imported_units(ast.parse(source)) if is_upward(unit, imported)] == found


def test_relative_imports_have_no_place():
    (unit,) = [unit for _, unit in imported_units(ast.parse("from ..layers import convert"))]
    with pytest.raises(KeyError):
        is_upward("policies", unit)


@pytest.mark.parametrize("fmt", FORMATS)
def test_format_check_finds(fmt):
    named = [fmt, f"{fmt}/64", f"{fmt}_from_float32"]
    lines = [
        f'"""Names {fmt}."""',
        *(f'mode == "{text}"' for text in named),
        f'f"{fmt}_from_{{x}}"',
        f'"{fmt}"',
        f'"x{fmt}"',
    ]
    assert [text for _, text in format_literals(ast.parse("\n".join(lines)))] == [*named, f"{fmt}_from_"]


@pytest.mark.parametrize(
    "source, found",
    [
        ("layer._tracker.unlock()", ["_tracker"]),
        ("layer._losses = []", ["_losses"]),
        ("getattr(layer, '_is_quantized', False)", ["_is_quantized"]),
        ("self.inner._tracker", ["_tracker"]),
        ("self._anything; cls._anything; super()._anything", ["_anything"]),
        ("type(x).__name__; x._keras_mask; x._asdict(); getattr(x, name)", []),
    ],
)
def test_private_check_finds(source, found):
    assert [name for _, name in foreign_private_attributes(ast.parse(source))] == found


@pytest.mark.parametrize(
    "source, found",
    [
        ("import keras.src.layers", [1]),
        ("from keras.src import layers", [1]),
        ("from keras import src", [1]),
        ("import keras\nkeras.src.layers.Layer", [2]),
        ("from keras import layers\nimport keras.layers", []),
    ],
)
def test_internals_check_finds(source, found):
    assert list(keras_internals(ast.parse(source))) == found
    assert "keras.src" in sys.modules
