"""What an expert would try first: points that cover evenly, searches along axes, draws at changes.

Why: a learned planner that only beats weak baselines has shown nothing.

    python -m pytest tests/test_planning_baselines.py
"""

import math
import sys

import numpy as np
import pytest
import torch

import train_diffusion_ddim as tdd
from planning import baselines, benchmark, goals, search, tasks, world
from planning.methods import cost_methods

L = 250


def rng(seed=0):
    return np.random.default_rng(seed)


def ends(actions):
    """Where gestures begin and end, (..., 2) each, and how many frames they are pressed."""
    z = search.to_ramp(actions)
    return z[..., :2], z[..., 3:5], actions[..., 2].sum(-1)


def test_sobol_points_cover_evenly():
    """In each eighth of every axis a share of an eighth of 256 points; each instance its own."""
    points = baselines.sobol(3, 256, 6, rng())
    assert points.shape == (3, 256, 6) and points.dtype == torch.float32
    counts = torch.stack([(points // 0.125 == i).sum(1) for i in range(8)])
    assert (counts - 32).abs().max() <= 1
    assert not torch.equal(points[0], points[1])
    assert not torch.equal(points, baselines.sobol(3, 256, 6, rng(1)))
    assert torch.equal(points, baselines.sobol(3, 256, 6, rng()))


def test_structured_draws_are_taps_and_swipes():
    drawn = baselines.draw_structured(2, 512, rng())
    assert torch.equal(drawn, tdd.to_gesture(drawn))
    begin, end, frames = ends(drawn)
    is_tap = (begin - end).norm(dim=-1) < 1e-6
    assert is_tap.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert frames.min() >= 0.02 * 249 - 1 and frames.max() <= 0.3 * 249 + 2
    assert (end - begin)[~is_tap].abs().mean() > 0.25, "anywhere"


def quadratic(centre):
    """Cost of actions (I, K, L, 3): the squared distance of their six numbers from a centre."""
    return lambda actions: (search.to_ramp(actions) - centre).square().sum(-1)


@pytest.mark.parametrize("name", ["sobol_axes", "sobol_cma", "sobol_adam", "sobol_halving"])
def test_searches_find_an_easy_minimum(name):
    centre = torch.tensor([0.3, 0.6, 0.4, 0.7, 0.2, 0.5])
    given = cost_methods()[name]
    objective = search.Objective(quadratic(centre), 3, 250)
    if name in ("sobol_adam", "sobol_halving"):  # which need a gradient

        def cost_fn(actions):
            press = actions[..., 2]
            place = (press[..., None] * actions[..., :2]).sum(-2) / (
                press.sum(-1)[..., None] + 1e-3
            )
            return ((place - centre[:2]) ** 2).sum(-1)

        objective = search.Objective(cost_fn, 3, 250)
    given.run(objective, rng())
    assert objective.best_cost.max() < 0.01


def test_a_coordinate_search_moves_one_axis_at_a_time():
    """Of two candidates, which differ from the best along one axis; by less and less."""
    seen = []

    def cost_fn(actions):
        seen.append(search.to_ramp(actions)[0])
        return quadratic(torch.full((6,), 0.5))(actions)

    objective = search.Objective(cost_fn, 1, 60)
    baselines.coordinate_search(objective, rng(), share=0.4, step=0.1)
    assert len(seen[0]) == 24 and {len(z) for z in seen[1:]} == {2}
    costs = (seen[0] - 0.5).square().sum(-1)
    for z in seen[1:3]:
        moved = (z - seen[0][costs.argmin()]).abs() > 0.05
        assert (moved.sum(dim=1) <= 2).all()
    objective = search.Objective(quadratic(torch.full((6,), 0.5)), 1, 300)
    baselines.coordinate_search(objective, rng(), share=0.2, step=0.2)
    assert objective.best_cost < 2e-4


def test_cma_es_starts_again_where_it_has_converged(monkeypatch):
    """On a plateau every run stops at once: from the next best draw, five at most."""
    import cma

    begun = []

    class Counted(cma.CMAEvolutionStrategy):
        def __init__(self, start, *args):
            begun.append(tuple(np.round(start, 5)))
            super().__init__(start, *args)

        def stop(self):
            return {"tolfun": 0}

    monkeypatch.setattr(cma, "CMAEvolutionStrategy", Counted)
    objective = search.Objective(lambda a: torch.zeros(1, a.shape[1]), 1, 250)
    baselines.cma_es(objective, rng())
    assert len(begun) == len(set(begun)) == 5


def test_cma_es_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(tdd.UserError, match="pip install cma"):
        baselines.cma_es(search.Objective(quadratic(0.5), 1, 100), rng())


def test_halving_halves():
    """Rounds of eight, four, two and one; those that go on are the cheapest."""
    sizes = []

    def cost_fn(actions):
        if actions.requires_grad:
            sizes.append(actions.shape[1])
        return (actions[..., 2] * (actions[..., 0] - 0.5) ** 2).sum(-1)

    baselines.halving(search.Objective(cost_fn, 2, 400), rng(), starts=8)
    assert sorted(set(sizes), reverse=True) == [8, 4, 2, 1] == list(dict.fromkeys(sizes))
    spent = [3 * sizes.count(R) * R for R in (8, 4, 2, 1)]
    assert all(280 / 4 - 24 <= s <= 280 / 4 + 24 for s in spent), "rounds of equal budget"


def test_draws_at_changes_touch_what_changes():
    """One token differs, in row 3, column 12; another is not like the rest, in row 8, column 1."""
    tokens = torch.zeros(2, world.GRID**2, 5)
    tokens[:, 8 * world.GRID + 1] = 1
    goal = tokens.clone()
    goal[:, 3 * world.GRID + 12] += 2
    drawn = baselines.draw_at_changes(2, 400, rng(), tokens=tokens, goal_tokens=goal)
    begin, end, _ = ends(drawn)

    def inside(xy, column, row):
        corner = torch.tensor([column, row]) / world.GRID
        return ((xy >= corner - 1e-6) & (xy <= corner + 1 / world.GRID + 1e-6)).all(-1)

    changes, content = inside(begin, 12, 3), inside(begin, 1, 8)
    assert (changes | content).all() and changes.float().mean().item() == pytest.approx(
        0.5, abs=0.1
    )
    stays = (begin - end).norm(dim=-1) < 1e-6
    assert (stays | inside(end, 12, 3)).all()
    assert stays.float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_screens_without_a_change_are_drawn_on_too():
    same = torch.zeros(1, world.GRID**2, 5)
    drawn = baselines.draw_at_changes(1, 50, rng(), tokens=same, goal_tokens=same)
    begin, _, _ = ends(drawn)
    assert begin.std(dim=1).min() > 0.1


def test_draws_at_changes_solve_what_blind_draws_do_not():
    instances = tasks.make_instances("slider", 20, 5)
    solved = {}
    for name in ("changes", "structured"):
        method = cost_methods()[name]
        objective = search.Objective(tasks.model_cost(instances), 20, 150)
        method.run(objective, rng(), **benchmark.goal_of(method, instances))
        solved[name] = tasks.judge(instances, objective.best).float().mean()
    assert solved["changes"] > 0.4 > 0.2 > solved["structured"]


def test_jittered_regression_draws_around_its_answer():
    """The first candidate is the answer itself; the others differ in place, not in time."""
    seen = []

    def cost_fn(actions):
        seen.append(search.to_ramp(actions.detach()))
        return off_target(actions)

    def off_target(actions):
        return (actions[..., 2] * (actions[..., :2] - 0.5).square().sum(-1)).sum(-1)

    answer = torch.tensor([[0.2, 0.3, 0.7, 0.8]])
    policy = goals.GoalPolicy(None, None, {}, None, lambda context: answer, None, None)
    objective = search.Objective(cost_fn, 1, 250)
    goals.regress_jitter(objective, rng(), policy, torch.zeros(1, 3), share=0.3, spread=0.1)
    drawn = torch.cat([z[0] for z in seen[:2]])
    assert len(drawn) == 75 and (drawn[0] - goals.at_fixed_time(answer)[0]).abs().max() < 0.01
    others = drawn[1:, [0, 1, 3, 4]] - answer
    assert others.std(dim=0).mean().item() == pytest.approx(0.1, abs=0.02)
    assert (drawn[:, [2, 5]].std(dim=0) < 1e-6).all()
    assert math.isclose(objective.used, 250, abs_tol=9)
