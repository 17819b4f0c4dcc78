"""A copy of the project in which a method is yours to write: its parts are blanks, and the tests grade them.

    python -m tools.lab multilora lab && cd lab && python -m pytest test_methods.py -k multilora
    python -m tools.lab csreft lab --parts 1,2     # these parts alone
    python -m tools.lab model lab                  # the Llama's blocks; tests/test_model.py grades

Signatures and docstrings stay. LAB.md says what to read first, and what to do with the method when it is whole.
"""

import ast
import shutil
from functools import reduce
from pathlib import Path

from engine.flags import Parser, command_line
from model import UserError

HERE = Path(__file__).resolve().parent.parent
# {file: {part: its functions}}, in the order in which they are written. The tests of a part are named
# test_multilora_PART..., those of the model test_PART...
PARTS = {
    "multilora": {"init": ["MultiLoRA.__init__"], "factors": ["MultiLoRA.factors"], "forward": ["MultiLoRA.forward"],
                  "attach": ["add_update"], "param_groups": ["MultiLoRAAdapter.param_groups"],
                  "merge": ["MultiLoRAAdapter.merge"]},
    "csreft": {"orthonormalize": ["CSReFT.orthonormalize"], "init": ["CSReFT.__init__"], "read": ["CSReFT.read"],
               "route": ["CSReFT.route"], "edit": ["CSReFT.edit"], "param_groups": ["CSReFTAdapter.param_groups"]},
    "cofitune": {"harmonic": ["harmonic"], "plan": ["plan"], "units": ["units"], "two_pass_kl": ["two_pass_kl"],
                 "importance": ["importance"],
                 "masked_rows": ["CoFiTuneAdapter.before_step", "CoFiTuneAdapter.after_step"]},
    "model": {"rms_norm": ["RMSNorm.forward"], "rope_frequencies": ["rope_frequencies"], "rotate": ["rotate"],
              "attention": ["Attention.forward"], "mlp": ["MLP.forward"], "a_layer": ["DecoderLayer.forward"]}}


def grader(prefix, parts):
    """What the copy's conftest.py gives to pytest: it says how many parts are right, and which is next."""
    def pytest_terminal_summary(terminalreporter):
        done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
        of = lambda part: [r for r in done if f"::{prefix}{part}_" in r.nodeid]
        right = [part for part in parts if of(part) and all(r.passed for r in of(part))]
        terminalreporter.write_line(f"{len(right)} of {len(parts)} parts are right: {', '.join(right) or 'none yet'}")
        if wrong := [(part, r.longrepr.reprcrash.message) for part in parts for r in of(part) if r.failed]:
            terminalreporter.write_line("next is {}: {}".format(*wrong[0]).splitlines()[0])
    return pytest_terminal_summary


def blank(text, parts):
    """The source with the bodies of these functions, {part: names}, taken out; a docstring stays."""
    lines, source = text.splitlines(keepends=True), ast.parse(text)
    inside = lambda node, name: next(inner for inner in node.body if getattr(inner, "name", None) == name)
    bodies = [(reduce(inside, name.split("."), source), f"part {i} of {len(parts)}: {name}")
              for i, names in enumerate(parts.values(), 1) for name in names]
    for function, what in sorted(bodies, key=lambda body: -body[0].lineno):
        first = function.body[1 if ast.get_docstring(function) else 0]
        lines[first.lineno - 1 : function.end_lineno] = [
            " " * first.col_offset + f'raise NotImplementedError("{what}")\n']
    return "".join(lines)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=list(PARTS), help="whose parts are blanks; model: the Llama's blocks")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not exist")
    parser.add_argument("--parts", metavar="N,N", help="numbers of the parts, from 1 on; default: all")
    args = parser.parse_args()
    numbered = {str(number): part for number, part in enumerate(PARTS[args.method].items(), 1)}
    chosen = args.parts.split(",") if args.parts else list(numbered)
    if not set(chosen) <= numbered.keys():
        raise UserError(f"--parts {args.parts}: expected numbers from 1 to {len(numbered)}, such as 1,2")
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: choose another folder")
    parts = dict(part for number, part in numbered.items() if number in chosen)
    shutil.copytree(HERE, args.folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "venv",
                                                                     args.folder.name))
    file = args.folder / f"{args.method}.py"
    file.write_text(blank(file.read_text(encoding="utf-8"), parts), encoding="utf-8")
    prefix = "test_" if args.method == "model" else f"test_{args.method}_"
    hook = f"from tools.lab import grader\n\npytest_terminal_summary = grader({prefix!r}, {list(parts)})\n"
    (args.folder / "conftest.py").write_text(hook, encoding="utf-8")
    tests = "tests/test_model.py" if args.method == "model" else f"test_methods.py -k {args.method}"
    print(f"{file}: {len(parts)} parts to write: {', '.join(parts)}\ncd {args.folder} && python -m pytest {tests}")


if __name__ == "__main__":
    command_line(main)
