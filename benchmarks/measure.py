"""What every benchmark shares: turns, spread, the record of the machine, the result file.

All that is compared runs in one process, in turn, round by round, so that a disturbance of the
machine falls on both sides; a ratio is formed within a round and its median and quartiles over
the rounds are reported.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import train_diffusion_ddim as tdd
from benchmarks.report import RESULTS, markdown
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, write_json
from trainlib.memory import memory_limit
from trainlib.process import pick_device, timer
from trainlib.provenance import ROOT, describe_machine, git_commit, version_of
from trainlib.run_log import read_metrics

PACKAGES = ("diffusers", "denoising-diffusion-pytorch", "azula", "onnxruntime")
MAY_BE_ZERO = ("variants", "compiled", "workers", "avx2", "seed")
DECIDED: dict[str, Any] = {"max_contacts": 1}  # of the default network, by its data
Row = dict[str, Any]


def in_turn(
    candidates: dict[str, Callable[[], Any]], rounds: int, calls: int = 1, warm_up: int = 2
) -> dict[str, list[float]]:
    """Call the candidates in turn; return the seconds per call of each, one number a round.

    Args:
        candidates: by name.
        rounds: how often all are measured.
        calls: calls per measurement, for candidates of less than a millisecond.
        warm_up: calls of each before the clock starts.
    """
    for function in candidates.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            taken = timer()
            for _ in range(calls):
                function()
            seconds[name].append(taken() / calls)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, quartiles and range of some numbers."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "quartile_1": quartiles[0],
        "quartile_3": quartiles[2],
        "min": min(values),
        "max": max(values),
    }


def compare(seconds: dict[str, list[float]], reference: str, *, faster: bool = False) -> list[Row]:
    """Return a row per candidate: ms with spread, and its ratio to the reference, formed by round.

    The ratio is candidate / reference; with `faster`, reference / candidate: how many times faster.
    """
    rows = []
    for name, values in seconds.items():
        pairs = zip(values, seconds[reference], strict=True)
        ratio = spread([b / a if faster else a / b for a, b in pairs])
        ms = spread([1000 * value for value in values])
        row = {"": name, "ms": ms["median"], "ms min": ms["min"], "ms max": ms["max"]}
        word = "times faster" if faster else "ratio"
        row |= {word: ratio["median"], "quartiles": [ratio["quartile_1"], ratio["quartile_3"]]}
        rows.append(row)
    return rows


def log_log_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of log y over log x by least squares."""
    fit = torch.tensor([xs, ys], dtype=torch.float64).log()
    fit = fit - fit.mean(dim=1, keepdim=True)
    return float((fit[0] * fit[1]).sum() / (fit[0] ** 2).sum())


