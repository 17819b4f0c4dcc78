"""The shared loop: one command trains any method on any base, scores it before and after, and leaves a run folder.

    python train.py --method multilora

Read from the top down: settings, methods, a run, its training loop, then the helpers that they call. No line here knows
a method by name: a `*.py` beside this file that defines `Config` and `attach(model, config) -> Adapter` is a method
(README, "Add a method").
"""

import importlib
import math
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError

import data
import formats
from base import suite as builtin
from engine import devices
from engine.checkpoint import Checkpoint, load_tensors, save_tensors
from engine.flags import Parser, Stopped, add_flags, check, command_line, flag, signals_deferred, user_message
from engine.folder import RunFolder, difference, digest, peak_memory, provenance, refuse_inputs
from engine.progress import Log, progress
from engine.table import print_table, summary
from formats import samples
from model import Llama, LlamaConfig, UserError, checkpoint_files, read_json, reading, run_layer

HERE = Path(__file__).resolve().parent
LOG_EVERY = 10  # steps between two lines of metrics.jsonl
# Where a method's own DEFAULTS say nothing else. lr is for a base of width 128, see with_rate.
STANDARD = {"steps": 600, "batch_size": 48, "lr": 1e-3, "width_power": 1.0}
WIDTH = 128
NOT_ASKED = ("out", "overwrite", "save_every", "shard")  # another value of these is still the same run

# ---------------------------------------------------------------------------------------------- settings


@dataclass
class Config:
    """Settings of every run; each field is a flag. steps, batch_size and lr default to the method's DEFAULTS, else to
    STANDARD; lr when the run begins, since it depends on the base."""

    method: Annotated[str | None, "fine-tuning method"] = None
    base: Annotated[str, "folder of the base model, in Hugging Face layout"] = "base"
    data: Annotated[list[str], "what to learn: builtin, or files as [NAME=]FILE, each a task"] = field(
        default_factory=lambda: ["builtin"])
    eval_data: Annotated[list[str], "files to score on; default: a twentieth of the rows of --data"] = field(
        default_factory=list)
    general_data: Annotated[list[str], "files of what the base can do already, only scored"] = field(
        default_factory=list)
    mix: Annotated[Literal["proportional", "equal"], "sample tasks by size, or equally often"] = "proportional"
    choices: Annotated[Literal["text", "letter"], "rank the options of a question by text or by letter"] = "text"
    template: Annotated[str, "prompt template: auto (the base's, else plain), a Jinja file, or one of "
                             + ", ".join(formats.TEMPLATES)] = "auto"
    tasks: Annotated[str, "built-in new tasks to learn: all (six), or names separated by commas"] = "all"
    max_length: Annotated[int, "longest example in tokens; longer ones are cut at the front of the prompt",
                          "[2, inf)"] = 512
    max_new_tokens: Annotated[int, "longest answer where scoring generates text (GSM8K)", "[1, inf)"] = 256
    steps: Annotated[int | None, "optimiser steps", "[1, inf)"] = None
    epochs: Annotated[float | None, "passes over the training data, instead of --steps", "(0, inf)"] = None
    batch_size: Annotated[int | None, "examples in a micro-batch, over all processes", "[1, inf)"] = None
    grad_accum: Annotated[int, "micro-batches in a step", "[1, inf)"] = 1
    lr: Annotated[float | None, "peak learning rate; default: the method's, lower on a wider base",
                  "(0, inf)"] = None
    warmup: Annotated[float, "share of the steps with a rising rate, before a cosine to zero", "[0, 1)"] = 0.05
    weight_decay: Annotated[float, "AdamW's decoupled weight decay", "[0, inf)"] = 0.0
    clip: Annotated[float, "largest gradient norm, 0 for no clipping", "[0, inf)"] = 1.0
    seed: Annotated[int, "of initialisation, order and dropout", "[0, 9e18]"] = 0
    device: Annotated[str, "auto (cuda, else mps, else cpu) or a torch device such as cuda:1"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"],
                     "frozen weights and computation; auto: bfloat16 on cuda, else float32"] = "auto"
    eval_split: Annotated[Literal["test", "validation"], "split that the results table shows"] = "test"
    eval_limit: Annotated[int, "examples of each task to score, 0 for all", "[0, inf)"] = 0
    eval_every: Annotated[int, "steps between two validation losses, 0 for none", "[0, inf)"] = 0
    samples: Annotated[int, "sample prompts of each kind, answered before and after", "[0, inf)"] = 3
    save_every: Annotated[int, "steps between two checkpoints, 0 for none", "[0, inf)"] = 100
    grad_checkpointing: Annotated[bool, "keep only each layer's input for the backward pass: less memory, slower"] = \
        False
    compile: Annotated[bool, "torch.compile the layers: a minute once, then faster steps"] = False
    shard: Annotated[bool, "split the base's weights over the processes that torchrun starts (FSDP2): for a model that "
                           "does not fit on each device"] = False
    out: Annotated[str | None, "run folder; default out/METHOD"] = None
    overwrite: Annotated[bool, "start anew, whatever run is in the folder"] = False

    def __post_init__(self):
        if self.epochs and self.steps:
            raise UserError("give one of --steps and --epochs")
        self.base = str(self.base)
        for name in ("steps", "batch_size"):
            if getattr(self, name) is None and not (name == "steps" and self.epochs):
                setattr(self, name, defaults_of(self.method)[name])
        if self.compile and self.shard:
            raise UserError("--compile does not go with --shard")
        if "builtin" in self.data and len(self.data) > 1:
            raise UserError("--data takes builtin or files, not both")
        if self.builtin and (self.eval_data or self.mix != "proportional"):
            raise UserError("--eval-data and --mix go with files in --data")
        if self.tasks != "all" and not self.builtin:
            raise UserError("--tasks is about the built-in suite; with files, name in --data what to learn")
        if self.eval_data and self.eval_split != "test":
            raise UserError("--eval-data is the test data: leave out --eval-split validation")

    @property
    def builtin(self):
        """Whether the data are the built-in suite's."""
        return self.data == ["builtin"]


