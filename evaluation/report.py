"""Write what was found: results.json, one CSV per table, report.md; what the page shares with them.

results.json is strict JSON (no NaN: null):

    format      2
    about       checkpoint, weights' epoch and step, parameters, data, sampling, machine, date,
                commit, command, wall_s
    verdicts    one object per criterion of the plan, in its order: level, criterion (the plan's
                words), protocol, setting, metric, how, line, value, ci, n, verdict,
                controls_that_meet_it: control -> value
    protocols   protocol -> setting -> metric -> {value, ci: [low, high] or null, n}

The settings and metrics are those of the modules that measure them. A CSV has one row per setting
and metric: setting, metric, value, ci_low, ci_high, n. reconstructions.csv holds the plan's table
of reconstructions, one row per gesture.
"""

import csv
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from evaluation.controls import LIMITS
from evaluation.distribution import FLOOR_SETTING
from evaluation.estimates import Estimate, Table
from evaluation.protocols import is_control
from evaluation.verdicts import MISSING, Headline, Verdict, verdicts_to_json
from train_diffusion_ddim import classify_gestures, gesture_metrics
from trainlib.gestures import GESTURE_TYPES
from trainlib.provenance import git_commit
from trainlib.tables import format_number, markdown_table

RESULTS_FORMAT = 2


class Picture(NamedTuple):
    """A figure, the file that it is saved to, and one line that says what it shows."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """A protocol or an analysis, as a reader is shown it.

    Attributes:
        name: its key in results.json, and the stem of its CSV.
        title: a heading.
        text: what is asked, and what the limit is.
        table: all that was measured.
        columns: metric -> heading of the metrics that are shown at once; the others are folded
            away. All are, where the figures say it.
        first: heading of the settings.
        pictures: its figures.
        claims: rows of a table in words, each heading -> cell.
        limits: the settings that are limits, or how their names begin.
    """

    name: str
    title: str
    text: str
    table: Table
    columns: Mapping[str, str] = field(default_factory=dict)
    first: str = ""
    pictures: Sequence[Picture] = ()
    claims: Sequence[Mapping[str, str]] = ()
    limits: tuple[str, ...] = (*LIMITS, FLOOR_SETTING)

    def kind(self, setting: str) -> str:
        """Return whose row it is: "model", "control" or "limit"; "" where all are the model's."""
        if not any(name.startswith("model") for name in self.table):
            return ""
        if setting.startswith(self.limits):
            return "limit"
        return "control" if is_control(setting) else "model"

    @property
    def other_metrics(self) -> list[str]:
        """The metrics that `columns` leaves out, in their order."""
        metrics = {name: None for row in self.table.values() for name in row}
        return [name for name in metrics if name not in self.columns]


@dataclass(frozen=True)
class Report:
    """All that is written.

    Attributes:
        about: what stands at the head.
        summary: the verdict in a few sentences.
        headlines: the compact table.
        verdicts: one per criterion of the plan.
        sections: protocols and analyses, in the order of reading.
        other_tables: by name, what only the verdicts need.
        reconstructions: rows of the plan's table, one per gesture.
    """

    about: dict[str, Any]
    summary: Sequence[str]
    headlines: Sequence[Headline]
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    other_tables: Mapping[str, Table]
    reconstructions: Sequence[Mapping[str, Any]]

    @property
    def tables(self) -> dict[str, Table]:
        """All tables by name."""
        return {s.name: s.table for s in self.sections} | dict(self.other_tables)


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
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git_commit(),
        "command": " ".join(["python -m evaluation", *argv]),
    }


def reconstruction_rows(x_0: Tensor, recreated: Tensor, epoch: int) -> list[dict[str, Any]]:
    """Return the plan's table of reconstructions, one row per gesture.

    Args:
        x_0: (B, L, C), data units.
        recreated: likewise.
        epoch: of the checkpoint, from 0.
    """
    types, recreated_types = classify_gestures(x_0), classify_gestures(recreated)
    rows = []
    for i, pair in enumerate(zip(x_0.split(1), recreated.split(1), strict=True)):
        scores = gesture_metrics(*pair)
        rows.append(
            {
                "epoch": epoch,
                "sample_id": i,
                "original_type": GESTURE_TYPES[types[i]],
                "reconstructed_type": GESTURE_TYPES[recreated_types[i]],
                "timing_accuracy": scores["temporal_iou"],
                "spatial_accuracy": scores["spatial_accuracy"],
                "overall_quality": sum(scores.values()) / len(scores),
            }
        )
    return rows


