"""Folders of gestures: every right file is read to the bit, every wrong one refused by name.

Why: silently dropped rows, a backup taken for data, pixels taken for shares of the screen, or a
pickle that runs code are found weeks later. Right files come from numpy's own variants of one array
and from the writer; wrong ones are made by hand. The writer's promises about kills and full disks
are tested through the generator, in test_augmentation.py.

    python -m pytest tests/test_gesture_files.py
"""

import io
import json
import os
import pickle
import struct
import threading

import numpy as np
import pytest
from conftest import L, make_gestures, python

from trainlib import gesture_files
from trainlib.errors import UserError
from trainlib.files import sha256_of
from trainlib.gesture_files import (
    action_files,
    check_writable,
    read_actions,
    read_context,
    read_gestures,
    write_context,
    write_gestures,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

ROWS = make_gestures(4).numpy().reshape(-1, 3)  # (80, 3)


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), **options)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def header(shape, descr="<f4"):
    """A header that promises what does not follow."""
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def changed(row, column, value):
    rows = ROWS.copy()
    rows[row, column] = value
    return npy(rows)


class Canary:
    """A pickle that leaves a trace when opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


BAD_FILES = {
    # name: (content, words of the message)
    "empty file": (b"", []),
    "text": (b"x,y,press\n0,0,0\n", []),
    "npz renamed": (npz(x=ROWS), []),
    "broken zip": (b"PK\x03\x04" + bytes(60), []),
    "int": (npy((ROWS * 100).astype(np.int64)), ["int64"]),
    "uint8": (npy((ROWS * 100).astype(np.uint8)), ["uint8"]),
    "bool": (npy(ROWS > 0.5), ["bool"]),
    "complex": (npy(ROWS.astype(np.complex64)), ["complex64"]),
    "text array": (npy(ROWS.astype("U5")), ["U5"]),
    "structured": (npy(np.zeros(80, [("x", "f4"), ("y", "f4"), ("press", "f4")])), ["press"]),
    "0 dimensions": (npy(np.float32(0.5)), ["[]"]),
    "1 dimension": (npy(ROWS.ravel()), ["[240]"]),
    "2 columns": (npy(ROWS[:, :2]), ["[80, 2]"]),
    "4 columns": (npy(np.ones((80, 4), np.float32)), ["[80, 4]"]),
    "4 dimensions": (npy(ROWS.reshape(2, 2, 20, 3)), ["[2, 2, 20, 3]"]),
    "other length": (npy(ROWS.reshape(8, 10, 3)), ["[8, 10, 3]", "--seq_len"]),
    "transposed": (npy(ROWS.reshape(4, 20, 3).transpose(0, 2, 1)), ["[4, 3, 20]"]),
    "a row less": (npy(ROWS[:-1]), ["79 rows", "19 left over"]),
    "too short": (npy(ROWS[:19]), ["19 rows"]),
    "no rows": (npy(ROWS[:0]), ["0 rows"]),
    "truncated": (npy(ROWS)[:-1], []),
    "bytes too many": (npy(ROWS) + b"ab", ["2 bytes too many"]),
    "header only": (npy(ROWS)[:128], []),
    "half a header": (npy(ROWS)[:40], []),
    "a terabyte promised": (header((10**11, 3)), []),
    "negative shape": (header((-80, 3)), []),
    "NaN": (changed(41, 1, np.nan), ["row 41", "column y", "1 NaN"]),
    "+Inf": (changed(0, 0, np.inf), ["row 0", "column x"]),
    "-Inf": (changed(79, 2, -np.inf), ["row 79", "column press"]),
    "pixels": (npy(ROWS * 1920), ["pixels"]),
    "below 0": (changed(5, 0, -0.5), ["-0.5"]),
    "press 2": (changed(5, 2, 2.0), ["2"]),
    "pressure": (changed(12, 2, 0.37), ["press must be 0 or 1, got 0.37 in row 12", "threshold"]),
    "half pressed": (changed(79, 2, 0.5), ["0.5 in row 79"]),
    "just above 0": (changed(0, 2, 2e-6), ["2e-06 in row 0"]),
    "just below 1": (changed(3, 2, 1 - 2e-6), ["in row 3"]),
    "pressure of float64": (npy(np.full((L, 3), 0.25)), ["0.25 in row 0"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content, words = BAD_FILES[name]
    path = tmp_path / "some_actions.npy"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_gestures(tmp_path, L)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("form", ["object array", "raw pickle", "npz of objects"])
def test_no_pickle_is_opened(tmp_path, form):
    canary = tmp_path / "canary"
    payload = np.array([Canary(canary)], dtype=object)
    content = {
        "object array": lambda: npy(payload, allow_pickle=True),
        "raw pickle": lambda: pickle.dumps(Canary(canary)),
        "npz of objects": lambda: npz(x=payload),
    }[form]()
    (tmp_path / "some_actions.npy").write_bytes(content)
    with pytest.raises(UserError, match="some_actions"):
        read_gestures(tmp_path, L)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # the canary does sing when it is opened
    assert canary.exists()


@pytest.mark.parametrize("what", ["missing", "file", "empty", "other files"])
def test_folders_without_data(tmp_path, what):
    folder = tmp_path / "data"
    if what == "file":
        folder.write_bytes(npy(ROWS))
    elif what != "missing":
        folder.mkdir()
    if what == "other files":
        (folder / "actions.npy").write_bytes(npy(ROWS))
        (folder / "x_actions.npy.tmp").write_bytes(npy(ROWS))
    with pytest.raises(UserError, match=str(folder)):
        read_gestures(folder, L)


@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_names_that_are_no_file(tmp_path, what):
    path = tmp_path / "x_actions.npy"
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="x_actions"):
        read_gestures(tmp_path, L)


GOOD_ARRAYS = {
    "float64": ROWS.astype(np.float64),
    "big-endian": ROWS.astype(">f4"),
    "big-endian float64": ROWS.astype(">f8"),
    "Fortran order": np.asfortranarray(ROWS),
    "[N, L, 3]": ROWS.reshape(-1, L, 3),
    "[N, L, 3] Fortran": np.asfortranarray(ROWS.reshape(-1, L, 3)),
}


@pytest.mark.parametrize("name", GOOD_ARRAYS)
def test_variants_of_one_array_load_to_the_bit(tmp_path, name):
    np.save(tmp_path / "x_actions.npy", GOOD_ARRAYS[name])
    x = read_gestures(tmp_path, L)
    assert x.dtype == np.float32 and x.dtype.isnative and x.flags.c_contiguous
    np.testing.assert_array_equal(x, ROWS.reshape(-1, L, 3))


def test_float16_is_converted_exactly(tmp_path):
    half = ROWS.astype(np.float16)
    np.save(tmp_path / "x_actions.npy", half)
    x = read_gestures(tmp_path, L)
    np.testing.assert_array_equal(x, half.astype(np.float32).reshape(-1, L, 3))


def test_rounding_just_outside_is_clipped(tmp_path):
    rows = ROWS.astype(np.float64)
    rows[3, 0], rows[4, 0] = -5e-7, 1 + 5e-7
    np.save(tmp_path / "x_actions.npy", rows)
    x = read_gestures(tmp_path, L)
    assert x.min() == 0 and x.max() == 1


def test_press_is_rounded_and_no_zero_is_negative(tmp_path):
    rows = ROWS.astype(np.float64)
    idle = rows[:, 2] == 0
    rows[idle] = -0.0
    rows[:, 2] += np.where(idle, 5e-7, -5e-7)
    np.save(tmp_path / "x_actions.npy", rows)
    x = read_gestures(tmp_path, L)
    assert set(np.unique(x[..., 2])) == {0, 1} and not np.signbit(x).any()
    np.testing.assert_array_equal(x, ROWS.reshape(-1, L, 3))


def test_files_are_taken_in_the_order_of_their_names(tmp_path):
    parts = {name: make_gestures(3, seed=i).numpy() for i, name in enumerate("dbca")}
    for name, x in parts.items():
        np.save(tmp_path / f"{name}_actions.npy", x)
    expected = np.concatenate([parts[n] for n in "abcd"])
    np.testing.assert_array_equal(read_gestures(tmp_path, L), expected)
    assert [p.name[0] for p in action_files(tmp_path)] == list("abcd")


@hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), max_size=4),
    st.integers(0, 1088),
)
def test_any_bytes_load_or_are_refused(tmp_path_factory, changes, length):
    content = bytearray(npy(ROWS))
    for position, data in changes:
        content[position : position + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "fuzz_actions.npy"
    path.write_bytes(content if length > 1000 else content[:length])
    try:
        x = read_actions(path, L)
    except UserError as error:
        assert "fuzz_actions.npy" in str(error)
    else:
        assert x.dtype == np.float32 and x.shape[1:] == (L, 3) and len(x)
        assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("num_files", [1, 16])
def test_a_set_is_held_once_in_memory(tmp_path, num_files):
    gestures = np.full((16000 // num_files, 250, 3), 1, np.float32)  # 48 MB in all
    for i in range(num_files):
        np.save(tmp_path / f"batch_{i}_actions.npy", gestures)
    code = (
        "import resource, sys; from trainlib.gesture_files import read_gestures;"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); x = read_gestures(sys.argv[1], 250);"
        "print((peak() - before) / x.nbytes)"
    )
    done = python("-c", code, tmp_path)
    assert float(done.stdout) < 1.2, done.stderr  # of 16 files one more is there at a time


def test_a_set_larger_than_the_memory_is_paged_in_from_disk(tmp_path):
    """96 MB in 8 files; the process may take 50 MB more than it has, and believes in 100 MB."""
    gestures = np.zeros((4000, 250, 3), np.float32)
    for i in range(8):
        gestures[:, 0, 0] = i / 8
        np.save(tmp_path / f"batch_{i}_actions.npy", gestures)
    code = (
        "import re, resource, sys; from pathlib import Path; from trainlib import gesture_files;"
        "gesture_files.memory_limit = lambda: int(sys.argv[2]);"
        "status = Path('/proc/self/status').read_text();"
        "taken = 1024 * int(re.search(r'VmData:\\s*(\\d+)', status)[1]);"
        "resource.setrlimit(resource.RLIMIT_DATA, (taken + 50_000_000,) * 2);"
        "x = gesture_files.read_gestures(sys.argv[1], 250);"
        "print(len(x), x[::4000, 0, 0].tolist())"
    )
    done = python("-c", code, tmp_path, 100_000_000)
    assert done.stdout.split(" ", 1) == ["32000", f"{[i / 8 for i in range(8)]}\n"], done.stderr
    assert python("-c", code, tmp_path, 10**12).returncode, "the limit limits nothing"


def test_one_file_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "x_actions.npy", ROWS)
    monkeypatch.setattr(gesture_files, "memory_limit", lambda: 1000)
    with pytest.raises(UserError, match=r"x_actions\.npy fills more than half of the memory"):
        read_gestures(tmp_path, L)


def test_no_room_for_the_copy_of_a_large_set_is_said(tmp_path, monkeypatch):
    for i in range(4):
        np.save(tmp_path / f"{i}_actions.npy", ROWS)
    size = (tmp_path / "0_actions.npy").stat().st_size
    monkeypatch.setattr(gesture_files, "memory_limit", lambda: 3 * size)
    monkeypatch.setattr(gesture_files.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        read_gestures(tmp_path, L)


def test_files_of_different_types_are_read_in_order(tmp_path):
    kinds = [("<f2", 20), ("<f2", 80), ("<f8", 60), (">f4", 40)]
    arrays = [ROWS.astype(kind)[:n] for kind, n in kinds]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}_actions.npy", array)
    expected = np.concatenate([a.astype(np.float32) for a in arrays]).reshape(-1, L, 3)
    np.testing.assert_array_equal(read_gestures(tmp_path, L), expected)
    for name in ("2_actions.npy", "3_actions.npy"):  # half as large on disk as in memory
        (tmp_path / name).unlink()
    np.testing.assert_array_equal(read_gestures(tmp_path, L), expected[:5])


def test_more_than_the_process_may_have_is_a_memory_error(tmp_path):
    np.save(tmp_path / "x_actions.npy", np.zeros((40_000, 250, 3), np.float32))  # 120 MB
    code = (
        "import mmap, re, resource, sys; from pathlib import Path;"
        "from trainlib.errors import run_program; from trainlib import gesture_files;"
        "gesture_files.memory_limit = lambda: 10**12;"  # so that it is noticed too late
        "status = Path('/proc/self/status').read_text();"
        "taken = 1024 * int(re.search(r'VmSize:\\s*(\\d+)', status)[1]);"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2);"
        "sys.exit(run_program(lambda: gesture_files.read_gestures(sys.argv[1], 250)))"
    )
    for room in (50_000_000, 130_000_000):  # fails when its header, then when its data is read
        done = python("-c", code, tmp_path, room)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"{tmp_path} does not fit" in done.stderr
    assert python("-c", code, tmp_path, 10**9).returncode == 0


# ---- names and dataset.json ------------------------------------------------------------


def write(folder, x=None, per_file=2, **options):
    x = make_gestures(5).numpy() if x is None else x
    arguments = {"num_sequences": len(x), "sequence_length": L, "sequences_per_file": per_file}
    return write_gestures(folder, arguments, lambda: (lambda rows: x[rows], {}), **options).folder


def test_what_is_written_is_read(tmp_path):
    x = make_gestures(5).numpy()
    folder = write(tmp_path / "a", x)
    np.testing.assert_array_equal(read_gestures(folder, L), x)
    assert [p.name for p in action_files(folder)] == [
        f"batch_{i:06d}_actions.npy" for i in range(3)
    ]


LOOK_ALIKES = {
    "an editor's copy": ".batch_000000_actions.npy",
    "macOS": "._batch_000000_actions.npy",
    "a write that was cut": ".batch_000000_actions.npy.tmp",
    "a download": "batch_000000_actions (1).npy",
    "a backup": "batch_000000_actions.npy.bak",
    "upper case": "BATCH_000000_ACTIONS.NPY",
    "not UTF-8": os.fsdecode(b".\xff_actions.npy"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_file_that_only_looks_like_ours_is_ignored_and_said(tmp_path, name, capsys):
    folder = write(tmp_path / "a")
    capsys.readouterr()
    expected = read_gestures(folder, L)
    assert capsys.readouterr() == ("", "")
    for other in (LOOK_ALIKES[name], "notes.npy", ".lock"):
        (folder / other).write_bytes(npy(ROWS))
    np.testing.assert_array_equal(read_gestures(folder, L), expected)
    err = capsys.readouterr().err
    assert err.startswith("warning: ignored 1 file in ") and err.count("\n") == 1
    assert LOOK_ALIKES[name].encode("utf-8", "backslashreplace").decode() in err


@pytest.mark.parametrize(
    "name", ["old_actions.npy", "Copy of batch_000000_actions.npy", "batch_000003_actions.npy"]
)
def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path, name):
    folder = write(tmp_path / "a")
    (folder / name).write_bytes(npy(ROWS))
    with pytest.raises(UserError, match=f"{name} is not in dataset.json"):
        read_gestures(folder, L)
    (folder / "dataset.json").unlink()
    assert len(read_gestures(folder, L)) == 9  # without a manifest all are read


def edited(**changes):
    def edit(manifest):
        return json.dumps({**manifest, **changes})

    return edit


def listing(**entry):
    return lambda manifest: json.dumps({**manifest, "files": [*manifest["files"], entry]})


BAD_MANIFESTS = {
    "empty": lambda _: "",
    "cut": lambda m: json.dumps(m)[:-20],
    "a list": lambda _: "[]",
    "null": lambda _: "null",
    "too deep": lambda _: "[" * 100_000,
    "no files": lambda m: json.dumps({k: v for k, v in m.items() if k != "files"}),
    "files that are numbers": edited(files=[1, 2]),
    "no length": lambda m: json.dumps({k: v for k, v in m.items() if k != "sequence_length"}),
    "another length": edited(sequence_length=250),
    "another format": edited(format=2),
    "a file that is missing": listing(name="x_actions.npy", sha256="0"),
    "a hidden file": listing(name=".x_actions.npy", sha256="0"),
    "a file elsewhere": listing(name="../x_actions.npy", sha256="0"),
    "a file of another kind": listing(name="README.md", sha256="0"),
    "a name that is none": listing(name=None, sha256="0"),
    "a file twice": lambda m: json.dumps(m | {"files": m["files"] * 2}),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_manifest_that_is_wrong_is_refused(tmp_path, name):
    folder = write(tmp_path / "a")
    path = folder / "dataset.json"
    path.write_text(BAD_MANIFESTS[name](json.loads(path.read_text())))
    with pytest.raises(UserError, match=r"dataset\.json") as error:
        read_gestures(folder, L)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../x_actions.npy", "sub/x_actions.npy", ".x_actions.npy"])
def test_a_manifest_that_lists_what_is_not_read_is_refused(tmp_path, name):
    folder = write(tmp_path / "a")
    (folder / "sub").mkdir()
    (folder / name).write_bytes(npy(ROWS))
    path = folder / "dataset.json"
    whole = listing(name=name, sha256=sha256_of(folder / name))
    path.write_text(whole(json.loads(path.read_text())))
    with pytest.raises(UserError, match="is not a valid manifest"):
        read_gestures(folder, L)


@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_a_manifest_that_is_no_file_is_refused(tmp_path, what):
    folder = write(tmp_path / "a")
    path = folder / "dataset.json"
    path.unlink()
    path.mkdir() if what == "folder" else path.symlink_to("gone")
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_gestures(folder, L)


@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_file_that_the_manifest_contradicts_is_refused(tmp_path, damage):
    folder = write(tmp_path / "a")
    path = folder / "batch_000001_actions.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content) if damage == "a bit" else os.truncate(path, 140)
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"batch_000001_actions\.npy is missing or not what"):
        read_gestures(folder, L)


@pytest.mark.parametrize("folder", ["", None, 3, b"", "a\0b", ["x"], "n" * 300])
def test_a_folder_that_is_none_is_refused(folder):
    for door in (lambda: read_gestures(folder, L), lambda: action_files(folder)):
        with pytest.raises(UserError):
            door()


@pytest.mark.parametrize("seq_len", [0, -20, 20.0, "20", None, True], ids=str)
def test_a_length_that_is_none_is_refused(tmp_path, seq_len):
    np.save(tmp_path / "x_actions.npy", ROWS)
    with pytest.raises(UserError, match=r"seq_len must be .*, got"):
        read_gestures(tmp_path, seq_len)
    assert len(read_gestures(tmp_path, np.int8(20))) == 4


def test_names_that_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xffolder")
    folder.mkdir()
    np.save(folder / os.fsdecode(b"\xfe_actions.npy"), ROWS)
    np.testing.assert_array_equal(read_gestures(folder, L), ROWS.reshape(-1, L, 3))
    np.testing.assert_array_equal(read_gestures(os.fsencode(folder), L), ROWS.reshape(-1, L, 3))
    code = (
        "import sys; from trainlib.errors import run_program;"
        "from trainlib.gesture_files import read_gestures;"
        "sys.exit(run_program(lambda: read_gestures(sys.argv[1], 7)))"
    )
    done = python("-c", code, folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_is_written_by_one_at_a_time(tmp_path):
    x, inside, done = make_gestures(4).numpy(), threading.Event(), threading.Event()
    arguments = {"num_sequences": 4, "sequence_length": L, "sequences_per_file": 2}

    def slow():
        inside.set()
        done.wait(30)
        return lambda rows: x[rows], {}

    first = threading.Thread(target=write_gestures, args=(tmp_path / "a", arguments, slow))
    first.start()
    inside.wait(30)
    try:
        for overwrite in (False, True):
            with pytest.raises(UserError, match="another process is writing"):
                write_gestures(tmp_path / "a", arguments, slow, overwrite=overwrite)
    finally:
        done.set()
        first.join()
    np.testing.assert_array_equal(read_gestures(tmp_path / "a", L), x)
    assert not write_gestures(tmp_path / "a", arguments, slow).written
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".npy", ".json"}  # no lock is left


WRITABLE = {
    "nothing": lambda folder: None,
    "an empty folder": lambda folder: folder.mkdir(),
    "the same set": write,
    "another set": lambda folder: write(folder, per_file=3),
    "a file of others": lambda folder: (folder.mkdir(), (folder / "x_actions.npy").touch()),
    "a file": lambda folder: folder.touch(),
    "a link to nothing": lambda folder: folder.symlink_to("nowhere"),
}


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except UserError as e:
        return str(e)
    return None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", WRITABLE)
def test_the_check_says_what_the_writer_says_and_changes_nothing(tmp_path, name, overwrite):
    folder = tmp_path / "a"
    WRITABLE[name](folder)
    arguments = {"num_sequences": 5, "sequence_length": L, "sequences_per_file": 2}
    there = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    said = error_of(check_writable, folder, arguments, overwrite=overwrite)
    assert there == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert said == error_of(write, folder, overwrite=overwrite)
    is_refused = name.startswith(("a file", "a link")) or (name == "another set" and not overwrite)
    assert (said is not None) == is_refused


# ---- goals -----------------------------------------------------------------------------


def test_goals_lie_beside_the_gestures(tmp_path):
    folder = write(tmp_path / "a")
    goals = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    write_context(folder, goals)
    names = {p.name for p in folder.glob("*_context.npy")}
    assert names == {f"batch_{i:06d}_context.npy" for i in range(3)}
    np.testing.assert_array_equal(read_context(folder, 5, 7), goals)
    assert len(read_gestures(folder, L)) == 5  # they are not gestures

    for num, width in ((4, 7), (5, 6)):
        with pytest.raises(UserError, match=f"{num} rows of --context_dim {width}"):
            read_context(folder, num, width)
    with pytest.raises(UserError, match="must hold 6 gestures"):
        write_context(folder, np.zeros((6, 7)))


def test_goals_that_are_damaged_or_belong_to_nothing_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(UserError, match=r"batch_000000_context\.npy"):
        read_context(folder, 5, 2)
    write_context(folder, np.zeros((5, 2)))
    (folder / ".batch_000001_context.npy").write_bytes(b"an editor's copy")
    np.save(folder / "old_context.npy", np.ones((9, 2)))
    assert not read_context(folder, 5, 2).any()
    path = folder / "batch_000001_context.npy"
    for content in (npy(np.full((2, 2), np.nan)), npy(np.zeros((2, 3))), b"damaged", npz(x=ROWS)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"_context\.npy"):
            read_context(folder, 5, 2)


def test_new_gestures_do_not_keep_old_goals(tmp_path):
    folder = write(tmp_path / "a")
    write_context(folder, np.zeros((5, 2)))
    x = make_gestures(5, seed=1).numpy()
    arguments = {"num_sequences": 5, "sequence_length": L, "sequences_per_file": 3}
    write_gestures(folder, arguments, lambda: (lambda rows: x[rows], {}), overwrite=True)
    assert not list(folder.glob("*_context.npy"))
