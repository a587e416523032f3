"""planning/goals.py: what the denoiser learns with goals, and what it is then given."""

import numpy as np
import torch
from conftest import make_gestures

import train_diffusion_ddim as tdd
from planning import goals


def test_to_fixed_time_moves_the_whole_gesture_and_nothing_else():
    gestures = make_gestures(20, tdd.SEQ_LEN, seed=3)
    moved = goals.to_fixed_time(gestures)
    for before, after in zip(gestures, moved, strict=True):
        pressed = before[:, 2] > 0.5
        num = int(pressed.sum())
        expected = torch.zeros(tdd.SEQ_LEN, 3)
        expected[goals.TOUCH_DOWN : goals.TOUCH_DOWN + num] = before[pressed]
        assert torch.equal(after, expected)


def test_the_policy_gives_the_denoiser_the_ends_that_the_regression_answers():
    """One gesture per goal and repeat, in order; 4·(ends - ½), by hand."""
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x_t, t, *_, context):
            seen.append(context)
            return torch.zeros_like(x_t)

    ends = torch.tensor([[0.0, 0.5, 0.75, 1.0], [0.25, 0.25, 0.25, 0.25]])
    scheduler = tdd.DDIMScheduler(100, prediction_type="x0")
    empty = torch.empty(0)
    policy = goals.GoalPolicy(
        Model(), scheduler, {"num_inference_steps": 2}, torch.nn.Identity(),
        lambda context: ends, empty, empty,
    )  # fmt: skip
    drawn = policy.sample(torch.zeros(2, 9), 3, np.random.default_rng(0), 1.0)
    expected = torch.tensor([[-2.0, 0.0, 1.0, 2.0], [-1.0, -1.0, -1.0, -1.0]])
    assert drawn.shape == (2, 3, tdd.SEQ_LEN, 3)
    assert torch.equal(seen[0], expected.repeat_interleave(3, dim=0))
