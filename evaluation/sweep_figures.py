"""Curves over noise, steps, model size and epochs: four of the figures of evaluation/analyses.py.

A `draw_*` function takes a `Table` and returns a Figure, as in analysis_figures.py.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from evaluation.estimates import Estimate, Table, shifted
from evaluation.figures import (
    BLUE,
    FRAME_MS,
    GREY,
    METHODS,
    NOISE_LABEL,
    ORANGE,
    SKY,
    VERMILION,
    Curve,
    Panel,
    draw_panel,
    scale_by,
)
from evaluation.protocols import PLAN_LINES, lines_met

PLAN_GOALS = {metric: [(line, "plan's line")] for metric, (_, line) in PLAN_LINES.items()}


def meets_all(scores: Mapping[str, Estimate]) -> bool:
    """Tell whether all of the plan's lines are met."""
    return len(lines_met(scores)) == len(PLAN_LINES)


def columns_of(table: Table) -> dict[str, list[Estimate]]:
    """Turn setting -> metric -> estimate into metric -> estimates."""
    return {
        metric: [row[metric] for row in table.values()] for metric in next(iter(table.values()))
    }


def by_steps(table: Table, prefix: str, metric: str) -> dict[int, Estimate]:
    """Pick a metric of the settings "{prefix}{steps}", where there is a value."""
    return {
        int(setting.removeprefix(prefix)): row[metric]
        for setting, row in table.items()
        if setting.startswith(prefix) and metric in row and row[metric].n
    }


# ----------------------------------------------------------------------------------------
# 3. NOISE AND STEPS
# ----------------------------------------------------------------------------------------


def draw_excess_loss(table: Table) -> Figure:
    """Draw the loss and the least possible one by noise level, and their ratio.

    Args:
        table: of `excess_loss`.
    """
    columns = columns_of(table)
    sigmas = [e.value for e in columns["sigma"]]
    ratio = [shifted(e, by=-1) for e in columns["excess_ratio"]]
    model, bayes = METHODS["model"][1], METHODS["bayes"][1]
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    unit = "training loss, in the unit of what the model predicts"
    draw_panel(
        left,
        Panel("", unit, log=True),
        [
            Curve(sigmas, columns["loss"], "", model),
            Curve(sigmas, columns["irreducible_loss"], "", bayes),
        ],
    )
    for metric, label, color, shift in (
        ("loss", "model", BLUE, (-8, 8)),
        ("irreducible_loss", "least possible (Bayes)", "black", (8, -10)),
    ):  # where the curves are apart
        place, side = (sigmas[1], columns[metric][1].value), "right" if shift[0] < 0 else "left"
        left.annotate(label, place, shift, textcoords="offset points", color=color, ha=side)
    frame = Panel("", "loss / least possible loss", [(1.1, "goal: 1.1")], [(1, "limit")], log=True)
    draw_panel(right, frame, [Curve(sigmas, ratio, "model", model)])
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xlabel(NOISE_LABEL)
    good = sum(e.value <= 1.1 for e in ratio)
    figure.suptitle(
        f"How much is left to learn?  The loss is within 10 % of the least possible one at {good} "
        f"of {len(ratio)} noise levels  (n = {ratio[0].n} each)",
        fontsize=13,
    )
    return figure


def draw_few_step_bias(sweep: Table, exact: Table, mean_duration: float) -> Figure:
    """Draw the mean duration of generated gestures against the number of steps.

    Args:
        sweep: of `sampler_sweep`.
        exact: of `exact_few_steps`; may be empty.
        mean_duration: of the law, frames.
    """
    truth, bias = FRAME_MS * mean_duration, ""
    curves = []
    for method in ("ddim_eta_1", "dpmpp", "dpmpp_eta_1", "ddim", "exact"):
        found = by_steps(exact if method == "exact" else sweep, f"{method}/", "mean_duration")
        found = {steps: shifted(e, scale=1 / FRAME_MS) for steps, e in found.items() if steps > 1}
        if found:
            label, style = METHODS[method]
            label += f", n = {min(e.n for e in found.values())}-{max(e.n for e in found.values())}"
            curves.append(Curve(list(found), list(found.values()), label, style))
        if 5 in found:
            who = "even the exact score" if method == "exact" else "the model"
            bias = f": with 5, {who} is off by {found[5].value / truth - 1:+.0%}"
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    ax = figure.subplots()
    ax.axhspan(0.95 * truth, 1.05 * truth, color="0.94", lw=0)
    ylabel = "mean duration of the generated gestures, ms"
    draw_panel(ax, Panel("", ylabel, [(truth, "truth, ±5 %")], ylim=(0, None)), curves)
    scale_by(ax, sorted({s for curve in curves for s in curve.x}), "denoising steps")
    figure.suptitle(f"Few steps change how long gestures last{bias}", fontsize=13)
    return figure


