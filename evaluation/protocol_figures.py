"""Figures of the invert and infill protocols; the others are in figures.py."""

from typing import Any

from matplotlib.figure import Figure

from evaluation.estimates import Table
from evaluation.figures import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    Curve,
    Panel,
    draw_panel,
    scale_by,
    strip,
)

WALKS: dict[str, tuple[str, dict[str, Any]]] = {  # prefix of a setting: label, style
    "ddim_paper": ("DDIM paper (images)", {"color": GREY, "ls": ":"}),
    "untrained_model_dequantised": ("untrained, dequantised", {"color": ORANGE, "marker": "D"}),
    "zero_eps_raw": ("answering eps = 0, raw", {"color": VERMILION, "marker": "v"}),
    "model_raw": ("model, raw", {"color": BLUE, "ls": "--", "marker": "s"}),
    "model_dequantised": ("model, dequantised", {"color": BLUE, "marker": "o"}),
    "exact_score_dequantised": ("limit (exact score),\ndequantised", {"color": "black"}),
}
NOTHING = 1e-10  # a smaller error is that of the arithmetic, and has no place on the axis


def draw_round_trips(table: Table) -> Figure:
    """Draw the error of the round trip and the spread of the latents against the steps.

    Args:
        table: of `inversion.invert`.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = {
        "mse": Panel("error of the round trip", "mean squared error", log=True),
        "latent_std": Panel("spread of the latents: 1 is due", "std", limits=[(1, "normal")],
                            log=True),
    }  # fmt: skip
    steps = sorted({int(name.rsplit("_", 1)[1]) for name in table if name.startswith("model")})
    for ax, (metric, panel) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        curves = []
        for prefix, (label, style) in WALKS.items():
            found = {n: table[f"{prefix}_{n}"] for n in steps if f"{prefix}_{n}" in table}
            points = {n: row[metric] for n, row in found.items() if metric in row}
            points = {n: e for n, e in points.items() if e.value > NOTHING}
            if points:
                curves.append(Curve(list(points), list(points.values()), label, style))
        draw_panel(ax, panel, curves)
        scale_by(ax, steps, "steps, each way")
    figure.suptitle("What is left of a gesture that was turned into noise and back?", fontsize=13)
    return figure


def draw_infill(table: Table) -> Figure:
    """Draw who answers with valid gestures, and how diverse the answers are.

    Args:
        table: of `infill.infill`, with the exact law.
    """
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    ax = figure.subplots()
    places: dict[tuple[float, float], list[str]] = {}
    for name, row in table.items():
        spread, good = row["diversity_ratio"], row["consistent_and_valid"]
        color = BLUE if name == "model" else "black" if name.startswith("exact") else ORANGE
        ax.errorbar(
            spread.value, good.value, color=color, marker="o", ms=7, lw=1.2,
            xerr=spread.ci and [[spread.value - spread.ci[0]], [spread.ci[1] - spread.value]],
            yerr=good.ci and [[good.value - good.ci[0]], [good.ci[1] - good.value]],
        )  # fmt: skip
        place = (round(spread.value, 1), round(good.value, 1))
        places.setdefault(place, []).append(name.replace("_", " "))
    for (x, y), names in places.items():
        text = "\n".join(names)
        ax.annotate(text, (x, y), (9, 5), textcoords="offset points", fontsize=8, va="bottom")
    ax.set_xlim(-0.1, None)
    ax.set_ylim(-0.05, 1.15)
    ax.set_xlabel("diversity of the answers, 1 is that of the exact law")
    ax.set_ylabel("share of answers that keep the touch-down and are valid")
    ax.grid(color="0.93")
    strip(ax)
    figure.suptitle("Given the touch-down alone: gestures, and different ones?", fontsize=13)
    return figure
