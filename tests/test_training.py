"""The loop: resumed runs repeat the uninterrupted one to the bit, and nothing disturbs training.

Why: every number of an ablation assumes that a run is a function of its config. So a run is cut
at a checkpoint and by kill -9, resumed here and in a new process, and compared to the bit;
validated more or less, run on two processes, and given losses that are not finite. The loss of a
batch is compared with its formula, computed here from what was drawn.

    python -m pytest tests/test_training.py
"""

import copy
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import (
    LAST,
    ROOT,
    SCRIPT,
    L,
    as_flags,
    assert_same_run,
    assert_same_tree,
    content_of,
    make_gestures,
    python,
    read_jsonl,
)
from torch import nn
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from train_diffusion_ddim import Drawn, draw, lr_at, train_step
from trainlib import process
from trainlib.checkpoint import load_checkpoint
from trainlib.errors import UserError
from trainlib.legendre import legendre_table
from trainlib.process import StopSignal
from trainlib.run_log import NullLogger
from trainlib.state import WEIGHT_DECAY, ema_decay_at, epoch_order

pytestmark = pytest.mark.usefixtures("no_figures")


def weights(folder, name=LAST):
    return content_of(folder / name)["model_state_dict"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- resume ----------------------------------------------------------------------------


def test_three_epochs_resume_three_are_six(cli, straight_run, tmp_path):
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    # what an interrupted run leaves behind: its log, which may reach beyond the checkpoint
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        lines = (straight_run / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:25]) + '{"step": 1')
    code, out, err = cli("--resume", tmp_path)
    assert code == 0 and err == "", err
    assert "epoch 4/6" in out and "epoch 3/6" not in out
    assert_same_run(straight_run, tmp_path)


KILL_AT_STEP = """
import os, signal, sys
import train_diffusion_ddim as tdd
real = tdd.train_step
def train_step(state, *args):
    if state.step == 17:  # in the middle of the fourth epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return real(state, *args)
tdd.train_step = train_step
sys.exit(tdd.main(sys.argv[1:]))
"""


def test_a_killed_run_resumes_to_the_same(straight_run, tmp_path, tiny_flags):
    folder = tmp_path / "run"
    flags = tiny_flags(num_epochs=6, batch_size=2, save_every=3, save_dir=folder)
    killed = python("-c", KILL_AT_STEP, *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / LAST).exists()
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 17  # beyond the checkpoint, at 15
    done = python(SCRIPT, *flags, "--resume")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert_same_run(straight_run, folder)


# ---- a run is a function of its config -------------------------------------------------


def test_the_same_config_gives_the_same_run_and_another_seed_another(cli, tiny_flags, tmp_path):
    runs = {}
    for name, seed in {"a": 1, "again": 1, "other": 2}.items():
        code, _, err = cli(*tiny_flags(seed=seed, save_dir=tmp_path / name))
        assert code == 0, err
        runs[name] = weights(tmp_path / name, "diffusion_checkpoint_epoch_1.pth")
    assert same(runs["a"], runs["again"]) and not same(runs["a"], runs["other"])


def test_the_seed_draws_the_first_weights(cli, tiny_flags, tmp_path):
    runs = []
    for seed in (1, 2):  # at this learning rate they stay where they start
        flags = tiny_flags(seed=seed, lr=1e-12, num_epochs=1, save_dir=tmp_path / str(seed))
        assert cli(*flags)[0] == 0
        runs.append(weights(tmp_path / str(seed), "diffusion_checkpoint_epoch_0.pth"))
    assert (runs[0]["blocks.0.up.weight"] - runs[1]["blocks.0.up.weight"]).abs().max() > 0.01


def test_validation_does_not_change_training(cli, tiny_flags, tmp_path, monkeypatch):
    runs = []
    for changes, constants in (
        ({"num_inference_steps": 2}, {"VAL_SEQUENCES": 1, "FIGURE_EVERY": 1}),
        ({"eta": 1.0, "log_interval": 3, "save_every": 1}, {"FIGURE_EVERY": 99}),
    ):
        folder = tmp_path / str(len(runs))
        for name, value in constants.items():
            monkeypatch.setattr(tdd, name, value)
        assert cli(*tiny_flags(save_dir=folder, **changes))[0] == 0
        runs.append(weights(folder, "diffusion_checkpoint_epoch_1.pth"))
    assert same(*runs)


