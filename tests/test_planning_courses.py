"""Courses: what the simulator counts, by hand; knots that lift; how plans are held against people.

Why: a task that a straight line can do after all, or a judge that sleeps, would decide the
question of planning by accident.

    python -m pytest tests/test_planning_courses.py
"""

import numpy as np
import pytest
import torch
from conftest import press

import train_diffusion_ddim as tdd
from evaluation.events import events_of
from planning import benchmark, course_methods, courses, search
from planning.course_methods import run_course

L = 250


def path(*stops, first=20, last=None):
    """A contact through (frame, x, y) of stops, straight between them, (1, L, 3)."""
    frames, x, y = zip(*stops, strict=True)
    at = torch.arange(L)
    action = torch.zeros(1, L, 3)
    inside = (at >= frames[0]) & (at <= frames[-1])
    for axis, values in enumerate((x, y)):
        action[0, :, axis] = torch.from_numpy(np.interp(at, frames, values)).float()
    action[0, :, 2] = 1
    return action * inside[:, None]


def course(task, *points, known=None):
    return courses.Courses(task, torch.tensor([points]), known)


def assert_judged(of, action, good):
    """The judge says so, and the cost of what is good is near its least."""
    assert of.judge(action).item() is good
    cost = of.cost_fn()(tdd.to_gesture(action)[None]).item()
    assert (cost < 0.12) == good, cost


def test_an_obstacle_drops_what_runs_into_it():
    """Straight through it the icon is left at its edge, 0.12 from the middle."""
    of = course("around", (0.2, 0.5), (0.8, 0.5), (0.5, 0.5))
    assert_judged(of, path((20, 0.2, 0.5), (120, 0.8, 0.5)), False)
    bow = path((20, 0.2, 0.5), (70, 0.5, 0.3), (120, 0.8, 0.5))
    assert_judged(of, bow, True)
    assert_judged(of, path((20, 0.3, 0.5), (70, 0.5, 0.3), (120, 0.8, 0.5)), False)
    straight = of.cost_fn()(path((20, 0.2, 0.5), (120, 0.8, 0.5))[None]).item()
    assert straight == pytest.approx(0.8 - (0.5 - 0.12), abs=0.03)


def test_a_card_flies_by_its_speed_at_lift_off():
    """Rest for 100 ms, then 0.3 in 100 ms: 3 screens a second fly on by 0.75."""
    of = course("fling", (0.3, 0.5), (1.35, 0.5))
    throw = path((20, 0.3, 0.5), (75, 0.3, 0.5), (125, 0.6, 0.5))
    assert_judged(of, throw, True)
    assert_judged(of, path((20, 0.3, 0.5), (70, 0.6, 0.5)), False)
    assert_judged(of, path((20, 0.3, 0.5), (75, 0.3, 0.5), (175, 0.6, 0.5)), False)


def test_a_long_press_and_a_double_tap():
    of = course("long_press", (0.3, 0.6))
    assert_judged(of, press(L, (10, 209)), True)
    assert_judged(of, press(L, (10, 150)), False)
    of = course("double_tap", (0.3, 0.6))
    assert_judged(of, press(L, (10, 40), (80, 110)), True)
    assert_judged(of, press(L, (10, 40)), False)
    assert not of.judge(press(L, (10, 40), (160, 190))).item(), "too long a pause"
    assert not of.judge(press(L, (10, 40), (60, 90), (120, 130))).item()


def test_a_pattern_is_drawn_in_order_and_misses_the_others():
    dots = [(0.2, 0.2), (0.4, 0.2), (0.4, 0.4), (0.6, 0.6)]
    others = [(0.2, 0.4), (0.2, 0.6), (0.4, 0.6), (0.6, 0.2), (0.6, 0.4)]
    of = course("pattern", *dots, *others)
    way = [(20 + 40 * i, *dot) for i, dot in enumerate(dots)]
    assert_judged(of, path(*way), True)
    back = [(20 + 40 * i, *dot) for i, dot in enumerate(reversed(dots))]
    assert_judged(of, path(*back), False)
    assert not of.judge(path(*way, (180, 0.6, 0.4))).item(), "one dot too many"


def test_a_drag_goes_on_from_the_known_frames():
    """What an action says of the known frames counts for nothing."""
    of = courses.make_courses("continued", 1, 0)
    (begin, goal), at = of.points[0], courses.KNOWN - 1
    assert torch.equal(of.paste(torch.rand(1, 3, L, 3))[0, 2, : at + 1], of.known[0, : at + 1])
    x, y = of.known[0, at, :2].tolist()
    action = path((at, x, y), (200, *goal.tolist()))
    assert_judged(of, action, True)
    assert_judged(of, path((at, x, y), (200, *begin.tolist())), False)
    assert not of.judge(path((at, x, y), (249, *goal.tolist()))).item(), "it never lifts"
    assert_judged(of, path((100, *goal.tolist()), (200, *goal.tolist())), False)
    elsewhere = path((at, *goal.tolist()), (200, *goal.tolist()))
    assert not of.judge(elsewhere).item(), "a finger cannot jump"


