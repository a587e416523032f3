"""Distillation: what a student does in one, two and four steps, beside its teacher.

    python -m benchmarks.distillation --teacher runs/RUN --student runs/STUDENT [--num 2000]

Gestures from noise alone, and recreations of validation gestures from their press edges. The
teacher by its own sampler, and by DDIM and DPM-Solver++ without randomness; straight gestures only.
Then plans on the exact simulator, 32 evaluations in 2 ms, by fresh draws of both.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_diffusion_ddim as tdd
from augmentation.click_aug import draw_gestures, render
from benchmarks.measure import Row, in_turn, main
from evaluation.bayes import GesturePrior
from evaluation.family import known_prior, validity
from evaluation.protocols.realism import find_classifier, realism_table
from evaluation.samples import type_shares
from planning.benchmark import Job, rate_of
from planning.planner import Planner
from planning.shipped import run_shipped
from planning.tasks import TASKS
from planning.world import soft_world
from trainlib.errors import UserError
from trainlib.metrics import compute_reconstruction_metrics

SETTINGS = {  # name: (whose, sampler, eta, steps); None = the run's own
    **{f"student, {n}": ("student", None, None, n) for n in (1, 2, 4)},
    **{f"teacher, {n}": ("teacher", None, None, n) for n in (1, 2, 4, 10, 20)},
    **{f"teacher, DDIM, {n}": ("teacher", "ddim", 0.0, n) for n in (1, 2, 4)},
    **{f"teacher, DPM-Solver++, {n}": ("teacher", "dpmpp", 0.0, n) for n in (2, 4, 20)},
}
PLANS = {  # name: (whose, milliseconds, draws at most)
    f"{whose}, {budget_ms} ms": (whose, budget_ms, draws)
    for budget_ms, draws in ((500, 128), (100, 200))
    for whose in ("teacher", "student")
}
TOGETHER = 64  # gestures that a planner might draw at once


def fresh_gestures(prior: GesturePrior, num: int, seed: int) -> torch.Tensor:
    """Return fresh gestures of the generator, (num, L, 3), data units."""
    length = prior.sequence_length
    ranges = prior.action_type, prior.min_delta_t, prior.max_delta_t, length
    drawn = draw_gestures(np.random.default_rng([seed, 1]), num, *ranges)
    return torch.from_numpy(render(drawn, length))


def plans_table(args: argparse.Namespace) -> Row:
    """Return how often plans succeed that draw afresh, told where the screen should change."""
    planners = {name: Planner.load(getattr(args, name)) for name in ("teacher", "student")}
    rows = []
    for name, (whose, budget_ms, draws) in PLANS.items():
        jobs = [Job("batched", "planner", task, 0, args.plans) for task in TASKS]
        given: dict[str, Any] = {"budget_ms": budget_ms, "num_plans": draws}
        made = [run_shipped(job, planners[whose], soft_world, **given) for job in jobs]
        rates = {row["task"]: 100 * rate_of(row) for row in made}
        row: Row = {"planner": name, **rates, "all, %": float(np.mean([*rates.values()]))}
        row["evaluations"] = max(one["used"] for one in made)
        rows.append(row | {"ms at most": max(one["ms_most"] for one in made)})
    note = f"Solved, %, of {args.plans}. Draws take this machine's time, evaluations 2 ms."
    title = "Plans by fresh draws at token changes, 32 evaluations in 2 ms"
    return {"title": title, "rows": rows, "note": note}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of all settings."""
    if not (args.teacher and args.student):
        raise UserError("--teacher and --student name checkpoints or run folders; give both")
    runs = {name: tdd.load_model(getattr(args, name)) for name in ("teacher", "student")}
    config = runs["teacher"][2]
    val = tdd.DiffusionActionDataset(config.val_data_dir, config.seq_len)
    x_val = torch.from_numpy(val.sequences)
    prior = known_prior(config.val_data_dir, x_val)
    real = fresh_gestures(prior, args.num, args.seed)
    rows: list[Row] = []
    timed: dict[int, dict[str, Any]] = {1: {}, TOGETHER: {}}
    x_0 = x_val[: args.recreated]
    for name, (whose, sampler, eta, steps) in SETTINGS.items():
        model, scheduler, own = runs[whose]
        given = own.sampling | {"num_inference_steps": steps}
        given |= {} if sampler is None else {"sampler": sampler, "eta": eta}
        made = tdd.generate(model, scheduler, tuple(real.shape), seed=args.seed, **given)
        recreated = tdd.recreate(model, scheduler, x_0, **given)
        shares = {k: e.value for k, e in type_shares(made).items()}
        told = realism_table({"": made}, real, find_classifier())[""]
        rows.append({"steps": name, "valid": validity(made, prior)["valid"].double().mean().item()})
        rows[-1] |= {k: shares[f"share_{k}"] for k in ("none", "click", "diagonal")}
        rows[-1] |= {"AUC": told["auc"].value if "auc" in told else "scikit-learn is missing"}
        rows[-1] |= {"still clicks": told["still_clicks_of_real"].value}
        snr = compute_reconstruction_metrics(x_0, recreated)["mean_snr_db"]
        rows[-1] |= {"keyframes, dB": snr}
        for num, functions in timed.items():
            shape = (num, *real.shape[1:])
            functions[name] = partial(tdd.generate, model, scheduler, shape, **given)
    for num, functions in timed.items():
        seconds = in_turn(functions, max(1, args.rounds // (1 + num // 16)))
        for row in rows:
            row[f"ms of {num}"] = 1000 * float(np.median(seconds[row["steps"]]))
    plans = plans_table(args)
    args.teacher, args.student = Path(args.teacher).name, Path(args.student).name
    note = (
        "AUC: of a classifier against as many real gestures. Still clicks: over real ones' share."
    )
    return [{"title": "In few steps", "rows": rows, "note": note}, plans]


OPTIONS: dict[str, Any] = {"teacher": "", "student": "", "num": 2000, "recreated": 300}
OPTIONS |= {"rounds": 20, "plans": 25, "seed": 0}

if __name__ == "__main__":
    sys.exit(main("distillation", __doc__ or "", measure, OPTIONS))
