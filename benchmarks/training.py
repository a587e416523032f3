"""Training step against the plan as written

    python -m benchmarks.training [--rounds 5] [--threads 2]

One step is batch, noise, forward, backward, clipping, optimizer and EMA. The epoch of the table is
79 steps of the plan's 5,000 gestures and the validation that each program does after it.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import train_diffusion_ddim as tdd
from benchmarks.measure import DECIDED, ROOT, Row, compare, in_turn, main, spread
from benchmarks.peers import PlanLoop, PlanNetwork
from trainlib.process import pick_device
from trainlib.state import TrainState, epoch_order

PLAN_NETWORK: dict[str, Any] = {
    "patch_size": 1,
    "dim_feedforward": 256,
    "adaln": False,
    "rotary": False,
    "known_frames": False,
    "contacts": False,
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "balance_loss": False,
    "optimizer": "adamw",
    "augment": False,
}


def our_state(x_train: torch.Tensor, **knobs: Any) -> TrainState:
    """Return the state of a new run with these knobs, on the CPU if `device` is not among them."""
    torch.manual_seed(0)
    config = tdd.TrainConfig(**{"device": "cpu"} | DECIDED | knobs)
    steps = -(-len(x_train) // config.batch_size) * config.num_epochs
    device = pick_device(config.device)
    model, scheduler = tdd.build_model(config).to(device), tdd.build_scheduler(config).to(device)
    return TrainState(model, scheduler, config, steps, tdd.NUM_TASKS)


def our_step(state: TrainState, x_train: torch.Tensor) -> Callable[[], Any]:
    """Return a function that takes one step on the next batch of the epoch's order."""
    order = epoch_order(len(x_train), 0, 0).to(x_train.device)
    batches = order.split(state.config.batch_size)

    def step() -> float:
        state.model.train()
        scalars = tdd.train_step(state, x_train[batches[state.step % len(batches)]])
        return float(scalars["train/loss"])

    return step


def per_gesture(rows: list[Row], batch_sizes: dict[str, int], plan: str) -> None:
    """Add to each row the batch and how many times faster a gesture is trained on."""
    reference = next(row["ms"] for row in rows if row[""] == plan) / batch_sizes[plan]
    for row in rows:
        row["batch"] = batch_sizes[row[""]]
        row["times faster per gesture"] = reference / (row["ms"] / row["batch"])


def variants_table(x_train: torch.Tensor, args: argparse.Namespace) -> Row:
    """Return the default recipe's step with options that help elsewhere, and by threads."""
    options: dict[str, dict[str, bool]] = {"as it is": {}, "--amp (bf16)": {"amp": True}}
    if shutil.which("g++"):
        options["--compile"] = {"compile": True}
        options["--amp --compile"] = {"amp": True, "compile": True}
    steps = {name: our_step(our_state(x_train, **o), x_train) for name, o in options.items()}

    def on_threads(step: Callable[[], Any], threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    for threads in range(1, (os.cpu_count() or 1) + 1):
        step = our_step(our_state(x_train), x_train)
        steps[f"{threads} thread(s)"] = partial(on_threads, step, threads)
    rows = compare(in_turn(steps, 4 * args.rounds), "as it is")
    torch.set_num_threads(args.threads)
    return {
        "title": f"The default recipe's step, {args.threads} thread(s) but where said",
        "rows": rows,
    }


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the tables of steps, of epochs and of options."""
    folders = (ROOT / args.data_dir / name for name in ("train", "val"))
    x_train, x_val = (torch.from_numpy(tdd.DiffusionActionDataset(f).sequences) for f in folders)
    size = {"d_model": args.d_model, "num_layers": args.num_layers, "batch_size": args.batch_size}
    network = PlanNetwork(args.d_model, num_layers=args.num_layers)
    plan = PlanLoop(network, x_train.numpy(), args.batch_size, num_workers=args.workers)
    states = {
        "plan's network, our loop": our_state(x_train, **PLAN_NETWORK, **size, dropout=0.1),
        "the same without dropout": our_state(x_train, **PLAN_NETWORK, **size),
        "the same with --amp (bf16)": our_state(x_train, **PLAN_NETWORK, **size, amp=True),
    }
    can_compile = args.variants and shutil.which("g++")
    if can_compile:
        compiled = our_state(x_train, **PLAN_NETWORK, **size, amp=True, compile=True)
        states["the same with --amp --compile"] = compiled
    batch = {"batch_size": args.batch_size}
    states["default recipe, plan's batch"] = our_state(x_train, **batch)
    if can_compile:
        states["the same with --compile"] = our_state(x_train, **batch, compile=True)
    states["default recipe"] = our_state(x_train)
    steps: dict[str, Callable[[], Any]] = {"plan as written": plan.step}
    steps |= {name: our_step(state, x_train) for name, state in states.items()}
    rows = compare(in_turn(steps, args.rounds, args.calls), "plan as written", faster=True)
    batches = {name: state.config.batch_size for name, state in states.items()}
    per_gesture(rows, batches | {"plan as written": args.batch_size}, "plan as written")
    default = states["default recipe"]
    x_0 = x_val[: tdd.VAL_SEQUENCES]
    sampling = default.config.sampling
    validation = in_turn(
        {
            "plan as written": lambda: plan.validate(x_val, args.batch_size),
            "default recipe": lambda: tdd.validate(default.ema, default.scheduler, x_0, sampling),
        },
        min(args.rounds, 3),
        warm_up=1,
    )
    epochs: list[Row] = []
    for name, seconds in validation.items():
        step = next(row for row in rows if row[""] == name)
        num_steps = -(-5000 // step["batch"])
        train_s, val_s = num_steps * step["ms"] / 1000, spread(seconds)["median"]
        epoch: Row = {"": name, "steps": num_steps, "train s": train_s, "validate s": val_s}
        epochs.append(epoch | {"epoch s": train_s + val_s})
    for epoch in epochs:
        epoch["times faster"] = epochs[0]["epoch s"] / epoch["epoch s"]
    title = f"One step: d_model {args.d_model}, {args.num_layers} layers, 250 frames"
    note = (
        "The default recipe reads ten frames per token, and takes the smaller steps of batch "
        "32: both columns are given. It also augments, and draws masks of known frames, and "
        "its Muon orthogonalises matrices, which the plan's step does not."
    )
    return [
        {"title": title, "rows": rows, "note": note},
        {"title": "An epoch of 5,000 gestures, by the medians above", "rows": epochs},
        *([variants_table(x_train, args)] if args.variants else []),
    ]


OPTIONS: dict[str, Any] = {
    "rounds": 5,
    "calls": 2,
    "batch_size": 64,
    "d_model": 64,
    "num_layers": 3,
}
OPTIONS |= {"threads": 2, "workers": 4, "variants": 1, "data_dir": "diffusion_test_data"}

if __name__ == "__main__":
    sys.exit(main("training", __doc__ or "", measure, OPTIONS))
