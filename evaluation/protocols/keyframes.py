"""keyframes: recreate gestures from pure noise, given only their press edges.

About 4 of 250 frames are given. They determine a straight gesture wholly, so recreations are paired
with the originals. A gesture without a press edge gives nothing to go by: those are scored in a
table of their own, or, where the distribution is not known, counted and left to `continue`. There
the interpolation is no limit, and the table says how a recreation compares with it:

    mse_to_interpolation                    MSE over that of the interpolation
    spatial_accuracy_over_interpolation     spatial accuracy less that of the interpolation
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evaluation.controls import Recreation, make_controls
from evaluation.criteria import COMPLEX_FRAMES, PLAN_LINES, lines_met
from evaluation.estimates import Estimate, FloatArray, Table, bootstrap, shifted
from evaluation.figures import (
    BLUE,
    TYPE_LABELS,
    VERMILION,
    draw_signal,
    handles_by_label,
    new_figure,
    strip,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import score_recreations, sequence_mse
from train_diffusion_ddim import has_press_edge, press_edges, recreate
from trainlib.gestures import FRAME_MS, GESTURE_TYPES, PRESSED
from trainlib.metrics import classify_gestures, compute_temporal_iou
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {
    "mse": "MSE",
    "mean_snr_db": "SNR, dB",
    "temporal_iou": "temporal IoU",
    "spatial_accuracy": "within 0.1",
    "gesture_type_accuracy": "same type",
}


def run(s: Subject) -> list[Section]:
    """Recreate all validation gestures, and have the controls do so."""
    recreations = {
        "model": lambda _: s.recreated,
        "model_raw_weights": lambda x_0: recreate(s.raw_model, s.scheduler, x_0, **s.sampling),
        **make_controls(s.model, s.untrained, s.scheduler, s.x_train, s.sampling),
    }
    tables, recreated = keyframes(s.x_val, recreations)
    text = (
        "About 4 of 250 frames are known. They determine a straight gesture wholly, so the "
        "limit is the exact answer, which interpolation between them gives."
    )
    if s.prior is None:
        tables.pop("keyframes_without_edge", None)
        text = _text_without_prior(s.x_val)
        add_interpolation(tables.get("keyframes", {}), s.x_val, recreated)
    rows, names = pick_examples(s.x_val, s.recreated)
    steps = s.num_inference_steps
    shown = s.x_val[rows].cpu(), s.recreated[rows].cpu(), names, steps
    caption = "A typical gesture of each type, and the one recreated worst."
    sections = []
    if "keyframes" in tables:
        section = Section(
            "keyframes",
            tables["keyframes"],
            f"Keyframes: recreated from pure noise in {steps} steps, given only the frames where "
            "the finger lands and lifts",
            text,
            COLUMNS,
            "recreated by",
            [Picture("recreated_gestures.png", caption, draw_recreated, *shown)],
        )
        groups = group_scores(s.x_val, recreated, tables["keyframes"])
        sections += [section, Section("keyframes_groups", groups)]
    if "keyframes_without_edge" in tables:
        text = "They give the model nothing to go by: they are scored apart."
        title = "Keyframes of gestures without a press edge"
        table = tables["keyframes_without_edge"]
        name = "keyframes_without_edge"
        sections.append(Section(name, table, title, text, COLUMNS, "recreated by"))
    return sections


# ----------------------------------------------------------------------------------------
# MEASURE
# ----------------------------------------------------------------------------------------


def keyframes(
    x_0: Tensor, recreations: Mapping[str, Recreation]
) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Score the model, the controls and the limit as recreations of x_0.

    Args:
        x_0: (B, L, C), data units.
        recreations: by name, functions x_0 -> recreations.

    Returns:
        The table of the gestures with a press edge, `keyframes`, and of the others,
        `keyframes_without_edge`, where there are any; and all recreations by name.
    """
    scored = has_press_edge(x_0)
    groups = {"keyframes": scored, "keyframes_without_edge": ~scored}
    tables: dict[str, Table] = {name: {} for name, rows in groups.items() if rows.any()}
    recreated = {}
    for setting in progress(list(recreations), "keyframes"):
        recreated[setting] = recreations[setting](x_0)
        for name, table in tables.items():
            rows = groups[name]
            table[setting] = score_recreations(x_0[rows], recreated[setting][rows])
    return tables, recreated


