"""The log of a run: strict JSON, cut back on resume, and nothing optional can stop a run.

Why: metrics.jsonl is the record; W&B and figures mirror it. A package that is missing or broken, a
server that is gone or a mode that is misspelt must cost a warning or a refusal, never the run.

    python -m pytest tests/test_run_log.py
"""

import os
import struct

import pytest
from conftest import SCRIPT, python, read_jsonl

from trainlib.checkpoint import load_checkpoint
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


def test_runs_without_matplotlib_wandb_and_tqdm(tmp_path, tiny_flags, straight_run):
    shim = tmp_path / "shim"
    for name in ("matplotlib", "wandb", "tqdm"):
        (shim / name).mkdir(parents=True)
        (shim / name / "__init__.py").write_text(f"raise ImportError('no {name}')\n")
    path = os.pathsep.join([str(shim), os.path.dirname(SCRIPT)])
    flags = tiny_flags(num_epochs=1, save_dir=tmp_path / "run")
    done = python(SCRIPT, *flags, PYTHONPATH=path, WANDB_MODE=None)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "diffusion_checkpoint_epoch_0.pth").exists()
    assert not list((tmp_path / "run" / "figures").iterdir())
    keys = set().union(*read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert keys == set().union(*read_jsonl(straight_run / "metrics.jsonl"))
