"""Every program ends in one line and an exit code, whatever its streams can print.

Why: a run of hours must not be lost to its own log, and a script that calls a program reads the
exit code.

    python -m pytest tests/test_errors.py
"""

import errno
import io
import os
import signal
import sys

import pytest

from trainlib.errors import UserError, run_program, say


def ending_with(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x must be 1, got 2"), 2, "x must be 1, got 2"),
        (UserError("no folder a\nb"), 2, "no folder a b"),
        (FloatingPointError("loss is nan"), 1, "loss is nan"),
        (OSError(errno.ENOSPC, "cannot write x"), 1, "[Errno 28] cannot write x"),
        (MemoryError("a data set\nis too large"), 1, "a data set is too large"),
        (MemoryError(), 1, "out of memory"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"
            ),
            1,
            "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes); "
            "lower the size of what is asked",
        ),
        (UserError(os.fsdecode(b"\xff")), 2, "\\udcff"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert run_program(ending_with(error)) == code
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_signals_and_success(capsys):
    assert run_program(lambda: None) == 0
    assert run_program(ending_with(KeyboardInterrupt()), stopped="stopped") == 130
    assert run_program(ending_with(KeyboardInterrupt(signal.SIGTERM))) == 143
    assert capsys.readouterr() == ("", "stopped\n")
    for fault in (KeyError("x"), RuntimeError("x")):  # a fault of ours keeps its traceback
        with pytest.raises(type(fault)):
            run_program(ending_with(fault))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", ["plain", "\u03b1\u0304", os.fsdecode(b"\xff"), "\U0001f600"])
def test_any_text_can_be_said_on_any_terminal(monkeypatch, encoding, text):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    say(text)
    expected = text.encode(encoding, "backslashreplace")
    assert out.getvalue() == expected + b"\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a stream without an encoding
    say(text)
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    say(text)
