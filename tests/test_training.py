"""The loop: resumed runs repeat the uninterrupted one to the bit, and nothing disturbs training.

Why: every number of an ablation assumes that a run is a function of its config. So a run is cut
at a checkpoint and by kill -9, resumed in new processes, and compared to the bit; validated more or
less, run on two processes, and given losses that are not finite.

    python -m pytest tests/test_training.py
"""

import copy
import json
import math
import shutil
import signal
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    SCRIPT,
    L,
    as_flags,
    assert_same_tree,
    make_gestures,
    python,
    read_jsonl,
    without_clock,
)
from torch import nn
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from train_diffusion_ddim import epoch_order, lr_at, train_step
from trainlib.state import TrainState, ema_decay_at

LAST = "diffusion_checkpoint_epoch_5.pth"


def content_of(path):
    """A checkpoint but for where it lies."""
    content = torch.load(path, weights_only=True)
    content["config"].pop("save_dir")
    return content


def assert_same_run(a, b):
    """Weights, EMA, optimizer and every logged number but the wall-clock ones."""
    assert_same_tree(content_of(a / LAST), content_of(b / LAST))
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        assert without_clock(read_jsonl(a / name)) == without_clock(read_jsonl(b / name))


def weights(folder, name=LAST):
    return content_of(folder / name)["model_state_dict"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def fresh(tiny_config):
    """Return f(total_steps, **changes): state, scheduler and config of a new run here."""

    def make(total_steps=10, **changes):
        config = tiny_config(**changes)
        torch.manual_seed(0)
        model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
        return TrainState(model, scheduler, config, total_steps, tdd.NUM_TASKS), scheduler, config

    return make


# ---- resume ----------------------------------------------------------------------------


def test_three_epochs_resume_three_are_six(straight_run, tmp_path):
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    # what an interrupted run leaves behind: its log, which may reach beyond the checkpoint
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        lines = (straight_run / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:25]) + '{"step": 1')
    done = python(SCRIPT, "--resume", tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "epoch 4/6" in done.stdout and "epoch 3/6" not in done.stdout
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


def test_resuming_a_finished_run_changes_nothing(cli, straight_run, tmp_path):
    folder = shutil.copytree(straight_run, tmp_path / "run")
    before = content_of(folder / LAST)
    code, out, err = cli("--resume", folder)
    assert code == 0 and "epoch" not in out.split("All")[0], err
    assert_same_tree(content_of(folder / LAST), before)


def test_nothing_to_resume_starts_afresh(cli, tiny_flags, tmp_path):
    code, out, _ = cli(*tiny_flags(num_epochs=1, save_dir=tmp_path / "run"), "--resume")
    assert code == 0 and out.startswith("note: nothing to resume")
    assert (tmp_path / "run" / "diffusion_checkpoint_epoch_0.pth").exists()


OTHER_MODELS = {
    **{"d_model": 32, "num_layers": 2, "nhead": 4, "seq_len": 10, "dim_feedforward": 8},
    **{"patch_size": 10, "adaln": False, "rotary": False, "token_overlap": False},
    **{"num_timesteps": 60, "beta_schedule": "linear", "prediction_type": "epsilon"},
    "optimizer": "adamw",
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_is_refused_with_both_values(refused, straight_run, name):
    was = json.loads((straight_run / "config.json").read_text())[name]
    message = refused("--resume", straight_run, *as_flags(**{name: OTHER_MODELS[name]}))
    assert f"--{name}" in message and f"{was} -> {OTHER_MODELS[name]}" in message


def test_all_that_makes_a_model_is_checked(tiny_config):
    config, refused = tiny_config(), set()
    for name in asdict(config):
        try:
            tdd.check_same_model(config, asdict(config) | {name: "another"}, "x.pth")
        except tdd.UserError as error:
            assert f"--{name}" in str(error)
            refused.add(name)
    assert refused == {*OTHER_MODELS, "known_frames", "noise_units", "gates", "context_dim"}


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.005), ("weight_decay", 0.5), ("seed", 1), ("num_epochs", 7)]
)
def test_another_run_is_allowed_with_a_warning(cli, straight_run, tmp_path, name, value):
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    code, _, err = cli("--resume", tmp_path, f"--{name}", value)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("warning: ") and f"--{name}" in err and f"-> {value}" in err
    content = tdd.load_checkpoint(tmp_path)
    config, groups = content["config"], content["optimizers"][0]["param_groups"]
    assert config[name] == value and groups[0]["weight_decay"] == config["weight_decay"]
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/lr" in row]
    total = math.ceil(10 / config["batch_size"]) * config["num_epochs"]
    expected = [lr_at(row["step"] - 1, total, tdd.TrainConfig(**config)) for row in rows]
    assert [row["train/lr"] for row in rows] == expected and rows[0]["step"] > 9


