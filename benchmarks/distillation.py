"""Distillation: what a student does in one, two and four steps, beside its teacher.

    python -m benchmarks.distillation --teacher runs/RUN --student runs/STUDENT [--num 2000]

Gestures from noise alone, and recreations of validation gestures from their press edges. The
teacher by its own sampler, and by DDIM and DPM-Solver++ without randomness; straight gestures only.
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
from trainlib.errors import UserError
from trainlib.metrics import compute_reconstruction_metrics

SETTINGS = {  # name: (whose, sampler, eta, steps); None = the run's own
    **{f"student, {n}": ("student", None, None, n) for n in (1, 2, 4)},
    **{f"teacher, {n}": ("teacher", None, None, n) for n in (1, 2, 4, 10, 20)},
    **{f"teacher, DDIM, {n}": ("teacher", "ddim", 0.0, n) for n in (1, 2, 4)},
    **{f"teacher, DPM-Solver++, {n}": ("teacher", "dpmpp", 0.0, n) for n in (2, 4, 20)},
}


def fresh_gestures(prior: GesturePrior, num: int, seed: int) -> torch.Tensor:
    """Return fresh gestures of the generator, (num, L, 3), data units."""
    length = prior.sequence_length
    ranges = prior.action_type, prior.min_delta_t, prior.max_delta_t, length
    drawn = draw_gestures(np.random.default_rng([seed, 1]), num, *ranges)
    return torch.from_numpy(render(drawn, length))


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
    alone: dict[str, Any] = {}
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
        one = (1, *real.shape[1:])
        alone[name] = partial(tdd.generate, model, scheduler, one, **given)
    seconds = in_turn(alone, args.rounds)
    for row in rows:
        row["ms alone"] = 1000 * float(np.median(seconds[row["steps"]]))
    args.teacher, args.student = Path(args.teacher).name, Path(args.student).name
    note = (
        "AUC: of a classifier against as many real gestures. Still clicks: over real ones' share."
    )
    return [{"title": "In few steps", "rows": rows, "note": note}]


OPTIONS: dict[str, Any] = {"teacher": "", "student": "", "num": 2000, "recreated": 300}
OPTIONS |= {"rounds": 20, "seed": 0}

if __name__ == "__main__":
    sys.exit(main("distillation", __doc__ or "", measure, OPTIONS))