# ----------------------------------------------------------------------------------------
# FILES
# ----------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> None:
    """Write all files but the page into an existing folder."""
    results = {
        "format": RESULTS_FORMAT,
        "about": report.about,
        "verdicts": verdicts_to_json(report.verdicts),
        "protocols": protocols_to_json(report.tables),
    }
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", "utf-8")
    for name, table in report.tables.items():
        if table:
            write_csv(folder / f"{name}.csv", CSV_COLUMNS, csv_rows(table))
    if report.reconstructions:
        rows = [list(row.values()) for row in report.reconstructions]
        write_csv(folder / "reconstructions.csv", list(report.reconstructions[0]), rows)
    for section in report.sections:
        for picture in section.pictures:
            save_picture(picture, folder)
    (folder / "report.md").write_text(to_markdown(report), "utf-8")


def save_picture(picture: Picture, folder: Path) -> None:
    """Save a figure as a PNG of a few colours: a quarter of the bytes, and looks the same."""
    data = io.BytesIO()
    picture.figure.savefig(data, format="png", dpi=130)
    few_colors = Image.open(data).convert("RGB").quantize(200)
    few_colors.save(folder / picture.name, optimize=True)


def protocols_to_json(protocols: Mapping[str, Table]) -> dict[str, Any]:
    """Turn estimates into {value, ci, n}."""
    return {
        protocol: {
            setting: {metric: estimate._asdict() for metric, estimate in row.items()}
            for setting, row in table.items()
        }
        for protocol, table in protocols.items()
    }


def finite(value: Any) -> Any:
    """Replace what JSON cannot say, NaN and infinity, by None."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


CSV_COLUMNS = ["setting", "metric", "value", "ci_low", "ci_high", "n"]


def csv_rows(table: Table) -> list[list[Any]]:
    """Return a table as rows of CSV_COLUMNS; where there is no interval, None."""
    return [
        [setting, metric, value, *(ci or (None, None)), n]
        for setting, row in table.items()
        for metric, (value, ci, n) in row.items()
    ]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV; None is an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def log_to_wandb(report: Report, folder: Path, mode: str, project: str) -> None:
    """Log the tables, the reconstructions and the figures as a W&B run of its own.

    Nothing that W&B does stops the evaluation: its first fault is a warning.

    Args:
        report: what is logged.
        folder: where the figures lie, and where W&B keeps its files.
        mode: online, offline or disabled.
        project: of W&B.
    """
    if mode == "disabled":
        return
    try:
        wandb: Any = import_module("wandb")
        run = wandb.init(
            project=project,
            job_type="evaluation",
            config=finite(report.about),
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(init_timeout=20, silent=True),
        )
        content: dict[str, Any] = {
            f"evaluation/{name}": wandb.Table(CSV_COLUMNS, finite(csv_rows(table)))
            for name, table in report.tables.items()
            if table
        }
        verdicts = [list(row.values()) for row in verdict_rows(report.verdicts)]
        content["evaluation/verdicts"] = wandb.Table(VERDICT_COLUMNS, verdicts)
        if report.reconstructions:
            rows = [list(row.values()) for row in report.reconstructions]
            table = wandb.Table(list(report.reconstructions[0]), rows)
            content["val/reconstruction_table"] = table
        for section in report.sections:
            for picture in section.pictures:
                image = wandb.Image(str(folder / picture.name), caption=picture.caption)
                content[f"evaluation/{Path(picture.name).stem}"] = image
        run.log(content)
        run.finish()
    except Exception as e:  # of many kinds
        print(f"warning: not logged to W&B ({type(e).__name__}: {e})", file=sys.stderr)


# ----------------------------------------------------------------------------------------
# TABLES FOR READERS
# ----------------------------------------------------------------------------------------


MANY = 12  # settings that no table has as columns


def format_estimate(estimate: Estimate | None, *, interval: bool = True) -> str:
    """Return "value [low, high]"."""
    if estimate is None:
        return "–"
    text = format_number(estimate.value)
    return f"{text} {format_interval(estimate)}" if interval and estimate.ci else text


def format_interval(estimate: Estimate) -> str:
    """Return "[low, high]", or "" without an interval."""
    return f"[{', '.join(map(format_number, estimate.ci))}]" if estimate.ci else ""


def name_setting(setting: str) -> str:
    """Return a setting as words: "sigma_0.4" is "sigma 0.4"."""
    return setting.replace("_", " ")


VERDICT_COLUMNS = [
    "level", "the plan's criterion", "judged by", "line", "value [95 %]", "verdict",
    "controls that meet it",
]  # fmt: skip


def format_verdict(verdict: Verdict) -> str:
    """Return the value that was judged, with its interval."""
    criterion, estimate = verdict.criterion, verdict.estimate
    if estimate and criterion.said == "yes":
        return "yes" if estimate.value else "no"
    return format_estimate(estimate)


def format_remark(verdict: Verdict) -> str:
    """Return the controls that meet the criterion, with their values, or why it is not measured."""
    if verdict.verdict == "not measured":
        return MISSING.get(verdict.criterion.table, "")
    pairs = verdict.controls.items()
    return ", ".join(f"{name_setting(name)} {format_number(value)}" for name, value in pairs)


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return the verdict table as text, VERDICT_COLUMNS -> cell."""
    rows = []
    for v in verdicts:
        judged_by = f"{v.criterion.table}: {v.criterion.metric}"
        judged_by += f" ({v.criterion.how})" if v.criterion.how else ""
        cells = [v.criterion.level, v.criterion.words, judged_by, v.criterion.line]
        cells += [format_verdict(v), v.verdict, format_remark(v)]
        rows.append(dict(zip(VERDICT_COLUMNS, cells, strict=True)))
    return rows


