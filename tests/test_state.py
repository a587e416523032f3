"""What a run holds: its average of the weights, and a checkpoint that takes up where it stood.

Why: an average with the wrong memory judges other weights than were trained; a checkpoint that
loses a buffer of the optimizer resumes another run.

    python -m pytest tests/test_state.py
"""

import copy

import pytest
import torch
from conftest import assert_same_tree, make_gestures, read_jsonl

import train_diffusion_ddim as tdd
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.muon import make_optimizers
from trainlib.state import WEIGHT_DECAY, ema_decay_at, epoch_order


def test_the_ema_forgets_its_start():
    decays = [ema_decay_at(step, 10_000, 0.999) for step in range(10_000)]
    assert decays[0] == 0 and decays[-1] == 0.998 and decays == sorted(decays)
    assert decays[90] == pytest.approx(1 - 10 / 100)
    assert max(ema_decay_at(step, 10**6, 0.9) for step in range(1000)) == 0.9
    assert ema_decay_at(9, 10, 0.999) == 0  # a run of ten steps is not averaged


def test_the_loss_of_a_checkpoint_is_the_mean_of_its_epoch(
    no_figures, straight_run, tmp_path, tiny_config
):
    logged = [row for row in read_jsonl(straight_run / "metrics.jsonl") if "val/epoch" in row]
    content = load_checkpoint(straight_run)
    assert content["loss"] == pytest.approx(logged[-1]["train/epoch_loss"], rel=1e-6)
    config = tiny_config(num_epochs=1, batch_size=4, save_dir=str(tmp_path / "run"))
    tdd.train(config)  # 10 gestures: the last batch has two
    (logged,) = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/epoch" in r]
    loss = load_checkpoint(tmp_path / "run")["loss"]
    assert loss == pytest.approx(logged["train/epoch_loss"], rel=1e-6)


def test_a_step_of_the_state_is_that_of_its_optimizers_then_the_average(new_state):
    state = new_state(total_steps=200)
    state.step = 100
    for i, p in enumerate(state.model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    model = copy.deepcopy(state.model)
    for p, q in zip(model.parameters(), state.model.parameters(), strict=True):
        p.grad = q.grad.clone()
    average = [p.clone() for p in state.ema.parameters()]
    for optimizer in make_optimizers(model, 0.02, WEIGHT_DECAY, muon=True):
        optimizer.step()
    state.update(0.02)
    decay = ema_decay_at(100, 200)
    assert 0 < decay < 1 and state.step == 101
    trees = average, model.parameters(), state.model.parameters(), state.ema.parameters()
    for before, expected, now, ema in zip(*trees, strict=True):
        assert torch.equal(now, expected)
        torch.testing.assert_close(ema, decay * before + (1 - decay) * now)


def test_what_is_restored_is_what_was_saved(new_state, tmp_path):
    state, other = new_state(total_steps=20), new_state(total_steps=20)
    for step in range(3):
        tdd.train_step(state, make_gestures(4, seed=step))
        state.loss_sum += step
    save_checkpoint(tmp_path / "x.pth", state.to_checkpoint(0))
    other.restore(load_checkpoint(tmp_path / "x.pth"))
    for s in (state, other):
        tdd.train_step(s, make_gestures(4, seed=9))
    assert_same_tree(other.to_checkpoint(0), state.to_checkpoint(0))


def test_the_batches_of_an_epoch_go_on_where_the_run_stands(new_state):
    state = new_state(total_steps=8, batch_size=3, num_epochs=2)
    state.loss_sum += 5
    whole = [batch.tolist() for batch in state.batches(10)]
    assert list(map(len, whole)) == [3, 3, 3, 1] and state.loss_sum == 0
    assert torch.equal(torch.cat(state.batches(10)), epoch_order(10, state.config.seed, 0))
    state.step, state.loss_sum = 2, state.loss_sum + 5
    assert [batch.tolist() for batch in state.batches(10)] == whole[2:] and state.loss_sum == 5
    state.step = 4
    assert torch.equal(torch.cat(state.batches(10)), epoch_order(10, state.config.seed, 1))
