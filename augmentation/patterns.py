"""The evaluation patterns: exact, hand-made sequences with known answers.

Every pattern is one touch along straight legs of equal duration, placed in the middle of the
window. The positions are the test plan's; the durations that it leaves open are chosen here:
10 frames for a click, 50 for a swipe, 75 (the longest of the training data) for the circle.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from augmentation.click_aug import folder_name
from trainlib.errors import UserError, check_choice, first_line
from trainlib.gesture_files import GeneratedDataset, as_folder, write_gestures
from trainlib.gestures import SEQ_LEN
from trainlib.knobs import as_type, check_range

Point = tuple[float, float]

_CORNERS = ((0.1, 0.1), (0.9, 0.9), (0.1, 0.9), (0.9, 0.1))
_CIRCLE_LEGS = 64  # the chords stay within 0.0004 of a circle of radius 0.3

EVAL_PATTERNS: tuple[Mapping[str, Any], ...] = (
    {"pattern": "center_click", "x": 0.5, "y": 0.5, "delta_t": 10},
    {"pattern": "corner_clicks", "positions": _CORNERS},
    {"pattern": "horizontal_swipe", "start": (0.2, 0.5), "end": (0.8, 0.5)},
    {"pattern": "diagonal_swipe", "start": (0.1, 0.1), "end": (0.9, 0.9)},
    {"pattern": "circle_approximation", "center": (0.5, 0.5), "radius": 0.3},
)


def center_click(x: float = 0.5, y: float = 0.5, delta_t: int = 10) -> np.ndarray:
    """Return one click at (x, y), (1, 250, 3) float32."""
    return _trace([(x, y)], delta_t)


def corner_clicks(positions: Sequence[Point] = _CORNERS, delta_t: int = 10) -> np.ndarray:
    """Return one click per position, (n, 250, 3) float32."""
    return np.concatenate([_trace([position], delta_t) for position in positions])


def horizontal_swipe(
    start: Point = (0.2, 0.5), end: Point = (0.8, 0.5), delta_t: int = 50
) -> np.ndarray:
    """Return one swipe, by default from left to right, (1, 250, 3) float32."""
    return _trace([start, end], delta_t)


def diagonal_swipe(
    start: Point = (0.1, 0.1), end: Point = (0.9, 0.9), delta_t: int = 50
) -> np.ndarray:
    """Return one swipe, by default from corner to corner, (1, 250, 3) float32."""
    return _trace([start, end], delta_t)


def circle_approximation(
    center: Point = (0.5, 0.5), radius: float = 0.3, delta_t: int = 75
) -> np.ndarray:
    """Return one full turn of a finger that stays down, (1, 250, 3) float32.

    It starts and ends at (center x + radius, center y) and first moves towards larger y. The
    training data holds nothing like it: every training gesture is straight.
    """
    angles = [2 * math.pi * leg / _CIRCLE_LEGS for leg in range(_CIRCLE_LEGS)]
    points = [
        (center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle))
        for angle in angles
    ]
    return _trace([*points, points[0]], delta_t)


_MAKERS: Mapping[str, Callable[..., np.ndarray]] = {
    maker.__name__: maker
    for maker in (
        center_click,
        corner_clicks,
        horizontal_swipe,
        diagonal_swipe,
        circle_approximation,
    )
}


def make_pattern(spec: Mapping[str, Any]) -> np.ndarray:
    """Return the sequences of one entry of EVAL_PATTERNS.

    Args:
        spec: "pattern" names the function in this module, the rest are its arguments.

    Returns:
        (n, 250, 3) float32.

    Raises:
        UserError: the pattern is unknown, or a value is out of range.
    """
    arguments = dict(spec)
    name = arguments.pop("pattern", None)
    check_choice("pattern", name, tuple(_MAKERS))
    try:
        return _MAKERS[name](**arguments)
    except TypeError as e:
        raise UserError(f"{name} cannot be made ({first_line(e)}), got {arguments}") from None


def write_eval_patterns(
    output_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> GeneratedDataset:
    """Write all of EVAL_PATTERNS as one data set folder (8 sequences in one file).

    The manifest's "patterns" holds the pattern's name per sequence.

    Args:
        output_dir: folder to write, made if missing.
        overwrite: replace the data set that is there; only its own files are removed.

    Returns:
        The folder, its manifest, and whether anything was written.

    Raises:
        UserError: the folder cannot be used; nothing was written.
        OSError: the disk failed or is full; no manifest was written.
    """
    folder = as_folder(output_dir, "output_dir")
    made = [make_pattern(spec) for spec in EVAL_PATTERNS]
    sequences = np.concatenate(made)
    names = [spec["pattern"] for spec, part in zip(EVAL_PATTERNS, made, strict=True) for _ in part]
    arguments = {
        "num_sequences": len(sequences),
        "sequence_length": SEQ_LEN,
        "sequences_per_file": len(sequences),
        "patterns": json.loads(json.dumps(EVAL_PATTERNS)),  # tuples become lists, as when read
        "seed": None,
        "split": folder_name(folder),
    }

    return write_gestures(
        folder, arguments, lambda: (lambda rows: sequences[rows], {"patterns": names}),
        overwrite=as_type("overwrite", overwrite, bool),
    )  # fmt: skip


def _trace(waypoints: Sequence[Point], delta_t: int) -> np.ndarray:
    """Return one touch that visits the waypoints in equal times, (1, 250, 3) float32."""
    delta_t = as_type("delta_t", delta_t, int)
    check_range("delta_t", delta_t, low=1, high=SEQ_LEN)
    points = np.array(waypoints, dtype=np.float64)
    if points.ndim != 2 or not np.all((points >= 0) & (points <= 1)):
        raise UserError(f"coordinates must be in [0, 1], got {points.tolist()}")
    onset = (SEQ_LEN - delta_t) // 2
    leg = np.linspace(0, len(points) - 1, delta_t)  # position along the path, in legs
    sequence = np.zeros((1, SEQ_LEN, 3), dtype=np.float32)
    for axis in (0, 1):
        path = np.interp(leg, np.arange(len(points)), points[:, axis])
        sequence[0, onset : onset + delta_t, axis] = path
    sequence[0, onset : onset + delta_t, 2] = 1
    return sequence
