"""report.html: the report as one file that loads nothing, with a replay of recreated gestures.

evaluation/page.html is the template: styles, the replay's script and {{placeholders}}. Everything
but the replay is plain HTML. A cell whose number stands in results.json says where, in data-path.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.criteria import Headline, Verdict
from evaluation.estimates import Estimate, format_interval
from evaluation.protocol import Picture, Section
from evaluation.report import MANY, Report, flatten_about, format_remark, name_setting
from trainlib.files import finite_or_null, write_text
from trainlib.tables import format_number

TEMPLATE = Path(__file__).with_name("page.html")
MARKS = {"met": "●", "not met": "✕", "not discriminating": "◐", "not measured": "–"}


def write_page(folder: Path, report: Report, replay: Mapping[str, Any] | None) -> Path:
    """Write report.html and return its path.

    Args:
        folder: where `write_report` has put the figures.
        report: what is shown.
        replay: of `replay.make_replay`; without it the page has none.
    """
    page = TEMPLATE.read_text("utf-8")
    answer, *rest = report.summary
    parts = {
        "title": escape(f"Report on {report.about['checkpoint']}"),
        "answer": escape(answer),
        "rest": "".join(f"<p>{escape(text)}</p>" for text in rest),
        "headlines": _headlines(report.headlines),
        "counts": escape(_counts(report.verdicts)),
        "verdicts": _verdicts(report.verdicts),
        "contents": "".join(
            f'<a href="#{s.name}">{escape(s.title.split(":")[0])}</a>' for s in report.shown
        ),
        "sections": "".join(_section(s, folder) for s in report.shown),
        "about": _about(report.about),
        # "<" is escaped so that no text can close the script element
        "replay": json.dumps(finite_or_null(replay)).replace("<", "\\u003c"),
    }
    head, *pieces = page.split("{{")
    for piece in pieces:
        name, _, text = piece.partition("}}")
        head += parts.pop(name) + text
    path = folder / "report.html"
    write_text(path, head)
    return path


def _row(cells: Sequence[str], kind: str = "") -> str:
    """Return a table row; its first cell is the row's head."""
    first, *others = cells
    mark = f' class="{kind}"' if kind else ""
    return f'<tr{mark}><th scope="row">{first}</th>{"".join(others)}</tr>\n'


