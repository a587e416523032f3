"""The analyses must measure what they say: held against loops, closed forms and the Bayes oracle.

Errors around edges are held against plain loops, the estimates along the steps against steps
written here, the excess loss against the oracle in the model's place (none) and the closed form of
the irreducible loss; records are read as they were written; every figure is drawn.

    python -m pytest tests/test_analyses.py
"""

import json
import math
import time
import warnings
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_gestures, press, read_jsonl
from matplotlib.figure import Figure
from torch import nn

from augmentation import COMPLEXITY_LEVELS
from evaluation import few_steps, figures
from evaluation.bayes import DEFAULT_PRIOR, GesturePrior, posterior_mean
from evaluation.controls import interpolation, untrained_model, zeros
from evaluation.criteria import PLAN_LINES
from evaluation.estimates import Estimate
from evaluation.protocol import Subject
from evaluation.protocols import error, excess_loss, frontier, quality, samplers, training
from evaluation.protocols.error import FRAME_SPAN, around_edges
from evaluation.scores import measure_latencies
from train_diffusion_ddim import (
    DDIMScheduler,
    TrainConfig,
    build_scheduler,
    generate,
    noise_bank,
    press_edges,
    recreate,
    to_data_units,
    to_model_units,
    validate,
)
from trainlib.checkpoint import save_checkpoint
from trainlib.errors import UserError

L = 40
PRIOR = GesturePrior(L, 3, 12)
SAMPLING = {"num_inference_steps": 4, "eta": 0.0, "sampler": "ddim"}
SMALL = {"d_model": 16, "num_layers": 1, "nhead": 2, "patch_size": 5}


def draw(n, seed=0):
    """Gestures of PRIOR, (n, L, 3) float32."""
    return torch.from_numpy(PRIOR.draw(n, np.random.default_rng(seed))).float()


def small_model(**changes):
    """A random network that takes known frames, with its scheduler."""
    config = TrainConfig(**{**SMALL, "seq_len": L, "num_timesteps": 60, **changes})
    model = untrained_model(config, "cpu")
    with torch.no_grad():  # else its output layer is zero
        for p in model.output_projection.parameters():
            nn.init.normal_(p, std=0.2)
    return model, build_scheduler(config)


class Oracle(nn.Module):
    """The Bayes denoiser in the model's place, in the unit of the scheduler."""

    def __init__(self, scheduler, prior=PRIOR):
        super().__init__()
        self.scheduler, self.prior = scheduler, prior
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t):
        t = int(t[0])
        noisy = to_data_units(x_t.double() / self.scheduler.alpha_bar(t) ** 0.5)
        mean = posterior_mean(noisy.numpy(), self.scheduler.sigma(t), self.prior)
        u = to_model_units(torch.from_numpy(mean))
        eps = self.scheduler.eps_from_x_0(u, x_t.double(), t)
        return self.scheduler.target(u, eps, t).float()


class Constant(nn.Module):
    """Answer always the same x_0, in model units; takes known frames."""

    known_frames = True

    def __init__(self, value, wait_s=0.0):
        super().__init__()
        self.value, self.wait_s = value, wait_s
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, known=None, known_mask=None):
        time.sleep(self.wait_s)
        return torch.full_like(x_t, self.value)


def x0_scheduler(num_timesteps=60):
    return DDIMScheduler(num_timesteps, beta_schedule="cosine", prediction_type="x0")


# ----------------------------------------------------------------------------------------
# QUALITY
# ----------------------------------------------------------------------------------------


def test_gestures_are_split_by_the_plans_type():
    x_0 = torch.cat([press(L, (5, 9)), torch.zeros(1, L, 3), press(L, (0, L - 1)), draw(40)])
    x_0[0, 5:10, 0] = torch.linspace(0.1, 0.9, 5)  # a horizontal swipe
    groups = quality.split_by_type(x_0)
    assert torch.equal(groups["horizontal"][0], x_0[0])
    # neither the idle gesture nor the one without an edge is there
    assert sum(len(x) for x in groups.values()) == 41
    assert "none" not in groups


