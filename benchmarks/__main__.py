"""Run all benchmarks, each in its own process, then write them into docs/: `make bench`.

python -m benchmarks [NAME ...]
"""

import sys

from benchmarks import document, report
from benchmarks.measure import run_child
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.process import timer


def main() -> None:
    """Run those that the command line names, by default all."""
    parser = OneLineParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(report.ORDER))
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(report.ORDER))
    if unknown:
        raise UserError(f"NAME must be among {', '.join(report.ORDER)}, got {', '.join(unknown)}")
    for name in names or report.ORDER:
        seconds = timer()
        run_child("-m", f"benchmarks.{name}")
        say(f"{name}: {seconds():.0f} s\n")
    document.main()


if __name__ == "__main__":
    sys.exit(run_program(main))
