"""Folders of gestures: `*_actions.npy`, `*_context.npy` and dataset.json, reader and writer.

A gesture is float32 [L, 3] = [x, y, press] in [0, 1], press 0 or 1, all zero while idle. A file
holds N of them as [N*L, 3] or [N, L, 3]; a folder's order is that of its files' names. A file of
goals, `*_context.npy`, lies beside each file of gestures and holds a row for each of them.

dataset.json lists the files with their SHA-256. The writer writes it last, after all data has
reached the disk, so that a folder with a manifest is a finished one whenever the writer was
killed. The reader trusts no file that the manifest does not list.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainlib.bars import bar
from trainlib.errors import UserError, first_line, say
from trainlib.files import disk_faults_named, make_folder, sha256_of, sync, write_json, write_whole
from trainlib.gestures import CHANNELS
from trainlib.knobs import as_type, check_range
from trainlib.memory import is_out_of_memory, memory_limit

FORMAT = 1
MANIFEST_NAME = "dataset.json"
ACTIONS, CONTEXT = "_actions.npy", "_context.npy"  # ends of the files' names
BATCHES = "batch_" + 6 * "[0-9]" + ACTIONS  # what the writer calls its files
HELD_OUT = "held_out"  # folder beside train: windows of the people trained on, kept out of training
BYTES_PER_FRAME = 12  # three float32
SLACK = 1e-6  # by which a number may leave its range, for rounding

Manifest = dict[str, Any]

_BATCH_NAME = re.compile(r"batch_\d{6}_(actions|context)\.npy")
_TEMPORARY_NAME = re.compile(rf"\.({_BATCH_NAME.pattern}|{re.escape(MANIFEST_NAME)})\.tmp")
_LOOKS_LIKE_ACTIONS = re.compile(r"actions.*\.npy", re.IGNORECASE)
_MAX_FILES = 1_000_000  # six digits, so that sorted names keep the order of the gestures
_AGAIN = "make room, then repeat with --overwrite"
_FRAMES_AT_ONCE = 100_000  # checked or rendered at a time, so that memory stays small


def as_folder(folder: Any, name: str) -> Path:
    """Return a folder's path; UserError unless it is a path with a name."""
    try:
        path = os.fsdecode(folder)
    except TypeError:
        path = ""
    if not path or "\0" in path:
        raise UserError(f"{name} must name a folder, got {folder!r}")
    return Path(path)


# ---- reader ----------------------------------------------------------------------------


def action_files(folder: str | Path) -> list[Path]:
    """Return the files of gestures in a folder, by name; UserError if there are none.

    Names are exact: `*_actions.npy` without a leading dot, which marks the copies of editors and
    systems.
    """
    return [Path(folder) / name for name in _names(as_folder(folder, "the data folder"))[0]]


