"""The processes of a run: device, ranks, signals, progress bars, the lock of a run folder."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainlib.errors import UserError

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


# ---- signals ---------------------------------------------------------------------------


class StopSignal:
    """Notes the signals that ask a run to stop; a second SIGINT ends the process.

    Under torchrun it does not: there each Ctrl-C comes twice, from the terminal and the launcher.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0  # of the highest signal that came

    def _note(self, number: int, _: Any) -> None:
        self.number = max(self.number, number)
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside; only the main thread can, in any other nothing changes."""
        is_main = threading.current_thread() is threading.main_thread()
        numbers = self.NUMBERS if is_main else ()
        before = {number: signal.signal(number, self._note) for number in numbers}
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
    """Wrap an iterable in a progress bar, on a terminal and with tqdm only."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, title, disable=None if sys.stderr else True, leave=False)


@contextmanager
def timer(device: torch.device | None = None) -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds since the start; on CUDA it waits for the device."""
    began = time.perf_counter()

    def seconds() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    yield seconds


# ---- the run folder --------------------------------------------------------------------


@contextmanager
def locked_folder(folder: Path, option: str = "--save_dir") -> Iterator[None]:
    """Make a folder and hold its lock; UserError if it cannot be written or is in use.

    The system frees the lock when the process ends, however it ends.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as e:
        raise UserError(f"cannot write into {option} {folder} ({e}); choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            user = f"process {lock.read()}"
            raise UserError(f"{folder} is in use by {user}; choose another {option}") from None
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        yield