# ----------------------------------------------------------------------------------------
# 6. STEPS, SAMPLER, ETA
# ----------------------------------------------------------------------------------------

SHARE = (0.0, 1.05)
SWEEP_PANELS = {
    "mse": Panel("recreated: mean squared error", goals=PLAN_GOALS["mse"], log=True),
    "temporal_iou": Panel(
        "recreated: overlap of the presses", goals=PLAN_GOALS["temporal_iou"], ylim=SHARE
    ),
    "gesture_type_accuracy": Panel(
        "recreated: share that keeps its type",
        goals=PLAN_GOALS["gesture_type_accuracy"],
        ylim=SHARE,
    ),
    "valid": Panel("invented: share of valid gestures", goals=[(0.98, "goal")], ylim=SHARE),
    "duration_bias": Panel("invented: error of the mean duration", goals=[(0.0, "truth")]),
    "latency_ms": Panel("time for one sample, ms (median, quartiles)", log=True),
}


def draw_sampler_sweep(table: Table) -> Figure:
    """Draw quality and latency against the number of steps, a curve per sampler.

    Args:
        table: of `sampler_sweep`.
    """
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    for ax, (metric, panel) in zip(figure.subplots(2, 3).flat, SWEEP_PANELS.items(), strict=True):
        curves = []
        for method in ("ddim_eta_1", "dpmpp", "dpmpp_eta_1", "ddim"):
            found, (label, style) = by_steps(table, f"{method}/", metric), METHODS[method]
            if found:
                label = label.removeprefix("model, ")
                curves.append(Curve(list(found), list(found.values()), label, style))
        draw_panel(ax, panel, curves)
        scale_by(ax, sorted({s for curve in curves for s in curve.x}), "denoising steps")
    enough = [s for s in by_steps(table, "ddim/", "mse") if meets_all(table[f"ddim/{s}"])]
    answer = "DDIM with none of these recreates"
    if enough:
        ms = table[f"ddim/{enough[0]}"]["latency_ms"].value
        answer = f"DDIM with {enough[0]} step{'s'[: enough[0] - 1]}, in {ms:.2g} ms, recreates"
    n = max(row["mse"].n for row in table.values())
    title = (
        f"How many steps, and which sampler?  {answer} within the plan's optimal line  (n = {n})"
    )
    figure.suptitle(title, fontsize=13)
    return figure


# ----------------------------------------------------------------------------------------
# 4. AND 5. SIZE AND TRAINING
# ----------------------------------------------------------------------------------------

FRONTIER_PANELS = {
    "mse": Panel("keyframes: mean squared error", goals=PLAN_GOALS["mse"], log=True),
    "r_0.4": Panel("denoise at 0.4: error / least possible", limits=[(1, "limit")], log=True),
    "valid": Panel("generate: share of valid gestures", goals=[(0.98, "goal")], ylim=SHARE),
    "latency_ms": Panel("time for one sample, ms", log=True),
}


def draw_frontier(table: Table) -> Figure:
    """Draw quality and latency against the number of parameters, a point per model.

    Args:
        table: of `read_frontier`.
    """
    panels = {k: p for k, p in FRONTIER_PANELS.items() if all(k in row for row in table.values())}
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    columns = columns_of(table)
    parameters = [e.value for e in columns["parameters"]]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (metric, panel) in zip(axes, panels.items(), strict=True):
        ax.set_xscale("log")
        ax.margins(x=0.25)
        style = {"color": BLUE, "marker": "o", "ms": 7, "ls": ""}
        draw_panel(ax, panel, [Curve(parameters, columns[metric], "", style)])
        places = sorted(zip(parameters, (e.value for e in columns[metric]), table, strict=True))
        for i, (x, y, name) in enumerate(places):  # neighbours: one above, one below
            shift = (6, 5 if i % 2 else -11)
            ax.annotate(name, (x, y), shift, textcoords="offset points", fontsize=8)
        ax.set_xlabel("parameters")
    enough = [row["parameters"].value for row in table.values() if meets_all(row)]
    answer = f"{min(enough):,.0f} parameters reach" if enough else "none of these reaches"
    figure.suptitle(f"How large must the model be?  {answer} the plan's optimal line", fontsize=13)
    return figure


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
DENOISE_PREFIX = "denoise_mse_sigma_"


def draw_convergence(table: Table, limits: Mapping[str, float] | None = None) -> Figure:
    """Draw the record of a training run.

    Args:
        table: of `read_convergence`.
        limits: of `analyses.denoise_limits`, on the gestures that the run validated.
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
    figure = Figure(figsize=(13, 7.4), layout="constrained")
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