def parse(argv):
    """(Config, the method's Config) from the command line; exits with code 2 and one line on a mistake."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    parser, standard = Parser(description=__doc__.split("\n\n")[0]), Config(method=name)
    add_flags(parser.add_argument_group("every run"), standard)
    if not name:
        parser.epilog = "methods, each with flags of its own (--method NAME --help): " + "; ".join(
            f"{m}: " + " ".join(flag(f.name) for f in fields(d)) for m, (_, d) in find_methods().items())
        parser.parse_args(argv)
        parser.error(f"give --method NAME, one of {', '.join(find_methods())}")
    default = method_of(name)[1]
    rate = f"default --lr at width {WIDTH}: {defaults_of(name)['lr']:g}"
    add_flags(parser.add_argument_group(f"--method {name}", rate), default)
    found = vars(parser.parse_args(argv))
    if found["epochs"] and not any(arg.split("=")[0] == "--steps" for arg in argv):
        found["steps"] = None
    return tuple(type(of)(**{f.name: found[f.name] for f in fields(of)}) for of in (standard, default))


# ---------------------------------------------------------------------------------------------- methods


IMPORTED = {}  # {method file: its text at that time}


@cache
def find_methods():
    """{name: (module, default Config)} of every method file beside this one, and of its presets. A file that was edited
    since its import, as in a notebook, is imported anew."""
    methods = {}
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\ndef attach(" not in text:
            continue
        module = importlib.import_module(path.stem)
        if IMPORTED.get(path, text) != text:
            importlib.reload(module)
        IMPORTED[path] = text
        if double := {f.name for f in fields(module.Config)} & {f.name for f in fields(Config)}:
            raise UserError(f"{path.name}: Config has the field {min(double)!r}, which is train.py's: use DEFAULTS")
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
    """STANDARD with what a method's file sets in `DEFAULTS = {name: {...}}`, for itself or a preset."""
    own = getattr(method_of(name)[0], "DEFAULTS", {}).get(name, {}) if name else {}
    if wrong := own.keys() - STANDARD.keys():
        raise UserError(f"DEFAULTS of {name!r} sets {min(wrong)!r}, expected some of {', '.join(STANDARD)}")
    return STANDARD | own


