"""The realism test passes what is real and fails what only looks so, by closed forms.

Why: MSE, SNR, IoU and validity do not see a gesture tremble, so this test must, on any data.

    python -m pytest tests/test_realism.py
"""

import builtins
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from augmentation import generate_augmented_dataset
from augmentation.click_aug import draw_gestures, render
from evaluation import criteria
from evaluation.bayes import GesturePrior
from evaluation.controls import untrained_model
from evaluation.estimates import quantile
from evaluation.events import (
    FEATURES,
    PIXELS,
    deviation,
    events_of,
    find_classifier,
    told_apart,
    two_sample_ks,
)
from evaluation.family import read_recipe
from evaluation.protocol import Subject
from evaluation.protocols import realism
from train_diffusion_ddim import TrainConfig, build_scheduler


def straight(n, seed, low=5, high=75):
    """Gestures of the generator, (n, 250, 3) float32."""
    return torch.from_numpy(
        render(draw_gestures(np.random.default_rng(seed), n, "mixed", low, high))
    )


def one_touch(xy, onset=20):
    """One gesture (1, 250, 3) that holds a touch."""
    x = torch.zeros(1, 250, 3)
    x[0, onset : onset + len(xy), :2] = torch.as_tensor(xy)
    x[0, onset : onset + len(xy), 2] = 1
    return x


def table_of(samples, real, classifier=None):
    """Values of realism_table, setting -> metric -> float."""
    table = realism.realism_table(samples, real, classifier)
    return {k: {m: e.value for m, e in row.items()} for k, row in table.items()}


# ----------------------------------------------------------------------------------------
# EVENTS
# ----------------------------------------------------------------------------------------


def test_features_of_a_line_by_hand():
    """51 frames, 100 pixels along x at two a frame, in 100 ms: nothing is rounded."""
    xy = np.column_stack([100 + 2 * np.arange(51), np.full(51, 540)]) / PIXELS
    events = events_of(one_touch(xy, onset=7).double())
    found = dict(zip(FEATURES, events.features[0], strict=True))
    speed = 500 * 2 / PIXELS
    assert found == pytest.approx(
        {
            "presses": 1, "frames": 51, "onset": 7,
            "x_start": 100 / PIXELS, "y_start": 0.5, "x_end": 200 / PIXELS, "y_end": 0.5,
            "path": 100 / PIXELS, "deviation": 0, "speed_peak": speed,
            "speed_peak_at": found["speed_peak_at"], "first_50_ms": speed, "last_50_ms": speed,
            "shake": 0,
        },
        abs=1e-9,
    )  # fmt: skip


def test_features_of_a_touch_that_starts_fast():
    steps = np.r_[np.full(25, 4), np.full(25, 2), 10, np.full(25, 1)]
    xy = np.column_stack([np.r_[0, np.cumsum(steps)], np.zeros(77)]) / PIXELS
    events = events_of(one_touch(xy).double())
    for name, per_frame in {"first_50_ms": 4, "last_50_ms": 1, "speed_peak": 10}.items():
        assert events.of(name) == pytest.approx(500 * per_frame / PIXELS)
    assert events.of("speed_peak_at") == pytest.approx(50.5 / 76)


def test_deviation_is_the_distance_from_the_chord():
    angle = np.linspace(0, np.pi, 181)
    arc = 0.5 + 0.2 * np.column_stack([np.cos(angle), np.sin(angle)])
    assert deviation(arc) == pytest.approx(0.2)  # a half circle: its radius
    turned = arc @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    assert deviation(turned) == pytest.approx(0.2)
    there_and_back = np.array([[0.5, 0.5], [0.5, 0.7], [0.5, 0.5]])
    assert deviation(there_and_back) == pytest.approx(0.2)
    beyond = np.array([[0.1, 0.5], [0.9, 0.5], [0.6, 0.5]])
    assert deviation(beyond) == pytest.approx(0.3)  # past the end of the chord
    assert deviation(np.array([[0.3, 0.3]])) == 0


