"""Trainings: what a recipe reaches, and what another seed changes.

    python -m benchmarks.trainings --runs runs/RUN runs/RUN_2 runs/RUN_3 [--num 10000]

Gestures from noise alone in as many steps as each run asks for, of all that are drawn; what a
classifier tells, and how contacts look, of as many as the report judges; keyframes and one-shot
denoising of validation gestures. Of recorded or human-like gestures what needs no known
distribution, against as many real windows as were kept out of training, up to those judged.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

import train_diffusion_ddim as tdd
from benchmarks.distillation import fresh_gestures
from benchmarks.frontier import denoise_ratios
from benchmarks.measure import Row, main
from evaluation.bayes import GesturePrior
from evaluation.controls import interpolate
from evaluation.family import read_prior, validity
from evaluation.protocols.infill import energy_score, network_answers
from evaluation.protocols.realism import find_classifier, realism_table
from evaluation.recorded import read_recorded
from evaluation.samples import type_shares
from evaluation.scores import sequence_mse
from trainlib.gestures import GESTURE_TYPES
from trainlib.metrics import compute_reconstruction_metrics, compute_spatial_accuracy

CONTACTS = {  # scores of the realism test: columns
    "auc": "AUC",
    "still_clicks_of_real": "still clicks",
    "shake_swipes": "shake",
    "deviation": "deviation",
    "deviation_p90": "p90",
}
NUM_DENOISED = 400
NUM_ASKED, NUM_ANSWERS = 250, 16  # windows whose press edges are given, answers to each
MORE_STEPS = 20
STRAIGHT, OTHER = "From noise alone", "Gestures of an unknown distribution"
NOTES = {
    STRAIGHT: (
        "Shares are of all drawn. AUC: of a classifier against as many real gestures. Still "
        "clicks: over real ones' share. Shake: thousandths of the screen a frame. Deviation: of "
        "swipes from their chord, median and 90th percentile. R: mean squared error of one-shot "
        "denoising over the Bayes optimum."
    ),
    OTHER: (
        "AUC: of a classifier against as many real windows, those of the people trained on that "
        "were kept out of training, if there are any; shake of swipes over what real ones allow. "
        "The rest: 250 windows, given their press edges, and of straight lines between these in "
        "brackets; MSE and spatial accuracy of one answer, MSE of the mean of 16, their energy "
        "score."
    ),
}


def score_straight(
    model: torch.nn.Module, scheduler: tdd.DDIMScheduler, config: tdd.TrainConfig,
    x_val: torch.Tensor, prior: GesturePrior, args: argparse.Namespace,
) -> Row:  # fmt: skip
    """Return the scores of a run on straight gestures."""
    real = fresh_gestures(prior, args.judged, args.seed)
    shape = (args.num, *real.shape[1:])
    made = tdd.generate(model, scheduler, shape, seed=args.seed, **config.sampling)
    shares = {k: e.value for k, e in type_shares(made).items()}
    row: Row = {"valid": validity(made, prior)["valid"].double().mean().item()}
    row |= {name: shares[f"share_{name}"] for name in ("none", *GESTURE_TYPES)}
    told = realism_table({"": made[: args.judged]}, real, find_classifier())[""]
    row |= {column: told[metric].value for metric, column in CONTACTS.items() if metric in told}
    recreated = tdd.recreate(model, scheduler, x_val, **config.sampling)
    row["keyframes, dB"] = compute_reconstruction_metrics(x_val, recreated)["mean_snr_db"]
    ratios = denoise_ratios(model, scheduler, x_val[:NUM_DENOISED], prior)
    return row | {f"R at {sigma}": ratio for sigma, ratio in ratios.items()}


def score_recorded(
    model: torch.nn.Module, scheduler: tdd.DDIMScheduler, config: tdd.TrainConfig,
    x_val: torch.Tensor, args: argparse.Namespace,
) -> Row:  # fmt: skip
    """Return the scores of a run on gestures whose distribution is not known."""
    found = read_recorded(x_val.numpy(), config.val_data_dir, config.data_dir, args.judged)
    real = torch.from_numpy(found.unseen[: args.judged])
    row: Row = {}
    for column, steps in (("AUC", None), (f"AUC, {MORE_STEPS} steps", MORE_STEPS)):
        given = config.sampling | ({"num_inference_steps": steps} if steps else {})
        made = tdd.generate(model, scheduler, tuple(real.shape), seed=args.seed, **given)
        told = realism_table({"": made}, real, find_classifier())[""]
        row[column] = told["auc"].value if "auc" in told else math.nan
        row.setdefault("shake / allowed", told["shake_swipes_of_allowed"].value)
    x_0 = torch.from_numpy(found.judged)
    x_0 = x_0[tdd.has_press_edge(x_0)][:NUM_ASKED]
    lines = interpolate(x_0, tdd.press_edges(x_0))
    answers = {"": tdd.recreate(model, scheduler, x_0, **config.sampling), " (lines)": lines}
    for name, answer in answers.items():
        row[f"MSE{name}"] = float(sequence_mse(x_0, answer).mean())
        row[f"within .1{name}"] = compute_spatial_accuracy(x_0, answer)
    given = config.sampling | {"seed": args.seed}
    asked = model, None, scheduler, x_0, tdd.press_edges(x_0)
    many = network_answers(*asked, num_samples=NUM_ANSWERS, sampling=given)["model"]()
    row["MSE of the mean"] = float(sequence_mse(x_0, many.mean(dim=1)).mean())
    for name, several in (("", many), (" (lines)", lines[:, None])):
        row[f"energy{name}"] = float(energy_score(several, x_0)[0].mean())
    return row


def score(run: str, args: argparse.Namespace) -> tuple[str, Row]:
    """Return the row of a run, and the title of the table where it belongs."""
    model, scheduler, config = tdd.load_model(run)
    val = tdd.DiffusionActionDataset(config.val_data_dir, config.seq_len)
    x_val = torch.from_numpy(val.sequences)
    prior, given = read_prior(config.val_data_dir, x_val), (model, scheduler, config, x_val)
    if prior is None:
        title, scores = OTHER, score_recorded(*given, args)
    else:
        title, scores = STRAIGHT, score_straight(*given, prior, args)
    return title, {"training": f"{Path(run).name}, seed {config.seed}"} | scores


def measure(args: argparse.Namespace) -> list[Row]:
    """Return a table of all runs of a kind, with their mean if they are several."""
    tables: dict[str, list[Row]] = {}
    for run in args.runs:
        title, row = score(run, args)
        tables.setdefault(title, []).append(row)
    for rows in tables.values():
        if len(rows) > 1:
            numbers = [key for key in rows[0] if key != "training"]
            mean = {key: sum(row[key] for row in rows) / len(rows) for key in numbers}
            rows.append({"training": "mean"} | mean)
    args.runs = [Path(run).name for run in args.runs]
    return [{"title": t, "rows": rows, "note": NOTES[t]} for t, rows in tables.items()]


OPTIONS: dict[str, Any] = {"runs": ["runs/default"], "num": 10_000, "judged": 1000, "seed": 0}

if __name__ == "__main__":
    sys.exit(main("trainings", __doc__ or "", measure, OPTIONS))
