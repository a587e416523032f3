"""One line and an exit code for every end of a program.

Why: a traceback tells a user nothing, and a script that starts programs sees the exit code alone.

    python -m pytest tests/test_errors.py
"""

import errno
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT, python

from trainlib.errors import (
    OneLineParser,
    UserError,
    check_choice,
    check_divides,
    first_line,
    run_program,
    say,
)


def raises(error):
    def program():
        raise error

    return program


ENDS = {
    # name: (what is raised, exit code, stderr)
    "a mistake": (UserError("x must be 1, got 2"), 2, "error: x must be 1, got 2\n"),
    "a disk": (OSError(errno.ENOSPC, "No space"), 1, "error: [Errno 28] No space\n"),
    "memory": (MemoryError(), 1, "error: out of memory\n"),
    "memory, named": (MemoryError("--batch_size"), 1, "error: --batch_size\n"),
    "numbers": (FloatingPointError("loss nan"), 1, "error: loss nan\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped\n"),
    "SIGTERM": (KeyboardInterrupt(15), 143, "stopped\n"),
    "SIGHUP": (KeyboardInterrupt(1), 129, "stopped\n"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_is_a_line_and_an_exit_code(name, capsys):
    error, code, line = ENDS[name]
    assert run_program(raises(error), stopped="stopped") == code
    assert capsys.readouterr() == ("", line)


def test_a_good_end_is_silent_and_a_fault_of_ours_is_not_hidden(capsys):
    assert run_program(lambda: 5) == 0
    assert run_program(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyError):
        run_program(raises(KeyError("ours")))


def test_a_mistake_is_a_value_error():
    assert issubclass(UserError, ValueError)


STREAMS = {
    "full": ">/dev/full 2>/dev/full",
    "closed": ">&- 2>&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "nobody reads": "| true",
}


@pytest.mark.parametrize("redirect", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_line_that_cannot_be_printed_costs_the_line(redirect, encoding, tmp_path):
    code = (
        "import sys, time; from trainlib.errors import UserError, run_program, say\n"
        "def program():\n"
        "    for i in range(3): say(f'ᾱ \\udcff {i}'); say('x', err=True); time.sleep(0.05)\n"
        "    open(sys.argv[1], 'w').close(); raise UserError('ᾱ')\n"
        "sys.exit(run_program(program))"
    )
    shell = ["bash", "-c", f'set -o pipefail; "$@" {redirect}', "bash", sys.executable]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([*shell, "-c", code, tmp_path / "done"], env=env, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert (tmp_path / "done").exists()


def test_say_without_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    say("somebody", err=True)
    assert sys.stderr.getvalue() == "somebody\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError("a"), "'a'"),
        (ValueError("\n"), ""),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_parser_reports_in_one_line():
    parser = OneLineParser(description="α: as it\n  is written")
    parser.add_argument("--number", type=int, required=True)
    for argv in ([], ["--number", "a"], ["--number", "1", "--other"], ["--num", "1"]):
        with pytest.raises(UserError, match=r"; see --help$") as error:
            parser.parse_args(argv)
        assert "\n" not in str(error.value)
    assert "α: as it\n  is written" in parser.format_help()


def test_choices_and_divisors_are_named():
    check_choice("x", "a", ("a", "b"))
    check_divides("--n", 4, "--m", 8)
    with pytest.raises(UserError, match="x must be one of a, b, got 'c'"):
        check_choice("x", "c", ("a", "b"))
    for n in (3, 0, -4):
        with pytest.raises(UserError, match=f"--n must divide --m = 8, got {n}"):
            check_divides("--n", n, "--m", 8)


def test_a_second_program_in_one_process_prints_as_the_first():
    code = (
        "from trainlib.errors import run_program, say\n"
        "run_program(lambda: say('ᾱ')); run_program(lambda: say('ᾱ'))"
    )
    done = python("-c", code, PYTHONIOENCODING="ascii")
    assert done.stdout == "\\u03b1\\u0304\n" * 2 or done.stdout == "\\u1fb1\n" * 2, done.stderr
