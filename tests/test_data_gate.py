"""The gate before a run: the same gesture is found however it was stored, and nothing else is.

Why: a validation gesture that is also trained on makes every score too good; a gate that takes two
gestures for one refuses good data. Copies are made by what happens to files: another number type,
six decimals, -0.0. Near-misses differ by just more than is allowed, on both sides of where rounding
to a grid would tell them apart.

    python -m pytest tests/test_data_gate.py
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, L, make_gestures, press, python

from trainlib.data_gate import SAME, check_data, check_idle_is_zero, shared_gestures
from trainlib.errors import UserError
from trainlib.gesture_files import read_gestures


def brute_force(x_train, x_val):
    """The definition, pair by pair."""
    found = []
    for i, v in enumerate(x_val.astype(np.float64)):
        is_still = v[:, 2].all() and (np.ptp(v[:, :2], axis=0) <= SAME + 1e-9).all()
        if v[:, 2].any() and not is_still:
            differences = [np.abs(t - v).max() for t in x_train.astype(np.float64)]
            if min(differences) <= SAME + 6e-8:  # float32
                found.append(i)
    return found


def negative_zeros(x):
    return np.where(x == 0, np.float32(-0.0), x)


COPIES = {
    "the same": lambda x: x,
    "-0.0": negative_zeros,
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    "six decimals": lambda x: np.round(x.astype(float), 6).astype(np.float32),
    "four decimals": lambda x: np.round(x.astype(float), 4).astype(np.float32),
    "three decimals": lambda x: np.round(x.astype(float), 3).astype(np.float32),
    "float64": lambda x: x.astype(np.float64),
    "all a little larger": lambda x: x + np.float32([4.9e-4, 4.9e-4, 0]) * x[..., 2:],
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(name):
    x_train, x_val = make_gestures(200).numpy(), make_gestures(90, seed=1).numpy()
    x_train[4], x_val[2] = 0, 0
    assert shared_gestures(x_train, x_val).tolist() == []
    x_val = x_val.astype(COPIES[name](x_train).dtype)
    x_val[5:60:5] = COPIES[name](x_train)[199:188:-1]
    assert shared_gestures(x_train, x_val).tolist() == list(range(5, 60, 5))
    assert shared_gestures(x_val, x_train).tolist() == list(range(189, 200))


@pytest.mark.parametrize("center", [0.5, 0.5005, 0.50025, 0.49975, 0.12345, 0.0005])
@pytest.mark.parametrize("axis", [0, 1])
def test_near_misses_are_not_found_wherever_a_grid_would_lie(center, axis):
    """One number of one frame differs, by just less and by just more than SAME."""
    gesture = make_gestures(1, seed=3).numpy()
    frame = gesture[0, :, 2].argmax() + 1
    gesture[0, frame, axis] = center
    for distance, expected in ((4e-4, [0]), (4.99e-4, [0]), (5e-4, [0]), (5.02e-4, []), (6e-4, [])):
        for sign in (1, -1):
            other = gesture.copy()
            other[0, frame, axis] = np.float32(center + sign * distance)
            assert shared_gestures(gesture, other).tolist() == expected, (distance, sign)


def test_a_press_in_another_frame_is_another_gesture():
    gesture = press(L, (3, 9)).numpy()
    for spans in ([(3, 8)], [(2, 9)], [(4, 10)], [(3, 5), (7, 9)], [(3, 9), (12, 12)]):
        assert shared_gestures(gesture, press(L, *spans).numpy()).tolist() == []
    assert shared_gestures(gesture, gesture).tolist() == [0]


def test_windows_without_an_event_do_not_count():
    idle, held = np.zeros((1, L, 3), np.float32), press(L, (0, L - 1)).numpy()
    trembles = held + np.float32([4e-4, 0, 0]) * (np.arange(L) % 2)[:, None]
    for still in (idle, held, trembles, negative_zeros(idle)):
        assert shared_gestures(still, still).tolist() == []
    moves = held.copy()
    moves[0, -1, 0] += 0.01
    released = press(L, (0, L - 2)).numpy()
    for event in (moves, released):
        assert shared_gestures(event, event).tolist() == [0]


def test_the_definition_on_crowded_sets():
    """Few places and few press patterns, so that most candidates are near and not the same."""
    rng = np.random.default_rng(0)
    sets = []
    for num in (400, 150):
        x = np.zeros((num, 12, 3), np.float32)
        for gesture in x:
            first, n = rng.integers(0, 2), rng.choice([4, 11, 12])
            gesture[first : first + n, 2] = 1
            places = 0.5 + 0.0004 * rng.integers(0, 3, (12, 2)) * (rng.random((12, 1)) < 0.2)
            gesture[..., :2] = places * gesture[..., 2:]
        sets.append(x)
    expected = brute_force(*sets)
    assert 20 < len(expected) < 130
    assert shared_gestures(*sets).tolist() == expected


@pytest.mark.parametrize("length", [3, 8, 20, 64, 65, 250])
def test_any_length(length):
    x = np.zeros((4, length, 3), np.float32)
    for i in range(3):
        x[i, i:] = 0.3, 0.2 * i, 1
    x[0, -1, 0] = 0.9
    assert shared_gestures(x, x[::-1]).tolist() == [1, 2, 3]
    assert shared_gestures(x[:0], x).tolist() == shared_gestures(x, x[:0]).tolist() == []


def test_the_committed_sets_share_nothing_within_a_second():
    sets = [read_gestures(ROOT / "diffusion_test_data" / name, 250) for name in ("train", "val")]
    began = time.monotonic()
    assert shared_gestures(*sets).tolist() == []
    assert time.monotonic() - began < 5  # 0.2 s on a quiet machine
    leaked = sets[1].copy()
    leaked[::100] = sets[0][::500].astype(np.float16)
    assert shared_gestures(sets[0], leaked).tolist() == list(range(0, 1000, 100))


def test_many_copies_of_one_gesture_take_no_longer():
    x = np.repeat(make_gestures(1).numpy(), 20_000, axis=0)
    began = time.monotonic()
    assert len(shared_gestures(x, x)) == 20_000  # 4e8 pairs
    assert time.monotonic() - began < 15


def test_a_large_set_is_read_some_at_a_time(tmp_path):
    """150 MB on disk, in a process that may take 40 MB more than it has."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (50_000, 250, 3))
    small = read_gestures(ROOT / "diffusion_test_data" / "train", 250)
    for i in range(10):
        x[5000 * i : 5000 * (i + 1)] = small
    x.flush()
    code = (
        "import re, resource, sys; from pathlib import Path; import numpy as np;"
        "from trainlib.data_gate import *;"
        "status = Path('/proc/self/status').read_text();"
        "taken = 1024 * int(re.search(r'VmData:\\s*(\\d+)', status)[1]);"
        "resource.setrlimit(resource.RLIMIT_DATA, (taken + 40_000_000,) * 2);"
        "x = np.load(sys.argv[1], mmap_mode='r'); check_idle_is_zero(x, 'x');"
        "print(len(shared_gestures(x, x[::50])))"
    )
    done = python("-c", code, tmp_path / "x.npy")
    assert done.stdout == "1000\n", done.stderr


