"""The loader takes every right file to the bit and refuses every wrong one by name.

Why: silently dropped rows, pixels taken for shares of the screen, or a pickle that runs code are
found weeks later. Right files come from the generator and from numpy's own variants of one array;
wrong ones are made by hand.

    python -m pytest tests/test_dataset.py
"""

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT, L, make_gestures, press, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

import train_diffusion_ddim
from augmentation.click_aug import generate_augmented_dataset
from train_diffusion_ddim import (
    DiffusionActionDataset,
    all_sequences,
    augment,
    count_shared,
    to_data_units,
    to_gesture,
    to_model_units,
)
from trainlib.errors import UserError
from trainlib.gesture_files import read_actions

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
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content, words = BAD_FILES[name]
    path = tmp_path / "some_actions.npy"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        DiffusionActionDataset(tmp_path, L)
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
        DiffusionActionDataset(tmp_path, L)
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
        DiffusionActionDataset(folder, L)


@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_names_that_are_no_file(tmp_path, what):
    path = tmp_path / "x_actions.npy"
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="x_actions"):
        DiffusionActionDataset(tmp_path, L)


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
    x = DiffusionActionDataset(tmp_path, L).sequences
    assert x.dtype == np.float32 and x.dtype.isnative and x.flags.c_contiguous
    np.testing.assert_array_equal(x, ROWS.reshape(-1, L, 3))


def test_float16_is_converted_exactly(tmp_path):
    half = ROWS.astype(np.float16)
    np.save(tmp_path / "x_actions.npy", half)
    x = DiffusionActionDataset(tmp_path, L).sequences
    np.testing.assert_array_equal(x, half.astype(np.float32).reshape(-1, L, 3))


def test_rounding_just_outside_is_clipped(tmp_path):
    rows = ROWS.astype(np.float64)
    rows[3, 0], rows[4, 0] = -5e-7, 1 + 5e-7
    np.save(tmp_path / "x_actions.npy", rows)
    x = DiffusionActionDataset(tmp_path, L).sequences
    assert x.min() == 0 and x.max() == 1


def test_files_are_taken_in_the_order_of_their_names(tmp_path):
    parts = {name: make_gestures(3, seed=i).numpy() for i, name in enumerate("dbca")}
    for name, x in parts.items():
        np.save(tmp_path / f"{name}_actions.npy", x)
    loaded = DiffusionActionDataset(tmp_path, L)
    np.testing.assert_array_equal(loaded.sequences, np.concatenate([parts[n] for n in "abcd"]))
    assert [p.name[0] for p in loaded.action_files] == list("abcd")


def test_items_and_loaders(tmp_path):
    np.save(tmp_path / "x_actions.npy", ROWS)
    dataset = DiffusionActionDataset(str(tmp_path), seq_len=L)
    expected = torch.from_numpy(ROWS.reshape(-1, L, 3))
    assert len(dataset) == 4 and dataset[2].dtype == torch.float32
    assert torch.equal(dataset[2], expected[2])
    assert torch.equal(torch.cat(list(DataLoader(dataset, 3))), expected)
    shuffled = DataLoader(dataset, 3, shuffle=True, drop_last=True)
    assert torch.equal(all_sequences(shuffled), expected)
    assert torch.equal(all_sequences(DataLoader(list(expected), 3)), expected)  # any data set


def test_shared_gestures_are_counted_idle_ones_not():
    x_train, x_val = make_gestures(20), make_gestures(9, seed=1)
    x_train[4], x_val[2] = 0, 0
    assert count_shared(x_train, x_val) == 0
    x_val[5], x_val[8] = x_train[19], x_train[0]
    assert count_shared(x_train, x_val) == 2 and count_shared(x_train, x_train) == 19


def test_the_committed_sets_share_nothing():
    folders = ROOT / "diffusion_test_data" / "train", ROOT / "diffusion_test_data" / "val"
    assert (
        count_shared(*(torch.from_numpy(DiffusionActionDataset(f).sequences) for f in folders)) == 0
    )


def test_what_the_generator_writes_is_what_is_read(tmp_path):
    generate_augmented_dataset(tmp_path, 13, 5, 50, action_type="mixed", sequences_per_file=5)
    dataset = DiffusionActionDataset(tmp_path)
    assert dataset.sequences.shape == (13, 250, 3) and len(dataset.action_files) == 3
    flat = np.concatenate([np.load(p) for p in dataset.action_files])
    np.testing.assert_array_equal(dataset.sequences.reshape(-1, 3), flat)
    assert set(np.unique(dataset.sequences[..., 2])) == {0, 1}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
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
    gestures = np.full((16000 // num_files, 250, 3), 0.5, np.float32)  # 48 MB in all
    for i in range(num_files):
        np.save(tmp_path / f"batch_{i}_actions.npy", gestures)
    code = (
        "import resource, sys, train_diffusion_ddim as tdd;"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); data = tdd.DiffusionActionDataset(sys.argv[1]);"
        "print((peak() - before) / data.sequences.nbytes)"
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
        "import re, resource, sys, torch, train_diffusion_ddim as tdd;"
        "from pathlib import Path;"
        "tdd.memory_limit = lambda: int(sys.argv[2]);"
        "status = Path('/proc/self/status').read_text();"
        "taken = 1024 * int(re.search(r'VmData:\\s*(\\d+)', status)[1]);"
        "resource.setrlimit(resource.RLIMIT_DATA, (taken + 50_000_000,) * 2);"
        "x = torch.from_numpy(tdd.DiffusionActionDataset(sys.argv[1]).sequences);"
        "print(len(x), x[::4000, 0, 0].tolist())"
    )
    done = python("-c", code, tmp_path, 100_000_000)
    assert done.stdout.split(" ", 1) == ["32000", f"{[i / 8 for i in range(8)]}\n"], done.stderr
    assert python("-c", code, tmp_path, 10**12).returncode, "the limit limits nothing"


def test_one_file_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "x_actions.npy", ROWS)
    monkeypatch.setattr(train_diffusion_ddim, "memory_limit", lambda: 1000)
    with pytest.raises(UserError, match=r"x_actions\.npy fills more than half of the memory"):
        DiffusionActionDataset(tmp_path, L)


