"""Write what the protocols found: results.json, one CSV per protocol, report.md.

results.json is strict JSON (no NaN: null):

    format      1
    about       checkpoint, weights' epoch and step, parameters, data, sampling, machine, date,
                commit, command, wall_s
    verdicts    metric or all_lines -> {line, value, ci, verdict, controls_that_meet_it}: keyframes
    protocols   protocol -> setting -> metric -> {value, ci: [low, high] or null, n}

The settings and metrics are those of evaluation/protocols.py. A CSV has one row per setting and
metric: setting, metric, value, ci_low, ci_high, n.
"""

import csv
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.controls import LIMITS
from evaluation.protocols import PLAN_LINES, Estimate, Table, is_control, lines_met

RESULTS_FORMAT = 1


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return where the numbers were made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": f"{device.type}: {name}",
    }


def describe_run(argv: Sequence[str]) -> dict[str, Any]:
    """Return when, from which commit and by which command; commit is null without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "command": " ".join(["python -m evaluation", *argv]),
    }


def write_report(
    folder: Path,
    about: dict[str, Any],
    verdicts: dict[str, dict[str, Any]],
    protocols: dict[str, Table],
    figures: dict[str, str],
) -> None:
    """Write all files but the figures.

    Args:
        folder: an existing folder.
        about: what stands at the head of the report.
        verdicts: of `protocols.judge`; empty if nothing could be judged.
        protocols: tables by name.
        figures: file name -> one line of caption.
    """
    results = {
        "format": RESULTS_FORMAT,
        "about": about,
        "verdicts": verdicts,
        "protocols": protocols_to_json(protocols),
    }
    text = json.dumps(_finite(results), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", "utf-8")
    for name, table in protocols.items():
        _write_csv(folder / f"{name}.csv", table)
    (folder / "report.md").write_text(_markdown(about, verdicts, protocols, figures), "utf-8")


def protocols_to_json(protocols: dict[str, Table]) -> dict[str, Any]:
    """Turn estimates into {value, ci, n}."""
    return {
        protocol: {
            setting: {metric: estimate._asdict() for metric, estimate in row.items()}
            for setting, row in table.items()
        }
        for protocol, table in protocols.items()
    }


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say, NaN and infinity, by None."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, table: Table) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["setting", "metric", "value", "ci_low", "ci_high", "n"])
        for setting, row in table.items():
            for metric, (value, ci, n) in row.items():
                writer.writerow([setting, metric, value, *(ci or ("", "")), n])


# ----------------------------------------------------------------------------------------
# TABLES FOR READERS
# ----------------------------------------------------------------------------------------


def format_number(value: float) -> str:
    """Four significant digits; a dash if not finite."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def format_estimate(estimate: Estimate | None, *, interval: bool = True) -> str:
    """Return "value [low, high]"."""
    if estimate is None:
        return "-"
    text = format_number(estimate.value)
    if interval and estimate.ci:
        text += f" [{format_number(estimate.ci[0])}, {format_number(estimate.ci[1])}]"
    return text


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table, which reads as plain text, too."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines]
    rule = "-|-".join("-" * w for w in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])


def verdict_table(verdicts: dict[str, dict[str, Any]]) -> str:
    """Return the plan's lines, one a row."""
    rows = [
        [
            metric,
            v["line"],
            format_estimate(Estimate(v["value"], v["ci"], 0)),
            v["verdict"],
            ", ".join(v["controls_that_meet_it"]) or "none",
        ]
        for metric, v in verdicts.items()
    ]
    header = ["keyframes", "the plan's line", "model [95 %]", "verdict", "controls that meet it"]
    return format_table(header, rows)


def keyframes_table(table: Table, *, interval: bool = True) -> str:
    """Return the metrics of PLAN_LINES, one setting a row, with the lines that it meets."""
    rows = []
    for setting, scores in table.items():
        met = lines_met(scores)
        remark = f"{len(met)} of {len(PLAN_LINES)}"
        if is_control(setting) and met:
            remark += f", not discriminating: {', '.join(met)}"
        values = [format_estimate(scores[name], interval=interval) for name in PLAN_LINES]
        rows.append([f"{setting} (limit)" if setting in LIMITS else setting, *values, remark])
    return format_table(["recreation by", *PLAN_LINES, "lines met"], rows)


