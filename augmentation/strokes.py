"""Strokes: what a finger did from touch-down to lift-off, and the windows that are cut of them.

A touch screen reports changes only, at some 30 to 240 Hz: silence means that the finger rests. So
a held position stays where it is until one sample period before the next change, and between
samples a stroke is linear. A frame is pressed if the finger is down at its time:

    touch-down <= time < lift-off

and a stroke that falls between two frames presses the next one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainlib.errors import UserError
from trainlib.gestures import FRAME_MS

FloatArray = npt.NDArray[np.float64]

_SLACK = 1e-3  # frames, for the rounding of times
_ROUNDING = 1e-6  # of a share
_MOST_HOURS = 7 * 24  # of a session
_USUAL_PERIOD = 1000 / 60  # ms, of a screen whose samples are too few to tell

# Why a stroke or a window is left out, as summaries and manifests say it.
OUTSIDE, TIME_BACK, TWO_FINGERS = "outside the screen", "time going back", "two fingers"
NO_DOWN, NO_LIFT, DUPLICATE = "no touch-down", "no lift-off", "duplicate"
TOO_LONG, TOO_SHORT = "longer than the window", "the end of a session, shorter than a window"
IDLE, HOLDS_REFUSED = "idle", "around a refused contact"


class Axes(NamedTuple):
    """The least and the largest number of a device's axes, both on the screen."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float


SHARES = Axes(0, 1, 0, 1)


class Stroke(NamedTuple):
    """One finger from touch-down to lift-off.

    Attributes:
        session: the name of the recording that it is part of.
        t: ms since any moment of the session, (n,) float64, n at least 1; from touch-down to
            lift-off.
        xy: (n, 2) float64, in units of the device.
        device: its name, perhaps ""; its axes if the same file describes them; None if xy are
            shares of the screen.
        fault: why it cannot be learned from; "" if it can.
    """

    session: str
    t: FloatArray
    xy: FloatArray
    device: str | Axes | None = None
    fault: str = ""


class Window(NamedTuple):
    """Half a second of a session, or another length.

    Attributes:
        strokes: those that press one of its frames.
        origin: time of the session's frame 0, ms.
        first: its first frame.
    """

    strokes: Sequence[Stroke]
    origin: float
    first: int


# ---- from reports to frames -------------------------------------------------------------


