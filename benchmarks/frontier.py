"""Train the recipe at several sizes and measure what a larger model brings and costs.

    python -m benchmarks.frontier [--num_epochs 45] [--only NAME ...]
    python -m benchmarks.frontier --checkpoint runs/RUN --name "the default"     # one more row

Each size, layers x width, is one run of the trainer's own command line on one thread, seed 0. All
see the same number of gestures, so the larger ones take longer: `train_s` says how long. The rows
go to benchmarks/results/frontier.json as they finish, from where the report draws them: its form is
in evaluation/protocols/frontier.py. A name that is there already is left as it is.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import add_row, read_rows, run_trainer
from benchmarks.report import table
from evaluation.bayes import GesturePrior
from evaluation.criteria import LINE_SIGMAS, PLAN_LINES
from evaluation.family import known_prior, validity
from evaluation.protocols.frontier import FRONTIER
from evaluation.scores import add_noise, bayes_mean, measure_latencies
from train_diffusion_ddim import (
    DDIMScheduler,
    DiffusionActionDataset,
    denoise_one_shot,
    generate,
    load_model,
    recreate,
)
from trainlib.errors import OneLineParser, run_program, say
from trainlib.metrics import compute_reconstruction_metrics, gesture_metrics

NUM_DENOISED, NUM_GENERATED = 400, 1000
SIZES = {
    "1 x 8": "--num_layers 1 --d_model 8 --nhead 1",
    "1 x 16": "--num_layers 1 --d_model 16 --nhead 2",
    "1 x 32": "--num_layers 1 --d_model 32",
    "2 x 16": "--num_layers 2 --d_model 16 --nhead 2",
    "2 x 32": "--num_layers 2 --d_model 32",
    "2 x 32, 1 head": "--num_layers 2 --d_model 32 --nhead 1",
    "2 x 32, patch 10": "--num_layers 2 --d_model 32 --patch_size 10",
    "2 x 64": "--num_layers 2 --d_model 64",
    "3 x 64": "--num_layers 3 --d_model 64",
    "4 x 96": "--num_layers 4 --d_model 96",
}


def denoise_ratios(
    model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, prior: GesturePrior
) -> dict[str, float]:
    """Return R = MSE / MMSE of one-shot denoising of x_0, (B, L, C), data units, by sigma."""
    ratios = {}
    for sigma in LINE_SIGMAS:
        t, _, noisy = add_noise(scheduler, x_0, sigma)
        best = bayes_mean(noisy, scheduler.sigma(t), prior)
        error = denoise_one_shot(model, scheduler, x_0, sigma) - x_0
        ratios[str(sigma)] = (error.square().mean() / (best - x_0).square().mean()).item()
    return ratios


def measure(checkpoint: str | Path) -> dict[str, Any]:
    """Score a checkpoint on the validation set, at the steps that it was trained for."""
    model, scheduler, config = load_model(checkpoint)
    x_0 = torch.from_numpy(DiffusionActionDataset(config.val_data_dir, config.seq_len).sequences)
    prior = known_prior(config.val_data_dir, x_0)
    recreated = recreate(model, scheduler, x_0, **config.sampling)
    keyframes = compute_reconstruction_metrics(x_0, recreated) | gesture_metrics(x_0, recreated)
    shape = (NUM_GENERATED, *x_0.shape[1:])
    is_valid = validity(generate(model, scheduler, shape, **config.sampling), prior)
    one = partial(generate, model, scheduler, (1, *x_0.shape[1:]), **config.sampling)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "keyframes": {metric: keyframes[metric] for metric in PLAN_LINES},
        "r": denoise_ratios(model, scheduler, x_0[:NUM_DENOISED], prior),
        "one_press": is_valid["one_press"].float().mean().item(),
        "valid": is_valid["valid"].float().mean().item(),
        "latency_ms": measure_latencies({"one": one}, x_0.device, 20)["one"].value,
    }


def train_size(flags: list[str]) -> dict[str, Any]:
    """Train once on one thread; return the scores and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        rows = run_trainer(Path(folder), flags)
        return measure(folder) | {"train_s": sum(row.get("train/epoch_s", 0.0) for row in rows)}


def describe(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the table shows it."""
    shown = {"model": row["name"], "parameters": row["parameters"]}
    names = {"mse": "MSE", "mean_snr_db": "SNR, dB", "spatial_accuracy": "spatial"}
    shown |= {title: row["keyframes"][name] for name, title in names.items()}
    shown |= {f"R at {sigma}": r for sigma, r in row["r"].items()}
    names = {"one_press": "one press", "valid": "valid", "latency_ms": "ms a sample"}
    return shown | {title: row[name] for name, title in names.items()}


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = OneLineParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("--num_epochs", type=int, default=45, help="of each size; default: 45")
    parser.add_argument("--only", nargs="*", choices=SIZES, default=list(SIZES), help="sizes")
    parser.add_argument("--checkpoint", help="measure this one, train nothing")
    parser.add_argument("--name", help="of its row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in [args.name or args.checkpoint] if args.checkpoint else args.only:
        if name in {row["name"] for row in read_rows(FRONTIER)}:
            continue
        flags = [] if args.checkpoint else [*SIZES[name].split(), f"--num_epochs={args.num_epochs}"]
        scores = measure(args.checkpoint) if args.checkpoint else train_size(flags)
        add_row(FRONTIER, {"name": name, "options": " ".join(flags)} | scores)
    say(table([describe(row) for row in read_rows(FRONTIER)]))


if __name__ == "__main__":
    sys.exit(run_program(main))
