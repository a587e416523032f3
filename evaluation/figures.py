"""Figures of the report; each explains itself to someone who knows nothing of this project.

Colours are Okabe and Ito's, told apart by the colour-blind, and mean the same in every figure:
blue the model, black a limit that no model passes, orange and vermilion controls, grey the rest.
A function takes arrays on the CPU in data units, or a `Table`, and returns a Figure that belongs
to no window and needs no closing. The plan's analyses are drawn in analysis_figures.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import NullFormatter
from torch import Tensor

from evaluation.estimates import Estimate, Table
from train_diffusion_ddim import classify_gestures, press_edges
from trainlib.gestures import GESTURE_TYPES, PRESSED

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#767676"
TYPE_COLORS = dict(zip(GESTURE_TYPES, (GREY, VERMILION, BLUE, GREEN, PINK), strict=True))
TYPE_LABELS = {
    name: {"none": "no touch", "click": "click"}.get(name, f"{name} swipe")
    for name in GESTURE_TYPES
}
FRAME_MS = 2.0  # 500 Hz

# Who answers: the name and the style of its line, in every figure.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("model", {"color": BLUE, "marker": "o"}),
    "ddim": ("model, DDIM", {"color": BLUE, "marker": "o"}),
    "ddim_eta_1": ("model, DDIM with eta 1", {"color": PINK, "marker": "^"}),
    "dpmpp": ("model, DPM-Solver++(2M)", {"color": GREEN, "marker": "s"}),
    "dpmpp_eta_1": ("model, 2M with eta 1", {"color": ORANGE, "marker": "v"}),
    "bayes": ("limit (Bayes)", {"color": "black"}),
    "exact": ("limit (exact score)", {"color": "black", "ls": "--", "marker": "."}),
    "interpolation": ("limit (interpolation)", {"color": "black", "marker": "|"}),
    "nearest_training_item": ("nearest training gesture", {"color": ORANGE, "marker": "D"}),
    "shuffled_condition": (
        "model, given the frames\nof another gesture",
        {"color": VERMILION, "marker": "v"},
    ),
}


def strip(ax: Axes) -> None:
    """Leave the axes that carry a scale."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def values_of(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return values, low and high ends of the intervals, (3, N); without one, the value."""
    return np.array([(e.value, *(e.ci or (e.value,) * 2)) for e in estimates]).T


