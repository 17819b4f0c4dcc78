"""A dataclass as command-line flags, and a user's mistakes in one line.

Each field of a settings dataclass is a flag: `rank: Annotated[int, "rank of each module", "[1, inf)"] = 4` is
`--rank`, with that help text and that default. The third part, where there is one, is the interval of allowed values.
"""

import argparse
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

from safetensors import SafetensorError

from model import UserError

OPTIONAL = "gguf", "matplotlib", "peft", "transformers"  # what single programs import in main()


def program():
    """The running program as its user named it: `train.py`, or `tools.chat` for `python -m tools.chat`."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name


def fail(message):
    """Ends the program with exit code 2 and one line of at most 300 characters. A message begins with what is wrong and
    ends with what to do, so a long one loses its middle."""
    text = f"{program()}: error: {message}".replace("\n", "\\n")
    print(text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse with flags before or after positional arguments, no abbreviations, and errors on one line."""

    def __init__(self, **options):
        super().__init__(prog=program(), allow_abbrev=False, **options,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))

    def error(self, message):
        fail(f"{message} (--help lists all flags)")

    def parse_args(self, argv=None):
        return self.parse_intermixed_args(argv)


def described(settings):
    """(name, type, help text, interval or None) of each field of a settings dataclass."""
    hints = get_type_hints(type(settings), include_extras=True)
    for f in fields(settings):
        kind, text, *interval = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else (
            hints[f.name], "")
        yield f.name, kind, text, interval[0] if interval else None


def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(group, defaults, only=None):
    """One flag for each field of a dataclass instance (or for those named), whose values are the defaults."""
    for name, kind, text, _ in described(defaults):
        if only and name not in only:
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
        high = 2.0**63 if isinstance(value, int) and high == float("inf") else high  # more than any size may be
        if not (low < value < high or interval[0] == "[" and value == low or interval[-1] == "]" and value == high):
            raise UserError(f"{flag(name)} is {value}, expected a number in {interval}")


class Stopped(KeyboardInterrupt):
    """Stopped by a signal; the text says how far the program came and how to go on."""

    def __init__(self, number, text="stopped"):
        super().__init__(text)
        self.number = number


@contextmanager
def signals_deferred():
    """Within, a first SIGINT or SIGTERM only joins the list given, to finish the step; a second one stops at once."""
    caught = []

    def keep(number, frame):
        if caught:
            raise Stopped(number)
        caught.append(number)

    able = threading.current_thread() is threading.main_thread()  # no other thread can handle signals
    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM) if able}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def user_message(error):
    """The line for a UserError, OSError, too little memory or a failed compiler. Raises anything else again: a bug."""
    if isinstance(error, (UserError, OSError, SafetensorError)):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return f"{error.name} is not installed: pip install {error.name}"
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or re.search("(out of|allocate) memory|size calculation overflowed", str(error)):
        return f"not enough memory: {first:.120}"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile failed, leave it out: {first:.120}"
    raise error


def command_line(main):
    """Runs a program. A user's mistake is one line and exit code 2; SIGINT and SIGTERM are one line and exit codes 130
    and 143; any other exception is a bug and keeps its traceback."""
    def stop(number, frame):
        raise Stopped(number)

    for stream in (sys.stdin, sys.stdout):  # a name or an answer may hold what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (UserError, OSError, SafetensorError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        fail(user_message(error))
    except Stopped as stopped:
        print(f"{program()}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
