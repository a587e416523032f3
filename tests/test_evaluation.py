"""The protocols must know their own limits, and the command must leave what it documents.

The interpolation is held against loops; the Bayes oracle in the model's place scores R = 1; the
bootstrap covers a known mean; the command line writes strict, documented JSON. What is made of the
numbers: test_report.py, test_page.py.

    python -m pytest tests/test_evaluation.py
"""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from augmentation import generate_augmented_dataset
from augmentation.click_aug import draw_gestures, render
from evaluation.__main__ import main
from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.controls import interpolate, interpolation, make_controls, nearest, untrained_model
from evaluation.criteria import PLAN_LINES
from evaluation.estimates import Estimate, bootstrap
from evaluation.family import is_linear_gesture, read_prior
from evaluation.protocol import Protocol, Section
from evaluation.protocols import PROTOCOLS
from evaluation.protocols.denoise import SIGMAS, denoise
from evaluation.protocols.keyframes import keyframes
from evaluation.scores import score_recreations, sequence_scores
from train_diffusion_ddim import (
    NUM_TASKS,
    TrainConfig,
    build_model,
    build_scheduler,
    load_model,
    to_data_units,
    to_model_units,
)
from trainlib.checkpoint import save_checkpoint
from trainlib.metrics import classify_gestures, compute_reconstruction_metrics, gesture_metrics
from trainlib.state import TrainState

PRIOR = GesturePrior()
SMALL = {"d_model": 16, "num_layers": 1, "nhead": 2}
TINY = {  # sizes for what only has to run
    "denoise": {"num_ddim": 1},
    "generate": {"limit": 8},
    "infill": {"num_conditions": 2, "num_samples": 2, "num_asked": 2},
    "realism": {"num": 8, "num_recreated": 4, "steps": (2,)},
    "invert": {"steps": (10,), "budget": 8, "num_exact": 0},
    "quality": {"num": 2},
    "error": {"num_frames": 2, "num_steps": 2},
    "excess_loss": {"num": 2, "num_bins": 3},
    "samplers": {"num": 2, "steps": (1, 2), "repeats": 1, "num_exact": 0},
}


def make_tiny(patch):
    """Patch `--quick` to be quicker still: few gestures, and nothing drawn."""
    dot = b"\x89PNG\r\n\x1a\n"
    tiny = tuple(replace(p, quick=TINY.get(p.name, p.quick)) for p in PROTOCOLS)
    patch.setattr("evaluation.__main__.PROTOCOLS", tiny)
    patch.setattr("evaluation.__main__.QUICK_GESTURES", 8)
    patch.setattr("evaluation.report.to_png", lambda _: dot)


def gestures(n, seed=0, low=5, high=75):
    """Mixed linear gestures, (n, 250, 3) float32."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render(draw_gestures(rng, n, "mixed", low, high)))


@pytest.fixture(scope="module")
def x_0():
    return gestures(48)


@pytest.fixture(scope="module")
def x_train():
    return gestures(2000, seed=1)


@pytest.fixture(scope="module")
def small():
    """A random network with its scheduler and config."""
    config = TrainConfig(**SMALL)
    return untrained_model(config, "cpu"), build_scheduler(config), config


class Oracle(nn.Module):
    """The Bayes denoiser in a model's place, for a scheduler that predicts x_0."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t):
        t = int(t[0])
        noisy = to_data_units(x_t.double() / self.scheduler.alpha_bar(t) ** 0.5)
        mean = posterior_mean(noisy.numpy(), self.scheduler.sigma(t), PRIOR)
        return to_model_units(torch.from_numpy(mean)).to(x_t)


# ----------------------------------------------------------------------------------------
# KEYFRAMES
# ----------------------------------------------------------------------------------------


