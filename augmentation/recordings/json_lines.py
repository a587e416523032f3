"""Strokes as JSON, one a line."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.recordings.files import (
    LARGEST,
    Recording,
    median_step,
    numbered_lines,
    session_name,
    unreadable,
)
from augmentation.strokes import TIME_BACK, Stroke
from trainlib.errors import UserError, first_line


def read_json_lines(path: Path, _options: Any, recording: Recording) -> None:
    """Read strokes `{"session": ..., "points": [[t_ms, x, y], ...]}`, x and y as shares.

    Other keys are ignored; without a session the file is one.
    """
    strokes = []
    for number, line in numbered_lines(path):
        if not line:
            continue
        try:
            row = json.loads(line)
            points = np.array(row["points"], np.float64)
            if points.ndim != 2 or points.shape[1] != 3 or not (abs(points) < LARGEST).all():
                raise ValueError("points must be [[t_ms, x, y], ...], finite numbers")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            why = f"no {e}" if isinstance(e, KeyError) else first_line(e)
            raise unreadable(path, number, f"is no stroke in JSON ({why})") from None
        t, xy = points[:, 0], points[:, 1:]
        fault = TIME_BACK if (np.diff(t) < 0).any() else ""
        session = str(row.get("session", session_name(path)))
        strokes.append(Stroke(session, t, xy, fault=fault))
    if (step := median_step(strokes)) < 1:
        raise UserError(f"{path}: t must be in ms, but its median step is {step:g}")
    recording.strokes += strokes