def label_right(ax: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Write labels right of the axes, led to their curves' ends, without overlap.

    Args:
        ax: its limits and scale must stand.
        labels: (height of the end in data, text, colour) each.
        gap: least distance of two one-line labels, a share of the axes' height.
    """
    to_axes, left = ax.transScale + ax.transLimits, ax.get_xlim()[0]
    ends = [float(to_axes.transform((left, height))[1]) for height, _, _ in labels]
    order = np.argsort(ends, kind="stable")
    heights = [min(max(ends[i], 0.0), 1.0) for i in order]
    rows = [labels[i][1].count("\n") + 1 for i in order]
    for _ in range(100):  # push neighbours apart, both by the same
        for i in range(1, len(heights)):
            lack = gap * (rows[i - 1] + rows[i]) / 2 - (heights[i] - heights[i - 1])
            if lack > 0:
                heights[i - 1], heights[i] = heights[i - 1] - lack / 2, heights[i] + lack / 2
    place: dict[str, Any] = {"xycoords": "axes fraction", "annotation_clip": False}
    for i, height in zip(order, heights, strict=True):
        _, text, color = labels[i]
        leader = {"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
        end = min(max(ends[i], 0.0), 1.0)
        ax.annotate("", (1.0, end), (1.03, height), arrowprops=leader, **place)
        ax.annotate(text, (1.035, height), va="center", color=color, fontsize=9, **place)


def plain_ticks(ax: Axes) -> None:
    """Label a short logarithmic y axis by plain numbers, a long one by powers of ten."""
    low, high = ax.get_ylim()
    if high / low < 50:
        ticks = [m * 10.0**e for e in range(-9, 9) for m in (1, 1.5, 2, 3, 5, 7)]
        ticks = [t for t in ticks if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(low, high)


class Curve(NamedTuple):
    """A line of a chart: x, estimates, what stands at its end ("" for nothing), its style."""

    x: Sequence[float]
    estimates: Sequence[Estimate]
    label: str
    style: dict[str, Any]


class Panel(NamedTuple):
    """What frames the curves of a chart; goals are (value, label), and so are limits."""

    title: str = ""
    ylabel: str = ""
    goals: Sequence[tuple[float, str]] = ()
    limits: Sequence[tuple[float, str]] = ()
    log: bool = False
    ylim: tuple[float | None, float | None] = (None, None)


def draw_panel(ax: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    """Draw curves with their 95 % bands, goals in dashed grey, limits in black, all labelled."""
    ends = []
    for goal, label in panel.goals:
        ax.axhline(goal, color="0.4", ls=(0, (6, 3)), lw=1.2)
        ends.append((goal, label, "0.4"))
    for limit, label in panel.limits:
        ax.axhline(limit, color="black", lw=1.8)
        ends.append((limit, label, "black"))
    for x, estimates, label, style in curves:
        value, low, high = values_of(estimates)
        ax.plot(x, value, **{"lw": 1.8, "ms": 5, **style})
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
        ends.append((value[-1], label, style["color"]))
    if panel.log:
        ax.set_yscale("log")
        plain_ticks(ax)
    ax.set_ylim(*panel.ylim)
    ax.set_title(panel.title, fontsize=11)
    ax.set_ylabel(panel.ylabel)
    ax.grid(color="0.93")
    strip(ax)
    label_right(ax, [end for end in ends if end[1] and np.isfinite(end[0])])


def scale_by(ax: Axes, ticks: Sequence[float], label: str) -> None:
    """Make the x axis logarithmic, with ticks at just these values."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)


def draw_recreated(
    x_0: Tensor, recreated: Tensor, names: Sequence[str], num_inference_steps: int
) -> Figure:
    """Draw gestures in columns: the original, the frames that are given, the recreation.

    Args:
        x_0: (B, L, C), a column each.
        recreated: likewise.
        names: a title per column.
        num_inference_steps: what the recreation took.
    """
    figure = Figure(figsize=(2.6 * len(x_0) + 0.6, 6.2), layout="constrained")
    axes = figure.subplots(3, len(x_0), squeeze=False, sharex=True, sharey=True)
    known = press_edges(x_0)
    for column, name in enumerate(names):
        original, answer = x_0[column].numpy(), recreated[column].numpy()
        given = np.flatnonzero(known[column].numpy())
        _draw_signal(axes[0, column], original)
        axes[0, column].set_title(name, fontsize=11)
        _draw_given(axes[1, column], original, given)
        _draw_signal(axes[2, column], original, ghost=True)
        _draw_signal(axes[2, column], answer)
        rms = float(np.sqrt(((original - answer) ** 2).mean()))
        axes[2, column].set_xlabel("time, ms", fontsize=9)
        axes[2, column].text(
            0.98, 0.97, f"RMS error {rms:.3f}", ha="right", va="top", fontsize=8,
            transform=axes[2, column].transAxes,
        )  # fmt: skip
    labels = (
        "original",
        "given to the model",
        f"recreated from noise,\n{num_inference_steps} steps",
    )
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=10)
    figure.legend(*_signal_legend(axes), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        "Touch gestures recreated by diffusion from about 4 known frames: a typical one of each "
        "type, and the worst",
        fontsize=13,
    )
    return figure


