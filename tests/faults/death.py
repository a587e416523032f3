"""Death, signals and the disk: kill -9 anywhere, SIGTERM, a full disk, a dead launcher."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import train_diffusion_ddim as tdd
from tests.conftest import ROOT, SCRIPT, read_jsonl
from tests.faults.lab import (
    LAST,
    STEPS,
    Lab,
    Skipped,
    fault,
    need,
    no_figures,
    sha256,
    stop_here,
    tensors_of,
    wait,
)
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.state import TrainState

# ---- kill -9 -----------------------------------------------------------------------------


@fault("kill -9 at a random moment; the resumed run is the same to the bit", quick=2, long=200)
def kill_anywhere(lab: Lab, num: int) -> Iterator[str]:
    for moment in lab.rng.uniform(0, lab.seconds, num):
        folder = lab.new()
        pid = lab.fork(lab.flags(folder))
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        yield lab.resumed(folder)
        shutil.rmtree(folder)


@fault("the same, of a process started by a user, figures and all", quick=0, long=10)
def kill_a_real_process(lab: Lab, num: int) -> Iterator[str]:
    for moment in lab.rng.uniform(0, 3, num):
        folder = lab.new()
        process = lab.train(*lab.flags(folder))
        process.stdout.readline()
        time.sleep(moment)
        process.kill()
        process.communicate()
        yield lab.resumed(folder)


@fault("kill -9 after each step of a run, saved at every step", quick=1, long=STEPS - 1)
def kill_at_every_step(lab: Lab, num: int) -> Iterator[str]:
    real = tdd.train_step
    for step in lab.rng.permutation(range(1, STEPS))[:num]:

        def dies(state: TrainState, x_0: torch.Tensor, *_: None, step: int = step) -> dict:
            if state.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(state, x_0)

        def before(dies: object = dies) -> None:
            no_figures()
            tdd.train_step = dies

        folder = lab.new()
        wait(lab.fork(lab.flags(folder, save_every=0.01), before))
        newest = load_checkpoint(folder)
        lost = step - newest["step"]
        # the frequency of saves is part of the config, so of the state that is compared
        yield (f"{lost} steps lost" if lost else "") or lab.resumed(folder, *lab.flags(folder))
        shutil.rmtree(folder)


@fault("ten kills in one run", quick=0, long=5)
def kill_again_and_again(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        folder = lab.new()
        for moment in lab.rng.uniform(0.3 * lab.seconds, 0.6 * lab.seconds, 10):
            pid = lab.fork([*lab.flags(folder), "--resume"])
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            wait(pid)
        yield lab.resumed(folder)


SAVE = "trace=openat,write,lseek,fsync,rename,unlink,close,newfstatat,fstat,ioctl"


def save_in_child(lab: Lab, folder: Path, content: dict, options: str) -> tuple[int, str]:
    """Save a checkpoint in a child of which strace watches the file and its folder."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setsid()
            os.kill(os.getpid(), signal.SIGSTOP)
            save_checkpoint(folder / LAST, content)
            code = 0
        except OSError:
            code = 1
        finally:
            os._exit(code)
    log = lab.folder / "strace"
    paths = folder / f".{LAST}.tmp", folder / LAST, folder
    lab.stopped_by(pid, log, f"-e {SAVE} {options}", *paths)
    code = wait(pid)
    lab.strace.wait()
    return code, log.read_text()


