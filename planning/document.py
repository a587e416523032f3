"""Turn results into the tables and figures of docs/PLANNING.md.

Shares come with 95 % Wilson intervals, comparisons are paired by instance (exact McNemar test).
A table stands in the document between `<!-- begin NAME -->` and `<!-- end NAME -->`; whatever is
between is replaced.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, strip
from planning.benchmark import BUDGET, MILESTONES, Row, read_rows
from planning.methods import COST, GOAL, PRIOR, Method
from planning.tasks import TASKS
from trainlib.errors import say
from trainlib.tables import markdown_table

DOCUMENT = Path(__file__).parents[1] / "docs" / "PLANNING.md"
LATENCIES_MS = (0, 2, 53)  # per evaluation: none, V-JEPA-2-AC, DINO-WM
RIVALS = ("adam_raw", "cem_raw", "cem_ramp", "true_adam")
STYLES: dict[str, dict[str, Any]] = {
    "shoot_true": {"color": GREY, "marker": "o", "ls": "--"},
    "adam_raw": {"color": ORANGE, "marker": "s"},
    "cem_raw": {"color": PINK, "marker": "^"},
    "cem_ramp": {"color": VERMILION, "marker": "v"},
    "true_adam": {"color": "black", "marker": "D", "ls": "--"},
    "ddim_select": {"color": SKY, "marker": "o"},
    "ddim_adam": {"color": BLUE, "marker": "D"},
    "diffusion_es": {"color": BLUE, "marker": "P", "ls": ":"},
    "cfg_ddim_adam": {"color": GREEN, "marker": "*"},
    "regress_ends_adam": {"color": "black", "marker": "x", "ls": ":"},
}
Bits = dict[tuple[str, str], str]  # (method, task) → "0110…", instances in the order of the seeds


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); (0, 1) without trials."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(a: str, b: str) -> tuple[int, int, float]:
    """Compare paired outcomes "0110…" of equal length: wins of a, of b, exact two-sided p."""
    wins = sum(x == "1" and y == "0" for x, y in zip(a, b, strict=True))
    losses = sum(x == "0" and y == "1" for x, y in zip(a, b, strict=True))
    n, k = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return wins, losses, min(1.0, 2 * tail)


def collect(rows: Sequence[Row], milestone: int, **match: Any) -> Bits:
    """Join the outcomes of the rows that match, by method and task, in the order of the seeds."""
    bits: Bits = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if all(row[k] == v for k, v in match.items()):
            reached = max(int(m) for m in row["solved"] if int(m) <= milestone)
            key = (row["method"], row["task"])
            bits[key] = bits.get(key, "") + row["solved"][str(reached)]
    return bits


def share(bits: str) -> str:
    """Return a share in percent with its interval."""
    low, high = wilson(bits.count("1"), len(bits))
    return f"{100 * bits.count('1') / len(bits):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def in_groups(
    methods: Mapping[str, Method], bits: Bits, cells: Callable[[str], list[str]], width: int
) -> list[list[str]]:
    """Return a row of cells per method that has results, under a row per information class."""
    rows = []
    for group in (COST, PRIOR, GOAL):
        names = [n for n, m in methods.items() if m.group == group and any(k[0] == n for k in bits)]
        rows += [[f"*{group}*"] + [""] * width] if names else []
        rows += [[methods[name].label, *cells(name)] for name in names]
    return rows


def success_table(
    rows: Sequence[Row], methods: Mapping[str, Method], milestone: int = BUDGET, **match: Any
) -> str:
    """Success after all evaluations of the rows that match, by task."""
    bits = collect(rows, milestone, **match)
    tasks = [t for t in TASKS if any(k[1] == t for k in bits)]

    def cells(name: str) -> list[str]:
        of = [bits.get((name, task), "") for task in tasks]
        return [share(b) if b else "" for b in of] + [str(max(map(len, of)))]

    return markdown_table(
        ["method", *tasks, "n per task"], in_groups(methods, bits, cells, len(tasks) + 1)
    )


def mean_rate(bits: Bits, name: str) -> float:
    """Return the success of a method, averaged over its tasks."""
    return float(np.mean([b.count("1") / len(b) for (n, _), b in bits.items() if n == name]))


def account_table(
    rows: Sequence[Row], methods: Mapping[str, Method], timing: Mapping[str, Any]
) -> str:
    """Success by evaluations, costs, plausibility, seconds and modelled latency."""
    main = [row for row in rows if row["stage"] == "main"]
    by = {m: collect(main, m) for m in MILESTONES}

    def cells(name: str) -> list[str]:
        own = [row for row in main if row["method"] == name]
        line = [f"{100 * mean_rate(by[m], name):.0f}" for m in MILESTONES]
        line += [f"{np.mean([r[k] for r in own]):.2f}" for k in ("model_cost", "true_cost")]
        line += [f"{100 * np.mean([r['valid'] for r in own]):.0f}"]
        if name not in timing:
            return line + [""] * (1 + len(LATENCIES_MS))
        t = timing[name]
        planner_s = t["total_s"] - t["world_s"]
        waits = [planner_s + t["used"] * ms / 1000 for ms in LATENCIES_MS]
        return [*line, f"{t['total_s']:.2f}", *(f"{w:.2f}" for w in waits)]

    head = ["method", *(f"% at {m}" for m in MILESTONES), "model cost", "true cost", "valid %"]
    head += ["s here", *(f"s at {ms} ms" for ms in LATENCIES_MS)]
    return markdown_table(head, in_groups(methods, by[BUDGET], cells, len(head) - 1))


def pairs_table(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """The best diffusion methods against each rival, task by task, and the check of the model."""
    bits = collect(rows, BUDGET, stage="main")
    pairs = [("ddim_select", "shoot_true")]
    pairs += [(a, r) for a in ("ddim_adam", "diffusion_es_adam") for r in RIVALS]
    pairs += [("cfg_ddim_adam", r) for r in ("cem_ramp", "regress_ends_adam")]
    lines = []
    for a, b in pairs:
        for task in TASKS:
            if (a, task) in bits and (b, task) in bits:
                lines.append(_pair(methods, bits, (a, b), task))
    head = ["", "against", "task", "first", "second", "only first", "only second", "p", "apart"]
    return markdown_table(head, lines)


def _pair(
    methods: Mapping[str, Method], bits: Bits, names: tuple[str, str], task: str
) -> list[str]:
    a, b = (bits[name, task] for name in names)
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    wins, losses, p = mcnemar(a, b)
    low_a, high_a = wilson(a.count("1"), n)
    low_b, high_b = wilson(b.count("1"), n)
    apart = "wins" if low_a > high_b else "loses" if low_b > high_a else "no"
    labels = [methods[name].label for name in names]
    return [*labels, task, share(a), share(b), str(wins), str(losses), f"{p:.2g}", apart]


def read_timing(folder: Path) -> dict[str, Any]:
    """Return the seconds of each method that was timed."""
    path = folder / "timing.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def tables(folder: Path, methods: Mapping[str, Method]) -> dict[str, str]:
    """Return every table by its name in the document."""
    rows, timing = read_rows(folder / "results.jsonl"), read_timing(folder)
    made = {
        "success": success_table(rows, methods, stage="main"),
        "account": account_table(rows, methods, timing),
        "pairs": pairs_table(rows, methods),
    }
    for budget in sorted({row["budget"] for row in rows if row["stage"] == "long"}):
        made[f"long_{budget}"] = success_table(rows, methods, budget, stage="long", budget=budget)
    for tau in sorted({row["variant"] for row in rows if row["stage"] == "temperature"}):
        match = {"stage": "temperature", "variant": tau}
        made[f"temperature_{tau}"] = success_table(rows, methods, **match)
    learned = [row for row in rows if row["stage"] == "surrogate"]
    if learned:
        made["surrogate"] = surrogate_table(learned, methods)
    return made


def surrogate_table(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Success with the learned world model, and what it promised against what came."""
    bits = collect(rows, BUDGET)
    tasks = [t for t in TASKS if any(k[1] == t for k in bits)]

    def cells(name: str) -> list[str]:
        own = [row for row in rows if row["method"] == name]
        costs = [float(np.mean([r[k] for r in own])) for k in ("model_cost", "true_cost")]
        return [share(bits[name, t]) if (name, t) in bits else "" for t in tasks] + [
            f"{costs[0]:.2f}", f"{costs[1]:.2f}", f"{costs[1] - costs[0]:.2f}",
        ]  # fmt: skip

    head = ["method", *tasks, "model cost", "true cost", "gap"]
    return markdown_table(head, in_groups(methods, bits, cells, len(head) - 1))


# ----------------------------------------------------------------------------------------
# FIGURES
# ----------------------------------------------------------------------------------------


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
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def summary(folder: Path, methods: Mapping[str, Method]) -> str:
    """Return what the command prints at the end."""
    made = tables(folder, methods)
    return f"Solved, % [95 % interval]:\n{made['success']}\n\nresults in {folder}"


def write(folder: Path, methods: Mapping[str, Method], path: Path = DOCUMENT) -> None:
    """Replace the tables in the document and draw its figures beside the results."""
    text = path.read_text("utf-8")
    for name, table in tables(folder, methods).items():
        if f"<!-- begin {name} -->" not in text:
            say(f"note: {path} has no place for the table {name}")
        between = rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)"
        text = re.sub(between, f"\n{table}\n\n".replace("\\", r"\\"), text, flags=re.DOTALL)
    path.write_text(text, "utf-8")
    rows, timing = read_rows(folder / "results.jsonl"), read_timing(folder)
    for name, figure in (
        ("success_by_evaluations", evaluations_figure(rows, methods)),
        ("success_by_seconds", seconds_figure(rows, methods, timing)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=130)