def to_shares(stroke: Stroke, axes: Axes, *, y_up: bool, rotate: int) -> Stroke:
    """Return a stroke in shares of the screen, x to the right and y downwards.

    Numbers up to one unit (a pixel) off the screen are clipped to its border; beyond that the
    stroke gets a fault.

    Args:
        stroke: in units of its device.
        axes: of the device.
        y_up: whether its y grows upwards.
        rotate: degrees by which the picture is turned clockwise: 0, 90, 180 or 270.
    """
    low, high = np.array(axes, np.float64).reshape(2, 2).T
    slack = _ROUNDING if axes == SHARES else 1
    is_inside = ((stroke.xy >= low - slack) & (stroke.xy <= high + slack)).all()
    fault = stroke.fault or ("" if is_inside else OUTSIDE)
    x, y = ((stroke.xy - low) / (high - low)).clip(0, 1).T
    if y_up:
        y = 1 - y
    for _ in range(rotate // 90):
        x, y = 1 - y, x
    return Stroke(stroke.session, stroke.t, np.column_stack([x, y]), None, fault)


def sample_periods(strokes: Iterable[Stroke]) -> dict[str, float]:
    """Return the time between two samples, ms, of each session: the median within its strokes.

    Strokes of fewer than four samples say little of it; a session of such ones has the period of
    all others.
    """
    steps: Mapping[str, list[FloatArray]] = defaultdict(list)
    for stroke in strokes:
        steps[stroke.session].append(np.diff(stroke.t) if len(stroke.t) > 3 else stroke.t[:0])
    by_session = {session: np.concatenate(found) for session, found in steps.items()}
    usual = _median(np.concatenate([[], *by_session.values()]), _USUAL_PERIOD)
    return {session: _median(found, usual) for session, found in by_session.items()}


def _median(x: FloatArray, default: float) -> float:
    return float(np.median(x)) if len(x) else default


def hold(stroke: Stroke, period: float) -> Stroke:
    """Add what silence says: after more than two periods (ms), the finger rested until the last."""
    after = np.flatnonzero(np.diff(stroke.t) > 2 * period) + 1
    return stroke._replace(
        t=np.insert(stroke.t, after, stroke.t[after] - period),
        xy=np.insert(stroke.xy, after, stroke.xy[after - 1], axis=0),
    )


def frames_of(stroke: Stroke, origin: float) -> tuple[int, int]:
    """Return the first frame that a stroke presses, counted from `origin` (ms), and the one after.

    There is at least one.
    """
    first, stop = (math.ceil((t - origin) / FRAME_MS - _SLACK) for t in (stroke.t[0], stroke.t[-1]))
    return first, max(stop, first + 1)


def render(windows: Sequence[Window], length: int) -> np.ndarray:
    """Return the frames of windows, [x, y, press], (N, length, 3) float32, x and y as in strokes.

    Args:
        windows: N.
        length: frames of a window.
    """
    x = np.zeros((len(windows), length, 3), np.float32)
    for window, frames in zip(windows, x, strict=True):
        for stroke in window.strokes:
            pressed = np.array(frames_of(stroke, window.origin)) - window.first
            first, stop = pressed.clip(0, length)
            time = window.origin + FRAME_MS * (window.first + np.arange(first, stop))
            frames[first:stop, 0] = np.interp(time, stroke.t, stroke.xy[:, 0])
            frames[first:stop, 1] = np.interp(time, stroke.t, stroke.xy[:, 1])
            frames[first:stop, 2] = 1
    return x


# ---- windows ----------------------------------------------------------------------------


def whole_windows(
    strokes: Iterable[Stroke], length: int, rng: np.random.Generator
) -> tuple[list[Window], Counter[str]]:
    """Return a window of `length` frames for each stroke that fits, its onset uniform.

    The second value counts the strokes that do not fit, by reason.
    """
    windows, refused = [], Counter[str]()
    for stroke in strokes:
        _, num = frames_of(stroke, stroke.t[0])
        if num > length:
            refused[TOO_LONG] += 1
        else:
            onset = int(rng.integers(0, length - num, endpoint=True))
            windows.append(Window([stroke], float(stroke.t[0]), -onset))
    return windows, refused


def timeline_windows(
    strokes: Iterable[Stroke],
    frames: Mapping[str, int],
    length: int,
    rng: np.random.Generator,
    *,
    drop_idle: bool = False,
) -> tuple[list[Window], Counter[str]]:
    """Cut sessions into windows of `length` frames, as they ran.

    Args:
        strokes: those with a fault too; the windows around them are left out.
        frames: the length of each session whose beginning is known, 0 ms; the others begin up to a
            window before their first stroke, uniformly, and end with the window of their last.
        length: frames of a window.
        rng: draws where sessions begin.
        drop_idle: leave out the windows without a stroke.

    Returns:
        The windows, session by session in the order of time, and the number of those left out.

    Raises:
        UserError: a session is so long that its times must be wrong.
    """
    sessions: dict[str, list[Stroke]] = {session: [] for session in frames}
    for stroke in strokes:
        sessions.setdefault(stroke.session, []).append(stroke)
    windows, refused = [], Counter[str]()
    for session, held in sessions.items():
        origin = 0.0
        if session not in frames:
            origin = min(float(s.t[0]) for s in held) - rng.uniform(0, length * FRAME_MS)
        pressed = [frames_of(stroke, origin) for stroke in held]
        num_frames = frames.get(session) or -(-max(stop for _, stop in pressed) // length) * length
        hours = num_frames * FRAME_MS / 3_600_000
        if hours > _MOST_HOURS:
            raise UserError(f"the session {session} lasts {hours:.0f} hours; check its times")
        inside: Mapping[int, list[Stroke]] = defaultdict(list)
        for stroke, (first, stop) in zip(held, pressed, strict=True):
            for index in range(first // length, (stop - 1) // length + 1):
                inside[index].append(stroke)
        for index in range(num_frames // length):
            if any(stroke.fault for stroke in inside[index]):
                refused[HOLDS_REFUSED] += 1
            elif drop_idle and not inside[index]:
                refused[IDLE] += 1
            else:
                windows.append(Window(inside[index], origin, index * length))
        refused[TOO_SHORT] += num_frames % length > 0
    return windows, refused


def without_overlaps(strokes: Iterable[Stroke]) -> list[Stroke]:
    """Sort strokes by session and time; one that lands before the last has lifted gets a fault."""
    ordered: list[Stroke] = []
    sessions: dict[str, list[Stroke]] = defaultdict(list)
    for stroke in strokes:
        sessions[stroke.session].append(stroke)
    for session in sessions.values():
        lift = -math.inf
        for stroke in sorted(session, key=lambda s: float(s.t[0])):
            if not stroke.fault and stroke.t[0] < lift:
                stroke = stroke._replace(fault=TWO_FINGERS)
            elif not stroke.fault:
                lift = float(stroke.t[-1])
            ordered.append(stroke)
    return ordered
