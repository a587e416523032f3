"""What few steps do even with the exact score: measured once, kept in a file, read by the report.

    python -m evaluation.few_steps --steps 2 5 10    # for the default recipe

The exact score is too slow for a report (10 ms per sample and step on one core). What DDIM makes of
it depends only on the prior of the gestures and on the noise levels of the steps, so an entry of
the file holds for any scheduler with the same ones: a list of {prior, sigmas, scores}, scores:
metric -> [value, interval, n].

Two biases meet in a duration. Few steps shorten it. The start lengthens it: pure noise at a finite
noise level stands for x_t that would still carry a little of the gesture.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.bayes import DEFAULT_PRIOR, GesturePrior, exact_ddim
from evaluation.estimates import Estimate, Table, bootstrap
from evaluation.family import validity
from train_diffusion_ddim import DDIMScheduler, TrainConfig, build_scheduler, noise_bank
from trainlib.errors import OneLineParser, run_program, say
from trainlib.files import write_json
from trainlib.gestures import PRESSED
from trainlib.metrics import has_one_press
from trainlib.process import progress

EXACT_FEW_STEPS = Path(__file__).parents[1] / "benchmarks" / "results" / "exact_few_steps.json"


def score_durations(samples: Tensor, prior: GesturePrior) -> dict[str, Estimate]:
    """Score samples, (B, L, C), data units: valid, one_press, mean_duration, duration_bias.

    The duration is that of the samples that press once, in frames; its bias is relative to the
    mean of the prior, (min_delta_t + max_delta_t)/2.
    """
    one = has_one_press(samples).double().cpu().numpy()
    frames = (samples[..., 2] > PRESSED).sum(dim=1).cpu().numpy()
    truth = (prior.min_delta_t + prior.max_delta_t) / 2
    return {
        "valid": bootstrap(validity(samples, prior)["valid"].cpu().numpy()),
        "one_press": bootstrap(one),
        "mean_duration": bootstrap(frames * one, one),
        "duration_bias": bootstrap((frames / truth - 1) * one, one),
    }


def exact_few_steps(
    scheduler: DDIMScheduler, prior: GesturePrior, steps: Sequence[int], n: int
) -> Table:
    """Score n samples of DDIM, eta 0, with the exact score.

    Args:
        scheduler: its ᾱ table and spacing are used.
        prior: the distribution of the gestures.
        steps: numbers of steps; those above the noise levels are left out.
        n: samples each.

    Returns:
        Settings "exact/{steps}" with the metrics of `score_durations`.
    """
    alphas_cumprod = [scheduler.alpha_bar(t) for t in range(scheduler.num_timesteps)]
    x_T = noise_bank((n, prior.sequence_length, 3)).numpy()
    table: Table = {}
    for num in progress([num for num in steps if num <= len(alphas_cumprod)], "exact score"):
        timesteps = [t for t, _ in scheduler.timestep_pairs(num)]
        samples = torch.from_numpy(exact_ddim(x_T, alphas_cumprod, timesteps, prior))
        table[f"exact/{num}"] = score_durations(samples, prior)
    return table


def _noise_levels(scheduler: DDIMScheduler, num_inference_steps: int) -> list[float]:
    """Sigma of each step, which with the prior is all that the exact score's samples depend on."""
    return [round(scheduler.sigma(t), 6) for t, _ in scheduler.timestep_pairs(num_inference_steps)]


def _is_entry_of(entry: dict[str, Any], prior: GesturePrior, sigmas: list[float]) -> bool:
    """Tell whether an entry of EXACT_FEW_STEPS is about this prior and these noise levels."""
    same = len(entry["sigmas"]) == len(sigmas) and np.allclose(entry["sigmas"], sigmas, 1e-4)
    return entry["prior"] == asdict(prior) and bool(same)


def read_exact_few_steps(
    scheduler: DDIMScheduler,
    prior: GesturePrior,
    steps: Sequence[int],
    path: Path = EXACT_FEW_STEPS,
) -> Table:
    """Read what `exact_few_steps` measured for this prior and these noise levels, if it has."""
    entries = json.loads(path.read_text("utf-8")) if path.exists() else []
    table: Table = {}
    for num in steps:
        if num > scheduler.num_timesteps:
            continue
        sigmas = _noise_levels(scheduler, num)
        for entry in entries:
            if _is_entry_of(entry, prior, sigmas):
                scores = entry["scores"].items()
                table[f"exact/{num}"] = {k: Estimate(v, tuple(ci), n) for k, (v, ci, n) in scores}
    return table


def write_exact_few_steps(
    scheduler: DDIMScheduler, prior: GesturePrior, table: Table, path: Path = EXACT_FEW_STEPS
) -> None:
    """Add the rows of `exact_few_steps` to the file; a newer row replaces an older one."""
    entries = json.loads(path.read_text("utf-8")) if path.exists() else []
    for setting, row in table.items():
        sigmas = _noise_levels(scheduler, int(setting.split("/")[1]))
        entries = [entry for entry in entries if not _is_entry_of(entry, prior, sigmas)]
        scores = {name: estimate for name, estimate in row.items() if estimate.n}
        entries.append({"prior": asdict(prior), "sigmas": sigmas, "scores": scores})
    write_json(path, entries)


def measure(argv: list[str] | None) -> None:
    """Measure the exact score with the default recipe's few steps and add it to the file."""
    parser = OneLineParser(prog="python -m evaluation.few_steps", description=measure.__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10, 20, 50], metavar="N")
    parser.add_argument("--num_sequences", type=int, default=400, metavar="N")
    args = parser.parse_args(argv)
    scheduler = build_scheduler(TrainConfig())
    for num in args.steps:
        table = exact_few_steps(scheduler, DEFAULT_PRIOR, [num], args.num_sequences)
        write_exact_few_steps(scheduler, DEFAULT_PRIOR, table)
        say(f"{num} steps: {table[f'exact/{num}']}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see `run_program` for what it returns."""
    return run_program(lambda: measure(argv))


if __name__ == "__main__":
    sys.exit(main())
