"""Shared by all tests: no network, one thread, tiny gestures, tiny runs.

Why: tests of a trainer are only run if they are quick, so everything here is as small as it can
be while it still has the structure that is tested: 20 frames, 16 features, one block.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"  # of the subprocesses: the same sums in the same order
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_diffusion_ddim.py"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_diffusion_ddim as tdd  # noqa: E402
from trainlib.checkpoint import newest_checkpoint, save_checkpoint  # noqa: E402
from trainlib.state import TrainState  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, here and in the subprocesses
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of a shell script

L = 20  # frames of a tiny gesture
LAST = "diffusion_checkpoint_epoch_5.pth"  # of straight_run
TINY = {
    "seq_len": L,
    "d_model": 16,
    "num_layers": 1,
    "nhead": 2,
    "patch_size": 5,
    "num_timesteps": 50,
    "beta_schedule": "cosine",
    "prediction_type": "v",
    "contacts": False,
    "num_inference_steps": 3,
    "batch_size": 4,
    "num_epochs": 2,
    "log_interval": 1,
    "device": "cpu",
    "dropout": 0.1,  # so that its random numbers are part of what resume must repeat
}
WALL_CLOCK = {"train/epoch_s", "val/epoch_s", "sampling/time_per_sample"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker of `pytest -n` a whole part of the tests, of which idle ones steal.

    The default hands them out in pairs in the end: each worker then makes every fixture of a
    module, imports every package, and starts a browser of its own.
    """
    if config.getvalue("dist") != "load":  # another one was asked for
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def make_gestures(num, length=L, seed=0):
    """Linear gestures with both press edges inside the window, one touch each; (num, L, 3)."""
    rng = np.random.default_rng(seed)
    x = np.zeros((num, length, 3), np.float32)
    for gesture in x:
        n = rng.integers(3, length // 2)
        first = rng.integers(1, length - n)
        ends = rng.uniform(0.05, 0.95, (2, 2))
        gesture[first : first + n, :2] = np.linspace(*ends, n)
        gesture[first : first + n, 2] = 1
    return torch.from_numpy(x)


def press(length, *spans):
    """One gesture (1, L, 3) that is pressed in each [first, last], at (0.3, 0.6)."""
    x = torch.zeros(1, length, 3)
    for first, last in spans:
        x[0, first : last + 1] = torch.tensor([0.3, 0.6, 1.0])
    return x


def flipped(good, place, bit):
    """Bytes with one bit turned over."""
    damaged = bytearray(good)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def as_flags(**options):
    """Options as command-line arguments; True and False as --flag and --no-flag."""
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def read_jsonl(path):
    """Rows of a .jsonl file, read strictly: NaN and Infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} in {path}")

    lines = Path(path).read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def without_clock(rows):
    """Rows of metrics.jsonl but for what a clock measured."""
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]


def content_of(path):
    """The content of a checkpoint but for where it lies."""
    content = torch.load(path, weights_only=True)
    content["config"].pop("save_dir")
    return content


def assert_same_run(a, b):
    """Weights, EMA, optimizer and every logged number but the wall-clock ones."""
    assert_same_tree(content_of(newest_checkpoint(a)), content_of(newest_checkpoint(b)))
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        assert without_clock(read_jsonl(a / name)) == without_clock(read_jsonl(b / name))


def python(*argv, timeout=120, **env):
    """Run the interpreter in a new process; env entries of None are removed."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    environ = {k: v for k, v in environ.items() if v is not None}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environ,
        stdin=subprocess.DEVNULL,
    )


def in_a_child(run):
    """Run run(say) in a fork of this process, which has torch already; (exit code, what it said).

    To locks and signals it is as much another process as `python` starts, in a hundredth of the
    time.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reader)
            run(lambda text: os.write(writer, f"{text}\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def assert_same_tree(a, b, path="root"):
    """Two nested states are equal to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_tree(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with train/ (10 gestures in two files) and val/ (6, one of them idle)."""
    folder = tmp_path_factory.mktemp("data")
    train, val = make_gestures(10, seed=1).numpy(), make_gestures(6, seed=2).numpy()
    val[3] = 0
    for name, x in {"train/a": train[:7], "train/b": train[7:], "val/a": val}.items():
        path = folder / f"{name}_actions.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, x.reshape(-1, 3))
    return folder


@pytest.fixture(scope="session")
def tiny_flags(data):
    """Return f(**changes): the command line of a tiny run on `data`."""

    def flags(**changes):
        sets = {"data_dir": data / "train", "val_data_dir": data / "val"}
        return as_flags(**{**TINY, **sets, **changes})

    return flags


@pytest.fixture(scope="session")
def tiny_config(data):
    """Return f(**changes): the TrainConfig of a tiny run on `data`."""

    def config(**changes):
        sets = {"data_dir": str(data / "train"), "val_data_dir": str(data / "val")}
        return tdd.TrainConfig(**{**TINY, **sets, **changes})

    return config


@pytest.fixture
def new_state(tiny_config):
    """Return f(total_steps, **changes): the state of a new tiny run in this process."""

    def make(total_steps=10, **changes):
        config = tiny_config(**changes)
        torch.manual_seed(0)
        model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
        return TrainState(model, scheduler, config, total_steps, tdd.NUM_TASKS)

    return make


@pytest.fixture
def no_figures(monkeypatch):
    """Draw none: a tiny run in this process is then five times as quick."""
    monkeypatch.setattr(tdd, "log_figures", lambda *_: None)


@pytest.fixture
def replace_package(monkeypatch, tmp_path):
    """Return f(name, source): let the package consist of one file; None: of a folder without any.

    Returns the folder to put on the path of another process.
    """

    replaced = []

    def loaded(name):
        return [module for module in sys.modules if (module + ".").startswith(name + ".")]

    def write(name, source):
        replaced.append(name)
        package = tmp_path / "packages" / name
        package.mkdir(parents=True)
        if source is not None:
            (package / "__init__.py").write_text(source)
        for module in loaded(name):
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(package.parent)
        return package.parent

    yield write
    for name in replaced:  # before monkeypatch brings back the real one
        for module in loaded(name):
            del sys.modules[module]


@pytest.fixture
def cli(capsys):
    """Return f(*argv): run main(argv) in this process; (exit code, stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        code = tdd.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_module(capsys, monkeypatch):
    """Return f(name, *argv): `python -m name argv` in this process; (exit code, stdout, stderr)."""

    def run(name, *argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            runpy.run_module(name, run_name="__main__")
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli):
    """Return f(*argv): assert a user's mistake, one line and exit code 2; return the line."""

    def run(*argv):
        code, _, err = cli(*argv)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return run


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory, tiny_flags):
    """A finished run folder: 6 epochs of 5 steps, checkpoints after the third and the last.

    More than 20 steps, because the EMA of a shorter run is the model itself.
    """
    folder = tmp_path_factory.mktemp("straight") / "run"
    flags = tiny_flags(num_epochs=6, batch_size=2, save_every=3, save_dir=folder)
    done = python(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout, "utf-8")
    return folder


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory):
    """A run folder with the checkpoint of a small untrained denoiser of 250 frames."""
    folder = tmp_path_factory.mktemp("untrained")
    config = tdd.TrainConfig(d_model=16, num_layers=1, nhead=2, patch_size=25, num_timesteps=50)
    torch.manual_seed(0)
    model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
    state = TrainState(model, scheduler, config, config.num_epochs, tdd.NUM_TASKS)
    save_checkpoint(folder / "diffusion_checkpoint_epoch_0.pth", state.to_checkpoint(0, None))
    return folder
