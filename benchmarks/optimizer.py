"""Optimizer: what Muon costs of a training step, with and without the processor's bfloat16

    python -m benchmarks.optimizer [--rounds 20]

The default recipe's step with this project's Muon, with torch's and with AdamW alone, in turn;
then the same in a process whose libraries are held to AVX2, as on a processor without AVX-512.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import train_diffusion_ddim as tdd
from benchmarks.measure import ROOT, Row, compare, in_turn, main, run_child
from benchmarks.training import our_state, our_step
from trainlib.state import WEIGHT_DECAY, TrainState

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def with_torch_muon(state: TrainState) -> TrainState:
    """Put torch's Muon in the place of ours; return the state."""
    adamw, muon = state.optimizers
    config, matrices = state.config, muon.param_groups[0]["params"]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": WEIGHT_DECAY}
    theirs = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
    state.optimizers = [adamw, theirs]
    return state


def held_to_avx2(args: argparse.Namespace) -> Row:
    """Return the table of this benchmark from a process with narrower libraries."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "benchmarks.optimizer", "--avx2", "0"]
        for name in ("rounds", "threads", "data_dir"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--output_dir", folder]
        run_child(*command, stdout=2, **AVX2)
        (path,) = Path(folder).glob("*.json")
        table: Row = json.loads(path.read_text())["tables"][0]
    settings = " ".join(f"{name}={value}" for name, value in AVX2.items())
    return table | {"title": f"The same, libraries held to AVX2 ({settings})"}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the tables of steps, on this processor and on a lesser one."""
    dataset = tdd.DiffusionActionDataset(ROOT / args.data_dir / "train")
    x_train = torch.from_numpy(dataset.sequences)
    states = {
        "Muon of torch": with_torch_muon(our_state(x_train)),
        "Muon, float32 and batched": our_state(x_train),
        "AdamW alone": our_state(x_train, optimizer="adamw"),
    }
    steps = {name: our_step(state, x_train) for name, state in states.items()}
    rows = compare(in_turn(steps, args.rounds), "Muon of torch", faster=True)
    title = f"The default recipe's step, {args.threads} thread(s)"
    tables = [{"title": title, "rows": rows}]
    if args.avx2 and platform.machine() == "x86_64":
        tables.append(held_to_avx2(args))
    return tables


OPTIONS = {"rounds": 20, "threads": 2, "avx2": 1, "data_dir": "diffusion_test_data"}

if __name__ == "__main__":
    sys.exit(main("optimizer", __doc__ or "", measure, OPTIONS))
