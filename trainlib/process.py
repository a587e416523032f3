"""The processes of a run: device, ranks, signals, progress bars, the lock of a run folder."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainlib.bars import bar
from trainlib.errors import BROKEN, UserError, first_line

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """Return the device that --device names; an explicit cuda never becomes cpu."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or auto")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


# ---- several processes -----------------------------------------------------------------


def join_processes(device: torch.device) -> None:
    """Under torchrun, join the other processes of the run; else do nothing."""
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        return
    if sys.platform == "linux":  # ask for SIGTERM when a launcher dies, which leaves no orphan
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=10))


def leave_processes() -> None:
    """Leave what `join_processes` joined, if it did."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def process_rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own_rows() -> slice:
    """Return the rows of a batch that this process takes; seed what it draws beyond the batch."""
    rank, world = process_rank()
    if rank:  # seeded alike, all processes would drop the same out; the CPU uses 32 bits
        torch.manual_seed(torch.initial_seed() + rank * 2_654_435_761)
    return slice(rank, None, world)


def gather_rows(values: Tensor, num: int) -> Tensor:
    """Return the values of a whole batch, (num,), from those of each process's `own_rows`."""
    rank, world = process_rank()
    if world == 1:
        return values
    whole = torch.zeros(num, device=values.device, dtype=values.dtype)
    whole[rank::world] = values
    torch.distributed.all_reduce(whole)
    return whole


# ---- signals ---------------------------------------------------------------------------


class StopSignal:
    """Notes the signals that ask a run to stop; a second SIGINT ends the process.

    Under torchrun it does not: there each Ctrl-C comes twice, from the terminal and the launcher.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # the last two: before a batch system kills

    def __init__(self) -> None:
        self.number = 0  # of the highest signal that came; 0 = none

    def _note(self, number: int, _: Any) -> None:
        self.number = max(self.number, number)
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside, but for SIGHUP where it is ignored, as under nohup.

        Only the main thread can; in any other nothing changes. A handler that is not of Python
        stays: it could not be put back. SIGINT is caught even where it is ignored, as in jobs that
        a script starts with `&`: a supervisor may send it.
        """
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers if is_main}
        if handlers.get(getattr(signal, "SIGHUP", None)) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        before = {number: handler for number, handler in handlers.items() if handler is not None}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, device: torch.device) -> int:
        """Return the highest signal that came to any process of the run; 0 for none."""
        if process_rank()[1] == 1:
            return self.number
        asked = torch.tensor(self.number, device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return int(asked)


# ---- progress and time -----------------------------------------------------------------


def progress(items: Iterable, title: str) -> Iterable:
    """Wrap an iterable in a progress bar, in the first process alone."""
    return items if process_rank()[0] else bar(items, title)


def timer(device: torch.device | None = None) -> Callable[[], float]:
    """Return a function that gives the seconds since now; on CUDA it waits for the device."""
    began = time.perf_counter()

    def seconds() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return seconds


# ---- the run folder --------------------------------------------------------------------


@contextmanager
def locked_folder(folder: Path, option: str = "--save_dir") -> Iterator[None]:
    """Make a folder and hold its lock; UserError if it cannot be written or is in use.

    The system frees the lock when the process ends, however it ends.
    """
    try:
        from filelock import FileLock, Timeout
    except BROKEN as e:
        reason = f"the package filelock does not work ({type(e).__name__}: {first_line(e)})"
        raise UserError(f"{reason}; install it again") from None
    owner = folder / ".pid"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
        owner.write_text(str(os.getpid()))
    except Timeout:
        who = owner.read_text() if owner.exists() else "another"
        raise UserError(f"{folder} is in use by process {who}; choose another {option}") from None
    except OSError as e:
        raise UserError(f"cannot write into {option} {folder} ({e}); choose another") from None
    try:
        yield
    finally:
        lock.release()
