"""The table of gesture types: one rule for numpy and torch, and rows that agree with each other.

Why: metric keys, colours, the generator and the classifier read this table; a second rule, or a row
that contradicts another, would show as a wrong share somewhere else. The rule is compared with the
plan's own, written here in plain Python.

    python -m pytest tests/test_gestures.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import python

from trainlib.gestures import CLICK_DISTANCE, GESTURE_TYPES, MOVES, TABLE, classify_moves


def plan_type(dx, dy, pressed):
    """The plan's classify_gesture."""
    if not pressed:
        return "none"
    if math.hypot(dx, dy) < 0.05:
        return "click"
    if abs(dx) > 2 * abs(dy):
        return "horizontal"
    return "vertical" if abs(dy) > 2 * abs(dx) else "diagonal"


@pytest.mark.parametrize("array", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_the_rule_is_the_plans(array):
    rng = np.random.default_rng(0)
    moves = rng.uniform(-0.2, 0.2, (2000, 2))
    moves[:9] = [(0, 0), (0.049, 0), (0, 0.05), (0.03, 0.035), (0.051, 0), (-0.3, 0.1), (0.1, -0.3),
                 (0.25, 0.125), (-0.125, 0.25)]  # fmt: skip
    pressed = rng.random(2000) < 0.9
    kind = classify_moves(array(moves[:, 0]), array(moves[:, 1]), array(pressed))
    assert kind.dtype in (np.int64, torch.int64)
    expected = [plan_type(*move, p) for move, p in zip(moves.tolist(), pressed, strict=True)]
    assert [GESTURE_TYPES[i] for i in kind] == expected and set(expected) == set(GESTURE_TYPES)


def test_float32_is_judged_alike_by_numpy_and_torch_next_to_the_boundary():
    angle = np.random.default_rng(1).uniform(0, 2 * np.pi, 100_000)
    distance = CLICK_DISTANCE * (1 + 1e-7 * np.random.default_rng(2).normal(size=len(angle)))
    dx = (distance * np.cos(angle)).astype(np.float32)
    dy = (distance * np.sin(angle)).astype(np.float32)
    pressed = np.ones(len(dx), bool)
    kind = classify_moves(dx, dy, pressed)
    theirs = classify_moves(*map(torch.from_numpy, (dx, dy, pressed)))
    assert 0.2 < (kind == 1).mean() < 0.8 and np.array_equal(kind, theirs.numpy())
    assert np.array_equal(kind == 1, torch.hypot(*map(torch.from_numpy, (dx, dy))) < 0.05)


def test_the_order_that_metric_keys_rely_on():
    assert GESTURE_TYPES == ("none", "click", "horizontal", "vertical", "diagonal")


def test_rows_are_told_apart_and_what_is_drawn_is_classified_as_drawn():
    for column in ("name", "label", "color"):
        assert len({getattr(row, column) for row in TABLE}) == len(TABLE)
    assert list(MOVES) == list(GESTURE_TYPES[1:]) and len(set(MOVES.values())) == len(MOVES)
    drawn = 0.2 * np.array(list(MOVES.values()))  # each row's axes move alike
    kind = classify_moves(drawn[:, 0], drawn[:, 1], np.ones(len(drawn), bool))
    assert [GESTURE_TYPES[i] for i in kind] == list(MOVES)


@pytest.mark.parametrize(
    "module", ["gestures", "gesture_files", "data_gate", "memory", "errors", "files", "provenance"]
)
def test_numpy_is_all_that_is_imported(module):
    code = (
        f"import sys, trainlib.{module};"
        "print(sorted({'torch', 'tqdm', 'matplotlib', 'wandb', 'scipy'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")