def test_another_batch_size_goes_on_with_the_same_epoch(cli, straight_run, tmp_path):
    # 15 steps of 2 gestures are 3 epochs, and stay so with 2 steps of 5 to the epoch
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    code, _, err = cli("--resume", tmp_path, "--batch_size", 5)
    assert code == 0 and err.count("\n") == 1 and "--batch_size" in err
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "val/epoch" in row]
    assert [row["val/epoch"] for row in rows] == [3, 4, 5]


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_an_explicit_resume_of_nothing_is_refused(refused, tmp_path, what):
    path = tmp_path / "run"
    if what != "missing":
        path.mkdir()
    if what == "damaged":
        (path / LAST).write_bytes(b"PK\x03\x04 not a checkpoint")
    assert str(path) in refused("--resume", path)


def test_a_used_folder_is_refused(refused, straight_run, tiny_flags):
    before = (straight_run / "metrics.jsonl").read_bytes()
    message = refused(*tiny_flags(save_dir=straight_run))
    assert str(straight_run) in message and "--resume" in message
    assert (straight_run / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path, tiny_flags):
    (tmp_path / "file").write_text("")
    assert "--save_dir" in refused(*tiny_flags(save_dir=tmp_path / "file"))


@pytest.mark.parametrize(("save_every", "steps"), [(0.4, range(2, 13, 2)), (1, (5, 10, 12))])
def test_checkpoints_come_at_parts_of_an_epoch(fresh, tmp_path, monkeypatch, save_every, steps):
    state, _, _ = fresh(total_steps=12, batch_size=2, num_epochs=2, save_every=save_every)
    state.steps_per_epoch, saved = 5, []
    log = tdd.RunLogger(tmp_path, state.config)
    monkeypatch.setattr(tdd, "save_checkpoint", lambda _, content: saved.append(content["step"]))
    for step in range(1, 13):
        state.step = step
        tdd.save_or_stop(state, log)
    assert saved == list(steps)


def test_the_final_scores_of_a_resumed_run_replace_the_old(straight_run, cli, tmp_path):
    folder = shutil.copytree(straight_run, tmp_path / "run")
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        before = without_clock(read_jsonl(folder / name))
        if name == "metrics.jsonl":  # killed while it scored the whole set
            (folder / name).write_text("".join(map("{}\n".format, map(json.dumps, before[:-1]))))
        assert cli("--resume", folder)[0] == 0
        assert without_clock(read_jsonl(folder / name)) == before


