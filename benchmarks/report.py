"""Write docs/BENCHMARKS.md from benchmarks/results/*.json.

python -m benchmarks.report
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_lines import LINES
from trainlib.errors import run_program
from trainlib.files import write_whole
from trainlib.provenance import ROOT
from trainlib.tables import format_number, markdown_table

RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = ROOT / "benchmarks" / "introduction.md"
ORDER = (
    *("training", "optimizer", "keyframes", "sampling", "latency", "roofline", "cost_curves"),
    *("startup", "scaling", "loading"),
)
OF_CHECKPOINTS = ("trainings", "exported", "distillation")  # not of `make bench`
SHOWN = (*ORDER, *OF_CHECKPOINTS)
QUALITY_NOTE = (
    "Of two learning rates the better; the peers by their stock recipes, which are made for runs "
    "of hours on a GPU: a short time is not what they are for. Drawn by DDIM with eta 0, ours by "
    "its own sampler. R: mean squared error of one-shot denoising over the Bayes optimum, 1 at "
    "best. MB: what a step keeps for its backward pass."
)


def show(value: Any) -> str:
    """Return a cell: a number in short, a range for a pair."""
    if isinstance(value, list):
        return " - ".join(show(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format_number(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    return markdown_table(list(rows[0]), [[show(value) for value in row.values()] for row in rows])


def markdown(result: dict[str, Any]) -> str:
    """Return the section of one result file."""
    options = " ".join(
        f"--{k} " + (" ".join(map(str, v)) if isinstance(v, list) else str(v))
        for k, v in result["arguments"].items()
    )
    about = result["machine"]
    machine = f"{about['processor']}, {about['cpu_count']} cores, {about['memory_gb']} GB"
    versions = {name: about[name] for name in ("python", "torch", "numpy")} | result["packages"]
    packages = ", ".join(f"{name} {v}" for name, v in versions.items())
    lines = [
        f"## {result['title']}",
        "",
        f"`python -m benchmarks.{result['name']} {options}`; {machine}; {packages}; "
        f"commit {result['commit'] or 'unknown'}, {result['date']}; "
        f"load before {result['load_before']:.1f}, {result['seconds']:.0f} s.",
    ]
    for part in result["tables"]:
        lines += ["", f"**{part['title']}**", "", table(part["rows"])]
        if part.get("note"):
            lines += ["", part["note"]]
    return "\n".join(lines) + "\n"


def show_measured(value: Any) -> str:
    """Return what was measured on a line: of a spread, the median and the quartiles."""
    if not isinstance(value, dict):
        return "–" if value is None else show(value)
    return f"{show(value['median'])} ({show([value['quartile_1'], value['quartile_3']])})"


def gpu_table(result: dict[str, Any] | None) -> str:
    """Return each line that needs a GPU, what is asked of it and what was measured."""
    stages, rows = result["stages"] if result else {}, []
    for stage, lines in LINES.items():
        found = stages.get(stage, "not measured")
        for line, asked in lines.items():
            value = found.get(line) if isinstance(found, dict) else found
            rows.append([line, asked, show_measured(value)])
    return markdown_table(["", "asked", "measured"], rows)


def gpu_section(results: Path) -> str:
    """Return what was measured on a GPU, or that nothing was; a rehearsal on a CPU counts not."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("gpu-*.json"))]
    found = [result for result in found if result["machine"]["device"].startswith("cuda")]
    result = max(found, key=lambda result: result["date"], default=None)
    made = "no machine with one was at hand"
    if result:
        about = result["machine"]
        made = f"{about['device']}, {about['cpu_count']} cores; python {about['python']}, "
        made += f"torch {about['torch']}; commit {result['commit'] or 'unknown'}, {result['date']}"
    about = f"`python -m benchmarks.gpu` measures all of it, within eight minutes; {made}."
    return f"## On a GPU\n\n{about}\n\n{gpu_table(result)}\n"


def better_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each recipe and time the better learning rate's row: more valid, then lower R."""
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["name"], row["seconds"]), []).append(row)
    better = [max(run, key=lambda r: (r["valid"]["10"], -r["r"]["0.1"])) for run in runs.values()]
    return sorted(better, key=lambda row: row["seconds"])


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Return what each recipe reaches in so many CPU seconds, by its better learning rate."""
    shown = []
    for row in better_rows(rows):
        cells = {"CPU s": int(row["seconds"]), "recipe": row["name"], "lr": row["lr"]}
        cells["drawn"] = row["num"]
        cells |= {f"valid, {steps} steps": share for steps, share in row["valid"].items()}
        cells["RMS from the line"] = row["line_rms"]
        cells |= {f"R at {sigma}": r for sigma, r in row["r"].items() if float(sigma) < 0.5}
        cells |= {"steps": row["steps"], "ms a step": row["ms_per_step"]}
        cells |= {"ms a sample": row["ms_per_sample"], "MB a step": row["mb_kept"]}
        shown.append(cells | {"parameters": row["parameters"]})
    return table(shown)


def quality_section(results: Path) -> str:
    """Return what is reached per CPU second, or that nothing was measured."""
    path = results / "quality.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    text = "Not measured yet."
    if rows:
        about = rows[-1]["machine"]
        made = f"{about['processor']}, torch {about['torch']}; seed 0"
        made += f"; commit {rows[-1]['commit'] or 'unknown'}, {rows[-1]['date']}"
        text = f"Made on one thread: {made}.\n\n{quality_table(rows)}\n\n{QUALITY_NOTE}"
    command = "`python -m benchmarks.quality` trains and judges; it goes on where it was cut."
    return f"## Quality per CPU second\n\n{command} {text}\n"


def main(results: Path = RESULTS, output: Path = ROOT / "docs" / "BENCHMARKS.md") -> None:
    """Write the document."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*-*.json"))]
    found = [result for result in found if result.get("name") in SHOWN]
    found.sort(key=lambda result: SHOWN.index(result["name"]))
    minutes = sum(result["seconds"] for result in found if result["name"] in ORDER) / 60
    introduction = INTRODUCTION.read_text("utf-8").format(minutes=minutes)
    sections = introduction, quality_section(results), gpu_section(results)
    write_whole(output, "\n".join([*sections, *map(markdown, found)]).encode())


if __name__ == "__main__":
    sys.exit(run_program(main))
