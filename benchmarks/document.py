"""Write every measured number of README.md and docs/ from the committed result files.

    python -m benchmarks.document

A number stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; NAME is a key of `blocks`.
docs/BENCHMARKS.md is written whole (benchmarks/report.py); the numbers of planning are written by
`python -m planning --document`.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import ablations
from benchmarks.frontier import FRONTIER, describe
from benchmarks.human import HUMAN, shown
from benchmarks.measure import read_rows
from benchmarks.report import RESULTS, show, table
from benchmarks.report import main as write_benchmarks
from evaluation.baselines_record import read_baselines
from evaluation.bayes import DEFAULT_PRIOR
from evaluation.estimates import Estimate, Table, format_estimate, tables_from_json
from evaluation.samples import type_distribution
from train_diffusion_ddim import KNOWN_STRATEGIES, TrainConfig
from trainlib.errors import run_program
from trainlib.gestures import GESTURE_TYPES
from trainlib.provenance import ROOT
from trainlib.tables import fill_document, format_number, markdown_table

REPORTS = ROOT / "docs" / "reports"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# Label → name of a setting or a metric in results.json.
PLAN = {
    "MSE": "mse",
    "SNR, dB": "mean_snr_db",
    "temporal IoU": "temporal_iou",
    "spatial": "spatial_accuracy",
    "type": "gesture_type_accuracy",
}
VARIANCE = {"variance x": "variance_ratio_x", "y": "variance_ratio_y", "press": "variance_ratio_p"}
CONTROLS = {
    "nearest training gesture": "nearest_training_item",
    "training mean": "training_mean",
    "zeros": "zeros",
    "untrained model": "untrained_model",
    "random training gesture": "random_training_item",
    "*interpolation, the exact answer*": "interpolation",
}
MORE_CONTROLS = {
    "the known frames, zeros elsewhere": "given_frames_alone",
    "model, another gesture's frames": "shuffled_condition",
}
DENOISE = {"MSE": "mse_one_shot", "MMSE": "mse_mmse", "R": "r", "R_10": "r_ddim"}
SIGMAS = {sigma: f"sigma_{sigma}" for sigma in ("0.05", "0.1", "0.2", "0.4", "0.7", "0.9")}
GENERATE = {
    "exactly one press": "one_press",
    "straight and even path": "straight_and_even",
    "5 to 75 frames": "duration_in_range",
    "valid by every factor": "valid",
    **{name: f"share_{name}" for name in GESTURE_TYPES[1:]},
    "error of the mean duration": "duration_bias",
    "farthest exact marginal, KS": "ks_max",
    "coverage": "coverage",
    "MMD²": "mmd2",
    "near copies of training gestures": "share_near_copies",
}
SAMPLES = {f"{n} steps": f"model_steps_{n}" for n in (10, 20, 50)} | {"real": "validation_data"}
REALISM = {
    "told from real ones by a classifier, AUC": "auc",
    "shake of swipes, thousandths of the screen": "shake_swipes",
    "deviation of swipes from their chord, median": "deviation",
    "... 90th percentile": "deviation_p90",
    "clicks that stay within a pixel": "still_clicks",
    "swipes that keep their axis to a pixel": "axis_swipes",
    "largest KS distance of a feature": "ks_max",
}
REALISM_BY = {
    "default, 10 steps": "model_steps_10",
    "50 steps": "model_steps_50",
    "recreated, 10 steps": "recreated",
    "`--preset gpu`, 10 steps": "best",
    "two pixels of jitter": "jittered_real",
    "real": "validation_data",
}
RECORDED = {
    "one answer given the press edges: MSE": ("keyframes", "mse"),
    "... share of places within 0.1": ("keyframes", "spatial_accuracy"),
    "the mean of 16 answers: MSE": ("infill_press_edges", "mse_of_mean"),
    "the 16 answers: energy score": ("infill_press_edges", "energy_score"),
    "invented: told from real ones, AUC": ("realism", "auc"),
    "... shake of swipes": ("realism", "shake_swipes"),
    "... largest KS distance of a feature": ("realism", "ks_max"),
}
RECORDED_BY = {
    "model": ("model", "model_steps_10"),
    "straight lines": ("interpolation", ""),
    "real, of the same people": ("", "validation_data"),
    "real, of others": ("", "other_users"),
}
TIMELINE = RECORDED | {
    f"going on after {n} frames: energy score": (f"continue_{n}", "energy_score") for n in (50, 125)
}
TIMELINE_BY = RECORDED_BY | {
    "holding the last position": ("hold_last_position", ""),
    "the 16 nearest training gestures": ("nearest_training_items", ""),
}
HUMAN_BY = {name: RECORDED_BY[name] for name in ("model", "straight lines")}
HUMAN_BY["real"] = ("", "validation_data")  # the generator has no other people
INFILL = {
    "valid": "valid",
    "MSE": "mse",
    "diversity / exact posterior's": "diversity_ratio",
    "KS of durations": "duration_ks",
}
INFILL_BY = {"model": "model", "exact posterior": "exact_posterior", "its mean": "exact_mean"}
INVERT = {  # label: (pattern of the setting, metric)
    "raw": ("model_raw_{}", "mse"),
    "dequantised": ("model_dequantised_{}", "mse"),
    "std of those latents": ("model_dequantised_{}", "latent_std"),
    "exact score, raw": ("exact_score_raw_{}", "mse"),
    "exact score, dequantised": ("exact_score_dequantised_{}", "mse"),
    "untrained model, raw": ("untrained_model_raw_{}", "mse"),
    "untrained model, dequantised": ("untrained_model_dequantised_{}", "mse"),
    "eps = 0 always, raw": ("zero_eps_raw_{}", "mse"),
    "DDIM paper, images": ("ddim_paper_{}", "mse"),
}
STEPS = {str(n): n for n in (10, 20, 50, 100, 200, 500, 1000)}
BASELINES = {
    "keyframes, MSE": ("keyframes/{}", "mse"),
    "keyframes, spatial": ("keyframes/{}", "spatial_accuracy"),
    "denoise at 0.1, MSE / MMSE": ("denoise_sigma_0.1/{}", "r"),
    "denoise at 0.9, MSE / MMSE": ("denoise_sigma_0.9/{}", "r"),
    "denoise at 0.9, valid": ("denoise_sigma_0.9/{}", "valid"),
    "touch-down only, MSE": ("infill/{}", "mse"),
    "touch-down only, valid": ("infill/{}", "valid"),
    "from nothing, valid": ("generate/{}", "valid"),
    "ms at batch 1": ("cost/{}", "batch_1_ms"),
}
BASELINES_BY = {"diffusion": "diffusion", "one evaluation of it": "diffusion_one_shot"}
BASELINES_BY |= {"regression": "regression", "limit": "limit"}
PLAN_50 = {**PLAN, **{f"denoise {s}": f"denoise_mse_sigma_{s}" for s in ("0.2", "0.4", "0.7")}}
SPEED = (  # what is asked: benchmark, row of its first table, column
    ("a step at the plan's size: 8 times faster", "training", "the same with --amp --compile"),
    ("... in float32", "training", "the same without dropout"),
    ("the default's step at its batch: 25 times", "training", "default recipe, plan's batch"),
    ("`sample()` over bare forward passes: 1.03", "sampling", "sample()"),
    ("... the same of diffusers", "sampling", "diffusers"),
    ("ms of one gesture on one thread: 10; `sample()`", "latency", "sample()"),
    ("... exported and compiled", "latency", "export, compiled"),
)
SPEED_COLUMN = {"training": "times faster", "sampling": "ratio", "latency": "ms"}


def read_report(name: str) -> dict[str, Any]:
    """Return a results.json; its protocols as tables of estimates."""
    report = json.loads((REPORTS / name / "results.json").read_text("utf-8"))
    return report | {"protocols": tables_from_json(report["protocols"])}


def one(source: Table, setting: str, metric: str, *, interval: bool = False) -> str:
    """Return one number of a table; a dash if it has none."""
    return format_estimate(source.get(setting, {}).get(metric), interval=interval)


def grid(
    source: Table,
    rows: Mapping[str, Any],
    columns: Mapping[str, Any],
    place: Callable[[Any, Any], tuple[str, str]] = lambda setting, metric: (setting, metric),
    *,
    corner: str = "",
    interval: bool = False,
) -> str:
    """Return a table; `place` maps what a row and a column stand for to setting and metric."""
    cells = [
        [label, *(one(source, *place(row, c), interval=interval) for c in columns.values())]
        for label, row in rows.items()
    ]
    return markdown_table([corner, *columns], cells)


def metric_first(metric: str, setting: str) -> tuple[str, str]:
    """Place a row of one metric."""
    return setting, metric


def by_pattern(row: tuple[str, str], value: Any) -> tuple[str, str]:
    """Place a row whose settings follow a pattern."""
    return row[0].format(value), row[1]


def training_time(name: str) -> str:
    """Return how long a run trained and on what, from its train.log and its report."""
    log = (REPORTS / name / "train.log").read_text("utf-8")
    epochs = re.findall(r"^epoch .* ([\d.]+)\+([\d.]+) s$", log, re.MULTILINE)
    minutes = sum(float(train) + float(val) for train, val in epochs) / 60
    about = read_report(name)["about"]
    machine, day = about["machine"], about["date"][:10]
    place = f"{machine['device']}, {machine['threads']} of {machine['cpu_count']} cores"
    return f"{minutes:.1f} minutes for {len(epochs)} epochs ({place}, {day})"


def train_log() -> str:
    """Return the lines of the default run that a reader waits for."""
    lines = (REPORTS / "default" / "train.log").read_text("utf-8").splitlines()
    epochs = [i for i, line in enumerate(lines) if line.startswith("epoch")]
    shown = [*lines[epochs[0] - 1 : epochs[0] + 1], "...", *lines[epochs[-1] : epochs[-1] + 6]]
    return "\n".join(["```", *shown, "```"])


def made_by(name: str) -> str:
    """Return what made a report."""
    about = read_report(name)["about"]
    machine, how = about["machine"], about["sampling"].items()
    commit, day = (about["commit"] or "unknown")[:7], about["date"][:10]
    return (
        f"{about['parameters']:,} parameters, {about['weights'].split(';')[0]} weights, "
        f"{about['validation_sequences']:,} gestures; {', '.join(f'{k} {v}' for k, v in how)}.\n"
        f"`{about['command']}`, commit {commit}, {day},\n"
        f"{machine['platform']}, {machine['threads']} thread, Python {machine['python']}, "
        f"torch {machine['torch']}: {about['wall_s']:.0f} s."
    )


def criteria(name: str) -> str:
    """Count the verdicts of a report."""
    verdicts = Counter(v["verdict"] for v in read_report(name)["verdicts"])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"Of {verdicts.total()} lines: {counts}."


def recipes() -> str:
    """Compare the two recipes with the limit."""
    reports = [read_report(name) for name in ("default", "best")]
    exact = [1.0, *type_distribution(DEFAULT_PRIOR)[1:]]
    rows = [["parameters", *(f"{r['about']['parameters']:,}" for r in reports), ""]]
    protocols = [r["protocols"] for r in reports]
    for sigma in ("0.1", "0.4"):
        found = [one(p["denoise"], SIGMAS[sigma], "r") for p in protocols]
        rows.append([f"error / Bayes optimum, noise sigma {sigma}", *found, "1"])
    for metric, limit in zip(("valid", *GESTURE_TYPES[1:]), exact, strict=True):
        key = metric if metric == "valid" else f"share_{metric}"
        found = [one(p["generate"], SAMPLES["10 steps"], key) for p in protocols]
        rows.append([f"drawn from noise: {metric}", *found, format_number(float(limit))])
    return markdown_table(["", "default", "`--preset gpu`", "limit"], rows)


def realism() -> str:
    """Return what tells generated gestures from real ones."""
    default, best = (read_report(name)["protocols"] for name in ("default", "best"))
    others = {"recreated": default["realism_recreated"], "best": best["realism"]}
    rows = {name: table["model_steps_10"] for name, table in others.items()}
    return grid(default["realism"] | rows, REALISM, REALISM_BY, metric_first)


def recorded(
    name: str,
    columns: Mapping[str, tuple[str, str]],
    rows: Mapping[str, tuple[str, str]] = RECORDED,
) -> str:
    """Return what the default recipe makes of gestures that people made, or nearly so."""
    tables = read_report(name)["protocols"]
    cells = []
    for words, (protocol, metric) in rows.items():
        settings = (pair[protocol == "realism"] for pair in columns.values())
        cells.append([words, *(one(tables[protocol], s, metric, interval=True) for s in settings)])
    return markdown_table(["", *columns], cells)


def speed() -> str:
    """Return what is asked of speed beside what was measured."""
    rows = []
    for asked, name, wanted in SPEED:
        (path,) = RESULTS.glob(f"{name}-*cpu.json")
        measured = json.loads(path.read_text("utf-8"))["tables"][0]["rows"]
        row, column = next(r for r in measured if r[""] == wanted), SPEED_COLUMN[name]
        spread = [row["ms min"], row["ms max"]] if column == "ms" else row["quartiles"]
        rows.append([asked, show(row[column]), show(spread)])
    return markdown_table(["asked", "measured", "quartiles, or range"], rows)


def baselines() -> Table:
    """Return the scores of regression, of the VAEs and of the default beside them."""
    tables = read_baselines(REPORTS / "default" / "baselines.json")["protocols"]
    return {f"{name}/{m}": row for name, rows in tables.items() for m, row in rows.items()}


def reported_blocks() -> dict[str, str]:
    """Return what comes from the reports of both recipes."""
    default, best = (read_report(name)["protocols"] for name in ("default", "best"))
    models = {"default": default["keyframes"]["model"], "gpu": best["keyframes"]["model"]}
    recipes = {"**the default**": "default", "**`--preset gpu`**": "gpu"}
    final = json.loads((REPORTS / "plan_50_epochs.json").read_text("utf-8"))["final"]
    plan_50 = {"": {k.removeprefix("final/"): Estimate(v, None, 1000) for k, v in final.items()}}
    made = {
        "recreated": grid(models | default["keyframes"], recipes | CONTROLS, PLAN),
        "controls": grid(default["keyframes"], CONTROLS | MORE_CONTROLS, PLAN | VARIANCE),
        "keyframes": grid(models, PLAN | VARIANCE, recipes, metric_first, interval=True),
        "infill": grid(default["infill"], INFILL, INFILL_BY, metric_first, interval=True),
        "invert": grid(default["invert"], INVERT, STEPS, by_pattern, corner="steps"),
        "baselines": grid(baselines(), BASELINES, BASELINES_BY, by_pattern),
        "plan_50": grid(plan_50, {"": ""}, PLAN_50),
    }
    for name, tables in (("default", default), ("gpu", best)):
        denoise, generate = tables["denoise"], tables["generate"]
        made[f"denoise_{name}"] = grid(denoise, SIGMAS, DENOISE, corner="sigma", interval=True)
        made[f"generate_{name}"] = grid(generate, GENERATE, SAMPLES, metric_first, interval=True)
    for name in ("zeros", "training_mean", "random_training_item"):
        made[f"mse_{name}"] = one(default["keyframes"], name, "mse")
    for sigma in ("0.2", "0.4", "0.7"):
        made[f"mmse_{sigma}"] = one(default["denoise"], SIGMAS[sigma], "mse_mmse")
    decibel = 10 * math.log10(0.4**2 / default["denoise"]["sigma_0.4"]["mse_mmse"].value)
    return made | {"noise_reduction_limit": format_number(decibel)}


def blocks() -> dict[str, str]:
    """Return all that is written, by name."""
    shares = zip(GESTURE_TYPES, type_distribution(DEFAULT_PRIOR), strict=True)
    made = {f"share_{name}": format_number(float(share)) for name, share in shares}
    made["known_share"] = f"{TrainConfig().known_share:.0%}"
    made |= {f"strategy_{name}": f"{share:.0%}" for name, (_, share) in KNOWN_STRATEGIES.items()}
    for name, report in (("default", "default"), ("gpu", "best")):
        made[f"time_{name}"] = training_time(report)
        made[f"made_by_{name}"] = made_by(report)
        made[f"criteria_{name}"] = criteria(report)
    others = {
        "ablations": ablations.shown(ablations.SHORT),
        "ablations_full": ablations.shown(ablations.FULL),
        "train_log": train_log(),
        "recipes": recipes(),
        "speed": speed(),
    }
    others |= {"realism": realism(), "made_by_games": made_by("games")}
    others |= {"recorded": recorded("games", RECORDED_BY), "made_by_human": made_by("human")}
    others["human_like"] = recorded("human", HUMAN_BY)
    others |= {"timeline": recorded("timeline", TIMELINE_BY, TIMELINE)}
    others["made_by_timeline"] = made_by("timeline")
    others["human_gestures"] = shown(json.loads(HUMAN.read_text("utf-8")))
    others["frontier"] = table([describe(row) for row in read_rows(FRONTIER)])
    return made | others | reported_blocks()


def main() -> None:
    """Write docs/BENCHMARKS.md, and fill in all documents."""
    write_benchmarks()
    made = blocks()
    for path in DOCUMENTS:
        fill_document(path, made)


if __name__ == "__main__":
    sys.exit(run_program(main))
