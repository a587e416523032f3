"""What the fault lab works with: tiny runs as real processes, and faults from outside of them.

The product holds no code for its own tests. A fault is a signal, a system call that strace makes
fail, a disk of a few kilobytes, damaged bytes, or a module on the import path that misbehaves.

Processes start in one of two ways. `start` runs the command line as a user does. `fork` calls its
`main` in a child of this process, which has torch imported already: twenty times as quick, and to
kill -9 no less real.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_diffusion_ddim as tdd
from tests.conftest import ROOT, SCRIPT, TINY, as_flags, make_gestures, read_jsonl, without_clock
from trainlib.checkpoint import load_checkpoint
from trainlib.state import TrainState

EPOCHS, STEPS = 3, 18  # of the run that is disturbed: 24 gestures, 4 to a batch
LAST = f"diffusion_checkpoint_epoch_{EPOCHS - 1}.pth"


class Skipped(Exception):
    """A tool or a right is missing; the message says which."""


@dataclass(frozen=True)
class Fault:
    """A fault: what it is, how often it is tried, and how to try it.

    `tries(lab, num)` yields, for each of about `num` tries, "" if it was survived, else why not.
    """

    title: str
    quick: int
    long: int
    tries: Callable[["Lab", int], Iterator[str]]


FAULTS: list[Fault] = []


def fault(title: str, *, quick: int, long: int) -> Callable:
    """Enter a function into the list of faults; `quick` 0 leaves it out of `make test`."""

    def enter(tries: Callable[["Lab", int], Iterator[str]]) -> Callable:
        FAULTS.append(Fault(title, quick, long, tries))
        return tries

    return enter


def need(*tools: str) -> None:
    """Raise Skipped unless this is root and the tools are there."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing or os.geteuid():
        raise Skipped(f"needs {' and '.join(missing)}" if missing else "needs root")


def no_figures() -> None:
    """Let matplotlib be missing, in this process: a run is then five times as quick."""
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]


def wait(pid: int, timeout: float = 300) -> int:
    """Return how a child ended, -N for signal N; 99 if it had to be killed after `timeout` s."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_tree(value: object, digest: "hashlib._Hash") -> None:
    """Feed a nested state into a digest, to the bit."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode())
            digest_tree(value[key], digest)
    elif isinstance(value, list | tuple):
        for inner in value:
            digest_tree(inner, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(str(value.dtype).encode() + value.contiguous().numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def end_state(folder: Path, last: str = LAST) -> str:
    """Return a digest of all that a run leaves: its last checkpoint and every logged number."""
    content = torch.load(folder / last, weights_only=True)
    for name in ("save_dir", "wandb_mode"):
        content["config"].pop(name)
    content.pop("wandb_id")
    digest = hashlib.sha256()
    digest_tree(content, digest)
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        digest.update(json.dumps(without_clock(read_jsonl(folder / name))).encode())
    return digest.hexdigest()


def tensors_of(path: Path) -> str:
    """Return a digest of what `load_checkpoint` gives."""
    content = load_checkpoint(path)
    content.pop("path")
    digest = hashlib.sha256()
    digest_tree(content, digest)
    return digest.hexdigest()


class Lab:
    """A folder with tiny data sets, a random generator, and the run that nothing disturbed."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.rng, self.count = folder, np.random.default_rng(seed), 0
        torch.set_num_threads(1)
        folder.chmod(0o755)  # another user is to reach it
        for name, num, data_seed in (("train", 24, 1), ("val", 6, 2)):
            (folder / name).mkdir()
            rows = make_gestures(num, seed=data_seed).numpy().reshape(-1, 3)
            np.save(folder / name / "x_actions.npy", rows)
        self.warm_up()
        self.straight = self.new()
        began = time.monotonic()
        code = wait(self.fork(self.flags(self.straight)))
        self.seconds = time.monotonic() - began
        assert code == 0, self.output()
        self.digest = end_state(self.straight)

    def warm_up(self) -> None:
        """Let this process import all that a run imports late, so that its children need not."""
        config = tdd.TrainConfig(**TINY)
        state = TrainState(
            tdd.build_model(config), tdd.build_scheduler(config), config, 10, tdd.NUM_TASKS
        )
        tdd.train_step(state, make_gestures(4))
        __import__("tqdm")

    def new(self) -> Path:
        """Return the path of a new run folder."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def copy(self) -> Path:
        """Return a copy of the undisturbed run."""
        return shutil.copytree(self.straight, self.new())

    def flags(self, folder: Path, **changes: object) -> list[str]:
        """Return the command line of the run, saved every third step."""
        sets = {"data_dir": self.folder / "train", "val_data_dir": self.folder / "val"}
        run = {"num_epochs": EPOCHS, "save_every": 0.5, "wandb_mode": "disabled"}
        return as_flags(**{**TINY, **sets, **run, "save_dir": folder, **changes})

    def fork(self, argv: list[str], before: Callable[[], None] = no_figures) -> int:
        """Run the command line in a child of this process; return its pid."""
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            output = os.open(self.folder / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for number in (1, 2):
                os.dup2(output, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            before()
            code = tdd.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def output(self) -> str:
        """Return what the latest forked child has printed."""
        return (self.folder / "output").read_text()

    def start(self, *argv: object, **options: object) -> subprocess.Popen:
        """Run the command line as a user does: a new process, in a group of its own."""
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        environ = {k: v for k, v in environ.items() if v is not None}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [str(a) for a in (*options.pop("prefix", ()), sys.executable, *argv)]
        group = {"start_new_session": True, "text": True, "env": environ}
        return subprocess.Popen(command, **{**pipes, **group, **options})

    def train(self, *argv: object, **options: object) -> subprocess.Popen:
        """Start the trainer's command line."""
        return self.start(SCRIPT, *argv, **options)

    def resumed(self, folder: Path, *argv: str) -> str:
        """Resume a run; return "" if it ends as the undisturbed one, to the bit, else why not."""
        code = wait(self.fork([*(argv or self.flags(folder)), "--resume"]))
        if code:
            return f"resume ended with {code}: {self.output()[-300:]}"
        if [*folder.glob(".*.tmp")]:
            return "a temporary file is left"
        return "" if end_state(folder) == self.digest else "another end state"

    def stopped_by(self, pid: int, log: Path, trace: str, *paths: Path) -> None:
        """Wait until a child has stopped itself, attach strace, then let it go on."""
        os.waitpid(pid, os.WUNTRACED)
        options = [f"-P{path}" for path in paths]
        strace = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", log, *options, "-p", str(pid), *trace.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        status = Path(f"/proc/{pid}/status")
        for _ in range(2000):
            if "TracerPid:\t0" not in status.read_text() or strace.poll() is not None:
                break
            time.sleep(0.002)
        if strace.poll() is not None:
            os.kill(pid, signal.SIGKILL)
            raise Skipped("strace may not attach here")
        os.kill(pid, signal.SIGCONT)
        self.strace = strace


def stop_here() -> None:
    """Wait, in a forked child, until strace is attached."""
    no_figures()
    os.kill(os.getpid(), signal.SIGSTOP)
