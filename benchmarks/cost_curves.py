"""Cost curves: what a step and a sample cost by size, beside the slope of theory

    python -m benchmarks.cost_curves [--rounds 3] [--threads 2]

One size of the default recipe varies at a time. Memory is what autograd keeps for the backward
pass, counted storage by storage, so it does not depend on the machine. The slope is that of
log cost over log size, of the larger half of the sizes.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import train_diffusion_ddim as tdd
from benchmarks.measure import Row, default_model, in_turn, log_log_slope, main
from benchmarks.training import our_state, our_step
from trainlib.gestures import SEQ_LEN

THEORY = {
    "seq_len": "1 (linear layers) to 2 (attention)",
    "d_model": "1 (attention, elementwise) to 2 (linear layers)",
    "batch_size": "1",
    "data set": "0: a batch is an index",
    "steps": "1",
    "batch": "below 1 while the cores are not full, then 1",
}


def kept_bytes(function: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


def gestures(num: int, seq_len: int) -> Tensor:
    """Return pressed gestures, (num, seq_len, 3), data units, made at once."""
    x = torch.zeros(num, seq_len, 3)
    x[:, seq_len // 4 : seq_len // 2] = torch.rand(num, 1, 3)
    x[:, seq_len // 4 : seq_len // 2, 2] = 1
    return x


def median_ms(function: Callable[[], Any], rounds: int) -> float:
    """Return the median time of a call."""
    return 1000 * sorted(in_turn({"": function}, rounds, warm_up=1)[""])[rounds // 2]


def training_curve(knob: str, sizes: list[int], rounds: int) -> list[Row]:
    """Return time and memory of a step by one knob of the recipe, or by the data set's size."""
    rows: list[Row] = []
    for size in sizes:
        knobs: dict[str, Any] = {} if knob == "data set" else {knob: size}
        config = tdd.TrainConfig(**knobs)
        x_train = gestures(size if knob == "data set" else config.batch_size, config.seq_len)
        state = our_state(x_train, **knobs)
        step = our_step(state, x_train)
        memory = kept_bytes(step)
        rows.append({knob: size, "ms": median_ms(step, rounds), "MB kept": memory / 1e6})
    return rows


def sampling_curve(knob: str, sizes: list[int], rounds: int) -> list[Row]:
    """Return the time of `sample()` by steps at batch 1, or by batch at ten steps."""
    model, scheduler = default_model()
    rows: list[Row] = []
    for size in sizes:
        steps, batch = (size, 1) if knob == "steps" else (10, size)
        shape = (batch, SEQ_LEN, 3)
        ms = median_ms(partial(scheduler.sample, model, shape, "cpu", steps), rounds)
        rows.append({knob: size, "ms": ms, "ms per gesture": ms / batch})
    return rows


def with_slope(knob: str, title: str, rows: list[Row]) -> Row:
    """Return a table with the measured slopes and the theory's below it."""
    half = rows[len(rows) // 2 - 1 :] if len(rows) > 2 else rows
    sizes = [row[knob] for row in half]
    found = f"time {log_log_slope(sizes, [row['ms'] for row in half]):.2f}"
    if "MB kept" in rows[0]:
        found += f", memory {log_log_slope(sizes, [row['MB kept'] for row in half]):.2f}"
    return {"title": title, "rows": rows, "note": f"Slope: {found}; theory: {THEORY[knob]}."}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return a table per curve."""
    training = {
        "seq_len": args.seq_lens,
        "d_model": args.widths,
        "batch_size": args.batch_sizes,
        "data set": args.set_sizes,
    }
    tables = [
        with_slope(knob, f"Step by {knob}", training_curve(knob, sizes, args.rounds))
        for knob, sizes in training.items()
    ]
    sampling = {"steps": args.step_counts, "batch": args.batches}
    return tables + [
        with_slope(knob, f"Sampling by {knob}", sampling_curve(knob, sizes, args.rounds))
        for knob, sizes in sampling.items()
    ]


OPTIONS = {
    "rounds": 5,
    "threads": 2,
    "seq_lens": [125, 250, 500, 1000, 2000],
    "widths": [32, 64, 128, 256],
    "batch_sizes": [8, 16, 32, 64, 128, 256],
    "set_sizes": [1000, 10000, 100000],
    "step_counts": [1, 2, 5, 10, 20, 50],
    "batches": [1, 2, 4, 8, 16, 64, 256],
}

if __name__ == "__main__":
    sys.exit(main("cost_curves", __doc__ or "", measure, OPTIONS))
