"""Gestures drawn side by side; matplotlib is imported when something is drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np

from trainlib.gestures import CHANNELS, PRESSED
from trainlib.known import press_edges
from trainlib.metrics import classify_gestures

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from trainlib.run_log import NullLogger


def as_array(x: Any) -> np.ndarray:
    """Return an array, or a tensor of any device, as a NumPy array."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def make_panels(columns: dict, rows: int, width: float, height: float) -> tuple["Figure", list]:
    """Return a figure with a row per gesture and its panels: axes, gesture, column, actions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 1 + height * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False, sharex=True)
    for ax in axes[-1]:
        ax.set_xlabel("frame (2 ms)")
    panels = []
    for i, row in enumerate(axes):
        for ax, (label, data) in zip(row, columns.items(), strict=True):
            panels.append((ax, i, label, as_array(data[i])))
    return figure, panels


def visualize_action_sequences(
    original: Any,
    reconstructed: Any,
    noisy: Any,
    title_prefix: str = "",
    max_samples: int = 4,
    *,
    known_mask: Any = None,
) -> "Figure":
    """Draw original, noisy and recreated gestures side by side, at most max_samples rows.

    They are (B, L, C), data units, arrays or tensors; the frames of `known_mask`, (B, L) bool,
    are marked with dots. The Figure belongs to no window and needs no closing.
    """
    columns = {"original": original, "noisy": noisy, "recreated": reconstructed}
    figure, panels = make_panels(columns, min(max_samples, len(original)), 15, 2.2)
    for ax, i, label, actions in panels:
        pressed = as_array(original[i])[:, 2] > PRESSED
        frames = np.arange(len(pressed))
        ax.fill_between(frames, 0, 1, where=pressed, color="0.9", label="pressed in original")
        for c, color in enumerate(("tab:blue", "tab:green", "tab:red")):
            ax.plot(frames, actions[:, c], color=color, lw=1.2, label=CHANNELS[c])
        if label != "noisy":
            ax.set_ylim(-0.1, 1.1)
            if known_mask is not None:
                known = np.flatnonzero(as_array(known_mask[i]))
                ax.plot(known, actions[known], "k.", ms=6, label="known frames")
        ax.set_title(f"{title_prefix} {label} {i + 1}".strip(), fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def visualize_noise_comparison(
    original: Any, reconstructed: Any, noisy: Any, title_prefix: str = "", max_samples: int = 4
) -> "Figure":
    """Draw |error| frame by frame on one log scale; else as `visualize_action_sequences`."""
    from matplotlib.colors import LogNorm

    columns = {"noisy": noisy, "recreated": reconstructed}
    figure, panels = make_panels(columns, min(max_samples, len(original)), 13, 1.4)
    for ax, i, label, actions in panels:
        error = np.abs(actions - as_array(original[i])).T  # (C, L)
        image = ax.imshow(error.clip(1e-3), norm=LogNorm(1e-3, 1), cmap="magma", aspect="auto")
        rmse = np.sqrt(np.mean(error**2))
        ax.set_title(f"{title_prefix} {label} {i + 1}, RMSE {rmse:.3f}".strip(), fontsize=10)
        ax.set_yticks(range(len(CHANNELS)), CHANNELS)
    figure.colorbar(image, ax=figure.axes, label="|error|, share of the screen")
    return figure


def log_figures(
    log: "NullLogger", step: int, title: str, x_0: "Tensor", recreated: "Tensor", noisy: "Tensor"
) -> None:
    """Log the plan's two figures, with one gesture of each type; (B, L, C), data units."""
    types = classify_gestures(x_0)
    first_of_type = [int((types == kind).int().argmax()) for kind in types.unique()]
    *three, known = (a[first_of_type] for a in (x_0, recreated, noisy, press_edges(x_0)))
    drawn = *three, title
    log.figure(step, "val/reconstructions", visualize_action_sequences, *drawn, known_mask=known)
    log.figure(step, "val/noise_comparison", visualize_noise_comparison, *drawn)
