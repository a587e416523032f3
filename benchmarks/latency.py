"""Latency: one gesture, from noise and its known frames to actions

    python -m benchmarks.latency [--rounds 40]

The planner's number: batch 1, one thread, the default network with random weights. Beside
`sample()` stand the same with the denoiser compiled, and what `python -m export` writes.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_diffusion_ddim as tdd
from benchmarks.measure import Row, compare, default_model, in_turn, main
from export import runtime
from export.__main__ import example_inputs, export
from trainlib.gestures import ACTION_DIM, SEQ_LEN

OURS = "sample()"
PARTS = {  # modules by the pattern of their whole name
    "the denoiser, all": "",
    "transformer blocks": r"blocks\.\d+",
    "head of contacts": "output_projection",
    "... its chain": r"output_projection\.chain",
    "... its curves": r"output_projection\.curves",
}


def steps_table(model: Any, scheduler: tdd.DDIMScheduler, args: argparse.Namespace) -> Row:
    """Return the time of `sample()` by number of steps, and of 2M at the same number."""
    rows, shape = [], (1, SEQ_LEN, ACTION_DIM)
    for steps in args.step_counts:
        functions: dict[str, Callable[[], Any]] = {
            name: partial(scheduler.sample, model, shape, "cpu", steps, sampler=name)
            for name in tdd.SAMPLERS
        }
        seconds = in_turn(functions, args.rounds)
        row: Row = {"steps": steps}
        row |= {f"{r['']} ms": r["ms"] for r in compare(seconds, tdd.SAMPLERS[0])}
        rows.append(row)
    return {"title": "`sample()` by number of steps, nothing known", "rows": rows}


class Operations(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def spent(model: Any, read: Callable[[], float]) -> dict[str, float]:
    """Run one step of one gesture; return by how much what is read grew in each of PARTS."""
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    hooks = []
    for name, part in PARTS.items():
        for module in [m for k, m in model.named_modules() if re.fullmatch(part, k)]:

            def before(*_: Any, name: str = name) -> None:
                found[name] -= read()

            def after(*_: Any, name: str = name) -> None:
                found[name] += read()

            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    x_t, t = torch.zeros(1, SEQ_LEN, ACTION_DIM), torch.full((1,), 500)
    with torch.inference_mode():
        model(x_t, t)
    for hook in hooks:
        hook.remove()
    return found


def parts_table(model: Any, rounds: int) -> Row:
    """Return where the time of one step goes, and how many operations that are."""
    with Operations() as operations:
        counts = spent(model, lambda: operations.count)
    rounds_of = [spent(model, time.perf_counter) for _ in range(rounds)]
    rows = [
        {"part": name, "operations": int(counts[name])}
        | {"ms": 1000 * float(np.median([seconds[name] for seconds in rounds_of]))}
        for name in PARTS
    ]
    note = "Of one gesture, nothing known. At this size an operation costs what its call costs."
    return {"title": "One step by part", "rows": rows, "note": note}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the tables of engines, of steps and of parts."""
    model, scheduler = default_model(num_layers=args.num_layers)
    sampling = tdd.TrainConfig().sampling | {"num_inference_steps": args.steps}
    _, known, known_mask = example_inputs(model, 1)

    def eager(model: Any) -> Callable[[], Any]:
        options = sampling | {"known": known, "known_mask": known_mask}
        return partial(scheduler.sample, model, tuple(known.shape), "cpu", **options)

    functions: dict[str, Callable[[], Any]] = {OURS: eager(model)}
    has_compiler = bool(args.compiled and shutil.which("g++"))
    if has_compiler:
        functions["sample() of torch.compile(model)"] = eager(torch.compile(model, dynamic=False))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        options: dict[str, Any] = {"compiled": has_compiler, "batch_size": 1}
        differences = export(model, scheduler, folder, **sampling, **options)
        for engine in differences:
            sampler = runtime.Sampler(folder, engine, args.threads)
            noise = sampler.draw(1, np.random.default_rng(0))
            functions[f"export, {engine}"] = partial(sampler, noise, known, known_mask)
        rows = compare(in_turn(functions, args.rounds), OURS)
    for row in rows:
        engine = row[""].removeprefix("export, ")
        row["largest difference"] = differences.get(engine, 0.0)
    note = "`export, compiled` is sampler.pt2: all steps as one program (AOTInductor, frozen)."
    title = f"Batch 1, {args.steps} steps, known frames, {args.threads} thread(s)"
    table = {"title": title, "rows": rows, "note": note}
    return [table, steps_table(model, scheduler, args), parts_table(model, args.rounds)]


OPTIONS: dict[str, Any] = {
    "rounds": 40,
    "steps": 10,
    "step_counts": [1, 2, 3, 5, 10, 20, 50],
    "compiled": 1,
}
OPTIONS["num_layers"] = tdd.TrainConfig().num_layers

if __name__ == "__main__":
    sys.exit(main("latency", __doc__ or "", measure, OPTIONS))
