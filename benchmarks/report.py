"""Write docs/BENCHMARKS.md from benchmarks/results/*.json.

python -m benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

from trainlib.tables import format_number, markdown_table

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = ROOT / "benchmarks" / "introduction.md"
ORDER = (
    *("training", "optimizer", "keyframes", "sampling", "latency", "roofline", "cost_curves"),
    *("startup", "scaling", "loading"),
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
    machine = f"{result['processor']}, {result['cores']} cores, {result['memory_gb']} GB"
    packages = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    lines = [
        f"## {result['title']}",
        "",
        f"`python -m benchmarks.{result['name']} {options}`; {machine}; {packages}; "
        f"commit {result['commit']}, {result['date']}; load before {result['load_before']:.1f}, "
        f"{result['seconds']:.0f} s.",
    ]
    for part in result["tables"]:
        lines += ["", f"**{part['title']}**", "", table(part["rows"])]
        if part.get("note"):
            lines += ["", part["note"]]
    return "\n".join(lines) + "\n"


def main(results: Path = ROOT / "benchmarks" / "results", output: Path | None = None) -> None:
    """Write the document."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*-*.json"))]
    found = [result for result in found if result.get("name") in ORDER]
    found.sort(key=lambda result: ORDER.index(result["name"]))
    sections = [INTRODUCTION.read_text("utf-8"), *map(markdown, found)]
    (output or ROOT / "docs" / "BENCHMARKS.md").write_text("\n".join(sections), "utf-8")


if __name__ == "__main__":
    main()