@fault("kill -9 at each system call of a save: the old or the new file, whole", quick=4, long=99)
def kill_in_a_save(lab: Lab, num: int) -> Iterator[str]:
    need("strace")
    folder = lab.copy()
    old = load_checkpoint(folder / LAST)
    old.pop("path")
    new = {**old, "step": 999}
    digests = {tensors_of(folder / LAST)}
    _, log = save_in_child(lab, folder, new, "")
    digests.add(tensors_of(folder / LAST))
    calls = re.findall(r"^(?:\d+ +)?(\w+)\(", log, re.MULTILINE)
    assert len(digests) == 2 and len(calls) >= 6, log
    for i in lab.rng.permutation(len(calls))[:num]:
        save_checkpoint(folder / LAST, old)
        when = calls[: i + 1].count(calls[i])
        inject = f"-e inject={calls[i]}:signal=KILL:when={when}"
        code, _ = save_in_child(lab, folder, new, inject)
        what = f"{calls[i]} number {when}"
        reason = "" if code == -signal.SIGKILL else f"{what} did not kill ({code})"
        if tensors_of(folder / LAST) not in digests:
            reason = f"killed at {what}: neither the old nor the new file"
        code = wait(lab.fork(["--resume", str(folder)]))
        if code or [*folder.glob(".*.tmp")]:
            reason = f"killed at {what}: resume ended with {code}, or left a file"
        yield reason


@fault("EIO, ENOSPC, EDQUOT at each write, fsync and rename of a save", quick=3, long=99)
def errors_in_a_save(lab: Lab, num: int) -> Iterator[str]:
    need("strace")
    cases = [(call, error) for call in ("write", "fsync", "rename", "openat")
             for error in ("EIO", "ENOSPC", "EDQUOT")]  # fmt: skip
    for i in lab.rng.permutation(len(cases))[:num]:
        call, error = cases[i]
        folder = lab.new()
        shutil.copytree(lab.straight, folder)
        for name in (LAST, "diffusion_checkpoint_epoch_1.pth"):
            (folder / name).unlink()
        kept = folder / "diffusion_checkpoint_epoch_0.pth"
        before = sha256(kept)
        pid = lab.fork([*lab.flags(folder), "--resume"], stop_here)
        target = "diffusion_checkpoint_epoch_1.pth"
        paths = folder / f".{target}.tmp", folder / target
        inject = f"-e trace={call} -e inject={call}:error={error}"
        lab.stopped_by(pid, lab.folder / "strace", inject, *paths)
        code, output = wait(pid), lab.output()
        lab.strace.wait()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        good = code == 1 and len(errors) == 1 and target in errors[0]
        good = good and "Traceback" not in output and sha256(kept) == before
        reason = "" if good else f"{call} {error}: {code}, {output[-200:]}"
        yield reason or lab.resumed(folder)


@fault("a save is write, fsync, rename, fsync of the folder, in this order", quick=1, long=1)
def order_of_a_save(lab: Lab, num: int) -> Iterator[str]:
    need("strace")
    folder = lab.copy()
    content = load_checkpoint(folder / LAST)
    content.pop("path")
    _, log = save_in_child(lab, folder, content, "")
    calls = re.findall(r"\b(write|fsync|rename)\(", log)
    calls = [c for i, c in enumerate(calls) if i == 0 or c != calls[i - 1]]
    yield "" if calls == ["write", "fsync", "rename", "fsync"] else str(calls)


# ---- signals -----------------------------------------------------------------------------


def stopped(lab: Lab, number: int, moment: float) -> Iterator[str]:
    """Send a signal to a run in its loop; it must save its last step, exit 128 + n, and resume."""
    folder = lab.new()
    pid = lab.fork(lab.flags(folder))
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(pid, number)
    began = time.monotonic()
    code, seconds = wait(pid), time.monotonic() - began
    if code == 0:
        return  # the run was over, which is no try
    rows = read_jsonl(folder / "metrics.jsonl")
    lost = rows[-1]["step"] - load_checkpoint(folder)["step"]
    if code != 128 + number or lost or seconds > 20 or "Traceback" in lab.output():
        yield f"code {code}, {lost} steps lost, {seconds:.1f} s, {lab.output()[-200:]}"
    else:
        yield lab.resumed(folder)
    shutil.rmtree(folder)


