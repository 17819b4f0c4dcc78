"""The shared loop: one command trains any method on any base, scores it before and after, and leaves a run folder.

    python train.py --method multilora

Read in this order: settings, the methods and how they are found, one run step by step (data, training, what it leaves),
trials, scoring alone, and finished runs. No line here knows a method by name: a `*.py` beside this file that defines
`Config` and `attach(model, config) -> Adapter` is a method (README, "Add a method").
"""

import argparse
import hashlib
import importlib
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch

import data
import formats
from base import suite as builtin
from engine import devices
from engine.best import Best
from engine.checkpoint import Checkpoint, save_tensors
from engine.compiled import compile_model
from engine.flags import Parser, Stopped, add_flags, check, command_line, flag, signals_kept, told
from engine.folder import (RunFolder, digest, locked, open_folder, peak_memory, provenance, refuse_inputs, room_for)
from engine.progress import Log, progress
from engine.table import print_table, show_finished, summary
from formats import samples
from model import LlamaConfig, UserError, count_parameters, open_tensors, read_json, tensor_files
from model import fits, typed, write_json

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
    eval_data: Annotated[list[str], "files to score on; default: a twentieth of the rows of --data"] = field(
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
    ignore_fields: Annotated[list[str], "fields of the data files that are left out on purpose"] = field(
        default_factory=list)
    max_new_tokens: Annotated[int, "longest answer where scoring generates text (GSM8K)", "[1, inf)"] = 256
    tasks: Annotated[str, "built-in new tasks to learn: all (six), hard (twelve), or names separated by commas"] = "all"
    steps: Annotated[int | None, "optimiser steps", "[1, inf)"] = None
    epochs: Annotated[float | None, "instead of --steps: how often each training example is seen", "(0, inf)"] = None
    batch_size: Annotated[int | None, "examples in a micro-batch, over all processes", "[1, inf)"] = None
    grad_accum: Annotated[int, "micro-batches in a step; their gradients add up to those of one large batch",
                          "[1, inf)"] = 1
    lr: Annotated[float | None, "peak learning rate", "(0, inf)"] = None
    warmup: Annotated[float, "share of the steps in which the rate rises; a cosine to zero follows", "[0, 1)"] = 0.05
    weight_decay: Annotated[float, "AdamW's decoupled weight decay", "[0, inf)"] = 0.0
    clip: Annotated[float, "largest gradient norm, 0 for no clipping", "[0, inf)"] = 1.0
    replay: Annotated[float, "share of general examples mixed into the training data", "[0, 1)"] = 0.0
    seed: Annotated[int, "of initialisation, order and dropout; the suite's facts and splits have their own",
                    "[0, 9e18]"] = 0
    device: Annotated[str, "auto (cuda, else mps, else cpu) or a torch device such as cuda:1"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"],
                     "frozen weights and computation; auto: bfloat16 on cuda, else float32. "
                     "What is trained stays float32 at least"] = "auto"
    eval_split: Annotated[Literal["test", "validation"], "the split that the table is about"] = "test"
    eval_limit: Annotated[int, "examples of each task to score, 0 for all", "[0, inf)"] = 0
    eval_every: Annotated[int, "steps between two looks at the loss on validation rows (512 at most), 0 for none",
                          "[0, inf)"] = 0
    keep_best: Annotated[bool, "end with what had the lowest loss on validation rows, not with the last step"] = False
    samples: Annotated[int, "prompts of each kind that are answered before and after, for samples.json",
                       "[0, inf)"] = 3
    log_every: Annotated[int, "steps between two lines of metrics.jsonl", "[1, inf)"] = 10
    save_every: Annotated[int, "steps between two checkpoints, 0 for none", "[0, inf)"] = 100
    grad_checkpointing: Annotated[bool, "keep only each layer's input for the backward pass: less memory, slower"] = \
        False
    compile: Annotated[bool, "compile the layers for training, and the generation of answers to score: a minute or "
                             "two once, then faster steps; needs a C++ compiler, or a GPU"] = False
    shard: Annotated[bool, "split the base's weights over the processes that torchrun starts (FSDP2): for a model that "
                           "does not fit on each device"] = False
    eval_only: Annotated[bool, "score a base, or a run with --adapter, and train nothing"] = False
    adapter: Annotated[str | None, "finished run folder to score with --eval-only"] = None
    out: Annotated[str | None, "run folder; default out/METHOD"] = None
    overwrite: Annotated[bool, "start anew, whatever run is in the folder"] = False

    def __post_init__(self):
        for name, value in {**STANDARD, **defaults_of(self.method)}.items():
            if getattr(self, name) is None and not (name == "steps" and self.epochs):
                setattr(self, name, value)
        if self.epochs and self.steps:
            raise UserError("give one of --steps and --epochs")
        if self.compile and self.shard:
            raise UserError("--compile does not go with --shard")
        if self.keep_best and (not self.eval_every or self.eval_split != "test"):
            raise UserError("--keep-best needs --eval-every, and validation rows that the table is not about")
        if self.adapter and not self.eval_only:
            raise UserError("--adapter names a run to score: give --eval-only as well")
        if not self.builtin:
            if "builtin" in self.data and self.data != ["builtin"]:
                raise UserError("--data takes builtin or files, not both")
            if self.tasks != "all" or self.replay:
                raise UserError(f"{'--replay' if self.replay else '--tasks'} is about the built-in suite; with files, "
                                 "name in --data what to learn")
        else:
            of_files = ("eval_data", "general_data", "shot_data", "shots", "mix", "template", "skip_bad_rows",
                        "ignore_fields")
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
    """(Config, the method's Config or None, names of train's own settings that argv gives) from the command line; exits
    with code 2 and one line on a mistake."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    parser = Parser(description=__doc__.split("\n\n")[0])
    standard, own = Config(method=name), None
    add_flags(parser.add_argument_group("every run"), standard)
    if name:
        own = method_of(name)[1]
        add_flags(parser.add_argument_group(f"--method {name}"), own)
    else:
        parser.epilog = "methods, each with flags of its own (--method NAME --help): " + "; ".join(
            f"{m}: " + " ".join(flag(f.name) for f in fields(d)) for m, (_, d) in find_methods().items())
    default = object()  # stands where the command line says nothing
    found = vars(parser.parse_args(argv, argparse.Namespace(
        **{f.name: default for settings in (standard, own) if settings for f in fields(settings)})))
    given = {key: value for key, value in found.items() if value is not default}
    own_steps = {"steps": None} if "epochs" in given else {}
    config = replace(standard, **own_steps | {f.name: given[f.name] for f in fields(standard) if f.name in given})
    if config.eval_only + (name is not None) != 1:
        parser.error(f"give one of --method NAME and --eval-only; methods: {', '.join(find_methods())}")
    return config, own and replace(own, **{f.name: given[f.name] for f in fields(own) if f.name in given}), given.keys()


# ---------------------------------------------------------------------------------------------- one run


def place(config):
    """(device, dtype) that `--device` and `--dtype` name. Raises UserError for a device that is not there."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = devices.own(device)
    try:
        if torch.zeros(1, device=device).device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]:.80}") from None
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
        name, source = formats.choose(config.template, tokenizer, Path(config.base))
        print(f"template {name}: {source}")
        suite = formats.load(files, config.eval_data, config.general_data, config.shot_data, config.shots, split, limit,
                             name, config.mix, config.skip_bad_rows, config.ignore_fields)
    longest = min(config.max_length, LlamaConfig.from_pretrained(config.base).max_position_embeddings)
    most = min(512, len(suite.validation), (limit or 512) * len(suite.trained))
    chosen = random.Random("validation").sample(suite.validation, most)
    suite = replace(suite, train=suite.train if train else [], validation=chosen if config.eval_every else [])
    return data.encode_suite(suite, tokenizer, longest, config.too_long), tokenizer


