"""planning/goals.py: what the denoiser learns with goals, and what it is then given."""

import re
import shlex

import numpy as np
import pytest
import torch
from conftest import make_gestures, read_jsonl

import train_diffusion_ddim as tdd
from planning import goals
from trainlib.gesture_files import read_context, read_gestures


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


def test_the_goals_train_a_denoiser_of_its_own(
    run_module, cli, no_figures, tmp_path, untrained_run
):
    """The command as users type it, then the command that it prints."""
    data = tmp_path / "data"
    tiny = ("--pairs", 40, "--epochs", 1, "--steps", 5)
    flags = ("--checkpoint", untrained_run, "--output_dir", tmp_path / "goals", *tiny)
    code, out, err = run_module("planning.goals", *flags, "--data_dir", data)
    assert code == 0, err
    policy = goals.load_policy(tmp_path / "goals")
    ends, gestures = goals.as_goal(policy.to_ends_net(policy.context)), policy.gestures
    for split, rows in (("train", torch.arange(40) % 10 > 0), ("val", torch.arange(40) % 10 == 0)):
        num = int(rows.sum())
        x_0 = torch.from_numpy(read_gestures(data / split, tdd.SEQ_LEN))
        assert torch.allclose(x_0, goals.to_fixed_time(gestures)[rows], atol=1e-3), "half there"
        context = torch.from_numpy(read_context(data / split, num, goals.ENDS))
        assert torch.allclose(context, ends[rows], atol=0.05)

    command = re.search(r"python (train_diffusion_ddim\.py .*)", out)[1]
    flags = shlex.split(command)[1:]
    tiny = "--d_model 16 --num_layers 1 --nhead 2 --patch_size 25 --num_timesteps 50 --num_epochs 1"
    tiny += f" --batch_size 9 --device cpu --wandb_mode disabled --save_dir {tmp_path / 'run'}"
    code, _, err = cli(*flags, *shlex.split(tiny))
    assert code == 0, err
    assert tdd.load_model(tmp_path / "run")[2].context_dim == goals.ENDS
    assert max(row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pairs", 1), "--pairs must be at least 2, got 1"),
        (("--epochs", 0), "--epochs must be at least 1"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--data_dir", "."), "--data_dir . is not empty; choose another"),
    ],
)
def test_a_users_mistakes(flags, words, untrained_run, tmp_path, capsys):
    needed = ("--checkpoint", untrained_run, "--output_dir", tmp_path / "goals")
    assert goals.main([str(flag) for flag in (*needed, *flags)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "goals").exists(), "refused before any work"


def test_damaged_goals_are_refused(tmp_path):
    with pytest.raises(tdd.UserError, match=r"train them: python -m planning\.goals"):
        goals.load_policy(tmp_path)