def stopped_often(lab: Lab, num: int, *numbers: int) -> Iterator[str]:
    """Send each of the signals in turn, `num` times in all; a run that was over is no try."""
    tried = 0
    while tried < num:
        number = numbers[tried % len(numbers)]
        for reason in stopped(lab, number, lab.rng.uniform(0, 0.6 * lab.seconds)):
            tried += 1
            yield reason


@fault("SIGTERM at a random moment: exit code 143, no step lost, the same to the bit",
       quick=1, long=40)  # fmt: skip
def sigterm(lab: Lab, num: int) -> Iterator[str]:
    return stopped_often(lab, num, signal.SIGTERM)


@fault("SIGINT, likewise: exit code 130", quick=1, long=20)
def sigint(lab: Lab, num: int) -> Iterator[str]:
    return stopped_often(lab, num, signal.SIGINT)


@fault("SIGHUP and SIGUSR1, likewise: exit codes 129 and 138", quick=1, long=20)
def signals_of_batch_systems(lab: Lab, num: int) -> Iterator[str]:
    return stopped_often(lab, num, signal.SIGHUP, signal.SIGUSR1)


@fault("SIGTERM to the group of a process started by a user", quick=1, long=5)
def sigterm_to_the_group(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        folder = lab.new()
        process = lab.train(*lab.flags(folder, num_epochs=500))
        while process.stdout.readline() and not (folder / "metrics.jsonl").exists():
            pass
        time.sleep(lab.rng.uniform(0, 2))
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        lost = read_jsonl(folder / "metrics.jsonl")[-1]["step"] - load_checkpoint(folder)["step"]
        good = process.returncode == 143 and not lost and "Traceback" not in err
        yield "" if good else f"code {process.returncode}, {lost} steps lost, {err[-200:]}"


@fault("a second SIGINT leaves at once, the folder stays valid", quick=1, long=10)
def double_sigint(lab: Lab, num: int) -> Iterator[str]:
    for moment in lab.rng.uniform(0, 0.5 * lab.seconds, num):
        folder = lab.new()
        pid = lab.fork(lab.flags(folder))
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        time.sleep(moment)
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.003)  # two signals at once are one
        code = wait(pid, 60)
        yield lab.resumed(folder) if code in (0, 130, -signal.SIGINT) else f"code {code}"


# ---- the disk ----------------------------------------------------------------------------

# A disk of a few kilobytes, in a mount namespace of its own; what is left on it is copied out.
SMALL_DISK = """
mount -t tmpfs -o size="$1" none "$2" && shift
folder="$1"; shift; after="$1"; shift
"$@"; code=$?
cp -a "$folder/." "$after" && exit $code
"""


def on_a_small_disk(lab: Lab, size: str, *command: object) -> tuple[int, str, Path]:
    """Run a command whose working folder is a disk of `size`; return code, stderr, a copy."""
    need("unshare")
    disk, after = lab.new(), lab.new()
    disk.mkdir()
    after.mkdir()
    shell = ["unshare", "-m", "sh", "-c", SMALL_DISK, "sh", size, disk, after, *command]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [str(a).replace("DISK", str(disk)) for a in shell],
        capture_output=True,
        text=True,
        timeout=600,
        env=environ,
    )
    if "permission denied" in done.stderr or "not permitted" in done.stderr:
        raise Skipped("may not mount a disk here")
    return done.returncode, done.stderr, after