def template_of(config, tokenizer):
    """The name of the prompt template that the data are written in."""
    if config.builtin:
        return "short"
    return formats.choose(config.template, tokenizer, Path(config.base))[0]


def start_adapter(model, method, config):
    """Attaches a method; what it trains becomes float32 where the base is stored in fewer bits (an Adam step of 1e-4
    would change nothing in a bfloat16 weight of 1)."""
    adapter = method.attach(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the method left nothing to train")
    for p in trained:
        if p.dtype in (torch.bfloat16, torch.float16):
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().float()))  # split ones, too
    return adapter


def schedule(step, config):
    """The share of the peak rate at a step, from 1 to config.steps: a linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 1 - warmup) / max(1, config.steps - warmup)))
    return min(step / warmup, cosine)


def train(model, adapter, examples, config, pad, log=None, keep=None, watch=None):
    """Trains in place, up to config.steps steps.

    log(record), if given, receives {"step", "loss", "lr", ...} every config.log_every steps. keep: the run's
    Checkpoint, from which training goes on. watch(step, steps) is called after each step. Raises Stopped, with a
    checkpoint, after the step in which a signal came.
    """
    draw = lambda: data.draw(examples, config.batch_size * config.grad_accum, config.seed)
    parts = lambda group: data.micro_batches(group, config.batch_size, model.device)
    collate = lambda part: data.collate(part, pad).to(model.device)
    some = progress(islice(draw(), adapter.prepare_steps), "preparing, step", adapter.prepare_steps)
    with model.autocast(), devices.prepared(model):  # each process reads all of the examples: all find the same
        adapter.prepare([collate(part) for part in parts(group)] for group in some)
    optimizer = torch.optim.AdamW(adapter.param_groups(config.lr, config.weight_decay),
                                  fused=model.device.type in ("cpu", "cuda"))
    peaks = [part["lr"] for part in optimizer.param_groups]
    params = [p for part in optimizer.param_groups for p in part["params"]]
    done, losses, waiting, tokens, seconds = 0, [], [], 0, 0.0
    if keep and "step" in keep.facts:
        with devices.mixed(model):
            keep.load(adapter, optimizer)
        done, losses, tokens, seconds = (keep.facts[key] for key in ("step", "losses", "tokens", "seconds"))

    model.train()
    start = time.perf_counter() - seconds
    with signals_kept() as caught:
        for step, group in zip(range(done + 1, config.steps + 1), islice(draw(), done, None)):
            torch.manual_seed(devices.seed(config.seed, step))  # dropout's, from here alone
            for part, peak in zip(optimizer.param_groups, peaks):
                part["lr"] = peak * schedule(step, config)
            total = devices.add_up(params, backward(model, adapter, parts(group), collate))
            with devices.mixed(model):
                norm = devices.whole(torch.nn.utils.clip_grad_norm_(params, config.clip or math.inf))
                adapter.before_step()
                optimizer.step()
                adapter.after_step()
            optimizer.zero_grad()
            waiting.append((step, total, norm, group))
            tokens += sum(len(example.ids) for example in group)
            due = config.save_every and (step % config.save_every == 0 or step == config.steps)
            logged = step % config.log_every == 0 or step == config.steps
            stop = devices.largest(max(caught, default=0))  # a signal, which others may not have got
            if due or logged or stop:  # only here does the host wait for the device
                losses += [finite_loss(*one, config.lr) for one in waiting]
                waiting = []
            seconds = time.perf_counter() - start
            if watch:
                watch(step, config.steps)
                model.train()
                start = time.perf_counter() - seconds  # looking on is no training
            if log and logged:
                log({"step": step, "steps": config.steps, "loss": sum(losses) / len(losses),
                     "lr": optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / seconds, "seconds": seconds,
                     "eta_seconds": seconds / step * (config.steps - step)})
                losses = []
            if keep and (due or stop):
                keep.save(adapter, optimizer, step=step, losses=losses, tokens=tokens, seconds=seconds)
            if stop:
                raise Stopped(stop, f"stopped after step {step} of {config.steps}")
    model.eval()


def backward(model, adapter, parts, collate):
    """Adds up the gradients of one step's loss, the mean over all labelled tokens of its micro-batches (so gradient
    accumulation equals one large batch); gives the loss, of this process's share."""
    parts, total = list(parts), 0.0
    labelled = sum(label != -100 for part in parts for example in part for label in example.labels)
    examples = sum(map(len, parts))
    for part in parts:
        batch = collate(devices.share(part))
        with model.autocast(), devices.mixed(model):
            loss = model(batch.ids, batch.labels, batch.ctx, reduction="sum") / labelled
            loss = loss + devices.weigh(adapter.penalty(batch.ctx), part) * (len(part) / examples)
        loss.backward()
        total = total + loss.detach()
    return total


