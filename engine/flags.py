"""A dataclass as command-line flags, and a user's mistakes in one line.

Each field of a settings dataclass is a flag: `rank: Annotated[int, "rank of each module", "[1, inf)"] = 4` is
`--rank`, with that help text and that default. The third part, where there is one, is the interval of allowed values.
"""

import argparse
import difflib
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from engine import devices
from model import UserError


def program():
    """What runs, as its user named it: `train.py`, or `tools.chat` for `python -m tools.chat`."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name


def fail(message, prog=None):
    """Ends the program with exit code 2 and one line of at most 300 characters: what is wrong comes first in a message,
    and what to do last."""
    text = f"{prog or program()}: error: {message}".replace("\n", "\\n")
    if devices.speaks():
        print(text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}", file=sys.stderr)
    devices.leave(2)


class Parser(argparse.ArgumentParser):
    """argparse with flags before or after positional arguments, no abbreviations, and errors on one line."""

    def __init__(self, **options):
        super().__init__(**{"prog": program(), "allow_abbrev": False, **options},
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))

    def error(self, message):
        fail(message, self.prog)

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_intermixed_args(argv, namespace)
        if unknown:
            flags = sorted(option for option in self._option_string_actions if option.startswith("--"))
            near = difflib.get_close_matches(unknown[0], flags, 1)
            self.error(f"unknown argument {unknown[0]!r:.80}" + (f", did you mean {near[0]}?" if near else "")
                       + " (--help lists them all)")
        return args


def described(settings):
    """(name, type, help text, interval or None) of each field of a settings dataclass."""
    hints = get_type_hints(type(settings), include_extras=True)
    for f in fields(settings):
        kind, text, *interval = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else (
            hints[f.name], "")
        yield f.name, kind, text, interval[0] if interval else None


def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(group, defaults, skip=()):
    """One flag for each field of a dataclass instance, whose values are the defaults."""
    for name, kind, text, _ in described(defaults):
        if name in skip:
            continue
        default = getattr(defaults, name)
        options = {"default": default, "help": text.replace("%", "%%") + " (%(default)s)"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            options.update(nargs="+", metavar=name.rsplit("_")[-1].rstrip("s").upper(),
                           help=f"{text} ({' '.join(default) or 'none'})")
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = next((t for t in get_args(kind) if t is not NoneType), kind)
            options["metavar"] = options["type"].__name__.upper()
        group.add_argument(flag(name), **options)


def check(settings):
    """Raises UserError for a number outside the interval that its field names, such as "[0, 1)" or "(0, inf)"."""
    for name, _, _, interval in described(settings):
        value = getattr(settings, name)
        if interval is None or value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        if isinstance(value, int) and value >= 2**53 and high == float("inf"):  # more than any size may be
            high = 2.0**53
        if not (low < value < high or interval[0] == "[" and value == low or interval[-1] == "]" and value == high):
            least = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
            most = "" if high == float("inf") else f" and {'at most' if interval[-1] == ']' else 'below'} {high:g}"
            raise UserError(f"{flag(name)} is {value}, expected {least}{most}")


class Stopped(KeyboardInterrupt):
    """Stopped by a signal; the text says how far the program came and how to go on."""

    def __init__(self, number, text="stopped"):
        super().__init__(text)
        self.number = number


@contextmanager
def signals_kept():
    """Within, the first SIGINT or SIGTERM only adds itself to the list that is given, so that a training step is never
    cut in two; a second one stops at once."""
    caught = []

    def keep(number, frame):
        if caught:
            raise Stopped(number)
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there can Python handle signals
        yield caught
        return
    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(error):
    """What a user is told of a UserError, an error of the operating system, too little memory, of the host or of a
    device, a compiler, or another process that has gone. Raises anything else again: it is a bug."""
    if devices.lost(error):
        return "another process of this run has ended: the same command continues it"
    short = "(out of|allocate) memory|size calculation overflowed"  # a RuntimeError of torch
    if not isinstance(error, UserError) and (isinstance(error, MemoryError) or re.search(short, str(error))):
        return f"not enough memory: {(str(error).splitlines() or [''])[0]:.120}"
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile failed, leave it out: {str(error).splitlines()[0]:.120}"
    raise error


def command_line(main):
    """Runs a program. What `told` knows is one line and exit code 2; SIGINT and SIGTERM are one line and exit codes 130
    and 143; anything else is a bug and keeps its traceback."""
    def stop(number, frame):
        raise Stopped(number)

    for stream in (sys.stdin, sys.stdout):  # a name or an answer may hold what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        code = main()
    except BrokenPipeError:  # who reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        fail(told(error))
    except Stopped as stopped:
        if devices.speaks():
            print(f"{program()}: {stopped}", file=sys.stderr)
        code = 128 + stopped.number
    devices.leave(code)
