"""What surrounds a run: W&B, the terminal, memory, numbers that are not finite, the generator."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import train_diffusion_ddim as tdd
from augmentation import generate_click_dataset
from tests.faults.death import on_a_small_disk
from tests.faults.lab import LAST, STEPS, Lab, Skipped, end_state, fault, no_figures, sha256, wait
from trainlib.checkpoint import load_checkpoint
from trainlib.state import epoch_order

# ---- W&B ---------------------------------------------------------------------------------

LOGGED_OUT = {"WANDB_API_KEY": None, "WANDB_MODE": None, "NETRC": "/dev/null"}  # None: not set


def need_wandb() -> None:
    """Raise Skipped without wandb."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise Skipped("needs wandb") from None


def cores_of(process: subprocess.Popen) -> list[int]:
    """Return the pids of the W&B processes that a run has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "-o", "args=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb" in line]


def ends_like_the_undisturbed(lab: Lab, folder: Path, process: subprocess.Popen) -> str:
    """Wait for a run; return "" if it ends well, with the same bits."""
    cores = cores_of(process)
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        return "still running after 300 s"
    for pid in cores:  # one that is stopped keeps the pipes open
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, err = process.communicate()
    if process.returncode or "Traceback" in err:
        return f"code {process.returncode}, {err[-300:]}"
    return "" if end_state(folder) == lab.digest else "another end state"


def with_core(lab: Lab, number: int) -> Iterator[str]:
    """Send a signal to W&B's own process in the middle of an offline run."""
    need_wandb()
    folder = lab.new()
    flags = lab.flags(folder, wandb_mode="offline")
    process = lab.train(*flags, env={**LOGGED_OUT, "HOME": str(lab.folder)})
    process.stdout.readline()
    deadline = time.monotonic() + 600
    while not cores_of(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(lab.rng.uniform(0, 1.5))
    cores = cores_of(process)
    for pid in cores:
        os.kill(pid, number)
    if not cores:
        process.kill()
        yield "W&B's process was not there"
        return
    yield ends_like_the_undisturbed(lab, folder, process)


@fault("kill -9 of W&B's process at a random moment: the same bits", quick=0, long=10)
def dead_core(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        yield from with_core(lab, signal.SIGKILL)


@fault("W&B's process hangs (SIGSTOP): the run ends, the same bits", quick=0, long=2)
def hanging_core(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        yield from with_core(lab, signal.SIGSTOP)


@fault("W&B logged out, or its server refuses: no prompt, the same bits", quick=0, long=2)
def unreachable(lab: Lab, num: int) -> Iterator[str]:
    need_wandb()
    refusing = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    for more in ({}, refusing)[:num]:
        folder = lab.new()
        env = {**LOGGED_OUT, "HOME": str(lab.folder), **more}
        process = lab.train(*lab.flags(folder, wandb_mode="auto"), env=env)
        yield ends_like_the_undisturbed(lab, folder, process)


# ---- the terminal ------------------------------------------------------------------------


@fault("stdout or stderr closed, full, or a pipe that nobody reads: exit 0, the same bits",
       quick=1, long=5)  # fmt: skip
def no_terminal(lab: Lab, num: int) -> Iterator[str]:
    pipe = 'set -o pipefail; "$@" | head -n 1'
    for redirect in ('"$@" >/dev/full 2>/dev/full', pipe, '"$@" >&-', '"$@" 2>&-', '"$@" >&- 2>&-')[
        :num
    ]:
        folder = lab.new()
        process = lab.train(*lab.flags(folder), prefix=["bash", "-c", redirect, "bash"])
        yield ends_like_the_undisturbed(lab, folder, process)


# ---- memory and numbers ------------------------------------------------------------------


def failing_at(step: int, error: Exception | None) -> None:
    """In a forked child: let a step's losses raise, or be NaN."""
    no_figures()
    real, calls = tdd.per_sample_loss, [0]

    def losses(*args: object) -> torch.Tensor:
        calls[0] += 1
        loss = real(*args)
        if calls[0] == step + 1:
            if error:
                raise error
            loss = loss * float("nan")
        return loss

    tdd.per_sample_loss = losses


@fault("out of memory at a step: exit 1 with the batch size, and resume", quick=1, long=5)
def out_of_memory(lab: Lab, num: int) -> Iterator[str]:
    for step in lab.rng.permutation(range(STEPS))[:num]:
        folder = lab.new()
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        code = wait(lab.fork(lab.flags(folder), lambda s=step, e=error: failing_at(s, e)))
        errors = [x for x in lab.output().splitlines() if not x.startswith("epoch")][1:]
        good = code == 1 and len(errors) == 1 and "--batch_size 4" in errors[0]
        yield lab.resumed(folder) if good else f"{code}, {lab.output()[-300:]}"


@fault("a loss that is NaN at a step: exit 1 with step, lr and batch; nothing of it is saved",
       quick=1, long=5)  # fmt: skip
def not_finite(lab: Lab, num: int) -> Iterator[str]:
    for step in lab.rng.permutation(range(STEPS))[:num]:
        folder = lab.new()
        code = wait(lab.fork(lab.flags(folder), lambda s=step: failing_at(s, None)))
        order = epoch_order(24, 0, step // 6)[step % 6 * 4 :][:4].tolist()
        words = f"step {step}, lr", "gestures " + ", ".join(map(str, order))
        good = code == 1 and all(word in lab.output() for word in words)
        for path in folder.glob("*.pth"):
            content = load_checkpoint(path)
            good = good and all(v.isfinite().all() for v in content["model_state_dict"].values())
        yield lab.resumed(folder) if good else f"{code}, {lab.output()[-300:]}"


@fault("--lr 1e38: exit 1, no weight that is not finite in any file", quick=1, long=1)
def diverging(lab: Lab, num: int) -> Iterator[str]:
    folder = lab.new()
    code = wait(lab.fork(lab.flags(folder, lr=1e38, save_every=0.01)))
    contents = [load_checkpoint(path) for path in folder.glob("*.pth")]
    finite = all(v.isfinite().all() for c in contents for v in c["model_state_dict"].values())
    yield "" if code == 1 and finite and "--lr" in lab.output() else f"{code}, finite {finite}"


# ---- what a run reads and writes ---------------------------------------------------------


@fault("data deleted, cut or replaced in the middle of a run: the same bits", quick=1, long=3)
def data_changes(lab: Lab, num: int) -> Iterator[str]:
    for change in (Path.unlink, lambda p: os.truncate(p, 200), lambda p: p.write_bytes(b""))[:num]:
        data, folder = lab.new(), lab.new()
        shutil.copytree(lab.folder / "train", data)
        flags = lab.flags(folder)
        flags[flags.index("--data_dir") + 1] = str(data)
        pid = lab.fork(flags)
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        change(data / "x_actions.npy")
        code = wait(pid)
        content = torch.load(folder / LAST, weights_only=True)
        expected = torch.load(lab.straight / LAST, weights_only=True)
        same = all(
            torch.equal(v, expected["ema_state_dict"][k])
            for k, v in content["ema_state_dict"].items()
        )
        yield "" if code == 0 and same else f"{code}, {lab.output()[-300:]}"


@fault("the dates of checkpoints are wrong: the newest is still the highest epoch", quick=1, long=2)
def wrong_dates(lab: Lab, num: int) -> Iterator[str]:
    for oldest, newest in ((4_070_908_800, 0), (4_070_908_800, 1))[:num]:
        folder = lab.copy()
        os.utime(folder / "diffusion_checkpoint_epoch_0.pth", (oldest, oldest))
        os.utime(folder / LAST, (newest, newest))
        yield "" if load_checkpoint(folder)["step"] == STEPS else "an older one"


# ---- the generator -----------------------------------------------------------------------


def generate(folder: Path, *more: str) -> list[str]:
    """Return the generator's arguments: 300 files, so that a kill finds it at work."""
    sizes = ["--num_sequences", "1500", "--sequences_per_file", "5", "--seed", "3"]
    return ["--output_dir", str(folder), *sizes, "--split", "x", *more]


def fork_generator(argv: list[str]) -> int:
    """Run the generator in a child; return its pid."""
    pid = os.fork()
    if not pid:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            os._exit(generate_click_dataset.main(argv))
        finally:
            os._exit(70)
    return pid


@fault("kill -9 of the generator: whole files, no manifest before the last; again the same bytes",
       quick=3, long=50)  # fmt: skip
def kill_the_generator(lab: Lab, num: int) -> Iterator[str]:
    straight = lab.new()
    began = time.monotonic()
    wait(fork_generator(generate(straight)))
    seconds = time.monotonic() - began
    expected = {path.name: sha256(path) for path in straight.iterdir()}
    for moment in lab.rng.uniform(0, seconds, num):
        folder = lab.new()
        pid = fork_generator(generate(folder))
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        visible = [path for path in folder.glob("*") if not path.name.startswith(".")]
        whole = all(sha256(path) == expected[path.name] for path in visible)
        names = {path.name for path in visible}
        honest = "dataset.json" not in names or names == set(expected)
        again = wait(fork_generator(generate(folder, "--overwrite")))
        same = {path.name: sha256(path) for path in folder.iterdir()} == expected
        good = whole and honest and again == 0 and same
        yield "" if good else f"whole {whole}, honest {honest}, again {again}, {same}"
        shutil.rmtree(folder)


@fault("the generator's disk is full: exit 1, no manifest; the trainer refuses the folder",
       quick=0, long=1)  # fmt: skip
def generator_on_a_full_disk(lab: Lab, num: int) -> Iterator[str]:
    module = ["-m", "augmentation.generate_click_dataset"]
    command = [sys.executable, *module, *generate(Path("DISK/set"))]
    code, err, left = on_a_small_disk(lab, "1m", *command)
    names = {path.name for path in (left / "set").glob("*")}
    good = code == 1 and err.count("\n") == 1 and "dataset.json" not in names
    yield "" if good and not any(".tmp" in n for n in names) else f"{code}, {err[-300:]}"
