"""tools.lab: each blank is noticed by tests that name it, and the method itself passes them."""

import re
import shutil

import pytest

from tests.helpers import HERE, cli, here, one_line_error
from tools.lab import PARTS


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cofitune", "model"])
def test_each_blank_fails_a_test_that_names_it_and_what_was_there_passes(tmp_path, method):
    said = here("-m", "tools.lab", method, tmp_path / "lab").stdout
    assert f"6 parts to write: {', '.join(PARTS[method])}\n" in said
    tests = said.split("python -m pytest ")[1].split()
    grade = lambda code: cli("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *tests, cwd=tmp_path / "lab",
                             code=code).stdout
    text, prefix = grade(1), "test_" if method == "model" else f"test_{method}_"
    assert all(re.search(rf"FAILED .*::{prefix}{part}_", text) for part in PARTS[method])
    assert "0 of 6 parts are right: none yet" in text
    assert f"next is {next(iter(PARTS[method]))}: NotImplementedError: part 1 of 6" in text
    shutil.copy(HERE / f"{method}.py", tmp_path / "lab")
    assert f"6 of 6 parts are right: {', '.join(PARTS[method])}" in grade(0)


def test_each_part_has_tests_that_are_named_after_it():
    for method, parts in PARTS.items():
        file, prefix = ("tests/test_model.py", "test_") if method == "model" else ("test_methods.py", f"test_{method}_")
        text = (HERE / file).read_text(encoding="utf-8")
        assert [part for part in parts if f"\ndef {prefix}{part}_" not in text] == []


def test_chosen_parts_are_blanks_and_a_mistake_is_one_line(tmp_path):
    here("-m", "tools.lab", "csreft", tmp_path / "lab", "--parts", "3,5")
    text = (tmp_path / "lab" / "csreft.py").read_text()
    blanks = re.findall(r'raise NotImplementedError\("(.*)"\)', text)
    assert blanks == ["part 1 of 2: CSReFT.read", "part 2 of 2: CSReFT.edit"]
    assert '"""x, what the router reads' in text, "a docstring stays"
    assert "exists: choose another" in one_line_error("-m", "tools.lab", "csreft", tmp_path / "lab")
    assert "from 1 to 6" in one_line_error("-m", "tools.lab", "csreft", tmp_path / "other", "--parts", "7")
