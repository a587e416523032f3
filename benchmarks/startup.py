"""Start-up: help, refusals and the first training step

    python -m benchmarks.startup [--rounds 5]

Each is a fresh process, in turn with a process that only imports torch. The first step is timed
until its line is in metrics.jsonl, on the ten gestures of test_data_mini.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row, in_turn, main, spread

SCRIPT = [sys.executable, "train_diffusion_ddim.py"]
MINI = ["--data_dir", "test_data_mini/train", "--val_data_dir", "test_data_mini/val"]
MINI += ["--batch_size", "2", "--num_epochs", "1", "--log_interval", "1", "--device", "cpu"]
MINI += ["--wandb_mode", "disabled"]


def finish(command: list[str]) -> Callable[[], Any]:
    """Return a function that runs a command to its end, whatever it returns."""
    return partial(subprocess.run, command, cwd=ROOT, capture_output=True)


def first_step() -> None:
    """Start a run on the mini set and stop it when its first step is recorded."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*SCRIPT, *MINI, "--save_dir", folder]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics = Path(folder) / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        process.kill()
        process.wait()


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table of start-up times."""
    base = "import torch"
    candidates = {
        base: finish([sys.executable, "-c", "import torch"]),
        "--help": finish([*SCRIPT, "--help"]),
        "a bad value": finish([*SCRIPT, "--lr", "-1"]),
        "an unknown flag": finish([*SCRIPT, "--learning_rate", "1"]),
        "no data": finish([*SCRIPT, "--data_dir", "nowhere"]),
        "first step, mini set": first_step,
    }
    seconds = in_turn(candidates, args.rounds, warm_up=min(args.rounds - 1, 1))
    rows = []
    for name, values in seconds.items():
        over = spread([a - b for a, b in zip(values, seconds[base], strict=True)])
        s = spread(values)
        row = {"": name, "s": s["median"], "s min": s["min"], "s max": s["max"]}
        rows.append(row | {"s over import torch": over["median"]})
    return [{"title": "Seconds from the start of the process", "rows": rows}]


OPTIONS = {"rounds": 5}

if __name__ == "__main__":
    sys.exit(main("startup", __doc__ or "", measure, OPTIONS))
