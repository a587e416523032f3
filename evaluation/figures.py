"""What the figures of the report are made of: colours, panels with labelled curves, gestures.

Colours are Okabe and Ito's, told apart by the colour-blind, and mean the same in every figure:
blue the model, black a limit that no model passes, orange and vermilion controls, grey the rest.
The figures themselves are drawn by the protocols. Each asks one question in its title, answers it
there where a number can, and writes the names of its curves at their ends; it belongs to no window
and needs no closing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaluation.criteria import GENERATE_LINES, PLAN_LINES, number_of
from evaluation.estimates import Estimate
from trainlib.gestures import FRAME_MS, PRESSED
from trainlib.gestures import TABLE as GESTURE_TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#767676"
COLORS = {"grey": GREY, "vermilion": VERMILION, "blue": BLUE, "green": GREEN, "pink": PINK}
TYPE_COLORS = {row.name: COLORS[row.color] for row in GESTURE_TABLE}
TYPE_LABELS = {row.name: row.label for row in GESTURE_TABLE}
NOISE_LABEL = "noise added to the gesture: std, share of the screen"
PLAN_GOALS = {metric: [(number_of(line), "plan's line")] for metric, line in PLAN_LINES.items()}
VALID_GOAL = [(number_of(GENERATE_LINES["valid"]), "goal")]
SHARE = (0.0, 1.05)  # limits of an axis of shares

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


# ----------------------------------------------------------------------------------------
# PANELS
# ----------------------------------------------------------------------------------------


def new_figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    """Return an empty figure, inches; it belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def strip(ax: "Axes") -> None:
    """Leave the axes that carry a scale."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def values_of(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return values, low and high ends of the intervals, (3, N); without one, the value."""
    return np.array([(e.value, *(e.ci or (e.value,) * 2)) for e in estimates]).T


def label_right(ax: "Axes", labels: Sequence[tuple[float, str, str]], gap: float = 0.065) -> None:
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


def plain_ticks(ax: "Axes") -> None:
    """Label a short logarithmic y axis by plain numbers, a long one by powers of ten."""
    from matplotlib.ticker import NullFormatter

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


def draw_panel(ax: "Axes", panel: Panel, curves: Sequence[Curve]) -> None:
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


def scale_by(ax: "Axes", ticks: Sequence[float], label: str) -> None:
    """Make the x axis logarithmic, with ticks at just these values."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)


# ----------------------------------------------------------------------------------------
# GESTURES — (L, 3) arrays, data units
# ----------------------------------------------------------------------------------------


def draw_signal(ax: "Axes", x: np.ndarray, *, ghost: bool = False) -> None:
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


def handles_by_label(*axes: "Axes") -> tuple[list, list]:
    """Collect one handle per label of the axes, for a legend."""
    pairs = [ax.get_legend_handles_labels() for ax in axes]
    found = {
        label: h for handles, labels in pairs for h, label in zip(handles, labels, strict=True)
    }
    return list(found.values()), list(found)


def draw_phone(ax: "Axes", aspect: float, bottom: float = 1.03, **style: Any) -> None:
    """Make axes the screen of a phone, y downwards, as far as `bottom`; `style` is its edge's."""
    from matplotlib.patches import FancyBboxPatch

    ax.set_xlim(-0.06, 1.06)
    ax.set_ylim(bottom, -0.03)
    ax.set_aspect(aspect)
    ax.axis("off")
    box = "round,pad=0.03,rounding_size=0.08"
    style = {"fc": "0.97", "ec": "0.55", "lw": 1.2, **style}
    ax.add_patch(FancyBboxPatch((0, 0), 1, 1, boxstyle=box, mutation_aspect=1 / aspect, **style))


def draw_path(ax: "Axes", x: np.ndarray, color: str, lw: float) -> None:
    """Draw where the finger is down, with a ring where it lands and a dot where it lifts."""
    down = x[:, 2] > PRESSED
    path = x[down, :2]
    if len(path):
        breaks = np.where(down[:, None], x[:, :2], np.nan)
        ax.plot(breaks[:, 0], breaks[:, 1], color=color, lw=lw, solid_capstyle="round")
        ax.plot(*path[0], "o", mfc="white", mec=color, mew=0.82 * lw, ms=3.6 * lw)
        ax.plot(*path[-1], "o", color=color, ms=2.2 * lw)