def with_rate(config, quiet=False):
    """The Config with a peak rate. The default falls with the base's width, to a method's width_power: Adam moves each
    entry of a weight by about the rate, and a sum over more inputs then moves by more (the rule of muP, Yang et al.
    2022, arXiv 2203.03466, has the power 1)."""
    if config.lr:
        return config
    default, width = defaults_of(config.method), LlamaConfig.from_pretrained(config.base).hidden_size
    rate = float(f"{default['lr'] * (WIDTH / width) ** default['width_power']:.2g}")
    if width != WIDTH and not quiet:
        power = f"({WIDTH} / {width})^{default['width_power']:g}"
        print(f"--lr {rate:g}: {default['lr']:g}, the default at width {WIDTH}, times {power}")
    return replace(config, lr=rate)


def start_adapter(model, method, config):
    """Attaches a method; what it trains becomes float32 where the base is stored in fewer bits (an Adam step of 1e-4
    would change nothing in a bfloat16 weight of 1)."""
    adapter = method.attach(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the method left nothing to train")
    for p in trained:
        if p.dtype in (torch.bfloat16, torch.float16):
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().float()))  # works for sharded ones, too
    return adapter


# ---------------------------------------------------------------------------------------------- one run


def run(config, method_config=None, argv=(), trial_data=None):
    """One whole run of a method, or the rest of one, or nothing where its folder holds it finished; returns what
    results.json holds. trial_data: what load_data gives, for a trial of a search, which is only scored after training.

    Raises UserError for a mistake in the settings and for a folder that holds another run, before anything is written.
    """
    if not trial_data:
        find_methods.cache_clear()
    method, default = method_of(config.method)
    method_config, out = method_config or default, Path(config.out or f"out/{config.method}")
    check(config)
    check(method_config)
    config = with_rate(config, quiet=trial_data is not None)
    if config.batch_size < devices.world_size():
        raise UserError(f"--batch-size {config.batch_size} counts over all processes, of which there are "
                        f"{devices.world_size()}: each needs an example")
    device, dtype = device_and_dtype(config)
    refuse_inputs(out, [config.base, *files_of(config)])
    asked = devices.from_main(lambda: identity(config, method_config, device, dtype))
    with RunFolder(out).locked() as folder:
        saved = {} if config.overwrite else devices.from_main(lambda: folder.saved(asked))
        if saved and (out / "results.json").exists():
            return show_finished(folder, quiet=trial_data is not None)
        suite, tokenizer, template = trial_data or load_data(config)
        if config.epochs:
            steps = config.epochs * len(suite.train) / (config.batch_size * config.grad_accum)
            config = replace(config, steps=max(1, round(steps)), epochs=None)
        note = {"method": config.method, "asked": asked, "tasks": suite.names, "template": template, **provenance(argv)}

        search_data = cache(lambda: load_trial_data(config))

        def trial(name, trial_config, **settings):
            """A short run below search/, scored on validation data; returns its results."""
            found = search_data()  # before anything is written
            folder.write("config.json", note)
            one = replace(config, eval_split="validation", eval_every=0, overwrite=False,
                          out=str(out / "search" / name), **settings)
            return run(one, trial_config, argv, found)

        if config.overwrite:
            devices.from_main(folder.move_away)
        if "settled" in saved:
            method_config = type(default)(**saved["settled"])
        elif hasattr(method, "plan"):
            method_config = method.plan(method_config, LlamaConfig.from_pretrained(config.base), trial)
        torch.manual_seed(config.seed)
        model = devices.load(config.base, device, dtype, config.shard)
        model.model.checkpointing = config.grad_checkpointing
        if config.compile:
            compile_layers(model.model)
        adapter = start_adapter(model, method, method_config)
        folder.write("config.json", {**note, "settled": asdict(method_config)})
        keep = Checkpoint(out)
        try:
            results = learn(config, model, adapter, suite, tokenizer, folder, keep, trial=trial_data is not None)
        except Stopped as stopped:
            again = "call continues" + ", without overwrite" * config.overwrite
            again = f"command continues: {note['command']}" if argv else again
            raise Stopped(stopped.number, f"{stopped}; the same {again}") from None
        except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
            left = f"; {out} holds the first {keep.facts['step']} steps" if "step" in keep.facts else ""
            old = config.overwrite and folder.old.exists()
            left += f"; the run before this one is in {folder.old}" if old else ""
            raise UserError(user_message(error) + left) from error
        folder.finish(results)
        if trial_data:
            folder.remove("adapter.safetensors")
        return results


