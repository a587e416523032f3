"""Change one choice of the default recipe at a time, train briefly, compare.

    python -m benchmarks.ablations [--num_epochs 12] [--only NAME ...]

Each variant is one run of the trainer's own command line, on one thread and one seed, scored on
the whole validation set; the rows go to benchmarks/results/ablations.json as they finish, and a
variant that is there already is not run again. Short runs rank choices, they do not show what the
full recipe reaches: that is docs/RESULTS.md.
"""

import argparse
import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.measure import RESULTS, exit_code, run_trainer
from benchmarks.report import table
from trainlib.errors import OneLineParser, say

ABLATIONS = RESULTS / "ablations.json"

VARIANTS = {
    "default": "",
    "no gates": "--no-gates",
    "no noise units": "--no-noise_units",
    "no gates, no noise units": "--no-gates --no-noise_units",
    "AdamW alone": "--optimizer adamw",
    "unweighted loss": "--no-balance_loss",
    "no rotary attention": "--no-rotary",
    "no augmentation": "--no-augment",
    "no token overlap": "--no-token_overlap",
    "known share 0.1": "--known_share 0.1",
    "known share 0.3": "--known_share 0.3",
}
COLUMNS = {
    "keyframes mse": "final/mse",
    "snr dB": "final/mean_snr_db",
    "spatial": "final/spatial_accuracy",
    "denoise .2": "final/denoise_mse_sigma_0.2",
    "denoise .4": "final/denoise_mse_sigma_0.4",
    "denoise .7": "final/denoise_mse_sigma_0.7",
    "one press": "generate/one_press",
    "clicks": "generate/share_click",
}


def run_variant(flags: str, num_epochs: int) -> dict[str, float]:
    """Train once and return the scores of the last line of its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        rows = run_trainer(Path(folder), [*flags.split(), "--num_epochs", str(num_epochs)])
    seconds = sum(row.get("train/epoch_s", 0.0) for row in rows)
    return {name: rows[-1][key] for name, key in COLUMNS.items()} | {"train s": seconds}


def read_results() -> dict[str, dict]:
    """Return the rows that are there; two processes may fill them at once."""
    return json.loads(ABLATIONS.read_text()) if ABLATIONS.exists() else {}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = OneLineParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--num_epochs", type=int, default=12, help="of each; default: 12")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="which")
    args = parser.parse_args()
    for name in args.only:
        if name in read_results():
            continue
        row = {
            "flags": VARIANTS[name],
            "num_epochs": args.num_epochs,
            "machine": f"{platform.machine()}, 1 thread, Python {platform.python_version()}",
            "date": date.today().isoformat(),
            "scores": run_variant(VARIANTS[name], args.num_epochs),
        }
        ABLATIONS.write_text(json.dumps(read_results() | {name: row}, indent=2) + "\n")
    say(table([{"variant": name} | row["scores"] for name, row in read_results().items()]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
