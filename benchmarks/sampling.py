"""Sampling overhead: `sample()` against bare forward passes and against three libraries

    python -m benchmarks.sampling [--rounds 60]

All go from noise to actions in the same number of DDIM steps with the same default network,
weights, shapes and threads, without known frames; the spacing is each library's own, ours and
diffusers' is "trailing", where both must agree. Progress bars are off, and all run in
torch.inference_mode, the fastest there is, though the libraries would by default in no_grad.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

import train_diffusion_ddim as tdd
from benchmarks.measure import Row, compare, default_model, in_turn, main
from benchmarks.peers import SAMPLERS
from trainlib.errors import UserError
from trainlib.gestures import ACTION_DIM

BARE = "bare forward passes"


def is_installed(name: str) -> bool:
    """Return whether a library of SAMPLERS can be imported."""
    return find_spec(name.replace("-", "_")) is not None


def candidates(batch: int, steps: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what to time at one batch size, and the largest difference to diffusers."""
    model, _ = default_model()
    config = tdd.TrainConfig(spacing="trailing")
    scheduler, shape = tdd.build_scheduler(config), (batch, config.seq_len, ACTION_DIM)
    x_T, t = torch.randn(shape), torch.full((batch,), config.num_timesteps // 2)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(steps):
            model(x_T, t)

    def ours() -> torch.Tensor:
        return scheduler.sample(model, shape, "cpu", steps, x_T=x_T)

    peers = {
        name: make(model, scheduler, shape, steps)
        for name, make in SAMPLERS.items()
        if is_installed(name)
    }
    difference = tdd.to_model_units(ours()) - peers["diffusers"](x_T)
    functions: dict[str, Callable[[], Any]] = {BARE: bare, "sample()": ours}
    functions |= {name: torch.inference_mode()(partial(f, x_T)) for name, f in peers.items()}
    return functions, float(difference.abs().max())


def measure(args: argparse.Namespace) -> list[Row]:
    """Return one table per batch size."""
    missing = [name for name in SAMPLERS if not is_installed(name)]
    if "diffusers" in missing:
        raise UserError("no diffusers to compare with; pip install -r requirements-bench.txt")
    tables = []
    for batch in args.batches:
        functions, difference = candidates(batch, args.steps)
        rows = compare(in_turn(functions, args.rounds), BARE)
        note = f"Largest difference between `sample()` and diffusers: {difference:.1e}."
        note += f" Not installed: {', '.join(missing)}." if missing else ""
        tables.append({"title": f"Batch {batch}, {args.steps} steps", "rows": rows, "note": note})
    return tables


OPTIONS = {"rounds": 60, "steps": 10, "batches": [1, 8]}

if __name__ == "__main__":
    sys.exit(main("sampling", __doc__ or "", measure, OPTIONS))
