"""The house: which room may use which, and how its files are written."""

import ast
import re
import sys
from itertools import chain

import pytest

from tests.helpers import HERE

METHODS = sorted(file.stem for file in HERE.glob("*.py") if "\ndef attach(" in file.read_text(encoding="utf-8"))
FILES = ("model", "data", *METHODS, "train", "test_methods")
PACKAGES = ("engine", "formats", "base", "tools", "reproduce", "bench", "tests")
EVERY = {*FILES, *PACKAGES} - {"test_methods", "tests"}
# What a room may import besides itself. One that is a file has only itself.
ALLOWED = {"model": set(), "engine": {"model"}, "data": {"model", "engine"}, "formats": {"data", "engine", "model"},
           "base": {"data", "formats", "model"}, **dict.fromkeys(METHODS, {"model"}),
           "train": {"model", "data", "engine", "formats", "base"}, "tools": EVERY - {"reproduce", "bench"},
           "reproduce": EVERY - {"bench"}, "bench": EVERY}
# Of others: what requirements.txt brings (torch brings numpy); the rest serves papers and measurements only.
NEEDED = {"torch", "numpy", "safetensors", "tokenizers"}
OPTIONAL = {"jinja2": {"formats"}, "matplotlib": {"reproduce", "tools"}, "transformers": {"bench"}, "peft": {"bench"}}


def sources(*endings):
    """Files of the project, without what runs and tools leave behind."""
    files = chain.from_iterable(HERE.rglob(f"*{ending}") for ending in endings)
    parts = lambda file: file.relative_to(HERE).parts
    return sorted(file for file in files if not any(p.startswith(".") or p in ("out", "venv") for p in parts(file)))


def module_of(file):
    """formats/known.py -> formats.known; formats/__init__.py -> formats"""
    return ".".join(file.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return module.split(".")[0]


def imports_of(text, module, package=False):
    """Every module that a source imports, in functions too; `from a import b` is a.b, where that is a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            yield from (".".join(filter(None, [*above, node.module, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "import_module", "__import__") and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def graph_of(files):
    """{module: {module of the project that it imports}} and {module: {other package that it imports}}"""
    names, inside, outside = {module_of(file) for file in files}, {}, {}
    for file in files:
        module = module_of(file)
        inside[module], outside[module] = set(), set()
        for name in imports_of(file.read_text(encoding="utf-8"), module, file.name == "__init__.py"):
            while name not in names and "." in name:
                name = name.rpartition(".")[0]
            (inside if name in names or room_of(name) in EVERY else outside)[module].add(name)
    return inside, outside


def circle_in(graph):
    """The nodes of one circle of a graph, or None."""
    done, path = set(), []

    def walk(node):
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return None
        path.append(node)
        found = next(filter(None, map(walk, sorted(graph.get(node, ())))), None)
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(walk, sorted(graph))), None)


INSIDE, OUTSIDE = graph_of(sources(".py"))


def test_every_source_file_is_in_one_of_the_rooms():
    assert {room_of(module) for module in INSIDE} == {*FILES, *PACKAGES}
    assert {file.stem for file in HERE.glob("*.py")} == set(FILES)
    assert {"csreft", "multilora", "cofitune"} <= set(METHODS)
    assert {file.parent.name for file in HERE.glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_down_only(room):
    used = {(module, name) for module, names in INSIDE.items() if room_of(module) == room for name in names
            if room_of(name) != room}
    wrong = {(module, name) for module, name in used if room_of(name) not in ALLOWED[room]}
    assert not wrong, f"{room} may import {sorted(ALLOWED[room]) or 'nothing of ours'}"


def test_there_is_no_circle_of_imports():
    assert circle_in(INSIDE) is None
    rooms = {}
    for module, names in INSIDE.items():
        rooms.setdefault(room_of(module), set()).update(room_of(name) for name in names)
    assert circle_in({room: names - {room} for room, names in rooms.items()}) is None


def test_other_packages_are_those_of_requirements():
    for module, names in OUTSIDE.items():
        for name in {room_of(name) for name in names} - set(sys.stdlib_module_names) - NEEDED:
            if room_of(module) in ("tests", "test_methods"):
                assert name in {"pytest", *OPTIONAL}, f"{module} imports {name}"
            else:
                assert room_of(module) in OPTIONAL.get(name, ()), f"{module} imports {name}"
    text = (HERE / "requirements.txt").read_text()
    listed = {re.match(r"[\w-]+", line)[0] for line in text.splitlines() if re.match(r"\w", line)}
    assert NEEDED - {"numpy"} <= listed <= {*NEEDED, "pytest"}


def test_only_tests_import_tests():
    for module, names in INSIDE.items():
        if room_of(module) not in ("tests", "test_methods"):
            assert not {"tests", "test_methods"} & {room_of(name) for name in (*names, *OUTSIDE[module])}, module


def test_no_program_changes_where_python_looks_for_modules():
    for file in sources(".py"):
        if room_of(module_of(file)) not in ("tests", "test_methods"):
            assert "sys.path" not in file.read_text(encoding="utf-8"), file


def test_lines_are_at_most_120_columns():
    for file in sources(".py", ".md"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            free = file.suffix == ".md" and (line.startswith("|") or re.search(r"\]\(|https?://|<img|<source", line))
            assert len(line) <= 120 or free, f"{file}:{number} has {len(line)} columns"


def test_the_walk_sees_every_kind_of_import():
    """Of the tests above, so that none of them passes because it sees nothing."""
    found = lambda text, module="a.b", package=False: set(imports_of(text, module, package))
    assert found("import x.y, z as w\nfrom u.v import t as s, r") == {"x.y", "z", "u.v.t", "u.v.r"}
    assert found("def f():\n    if g:\n        from x import y") == found("class C:\n    import x.y") == {"x.y"}
    assert found("from . import y\nfrom .z import w\nfrom .. import v") == {"a.y", "a.z.w", "v"}
    assert found("from . import y", "a", package=True) == {"a.y"}
    assert found("importlib.import_module('x.y')\n__import__('z')\nimportlib.import_module(name)") == {"x.y", "z"}
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert "base.suite" in INSIDE["train"] and "reproduce.spectra" in INSIDE["reproduce.claims.multilora"]
    assert "formats.known" in INSIDE["formats"] and "torch" in OUTSIDE["model"]
