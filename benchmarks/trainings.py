"""Trainings: what a recipe reaches, and what another seed changes.

    python -m benchmarks.trainings --runs runs/RUN runs/RUN_2 runs/RUN_3 [--num 10000]

Gestures from noise alone in as many steps as each run asks for, of all that are drawn; what a
classifier tells, and how contacts look, of as many as the report judges; keyframes and one-shot
denoising of validation gestures. Straight gestures only.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import train_diffusion_ddim as tdd
from benchmarks.distillation import fresh_gestures
from benchmarks.frontier import denoise_ratios
from benchmarks.measure import Row, main
from evaluation.family import known_prior, validity
from evaluation.protocols.realism import find_classifier, realism_table
from evaluation.samples import type_shares
from trainlib.gestures import GESTURE_TYPES
from trainlib.metrics import compute_reconstruction_metrics

CONTACTS = {  # scores of the realism test: columns
    "auc": "AUC",
    "still_clicks_of_real": "still clicks",
    "shake_swipes": "shake",
    "deviation": "deviation",
    "deviation_p90": "p90",
}
NUM_DENOISED = 400


def score(run: str, args: argparse.Namespace) -> Row:
    """Return the row of a run."""
    model, scheduler, config = tdd.load_model(run)
    val = tdd.DiffusionActionDataset(config.val_data_dir, config.seq_len)
    x_val = torch.from_numpy(val.sequences)
    prior = known_prior(config.val_data_dir, x_val)
    real = fresh_gestures(prior, args.judged, args.seed)
    shape = (args.num, *real.shape[1:])
    made = tdd.generate(model, scheduler, shape, seed=args.seed, **config.sampling)
    shares = {k: e.value for k, e in type_shares(made).items()}
    row: Row = {"training": f"{Path(run).name}, seed {config.seed}"}
    row["valid"] = validity(made, prior)["valid"].double().mean().item()
    row |= {name: shares[f"share_{name}"] for name in ("none", *GESTURE_TYPES)}
    told = realism_table({"": made[: args.judged]}, real, find_classifier())[""]
    row |= {column: told[metric].value for metric, column in CONTACTS.items() if metric in told}
    recreated = tdd.recreate(model, scheduler, x_val, **config.sampling)
    row["keyframes, dB"] = compute_reconstruction_metrics(x_val, recreated)["mean_snr_db"]
    ratios = denoise_ratios(model, scheduler, x_val[:NUM_DENOISED], prior)
    return row | {f"R at {sigma}": ratio for sigma, ratio in ratios.items()}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of all runs, and their mean if they are several."""
    rows = [score(run, args) for run in args.runs]
    if len(rows) > 1:
        numbers = [key for key in rows[0] if key != "training"]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in numbers}
        rows.append({"training": "mean"} | mean)
    args.runs = [Path(run).name for run in args.runs]
    note = (
        "Shares are of all drawn. AUC: of a classifier against as many real gestures. Still "
        "clicks: over real ones' share. Shake: thousandths of the screen a frame. Deviation: of "
        "swipes from their chord, median and 90th percentile. R: mean squared error of one-shot "
        "denoising over the Bayes optimum."
    )
    return [{"title": "From noise alone", "rows": rows, "note": note}]


OPTIONS: dict[str, Any] = {"runs": ["runs/default"], "num": 10_000, "judged": 1000, "seed": 0}

if __name__ == "__main__":
    sys.exit(main("trainings", __doc__ or "", measure, OPTIONS))
