"""The generate protocol must tell the prior from all else: real data pass, each control is caught.

Validity is broken one factor at a time; features, the prior's type shares, KS, MMD, density and
coverage are held against known parameters, a large draw, and loops; fresh gestures score the
floor everywhere; a collapsed sampler, a biased one and memorisers, also of mirrored or moved
twins, are refused.

    python -m pytest tests/test_samples.py
"""

import math

import numpy as np
import pytest
import torch

from augmentation.click_aug import draw_gestures, render
from evaluation import samples as samples_module
from evaluation.bayes import GesturePrior
from evaluation.controls import untrained_model
from evaluation.criteria import GENERATE_LINES, judge
from evaluation.estimates import bootstrap
from evaluation.family import fit_lines, validity
from evaluation.protocols import generate
from evaluation.protocols.generate import draw_samples, generate_table, score_samples
from evaluation.samples import (
    compare_features,
    copy_scores,
    gesture_features,
    ks_distance,
    make_reference,
    neighbour_distances,
    pit,
    pit_scores,
    type_distribution,
    type_scores,
)
from train_diffusion_ddim import TrainConfig, build_scheduler, generation_metrics
from trainlib.augment import augment
from trainlib.metrics import classify_gestures, has_one_press

PRIOR = GesturePrior()


def gestures(n, seed=0, low=5, high=75):
    """Mixed linear gestures, (n, 250, 3) float32."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render(draw_gestures(rng, n, "mixed", low, high)))


def swipes(n):
    """Mixed gestures without what the plan calls a click."""
    x = gestures(2 * n, seed=8)
    return x[classify_gestures(x) > 1][:n]


def values(scores):
    return {name: estimate.value for name, estimate in scores.items()}


@pytest.fixture(scope="module")
def x_train():
    return gestures(2000, seed=1)


@pytest.fixture(scope="module")
def real(x_train):
    return make_reference(x_train, gestures(1000, seed=7))


@pytest.fixture(scope="module")
def table(real):
    return generate_table({"model_steps_10": gestures(1000, seed=8)}, PRIOR, real)


# ----------------------------------------------------------------------------------------
# SAMPLES
# ----------------------------------------------------------------------------------------


def test_samples_of_all_settings_start_from_the_same_noise(monkeypatch):
    config = TrainConfig(d_model=16, num_layers=1, nhead=2, num_timesteps=30, seq_len=20)
    model, scheduler = untrained_model(config, "cpu"), build_scheduler(config)
    given = config.sampling | {"num_inference_steps": 4}
    samples = draw_samples(model, model, scheduler, given, shape=(20, 3), limit=6)
    # 50 steps are more than the scheduler has
    assert list(samples) == [*(f"model_steps_{s}" for s in (2, 4, 5, 10, 20)), "untrained_model"]
    assert all(x.shape == (6, 20, 3) for x in samples.values())
    assert torch.equal(samples["model_steps_4"], samples["untrained_model"])
    monkeypatch.setattr(generate, "NUM_JUDGED", 9)
    monkeypatch.setattr(generate, "NUM_SAMPLES", {2: 5})
    monkeypatch.setattr(generate, "NUM_UNTRAINED", 3)
    samples = draw_samples(model, model, scheduler, given, shape=(20, 3))
    assert [len(x) for x in samples.values()] == [5, 9, 3]


# ----------------------------------------------------------------------------------------
# VALIDITY
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
    checks = validity(spoil(gestures(30, low=20), factor), PRIOR)
    assert not checks.pop("valid").any() and not checks.pop(factor).any()
    assert all(ok.all() for ok in checks.values())


def test_validity_of_presses_and_durations():
    assert validity(gestures(50), PRIOR)["valid"].all()
    assert not validity(torch.zeros(2, 250, 3), PRIOR)["valid"].any()
    assert not validity(torch.ones(2, 250, 3), PRIOR)["duration_in_range"].any()
    short = gestures(20, low=4, high=4)
    assert not validity(short, PRIOR)["duration_in_range"].any()
    inside = torch.stack([x for x in gestures(60) if not x[:10, 2].any()])
    assert not validity(spoil(inside, "one_press"), PRIOR)["one_press"].any()


# ----------------------------------------------------------------------------------------
# FEATURES
# ----------------------------------------------------------------------------------------


def test_lines_equal_polyfit():
    x = spoil(gestures(5, low=20), "straight_and_even")
    x[..., 1] += 0.05 * torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0))
    fits = zip(*fit_lines(x), strict=True)
    for sample, (onset, frames, start, end, rms) in zip(x, fits, strict=True):
        pressed = np.flatnonzero(sample[:, 2] > 0.5)
        xy = sample[pressed, :2].double().numpy()
        fit = np.stack([np.polyval(np.polyfit(pressed, v, 1), pressed) for v in xy.T], axis=1)
        assert (onset, frames) == (pressed[0], len(pressed))
        assert start.numpy() == pytest.approx(fit[0]) and end.numpy() == pytest.approx(fit[-1])
        assert rms == pytest.approx(np.sqrt(((xy - fit) ** 2).mean()))


def test_features_are_the_parameters_that_were_drawn():
    drawn = draw_gestures(np.random.default_rng(3), 200, "mixed", 1, 75)
    still = drawn.delta_t == 1  # a swipe of one frame is its start
    end = np.where(still[:, None], drawn.start, drawn.end)
    length = np.hypot(*(end - drawn.start).T)
    zero = 0 * length
    expected = [np.log(drawn.delta_t), *drawn.start.T, *end.T, drawn.onset, length, zero, zero]
    found = gesture_features(torch.from_numpy(render(drawn)))
    assert still.any()
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=2e-6)
    assert not gesture_features(torch.zeros(2, 250, 3)).any()


# ----------------------------------------------------------------------------------------
# PRIOR
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixed", "click", "horizontal", "vertical", "diagonal", "swipe"])
@pytest.mark.parametrize("low", [1, 2])
def test_type_distribution_is_the_share_in_a_large_draw(kind, low):
    prior, n = GesturePrior(8, low, 4, kind), 40_000
    drawn = torch.from_numpy(prior.draw(n, np.random.default_rng(0)))
    share = np.bincount(classify_gestures(drawn), minlength=5) / n
    due = type_distribution(prior)
    assert due.sum() == pytest.approx(1) and due[0] == 0
    assert np.all(np.abs(share - due) <= 4 * np.sqrt(due * (1 - due) / n))


def test_type_distribution_of_diagonals_by_quadrature():
    """Midpoint sums in polar coordinates for the short moves, over b for the flat ones."""
    r, angle = (np.arange(500)[:, None] + 0.5) / 500 * 0.05, (np.arange(500) + 0.5) / 500
    short, short_and_flat = (
        np.mean(4 * r * (1 - r * np.cos(a)) * (1 - r * np.sin(a))) * 0.05 * top
        for top in (math.pi / 2, math.atan(0.5))
        for a in (angle * top,)
    )
    b = (np.arange(20_000) + 0.5) / 40_000  # the lesser move; the other is more than twice as far
    flat = np.mean(2 * (1 - b) * (1 - 2 * b) ** 2) / 2 - short_and_flat
    expected = [0, short, flat, flat, 1 - short - 2 * flat]
    assert type_distribution(GesturePrior(action_type="diagonal")) == pytest.approx(
        expected, abs=1e-7
    )


def test_type_counts_by_hand():
    prior = GesturePrior(250, 5, 75, "click")
    clicks = torch.from_numpy(prior.draw(10, np.random.default_rng(0)))
    swipe = torch.from_numpy(GesturePrior(action_type="vertical").draw(1, np.random.default_rng(1)))
    scores = values(type_scores(torch.cat([clicks, 0 * swipe]), prior))
    assert scores["types_chi2"] == 0 and scores["types_p"] == 1  # the empty one does not touch
    assert scores["share_none_minus_law"] == pytest.approx(1 / 11)
    assert scores["share_click_minus_law"] == pytest.approx(-1 / 11)
    assert scores["type_mix_error"] == pytest.approx(1 / 11)
    scores = values(type_scores(torch.cat([clicks, swipe]), prior))
    assert scores["types_chi2"] == math.inf and scores["types_p"] == 0
    # two possible types: one degree of freedom, whose tail is that of a normal number
    mixed = GesturePrior(250, 5, 75, "horizontal")
    click, horizontal = type_distribution(mixed)[1:3] * 1000
    many = [clicks[:1].expand(400, -1, -1), swipe[..., [1, 0, 2]].expand(600, -1, -1)]
    scores = values(type_scores(torch.cat(many), mixed))
    chi2 = (400 - click) ** 2 / click + (600 - horizontal) ** 2 / horizontal
    assert scores["types_chi2"] == pytest.approx(chi2)
    assert scores["types_p"] == pytest.approx(math.erfc(math.sqrt(chi2 / 2)), abs=1e-12)


def test_chi_square_is_uniform_under_the_prior():
    p = [values(type_scores(gestures(200, seed=s, high=9)[:, :250], GesturePrior(250, 5, 9)))
         ["types_p"] for s in range(60)]  # fmt: skip
    # types are drawn in equal parts, so the counts vary less than if drawn one by one
    assert 0.5 < np.mean(p) < 0.85 and min(p) > 0.02


def test_ks_distance_by_hand_and_by_loops():
    assert ks_distance(torch.tensor([0.5])) == 0.5
    assert ks_distance(torch.tensor([0.9, 0.8])) == pytest.approx(0.8)
    assert ks_distance(torch.tensor([-3.0, 2.0])) == 0.5  # outside [0, 1]: at its end
    assert math.isnan(ks_distance(torch.tensor([])))
    u = torch.rand(50, generator=torch.Generator().manual_seed(0)) ** 2
    grid = torch.linspace(0, 1, 100_001)
    loops = max(abs((u <= g).double().mean() - g) for g in grid[:: len(grid) // 2000])
    assert ks_distance(u) == pytest.approx(float(loops), abs=2e-3)


def test_pit_of_real_data_is_uniform():
    x = gestures(3000, seed=2)
    for factor in pit(x, PRIOR).values():
        assert factor.min() >= 0 and factor.max() <= 1
    scores = values(pit_scores(x, PRIOR))
    assert scores["ks_max"] < scores["ks_max_critical"] == pytest.approx(1.6554 / 3000**0.5, 1e-3)
    small, edges = GesturePrior(6, 2, 3), []  # 2 durations, 5 or 4 onsets: every step is filled
    drawn = torch.from_numpy(small.draw(4000, np.random.default_rng(0)))
    for name in ("duration", "onset"):
        u = pit(drawn, small)[name]
        edges.append(ks_distance(u))
    assert max(edges) < 1.6554 / 4000**0.5


def test_pit_sees_each_biased_factor():
    x = gestures(1000, seed=2)
    critical = 1.6554 / 1000**0.5

    def high(samples):
        scores = values(pit_scores(samples, PRIOR))
        return {n[3:] for n, v in scores.items() if v > critical and "max" not in n}

    assert high(gestures(1000, high=60)) == {"duration"}
    early = x.clone()
    early[x[:, :40, 2].any(dim=1)] = 0  # none starts in the first 40 frames
    assert high(early) == {"onset"}
    squeezed = x.clone()
    squeezed[..., 0] *= 0.8
    assert high(squeezed) == {"x_start", "x_end"}
    squeezed = x.clone()
    squeezed[..., 1] = x[..., 2] - 0.8 * x[..., 1]
    assert high(squeezed) == {"y_start", "y_end"}


# ----------------------------------------------------------------------------------------
# REAL GESTURES
# ----------------------------------------------------------------------------------------


def compare_by_loops(x, y, k=5):
    """mmd2, density, coverage and 1-NN accuracy, item by item."""
    n = len(x)
    d = lambda a, b: float(((a - b) ** 2).sum()) ** 0.5  # noqa: E731
    median = sorted(d(y[i], y[j]) for i in range(n) for j in range(i))[(n * (n - 1) // 2 - 1) // 2]
    kernel = lambda a, b: sum(  # noqa: E731
        math.exp(-(d(a, b) ** 2) / (2 * q * median**2)) for q in (0.25, 0.5, 1, 2, 4)
    )
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in off) / (n * (n - 1))
    mmd2 = within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2
    radius = [sorted(d(y[i], y[j]) for j in range(n) if j != i)[k - 1] for i in range(n)]
    inside = np.array([[d(a, y[i]) < radius[i] for i in range(n)] for a in x])
    both, right = [*x, *y], 0
    for i, a in enumerate(both):
        others = [d(a, b) if i != j else math.inf for j, b in enumerate(both)]
        right += (np.argmin(others) < n) == (i < n)
    return mmd2, inside.sum() / (k * n), inside.any(axis=0).mean(), right / (2 * n)


def test_comparison_equals_loops():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 3, generator=generator, dtype=torch.float64) + 0.7
    found = values(compare_features(x, y))
    p = found.pop("mmd2_p")
    assert 0 < p <= 1
    assert list(found.values()) == pytest.approx(compare_by_loops(x, y))


def test_comparison_is_the_mean_over_blocks(monkeypatch):
    monkeypatch.setattr(samples_module, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
    found = compare_features(x, y[:19])  # two blocks of 8
    assert {estimate.n for estimate in found.values()} == {16}
    parts = [compare_by_loops(x[:8], y[:8]), compare_by_loops(x[8:16], y[8:16])]
    names = ("mmd2", "density", "coverage", "c2st_1nn")
    assert [found[name].value for name in names] == pytest.approx(np.mean(parts, axis=0).tolist())


def test_equal_distributions_score_the_stated_limits():
    """MMD about 0 and p even over splits, density 1, coverage 1 - 2^-5, 1-NN ½."""
    features = gesture_features(gestures(8000, seed=4, high=75))
    features = (features - features.mean(dim=0)) / features.std(dim=0).clamp(min=0.02)
    parts = features.split(200)
    rows = [values(compare_features(*pair)) for pair in zip(parts[::2], parts[1::2], strict=True)]
    mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    error = {name: np.std([row[name] for row in rows]) / len(rows) ** 0.5 for name in rows[0]}
    limit = {"mmd2": 0, "mmd2_p": 0.5, "density": 1, "coverage": 1 - 2**-5, "c2st_1nn": 0.5}
    for name, value in limit.items():
        assert abs(mean[name] - value) < 3.5 * error[name] + 1e-3, name
    assert error["coverage"] < 0.005 and error["mmd2"] < 0.003


def test_scores_of_fresh_gestures_are_those_of_the_floor(table, real):
    for setting in ("model_steps_10", "validation_data"):
        scores = values(table[setting])
        assert scores["valid"] == 1 and abs(scores["duration_bias"]) < 0.05
        assert scores["type_mix_error"] < 0.04 and scores["types_p"] > 0.01
        assert scores["ks_max"] < scores["ks_max_critical"]
        assert abs(scores["mmd2"]) < 0.01
        assert scores["density"] == pytest.approx(1, abs=0.08) and scores["coverage"] >= 0.95
        assert scores["c2st_1nn"] == pytest.approx(0.5, abs=0.04)
        assert scores["nn_distance_ratio"] == pytest.approx(1, abs=0.1)
        assert scores["copy_auc"] == pytest.approx(0.5, abs=0.04)
        assert scores["share_near_copies"] < 0.04
    low, high = table["validation_data"]["copy_auc"].ci
    assert low < 0.5 < high
    fresh = gestures(1000, seed=8)
    trainer = generation_metrics(fresh)
    assert trainer.pop("shake") < 1e-3  # of the realism protocol
    assert {k: table["model_steps_10"][k].value for k in trainer} == pytest.approx(trainer)


def test_controls_are_caught(table):
    copies, one = values(table["training_items"]), values(table["one_training_item"])
    assert copies["valid"] == 1 and copies["coverage"] > 0.95
    assert copies["nn_distance_ratio"] == 0
    assert copies["copy_auc"] == copies["share_near_copies"] == 1
    assert one["valid"] == 1 and one["coverage"] < 0.02 and one["type_mix_error"] > 0.5
    assert one["ks_max"] > 0.5 and one["mmd2_p"] == 1 / 200 and one["c2st_1nn"] > 0.99
    for name in ("training_mean", "zeros"):
        row = values(table[name])
        assert row["valid"] == row["coverage"] == row["density"] == 0 and row["c2st_1nn"] == 1
        assert math.isnan(row["copy_auc"]) and table[name]["copy_auc"].n == 0
    assert table["zeros"]["line_rms"].n == 0 and table["model_steps_10"]["line_rms"].value < 1e-6


@pytest.mark.parametrize("copying", ["noisy", "twins", "fifth"])
def test_a_memoriser_is_caught(copying, x_train, real):
    x = x_train[torch.randperm(2000, generator=torch.Generator().manual_seed(3))[:500]]
    fresh = gestures(500, seed=9)
    if copying == "noisy":
        x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    elif copying == "twins":  # mirrored, turned, reversed, at another time
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = augment(x)
    else:
        x = torch.cat([x[:100], fresh[:400]])
    scores = values(copy_scores(gesture_features(x)[has_one_press(x)], real))
    others = values(copy_scores(gesture_features(fresh), real))
    assert others["copy_auc"] <= 0.55 < scores["copy_auc"]
    assert others["share_near_copies"] <= 0.05 < scores["share_near_copies"]
    if copying != "fifth":
        assert scores["copy_auc"] > 0.95 and scores["share_near_copies"] > 0.6
        assert scores["nn_distance_ratio"] < 0.3


def test_a_sample_as_near_as_its_rival_counts_half(real):
    features = gesture_features(gestures(5, seed=9))
    gaps = neighbour_distances(features, real.bank, real.scale)[:, 0]
    scores = copy_scores(features, real._replace(bank_gaps=gaps.sort().values))
    assert scores["copy_auc"].value == pytest.approx(0.5, abs=1e-6)
    assert scores["nn_distance_ratio"].value == pytest.approx(1)


def test_neighbour_distances_equal_loops(real):
    x, bank = real.bank[:4] + 0.1, real.bank[:9]
    scale = torch.tensor([2.0, 0.3, 0.4, 0.5, 0.6])
    found = neighbour_distances(x, bank, scale, chunk=3)
    for row, (first, second) in zip(x.tolist(), found.tolist(), strict=True):
        d, x0, y0, x1, y1, *_ = row
        distances = []
        for other in bank[:, :5]:
            twins = []
            for a, b in (((x0, y0), (x1, y1)), ((x1, y1), (x0, y0))):
                for fx in (False, True):
                    for fy in (False, True):
                        p, q = ((1 - u if fx else u, 1 - v if fy else v) for u, v in (a, b))
                        twins += [[d, *p, *q], [d, *p[::-1], *q[::-1]]]
            assert len(twins) == 16
            distances.append(
                min(float((((torch.tensor(t) - other) / scale) ** 2).sum()) ** 0.5 for t in twins)
            )
        assert [first, second] == pytest.approx(sorted(distances)[:2], rel=1e-4)


# ----------------------------------------------------------------------------------------
# VERDICTS
# ----------------------------------------------------------------------------------------


def judged(table, setting="model_steps_10"):
    """The verdicts on generated samples, by metric."""
    found = judge({"generate": table}, {"generate": setting})
    return {v.criterion.metric: v for v in found if v.criterion.table == "generate"}


def test_fresh_gestures_meet_every_line_and_no_control_does(table):
    verdicts = judged(table)
    assert list(verdicts) == [*GENERATE_LINES, "all_lines"]
    assert verdicts["all_lines"].verdict == "met" and verdicts["all_lines"].real == 6
    assert verdicts["coverage"].verdict == "met"
    assert verdicts["coverage"].real == table["validation_data"]["coverage"].value
    # a gesture repeated is a valid one: validity alone says nothing
    assert verdicts["valid"].verdict == "not discriminating"
    assert verdicts["valid"].controls == {"one_training_item": 1.0}
    assert verdicts["copy_auc"].verdict == verdicts["share_near_copies"].verdict == "met"
    for name in ("training_items", "one_training_item", "training_mean", "zeros"):
        verdicts = judged(table, name)
        assert verdicts["all_lines"].verdict == "not met", name
    copies = judged(table, "training_items")
    assert [m for m in GENERATE_LINES if copies[m].verdict == "not met"] == [
        *("copy_auc", "share_near_copies")
    ]


def test_each_line_is_missed_by_what_it_is_for(x_train, table, real):
    wrong = {
        "valid": spoil(gestures(600, seed=8), "idle_at_zero"),
        "duration_bias": gestures(600, seed=8, high=60),
        "type_mix_error": swipes(600),
        "coverage": gestures(6, seed=8).repeat(100, 1, 1),
        "copy_auc": x_train[:600],
    }
    for metric, samples in wrong.items():
        spoilt = table | {"model_steps_10": score_samples(samples, PRIOR, real)}
        assert judged(spoilt)[metric].verdict == "not met", metric


def test_lines_that_a_memoriser_meets_say_nothing_about_copies(table):
    blind = judged(table | {"training_items": table["validation_data"]})
    for metric in ("copy_auc", "share_near_copies", "all_lines"):
        assert blind[metric].verdict == "not discriminating"
        assert blind[metric].controls.keys() == {"training_items"}
    assert blind["coverage"].verdict == "met"


@pytest.mark.parametrize("n", [1, 3, 7])
def test_few_gestures_are_scored_without_a_crash(n):
    real = make_reference(gestures(n, seed=1), gestures(n, seed=2))
    table = generate_table({"model_steps_10": gestures(n, seed=3)}, PRIOR, real)
    assert math.isnan(table["model_steps_10"]["coverage"].value) == (n < 6)
    assert judged(table)["valid"].estimate.value == 1
    idle = make_reference(torch.zeros(n, 250, 3), torch.zeros(n, 250, 3))
    table = generate_table({"model_steps_10": torch.zeros(n, 250, 3)}, PRIOR, idle)
    assert judged(table)["all_lines"].verdict == "not met"


def test_scores_are_the_same_again(real):
    x = gestures(40, seed=8)
    first, again = (values(score_samples(x, PRIOR, real)) for _ in range(2))
    assert first == pytest.approx(again, nan_ok=True)
    assert first["valid"] == bootstrap(validity(x, PRIOR)["valid"]).value