def test_every_contact_of_a_window_is_an_event_and_so_is_an_idle_window():
    two = one_touch(np.full((9, 2), 0.5)) + one_touch(np.full((1, 2), 0.25), onset=100)
    throughout = torch.full((1, 250, 3), 0.5)
    throughout[..., 2] = 1
    events = events_of(torch.cat([two, torch.zeros(1, 250, 3), throughout]))
    assert events.window.tolist() == [0, 0, 2, 1]
    assert events.features[:, 0].tolist() == [2, 2, 1, 0]
    assert events.of("frames").tolist() == [9, 1, 250]
    assert np.isnan(events.features[1, -5:]).all()  # one frame has no speed
    assert np.isnan(events.features[3, 1:]).all()
    assert len(events_of(torch.zeros(0, 250, 3)).features) == 0


def test_two_sample_ks_by_hand():
    a, b = np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])
    assert two_sample_ks(a, b) == two_sample_ks(b, a) == 0.5
    assert two_sample_ks(a, a) == 0 and two_sample_ks(a, b + 9) == 1
    assert math.isnan(two_sample_ks(a, a[:0]))


def test_quantiles_have_intervals_that_hold_the_truth():
    rng = np.random.default_rng(0)
    estimates = [quantile(rng.random(200), 0.9) for _ in range(400)]
    held = [low <= 0.9 <= high for _, (low, high), _ in estimates]
    assert 0.91 < np.mean(held) < 0.99
    assert quantile([3.0, 1, 2], 0.5).value == 2
    assert quantile([3.0], 0.5).ci is None and math.isnan(quantile([], 0.5).value)


# ----------------------------------------------------------------------------------------
# CLASSIFIER
# ----------------------------------------------------------------------------------------


def test_halves_of_one_distribution_cannot_be_told_apart():
    told = told_apart(events_of(straight(600, 1)), events_of(straight(600, 2)), find_classifier())
    assert not np.isnan(told).any() and np.mean(told) == pytest.approx(0.5, abs=0.05)


def test_jitter_of_pixels_is_told_and_less_than_half_a_pixel_at_rest_is_not():
    real, other = straight(500, 1), straight(500, 2)
    jittered = realism.beside(other)["jittered_real"]
    classifier = find_classifier()
    assert np.mean(told_apart(events_of(jittered), events_of(real), classifier)) > 0.995
    rng = np.random.default_rng(0)
    at = rng.integers(300, 800, (2, 400, 1, 2)) / PIXELS
    clicks, wandering = (torch.cat([one_touch(p + np.zeros((20, 2))) for p in side]) for side in at)
    wandering[:, 20:40, :2] += torch.from_numpy(rng.uniform(-0.4, 0.4, (400, 20, 2)) / PIXELS)
    told = told_apart(events_of(wandering), events_of(clicks), classifier)
    assert np.mean(told) == pytest.approx(0.5, abs=0.07)


def test_windows_are_judged_by_classifiers_that_have_not_seen_them():
    """Twins of one window in two folds would be told by heart."""
    twins = straight(300, 1).repeat_interleave(2, dim=0)
    assert len(set(events_of(twins).window)) == 600
    three = sum(one_touch(np.full((5, 2), 0.5), onset) for onset in (10, 50, 90))
    events = events_of(three.repeat(40, 1, 1))
    seen = []

    class Recorder:
        def fit(self, x, side):
            seen.append(len(x))
            return self

        def decision_function(self, x):
            assert len(x) == 24  # eight windows of three contacts: none is divided
            return np.zeros(len(x))

    told = told_apart(events, events, Recorder)
    assert seen == [2 * 96] * 5
    assert (told == 0.5).all()  # a tie counts half


def test_too_few_windows_are_not_judged():
    few = events_of(straight(1, 1))
    assert np.isnan(told_apart(few, few, find_classifier())).all()
    assert told_apart(events_of(torch.zeros(0, 250, 3)), few, find_classifier()).size == 0


