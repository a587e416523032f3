"""quality: the keyframes protocol by type, by complexity level, and of the plan's patterns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from augmentation import COMPLEXITY_LEVELS, EVAL_PATTERNS, draw_gestures, make_pattern, render
from evaluation.controls import Recreation, interpolation, nearest_training_item
from evaluation.criteria import PLAN_LINES, lines_met, number_of
from evaluation.estimates import Estimate, Table
from evaluation.figures import (
    BLUE,
    METHODS,
    TYPE_LABELS,
    VERMILION,
    draw_path,
    draw_phone,
    new_figure,
    strip,
    values_of,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import score_recreations
from train_diffusion_ddim import has_press_edge, recreate
from trainlib.gestures import GESTURE_TYPES, PRESSED, SEQ_LEN
from trainlib.metrics import classify_gestures
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVEL_SEED = 20210506
Group = dict[str, dict[str, Estimate]]  # method -> metric -> estimate


def run(s: Subject, num: int) -> list[Section]:
    """Recreate gestures of each type and level, `num` of each, and the evaluation patterns."""
    recreations: dict[str, Recreation] = {
        "model": lambda x_0: recreate(s.model, s.scheduler, x_0, **s.sampling),
        "nearest_training_item": nearest_training_item(s.x_train),
        "interpolation": interpolation,
    }
    length, device = s.x_val.shape[1], s.x_val.device
    groups = {"by_type": split_by_type(s.x_val[: 3 * num]), "by_level": {}, "patterns": {}}
    if s.prior:  # levels and patterns are straight
        groups["by_level"] = draw_levels(num, length)
        groups["patterns"] = make_patterns() if length == SEQ_LEN else {}
    tables, recreated = {}, {}
    for name, group in groups.items():
        on_device = {key: x.to(device) for key, x in group.items()}
        tables[name], recreated[name] = quality_by_group(on_device, recreations)
    sections = []
    by_type, by_level = tables["by_type"], tables["by_level"]
    if by_type | by_level:
        text = "The keyframes protocol by action type, and by the plan's levels of complexity."
        caption = "Which gestures are hard: by type and by the plan's complexity levels."
        if not by_level:
            text, caption = "The keyframes protocol by action type.", "Which types are hard."
        lines = "limit (interpolation)" if s.prior else "straight lines between known frames"
        drawn = draw_quality, by_type, by_level, s.num_inference_steps, lines
        pictures = [Picture("quality_by_group.png", caption, *drawn)] if by_type else []
        title = "By gesture: which are hard"
        table = by_type | by_level
        sections.append(Section("quality_by_group", table, title, text, pictures=pictures))
    if tables["patterns"]:
        text = (
            "The plan's evaluation patterns, recreated from the frames where the finger lands and "
            "lifts. A circle is none of the straight gestures that the model has seen."
        )
        patterns = {
            name: (x, recreated["patterns"][name]["model"].cpu())
            for name, x in groups["patterns"].items()
        }
        caption = "The plan's evaluation patterns, recreated from their keyframes."
        pictures = [Picture("patterns.png", caption, draw_patterns, patterns, tables["patterns"])]
        title = "Patterns: those that the plan names"
        table = tables["patterns"]
        sections.append(Section("quality_of_patterns", table, title, text, pictures=pictures))
    return sections


# ----------------------------------------------------------------------------------------
# MEASURE
# ----------------------------------------------------------------------------------------


def split_by_type(x_0: Tensor) -> dict[str, Tensor]:
    """Group gestures that have a press edge by the plan's rule; empty groups are left out."""
    x_0 = x_0[has_press_edge(x_0)]
    types = classify_gestures(x_0)
    groups = {name: x_0[types == i] for i, name in enumerate(GESTURE_TYPES)}
    return {name: x for name, x in groups.items() if len(x)}


def draw_levels(n: int, length: int) -> dict[str, Tensor]:
    """Draw n mixed gestures of each complexity level of the plan, always the same.

    Args:
        n: gestures per level.
        length: L, frames; a level whose longest gesture does not fit is left out.
    """
    levels = {}
    for i, level in enumerate(COMPLEXITY_LEVELS):
        frames = level["min_delta_t"], level["max_delta_t"]
        if frames[1] <= length:
            rng = np.random.default_rng([LEVEL_SEED, i])
            gestures = draw_gestures(rng, n, "mixed", *frames, length)
            name = f"{level['name']}, {frames[0]}-{frames[1]} frames"
            levels[name] = torch.from_numpy(render(gestures, length))
    return levels


