"""Files that appear whole or not at all."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainlib.errors import UserError


@contextmanager
def disk_faults_named(path: Path, num_bytes: int = 0, cure: str = "make room") -> Iterator[None]:
    """Give an OSError from writing `path` the words that an error line needs: path, bytes, cure."""
    try:
        yield
    except OSError as e:
        free = shutil.disk_usage(path.parent).free
        fault = f"{e.strerror} ({num_bytes} bytes needed, {free} free)"
        raise OSError(f"cannot write {path}: {fault}; {cure}") from None


def write_whole(path: Path, content: bytes, cure: str = "make room") -> None:
    """Write a file so that `path` is at every moment, even of a power cut, the old or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_faults_named(path, len(content), cure):
        try:
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all; names that are not UTF-8 become escapes."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(finite_or_null(content), indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def finite_or_null(content: Any) -> Any:
    """Return nested lists and dicts with None in place of NaN and infinity."""
    if isinstance(content, dict):
        return {key: finite_or_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_folder(folder: str | Path, option: str = "--output_dir") -> Path:
    """Make a folder with its parents; UserError naming `option` if it cannot be written into."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"cannot write into {option} {folder} ({e}); choose another") from None
    return folder
