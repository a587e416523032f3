"""Run all benchmarks, each in its own process, then write docs/BENCHMARKS.md: `make bench`.

python -m benchmarks [NAME ...]
"""

import subprocess
import sys
import time

from benchmarks import report
from benchmarks.measure import exit_code
from trainlib.errors import OneLineParser, UserError, say


def main() -> None:
    """Run those that the command line names, by default all."""
    parser = OneLineParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(report.ORDER))
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(report.ORDER))
    if unknown:
        raise UserError(f"NAME must be among {', '.join(report.ORDER)}, got {', '.join(unknown)}")
    for name in names or report.ORDER:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=report.ROOT, check=True)
        say(f"{name}: {time.perf_counter() - start:.0f} s\n")
    report.main()


if __name__ == "__main__":
    sys.exit(exit_code(main))
