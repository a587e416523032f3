"""Exported sampler: does it draw what the run draws?

    python -m benchmarks.exported --checkpoint runs/RUN [--num 10000]

Gestures from noise alone, by `sample()` and by every engine that `python -m export` writes, each
with noise of its own: shares of what they are, and how far each set is from the first. A second
set of `sample()` shows what chance does.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train_diffusion_ddim as tdd
from benchmarks.measure import Row, main
from evaluation.bayes import GesturePrior
from evaluation.events import two_sample_ks
from evaluation.family import known_prior, validity
from export import runtime
from export.__main__ import describe_sampling, export
from trainlib.errors import UserError
from trainlib.gestures import ACTION_DIM, GESTURE_TYPES, PRESSED
from trainlib.metrics import classify_gestures

CHANCE = 3.5  # largest |z| of seven shares in 2,000 comparisons of equal sets


def traits(x_0: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Tell of gestures, (B, L, C), data units, what each is: (B,) bool by name."""
    types = classify_gestures(x_0)
    is_valid = validity(x_0, prior)
    return {
        "valid": is_valid["valid"],
        "one press": is_valid["one_press"],
        **{name: types == i for i, name in enumerate(GESTURE_TYPES)},
    }


def z_score(a: Tensor, b: Tensor) -> float:
    """Return by how many standard errors two shares differ; a and b are (n,) bool."""
    pooled = float(torch.cat([a, b]).double().mean())
    error = math.sqrt(pooled * (1 - pooled) * (1 / len(a) + 1 / len(b)))
    return float(a.double().mean() - b.double().mean()) / error if error else 0.0


def compare_sets(sets: Mapping[str, Tensor], prior: GesturePrior) -> list[Row]:
    """Return a row for each set of gestures, held against the first."""
    rows, reference = [], next(iter(sets.values()))
    expected = traits(reference, prior)
    frames = {name: (x[..., 2] > PRESSED).sum(dim=1).double().numpy() for name, x in sets.items()}
    first = next(iter(frames.values()))
    for name, x_0 in sets.items():
        found = traits(x_0, prior)
        row: Row = {"": name, "n": len(x_0)}
        row |= {trait: float(told.double().mean()) for trait, told in found.items()}
        z = max(abs(z_score(found[trait], expected[trait])) for trait in found)
        rows.append(row | {"largest z": z, "KS of frames": two_sample_ks(frames[name], first)})
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of all sets."""
    if not args.checkpoint:
        raise UserError("--checkpoint names a checkpoint or run folder; give one")
    model, scheduler, config = tdd.load_model(args.checkpoint)
    x_val = tdd.DiffusionActionDataset(config.val_data_dir, config.seq_len).sequences
    shape = (args.num, config.seq_len, ACTION_DIM)
    sets = {}
    for name, seed in (("sample()", 0), ("sample(), other noise", 1)):
        sets[name] = tdd.generate(model, scheduler, shape, seed=seed, **config.sampling)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "exported"
        options: dict[str, Any] = {"compiled": bool(args.compiled)}
        differences = export(model, scheduler, folder, **config.sampling, **options)
        for i, engine in enumerate(differences):
            sampler = runtime.Sampler(folder, engine, args.threads)
            noise = sampler.draw(args.num, np.random.default_rng([args.seed, i]))
            sets[f"export, {engine}"] = torch.from_numpy(sampler(noise))
    rows = compare_sets(sets, known_prior(config.val_data_dir, torch.from_numpy(x_val)))
    for row in rows:
        engine = row[""].removeprefix("export, ")
        row["difference for given noise"] = differences.get(engine, 0.0)
    note = f"Largest z: of seven shares against the first row; chance stays below {CHANCE}."
    args.checkpoint = Path(args.checkpoint).name  # of the result file: where it lay is nobody's
    return [{"title": f"Drawn by {describe_sampling(config.sampling)}", "rows": rows, "note": note}]


OPTIONS: dict[str, Any] = {"checkpoint": "", "num": 10_000, "compiled": 1, "seed": 0}

if __name__ == "__main__":
    sys.exit(main("exported", __doc__ or "", measure, OPTIONS))
