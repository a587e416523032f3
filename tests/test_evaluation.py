"""The report must refuse trivial answers, accept perfect ones, and know its own limits.

Each control is put in the model's place and must miss the plan's lines; a perfect recreation
meets them; the interpolation is held against loops; the Bayes oracle in the model's place scores
R = 1; the bootstrap covers a known mean; the command line writes strict, documented JSON.

    python -m pytest tests/test_evaluation.py
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from augmentation import generate_augmented_dataset
from augmentation.click_aug import draw_gestures, render
from evaluation import protocols
from evaluation.__main__ import main
from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.controls import interpolate, interpolation, make_controls, nearest, untrained_model
from evaluation.protocols import PLAN_LINES, Estimate, bootstrap
from train_diffusion_ddim import (
    TrainConfig,
    TrainState,
    build_model,
    build_scheduler,
    classify_gestures,
    compute_reconstruction_metrics,
    generation_metrics,
    gesture_metrics,
    load_model,
    save_checkpoint,
    to_data_units,
    to_model_units,
)

ROOT = Path(__file__).parents[1]
PRIOR = GesturePrior()
SMALL = {"d_model": 16, "num_layers": 1, "nhead": 2}


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


def test_every_control_in_place_of_the_model_is_refused(x_0, x_train, small):
    model, scheduler, config = small
    controls = make_controls(model, model, scheduler, x_train, config.sampling)
    tables, _ = protocols.keyframes(x_0, {"model": torch.clone, **controls})
    for name in controls:
        met = protocols.lines_met(tables["keyframes"][name])
        assert (set(met) == set(PLAN_LINES)) == (name == "interpolation"), (name, met)
        verdicts = protocols.judge(tables["keyframes"], name)
        assert (verdicts["all_lines"]["verdict"] == "met") == (name == "interpolation")


def test_perfect_recreation_meets_every_line(x_0, x_train, small):
    model, scheduler, config = small
    controls = make_controls(model, model, scheduler, x_train[:20], config.sampling)
    tables, recreated = protocols.keyframes(x_0, {"model": torch.clone, **controls})
    verdicts = protocols.judge(tables["keyframes"])
    # The known frames alone tell the type: no answer that keeps them can miss it.
    assert "given_frames_alone" in verdicts.pop("gesture_type_accuracy")["controls_that_meet_it"]
    assert set(verdicts) == {*PLAN_LINES, "all_lines"} - {"gesture_type_accuracy"}
    assert {v["verdict"] for v in verdicts.values()} == {"met"}
    assert all(v["controls_that_meet_it"] == [] for v in verdicts.values())
    assert torch.equal(recreated["model"], x_0)


def test_a_line_that_a_control_meets_is_not_discriminating(x_0):
    tables, _ = protocols.keyframes(x_0, {"model": torch.clone, "nearest": torch.clone})
    verdicts = protocols.judge(tables["keyframes"])
    assert {v["verdict"] for v in verdicts.values()} == {"not discriminating"}
    assert verdicts["mse"]["controls_that_meet_it"] == ["nearest"]


def test_the_limit_and_the_raw_weights_are_no_controls(x_0):
    others = {"model_raw_weights": torch.clone, "interpolation": interpolation}
    tables, _ = protocols.keyframes(x_0, {"model": torch.clone, **others})
    assert {v["verdict"] for v in protocols.judge(tables["keyframes"]).values()} == {"met"}


def test_gestures_without_press_edge_are_scored_apart(x_0):
    mixed = torch.cat([x_0[:6], torch.zeros(2, 250, 3), torch.ones(1, 250, 3)])
    tables, _ = protocols.keyframes(mixed, {"model": torch.clone})
    assert tables["keyframes"]["model"]["mse"].n == 6
    assert tables["keyframes_without_edge"]["model"]["mse"].n == 3
    assert list(protocols.keyframes(mixed[6:], {"model": torch.clone})[0]) == [
        "keyframes_without_edge"
    ]


def test_intervals_belong_to_the_trainers_values(x_0):
    recreated = x_0 + 0.06 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    scores = protocols.score_recreations(x_0, recreated)
    whole = compute_reconstruction_metrics(x_0, recreated) | gesture_metrics(x_0, recreated)
    assert {name: e.value for name, e in scores.items()} == whole
    assert {name for name, e in scores.items() if e.ci} == set(PLAN_LINES)
    active = (x_0[..., 2] > 0.5) | (recreated[..., 2] > 0.5)
    for name, each in protocols.sequence_scores(x_0, recreated).items():
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
    assert protocols.is_linear_gesture(x_0).all()
    bent = x_0.clone()
    bent[..., :2] = bent[..., :2] ** 2
    swipes = classify_gestures(bent) == 4
    assert not protocols.is_linear_gesture(bent)[swipes].all()


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
    table = protocols.denoise(
        oracle, oracle, scheduler, gestures(6), x_train[:50], prior=PRIOR,
        num_inference_steps=4, num_ddim=3,
    )  # fmt: skip
    assert list(table) == [f"sigma_{s}" for s in protocols.SIGMAS]
    for sigma, row in zip(protocols.SIGMAS, table.values(), strict=True):
        assert row["r"].value == pytest.approx(1, abs=2e-3)
        assert row["r_ddim"].value == pytest.approx(1, abs=2e-2)
        assert row["mse_identity"].value == pytest.approx(sigma**2, rel=0.1)
        assert row["mse_mmse"].value < row["mse_identity"].value / 50
        assert row["mse_one_shot"].n == 6 and row["mse_ddim"].n == 3


def test_without_a_prior_the_limits_are_left_out(small, x_train):
    model, scheduler, _ = small
    table = protocols.denoise(
        model, model, scheduler, gestures(3), x_train[:9], prior=None, num_inference_steps=2
    )
    row = table["sigma_0.4"]
    assert "r" not in row and "mse_mmse" not in row and row["mse_one_shot"].n == 3


def test_prior_is_read_from_manifest_or_data(tmp_path):
    made = generate_augmented_dataset(tmp_path / "a", 30, 0, 40, action_type="swipe")
    x = torch.from_numpy(np.load(made.folder / "batch_000000_actions.npy").reshape(-1, 250, 3))
    assert protocols.read_prior(made.folder, x) == GesturePrior(250, 1, 40, "diagonal") or (
        protocols.read_prior(made.folder, x) == GesturePrior(250, 1, 40, "swipe")
    )
    x = gestures(40, low=7, high=9)
    assert protocols.read_prior(tmp_path, x) == GesturePrior(250, 7, 9, "mixed")
    (tmp_path / "dataset.json").write_text('{"arguments": {"min_delta_t": "?"}}')
    clicks = x.clone()
    clicks[..., :2] = 0.5 * clicks[..., 2:]
    assert protocols.read_prior(tmp_path, clicks) == GesturePrior(250, 7, 9, "click")
    assert protocols.read_prior(tmp_path, 0 * clicks) == GesturePrior(250, 1, 250, "mixed")


# ----------------------------------------------------------------------------------------
# GENERATE
# ----------------------------------------------------------------------------------------


def spoil(x, factor):
    """Break one factor of validity in every sequence."""
    x = x.clone()
    pressed = x[..., 2] > 0.5
    if factor == "one_press":
        x[:, :4] = 1
        x[:, 4:6] = 0
    elif factor == "press_binary":
        x[..., 2] = torch.where(pressed, x[..., 2], 0.1)
    elif factor == "straight_and_even":
        wave = 0.1 * torch.sin(torch.arange(250.0) * 1.3)
        x[..., 0] += torch.where(pressed, wave, 0)
    elif factor == "idle_at_zero":
        x[..., :2] = torch.where(pressed[..., None], x[..., :2], 0.1)
    return x


@pytest.mark.parametrize("factor", ["press_binary", "straight_and_even", "idle_at_zero"])
def test_each_factor_of_validity_is_seen_alone(factor):
    checks = protocols.validity(spoil(gestures(30, low=20), factor), PRIOR)
    assert not checks.pop("valid").any() and not checks.pop(factor).any()
    assert all(ok.all() for ok in checks.values())


def test_validity_of_presses_and_durations():
    assert protocols.validity(gestures(50), PRIOR)["valid"].all()
    assert not protocols.validity(torch.zeros(2, 250, 3), PRIOR)["valid"].any()
    assert not protocols.validity(torch.ones(2, 250, 3), PRIOR)["duration_in_range"].any()
    short = gestures(20, low=4, high=4)
    assert not protocols.validity(short, PRIOR)["duration_in_range"].any()
    inside = torch.stack([x for x in gestures(60) if not x[:10, 2].any()])
    assert not protocols.validity(spoil(inside, "one_press"), PRIOR)["one_press"].any()


def test_line_residual_equals_polyfit():
    x = spoil(gestures(5, low=20), "straight_and_even")
    x[..., 1] += 0.05 * torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0))
    for sample, found in zip(x, protocols._line_rms(x), strict=True):
        frames = np.flatnonzero(sample[:, 2] > 0.5)
        xy = sample[frames, :2].double().numpy()
        fit = np.stack([np.polyval(np.polyfit(frames, v, 1), frames) for v in xy.T], axis=1)
        assert found == pytest.approx(np.sqrt(((xy - fit) ** 2).mean()), rel=1e-3)


def test_generation_scores_tell_new_gestures_from_copies(x_train):
    real = protocols.make_reference(x_train, gestures(400, seed=7))
    fresh = gestures(300, seed=8)
    table = protocols.generate_table({"model": fresh}, PRIOR, real)
    model = {name: e.value for name, e in table["model"].items()}
    assert model["valid"] == 1 and abs(model["duration_bias"]) < 0.1
    assert model["type_mix_error"] < 0.1
    assert model["nn_distance_ratio"] == pytest.approx(1, abs=0.1)
    assert table["training_items"]["nn_distance_ratio"].value == 0
    assert table["training_items"]["share_near_copies"].value == 1
    assert table["one_training_item"]["type_mix_error"].value > 0.5
    assert table["training_mean"]["valid"].value == table["zeros"]["valid"].value == 0
    assert table["zeros"]["line_rms"].n == 0 and table["model"]["line_rms"].value < 1e-6
    low, high = table["validation_data"]["share_nearer_to_train"].ci
    assert low < 0.5 < high
    trainer = generation_metrics(fresh)
    assert {k: model[k] for k in trainer} == pytest.approx(trainer)


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
    nn.init.normal_(model.output_projection.weight, std=0.1)
    state = TrainState.start(model, config, torch.device("cpu"))
    content = state.to_checkpoint(0, config, None)
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
    assert set(results["verdicts"]) == {*PLAN_LINES, "all_lines"}
    assert list(results["protocols"]) == ["keyframes", "denoise", "generate"]
    for table in results["protocols"].values():
        for row in table.values():
            for estimate in row.values():
                assert list(estimate) == ["value", "ci", "n"] and isinstance(estimate["n"], int)
                if estimate["ci"]:
                    low, high = estimate["ci"]
                    assert low <= high
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
        with open(folder / f"{protocol}.csv", newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert len(rows) == sum(len(row) for row in table.values())
        for row in rows:
            expected = table[row["setting"]][row["metric"]]
            assert int(row["n"]) == expected["n"]
            if expected["value"] is not None:
                assert float(row["value"]) == expected["value"]


def test_report_and_figures_are_there(quick_report):
    folder, printed = quick_report
    markdown = (folder / "report.md").read_text("utf-8")
    for name in ("recreated_gestures.png", "denoise_curve.png", "generated_gestures.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in markdown
    for word in ("nearest_training_item", "interpolation (limit)", "sigma_0.4", "not met"):
        assert word in markdown and word in printed


def test_raw_and_averaged_weights_are_both_loaded(checkpoint):
    content = torch.load(checkpoint / "diffusion_checkpoint_epoch_0.pth", weights_only=True)
    model, _, _ = load_model(checkpoint, ema=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["model"][name])


def test_a_set_without_edges_and_one_of_one_gesture(checkpoint, tmp_path):
    for name, actions in (("idle", np.zeros((500, 3))), ("one", gestures(1)[0].numpy())):
        data = tmp_path / name
        data.mkdir()
        np.save(data / "a_actions.npy", actions.astype(np.float32))
        out = tmp_path / f"report_{name}"
        argv = ["--checkpoint", str(checkpoint), "--data_dir", str(data), "--quick"]
        assert main([*argv, "--num_inference_steps", "2", "--output_dir", str(out)]) == 0
        results = json.loads((out / "results.json").read_text("utf-8"), parse_constant=refuse)
        assert ("keyframes" in results["protocols"]) == (name == "one")
        assert bool(results["verdicts"]) == (name == "one")


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