def add_interpolation(table: Table, x_0: Tensor, recreated: Mapping[str, Tensor]) -> None:
    """Add to a table of recreations of x_0, (B, L, C), how they compare with the interpolation."""
    scored = has_press_edge(x_0)
    x = x_0[scored]
    lines = sequence_mse(x, recreated["interpolation"][scored]) if table else None
    for setting, row in table.items():
        own = sequence_mse(x, recreated[setting][scored])
        row["mse_to_interpolation"] = bootstrap(own, lines)
        due = table["interpolation"]["spatial_accuracy"].value
        over = shifted(row["spatial_accuracy"], by=due)
        row["spatial_accuracy_over_interpolation"] = over


def _text_without_prior(x_0: Tensor) -> str:
    """Say what is asked of windows whose distribution is not known, and of how many it is not."""
    without = int((~has_press_edge(x_0)).sum())
    text = (
        "A window is recreated from the frames on both sides of each touch-down and lift-off. They "
        "do not determine what the finger did in between, so there is no limit; joining them by "
        "straight lines (interpolation) is a control like any other."
    )
    if without:
        text += (
            f" {without} of {len(x_0)} windows have no such frame, most of them because they are "
            "pressed throughout. They are not asked here, but by `continue`."
        )
    return text


def group_scores(x_0: Tensor, recreated: Mapping[str, Tensor], table: Table) -> Table:
    """Score recreations by the plan's groups of gestures, and by its criteria of many metrics.

    Args:
        x_0: (B, L, C), data units.
        recreated: by setting, likewise.
        table: their scores, of `keyframes`.

    Returns:
        Per setting: mse_{type} and the largest, mse_worst_type; temporal_iou_complex;
        variance_ratio, the one farthest from 1 by ratio; smoothness_ratio, the largest; lines_met
        of PLAN_LINES; and where there is a random_training_item, metrics_beyond_random.
    """
    scored = has_press_edge(x_0)
    x, types = x_0[scored], classify_gestures(x_0[scored])
    is_complex = (x[..., 2] > PRESSED).sum(dim=1) >= COMPLEX_FRAMES
    groups: Table = {}
    for setting, scores in table.items():
        y = recreated[setting][scored]
        error = ((x.double() - y.double()) ** 2).mean(dim=(1, 2)).cpu().numpy()
        of_type = {
            f"mse_{name}": bootstrap(error[(types == i).cpu().numpy()])
            for i, name in enumerate(GESTURE_TYPES)
            if (types == i).any()
        }
        pressed = (x[is_complex][..., 2] > PRESSED, y[is_complex][..., 2] > PRESSED)
        groups[setting] = {
            **of_type,
            "mse_worst_type": max(of_type.values(), key=lambda e: e.value),
            "temporal_iou_complex": bootstrap(_each_iou(*pressed)),
            "variance_ratio": max(_ratios(scores, "variance"), key=lambda e: _far(e.value)),
            "smoothness_ratio": max(_ratios(scores, "smoothness"), key=lambda e: e.value),
            "lines_met": Estimate(len(lines_met(scores)), None, len(x)),
        }
        if "random_training_item" in table:
            beyond = metrics_beyond(scores, table["random_training_item"])
            groups[setting]["metrics_beyond_random"] = Estimate(beyond, None, len(x))
    return groups


def _each_iou(p: Tensor, q: Tensor) -> FloatArray:
    """Temporal IoU gesture by gesture, (B,)."""
    pairs = zip(p.split(1), q.split(1), strict=True)
    return np.array([compute_temporal_iou(*pair) for pair in pairs])


