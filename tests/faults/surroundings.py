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
from tests.conftest import ROOT, L
from tests.faults.death import on_a_small_disk
from tests.faults.lab import (
    LAST,
    STEPS,
    Lab,
    Skipped,
    end_state,
    fault,
    need,
    no_figures,
    sha256,
    wait,
)
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


@fault("a run folder whose name is not UTF-8: exit 0, resumed, the same bits", quick=1, long=3)
def strange_names(lab: Lab, num: int) -> Iterator[str]:
    for name in (b"\xff\xfe", b"two\nlines", "ᾱ ·".encode())[:num]:
        folder = lab.new() / os.fsdecode(name)
        folder.parent.mkdir()
        code = wait(lab.fork(lab.flags(folder)))
        same = code == 0 and end_state(folder) == lab.digest
        yield lab.resumed(folder) if same else f"{name!r}: {code}, {lab.output()[-300:]}"


# ---- packages that are optional ----------------------------------------------------------

PACKAGES = {  # how each of them is broken
    "matplotlib": "raise AttributeError('_ARRAY_API not found')",
    "wandb": "raise TypeError('Descriptors cannot be created directly.')",
    "tqdm": "raise ImportError('no tqdm')",  # torch imports it too
    "matplotlib/figure": "import sys; sys.exit(3)",
    "wandb/sdk": "raise OSError('libprotobuf.so')",
}


@fault("matplotlib, wandb or tqdm installed but broken: a warning, exit 0, the same bits",
       quick=0, long=5)  # fmt: skip
def broken_packages(lab: Lab, num: int) -> Iterator[str]:
    for name, source in [*PACKAGES.items()][:num]:
        package, folder = lab.new(), lab.new()
        for part in (package / name, *(package / name).relative_to(package).parents):
            (package / part).mkdir(parents=True, exist_ok=True)
            (package / part / "__init__.py").touch()
        (package / name / "__init__.py").write_text(source)
        path = f"{package}{os.pathsep}{ROOT}"
        flags = lab.flags(folder, wandb_mode="offline" if "wandb" in name else "disabled")
        process = lab.train(*flags, env={"PYTHONPATH": path})
        reason = ends_like_the_undisturbed(lab, folder, process)
        yield f"{name}: {reason}" if reason else ""


@fault("--compile without a compiler, or in a temporary folder that is noexec: one line, exit 2",
       quick=0, long=2)  # fmt: skip
def no_compiler(lab: Lab, num: int) -> Iterator[str]:
    need("unshare")
    empty = lab.new()
    empty.mkdir()
    noexec = f'mount -t tmpfs -o noexec none {empty} && exec "$@"'
    shell = ["unshare", "-m", "sh", "-c", noexec, "sh"]
    caches = {"TMPDIR": str(empty), "TORCHINDUCTOR_CACHE_DIR": str(empty / "cache")}
    for prefix, env in (([], {"PATH": str(empty), "CXX": None}), (shell, caches))[:num]:
        process = lab.train(*lab.flags(lab.new(), compile=True), prefix=prefix, env=env)
        _, err = process.communicate(timeout=300)
        good = process.returncode == 2 and err.count("\n") == 1 and "--no-compile" in err
        yield "" if good else f"code {process.returncode}, {err[-300:]}"


# ---- two at once -------------------------------------------------------------------------


@fault("runs of the same second without --save_dir: a folder each, the same bits", quick=0, long=3)
def same_second(lab: Lab, num: int) -> Iterator[str]:
    for _ in range(num):
        place = lab.new()
        place.mkdir()
        flags = lab.flags(place)
        at = flags.index("--save_dir")
        del flags[at : at + 2]
        started = [lab.train(*flags, cwd=place) for _ in range(3)]
        codes = [process.communicate(timeout=300) and process.returncode for process in started]
        folders = [*(place / "runs").iterdir()]
        same = all(end_state(folder) == lab.digest for folder in folders)
        yield "" if codes == [0, 0, 0] and len(folders) == 3 and same else f"{codes}, {folders}"


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
        expected = "epoch", "warning: no figures"  # which the lab does without
        lines = lab.output().splitlines()  # first what the run is, up to its parameters
        first = next(i for i, line in enumerate(lines) if " parameters on " in line)
        errors = [line for line in lines[first + 1 :] if not line.startswith(expected)]
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


@fault("a batch, a model or a sample larger than ulimit -v: exit 1, one line, what to lower",
       quick=0, long=3)  # fmt: skip
def address_space(lab: Lab, num: int) -> Iterator[str]:
    limited = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash"]
    large = {"num_timesteps": 1000, "seq_len": L, "patch_size": 1}
    sample = ["--checkpoint", str(lab.straight), "--output_dir", str(lab.new())]
    for argv, words in (
        (lab.flags(lab.new(), d_model=40_000, **large), "--d_model"),
        (["--sample", "90000000", *sample], "--sample 90000000"),
        (lab.flags(lab.new(), dim_feedforward=2_000_000_000), "--dim_feedforward"),
    )[:num]:
        process = lab.train(*argv, prefix=limited, env={"WANDB_MODE": "disabled"})
        _, err = process.communicate(timeout=300)
        good = process.returncode == 1 and err.count("\n") == 1 and words in err
        yield "" if good else f"{argv[:4]}: code {process.returncode}, {err[-300:]}"


@fault("a sample from weights that diverged, finite or not: exit 1, no file", quick=2, long=3)
def diverged_sample(lab: Lab, num: int) -> Iterator[str]:
    content = torch.load(lab.straight / LAST, weights_only=True)
    for value in (float("nan"), 1e38, float("inf"))[:num]:
        for weights in content["ema_state_dict"].values():
            weights.fill_(value)
        folder, output = lab.new(), lab.new()
        folder.mkdir()
        torch.save(content, folder / LAST)
        argv = ["--sample", "4", "--checkpoint", str(folder), "--output_dir", str(output)]
        code = wait(lab.fork(argv))
        good = code == 1 and lab.output().count("\n") == 1 and not [*output.glob("*.npy")]
        yield "" if good else f"{value}: {code}, {lab.output()[-300:]}"


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
