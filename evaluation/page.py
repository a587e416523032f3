"""report.html: the report as one file that loads nothing, with a replay of recreated gestures.

evaluation/page.html is the template: styles, the replay's script and {{placeholders}}. Everything
but the replay is plain HTML. A cell whose number stands in results.json says where, in data-path.

The replay holds, per gesture, the original, what the network was shown at each step (x_t) and what
it then took x_0 for, in two tasks: from pure noise given the frames at the press edges (keyframes),
and from x_t noised to sigma REPLAY_SIGMA (denoise). x_0 and its estimates are uint16 over [0, 1],
x_t is uint8 over X_T_RANGE, little-endian, base64, (frames, channels) row by row.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.estimates import Estimate
from evaluation.report import (
    MANY,
    Picture,
    Report,
    Section,
    finite,
    flatten_about,
    format_interval,
    format_remark,
    name_setting,
)
from evaluation.verdicts import Headline, Verdict
from train_diffusion_ddim import (
    DDIMScheduler,
    classify_gestures,
    has_press_edge,
    noise_bank,
    press_edges,
    takes_known_frames,
    to_data_units,
    to_model_units,
)
from trainlib.gestures import GESTURE_TYPES
from trainlib.tables import format_number

TEMPLATE = Path(__file__).with_name("page.html")
REPLAY_SIGMA = 0.4  # data units
X_T_RANGE = (-1.0, 2.0)  # data units; noise beyond it is clipped
MARKS = {"met": "●", "not met": "✕", "not discriminating": "◐", "not measured": "–"}
RANKS = ("best", "better than 3 in 4", "typical", "worse than 3 in 4", "worst")

# ----------------------------------------------------------------------------------------
# REPLAY
# ----------------------------------------------------------------------------------------


def pick_gestures(x_0: Tensor, recreated: Tensor) -> tuple[Tensor, list[str]]:
    """Choose gestures to replay: of each type five from the best recreated to the worst.

    Args:
        x_0: (B, L, C), data units; those without a press edge are not chosen.
        recreated: likewise.

    Returns:
        Their rows, (N,), and a name for each.
    """
    error = ((x_0 - recreated) ** 2).mean(dim=(1, 2))
    types = classify_gestures(x_0)
    rows: list[int] = []
    names: list[str] = []
    for kind, name in enumerate(GESTURE_TYPES):
        of_kind = torch.nonzero((types == kind) & has_press_edge(x_0))[:, 0]
        ranked = of_kind[error[of_kind].argsort()].tolist()
        places = np.linspace(0, len(ranked) - 1, len(RANKS)).round().astype(int)
        for place, rank in dict(zip(places.tolist(), RANKS, strict=True)).items():
            if ranked:
                rows.append(ranked[place])
                names.append(f"{name}, {rank} of {len(ranked)}")
    return torch.tensor(rows, dtype=torch.int64, device=x_0.device), names


def make_replay(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    recreated: Tensor,
    sampling: dict[str, Any],
) -> dict[str, Any] | None:
    """Record how the model recreates some gestures; the replay's data, None without a gesture.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units.
        recreated: by the keyframes protocol, likewise; it decides which gestures are shown.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
    """
    rows, names = pick_gestures(x_0, recreated)
    if not names:
        return None
    x, eps = x_0[rows], noise_bank(x_0.shape)[rows.cpu()].to(x_0)
    tasks = []
    if takes_known_frames(model):
        known = {"known": x, "known_mask": press_edges(x)}
        title = "from noise, given where the finger lands and lifts"
        walk = trace(model, scheduler, eps, **sampling, **known)
        tasks.append({"title": title, **_task(x, walk, given=known["known_mask"])})
    t = scheduler.timestep_at(REPLAY_SIGMA)
    x_t, _ = scheduler.add_noise(to_model_units(x), t, eps)
    steps = min(sampling["num_inference_steps"], t + 1)
    walk = trace(model, scheduler, x_t, start_t=t, **sampling | {"num_inference_steps": steps})
    title = f"from the gesture under noise of {REPLAY_SIGMA} of the screen"
    tasks.append({"title": title, **_task(x, walk, given=torch.zeros_like(x[..., 0]))})
    return {
        "names": names,
        "frames": x.shape[1],
        "range": X_T_RANGE,
        "x_0": [_encode(gesture, np.uint16, (0, 1)) for gesture in x],
        "tasks": tasks,
    }


def trace(
    model: nn.Module, scheduler: DDIMScheduler, x_T: Tensor, **options: Any
) -> list[tuple[float, Tensor, Tensor]]:
    """Walk from x_T, (B, L, C) in model units, to x_0, and keep what each step sees and says.

    `options` are those of `DDIMScheduler.sample`.

    Returns:
        Per step: sigma in data units, x_t in model units, and the estimate of x_0 in data units
        with the known frames in it; of the last step it is what `sample` returns.
    """
    walk: list[tuple[float, Tensor, Tensor]] = []

    def recording(x_t: Tensor, ts: Tensor, *given: Tensor) -> Tensor:
        output, t = model(x_t, ts, *given), int(ts[0])
        x_0_pred = scheduler.predict_x_0(output, x_t, t)
        if given:
            x_0_pred = torch.where(given[1][..., None], given[0], x_0_pred)
        walk.append((scheduler.sigma(t), x_t, to_data_units(x_0_pred)))
        return output

    scheduler.sample(recording, tuple(x_T.shape), x_T.device, x_T=x_T, **options)
    return walk


def _task(x_0: Tensor, walk: list[tuple[float, Tensor, Tensor]], *, given: Tensor) -> dict:
    """Encode a trace of x_0, gesture by gesture; `given` is (B, L), nonzero where known."""
    sigmas, x_ts, estimates = zip(*walk, strict=True)
    x_t, estimate = torch.stack(x_ts, 1), torch.stack(estimates, 1)  # (B, N, L, C)
    rms = ((estimate - x_0[:, None]) ** 2).mean(dim=(2, 3)).sqrt()
    return {
        "sigmas": [float(f"{sigma:.3g}") for sigma in sigmas],
        "given": [torch.nonzero(mask)[:, 0].tolist() for mask in given],
        "rms": [[float(f"{value:.3g}") for value in row] for row in rms],
        "x_t": [_encode(to_data_units(x), np.uint8, X_T_RANGE) for x in x_t],
        "estimate": [_encode(x, np.uint16, (0, 1)) for x in estimate],
    }


def _encode(x: Tensor, dtype: Any, limits: tuple[float, float]) -> str:
    """Round a tensor to the integers of an unsigned dtype, spread over `limits`; base64."""
    low, high = limits
    share = ((x.double().cpu().numpy() - low) / (high - low)).clip(0, 1)
    whole = np.round(share * np.iinfo(dtype).max).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(whole.tobytes()).decode("ascii")


# ----------------------------------------------------------------------------------------
# HTML
# ----------------------------------------------------------------------------------------


def write_page(folder: Path, report: Report, replay: Mapping[str, Any] | None) -> Path:
    """Write report.html and return its path.

    Args:
        folder: where `write_report` has put the figures.
        report: what is shown.
        replay: of `make_replay`; without it the page has none.
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
            f'<a href="#{s.name}">{escape(s.title.split(":")[0])}</a>' for s in report.sections
        ),
        "sections": "".join(_section(s, folder) for s in report.sections),
        "about": _about(report.about),
        # "<" is escaped so that no text can close the script element
        "replay": json.dumps(finite(replay)).replace("<", "\\u003c"),
    }
    head, *pieces = page.split("{{")
    for piece in pieces:
        name, _, text = piece.partition("}}")
        head += parts.pop(name) + text
    path = folder / "report.html"
    path.write_text(head, "utf-8")
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


def _path(verdict: Verdict) -> tuple[str, str, str] | None:
    """Return where results.json has the value; None for a count of lines, which is there alone."""
    if verdict.criterion.metric == "all_lines":
        return None
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
        if v.estimate and criterion.said == "yes":
            value = _text("yes" if v.estimate.value else "no", "number")
        how = f"<small>{escape(criterion.how)}</small>" if criterion.how else ""
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
        cells = [_number(row.get(m), (section.name, setting, m)) for m in section.columns]
        kind = section.kind(setting)
        mark = ' <small class="tag">limit</small>' if kind == "limit" else ""
        rows.append(_row([escape(name_setting(setting)) + mark, *cells], kind))
    shown = _table([section.first, *section.columns.values()], rows) if section.columns else ""
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