def finite_loss(step, loss, norm, group, lr):
    """The loss of a step as a number. Raises UserError, naming the examples of its group, where it or the gradients'
    norm is not finite."""
    loss, norm = float(loss), float(norm)
    if math.isfinite(loss) and math.isfinite(norm):
        return loss
    named = ", ".join(e.source[-24:] for e in group[:3]) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
    raise UserError(f"at step {step} the loss is {loss:g} and the gradients' norm {norm:g} (examples {named}): try a "
                    f"lower --lr than {lr:g}")


class Trials:
    """trial(name, method_config, shares, **settings): a short run in a folder below, with these settings of train's
    own, scored on validation data; gives its results. shares: their "points" are the scores of start + share (end -
    start), for all tensors that are trained."""

    EXAMPLES = 50  # of each task

    def __init__(self, config, argv, folder, note):
        self.config, self.argv, self.folder, self.note = config, argv, folder, note

    @cached_property
    def data(self):
        limit = min(self.EXAMPLES, self.config.eval_limit or self.EXAMPLES)
        suite, tokenizer = load_data(self.config, "validation", limit)
        if by_loss := [task for task, score in suite.score.items() if score is data.loss]:
            print(f"scored by loss, which has no part in the choice: {', '.join(by_loss)}")
        if not all(suite.groups({task: {"": 0.0} for task in suite.tests})):
            raise UserError(f"{self.config.method} chooses by trials, which need new and general tasks that are scored "
                            "in percent, not by loss: give such --general-data, or make its choice yourself")
        return suite, tokenizer

    def __call__(self, name, method_config, shares=(), **settings):
        loaded, file = self.data, self.folder.path / "config.json"
        if devices.first() and not file.exists():
            write_json(file, self.note)
        one = replace(self.config, **{"eval_split": "validation", "epochs": None, "eval_every": 0, "keep_best": False,
                                       **settings}, overwrite=False,
                      out=str(self.folder.path / "search" / name))
        return run(one, method_config, self.argv, (loaded, shares))


