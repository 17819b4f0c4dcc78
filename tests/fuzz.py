"""Mutated input, again and again: success with a documented meaning, or one bounded line; never a traceback or a hang.

    python -m tests.fuzz --cases 2000        # what CI runs, always the same ones
    python -m tests.fuzz --minutes 10 --seed 1

Each case is a forked child of a process that has imported everything, with limits of 20 s and 2 GiB. A case is accepted
where nothing is said; what may be is listed in MAY_BE_ACCEPTED with the reason, anything else counts as unlisted.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

import formats
import train
from data import Tokenizer
from engine.flags import Parser, check, command_line, told
from engine.flags import described as described_flags
from model import Llama, LlamaConfig, fits, open_tensors
from tests.test_forms import FORMS

HERE = Path(__file__).resolve().parent
# What may pass in silence, and why. In JSON that is parsed key by key, any change that no pattern takes is a failure.
OPTIONAL = {r".* is new": "other programs' keys are many, and not read",
            r".* is (absent|NoneType)": "the format's default, or that of the build before the setting was there"}
MAY_BE_ACCEPTED = {
    "config": OPTIONAL | {
        r"\.(architectures|torch_dtype) is .*": "not read: the code and --dtype say it",
        r"\.(bos|eos|pad)_token_id is (int|list)": "an id, which the tokenizer holds against its vocabulary",
        r"\.(max_position_embeddings|rms_norm_eps|rope_theta) is (int|float)": "a legal value: another model",
        r"\.num_(attention|key_value)_heads is int": "the same width, cut into other heads: another model",
        r"\.tie_word_embeddings is bool": "the head is there, or is not needed: another model",
        r"\.rope_scaling is dict": "empty: none"},
    "tokenizer": OPTIONAL | {
        r"\.(tokenizer_class|clean_up_tokenization_spaces|bos_token_id) is .*": "not read",
        r"\.(bos|eos|pad)_token is (str|dict)": "another token of the vocabulary; a pad token is never looked at",
        r"\.eos_token_id is (int|list)": "ids of the vocabulary",
        r"\.template is .*": "refused where it is used (formats.named)",
        r"\.(version|truncation|padding|added_tokens|normalizer|pre_tokenizer|post_processor|decoder|model)\b.*":
            "what the library reads is a tokenizer, with other merges perhaps"},
    "run": OPTIONAL | {
        r"\.(command|versions|tasks)\b.*": "a record for people, not read",
        r"\.(method_settings\.lr|settings\.(pretrain|lr|steps|batch_size)) is .*": "retired (train.RETIRED)",
        r"\.settings\.\w+ is (int|float|str|bool|list)": "a legal value: data, training and scoring, not the adapter",
        r"\.method_settings\.(alpha|dropout|shared_s) is (int|float|bool)": "a legal value",
        r"\.template is str": "a template that is known"},
    # Elsewhere a case itself asserts what it may be.
    "weights": "a changed number is a number, a changed byte of the header's padding or metadata says nothing: the "
               "tensors have the names, types and shapes that they had",
    "adapter": "the same",
    "data": "changed text is text: rows of a known format, each with something to learn, no special token from a text",
    "flags": "a legal value: of the flag's own type, inside its interval",
}
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, -2.5, 1e308, float("nan"), float("inf"), "", "x", "0", "\ud800",
       "\x00", "a" * 10_000, [], [[]], {}, {"a": {}}, [1, "x", None], {"content": 3})


# ---------------------------------------------------------------------------------------------- mutations


def mutated_json(rng, value):
    """The value with one to three of its parts replaced, removed, doubled or moved."""
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
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, end = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        action = rng.randrange(5)
        if action == 0:
            del raw[at:]
        elif action == 1 and at < len(raw):
            raw[at] = rng.randrange(256)
        elif action == 2:
            raw[at:at] = rng.choice((b"\x00", b"\xff\xfe", b"{", b"[", b'"', b"\n", b",", b"NaN", b"\xef\xbb\xbf"))
        elif action == 3:
            del raw[min(at, end) : min(at, end) + 50]
        else:
            raw[at:at] = raw[min(at, end) : min(at, end) + 2000]
    return bytes(raw)


def mutated_file(rng, file):
    raw = file.read_bytes()
    try:
        whole = rng.random() < 0.7 and json.loads(raw)
    except ValueError:
        whole = None
    file.write_bytes(mutated_json(rng, whole).encode() if whole else mutated_bytes(rng, raw))
    with suppress(ValueError, RecursionError):
        print(*changes(json.loads(raw), json.loads(file.read_bytes())), sep="\n", file=sys.stderr)


def changes(old, new, path=""):
    """Each part of parsed JSON that differs, as "file's key.key is type"; to a depth of two."""
    if isinstance(old, dict) and isinstance(new, dict) and path.count(".") < 2:
        for key in dict.fromkeys([*old, *new]):
            if key not in new:
                yield f"{path}.{key} is absent"
            elif key not in old:
                yield f"{path}.{key} is new"
            else:
                yield from changes(old[key], new[key], f"{path}.{key}")
    elif json.dumps(old) != json.dumps(new):
        yield f"{path} is {type(new).__name__}"


# ---------------------------------------------------------------------------------------------- sections


def prepare(folder):
    """Small good files, of which each case mutates a copy."""
    base = folder / "base"
    model = Llama(LlamaConfig(512, 16, 24, 2, 2, max_position_embeddings=64))
    model.init_weights(0)
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE.parent / "base" / name, base / name)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 3], "bos_token_id": 1}')
    shutil.copytree(HERE / "fixtures" / "first-build-multilora", folder / "run")
    rows = {"pair.jsonl": [{"prompt": f"q{i}", "completion": "a"} for i in range(30)],
            "alpaca.json": [{"instruction": f"i{i}", "input": "x", "output": "o"} for i in range(30)],
            "chat.jsonl": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}]}
                           for i in range(30)],
            "boolq.jsonl": [{"passage": "p", "question": "q", "label": i % 2 == 0} for i in range(30)],
            "gsm8k.jsonl": [{"question": "q", "answer": f"so\n#### {i}"} for i in range(30)],
            **{f"form{n}.json{'l' * (n % 2)}": [record] * 6 for n, (record, *_) in enumerate(FORMS.values())}}
    for name, records in rows.items():
        text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
        (folder / name).write_text(text)
    (folder / "mmlu.csv").write_text("".join(f"question {i},a,b,c,d,{'ABCD'[i % 4]}\n" for i in range(30)))


def config(rng, folder):
    mutated_file(rng, folder / "base" / "config.json")
    with torch.no_grad():
        Llama.from_pretrained(folder / "base")(torch.tensor([[1, 2, 3]]))


def tokenizer(rng, folder):
    mutated_file(rng, folder / "base" / rng.choice(
        ("tokenizer_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")))
    found = Tokenizer.from_pretrained(folder / "base")
    found.encode("What is 1 + 2?")
    formats.choose("auto", found, folder / "base")


def described(file):
    """{name: (type, shape)} of the tensors in a safetensors file."""
    with open_tensors(file) as tensors:
        return {name: (tensors.get_slice(name).get_dtype(), tensors.get_slice(name).get_shape())
                for name in tensors.keys()}


def weights(rng, folder):
    file = folder / "base" / "model.safetensors"
    before = described(file)
    file.write_bytes(mutated_bytes(rng, file.read_bytes()))
    Llama.from_pretrained(folder / "base")
    assert described(file) == before


def run(rng, folder):
    mutated_file(rng, folder / "run" / "config.json")
    train.load_run(folder / "run", base=HERE.parent / "base")


def adapter(rng, folder):
    file = folder / "run" / "adapter.safetensors"
    before = described(file)
    if rng.random() < 0.3:
        save_file({rng.choice(("a", "model.x")): torch.zeros(rng.randrange(4))}, file)
    else:
        file.write_bytes(mutated_bytes(rng, file.read_bytes()))
    train.load_run(folder / "run", base=HERE.parent / "base")
    assert described(file) == before


def data(rng, folder):
    file = rng.choice([f for f in sorted(folder.iterdir()) if f.suffix in (".jsonl", ".json", ".csv")])
    mutated_file(rng, file)
    skip, tokenizer = rng.random() < 0.5, Tokenizer.from_pretrained(folder / "base")
    name, _ = formats.choose(rng.choice(("auto", "plain", "alpaca", "zephyr", "llama2")), tokenizer, folder / "base")
    suite = formats.load([str(file)], template=name, skip_bad=skip, ignore=rng.choice(((), ("label", "history"))))
    assert suite.train and all(e.segments for e in suite.train)
    encoded = train.data.encode_suite(suite, tokenizer, 64)
    assert all(sum(i == 2 for i in e.ids) <= 16 for e in encoded.train), "text became a special token"


def flags(rng, folder):
    values = ("0", "-1", "1", "nan", "inf", "1e400", "", "x", "a\nb", "builtin", "auto", "9" * 40, "\x00", "--", "all")
    argv = ["--method", rng.choice(["multilora", "csreft", "cofitune", "sft", "nothing"])]
    names = [option for option in OPTIONS if option != "--help"]
    for _ in range(rng.randint(1, 4)):
        argv += [rng.choice(names)] + [rng.choice(values)] * rng.randint(0, 2)
    settings, own, given = train.parse(argv)
    for part in filter(None, (settings, own)):
        check(part)
        for name, kind, *_ in described_flags(part):
            value = getattr(part, name)
            assert name not in given or value is None or fits(value, kind), (name, value)
    train.place(settings)


SECTIONS = (config, tokenizer, weights, run, adapter, data, flags)
OPTIONS = sorted({"--rank", "--layers", "--modules", "--targets", "--positions", "--alpha",
                  *("--" + f.replace("_", "-") for f in train.Config.__dataclass_fields__)})


# ---------------------------------------------------------------------------------------------- cases


def child(section, seed, source, folder):
    """One case: 0 accepted, 2 refused in one line, 3 a traceback, which is in the folder."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30),) * 2)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    code = 3
    with open(folder / "said", "w", encoding="utf-8", errors="replace") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        try:
            section(random.Random(f"{section.__name__} {seed}"), folder)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            (folder / "traceback").write_text(traceback.format_exc(), errors="replace")
            code = 2 if told(error) else 3  # raises what is a bug
        finally:
            os._exit(code)


