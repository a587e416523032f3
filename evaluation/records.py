"""What was measured elsewhere, read for the report: the sweep over model sizes, a run's record."""

import json
import math
from pathlib import Path

from evaluation.estimates import Estimate, Table
from trainlib.checkpoint import newest_checkpoint
from trainlib.errors import UserError, say

FRONTIER = Path(__file__).parents[1] / "benchmarks" / "results" / "frontier.json"


def read_frontier(path: Path) -> Table | None:
    """Read the sweep over model sizes; None without the file.

    The file is a JSON list; each model is an object

        name        what stands beside its point
        options     flags of the trainer
        parameters  their number
        keyframes   metric of the plan -> value
        r           sigma, as a string -> R of the denoise protocol
        one_press, valid    of unconditional samples, in [0, 1]
        latency_ms  of one sample at batch 1

    Returns:
        Per setting, a name: parameters, latency_ms, valid, one_press, the metrics of keyframes,
        r_{sigma}.

    Raises:
        UserError: the file is not of this form.
    """
    if not path.exists():
        return None
    table: Table = {}
    try:
        for model in json.loads(path.read_text("utf-8")):
            names = ("parameters", "latency_ms", "valid", "one_press")
            row = {name: model[name] for name in names} | model["keyframes"]
            row |= {f"r_{sigma}": value for sigma, value in model["r"].items()}
            table[model["name"]] = {k: Estimate(float(v), None, 1) for k, v in row.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{path} is no list of measured models ({reason}); measure again") from None
    return table


CONVERGENCE = {  # key of metrics.jsonl: metric
    "train/epoch_loss": "train_loss",
    "val/loss": "val_loss",
    "val/mse": "mse",
    "val/mean_snr_db": "mean_snr_db",
}


def read_convergence(checkpoint: str | Path) -> Table | None:
    """Read metrics.jsonl beside a checkpoint; None without it.

    Args:
        checkpoint: a checkpoint or a run folder.

    Returns:
        Per setting "epoch_{e}", counted as in the file: train_loss, as it is minimised;
        val_loss, unweighted and unconditional; mse and mean_snr_db of keyframes;
        denoise_mse_sigma_*. What the run did not log is left out.
    """
    path = newest_checkpoint(checkpoint).parent / "metrics.jsonl"
    if not path.exists():
        return None
    table: Table = {}
    for row in map(json.loads, path.read_text("utf-8").splitlines()):
        if "val/epoch" not in row:
            continue
        denoise = {k: k.removeprefix("val/") for k in row if k.startswith("val/denoise_mse_sigma_")}
        table[f"epoch_{row['val/epoch']}"] = {
            name: Estimate(math.nan if row[key] is None else row[key], None, 1)
            for key, name in (CONVERGENCE | denoise).items()
            if key in row
        }
    return table or None


def read_records(checkpoint: str | Path) -> dict[str, Table]:
    """Return the tables `frontier` and `convergence` if they exist; print a note if not."""
    tables: dict[str, Table] = {}
    for name, table, file in (
        ("frontier", read_frontier(FRONTIER), "benchmarks/results/frontier.json"),
        ("convergence", read_convergence(checkpoint), f"metrics.jsonl beside {checkpoint}"),
    ):
        if table:
            tables[name] = table
        else:
            say(f"note: no {file}; no figure of the {name}")
    return tables