def test_gestures_without_press_edge_are_scored_apart(x_0):
    mixed = torch.cat([x_0[:6], torch.zeros(2, 250, 3), torch.ones(1, 250, 3)])
    tables, _ = keyframes(mixed, {"model": torch.clone})
    assert tables["keyframes"]["model"]["mse"].n == 6
    assert tables["keyframes_without_edge"]["model"]["mse"].n == 3
    assert list(keyframes(mixed[6:], {"model": torch.clone})[0]) == ["keyframes_without_edge"]


def test_intervals_belong_to_the_trainers_values(x_0):
    recreated = x_0 + 0.06 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    scores = score_recreations(x_0, recreated)
    whole = compute_reconstruction_metrics(x_0, recreated) | gesture_metrics(x_0, recreated)
    assert {name: e.value for name, e in scores.items()} == whole
    assert {name for name, e in scores.items() if e.ci} == set(PLAN_LINES)
    active = (x_0[..., 2] > 0.5) | (recreated[..., 2] > 0.5)
    for name, each in sequence_scores(x_0, recreated).items():
        weight = active.sum(dim=1).numpy() if name == "spatial_accuracy" else None
        assert np.average(each, weights=weight) == pytest.approx(whole[name], rel=1e-4)
        low, high = scores[name].ci
        assert low <= whole[name] <= high and (low < high or whole[name] == 1)


def test_shuffled_condition_answers_another_gesture(small):
    _, scheduler, config = small

    class Repeat(nn.Module):  # answers with the known frames
        known_frames = True

        def forward(self, x_t, t, known, known_mask):
            return interpolate(known, known_mask)

    scheduler = build_scheduler(TrainConfig(**SMALL, prediction_type="x0"))
    x_0 = gestures(8)
    model = Repeat()
    controls = make_controls(model, model, scheduler, x_0, config.sampling)
    inside = x_0.roll(1, 0)
    assert torch.allclose(controls["untrained_model"](x_0), interpolation(x_0), atol=1e-3)
    assert torch.allclose(controls["shuffled_condition"](x_0), inside, atol=1e-3)


# ----------------------------------------------------------------------------------------
# CONTROLS
# ----------------------------------------------------------------------------------------


def interpolate_by_loops(known, mask):
    out = np.zeros_like(known)
    frames = np.flatnonzero(mask)
    for c in range(known.shape[1]):
        if len(frames):
            out[:, c] = np.interp(np.arange(len(known)), frames, known[frames, c])
    return out


def test_interpolation_equals_loops():
    known = gestures(12, seed=3)
    mask = torch.rand(12, 250, generator=torch.Generator().manual_seed(0)) < 0.03
    mask[0] = False
    mask[1] = torch.arange(250) == 100
    expected = [
        interpolate_by_loops(k.numpy(), m.numpy()) for k, m in zip(known, mask, strict=True)
    ]
    np.testing.assert_allclose(interpolate(known, mask), np.stack(expected), atol=1e-6)


def test_interpolation_is_exact_for_linear_gestures():
    x_0 = gestures(400, seed=4, low=1, high=249)  # some touch the border
    np.testing.assert_allclose(interpolation(x_0), x_0, atol=2e-6)
    assert is_linear_gesture(x_0).all()
    bent = x_0.clone()
    bent[..., :2] = bent[..., :2] ** 2
    swipes = classify_gestures(bent) == 4
    assert not is_linear_gesture(bent)[swipes].all()


def test_nearest_equals_loops():
    x, bank = gestures(7, seed=5), gestures(11, seed=6)
    bank[3] = x[2]
    distance, rows = nearest(x, bank, chunk=3)
    full = ((x[:, None] - bank[None]) ** 2).mean(dim=(2, 3)).sqrt()
    assert torch.equal(rows, full.argmin(dim=1)) and rows[2] == 3
    torch.testing.assert_close(distance, full.amin(dim=1))
    assert distance[2] == 0


def test_random_training_item_is_the_same_every_time(x_0, x_train, small):
    controls = make_controls(small[0], small[0], small[1], x_train, {})
    drawn = controls["random_training_item"]
    assert torch.equal(drawn(x_0), drawn(x_0))


