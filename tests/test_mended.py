"""Faults that a review found, each with the behaviour that replaced it.

Why: each of these once deleted, contradicted or lost something of a user's.
Command: python -m pytest tests/test_mended.py
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_gestures
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd


@pytest.mark.parametrize("flag", ["--checkpoint", "--output_dir", "--known_data_dir"])
def test_a_sampling_flag_without_sample_does_not_start_a_training(refused, flag):
    assert flag in refused(flag, "x")


def test_files_of_the_user_in_the_run_folder_are_left_alone(cli, tiny_flags, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\nnot json\n')
    code, _, err = cli(*tiny_flags(save_dir=tmp_path, num_epochs=1))
    assert code == 0, err
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}\nnot json\n'


def test_a_run_without_a_checkpoint_yet_can_be_resumed(cli, tiny_flags, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    code, out, err = cli(*tiny_flags(save_dir=tmp_path, num_epochs=1), "--resume")
    assert code == 0, err
    assert "starting afresh" in out
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows if row["step"] == 1] != [1.0]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_resuming_into_the_folder_of_another_run_is_refused(refused, straight_run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refused("--resume", straight_run, "--save_dir", tmp_path)
    assert "another run" in message
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_the_checkpoint_of_the_plans_own_model_loads(tmp_path, monkeypatch):
    x_0 = make_gestures(4).numpy()
    np.save(tmp_path / "a_actions.npy", x_0)
    length = x_0.shape[1]
    model = tdd.MinimalDiffusionTransformer(
        seq_len=length, d_model=16, nhead=2, num_layers=1, dim_feedforward=24, max_timesteps=100
    )
    scheduler = tdd.DDIMScheduler(num_timesteps=100)
    loader = DataLoader(tdd.DiffusionActionDataset(tmp_path, length), batch_size=2)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tmp_path / "run"
    ema = tdd.train_diffusion_model(model, scheduler, loader, loader, 1, 1e-3, "cpu", 1, run)
    loaded, its_scheduler, config = tdd.load_model(run)
    assert its_scheduler.prediction_type == "epsilon" and config.num_timesteps == 100
    assert config.dim_feedforward == 24 and not config.known_frames
    for ours, theirs in zip(loaded.parameters(), ema.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_data_that_moves_while_idle_is_refused_unless_the_recipe_allows_it(
    refused, cli, tiny_flags, tmp_path
):
    x_0 = make_gestures(4).numpy()
    x_0[0, 0, 0] = 0.5  # hovers
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a_actions.npy", x_0)
    flags = tiny_flags(save_dir=tmp_path / "run", data_dir=tmp_path / "data", num_epochs=1)
    assert "--no-augment" in refused(*flags, "--augment")
    code, _, err = cli(*flags, "--no-augment", "--no-gates")
    assert code == 0, err


def test_recreations_with_eta_are_the_same_twice():
    model = tdd.MinimalDiffusionTransformer(
        seq_len=60, d_model=16, nhead=2, num_layers=1, known_frames=True
    ).eval()
    scheduler, x_0 = tdd.DDIMScheduler(100), make_gestures(2, length=60)
    first, second = (tdd.recreate(model, scheduler, x_0, 3, eta=1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_gestures_without_an_edge_earn_no_score():
    idle = SimpleNamespace(dataset=list(torch.zeros(2, 250, 3)))
    with pytest.raises(tdd.UserError, match="press edge"):
        tdd.comprehensive_evaluation(torch.nn.Identity(), tdd.DDIMScheduler(), idle, "cpu")


@pytest.mark.parametrize(
    ("netrc", "expected"),
    [("machine api.wandb.ai login user password k\n", "online"), ("", "offline")],
)
def test_a_wandb_login_is_seen_without_asking_wandb(tmp_path, monkeypatch, netrc, expected):
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tdd.resolve_wandb_mode("auto") == expected
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tdd.resolve_wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert tdd.resolve_wandb_mode("auto") == "online"


@pytest.mark.parametrize("redirect", [">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_no_stdout_and_stderr_cost_lines_and_not_the_run(redirect, tiny_flags, tmp_path):
    argv = [str(a) for a in tiny_flags(save_dir=tmp_path / "run", num_epochs=1)]
    shell = ["bash", "-c", f'"$@" {redirect}', "bash"]
    script = [sys.executable, str(ROOT / "train_diffusion_ddim.py")]
    done = subprocess.run([*shell, *script, *argv], env=os.environ | {"WANDB_MODE": "disabled"})
    assert done.returncode == 0
    assert list((tmp_path / "run").glob("diffusion_checkpoint_epoch_*.pth"))


def test_help_speaks_ascii_to_a_terminal_without_greek():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_diffusion_ddim.py"), "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0 and done.stdout.isascii()
