"""The closed loop: each plan goes on from the last one's tail, on a screen that changes.

python -m pytest tests/test_planning_loop.py
"""

import numpy as np
import pytest
import torch
from conftest import press

from planning import benchmark, loop, tasks, world
from planning.planner import PlanResult

L = 250


class Fake:
    """A planner that presses in a known place, and notes what it is asked."""

    def __init__(self, *spans):
        self.asked, self.resets, self.action = [], 0, press(L, *spans)[0]

    def reset(self):
        self.resets += 1

    def plan(self, cost_fn, **given):
        self.asked.append(given)
        assert cost_fn(self.action[None]).shape == (1,)
        return PlanResult(self.action, 0.0, 1, 5.0, 1.0, "draw", "")


@pytest.mark.parametrize("warm", [False, True])
def test_a_plan_begins_with_the_tail_of_the_last(warm):
    planner = Fake((200, 240))
    bits, ms = loop.run_episode(planner, "slider", 0, warm=warm, budget_ms=9, steps=3)
    assert len(bits) == len(ms) == 3 and planner.resets == (1 if warm else 4)
    first, *others = planner.asked
    assert first["known"] is None is first["known_mask"], "nothing is known at first"
    for given in others:
        assert given["known_mask"].tolist() == [True] * 25 + [False] * 225
        assert torch.equal(given["known"][:25], planner.action[225:])
        assert not given["known"][25:].any()


def test_only_what_is_carried_out_counts(monkeypatch):
    """The goal is reached by what comes of 225 frames; the next step begins there."""
    seen = []

    def hard_world(scenes, actions):
        seen.append((actions.shape, scenes.pos[0, 0].clone()))
        return goals[-1]

    goals, new_goal = [], loop.new_goal
    monkeypatch.setattr(loop, "hard_world", hard_world)
    monkeypatch.setattr(loop, "DRIFT", 0.0)
    monkeypatch.setattr(loop, "new_goal", lambda *a: goals.append(new_goal(*a)) or goals[-1])
    bits, _ = loop.run_episode(Fake(), "drag", 1, warm=True, budget_ms=9, steps=6)
    assert bits == "111111" and len(goals) == 2
    assert {shape for shape, _ in seen} == {(1, 225, 3)}
    for step, goal in ((1, 0), (5, 1)):
        assert torch.equal(seen[step][1], goals[goal].pos[0, 0])


@pytest.mark.parametrize("task", loop.LOOP_TASKS)
def test_goals_are_elsewhere_and_within_reach(task):
    rng, scenes = np.random.default_rng(0), tasks.make_instances(task, 1, 3).scenes
    low, high = world.value_range(scenes.kind)
    for _ in range(20):
        goal = loop.new_goal(scenes, rng)
        instances = loop.towards(task, scenes, goal)
        assert not tasks.is_solved(instances, scenes.state).item()
        assert tasks.is_solved(instances, instances.goal).item()
        assert (goal.pos >= scenes.low)[0, 0].all() and (goal.pos <= scenes.high)[0, 0].all()
        assert low[0, 0] <= goal.value[0, 0] <= high[0, 0]
        scenes = loop.drifted(scenes, rng)


def test_a_row_counts_steps_and_times():
    job = benchmark.Job("loop", "cold", "slider", 0, 2)
    row = loop.run_loop(job, Fake())
    assert len(row["solved"]["250"]) == 40 and len(row["by_step"]) == 20
    assert row["ms_median"] == row["ms_most"] == 5.0
