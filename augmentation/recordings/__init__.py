"""Files of recorded touch: one reader per format, in one table.

A reader adds to a Recording the strokes of a file, in units of the device, and counts every line
that it refuses, by reason. A touch that is no whole contact of one finger is added too, with its
fault, so that nobody takes its time for idle. What cannot be read at all is a UserError that names
the file and the line.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from augmentation.recordings.files import Recording, without_compression
from augmentation.recordings.getevent import read_getevent
from augmentation.recordings.hdf5 import read_hdf5
from augmentation.recordings.json_lines import read_json_lines
from augmentation.recordings.table import read_table
from trainlib.errors import UserError

READERS: Mapping[str, Callable[[Path, Any, Recording], None]] = {
    "getevent": read_getevent,
    "json": read_json_lines,
    "csv": read_table,
    "hdf5": read_hdf5,
}
SUFFIXES = {
    ".txt": "getevent",
    ".log": "getevent",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}


def format_of(path: Path, options: Any) -> str:
    """Return the key in READERS of a file: what is asked for, else by its name."""
    if options.format != "auto":
        return str(options.format)
    suffix = without_compression(path).suffix.lower()
    usual = SUFFIXES.get(suffix)
    if options.columns and usual in (None, "getevent"):
        return "csv"
    if usual is None:
        raise UserError(f"{path} has no known suffix ({', '.join(SUFFIXES)}); pass --format")
    return usual