@pytest.mark.parametrize("task", courses.TASKS)
def test_costs_have_a_gradient_and_instances_are_paired(task):
    of, more = courses.make_courses(task, 3, 1), courses.make_courses(task, 5, 1)
    assert torch.equal(of.points, more.points[:3])
    z = torch.rand(3, 4, 24, generator=torch.Generator().manual_seed(3))
    objective = search.Objective(of.cost_fn(), 3, 12)
    costs, gradient = objective.gradient(z, search.strokes)
    assert costs.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_strokes_lift_where_a_knot_says_so():
    """Three pieces, the second not touched: two contacts, from knot to knot."""
    knots = [[0.2, 0.3, 0.1, 0.9], [0.4, 0.3, 0.3, 0.1], [0.6, 0.3, 0.5, 0.9], [0.8, 0.3, 0.9, 0.2]]
    action = search.strokes(torch.tensor(knots).flatten()[None])
    assert torch.equal(action, tdd.to_gesture(action))
    first, second = (courses.contact(action, i) for i in (1, 2))
    assert courses.num_contacts(action).item() == 2
    for c, begin, end in ((first, knots[0], knots[1]), (second, knots[2], knots[3])):
        assert c.first.item() == pytest.approx(249 * begin[2], abs=1)
        assert c.last.item() == pytest.approx(249 * end[2], abs=1)
        assert c.begin[0].tolist() == pytest.approx(begin[:2], abs=0.02)
        assert c.end[0].tolist() == pytest.approx(end[:2], abs=0.02)
    ends = torch.tensor(knots)[[0, 3]]
    line = search.strokes(ends.flatten()[None])
    assert torch.equal(line[..., 2], search.ramp(ends[:, :3].flatten()[None])[..., 2])


def test_people_are_not_told_from_people_and_lines_are():
    """Contacts of the same generator pass; lines of constant speed give themselves away."""
    human = events_of(course_methods.human_windows(1500, 0).numpy())
    others = course_methods.human_windows(80, 1)
    assert course_methods.told_from_people(others, human) == pytest.approx(0.5, abs=0.15)
    z = torch.rand(80, 6, generator=torch.Generator().manual_seed(0))
    assert course_methods.told_from_people(search.ramp(z), human) > 0.9
    assert course_methods.told_from_people(others[:5], human) is None


def test_nobody_is_compared_twice():
    features = events_of(course_methods.human_windows(50, 0).numpy()).features
    features = features[features[:, 0] > 0]
    chosen = course_methods.nearest(np.repeat(features[:1], 5, axis=0), features)
    assert len(set(chosen)) == 5 and chosen[0] == 0


@pytest.mark.parametrize("name", ["line_adam", "knots_cem", "knots_adam", "people_bend"])
def test_methods_keep_to_the_budget(name):
    human = course_methods.human_windows(40, 0)
    methods = course_methods.course_methods(None, lambda: human)
    for task in ("double_tap", "continued"):
        job = benchmark.Job("courses", name, task, 0, 2, 60)
        row = run_course(job, methods[name], events_of(human.numpy()))
        assert row["used"] <= 60 and len(row["solved"]["60"]) == 2 and row["auc"] is None


def test_places_of_a_course():
    """The icon and its goal change, the obstacle is there: half of a half and of a third."""
    of = course("around", (0.2, 0.5), (0.8, 0.99), (0.5, 0.5))
    begin, end = of.places()[0]
    cells = {"icon": (8, 3), "goal": (15, 12), "obstacle": (8, 8)}
    assert [begin[at].item() for at in cells.values()] == pytest.approx([5 / 12, 5 / 12, 1 / 6])
    assert [end[at].item() for at in cells.values()] == pytest.approx([0.5, 0.5, 0])
    assert begin.sum().item() == end.sum().item() == pytest.approx(1)


def test_draws_are_moved_to_the_places_of_their_course():
    """A card thrown off the screen: gestures begin at the card or in the cell nearest its goal."""
    of = course("fling", (0.2, 0.5), (1.35, 0.5))
    drawn = course_methods.at_places(course_methods.base.draw_structured, of)(
        1, 60, np.random.default_rng(0)
    )
    begin = search.to_ramp(drawn)[0, :, :2]
    cells = {tuple(cell) for cell in (begin * 16).long().tolist()}
    assert drawn.shape == (1, 60, L, 3) and cells == {(3, 8), (15, 8)}
