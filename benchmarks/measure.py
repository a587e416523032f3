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
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import train_diffusion_ddim as tdd
from benchmarks.report import ROOT, markdown
from trainlib.errors import OneLineParser, UserError, say
from trainlib.provenance import git_commit

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "azula", "onnxruntime")
MAY_BE_ZERO = ("variants", "compiled", "workers", "avx2")
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
            start = time.perf_counter()
            for _ in range(calls):
                function()
            seconds[name].append((time.perf_counter() - start) / calls)
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
    config = tdd.TrainConfig(**knobs)
    return random_weights(tdd.build_model(config)), tdd.build_scheduler(config)


def run_trainer(folder: Path, flags: Sequence[str], launcher: Sequence[str] = ()) -> list[Row]:
    """Train on the CPU, a thread per process, into `folder`; return the lines of metrics.jsonl.

    Args:
        folder: the run folder.
        flags: of the trainer's command line.
        launcher: of the interpreter's, such as ("-m", "torch.distributed.run").
    """
    command = [sys.executable, *launcher, "train_diffusion_ddim.py", *flags]
    command += ["--save_dir", str(folder), "--wandb_mode", "disabled", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=2)  # stdout has tables
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine_name() -> str:
    """Name this machine for the result files: architecture, cores, and the GPU if there is one."""
    name = f"{platform.machine()}-{os.cpu_count()}cpu".lower()
    if torch.cuda.is_available():
        name += "-" + "-".join(torch.cuda.get_device_name().lower().split())
    return name


def record(name: str, title: str, arguments: dict[str, Any], tables: list[Row]) -> Row:
    """Return what a result file holds.

    Args:
        name: of the benchmark.
        title: its headline.
        arguments: it ran with.
        tables: each {"title", "rows", "note"}; the rows of one table have the same keys.
    """
    return {
        "name": name,
        "title": title,
        "date": date.today().isoformat(),
        "commit": git_commit() or "unknown",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "arguments": arguments,
        "tables": tables,
    }


def exit_code(program: Callable[[], Any]) -> int:
    """Call a program; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    try:
        program()
    except UserError as e:
        say(f"error: {e}", err=True)
        return 2
    except (OSError, subprocess.CalledProcessError) as e:
        say(f"error: {e}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def make_folder(folder: Path) -> None:
    """Make the folder of the results; raise UserError if it cannot be written, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"cannot write into --output_dir {folder} ({e}); choose another") from e


def parse_args(
    name: str, description: str, options: dict[str, Any], argv: list[str] | None
) -> argparse.Namespace:
    """Parse the command line of a benchmark; see `main`."""
    parser = OneLineParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
        folder = Path(args.output_dir)
        make_folder(folder)
        torch.set_num_threads(args.threads)
        load, start = os.getloadavg()[0], time.perf_counter()
        tables = measure(args)
        arguments = {k: v for k, v in vars(args).items() if k != "output_dir"}
        result = record(name, description.splitlines()[0], arguments, tables)
        result |= {"load_before": load, "seconds": round(time.perf_counter() - start, 1)}
        path = folder / f"{name}-{machine_name()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        say(markdown(result))

    return exit_code(program)
