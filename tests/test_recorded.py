"""A report on gestures of an unknown distribution says what is true of them, and nothing else.

Why: recordings have no prior, so nothing that needs one may appear, and windows that are pressed at
the border, throughout, twice or not at all must go through every protocol. The energy score is held
against loops and a closed form.

    python -m pytest tests/test_recorded.py
"""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import press
from test_evaluation import SMALL, TINY, make_tiny, refuse

from augmentation import generate_augmented_dataset
from augmentation.import_touch import import_touch
from evaluation import criteria, recorded, rivals
from evaluation.__main__ import main
from evaluation.controls import untrained_model
from evaluation.family import known_prior, read_prior
from evaluation.protocol import Subject
from evaluation.protocols import PROTOCOLS, infill, keyframes, realism
from evaluation.replay import make_replay
from train_diffusion_ddim import TrainConfig, build_model, build_scheduler
from trainlib.checkpoint import save_checkpoint
from trainlib.errors import UserError
from trainlib.gesture_files import read_gestures
from trainlib.state import TrainState

L = 250
BEGINS, ENDS, THROUGHOUT = press(L, (0, 40)), press(L, (200, 249)), press(L, (0, 249))
TWICE, IDLE, INSIDE = press(L, (20, 60), (120, 180)), press(L), press(L, (30, 90))
EVERY = {
    "begins pressed": BEGINS, "ends pressed": ENDS, "throughout": THROUGHOUT, "twice": TWICE,
    "idle": IDLE, "inside": INSIDE,
}  # fmt: skip


def some(num=4):
    """Windows of every kind, curved and no two alike, (6·num, 250, 3)."""
    x = torch.cat([*EVERY.values()] * num)
    generator = torch.Generator().manual_seed(0)
    drift = (
        0.2 * torch.rand(len(x), 1, 2, generator=generator) * torch.linspace(0, 1, L)[:, None] ** 2
    )
    x[..., :2] += drift * x[..., 2:]
    return x