def _ratios(scores: Mapping[str, Estimate], name: str) -> list[Estimate]:
    return [scores[f"{name}_ratio_{channel}"] for channel in "xyp"]


def _far(ratio: float) -> float:
    return abs(math.log(max(ratio, 1e-12)))


def metrics_beyond(scores: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> int:
    """Count the PLAN_LINES metrics whose interval lies wholly on the better side of another's."""
    count = 0
    for metric, line in PLAN_LINES.items():
        a, b = scores[metric].ci, other[metric].ci
        if a and b:
            count += a[1] < b[0] if line.startswith("<") else a[0] > b[1]
    return count


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


def pick_examples(x_0: Tensor, recreated: Tensor) -> tuple[Tensor, list[str]]:
    """Return rows to show: of each type the one of median error, and the worst of all."""
    error = ((x_0 - recreated) ** 2).mean(dim=(1, 2))
    error = torch.where(has_press_edge(x_0), error, -1.0)
    types = classify_gestures(x_0)
    rows, names = [], []
    for kind, name in enumerate(GESTURE_TYPES):
        of_kind = torch.nonzero((types == kind) & (error >= 0))[:, 0]
        if len(of_kind):
            rows.append(of_kind[error[of_kind].argsort()[len(of_kind) // 2]])
            names.append(TYPE_LABELS[name])
    rows.append(error.argmax())
    names.append(f"the worst of {int((error >= 0).sum())}")
    return torch.stack(rows), names


def draw_recreated(
    x_0: Tensor, recreated: Tensor, names: Sequence[str], num_inference_steps: int
) -> "Figure":
    """Draw gestures in columns: the original, the frames that are given, the recreation.

    Args:
        x_0: (B, L, C), a column each.
        recreated: likewise.
        names: a title per column.
        num_inference_steps: what the recreation took.
    """
    figure = new_figure(2.6 * len(x_0) + 0.6, 6.2)
    axes = figure.subplots(3, len(x_0), squeeze=False, sharex=True, sharey=True)
    known = press_edges(x_0)
    for column, name in enumerate(names):
        original, answer = x_0[column].numpy(), recreated[column].numpy()
        draw_signal(axes[0, column], original)
        axes[0, column].set_title(name, fontsize=11)
        _draw_given(axes[1, column], original, np.flatnonzero(known[column].numpy()))
        draw_signal(axes[2, column], original, ghost=True)
        draw_signal(axes[2, column], answer)
        axes[2, column].set_xlabel("time, ms", fontsize=9)
        rms = float(np.sqrt(((original - answer) ** 2).mean()))
        _note(axes[2, column], f"RMS error {rms:.3f}")
    steps = f"recreated from noise,\n{num_inference_steps} steps"
    labels = ("original", "given to the model", steps)
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=10)
    legend = handles_by_label(axes[0, 0], axes[2, 0])
    figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        "Touch gestures recreated by diffusion from about 4 known frames: a typical one of each "
        "type, and the worst",
        fontsize=13,
    )
    return figure


def _draw_given(ax: "Axes", x: np.ndarray, given: np.ndarray) -> None:
    """Draw the known frames alone, as dots."""
    ms = FRAME_MS * given
    for frame in given:
        ax.axvspan(FRAME_MS * (frame - 0.5), FRAME_MS * (frame + 0.5), color="0.88", lw=0)
    ax.plot(ms, x[given, 0], "o", color=BLUE, mfc="none", mew=1.8, ms=9)
    ax.plot(ms, x[given, 1], "s", color=VERMILION, ms=4)
    _note(ax, f"{len(given)} of {len(x)} frames")
    strip(ax)


def _note(ax: "Axes", text: str) -> None:
    ax.text(0.98, 0.97, text, ha="right", va="top", fontsize=8, transform=ax.transAxes)