def test_the_order_of_an_epoch_is_a_permutation_of_seed_and_epoch():
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert epoch_order(100, 1, 1).tolist() == orders[3]


def test_an_epoch_sees_each_gesture_once(new_state, monkeypatch):
    state = new_state(total_steps=8, batch_size=3, num_epochs=2)
    x_train, seen = make_gestures(10), []

    def recording(state, x_0, *context):
        seen.append(x_0)
        state.step += 1
        return {"train/loss": torch.tensor(float(len(x_0)))}

    monkeypatch.setattr(tdd, "train_step", recording)
    tdd.train_epochs(state, x_train, x_train, None, NullLogger())
    assert [len(x) for x in seen] == [3, 3, 3, 1] * 2 and state.step == 8
    for epoch in range(2):
        order = epoch_order(10, state.config.seed, epoch)
        assert torch.equal(torch.cat(seen[4 * epoch : 4 * epoch + 4]), x_train[order])
    assert state.loss_sum == 3 * 3 * 3 + 1  # of the last epoch, over gestures


def test_the_steps_of_a_run_are_counted_from_its_data(tiny_config, tmp_path, monkeypatch):
    totals, real = [], tdd.train_step

    def recording(state, x_0, *context):
        totals.append(state.total_steps)
        return real(state, x_0, *context)

    monkeypatch.setattr(tdd, "train_step", recording)
    tdd.train(tiny_config(batch_size=3, num_epochs=2, save_dir=str(tmp_path / "run")))
    assert totals == [4 * 2] * 8  # ten gestures