def subject_of(x_val, tmp_path, **more):
    """An untrained model with windows of an unknown distribution."""
    config = TrainConfig(**SMALL, num_timesteps=20)
    model = untrained_model(config, "cpu")
    return Subject(
        checkpoint=tmp_path, folders=(tmp_path,), model=model, raw_model=model, untrained=model,
        scheduler=build_scheduler(config), config=config,
        sampling={"num_inference_steps": 2, "eta": 1.0, "sampler": "dpmpp"},
        x_val=x_val, x_train=some(6), prior=None, **more,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------
# RULE
# ----------------------------------------------------------------------------------------


def strokes(users=4, num=8):
    """JSON lines of curved strokes of some users, some longer than a window."""
    rng = np.random.default_rng(0)
    for user in range(1, users + 1):
        for k in range(num):
            t = 900 * k + np.arange(0, (120, 700)[k % 2], 10)
            xy = 0.5 + 0.3 * np.cumsum(rng.normal(0, 0.02, (len(t), 2)), axis=0)
            points = np.column_stack([t, xy.clip(0, 1)]).tolist()
            yield json.dumps({"session": f"game-{user}", "points": points})


@pytest.fixture(scope="module")
def timeline(tmp_path_factory):
    """A folder with train, val and held_out of recorded strokes, cut as they ran."""
    folder = tmp_path_factory.mktemp("timeline")
    (folder / "a.jsonl").write_text("\n".join(strokes()))
    options = {"window": "timeline", "user_pattern": r"(\d+)$", "val_users": "4"}
    import_touch([folder / "a.jsonl"], folder, held_out=0.3, **options)
    return folder


def test_the_manifest_decides_what_is_known(timeline, tmp_path):
    straight = generate_augmented_dataset(tmp_path / "straight", 4, 5, 75)
    human = generate_augmented_dataset(tmp_path / "human", 4, style="human")
    for folder, known in (
        (straight.folder, True),
        (human.folder, False),
        (timeline / "val", False),
    ):
        x = torch.from_numpy(read_gestures(folder, L))
        assert (read_prior(folder, x) is not None) == known, folder
        # whatever the windows look like
        assert (read_prior(folder, INSIDE) is not None) == known, folder
        if not known:
            with pytest.raises(UserError, match="distribution"):
                known_prior(folder, x)


def test_windows_kept_out_are_taken_if_they_are_of_the_same_import(timeline, tmp_path, capsys):
    val = read_gestures(timeline / "val", L)
    found = recorded.read_recorded(val, str(timeline / "val"), str(timeline / "train"), 5)
    assert len(found.judged) == 5 and (found.judged[..., 2] > 0.5).any(axis=1).all()
    for windows, folder in ((found.unseen, "held_out"), (found.others, "val")):
        sides = (windows, read_gestures(timeline / folder, L))
        assert sorted(w.tobytes() for w in sides[0]) == sorted(w.tobytes() for w in sides[1])
    for words in ("8 contacts of 1 user", "3 other users", "begin pressed", "kept out of training"):
        assert words in found.about
    (tmp_path / "train").mkdir()
    shutil.copytree(timeline / "held_out", tmp_path / "held_out")  # beside another training set
    elsewhere = recorded.read_recorded(val, str(timeline / "val"), str(tmp_path / "train"), 5)
    assert elsewhere.others is None and "it is left out" in capsys.readouterr().out
    assert "held against the validation windows" in elsewhere.about


def test_what_is_not_known_of_the_data_is_not_said():
    said = recorded.describe_data(some(1).numpy(), {}, {})
    assert said.startswith("Gestures of an unknown source: 6 contacts in 6 windows")
    assert "33 % begin pressed" in said and "user" not in said
    human = {"arguments": {"style": "human"}}
    assert recorded.describe_data(IDLE.numpy(), human, {}).startswith("Human-like gestures")
    assert [recorded._share(v) for v in (0, 0.004, 0.996, 1)] == [
        "none", "under 1 %", "nearly all", "all",
    ]  # fmt: skip


def test_shares_of_windows_by_hand():
    shares = recorded.window_shares(torch.cat([*EVERY.values()]).numpy())
    assert shares == {
        "contacts": 6, "begin pressed": 2 / 6, "end pressed": 2 / 6,
        "are pressed throughout": 1 / 6, "hold several contacts": 1 / 6, "hold no touch": 1 / 6,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------
# ENERGY SCORE
# ----------------------------------------------------------------------------------------


def test_energy_score_by_loops():
    x_0 = torch.cat([INSIDE, TWICE])
    answers = torch.rand(2, 5, L, 3, generator=torch.Generator().manual_seed(1))
    scores, errors = infill.energy_score(answers, x_0)
    for i in range(2):
        down = (x_0[i, :, 2] > 0.5).numpy()
        s, x = answers[i, :, down, :2].double().numpy(), x_0[i, down, :2].double().numpy()
        error = np.mean([np.hypot(*(a - x).T).mean() for a in s])
        pairs = [(a, b) for j, a in enumerate(s) for k, b in enumerate(s) if j != k]
        apart = [np.hypot(*(a - b).T).mean() for a, b in pairs]
        assert errors[i] == pytest.approx(error)
        assert scores[i] == pytest.approx(error - np.mean(apart) / 2)


def test_the_mean_of_many_answers_is_scored_as_one_answer():
    x_0 = some(1)[:2]
    mask = torch.zeros(x_0.shape[:2], dtype=torch.bool)
    answers = x_0[:, None] + torch.tensor([0.1, -0.2, 0.4])[:, None, None]  # 0.1 off in the mean
    lines = x_0[:, None] + 0.2
    given = {"model": lambda: answers, "interpolation": lambda: lines}
    table = infill.energy_table(given, x_0, mask, "title")
    assert table["model"]["mse_of_mean"].value == pytest.approx(0.1**2, rel=1e-4)
    assert table["model"]["mse"].value == pytest.approx((0.01 + 0.04 + 0.16) / 3, rel=1e-4)
    assert table["model"]["mse_of_mean_to_interpolation"].value == pytest.approx(0.25, rel=1e-4)
    assert "mse_of_mean_to_interpolation" not in table["interpolation"]


def test_the_right_distribution_has_the_least_energy_score():
    """Two equally likely ends: both at once score .5 of either alone, as by hand."""
    x_0 = torch.cat([INSIDE] * 200)
    side = torch.where(torch.arange(200) % 2 == 0, 0.1, -0.1)[:, None]
    x_0[..., 0] += side * x_0[..., 2]
    both = torch.stack([x_0, x_0.roll(1, 0)], dim=1)
    middle = torch.cat([INSIDE] * 200)[:, None]
    score = {k: v.mean() for k, v in (
        ("both", infill.energy_score(both, x_0)[0]),
        ("one", infill.energy_score(x_0[:1, None].expand(200, 1, -1, -1), x_0)[0]),
        ("middle", infill.energy_score(middle, x_0)[0]),
    )}  # fmt: skip
    assert score == pytest.approx({"both": 0.0, "one": 0.1, "middle": 0.1}, abs=1e-6)


def test_what_an_answer_says_of_an_idle_frame_counts_as_it_stands():
    score, _ = infill.energy_score(torch.zeros(1, 1, L, 3), INSIDE)
    assert score == pytest.approx(np.hypot(0.3, 0.6))


def test_holding_the_last_position_is_right_for_who_rests(tmp_path):
    still = torch.cat([THROUGHOUT, ENDS, BEGINS] * 4)
    sections = {s.name: s for s in infill.run(subject_of(still, tmp_path), 2, 3, 12)}
    row = sections["continue_50"].table["hold_last_position"]
    # ENDS lands after the given frames, where holding says idle; BEGINS has lifted before
    assert row["energy_score"].n == 8
    assert row["energy_score"].value == pytest.approx(np.hypot(0.3, 0.6) / 2, rel=1e-5)
    assert set(sections) == {"infill", "infill_press_edges", "continue_50", "continue_125"}
    table = sections["infill_press_edges"].table
    ratio = table["model"]["energy_to_nearest_training_item"].value
    own, other = (table[k]["energy_score"].value for k in ("model", "nearest_training_item"))
    assert ratio == pytest.approx(own / other)
    assert "energy_to_interpolation" not in table["nearest_training_item"]


def test_a_question_to_hardly_any_window_is_not_put(tmp_path):
    names = [s.name for s in infill.run(subject_of(torch.cat([INSIDE] * 30), tmp_path), 2, 2, 4)]
    assert names == ["infill_press_edges", "infill"]


# ----------------------------------------------------------------------------------------
# PROTOCOLS
# ----------------------------------------------------------------------------------------

LAW = ("valid", "r", "r_ddim", "all_lines", "mse_mmse", "mse_exact_ddim", "type_mix_error")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_no_protocol_needs_an_edge_or_a_prior(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(realism, "find_classifier", lambda: None)  # slow, and tested elsewhere
    size = TINY.get(protocol.name, protocol.quick)
    for x in (some(1), torch.cat([THROUGHOUT] * 2), torch.cat([IDLE] * 2)):
        s = subject_of(x, tmp_path, x_unseen=x.flip(0), x_others=x)
        if protocol.name == "training":
            path = tmp_path / "diffusion_checkpoint_epoch_0.pth"
            state = TrainState(s.model, s.scheduler, s.config, 1, 6)
            save_checkpoint(path, state.to_checkpoint(0, None))
            s = replace(s, checkpoint=path)
        for section in protocol.run(s, **size):
            for row in section.table.values():
                assert not [m for m in row if m in LAW or m.endswith("_minus_law")], section.name


def test_windows_without_an_edge_are_counted_and_left_to_continue(tmp_path):
    x = torch.cat([INSIDE, THROUGHOUT, TWICE, THROUGHOUT])
    (section, *_) = keyframes.run(subject_of(x, tmp_path))
    assert section.table["model"]["mse"].n == 2
    assert " 2 of 4 windows have no such frame" in section.text and "continue" in section.text
    assert keyframes.run(subject_of(torch.cat([THROUGHOUT] * 2), tmp_path)) == []


def test_figures_of_any_windows_are_drawn(tmp_path):
    x = some(2)
    s = subject_of(x, tmp_path, x_unseen=x, x_others=x)
    sections = realism.run(s, num=6, num_recreated=6, steps=(2,))
    assert [p.name for p in sections[0].pictures] == ["realism.png", "marginals.png"]
    assert all(p.figure.axes for section in sections for p in section.pictures)
    assert make_replay(s.model, s.scheduler, x, x, s.sampling)["names"]
    still = torch.cat([THROUGHOUT] * 2)
    assert make_replay(s.model, s.scheduler, still, still, s.sampling) is None


def test_idle_windows_on_both_sides_do_not_blur_what_tells_contacts_apart():
    """Three in four windows are idle: with them, jittered contacts would score .72."""
    real = torch.cat([torch.zeros(300, L, 3), some(50)[some(50)[..., 2].sum(dim=1) > 0][:100]])
    shaken = realism.beside(real)["jittered_real"]
    table = realism.realism_table({"model": shaken}, real, realism.find_classifier())
    assert table["model"]["auc"].value > 0.95


def leave_regression(folder, config):
    """Write an untrained regression where python -m evaluation.baselines leaves its own."""
    content = {"config": asdict(config), "step": 1, "train_s": 0.0}
    content["ema_state_dict"] = rivals.Regression(build_model(config)).state_dict()
    folder.mkdir(parents=True)
    save_checkpoint(folder / "regression_from_known_frames.pth", content)


def test_the_regression_of_this_run_is_taken_and_no_other(tmp_path, capsys):
    config = TrainConfig(**SMALL)
    leave_regression(tmp_path / "run" / "baselines", config)
    folders = (tmp_path, tmp_path / "run")
    elsewhere = replace(config, data_dir="elsewhere", device="cpu")  # nothing of the network
    for same in (config, elsewhere):
        regression, scheduler = rivals.find_regression(folders, same, torch.device("cpu"))
        assert scheduler.prediction_type == "x0" and not regression.training
    assert capsys.readouterr().out == ""
    other = replace(config, seed=1)
    assert rivals.find_regression(folders, other, torch.device("cpu")) is None
    assert "belongs to another checkpoint" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------
# VERDICT
# ----------------------------------------------------------------------------------------


def test_the_criteria_of_one_kind_of_gestures_are_not_asked_of_the_other():
    straight, other = (criteria.criteria_for(d) for d in (criteria.STRAIGHT, criteria.OTHER))
    assert {c.metric for c in straight} >= {"valid", "r", "type_mix_error"}
    assert not {c.metric for c in other} & {"valid", "r", "r_ddim", "type_mix_error", "all_lines"}
    assert {"energy_to_regression", "mse_to_interpolation"} <= {c.metric for c in other}
    assert not [c for c in straight if c.metric.startswith("energy_to")]


def test_interpolation_is_a_limit_of_straight_gestures_and_a_control_of_others():
    row = {"mse": criteria.Estimate(1e-3, (1e-3, 1e-3), 9)}
    tables = {"keyframes": {"model": row, "interpolation": row}}
    verdicts = {
        data: next(v for v in criteria.judge(tables, data=data) if v.criterion.metric == "mse")
        for data in (criteria.STRAIGHT, criteria.OTHER)
    }
    assert verdicts[criteria.STRAIGHT].verdict == "met"
    assert verdicts[criteria.OTHER].verdict == "not discriminating"


def test_the_first_screen_says_who_is_better_at_what():
    def table(own, other, name, ci):
        rows = {"model": own, name: other}
        rows = {k: {"energy_score": criteria.Estimate(v, None, 9)} for k, v in rows.items()}
        rows["model"][f"energy_to_{name}"] = criteria.Estimate(own / other, ci, 9)
        return rows

    edges = table(0.02, 0.01, "interpolation", (1.5, 2.5))
    edges["model"]["mse_of_mean"] = criteria.Estimate(0.003, None, 9)
    edges["model"]["mse_of_mean_to_interpolation"] = criteria.Estimate(0.5, (0.4, 0.6), 9)
    edges["interpolation"]["mse_of_mean"] = criteria.Estimate(0.006, None, 9)
    tables = {
        "infill_press_edges": edges,
        "continue_50": table(0.02, 0.04, "regression", (0.4, 0.6)),
        "continue_125": table(0.02, 0.02, "hold_last_position", (0.9, 1.1)),
    }
    said = recorded.summarise("What was recorded.", tables, {})
    assert said[0].startswith("In 2 of 4 comparisons with simple answers") and "1 worse" in said[0]
    assert said[1] == "What was recorded."
    assert said[2:] == [
        "The mean of many answers given the press edges (MSE 0.00300): the model is better than "
        "straight lines (0.00600).",
        "Many answers given the press edges (energy score 0.0200): the model is worse than "
        "straight lines (0.0100).",
        "Going on after 50 frames (energy score 0.0200): the model is better than "
        "the regression (0.0400).",
        "Going on after 125 frames (energy score 0.0200): the model is neither better nor worse, "
        "for sure, than holding the last position (0.0200).",
    ]
    exact = recorded.Duel("a task", "lines", 0.1, 0.0, None, "MSE")
    assert exact.outcome == "rival" and exact._replace(own=0.0).outcome == "open"


# ----------------------------------------------------------------------------------------
# COMMAND
# ----------------------------------------------------------------------------------------


def test_the_report_of_a_recording(timeline, tmp_path, monkeypatch):
    make_tiny(monkeypatch)
    folders = {"data_dir": str(timeline / "train"), "val_data_dir": str(timeline / "val")}
    config = TrainConfig(**SMALL, **folders, num_timesteps=20, num_inference_steps=2)
    torch.manual_seed(0)
    state = TrainState(build_model(config), build_scheduler(config), config, 1, 6)
    path = tmp_path / "run" / "diffusion_checkpoint_epoch_0.pth"
    path.parent.mkdir()
    save_checkpoint(path, state.to_checkpoint(0, None))
    leave_regression(path.parent / "baselines", config)
    assert main(["--checkpoint", str(path.parent), "--quick", "--device", "cpu"]) == 0
    folder = path.parent / "report"
    results = json.loads((folder / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert results["about"]["distribution"] == "not known"
    assert {"keyframes", "continue_50", "realism", "generate"} <= set(results["protocols"])
    for table in results["protocols"].values():
        for row in table.values():
            assert not [m for m in row if m in LAW or m.endswith("_minus_law")]
    assert {"other_users", "validation_data"} <= set(results["protocols"]["realism"])
    assert "regression" in results["protocols"]["continue_50"]
    page = (folder / "report.html").read_text("utf-8")
    assert "8 contacts of 1 user" in page and "Bayes" not in page
    words = [v["criterion"] for v in results["verdicts"]]
    assert len(words) == len(criteria.criteria_for(criteria.OTHER))
