"""The log of a run: strict JSON, cut back on resume, and nothing optional can stop a run.

Why: metrics.jsonl is the record; W&B and figures mirror it. A package that is missing or broken, a
server that is gone or a mode that is misspelt must cost a warning or a refusal, never the run.

    python -m pytest tests/test_run_log.py
"""

import os
import struct

import pytest
from conftest import SCRIPT, assert_same_run, make_gestures, python, read_jsonl

from trainlib.checkpoint import load_checkpoint
from trainlib.figures import visualize_action_sequences
from trainlib.run_log import RunLogger, read_metrics, resolve_wandb_mode

OPTIONS = {"wandb_mode": "disabled", "wandb_project": "x"}


def test_what_is_not_finite_becomes_null(tmp_path):
    with RunLogger(tmp_path / "run", OPTIONS) as log:
        log.scalars(3, {"a": 1.5, "b": float("nan"), "c": float("inf")})
    row = {"step": 3, "a": 1.5, "b": None, "c": None}
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [row]


def test_a_resumed_log_cuts_what_lies_beyond_and_a_torn_line(tmp_path):
    log = RunLogger(tmp_path, OPTIONS)
    for step in range(1, 6):
        log.scalars(step, {"a": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "a": 6.')
    assert [row["a"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    RunLogger(tmp_path, OPTIONS, step=3).scalars(4, {"a": 40.0})
    assert [row["a"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]


def wandb_records(path):
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format in 32 KiB blocks."""
    data, position, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_gets_the_same_keys(tmp_path, tiny_flags):
    """A real W&B run, offline, without a login; its own file is read back."""
    wandb_proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    flags = tiny_flags(num_epochs=1, save_dir=tmp_path / "run", wandb_mode="offline")
    done = python(SCRIPT, *flags, WANDB_MODE=None, WANDB_API_KEY=None, HOME=str(tmp_path))
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    keys = set()
    for data in wandb_records(file):
        record = wandb_proto.Record.FromString(data)
        keys |= {item.key or item.nested_key[0] for item in record.history.item}
    keys = {key for key in keys if not key.startswith("_")}
    logged = set().union(*read_jsonl(tmp_path / "run" / "metrics.jsonl")) - {"step"}
    images = {"val/reconstructions", "val/noise_comparison", "val/reconstruction_table"}
    assert keys == logged | images
    wandb_id = load_checkpoint(tmp_path / "run")["wandb_id"]
    assert wandb_id and wandb_id in file.name


def test_a_fault_of_wandb_never_stops_a_run(tmp_path, capsys):
    pytest.importorskip("wandb")

    class Broken:
        id = "abc"

        def log(self, *_, **__):
            raise ConnectionError("gone")

    with RunLogger(tmp_path, OPTIONS) as log:
        log.wandb = Broken()
        log.scalars(1, {"a": 1.0})
        log.scalars(2, {"a": 2.0})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().err.count("warning: W&B is off") == 1 and log.wandb is None


BROKEN = {  # name: the source of a package that is installed, but broken
    "missing": "raise ImportError('no module')",
    "of another NumPy": "raise AttributeError('np.float_ was removed in the NumPy 2.0 release.')",
    "of another protobuf": "raise TypeError('Descriptors cannot be created directly.')",
    "a library that is not there": "raise OSError('libGL.so.1: cannot open shared object file')",
    "without a word": "raise RuntimeError",
    "leaves": "import sys; sys.exit('this needs another Python')",
    "not of this Python": "print 'hello'",
    "empty": "",
    "raises when asked": "def __getattr__(name): raise ValueError('two\\nlines')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wandb_that_is_broken_costs_a_warning(replace_package, tmp_path, capsys, name):
    replace_package("wandb", BROKEN[name])
    for mode in ("offline", "online"):
        assert resolve_wandb_mode(mode) == "disabled"
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.startswith("warning: W&B is off"), err
    with RunLogger(tmp_path / "run", OPTIONS | {"wandb_mode": "offline"}) as log:
        log.scalars(1, {"a": 1.0})
        log.table(1, [{"b": 2}])
    assert read_metrics(tmp_path / "run") == [{"step": 1, "a": 1.0}]


@pytest.mark.parametrize("name", BROKEN)
def test_figures_that_cannot_be_drawn_cost_a_warning(replace_package, tmp_path, capsys, name):
    replace_package("matplotlib", BROKEN[name])
    x = make_gestures(2).numpy()
    with RunLogger(tmp_path / "run", OPTIONS) as log:
        for step in (1, 2):
            log.figure(step, "a/b", visualize_action_sequences, x, x, x)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: no figures from here on"), err
    assert not list((tmp_path / "run" / "figures").iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("backend", "module://matplotlib_inline.backend_inline"), ("text.usetex", True),
     ("font.family", "no such font"), ("mathtext.fontset", "custom")],
)  # fmt: skip
def test_settings_of_matplotlib_do_not_stop_a_run(tmp_path, capsys, setting, value):
    import matplotlib

    x = make_gestures(2).numpy()
    with RunLogger(tmp_path, OPTIONS) as log, matplotlib.rc_context():
        matplotlib.rcParams._set(setting, value)
        log.figure(1, "a/b", visualize_action_sequences, x, x, x)
    drawn, err = list((tmp_path / "figures").iterdir()), capsys.readouterr().err
    assert len(drawn) == 1 or err.startswith("warning: no figures from here on"), err


@pytest.mark.parametrize("value", ["offline", "dryrun", "disabled"])
def test_the_mode_of_the_environment_counts(monkeypatch, value):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", value)
    expected = {"dryrun": "offline"}.get(value, value)
    assert resolve_wandb_mode("auto") == expected
    assert resolve_wandb_mode("disabled") == "disabled"


@pytest.mark.parametrize(
    ("netrc", "expected"),
    [("machine api.wandb.ai login user password k\n", "online"), ("", "offline")],
)
def test_a_wandb_login_is_seen_without_asking_wandb(tmp_path, monkeypatch, netrc, expected):
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_wandb_mode("auto") == expected
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert resolve_wandb_mode("auto") == "online"


def test_a_run_without_its_optional_packages_has_the_same_bits(
    replace_package, tiny_flags, straight_run, tmp_path
):
    replace_package("matplotlib", "broken(")
    replace_package("wandb", "")
    folder = replace_package("tqdm", "raise ImportError")  # else torch stops too
    path = os.pathsep.join([str(folder), os.path.dirname(SCRIPT)])
    run = tmp_path / "run"
    flags = tiny_flags(num_epochs=6, batch_size=2, save_every=3, save_dir=run)
    done = python(SCRIPT, *flags, PYTHONPATH=path, WANDB_MODE=None)
    assert done.returncode == 0 and done.stderr.count("\n") == 2, done.stderr
    assert done.stderr.count("warning: ") == 2  # of W&B and of figures
    assert not list((run / "figures").iterdir())
    assert_same_run(run, straight_run)
