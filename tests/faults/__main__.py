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
    parser.add_argument("--only", default="", help="faults whose title holds this; no document")
    parser.add_argument("--quick", action="store_true", help="the part of make test; no document")
    parser.add_argument("--seed", type=int, default=0, help="of moments, bits and bytes")
    parser.add_argument("--output", default=ROOT / "docs" / "FAULTS.md", help="where to write")
    args = parser.parse_args()
    rows, notes, lost = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), args.seed)
        for fault in FAULTS:
            if args.only not in fault.title:
                continue
            tried, failures, seconds, skipped = attempt(
                fault, lab, fault.quick if args.quick else fault.long
            )
            survived = f"skipped: {skipped}" if skipped else f"{tried - len(failures)}"
            rows.append(f"| {fault.title} | {tried} | {survived} | {seconds:.0f} |")
            notes += [f"- {fault.title}: {reason}" for reason in sorted(set(failures))[:3]]
            lost += len(failures)
            print(rows[-1], *failures[:3], sep="\n    ", flush=True)
            if not (args.only or args.quick):
                write(Path(args.output), rows, notes, args.seed)
    return 1 if lost else 0


def write(path: Path, rows: list[str], notes: list[str], seed: int) -> None:
    """Write the document."""
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
