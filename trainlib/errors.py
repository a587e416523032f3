"""A user's mistake ends in one line and exit code 2; a fault in one line and exit code 1."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake that the user can fix: one line `error: what, where, how to fix`, exit code 2."""


def say(text: str, *, err: bool = False) -> None:
    """Print a line to stdout or stderr; a closed or full stream costs the line, not the run.

    What the stream cannot encode, such as names that are not UTF-8, is printed as escapes.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        if stream:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            print(text, file=stream, flush=True)
    except OSError:  # what print has buffered must not fail again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# What a package that is optional may raise where it is installed but broken, import or call.
BROKEN = (Exception, SystemExit)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type without one."""
    return (str(error) or type(error).__name__).splitlines()[0]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError if `value` is not one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise UserError if `value` does not divide `whole`."""
    if value < 1 or whole % value:
        raise UserError(f"{name} must divide {whole_name} = {whole}, got {value}")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as UserError: in one line, like all others.

    Its help shows the description as it is written; options cannot be abbreviated.
    """

    def __init__(self, **options: Any) -> None:
        raw: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": raw, "allow_abbrev": False} | options)

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see --help")


def run_program(program: Callable[[], Any], *, stopped: str = "") -> int:
    """Call a program and turn its end into an exit code, with one line on stderr if it failed.

    0 done, 2 the user's mistake, 1 a fault of disk, memory or numbers, 128 + N ended by signal N
    (KeyboardInterrupt carries N; Ctrl-C is 130). `stopped` is what to say when a signal ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Greek letters
    try:
        program()
    except UserError as e:
        say(f"error: {' '.join(str(e).splitlines())}", err=True)
        return 2
    except (FloatingPointError, OSError, MemoryError) as e:
        say(f"error: {' '.join(str(e).splitlines()) or 'out of memory'}", err=True)
        return 1
    except RuntimeError as e:
        from trainlib.memory import is_out_of_memory  # which needs this module

        if not is_out_of_memory(e):
            raise
        say(f"error: out of memory ({first_line(e)}); lower the size of what is asked", err=True)
        return 1
    except KeyboardInterrupt as e:
        if stopped:
            say(stopped, err=True)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    return 0
