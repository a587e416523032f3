"""Where gestures may begin and end on the screen, and the planner as the benchmark runs it.

Why: what should change on the screen says more of where to touch than any prior of gestures.

    python -m pytest tests/test_planning_places.py
"""

import math
import time

import numpy as np
import pytest
import torch
from conftest import make_gestures

import train_diffusion_ddim as tdd
from planning import places, shipped
from planning.benchmark import Job
from planning.planner import Planner
from planning.search import to_ramp
from planning.world import soft_world

L = 250
ROWS, COLUMNS = 4, 8


def line(begin, end, first=50, last=90):
    """One gesture (L, 3): a straight contact."""
    x, share = torch.zeros(L, 3), torch.linspace(0, 1, last - first + 1)[:, None]
    x[first : last + 1, :2] = torch.lerp(torch.tensor(begin), torch.tensor(end), share)
    x[first : last + 1, 2] = 1
    return x


def ends_of(actions):
    return to_ramp(actions).unflatten(-1, (2, 3))[..., :2]


def one_cell(row, column):
    weights = torch.zeros(ROWS, COLUMNS)
    weights[row, column] = 3.0
    return weights


def is_in(xy, row, column):
    low = torch.tensor([column / COLUMNS, row / ROWS])
    high = torch.tensor([(column + 1) / COLUMNS, (row + 1) / ROWS])
    return ((xy >= low - 1e-6) & (xy <= high + 1e-6)).all(dim=-1)


def test_changed_places():
    """Token 5 should change; token 14 is there; all differ by a little, which is noise."""
    tokens = torch.full((16, 3), 0.25)
    tokens[14] = 2.0
    goal = tokens + 0.01
    goal[5] += 1
    begin, end = places.changed_places(tokens, goal.numpy())
    assert begin.shape == end.shape == (4, 4)
    assert begin[1, 1].item() == pytest.approx(0.5) == begin[3, 2].item()
    assert end[1, 1].item() == pytest.approx(1) == begin.sum().item() == end.sum().item()


def test_without_any_change_all_places_are_alike():
    found = places.changed_places(torch.zeros(16, 3), torch.zeros(16, 3))
    assert torch.allclose(found, torch.full((2, 4, 4), 1 / 16))


@pytest.mark.parametrize("shapes", [((16, 3), (16, 4)), ((15, 3), (15, 3)), ((0, 3), (0, 3)),
                                    ((4, 4, 3), (4, 4, 3))])  # fmt: skip
def test_screens_must_be_alike_and_square(shapes):
    with pytest.raises(tdd.UserError, match="alike and of a square screen"):
        places.changed_places(*map(torch.zeros, shapes))


def test_places_are_drawn_by_their_weights():
    weights = torch.stack([one_cell(1, 6) + one_cell(3, 0) / 3, one_cell(0, 2)])
    begin, end = places.draw_places(weights, 4000, np.random.default_rng(0)).unbind(dim=1)
    assert is_in(end, 0, 2).all() and (is_in(begin, 1, 6) | is_in(begin, 3, 0)).all()
    assert is_in(begin, 1, 6).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert end.std(dim=0).tolist() == pytest.approx(
        [1 / COLUMNS / 12**0.5, 1 / ROWS / 12**0.5], rel=0.05
    ), "evenly within a cell"


def test_the_gesture_is_chosen_that_needs_least_moving():
    touch, right, down, left = (
        line((0.5, 0.5), end) for end in ((0.5, 0.5), (0.8, 0.5), (0.5, 0.9), (0.2, 0.5))
    )
    wanted = torch.tensor([[[0.1, 0.1], [0.1, 0.6]]])
    for order, best in (((right, down, touch, left), down), ((touch, right, down, left), touch)):
        assert torch.equal(places.fitting(torch.stack(order)[None], wanted)[0], best)


def test_moved_gestures_keep_their_detail():
    """An arc stays as high over its chord; a touch that drifts is moved as a whole."""
    frames = torch.arange(100, 200)
    arc, drift = torch.zeros(2, L, 3)
    share = (frames - 100) / 99
    arc[frames] = torch.stack(
        [0.2 + 0.4 * share, 0.3 + 0.1 * (math.pi * share).sin(), 0 * share + 1], dim=1
    )
    drift[frames] = torch.stack([0.5 + 0.01 * share, 0.5 + 0 * share, 0 * share + 1], dim=1)
    idle = torch.zeros(L, 3)
    wanted = torch.tensor([[0.3, 0.6], [0.8, 0.5]]).expand(3, 2, 2)
    moved = places.moved_to(torch.stack([arc, drift, idle]), wanted)
    assert torch.allclose(ends_of(moved[:1]), wanted[:1], atol=1e-5)
    chord = torch.lerp(wanted[0, 0], wanted[0, 1], share[:, None])
    height = moved[0, frames, :2] - chord
    assert torch.allclose(height[:, 1], 0.1 * (math.pi * share).sin(), atol=1e-4)
    shift = moved[1, frames] - drift[frames]
    assert torch.allclose(shift, torch.tensor([-0.2, 0.1, 0]).expand(100, 3), atol=1e-5)
    assert not moved[2].any()


def test_a_contact_that_is_held_begins_where_it_is():
    base = line((0.4, 0.4), (0.5, 0.4), 0, 150)[None]
    wanted = torch.tensor([[[0.9, 0.9], [0.7, 0.8]]])
    free = torch.arange(L) >= 25
    moved = places.moved_to(base, wanted, free)
    assert torch.equal(moved[0, 24], base[0, 24]), "from the last frame that is not free"
    assert torch.allclose(ends_of(moved)[0, 1], wanted[0, 1], atol=1e-5)


