"""Mutated input, again and again: success, or one line that says what is wrong; never a traceback, a hang or an abort.

    python -m tests.fuzz --cases 2000            # what CI runs, always the same ones
    python -m tests.fuzz --cases 9000 --seed 1

Each case is a forked child of this process, which has imported everything; it has 20 s and 2 GiB.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch

import formats
import train
from data import Tokenizer, encode
from engine.flags import Parser, check, command_line, flag, user_message
from model import Llama
from tests.helpers import BASE, tiny

ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, -2.5, 1e308, float("nan"), float("inf"), "", "x", "0", "\ud800",
       "\x00", "</s>", "a" * 10_000, [], [[]], {}, {"a": {}}, [1, "x", None], {"content": 3})


def mutated_json(rng, value):
    """The value, as text, with one to three of its parts replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        node = value
        while isinstance(node, (dict, list)) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            action = rng.random()
            if action < 0.7:
                node[key] = json.loads(json.dumps(rng.choice(ODD)))
            elif action < 0.85:
                del node[key]
            elif isinstance(node, dict):
                node[key + rng.choice(" xX_")] = node.pop(key)
            else:
                node += node[:1000]
            break
    return json.dumps(value, ensure_ascii=True)


def mutated_bytes(rng, raw):
    """The bytes with one to four places cut, changed, filled or repeated."""
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        mark = rng.choice((b"\x00", b"\xff\xfe", b"{", b"[", b'"', b"\n", b",", b"NaN", b"\xef\xbb\xbf"))
        raw = rng.choice((raw[:at], raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :], raw[:at] + mark + raw[at:],
                          raw[:at] + raw[at + 50 :], raw[:at] + raw[other : other + 2000] + raw[at:]))
    return raw


def mutate(rng, folder, *patterns):
    """Changes one of the files in a folder: one that is JSON mostly in its values, else in its bytes; returns it."""
    file = rng.choice(sorted(file for pattern in patterns for file in folder.glob(pattern)))
    raw = file.read_bytes()
    try:
        whole = rng.random() < 0.7 and json.loads(raw)
    except ValueError:
        whole = None
    file.write_bytes(mutated_json(rng, whole).encode() if whole else mutated_bytes(rng, raw))
    return file


def prepare(folder):
    """Small good files, of which each case mutates a copy."""
    tiny(vocab_size=512, max_position_embeddings=64).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / "base" / name)
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 3], "bos_token_id": 1}')
    for method in ("multilora", "csreft"):
        train.run(*train.parse(["--method", method, "--base", str(folder / "base"), "--tasks", "currency", "--device",
                                "cpu", "--steps", "1", "--batch-size", "2", "--eval-limit", "1", "--samples", "0",
                                "--out", str(folder / f"run-{method}")]))
    for n, (name, kind) in enumerate(formats.FORMATS.items()):
        rows = [kind.sample] * 200  # one or two bad ones are left out
        (folder / f"{name}.data").write_text(json.dumps(rows) if n % 2 else "\n".join(map(json.dumps, rows)))
    (folder / "csv.data").write_text("".join(f"question {i},a,b,c,d,{'ABCD'[i % 4]}\n" for i in range(200)))


def checkpoint(rng, folder):
    mutate(rng, folder, "base/config.json", "base/model.safetensors")
    with torch.no_grad():
        Llama.from_pretrained(folder / "base")(torch.tensor([[1, 2, 3]]))


def tokenizer(rng, folder):
    mutate(rng, folder, "base/tokenizer.json", "base/tokenizer_config.json", "base/generation_config.json")
    found = Tokenizer.from_pretrained(folder / "base")
    found.encode("What is 1 + 2?")
    formats.choose("auto", found, folder / "base")


def run(rng, folder):
    file = mutate(rng, folder, "run-*/config.json", "run-*/adapter.safetensors")
    train.load_run(file.parent, base=folder / "base")


def data(rng, folder):
    found = Tokenizer.from_pretrained(folder / "base")
    template, _ = formats.choose("alpaca", found, folder / "base")
    suite = formats.dress(formats.load([str(mutate(rng, folder, "*.data"))]), template)
    for example, encoded in zip(suite.train, encode(suite.train, found, suite.names)):
        answers = sum(segment.role == "assistant" for segment in example.segments)
        assert answers and encoded.ids.count(found.eos_id) == answers, "a text became a special token"


def flags(rng, folder):
    """A command line: parsed, its numbers checked, its device tried."""
    values = ("0", "-1", "1", "nan", "inf", "1e400", "", "x", "a\nb", "builtin", "auto", "9" * 40, "\x00", "--", "all")
    options = [*map(flag, train.Config.__dataclass_fields__), "--rank", "--layers", "--targets", "--positions"]
    argv = ["--method", rng.choice(["multilora", "csreft", "cofitune", "sft", "nothing"])]
    for _ in range(rng.randint(1, 4)):
        argv += [rng.choice(options)] + [rng.choice(values)] * rng.randint(0, 2)
    settings, own = train.parse(argv)
    check(settings)
    check(own)
    train.device_and_dtype(settings)


SECTIONS = (checkpoint, tokenizer, run, data, flags)


def child(section, seed, source, folder):
    """One case; ends with exit code 0 (accepted), 2 (refused) or 3 (a traceback, which is in the folder)."""
    signal.alarm(20)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30),) * 2)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    code = 3
    try:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        section(random.Random(f"{section.__name__} {seed}"), folder)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        (folder / "traceback").write_text(traceback.format_exc(), errors="replace")
        user_message(error)  # raises what is a bug
        code = 2
    finally:
        os._exit(code)


def case(section, seed, source):
    """(what happened, details) of one case."""
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if not pid:
            child(section, seed, source, Path(folder))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            return "hang" if code == -signal.SIGALRM else "abort", f"signal {-code}"
        file = Path(folder) / "traceback"
        return {0: "accepted", 2: "refused"}.get(code, "traceback"), file.read_text() if file.exists() else ""


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = Counter()
    with tempfile.TemporaryDirectory() as source:
        with redirect_stdout(io.StringIO()):
            prepare(Path(source))
        for number in range(args.seed * 10**6, args.seed * 10**6 + args.cases):
            section = SECTIONS[number % len(SECTIONS)]
            what, details = case(section, number, source)
            counts[section.__name__, what] += 1
            if what not in ("accepted", "refused"):
                print(f"{section.__name__} {number}: {what}\n{details}", flush=True)
    for (name, what), number in sorted(counts.items()):
        print(f"{name:<12}{what:<12}{number:,}")
    sys.exit(any(what not in ("accepted", "refused") for _, what in counts))


if __name__ == "__main__":
    command_line(main)
