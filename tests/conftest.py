import pytest

from tests.helpers import here


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Makes short runs by train.py's command line, once for each set of arguments: runs(*args) -> run folder. What was
    printed lies beside it, in printed.txt."""
    made = {}

    def make(*args):
        if args not in made:
            made[args] = tmp_path_factory.mktemp("run") / "out"
            printed = here("train.py", *args, "--out", made[args]).stdout
            (made[args].parent / "printed.txt").write_text(printed)
        return made[args]

    return make
