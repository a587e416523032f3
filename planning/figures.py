"""The figures of docs/PLANNING.md: success against evaluations and against seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, strip
from planning.benchmark import MILESTONES, Row
from planning.document import collect, mean_rate, wilson
from planning.methods import Method
from planning.tasks import TASKS

STYLES: dict[str, dict[str, Any]] = {
    "shoot_true": {"color": GREY, "marker": "o", "ls": "--"},
    "adam_raw": {"color": ORANGE, "marker": "s"},
    "cem_ramp": {"color": VERMILION, "marker": "v"},
    "true_adam": {"color": "black", "marker": "D", "ls": "--"},
    "ddim_adam": {"color": BLUE, "marker": "D"},
    "diffusion_es": {"color": BLUE, "marker": "P", "ls": ":"},
    "cfg_ddim_adam": {"color": GREEN, "marker": "*"},
    "regress_jitter_adam": {"color": SKY, "marker": "^", "ls": ":"},
    "changes_adam": {"color": PINK, "marker": "X"},
}


def evaluations_figure(rows: Sequence[Row], methods: Mapping[str, Method]) -> Figure:
    """Success against evaluations, a panel per task, with intervals."""
    main = [row for row in rows if row["stage"] == "main"]
    by = {m: collect(main, m) for m in MILESTONES}
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for ax, task in zip(axes.flat, TASKS, strict=True):
        ax.set_title(task, fontsize=10, loc="left")
        for name, style in STYLES.items():
            of = [by[m].get((name, task)) for m in MILESTONES]
            if name in methods and all(of):
                _line(ax, MILESTONES, [b for b in of if b], style | {"label": methods[name].label})
        ax.set_xscale("log")
        ax.set_ylim(-3, 103)
        strip(ax)
        ax.set_xticks(MILESTONES, [str(m) for m in MILESTONES])
        ax.minorticks_off()
    figure.supxlabel("evaluations of the world model (a backward pass counts two)", fontsize=9)
    figure.supylabel("instances solved, %", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _line(ax: Axes, x: Sequence[float], of: Sequence[str], style: dict[str, Any]) -> None:
    values = [100 * b.count("1") / len(b) for b in of]
    ends = [wilson(b.count("1"), len(b)) for b in of]
    ax.plot(x, values, ms=4, lw=1.4, **style)
    low, high = ([100 * e[i] for e in ends] for i in (0, 1))
    ax.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def seconds_figure(
    rows: Sequence[Row], methods: Mapping[str, Method], timing: Mapping[str, Any]
) -> Figure:
    """Mean success over tasks against the seconds of one plan, at 0 and 2 ms per evaluation."""
    main = [row for row in rows if row["stage"] == "main"]
    by = {m: collect(main, m) for m in MILESTONES}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = ("measured here, one thread", "modelled, 2 ms per evaluation")
    for ax, extra, title in zip(figure.subplots(1, 2, sharey=True), (0, 2e-3), titles, strict=True):
        ax.axvspan(0.5, 1e3, color=GREY, alpha=0.12, lw=0)
        for name, style in STYLES.items():
            if name not in methods or name not in timing:
                continue
            t = timing[name]
            world = t["world_s"] / t["used"] if extra else 0.0  # per evaluation, taken out
            x = [t["at"][str(m)] + min(m, t["used"]) * (extra - world) for m in MILESTONES]
            y = [100 * mean_rate(by[m], name) for m in MILESTONES]
            ax.plot(x, y, ms=4, lw=1.4, label=methods[name].label, **style)
        ax.set_xscale("log")
        ax.set_xlim(1e-3, 3)
        ax.set_ylim(-3, 103)
        ax.set_title(title, fontsize=10, loc="left")
        strip(ax)
    figure.supxlabel("seconds of one plan; grey: more than the planner's half second", fontsize=9)
    figure.supylabel("solved, %, mean over six tasks", fontsize=9)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure
