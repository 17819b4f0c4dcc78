"""The shared loop: one command trains any method on any base, scores it before and after, and leaves a run folder.

    python train.py --method multilora

Read in this order: settings, the methods and how they are found, one run step by step (data, training, what it leaves),
trials, scoring alone, and finished runs. No line here knows a method by name: a `*.py` beside this file that defines
`Config` and `attach(model, config) -> Adapter` is a method (README, "Add a method").
"""

import hashlib
import importlib
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy
import safetensors
import tokenizers
import torch
from safetensors.torch import save_file

import data
import formats
from base import suite as builtin
from engine.flags import Parser, add_flags, check, command_line, flag
from model import Llama, LlamaConfig, UserError, count_parameters, open_tensors, read_json, write_json

HERE = Path(__file__).resolve().parent
TEMPLATES = ("auto", *formats.TEMPLATES)
STANDARD = {"steps": 600, "batch_size": 48, "lr": 1e-3}  # where a method's own DEFAULTS say nothing else


# ---------------------------------------------------------------------------------------------- settings


@dataclass
class Config:
    """Settings of every run; each field is a flag. Where steps, batch_size or lr are None they become the method's own
    (`DEFAULTS` of its file), else STANDARD's."""

    method: Annotated[str | None, "fine-tuning method"] = None
    base: Annotated[str, "folder of the base model, in Hugging Face layout"] = "base"
    data: Annotated[list[str], "what to learn: builtin, or files as [NAME=]FILE, each a task"] = field(
        default_factory=lambda: ["builtin"])
    eval_data: Annotated[list[str], "files to score on; default: every 20th row of --data"] = field(
        default_factory=list)
    general_data: Annotated[list[str], "files of what the base can do already, only scored"] = field(
        default_factory=list)
    shot_data: Annotated[list[str], "files of solved examples, matched to tasks by name"] = field(
        default_factory=list)
    shots: Annotated[int, "solved examples in front of each scored question", "[0, inf)"] = 0
    mix: Annotated[Literal["proportional", "equal"], "how much of each task is seen: as it has rows, or alike"] = \
        "proportional"
    template: Annotated[Literal[TEMPLATES], "prompt template; auto: the base's own, else plain"] = "auto"
    max_length: Annotated[int, "tokens of an example, at most; the model's own limit where that is smaller",
                          "[2, inf)"] = 512
    too_long: Annotated[Literal["cut", "drop"], "what happens to longer ones; they are counted"] = "cut"
    skip_bad_rows: Annotated[bool, "leave out and count rows that their format does not take"] = False
    max_new_tokens: Annotated[int, "longest answer where scoring generates text (GSM8K)", "[1, inf)"] = 256
    tasks: Annotated[str, "built-in new tasks to learn: all (six), hard (twelve), or names separated by commas"] = "all"
    steps: Annotated[int | None, "optimiser steps", "[1, inf)"] = None
    batch_size: Annotated[int | None, "examples in a micro-batch", "[1, inf)"] = None
    grad_accum: Annotated[int, "micro-batches in a step; their gradients add up to those of one large batch",
                          "[1, inf)"] = 1
    lr: Annotated[float | None, "peak learning rate", "(0, inf)"] = None
    warmup: Annotated[float, "share of the steps in which the rate rises; a cosine to zero follows", "[0, 1)"] = 0.05
    weight_decay: Annotated[float, "AdamW's decoupled weight decay", "[0, inf)"] = 0.0
    clip: Annotated[float, "largest gradient norm, 0 for no clipping", "[0, inf)"] = 1.0
    replay: Annotated[float, "share of general examples mixed into the training data", "[0, 1)"] = 0.0
    seed: Annotated[int, "of initialisation, order and dropout; the suite's facts and splits have their own",
                    "[0, inf)"] = 0
    device: Annotated[str, "auto (cuda, else mps, else cpu) or a torch device such as cuda:1"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"],
                     "frozen weights and computation; auto: bfloat16 on cuda, else float32. "
                     "What is trained stays float32 at least"] = "auto"
    eval_split: Annotated[Literal["test", "validation"], "the split that the table is about"] = "test"
    eval_limit: Annotated[int, "examples of each task to score, 0 for all", "[0, inf)"] = 0
    log_every: Annotated[int, "steps between two lines of metrics.jsonl", "[1, inf)"] = 10
    grad_checkpointing: Annotated[bool, "keep only each layer's input for the backward pass: less memory, slower"] = \
        False
    eval_only: Annotated[bool, "score a base, or a run with --adapter, and train nothing"] = False
    adapter: Annotated[str | None, "finished run folder to score with --eval-only"] = None
    out: Annotated[str | None, "run folder; default out/METHOD"] = None
    overwrite: Annotated[bool, "replace the run that is already in the folder"] = False

    def __post_init__(self):
        for name, value in {**STANDARD, **defaults_of(self.method)}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.adapter and not self.eval_only:
            raise UserError("--adapter names a run to score: give --eval-only as well")
        if not self.builtin:
            if "builtin" in self.data and self.data != ["builtin"]:
                raise UserError("--data takes builtin or files, not both")
            if self.tasks != "all" or self.replay:
                raise UserError(f"{'--replay' if self.replay else '--tasks'} is about the built-in suite; with files, "
                                 "name in --data what to learn")
        else:
            of_files = ("eval_data", "general_data", "shot_data", "shots", "mix", "template", "skip_bad_rows")
            if wrong := [name for name in of_files if getattr(self, name) not in (0, [], "proportional", "auto")]:
                raise UserError(f"--{wrong[0].replace('_', '-')} goes with files in --data, not with the built-in "
                                 "suite")
        if self.eval_data and self.eval_split != "test":
            raise UserError("--eval-data is the test data: leave out --eval-split validation")
        if bool(self.shots) != bool(self.shot_data):
            raise UserError("--shots and --shot-data go together: how many solved examples, and from where")

    @property
    def builtin(self):
        """Whether the data are the built-in suite's."""
        return self.data == ["builtin"] and not (self.eval_only and self.eval_data)


@cache
def find_methods():
    """{name: (module, default Config)} of every method file beside this one, and of its presets."""
    methods = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem == "train" or path.stem.startswith("test_"):
            continue
        module = importlib.import_module(path.stem)
        if not (hasattr(module, "Config") and hasattr(module, "attach")):
            continue
        if double := {f.name for f in fields(module.Config)} & {f.name for f in fields(Config)}:
            raise UserError(f"{path.name}: Config has the field {min(double)!r}, which is train.py's: set its default "
                            "in DEFAULTS")
        for name, defaults in {path.stem: module.Config(), **getattr(module, "PRESETS", {})}.items():
            if name in methods:
                raise UserError(f"{path.name} defines the method {name!r}, and so does {methods[name][0].__name__}.py")
            methods[name] = module, defaults
    return methods


def method_of(name):
    """(module, default Config) of a method. Raises UserError, listing the valid names, for one that does not exist."""
    if name not in find_methods():
        raise UserError(f"unknown method {name!r}; valid: {', '.join(find_methods())}")
    return find_methods()[name]


def defaults_of(name):
    """{field of Config: value} that a method's file sets in `DEFAULTS = {name: {...}}`, for itself or a preset."""
    own = getattr(method_of(name)[0], "DEFAULTS", {}).get(name, {}) if name else {}
    if wrong := own.keys() - STANDARD.keys():
        raise UserError(f"DEFAULTS of {name!r} sets {min(wrong)!r}, expected some of {', '.join(STANDARD)}")
    return own


def parse(argv):
    """(Config, the method's Config or None) from the command line; exits with code 2 and one line on a mistake."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser.add_argument_group("every run"), Config(method=name))
    if name:
        _, defaults = method_of(name)
        add_flags(parser.add_argument_group(f"--method {name}"), defaults)
    else:
        parser.epilog = "methods, each with flags of its own (--method NAME --help): " + "; ".join(
            f"{m}: " + " ".join(flag(f.name) for f in fields(d)) for m, (_, d) in find_methods().items())
    values = vars(parser.parse_args(argv))
    config = Config(**{f.name: values[f.name] for f in fields(Config)})
    if config.eval_only + (name is not None) != 1:
        parser.error(f"give one of --method NAME and --eval-only; methods: {', '.join(find_methods())}")
    return config, name and replace(defaults, **{f.name: values[f.name] for f in fields(defaults)})


# ---------------------------------------------------------------------------------------------- one run


def place(config):
    """(device, dtype) that `--device` and `--dtype` name. Raises UserError for a device that is not there."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return torch.device(device), getattr(torch, dtype)


def load_data(config, split=None, limit=None, train=True):
    """(Suite of tokens, tokenizer) of a run. split, limit: instead of the run's own; train: False leaves out the
    training examples."""
    tokenizer = data.Tokenizer.from_pretrained(config.base)
    split, limit = split or config.eval_split, config.eval_limit if limit is None else limit
    if config.builtin:
        suite = builtin.load(config.tasks, split, limit, config.replay)
    else:
        files = [file for file in config.data if file != "builtin"]
        suite = formats.load(files, config.eval_data, config.general_data, config.shot_data, config.shots, split, limit,
                             template_of(config, tokenizer), config.mix, config.skip_bad_rows)
    longest = min(config.max_length, LlamaConfig.from_pretrained(config.base).max_position_embeddings)
    suite = suite if train else replace(suite, train=[])
    return data.encode_suite(suite, tokenizer, longest, config.too_long), tokenizer


def template_of(config, tokenizer):
    """The name of the prompt template that the data are written in."""
    if config.builtin:
        return "short"
    return config.template if config.template != "auto" else tokenizer.template or "plain"


def start_adapter(model, method, config):
    """Attaches a method; what it trains becomes float32 where the base is stored in fewer bits (an Adam step of 1e-4
    would change nothing in a bfloat16 weight of 1)."""
    adapter = method.attach(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the method left nothing to train")
    for p in trained:
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return adapter


def schedule(step, config):
    """The share of the peak rate at a step, from 1 to config.steps: a linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 1 - warmup) / max(1, config.steps - warmup)))
    return min(step / warmup, cosine)


def train(model, adapter, examples, config, pad, log=None):
    """Trains in place for config.steps steps.

    The loss of a step is the mean over all labelled tokens of its micro-batches, so gradient accumulation equals one
    large batch. log(record), if given, receives {"step", "loss", "lr", ...} every config.log_every steps.
    """
    per_step = config.batch_size * config.grad_accum
    draws = data.draw(examples, per_step, config.seed)
    collated = lambda group: data.collate(group, pad).to(model.device)
    with model.autocast():
        adapter.prepare(collated(group) for group in data.draw(examples, config.batch_size, config.seed))
    optimizer = torch.optim.AdamW(adapter.param_groups(config.lr, config.weight_decay))
    peaks = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]

    model.train()
    start, tokens, losses = time.perf_counter(), 0, []
    for step in range(1, config.steps + 1):
        for part, peak in zip(optimizer.param_groups, peaks):
            part["lr"] = peak * schedule(step, config)
        group = next(draws)
        labelled = sum(label != -100 for example in group for label in example.labels)
        total = 0.0
        for i in range(0, per_step, config.batch_size):
            batch = collated(group[i : i + config.batch_size])
            with model.autocast():
                loss = model(batch.ids, batch.labels, batch.ctx, reduction="sum") / labelled
                loss = loss + adapter.penalty(batch.ctx) / config.grad_accum
            loss.backward()
            total += loss.item()
            tokens += batch.ids.numel()
        if not math.isfinite(total):
            raise UserError(f"the loss is {total} at step {step}: try a lower --lr than {config.lr:g}")
        if config.clip:
            torch.nn.utils.clip_grad_norm_(params, config.clip)
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        losses.append(total)
        if log and (step % config.log_every == 0 or step == config.steps):
            seconds = time.perf_counter() - start
            log({"step": step, "steps": config.steps, "loss": sum(losses) / len(losses),
                 "lr": optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / seconds, "seconds": seconds,
                 "eta_seconds": seconds / step * (config.steps - step)})
            losses = []
    model.eval()


class Log:
    """Writes metrics.jsonl and shows progress: in place on a terminal, one line in ten records elsewhere."""

    def __init__(self, path):
        self.file, self.live, self.count = open(path, "w", encoding="utf-8"), sys.stdout.isatty(), 0

    def __call__(self, record):
        print(json.dumps(record), file=self.file, flush=True)
        last = record["step"] == record["steps"]
        self.count += 1
        if self.live or last or self.count % 10 == 1:
            line = "step {step:>5}/{steps}  loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s  ETA {eta}"
            line = line.format(**record, eta=clock(record["eta_seconds"]))
            print(("\r\033[K" if self.live else "") + line, end="" if self.live and not last else "\n", flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Job:
    """A run's settings, and what it needs before a method is attached."""

    config: Config
    method_config: object
    method: object  # its module
    base: LlamaConfig
    device: torch.device
    dtype: torch.dtype
    out: Path
    asked: dict  # what identifies the run: base, method and all settings

    def start(self, method_config):
        """(model, adapter) from a new copy of the base. The seed is set here, so that each start is the same."""
        torch.manual_seed(self.config.seed)
        model = Llama.from_pretrained(self.config.base, self.device, self.dtype)
        model.model.checkpointing = self.config.grad_checkpointing
        return model, start_adapter(model, self.method, method_config)


def open_job(config, method_config):
    """Raises UserError for a device or a base that is not there, and for a folder that holds another run."""
    check(config)
    check(method_config)
    device, dtype = place(config)
    base = LlamaConfig.from_pretrained(config.base)
    out = Path(config.out or f"out/{config.method}")
    asked = {"method": config.method, "settings": asdict(replace(config, overwrite=False)),
             "method_settings": asdict(method_config), "base_sha256": checksum(Path(config.base))}
    check_folder(out, config.overwrite, asked)
    return Job(config, method_config, method_of(config.method)[0], base, device, dtype, out, asked)


def settle(job):
    """The method's Config to train with: as asked, or as its plan() chooses by trials."""
    if not hasattr(job.method, "plan"):
        return job.method_config
    return job.method.plan(job.method_config, job.base, Trials(job))


def run(config, method_config=None, argv=()):
    """One whole run of a method; returns what results.json holds. method_config: default, the method's own."""
    job = open_job(config, method_config or method_of(config.method)[1])
    suite, tokenizer = load_data(config)
    method_config = settle(job)
    model, adapter = job.start(method_config)  # every mistake has shown by now, and nothing old is deleted before
    clear_folder(job.out)
    write_json(job.out / "config.json", {
        **job.asked, "method_settings": asdict(method_config), "tasks": suite.names,
        "template": template_of(config, tokenizer), **provenance(argv)})
    results = learn(config, config.method, model, adapter, suite, tokenizer, job.out)
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors().items()}
    save_file(tensors, job.out / "adapter.safetensors", {"format": "pt"})
    write_json(job.out / "results.json", results)
    return results


