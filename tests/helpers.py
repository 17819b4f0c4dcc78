"""What several test files use: running programs, tiny models, short runs, records in files."""

import contextlib
import csv
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import tokenizers
import torch

import data
import train
from engine import devices
from formats import choose
from model import Context, Llama, LlamaConfig, UserError

torch.set_num_threads(1)  # these models are small, and two spinning threads on a busy core take seconds for a product
os.environ["OMP_NUM_THREADS"] = "1"  # nor in a program that a test starts
HERE = Path(__file__).resolve().parent.parent
CPU = HERE / "tests" / "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CPU), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(CPU / "sitecustomize.py"), run_name="sitecustomize")
BASE = HERE / "base"
REAL = HERE.parent / "shared" / "real"  # real files, where a checkout has them beside it
posix = pytest.mark.skipif(os.name != "posix", reason="Windows sends no such signals, and has no locks, pipes, links")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real files beside this checkout")
TINY = REAL / "tinystories-656k"
QUICK = ("--tasks", "currency,cipher", "--steps", "12", "--batch-size", "8", "--eval-limit", "5", "--samples", "0")

# ---------------------------------------------------------------------------------------------- programs


def start(*args, cwd=HERE, **options):
    """A program of the project as a user starts it: start("train.py", ...) or start("-m", "tools.chat", ...)."""
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, text=True, **options)


def cli(*args, cwd=HERE, code=0, stdin=""):
    """The same, waited for: its finished process, after checking the exit code."""
    process = start(*args, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-2000:]}"
    return subprocess.CompletedProcess(process.args, code, out, err)


def here(*args, cwd=HERE, code=0):
    """The same in this process, which has imported everything already. Returns what it printed."""
    *module, program = args[:2] if args[0] == "-m" else args[:1]
    out, err, argv, folder, got = io.StringIO(), io.StringIO(), sys.argv, Path.cwd(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(cwd)
        sys.argv = list(map(str, args[len(module) :]))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
            if module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(program), run_name="__main__")
    except SystemExit as end:
        got = end.code or 0
    finally:
        os.chdir(folder)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = out.getvalue(), err.getvalue()
    assert got == code, f"exit code {got}\n{out[-2000:]}\n{err[-2000:]}"
    return subprocess.CompletedProcess(args, got, out, err)


def kill(command, moment, number=None):
    """Starts a command, kills it (or sends it a signal) as soon as moment() is true, and returns the ended process with
    its output; None where the command ended before."""
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not moment():
        if process.poll() is not None:
            return None
        time.sleep(0.001)
    process.send_signal(number) if number else process.kill()
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def one_line_error(*args, cwd=HERE, run=here):
    """The message of a command that must fail as a user's mistake: exit code 2, one line, no traceback."""
    done = run(*args, cwd=cwd, code=2)
    lines = done.stderr.strip().splitlines()
    name = args[1] if args[0] == "-m" else Path(args[0]).name
    assert len(lines) == 1 and lines[0].startswith(f"{name}: error: "), done.stderr
    assert "Traceback" not in done.stdout
    return lines[0]


def refused(load, path, *words):
    """load(path) raises what a program shows as one line: a UserError that names the path, with these words."""
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in (str(path), *words)), text


def clone(path):
    """A copy of the project, without what runs and tools leave behind."""
    return shutil.copytree(HERE, path, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "venv"))


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- models


def tiny(dtype=torch.float32, seed=0, **changes):
    """A random two-layer model; norms and biases are randomised too, so that one which is not used shows."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = Llama(LlamaConfig(**{**shape, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else 0.15 * noise)
    return model.eval()


def perturb(model, scale=0.1, seed=1):
    """Stands in for training: moves every trainable tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def random_ids(model, batch=3, length=11, seed=2):
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy_without_cache(model, prompt, new, stop=()):
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        ctx = Context(torch.arange(len(ids))[None] < len(prompt))
        ids.append(model(torch.tensor([ids]), ctx=ctx)[0, -1].argmax().item())
        if ids[-1] in stop:
            return ids[len(prompt):-1]
    return ids[len(prompt):]


def their_logits(path, ids):
    """What transformers computes from the checkpoint in this folder."""
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits


# ---------------------------------------------------------------------------------------------- methods and data


def settled(name):
    """(module, Config) of a method, with what a search would choose filled in, and few batches for the importance."""
    method, config = train.method_of(name)
    chosen = {"layers": "25%-50%", "importance_batches": 4} if getattr(config, "layers", "") == "search" else {}
    return method, replace(config, **chosen)


@cache
def builtin_examples():
    """(tokenizer, encoded training examples of two built-in tasks)"""
    suite, tokenizer, _ = train.load_data(train.Config(method="lora", tasks="currency,cipher", eval_limit=1))
    return tokenizer, suite.train


def with_template(examples, name="short", tokenizer=None, folder=BASE):
    """Examples with a template around them."""
    template, _ = choose(name, tokenizer or data.Tokenizer.from_pretrained(folder), folder)
    return [template.apply(example) for example in examples]


def trained_on_builtin(method, method_config, steps=4, dtype=torch.float32, after=None, log=None, keep=None, **changes):
    """(model, adapter) after a few steps on the built-in suite, in this process. after(adapter, step) looks on."""
    config = train.Config(steps=steps, **{"batch_size": 8, "lr": 1e-2, **changes})
    tokenizer, examples = builtin_examples()
    model = devices.load(BASE, torch.device("cpu"), dtype, config.shard)
    model.model.checkpointing = config.grad_checkpointing
    torch.manual_seed(config.seed)
    adapter = train.start_adapter(model, method, method_config)
    train.train(model, adapter, examples, config, tokenizer.pad_id, log, keep, after and partial(after, adapter))
    return model, adapter


def tokenizer_folder(path, before="<s> $A", **settings):
    """The built-in tokenizer with another post-processor (None: none) and these files beside it, without .json."""
    shutil.copytree(BASE, path, ignore=shutil.ignore_patterns("pretraining", "*.safetensors", "*.py", "__pycache__"))
    fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    fast.enable_truncation(4)  # left over from somebody's training, and not to be applied
    fast.enable_padding(length=9)
    if before:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=before, special_tokens=[("<s>", 1), ("</s>", 2)])
    raw = json.loads(fast.to_str())
    (path / "tokenizer.json").write_text(json.dumps(raw if before else {**raw, "post_processor": None}))
    for name, content in settings.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------- records

PASSAGE = {"passage": "Ice floats.", "question": "does ice float"}
COPA = {"premise": "He fell.", "choice1": "He slipped.", "choice2": "He sang.", "question": "cause", "label": 0}


def written(path, records, form="lines"):
    """A file of records as a JSON array, as JSON lines, or as CSV with or without a header."""
    if form.startswith("csv"):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerows(([list(records[0])] if form == "csv" else []) + [list(r.values()) for r in records])
    else:
        path.write_text(json.dumps(records, indent=1) if form == "array" else "\n".join(map(json.dumps, records)))
    return path