def bank_planner(untrained_run, gestures):
    planner = Planner.load(untrained_run)
    planner.bank = gestures
    return planner


def test_the_planner_draws_at_places(untrained_run):
    """Every action that is evaluated, doing nothing aside, begins and ends where it may."""
    seen = []

    def cost_fn(actions):
        seen.append(actions)
        return 1 + actions.sum(dim=(1, 2)).clamp(max=1)  # nothing is best: no refinement helps

    bank = torch.cat([make_gestures(200, L), line((0.4, 0.4), (0.4, 0.4)).expand(100, L, 3)])
    planner = bank_planner(untrained_run, bank)
    maps = torch.stack([one_cell(2, 5), one_cell(0, 1)])
    planner.plan(cost_fn, places=maps, num_plans=150, budget_ms=math.inf)
    drawn = torch.cat(seen)[1:151]
    begin, end = ends_of(drawn).unbind(dim=1)
    stays = (begin - end).norm(dim=1) < 0.02
    assert is_in(begin, 2, 5).all() and (is_in(end, 0, 1) | stays).all()
    share = stays.float().mean().item()
    assert share == pytest.approx(1 / 3, abs=0.1), "touches and swipes as in the bank"


def test_known_frames_stay_at_places(untrained_run):
    seen = []
    planner, mask = Planner.load(untrained_run), torch.arange(L) < 25
    known = line((0.4, 0.4), (0.5, 0.4), 0, 25)
    maps = torch.stack([one_cell(2, 5), one_cell(0, 1)])
    planner.plan(
        lambda a: (seen.append(a), a.sum(dim=(1, 2)))[1], known=known, known_mask=mask,
        places=maps, num_plans=4, budget_ms=math.inf,
    )  # fmt: skip
    assert all(torch.equal(a[:25], known[:25]) for actions in seen for a in actions)


@pytest.mark.parametrize("wrong", [
    torch.ones(4, 8), torch.ones(3, 4, 8), -torch.ones(2, 4, 8), torch.zeros(2, 4, 8),
    torch.stack([torch.ones(4, 8), torch.zeros(4, 8)]), torch.full((2, 4, 8), math.nan),
    [[1], [1, 2]], [torch.ones(4, 8, requires_grad=True)] * 2,
    torch.full((2, 4, 8), math.inf), "map", torch.ones(2, 0, 8), np.ones((2, 4, 8), complex),
])  # fmt: skip
def test_places_that_are_none(untrained_run, wrong):
    with pytest.raises(tdd.UserError, match="places must be") as error:
        Planner.load(untrained_run).plan(lambda a: a.sum((1, 2)), places=wrong)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------
# THE PLANNER IN THE BENCHMARK
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "calls"), [(1, 5), (2, 3), (32, 1)])
@pytest.mark.parametrize("slow", [0.0, 0.05])
def test_a_call_takes_its_price_however_long_it_takes(width, calls, slow):
    """2 ms of the clock a candidate, or as many as fit; thrice as much with its gradient."""

    def cost_fn(actions):
        time.sleep(slow)
        return actions.square().sum(dim=(2, 3))

    cost = shipped.PricedCost(cost_fn, width)
    for actions, times in ((torch.ones(5, L, 3), 1), (torch.ones(5, L, 3, requires_grad=True), 3)):
        began = cost.clock()
        costs = cost(actions)
        if costs.requires_grad:
            costs.sum().backward()
        assert cost.clock() - began == pytest.approx(times * calls * 0.002, abs=0.002)


def test_the_planner_keeps_its_half_second(untrained_run):
    """At 2 ms each at most 250 evaluations, whatever the world model takes here."""
    planner = bank_planner(untrained_run, make_gestures(200, L))
    clock = planner.clock
    for stage, most in (("main", 250), ("batched", 250 * 32)):
        row = shipped.run_shipped(Job(stage, "planner", "slider", 3, 2), planner, soft_world)
        assert 100 < row["used"] <= most and row["ms_most"] < 505
        assert len(row["solved"]["250"]) == 2 and sum(row["made_by"].values()) == 2
    assert row["used"] > 1000
    assert planner.clock is clock


def test_only_one_of_the_rows_is_told_of_changes(untrained_run, monkeypatch):
    planner, told = bank_planner(untrained_run, make_gestures(200, L)), []
    plan = planner.plan
    monkeypatch.setattr(
        planner, "plan", lambda *a, **k: told.append("places" in k) or plan(*a, **k)
    )
    for name in shipped.SHIPPED:
        shipped.run_shipped(Job("main", name, "drag", 3, 1), planner, soft_world)
    assert told == [True, False]


def test_a_world_model_that_errs_is_only_chosen_by(untrained_run):
    """As the rule has it: draws for all of the half second, and no gradient is taken."""
    planner, graded = bank_planner(untrained_run, make_gestures(200, L)), []

    def world(scenes, actions):
        graded.append(actions.requires_grad)
        return soft_world(scenes, actions)

    for refine in (False, True):
        graded.clear()
        row = shipped.run_shipped(
            Job("main", "planner", "slider", 3, 2), planner, world, refine=refine
        )
        assert row["settings"] == {"refine": refine} and any(graded) == refine
        assert 150 < row["used"] <= 250
