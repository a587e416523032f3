"""Turn results into the numbers of docs/PLANNING.md and of the README's planning section.

Shares come with 95 % Wilson intervals, comparisons are paired by instance (exact McNemar test).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from planning.benchmark import BUDGET, MILESTONES, STAGES, Row, read_rows
from planning.course_methods import course_methods
from planning.diffusion import DiffusionPrior
from planning.learned import GRADIENT, RECIPES, SELECT, TRUST, accuracy_table, advice
from planning.loop import MODES, NEW_GOAL
from planning.methods import COST, GOAL, PRIOR, Method, cost_methods, goal_methods, prior_methods
from planning.shipped import SHIPPED
from planning.tasks import TASKS
from train_diffusion_ddim import DDIMScheduler
from trainlib.errors import first_line, say
from trainlib.files import write_whole
from trainlib.provenance import ROOT
from trainlib.tables import fill_document, format_number, markdown_table

DOCUMENTS = (ROOT / "docs" / "PLANNING.md", ROOT / "README.md")
LATENCIES_MS = (0, 2, 53)  # per evaluation: none, V-JEPA-2-AC, DINO-WM
RIVALS = ("adam_raw", "cem_raw", "cem_ramp", "true_adam")
PLANNER = "planner"  # as it is shipped, see shipped.py
HEADLINE = (
    PLANNER, "planner_cost", "changes_adam", "regress_jitter_adam", "cfg_ddim_64_adam",
    "cfg_ddim_adam",
    "regress_ends_adam", "ddim_adam", "diffusion_es", "true_adam", "ddim_select", "shoot_true",
    "cem_ramp", "ddim_guided", "cem_raw", "adam_raw",
)  # fmt: skip
ANSWER = (PLANNER, "changes_adam", "cfg_ddim_64_adam", "ddim_adam", "cem_ramp", "adam_raw")
ANSWER_ON_COURSES = ("people_places", "human_places", "line_places", "knots_adam")
PAIR_HEAD = ("", "against", "task", "first", "second", "only first", "only second", "p", "apart")
GRADIENT_WAYS = (  # the same draws: chosen from; refined near; refined; refined, a second chooses
    ("changes", "changes_trust", "changes_adam", "changes_second"),
    ("ddim_select", "ddim_trust", "ddim_adam", "ddim_second"),
    ("regress_jitter", "regress_jitter_trust", "regress_jitter_adam", "regress_jitter_second"),
)
NOBODY = DiffusionPrior(nn.Identity(), DDIMScheduler(), {})  # for the labels of methods
EXACT, COURSES = "exact simulator", "courses"
BEST_MODELS = ("objects_240k", "tokens_60k")  # of each kind
NOT_YET = "*Not measured yet.*"
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
        reached = [int(m) for m in row["solved"] if int(m) <= milestone]
        if reached and all(row[k] == v for k, v in match.items()):
            key = (row["method"], row["task"])
            bits[key] = bits.get(key, "") + row["solved"][str(max(reached))]
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


def headline_table(
    rows: Sequence[Row], methods: Mapping[str, Method], timing: Mapping[str, Any]
) -> str:
    """Success of the methods that the verdict names, best first, and the seconds of one plan."""
    bits = collect(rows, BUDGET, stage="main")
    names = [name for name in HEADLINE if name in methods and (name, "scroll") in bits]
    lines = []
    for name in sorted(names, key=lambda name: -mean_rate(bits, name)):
        rates = [bits[name, task] for task in TASKS]
        line = [methods[name].label, methods[name].group, percent(mean_rate(bits, name))]
        line += [percent(rate.count("1") / len(rate)) for rate in rates]
        lines.append([*line, *seconds_cells(timing, name)[:3]])
    head = ["method", "knows", "all, %", *TASKS, "s here", "s at 0 ms", "s at 2 ms"]
    return markdown_table(head, lines)


def percent(rate: float) -> str:
    """Return a share as whole percent."""
    return f"{100 * rate:.0f}"


def seconds_cells(timing: Mapping[str, Any], name: str) -> list[str]:
    """Return the seconds of one plan, as measured and at each of LATENCIES_MS an evaluation."""
    if name not in timing:
        return [""] * (1 + len(LATENCIES_MS))
    t = timing[name]
    waits = [t["total_s"] - t["world_s"] + t["used"] * ms / 1000 for ms in LATENCIES_MS]
    return [f"{s:.2f}" for s in (t["total_s"], *waits)]


def budget_table(
    rows: Sequence[Row], methods: Mapping[str, Method], timing: Mapping[str, Any]
) -> str:
    """Success by evaluations, costs, plausibility, seconds and modelled latency."""
    main = [row for row in rows if row["stage"] == "main"]
    by = {m: collect(main, m) for m in MILESTONES}

    def cells(name: str) -> list[str]:
        own = [row for row in main if row["method"] == name]
        line = [percent(mean_rate(by[m], name)) for m in MILESTONES]
        line += [f"{np.mean([r[k] for r in own]):.2f}" for k in ("model_cost", "true_cost")]
        line += [percent(float(np.mean([r["valid"] for r in own])))]
        return line + seconds_cells(timing, name)

    head = ["method", *(f"% at {m}" for m in MILESTONES), "model cost", "true cost", "valid %"]
    head += ["s here", *(f"s at {ms} ms" for ms in LATENCIES_MS)]
    return markdown_table(head, in_groups(methods, by[MILESTONES[0]], cells, len(head) - 1))


def pairs_table(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """The best diffusion methods against each rival, task by task, and the check of the model."""
    bits = collect(rows, BUDGET, stage="main")
    pairs = [("ddim_select", "shoot_true")]
    pairs += [(a, r) for a in ("ddim_adam", "diffusion_es_adam") for r in RIVALS]
    pairs += [("cfg_ddim_adam", r) for r in ("cem_ramp", "regress_ends_adam")]
    pairs += [("cfg_ddim_64_adam", "regress_jitter_adam")]
    lines = []
    for a, b in pairs:
        for task in TASKS:
            if (a, task) in bits and (b, task) in bits:
                lines.append(_pair(methods, bits, (a, b), task))
    return markdown_table(PAIR_HEAD, lines)


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


def base_rate_table(rates: Mapping[str, Any]) -> str:
    """How many gestures of the generator solve an instance by chance."""
    shares = [f"{format_number(100 * rates['rates'][task])} %" for task in TASKS]
    table = markdown_table(["", *TASKS], [["solved by chance", *shares]])
    return f"Of {rates['gestures']:,} gestures of the true generator:\n\n{table}"


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def made_by(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Say how and where the results were made."""
    main = [row for row in rows if row["stage"] == "main"]
    machine, seeds = about["machine"], len({row["seed"] for row in main})
    return (
        f"{seeds} seeds of {main[0]['instances']} instances, {about['date'][:10]}, "
        f"{machine['platform']}, {machine['cpu_count']} cores, {machine['threads']} thread, "
        f"torch {machine['torch']}; the last run was `{about['command']}` at commit "
        f"`{str(about['commit'])[:7]}`."
    )