def _table(header: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """Return a table that scrolls by itself on a narrow screen."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _number(
    estimate: Estimate | None, path: tuple[str, str, str] | None = None, *, interval: bool = True
) -> str:
    """Return a cell with a number, its interval below, and its place in results.json."""
    if estimate is None:
        return '<td class="number">–</td>'
    where = f' data-path="{escape("|".join(path))}"' if path else ""
    below = format_interval(estimate).strip("[]") if interval else ""
    below = f"<small>{below}</small>" if below else ""
    return f'<td class="number"><span{where}>{format_number(estimate.value)}</span>{below}</td>'


def _text(text: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<td{mark}>{escape(text)}</td>"


def _path(verdict: Verdict) -> tuple[str, str, str]:
    """Return where results.json has the value."""
    return verdict.criterion.table, verdict.setting, verdict.criterion.metric


def _verdict(verdict: str) -> str:
    """Return a cell that says a verdict by a sign, a word and a colour."""
    kind = verdict.replace(" ", "-")
    return f'<td class="verdict {kind}"><span>{MARKS[verdict]}</span> {verdict}</td>'


def _headlines(headlines: Sequence[Headline]) -> str:
    """Return the compact table, a heading row before each thing that is asked."""
    rows, asked = [], ""
    for h in headlines:
        if h.asked != asked:
            asked = h.asked
            rows.append(f'<tr class="group"><th colspan="6">{escape(asked)}</th></tr>\n')
        trivial = Estimate(h.control, None, 0)
        limit = None if h.limit is None else Estimate(h.limit, None, 0)
        cells = [
            escape(h.words),
            _number(h.verdict.estimate, _path(h.verdict)),
            _text(h.verdict.criterion.line, "number"),
            _verdict(h.verdict.verdict),
            _trivial(trivial, h.control_name),
            _number(limit),
        ]
        rows.append(_row(cells))
    header = ["", "this model", "asked", "verdict", "best trivial answer", "limit"]
    return _table(header, rows, "headlines")


def _trivial(estimate: Estimate, name: str) -> str:
    value = format_number(estimate.value)
    return f'<td class="number">{value}<small>{escape(name_setting(name))}</small></td>'


def _counts(verdicts: Sequence[Verdict]) -> str:
    """Return how many criteria got which verdict."""
    found = [v.verdict for v in verdicts]
    parts = [f"{found.count(name)} {name}" for name in MARKS if name in found]
    return f"{len(found)} criteria: {', '.join(parts)}"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return the verdict table."""
    rows, level = [], ""
    for v in verdicts:
        criterion = v.criterion
        if criterion.level != level:
            level = criterion.level
            rows.append(f'<tr class="group"><th colspan="6">{escape(level)}</th></tr>\n')
        value = _number(v.estimate, _path(v))
        if v.estimate and criterion.line == "yes":
            value = _text("yes" if v.estimate.value else "no", "number")
        how = f"<small>{escape(v.how)}</small>" if v.how else ""
        judged = f"<td>{criterion.table.replace('_', ' ')}{how}</td>"
        cells = [escape(criterion.words), judged, _text(criterion.line, "number"), value]
        rows.append(_row([*cells, _verdict(v.verdict), _text(format_remark(v), "controls")]))
    header = ["the plan's words", "judged by", "line", "value", "verdict", "also met by"]
    return _table(header, rows, "verdicts")


def _section(section: Section, folder: Path) -> str:
    """Return a section: heading, what is asked, figures, the table, the other metrics."""
    figures = "".join(_figure(picture, folder) for picture in section.pictures)
    rows = []
    for setting, row in section.table.items():
        cells = [_number(row.get(m), (section.name, setting, m)) for m in section.shown]
        kind = section.kind(setting)
        mark = ' <small class="tag">limit</small>' if kind == "limit" else ""
        rows.append(_row([escape(name_setting(setting)) + mark, *cells], kind))
    shown = _table([section.first, *section.shown.values()], rows) if section.columns else ""
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>\n'
        f"<p>{escape(section.text)}</p>{figures}{_claims(section)}{shown}"
        f"{_other_metrics(section)}</section>\n"
    )


def _claims(section: Section) -> str:
    """Return the table in words, if there is one."""
    if not section.claims:
        return ""
    cells = [list(claim.values()) for claim in section.claims]
    rows = [_row([escape(first), *map(_text, others)]) for first, *others in cells]
    return _table(list(section.claims[0]), rows, "words")


def _other_metrics(section: Section) -> str:
    """Return the metrics that the table leaves out, folded away."""
    if not section.other_metrics:
        return ""
    many = len(section.table) > MANY
    if many:
        header = ["", *section.other_metrics]
        rows = [
            _row([escape(s), *(_other(section, s, m) for m in section.other_metrics)])
            for s in section.table
        ]
    else:
        header = ["", *map(name_setting, section.table)]
        rows = [
            _row([f"<code>{m}</code>", *(_other(section, s, m) for s in section.table)])
            for m in section.other_metrics
        ]
    summary = "All other metrics" if section.columns else "The numbers"
    return f"<details><summary>{summary}</summary>{_table(header, rows)}</details>"


def _other(section: Section, setting: str, metric: str) -> str:
    estimate = section.table[setting].get(metric)
    return _number(estimate, (section.name, setting, metric), interval=False)


def _figure(picture: Picture, folder: Path) -> str:
    """Return a figure with its picture in it."""
    source = base64.b64encode((folder / picture.name).read_bytes()).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _about(about: Mapping[str, Any]) -> str:
    """Return the head of the report as a list of terms."""
    pairs = flatten_about(about).items()
    return "".join(
        f"<dt>{escape(name_setting(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs
    )