def learn(config, model, adapter, suite, tokenizer, folder, keep=None, trial=False):
    """Score, train, save, score, and the table: the part that fine-tuning and pretraining share. Returns what
    results.json holds. trial: part of a search, which is not scored before training and prints nothing."""
    score = lambda: data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
    start, total = time.perf_counter(), count_parameters(model.config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = keep.facts if keep else {}  # saved with each checkpoint, the scores before training among them
    spent, done = facts.get("seconds", 0.0), facts.get("step", 0)
    if not trial:
        size, number = config.batch_size * config.grad_accum, len(suite.train)
        print(f"{config.method or 'pretraining'}: {trainable:,} trainable parameters / {total:,} of the base = "
              f"{100 * trainable / total:.3f} %\n{number:,} training examples of {len(suite.trained)} tasks, "
              f"{config.steps} steps of {size} = {config.steps * size / number:.3g} epochs, {model.device.type} "
              f"{str(model.dtype)[6:]}, to {folder.path}" + f", going on from step {done}" * bool(done), flush=True)
        picked = samples.pick(suite, config.samples, model.config.max_position_embeddings)
        if not done:
            facts |= {"before": score(), "samples_before": samples.answer(model, picked, tokenizer)}
    log = Log(folder.path / "metrics.jsonl", done, trial) if devices.is_main() else lambda record: None
    rows = replace(suite, tests={"": suite.validation}, score={"": data.loss})

    def validate(step):
        if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            loss = data.evaluate(model, rows, tokenizer, config.batch_size)[""]["loss"]
            log({"step": step, "steps": config.steps, "validation_loss": loss})

    train(model, adapter, suite.train, config, tokenizer.pad_id, log, keep, validate)
    save_tensors(folder.path / "adapter.safetensors", adapter.tensors())
    scores = score()
    with devices.allow_sharded(model):
        extra = adapter.scored(scores, score, suite)
    results = {"method": config.method, "seed": config.seed, "base": config.base, "steps": config.steps,
               "trainable_parameters": trainable, "total_parameters": total, "eval_split": config.eval_split,
               **summary(suite, facts.get("before"), scores), **extra,
               "seconds": spent + time.perf_counter() - start, "peak_memory_bytes": peak_memory(model.device),
               "report": adapter.report()}
    if not trial:
        folder.write("samples.json", samples.tell(
            picked, facts["samples_before"], samples.answer(model, picked, tokenizer), tokenizer))
        print_table(results)
        if devices.is_main() and log.losses[-1] > log.losses[0]:
            print(f"the loss rose from {log.losses[0]:.4g} to {log.losses[-1]:.4g}: try --lr {config.lr / 4:.2g}")
    return results


# ---------------------------------------------------------------------------------------------- the training loop


def train(model, adapter, examples, config, pad, log=None, keep=None, after=None):
    """Trains in place, up to config.steps steps.

    log(record), if given, receives {"step", "loss", "lr", ...} after the first step and every LOG_EVERY steps. keep:
    the run's Checkpoint, from which training goes on. after(step) is called after each step. Raises Stopped, with a
    checkpoint, after the step in which a signal came.
    """
    draw = lambda: data.draw(examples, config.batch_size * config.grad_accum, config.seed)
    parts = lambda group: data.micro_batches(group, config.batch_size, model.device)
    first = progress(islice(draw(), adapter.prepare_steps), "preparing, step", adapter.prepare_steps)
    with model.autocast(), devices.unsharded(model):  # each process reads all of the examples: all find the same
        adapter.prepare([data.collate(part, pad).to(model.device) for part in parts(group)] for group in first)
    optimizer = adapter.optimizer(config.lr, config.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    done, losses, waiting, tokens, seconds = 0, [], [], 0, 0.0
    if keep and "step" in keep.facts:
        with devices.allow_sharded(model):
            keep.load(adapter, optimizer)
        done, losses, tokens, seconds = (keep.facts[key] for key in ("step", "losses", "tokens", "seconds"))

    model.train()
    start = time.perf_counter() - seconds
    with signals_deferred() as caught:
        for step, group in zip(range(done + 1, config.steps + 1), islice(draw(), done, None)):
            torch.manual_seed(devices.seed(config.seed, step))  # for dropout
            for part, peak in zip(optimizer.param_groups, peaks):
                part["lr"] = peak * schedule(step, config)
            loss = devices.all_reduce_gradients(params, backward(model, adapter, parts(group), pad))
            with devices.allow_sharded(model):
                norm = devices.full(torch.nn.utils.clip_grad_norm_(params, config.clip or math.inf))
                adapter.before_step()
                optimizer.step()
                adapter.after_step()
            optimizer.zero_grad()

            waiting.append((step, loss, norm, group))
            tokens += sum(len(example.ids) for example in group)
            due = config.save_every and (step % config.save_every == 0 or step == config.steps)
            logged = step % LOG_EVERY == 0 or step in (1, config.steps)
            stop = devices.all_reduce_max(max(caught, default=0))  # a signal, which others may not have got
            if due or logged or stop:  # only here does the host wait for the device
                losses += [finite_loss(*one, config.lr) for one in waiting]
                waiting = []
            seconds = time.perf_counter() - start
            if after:
                after(step)
                model.train()
                start = time.perf_counter() - seconds  # validation does not count as training time
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


def backward(model, adapter, parts, pad):
    """Adds up the gradients of one step's loss, the mean over all labelled tokens of its micro-batches (so gradient
    accumulation equals one large batch); returns the loss, of this process's share."""
    labelled = sum(label != -100 for part in parts for example in part for label in example.labels)
    examples, total = sum(map(len, parts)), 0.0
    for part in parts:
        batch = data.collate(devices.share(part), pad).to(model.device)
        with model.autocast(), devices.allow_sharded(model):
            loss = adapter.loss(batch) / labelled
            loss = loss + devices.scale_penalty(adapter.penalty(batch.ctx), part) * (len(part) / examples)
        loss.backward()
        total = total + loss.detach()
    return total


def schedule(step, config):
    """The share of the peak rate at a step, from 1 to config.steps: a linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 1 - warmup) / max(1, config.steps - warmup)))
    return min(step / warmup, cosine)


def finite_loss(step, loss, norm, group, lr):
    """The loss of a step as a number. Raises UserError, naming the examples of its group, where it or the gradients'
    norm is not finite."""
    loss, norm = float(loss), float(norm)
    if math.isfinite(loss) and math.isfinite(norm):
        return loss
    named = ", ".join(e.source[-24:] for e in group[:3]) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
    raise UserError(f"at step {step} the loss is {loss:g} and the gradients' norm {norm:g} (examples {named}): try a "
                    f"lower --lr than {lr:g}")


# ---------------------------------------------------------------------------------------------- helpers


def device_and_dtype(config):
    """(device, dtype) that `--device` and `--dtype` name; auto is the first device that can add two numbers. Raises
    UserError for a device that cannot."""
    found = [config.device]
    if config.device == "auto":
        found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    for device in map(devices.local_device, found):
        try:
            fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
            auto = "bfloat16" if fast else "float32"  # older GPUs emulate bfloat16, slower than float32
            dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
            (torch.ones(1, device=device, dtype=dtype) + 1).item()
            # torch's own thread begins the backward pass on a GPU so, and needs nobody's help.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            return torch.device(device), dtype
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            message = f"--device {device} cannot be used: {str(error).splitlines()[0]:.120}"
        if config.device != "auto":
            raise UserError(message)
        print(f"note: {message}")


def compile_layers(backbone):
    """Compiles the layers for training. The code is made at its first use, with a method's hooks in it."""
    torch._dynamo.reset()  # earlier runs of this process count for the limit below
    # A method may do something else at each layer (CS-ReFT does): a version of the code for each.
    torch._dynamo.config.cache_size_limit = max(8, 4 * len(backbone.layers))
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # else a layer with a hook may get the code of one without
    backbone.compiled = torch.compile(run_layer, dynamic=True)


def count_parameters(config):
    """Parameters of the plain model, tied ones once; makes no weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def load_data(config, split=None, limit=None, train=True, **shots):
    """(Suite of tokens, tokenizer, name of the template) of a run. split, limit: instead of the run's; train: False
    leaves out the training examples; shots: see formats.load."""
    tokenizer = data.Tokenizer.from_pretrained(config.base)
    split, limit = split or config.eval_split, config.eval_limit if limit is None else limit
    template, source = formats.choose(config.template, tokenizer, Path(config.base))
    ours = formats.chat_template(Path(config.base)).endswith(formats.TEMPLATES["short"])  # tools.pretrain's
    if not (config.builtin and ours):
        print(f"template: {source}")
    suite = formats.load([] if config.builtin else config.data, config.eval_data, config.general_data, split, limit,
                         choices=config.choices, **shots)
    if config.builtin:
        suite = builtin.load(config.tasks, split, limit, common=not ours).joined(suite)
    if config.eval_every and not suite.validation:
        raise UserError("--eval-every needs validation rows, and a single row is trained on: leave it out")
    longest = min(config.max_length, LlamaConfig.from_pretrained(config.base).max_position_embeddings)
    some = random.Random("validation").sample(suite.validation, min(512, len(suite.validation)))
    suite = replace(suite, train=suite.train if train else [], validation=some if config.eval_every else [])
    return data.encode_suite(formats.dress(suite, template, config.mix), tokenizer, longest), tokenizer, template.name


def load_trial_data(config):
    """What load_data gives for the trials of a search: 50 validation examples of each task."""
    suite, *rest = load_data(config, "validation", min(50, config.eval_limit or 50))
    if not all(suite.groups({task: {"": 0.0} for task in suite.tests})):
        raise UserError(f"the search of {config.method} needs new and general tasks that are scored in percent, not by "
                        "loss: give such --general-data, or make its choice yourself")
    return suite, *rest


def files_of(config):
    """The data files that a run reads."""
    entries = [*([] if config.builtin else config.data), *config.eval_data, *config.general_data]
    return [formats.name_and_file(entry)[1] for entry in entries]


def identity(config, method_config, device, dtype):
    """What makes a run this very run: settings as asked, and the files that decide its numbers, by their SHA-256."""
    base, method = Path(config.base), sys.modules[type(method_config).__module__]
    code = [HERE / "model.py", HERE / "data.py", HERE / "train.py", Path(method.__file__)]
    code += sorted(file for room in ("base", "formats") for file in (HERE / room).glob("*.py"))
    hashes = lambda files, above: {Path(file).relative_to(above).as_posix(): digest(file) for file in files}
    return {"settings": {key: value for key, value in asdict(config).items() if key not in NOT_ASKED},
            "method_settings": asdict(method_config), "device": device.type, "dtype": str(dtype)[6:],
            "base": hashes(checkpoint_files(base), base),
            "data": {file: digest(file) for file in files_of(config) if Path(file).is_file()},
            "code": hashes(code, HERE)}


def show_finished(folder, quiet=False):
    """The results of a finished run, with their table."""
    folder.remove("checkpoint.safetensors")  # where the run was killed before it did so
    results = read_json(folder.path / "results.json")
    if not quiet:
        print_table(results)
        print(f"{folder.path} holds this very run, finished: nothing was done (--overwrite starts anew)")
    return results


def load_run(run_dir, device="cpu", dtype=torch.float32, base=None, shard=False):
    """(model, adapter, config.json) of a finished run, with the trained tensors in place. base: where its base model
    lies now; default: where it was. shard: see devices.load.

    Raises UserError where the folder holds no finished run, and where the base's weights have changed since.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "adapter.safetensors").exists():
        raise UserError(f"{run_dir} holds no adapter.safetensors; expected a run folder such as out/multilora")
    saved = read_json(run_dir / "config.json")
    with reading(run_dir / "config.json"):
        method, default = method_of(saved["method"])
        Config(**saved["asked"]["settings"])
        base = Path(base or saved["asked"]["settings"]["base"])
        if not base.is_dir():
            raise UserError(f"{run_dir} was trained on the base {base}, which is not here: run where it is")
        held = {file.name: digest(file) for file in checkpoint_files(base)}
        if other := difference({"base": saved["asked"]["base"]}, {"base": held}):
            raise UserError(f"{run_dir} was trained on another base than {base} holds now: {other}")
    model = devices.load(base, device, dtype, shard)
    with reading(run_dir / "config.json"):
        adapter = start_adapter(model, method, type(default)(**saved["settled"]))
    with devices.allow_sharded(model):
        adapter.load_tensors(load_tensors(run_dir / "adapter.safetensors"))
    return model.eval(), adapter, saved


def main():
    argv = ["train.py", *sys.argv[1:]]
    devices.init()
    config, method_config = parse(argv[1:])
    run(config, method_config, argv)
    devices.end()


if __name__ == "__main__":
    command_line(main)