def test_without_scikit_learn_a_line_says_so(monkeypatch, capsys):
    whole = builtins.__import__

    for broken in (ImportError("no sklearn"), OSError("libgomp.so.1\nis missing")):

        def fail(name, *args, error=broken, **kwargs):
            if name.startswith("sklearn"):
                raise error
            return whole(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fail)
        assert find_classifier() is None
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "scikit-learn" in out and type(broken).__name__ in out
    row = table_of({"model": straight(50, 1)}, straight(50, 2))["model"]
    assert "auc" not in row and row["shake_swipes"] < 1e-3 and row["ks_max"] < 0.5


# ----------------------------------------------------------------------------------------
# METRICS
# ----------------------------------------------------------------------------------------


def test_clicks_with_a_known_drift():
    """Half of the clicks drift by .9 of a pixel, half by 1.1."""
    clicks = [
        one_touch(0.5 + np.linspace([0, 0], [0, (0.9, 1.1)[i % 2] / PIXELS], 20))
        for i in range(100)
    ]
    still = torch.cat([one_touch(np.full((20, 2), 0.5))] * 100)
    row = table_of({"model": torch.cat(clicks)}, still)["model"]
    assert row["still_clicks"] == row["still_clicks_of_real"] == 0.5
    assert row["click_excursion"] == pytest.approx(1 / PIXELS, rel=1e-3)
    assert math.isnan(row["shake_swipes"]) and row["shake_all"] < 1e-3
    half_moving = table_of({"model": still}, torch.cat(clicks))["model"]
    assert half_moving["still_clicks_of_real"] == 2


def test_swipes_that_leave_their_axis_and_bend():
    def arc(height, turn):
        """A swipe of .6 whose middle is `height` off the chord."""
        along = np.linspace(-1, 1, 61)
        xy = np.column_stack([0.5 + 0.3 * along, 0.5 + height * (1 - along**2)])
        return one_touch(xy[:, ::-1].copy() if turn else xy)

    bent = torch.cat([arc(h, turn) for h in (0.0005, 0.002) for turn in (0, 1) for _ in range(9)])
    flat = torch.cat([arc(0, turn) for turn in (0, 1)] * 18)
    row = table_of({"model": bent}, flat)["model"]
    assert row["axis_swipes"] == 0.5  # .54 of a pixel, and 2.2
    assert row["deviation"] == pytest.approx(0.00125, rel=1e-3)
    for metric in ("deviation_p90", "excess_deviation_p90"):
        assert row[metric] == pytest.approx(0.002, rel=1e-3)
    same = table_of({"model": bent}, bent)["model"]
    assert same["excess_deviation"] == 0 and same["ks_max"] == 0


def test_jitter_has_the_shake_of_its_closed_form():
    real = straight(300, 3)
    row = table_of({"jittered": realism.beside(real)["jittered_real"]}, real)["jittered"]
    expected = 1000 * realism.JITTER * math.sqrt(12 / math.pi)
    assert row["shake_swipes"] == pytest.approx(expected, rel=0.03)
    assert row["shake_all"] == pytest.approx(expected, rel=0.03)


def test_real_gestures_meet_all_lines_and_jittered_ones_none():
    table = realism.realism_table(
        {"model": straight(600, 4)} | realism.beside(straight(600, 5)),
        straight(600, 6),
        find_classifier(),
    )

    def verdicts(setting):
        found = criteria.judge({"realism": table}, {"realism": setting})
        return {v.criterion.metric: v for v in found if v.criterion.table == "realism"}

    real, shaken = verdicts("model"), verdicts("jittered_real")
    assert list(real) == list(criteria.REALISM_LINES)
    noisy = {"still_clicks_of_real"}  # of some 180 clicks
    assert {m for m, v in real.items() if v.verdict != "met"} <= noisy
    assert table["model"]["still_clicks_of_real"].value == pytest.approx(1, abs=0.1)
    assert real["auc"].real == pytest.approx(0.5, abs=0.05)
    assert {m: v.verdict for m, v in shaken.items()} == dict.fromkeys(shaken, "not met")
    rows = [r for r in criteria.headlines({"realism": table}) if r.asked == criteria.LIKE_REAL]
    assert [r.control_name for r in rows] == ["jittered_real"] * 2
    text = " ".join(criteria.summarise(list(real.values()), criteria.headlines({"realism": table})))
    assert "AUC of 0." in text and "real from real: 0." in text