def make_patterns() -> dict[str, Tensor]:
    """Return the plan's evaluation patterns by name, (n, 250, 3) each."""
    return {spec["pattern"]: torch.from_numpy(make_pattern(spec)) for spec in EVAL_PATTERNS}


def quality_by_group(
    groups: Mapping[str, Tensor], recreations: Mapping[str, Recreation]
) -> tuple[Table, dict[str, dict[str, Tensor]]]:
    """Score recreations group by group with the plan's metrics.

    Args:
        groups: by name, gestures (B, L, C), data units.
        recreations: by name, functions x_0 -> recreations.

    Returns:
        The table with a setting "group/method", and the recreations by group and method.
    """
    table: Table = {}
    recreated: dict[str, dict[str, Tensor]] = {}
    for group, x_0 in progress(list(groups.items()), "quality"):
        recreated[group] = {name: function(x_0) for name, function in recreations.items()}
        for name, answer in recreated[group].items():
            table[f"{group}/{name}"] = score_recreations(x_0, answer)
    return table, recreated


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


def split_settings(table: Table) -> dict[str, Group]:
    """Turn the settings "group/method" into group -> method -> metric -> estimate."""
    groups: dict[str, Group] = {}
    for setting, row in table.items():
        group, method = setting.rsplit("/", 1)
        groups.setdefault(group, {})[method] = row
    return groups


DOT_METRICS = {
    "mse": "← better    mean squared error",
    "temporal_iou": "timing: overlap of the presses    better →",
    "spatial_accuracy": "place: frames within 0.1    better →",
    "gesture_type_accuracy": "type: share that keeps it    better →",
}
SMALLEST_MSE = 1e-7  # what is below stands at the edge of the axis


def draw_quality(
    by_type: Table, by_level: Table, num_inference_steps: int, lines: str = "limit (interpolation)"
) -> "Figure":
    """Draw the plan's metrics of each type and level, beside a control and the limit.

    Args:
        by_type: of `quality_by_group`.
        by_level: likewise; may be empty.
        num_inference_steps: of the recreation.
        lines: what interpolation is called.
    """
    from matplotlib.lines import Line2D

    tables = {"by action type": by_type, "by complexity": by_level}
    parts = {name: split_settings(table) for name, table in tables.items() if table}
    every = [group["model"] for groups in parts.values() for group in groups.values()]
    met = sum(meets_all(scores) for scores in every)
    figure = new_figure(15, 1.9 + 0.42 * len(every))
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
    handles.append(Line2D([], [], color="black", marker="|", ls="", ms=12, label=lines))
    handles.append(Line2D([], [], color="0.4", ls="--", label="the plan's optimal line"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"{met} of {len(every)} kinds of gesture meet the plan's optimal line when recreated from "
        f"about 4 known frames in {num_inference_steps} steps",
        fontsize=13,
    )
    return figure


def _draw_dots(ax: "Axes", groups: Mapping[str, Group], metric: str) -> None:
    """Draw one metric: a row per group, a dot per method; errors too small to draw at the edge."""
    if metric == "mse":
        ax.set_xscale("log")
        ax.set_xlim(SMALLEST_MSE, 0.2)
    else:
        ax.set_xlim(-0.03, 1.03)
    ax.axvline(number_of(PLAN_LINES[metric]), color="0.4", ls="--", lw=1.2)
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


def draw_patterns(patterns: Mapping[str, tuple[Tensor, Tensor]], table: Table) -> "Figure":
    """Draw the evaluation patterns as paths on a phone, with their scores below.

    Args:
        patterns: by name, gestures and the model's recreations, (n, L, C) each, CPU.
        table: of `quality_by_group` on the patterns.
    """
    groups = split_settings(table)
    figure = new_figure(2.5 * len(patterns), 6.6, layout=None)
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


def _draw_paths(ax: "Axes", x_0: np.ndarray, recreated: np.ndarray) -> None:
    """Draw the pressed frames of gestures (n, L, 3) and of their recreations on one phone."""
    draw_phone(ax, 1.6, bottom=1.65)
    for shown, answer in zip(x_0, recreated, strict=True):
        path = shown[shown[:, 2] > PRESSED, :2]
        ax.plot(*path.T, color="0.78", lw=10, marker="o", ms=10)
        draw_path(ax, answer, BLUE, lw=1.6)


def meets_all(scores: Mapping[str, Estimate]) -> bool:
    """Tell whether all of the plan's lines are met."""
    return len(lines_met(scores)) == len(PLAN_LINES)
