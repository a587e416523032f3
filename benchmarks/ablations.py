"""Change one choice of the default recipe at a time, train, compare.

    python -m benchmarks.ablations [--full] [--seed 0] [--only NAME ...]
    python -m benchmarks.ablations --run runs/RUN --name "no rotary attention"   # trained elsewhere

Each variant is one run of the trainer's own command line, on one thread, scored on the whole
validation set, and what it draws by the judge of benchmarks/trainings.py: 12 epochs, or with --full
all of the recipe's. The rows go to benchmarks/results/ablations.json as they finish, and a variant
that is there already is not run again. Short runs rank choices, only full ones show what a choice
brings in the end; of a difference between two rows compare what another seed changes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Row, add_row, read_rows, run_trainer
from benchmarks.report import RESULTS, table
from benchmarks.trainings import score
from train_diffusion_ddim import TrainConfig
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.run_log import read_metrics

ABLATIONS = RESULTS / "ablations.json"
SHORT, FULL = 12, TrainConfig().num_epochs
DRAWN = argparse.Namespace(num=4000, judged=1000, seed=0)  # gestures, of them by a classifier

VARIANTS = {
    "default": "",
    "no contacts": "--no-contacts",
    "no rotary attention": "--no-rotary",
    "no adaLN-zero": "--no-adaln",
    "neither of the two": "--no-rotary --no-adaln",
    "patches of 5 frames": "--patch_size 5",
    "predicts v": "--prediction_type v --no-contacts",
    "linear schedule": "--beta_schedule linear",
    "unweighted loss": "--no-balance_loss",
    "known share 0.1": "--known_share 0.1",
    "known share 0.3": "--known_share 0.3",
    "no augmentation": "--no-augment",
    "AdamW alone": "--optimizer adamw",
    "sampled by DDIM, eta 0": "--sampler ddim --eta 0",
    "sampled at trailing steps": "--spacing trailing",
}
COLUMNS = {
    "keyframes mse": "final/mse",
    "snr dB": "final/mean_snr_db",
    "spatial": "final/spatial_accuracy",
    "denoise .2": "final/denoise_mse_sigma_0.2",
    "denoise .4": "final/denoise_mse_sigma_0.4",
    "denoise .7": "final/denoise_mse_sigma_0.7",
    "shake": "generate/shake",
}
JUDGED = ("valid", "click", "AUC", "still clicks", "R at 0.1", "R at 0.2", "R at 0.4", "R at 0.7")


def read_run(name: str, folder: Path) -> Row:
    """Return the row of a finished run: of the last line of its metrics.jsonl, and the judge's."""
    config, rows = json.loads((folder / "config.json").read_text("utf-8")), read_metrics(folder)
    if not rows or "final/mse" not in rows[-1]:
        raise UserError(f"{folder} holds no finished run")
    scores = {column: rows[-1][key] for column, key in COLUMNS.items()}
    judged = score(str(folder), DRAWN)[1]
    scores |= {column: judged[column] for column in JUDGED}
    scores["train s"] = sum(row.get("train/epoch_s", 0.0) for row in rows)
    row = {key: config[key] for key in ("num_epochs", "seed")}
    return {"name": name, "commit": config["made_by"]["commit"], **row, "scores": scores}


def train_variant(name: str, num_epochs: int, seed: int) -> Row:
    """Train a variant and return its row."""
    flags = f"{VARIANTS[name]} --num_epochs {num_epochs} --seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        run_trainer(Path(folder), flags.split())
        return read_run(name, Path(folder))


def is_there(name: str, num_epochs: int, seed: int) -> bool:
    """Return whether a variant's row is there."""
    wanted = {"name": name, "num_epochs": num_epochs, "seed": seed}
    return any(wanted.items() <= row.items() for row in read_rows(ABLATIONS))


def shown(num_epochs: int) -> str:
    """Return the rows of so many epochs as a table of the scores that all of them have."""
    rows = [row for row in read_rows(ABLATIONS) if row["num_epochs"] == num_epochs]
    columns = [name for name in rows[0]["scores"] if all(name in row["scores"] for row in rows)]
    named = [{"variant": row["name"], "seed": row["seed"]} | row["scores"] for row in rows]
    return table([{name: row[name] for name in ("variant", "seed", *columns)} for row in named])


def main() -> None:
    """Run what is missing, then print the table."""
    parser = OneLineParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL} epochs instead of {SHORT}")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="which")
    parser.add_argument("--run", type=Path, help="add the row of this run folder, train nothing")
    parser.add_argument("--name", help="of its row")
    args = parser.parse_args()
    num_epochs = FULL if args.full else SHORT
    if args.run:
        if not args.name:
            raise UserError("--run FOLDER needs --name")
        add_row(ABLATIONS, read_run(args.name, args.run))
    for name in [] if args.run else args.only:
        if not is_there(name, num_epochs, args.seed):
            add_row(ABLATIONS, train_variant(name, num_epochs, args.seed))
    lengths = sorted({row["num_epochs"] for row in read_rows(ABLATIONS)})
    say("\n\n".join(f"{length} epochs\n\n{shown(length)}" for length in lengths))


if __name__ == "__main__":
    sys.exit(run_program(main))
