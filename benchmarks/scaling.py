"""Scaling: one process and two by torchrun, at the same global batch

    python -m benchmarks.scaling [--batch_sizes 32 256] [--epochs 1]

Each run is the trainer's own command line, one thread per process, gloo, on the first gestures of
the data set. The losses of all steps are compared; eight GPUs are computed, not measured.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

import train_diffusion_ddim as tdd
from benchmarks.measure import DECIDED, ROOT, Row, in_turn, main, run_child, run_trainer
from trainlib.errors import UserError
from trainlib.process import process_rank, timer

LINK_GB_S = 300.0  # one direction of NVLink 4 between two data-centre GPUs, from its data sheet


def launcher(processes: int) -> list[str]:
    """Return the interpreter's arguments that start so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return torchrun if processes > 1 else []


def all_reduce_s(processes: int, numel: int, rounds: int) -> float:
    """Return the median time that gloo takes to sum one float32 vector over local processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher(processes), "-m", "benchmarks.scaling", "--worker"]
        command += [str(numel), str(rounds), str(Path(folder) / "seconds")]
        run_child(*command, stdout=2, OMP_NUM_THREADS="1")
        return float((Path(folder) / "seconds").read_text())


def worker(numel: int, rounds: int, path: str) -> None:
    """Be one process of `all_reduce_s`; the first writes the median."""
    torch.distributed.init_process_group("gloo")
    vector = torch.ones(numel)
    seconds = in_turn({"": lambda: torch.distributed.all_reduce(vector)}, rounds)[""]
    if process_rank()[0] == 0:
        Path(path).write_text(str(sorted(seconds)[rounds // 2]))
    torch.distributed.destroy_process_group()


def paper_table(parameters: int, gloo_s: float, step_s: float) -> Row:
    """Return step times computed from a step's time on one device and the all-reduce's volume."""
    rows: list[Row] = []
    for devices in (1, 2, 4, 8):
        moved = 2 * (devices - 1) / devices * parameters * 4  # bytes through each link, ring
        row: Row = {"GPUs": devices, "MB over each link": moved / 1e6}
        rows.append(row | {"ms of all-reduce": moved / LINK_GB_S / 1e6})
    note = (
        f"Computed, not measured: a ring at {LINK_GB_S:.0f} GB/s, without its latency of some "
        f"10 us per call, which exceeds it. Gloo on this machine took {gloo_s * 1e3:.2f} ms for "
        f"the {parameters:,} gradients of a step, {step_s * 1e3:.1f} ms the step. On "
        "GPUs the step itself is bound by kernel launches until the batch is thousands."
    )
    return {"title": "Eight GPUs, on paper", "rows": rows, "note": note}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of runs and the one on paper."""
    if args.processes[0] != 1:
        raise UserError(f"--processes must begin with 1, got {args.processes}")
    x_train = tdd.DiffusionActionDataset(ROOT / args.data_dir).sequences[: args.num_sequences]
    rows: list[Row] = []
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        np.save(data / "batch_000000_actions.npy", x_train)
        for batch_size in args.batch_sizes:
            flags = ["--batch_size", str(batch_size), "--num_epochs", str(args.epochs)]
            flags += ["--data_dir", str(data), "--val_data_dir", "test_data_mini/val"]
            flags += ["--log_interval", "1"]
            losses: dict[int, list[float]] = {}
            for processes in args.processes:
                folder = Path(name) / f"run_{batch_size}_{processes}"
                taken = timer()
                lines = run_trainer(folder, flags, launcher(processes))
                wall_s = taken()
                losses[processes] = [r["train/loss"] for r in lines if "train/loss" in r]
                epoch_s = min(r["train/epoch_s"] for r in lines if "train/epoch_s" in r)
                seconds[processes] = epoch_s / (len(losses[processes]) / args.epochs)
                gaps = zip(losses[1], losses[processes], strict=True)
                row: Row = {"global batch": batch_size, "processes": processes}
                row |= {"ms per step": 1000 * seconds[processes], "wall s": wall_s}
                row |= {"times faster": seconds[1] / seconds[processes]}
                row |= {"largest difference of losses": max(abs(a - b) for a, b in gaps)}
                rows.append(row)
    parameters = sum(p.numel() for p in tdd.build_model(tdd.TrainConfig(**DECIDED)).parameters())
    most = max(args.processes)
    gloo_s = all_reduce_s(most, parameters, 50) if most > 1 else 0.0
    return [
        {"title": f"{args.epochs} epoch(s) of {len(x_train)} gestures", "rows": rows},
        paper_table(parameters, gloo_s, seconds[max(args.processes)]),
    ]


OPTIONS: dict[str, Any] = {
    "batch_sizes": [32, 256],
    "processes": [1, 2],
    "epochs": 1,
    "num_sequences": 2560,
}
OPTIONS |= {"data_dir": "diffusion_test_data/train"}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main("scaling", __doc__ or "", measure, OPTIONS))