# ----------------------------------------------------------------------------------------
# INTERVALS
# ----------------------------------------------------------------------------------------


def test_bootstrap_interval_covers_a_known_mean():
    rng = np.random.default_rng(0)
    mean, hits = math.exp(0.5), 0
    for _ in range(300):
        low, high = bootstrap(rng.lognormal(size=200)).ci
        hits += low <= mean <= high
    assert 0.88 <= hits / 300 <= 0.98  # 0.95 less the skew of 200 draws


def test_bootstrap_of_a_paired_ratio_is_sharp():
    rng = np.random.default_rng(0)
    difficulty = rng.lognormal(sigma=1.5, size=300)
    ratio = bootstrap(1.2 * difficulty, difficulty)
    assert ratio.value == pytest.approx(1.2) and ratio.ci == pytest.approx((1.2, 1.2))
    assert bootstrap([3.0]) == Estimate(3.0, None, 1)
    assert bootstrap([1, 2, 3], [0, 1, 1]) == Estimate(2.5, (2.0, 3.0), 2)
    assert math.isnan(bootstrap([]).value)
    assert bootstrap([1.0, 2.0]) == bootstrap([1.0, 2.0])


# ----------------------------------------------------------------------------------------
# DENOISE
# ----------------------------------------------------------------------------------------


def test_the_oracle_scores_one(x_train):
    scheduler = build_scheduler(TrainConfig(**SMALL, prediction_type="x0"))
    oracle = Oracle(scheduler)
    table = denoise(
        oracle, oracle, scheduler, gestures(6), x_train[:50], prior=PRIOR,
        num_inference_steps=4, num_ddim=3,
    )  # fmt: skip
    assert list(table) == [f"sigma_{s}" for s in SIGMAS]
    for sigma, row in zip(SIGMAS, table.values(), strict=True):
        assert row["r"].value == pytest.approx(1, abs=2e-3)
        assert row["r_ddim"].value == pytest.approx(1, abs=2e-2)
        assert row["mse_identity"].value == pytest.approx(sigma**2, rel=0.1)
        assert row["mse_mmse"].value < row["mse_identity"].value / 50
        assert row["mse_one_shot"].n == 6 and row["mse_ddim"].n == 3


def test_without_a_prior_the_limits_are_left_out(small, x_train):
    model, scheduler, _ = small
    table = denoise(
        model, model, scheduler, gestures(3), x_train[:9], prior=None, num_inference_steps=2
    )
    row = table["sigma_0.4"]
    assert "r" not in row and "mse_mmse" not in row and row["mse_one_shot"].n == 3


def test_prior_is_read_from_manifest_or_data(tmp_path):
    made = generate_augmented_dataset(tmp_path / "a", 30, 0, 40, action_type="swipe")
    x = torch.from_numpy(np.load(made.folder / "batch_000000_actions.npy").reshape(-1, 250, 3))
    assert read_prior(made.folder, x) == GesturePrior(250, 1, 40, "diagonal") or (
        read_prior(made.folder, x) == GesturePrior(250, 1, 40, "swipe")
    )
    x = gestures(40, low=7, high=9)
    assert read_prior(tmp_path, x) == GesturePrior(250, 7, 9, "mixed")
    (tmp_path / "dataset.json").write_text('{"arguments": {"min_delta_t": "?"}}')
    clicks = x.clone()
    clicks[..., :2] = 0.5 * clicks[..., 2:]
    assert read_prior(tmp_path, clicks) is None  # it says something else
    (tmp_path / "dataset.json").unlink()
    assert read_prior(tmp_path, clicks) == GesturePrior(250, 7, 9, "click")
    clicks[3] = 0
    assert read_prior(tmp_path, clicks) == GesturePrior(250, 7, 9, "click")
    assert read_prior(tmp_path, 0 * clicks) is None
    clicks[5, :, 2] = 1
    assert read_prior(tmp_path, clicks) is None  # one is pressed throughout