def goal_seconds(seconds: Mapping[str, float]) -> str:
    """Say how long `python -m planning.goals` took."""
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    return f"Training with goals took {sum(seconds.values()):.0f} s on one thread: {parts}."


def answer(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Say in two sentences how many instances the methods of the README's verdict solve."""
    bits = collect(rows, BUDGET, stage="main")
    named = [f"{methods[name].label} {percent(mean_rate(bits, name))} %" for name in ANSWER]
    said = f"Of all tasks, {BUDGET} evaluations of the world model solve: {'; '.join(named)}."
    bits, methods = collect(rows, BUDGET, stage="courses"), courses_of_nobody()
    named = [
        f"{methods[name].label} {percent(mean_rate(bits, name))} %"
        for name in ANSWER_ON_COURSES
        if everything(bits, name)
    ]
    return f"{said} Of the courses: {'; '.join(named)}." if named else said


def every_method() -> dict[str, Method]:
    """Return all methods on the tasks, for their labels, whatever is trained here."""
    untrained: Any = None
    trained = prior_methods(NOBODY) | goal_methods(untrained)
    return SHIPPED | cost_methods() | trained


def courses_of_nobody() -> dict[str, Method]:
    """Return the methods on the courses, for their labels."""
    return course_methods(NOBODY, lambda: torch.empty(0))


def blocks(folder: Path, methods: Mapping[str, Method]) -> dict[str, str]:
    """Return every block by its name in the documents."""
    rows, timing = read_rows(folder / "results.jsonl"), read_json(folder / "timing.json")
    made = {
        "headline": headline_table(rows, methods, timing),
        "success": success_table(rows, methods, stage="main"),
        "budget": budget_table(rows, methods, timing),
        "pairs": pairs_table(rows, methods),
        "answer": answer(rows, methods),
    }
    if about := read_json(folder / "about.json"):
        made["made_by"] = made_by(about, rows)
    if seconds := read_json(folder / "goals_seconds.json"):
        made["goal_seconds"] = goal_seconds(seconds)
    if rates := read_json(folder / "base_rates.json"):
        made["base_rates"] = base_rate_table(rates)
    if any(row["stage"] == "batched" for row in rows):
        made["batched"] = success_table(rows, methods, stage="batched")
    for budget in sorted({row["budget"] for row in rows if row["stage"] == "long"}):
        made[f"long_{budget}"] = success_table(rows, methods, budget, stage="long", budget=budget)
    for tau in sorted({row["variant"] for row in rows if row["stage"] == "temperature"}):
        match = {"stage": "temperature", "variant": tau}
        made[f"temperature_{tau}"] = success_table(rows, methods, **match)
    return made | new_blocks(rows, read_json(folder / "accuracy.json"), methods)


def new_blocks(
    rows: Sequence[Row], measured: Mapping[str, Any], methods: Mapping[str, Method]
) -> dict[str, str]:
    """Return the blocks whose places wait for their stages."""
    made = dict.fromkeys(("accuracy", "gradients", "learned", "courses", "loop"), NOT_YET)
    courses = courses_of_nobody()
    of = {stage: [row for row in rows if row["stage"] == stage] for stage in STAGES}
    if measured:
        made["accuracy"] = accuracy_table(measured)
    if measured and of["learned"]:
        made["gradients"] = gradients_table(of["learned"], measured, methods)
    if of["learned"]:
        made["learned"] = learned_tables(of["learned"], methods)
    if of["courses"]:
        made["courses"] = courses_table(of["courses"], courses)
    if of["loop"]:
        made["loop"] = loop_table(of["loop"])
    arenas = arenas_of(rows)
    made["arenas"] = arenas_table(arenas, {**methods, **courses})
    made["shipped"] = shipped_table(arenas, methods) if PLANNER in methods else NOT_YET
    made["verdict"] = verdict(arenas, {**methods, **courses})
    return made


# ----------------------------------------------------------------------------------------
# THE FIRST SCREEN — a verdict and a table, over all arenas
# ----------------------------------------------------------------------------------------


def arenas_of(rows: Sequence[Row]) -> dict[str, Bits]:
    """Return the outcomes by arena: the simulator, each learned world model, the courses."""
    arenas = {EXACT: collect(rows, BUDGET, stage="main")}
    arenas[f"{EXACT}, 32 at a time"] = collect(rows, BUDGET, stage="batched")
    for name, recipe in RECIPES.items():
        arenas[recipe.label] = collect(rows, BUDGET, stage="learned", variant=name)
    arenas[COURSES] = collect(rows, BUDGET, stage="courses")
    return {name: bits for name, bits in arenas.items() if bits}


def best_of(bits: Bits, names: Iterable[str]) -> str | None:
    """Return the method of some that solves most; None if none of them has results."""
    found = {name for name, _ in bits}
    return max((n for n in names if n in found), key=lambda n: mean_rate(bits, n), default=None)


def everything(bits: Bits, name: str) -> str:
    """Join the outcomes of a method over its tasks."""
    return "".join(of for (n, _), of in sorted(bits.items()) if n == name)


def arenas_table(arenas: Mapping[str, Bits], methods: Mapping[str, Method]) -> str:
    """The best method of each information class in each arena, and what it solves of all tasks."""
    lines = []
    for arena, bits in arenas.items():
        line = [arena]
        for group in (COST, PRIOR, GOAL):
            best = best_of(bits, [n for n, m in methods.items() if m.group == group])
            line += [f"{methods[best].label}: {percent(mean_rate(bits, best))} %" if best else ""]
        lines.append([*line, str(max(map(len, bits.values())))])
    return markdown_table(["world model", COST, PRIOR, GOAL, "n per task"], lines)


def shipped_table(arenas: Mapping[str, Bits], methods: Mapping[str, Method]) -> str:
    """The planner as it is shipped against the best method of each class without a denoiser.

    Paired over all tasks by the exact McNemar test; the tasks where intervals are apart.
    """
    lines = []
    for arena, bits in arenas.items():
        if not everything(bits, PLANNER):
            continue
        tasks = sorted(task for name, task in bits if name == PLANNER)
        for group in (COST, GOAL):
            names = [n for n, m in methods.items() if m.group == group and not uses_denoiser(n, m)]
            rival = best_of(bits, [n for n in names if all((n, task) in bits for task in tasks)])
            if rival is None:
                continue
            n = min(len(bits[name, task]) for name in (PLANNER, rival) for task in tasks)
            pair = [[bits[name, task][:n] for task in tasks] for name in (PLANNER, rival)]
            p = mcnemar(*("".join(of) for of in pair))[2]
            ends = [[wilson(b.count("1"), n) for b in of] for of in pair]
            apart = [
                f"{'wins' if own[0] > other[1] else 'loses'} {task}"
                for task, own, other in zip(tasks, *ends, strict=True)
                if own[0] > other[1] or other[0] > own[1]
            ]
            rates = [percent("".join(of).count("1") / (n * len(tasks))) for of in pair]
            label = methods[rival].label
            lines.append(
                [arena, rates[0], label, group, rates[1], f"{p:.2g}", ", ".join(apart), str(n)]
            )
    head = ["world model", "Planner, %", "best rival without a denoiser", "knows", "%", "p"]
    return markdown_table([*head, "apart", "n per task"], lines)


def verdict(arenas: Mapping[str, Bits], methods: Mapping[str, Method]) -> str:
    """Say in short sentences where methods with a denoiser beat those without, and where not.

    On the simulator, the best network of each kind and the courses. The planner stands for those
    with a denoiser where it ran; those trained on goals are held against each other alone.
    """
    said = []
    for arena in (EXACT, *(RECIPES[name].label for name in BEST_MODELS), COURSES):
        bits = arenas.get(arena, {})
        for knows, groups in (("without goals", (COST, PRIOR)), ("given goals", (GOAL,))):
            known = {name: method for name, method in methods.items() if method.group in groups}
            ours = [name for name, m in known.items() if uses_denoiser(name, m)]
            has_planner = PLANNER in ours and everything(bits, PLANNER)
            a = PLANNER if has_planner else best_of(bits, ours)
            b = best_of(bits, [name for name, m in known.items() if not uses_denoiser(name, m)])
            if a and b and len(everything(bits, a)) == len(everything(bits, b)):
                said.append(f"{arena}, {knows}: {_compared(bits, methods, a, b)}")
    missing = [] if any(r.label in arenas for r in RECIPES.values()) else ["learned world models"]
    missing += [] if COURSES in arenas else ["courses"]
    said += [f"not measured yet: {', '.join(missing)}."] if missing else []
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _compared(bits: Bits, methods: Mapping[str, Method], a: str, b: str) -> str:
    """Say how method a, with a denoiser, does against b, without."""
    p = mcnemar(everything(bits, a), everything(bits, b))[2]
    rates = [mean_rate(bits, name) for name in (a, b)]
    how = "beats" if rates[0] > rates[1] else "loses to"
    labels = [methods[name].label for name in (a, b)]
    first, second = (f"{s} ({percent(r)} %)" for s, r in zip(labels, rates, strict=True))
    return f"{first} {how if p < 0.05 else 'equals, within noise,'} {second}, p = {p:.2g}."


def uses_denoiser(name: str, method: Method) -> bool:
    """Return whether a method asks a denoiser."""
    return method.group == PRIOR or name.startswith("cfg")


# ----------------------------------------------------------------------------------------
# COURSES AND LOOP
# ----------------------------------------------------------------------------------------


def courses_table(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Success on the courses, and how well the plans are told from people's gestures."""
    bits = collect(rows, BUDGET)
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def cells(name: str) -> list[str]:
        told = [row["auc"] for row in rows if row["method"] == name and row["auc"] is not None]
        line = [share(bits[name, t]) if (name, t) in bits else "" for t in tasks]
        line += [percent(mean_rate(bits, name)), f"{np.mean(told):.2f}" if told else ""]
        return [*line, str(max(len(b) for (n, _), b in bits.items() if n == name))]

    head = ["method", *tasks, "all, %", "told from people, AUC", "n per task"]
    return markdown_table(head, in_groups(methods, bits, cells, len(head) - 1))


def loop_table(rows: Sequence[Row]) -> str:
    """Success after each plan of the closed loop, and its time, cold and warm."""
    lines = []
    for row in rows:
        bits = row["solved"][str(row["budget"])]
        since = ["".join(bits[i] for i in range(k, len(bits), NEW_GOAL)) for k in range(NEW_GOAL)]
        of = {r["method"]: r["solved"][str(r["budget"])] for r in rows if r["task"] == row["task"]}
        whole = set(of) == set(MODES) and len({len(b) for b in of.values()}) == 1
        p = f"{mcnemar(of['warm'], of['cold'])[2]:.2g}" if whole else ""
        ms = [f"{row[name]:.0f}" for name in ("ms_median", "ms_95", "ms_most")]
        rates = [percent(b.count("1") / len(b)) for b in since]
        lines.append([row["task"], row["method"], share(bits), *rates, *ms, str(len(bits)), p])
    head = ["task", "start", "solved after a step", *(f"plan {k + 1}" for k in range(NEW_GOAL))]
    head += ["ms, median", "ms, 95 %", "ms, most", "steps", "p, warm against cold"]
    return markdown_table(head, lines)


def learned_tables(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Return a table per learned world model, under its name."""
    parts = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        parts.append(f"{RECIPES[name].label}:\n\n{learned_table(own, methods)}")
    return "\n\n".join(parts)


def gradients_table(
    rows: Sequence[Row], measured: Mapping[str, Any], methods: Mapping[str, Method]
) -> str:
    """What the rule advises on each learned world model, beside what each way came to.

    Success over all tasks; p of the exact McNemar test of "gradient" against "choose", and whether
    the rule named the best way.
    """
    lines = []
    for model in [name for name in measured if any(row["variant"] == name for row in rows)]:
        bits = collect(rows, BUDGET, stage="learned", variant=model)
        rule = advice(measured[model]["r2"])
        for ways in GRADIENT_WAYS:
            of = [whole(bits, name) for name in ways]
            if not all(of[:3]):  # there may be no second network
                continue
            rates = [of_way.count("1") / len(of_way) for of_way in of if of_way]
            p = mcnemar(of[2], of[0])[2]
            at = (SELECT, TRUST, GRADIENT).index(rule)
            best = "yes" if rates[at] == max(rates[:3]) else "no"
            label = methods[ways[0]].label
            shown = [*map(percent, rates), ""][:4]
            lines.append([RECIPES[model].label, label, *shown, f"{p:.2g}", rule, best])
    head = ["world model", "draws", "choose", "Adam near", "Adam", "a second chooses", "p", "rule"]
    return markdown_table([*head, "was best"], lines)


def whole(bits: Bits, name: str) -> str:
    """Join the outcomes of a method over its tasks; empty without any."""
    return "".join(bits.get((name, task), "") for task in TASKS)


def learned_table(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Success with a learned world model, and what it promised against what came."""
    bits = collect(rows, BUDGET)
    tasks = [t for t in TASKS if any(k[1] == t for k in bits)]

    def cells(name: str) -> list[str]:
        own = [row for row in rows if row["method"] == name]
        costs = [float(np.mean([r[k] for r in own])) for k in ("model_cost", "true_cost")]
        return [share(bits[name, t]) if (name, t) in bits else "" for t in tasks] + [
            percent(mean_rate(bits, name)), f"{costs[0]:.2f}", f"{costs[1]:.2f}",
            str(len(bits[name, tasks[0]])),
        ]  # fmt: skip

    head = ["method", *tasks, "all, %", "model cost", "true cost", "n per task"]
    return markdown_table(head, in_groups(methods, bits, cells, len(head) - 1))


def summary(folder: Path, methods: Mapping[str, Method]) -> str:
    """Return what the command prints at the end: what is measured so far."""
    rows = read_rows(folder / "results.jsonl")
    made = new_blocks(rows, read_json(folder / "accuracy.json"), methods)
    if any(row["stage"] == "main" for row in rows):
        made = {"exact simulator": success_table(rows, methods, stage="main"), **made}
    parts = [f"{name}:\n{text}" for name, text in made.items() if text != NOT_YET]
    return "\n\n".join(["Solved, % [95 % interval]", *parts, f"results in {folder}"])


def write(
    folder: Path, methods: Mapping[str, Method], documents: Sequence[Path] = DOCUMENTS
) -> None:
    """Replace the blocks of the documents and draw the figures beside the results."""
    made = blocks(folder, methods)
    found = set[str]().union(*(fill_document(path, made) for path in documents))
    for name in sorted(set(made) - found):
        say(f"note: no document has a place for the block {name}")
    rows, timing = read_rows(folder / "results.jsonl"), read_json(folder / "timing.json")
    try:
        from planning import figures
    except Exception as e:  # the tables need no matplotlib, be it missing or broken
        say(f"warning: no figures: matplotlib cannot be used ({first_line(e)})", err=True)
        return
    for name, figure in (
        ("success_by_evaluations", figures.evaluations_figure(rows, methods)),
        ("success_by_seconds", figures.seconds_figure(rows, methods, timing)),
    ):
        content = BytesIO()
        figure.savefig(content, dpi=130)
        write_whole(folder / f"{name}.png", content.getvalue())