def random_weights(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """Move the weights off their initial zeros, so that no product is skipped; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)
    return model.eval().requires_grad_(False)


def default_model(**knobs: Any) -> tuple[nn.Module, tdd.DDIMScheduler]:
    """Return the default denoiser with random weights, and its scheduler."""
    torch.manual_seed(0)
    config = tdd.TrainConfig(**DECIDED | knobs)
    return random_weights(tdd.build_model(config)), tdd.build_scheduler(config)


def run_child(*arguments: str, stdout: int | None = None, **environment: str) -> str:
    """Run Python with these arguments in the checkout; return its stdout if that is a PIPE.

    Raises:
        ChildProcessError: it failed; its own words are on stderr.
    """
    command, env = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=stdout, text=True)
    if done.returncode:
        reason = f"ended with exit code {done.returncode}"
        raise ChildProcessError(f"python {' '.join(arguments[:3])} {reason}")
    return done.stdout or ""


def run_trainer(folder: Path, flags: Sequence[str], launcher: Sequence[str] = ()) -> list[Row]:
    """Train on the CPU, a thread per process, into `folder`; return the lines of metrics.jsonl.

    Args:
        folder: the run folder.
        flags: of the trainer's command line.
        launcher: of the interpreter's, such as ("-m", "torch.distributed.run").
    """
    command = [*launcher, "train_diffusion_ddim.py", *flags, "--save_dir", str(folder)]
    command += ["--wandb_mode", "disabled", "--device", "cpu"]
    run_child(*command, stdout=2, OMP_NUM_THREADS="1", MPLBACKEND="agg")  # stdout has tables
    return read_metrics(folder)


def machine_name() -> str:
    """Name this machine for the result files: architecture, cores, and the GPU if there is one."""
    name = f"{platform.machine()}-{os.cpu_count()}cpu".lower()
    if torch.cuda.is_available():
        name += "-" + "-".join(torch.cuda.get_device_name().lower().split())
    return name


def stamp() -> Row:
    """Return when, from which commit and on which machine a result is made."""
    machine = describe_machine(pick_device("auto"))
    machine["memory_gb"] = round(memory_limit() / 2**30, 1)
    return {"date": date.today().isoformat(), "commit": git_commit(), "machine": machine}


def record(name: str, title: str, arguments: dict[str, Any], tables: list[Row]) -> Row:
    """Return what a result file holds.

    Args:
        name: of the benchmark.
        title: its headline.
        arguments: it ran with.
        tables: each {"title", "rows", "note"}; the rows of one table have the same keys.
    """
    packages = {package: version_of(package) for package in PACKAGES}
    return {
        "name": name,
        "title": title,
        **stamp(),
        "packages": {package: v for package, v in packages.items() if v},
        "arguments": arguments,
        "tables": tables,
    }


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a result file of rows holds by now."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def add_row(path: Path, row: Row) -> None:
    """Append a row to a result file; read again, since two processes may fill it at once."""
    write_json(path, [*read_rows(path), stamp() | row])


def parse_args(
    name: str, description: str, options: dict[str, Any], argv: list[str] | None
) -> argparse.Namespace:
    """Parse the command line of a benchmark; see `main`."""
    parser = OneLineParser(prog=f"python -m benchmarks.{name}", description=description)
    for option, default in ({"threads": 1, "output_dir": str(RESULTS)} | options).items():
        kind: Any = type(default[0]) if isinstance(default, list) else type(default)
        nargs = "+" if isinstance(default, list) else None
        help = f"default: {default}"
        parser.add_argument(f"--{option}", type=kind, nargs=nargs, default=default, help=help)
    args = parser.parse_args(argv)
    for option, given in vars(args).items():
        values = given if isinstance(given, list) else [given]
        least = 0 if option in MAY_BE_ZERO else 1e-9
        if any(isinstance(value, int | float) and not value >= least for value in values):
            words = "above" if least else "at least"
            raise UserError(f"--{option} must be {words} 0, got {given}")
    return args


def main(
    name: str,
    description: str,
    measure: Callable[[argparse.Namespace], list[Row]],
    options: dict[str, Any],
    argv: list[str] | None = None,
) -> int:
    """Run a benchmark from the command line: measure, write its JSON, print its tables.

    Args:
        name: of the benchmark and of its result file.
        description: the module's docstring; its first line is the title.
        measure: maps the options to tables, see `record`.
        options: name and default of each; `threads` and `output_dir` are added.
        argv: the command line, None = sys.argv.

    Returns: the exit code.
    """

    def program() -> None:
        args = parse_args(name, description, options, argv)
        folder = make_folder(args.output_dir)
        torch.set_num_threads(args.threads)
        load, seconds = os.getloadavg()[0], timer()
        tables = measure(args)
        taken = seconds()
        arguments = {k: v for k, v in vars(args).items() if k != "output_dir"}
        result = record(name, description.splitlines()[0], arguments, tables)
        result |= {"load_before": load, "seconds": round(taken, 1)}
        write_json(folder / f"{name}-{machine_name()}.json", result)
        say(markdown(result))

    return run_program(program)
