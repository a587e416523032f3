"""Data set folders on disk: atomic files, the manifest, and who may overwrite what.

Every file appears under its name only when it is whole (temporary name, then os.replace), and
the manifest comes last, after all data has reached the disk. So a folder with a manifest is a
finished one, a folder without one is not, and no kill or power cut makes the first from the
second.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
MANIFEST_NAME = "dataset.json"

Manifest = dict[str, Any]

_BATCH_NAME = re.compile(r"batch_\d{6}_actions\.npy")
_TEMPORARY_NAME = re.compile(r"\.(batch_\d{6}_actions\.npy|dataset\.json)\.tmp")
_MAX_FILES = 1_000_000  # six digits, so that sorted names keep the order of the sequences
_BYTES_PER_FRAME = 12  # three float32
_FRAMES_AT_ONCE = 100_000  # rendered at a time, so that memory does not grow with the file


class DatasetFolderError(ValueError):
    """The folder cannot be used as asked; the message says why and what to do."""


class GeneratedDataset(NamedTuple):
    """What a generator call leaves behind.

    Attributes:
        folder: where the files are.
        manifest: the content of dataset.json.
        written: False if the folder already held exactly this data set.
    """

    folder: Path
    manifest: Manifest
    written: bool


def claim_folder(
    output_dir: str | os.PathLike[str], arguments: Mapping[str, Any], *, overwrite: bool
) -> tuple[Path, Manifest | None]:
    """Make the folder ready for `write_dataset`, or find the same data set finished in it.

    Args:
        output_dir: the folder, made if missing.
        arguments: everything that decides the bytes; holds num_sequences, sequence_length and
            sequences_per_file.
        overwrite: clear the data set that is there, even an identical one.

    Returns:
        The folder, and the manifest if there is nothing left to do, else None.

    Raises:
        DatasetFolderError: not a writable folder, or it holds other data.
        OSError: ENOSPC, the data set would not fit on the disk.
    """
    names = _file_names(arguments)
    folder = _make_folder(output_dir)
    data_names = {name for name in os.listdir(folder) if _is_data_name(name)}
    manifest = _read_manifest(folder)
    if manifest is not None and not overwrite:
        _check_same_and_intact(folder, manifest, arguments, names, data_names)
        return folder, manifest
    if data_names and not overwrite:
        raise DatasetFolderError(
            f"{folder} holds {len(data_names)} *_actions.npy but no {MANIFEST_NAME}, as an "
            "interrupted run leaves it; pass --overwrite (overwrite=True) to replace "
            "batch_NNNNNN_actions.npy, or choose an empty folder"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DatasetFolderError(f"{folder} is not writable; choose another folder")
    _clear(folder, manifest, data_names, arguments)
    return folder, None


def write_dataset(
    folder: Path,
    arguments: Mapping[str, Any],
    render_rows: Callable[[slice], np.ndarray],
    *,
    notes: Mapping[str, Any],
    progress: bool = False,
) -> Manifest:
    """Write the batch files, then the manifest.

    Args:
        folder: as claim_folder returned it.
        arguments: as given to claim_folder.
        render_rows: the sequences of a slice, (n, L, 3) float32.
        notes: further entries of the manifest.
        progress: show a bar, on a terminal only.

    Returns:
        The manifest.

    Raises:
        OSError: the disk failed; the file being written is removed, no manifest is written.
    """
    count, length = arguments["num_sequences"], arguments["sequence_length"]
    per_file = arguments["sequences_per_file"]
    files = []
    for index, name in enumerate(_bar(_file_names(arguments), progress)):
        first, stop = index * per_file, min((index + 1) * per_file, count)
        digest = _write_whole(folder / name, _npy_chunks(render_rows, first, stop, length))
        files.append({"name": name, "rows": (stop - first) * length, "sha256": digest})
    # Synchronising at the end costs a fraction of doing it file by file (the kernel has written
    # most of it by then) and protects as much: until the manifest exists nobody trusts the data.
    for entry in files:
        _sync(folder / entry["name"])
    _sync(folder)
    manifest = {
        "format": FORMAT,
        "count": count,
        "sequence_length": length,
        "seed": arguments.get("seed"),
        "split": arguments.get("split"),
        "arguments": dict(arguments),
        **notes,
        "files": files,
    }
    path = folder / MANIFEST_NAME
    _write_whole(path, [json.dumps(manifest, indent=1).encode() + b"\n"], sync=True)
    _sync(folder)
    return manifest


def _make_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Return the folder, made with its parents if missing."""
    if not os.fspath(output_dir):
        raise DatasetFolderError("output_dir must name a folder, got ''")
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
    except OSError as error:
        raise DatasetFolderError(
            f"cannot use {folder} as a folder: {error.strerror}; choose another one"
        ) from error
    return folder


