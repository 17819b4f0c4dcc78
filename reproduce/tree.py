"""The tree that CoFiTune searched in a finished run, drawn again.

    python -m reproduce.tree out/cofitune
"""

from pathlib import Path

import cofitune
from engine.flags import Parser, command_line
from model import LlamaConfig, UserError, read_json


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/cofitune")
    args = parser.parse_args()
    saved, search = read_json(args.run / "config.json"), args.run / "search.json"
    if not search.exists():
        raise UserError(f"{args.run} holds no search: expected a run of cofitune with --layers search")
    search = read_json(search)

    class Known:
        """The trials of the run, looked up."""

        def estimate(self, config, steps):
            return 0.0

        def __call__(self, config, steps):
            found = next(t for t in search["trials"]
                         if (t["settings"]["layers"], t["settings"]["modules"]) == (config.layers, config.modules))
            return found["speciality"], found["versatility"]

    settings = search["asked"]["method_settings"]
    cofitune.plan(cofitune.Config(**settings), LlamaConfig.from_pretrained(saved["settings"]["base"]), Known())


if __name__ == "__main__":
    command_line(main)
