"""What the numbers of a device span: as described, as asked for, or as seen."""

import re
from collections.abc import Mapping

import numpy as np

from augmentation.recordings.files import Recording
from augmentation.strokes import SHARES, Axes, FloatArray
from trainlib.errors import UserError

KnownAxes = tuple[Axes, str]  # and how they are known


def axes_used(recording: Recording, screen: str) -> dict[str | Axes | None, KnownAxes]:
    """Return the axes by the devices of the strokes.

    Args:
        recording: as read.
        screen: WIDTHxHEIGHT of a device that nothing describes; "" if that is not known either.
    """
    used: dict[str | Axes | None, KnownAxes] = {}
    for device in dict.fromkeys(stroke.device for stroke in recording.strokes):
        if device is None:
            used[device] = SHARES, "shares of the screen"
        elif isinstance(device, Axes):
            used[device] = device, "from getevent -p"
        elif known := find_axes(device, recording.axes):
            used[device] = known
        elif screen:
            used[device] = screen_axes(screen), "from --screen"
        elif recording.axes:
            names = ", ".join(name for name, _ in recording.axes)
            why = f"nothing describes {device}" if device else "the log names no device"
            cure = "leave the others' axes out, or pass --screen"
            raise UserError(f"which screen was touched: {names}? {why}; {cure}")
        else:
            used[device] = seen_axes([s.xy for s in recording.strokes if s.device == device])
    return used


def find_axes(device: str, axes: Mapping[tuple[str, Axes], str]) -> KnownAxes | None:
    """Return the axes of a device: those under its name, or the only ones if a name is not known.

    Args:
        device: its name, perhaps "".
        axes: as in a Recording.

    Raises:
        UserError: two devices of that name have different axes.
    """
    named = [(known, how) for (name, known), how in axes.items() if name == device]
    if len(named) > 1:
        raise UserError(f"two screens are called {device or 'nothing'}; import them one by one")
    if not named and len(axes) == 1:
        [((name, known), how)] = axes.items()
        named = [(known, how)] if "" in (name, device) else []
    return named[0] if named else None


def described(axes: Axes, how: str) -> str:
    """Return in words what axes span."""
    return f"x {axes.x_min:g} to {axes.x_max:g}, y {axes.y_min:g} to {axes.y_max:g}, {how}"


def screen_axes(screen: str) -> Axes:
    """Return the axes of a screen WIDTHxHEIGHT, pixels from 0."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", screen)
    if not match or min(map(int, match.groups())) < 2:
        raise UserError(f"--screen must be WIDTHxHEIGHT, as 1080x2400, got {screen!r:.60}")
    return Axes(0, int(match[1]) - 1, 0, int(match[2]) - 1)


def seen_axes(positions: list[FloatArray]) -> KnownAxes:
    """Return axes from 0 to the largest numbers seen, or shares if none is above 1."""
    x_max, y_max = np.nanmax(np.concatenate([*positions, [[0, 0]]]), axis=0).tolist()
    if max(x_max, y_max) <= 1:
        return SHARES, "shares of the screen, as no number is above 1"
    axes = Axes(0, max(x_max, 1), 0, max(y_max, 1))
    return axes, "the largest seen; or give --screen, getevent -p"