def test_levels_are_fixed_and_last_as_long_as_the_plan_says():
    levels = quality.draw_levels(64, 250)
    assert len(levels) == len(COMPLEXITY_LEVELS) == 3
    for x_0, again, level in zip(
        levels.values(), quality.draw_levels(64, 250).values(), COMPLEXITY_LEVELS, strict=True
    ):
        assert torch.equal(x_0, again) and x_0.shape == (64, 250, 3)
        frames = x_0[..., 2].sum(dim=1)
        assert level["min_delta_t"] <= frames.min() and frames.max() <= level["max_delta_t"]
    assert list(quality.draw_levels(4, 40)) == ["simple, 5-15 frames", "medium, 10-40 frames"]


def test_quality_is_that_of_each_group():
    groups = {"a": draw(6), "b": draw(5, seed=1)}
    table, recreated = quality.quality_by_group(
        groups, {"zeros": zeros, "interpolation": interpolation}
    )
    assert set(table) == {"a/zeros", "a/interpolation", "b/zeros", "b/interpolation"}
    for name, x_0 in groups.items():
        assert table[f"{name}/zeros"]["mse"].value == pytest.approx(
            float((x_0**2).mean()), rel=1e-5
        )
        assert table[f"{name}/zeros"]["mse"].n == len(x_0)
        assert table[f"{name}/interpolation"]["temporal_iou"].value == 1
        assert torch.equal(recreated[name]["zeros"], torch.zeros_like(x_0))


# ----------------------------------------------------------------------------------------
# WHERE THE ERROR SITS
# ----------------------------------------------------------------------------------------


def loop_around_edges(error, x_0, edge):
    """`around_edges`, gesture by gesture and frame by frame."""
    found = {offset: [] for offset in FRAME_SPAN[edge]}
    for e, x in zip(error.numpy(), x_0.numpy(), strict=True):
        down = [i for i in range(len(x)) if x[i, 2] > 0.5]
        if not down or down != list(range(down[0], down[-1] + 1)):
            continue
        at = down[0] if edge == "touch_down" else down[-1] + 1
        if not 1 <= at <= len(x) - 1:
            continue
        for offset, values in found.items():
            frame = at + offset
            inside = frame in down
            belongs = inside == (offset >= 0 if edge == "touch_down" else offset < 0)
            if 0 <= frame < len(x) and belongs:
                values.append(e[frame])
    return found


@pytest.mark.parametrize("edge", ["touch_down", "lift_off"])
def test_errors_around_edges_are_those_of_a_loop(edge):
    at_ends = [press(L, (0, 4)), press(L, (30, L - 1)), press(L, (3, 5), (20, 30)), draw(30)]
    x_0 = torch.cat([*at_ends, torch.zeros(1, L, 3)])
    error = torch.rand(len(x_0), L, dtype=torch.float64)
    means = around_edges(error, x_0, edge)
    for offset, values in loop_around_edges(error, x_0, edge).items():
        assert means[offset].n == len(values)
        if values:
            assert means[offset].value == pytest.approx(np.mean(values))
    assert means[0].n == 31  # of 34: one touches the edge, one presses twice, one is idle


def test_given_frames_have_no_error_and_the_oracle_is_its_own_limit():
    model, scheduler = small_model()
    x_0 = draw(12)
    table = error.error_by_frame(
        model, scheduler, x_0, draw(50, seed=1), sampling=SAMPLING, prior=PRIOR
    )
    for edge in ("touch_down", "lift_off"):  # the frames on both sides of an edge are known
        for offset in (-1, 0):
            assert table[f"keyframes/{edge}{offset:+d}"]["mse_model"].value < 1e-12
        assert table[f"keyframes/{edge}+1"]["mse_model"].value > 1e-4
    scheduler = x0_scheduler()
    table = error.error_by_frame(
        Oracle(scheduler), scheduler, x_0, draw(50, seed=1), sampling=SAMPLING, prior=PRIOR
    )
    row = table["denoise/touch_down+0"]
    assert row["mse_model"].value == pytest.approx(row["mse_bayes"].value, rel=1e-4)
    assert row["mse_bayes"].value > 0


