"""What a run holds: its average of the weights, and a checkpoint that takes up where it stood.

Why: an average with the wrong memory judges other weights than were trained; a checkpoint that
loses a buffer of the optimizer resumes another run.

    python -m pytest tests/test_state.py
"""

import pytest
from conftest import read_jsonl

import train_diffusion_ddim as tdd
from trainlib.checkpoint import load_checkpoint
from trainlib.state import ema_decay_at


def test_the_ema_forgets_its_start():
    decays = [ema_decay_at(step, 10_000, 0.999) for step in range(10_000)]
    assert decays[0] == 0 and decays[-1] == 0.998 and decays == sorted(decays)
    assert decays[90] == pytest.approx(1 - 10 / 100)
    assert max(ema_decay_at(step, 10**6, 0.9) for step in range(1000)) == 0.9
    assert ema_decay_at(9, 10, 0.999) == 0  # a run of ten steps is not averaged


def test_the_loss_of_a_checkpoint_is_the_mean_of_its_epoch(straight_run, tmp_path, tiny_config):
    logged = [row for row in read_jsonl(straight_run / "metrics.jsonl") if "val/epoch" in row]
    content = load_checkpoint(straight_run)
    assert content["loss"] == pytest.approx(logged[-1]["train/epoch_loss"], rel=1e-6)
    config = tiny_config(num_epochs=1, batch_size=4, save_dir=str(tmp_path / "run"))
    tdd.train(config)  # 10 gestures: the last batch has two
    (logged,) = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/epoch" in r]
    loss = load_checkpoint(tmp_path / "run")["loss"]
    assert loss == pytest.approx(logged["train/epoch_loss"], rel=1e-6)
