"""What the readers of all formats share: the recording that they fill, and the lines of a file."""

import gzip
import hashlib
import lzma
import math
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.strokes import Axes, Stroke
from trainlib.bars import bar
from trainlib.errors import UserError, first_line
from trainlib.files import sha256_of

LARGEST = 1e19  # of all numbers in files: more than the ns since 1970
_OPENERS: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open}
_FAULTS = (OSError, EOFError, lzma.LZMAError, zlib.error)  # of opening and unpacking a file
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell redirects


@dataclass
class Recording:
    """What files hold.

    Attributes:
        strokes: in the order of the files, in units of their device.
        refused: lines that were not taken, by reason.
        axes: of the devices that are described, with their names; and where they are.
        notes: what was assumed, in words; a set in order.
        frames: the length of each session whose beginning and end are known; at 500 Hz, from 0 ms.
        sources: the name and the SHA-256 of each file that was read.
    """

    strokes: list[Stroke] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    axes: dict[tuple[str, Axes], str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, str]] = field(default_factory=list)


def check_source(path: Path) -> None:
    """Raise UserError unless a file is there, and can be read more than once."""
    try:
        mode = path.stat().st_mode
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file; save it to a file first")


def distinct_files(paths: Iterable[Path], recording: Recording) -> list[Path]:
    """Return the files to read, each content once, and enter them as the sources of a recording.

    Of a file and its .gz or .xz beside it, the first given is read, and a note names the other.

    Raises:
        UserError: another file holds the same: under two names, its people could be trained and
            validated on; or a file is not there.
    """
    found: dict[str, Path] = {}
    for path in paths:
        check_source(path)
        content = _sha256_unpacked(path)
        same = found.get(content)
        if same is None:
            found[content] = path
            digest = content if _opener(path) is open else sha256_of(path)
            recording.sources.append({"name": path.name, "sha256": digest})
        elif same != path and without_compression(same) == without_compression(path):
            recording.notes[f"{path.name} is left out, as {same.name} holds the same"] = None
        else:
            raise UserError(f"{same} and {path} hold the same; leave one out")
    return [*found.values()]


def _sha256_unpacked(path: Path) -> str:
    """Return the SHA-256 of what a file holds, unpacked; of its bytes if that cannot be done."""
    try:
        with _opener(path)(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except _FAULTS:  # its reader will name the line
        return sha256_of(path)


def _opener(path: Path) -> Callable[..., Any]:
    """Return the function that opens a file, plain, .gz or .xz by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((_OPENERS[magic] for magic in _OPENERS if head.startswith(magic)), open)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, plain, .gz or .xz, each with its number, from 1.

    Line ends and blanks at the end are cut off; bytes that are no text become U+FFFD.
    """
    number = 0
    try:
        opener = _opener(path)
        with opener(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
        with opener(path, "rt", encoding=encoding, errors="replace", newline="\n") as file:
            for number, line in enumerate(bar(file, f"reading {path.name}", " lines"), 1):
                yield number, line.rstrip(" \r\n")
    except _FAULTS as e:
        raise unreadable(path, number + 1, first_line(e)) from None


def unreadable(path: Path, number: int, why: str) -> UserError:
    """Return the error of a file that cannot be read at some line."""
    return UserError(f"{path}, line {number}: {why}")


def number_in(text: str) -> float:
    """Return the number in a text; NaN if there is none, or none that can be reckoned with."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if abs(number) < LARGEST else math.nan


def median_step(strokes: Iterable[Stroke]) -> float:
    """Return the median time between two samples that differ in it; NaN if there are none."""
    steps = np.concatenate([[], *(np.diff(stroke.t) for stroke in strokes)])
    steps = steps[steps > 0]
    return float(np.median(steps)) if len(steps) else math.nan


def without_compression(path: Path) -> Path:
    """Return a path without .gz or .xz."""
    return path.with_suffix("") if path.suffix in (".gz", ".xz") else path


def session_name(path: Path) -> str:
    """Return the name of a file that is one session: its path without suffixes."""
    return without_compression(path).with_suffix("").as_posix()
