"""Distillation: what a teacher makes of noise, and a student that does it in one step.

python -m pytest tests/test_distillation.py
"""

import argparse
import json
import math

import torch
from conftest import TINY, L, content_of, make_gestures
from torch import nn

import train_diffusion_ddim as tdd
from benchmarks import distillation, measure
from train_diffusion_ddim import DDIMScheduler, TrainConfig, draw_lesson, draw_lessons
from trainlib.checkpoint import newest_checkpoint
from trainlib.gesture_files import read_gestures
from trainlib.legendre import legendre_table
from trainlib.lessons import curve_lessons
from trainlib.state import TrainState

T = 50
SCHEDULER = DDIMScheduler(
    T, beta_schedule="cosine", prediction_type="x0", spacing="log_sigma", sigma_min=0.05
)
FINE = DDIMScheduler(
    1000, beta_schedule="wide_cosine", prediction_type="x0", spacing="log_sigma", sigma_min=1e-3
)


class Sorter(nn.Module):
    """A teacher that makes the first of two gestures if the first number of the noise is positive.

    Both are idle at that frame, so the noise is seen there on all the way. With a goal it is the
    goal's first number that decides.
    """

    known_frames, seq_len, action_dim, context_dim = True, L, 3, 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.two = tdd.to_model_units(make_gestures(2))

    def forward(self, x_t, t, known=None, known_mask=None, context=None):
        idle = -(SCHEDULER.alphas_cumprod[t] ** 0.5)
        decides = x_t[:, 0, 0] - idle if context is None else context[:, 0]
        return self.two[(decides <= 0).long()]


def drawn_for(num, context=None):
    torch.manual_seed(1)
    return tdd.draw(make_gestures(num, seed=3), T, 0.5, context)


def test_lessons_are_what_the_teacher_makes_of_the_noise_drawn():
    """x_0 by hand, and `add_noise` with the eps of a lesson is the noise that the teacher had."""
    drawn, x_0 = drawn_for(40), make_gestures(40, seed=3)
    made, lessons = draw_lessons(Sorter().eval(), SCHEDULER, x_0, drawn)
    two = make_gestures(2)
    expected = two[(drawn.eps[:, 0, 0] <= 0).long()]
    expected = torch.where(drawn.known_mask[..., None], x_0, expected)
    clear = drawn.eps[:, 0, 0].abs() > 0.05  # beyond rounding
    expected = tdd.to_gesture(expected)
    torch.testing.assert_close(made[clear], expected[clear], atol=1e-5, rtol=0)
    start_t = SCHEDULER.timestep_pairs(tdd.LESSON_STEPS)[0][0]
    assert (lessons.t == start_t).all() and torch.equal(lessons.known_mask, drawn.known_mask)
    x_T, _ = SCHEDULER.add_noise(tdd.to_model_units(made), start_t, lessons.eps)
    torch.testing.assert_close(x_T, drawn.eps, atol=1e-5, rtol=0)


def test_a_teacher_is_told_the_goals_that_its_student_will_see():
    goals = torch.randn(40, 2)
    drawn = drawn_for(40, goals)
    made, lessons = draw_lessons(Sorter().eval(), SCHEDULER, make_gestures(40, seed=3), drawn)
    unknown = ~drawn.known_mask.any(dim=1)
    expected = make_gestures(2)[(drawn.context[:, 0] <= 0).long()]
    torch.testing.assert_close(made[unknown], expected[unknown], atol=1e-5, rtol=0)
    rows = torch.arange(7, 19)
    assert torch.equal(draw_lesson(lessons, rows, T, 0).context, drawn.context[rows])


