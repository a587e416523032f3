"""Try every fault of the lab, and write docs/FAULTS.md: python -m tests.faults --help."""

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.faults import damage, death, surroundings  # noqa: F401  their faults enter the list
from tests.faults.lab import FAULTS, Fault, Lab, Skipped


def attempt(fault: Fault, lab: Lab, num: int) -> tuple[int, list[str], float, str]:
    """Return how often a fault was tried, why it was not survived, seconds, why it was skipped."""
    began, tried, failures, skipped = time.monotonic(), 0, [], ""
    try:
        for reason in fault.tries(lab, num):
            tried += 1
            failures += [reason] if reason else []
    except Skipped as e:
        skipped = str(e)
    except Exception as e:  # a fault that breaks the lab is not survived
        tried, failures = tried + 1, [*failures, f"{type(e).__name__}: {e}"]
    return tried, failures, time.monotonic() - began, skipped


def main() -> int:
    """Run the command line; return 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose title holds this")
    parser.add_argument("--quick", action="store_true", help="the part of make test; no document")
    parser.add_argument("--seed", type=int, default=0, help="of moments, bits and bytes")
    parser.add_argument("--output", default=ROOT / "docs" / "FAULTS.md", help="where to write")
    args = parser.parse_args()
    path, lost = Path(args.output), 0
    lines = path.read_text("utf-8").splitlines() if args.only and path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), args.seed)
        for fault in FAULTS:
            if args.only not in fault.title:
                continue
            tried, failures, seconds, skipped = attempt(
                fault, lab, fault.quick if args.quick else fault.long
            )
            survived = f"skipped: {skipped}" if skipped else f"{tried - len(failures)}"
            row = f"| {fault.title} | {tried} | {survived} | {seconds:.0f} |"
            notes = [f"- {fault.title}: {reason}" for reason in sorted(set(failures))[:3]]
            print(row, *failures[:3], sep="\n    ", flush=True)
            lost += len(failures)
            # a fault that is tried again replaces its row
            lines = [line for line in lines if fault.title not in line] + [row, *notes]
            if not args.quick:
                write(path, lines, args.seed)
    return 1 if lost else 0


def write(path: Path, lines: list[str], seed: int) -> None:
    """Write the document; `lines` are the rows of its table and notes on what falls short."""
    rows = [line for f in FAULTS for line in lines if line.startswith(f"| {f.title} |")]
    notes = [line for f in FAULTS for line in lines if line.startswith(f"- {f.title}:")]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    table = "\n".join(rows)
    short = "\n".join(["", "What falls short:", "", *notes, ""]) if notes else ""
    path.write_text(
        f"""# Faults, tried and survived

Each fault is real and comes from outside: signals, system calls that strace makes fail, disks of a
few kilobytes, damaged bytes, dead processes. The product holds no code for it. Survived means: the
exit code and the single error line that are promised, no file harmed, and a resumed run that ends
as the undisturbed one, every weight and every logged number to the bit.

Made by `make faults`: {machine}, {versions}, seed {seed}, {date.today()}.

| fault | tried | survived | seconds |
|---|---|---|---|
{table}
{short}""",
        "utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
