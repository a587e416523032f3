"""The folder of a whole run: what lies in it, and that its numbers are what they say.

Why: the folder is the record from which a run is judged, resumed and sampled, without W&B. Its JSON
must be strict, its keys those of the user's plan, and its last scores those of its last weights.

    python -m pytest tests/test_run_record.py
"""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import LAST, SCRIPT, TINY, L, make_gestures, read_jsonl, without_clock
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from train_diffusion_ddim import TrainConfig, load_model, lr_at
from trainlib.checkpoint import load_checkpoint
from trainlib.gestures import GESTURE_TYPES

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


def test_logged_numbers_are_what_they_say(straight_run):
    rows = read_jsonl(straight_run / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    for i, row in enumerate(by_epoch(rows)):
        mean = np.mean(losses[5 * i : 5 * i + 5])
        assert row["train/epoch_loss"] == pytest.approx(mean, rel=1e-5)
    lrs = [row["train/lr"] for row in rows if "train/lr" in row]
    assert lrs == [lr_at(step, 30, TrainConfig().lr) for step in range(30)]
    # the last row: the EMA weights of the last checkpoint on the whole validation set
    model, scheduler, config = load_model(straight_run)
    x_val = torch.from_numpy(tdd.DiffusionActionDataset(config.val_data_dir, L).sequences)
    scores, _ = tdd.validate(model, scheduler, x_val, config.sampling)
    for key in ("mse", "mean_snr_db", "temporal_iou", "loss"):
        assert rows[-1][f"final/{key}"] == pytest.approx(scores[key], rel=1e-5), key


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
        assert row["original_type"] in GESTURE_TYPES
        assert row["reconstructed_type"] in GESTURE_TYPES
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
    assert left == expected | {".lock", ".pid"}  # no temporary files


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


def test_without_clock_drops_only_what_a_clock_measures(straight_run):
    rows = read_jsonl(straight_run / "metrics.jsonl")
    dropped = set().union(*rows) - set().union(*without_clock(rows))
    assert dropped == {"train/epoch_s", "val/epoch_s", "sampling/time_per_sample"}


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


def test_the_checkpoint_of_the_plans_own_model_loads(no_figures, tmp_path):
    model = tdd.MinimalDiffusionTransformer(
        seq_len=L, d_model=16, nhead=2, num_layers=1, dim_feedforward=24, max_timesteps=100
    )
    scheduler = tdd.DDIMScheduler(num_timesteps=100)
    loaders = (DataLoader(list(make_gestures(4, seed=i)), batch_size=2) for i in (1, 2))
    run = tmp_path / "run"
    ema = tdd.train_diffusion_model(model, scheduler, *loaders, 1, 1e-3, "cpu", 1, run)
    loaded, its_scheduler, config = tdd.load_model(run)
    assert its_scheduler.prediction_type == "epsilon" and config.num_timesteps == 100
    assert config.dim_feedforward == 24 and not config.known_frames
    for ours, theirs in zip(loaded.parameters(), ema.parameters(), strict=True):
        assert torch.equal(ours, theirs)
