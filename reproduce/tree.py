"""The tree that CoFiTune searched in a finished run, drawn again.

    python -m reproduce.tree out/cofitune
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import cofitune
from engine.flags import Parser, command_line
from model import LlamaConfig, UserError, read_json


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/cofitune")
    args = parser.parse_args()
    saved = read_json(args.run / "config.json")
    if not (args.run / "search").is_dir() or "settled" not in saved:
        raise UserError(f"{args.run} holds no finished search: expected a run of cofitune with --layers search")
    config = cofitune.Config(**saved["asked"]["method_settings"])
    base = LlamaConfig.from_pretrained(saved["asked"]["settings"]["base"])
    with redirect_stdout(StringIO()) as said:
        cofitune.plan(config, base, lambda name, *_, **__: read_json(args.run / "search" / name / "results.json"))
    print("tree search, validation" + said.getvalue().partition("tree search, validation")[2], end="")  # no progress


if __name__ == "__main__":
    command_line(main)