def headline_table(headlines: Sequence[Headline]) -> str:
    """Return the compact table."""
    rows = [
        [
            h.words,
            format_estimate(h.verdict.estimate),
            h.verdict.criterion.line,
            f"{format_number(h.control)} {name_setting(h.control_name)}",
            "–" if h.limit is None else format_number(h.limit),
            h.verdict.verdict,
        ]
        for h in headlines
    ]
    header = ["", "this model [95 %]", "asked", "best trivial answer", "limit", "verdict"]
    return markdown_table(header, rows)


def section_table(section: Section) -> str:
    """Return the shown metrics of a section, one setting a row."""
    rows = []
    for setting, row in section.table.items():
        mark = " (limit)" if section.kind(setting) == "limit" else ""
        cells = [format_estimate(row.get(metric)) for metric in section.columns]
        rows.append([name_setting(setting) + mark, *cells])
    return markdown_table([section.first, *section.columns.values()], rows)


def other_metrics_table(section: Section) -> str:
    """Return the other metrics, one a row, one setting a column, without intervals."""
    rows = [
        [m, *(format_estimate(row.get(m), interval=False) for row in section.table.values())]
        for m in section.other_metrics
    ]
    return markdown_table(["metric", *map(name_setting, section.table)], rows)


def to_text(report: Report) -> str:
    """Return the verdict for a terminal."""
    return "\n\n".join([*report.summary, headline_table(report.headlines)])


def to_markdown(report: Report) -> str:
    """Return report.md: what report.html shows, without the replay."""
    rows = [list(row.values()) for row in verdict_rows(report.verdicts)]
    parts = [
        f"# Report on {report.about['checkpoint']}",
        *report.summary,
        headline_table(report.headlines),
        "## Every criterion of the plan",
        markdown_table(VERDICT_COLUMNS, rows),
    ]
    for section in report.sections:
        parts += [f"## {section.title}", section.text]
        parts += [f"![{p.caption}]({p.name})\n\n*{p.caption}*" for p in section.pictures]
        if section.claims:
            rows = [list(claim.values()) for claim in section.claims]
            parts.append(markdown_table(list(section.claims[0]), rows))
        if section.columns:
            parts.append(section_table(section))
        if section.columns and section.other_metrics and len(section.table) <= MANY:
            parts += ["All other metrics:", other_metrics_table(section)]
        elif section.other_metrics:
            parts.append(f"All other metrics: {section.name}.csv")
    parts += ["## How this was made", _about_lines(report.about)]
    return "\n\n".join(parts) + "\n"


def flatten_about(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the head of the report as text, nested entries on one line."""
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for key, value in about.items()
    }


def _about_lines(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in flatten_about(about).items())
