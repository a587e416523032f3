"""Files of recorded touch: one reader per format, in one table.

A reader adds to a Recording the strokes of a file, in units of the device, and counts every line
that it refuses, by reason. A touch that is no whole contact of one finger is added too, with its
fault, so that nobody takes its time for idle. What cannot be read at all is a UserError that names
the file and the line.
"""

import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.strokes import TIME_BACK, Stroke
from trainlib.bars import bar
from trainlib.errors import UserError, first_line

_OPENERS: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell redirects


@dataclass
class Recording:
    """What the files hold.

    Attributes:
        strokes: in the order of the files.
        refused: lines that were not taken, by reason.
        frames: the length of each session whose beginning and end are known; at 500 Hz, from 0 ms.
    """

    strokes: list[Stroke] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    frames: dict[str, int] = field(default_factory=dict)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, plain, .gz or .xz, each with its number, from 1.

    Line ends and blanks at the end are cut off; bytes that are no text become U+FFFD.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            head = file.read(6)
        opener = next((_OPENERS[magic] for magic in _OPENERS if head.startswith(magic)), open)
        with opener(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
        with opener(path, "rt", encoding=encoding, errors="replace", newline="\n") as file:
            for number, line in enumerate(bar(file, f"reading {path.name}", " lines"), 1):
                yield number, line.rstrip()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise unreadable(path, number + 1, first_line(e)) from None


def unreadable(path: Path, number: int, why: str) -> UserError:
    """Return the error of a file that cannot be read at some line."""
    return UserError(f"{path}, line {number}: {why}")


def read_json_lines(path: Path, _options: Any, recording: Recording) -> None:
    """Read strokes `{"session": ..., "points": [[t_ms, x, y], ...]}`, x and y as shares.

    Other keys are ignored; without a session the file is one.
    """
    for number, line in numbered_lines(path):
        if not line:
            continue
        try:
            row = json.loads(line)
            points = np.array(row["points"], np.float64)
            if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
                raise ValueError("points must be [[t_ms, x, y], ...], finite numbers")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            why = f"no {e}" if isinstance(e, KeyError) else first_line(e)
            raise unreadable(path, number, f"is no stroke in JSON ({why})") from None
        t, xy = points[:, 0], points[:, 1:]
        fault = TIME_BACK if (np.diff(t) < 0).any() else ""
        session = str(row.get("session", session_name(path)))
        recording.strokes.append(Stroke(session, t, xy, fault=fault))


READERS: Mapping[str, Callable[[Path, Any, Recording], None]] = {"json": read_json_lines}
SUFFIXES = {".jsonl": "json", ".json": "json", ".ndjson": "json"}


def format_of(path: Path, options: Any) -> str:
    """Return the key in READERS of a file: what is asked for, else by its name."""
    if options.format != "auto":
        return str(options.format)
    suffix = without_compression(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} has no known suffix ({', '.join(SUFFIXES)}); pass --format")
    return SUFFIXES[suffix]


def without_compression(path: Path) -> Path:
    """Return a path without .gz or .xz."""
    return path.with_suffix("") if path.suffix in (".gz", ".xz") else path


def session_name(path: Path) -> str:
    """Return the name of a file that is one session: its path without suffixes."""
    return without_compression(path).with_suffix("").as_posix()