@pytest.mark.parametrize("n", [5, 300])  # 300: more than one batch
def test_recorded_estimates_are_those_of_the_sampler(n):
    model, scheduler = small_model()
    x_0 = draw(n)
    estimates = error.record_x_0(model, scheduler, x_0, **SAMPLING)
    assert len(estimates) == 4 and not model._forward_hooks
    known, mask, x_t = to_model_units(x_0), press_edges(x_0), noise_bank(x_0.shape)
    for estimate, (t, t_prev) in zip(estimates, scheduler.timestep_pairs(4), strict=True):
        output = model(x_t, torch.full((n,), t), known, mask)
        x_0_pred = torch.where(mask[..., None], known, output.clamp(-1, 1))
        assert torch.allclose(estimate, to_data_units(x_0_pred), atol=1e-5)
        x_t = scheduler.step(x_0_pred, x_t, t, t_prev)
    assert torch.allclose(estimates[-1], recreate(model, scheduler, x_0, **SAMPLING), atol=1e-5)


def test_error_by_step_of_a_constant_answer():
    x_0, scheduler = draw(8), x0_scheduler()
    model = Constant(to_model_units(torch.tensor(0.25)).item())
    table = error.error_by_step(model, scheduler, x_0, sampling=SAMPLING, prior=PRIOR)
    by_hand = ((x_0 - 0.25) ** 2 * ~press_edges(x_0)[..., None]).mean()
    assert list(table) == ["step_1", "step_2", "step_3", "step_4"]
    for row, (t, _) in zip(table.values(), scheduler.timestep_pairs(4), strict=True):
        assert row["mse_model"].value == pytest.approx(float(by_hand), rel=1e-5)
        assert row["sigma"].value == scheduler.sigma(t)
    bayes = [row["mse_bayes"].value for row in table.values()]
    assert bayes == sorted(bayes, reverse=True) and table["step_1"]["mse_bayes"].n == 2


# ----------------------------------------------------------------------------------------
# EXCESS LOSS
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["x0", "v", "epsilon"])
def test_the_oracle_leaves_no_excess_loss(prediction_type):
    scheduler = DDIMScheduler(200, beta_schedule="cosine", prediction_type=prediction_type)
    table = excess_loss.excess_loss(Oracle(scheduler), scheduler, draw(8), PRIOR, num_bins=5)
    assert list(table) == ["t_20", "t_60", "t_100", "t_140", "t_180"]
    for row in table.values():
        assert row["irreducible_loss"].value > 0
        assert abs(row["excess_ratio"].value) < 1e-3
        assert row["excess_loss"].value == pytest.approx(0, abs=1e-3 * row["loss"].value)


def test_irreducible_loss_is_its_closed_form_and_the_loss_that_of_the_answer():
    x_0, scheduler = draw(8), DDIMScheduler(200, beta_schedule="cosine")
    eps = noise_bank(x_0.shape)
    table = excess_loss.excess_loss(Constant(0.5), scheduler, x_0, PRIOR, num_bins=4)
    for setting, row in table.items():
        sigma = scheduler.sigma(int(setting.removeprefix("t_")))
        noisy = (x_0 + sigma * eps).double().numpy()
        mmse = float(((posterior_mean(noisy, sigma, PRIOR) - x_0.numpy()) ** 2).mean())
        assert row["irreducible_loss"].value == pytest.approx(mmse / sigma**2, rel=1e-3)
        assert row["loss"].value == pytest.approx(float(((eps - 0.5) ** 2).mean()), rel=1e-5)
        excess = row["loss"].value - row["irreducible_loss"].value
        assert row["excess_loss"].value == pytest.approx(excess)
        ratio = excess / row["irreducible_loss"].value
        assert row["excess_ratio"].value == pytest.approx(ratio)


def test_limits_are_what_the_oracle_scores_in_the_trainers_validation():
    scheduler, x_0 = x0_scheduler(200), draw(8)
    limits = training.denoise_limits(scheduler, x_0, PRIOR)
    scores, _ = validate(Oracle(scheduler), scheduler, x_0, SAMPLING)
    assert len(limits) == 3
    for sigma, limit in limits.items():
        assert limit == pytest.approx(scores[f"denoise_mse_sigma_{sigma}"], rel=1e-3)
    assert training.denoise_limits(scheduler, torch.zeros_like(x_0), PRIOR) == {}