class Dropping(nn.Module):
    """Answers with what its dropout makes of ones."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def forward(self, x_t, t):
        self.answers.append(F.dropout(torch.ones_like(x_t), 0.5))
        return self.answers[-1]


def test_processes_draw_their_dropout_apart(fresh):
    _, scheduler, config = fresh()
    model, x_0 = Dropping(), make_gestures(6)
    for rank, world in ((0, 2), (0, 2), (1, 2), (2, 3)):
        torch.manual_seed(7)
        tdd.gesture_losses(model, scheduler, x_0, config, slice(rank, None, world))
    first, again, second, third = (answer[:2] for answer in model.answers)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(second, third)


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


def test_validation_does_not_change_training(cli, tiny_flags, tmp_path):
    runs = []
    for changes in (
        {"val_sequences": 1, "figure_every": 1, "num_inference_steps": 2},
        {"val_sequences": 6, "figure_every": 99, "eta": 1.0, "log_interval": 3, "save_every": 1},
    ):
        folder = tmp_path / str(len(runs))
        assert cli(*tiny_flags(save_dir=folder, **changes))[0] == 0
        runs.append(weights(folder, "diffusion_checkpoint_epoch_1.pth"))
    assert same(*runs)


def test_the_order_of_an_epoch_is_a_permutation_of_seed_and_epoch():
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert epoch_order(100, 1, 1).tolist() == orders[3]


def test_an_epoch_sees_each_gesture_once(fresh, monkeypatch):
    state, _, config = fresh(total_steps=8, batch_size=3, num_epochs=2)
    x_train, seen = make_gestures(10), []

    def recording(state, x_0, *context):
        seen.append(x_0)
        state.step += 1
        return {"train/loss": torch.tensor(float(len(x_0)))}

    monkeypatch.setattr(tdd, "train_step", recording)
    for epoch in range(2):
        seen.clear()
        tdd.train_epoch(state, x_train, None)
        assert [len(x) for x in seen] == [3, 3, 3, 1] and state.step == 4 * (epoch + 1)
        assert torch.equal(torch.cat(seen), x_train[epoch_order(10, config.seed, epoch)])


def test_the_steps_of_a_run_are_counted_from_its_data(tiny_config, tmp_path, monkeypatch):
    totals, real = [], tdd.train_step

    def recording(state, x_0, *context):
        totals.append(state.total_steps)
        return real(state, x_0, *context)

    monkeypatch.setattr(tdd, "train_step", recording)
    tdd.train(tiny_config(batch_size=3, num_epochs=2, save_dir=str(tmp_path / "run")))
    assert totals == [4 * 2] * 8  # ten gestures


def test_one_process_and_two_agree(tmp_path, tiny_flags):
    # Dropout draws per process, so it is off; the rest must not depend on their number. The last
    # batch is one gesture, so that one of the two processes has none.
    folders = {world: tmp_path / str(world) for world in (1, 2)}
    for world, folder in folders.items():
        flags = tiny_flags(num_epochs=1, batch_size=3, dropout=0.0, save_dir=folder)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world]
        done = python(*(launcher if world > 1 else []), SCRIPT, *flags, timeout=200)
        assert done.returncode == 0, done.stderr
    one, two = (read_jsonl(folder / "metrics.jsonl") for folder in folders.values())
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in ("train/loss", "train/epoch_loss", "val/loss", "train/grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], abs=1e-4), key


# ---- learning rate, EMA, one step ------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup_steps"), [(100, 5), (100, 50), (1000, 200), (9, 200)])
def test_the_learning_rate_is_its_formula(tiny_config, total, warmup_steps):
    config = tiny_config(lr=0.01, warmup_steps=warmup_steps)
    warmup = min(warmup_steps, total // 10)
    lrs = [lr_at(step, total, config) for step in range(total + 1)]
    for step, lr in enumerate(lrs):
        if step < warmup:
            assert lr == pytest.approx(0.01 * (step + 1) / warmup)
        else:
            phase = math.pi * (step - warmup) / (total - warmup)
            assert lr == pytest.approx(0.01 * (1 + math.cos(phase)) / 2, abs=1e-12)
    assert max(lrs) == 0.01 and 0 < lrs[-2] and lrs[-1] == pytest.approx(0, abs=1e-12)
    rising, falling = lrs[: warmup + 1], lrs[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_the_ema_forgets_its_start():
    decays = [ema_decay_at(step, 10_000, 0.999) for step in range(10_000)]
    assert decays[0] == 0 and decays[-1] == 0.998 and decays == sorted(decays)
    assert decays[90] == pytest.approx(1 - 10 / 100)
    assert max(ema_decay_at(step, 10**6, 0.9) for step in range(1000)) == 0.9
    assert ema_decay_at(9, 10, 0.999) == 0  # a run of ten steps is not averaged


def seed_of_step(config, step):
    torch.manual_seed(config.seed * 1_000_003 + step)


def test_one_step_is_adamw_then_lerp(fresh):
    recipe = {"optimizer": "adamw", "balance_loss": False, "augment": False}
    state, scheduler, config = fresh(total_steps=300, grad_clip=0.01, **recipe)
    state.step, total, x_0 = 150, 300, make_gestures(4)
    reference, ema_before = copy.deepcopy(state.model), copy.deepcopy(state.ema)
    scalars = train_step(state, x_0)

    seed_of_step(config, 150)
    loss = tdd.gesture_losses(reference, scheduler, x_0, config)[0].mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    for p in reference.parameters():
        p.grad *= 0.01 / norm
    lr = lr_at(150, total, config)
    torch.optim.AdamW(reference.parameters(), lr, weight_decay=config.weight_decay).step()
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


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(fresh):
    state, _, _ = fresh(optimizer="muon")
    adamw, muon = ([p for g in o.param_groups for p in g["params"]] for o in state.optimizers)
    named = dict(state.model.named_parameters())
    assert {id(p) for p in adamw + muon} == {id(p) for p in named.values()}
    assert len(adamw) + len(muon) == len(named)
    kinds = {name.split(".", 2)[2] for name, p in named.items() if any(p is q for q in muon)}
    layers = ("attention.qkv", "attention.out", "up", "down")
    assert kinds == {f"{layer}.weight" for layer in layers}


def test_a_muon_step_is_the_polar_factor_of_the_gradient(fresh):
    """Singular values all near lr·0.2·sqrt(max(m, n)), the same singular vectors."""
    state, _, config = fresh(optimizer="muon", weight_decay=0.0)
    muon, weight = state.optimizers[1], state.model.blocks[0].up.weight
    torch.manual_seed(0)
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    U, _, Vh = torch.linalg.svd(weight.grad, full_matrices=False)
    muon.step()
    step = (before - weight.detach()) / (config.lr * 0.2 * max(weight.shape) ** 0.5)
    assert (torch.linalg.svdvals(step) - 1).abs().max() < 0.4  # after five Newton-Schulz steps
    assert F.cosine_similarity(step.flatten(), (U @ Vh).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_that_of_torch(monkeypatch, weight_decay):
    """Kept in float32. Tall, wide, square, a zero gradient and none; then a step from its state."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (16, 16), (48, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs, lr = copy.deepcopy(ours), 0.1
    muon = tdd.Muon(ours, lr, weight_decay)
    options = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, lr, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) * 10.0**-i
            p.grad = [p.grad, 0 * p.grad, None][max(0, i - 2)]
            q.grad = copy.deepcopy(p.grad)
        if step == 3:
            muon.load_state_dict(copy.deepcopy(reference.state_dict()))
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4 * lr)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(*(o.state[x] for o, x in ((muon, p), (reference, q))))