class Trials:
    """trial(config, steps) -> (speciality, versatility): a short fine-tune of a fresh copy, scored on validation data.

    Every score is written to search.json in the run folder at once, and a trial that is there is not trained again.
    """

    EXAMPLES = 50  # of each task

    def __init__(self, job):
        self.job, self.file = job, job.out / "search.json"
        self.known = read_json(self.file)["trials"] if same_search(job.out, job.asked) else []

    @cached_property
    def data(self):
        limit = min(self.EXAMPLES, self.job.config.eval_limit or self.EXAMPLES)
        suite, tokenizer = load_data(self.job.config, "validation", limit)
        if {suite.group[t] for t in suite.tests if suite.score[t] is not data.loss} != {"new", "general"}:
            raise UserError("a search needs new and general tasks that are scored in percent, not by loss: give such "
                            "--general-data, or make its choice yourself (CoFiTune: --layers 25%-50%)")
        return suite, tokenizer

    def __call__(self, method_config, steps):
        key = {"settings": asdict(method_config), "steps": steps}
        found = next((t for t in self.known if key.items() <= t.items()), None)
        if found is None:
            start = time.perf_counter()
            speciality, versatility = self.data[0].means(self.fine_tune(method_config, steps))
            seconds = time.perf_counter() - start
            found = {**key, "speciality": speciality, "versatility": versatility, "seconds": seconds}
            self.known.append(found)
            self.job.out.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"asked": self.job.asked, "trials": self.known})
        return found["speciality"], found["versatility"]

    def fine_tune(self, method_config, steps):
        """{task: figures} after `steps` steps."""
        (suite, tokenizer), config = self.data, self.job.config
        model, adapter = self.job.start(method_config)
        train(model, adapter, suite.train, replace(config, steps=steps), tokenizer.pad_id)
        return data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)

    def estimate(self, method_config, steps):
        """Seconds that a trial will take, from the trials so far or from a few steps."""
        if self.known:
            return sorted(t["seconds"] for t in self.known)[len(self.known) // 2]
        self.fine_tune(method_config, 1)  # the first one of a process is slower
        seconds = []
        for few in (1, 11):
            start = time.perf_counter()
            self.fine_tune(method_config, few)
            seconds.append(time.perf_counter() - start)
        return seconds[0] + max(0.0, seconds[1] - seconds[0]) / 10 * (steps - 1)


def learn(config, name, model, adapter, suite, tokenizer, out):
    """Score, train, score, and the table: what fine-tuning and pretraining share. Returns what results.json holds."""
    start = time.perf_counter()
    scored = lambda: data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
    total = count_parameters(model.config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{name}: {trainable:,} trainable parameters / {total:,} of the base = {100 * trainable / total:.3f} %")
    print(f"{len(suite.train):,} training examples of {len(suite.trained)} tasks, {config.steps} steps of "
          f"{config.batch_size * config.grad_accum}, {model.device.type} {config.dtype}, to {out}", flush=True)

    before = scored()
    train(model, adapter, suite.train, config, tokenizer.pad_id, Log(out / "metrics.jsonl"))
    results = {
        "method": name, "seed": config.seed, "base": config.base, "steps": config.steps,
        "trainable_parameters": trainable, "total_parameters": total,
        **summary(config, suite, before, scored()), "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(model.device), "report": adapter.report()}
    print_table(results)
    return results


def summary(config, suite, before, after):
    """The part of results.json that is about scores. A task's before and after are its main figure's; `figures` holds
    all that it is scored by."""
    speciality, versatility = suite.means(after)
    main = data.main_figure
    return {"eval_split": config.eval_split,
            "tasks": {task: {"group": suite.group[task], "aspect": suite.aspect[task],
                             "score": suite.score[task].__name__,
                             "before": main(before[task]), "after": main(after[task]),
                             "figures": {name: [before[task][name], after[task][name]] for name in after[task]}}
                      for task in after},
            "speciality": speciality, "versatility": versatility,
            "uni": None if None in (speciality, versatility) else speciality + versatility}


def score_only(config, argv=()):
    """Scores a base, or a finished run, on the data named, else on the run's own; writes results.json."""
    check(config)
    device, dtype = place(config)
    name, out = "base", Path(config.out or "out/eval")
    check_folder(out, config.overwrite)
    if config.adapter:
        moved = None if config.base == Config.base else config.base  # else where the run found it
        model, _, _, saved = load_run(config.adapter, device, dtype, moved)
        name, settings = saved["method"], saved["settings"]
        if config.builtin:
            own = ("data", "eval_data", "general_data", "shot_data", "shots", "tasks", "template", "max_length",
                   "too_long", "skip_bad_rows")
            config = replace(config, **{key: settings[key] for key in own})
        elif config.template == "auto":
            config = replace(config, template=saved.get("template", "auto"))
        config = replace(config, base=moved or settings["base"])
    else:
        model = Llama.from_pretrained(config.base, device, dtype)
    (suite, tokenizer), start = load_data(config, train=False), time.perf_counter()
    scores = data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
    clear_folder(out)
    write_json(out / "config.json", {"settings": asdict(config), **provenance(argv)})
    results = {"method": name, "base": config.base, "adapter": config.adapter, **summary(config, suite, scores, scores),
               "seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(model.device)}
    print_table(results)
    write_json(out / "results.json", results)
    return results


RUN_FILES = ("config.json", "adapter.safetensors", "metrics.jsonl", "results.json")


def same_search(out, asked):
    """True where the folder holds nothing but the unfinished search of this same run."""
    return ((out / "search.json").exists() and not (out / "results.json").exists()
            and read_json(out / "search.json").get("asked") == asked)


def check_folder(out, overwrite, asked=None):
    """Raises UserError where the folder holds something already, unless it may be replaced or continued."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not same_search(out, asked):
        raise UserError(f"{out} already holds a run: choose another --out, or add --overwrite to replace it")


def clear_folder(out):
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


def checksum(base):
    """SHA-256 over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(base.glob("*.safetensors")):
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def provenance(argv):
    versions = {m.__name__: m.__version__ for m in (torch, numpy, tokenizers, safetensors)}
    return {"command": shlex.join(["python", *argv]),
            "versions": {"python": platform.python_version(), **versions}}


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, else the process's largest resident size (0 where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_table(results):
    """The figures of each task before and after, one column where nothing was trained, and the group means."""
    trained = "trainable_parameters" in results
    line = lambda name, kind, *values: f"{name:<23} {kind:<18}" + "".join(f"{v:>9}" for v in values[-1 - trained :])
    print("\n" + line("in % but for loss", results["eval_split"], *(("before", "after") if trained else ("score",))))
    for group, title in (("new", "speciality"), ("general", "versatility")):
        rows = {task: s for task, s in results["tasks"].items() if s["group"] == group}
        for task, s in rows.items():
            for i, (name, values) in enumerate(s["figures"].items()):
                shown = [f"{v:.1f}" if s["score"] != "loss" else f"{v:.4g}" for v in values]
                print(line("" if i else "  " + task, s["aspect"] if name == "exact match" else name, *shown))
        before = [s["before"] for s in rows.values() if s["score"] != "loss"]
        if before:
            print(line(title, f"mean, {group}", f"{sum(before) / len(before):.1f}", f"{results[title]:.1f}"))
    if results["uni"] is not None:
        print(line("Uni", "their sum", "", f"{results['uni']:.1f}"))
    print(f"{results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**20:,.0f} MiB")


# Fields that the first build's run folders have and today's settings do not. The method's rate and steps stood in both.
RETIRED = {"pretrain", "lr", "steps", "batch_size"}


def revive(cls, saved):
    """Settings from a run's config.json. Raises UserError for a field that they do not have."""
    known = {f.name for f in fields(cls)}
    if wrong := saved.keys() - known - RETIRED:
        raise UserError(f"the run has the setting {min(wrong)!r}, which {cls.__module__}.py does not know")
    return cls(**{name: value for name, value in saved.items() if name in known})


def load_run(run_dir, device="cpu", dtype=torch.float32, base=None):
    """(model, adapter, method module, config.json as a dict) of a finished run, with the trained tensors in place.
    base: where its base model lies now; default: where it was.

    Raises UserError where the folder holds no finished run, or its base has changed since.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "adapter.safetensors").exists():
        raise UserError(f"{run_dir} holds no adapter.safetensors; expected a run folder such as out/multilora")
    saved = read_json(run_dir / "config.json")
    base = Path(base or saved["settings"]["base"])
    if not base.is_dir():
        raise UserError(f"{run_dir} was trained on the base {base}, which is not here: run where it is")
    if checksum(base) != saved["base_sha256"]:
        raise UserError(f"{run_dir} was trained on other weights than {base} holds now (base_sha256 differs)")
    if saved["method"] not in find_methods():
        raise UserError(f"{run_dir} is a run of the method {saved['method']!r}, whose file is not here")
    method, defaults = find_methods()[saved["method"]]
    saved["settings"] = asdict(revive(Config, saved["settings"]))
    model = Llama.from_pretrained(base, device, dtype)
    adapter = start_adapter(model, method, revive(type(defaults), saved["method_settings"]))
    with open_tensors(run_dir / "adapter.safetensors") as file:
        adapter.load_tensors({name: file.get_tensor(name) for name in file.keys()})
    return model.eval(), adapter, method, saved


def main():
    argv = sys.argv[1:]
    config, method_config = parse(argv)
    if config.eval_only:
        score_only(config, ["train.py", *argv])
    else:
        run(config, method_config, ["train.py", *argv])


if __name__ == "__main__":
    command_line(main)
