"""The evaluation budget, the ramp and the methods that only ask for costs, by hand.

Why: methods are compared at equal budget, so what an evaluation is must be counted right.

    python -m pytest tests/test_planning_search.py
"""

import math

import numpy as np
import pytest
import torch

from planning import search, tasks
from planning.methods import cost_methods

L = 250


def quadratic(actions):
    """Cost (I, K): squared distance of the first frame's x from 0.7."""
    return (actions[:, :, 0, 0] - 0.7) ** 2


def test_the_budget_by_hand():
    objective = search.Objective(quadratic, 1, 20, milestones=(2, 5, 20))
    candidates = torch.zeros(1, 4, L, 3)
    candidates[0, :, 0, 0] = torch.tensor([0.1, 0.5, 0.69, 0.2])
    objective(candidates)
    assert objective.used == 4 and objective.left == 16
    assert objective.kept[2][0][0, 0, 0].item() == pytest.approx(0.5)  # best of the first two
    gradient = objective.gradient(candidates[:, :2])
    assert gradient[0, :, 0, 0].tolist() == pytest.approx([-1.2, -0.4], abs=1e-6)
    assert objective.used == 4 + 2 * 3, "a gradient counts three"
    assert objective.kept[5][0][0, 0, 0].item() == pytest.approx(0.69)
    objective.finish()
    assert objective.kept[20][1].item() == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(AssertionError):
        objective(candidates.repeat(1, 3, 1, 1))


def test_nan_costs_never_win():
    objective = search.Objective(lambda a: torch.tensor([[math.nan, 2.0]]), 1, 2)
    objective(torch.zeros(1, 2, L, 3))
    assert objective.best_cost.item() == 2.0


def test_time_ends_the_budget():
    assert search.Objective(quadratic, 1, 20, seconds=-1.0).left == 0


@pytest.mark.parametrize("name", cost_methods())
@pytest.mark.parametrize("budget", [250, 1000])
def test_methods_keep_to_their_budget(name, budget):
    method = cost_methods()[name]
    objective = search.Objective(quadratic, 2, budget, milestones=(10, 250))
    method.run(objective, np.random.default_rng(0), **method.trials[0])
    objective.finish()
    least = 31 if name == "adam_zeros" else 0.9 * budget
    assert least <= objective.used <= budget
    assert objective.best.shape == (2, L, 3) and set(objective.kept) == {10, 250}


@pytest.mark.parametrize("name", ["adam_raw", "adam_ramp", "cem_ramp", "true_adam", "true_cem"])
def test_methods_find_an_easy_minimum(name):
    """The cost depends on where the contact begins, everywhere with a gradient."""

    def cost_fn(actions):
        press = actions[..., 2]
        begin = (press[..., None] * actions[..., :2]).sum(-2) / (press.sum(-1)[..., None] + 1e-3)
        return ((begin - torch.tensor([0.3, 0.6])) ** 2).sum(-1)

    objective = search.Objective(cost_fn, 3, 250)
    cost_methods()[name].run(objective, np.random.default_rng(1))
    assert objective.best_cost.max() < 5e-3


def test_the_ramp_and_its_reading():
    z = torch.tensor([[0.2, 0.3, 0.25, 0.8, 0.5, 0.75]])
    action = search.ramp(z)
    pressed = action[0, :, 2] > 0.5
    frames = torch.arange(L)[pressed]
    assert frames[0] == math.ceil(0.25 * 249) and frames[-1] == math.floor(0.75 * 249)
    assert action[0, 125, :2].tolist() == pytest.approx([0.501, 0.4], abs=2e-3)
    assert torch.allclose(search.to_ramp(action), z, atol=6e-3)
    swapped = z[:, [0, 1, 5, 3, 4, 2]]
    assert torch.equal(search.ramp(swapped), action), "times in the wrong order mean the same"
    true = tasks.draw_true(1, 50, np.random.default_rng(0))[0]
    again = search.ramp(search.to_ramp(true))
    assert torch.equal(again[..., 2] > 0.5, true[..., 2] > 0.5)
