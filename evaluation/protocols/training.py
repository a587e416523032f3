"""training: what metrics.jsonl beside the checkpoint tells of the run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from evaluation.bayes import GesturePrior
from evaluation.estimates import Estimate, FloatArray, Table
from evaluation.family import is_linear_gesture
from evaluation.figures import (
    BLUE,
    GREY,
    ORANGE,
    PLAN_GOALS,
    SKY,
    VERMILION,
    Curve,
    Panel,
    draw_panel,
    new_figure,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import bayes_mean, frame_mse, noisy
from train_diffusion_ddim import DENOISE_SIGMAS, VAL_SEQUENCES, DDIMScheduler
from trainlib.checkpoint import load_checkpoint
from trainlib.errors import say
from trainlib.run_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONVERGED = 1.1  # the validation loss stays below this multiple of its least value
METRICS = {  # key of metrics.jsonl: metric
    "train/epoch_loss": "train_loss",
    "val/loss": "val_loss",
    "val/mse": "mse",
    "val/mean_snr_db": "mean_snr_db",
}
DENOISE_PREFIX = "denoise_mse_sigma_"


def run(s: Subject, limits: bool = True) -> list[Section]:
    """Read the record of the run, if it is there; `limits` costs the Bayes answer to x_val."""
    rows = read_record(s.checkpoint.parent)
    sections = [Section("training", training_table(rows, load_checkpoint(s.checkpoint)))]
    table = convergence_table(rows)
    if not table:
        say(f"note: no metrics.jsonl beside {s.checkpoint}; no figure of the convergence")
        return sections
    every = max(1, len(s.x_val) // VAL_SEQUENCES)  # as the trainer chooses its subset
    x_0 = s.x_val[::every][:VAL_SEQUENCES]
    least = denoise_limits(s.scheduler, x_0, s.prior) if limits else {}
    caption = "Whether the training had come to its end."
    pictures = [Picture("convergence.png", caption, draw_convergence, table, least)]
    title = "Convergence: had training come to its end?"
    text = "The record of the run."
    return [*sections, Section("convergence", table, title, text, pictures=pictures)]


def read_record(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; none if it is missing or of another program."""
    try:
        return read_metrics(folder)
    except (OSError, ValueError):
        return []


