"""frontier: model size against quality and latency, as `python -m benchmarks.frontier` measured."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.criteria import PLAN_LINES, lines_met
from evaluation.estimates import Estimate, Table, columns_of
from evaluation.figures import (
    BLUE,
    PLAN_GOALS,
    SHARE,
    VALID_GOAL,
    Curve,
    Panel,
    draw_panel,
    new_figure,
)
from evaluation.protocol import Picture, Section, Subject
from trainlib.errors import UserError, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONTIER = Path(__file__).parents[2] / "benchmarks" / "results" / "frontier.json"


def run(s: Subject) -> list[Section]:
    """Read the sweep over model sizes, if it is there; it is of straight gestures."""
    if s.prior is None:
        return []
    table = read_frontier(FRONTIER)
    if not table:
        say("note: no benchmarks/results/frontier.json; no figure of the frontier")
        return []
    caption = "What a larger model brings, and costs."
    pictures = [Picture("frontier.png", caption, draw_frontier, table)]
    text = "Networks of several sizes, trained alike; measured by a command of its own."
    title = "By size: quality and latency"
    return [Section("frontier", table, title, text, pictures=pictures)]


def read_frontier(path: Path) -> Table | None:
    """Read the sweep over model sizes; None without the file.

    The file is a JSON list; each model is an object

        name        what stands beside its point
        options     flags of the trainer
        parameters  their number
        keyframes   metric of the plan -> value
        r           sigma, as a string -> R of the denoise protocol
        one_press, valid    of unconditional samples, in [0, 1]
        latency_ms  of one sample at batch 1

    Returns:
        Per setting, a name: parameters, latency_ms, valid, one_press, the metrics of keyframes,
        r_{sigma}.

    Raises:
        UserError: the file is not of this form.
    """
    if not path.exists():
        return None
    table: Table = {}
    try:
        for model in json.loads(path.read_text("utf-8")):
            names = ("parameters", "latency_ms", "valid", "one_press")
            row = {name: model[name] for name in names} | model["keyframes"]
            row |= {f"r_{sigma}": value for sigma, value in model["r"].items()}
            table[model["name"]] = {k: Estimate(float(v), None, 1) for k, v in row.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{path} is no list of measured models ({reason}); measure again") from None
    return table


FRONTIER_PANELS = {
    "mse": Panel("keyframes: mean squared error", goals=PLAN_GOALS["mse"], log=True),
    "r_0.4": Panel("denoise at 0.4: error / least possible", limits=[(1, "limit")], log=True),
    "valid": Panel("generate: share of valid gestures", goals=VALID_GOAL, ylim=SHARE),
    "latency_ms": Panel("time for one sample, ms", log=True),
}


def draw_frontier(table: Table) -> "Figure":
    """Draw quality and latency against the number of parameters, a point per model.

    Args:
        table: of `read_frontier`.
    """
    panels = {k: p for k, p in FRONTIER_PANELS.items() if all(k in row for row in table.values())}
    figure = new_figure(5 * len(panels), 5)
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
    enough = [
        row["parameters"].value for row in table.values() if len(lines_met(row)) == len(PLAN_LINES)
    ]
    answer = f"{min(enough):,.0f} parameters reach" if enough else "none of these reaches"
    figure.suptitle(f"How large must the model be?  {answer} the plan's optimal line", fontsize=13)
    return figure