# ----------------------------------------------------------------------------------------
# STEPS
# ----------------------------------------------------------------------------------------


def test_durations_by_hand():
    parts = [press(L, (5, 7)), press(L, (9, 13)), press(L, (3, 4), (8, 9)), torch.zeros(1, L, 3)]
    scores = few_steps.score_durations(torch.cat(parts), PRIOR)  # 3 to 12 frames: 7.5 on average
    assert scores["one_press"].value == 0.5 and scores["valid"].value == 0.5
    assert scores["mean_duration"].value == 4 and scores["mean_duration"].n == 2
    assert scores["duration_bias"].value == pytest.approx(4 / 7.5 - 1)
    none = few_steps.score_durations(torch.zeros(2, L, 3), PRIOR)
    assert math.isnan(none["mean_duration"].value) and none["mean_duration"].n == 0


def test_latency_counts_every_step():
    model = Constant(0.0, wait_s=0.004)
    calls = {
        name: partial(generate, model, x0_scheduler(), (1, L, 3), steps)
        for name, steps in {"five": 5, "two": 2}.items()
    }
    latencies = measure_latencies(calls, torch.device("cpu"), 3)
    for name, least in {"five": 20, "two": 8}.items():
        low, high = latencies[name].ci
        assert least <= low <= latencies[name].value <= high and latencies[name].n == 3
    assert latencies["five"].value > latencies["two"].value


def test_sweep_agrees_with_the_sampler():
    model, scheduler = small_model()
    x_0 = draw(6)
    table = samplers.sampler_sweep(model, scheduler, x_0, PRIOR, steps=(1, 4, 61), repeats=1)
    assert set(table) == {f"{s}/{n}" for s in samplers.SAMPLERS for n in (1, 4)}  # T = 60
    for name, options in samplers.SAMPLERS.items():
        mse = float(((recreate(model, scheduler, x_0, 4, **options) - x_0) ** 2).mean())
        assert table[f"{name}/4"]["mse"].value == pytest.approx(mse, rel=1e-5)
        # one step lands on the first estimate, whatever the sampler
        assert table[f"{name}/1"]["mse"].value == table["ddim/1"]["mse"].value
    assert table["ddim/4"]["mse"].value != table["ddim_eta_1/4"]["mse"].value
    unconditional = untrained_model(TrainConfig(**SMALL, seq_len=L, known_frames=False), "cpu")
    table = samplers.sampler_sweep(unconditional, scheduler, x_0, PRIOR, steps=(2, 50), repeats=1)
    assert "ddim/2" in table and "ddim/50" not in table  # sigma 0.4 is below t = 50


def test_one_step_of_the_exact_score_is_the_posterior_mean():
    scheduler = x0_scheduler()
    t, _ = scheduler.timestep_pairs(1)[0]
    y = to_data_units(noise_bank((6, L, 3)).double() / scheduler.alpha_bar(t) ** 0.5)
    mean = torch.from_numpy(posterior_mean(y.numpy(), scheduler.sigma(t), PRIOR))
    table = few_steps.exact_few_steps(scheduler, PRIOR, [1, 3], 6)
    assert list(table) == ["exact/1", "exact/3"]
    by_hand = few_steps.score_durations(mean, PRIOR)
    assert table["exact/1"]["valid"] == by_hand["valid"]
    assert table["exact/1"]["one_press"] == by_hand["one_press"]


def test_exact_scores_are_read_only_for_the_same_prior_and_noise(tmp_path):
    path, scheduler = tmp_path / "few.json", x0_scheduler()
    row = {"valid": Estimate(0.5, (0.25, 0.75), 8), "mean_duration": Estimate(math.nan, None, 0)}
    few_steps.write_exact_few_steps(scheduler, PRIOR, {"exact/3": row, "exact/5": row}, path)
    newer = {"valid": Estimate(0.75, (0.5, 1.0), 9)}
    few_steps.write_exact_few_steps(scheduler, PRIOR, {"exact/3": newer}, path)
    read = few_steps.read_exact_few_steps(scheduler, PRIOR, (2, 3, 5, 99), path)
    assert read == {"exact/3": newer, "exact/5": {"valid": row["valid"]}}
    other = DDIMScheduler(60, beta_schedule="cosine", spacing="linspace")
    assert few_steps.read_exact_few_steps(other, PRIOR, (3,), path) == {}
    assert few_steps.read_exact_few_steps(scheduler, GesturePrior(L, 3, 13), (3,), path) == {}


def test_the_file_of_exact_scores_is_about_the_default_recipe():
    steps = [n for n in samplers.STEPS if n > 1]
    table = few_steps.read_exact_few_steps(build_scheduler(TrainConfig()), DEFAULT_PRIOR, steps)
    assert set(table) == {f"exact/{n}" for n in steps}, "run python -m evaluation.few_steps"
    # SCIENCE: every exact sample is valid from 10 steps on, and few steps shorten
    assert table["exact/10"]["valid"].value > 0.97
    assert table["exact/2"]["duration_bias"].ci[1] < table["exact/10"]["duration_bias"].ci[0] < 0.1


# ----------------------------------------------------------------------------------------
# RECORDS
# ----------------------------------------------------------------------------------------


def model_record(name, parameters, mse):
    scores = dict(zip(PLAN_LINES, (mse, 30.0, 0.99, 0.99, 0.99), strict=True))
    return {
        "name": name,
        "options": {"d_model": 32},
        "parameters": parameters,
        "keyframes": scores,
        "r": {"0.1": 1.3, "0.4": 1.2},
        "one_press": 0.9,
        "valid": 0.8,
        "latency_ms": 7.5,
    }


def test_frontier_is_read_as_written(tmp_path):
    path = tmp_path / "frontier.json"
    assert frontier.read_frontier(path) is None
    path.write_text(json.dumps([model_record("small", 40_000, 0.01)]))
    row = frontier.read_frontier(path)["small"]
    assert row["parameters"].value == 40_000 and row["r_0.4"].value == 1.2
    assert row["mse"].value == 0.01 and row["latency_ms"].value == 7.5
    for broken in ("{", "[{}]", '[{"name": 1}]', "[3]"):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"frontier\.json"):
            frontier.read_frontier(path)


def test_convergence_is_the_runs_record(straight_run, tmp_path):
    table = training.convergence_table(training.read_record(straight_run))
    logged = [row for row in read_jsonl(straight_run / "metrics.jsonl") if "val/epoch" in row]
    assert list(table) == [f"epoch_{e}" for e in range(6)]
    for row, line in zip(table.values(), logged, strict=True):
        assert row["val_loss"].value == line["val/loss"]
        assert row["train_loss"].value == line["train/epoch_loss"]
        assert row["denoise_mse_sigma_0.4"].value == line["val/denoise_mse_sigma_0.4"]
    path = tmp_path / "metrics.jsonl"
    assert training.read_record(tmp_path) == [] and training.convergence_table([]) == {}
    path.write_text('{"step": 1}\n{"val/epoch": 0, "val/loss": null}\n')
    table = training.convergence_table(training.read_record(tmp_path))
    assert math.isnan(table["epoch_0"]["val_loss"].value)


# ----------------------------------------------------------------------------------------
# FIGURES
# ----------------------------------------------------------------------------------------


