"""The plan's five analyses, the sampler sweep and the evaluation patterns: the figures.

A `draw_*` function takes a `Table` of evaluation/analyses.py and returns a Figure. Each asks one
question in its title, answers it there where a number can, and writes the names of its curves at
their ends. `draw_analyses` draws all that there are tables for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from evaluation.analyses import FRAME_SIGMA
from evaluation.estimates import Estimate, Table
from evaluation.figures import (
    BLUE,
    FRAME_MS,
    METHODS,
    TYPE_LABELS,
    VERMILION,
    Curve,
    Panel,
    draw_panel,
    label_right,
    strip,
    values_of,
)
from evaluation.protocols import PLAN_LINES, lines_met
from evaluation.sweep_figures import (
    PLAN_GOALS,
    columns_of,
    draw_convergence,
    draw_excess_loss,
    draw_few_step_bias,
    draw_frontier,
    draw_sampler_sweep,
    meets_all,
)
from trainlib.gestures import PRESSED

CAPTIONS = {
    "quality_by_group.png": "Which gestures are hard: by type and by the plan's complexity levels.",
    "patterns.png": "The plan's evaluation patterns, recreated from their keyframes.",
    "error_by_frame.png": "Where in a gesture the error sits, with its edges given and not.",
    "error_by_step.png": "How the estimate of the gesture sharpens from step to step.",
    "excess_loss.png": "How far the loss is above the least possible one, at each noise level.",
    "few_step_bias.png": "What few steps do to durations, beside the exact score.",
    "sampler_sweep.png": "What more steps and other samplers bring, and cost.",
    "frontier.png": "What a larger model brings, and costs.",
    "convergence.png": "Whether the training had come to its end.",
}

Group = dict[str, dict[str, Estimate]]  # method -> metric -> estimate


def split_settings(table: Table) -> dict[str, Group]:
    """Turn the settings "group/method" into group -> method -> metric -> estimate."""
    groups: dict[str, Group] = {}
    for setting, row in table.items():
        group, method = setting.rsplit("/", 1)
        groups.setdefault(group, {})[method] = row
    return groups


# ----------------------------------------------------------------------------------------
# 1. QUALITY — by type and level, and the evaluation patterns
# ----------------------------------------------------------------------------------------

DOT_METRICS = {
    "mse": "← better    mean squared error",
    "temporal_iou": "timing: overlap of the presses    better →",
    "spatial_accuracy": "place: frames within 0.1    better →",
    "gesture_type_accuracy": "type: share that keeps it    better →",
}
SMALLEST_MSE = 1e-7  # what is below stands at the edge of the axis


def draw_quality(by_type: Table, by_level: Table, num_inference_steps: int) -> Figure:
    """Draw the plan's metrics of each type and level, beside a control and the limit.

    Args:
        by_type: of `quality_by_group`.
        by_level: likewise; may be empty.
        num_inference_steps: of the recreation.
    """
    tables = {"by action type": by_type, "by complexity": by_level}
    parts = {name: split_settings(table) for name, table in tables.items() if table}
    every = [group["model"] for groups in parts.values() for group in groups.values()]
    met = sum(meets_all(scores) for scores in every)
    figure = Figure(figsize=(15, 1.9 + 0.42 * len(every)), layout="constrained")
    axes = figure.subplots(
        len(parts), len(DOT_METRICS), squeeze=False, sharex="col",
        height_ratios=[len(groups) for groups in parts.values()],
    )  # fmt: skip
    for row, (title, groups) in zip(axes, parts.items(), strict=True):
        for ax, metric in zip(row, DOT_METRICS, strict=True):
            _draw_dots(ax, groups, metric)
        labels = [
            f"{TYPE_LABELS.get(name, name)}  (n = {group['model']['mse'].n})"
            for name, group in groups.items()
        ]
        row[0].set_yticks(range(len(groups)), labels, fontsize=10)
        row[0].set_ylabel(title, fontsize=10)
    for ax, label in zip(axes[-1], DOT_METRICS.values(), strict=True):
        ax.set_xlabel(label, fontsize=10)
    handles = [
        Line2D([], [], label=label, **{"ls": "", "ms": 8, "mew": 1.6, **style})
        for label, style in (METHODS[m] for m in ("model", "nearest_training_item"))
    ]
    handles.append(
        Line2D([], [], color="black", marker="|", ls="", ms=12, label="limit (interpolation)")
    )
    handles.append(Line2D([], [], color="0.4", ls="--", label="the plan's optimal line"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"{met} of {len(every)} kinds of gesture meet the plan's optimal line when recreated from "
        f"about 4 known frames in {num_inference_steps} steps",
        fontsize=13,
    )
    return figure


def _draw_dots(ax: Axes, groups: Mapping[str, Group], metric: str) -> None:
    """Draw one metric: a row per group, a dot per method; errors too small to draw at the edge."""
    if metric == "mse":
        ax.set_xscale("log")
        ax.set_xlim(SMALLEST_MSE, 0.2)
    else:
        ax.set_xlim(-0.03, 1.03)
    ax.axvline(PLAN_LINES[metric][1], color="0.4", ls="--", lw=1.2)
    for i, group in enumerate(groups.values()):
        for method, scores in group.items():
            value, low, high = values_of([scores[metric]])[:, 0]
            color, marker = (METHODS[method][1][key] for key in ("color", "marker"))
            if metric == "mse" and value < SMALLEST_MSE:
                ax.plot(SMALLEST_MSE, i, "<", color=color, ms=7, clip_on=False)
                ax.text(1.7 * SMALLEST_MSE, i, "0", va="center", fontsize=8, color=color)
                continue
            ax.plot([low, high], [i, i], color=color, lw=2.2, alpha=0.6)
            ax.plot(value, i, marker, color=color, ms=14 if marker == "|" else 6.5, mew=1.6)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_yticks(range(len(groups)), [""] * len(groups))
    ax.grid(axis="y", color="0.93")
    strip(ax)


PATTERN_NOTES = {
    "circle_approximation": "Not a training gesture: those are\nstraight. Its known frames are\n"
    "those of a click, and the type rule,\nwhich sees the ends, calls it one."
}


def draw_patterns(patterns: Mapping[str, tuple[Tensor, Tensor]], table: Table) -> Figure:
    """Draw the evaluation patterns as paths on a phone, with their scores below.

    Args:
        patterns: by name, gestures and the model's recreations, (n, L, C) each, CPU.
        table: of `quality_by_group` on the patterns.
    """
    groups = split_settings(table)
    figure = Figure(figsize=(2.5 * len(patterns), 6.6))
    axes = figure.subplots(1, len(patterns), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, top=0.85, bottom=0.01, wspace=0.06)
    for ax, (name, (x_0, recreated)) in zip(axes, patterns.items(), strict=True):
        _draw_paths(ax, x_0.numpy(), recreated.numpy())
        ax.set_title(name.replace("_", " "), fontsize=12)
        text = _pattern_scores(groups[name], len(x_0))
        ax.text(0.5, 1.08, text, ha="center", va="top", fontsize=9, linespacing=1.5)
        note = PATTERN_NOTES.get(name, "")
        ax.text(0.5, 1.43, note, ha="center", va="top", fontsize=9, color=VERMILION)
    ok = sum(meets_all(groups[name]["model"]) for name in patterns)
    title = f"{ok} of {len(patterns)} evaluation patterns, recreated from their keyframes, meet all"
    figure.suptitle(f"{title} of the plan's lines", fontsize=14, y=0.985)
    legend = "wide grey: original     blue: recreated,  ○ touch-down  ● lift-off"
    figure.text(0.5, 0.915, legend, ha="center", fontsize=10, color="0.35")
    return figure


def _pattern_scores(group: Group, n: int) -> str:
    """Return the model's scores on a pattern, and the limit's error."""
    scores, limit = group["model"], group["interpolation"]["mse"].value
    return "\n".join(
        (
            f"MSE {scores['mse'].value:.1e}    SNR {scores['mean_snr_db'].value:.0f} dB",
            f"timing {scores['temporal_iou'].value:.3f}    "
            f"place {scores['spatial_accuracy'].value:.3f}",
            f"type {scores['gesture_type_accuracy'].value:.2f}    n = {n}",
            f"{len(lines_met(scores))} of {len(PLAN_LINES)} of the plan's lines met",
            f"limit (interpolation): MSE {limit if limit > 1e-12 else 0:.2g}",
        )
    )


def _draw_paths(ax: Axes, x_0: np.ndarray, recreated: np.ndarray) -> None:
    """Draw the pressed frames of gestures (n, L, 3) and of their recreations on one phone."""
    ax.set_xlim(-0.06, 1.06)
    ax.set_ylim(1.65, -0.05)
    ax.set_aspect(1.6)
    ax.axis("off")
    box = "round,pad=0.03,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((0, 0), 1, 1, boxstyle=box, fc="0.97", ec="0.55", lw=1.2))
    for shown, answer in zip(x_0, recreated, strict=True):
        path = shown[shown[:, 2] > PRESSED, :2]
        ax.plot(*path.T, color="0.78", lw=10, marker="o", ms=10)
        path = answer[answer[:, 2] > PRESSED, :2]
        if len(path):
            ax.plot(*path.T, color=BLUE, lw=1.6)
            ax.plot(*path[0], "o", mfc="white", mec=BLUE, mew=1.4, ms=6)
            ax.plot(*path[-1], "o", color=BLUE, ms=3)


# ----------------------------------------------------------------------------------------
# 2. WHERE THE ERROR SITS — frame by frame, step by step
# ----------------------------------------------------------------------------------------

FRAME_ROWS = {  # protocol: (label, methods, smallest RMS error drawn)
    "keyframes": ("edges given\n(keyframes)", ("nearest_training_item", "model"), 1e-4),
    "denoise": (f"edges not given\n(one shot, noise {FRAME_SIGMA:g})", ("model", "bayes"), 1e-3),
}
GIVEN = (-1.5, 0.5)  # the frames on both sides of an edge, in frames from it


def draw_error_by_frame(table: Table) -> Figure:
    """Draw the RMS error of each frame around touch-down and lift-off.

    Args:
        table: of `error_by_frame`.
    """
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (protocol, (label, methods, smallest)) in zip(axes, FRAME_ROWS.items(), strict=True):
        row[0].set_yscale("log")
        for ax, edge in zip(row, ("touch_down", "lift_off"), strict=True):
            ends = _draw_edge(ax, table, f"{protocol}/{edge}", methods, smallest)
            if edge == "touch_down":
                row[0].set_ylim(bottom=smallest)
                label_right(ax, ends)
        row[0].set_ylabel(f"{label}\nRMS error, share of the screen", fontsize=10)
    for ax, title in zip(axes[0], ("touch-down", "lift-off"), strict=True):
        ax.set_title(f"around {title}", fontsize=11)
        ax.axvspan(*(FRAME_MS * end for end in GIVEN), color="0.8", lw=0)
        place = (FRAME_MS * sum(GIVEN) / 2, 1.3e-4)
        ax.annotate("given:\nerror 0", place, ha="center", fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("time from the edge, ms  (a frame is 2 ms)")
    n = max(row["mse_model"].n for row in table.values())
    at_edge, inside = (table[f"denoise/touch_down+{k}"]["mse_model"].value for k in (0, 20))
    title = "Where in a gesture is the error?"
    if at_edge > 0 and inside > 0:  # not if no gesture is that long
        times = f"{(at_edge / inside) ** 0.5:.1f} times as large at an edge as 40 ms inside"
        title += f"  If the edges are not given, it is {times}"
    figure.suptitle(f"{title}  (n = {n})", fontsize=13)
    return figure


def _draw_edge(
    ax: Axes, table: Table, prefix: str, methods: Sequence[str], smallest: float
) -> list[tuple[float, str, str]]:
    """Draw RMS errors around one edge; return the labels of their right ends."""
    offsets = [int(s.removeprefix(prefix)) for s in table if s.startswith(prefix)]
    ms, ends = FRAME_MS * np.array(offsets), []
    after = "touch_down" in prefix
    ax.set_xlim(ms[0], ms[-1])
    ax.axvspan(-0.5 * FRAME_MS, ms[-1] if after else ms[0], color="0.95", lw=0)
    ax.text(
        0.97 if after else 0.03, 0.93, "finger down", ha="right" if after else "left", fontsize=8,
        color="0.35", transform=ax.transAxes,
    )  # fmt: skip
    for method in methods:
        estimates = [table[f"{prefix}{offset:+d}"][f"mse_{method}"] for offset in offsets]
        rms = np.sqrt(values_of(estimates))
        rms[:, rms[0] < smallest] = np.nan  # zeros have no place on a log axis
        label, style = METHODS[method]
        ax.plot(ms, rms[0], **{"lw": 1.8, "ms": 3.5, **style})
        ax.fill_between(ms, rms[1], rms[2], color=style["color"], alpha=0.15, lw=0)
        ends.append((float(rms[0][-1]), label, style["color"]))
    ax.grid(color="0.9", axis="y")
    strip(ax)
    return ends


def draw_error_by_step(table: Table) -> Figure:
    """Draw the error of the x_0 estimate along the denoising steps.

    Args:
        table: of `error_by_step`.
    """
    columns, steps = columns_of(table), range(1, len(table) + 1)
    no_frame = "the best who sees the noisy gesture\nbut no known frame (Bayes)"
    curves = {
        "mse_shuffled_condition": METHODS["shuffled_condition"],
        "mse_bayes": (no_frame, METHODS["bayes"][1]),
        "mse_model": METHODS["model"],
    }
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    ax = figure.subplots()
    ylabel = "mean squared error of the x_0 estimate"
    draw_panel(
        ax,
        Panel("", ylabel, PLAN_GOALS["mse"], log=True),
        [Curve(steps, columns[metric], *method) for metric, method in curves.items()],
    )
    sigmas = [f"{i}\n{e.value:.2g}" for i, e in zip(steps, columns["sigma"], strict=True)]
    ax.set_xticks(steps, sigmas)
    ax.set_xlabel(
        "denoising step, and the noise that it starts from (std, share of the screen);\n"
        "the limit, interpolation between the known frames, is 0 at every step"
    )
    model = columns["mse_model"]
    figure.suptitle(
        f"What {len(steps)} denoising steps do: the error of the estimate goes from "
        f"{model[0].value:.1e} to {model[-1].value:.1e}  (n = {model[0].n})",
        fontsize=13,
    )
    return figure


# ----------------------------------------------------------------------------------------
# ALL OF THEM
# ----------------------------------------------------------------------------------------


def draw_analyses(
    tables: Mapping[str, Table],
    patterns: Mapping[str, tuple[Tensor, Tensor]],
    *,
    num_inference_steps: int,
    mean_duration: float,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Figure]:
    """Draw all figures that there are tables for, by file name, in the order of CAPTIONS.

    Args:
        tables: of `analyses.run_analyses`.
        patterns: likewise.
        num_inference_steps: of the recreations.
        mean_duration: of the law, frames.
        limits: of `draw_convergence`.
    """

    def table(name: str) -> Table:
        return tables.get(name, {})

    figures: dict[str, Figure] = {}
    if table("quality_by_type"):
        by_type, by_level = table("quality_by_type"), table("quality_by_level")
        figures["quality_by_group.png"] = draw_quality(by_type, by_level, num_inference_steps)
    if table("quality_of_patterns"):
        figures["patterns.png"] = draw_patterns(patterns, table("quality_of_patterns"))
    if table("sampler_sweep"):
        sweep, exact = table("sampler_sweep"), table("exact_few_steps")
        figures["few_step_bias.png"] = draw_few_step_bias(sweep, exact, mean_duration)
    makers: dict[str, Any] = {
        "error_by_frame": draw_error_by_frame,
        "error_by_step": draw_error_by_step,
        "excess_loss": draw_excess_loss,
        "sampler_sweep": draw_sampler_sweep,
        "frontier": draw_frontier,
        "convergence": lambda record: draw_convergence(record, limits),
    }
    figures |= {f"{name}.png": draw(table(name)) for name, draw in makers.items() if table(name)}
    return {name: figures[name] for name in CAPTIONS if name in figures}