def _draw_signal(ax: Axes, x: np.ndarray, *, ghost: bool = False) -> None:
    """Draw x, y and press against time; a ghost is a wide pale line to be drawn over."""
    ms = FRAME_MS * np.arange(len(x))
    style: dict[str, Any] = {"lw": 5.0, "alpha": 0.25} if ghost else {"lw": 1.6}
    if not ghost:
        ax.fill_between(ms, 0, x[:, 2], color="0.88", step="mid", lw=0, label="finger down")
    label = "original, for comparison" if ghost else None
    ax.plot(ms, x[:, 0], color=BLUE, label=label or "x, share of the screen", **style)
    ax.plot(ms, x[:, 1], color=VERMILION, label=label or "y", ls="-", **style)
    ax.set_ylim(-0.05, 1.25)
    ax.set_yticks([0, 0.5, 1])
    ax.set_xlim(0, ms[-1])
    strip(ax)


def _draw_given(ax: Axes, x: np.ndarray, given: np.ndarray) -> None:
    """Draw the known frames alone, as dots."""
    ms = FRAME_MS * given
    for frame in given:
        ax.axvspan(FRAME_MS * (frame - 0.5), FRAME_MS * (frame + 0.5), color="0.88", lw=0)
    ax.plot(ms, x[given, 0], "o", color=BLUE, mfc="none", mew=1.8, ms=9)
    ax.plot(ms, x[given, 1], "s", color=VERMILION, ms=4)
    ax.text(
        0.98, 0.97, f"{len(given)} of {len(x)} frames", ha="right", va="top", fontsize=8,
        transform=ax.transAxes,
    )  # fmt: skip
    strip(ax)


def _signal_legend(axes: np.ndarray) -> tuple[list, list]:
    """Collect one handle per label."""
    pairs = [ax.get_legend_handles_labels() for ax in (axes[0, 0], axes[2, 0])]
    found = {
        label: h for handles, labels in pairs for h, label in zip(handles, labels, strict=True)
    }
    return list(found.values()), list(found)


