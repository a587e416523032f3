"""Checkpoints: at every moment the old file or the new one, whole; loaded whole or refused.

A checkpoint is a dict of tensors and plain values with an integer `format`. Reading one runs no
code from it: only `weights_only=True`, and only what passed its CRC.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainlib.errors import UserError, first_line, say
from trainlib.files import write_whole

CHECKPOINT_FORMAT = 11
CHECKPOINT_NAME = "diffusion_checkpoint_epoch_{}.pth"
CHECKPOINT_PATTERN = re.compile(r"diffusion_checkpoint_epoch_(0|[1-9][0-9]*)\.pth")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` is at every moment the old file or the new one, whole."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT} | content, buffer)
    cure = "the checkpoints before it are whole: make room, then --resume"
    write_whole(path, buffer.getvalue(), cure)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or the newest one of a run folder; its CRCs are checked.

    Returns what was saved, and its `path`; UserError if it is missing, damaged, of another program
    or format, or of another epoch than its name says.
    """
    path = newest_checkpoint(path)
    try:
        content = torch.load(checked_archive(path), map_location="cpu", weights_only=True)
    except Exception as e:  # damage shows as many kinds of exception
        reason = f"{path} is not a valid checkpoint ({first_line(e)})"
        raise UserError(f"{reason}; use an older one") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is not a checkpoint of this trainer")
    made = content["format"]
    if made != CHECKPOINT_FORMAT:
        age = "a newer" if made > CHECKPOINT_FORMAT else "an older"
        reason = f"has format {made}, this version's is {CHECKPOINT_FORMAT}"
        raise UserError(f"{path} was made by {age} version: it {reason}; load it with that one")
    if named := CHECKPOINT_PATTERN.fullmatch(path.name):
        held = content.get("epoch")
        if held not in (None, int(named[1])):
            raise UserError(f"{path} is a renamed copy: it holds epoch {held}; move it away")
    return content | {"path": path}


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Turn what a checkpoint with missing or strange content raises into UserError."""
    try:
        yield
    except Exception as e:  # of many kinds
        raise UserError(f"{path} does not fit this version ({first_line(e)})") from None


def checked_archive(path: Path) -> io.BytesIO:
    """Copy a zip file from entries that passed their CRC; zipfile.BadZipFile if one fails.

    torch.load checks none, and of a damaged file it may read other bytes than those checked here.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as rewritten:
        if any(entry.compress_type for entry in archive.infolist()):  # small files can be huge
            raise zipfile.BadZipFile("compressed")
        for entry in archive.infolist():
            rewritten.writestr(entry.filename, archive.read(entry))
    checked.seek(0)
    return checked


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run folder, highest epoch first; other names are not ours."""
    epochs = {path: CHECKPOINT_PATTERN.fullmatch(path.name) for path in Path(folder).glob("*.pth")}
    ours = [(int(match[1]), path) for path, match in epochs.items() if match and path.is_file()]
    return [path for _, path in sorted(ours, reverse=True)]


def checkpoints_of(path: str | Path) -> list[Path]:
    """Return [path] if it is a file, else the run folder's checkpoints, highest epoch first.

    UserError if there is none. What only looks like one, such as a backup copy, is ignored aloud.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = find_checkpoints(path)
    if not found:
        raise UserError(f"no {CHECKPOINT_NAME.format('*')} at {path}; check the path")
    others = {p.name for p in path.iterdir() if ".pth" in p.name.lower() and p.suffix != ".tmp"}
    ignored = sorted(others - {p.name for p in found})
    if ignored:
        say(f"note: ignored in {path}: {', '.join(ignored[:3])}; name the file to use it", err=True)
    return found


def newest_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a file, else the run folder's checkpoint of the highest epoch."""
    return checkpoints_of(path)[0]


def newest_valid(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint, or the newest valid one of a run folder, with a warning if it is older."""
    *newer, oldest = checkpoints_of(path)
    for candidate in newer:
        try:
            return load_checkpoint(candidate)
        except UserError as e:
            say(f"warning: {e}; going back to the one before", err=True)
    return load_checkpoint(oldest)