def case(section, seed, source):
    """(what happened, details) of one case."""
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if not pid:
            child(section, seed, source, Path(folder))
        deadline = time.monotonic() + 20
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "hang", ""
            time.sleep(0.002)
        file = Path(folder) / "traceback"
        details = file.read_text(errors="replace") if file.exists() else ""
        if os.WIFSIGNALED(status):
            return "abort", f"signal {os.WTERMSIG(status)}"
        changed = [line for line in (Path(folder) / "said").read_text().splitlines() if line.startswith(".")]
        known = MAY_BE_ACCEPTED[section.__name__]
        if not status and (silent := [c for c in changed if not any(re.fullmatch(pattern, c) for pattern in known)]):
            return "unlisted", "\n".join(silent)
        return {0: "accepted", 2: "refused"}.get(os.WEXITSTATUS(status), "traceback"), details


def fuzz(cases, seconds, seed):
    """{section: Counter of what happened}; prints each failure."""
    torch.set_num_threads(1)
    counts, start = {section.__name__: Counter() for section in SECTIONS}, time.monotonic()
    with tempfile.TemporaryDirectory() as source:
        prepare(Path(source))
        number = 0
        while number < cases and time.monotonic() - start < seconds:
            section = SECTIONS[number % len(SECTIONS)]
            what, details = case(section, seed * 10**6 + number, source)
            counts[section.__name__][what] += 1
            if what not in ("accepted", "refused"):
                print(f"{section.__name__} {seed * 10**6 + number}: {what}\n{details}", flush=True)
            number += 1
    return counts


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = fuzz(args.cases, 60 * args.minutes, args.seed)
    for name, found in counts.items():
        print(f"{name:<12}" + ", ".join(f"{what} {number:,}" for what, number in sorted(found.items())))
    return int(any(found.keys() - {"accepted", "refused"} for found in counts.values()))


if __name__ == "__main__":
    command_line(main)