def run(config, method_config=None, argv=(), trial=None):
    """One whole run of a method, or what is left of it, or nothing where its folder holds it finished; returns what
    results.json holds.

    method_config: default, the method's own. trial: (data, shares) where this is a trial, see above: it is not scored
    before training, and its weights are dropped. Raises UserError for a mistake in the settings, for a folder that
    holds something else, and where another process works in it; nothing has been written by then.
    """
    method, own = method_of(config.method)
    method_config, out = method_config or own, Path(config.out or f"out/{config.method}")
    for settings in (config, method_config):
        check(settings)
    if config.batch_size < devices.count():
        raise UserError(f"--batch-size {config.batch_size} counts over all processes: {devices.count()} of them need "
                        "at least as many examples")
    device, dtype = place(config)
    base = LlamaConfig.from_pretrained(config.base)
    refuse_inputs(out, [config.base, *files_of(config)])
    asked = devices.from_first(lambda: identity(config, method_config, device, dtype))
    asked |= {"shares": list(trial[1])} if trial else {}
    with nullcontext() if trial or not devices.first() else locked(out):
        saved, folder = devices.from_first(
            lambda: (open_folder(out, asked, config.overwrite), RunFolder(out, config.overwrite)))
        if saved and (out / "results.json").exists():
            if devices.first():
                (out / "checkpoint.safetensors").unlink(missing_ok=True)  # where a kill came between the two
            return show_finished(out, quiet=trial is not None)
        suite, tokenizer = trial[0] if trial else load_data(config)
        if config.epochs:
            steps = config.epochs * len(suite.train) / (config.batch_size * config.grad_accum)
            config = replace(config, steps=max(1, round(steps)), epochs=None)
        note = {"method": config.method, "asked": asked, "tasks": suite.names,
                "template": template_of(config, tokenizer), **provenance(argv)}
        if "settled" in saved:
            method_config = type(own)(**saved["settled"])
        elif hasattr(method, "plan"):
            method_config = method.plan(method_config, base, Trials(config, argv, folder, note))
        torch.manual_seed(config.seed)
        model = devices.load(config.base, device, dtype, config.shard)
        model.model.checkpointing = config.grad_checkpointing
        if config.compile:
            compile_model(model)
        adapter = start_adapter(model, method, method_config)
        if config.save_every:  # the trained tensors and two moments of each, beside the ones before
            room_for(out, 2 * 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
        if devices.first() and "settled" not in saved:
            write_json(folder.path / "config.json", {**note, "settled": asdict(method_config)})
        keep = Checkpoint(folder)
        goes_on = lambda: (f"{folder.path} holds the first {keep.facts['step']} steps" if "step" in keep.facts else
                           f"{out} is as it was" if folder.path != folder.out else "")
        try:
            results = learn(config, config.method, model, adapter, suite, tokenizer, folder, keep, trial and trial[1])
            if devices.first():
                write_json(out / "results.json", results)
        except Stopped as stopped:
            raise Stopped(stopped.number, f"{stopped}; the same command continues: {note['command']}") from None
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            raise UserError("; ".join(filter(None, (told(error), goes_on())))) from None
        for name in ("checkpoint.safetensors", "best.safetensors", *(["adapter.safetensors"] if trial else [])):
            if devices.first():
                (out / name).unlink(missing_ok=True)
        return results


def learn(config, name, model, adapter, suite, tokenizer, folder, keep=None, shares=None):
    """Score, train, save, score, and the table: what fine-tuning and pretraining share. shares: those of a trial.
    Returns what results.json holds."""
    scored = lambda: data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
    copied = lambda: {name: tensor.clone() for name, tensor in adapter.tensors().items()} if shares else {}
    start, total = time.perf_counter(), count_parameters(model.config)
    trainable, before = sum(p.numel() for p in model.parameters() if p.requires_grad), {}
    facts, trial = keep.facts if keep else {}, shares is not None
    spent, done = facts.get("seconds", 0.0), facts.get("step", 0)
    if not trial:
        print(f"{name}: {trainable:,} trainable parameters / {total:,} of the base = {100 * trainable / total:.3f} %")
        size, number = config.batch_size * config.grad_accum, len(suite.train)
        print(f"{number:,} training examples of {len(suite.trained)} tasks, {config.steps} steps of {size} = "
              f"{config.steps * size / number:.3g} epochs, {model.device.type} {str(model.dtype)[6:]}, to {folder.out}")
        print(f"{folder.out} holds the first {done} steps: going on from there\n" * bool(done), end="", flush=True)
        facts["before"] = before = facts["before"] if done else scored()
        picked = samples.pick(suite, config.samples, model.config.max_position_embeddings)
        facts["said"] = said = facts["said"] if done else samples.answer(model, picked, tokenizer)
    rows = replace(suite, tests={"": suite.validation}, score={"": data.loss})
    look = lambda: data.evaluate(model, rows, tokenizer, config.batch_size)[""]["loss"]
    log = Log(folder.path / "metrics.jsonl", done, trial) if devices.first() else lambda record: None
    best = Best(folder, adapter, look, log, config.eval_every, config.keep_best, done)
    first = copied()
    train(model, adapter, suite.train, config, tokenizer.pad_id, log, keep, best)
    with devices.mixed(model):
        best.restore()
    if keep:
        save_tensors(folder.path / "adapter.safetensors", adapter.tensors())
        folder.take_place()
    after, report, last, points = scored(), adapter.report(), copied(), []
    for share in shares or ():
        with torch.no_grad(), devices.mixed(model):
            adapter.load_tensors({name: torch.lerp(first[name], tensor, share) for name, tensor in last.items()})
        scores = scored() if share != 1 else after
        (speciality, versatility), errors = suite.means(scores), suite.errors(scores)
        points.append({"share": share, "speciality": speciality, "versatility": versatility, "errors": errors})
    results = {
        "method": name, "seed": config.seed, "base": config.base, "steps": config.steps,
        "trainable_parameters": trainable, "total_parameters": total,
        "eval_split": config.eval_split, **summary(suite, before, after), **({"points": points} if shares else {}),
        "seconds": spent + time.perf_counter() - start, "peak_memory_bytes": peak_memory(model.device),
        "report": report}
    if not trial:
        answers = samples.tell(picked, said, samples.answer(model, picked, tokenizer), tokenizer)
        if devices.first():
            write_json(folder.path / "samples.json", answers)
        print_table(results)
    return results


# What a scored run's own data are; with --eval-only each is the run's where the command line does not name it.
ABOUT_FILES = ("data", "eval_data", "general_data", "shot_data", "shots", "skip_bad_rows", "ignore_fields")
ABOUT_DATA = ("tasks", "template", "max_length", "too_long", "eval_split", "eval_limit", "max_new_tokens")


def score_only(config, given=(), argv=()):
    """Scores a base, or a finished run, on the data named, else on the run's own; writes results.json. given: the names
    of settings that were asked for explicitly."""
    check(config)
    device, dtype = place(config)
    name, saved = Path(config.base).resolve().name, {}
    if config.adapter:
        saved = read_run(config.adapter)
        name, own = Path(config.adapter).resolve().name, saved["settings"]
        files = ABOUT_FILES if not set(ABOUT_FILES) & set(given) else ()
        keys = {key for key in ("base", *files, *ABOUT_DATA) if key not in given}
        if not files:
            keys -= {"tasks", "eval_split", "eval_limit"}
            own = {**own, "template": saved.get("template", own["template"])}
        config = replace(config, **{key: own[key] for key in keys})
    asked = devices.from_first(lambda: identity(config, None, device, dtype))
    if config.adapter:
        asked["adapter"] = digest(Path(config.adapter) / "adapter.safetensors")
    out = Path(config.out or f"out/eval/{name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}")
    refuse_inputs(out, [config.base, *files_of(config), *([config.adapter] if config.adapter else [])])
    with locked(out) if devices.first() else nullcontext():
        if devices.from_first(lambda: open_folder(out, asked, config.overwrite)):
            return show_finished(out)
        if config.adapter:
            model, *_ = load_run(config.adapter, device, dtype, config.base, config.shard)
        else:
            model = devices.load(config.base, device, dtype, config.shard)
        if config.compile:
            compile_model(model)
        own = config.adapter and not config.builtin and not config.eval_data
        if own and "ignore_fields" not in saved.get("asked", {}).get("settings", {}):
            print("this run held out other rows than are drawn today: some that are scored may have been trained on")
        (suite, tokenizer), start = load_data(config, train=False), time.perf_counter()
        scores = data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
        results = {"method": saved.get("method", "base"), "base": config.base, "adapter": config.adapter,
                   "eval_split": config.eval_split,
                   **summary(suite, scores, scores), "seconds": time.perf_counter() - start,
                   "peak_memory_bytes": peak_memory(model.device)}
        print_table(results)
        if devices.first():
            folder = RunFolder(out, config.overwrite)
            write_json(folder.path / "results.json", results)
            write_json(folder.path / "config.json", {"method": results["method"], "asked": asked, **provenance(argv)})
            folder.take_place()
        print(f"results in {out}")
        return results


# ---------------------------------------------------------------------------------------------- run folders


NOT_ASKED = ("out", "overwrite", "save_every", "log_every", "shard")  # another value of these is still the same run


def files_of(config):
    """The data files that a run reads."""
    entries = [] if config.builtin else [*config.data, *config.eval_data, *config.general_data, *config.shot_data]
    return [formats.name_and_file(entry)[1] for entry in entries if entry != "builtin"]


def identity(config, method_config, device, dtype):
    """What makes a run this very run: settings as asked, and the files that decide its numbers, by their SHA-256."""
    base, source = Path(config.base), [HERE / name for name in ("model.py", "data.py", "train.py", "base/suite.py")]
    weights = {str(file) for file in tensor_files(base).values()}
    source += sorted((HERE / "formats").glob("*.py"))
    if method_config:
        source.append(Path(sys.modules[type(method_config).__module__].__file__))
    hashes = lambda files, above: {str(Path(file).relative_to(above)): digest(file) for file in files}
    return {"settings": {key: value for key, value in asdict(config).items() if key not in NOT_ASKED},
            "method_settings": asdict(method_config) if method_config else {},
            "device": device.type, "dtype": str(dtype).removeprefix("torch."),
            "base": hashes(sorted([*weights, *map(str, base.glob("*.json"))]), base),
            "data": {file: digest(file) for file in files_of(config) if Path(file).is_file()},
            "code": hashes(source, HERE)}


# Fields that the first build's run folders have and today's settings do not. The method's rate and steps stood in both.
RETIRED = {"pretrain", "lr", "steps", "batch_size"}


def revive(cls, saved):
    """Settings from a run's config.json. Raises UserError for a field that they do not have, or for a wrong value."""
    known = {f.name for f in fields(cls)}
    if wrong := saved.keys() - known - RETIRED:
        raise UserError(f"the run has the setting {min(wrong)!r}, which {cls.__module__}.py does not know")
    settings = cls(**typed(cls, saved, f"config.json of the run, {cls.__module__}.Config"))
    check(settings)
    return settings


def read_run(run_dir):
    """config.json of a finished run, with "settings" and the settled "method_settings" as complete dicts.

    Raises UserError where the folder holds no finished run, or settings that these files do not know.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "adapter.safetensors").exists():
        raise UserError(f"{run_dir} holds no adapter.safetensors; expected a run folder such as out/multilora")
    file = run_dir / "config.json"
    saved = read_json(file)

    def part(of, key, kind):
        if not fits(of.get(key), kind):
            raise UserError(f"{file}: {key} is {of.get(key)!r:.80}, expected {kind.__name__}")
        return of[key]

    if "asked" in saved:
        asked = part(saved, "asked", dict)
        saved |= {"settings": part(asked, "settings", dict), "method_settings": part(saved, "settled", dict),
                  "base": part(asked, "base", dict)}
    else:
        part(saved, "base_sha256", str)
    for key, kind in (("method", str), ("settings", dict), ("method_settings", dict)):
        part(saved, key, kind)
    if saved.get("template", "auto") not in TEMPLATES:
        raise UserError(f"{file}: template is {saved['template']!r:.80}, expected one of {', '.join(TEMPLATES)}")
    if saved["method"] not in find_methods():
        raise UserError(f"{run_dir} is a run of the method {saved['method']!r}, whose file is not here")
    for key, cls in (("settings", Config), ("method_settings", type(method_of(saved["method"])[1]))):
        saved[key] = asdict(revive(cls, saved[key]))
    return saved


def load_run(run_dir, device="cpu", dtype=torch.float32, base=None, shard=False):
    """(model, adapter, method module, what read_run gives) of a finished run, with the trained tensors in place.
    base: where its base model lies now; default: where it was. shard: see devices.load.

    Raises UserError as read_run does, and where the base's weights have changed since.
    """
    saved = read_run(run_dir)
    base = Path(base or saved["settings"]["base"])
    if not base.is_dir():
        raise UserError(f"{run_dir} was trained on the base {base}, which is not here: run where it is")
    weights = sorted(base.glob("*.safetensors"))
    if "base" in saved:
        same = all(saved["base"].get(file.name) == digest(file) for file in weights)
    else:
        same = saved["base_sha256"] == digest(*weights)
    if not same:
        raise UserError(f"{run_dir} was trained on other weights than {base} holds now (SHA-256 differs)")
    method, defaults = method_of(saved["method"])
    model = devices.load(base, device, dtype, shard)
    adapter = start_adapter(model, method, type(defaults)(**saved["method_settings"]))
    with open_tensors(Path(run_dir) / "adapter.safetensors") as file, devices.mixed(model):
        adapter.load_tensors({name: file.get_tensor(name) for name in file.keys()})
    return model.eval(), adapter, method, saved


def main():
    argv = ["train.py", *sys.argv[1:]]
    devices.join()
    config, method_config, given = parse(argv[1:])
    if config.eval_only:
        score_only(config, given, argv)
    else:
        run(config, method_config, argv)
    devices.meet()


if __name__ == "__main__":
    command_line(main)
