"""The house: which room may use which, how its files are written, what README promises, and that the tests notice what
is wrong. What a reader drops beside the project's files, such as a method of their own, is not looked at."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests import mutate
from tests.helpers import HERE, cli, here
from train import find_methods

METHODS = ("multilora", "csreft", "cofitune")
FILES = ("model", "data", *METHODS, "train", "test_methods")
PACKAGES = ("engine", "formats", "base", "tools", "reproduce", "bench", "tests")
ROOMS = {*FILES, *PACKAGES} - {"test_methods", "tests"}
# What a room may import besides itself. One that is a file has only itself.
ALLOWED = {"model": set(), "engine": {"model"}, "data": {"model", "engine"}, "formats": {"data", "engine", "model"},
           "base": {"data", "formats", "model"}, **dict.fromkeys(METHODS, {"model"}),
           "train": {"model", "data", "engine", "formats", "base"}, "tools": ROOMS - {"reproduce", "bench"},
           "reproduce": ROOMS - {"bench"}, "bench": ROOMS}
# Of others: what requirements.txt brings (torch brings numpy); the rest serves papers and measurements only.
NEEDED = {"torch", "numpy", "safetensors", "tokenizers"}
OPTIONAL = {"jinja2": {"formats"}, "matplotlib": {"reproduce", "tools"}, "gguf": {"tools"},
            "transformers": {"bench"}, "peft": {"bench"}}
SOURCES = [HERE / f"{name}.py" for name in FILES] + sorted(f for name in PACKAGES for f in (HERE / name).rglob("*.py"))
READMES = [HERE / "README.md", HERE / "reproduce" / "README.md"]


def module_of(file):
    """formats/known.py -> formats.known; formats/__init__.py -> formats"""
    return ".".join(file.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return module.split(".")[0]


def imports_of(text):
    """Every module that a source imports, in functions too; `from a import b` is a.b, which may be a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def graph_of(files):
    """{module: {module of the project that it imports}} and {module: {other package that it imports}}"""
    names, inside, outside = {module_of(file) for file in files}, {}, {}
    for file in files:
        module = module_of(file)
        inside[module], outside[module] = set(), set()
        for name in imports_of(file.read_text(encoding="utf-8")):
            while name not in names and "." in name:
                name = name.rpartition(".")[0]
            (inside if name in names else outside)[module].add(name)
    return inside, outside


INSIDE, OUTSIDE = graph_of(SOURCES)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_down_only(room):
    assert "base.suite" in INSIDE["train"] and "torch" in OUTSIDE["model"]  # the walk sees them
    used = {(module, name) for module, names in INSIDE.items() if room_of(module) == room for name in names}
    wrong = {(module, name) for module, name in used if room_of(name) not in ALLOWED[room] | {room}}
    assert not wrong, f"{room} may import {sorted(ALLOWED[room]) or 'nothing of ours'}"


def test_there_is_no_circle_of_imports():
    for graph in (INSIDE, ALLOWED):
        TopologicalSorter({node: names - {node} for node, names in graph.items()}).prepare()


def test_other_packages_are_those_of_requirements():
    for module, names in OUTSIDE.items():
        tests = room_of(module) in ("tests", "test_methods")
        for name in set(map(room_of, names)) - set(sys.stdlib_module_names) - NEEDED:
            allowed = name in {"pytest", "jinja2", *OPTIONAL} if tests else room_of(module) in OPTIONAL.get(name, ())
            assert allowed, f"{module} imports {name or 'by a dot'}"
    listed = re.findall(r"^[\w-]+", (HERE / "requirements.txt").read_text(), re.M)
    assert NEEDED - {"numpy"} <= set(listed) <= {*NEEDED, "pytest"}


def test_no_file_is_unpickled_and_no_path_is_changed():
    for file in SOURCES:
        module = module_of(file)
        if room_of(module) not in ("tests", "test_methods"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"sys\.path\b|torch\.(load|save)\(|\bpickle\b", text), file
            assert not OUTSIDE[module] & {"pickle", "marshal", "shelve"}, file


def test_lines_are_at_most_120_columns():
    for file in [*SOURCES, *READMES]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            free = file.suffix == ".md" and (line.startswith("|") or re.search(r"\]\(|https?://|<img", line))
            assert len(line) <= 120 or free, f"{file}:{number} has {len(line)} columns"


@cache
def help_of(*program):
    return here(*program, "--help").stdout


@pytest.mark.parametrize("file", [*READMES, HERE / "LAB.md"], ids=["README", "reproduce", "LAB"])
def test_readmes_commands_name_programs_and_flags_that_there_are(file):
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python (?:-m )?(train\.py|[\w.]+)([^`\n#]*)", text)
    assert len(commands) > 10
    for program, rest in commands:
        if program in ("pytest", "doctest"):
            continue
        known = help_of(*(("train.py",) if program == "train.py" else ("-m", program)))
        assert known.startswith(f"usage: {program} [-h]")
        for method in set(find_methods()) & set(rest.split()):  # reproduce.count takes a method's flags too
            known += help_of("train.py", "--method", method)
        flags = set(re.findall(r"(?<!\S)--[\w-]+", rest))
        assert not [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)], (program, rest)


def test_readmes_python_runs_or_at_least_compiles():
    first, *others = re.findall("```python\n(.*?)```", READMES[0].read_text(encoding="utf-8"), re.S)
    assert cli("-c", f"{first}\nprint(len(losses), losses[0] > 9 * losses[-1])").stdout == "you did\n20 True\n"
    for code in others:
        compile(code, "README.md", "exec")


def test_every_wrong_version_of_the_code_is_one_that_can_be_made():
    versions = mutate.wrong_versions()
    assert sum(file.removesuffix(".py") in METHODS for file, *_ in versions) >= 90 and len(versions) >= 120


@pytest.mark.slow
def test_wrong_versions_of_each_method_are_noticed_in_words():
    """The first of each; `python -m tests.mutate` makes all of them."""
    versions = [mutate.wrong_versions(f"{name}.py")[0] for name in METHODS]
    for (file, what, failure), words in zip(mutate.notice(versions), ("A_i starts uniform", "what the docstring says",
                                                                      "shares are in order")):
        assert failure and words in failure[1], (file, what, failure)
