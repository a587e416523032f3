"""Numbers and tables for readers, in Markdown."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainlib.files import write_text

ROUNDING = 1e-12  # what is nearer to 0 is 0 but for the arithmetic


def format_number(value: float) -> str:
    """Three significant digits, four of a share above 0.99; a dash if not finite.

    Integers and what is above 1000 are written in full, thousands apart.
    """
    if not math.isfinite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < ROUNDING:
        return "0"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    significant = 4 if 0.99 <= abs(value) < 1 else 3
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, decimals)}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with its columns aligned, so that it reads as plain text, too."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines]
    head, *body = [f"| {line} |" for line in padded]
    rule = "|".join("-" * (w + 2) for w in widths)
    return "\n".join([head, f"|{rule}|", *body])


def fill_document(path: Path, blocks: Mapping[str, str]) -> set[str]:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a document.

    On lines of its own if the first ends its line, else within the line. Returns the names of the
    blocks that have a place in it.
    """
    found = set()

    def fill(match: re.Match[str]) -> str:
        begin, name, ends_line, end = match.groups()
        if name not in blocks:
            return match[0]
        found.add(name)
        return f"{begin}\n\n{blocks[name]}\n\n{end}" if ends_line else f"{begin}{blocks[name]}{end}"

    place = r"(<!-- begin (\S+) -->)(\n?).*?(<!-- end \2 -->)"
    text = re.sub(place, fill, path.read_text("utf-8"), flags=re.DOTALL)
    write_text(path, text)
    return found