def convergence_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Take what a run recorded of each epoch.

    Args:
        rows: of metrics.jsonl.

    Returns:
        Per setting "epoch_{e}", counted as in the file: train_loss, as it is minimised;
        val_loss, unweighted and unconditional; mse and mean_snr_db of keyframes;
        denoise_mse_sigma_*. What the run did not log is left out.
    """
    table: Table = {}
    for row in rows:
        if "val/epoch" not in row:
            continue
        denoise = {k: k.removeprefix("val/") for k in row if k.startswith(f"val/{DENOISE_PREFIX}")}
        table[f"epoch_{row['val/epoch']}"] = {
            name: Estimate(math.nan if row[key] is None else row[key], None, 1)
            for key, name in (METRICS | denoise).items()
            if key in row
        }
    return table


def training_table(rows: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]) -> Table:
    """Tell how the training went, up to a checkpoint.

    Args:
        rows: of metrics.jsonl.
        checkpoint: what was saved.

    Returns:
        Of "model", over epochs: finished, falls, loss_ratio_3_epochs, epochs_to_converge as the
        criteria have them; empty without a whole record.
    """
    rows = [row for row in rows if row.get("step", math.inf) <= checkpoint["step"]]
    loss = _series(rows, "train/epoch_loss")
    val_loss = _series(rows, "val/loss")
    if len(loss) != checkpoint["epoch"] + 1 or len(val_loss) != len(loss):
        return {}
    n = len(loss)
    finished = n == checkpoint["config"]["num_epochs"] and np.isfinite(loss).all()
    scores: dict[str, float] = {"finished": int(finished)}
    if n > 1:
        parts = [part.mean() for part in np.array_split(loss, min(5, n))]
        scores["falls"] = float((np.diff(parts) < 0).mean())
        above = np.flatnonzero(val_loss > CONVERGED * val_loss.min())
        scores["epochs_to_converge"] = int(above[-1]) + 2 if len(above) else 1
    if n > 2:
        scores["loss_ratio_3_epochs"] = float(loss[2] / loss[0])
    return {"model": {name: Estimate(value, None, n) for name, value in scores.items()}}


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> FloatArray:
    """One value per epoch; null reads as NaN."""
    return np.array([row[key] for row in rows if key in row and "val/epoch" in row], dtype=float)


def denoise_limits(
    scheduler: DDIMScheduler, x_0: Tensor, prior: GesturePrior | None
) -> dict[str, float]:
    """Score the Bayes denoiser on what the trainer's denoise_mse_sigma_* are measured on.

    Args:
        scheduler: of the run.
        x_0: the gestures that it validates each epoch, (B, L, C), data units.
        prior: the distribution of x_0, if it is known.

    Returns:
        Sigma, as in the name of the metric -> MSE; nothing if a gesture is not of the prior.
    """
    if prior is None or not is_linear_gesture(x_0).all():
        return {}
    limits = {}
    for level in DENOISE_SIGMAS:
        sigma = scheduler.sigma(scheduler.timestep_at(level))
        best = bayes_mean(noisy(x_0, sigma), sigma, prior)
        limits[str(level)] = float(frame_mse(best, x_0).mean(dim=1).numpy().mean())
    return limits


HISTORY_PANELS = (  # (panel, metric -> (label, colour)); denoise_mse_sigma_* form one more
    (
        Panel("loss", log=True),
        {
            "train_loss": ("train, as weighted", ORANGE),
            "val_loss": ("validation,\nunweighted", BLUE),
        },
    ),
    (
        Panel("keyframes: mean squared error", goals=PLAN_GOALS["mse"], log=True),
        {"mse": ("model", BLUE)},
    ),
    (
        Panel("keyframes: signal to noise, dB", goals=PLAN_GOALS["mean_snr_db"]),
        {"mean_snr_db": ("model", BLUE)},
    ),
)


def draw_convergence(table: Table, limits: Mapping[str, float] | None = None) -> "Figure":
    """Draw the record of a training run.

    Args:
        table: of `convergence_table`.
        limits: of `denoise_limits`, on the gestures that the run validated.
    """
    limits, epochs = limits or {}, [int(s.removeprefix("epoch_")) + 1 for s in table]
    metrics = sorted({metric for row in table.values() for metric in row})
    sigmas = [m.removeprefix(DENOISE_PREFIX) for m in metrics if m.startswith(DENOISE_PREFIX)]
    lines = [(limits[sigma], "limit (Bayes)") for sigma in sigmas if sigma in limits]
    shades = (SKY, BLUE, "#003A5C", GREY, ORANGE, VERMILION)
    denoise = {
        f"{DENOISE_PREFIX}{sigma}": (f"noise {sigma}", color)
        for sigma, color in zip(sigmas, shades, strict=False)
    }
    panel = Panel("denoise in one shot: mean squared error", limits=lines, log=True)
    figure = new_figure(13, 7.4)
    axes, missing = figure.subplots(2, 2, sharex=True), Estimate(np.nan, None, 0)
    for ax, (frame, named) in zip(axes.flat, (*HISTORY_PANELS, (panel, denoise)), strict=True):
        curves = [
            Curve(epochs, [row.get(m, missing) for row in table.values()], label, {"color": color})
            for m, (label, color) in named.items()
        ]
        draw_panel(ax, frame, curves)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    figure.suptitle(f"Had the training come to its end?  {_late_gains(table)}", fontsize=13)
    return figure


def _late_gains(table: Table) -> str:
    """Say what the last fifth of the epochs brought."""
    rows = list(table.values())
    if len(rows) < 5:
        return f"{len(rows)} epochs are too few to tell"
    parts = []
    for metric, name in {"val_loss": "validation loss", "mse": "keyframes error"}.items():
        first, last = (row.get(metric) for row in (rows[-1 - len(rows) // 5], rows[-1]))
        if first and last and first.value > 0:
            parts.append(f"{name} {last.value / first.value - 1:+.0%}")
    return f"In the last fifth of its {len(rows)} epochs: {', '.join(parts)}"