@pytest.mark.parametrize("axis", [0, 1])
def test_what_moves_while_idle_is_refused(axis):
    x = make_gestures(5000).numpy()
    check_idle_is_zero(x, "train")
    x[4500, 0, axis] = 1e-3
    with pytest.raises(UserError, match=r"val has x or y above 0 .* \(gesture 4500\); cure me$"):
        check_idle_is_zero(x, "val", "cure me")


@pytest.mark.parametrize("at_fault", ["train", "val"])
def test_validation_is_held_to_what_training_is(at_fault):
    sets = {"train": make_gestures(9).numpy(), "val": make_gestures(4, seed=1).numpy()}
    off = {"augment": False, "contacts": False, "allow_overlap": False}
    config = SimpleNamespace(data_dir="T", val_data_dir="V", seq_len=L, **off)
    check_data(sets["train"], sets["val"], config)
    sets[at_fault][2, 0, 1] = 0.1  # moves while idle
    check_data(sets["train"], sets["val"], config)
    for option in ("augment", "contacts"):
        asked = SimpleNamespace(**{**vars(config), option: True})
        where = {"train": "T", "val": "V"}[at_fault]
        with pytest.raises(UserError, match=rf"^{where} has x or y .*--no-augment --no-contacts"):
            check_data(sets["train"], sets["val"], asked)
    sets["val"][3] = sets["train"][5]
    with pytest.raises(UserError, match=r"1 gestures of V are in T too; .*--allow_overlap"):
        check_data(sets["train"], sets["val"], config)
    check_data(sets["train"], sets["val"], SimpleNamespace(**{**vars(config), "allow_overlap": 1}))
    for bad in (sets[at_fault][:0], sets[at_fault][:, 1:], sets[at_fault][..., :2]):
        with pytest.raises(UserError, match=rf"^{where} must hold gestures \[{L}, 3\], got"):
            check_data(*(sets | {at_fault: bad}).values(), config)