# ----------------------------------------------------------------------------------------
# PROTOCOL
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """An untrained model with what the protocol reads."""
    config = TrainConfig(d_model=16, num_layers=1, nhead=2, num_timesteps=20)
    model, x = untrained_model(config, "cpu"), straight(30, 1)
    folder = tmp_path_factory.mktemp("subject")
    made = generate_augmented_dataset(folder / "data", 4, 5, 75)
    return Subject(
        checkpoint=folder, folders=(folder,), model=model, raw_model=model, untrained=model,
        scheduler=build_scheduler(config), config=config, sampling={"num_inference_steps": 3},
        x_val=x, x_train=x, prior=GesturePrior(), recipe=read_recipe(made.folder, 250),
    )  # fmt: skip


def test_real_gestures_are_fresh_draws_or_halves_of_the_validation_set(subject):
    real, held_out, originals = realism.draw_real(subject, 40)
    assert len(real) == len(held_out) == 40 and originals is subject.x_val
    seen = {x.numpy().tobytes() for x in torch.cat([real, held_out, originals])}
    assert len(seen) == 110  # none is another
    recorded = replace(subject, recipe=None)
    real, held_out, originals = realism.draw_real(recorded, 40)
    assert len(real) == len(held_out) == 15 and torch.equal(held_out, originals)
    seen = {x.numpy().tobytes() for x in torch.cat([real, held_out])}
    assert seen == {x.numpy().tobytes() for x in subject.x_val}


def test_the_recipe_is_that_of_the_manifest(tmp_path):
    made = generate_augmented_dataset(tmp_path / "a", 3, 0, 40, action_type="swipe")
    recipe = read_recipe(made.folder, 250)
    assert (recipe.action_type, recipe.min_delta_t, recipe.max_delta_t) == ("swipe", 0, 40)
    assert recipe.sequence_length == 250 and read_recipe(tmp_path, 250) is None
    for bad in ({"action_type": "human"}, {"min_delta_t": 50}, {"max_delta_t": "many"}):
        path = made.folder / "dataset.json"
        content = json.loads(path.read_text())
        content["arguments"] |= bad
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert read_recipe(tmp_path, 250) is None, bad


@pytest.mark.parametrize("recorded", [False, True])
def test_the_protocol_runs_on_any_windows(subject, recorded):
    windows = torch.cat(
        [
            subject.x_val[:8],
            torch.zeros(2, 250, 3),
            torch.full((2, 250, 3), 1.0),  # pressed throughout
            one_touch(np.full((9, 2), 0.5)) + one_touch(np.full((30, 2), 0.2), onset=220),
        ]
    )
    s = replace(subject, x_val=windows, recipe=None if recorded else subject.recipe)
    state = torch.get_rng_state()
    sections = realism.run(s, num=12, num_recreated=6, steps=(1, 2, 50))
    assert torch.equal(torch.get_rng_state(), state)  # other protocols draw what they drew
    assert [section.name for section in sections] == ["realism", "realism_recreated"]
    for section in sections:
        names = [n for n in section.table if n.startswith("model")]
        assert names == ["model_steps_1", "model_steps_2", "model_steps_3"]  # 50 are too many
        assert section.kind("validation_data") == "limit"
        assert section.kind("jittered_real") == "control"
        assert section.judged == "model_steps_3" and set(section.columns) <= set(section.shown)
    (picture,) = sections[0].pictures
    assert picture.name == "realism.png" and picture.figure.axes


def test_no_press_edge_means_no_recreation(subject):
    idle = replace(subject, x_val=torch.zeros(5, 250, 3), recipe=None)
    sections = realism.run(idle, num=10, num_recreated=5, steps=(1,))
    assert [section.name for section in sections] == ["realism"]