def wide_table(
    table: Table, metrics: Sequence[str], first: str = "", *, interval: bool = True
) -> str:
    """Return some metrics, one setting a row."""
    rows = [
        [setting, *(format_estimate(row.get(m), interval=interval) for m in metrics)]
        for setting, row in table.items()
    ]
    return format_table([first, *metrics], rows)


def tall_table(table: Table) -> str:
    """Return all metrics, one a row, one setting a column, without intervals."""
    metrics = list(next(iter(table.values())))
    rows = [
        [m, *(format_estimate(row.get(m), interval=False) for row in table.values())]
        for m in metrics
    ]
    return format_table(["metric", *table], rows)


DENOISE_LIMITS = ("r", "r_ddim", "mse_one_shot", "mse_mmse", "mse_ddim", "mse_exact_ddim")
DENOISE_CONTROLS = (
    "mse_one_shot",
    "mse_identity",
    "mse_zeros",
    "mse_training_mean",
    "mse_nearest_training_item",
    "mse_untrained_model",
)
VALIDITY = (
    "valid",
    "one_press",
    "duration_in_range",
    "press_binary",
    "straight_and_even",
    "idle_at_zero",
)
TYPE_MIX = (
    "type_mix_error",
    "share_none",
    "share_click",
    "share_horizontal",
    "share_vertical",
    "share_diagonal",
)
DISTRIBUTION = (
    "press_softness",
    "line_rms",
    "idle_xy",
    "mean_duration",
    "duration_bias",
    "nn_distance_ratio",
    "share_nearer_to_train",
    "share_near_copies",
)


def summary(verdicts: dict[str, dict[str, Any]], protocols: dict[str, Table]) -> str:
    """Return the main tables for a terminal."""
    parts = []
    if "keyframes" in protocols:
        parts += [verdict_table(verdicts), keyframes_table(protocols["keyframes"], interval=False)]
    parts.append(wide_table(protocols["denoise"], DENOISE_LIMITS[:2], "denoise"))
    parts.append(
        wide_table(
            protocols["generate"],
            (
                "valid",
                "one_press",
                "line_rms",
                "type_mix_error",
                "duration_bias",
                "nn_distance_ratio",
            ),
            "generate",
            interval=False,
        )
    )
    return "\n\n".join(parts)


def _markdown(
    about: dict[str, Any],
    verdicts: dict[str, dict[str, Any]],
    protocols: dict[str, Table],
    figures: dict[str, str],
) -> str:
    """Return report.md."""
    pages = [f"# Report on {about['checkpoint']}", _about_lines(about)]
    if "keyframes" in protocols:
        pages += [
            "## keyframes: recreated from pure noise, given about 4 of 250 frames",
            verdict_table(verdicts),
            keyframes_table(protocols["keyframes"]),
            tall_table(protocols["keyframes"]),
        ]
    if "keyframes_without_edge" in protocols:
        pages += [
            "## keyframes_without_edge: the gestures that give nothing to go by",
            keyframes_table(protocols["keyframes_without_edge"]),
        ]
    pages += [
        "## denoise: recreated from the original with noise of std sigma",
        _denoise_note(protocols["denoise"]),
        wide_table(protocols["denoise"], DENOISE_LIMITS, "noise"),
        wide_table(protocols["denoise"], DENOISE_CONTROLS, "noise", interval=False),
        "## generate: from pure noise, given nothing",
        wide_table(protocols["generate"], VALIDITY, "samples"),
        wide_table(protocols["generate"], TYPE_MIX, "samples"),
        wide_table(protocols["generate"], DISTRIBUTION, "samples"),
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items()),
    ]
    return "\n\n".join(pages) + "\n"


def _denoise_note(table: Table) -> str:
    """Return what the ratios are, and over how many sequences."""
    row = next(iter(table.values()))
    return (
        "r = mse_one_shot/mse_mmse, the Bayes limit, over "
        f"{row['mse_one_shot'].n} sequences; r_ddim = mse_ddim/mse_exact_ddim, DDIM with the "
        f"exact score, over the first {row['mse_ddim'].n}. A perfect model scores 1."
    )


def _about_lines(about: dict[str, Any]) -> str:
    """Return the head of the report as a list."""
    flat = {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for key, value in about.items()
    }
    return "\n".join(f"- {key}: {value}" for key, value in flat.items())