def texts(figure):
    """Everything that is written in a figure."""
    return [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_labels_keep_their_order_and_do_not_overlap():
    figure = Figure()
    ax = figure.subplots()
    ax.set_ylim(0, 1)
    wanted = [(0.5, "b", "k"), (0.51, "c\nc", "k"), (0.49, "a", "k"), (0.9, "d", "k")]
    figures.label_right(ax, wanted, gap=0.1)
    placed = {t.get_text(): t.xy[1] for t in ax.texts if t.get_text()}
    assert sorted(placed, key=placed.get) == ["a", "b", "c\nc", "d"]
    assert placed["b"] - placed["a"] > 0.099 and placed["c\nc"] - placed["b"] > 0.149
    assert placed["d"] == pytest.approx(0.9)  # undisturbed


def subject(folder, model, scheduler, config, x_0, x_train, prior):
    """What the protocols are given, with a checkpoint of the sixth epoch and no weights."""
    checkpoint = folder / "diffusion_checkpoint_epoch_5.pth"
    save_checkpoint(checkpoint, {"epoch": 5, "step": 60, "config": asdict(config)})
    networks = {"model": model, "raw_model": model, "untrained": model}
    return Subject(
        checkpoint=checkpoint,
        folders=(folder,),
        **networks,
        scheduler=scheduler,
        config=config,
        sampling=SAMPLING,
        x_val=x_0,
        x_train=x_train,
        prior=prior,
    )


def run_analyses(s, *, num_exact):
    """The plan's analyses, each on a few gestures: their sections by name."""
    sections = [
        *quality.run(s, num=4),
        *error.run(s, num_frames=4, num_steps=4),
        *excess_loss.run(s, num=4, num_bins=3),
        *samplers.run(s, num=4, repeats=1, num_exact=num_exact, steps=(1, 2)),
        *frontier.run(s),
        *training.run(s),
    ]
    return {section.name: section for section in sections}


FIGURES = [
    *("quality_by_group.png", "patterns.png", "error_by_frame.png", "error_by_step.png"),
    *("excess_loss.png", "sampler_sweep.png", "few_step_bias.png", "frontier.png"),
    "convergence.png",
]


def test_all_figures_are_drawn_from_a_model_as_it_comes(tmp_path, monkeypatch, capsys):
    config = TrainConfig(**SMALL)
    model, scheduler = untrained_model(config, "cpu"), build_scheduler(config)
    x_0 = torch.from_numpy(DEFAULT_PRIOR.draw(12, np.random.default_rng(0))).float()
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps([model_record("a", 4e4, 0.01), model_record("b", 1e5, 1e-4)]))
    monkeypatch.setattr(frontier, "FRONTIER", path)
    monkeypatch.setattr(samplers, "EXACT_STEPS", (2,))
    keys = (*training.METRICS, "val/denoise_mse_sigma_0.2")
    lines = [{"step": 10, "val/epoch": e} | {key: 1 / (e + 1) for key in keys} for e in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    x_train = make_gestures(20, length=250)
    s = subject(tmp_path, model, scheduler, config, x_0, x_train, DEFAULT_PRIOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sections = run_analyses(s, num_exact=2)
        drawn = {p.name: p for section in sections.values() for p in section.pictures}
        for name, picture in drawn.items():
            picture.figure.savefig(tmp_path / name, dpi=40)
    assert list(drawn) == FIGURES and "note" not in capsys.readouterr().out
    for picture in drawn.values():
        assert picture.caption and picture.figure.get_suptitle()
        assert not [text for text in texts(picture.figure) if "nan" in text]
    assert "Not a training gesture" in "".join(texts(drawn["patterns.png"].figure))
    assert "limit (Bayes)" in texts(drawn["convergence.png"].figure)
    assert "100,000 parameters reach" in drawn["frontier.png"].figure.get_suptitle()
    assert sections["quality_of_patterns"].table["corner_clicks/model"]["mse"].n == 4
    assert sections["training"].table["model"]["epochs_to_converge"].value == 6


def test_what_cannot_be_measured_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    model, scheduler = small_model()
    x_0 = torch.cat([press(L, (3, 5), (20, 30)), press(L, (8, 9), (12, 20))])  # two presses each
    monkeypatch.setattr(frontier, "FRONTIER", tmp_path / "none.json")
    config = TrainConfig(**SMALL, seq_len=L)
    s = subject(tmp_path, model, scheduler, config, x_0, draw(9), PRIOR)
    sections = run_analyses(s, num_exact=0)
    assert list(sections) == ["quality_by_group", "sampler_sweep", "training"]
    assert sections["training"].table == {}
    assert capsys.readouterr().out.count("note: no ") == 2
    drawn = [p.name for section in sections.values() for p in section.pictures]
    assert drawn == ["quality_by_group.png", "sampler_sweep.png", "few_step_bias.png"]