# ----------------------------------------------------------------------------------------
# COMMAND
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run folder with one checkpoint of a random network."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(**SMALL, data_dir=str(ROOT / "test_data_mini/train"))
    torch.manual_seed(0)
    model = build_model(config)
    for p in model.output_projection.parameters():
        nn.init.normal_(p, std=0.1)
    state = TrainState(model, build_scheduler(config), config, config.num_epochs, NUM_TASKS)
    content = state.to_checkpoint(0, None)
    save_checkpoint(folder / "diffusion_checkpoint_epoch_0.pth", content)
    return folder


@pytest.fixture(scope="module")
def quick_report(checkpoint, tmp_path_factory):
    """What `--quick` leaves and prints on the mini set, run as a user runs it."""
    folder = tmp_path_factory.mktemp("report")
    data = str(ROOT / "test_data_mini/val")
    argv = ["--checkpoint", str(checkpoint), "--data_dir", data, "--output_dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "evaluation", *argv, "--quick", "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_results_json_is_strict_and_as_documented(quick_report):
    text = (quick_report[0] / "results.json").read_text("utf-8")
    results = json.loads(text, parse_constant=refuse)
    assert list(results) == ["format", "about", "verdicts", "protocols"]
    assert {"keyframes", "denoise", "generate"} <= set(results["protocols"])
    for table in results["protocols"].values():
        for row in table.values():
            for estimate in row.values():
                assert list(estimate) == ["value", "ci", "n"] and isinstance(estimate["n"], int)
                if estimate["ci"]:
                    low, high = estimate["ci"]
                    assert low <= high
    words = {"met", "not met", "not discriminating", "not measured"}
    assert {v["verdict"] for v in results["verdicts"]} <= words
    for v in results["verdicts"]:
        if v["verdict"] != "not measured":
            judged = results["protocols"][v["protocol"]][v["setting"]][v["metric"]]
            assert judged == {name: v[name] for name in ("value", "ci", "n")}
    about = results["about"]
    assert about["quick"] and about["validation_sequences"] == 5
    assert {"platform", "cpu_count", "torch", "device"} <= set(about["machine"])
    assert about["command"].startswith("python -m evaluation --checkpoint")
    for name in ("date", "commit", "checkpoint", "wall_s"):
        assert name in about


def test_csv_and_json_agree(quick_report):
    folder, _ = quick_report
    results = json.loads((folder / "results.json").read_text("utf-8"))
    for protocol, table in results["protocols"].items():
        if not table:
            continue
        with open(folder / f"{protocol}.csv", newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert len(rows) == sum(len(row) for row in table.values())
        for row in rows:
            expected = table[row["setting"]][row["metric"]]
            assert int(row["n"]) == expected["n"]
            if expected["value"] is not None:
                assert float(row["value"]) == expected["value"]


def test_report_figures_and_what_is_printed(quick_report):
    folder, printed = quick_report
    markdown = (folder / "report.md").read_text("utf-8")
    for name in ("recreated_gestures.png", "denoise_curve.png", "generated_gestures.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in markdown
    for word in ("nearest training item", "interpolation (limit)", "sigma 0.4", "not measured"):
        assert word in markdown
    assert "not met" in printed and str(folder / "report.html") in printed
    assert re.search(r"keyframes +\d+\.\d s", printed)


def test_raw_and_averaged_weights_are_both_loaded(checkpoint):
    content = torch.load(checkpoint / "diffusion_checkpoint_epoch_0.pth", weights_only=True)
    model, _, _ = load_model(checkpoint, ema=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["model_state_dict"][name])


def test_a_set_without_edges_and_one_of_one_gesture(checkpoint, tmp_path, monkeypatch):
    make_tiny(monkeypatch)
    for name, actions in (("idle", np.zeros((500, 3))), ("one", gestures(1)[0].numpy())):
        data = tmp_path / name
        data.mkdir()
        np.save(data / "a_actions.npy", actions.astype(np.float32))
        out = tmp_path / f"report_{name}"
        argv = ["--checkpoint", str(checkpoint), "--data_dir", str(data), "--quick"]
        assert main([*argv, "--num_inference_steps", "2", "--output_dir", str(out)]) == 0
        results = json.loads((out / "results.json").read_text("utf-8"), parse_constant=refuse)
        assert ("keyframes" in results["protocols"]) == (name == "one")
        snr = next(v for v in results["verdicts"] if v["metric"] == "mean_snr_db")
        assert (snr["verdict"] == "not measured") == (name == "idle")


def test_a_protocol_is_its_function_and_a_row(checkpoint, tmp_path, monkeypatch):
    def run(s, num):
        table = {"model": {"share": Estimate(0.25, (0.2, 0.3), num)}, "zeros": {}}
        return [Section("halves", table, "Halves: a title", "What is asked.", {"share": "half"})]

    row = Protocol("halves", run, full={"num": 9}, quick={"num": 5})
    monkeypatch.setattr("evaluation.__main__.PROTOCOLS", (row,))
    data = str(ROOT / "test_data_mini/val")
    argv = ["--checkpoint", str(checkpoint), "--data_dir", data, "--output_dir", str(tmp_path)]
    assert main([*argv, "--quick"]) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    judged = {"value": 0.25, "ci": [0.2, 0.3], "n": 5}
    assert results["protocols"] == {"halves": {"model": {"share": judged}, "zeros": {}}}
    assert list(results["about"]["seconds"]) == ["halves"]
    assert "## Halves: a title" in (tmp_path / "report.md").read_text("utf-8")
    assert 'data-path="halves|model|share"' in (tmp_path / "report.html").read_text("utf-8")
    assert {v["verdict"] for v in results["verdicts"]} == {"not measured"}


def test_only_some_protocols(checkpoint, tmp_path, monkeypatch, capsys):
    make_tiny(monkeypatch)
    data = str(ROOT / "test_data_mini/val")
    argv = ["--checkpoint", str(checkpoint), "--data_dir", data, "--output_dir", str(tmp_path)]
    assert main([*argv, "--quick", "--only", "realism"]) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert list(results["protocols"]) == ["realism", "realism_recreated"]
    assert {v["protocol"] for v in results["verdicts"]} == set(results["protocols"])
    assert "Only realism: 7 of " in capsys.readouterr().out
    assert main([*argv, "--only", "realms"]) == 2


def test_only_what_draws_imports_matplotlib():
    names = ("bayes", "family", "criteria", "samples", "scores", "touch_down", "few_steps")
    code = f"import sys, {', '.join(f'evaluation.{name}' for name in names)};"
    code += "assert not [m for m in sys.modules if m.startswith('matplotlib')]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--checkpoint": "nowhere"}, "no diffusion_checkpoint_epoch"),
        ({"--data_dir": "nowhere"}, "no such folder: nowhere"),
        ({"--train_data_dir": "nowhere"}, "set --train_data_dir"),
        ({"--num_inference_steps": "0"}, "num_inference_steps"),
        ({"--num_inference_steps": "many"}, "invalid int value"),
        ({"--device": "tpu"}, "--device"),
        ({"--output_dir": "/dev/null/report"}, "--output_dir"),
        ({"--wandb_mode": "sometimes"}, "--wandb_mode"),
        ({"--unknown": "1"}, "unrecognized"),
    ],
)
def test_mistakes_end_in_one_line(change, said, checkpoint, tmp_path, capsys):
    data = str(ROOT / "test_data_mini/val")
    given = {"--checkpoint": str(checkpoint), "--data_dir": data, "--output_dir": str(tmp_path)}
    argv = [word for pair in (given | change).items() for word in pair]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.md"))
