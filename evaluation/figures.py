"""Figures of the report; each explains itself to someone who knows nothing of this project.

Colours are Okabe and Ito's, told apart by the colour-blind. A function takes arrays on the CPU
in data units and returns a Figure that belongs to no window and needs no closing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from evaluation.protocols import Table
from train_diffusion_ddim import GESTURE_TYPES, PRESSED, classify_gestures, press_edges

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#767676"
TYPE_COLORS = dict(zip(GESTURE_TYPES, (GREY, VERMILION, BLUE, GREEN, PINK), strict=True))
TYPE_LABELS = {
    name: {"none": "no touch", "click": "click"}.get(name, f"{name} swipe")
    for name in GESTURE_TYPES
}
FRAME_MS = 2.0  # 500 Hz


def _strip(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


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
    _strip(ax)


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
    _strip(ax)


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


def draw_denoise_curve(table: Table, num_inference_steps: int) -> Figure:
    """Draw error against noise: the model between the limit and doing nothing.

    Args:
        table: of `protocols.denoise`.
        num_inference_steps: of DDIM.
    """
    curves = {  # metric: (label, color, marker, line style)
        "mse_zeros": ("zeros", GREY, "", (0, (1, 2))),
        "mse_identity": ("do nothing", GREY, "x", "--"),
        "mse_nearest_training_item": ("nearest training gesture", SKY, "v", "--"),
        "mse_ddim": (f"model, DDIM {num_inference_steps} steps", VERMILION, "s", "-"),
        "mse_exact_ddim": (f"limit of DDIM {num_inference_steps} steps", ORANGE, "", (0, (5, 1))),
        "mse_one_shot": ("model, one shot", BLUE, "o", "-"),
        "mse_mmse": ("limit of any model (Bayes)", "black", "", "-"),
    }
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    ax = figure.subplots()
    sigmas = [float(setting.removeprefix("sigma_")) for setting in table]
    for metric, (label, color, marker, style) in curves.items():
        if any(metric not in row for row in table.values()):
            continue
        estimates = [row[metric] for row in table.values()]
        values = [e.value for e in estimates]
        ax.plot(sigmas, values, color=color, marker=marker, ls=style, lw=1.8, ms=6, label=label)
        if metric in ("mse_one_shot", "mse_ddim"):
            low, high = np.array([e.ci or (e.value,) * 2 for e in estimates]).T
            ax.fill_between(sigmas, low, high, color=color, alpha=0.15, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sigmas, [f"{s:g}" for s in sigmas])
    ax.minorticks_off()
    ax.set_xlabel("noise added to the gesture: std, share of the screen")
    ax.set_ylabel("mean squared error of the recreation")
    ax.set_title("How well noisy gestures are recreated, and the limit of what is possible")
    ax.grid(color="0.92")
    ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9)
    return figure