def _file_names(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the batch files; ValueError if six digits cannot order them."""
    num_files = -(-arguments["num_sequences"] // arguments["sequences_per_file"])
    if num_files > _MAX_FILES:
        raise ValueError(
            f"sequences_per_file must give at most {_MAX_FILES} files, "
            f"got {arguments['sequences_per_file']}, which gives {num_files}"
        )
    return [f"batch_{index:06d}_actions.npy" for index in range(num_files)]


def _is_data_name(name: str) -> bool:
    """Whether a trainer would read a file of this name."""
    return name.endswith("_actions.npy") and not name.startswith(".")


def _read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest, {} if it is damaged, None if there is none."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest: Manifest = json.loads(path.read_bytes())
        well_formed = isinstance(manifest["arguments"], dict) and all(
            isinstance(entry["name"], str) and isinstance(entry["sha256"], str)
            for entry in manifest["files"]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    return manifest if well_formed else {}


def _check_same_and_intact(
    folder: Path,
    manifest: Manifest,
    arguments: Mapping[str, Any],
    names: list[str],
    data_names: set[str],
) -> None:
    """Raise unless the folder holds exactly the data set of these arguments, undamaged."""
    cure = "pass --overwrite (overwrite=True) to replace it, or choose an empty folder"
    if manifest.get("format") != FORMAT:
        raise DatasetFolderError(
            f"{folder / MANIFEST_NAME} is damaged or of another format; {cure}"
        )
    there = manifest["arguments"]
    if there != arguments:
        keys = [key for key in {**arguments, **there} if there.get(key) != arguments.get(key)]
        change = ", ".join(f"{key} {there.get(key)} -> {arguments.get(key)}" for key in keys)
        raise DatasetFolderError(f"{folder} holds another data set ({change}); {cure}")
    listed = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    if list(listed) != names:
        raise DatasetFolderError(f"{folder / MANIFEST_NAME} does not list its files; {cure}")
    if strange := sorted(data_names - set(names)):
        raise DatasetFolderError(f"{folder / strange[0]} is not in {MANIFEST_NAME}; move it away")
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            raise DatasetFolderError(f"{path} is missing; {cure}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DatasetFolderError(f"{path} is damaged (its sha256 differs); {cure}")


def _clear(
    folder: Path, manifest: Manifest | None, data_names: set[str], arguments: Mapping[str, Any]
) -> None:
    """Remove the old data set and left-over temporary files, if the new one is sure to fit."""
    # Only names of our own form: a manifest is a file from anywhere and may list "../other".
    ours = {name for name in data_names if _BATCH_NAME.fullmatch(name)}
    if manifest:
        ours &= {entry["name"] for entry in manifest["files"]}
    if foreign := sorted(data_names - ours):
        raise DatasetFolderError(
            f"{folder / foreign[0]} was not written here and would mix with the new data; "
            "move it away or choose an empty folder"
        )
    freed = sum((folder / name).lstat().st_size for name in ours)
    available = shutil.disk_usage(folder).free + freed
    needed = arguments["num_sequences"] * arguments["sequence_length"] * _BYTES_PER_FRAME
    if needed > available:
        reason = f"{needed} bytes needed, {available} available"
        raise OSError(errno.ENOSPC, reason, str(folder))
    # The manifest goes first: from here on the folder counts as unfinished.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for name in os.listdir(folder):
        if name in ours or _TEMPORARY_NAME.fullmatch(name):
            (folder / name).unlink()


def _npy_chunks(
    render_rows: Callable[[slice], np.ndarray], first: int, stop: int, length: int
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of an .npy file: the header, then the sequences some at a time."""
    header = BytesIO()
    shape = ((stop - first) * length, 3)
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    yield header.getvalue()
    step = max(_FRAMES_AT_ONCE // length, 1)
    for row in range(first, stop, step):
        sequences = render_rows(slice(row, min(row + step, stop)))
        yield np.ascontiguousarray(sequences, dtype="<f4").data.cast("B")


def _write_whole(path: Path, chunks: Iterable[bytes | memoryview], *, sync: bool = False) -> str:
    """Write a file that appears only when whole; return the sha256 of its content."""
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bar(names: list[str], progress: bool) -> Iterable[str]:
    """Return the names, with a bar on a terminal if asked for."""
    if not progress:
        return names
    from tqdm import tqdm  # here, so that importing the package stays cheap

    return tqdm(names, desc="writing", unit="file", disable=None, ascii=True, leave=False)
