"""What the numbers of a device span: as described, as asked for, or as seen."""

import re

import numpy as np

from augmentation.recordings.files import Recording
from augmentation.strokes import SHARES, Axes, FloatArray
from trainlib.errors import UserError

KnownAxes = tuple[Axes, str]  # and how they are known


def axes_used(recording: Recording, screen: str) -> dict[str | None, KnownAxes]:
    """Return the axes of each device that strokes come from; None stands for shares.

    Args:
        recording: as read.
        screen: WIDTHxHEIGHT of a device that nothing describes; "" if that is not known either.
    """
    used: dict[str | None, KnownAxes] = {}
    for device in dict.fromkeys(stroke.device for stroke in recording.strokes):
        if device is None:
            used[device] = SHARES, "shares of the screen"
        elif device in recording.axes:
            used[device] = recording.axes[device]
        elif len(recording.axes) == 1:
            used[device] = next(iter(recording.axes.values()))
        elif recording.axes:
            names = ", ".join(recording.axes)
            raise UserError(f"which screen was touched: {names}? leave the others' axes out")
        elif screen:
            used[device] = screen_axes(screen), "from --screen"
        else:
            used[device] = seen_axes([s.xy for s in recording.strokes if s.device == device])
    return used


def described(axes: Axes, how: str) -> str:
    """Return in words what axes span."""
    return f"x {axes.x_min:g} to {axes.x_max:g}, y {axes.y_min:g} to {axes.y_max:g}, {how}"


def screen_axes(screen: str) -> Axes:
    """Return the axes of a screen WIDTHxHEIGHT, pixels from 0."""
    match = re.fullmatch(r"(\d+)x(\d+)", screen)
    if not match or min(map(int, match.groups())) < 2:
        raise UserError(f"--screen must be WIDTHxHEIGHT, as 1080x2400, got {screen!r}")
    return Axes(0, int(match[1]) - 1, 0, int(match[2]) - 1)


def seen_axes(positions: list[FloatArray]) -> KnownAxes:
    """Return axes from 0 to the largest numbers seen, or shares if none is above 1."""
    x_max, y_max = np.nanmax(np.concatenate([*positions, [[0, 0]]]), axis=0).tolist()
    if max(x_max, y_max) <= 1:
        return SHARES, "shares of the screen, as no number is above 1"
    axes = Axes(0, max(x_max, 1), 0, max(y_max, 1))
    return axes, "the largest seen; or give --screen, getevent -p"