def _names(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files of gestures, and of those that only look like some."""
    if not os.path.isdir(folder):  # pathlib's raises for some names
        raise UserError(f"no such folder: {folder}; check the path")
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise UserError(f"cannot read the folder {folder} ({e.strerror})") from None
    ours = [name for name in names if _is_of_gestures(name)]
    if not ours:
        make = "python -m augmentation.generate_click_dataset"
        raise UserError(f"no *{ACTIONS} in {folder}; make some with {make}")
    others = [name for name in names if _LOOKS_LIKE_ACTIONS.search(name) and name not in ours]
    return ours, others


def _is_of_gestures(name: str) -> bool:
    """Whether a file of this name holds gestures."""
    return name.endswith(ACTIONS) and not name.startswith(".")


def read_gestures(folder: str | Path, seq_len: int) -> np.ndarray:
    """Read all gestures of a folder, in the order of its files' names.

    Args:
        folder: with `*_actions.npy`, and a dataset.json that lists them, or without one.
        seq_len: frames of a gesture, L.

    Returns:
        float32 (N, L, 3), data units; in memory, or paged in from disk if it is large.

    Raises:
        UserError: a file is damaged, out of range, not listed or missing.
        MemoryError: there is no room for them.
    """
    folder, seq_len = as_folder(folder, "the data folder"), as_type("seq_len", seq_len, int)
    check_range("seq_len", seq_len, low=1)
    names, ignored = _names(folder)
    if ignored:
        what = f"{len(ignored)} file{'s' * (len(ignored) > 1)} in {folder}"
        why = f"the first is {ignored[0]}; only *{ACTIONS} without a leading dot are read"
        say(f"warning: ignored {what}, {why}", err=True)
    check_manifest(folder, names, seq_len)
    return read_all_actions([folder / name for name in names], seq_len)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the content of a folder's dataset.json, None without one; UserError for a bad one."""
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    try:
        manifest: Manifest = json.loads(path.read_bytes())
        if manifest.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, not {FORMAT}")
        _ = manifest["sequence_length"], [file["sha256"] for file in manifest["files"]]
        names = [file["name"] for file in manifest["files"]]
        if strange := [name for name in names if not _is_of_gestures(name) or "/" in name]:
            raise ValueError(f"it lists {strange[0]!r}, not a *{ACTIONS}")
        if len(set(names)) < len(names):
            raise ValueError("it lists a file twice")
    except Exception as e:  # damage shows as many kinds of exception
        reason = f"is not a valid manifest ({first_line(e)})"
        raise UserError(f"{path} {reason}; regenerate the data set with --overwrite") from None
    return manifest


def check_manifest(folder: Path, names: list[str], seq_len: int) -> None:
    """Raise UserError unless `names` are the files that dataset.json, if there is one, lists."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    path, length = folder / MANIFEST_NAME, manifest["sequence_length"]
    if length != seq_len:
        raise UserError(f"{path} says {length} frames a gesture, not {seq_len}; set --seq_len")
    listed = {file["name"]: file["sha256"] for file in manifest["files"]}
    if strange := [name for name in names if name not in listed]:
        where = f"is not in {MANIFEST_NAME}, which lists all files of the data set"
        raise UserError(f"{folder / strange[0]} {where}; move it away, or move {path} away")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != digest:
            fault = f"is missing or not what {path} says"
            raise UserError(f"{file} {fault}; regenerate the data set with --overwrite")


def read_all_actions(paths: list[Path], seq_len: int) -> np.ndarray:
    """Read files as one float32 array (N, seq_len, 3), without holding any of it twice.

    More than half of the memory goes through a nameless file into a map of that, paged in by need.
    """
    size, limit = sum(path.stat().st_size for path in paths if path.is_file()), memory_limit()
    try:
        if len(paths) == 1 and size <= 0.9 * limit:
            return read_actions(paths[0], seq_len)
        if size > 0.5 * limit:
            return _map_all_actions(paths, seq_len, limit)
        sequences = np.empty((size // (4 * seq_len * 3), seq_len, 3), np.float32)
        count = 0
        for path in paths:
            x = read_actions(path, seq_len)
            if count + len(x) > len(sequences):  # a file of float16
                sequences.resize((count + len(x), seq_len, 3), refcheck=False)
            sequences[count : count + len(x)] = x
            count += len(x)
        return sequences[:count]
    except MemoryError:
        room = f"{size} bytes of files, {limit} bytes of memory allowed"
        cure = "train on fewer files or allow more memory"
        raise MemoryError(f"{paths[0].parent} does not fit ({room}); {cure}") from None


def _map_all_actions(paths: list[Path], seq_len: int, limit: int) -> np.ndarray:
    """Copy files into a temporary file that is gone with its map, float32 (N, seq_len, 3)."""
    try:
        with tempfile.TemporaryFile() as copy_of_all:
            for path in paths:
                if path.stat().st_size > 0.5 * limit:
                    raise UserError(f"{path} fills more than half of the memory; split it")
                copy_of_all.write(read_actions(path, seq_len).data)
            return np.memmap(copy_of_all, np.float32).reshape(-1, seq_len, 3)
    except OSError as e:
        if is_out_of_memory(e):
            raise MemoryError from None
        place = f"{paths[0].parent} does not fit into memory, nor into a temporary file"
        raise UserError(f"{place} ({e.strerror}); set TMPDIR to a larger disk") from None


def read_actions(path: Path, seq_len: int) -> np.ndarray:
    """Read one `*_actions.npy` as float32 (N, seq_len, 3); UserError names the file and why not."""
    rows = _read_array(path)
    if rows.shape[1:] not in ((3,), (seq_len, 3)):
        shapes = f"[N*{seq_len}, 3] or [N, {seq_len}, 3], got {list(rows.shape)}"
        raise UserError(f"{path} must be {shapes}; set --seq_len or regenerate it")
    rows = rows.reshape(-1, 3)
    if len(rows) == 0 or len(rows) % seq_len:
        got = f"{len(rows)} rows, {len(rows) % seq_len} left over"
        raise UserError(f"{path} must hold gestures of {seq_len} frames, got {got}; set --seq_len")
    return as_data_units(path, rows).reshape(-1, seq_len, 3)


def as_data_units(path: Any, rows: np.ndarray) -> np.ndarray:
    """Return rows (n, 3), perhaps in place, as float32 in [0, 1], press 0 or 1.

    UserError names `path` and the number that is neither, by more than rounding.
    """
    _check_numbers(path, rows)
    rows = rows.astype(np.float32, order="C", copy=False)
    np.clip(rows, 0, 1, out=rows)
    rows += 0.0  # -0.0 becomes 0.0
    np.rint(rows[:, 2], out=rows[:, 2])
    return rows


def _read_array(path: Path) -> np.ndarray:
    """Read an .npy file of floats; no pickle is opened, and no more is read than the file holds."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        promised = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        if not isinstance(promised, np.memmap):
            raise ValueError("an archive")
        excess = path.stat().st_size - promised.offset - promised.nbytes
        if excess:
            raise ValueError(f"{excess} bytes too many")
        data = np.load(path, allow_pickle=False)
    except Exception as e:  # damage shows as many kinds of exception
        if is_out_of_memory(e):
            raise MemoryError(f"{path} does not fit into memory; split it") from None
        raise UserError(
            f"cannot read {path} as an .npy array ({first_line(e)}); regenerate it"
        ) from None
    if data.dtype.kind != "f":
        raise UserError(f"{path} must hold floats, got {data.dtype}; convert it to float32")
    return data


def _check_numbers(path: Any, rows: np.ndarray) -> None:
    """Raise UserError unless all of rows (n, 3) is finite and in [0, 1], and press is 0 or 1."""
    low, high = float(rows.min()), float(rows.max())
    if not np.isfinite([low, high]).all():
        bad = np.argwhere(~np.isfinite(rows))
        first = f"row {bad[0][0]}, column {CHANNELS[bad[0][1]]}"
        raise UserError(f"{path} holds {len(bad)} NaN or infinite values, the first in {first}")
    if low < -SLACK or high > 1 + SLACK:
        got = f"[{low:g}, {high:g}]"
        raise UserError(f"{path} must lie in [0, 1], got {got}; divide pixels by the screen's size")
    for first_row in range(0, len(rows), _FRAMES_AT_ONCE):
        press = rows[first_row : first_row + _FRAMES_AT_ONCE, 2]
        between = np.flatnonzero((press > SLACK) & (press < 1 - SLACK))
        if len(between):
            got = f"{press[between[0]]:g} in row {first_row + between[0]}"
            cure = "threshold pressure at 0.5"
            raise UserError(f"{path}: press must be 0 or 1, got {got}; {cure}")


def read_context(folder: str | Path, num: int, context_dim: int) -> np.ndarray:
    """Read the goals of `num` gestures, float32 (num, context_dim); UserError for bad ones.

    They lie in one `*_context.npy` beside each `*_actions.npy`.
    """
    paths = [_context_path(path) for path in action_files(folder)]
    try:
        context = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
        if context.shape != (num, context_dim) or not np.isfinite(context).all():
            raise ValueError(f"got {list(context.shape)}, or not finite")
    except Exception as e:  # damage shows as many kinds of exception
        beside = f"*{CONTEXT} beside each *{ACTIONS}, in all"
        needed = f"{beside} {num} rows of --context_dim {context_dim}"
        raise UserError(f"{folder} must hold {needed} ({first_line(e)})") from None
    return context.astype(np.float32)


def _context_path(path: Path) -> Path:
    """Return the file of goals that belongs to a file of gestures."""
    return path.with_name(path.name.removesuffix(ACTIONS) + CONTEXT)


# ---- writer ----------------------------------------------------------------------------


def write_actions(path: Path, x: np.ndarray) -> None:
    """Write gestures (N, L, 3), data units, as one `*_actions.npy`, whole or not at all."""
    content = BytesIO()
    np.save(content, x.reshape(-1, x.shape[-1]))
    write_whole(path, content.getvalue())


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


Render = Callable[[slice], np.ndarray]


def write_gestures(
    output_dir: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    draw: Callable[[], tuple[Render, Mapping[str, Any]]],
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> GeneratedDataset:
    """Write a data set, or find the same one finished in the folder.

    Args:
        output_dir: the folder, made if missing.
        arguments: everything that decides the bytes; holds num_sequences, sequence_length and
            sequences_per_file.
        draw: called if there is something to write; returns a function that renders the gestures
            of a slice, (n, L, 3) float32, and further entries of the manifest.
        overwrite: replace the data set that is there; only its own files are removed.
        progress: show a bar, on a terminal only.

    Raises:
        UserError: the folder cannot be written, is being written, or holds other data.
        OSError: the disk failed or is full; no half file and no manifest is left.
    """
    folder, names = as_folder(output_dir, "output_dir"), _batch_names(arguments)
    if not os.path.isdir(folder):
        make_folder(folder)
    with _locked(folder):
        manifest, old = _check_folder(folder, names, arguments, overwrite=overwrite)
        if manifest is not None:
            return GeneratedDataset(folder, manifest, written=False)
        render, notes = draw()
        _remove(folder, old)
        manifest = _write_all(folder, names, arguments, render, notes, progress)
        return GeneratedDataset(folder, manifest, written=True)


def check_writable(folder: Path, arguments: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise what `write_gestures` would raise before it changes a folder; a new one is not made."""
    names = _batch_names(arguments)
    if os.path.isdir(folder):
        with _locked(folder):
            _check_folder(folder, names, arguments, overwrite=overwrite)
    elif os.path.lexists(folder):
        make_folder(folder)  # says why a file is no folder


def write_context(folder: str | Path, context: np.ndarray) -> None:
    """Write goals, (N, D), beside the N gestures that `write_gestures` wrote into a folder."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or len(context) != manifest["count"]:
        raise UserError(f"{folder} must hold {len(context)} gestures, one for each goal")
    first = 0
    for file in manifest["files"]:
        stop = first + file["rows"] // manifest["sequence_length"]
        content = BytesIO()
        np.save(content, np.asarray(context[first:stop], "<f4"))
        write_whole(_context_path(folder / file["name"]), content.getvalue())
        first = stop


def _batch_names(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the batch files; UserError if six digits cannot order them."""
    num_files = -(-arguments["num_sequences"] // arguments["sequences_per_file"])
    if num_files > _MAX_FILES:
        raise UserError(
            f"sequences_per_file must give at most {_MAX_FILES} files, "
            f"got {arguments['sequences_per_file']}, which gives {num_files}"
        )
    return [f"batch_{index:06d}{ACTIONS}" for index in range(num_files)]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is written; the system frees it when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers at once are not kept apart there
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"cannot use the folder {folder} ({e.strerror}); choose another") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or choose another folder"
            raise UserError(f"another process is writing into {folder}; {cure}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _check_folder(
    folder: Path, names: list[str], arguments: Mapping[str, Any], *, overwrite: bool
) -> tuple[Manifest | None, set[str]]:
    """Return the manifest if the data set is there, else None and the names of files to replace.

    Raises what `write_gestures` raises, and changes nothing.
    """
    data_names = {name for name in os.listdir(folder) if _is_of_gestures(name)}
    manifest = _check_free(folder, data_names, arguments, names, overwrite=overwrite)
    if manifest is not None:
        return manifest, set()
    old = _check_replaceable(folder, data_names)
    _check_room(folder, old, names, arguments)
    return None, old


def _check_free(
    folder: Path,
    data_names: set[str],
    arguments: Mapping[str, Any],
    names: list[str],
    *,
    overwrite: bool,
) -> Manifest | None:
    """Return the manifest if the data set is there, intact; None if it may be written."""
    if overwrite:
        return None
    cure = "pass --overwrite (overwrite=True) to replace it, or choose an empty folder"
    manifest = read_manifest(folder)
    if manifest is None:
        if data_names:
            what = f"{len(data_names)} *{ACTIONS} but no {MANIFEST_NAME}"
            raise UserError(f"{folder} holds {what}, as an interrupted run leaves it; {cure}")
        return None
    there = manifest.get("arguments")
    if not isinstance(there, dict):
        raise UserError(f"{folder / MANIFEST_NAME} is of another program; {cure}")
    if there != arguments:
        keys = [key for key in {**arguments, **there} if there.get(key) != arguments.get(key)]
        change = ", ".join(f"{key} {there.get(key)} -> {arguments.get(key)}" for key in keys)
        raise UserError(f"{folder} holds another data set ({change}); {cure}")
    if [file["name"] for file in manifest["files"]] != names:
        raise UserError(f"{folder / MANIFEST_NAME} does not list its files; {cure}")
    check_manifest(folder, sorted(data_names), arguments["sequence_length"])
    return manifest


def _check_replaceable(folder: Path, data_names: set[str]) -> set[str]:
    """Return the names of the old data set's files; UserError if there are files of others."""
    ours = {name for name in data_names if _BATCH_NAME.fullmatch(name)}
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            ours &= {file["name"] for file in manifest["files"]}
    except UserError:  # damaged: by our form of names alone
        pass
    if foreign := sorted(data_names - ours):
        fault = "was not written here and would mix with the new data"
        raise UserError(f"{folder / foreign[0]} {fault}; move it away or choose an empty folder")
    return ours


def _check_room(
    folder: Path, old: set[str], names: list[str], arguments: Mapping[str, Any]
) -> None:
    """Raise if the folder cannot be written, or the new data set would not fit on the disk."""
    make_folder(folder)
    needed = arguments["num_sequences"] * arguments["sequence_length"] * BYTES_PER_FRAME
    freed = sum((folder / name).lstat().st_size for name in old)
    if needed > shutil.disk_usage(folder).free + freed:
        with disk_faults_named(folder / names[0], needed, "make room or ask for less"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _remove(folder: Path, old: set[str]) -> None:
    """Remove the old data set, with its goals, and left-over temporary files."""
    # The manifest goes first: from here on the folder counts as unfinished.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    old |= {_context_path(Path(name)).name for name in old}
    for name in os.listdir(folder):
        if name in old or _TEMPORARY_NAME.fullmatch(name):
            (folder / name).unlink()


def _write_all(
    folder: Path,
    names: list[str],
    arguments: Mapping[str, Any],
    render: Render,
    notes: Mapping[str, Any],
    progress: bool,
) -> Manifest:
    """Write the files of gestures, then the manifest, and return it."""
    count, length = arguments["num_sequences"], arguments["sequence_length"]
    per_file = arguments["sequences_per_file"]
    files = []
    for index, name in enumerate(bar(names, "writing", "file") if progress else names):
        first, stop = index * per_file, min((index + 1) * per_file, count)
        rows = (stop - first) * length
        chunks = _npy_chunks(render, first, stop, length)
        digest = _write_chunks(folder / name, chunks, rows * BYTES_PER_FRAME)
        files.append({"name": name, "rows": rows, "sha256": digest})
    # Synchronising at the end costs a fraction of doing it file by file (the kernel has written
    # most of it by then) and protects as much: until the manifest exists nobody trusts the data.
    for file in files:
        path = folder / str(file["name"])
        with disk_faults_named(path, path.stat().st_size, _AGAIN):
            sync(path)
    sync(folder)
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
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def _npy_chunks(render: Render, first: int, stop: int, length: int) -> Iterator[bytes | memoryview]:
    """Yield the bytes of an .npy file: the header, then the gestures some at a time."""
    header = BytesIO()
    shape = ((stop - first) * length, 3)
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    yield header.getvalue()
    step = max(_FRAMES_AT_ONCE // length, 1)
    for row in range(first, stop, step):
        gestures = render(slice(row, min(row + step, stop)))
        yield np.ascontiguousarray(gestures, dtype="<f4").data.cast("B")


def _write_chunks(path: Path, chunks: Iterable[bytes | memoryview], num_bytes: int) -> str:
    """Write a file that appears only when it is whole; return the SHA-256 of its content."""
    digest, temporary = hashlib.sha256(), path.with_name(f".{path.name}.tmp")
    with disk_faults_named(path, num_bytes, _AGAIN):
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()