@fault(
    "the disk is full at the first, second, third save: exit 1, older files whole", quick=1, long=3
)
def full_disk(lab: Lab, num: int) -> Iterator[str]:
    kilobytes = (lab.straight / LAST).stat().st_size // 1024
    for saved in range(num):
        flags = lab.flags("DISK/run", save_every=1)
        size = f"{int((saved + 0.5) * kilobytes) + 20}k"
        # matplotlib would fill the disk first
        shim = lab.folder / "shim" / "matplotlib"
        shim.mkdir(parents=True, exist_ok=True)
        (shim / "__init__.py").write_text("raise ImportError('no matplotlib')\n")
        path = f"PYTHONPATH={shim.parent}:{ROOT}"
        code, err, left = on_a_small_disk(lab, size, "env", path, sys.executable, SCRIPT, *flags)
        files = sorted(path.name for path in (left / "run").glob("*.pth"))
        expected = [f"diffusion_checkpoint_epoch_{i}.pth" for i in range(saved)]
        errors = [x for x in err.splitlines() if not x.startswith("warning: no figures")]
        good = code == 1 and len(errors) == 1 and "bytes needed" in err and files == expected
        good = good and not [*(left / "run").glob(".*.tmp")]
        for name in expected:
            load_checkpoint(left / "run" / name)
        yield "" if good else f"code {code}, {files}, {err[-300:]}"


@fault("the disk is full under a figure or a sample: path and bytes are named, no half file",
       quick=0, long=2)  # fmt: skip
def full_disk_elsewhere(lab: Lab, num: int) -> Iterator[str]:
    kilobytes = (lab.straight / LAST).stat().st_size // 1024
    figure = [SCRIPT, *lab.flags("DISK/run", num_epochs=1, save_every=1)]
    sample = [SCRIPT, "--sample", 2000, "--checkpoint", lab.straight, "--output_dir", "DISK/run"]
    for argv, size, expected in ((figure, kilobytes + 60, 0), (sample, 100, 1))[:num]:
        code, err, left = on_a_small_disk(lab, f"{size}k", sys.executable, *argv)
        good = code == expected and err.count("\n") == 1
        good = good and "/run/" in err and "bytes needed" in err
        half = [*left.rglob("*.npy"), *left.rglob("*.tmp")]
        yield "" if good and not half else f"code {code}, {half}, {err[-300:]}"


@fault("a file size limit (ulimit -f) below a checkpoint's: exit 1, one line", quick=0, long=1)
def file_size_limit(lab: Lab, num: int) -> Iterator[str]:
    folder = lab.new()
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash"]
    process = lab.train(*lab.flags(folder), prefix=limited, env={"WANDB_MODE": "disabled"})
    _, err = process.communicate(timeout=300)
    good = process.returncode == 1 and err.count("\n") == 1 and "bytes needed" in err
    yield "" if good and not [*folder.glob("*.pth")] else f"{process.returncode}, {err[-300:]}"


@fault(
    "a folder that cannot be written: read-only, another user's, a file: exit 2", quick=4, long=4
)
def unwritable(lab: Lab, num: int) -> Iterator[str]:
    file = lab.new()
    file.write_text("")
    for path in (file, file / "below"):
        code = wait(lab.fork(lab.flags(path)))
        good = code == 2 and lab.output().count("\n") == 1 and "--save_dir" in lab.output()
        yield "" if good else f"{code} {lab.output()}"
    need("unshare")
    closed = lab.new()
    closed.mkdir(0o555)

    def as_nobody() -> None:
        no_figures()
        os.setgid(65534)
        os.setuid(65534)

    code = wait(lab.fork(lab.flags(closed), as_nobody))
    good = code == 2 and lab.output().count("\n") == 1 and "--save_dir" in lab.output()
    yield "" if good else f"{code} {lab.output()}"
    flags = lab.flags("DISK/run")
    remount = ["sh", "-c", 'mount -o remount,ro DISK; exec "$@"', "sh"]
    code, err, _ = on_a_small_disk(lab, "64k", *remount, sys.executable, SCRIPT, *flags)
    yield "" if code == 2 and err.count("\n") == 1 else f"{code} {err}"


# ---- several processes -------------------------------------------------------------------