def test_symmetries_change_the_batch_and_nothing_else(fresh, monkeypatch):
    x_0, seen = make_gestures(8), []
    real = tdd.gesture_losses

    def recording(model, scheduler, x_0, *rest):
        seen.append(x_0)
        return real(model, scheduler, x_0, *rest)

    monkeypatch.setattr(tdd, "gesture_losses", recording)
    for symmetries in (False, True):
        state, _, config = fresh(augment=symmetries)
        train_step(state, x_0)
    seed_of_step(config, 0)
    assert torch.equal(seen[0], x_0) and torch.equal(seen[1], tdd.augment(x_0))


@pytest.mark.parametrize("loss_weighting", tdd.LOSS_WEIGHTINGS)
def test_the_gradient_is_that_of_the_weighted_mean(fresh, loss_weighting):
    state, scheduler, config = fresh(grad_clip=1e9, loss_weighting=loss_weighting, augment=False)
    reference, x_0 = copy.deepcopy(state.model), make_gestures(8)
    state.task_loss.uniform_(0.1, 3.0)
    before = state.task_loss.clone()
    scalars = train_step(state, x_0)

    seed_of_step(config, 0)
    loss, task, t, _ = tdd.gesture_losses(reference, scheduler, x_0, config)
    weight = {
        "none": torch.ones(8),
        "min_snr": tdd.min_snr_weight(scheduler, t, config.snr_gamma),
        "balanced": tdd.balanced_weight(before, loss.detach(), task),
    }[loss_weighting]
    (weight * loss).mean().backward()
    for p, q in zip(state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
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


@pytest.mark.parametrize("loss_weighting", tdd.LOSS_WEIGHTINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_touches_no_weight(fresh, value, loss_weighting):
    state, _, _ = fresh(loss_weighting=loss_weighting)
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


# ---- the loss --------------------------------------------------------------------------


class Recorder(nn.Module):
    """Answers with zeros; remembers what it was asked."""

    known_frames = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, known, known_mask):
        self.calls.append((x_t, t, known, known_mask))
        return torch.zeros_like(x_t)


def test_what_the_model_is_asked_in_training(fresh):
    _, scheduler, config = fresh(prediction_type="epsilon", known_share=0.5)
    model, x_0 = Recorder(), make_gestures(25)
    torch.manual_seed(0)
    loss, task, t, entropy = tdd.gesture_losses(model, scheduler, x_0, config)
    assert not entropy.any()
    x_t, given_t, known, mask = model.calls[0]
    assert torch.equal(t, given_t)
    assert sorted((t // 2).tolist()) == list(range(25))  # one t in each 25th of [0, 50)
    assert t.tolist() != sorted(t.tolist()) and t.min() >= 0 and t.max() < 50
    torch.testing.assert_close(known, 2 * x_0 - 1)
    assert mask.shape == (25, L) and mask.dtype == torch.bool and 0 < mask.any(dim=1).sum() < 25
    eps = scheduler.eps_from_x_0(2 * x_0 - 1, x_t, t)
    torch.testing.assert_close(loss, (eps**2).mean(dim=(1, 2)), rtol=1e-3, atol=1e-3)
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert torch.equal(task % tdd.NOISE_LEVELS, t * tdd.NOISE_LEVELS // 50)
    drawn = task // tdd.NOISE_LEVELS
    assert not mask[drawn == 0].any() and mask[drawn == 1].any(dim=1).all()
    assert 0 <= task.min() and task.max() < tdd.NUM_TASKS


def test_the_rows_of_several_processes_are_those_of_one(fresh):
    state, scheduler, config = fresh(dropout=0.0)
    x_0, parts = make_gestures(7), []
    for rows in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        torch.manual_seed(0)
        parts.append(tdd.gesture_losses(state.model, scheduler, x_0, config, rows))
    for whole, even, odd in zip(*parts, strict=True):
        if even.is_floating_point():  # of the share of a process; task and t are of the whole batch
            torch.testing.assert_close(whole[0::2], even)
            torch.testing.assert_close(whole[1::2], odd)
        else:
            assert torch.equal(whole, even) and torch.equal(whole, odd)


def test_the_gates_are_scored_by_their_cross_entropy():
    """By hand: x moves by 0.2, y by less than a pixel; the second gesture has no press."""
    x_0 = torch.zeros(2, L, 3)
    x_0[0, 4:14, 0] = torch.linspace(0.3, 0.5, 10)
    x_0[0, 4:14, 1] = torch.linspace(0.6, 0.6005, 10)
    x_0[0, 4:14, 2] = 1
    logits = torch.full((2, L, 3), 100.0)  # wrong, where it must not matter
    logits[0, 4:14, :2] = torch.tensor([math.log(4), math.log(2)])  # P(moves) = 4/5 and 2/3
    logits[..., 2] = -math.log(9)  # P(press) = 1/10
    motion = (-math.log(4 / 5) - math.log(1 / 3)) / 2
    press = -0.5 * math.log(1 / 10) - 0.5 * math.log(9 / 10)  # pressed in half of the frames
    expected = torch.tensor([motion + press, -math.log(9 / 10)])
    torch.testing.assert_close(tdd.gate_loss(logits, x_0), expected)


def test_the_gates_are_trained_by_their_own_loss_too(fresh):
    recipe = {"gates": True, "prediction_type": "x0", "dropout": 0.0, "balance_loss": False}
    state, scheduler, config = fresh(**recipe, augment=False, grad_clip=1e9, gate_weight=0.5)
    reference, x_0 = copy.deepcopy(state.model), make_gestures(8)
    scalars = train_step(state, x_0)
    seed_of_step(config, 0)
    loss, _, _, entropy = tdd.gesture_losses(reference, scheduler, x_0, config)
    (loss + 0.5 * entropy).mean().backward()
    for p, q in zip(state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    assert float(scalars["train/gate_loss"]) == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert entropy.mean().item() == pytest.approx(2 * math.log(2), rel=1e-5)  # undecided at first


def test_bf16_is_near_float32(fresh):
    state, scheduler, config = fresh(dropout=0.0)
    losses = []
    for amp in (False, True):
        torch.manual_seed(0)
        chosen = replace(config, amp=amp)
        losses.append(tdd.gesture_losses(state.model, scheduler, make_gestures(8), chosen)[0])
    torch.testing.assert_close(*losses, rtol=0.03, atol=0.01)
    assert losses[1].dtype == torch.float32


def test_the_loss_falls(cli, tmp_path):
    """On the project's mini data, with the plan's sizes."""
    sets = {
        f"{s}data_dir": ROOT / "test_data_mini" / n for s, n in [("", "train"), ("val_", "val")]
    }
    sizes = {"d_model": 32, "num_layers": 2, "nhead": 2, "batch_size": 5, "lr": 3e-3}
    flags = as_flags(**sets, **sizes, num_epochs=30, device="cpu", save_dir=tmp_path / "run")
    assert cli(*flags)[0] == 0
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]
    losses = [row["train/epoch_loss"] for row in rows]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_every_architecture_and_option_trains(cli, tiny_flags, tmp_path):
    changes = {
        "adaln": False,
        "rotary": False,
        "token_overlap": False,
        "augment": False,
        "patch_size": 1,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "balance_loss": False,
        "snr_gamma": 3.0,
        "spacing": "trailing",
        "sampler": "dpmpp",
        "dim_feedforward": 24,
        "amp": True,
    }
    gated = {"gates": True, "token_overlap": True, "prediction_type": "x0"}
    for i, given in enumerate((changes, gated)):
        folder = tmp_path / str(i)
        code, _, err = cli(*tiny_flags(num_epochs=1, save_dir=folder, **given))
        assert code == 0, err
        config = tdd.load_model(folder)[2]
        assert all(getattr(config, name) == value for name, value in given.items())


# ---- from a notebook -------------------------------------------------------------------


def test_train_from_python_returns_the_ema(tiny_config, tmp_path):
    model = tdd.train(tiny_config(save_dir=str(tmp_path / "run")))
    content = tdd.load_checkpoint(tmp_path / "run")
    assert same(model.state_dict(), content["ema_state_dict"]) and not model.training
    assert not same(content["model_state_dict"], content["ema_state_dict"]) or content["step"] < 20


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
    saved = tdd.load_checkpoint(tmp_path / "run")["config"]
    assert (saved["batch_size"], saved["num_epochs"], saved["lr"]) == (5, 1, 1e-3)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


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
    assert sys.platform.startswith("linux")