def draw_generated(samples: Tensor, valid: Tensor, num_inference_steps: int) -> Figure:
    """Draw up to 32 samples as paths on a phone, with a strip that shows when the finger is down.

    Args:
        samples: (B, L, C), the first of them are drawn.
        valid: (B,) bool.
        num_inference_steps: what a sample took.
    """
    share, total = float(valid.float().mean()), len(samples)
    samples = samples[:32]
    columns, rows = 8, -(-len(samples) // 8)
    height = 2.75 * rows + 1.5
    figure = Figure(figsize=(1.5 * columns, height))
    below, above = 0.6 / height, 1 - 0.8 / height
    place = {"left": 0.02, "right": 0.98, "bottom": below, "top": above}
    grid = figure.add_gridspec(rows, columns, wspace=0.25, hspace=0.15, **place)
    types = classify_gestures(samples)
    for i, sample in enumerate(samples.numpy()):
        cell = grid[i // columns, i % columns].subgridspec(2, 1, height_ratios=(14, 1), hspace=0.06)
        color = TYPE_COLORS[GESTURE_TYPES[types[i]]]
        _draw_phone(figure.add_subplot(cell[0]), sample, color, bool(valid[i]))
        _draw_press_strip(figure.add_subplot(cell[1]), sample, color)
    for i, (name, color) in enumerate(TYPE_COLORS.items()):
        style: dict[str, Any] = {"fontsize": 11, "weight": "bold", "ha": "center"}
        figure.text(0.1 + 0.2 * i, 0.25 / height, f"●  {TYPE_LABELS[name]}", color=color, **style)
    title = f"Gestures that the model invents from noise in {num_inference_steps} steps"
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", fontsize=15)
    subtitle = (
        "path of the finger on the screen, ○ touch-down, ● lift-off; the bar below shows when in "
        f"0.5 s the finger is down.  The first {len(samples)} of {total}, not selected; "
        f"{share:.0%} of all are valid."
    )
    figure.text(0.5, 1 - 0.57 / height, subtitle, ha="center", fontsize=9.5, color="0.35")
    return figure


def _draw_phone(ax: Axes, x: np.ndarray, color: str, valid: bool) -> None:
    """Draw the path of the pressed frames on a phone; y runs down the screen."""
    ax.set_xlim(-0.06, 1.06)
    ax.set_ylim(1.03, -0.03)
    ax.set_aspect(2.0)
    ax.axis("off")
    edge = "0.55" if valid else "black"
    ax.add_patch(
        FancyBboxPatch(
            (0, 0), 1, 1, boxstyle="round,pad=0.03,rounding_size=0.08", mutation_aspect=0.5,
            fc="0.97", ec=edge, lw=1.2, ls="-" if valid else ":",
        )
    )  # fmt: skip
    down = x[:, 2] > PRESSED
    path = x[down, :2]
    if len(path):
        breaks = np.where(down[:, None], x[:, :2], np.nan)
        ax.plot(breaks[:, 0], breaks[:, 1], color=color, lw=2.2, solid_capstyle="round")
        ax.plot(*path[0], "o", mfc="white", mec=color, mew=1.8, ms=8)
        ax.plot(*path[-1], "o", color=color, ms=5)
    if not valid:
        ax.text(0.5, 0.96, "not valid", ha="center", fontsize=8, color="black")


def _draw_press_strip(ax: Axes, x: np.ndarray, color: str) -> None:
    """Draw when the finger is down, left to right."""
    down = (x[None, :, 2] > PRESSED).astype(float)
    extent = (-0.03, 1.03, 0, 1)  # as wide as the phone
    colors = ListedColormap(["0.90", color])
    ax.imshow(down, cmap=colors, extent=extent, aspect="auto", interpolation="none", vmin=0, vmax=1)
    ax.set_xlim(-0.06, 1.06)
    ax.axis("off")


DENOISE_CURVES: Mapping[str, tuple[str, dict[str, Any]]] = {  # metric: (label, style)
    "mse_zeros": ("answering zeros", {"color": GREY, "ls": ":"}),
    "mse_identity": ("leaving the noise in", {"color": GREY, "ls": "--"}),
    "mse_nearest_training_item": METHODS["nearest_training_item"],
    "mse_exact_ddim": ("limit of DDIM", {"color": "black", "ls": "--"}),
    "mse_ddim": ("model, DDIM", {"color": BLUE, "ls": "--", "marker": "s"}),
    "mse_one_shot": ("model, one shot", {"color": BLUE, "marker": "o"}),
    "mse_mmse": ("limit of any model\n(Bayes)", {"color": "black"}),
}
NOISE_LABEL = "noise added to the gesture: std, share of the screen"


def draw_denoise_curve(table: Table, num_inference_steps: int) -> Figure:
    """Draw error against noise, between the limit and doing nothing, and its ratio to the limit.

    Args:
        table: of `protocols.denoise`; without a limit the ratio is left out.
        num_inference_steps: of DDIM.
    """
    sigmas = [float(setting.removeprefix("sigma_")) for setting in table]

    def curves(metrics: Mapping[str, str]) -> list[Curve]:  # metric -> its key of DENOISE_CURVES
        return [
            Curve(sigmas, [row[metric] for row in table.values()], *DENOISE_CURVES[key])
            for metric, key in metrics.items()
            if all(metric in row for row in table.values())
        ]

    ratios = curves({"r_ddim": "mse_ddim", "r": "mse_one_shot"})
    panels = [
        (Panel("", "mean squared error", log=True), curves({m: m for m in DENOISE_CURVES})),
        (
            Panel("", "error / least possible error", [(1.1, "goal: 1.1")], [(1, "limit")], True),
            ratios,
        ),
    ][: 2 if ratios else 1]
    figure = Figure(figsize=(6.5 * len(panels) + 1, 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (panel, lines) in zip(axes, panels, strict=True):
        draw_panel(ax, panel, lines)
        scale_by(ax, sigmas, NOISE_LABEL)
    found = ""
    if ratios:
        worst = max(e.value for e in ratios[-1].estimates)
        found = f"  In one shot with at most {worst:.2f} times the least possible error"
    figure.suptitle(
        f"How well are noisy gestures recreated?{found}  (DDIM: {num_inference_steps} steps)",
        fontsize=13,
    )
    return figure