def test_half_of_a_lesson_is_where_the_teacher_began():
    _, lessons = draw_lessons(Sorter().eval(), SCHEDULER, make_gestures(40), drawn_for(40))
    rows = torch.arange(40).repeat(50)
    lesson = draw_lesson(lessons, rows, T, seed=4)
    start_t = int(lessons.t[0])
    at_start = (lesson.t == start_t).float().mean()
    assert abs(at_start - 0.5) < 0.04
    below = lesson.t[lesson.t < start_t]
    counts = torch.bincount(below, minlength=start_t).float()
    assert (counts > 0).all() and below.min() == 0  # uniform: 1000 over about 45
    assert torch.equal(lesson.eps, lessons.eps[rows])
    strategy = lessons.task[rows] // tdd.NUM_T_BINS
    assert torch.equal(lesson.task, strategy * tdd.NUM_T_BINS + tdd.NUM_T_BINS * lesson.t // T)
    again = draw_lesson(lessons, rows, T, seed=4)
    assert torch.equal(again.t, lesson.t)
    assert not torch.equal(draw_lesson(lessons, rows, T, seed=5).t, lesson.t)


def test_a_student_does_in_one_step_what_its_teacher_does_in_twenty():
    """Which of two gestures it is, of noise that it never saw; chance would be right by half."""
    options = TINY | {"prediction_type": "x0", "contacts": True, "d_model": 32, "dropout": 0.0}
    config = TrainConfig(**options, decisive=True, lr=5e-3, augment=False, sigma_min=0.05)
    torch.manual_seed(0)
    model, scheduler, steps = tdd.build_model(config), tdd.build_scheduler(config), 500
    x_0 = make_gestures(400, seed=3)
    made, lessons = draw_lessons(Sorter().eval(), scheduler, x_0, tdd.draw(x_0, T, 0.0))
    state = TrainState(model, scheduler, config, steps, tdd.NUM_TASKS)
    for i in range(steps):
        rows = (torch.arange(32) * 7 + 13 * i) % 400
        tdd.train_step(state, made[rows], None, draw_lesson(lessons, rows, T, i))
    start_t, x_T = int(lessons.t[0]), torch.randn(200, L, 3)
    drawn = scheduler.sample(state.ema, x_T.shape, "cpu", 1, x_T=x_T, start_t=start_t)
    two = make_gestures(2)
    error = (drawn[:, None] - two).square().mean(dim=(2, 3))
    assert error.min(dim=1).values.mean() < 0.2 * (two[0] - two[1]).square().mean()
    right = error.argmin(dim=1) == (x_T[:, 0, 0] <= 0).long()
    clear = x_T[:, 0, 0].abs() > 0.3
    assert right[clear].float().mean() > 0.9


class Bell(nn.Module):
    """A teacher whose curves are the posterior mean of coefficients that are N(0, STD²).

    The noise z of a contact then leads to STD·z/√(1 + STD²/v), v its variance over ᾱ.
    """

    STD = 0.05

    def __init__(self):
        super().__init__()
        self.output_projection = self
        self.shapes, self.max_contacts, self.certain = legendre_table(L, 8), 1, 0.0
        levels = [-2 * math.log(2 * FINE.sigma(t)) for t in range(1000)]
        self.log_snr = torch.tensor(levels)
        self.seen = []

    def curves(self, c_t, tokens, log_snr, n, decided_below):
        assert tokens is None and decided_below == 0.0
        self.seen.append((c_t, n))
        v = torch.exp(-log_snr) / n
        return c_t / torch.sigmoid(log_snr).sqrt() * self.STD**2 / (self.STD**2 + v), None, None


def test_curves_are_taught_by_curves_without_the_choice_of_their_noise():
    """The choice of contacts by their noise is a mean of (2, 0.5) in x and y, taken off again."""
    teacher, x_0 = Bell(), torch.zeros(600, L, 3)
    x_0[:, 3:11] = torch.tensor([0.5, 0.5, 1.0])
    x_0[5] = 0  # idle
    drawn = tdd.draw(x_0, 1000, 0.0)
    known_mask = torch.arange(600)[:, None].expand(-1, L) == 7  # all of the seventh
    choice = torch.tensor([2.0, 0.5, 0.0]) / 8**0.5
    drawn = drawn._replace(eps=drawn.eps + choice, known_mask=known_mask)
    made, lessons = curve_lessons(teacher, FINE, 20, x_0, drawn, seed=0)
    assert torch.equal(made[[5, 7]], x_0[[5, 7]]) and torch.equal(made[..., 2], x_0[..., 2])
    assert not made[:, 11:].any()

    began = teacher.seen[0][0] * 8**0.5  # the noise of the gestures, projected
    assert began.shape == (598, 1, 16)
    torch.testing.assert_close(began.mean(dim=0), torch.zeros(1, 16), atol=1e-5, rtol=0)
    assert ((began.std(dim=0) - 1).abs() < 0.15).all()
    start_t = FINE.timestep_pairs(20)[0][0]
    places = tdd.to_model_units(made[:, 3:11, 0]).mean(dim=1)
    places = places[(torch.arange(600) != 5) & (torch.arange(600) != 7)]
    v = 4 * FINE.sigma(start_t) ** 2 / 8
    exact = Bell.STD * began[:, 0, 0] / (1 + Bell.STD**2 / v) ** 0.5
    torch.testing.assert_close(places, exact, atol=1e-4, rtol=0.02)

    c_0, eps, n = lessons
    assert c_0.shape == eps.shape == (600, 32, 1, 16) and (n == 8).all()
    variance = (1 - FINE.alpha_bar(start_t)) / n
    c_T = FINE.alpha_bar(start_t) ** 0.5 * c_0 + variance.sqrt() * eps
    z = (c_T * n.sqrt()).flatten(0, 2)  # chosen, as a student will see it
    expected = torch.zeros(16).index_put((torch.tensor([0, 8]),), torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(z.mean(dim=0), expected, atol=0.15, rtol=0)
    assert ((z.std(dim=0) - 1).abs() < 0.03).all()
    less = (z - z.mean(dim=0))[:, 0]
    assert torch.corrcoef(torch.stack([less, c_0.flatten(0, 2)[:, 0]]))[0, 1] > 0.999


def test_curves_that_depend_on_more_than_noise_are_left_as_they_are():
    """Goals; other contacts in the window; frames that are known of every gesture; no contact."""
    teacher, x_0 = Bell(), make_gestures(20)
    drawn = tdd.draw(x_0, T, 0.0)
    cases = [(1, x_0, drawn._replace(context=torch.ones(20, 2))), (3, x_0, drawn)]
    cases += [(1, x_0, drawn._replace(known_mask=torch.ones(20, L, dtype=torch.bool)))]
    cases += [(1, torch.zeros_like(x_0), drawn)]
    for most, gestures, given in cases:
        teacher.max_contacts = most
        made, lessons = curve_lessons(teacher, SCHEDULER, 20, gestures, given, seed=0)
        assert lessons is None and torch.equal(made, gestures)


def test_a_decisive_network_decides_outside_of_training():
    options = {"seq_len": L, "d_model": 16, "nhead": 2, "num_layers": 1, "patch_size": 5}
    model = tdd.MinimalDiffusionTransformer(**options, contacts=True, decisive=True)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x_t, t = torch.randn(8, L, 3), torch.full((8,), 700)
    press = model.train()(x_t, t)[..., 2]
    assert ((press > -0.99) & (press < 0.99)).any()
    decided, decisions = model.eval()(x_t, t, made_of=(x_t, x_t))
    assert torch.equal(decided[..., 2], torch.where(decisions.log_odds > 0, 1.0, -1.0))


def test_the_command_line_distils_samples_and_resumes(straight_run, tmp_path, capsys):
    student = tmp_path / "student"
    flags = ["--distill", str(straight_run), "--save_dir", str(student), "--num_epochs", "2"]
    assert tdd.main([*flags, "--save_every", "1", "--batch_size", "2", "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"{straight_run} makes 10 gestures of noise, in 20 steps" in out
    _, scheduler, config = tdd.load_model(student)
    assert (config.num_inference_steps, config.sampler, config.eta) == (1, "ddim", 0)
    assert config.decisive and config.d_model == TINY["d_model"]
    assert config.augment is False and config.curve_steps == scheduler.curve_steps == 0
    _, theirs, _ = tdd.load_model(straight_run)
    begins = theirs.timestep_pairs(tdd.LESSON_STEPS)[0][0]
    assert scheduler.timestep_pairs(1) == [(begins, -1)]
    samples = tmp_path / "samples"
    argv = ["--sample", "3", "--checkpoint", str(student), "--output_dir", str(samples)]
    assert tdd.main(argv) == 0
    assert read_gestures(samples, L).shape == (3, L, 3)
    whole = content_of(newest_checkpoint(student))
    newest_checkpoint(student).unlink()
    assert tdd.main(["--resume", str(student)]) == 0
    again = content_of(newest_checkpoint(student))
    for name, tensor in whole["ema_state_dict"].items():
        assert torch.equal(again["ema_state_dict"][name], tensor), name


def test_a_teacher_without_known_frames_teaches_without_them(tiny_flags, tmp_path, cli):
    teacher = {"known_frames": False, "save_dir": tmp_path / "teacher", "num_epochs": 1}
    assert cli(*tiny_flags(**teacher))[0] == 0
    flags = ["--distill", tmp_path / "teacher", "--save_dir", tmp_path / "run"]
    code, _, err = cli(*flags, "--num_epochs", 1)
    assert code == 0, err
    assert tdd.load_model(tmp_path / "run")[2].known_share == 0


def test_a_student_has_the_network_of_its_teacher(straight_run, tmp_path, capsys):
    flags = ["--save_dir", str(tmp_path / "x")]
    assert tdd.main(["--distill", str(straight_run), "--d_model", "32", *flags]) == 2
    assert "--d_model contradicts" in capsys.readouterr().err
    ordinary = ["--resume", str(straight_run), "--distill", str(straight_run)]
    assert tdd.main([*ordinary, "--num_epochs", "99"]) == 2
    assert "a run is a student from its first step" in capsys.readouterr().err
    assert tdd.main(["--distill", str(straight_run), "--augment", *flags]) == 2
    assert "--distill needs --no-augment" in capsys.readouterr().err
    assert tdd.main(["--distill", str(tmp_path / "none"), *flags]) == 2
    err = capsys.readouterr().err
    assert "none" in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_the_table_has_a_row_for_each_setting(straight_run, tmp_path, monkeypatch):
    none = {"title": "plans", "rows": [{"planner": "none"}], "note": ""}  # gestures are too short
    monkeypatch.setattr(distillation, "plans_table", lambda args: none)
    flags = ["--teacher", str(straight_run), "--student", str(straight_run), "--num", "20"]
    flags += ["--recreated", "3", "--rounds", "1", "--output_dir", str(tmp_path)]
    options = distillation.OPTIONS
    name = "distillation"
    assert measure.main(name, distillation.__doc__, distillation.measure, options, flags) == 0
    (path,) = tmp_path.glob("distillation-*.json")
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert [row["steps"] for row in rows] == [*distillation.SETTINGS]
    by_name = {row["steps"]: row for row in rows}
    row = by_name["student, 4"]
    same = {k: v for k, v in row.items() if k != "steps" and not k.startswith("ms")}
    assert same.items() <= by_name["teacher, 4"].items()
    assert measure.main(name, "", distillation.measure, options, flags[:2]) == 2


def test_plans_are_made_by_both_in_both_times(monkeypatch):
    """Of a stand-in that solves a half in half a second and a quarter in a tenth."""
    asked = []

    def run(job, planner, model, *, budget_ms, num_plans):
        asked.append((planner, job.task, job.stage, budget_ms, num_plans))
        solved = "0101" if budget_ms == 500 else "0100"
        return {"task": job.task, "solved": {"250": solved}, "used": 7, "ms_most": budget_ms - 1}

    monkeypatch.setattr(distillation, "run_shipped", run)
    monkeypatch.setattr(distillation.Planner, "load", lambda run: run)
    table = distillation.plans_table(argparse.Namespace(teacher="old", student="new", plans=4))
    assert [row["all, %"] for row in table["rows"]] == [50, 50, 25, 25]
    assert [row["ms at most"] for row in table["rows"]] == [499, 499, 99, 99]
    assert {a[:1] + a[2:] for a in asked} == {
        (who, "batched", *given) for who in ("old", "new") for given in ((500, 128), (100, 200))
    }
    assert {a[1] for a in asked} == {*distillation.TASKS}
