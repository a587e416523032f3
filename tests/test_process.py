"""The processes of a run: device, ranks, signals, progress bars, the lock of a run folder.

Why: two runs in one folder, a signal that is lost, or processes that draw alike spoil a run without
an error.

    python -m pytest tests/test_process.py
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import in_a_child
from filelock import FileLock

from trainlib import process
from trainlib.errors import UserError
from trainlib.process import (
    StopSignal,
    gather_rows,
    locked_folder,
    own_rows,
    pick_device,
    process_rank,
    progress,
    timer,
)


def test_processes_draw_their_dropout_apart(monkeypatch):
    drawn = []
    for rank, world in ((0, 2), (0, 2), (1, 2), (2, 3)):
        monkeypatch.setattr(process, "process_rank", lambda r=rank, w=world: (r, w))
        torch.manual_seed(7)
        assert own_rows() == slice(rank, None, world)
        drawn.append(F.dropout(torch.ones(60), 0.5))
    first, again, second, third = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(second, third)


# ---- devices ---------------------------------------------------------------------------


def test_a_device_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:2")
    assert pick_device("cpu") == torch.device("cpu")


def test_one_process_gathers_what_it_has():
    assert process_rank() == (0, 1) and own_rows() == slice(0, None, 1)
    values = torch.rand(5)
    assert gather_rows(values, 5) is values


# ---- signals ---------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in StopSignal.NAMES]


@pytest.mark.parametrize("number", SIGNALS, ids=StopSignal.NAMES)
def test_a_signal_is_noted_and_its_handler_comes_back(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    stop = StopSignal()
    with stop.caught():
        assert stop.agreed(torch.device("cpu")) == 0
        os.kill(os.getpid(), number)
        assert stop.agreed(torch.device("cpu")) == number
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_second_interrupt_ends_the_process():
    def run(say):
        with StopSignal().caught():
            for i in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                say(i)

    assert in_a_child(run) == (-signal.SIGINT, "0\n")


def test_signals_that_are_ignored_or_of_another_library_are_left_alone(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR1 else real(n))
    try:
        with StopSignal().caught():
            assert real(signal.SIGHUP) is signal.SIG_IGN
            assert real(signal.SIGUSR1) is signal.SIG_DFL
        assert real(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_thread_trains_without_signals():
    def run():
        with StopSignal().caught():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run).result() is signal.getsignal(signal.SIGTERM)


# ---- progress --------------------------------------------------------------------------

BROKEN_TQDM = {
    "missing": "raise ImportError",
    "broken": "raise AttributeError('x')",
    "leaves": "raise SystemExit(3)",
    "empty": "",
    "of other arguments": "def tqdm(items): return items",
    "fails when called": "def tqdm(*_, **__): raise OSError('no terminal')",
}


@pytest.mark.parametrize("name", BROKEN_TQDM)
def test_a_progress_bar_that_is_broken_is_none(replace_package, name):
    replace_package("tqdm", BROKEN_TQDM[name])
    items = [1, 2, 3]
    assert progress(items, "x") is items


def test_a_progress_bar_is_quiet_without_a_terminal(capsys):
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


# ---- the lock of a folder --------------------------------------------------------------


def test_a_folder_is_locked_for_another_process_until_this_one_ends(tmp_path):
    folder = tmp_path / "a" / "b"

    def run(say):
        try:
            with locked_folder(folder):
                say("free")
        except UserError as e:
            say(e)

    with locked_folder(folder):
        assert (folder / ".pid").read_text() == str(os.getpid())
        code, said = in_a_child(run)
        assert code == 0 and f"{folder} is in use by process {os.getpid()}" in said
        with pytest.raises(UserError, match="choose another --out"), locked_folder(folder, "--out"):
            pass
    assert in_a_child(run) == (0, "free\n")


def test_a_killed_process_frees_its_folder(tmp_path):
    def run(say):
        with locked_folder(tmp_path):
            say((tmp_path / ".pid").read_text())
            os.kill(os.getpid(), signal.SIGKILL)

    code, pid = in_a_child(run)
    assert code == -signal.SIGKILL and int(pid) != os.getpid()
    with locked_folder(tmp_path):
        assert (tmp_path / ".pid").read_text() == str(os.getpid())


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, what):
    path = tmp_path / "x"
    path.write_text("")
    path = path / "y" if what == "below a file" else path
    with (
        pytest.raises(UserError, match=f"cannot write into --save_dir {path}"),
        locked_folder(path),
    ):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with locked_folder(tmp_path):
        assert (tmp_path / ".pid").exists()


def test_seconds_are_counted_from_the_call(monkeypatch):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds = timer(torch.device("cpu"))
    assert (seconds(), seconds()) == (0.5, 2.0)
