"""Actions in HDF5: the dataset `actions`, [N, L, 3] or [N, T, L, 3], 500 frames a second."""

from pathlib import Path
from typing import Any

import numpy as np

from augmentation.recordings.files import Recording, session_name
from augmentation.strokes import NO_DOWN, NO_LIFT, Stroke
from trainlib.bars import bar
from trainlib.contacts import contacts_of
from trainlib.errors import BROKEN, UserError, first_line
from trainlib.gestures import FRAME_MS
from trainlib.memory import is_out_of_memory

_FRAMES_AT_ONCE = 1_000_000


def read_hdf5(path: Path, options: Any, recording: Recording) -> None:
    """Read N sessions of T segments, one after the other in time; without T, of one segment.

    x and y are shares of the screen, press is 0 or 1. A contact goes on from segment to segment.
    In whole windows, one that a session begins or ends in is none.
    """
    try:
        import h5py
    except BROKEN as e:
        why = f"({type(e).__name__}: {first_line(e)})"
        raise UserError(f"HDF5 needs the package h5py {why}; pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            if "actions" not in file:
                names = ", ".join(map(str, file)) or "nothing"
                raise UserError(f"{path} holds {names}, no dataset 'actions'")
            _read_actions(path, file["actions"], options, recording)
    except UserError:
        raise
    except Exception as e:  # damage shows as many kinds of exception
        if is_out_of_memory(e):
            raise
        raise UserError(f"cannot read {path} as HDF5 ({first_line(e)})") from None


def _read_actions(path: Path, actions: Any, options: Any, recording: Recording) -> None:
    """Read the sessions of a dataset, some at a time."""
    shape: tuple[int, ...] = getattr(actions, "shape", ())
    if len(shape) not in (3, 4) or shape[-1] != 3 or 0 in shape:
        raise UserError(f"{path}: actions must be [N, L, 3] or [N, T, L, 3], got {list(shape)}")
    if actions.dtype.kind not in "fiu":
        raise UserError(f"{path}: actions must hold numbers, got {actions.dtype}")
    num_frames, stray = int(np.prod(shape[1:-1])), 0
    step = max(_FRAMES_AT_ONCE // num_frames, 1)
    for first in bar(range(0, shape[0], step), f"reading {path.name}"):
        x = np.asarray(actions[first : first + step]).astype(np.float64)
        x = x.reshape(len(x), num_frames, 3)
        pressed = x[..., 2] == 1
        if strange := np.argwhere(~pressed & (x[..., 2] != 0)).tolist():
            row, frame = strange[0]
            got = f"{x[row, frame, 2]:g} in actions[{first + row}], frame {frame}"
            raise UserError(f"{path}: press must be 0 or 1, got {got}; threshold it at 0.5")
        stray += int((~pressed & (x[..., :2] != 0).any(axis=2)).any(axis=1).sum())
        sessions = [f"{session_name(path)}/{first + row}" for row in range(len(x))]
        recording.frames.update(dict.fromkeys(sessions, num_frames))
        for row, onset, xy in contacts_of(x):
            frames = np.arange(onset, onset + len(xy) + 1, dtype=np.float64)  # lifts at the last
            stroke = Stroke(sessions[row], FRAME_MS * frames, np.concatenate([xy, xy[-1:]]))
            if options.window == "whole":
                fault = NO_LIFT if frames[-1] == num_frames else ""
                stroke = stroke._replace(fault=fault if onset else NO_DOWN)
            recording.strokes.append(stroke)
    if stray:
        recording.notes[f"x and y set to 0 where press is 0, in {stray} rows of {path.name}"] = None
