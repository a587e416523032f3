"""Wall-clock to a keyframes MSE below 0.01

    python -m benchmarks.keyframes [--threads 2] [--bound 40]

Our default recipe, its cosine shortened to `--num_epochs`, against the plan's loop and network
given the same protocol: the press edges as input, [-1, 1], ten steps, the same gestures and noise.
The plan's network is trained for this one task only, ours also for the others. The clock runs
while training, not while scoring; the plan stops after `--bound` times our time.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from benchmarks.measure import ROOT, Row, main
from benchmarks.peers import PlanLoop, PlanNetwork
from benchmarks.training import our_state, our_step
from trainlib.process import timer


def keyframes_mse(model: nn.Module, scheduler: tdd.DDIMScheduler, x_0: Tensor) -> float:
    """Return the MSE of the keyframes protocol at ten steps, data units."""
    return float((tdd.recreate(model, scheduler, x_0) - x_0).square().mean())


def train_until(
    step: Callable[[], Any], score: Callable[[], float], target: float, limit_s: float, every: int
) -> tuple[list[Row], bool]:
    """Step until `score()`, taken every so many steps, is below the target or the time is over.

    Returns: the scores so far, {"steps", "seconds", "mse"}, and whether the target was reached.
    """
    curve: list[Row] = []
    seconds, taken = 0.0, 0
    while seconds < limit_s:
        elapsed = timer()
        for _ in range(every):
            step()
        seconds += elapsed()
        taken += every
        curve.append({"steps": taken, "seconds": seconds, "mse": score()})
        if curve[-1]["mse"] < target:
            return curve, True
    return curve, False


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of both and the plan's curve."""
    folders = (ROOT / args.data_dir / name for name in ("train", "val"))
    x_train, x_val = (torch.from_numpy(tdd.DiffusionActionDataset(f).sequences) for f in folders)
    x_0 = x_val[tdd.has_press_edge(x_val)][: args.val_sequences]
    state = our_state(x_train, num_epochs=args.num_epochs)
    ours, reached = train_until(
        our_step(state, x_train),
        lambda: keyframes_mse(state.ema, state.scheduler, x_0),
        args.target,
        args.limit_s,
        args.every,
    )
    torch.manual_seed(0)
    plan = PlanLoop(
        PlanNetwork(known_frames=True), x_train.numpy(), known_frames=True, num_workers=args.workers
    )
    limit_s = min(args.bound * ours[-1]["seconds"], args.limit_s)
    theirs, plan_reached = train_until(
        plan.step,
        lambda: keyframes_mse(plan.model, plan.scheduler, x_0),
        args.target,
        limit_s,
        args.every,
    )
    rows: list[Row] = [
        {"": name, "reached": "yes" if done else "no, stopped", **curve[-1]}
        for name, curve, done in (
            ("default recipe", ours, reached),
            ("plan's loop and network", theirs, plan_reached),
        )
    ]
    for row in rows:
        row["times our seconds"] = row["seconds"] / ours[-1]["seconds"]
    kept = theirs[:: max(1, math.ceil(len(theirs) / 8))]
    zeros, copies = float(x_0.square().mean()), len(x_0)
    note = f"{copies} validation gestures; predicting zeros scores {zeros:.3f}."
    return [
        {"title": f"Training until the MSE is below {args.target}", "rows": rows, "note": note},
        {"title": "The plan's curve", "rows": kept},
    ]


OPTIONS: dict[str, Any] = {
    "threads": 2,
    "bound": 40.0,
    "limit_s": 200.0,
    "num_epochs": 3,
    "every": 10,
}
OPTIONS |= {"workers": 4, "target": 0.01, "val_sequences": 128, "data_dir": "diffusion_test_data"}

if __name__ == "__main__":
    sys.exit(main("keyframes", __doc__ or "", measure, OPTIONS))
