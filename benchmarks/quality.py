"""Quality per CPU second, against what a user would pick instead

    python -m benchmarks.quality            # an hour and a quarter, then three more with --hour
    python -m benchmarks.quality --quick    # a minute: every line, no measurement

Each recipe of benchmarks/recipes.py trains on one thread for a number of CPU seconds, with each of
two learning rates, on the same gestures; one judge scores them by the metrics of the evaluation. A
row is written when it is done, and what is there already is left as it is. `--hour` adds a row each
of 3,600 seconds, with the better learning rate: the recipes of others are made for longer runs.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from benchmarks.cost_curves import kept_bytes
from benchmarks.frontier import denoise_ratios
from benchmarks.measure import ROOT, Row, add_row, read_rows
from benchmarks.recipes import RECIPES, Recipe
from benchmarks.report import RESULTS, better_rows, quality_table
from evaluation.bayes import GesturePrior
from evaluation.family import deviations, known_prior, validity
from evaluation.scores import measure_latencies
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder

STEPS = (10, 20, 50)
SECONDS, HOUR = (60.0, 180.0, 420.0), 3600.0
PROBE = 20  # steps that are timed, to know how many fit


def cpu_seconds_of(recipe: Recipe, num: int) -> float:
    """Return the CPU seconds of a step, after two that are not counted."""
    for _ in range(2):
        recipe.step()
    began = time.process_time()
    for _ in range(num):
        recipe.step()
    return (time.process_time() - began) / num


def train(name: str, x_train: Tensor, lr: float, seconds: float, **size: Any) -> tuple[Recipe, Row]:
    """Train for so many CPU seconds; return the recipe and what it cost.

    The steps that fit are known beforehand, since learning rates follow a schedule; the clock, too,
    ends the training, 5 % late at most.
    """
    probe = RECIPES[name](x_train, lr, 1000, **size)
    fitting = max(1, int(seconds / cpu_seconds_of(probe, min(PROBE, math.ceil(seconds)))))
    recipe = RECIPES[name](x_train, lr, fitting, **size)
    steps, began, said = 0, time.process_time(), 0.0
    while steps < fitting and (used := time.process_time() - began) < 1.05 * seconds:
        recipe.step()
        steps += 1
        if used > said + 20:
            say(f"  step {steps} of {fitting}, {used:.0f} CPU s")
            said = used
    used = time.process_time() - began
    return recipe, {"steps": steps, "cpu_s": used, "ms_per_step": 1000 * used / steps}


def judge(recipe: Recipe, x_val: Tensor, prior: GesturePrior, num: int) -> Row:
    """Score a trained denoiser; `num` gestures are drawn, and as many are denoised.

    Returns: valid by number of steps, line_rms (the median distance of the pressed frames from
        their line, of 10 steps), R = MSE / MMSE by sigma, ms_per_sample (one at a time, 10 steps).
    """
    model, scheduler, sampling = recipe.trained()
    model.eval()
    shape, valid = (num, *x_val.shape[1:]), {}
    for steps in reversed(STEPS):
        options = sampling | {"num_inference_steps": steps}
        drawn = tdd.generate(model, scheduler, shape, seed=1, **options)
        valid[str(steps)] = float(validity(drawn, prior)["valid"].float().mean())
    rms = deviations(drawn)["line_rms"]  # of the fewest steps
    one = partial(tdd.generate, model, scheduler, (1, *x_val.shape[1:]), **options)
    ms = measure_latencies({"one": one}, x_val.device, 10)["one"].value
    return {
        "valid": dict(reversed(valid.items())),
        "line_rms": float(rms.median()),
        "r": denoise_ratios(model, scheduler, x_val[:num], prior),
        "ms_per_sample": ms,
        "parameters": parameters_of(model),
        "mb_kept": kept_bytes(recipe.step) / 1e6,
    }


def parameters_of(model: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in model.parameters())


def plan(path: Path, args: argparse.Namespace) -> list[tuple[str, float, float]]:
    """Return what the file lacks: recipe, learning rate, CPU seconds, short ones first."""
    wanted = [
        (name, lr, seconds)
        for seconds in args.seconds
        for name in args.recipes
        for lr in RECIPES[name].LEARNING_RATES  # type: ignore[attr-defined]
    ]
    rows = read_rows(path)
    done = {(row["name"], row["lr"], row["seconds"]) for row in rows}
    missing = [run for run in wanted if run not in done]
    if args.hour and not missing:  # by then the better learning rate is known
        longest = max(args.seconds)
        better = [row for row in better_rows(rows) if row["seconds"] == longest]
        hours = [(row["name"], row["lr"], HOUR) for row in better if row["name"] in args.recipes]
        missing = [run for run in hours if run[0] not in {r[0] for r in done if r[2] == HOUR}]
    return missing


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    add("--seconds", nargs="+", type=float, default=list(SECONDS), help=f"default: {SECONDS}")
    add("--num", type=int, default=400, help="gestures drawn by each; default: 400")
    add("--hour", action="store_true", help="add a row each of an hour")
    add("--quick", action="store_true", help="2 s each and 8 gestures, into a file of its own")
    add("--data_dir", default="diffusion_test_data", help="with train/ and val/")
    add("--output_dir", default=str(RESULTS), help=f"default: {RESULTS}")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds, args.num = [2.0], 8
    if args.num < 1 or not all(seconds > 0 for seconds in args.seconds):
        raise UserError("--num and --seconds must be above 0")
    return args


def run(argv: list[str] | None, **sizes: Any) -> None:
    """Train and judge what is missing, then print the table; sizes are by recipe."""
    args = parse_args(argv)
    path = make_folder(args.output_dir) / f"quality{'-quick' * args.quick}.json"
    torch.set_num_threads(1)
    folders = [ROOT / args.data_dir / name for name in ("train", "val")]
    x_train, x_val = (torch.from_numpy(tdd.DiffusionActionDataset(f).sequences) for f in folders)
    prior = known_prior(folders[1], x_val)
    while missing := plan(path, args):
        name, lr, seconds = missing[0]
        say(f"{name}, lr {lr:g}, {seconds:g} CPU s ({len(missing)} to go)")
        try:
            recipe, cost = train(name, x_train, lr, seconds, **sizes.get(name, {}))
        except ImportError as e:
            cure = "pip install -r requirements-bench.txt, or leave it out of --recipes"
            raise UserError(f"{name} cannot be imported ({e}); {cure}") from None
        scores = judge(recipe, x_val, prior, args.num)
        about = {"name": name, "lr": lr, "seconds": seconds, "num": args.num}
        add_row(path, about | cost | scores)
    say(f"{quality_table(read_rows(path))}\n\n{path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_program(lambda: run(argv), stopped="stopped; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
