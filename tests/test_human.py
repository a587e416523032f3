"""What the human-like gestures promise: their format, their habits, and the fit to recordings.

Why: a model of real gestures is judged on them, and they are what the trainer must accept beside
straight ones. Frames are tested against a contact rendered by definition, the draw against the
habits that it is given, the fit against contacts of known curves.

    python -m pytest tests/test_human.py
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from augmentation import fit_human
from augmentation.click_aug import generate_augmented_dataset
from augmentation.fit_human import fit, shape_of
from augmentation.generate_click_dataset import main
from augmentation.human import FEATURES, HABITS_FILE, KNOTS, Session, draw_session, render_session
from augmentation.presets import HUMAN_DATASETS, generate_preset
from augmentation.strokes import Stroke
from benchmarks import human
from trainlib.contacts import contacts_of
from trainlib.data_gate import check_data
from trainlib.errors import UserError
from trainlib.gesture_files import read_gestures

stats = pytest.importorskip("scipy.stats")

L = 250
N = 4000
HABITS = json.loads(HABITS_FILE.read_text("utf-8"))


def rendered(seed=0, num=N, **options):
    session = draw_session(np.random.default_rng(seed), num, **options)
    return render_session(session, slice(0, num), options.get("length", L)), session


@pytest.fixture(scope="module")
def timeline():
    return rendered()


@pytest.fixture(scope="module")
def whole():
    return rendered(whole=True)


# --------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("name", ["timeline", "whole"])
def test_frames_are_valid(name, request):
    x, _ = request.getfixturevalue(name)
    assert x.shape == (N, L, 3) and x.dtype == np.float32
    assert np.all((x >= 0) & (x <= 1)) and not np.any(np.signbit(x))  # false for NaN
    press = x[..., 2]
    assert np.all((press == 0) | (press == 1)) and not np.any(x[press == 0])


def test_a_timeline_has_every_kind_of_window(timeline):
    x, _ = timeline
    pressed = x[..., 2] == 1
    downs = (np.diff(np.pad(pressed, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(axis=1)
    assert np.mean(downs >= 2) > 0.05 and np.mean(downs >= 3) > 0
    for some in (pressed[:, 0], pressed[:, -1], pressed.all(axis=1), ~pressed.any(axis=1)):
        assert 0.1 < some.mean() < 0.6


def test_a_contact_goes_on_in_the_next_window(timeline):
    x, _ = timeline
    going_on = (x[:-1, -1, 2] == 1) & (x[1:, 0, 2] == 1)
    jump = np.abs(x[1:, 0] - x[:-1, -1])[going_on].max(axis=1)
    within = np.abs(np.diff(x[:, :, :2], axis=1))[(x[:, 1:, 2] == 1) & (x[:, :-1, 2] == 1)]
    assert len(jump) > 1000 and np.quantile(jump, 0.99) < 2 * np.quantile(within, 0.999)


def test_a_whole_window_holds_one_contact_with_a_uniform_onset(whole):
    x, session = whole
    contacts = contacts_of(x)
    assert [contact.window for contact in contacts] == list(range(N))
    frames = np.array([len(contact.xy) for contact in contacts])
    onset = np.array([contact.onset for contact in contacts])
    assert np.array_equal(frames, (session.up - session.down) / 2)
    u = (onset + np.random.default_rng(0).random(N)) / (L - frames + 1)
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("step", [1, 7, N])
def test_frames_do_not_depend_on_the_slices(is_whole, step):
    session = draw_session(np.random.default_rng(3), 60, whole=is_whole)
    at_once = render_session(session, slice(0, 60))
    parts = [render_session(session, slice(i, min(i + step, 60))) for i in range(0, 60, step)]
    assert np.concatenate(parts).tobytes() == at_once.tobytes()


@pytest.mark.parametrize("limits", [(1, 1), (5, 40), (100, 249)])
@pytest.mark.parametrize("is_whole", [False, True])
def test_limits_are_kept(limits, is_whole):
    _, session = rendered(num=500, whole=is_whole, shortest=limits[0], longest=limits[1])
    frames = (session.up - session.down) / 2
    assert frames.min() >= limits[0] and frames.max() <= limits[1]
    if limits == (100, 249):  # drawn within them, not moved to them
        assert np.mean(frames > 110) > 0.7


def test_a_timeline_of_short_windows_limits_no_contact():
    expected = rendered(num=4000)[1]
    _, session = rendered(num=20_000, length=50, longest=50)
    for kind in (0, 1):
        durations = [(s.up - s.down)[s.kind == kind] for s in (session, expected)]
        assert stats.ks_2samp(*durations).pvalue > 1e-3
    _, session = rendered(num=500, length=2000, shortest=500, longest=2000)
    assert (session.up - session.down).min() == 1000


@pytest.mark.parametrize("length", [1, 3, 2000])
def test_windows_of_other_lengths(length):
    for is_whole in (False, True):
        x, _ = rendered(num=2000, whole=is_whole, length=length, longest=length)
        assert x.shape == (2000, length, 3) and np.isfinite(x).all() and x[..., 2].any()


# --------------------------------------------------------------------------------------
# What is drawn


def test_the_draw_has_the_habits(whole):
    _, session = whole
    for index, kind in enumerate(("tap", "swipe")):
        chosen, expected = session.kind == index, HABITS[kind]
        shorts = [HABITS[k]["share"] * (1 - HABITS[k]["long_share"]) for k in ("tap", "swipe")]
        n, p = int(chosen.sum()), shorts[index] / sum(shorts)
        assert abs(n - N * p) < 5 * np.sqrt(N * p * (1 - p))
        drawn = session.duration[chosen]
        inner, wanted = slice(4, -4), expected["quantiles"]["duration"]  # up to two deviations
        found = np.quantile(drawn, stats.norm.cdf(KNOTS[inner]))
        np.testing.assert_allclose(found, wanted[inner], rtol=0.1, atol=6)  # whole sample periods
        length = np.hypot(*session.end[chosen].T)
        rank = stats.spearmanr(drawn, length).statistic
        row = expected["correlation"][FEATURES.index("duration")]
        assert np.sign(rank) == np.sign(row[FEATURES.index("reach")])


def test_kinds_can_be_chosen():
    assert set(rendered(num=50, kinds=("swipe",))[1].kind) == {1}
    assert set(rendered(num=50, kinds=("tap",), whole=True)[1].kind) == {0}


def test_swipes_are_near_the_axes_but_not_on_them(whole):
    _, session = whole
    dx, dy = np.abs(session.end[session.kind == 1]).T
    small, large = np.minimum(dx, dy), np.maximum(dx, dy)
    assert np.all(small > 0)
    assert np.mean(small < 0.27 * large) > 0.42  # within 15 degrees; a third of all directions


# --------------------------------------------------------------------------------------
# Rendering


def one_leg(**changes):
    """A contact of 100 ms at 50 samples a second, straight and even, on a fine screen."""
    leg = {
        "down": np.array([10.0]),
        "up": np.array([110.0]),
        "kind": np.array([1]),
        "rate": np.array([50.0]),
        "screen": np.array([[1e9, 1e9]]),
        "first": np.array([0, 1]),
        "duration": np.array([100.0]),
        "start": np.array([[0.2, 0.3]]),
        "control": np.array([[0.2, -0.05]]),
        "end": np.array([[0.4, -0.1]]),
        "timing": np.array([[1.0, 1.0]]),
        "rests": np.zeros((1, 2)),
        "speeds": np.ones(1 << 16),
        "speeds_at": np.array([5]),
    }
    return Session(**leg | {name: np.array(value) for name, value in changes.items()})


def frames_of(session):
    x = render_session(session, slice(0, 1))[0]
    pressed = np.flatnonzero(x[:, 2])
    assert np.array_equal(pressed, np.arange(5, 55))
    return x[pressed, :2], 2 * (pressed - 5)  # ms since the touch-down


def test_an_even_straight_leg_is_a_line():
    xy, t = frames_of(one_leg())
    np.testing.assert_allclose(xy, [0.2, 0.3] + t[:, None] / 100 * [0.4, -0.1], atol=1e-7)


def test_a_leg_is_its_curve_at_the_samples_and_linear_between():
    control, end, a, b = [0.3, 0.2], [0.4, -0.1], 3.0, 1.5
    rate = 2000.0  # so that the density is as good as integrated
    session = one_leg(control=[control], timing=[[a, b]], rests=[[20.0, 10.0]], rate=[rate])
    xy, t = frames_of(session)
    s = stats.beta.cdf(((t - 20) / 70).clip(0, 1), a, b)[:, None]
    curve = [0.2, 0.3] + 2 * s * (1 - s) * control + s**2 * end
    np.testing.assert_allclose(xy, curve, atol=5e-4)
    assert np.ptp(xy[t <= 18], axis=0).max() == 0 and np.ptp(xy[t >= 92], axis=0).max() == 0

    xy, t = frames_of(replace(session, rate=np.array([50.0])))  # every ten frames
    bends = np.flatnonzero(np.abs(np.diff(xy, n=2, axis=0)).max(axis=1) > 1e-5) + 1
    assert len(bends) and np.all(t[bends] % 20 == 0)


def test_samples_are_whole_pixels():
    xy, t = frames_of(one_leg(screen=[[101.0, 51.0]], control=[[0.31, 0.17]]))
    pixels = xy[t % 20 == 0] * [100, 50]
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-5)


def test_legs_of_a_contact_follow_one_another():
    session = one_leg(
        first=[0, 2], duration=[40.0, 60.0], start=[[0.2, 0.3], [0.6, 0.2]],
        control=[[0.2, -0.05], [-0.1, 0]], end=[[0.4, -0.1], [-0.2, 0]],
        timing=np.ones((2, 2)), rests=np.zeros((2, 2)), speeds_at=[5, 9],
    )  # fmt: skip
    xy, t = frames_of(session)
    expected = [np.interp(t, [0, 40, 100], at) for at in ([0.2, 0.6, 0.4], [0.3, 0.2, 0.2])]
    np.testing.assert_allclose(xy, np.stack(expected, axis=1), atol=1e-7)


# --------------------------------------------------------------------------------------
# The fit


def stroke_of(t, xy, session="s"):
    return Stroke(session, np.asarray(t, float), np.asarray(xy, float))


@pytest.mark.parametrize("a, b", [(1.0, 1.0), (3.0, 1.2), (1.3, 3.0)])
def test_the_shape_of_a_known_curve_is_found(a, b):
    t = np.arange(0, 301, 5.0)
    s = stats.beta.cdf(((t - 40) / 240).clip(0, 1), a, b)[:, None]
    unit, normal = np.array([0.6, 0.8]), np.array([-0.8, 0.6])
    control, end = 0.2 * (0.4 * unit + 0.3 * normal), 0.2 * unit
    shape = shape_of(stroke_of(t, 0.3 + 2 * s * (1 - s) * control + s**2 * end), 5.0)
    found = dict(zip(FEATURES, shape, strict=True))
    assert found["duration"] == 300 and found["reach"] == pytest.approx(0.2)
    assert found["chord"] == pytest.approx(1) and found["direction"] == pytest.approx(
        0.9273, abs=1e-3
    )
    assert found["along"] == pytest.approx(0.4, abs=0.1)
    assert found["aside"] == pytest.approx(0.3, abs=0.03)
    assert found["rest_before"] == pytest.approx(40, abs=2)
    assert found["rest_after"] == pytest.approx(20, abs=2)
    assert found["a"] == pytest.approx(a, rel=0.25) and found["b"] == pytest.approx(b, rel=0.25)


def test_a_still_contact_has_a_shape():
    shape = shape_of(stroke_of([0, 8, 70], [[0.5, 0.5]] * 3), 8.0)
    assert shape[0] == 70 and np.isfinite(shape).all() and shape[1] == 0


def strokes_of(session, num=None):
    """The contacts of a session as a recording would hold them: the frames."""
    x = render_session(session, slice(0, num))
    flat, strokes = x.reshape(1, -1, 3), []
    for contact in contacts_of(flat):
        t = 2.0 * (contact.onset + np.arange(len(contact.xy) + 1))
        strokes.append(stroke_of(t, np.vstack([contact.xy, contact.xy[-1:]])))
    return strokes


def test_the_fit_finds_the_habits_again(timeline):
    _, session = timeline
    habits = fit(strokes_of(session, N))
    for kind in ("tap", "swipe"):
        assert habits[kind]["share"] == pytest.approx(HABITS[kind]["share"], abs=0.1)
        assert habits[kind]["long_share"] == pytest.approx(HABITS[kind]["long_share"], abs=0.1)
        for feature in ("duration", "reach"):  # what is not below a pixel
            found, wanted = (np.array(h[kind]["quantiles"][feature]) for h in (habits, HABITS))
            assert np.abs(np.log(found[10:17] / wanted[10:17])).max() < 0.35, (kind, feature)
        assert np.linalg.eigvalsh(habits[kind]["correlation"]).min() > 0
    assert habits["again"]["share"] == pytest.approx(HABITS["again"]["share"], abs=0.05)


def test_the_command_fits_files(tmp_path, capsys):
    _, session = rendered(num=1000)
    lines = [
        json.dumps({"session": s.session, "points": np.column_stack([s.t, s.xy]).tolist()})
        for s in strokes_of(session, 1000)
    ]
    (tmp_path / "taps.jsonl").write_text("\n".join(lines))
    argv = [str(tmp_path / "taps.jsonl"), "--output", str(tmp_path / "habits.json")]
    assert fit_human.main(argv) == 0 and "habits of" in capsys.readouterr().out
    habits = json.loads((tmp_path / "habits.json").read_text())
    assert rendered(num=50, habits=habits)[0][..., 2].any()
    assert fit_human.main([str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_fitted_says_so():
    with pytest.raises(UserError, match="too few"):
        fit([stroke_of([0, 50], [[0.5, 0.5], [0.5, 0.5]])])


# --------------------------------------------------------------------------------------
# Data sets


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def test_same_command_same_bytes_and_the_trainer_accepts_them(tmp_path, capsys):
    for root, per_file in (("a", 100), ("b", 7)):
        for split in ("train", "val"):
            code, out, _ = run(
                capsys, "--output_dir", tmp_path / root / split, "--num_sequences", 300,
                "--sequences_per_file", per_file, "--style", "human",
            )  # fmt: skip
            assert code == 0 and "tap" in out and "swipe" in out
    train, val = (read_gestures(tmp_path / "a" / split, L) for split in ("train", "val"))
    assert train.tobytes() == read_gestures(tmp_path / "b" / "train", L).tobytes()
    pressed = train[..., 2] == 1
    for needed in (pressed.all(axis=1), pressed[:, 0] & ~pressed[:, -1], ~pressed.any(axis=1)):
        assert needed.any()
    config = SimpleNamespace(
        data_dir="a", val_data_dir="b", seq_len=L, augment=True, contacts=True, allow_overlap=False
    )
    check_data(train, val, config)


def test_the_manifest_cannot_be_taken_for_a_straight_set(tmp_path):
    made = generate_augmented_dataset(tmp_path / "d", 20, style="human", window="whole")
    arguments = made.manifest["arguments"]
    assert "min_delta_t" not in arguments and arguments["style"] == "human"
    assert sum(made.manifest["contact_counts"][kind] for kind in ("tap", "swipe")) == 20
    assert not generate_augmented_dataset(tmp_path / "d", 20, style="human", window="whole").written
    with pytest.raises(UserError, match=r"habits .*--overwrite"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("augmentation.click_aug.sha256_of", lambda _: "other")
            generate_augmented_dataset(tmp_path / "d", 20, style="human", window="whole")


def test_the_plans_call_takes_the_style(tmp_path):
    made = generate_augmented_dataset(tmp_path / "d", 50, 20, 60, L, "swipe", style="human",
                                      window="whole")  # fmt: skip
    frames = (read_gestures(made.folder, L)[..., 2] == 1).sum(axis=1)
    assert frames.min() >= 20 and frames.max() <= 60


@pytest.mark.parametrize("preset", HUMAN_DATASETS, ids=lambda preset: preset["name"])
def test_presets(tmp_path, preset):
    made = generate_preset(preset["name"], tmp_path, num_sequences=30)
    assert made.written and made.folder == tmp_path / preset["name"]
    assert made.manifest["arguments"]["style"] == "human"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--window", "timeline"], "needs --style human"),
        (["--style", "human", "--action_type", "diagonal"], "action_type must be one of"),
        (["--style", "human", "--max_delta_t_pct", "0"], "longest must be in"),
        (["--style", "human", "--min_delta_t_pct", "0.5", "--max_delta_t_pct", "0.2"], "<="),
        (["--style", "robot"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, message):
    code, _, err = run(capsys, "--output_dir", tmp_path / "d", *options)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------------
# The comparison with recordings


def test_the_comparison_finds_what_differs(timeline):
    x, _ = timeline
    same = human.describe(x)
    assert all(row[label] == 0 for row in human.distances(("a", "b"), (same, same))
               for label in human.COMPARED)  # fmt: skip
    slow = x.copy()
    slow[..., :2] *= 0.5  # half the path, deviation and speed in the same time
    taps, swipes = human.distances(("a", "b"), (human.describe(slow), same))
    assert taps["duration"] < 0.1 and taps["path"] > 0.1 and swipes["speed peak"] > 0.1


def test_two_users_with_the_committed_habits_are_alike(monkeypatch):
    monkeypatch.setattr(human, "NUM_GENERATED", 2000)
    strokes = []
    for user in "ab":
        _, session = rendered(seed=ord(user), num=1000)
        strokes += [stroke._replace(session=user) for stroke in strokes_of(session, 1000)]
    rows = human.compare(strokes, "(.)")
    assert [row["of"] for row in rows[::2]].count("committed habits") == 1
    for row in rows:
        limit = 1.95 * np.sqrt(2 / min(row["n"], human.NUM_GENERATED))
        assert row["deviation"] < limit + 0.08, row
    assert [row["n"] for row in rows[:2]] == [
        len(part) for part in human.recorded(strokes).values()
    ]
    with pytest.raises(UserError, match="one user"):
        human.compare(strokes[:5], "(.)")
