"""The run folder: what is logged, that it can be trusted, and that it needs no W&B.

Why: the folder is the record from which a run is judged, resumed and sampled. Its JSON must be
strict, its checkpoints whole or refused, and opening one must never run code from it.

    python -m pytest tests/test_run_record.py
"""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPT,
    TINY,
    L,
    assert_same_tree,
    flipped,
    make_gestures,
    python,
    read_jsonl,
    without_clock,
)

import train_diffusion_ddim as tdd
from train_diffusion_ddim import (
    TrainConfig,
    load_model,
    visualize_action_sequences,
    visualize_noise_comparison,
)
from trainlib.checkpoint import (
    CHECKPOINT_FORMAT,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from trainlib.errors import UserError
from trainlib.run_log import RunLogger

LAST = "diffusion_checkpoint_epoch_5.pth"
PLAN_LOGGING_METRICS = [
    # the plan's logging_metrics
    *("train/loss", "train/grad_norm", "train/lr"),
    *("val/loss", "val/mse", "val/mae", "val/coord_mse", "val/press_mse"),
    *("val/active_coord_mse", "val/press_accuracy"),
    *("val/temporal_iou", "val/spatial_accuracy", "val/gesture_type_accuracy"),
    *("model/weight_norm", "model/activation_stats"),
    *("sampling/time_per_sample", "sampling/noise_reduction"),
    # its training loop, and the metrics that it says to watch
    *("train/epoch", "train/epoch_loss", "val/epoch", "val/mean_snr_db"),
    *(f"val/{kind}_ratio_{c}" for kind in ("variance", "smoothness") for c in "xyp"),
    *(f"val/{kind}_variance_{c}" for kind in ("orig", "recon") for c in "xyp"),
]
PLAN_TABLE = [
    *("epoch", "sample_id", "original_type", "reconstructed_type"),
    *("timing_accuracy", "spatial_accuracy", "overall_quality"),
]


def by_epoch(rows):
    return [row for row in rows if "val/epoch" in row]


# ---- what is in the folder -------------------------------------------------------------


def test_metrics_jsonl_is_strict_and_has_the_plans_keys(straight_run):
    rows = read_jsonl(straight_run / "metrics.jsonl")
    assert set(PLAN_LOGGING_METRICS) <= set().union(*rows)
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and steps[-1] == 30  # 6 epochs of 5 steps
    assert [row["val/epoch"] for row in by_epoch(rows)] == list(range(6))
    assert sum("train/loss" in row for row in rows) == 30  # log_interval 1
    for row in rows:
        values = [v for v in row.values() if v is not None]
        assert all(isinstance(v, int | float) for v in values)
    assert rows[-1]["final/sequences_without_edge"] == 1  # the idle one


def test_logged_numbers_are_what_they_say(straight_run, tiny_config):
    rows = read_jsonl(straight_run / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    for i, row in enumerate(by_epoch(rows)):
        mean = np.mean(losses[5 * i : 5 * i + 5])
        assert row["train/epoch_loss"] == pytest.approx(mean, rel=1e-5)
    config = tiny_config(num_epochs=6, batch_size=2)
    lrs = [row["train/lr"] for row in rows if "train/lr" in row]
    assert lrs == [tdd.lr_at(step, 30, config) for step in range(30)]
    # the last row: the EMA weights of the last checkpoint on the whole validation set
    model, scheduler, config = load_model(straight_run)
    x_val = torch.from_numpy(tdd.DiffusionActionDataset(config.val_data_dir, L).sequences)
    scores, _ = tdd.validate(model, scheduler, x_val, config.sampling)
    for key in ("mse", "mean_snr_db", "temporal_iou", "loss"):
        assert rows[-1][f"final/{key}"] == pytest.approx(scores[key], rel=1e-5), key


def test_the_commit_is_named_with_a_sign_of_changes(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(tdd, "__file__", str(tmp_path / "script.py"))
    assert tdd.git_commit() is None  # no repository
    (tmp_path / "script.py").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run(git + command, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert tdd.git_commit() == head.strip()
    (tmp_path / "script.py").write_text("changed")
    assert tdd.git_commit() == f"{head.strip()}-dirty"
    monkeypatch.setenv("PATH", "")
    assert tdd.git_commit() is None  # no git


def test_config_json_is_the_config(straight_run):
    saved = json.loads((straight_run / "config.json").read_text())
    made_by = saved.pop("made_by")
    assert made_by["argv"][0] == str(SCRIPT) and str(straight_run) in made_by["argv"]
    assert made_by["torch"] == torch.__version__ and {"python", "numpy", "commit"} < set(made_by)
    assert TrainConfig(**saved).num_epochs == 6
    assert saved["d_model"] == TINY["d_model"] and saved["save_dir"] == str(straight_run)
    assert saved == asdict(TrainConfig(**saved))


def test_the_table_has_the_plans_columns(straight_run):
    rows = read_jsonl(straight_run / "reconstructions.jsonl")
    assert {row["epoch"] for row in rows} == {0, 5}  # every tenth, and the last
    assert len(rows) == 2 * 6
    for row in rows:
        assert list(row)[-len(PLAN_TABLE) :] == PLAN_TABLE
        assert row["original_type"] in tdd.GESTURE_TYPES
        assert row["reconstructed_type"] in tdd.GESTURE_TYPES
        assert 0 <= row["overall_quality"] <= 1
    assert rows[3]["original_type"] == "none"


def test_figures_are_images_of_the_plan(straight_run):
    import matplotlib.image

    names = {path.name for path in (straight_run / "figures").iterdir()}
    keys = "val_reconstructions", "val_noise_comparison"
    assert names == {f"{key}_{step:06d}.png" for key in keys for step in (5, 30)}
    for path in (straight_run / "figures").iterdir():
        image = matplotlib.image.imread(path)
        assert image.ndim == 3 and min(image.shape[:2]) > 100 and image.std() > 0.01


def test_checkpoints_are_where_the_plan_has_them(straight_run):
    names = {path.name for path in straight_run.glob("*.pth")}
    assert names == {"diffusion_checkpoint_epoch_2.pth", LAST}
    left = {path.name for path in straight_run.iterdir()} - names
    expected = {"metrics.jsonl", "reconstructions.jsonl", "config.json", "figures", "stdout.txt"}
    assert left == expected | {".lock"}  # no temporary files


def test_stdout_is_plain_lines_that_end_in_commands(straight_run, cli, tmp_path):
    out = (straight_run / "stdout.txt").read_text()
    assert "\r" not in out and "\x1b" not in out and out.isascii()
    assert len(re.findall(r"^epoch \d/6 .*mse", out, re.MULTILINE)) == 6
    assert str(straight_run) in out and "one press" in out
    commands = out.replace("\\\n", " ")
    for word in ("resume ", "evaluate ", "sample "):
        assert re.search(rf"^  {word} +python ", commands, re.MULTILINE)
    sample = re.search(r"sample +python train_diffusion_ddim.py (.*)", commands).group(1)
    argv = sample.replace(f"{straight_run}/samples", str(tmp_path / "samples")).split()
    assert cli(*argv)[0] == 0 and (tmp_path / "samples").is_dir()


def test_figures_take_what_the_plan_gives_them():
    x, y, z = (make_gestures(3, seed=i).numpy() for i in range(3))
    figure = visualize_action_sequences(x, y, z, title_prefix="Epoch 0", max_samples=2)
    assert len(figure.axes) == 6 and "Epoch 0" in figure.axes[0].get_title()
    np.testing.assert_allclose(figure.axes[2].lines[1].get_ydata(), y[0, :, 1])
    assert len(visualize_action_sequences(x[:1], y[:1], z[:1], "").axes) == 3
    tensors = (torch.from_numpy(a) for a in (x, y, z))
    mask = np.zeros((3, L), bool)
    mask[:, 4] = True
    assert len(visualize_action_sequences(*tensors, known_mask=mask).axes) == 9
    heat = visualize_noise_comparison(x, y, z, title_prefix="Epoch 0", max_samples=2)
    images = [image for ax in heat.axes for image in ax.images]
    np.testing.assert_allclose(images[1].get_array(), np.abs(y[0] - x[0]).T.clip(1e-3))
    rmse = np.sqrt(np.mean((y[0] - x[0]) ** 2))
    assert f"{rmse:.3f}" in heat.axes[1].get_title()


# ---- the logger ------------------------------------------------------------------------


def test_what_is_not_finite_becomes_null(tmp_path):
    log = RunLogger(tmp_path / "run", TrainConfig())
    log.scalars(3, {"a": 1.5, "b": float("nan"), "c": float("inf")})
    log.close()
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 3, "a": 1.5, "b": None, "c": None}
    ]


def test_a_resumed_log_cuts_what_lies_beyond_and_a_torn_line(tmp_path):
    log = RunLogger(tmp_path, TrainConfig())
    for step in range(1, 6):
        log.scalars(step, {"a": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "a": 6.')
    RunLogger(tmp_path, TrainConfig(), step=3).scalars(4, {"a": 40.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["a"] for row in rows] == [1, 2, 3, 40]


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

    log = RunLogger(tmp_path, TrainConfig(wandb_mode="disabled"))
    log.wandb = Broken()
    log.scalars(1, {"a": 1.0})
    log.scalars(2, {"a": 2.0})
    log.close()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().err.count("warning: W&B is off") == 1 and log.wandb is None


@pytest.mark.parametrize("value", ["offline", "dryrun", "disabled"])
def test_the_mode_of_the_environment_counts(monkeypatch, value):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", value)
    expected = {"dryrun": "offline"}.get(value, value)
    assert tdd.resolve_wandb_mode("auto") == expected
    assert tdd.resolve_wandb_mode("disabled") == "disabled"


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


def test_an_ascii_terminal_is_enough(tmp_path, tiny_flags):
    flags = tiny_flags(num_epochs=1, save_dir=tmp_path / "run")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "DISPLAY": None}
    done = python(SCRIPT, *flags, **ascii_only, MPLBACKEND="TkAgg")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "figures").glob("*.png"))


# ---- checkpoints -----------------------------------------------------------------------


@pytest.fixture
def checkpoint(straight_run, tmp_path):
    return shutil.copy(straight_run / LAST, tmp_path / LAST)


def test_a_checkpoint_holds_plain_types_only(checkpoint):
    def check(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) in (str, int), path
                check(inner, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner, f"{path}[]")
        else:
            plain = str, int, float, bool, type(None), torch.Tensor
            assert type(value) in plain or isinstance(value, torch.Tensor), (path, type(value))

    content = torch.load(checkpoint, weights_only=True)
    assert {"model", "ema", "optimizers", "config", "epoch", "step", "format"} <= set(content)
    check({k: dict(v) if k in ("model", "ema") else v for k, v in content.items()}, "root")
    assert content["epoch"] == 5 and content["step"] == 30


def test_round_trip(tmp_path, checkpoint):
    content = load_checkpoint(checkpoint)
    content.pop("path")
    save_checkpoint(tmp_path / "again.pth", content)
    again = load_checkpoint(tmp_path / "again.pth")
    again.pop("path")
    assert_same_tree(content, again)


def test_load_model_takes_the_ema_and_is_ready_to_sample(straight_run):
    content = load_checkpoint(straight_run)
    model, scheduler, config = load_model(straight_run)
    raw, _, _ = load_model(straight_run / LAST, ema=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["ema_state_dict"][name])
        assert torch.equal(raw.state_dict()[name], content["model_state_dict"][name])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert scheduler.num_timesteps == config.num_timesteps == TINY["num_timesteps"]
    assert scheduler.prediction_type == config.prediction_type
    assert scheduler.spacing == config.spacing


def test_the_newest_is_the_highest_epoch_whatever_its_date(tmp_path):
    for i, epoch in enumerate((100, 9, 20)):
        path = tmp_path / f"diffusion_checkpoint_epoch_{epoch}.pth"
        path.touch()
        os.utime(path, (i, i))
    assert newest_checkpoint(tmp_path).name == "diffusion_checkpoint_epoch_100.pth"
    assert newest_checkpoint(path) == path
    for nothing in (tmp_path / "no", tmp_path / "no.pth"):
        with pytest.raises(UserError, match=str(nothing)):
            newest_checkpoint(nothing)


def test_a_flipped_bit_is_never_loaded(checkpoint, tmp_path):
    good, rng = checkpoint.read_bytes(), np.random.default_rng(0)
    reference = torch.load(checkpoint, weights_only=True)
    refused = 0
    for _ in range(100):
        path = tmp_path / "flipped.pth"
        path.write_bytes(flipped(good, rng.integers(len(good)), rng.integers(8)))
        try:
            content = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # padding, or a field of the archive that nobody reads
            content.pop("path")
            assert_same_tree(content, reference)
    assert refused > 50


@pytest.mark.parametrize("damage", ["folder", "prefix"])
def test_what_was_checked_is_what_is_loaded(tmp_path, damage):
    """Where torch's reader of archives would take other bytes than Python's.

    An entry marked as a folder it leaves unset; of two archives in one file it reads the first.
    """
    content = {"format": CHECKPOINT_FORMAT, "a": torch.rand(1000), "b": torch.rand(1000)}
    path = tmp_path / "x.pth"
    torch.save(content, path)
    good = path.read_bytes()
    if damage == "folder":
        (entry,) = re.finditer(rb"PK\x01\x02.{42}x/data/1", good, re.DOTALL)
        path.write_bytes(flipped(good, entry.start() + 38, 4))  # 0x10 of its external attributes
    else:
        path.write_bytes(flipped(good, good.index(content["b"].numpy().tobytes()), 4) + good)
    read = torch.load(path, weights_only=True)
    assert not torch.equal(read["b"], content["b"])  # or this test shows nothing
    assert_same_tree(load_checkpoint(path), content | {"path": path})


def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    good = checkpoint.read_bytes()
    for length in [0, 1, 100, *np.random.default_rng(0).integers(0, len(good), 20)]:
        path = tmp_path / "cut.pth"
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_checkpoint(path)


class Canary:
    """A pickle that leaves a trace when opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def as_zip(payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "in the optimizer", "raw pickle", "legacy", "zip"])
def test_a_malicious_checkpoint_is_inert(checkpoint, tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    content = torch.load(checkpoint, weights_only=True)
    if form == "torch":
        torch.save({"format": 1, "model": Canary(canary)}, path)
    elif form == "in the optimizer":
        content["optimizers"][0]["state"] = Canary(canary)
        torch.save(content, path)
    elif form == "legacy":
        torch.save({"x": Canary(canary)}, path, _use_new_zipfile_serialization=False)
    else:
        payload = pickle.dumps(Canary(canary))
        path.write_bytes(payload if form == "raw pickle" else as_zip(payload))
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_checkpoint(path)
    assert not canary.exists()
    if form == "torch":
        torch.load(path, weights_only=False)  # the canary does sing when it is opened
        assert canary.exists()


@pytest.mark.parametrize(("step", "age"), [(-2, "an older"), (1, "a newer")])
def test_formats_of_other_versions_are_refused(checkpoint, tmp_path, step, age):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"format": CHECKPOINT_FORMAT + step}, tmp_path / "other.pth")
    words = f"{age} version.*format {CHECKPOINT_FORMAT + step}.*{CHECKPOINT_FORMAT}"
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, torch.zeros(3)], ids=str)
def test_files_of_other_programs_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_file(checkpoint, monkeypatch, failing):
    before = checkpoint.read_bytes()

    def fail(*args, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match=r"epoch_5\.pth.*No space.*\d+ bytes needed, \d+ free"):
        save_checkpoint(checkpoint, {"format": 1})
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [LAST]


# ---- samples from a checkpoint ---------------------------------------------------------


@pytest.fixture(scope="module")
def pressing(straight_run, tmp_path_factory):
    """A checkpoint whose weights are so random that its samples press; the tiny run's are idle."""
    content = torch.load(straight_run / LAST, weights_only=True)
    torch.nn.init.normal_(content["ema_state_dict"]["output_projection.weight"])
    path = tmp_path_factory.mktemp("pressing") / LAST
    torch.save(content, path)
    return path


def sample(cli, checkpoint, folder, *argv, num=6):
    code, out, err = cli("--sample", num, "--checkpoint", checkpoint, "--output_dir", folder, *argv)
    assert code == 0 and err == "", err
    path = folder / "samples_actions.npy"
    assert str(path) in out
    return path


def test_samples_are_gestures_that_the_loader_reads(cli, pressing, tmp_path):
    path = sample(cli, pressing, tmp_path / "new" / "folder")
    x = tdd.DiffusionActionDataset(path.parent, L).sequences
    assert x.shape == (6, L, 3)
    assert set(np.unique(x[..., 2])) == {0, 1} and not x[x[..., 2] == 0].any()


def test_the_seed_decides(cli, pressing, tmp_path):
    def content(name, *argv):
        return sample(cli, pressing, tmp_path / name, *argv).read_bytes()

    first = content("a", "--seed", 3)
    assert content("b", "--seed", 3) == first
    assert content("c", "--seed", 4) != first
    assert content("d", "--seed", 3, "--num_inference_steps", 7) != first
    assert content("e", "--seed", 3, "--sampler", "ddim") != first
    assert content("f", "--seed", 3, "--eta", 0) != first


def test_known_frames_are_kept(cli, pressing, tmp_path, data):
    known = tdd.DiffusionActionDataset(data / "train", L).sequences[:6]
    for strategy in ("press_edges", "prefix"):
        flags = "--known_data_dir", data / "train", "--known_strategy", strategy, "--seed", 5
        path = sample(cli, pressing, tmp_path / strategy, *flags)
        torch.manual_seed(5)
        mask = tdd.KNOWN_STRATEGIES[strategy][0](torch.from_numpy(known)).numpy()
        x = np.load(path).reshape(6, L, 3)
        assert mask.any()
        np.testing.assert_allclose(x[mask], known[mask], atol=1e-6)
        assert not np.allclose(x[~mask], known[~mask], atol=0.01)


def test_mistakes_in_sampling(refused, cli, straight_run, tmp_path, data):
    args = ["--sample", 6, "--checkpoint", straight_run, "--output_dir", tmp_path]
    message = refused("--sample", 99, *args[2:], "--known_data_dir", data / "train")
    assert "10" in message and "99" in message
    assert "no/such" in refused(*args[:3], "no/such", *args[4:])
    assert "1001" in refused(*args, "--num_inference_steps", 1001)
    assert "--no_such" in refused(*args, "--no_such")
    assert cli(*args)[0] == 0
    assert "exists" in refused(*args)


@pytest.mark.parametrize("flag", [("--d_model", 32), ("--prediction_type", "x0")])
def test_a_flag_that_the_weights_contradict(refused, straight_run, tmp_path, flag):
    # The denoiser was trained for one prediction type: another would draw nonsense in silence.
    args = ["--sample", 2, "--checkpoint", straight_run, "--output_dir", tmp_path]
    message = refused(*args, *flag)
    assert flag[0] in message and not list(tmp_path.iterdir())


def test_without_clock_drops_only_what_a_clock_measures(straight_run):
    rows = read_jsonl(straight_run / "metrics.jsonl")
    dropped = set().union(*rows) - set().union(*without_clock(rows))
    assert dropped == {"train/epoch_s", "val/epoch_s", "sampling/time_per_sample"}