@fault(
    "two starts in one folder at once: one runs, the other exits 2 with its pid", quick=2, long=20
)
def race(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        folder = lab.new()
        flags = lab.flags(folder, num_epochs=30)
        first, second = lab.fork(flags), lab.fork(flags)
        codes = {}
        while not codes:
            for pid in (first, second):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        ((loser, code),) = codes.items()
        winner = first + second - loser
        alive = os.path.exists(f"/proc/{winner}")
        os.kill(winner, signal.SIGKILL)
        wait(winner)
        after = wait(lab.fork([*lab.flags(folder, num_epochs=1), "--resume"]))
        good = code == 2 and alive and after == 0
        yield "" if good else f"loser {code}, winner alive {alive}, restart {after}"


def processes_of(folder: Path) -> list[int]:
    """Return the pids whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in line and (entry / "stat").exists():
            found.append(int(entry.name))
    return found


def under_torchrun(lab: Lab, folder: Path, **changes: object) -> subprocess.Popen:
    """Start two processes on the CPU; return when the first epoch is over."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = lab.start(*launcher, SCRIPT, *lab.flags(folder, **changes))
    while line := process.stdout.readline():
        if line.startswith("epoch"):
            return process
    raise AssertionError(process.communicate()[1][-2000:])


def gone_within(folder: Path, seconds: float) -> float | None:
    """Return after how many seconds no process names the folder any more; None if some stay."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if not processes_of(folder):
            return time.monotonic() - began
        time.sleep(0.05)
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    return None


@fault("torchrun, two processes: kill -9 of either, or of torchrun, leaves none", quick=0, long=9)
def kill_one_of_two(lab: Lab, num: int) -> Iterator[str]:
    for i in range(num):
        folder = lab.new()
        process = under_torchrun(lab, folder, num_epochs=5000)
        ranks = [pid for pid in processes_of(folder) if pid != process.pid]
        victim = [process.pid, *ranks][i % 3]
        os.kill(victim, signal.SIGKILL)
        seconds = gone_within(folder, 60)
        process.communicate()
        newest = load_checkpoint(folder)["step"]
        yield "" if seconds is not None and newest else "processes stayed for 60 s"


@fault("torchrun, SIGTERM to one process or to torchrun: all stop on one step", quick=1, long=6)
def sigterm_one_of_two(lab: Lab, num: int) -> Iterator[str]:
    for i in range(num):
        folder = lab.new()
        process = under_torchrun(lab, folder, num_epochs=5000)
        ranks = sorted(pid for pid in processes_of(folder) if pid != process.pid)
        os.kill([ranks[1], process.pid, ranks[0]][i % 3], signal.SIGTERM)
        seconds = gone_within(folder, 60)
        _, err = process.communicate()
        content = load_checkpoint(folder)
        lost = read_jsonl(folder / "metrics.jsonl")[-1]["step"] - content["step"]
        good = seconds is not None and not lost
        yield "" if good else f"{lost} steps lost, gone after {seconds} s, {err[-300:]}"


@fault("a run of one process goes on with two, then one: losses within 1e-4", quick=0, long=1)
def another_world(lab: Lab, num: int) -> Iterator[str]:
    straight, folder = lab.new(), lab.new()
    flags = {"dropout": 0.0, "save_every": 1}
    wait(lab.fork(lab.flags(straight, num_epochs=EPOCHS_OF_WORLDS, **flags)))
    shutil.copytree(straight, folder)
    for name in [*folder.glob("diffusion_checkpoint_epoch_[1-9].pth")]:
        name.unlink()
    longer = lab.flags(folder, num_epochs=EPOCHS_OF_WORLDS, **flags)
    process = under_torchrun(lab, folder, num_epochs=EPOCHS_OF_WORLDS, **flags, resume=folder)
    process.communicate(timeout=600)
    for name in [*folder.glob("diffusion_checkpoint_epoch_[3-9].pth")]:
        name.unlink()
    wait(lab.fork([*longer, "--resume"]))
    losses = []
    for run in (straight, folder):
        rows = read_jsonl(run / "metrics.jsonl")
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    yield "" if worst < 1e-4 else f"relative difference {worst:.1e}"


EPOCHS_OF_WORLDS = 5
