"""Write what was found: results.json, one CSV per table, report.md, the figures; log it to W&B.

results.json is strict JSON (no NaN: null):

    format      2
    about       checkpoint, weights' epoch and step, parameters, data, sampling, machine, date,
                commit, command, seconds per protocol, wall_s
    verdicts    one object per criterion of evaluation/criteria.py, in its order: level, criterion
                (the plan's words), protocol, setting, metric, how, line, value, ci, n, verdict,
                controls_that_meet_it: control -> value
    protocols   table -> setting -> metric -> {value, ci: [low, high] or null, n}

The settings and metrics are those of the protocols. A CSV has one row per setting and metric:
setting, metric, value, ci_low, ci_high, n. reconstructions.csv holds the plan's table of
reconstructions, one row per gesture.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from evaluation.criteria import MISSING, Headline, Verdict, verdicts_to_json
from evaluation.estimates import Table, format_estimate, tables_to_json
from evaluation.protocol import Picture, Section
from trainlib.errors import BROKEN, first_line, say
from trainlib.files import finite_or_null, write_json, write_text, write_whole
from trainlib.provenance import provenance
from trainlib.tables import format_number, markdown_table

RESULTS_FORMAT = 2


@dataclass(frozen=True)
class Report:
    """All that is written.

    Attributes:
        about: what stands at the head.
        summary: the verdict in a few sentences.
        headlines: the compact table.
        verdicts: one per criterion.
        sections: what the protocols found, in the order of reading.
        reconstructions: rows of the plan's table, one per gesture.
    """

    about: dict[str, Any]
    summary: Sequence[str]
    headlines: Sequence[Headline]
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    reconstructions: Sequence[Mapping[str, Any]]

    @property
    def tables(self) -> dict[str, Table]:
        """All tables by name."""
        return {s.name: s.table for s in self.sections}

    @property
    def shown(self) -> list[Section]:
        """The sections that a reader is shown."""
        return [s for s in self.sections if s.title]


def describe_run(program: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return when, from which commit and by which command; commit is null without git."""
    made = provenance()
    command = " ".join([f"python -m {program}", *argv])
    return {"date": made["date"], "commit": made["commit"], "command": command}


# ----------------------------------------------------------------------------------------
# FILES
# ----------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> Report:
    """Write all files but the page into an existing folder; return the report, as far as drawn."""
    results = {
        "format": RESULTS_FORMAT,
        "about": report.about,
        "verdicts": verdicts_to_json(report.verdicts),
        "protocols": tables_to_json(report.tables),
    }
    write_json(folder / "results.json", results)
    for name, table in report.tables.items():
        if table:
            write_csv(folder / f"{name}.csv", CSV_COLUMNS, csv_rows(table))
    if report.reconstructions:
        rows = [list(row.values()) for row in report.reconstructions]
        write_csv(folder / "reconstructions.csv", list(report.reconstructions[0]), rows)
    report = replace(report, sections=save_pictures(folder, report.sections))
    write_text(folder / "report.md", to_markdown(report))
    return report


def save_pictures(folder: Path, sections: Sequence[Section]) -> list[Section]:
    """Save the pictures of sections; return these without what could not be drawn.

    The first fault of matplotlib or Pillow, which are optional, is one warning and ends drawing.
    """
    drawn: list[Section] = []
    works = True
    for section in sections:
        pictures: list[Picture] = []
        for picture in section.pictures:
            try:
                png = to_png(picture) if works else None
            except BROKEN as e:
                say(f"warning: no more figures ({type(e).__name__}: {first_line(e)})", err=True)
                png, works = None, False
            if png:
                write_whole(folder / picture.name, png)
                pictures.append(picture)
        drawn.append(replace(section, pictures=pictures))
    return drawn


def to_png(picture: Picture) -> bytes:
    """Return a figure as a PNG of a few colours: a quarter of the bytes, and looks the same."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    picture.figure.savefig(full, format="png", dpi=130)
    Image.open(full).convert("RGB").quantize(200).save(small, format="png", optimize=True)
    return small.getvalue()


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
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


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
            config=finite_or_null(report.about),
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(init_timeout=20, silent=True),
        )
        content: dict[str, Any] = {
            f"evaluation/{name}": wandb.Table(CSV_COLUMNS, finite_or_null(csv_rows(table)))
            for name, table in report.tables.items()
            if table
        }
        verdicts = [list(row.values()) for row in verdict_rows(report.verdicts)]
        content["evaluation/verdicts"] = wandb.Table(VERDICT_COLUMNS, verdicts)
        if report.reconstructions:
            rows = [list(row.values()) for row in report.reconstructions]
            table = wandb.Table(list(report.reconstructions[0]), rows)
            content["val/reconstruction_table"] = table
        for section in report.shown:
            for picture in section.pictures:
                image = wandb.Image(str(folder / picture.name), caption=picture.caption)
                content[f"evaluation/{Path(picture.name).stem}"] = image
        run.log(content)
        run.finish()
    except Exception as e:  # of many kinds
        say(f"warning: not logged to W&B ({type(e).__name__}: {e})", err=True)


# ----------------------------------------------------------------------------------------
# TABLES FOR READERS
# ----------------------------------------------------------------------------------------

MANY = 12  # settings that no table has as columns


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
    if estimate and criterion.line == "yes":
        return "yes" if estimate.value else "no"
    return format_estimate(estimate)


def format_remark(verdict: Verdict) -> str:
    """Return the controls that meet the criterion, with their values, or why it is not measured."""
    if verdict.verdict == "not measured":
        table, metric = verdict.criterion.key
        return MISSING.get(metric) or MISSING.get(table, "")
    pairs = verdict.controls.items()
    return ", ".join(f"{name_setting(name)} {format_number(value)}" for name, value in pairs)


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return the verdict table as text, VERDICT_COLUMNS -> cell."""
    rows = []
    for v in verdicts:
        judged_by = f"{v.criterion.table}: {v.criterion.metric}"
        judged_by += f" ({v.how})" if v.how else ""
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
        cells = [format_estimate(row.get(metric)) for metric in section.shown]
        rows.append([name_setting(setting) + mark, *cells])
    return markdown_table([section.first, *section.shown.values()], rows)


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
        "## Every criterion",
        markdown_table(VERDICT_COLUMNS, rows),
    ]
    for section in report.shown:
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
