"""GPU: all that waits for one, in one command of at most eight minutes

    python -m benchmarks.gpu                            # on the machine with the GPU
    python -m benchmarks.gpu --device cpu --quick       # a rehearsal: every line, no measurement

Each stage of benchmarks/gpu_lines.py runs in a process of its own and is written to the result
file when it ends. The same command continues one that was cut, and repeats what failed. A stage
that takes too long is stopped; what is left for the last, --preset gpu, decides on its epochs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_lines import LINES
from benchmarks.gpu_stages import STAGES, Place
from benchmarks.measure import ROOT, Row, machine_name, record
from benchmarks.report import RESULTS, gpu_table
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, write_json
from trainlib.process import pick_device, timer
from trainlib.provenance import describe_machine

LEAST_S = 20.0  # no stage is begun with less


def new_result(device: Any, quick: bool) -> Row:
    """Return a result file without stages."""
    made = record("gpu", (__doc__ or "").splitlines()[0], {"quick": quick}, [])
    del made["tables"]
    made["machine"] |= describe_machine(device)
    return made | {"stages": {}, "seconds": 0.0}


def resumed(path: Path, fresh: Row) -> Row:
    """Return the result that a file holds if it is of this program, machine and size."""
    try:
        found: Row = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return fresh
    told = [(r["commit"], r["arguments"], r["machine"], r["packages"]) for r in (found, fresh)]
    return found if told[0] == told[1] else fresh


def run_stage(name: str, args: argparse.Namespace, limit_s: float) -> Any:
    """Run a stage in a process of its own; return its values by line, or in words why not."""
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "values.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name]
        command += ["--device", args.device, "--limit_s", str(limit_s), "--values", str(values)]
        command += ["--quick"] if args.quick else []
        environment = os.environ | {"MPLBACKEND": "agg"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
        finally:  # its own children, too; on Ctrl-C as well
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        if code:
            return f"ended with exit code {code}"
        return json.loads(values.read_text("utf-8"))


def measure_stage(name: str, place: Place) -> Row:
    """Measure a stage in this process; return the values by line."""
    function, _ = STAGES[name]
    return dict(zip(LINES[name], function(place), strict=True))


def measure(args: argparse.Namespace, path: Path) -> Row:
    """Run the stages that the result file lacks, until all are there or the time is up."""
    seconds = timer()
    result = resumed(path, new_result(pick_device(args.device), args.quick))
    before = result["seconds"]
    for name, (_, most) in STAGES.items():
        if isinstance(result["stages"].get(name), dict):
            say(f"{name}: measured before")
            continue
        left = args.limit_s - seconds()
        if left < LEAST_S:
            say(f"{name}: the time is up; the same command goes on from here")
            break
        say(f"{name}: at most {min(left, most):.0f} s")
        result["stages"][name] = run_stage(name, args, min(left, most))
        result["seconds"] = round(before + seconds(), 1)
        write_json(path, result)
        say(f"{name}: done at {seconds():.0f} s")
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--quick", action="store_true", help="rehearse: sizes that measure nothing")
    add("--limit_s", type=float, default=465.0, help="end within this; default: 465")
    add("--output_dir", default=str(RESULTS), help=f"default: {RESULTS}")
    add("--stage", choices=STAGES, help="measure this one alone, here; for the command itself")
    add("--values", metavar="FILE", help="where --stage writes its values")
    args = parser.parse_args(argv)
    if not args.limit_s > 0 or bool(args.stage) != bool(args.values):
        raise UserError("--limit_s must be above 0, and --stage and --values go together")
    return args


def run(argv: list[str] | None) -> None:
    """Do what the command line asks."""
    args = parse_args(argv)
    if args.stage:
        place = Place(pick_device(args.device), args.quick, args.limit_s)
        write_json(Path(args.values), measure_stage(args.stage, place))
        return
    name = f"gpu-{machine_name()}" + ("-rehearsal" if args.device == "cpu" else "")
    path = make_folder(args.output_dir) / f"{name}.json"
    result = measure(args, path)
    say(f"{gpu_table(result)}\n\n{path}")
    failed = [name for name, found in result["stages"].items() if not isinstance(found, dict)]
    if failed:
        raise ChildProcessError(f"{', '.join(failed)} failed; the same command tries again")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_program(lambda: run(argv), stopped="stopped; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