def test_one_process_and_two_agree(cli, tmp_path, tiny_flags):
    # Dropout draws per process, so it is off; the rest must not depend on their number. The last
    # batch is one gesture, so that one of the two processes has none.
    changes = {"num_epochs": 1, "batch_size": 3, "dropout": 0.0}
    assert cli(*tiny_flags(**changes, save_dir=tmp_path / "1"))[0] == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = tiny_flags(**changes, save_dir=tmp_path / "2")
    done = python(*launcher, SCRIPT, *flags, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in "12")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in ("train/loss", "train/epoch_loss", "val/loss", "train/grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], abs=1e-4), key


# ---- the loop --------------------------------------------------------------------------


def test_the_last_step_of_an_epoch_is_logged_besides_every_third(tiny_config, tmp_path):
    config = tiny_config(batch_size=2, log_interval=3, save_dir=str(tmp_path / "run"))
    tdd.train(config)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [3, 5, 6, 9, 10]
    assert [row["train/epoch"] for row in rows if "train/loss" in row] == [0.6, 1, 1.2, 1.8, 2]


@pytest.mark.parametrize("name", StopSignal.NAMES)
def test_a_signal_in_the_loop_saves_the_step_that_it_came_in(
    cli, tiny_flags, tmp_path, monkeypatch, name
):
    number, real = getattr(signal, name), train_step

    def stopped(state, *batch):
        if state.step == 3:
            os.kill(os.getpid(), number)
        return real(state, *batch)

    monkeypatch.setattr(tdd, "train_step", stopped)
    code, out, err = cli(*tiny_flags(batch_size=2, save_dir=tmp_path / "run"))
    assert code == 128 + number and err.startswith("stopped; --resume") and "epoch 1" not in out
    content = load_checkpoint(tmp_path / "run")
    assert content["step"] == 4 and content["epoch"] == 0
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_a_signal_in_the_final_scoring_is_heard_after_it(cli, tiny_flags, tmp_path, monkeypatch):
    real = tdd.generation_metrics

    def stopped(samples):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(samples)

    monkeypatch.setattr(tdd, "generation_metrics", stopped)
    code, out, _ = cli(*tiny_flags(num_epochs=1, save_dir=tmp_path / "run"))
    assert code == 143 and "resume    python" in out
    assert "final/mse" in read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert load_checkpoint(tmp_path / "run")["step"] == 3


def test_an_epoch_is_saved_before_anything_is_drawn(tiny_config, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("drawing")

    monkeypatch.setattr(tdd, "log_figures", fail)
    with pytest.raises(KeyError, match="drawing"):
        tdd.train(tiny_config(num_epochs=1, save_dir=str(tmp_path / "run")))
    assert load_checkpoint(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("contacts", [False, True])
def test_the_default_dtype_of_a_notebook_does_not_stop_a_run(tiny_config, tmp_path, contacts):
    recipe = {"contacts": True, "prediction_type": "x0"} if contacts else {}
    torch.set_default_dtype(torch.float64)
    try:
        tdd.train(tiny_config(num_epochs=1, save_dir=str(tmp_path / "run"), **recipe))
    finally:
        torch.set_default_dtype(torch.float32)
    content = load_checkpoint(tmp_path / "run")
    assert all(v.dtype == torch.float32 for v in content["model_state_dict"].values())
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["final/mse"] > 0 and last["final/loss"] > 0


# ---- learning rate, one step ------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup_steps"), [(100, 5), (100, 50), (1000, 200), (9, 200)])
def test_the_learning_rate_is_its_formula(total, warmup_steps):
    warmup = min(warmup_steps, total // 10)
    lrs = [lr_at(step, total, 0.01, warmup_steps) for step in range(total + 1)]
    for step, lr in enumerate(lrs):
        if step < warmup:
            assert lr == pytest.approx(0.01 * (step + 1) / warmup)
        else:
            phase = math.pi * (step - warmup) / (total - warmup)
            assert lr == pytest.approx(0.01 * (1 + math.cos(phase)) / 2, abs=1e-12)
    assert max(lrs) == 0.01 and 0 < lrs[-2] and lrs[-1] == pytest.approx(0, abs=1e-12)
    rising, falling = lrs[: warmup + 1], lrs[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def drawn_for(x_0, config, step=0):
    """What a step draws, as it draws it."""
    torch.manual_seed(config.seed * 1_000_003 + step)
    return draw(x_0, config.num_timesteps, config.known_share)


def squared_errors(model, scheduler, x_0, drawn, **options):
    """The loss of each gesture by its formula, from what was drawn: eps, v or x_0 at x_t.

    Returns them, and what else the model answers.
    """
    bar = torch.from_numpy(numpy_alpha_bar(scheduler))[drawn.t].float()[:, None, None]
    x = 2 * x_0 - 1
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * drawn.eps
    target = {"epsilon": drawn.eps, "v": bar.sqrt() * drawn.eps - (1 - bar).sqrt() * x, "x0": x}
    answer = model(x_t, drawn.t, x, drawn.known_mask, **options)
    output, rest = answer if isinstance(answer, tuple) else (answer, None)
    return ((output - target[scheduler.prediction_type]) ** 2).mean(dim=(1, 2)), rest


def numpy_alpha_bar(scheduler):
    """ᾱ of the cosine schedule (2102.09672, eq. 17)."""
    T = scheduler.num_timesteps
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.parametrize("prediction_type", tdd.PREDICTION_TYPES)
def test_the_loss_is_a_function_of_what_was_drawn(new_state, prediction_type):
    """By hand, from t, eps and masks that no step would draw; twice the same."""
    x_0 = make_gestures(6)
    drawn = Drawn(
        t=torch.tensor([0, 49, 7, 7, 25, 48]),
        eps=torch.linspace(-3, 3, 6 * L * 3).reshape(6, L, 3).sin() * 2,
        known_mask=torch.arange(L) < torch.arange(0, 24, 4)[:, None],
        task=torch.arange(6),
        context=None,
    )
    options = {"prediction_type": prediction_type, "balance_loss": False, "augment": False}
    for seed in (0, 1):
        state = new_state(dropout=0.0, seed=seed, **options)
        torch.nn.init.normal_(state.model.output_projection.weight, std=0.5)
        reference = copy.deepcopy(state.model)
        expected, _ = squared_errors(reference, state.scheduler, x_0, drawn)
        scalars = train_step(state, x_0, drawn=drawn)
        assert float(scalars["train/loss"]) == pytest.approx(expected.mean().item(), rel=1e-5)


def test_one_step_is_adamw_then_lerp(new_state, monkeypatch):
    recipe = {"optimizer": "adamw", "balance_loss": False, "augment": False, "dropout": 0.0}
    state = new_state(total_steps=300, **recipe)
    monkeypatch.setattr(tdd, "GRAD_CLIP", 0.01)
    state.step, total, x_0, config = 150, 300, make_gestures(4), state.config
    reference, ema_before = copy.deepcopy(state.model), copy.deepcopy(state.ema)
    scalars = train_step(state, x_0)

    drawn = drawn_for(x_0, config, 150)
    loss = squared_errors(reference, state.scheduler, x_0, drawn)[0].mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    for p in reference.parameters():
        p.grad *= 0.01 / norm
    lr = lr_at(150, total, config.lr)
    torch.optim.AdamW(reference.parameters(), lr, weight_decay=WEIGHT_DECAY).step()
    assert norm > 0.01 and state.step == 151
    assert float(scalars["train/grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    assert float(scalars["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert scalars["train/lr"] == lr
    for p, q in zip(state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    decay = ema_decay_at(150, total)
    trees = ema_before.parameters(), state.model.parameters(), state.ema.parameters()
    assert 0 < decay < 1
    for old, new, ema in zip(*trees, strict=True):
        torch.testing.assert_close(ema, decay * old + (1 - decay) * new)


def test_augment_changes_the_batch_and_nothing_else(new_state, monkeypatch):
    x_0, seen = make_gestures(8), []
    real = tdd.per_sample_loss

    def recording(scheduler, output, x_0, *rest):
        seen.append(x_0)
        return real(scheduler, output, x_0, *rest)

    monkeypatch.setattr(tdd, "per_sample_loss", recording)
    for augment in (False, True):
        state = new_state(augment=augment)
        train_step(state, x_0)
    torch.manual_seed(0)
    assert torch.equal(seen[0], x_0) and torch.equal(seen[1], tdd.augment(x_0))


@pytest.mark.parametrize("balance_loss", [False, True])
def test_the_gradient_is_that_of_the_weighted_mean(new_state, monkeypatch, balance_loss):
    monkeypatch.setattr(tdd, "GRAD_CLIP", 1e9)
    state = new_state(balance_loss=balance_loss, augment=False, dropout=0.0)
    reference, x_0 = copy.deepcopy(state.model), make_gestures(8)
    state.task_loss.uniform_(0.1, 3.0)
    before = state.task_loss.clone()
    scalars = train_step(state, x_0)

    drawn = drawn_for(x_0, state.config)
    loss, _ = squared_errors(reference, state.scheduler, x_0, drawn)
    weight = torch.ones(8)
    if balance_loss:
        weight = tdd.balanced_weight(before, loss.detach(), drawn.task)
    (weight * loss).mean().backward()
    for p, q in zip(state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert float(scalars["train/loss"]) == pytest.approx(loss.mean().item(), rel=1e-5)


def test_balanced_weights_by_a_loop():
    task_loss = torch.rand(tdd.NUM_TASKS) + 0.1
    task = torch.tensor([3, 7, 3, 50])
    loss = torch.tensor([1.0, 2.0, 5.0, 0.25])
    expected = task_loss.tolist()
    for i in (3, 7, 50):
        mean = loss[task == i].mean().item()
        expected[i] += 0.02 * (mean - expected[i])
    weight = tdd.balanced_weight(task_loss, loss, task)
    np.testing.assert_allclose(task_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, [1 / expected[i] for i in task], rtol=1e-4)


def test_balanced_tasks_end_up_equally_large():
    torch.manual_seed(0)
    sizes, task_loss = torch.logspace(-4, 0, tdd.NUM_TASKS), torch.ones(tdd.NUM_TASKS)
    for _ in range(400):
        task = torch.arange(tdd.NUM_TASKS)
        loss = sizes[task] * (0.5 + torch.rand(len(task)))
        weight = tdd.balanced_weight(task_loss, loss, task)
    ratio = weight * sizes
    assert ratio.min() > 0.2 and ratio.max() < 1.5  # a range of 10,000 before


def everything(state):
    """Return what a step updates: weights, averages, the memory of the optimizers."""
    trained = state.model, state.ema, *state.optimizers
    return [one.state_dict() for one in trained]


@pytest.mark.parametrize("balance_loss", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_touches_no_weight(new_state, value, balance_loss):
    state = new_state(balance_loss=balance_loss)
    before = copy.deepcopy(everything(state))
    x_0 = make_gestures(4)
    x_0[2, 5, 1] = value
    with pytest.raises(FloatingPointError, match=r"step 0.*lower --lr"):
        train_step(state, x_0)
    assert_same_tree(before, everything(state))
    assert state.step == 0


def test_a_diverging_run_ends_in_one_line(cli, tiny_flags, tmp_path):
    flags = tiny_flags(lr=1e30, num_epochs=20, save_every=1, save_dir=tmp_path / "run")
    code, _, err = cli(*flags)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "--lr" in err
    for path in (tmp_path / "run").glob("*.pth"):
        content = content_of(path)
        assert all(torch.isfinite(v).all() for v in content["model_state_dict"].values())
    read_jsonl(tmp_path / "run" / "metrics.jsonl")


# ---- what is drawn ---------------------------------------------------------------------


def test_what_is_drawn_for_a_batch():
    torch.manual_seed(0)
    x_0, T = make_gestures(25), 50
    drawn = draw(x_0, T, 0.5)
    assert sorted((drawn.t // 2).tolist()) == list(range(25))  # one t in each 25th of [0, 50)
    assert drawn.t.tolist() != sorted(drawn.t.tolist())
    mask = drawn.known_mask
    assert mask.shape == (25, L) and mask.dtype == torch.bool and 0 < mask.any(dim=1).sum() < 25
    assert drawn.eps.shape == x_0.shape and drawn.context is None
    assert abs(drawn.eps.mean()) < 0.1 and abs(drawn.eps.std() - 1) < 0.1
    num_t_bins = tdd.NUM_T_BINS
    bins = (num_t_bins * (drawn.t / T)).long()
    assert torch.equal(drawn.task % num_t_bins, bins)
    strategy = drawn.task // num_t_bins
    assert not mask[strategy == 0].any() and mask[strategy == 1].any(dim=1).all()
    assert 0 <= drawn.task.min() and drawn.task.max() < tdd.NUM_TASKS


def test_contexts_are_dropped_for_a_tenth_of_the_batch():
    torch.manual_seed(0)
    given = torch.rand(4000, 2) + 1
    context = draw(torch.zeros(4000, 2, 3), 50, 0.0, given).context
    dropped = ~context.any(dim=1)
    assert torch.equal(context[~dropped], given[~dropped])
    assert abs(dropped.float().mean() - tdd.CONTEXT_DROPOUT) < 3 * (0.1 * 0.9 / 4000) ** 0.5


def test_the_rows_of_several_processes_are_those_of_one(new_state, monkeypatch):
    """The mean of two processes' gradients, as torch averages them, is that of one process."""
    monkeypatch.setattr(tdd, "GRAD_CLIP", 1e9)
    options = {"dropout": 0.0, "contacts": True, "prediction_type": "x0"}
    x_0, grads, losses = make_gestures(7), [], []
    gather = process.gather_rows
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        state = new_state(**options)
        monkeypatch.setattr(process, "process_rank", lambda r=rank, w=world: (r, w))
        monkeypatch.setattr(process, "own_rows", lambda r=rank, w=world: slice(r, None, w))

        def gathered(values, num, rank=rank, world=world):
            if world == 1:
                losses.append(gather(values, num))
            torch.testing.assert_close(values, losses[0][rank::world])
            return losses[0]

        monkeypatch.setattr(process, "gather_rows", gathered)
        train_step(state, x_0)
        grads.append([p.grad for p in state.model.parameters()])
    for whole, even, odd in zip(*grads, strict=True):
        torch.testing.assert_close((even + odd) / 2, whole, rtol=1e-4, atol=1e-6)


class Recorder(nn.Module):
    """Answers with zeros; remembers what it was asked."""

    def forward(self, x_t, t, known, known_mask):
        self.asked = x_t, t, known, known_mask
        return torch.zeros_like(x_t, requires_grad=True)


def test_what_the_model_is_asked_in_training(new_state):
    state, x_0 = new_state(prediction_type="epsilon", augment=False), make_gestures(8)
    drawn, state.forward = drawn_for(x_0, state.config), Recorder()
    scalars = train_step(state, x_0)
    x_t, t, known, mask = state.forward.asked
    assert torch.equal(t, drawn.t) and torch.equal(mask, drawn.known_mask)
    torch.testing.assert_close(known, 2 * x_0 - 1)
    expected, _ = state.scheduler.add_noise(2 * x_0 - 1, t, drawn.eps)
    assert torch.equal(x_t, expected)
    assert float(scalars["train/loss"]) == pytest.approx((drawn.eps**2).mean().item(), rel=1e-5)


# ---- decisions, precision --------------------------------------------------------------


def decided(log_odds, contact, gates, returns=0.0):
    """Decisions of windows, (B, L), of which the frames `contact` are the first contact."""
    member, basis = torch.zeros(*log_odds.shape, 3), torch.zeros(*log_odds.shape, 8)
    member[:, contact, 0] = 1
    n = contact.stop - contact.start
    basis[:, contact] = legendre_table(L, 8)[n, :n]
    returns = torch.full((len(log_odds), 2), returns)
    practice = torch.zeros(len(log_odds))
    return tdd.Decisions(log_odds, gates, member, basis, returns, practice)


def test_decisions_are_scored_by_their_cross_entropy():
    """By hand: x moves by 0.2, y rests, all of higher degree is 0; the second window is idle."""
    x_0 = torch.zeros(2, L, 3)
    x_0[0, 4:14, 0] = torch.linspace(0.3, 0.5, 10)
    x_0[0, 4:14, 1:] = torch.tensor([0.6, 1.0])
    gates = torch.full((2, 3, 16), 1000.0)  # wrong, where it must not matter
    gates[0, 0] = -1000.0
    gates[0, 0, [0, 8]] = 1000.0  # there is a mean
    gates[0, 0, [1, 9]] = torch.tensor([math.log(4), math.log(2)])  # P(moves) = 4/5 and 2/3
    log_odds = torch.full((2, L), -math.log(9))  # P(press) = 1/10
    motion = (-math.log(4 / 5) - math.log(1 / 3)) / 2
    press = -0.5 * math.log(1 / 10) - 0.5 * math.log(9 / 10)  # pressed in half of the frames
    expected = torch.tensor([motion + press, -math.log(9 / 10)])
    loss = tdd.decision_loss(decided(log_odds, slice(4, 14), gates), x_0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("gap", "right"), [(0.02, True), (0.3, True), (0.02, False)])
def test_whether_a_contact_returns_is_scored_where_both_are_right(gap, right):
    """Two taps, P(return) = 4/5; the second is pressed throughout, or not."""
    x_0 = torch.zeros(1, L, 3)
    x_0[0, 2:6], x_0[0, 8:12] = torch.tensor([0.4, 0.6, 1.0]), torch.tensor([0.4 + gap, 0.6, 1.0])
    gates = torch.full((1, 3, 16), -1000.0)
    gates[..., [0, 8]] = 1000.0  # there is a mean, and nothing else
    log_odds = 1000 * (2 * x_0[..., 2] - 1)
    decisions = decided(log_odds, slice(2, 6), gates, math.log(4))
    second = slice(8, 12 if right else 13)
    decisions.member[:, second, 1] = 1
    n = second.stop - second.start
    decisions.basis[:, second] = legendre_table(L, 8)[n, :n]
    loss = tdd.decision_loss(decisions, x_0)
    expected = -math.log(4 / 5 if gap < 0.05 else 1 / 5) if right else 0.0
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_a_contact_that_is_partly_idle_says_nothing_of_motion():
    x_0 = torch.zeros(1, L, 3)
    x_0[0, 4:14] = 1
    gates, log_odds = torch.full((1, 3, 16), 1000.0), torch.full((1, L), -math.log(9))
    loss = tdd.decision_loss(decided(log_odds, slice(3, 14), gates), x_0)
    press = -0.5 * math.log(1 / 10) - 0.5 * math.log(9 / 10)
    torch.testing.assert_close(loss, torch.tensor([press]))


def test_the_decisions_are_trained_by_their_own_loss_too(new_state, monkeypatch):
    monkeypatch.setattr(tdd, "GRAD_CLIP", 1e9)
    recipe = {"contacts": True, "prediction_type": "x0", "dropout": 0.0, "balance_loss": False}
    state = new_state(**recipe, augment=False)
    reference, x_0 = copy.deepcopy(state.model), make_gestures(8)
    scalars = train_step(state, x_0)
    drawn = drawn_for(x_0, state.config)
    given = {"made_of": (tdd.to_model_units(x_0), drawn.eps)}
    loss, decisions = squared_errors(reference, state.scheduler, x_0, drawn, **given)
    entropy = tdd.decision_loss(decisions, x_0)
    (loss + tdd.DECISION_WEIGHT * entropy + decisions.practice).mean().backward()
    for p, q in zip(state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    logged = float(scalars["train/decision_loss"])
    assert logged == pytest.approx(entropy.mean().item(), rel=1e-5)


def test_bf16_is_near_float32(new_state):
    losses = []
    for amp in (False, True):
        state = new_state(dropout=0.0, amp=amp)
        losses.append(train_step(state, make_gestures(8))["train/loss"])
        assert losses[-1].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    torch.testing.assert_close(*losses, rtol=0.03, atol=0.01)


# ---- whole runs ------------------------------------------------------------------------


@pytest.mark.parametrize(("contacts", "fall"), [(False, 0.6), (True, 0.85)])
def test_the_loss_falls(cli, tmp_path, contacts, fall):
    """On the project's mini data, with the plan's sizes; a network of contacts begins lower."""
    sets = {
        f"{s}data_dir": ROOT / "test_data_mini" / n for s, n in [("", "train"), ("val_", "val")]
    }
    sizes = {"d_model": 32, "num_layers": 2, "nhead": 2, "batch_size": 5, "lr": 3e-3}
    sizes |= {"patch_size": 5}  # in sixty steps 25 long tokens learn less
    sizes |= {"contacts": contacts, "num_epochs": 30, "device": "cpu"}
    sizes |= {"num_inference_steps": 2}  # of what is drawn after each epoch
    assert cli(*as_flags(**sets, **sizes, save_dir=tmp_path / "run"))[0] == 0
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    model, scheduler, config = tdd.load_model(tmp_path / "run")
    x_train = torch.from_numpy(tdd.DiffusionActionDataset(sets["data_dir"]).sequences)
    losses = [  # of ten gestures an epoch's own loss is chance: of t more than of what was learnt
        tdd.validation_loss(net, scheduler, x_train.repeat(4, 1, 1))
        for net in (tdd.build_model(config), model)
    ]
    assert losses[1] < fall * losses[0]


def test_every_architecture_and_option_trains(cli, tiny_flags, tmp_path):
    changes = {
        "adaln": False,
        "rotary": False,
        "augment": False,
        "patch_size": 1,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "balance_loss": False,
        "spacing": "trailing",
        "sampler": "dpmpp",
        "dim_feedforward": 24,
        "amp": True,
    }
    gated = {"contacts": True, "prediction_type": "x0"}
    for i, given in enumerate((changes, gated)):
        folder = tmp_path / str(i)
        code, _, err = cli(*tiny_flags(num_epochs=1, save_dir=folder, **given))
        assert code == 0, err
        config = tdd.load_model(folder)[2]
        assert all(getattr(config, name) == value for name, value in given.items())


# ---- from a notebook -------------------------------------------------------------------


def test_train_from_python_returns_the_ema(tiny_config, tmp_path):
    """After 25 steps: the EMA of 20 is the model itself."""
    model = tdd.train(tiny_config(batch_size=2, num_epochs=5, save_dir=str(tmp_path / "run")))
    content = load_checkpoint(tmp_path / "run")
    assert same(model.state_dict(), content["ema_state_dict"]) and not model.training
    assert not same(content["model_state_dict"], content["ema_state_dict"])


def test_the_loaders_batch_size_and_the_arguments_win(tiny_config, tmp_path):
    config = tiny_config(num_epochs=9, lr=1.0, batch_size=2)
    torch.manual_seed(0)
    tdd.train_diffusion_model(
        tdd.build_model(config),
        tdd.build_scheduler(config),
        DataLoader(list(make_gestures(10)), batch_size=5),
        DataLoader(list(make_gestures(3, seed=1)), batch_size=2),
        num_epochs=1,
        lr=1e-3,
        device="cpu",
        log_interval=1,
        save_dir=tmp_path / "run",
        config=config,
    )
    saved = load_checkpoint(tmp_path / "run")["config"]
    assert (saved["batch_size"], saved["num_epochs"], saved["lr"]) == (5, 1, 1e-3)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


def library(folder, model, **changes):
    """The library's loop on six gestures, with Muon."""
    loaders = (DataLoader(list(make_gestures(6, seed=i)), batch_size=3) for i in (1, 2))
    return tdd.train_diffusion_model(
        model, tdd.DDIMScheduler(50), *loaders, 1, 1e-3, save_dir=folder, **changes
    )


def small_model():
    torch.manual_seed(0)
    sizes = {"seq_len": L, "d_model": 16, "nhead": 2, "num_layers": 1, "dim_feedforward": 32}
    return tdd.MinimalDiffusionTransformer(**sizes)


def test_of_a_compiled_model_what_it_was_compiled_from_is_trained(tmp_path):
    models = {"plain": small_model(), "compiled": torch.compile(small_model(), backend="eager")}
    for name, model in models.items():
        library(tmp_path / name, model, device="cpu")
    plain, compiled = (load_checkpoint(tmp_path / name) for name in models)
    assert compiled["optimizers"] == plain["optimizers"] == ["adamw", "muon"]
    for key in ("model_state_dict", "ema_state_dict"):
        assert_same_tree(compiled[key], plain[key])
    assert tdd.load_model(tmp_path / "compiled")[2].dim_feedforward == 32


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta0", 3.5])
def test_a_device_that_is_not_there_is_refused_by_the_library(tmp_path, device):
    with pytest.raises(UserError, match=f"device .*{device}"):
        library(tmp_path / "run", small_model(), device=device)
    assert not (tmp_path / "run").exists()


def test_the_same_gestures_for_training_and_validation_are_refused(tmp_path):
    x_0 = make_gestures(6)
    twice = DataLoader(list(x_0), batch_size=3)
    for other in (twice, DataLoader(list(x_0[4:]), batch_size=3), DataLoader(list(x_0 * 1.0), 1)):
        with pytest.raises(UserError, match="allow_overlap"):
            tdd.train_diffusion_model(
                small_model(), tdd.DDIMScheduler(50), twice, other, 1, device="cpu",
                save_dir=tmp_path / "run",
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_as_the_cpu_does(tiny_flags, tmp_path):
    rows = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        flags = tiny_flags(num_epochs=1, dropout=0.0, device=device, save_dir=folder)
        done = python(SCRIPT, *flags)
        assert done.returncode == 0, done.stderr
        rows.append(read_jsonl(folder / "metrics.jsonl")[-1])
    assert rows[1].keys() == rows[0].keys() and math.isfinite(rows[1]["final/loss"])