def test_no_room_for_the_copy_of_a_large_set_is_said(tmp_path, monkeypatch):
    for i in range(4):
        np.save(tmp_path / f"{i}_actions.npy", ROWS)
    size = (tmp_path / "0_actions.npy").stat().st_size
    monkeypatch.setattr(train_diffusion_ddim, "memory_limit", lambda: 3 * size)
    monkeypatch.setattr(train_diffusion_ddim.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        DiffusionActionDataset(tmp_path, L)


def test_files_of_different_types_are_read_in_order(tmp_path):
    arrays = [ROWS.astype(kind)[:n] for kind, n in (("<f2", 20), ("<f8", 60), (">f4", 40))]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}_actions.npy", array)
    expected = np.concatenate([a.astype(np.float32) for a in arrays]).reshape(-1, L, 3)
    np.testing.assert_array_equal(DiffusionActionDataset(tmp_path, L).sequences, expected)


def test_units_are_each_others_inverse():
    x = torch.linspace(0, 1, 101)
    assert to_model_units(x).min() == -1 and to_model_units(x).max() == 1
    assert to_model_units(torch.tensor(0.5)) == 0 and to_data_units(torch.tensor(0.0)) == 0.5
    torch.testing.assert_close(to_data_units(to_model_units(x)), x)


def test_to_gesture_gives_the_file_format():
    x = torch.tensor([[[-0.2, 1.3, 0.6], [0.4, 0.5, 0.5], [0.1, 0.2, 0.9]]])
    expected = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.2, 1.0]]])
    assert torch.equal(to_gesture(x), expected)
    gestures = make_gestures(5)
    assert torch.equal(to_gesture(gestures), gestures)


def images_of(gesture):
    """The 16 mirrored, turned and reversed copies of the touched frames, (n, 2) each."""
    xy = gesture[gesture[:, 2] == 1][:, :2].double().numpy()
    copies = []
    for i in range(16):
        x, y = xy.T
        x, y = 1 - x if i & 1 else x, 1 - y if i & 2 else y
        copy = np.stack([y, x] if i & 4 else [x, y], axis=1)
        copies.append(copy[::-1] if i & 8 else copy)
    return np.stack(copies)


def test_symmetries_are_the_sixteen_images_anywhere_they_fit():
    torch.manual_seed(0)
    gesture = press(L, (4, 9))
    gesture[0, 4:10, :2] = torch.rand(6, 2)
    x = augment(gesture.expand(4800, L, 3))
    images, counts, onsets = images_of(gesture[0]), np.zeros(16), np.zeros(L - 6 + 1)
    for row in x.numpy():
        touched = np.flatnonzero(row[:, 2])
        assert len(touched) == 6 == touched[-1] - touched[0] + 1
        assert not row[row[:, 2] == 0].any()
        distance = np.abs(images - row[touched, :2]).max(axis=(1, 2))
        assert distance.min() < 1e-6
        counts[distance.argmin()] += 1
        onsets[touched[0]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(onsets).pvalue > 1e-3


def test_symmetries_keep_what_has_no_room_and_several_touches():
    torch.manual_seed(0)
    idle, held = torch.zeros(50, L, 3), press(L, (0, L - 1)).expand(50, L, 3)
    assert not augment(idle).any()
    assert (augment(held)[..., 2] == 1).all()
    gaps = set()
    for row in augment(press(L, (2, 4), (9, 10)).expand(50, L, 3))[..., 2].tolist():
        touched = [i for i, p in enumerate(row) if p]
        gaps.add(tuple(i - touched[0] for i in touched))
    assert gaps == {(0, 1, 2, 7, 8), (0, 1, 6, 7, 8)}  # as it was, and reversed


def test_symmetries_draw_each_gesture_by_itself_and_do_not_write_into_it():
    torch.manual_seed(0)
    x_0 = make_gestures(64)
    before = x_0.clone()
    x = augment(x_0)
    assert torch.equal(x_0, before) and x.dtype == x_0.dtype and x.shape == x_0.shape
    assert torch.equal(x[..., 2].sum(dim=1), x_0[..., 2].sum(dim=1))
    assert 0 <= x.min() and x.max() <= 1 and not torch.equal(x, x_0)
