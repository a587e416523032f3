"""Contacts: what a finger does between touch-down and lift-off; a window holds any number.

A window may begin or end pressed; what it shows of such a contact counts. Numpy only.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainlib.gestures import CLICK_DISTANCE, PRESSED

FloatArray = npt.NDArray[np.float64]


class Contact(NamedTuple):
    """A run of pressed frames.

    Attributes:
        window: its row in the gestures.
        onset: its first frame.
        xy: where the finger is, (n, 2), data units, n at least 1.
    """

    window: int
    onset: int
    xy: FloatArray

    @property
    def moves(self) -> bool:
        """Whether it is a swipe, by the rule of the gesture types."""
        return bool(np.hypot(*(self.xy[-1] - self.xy[0])) >= CLICK_DISTANCE)


def contacts_of(x: npt.ArrayLike) -> list[Contact]:
    """Split gestures, (B, L, 3), data units, into their contacts, in order."""
    x = np.asarray(x, dtype=np.float64)
    pressed = np.pad(x[..., 2] > PRESSED, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(pressed, axis=1)  # (B, L + 1)
    downs, lifts = np.argwhere(change == 1), np.argwhere(change == -1)[:, 1]
    return [
        Contact(int(row), int(first), x[row, first:stop, :2])
        for (row, first), stop in zip(downs, lifts, strict=True)
    ]


def shake(xy: FloatArray) -> float:
    """Return how much a contact, (n, 2), trembles, thousandths of the screen per frame².

        1000 · mean |x_{i+1} - 2x_i + x_{i-1}| over its inner frames, and x and y

    0 for even motion on a straight line; NaN below three frames.
    """
    return 1000 * float(np.abs(np.diff(xy, n=2, axis=0)).mean()) if len(xy) > 2 else np.nan


def median_shake(x: npt.ArrayLike) -> float:
    """Return the median `shake` of the swipes in gestures, (B, L, 3); NaN without any."""
    shakes = [shake(contact.xy) for contact in contacts_of(x) if contact.moves]
    shakes = [value for value in shakes if value == value]
    return float(np.median(shakes)) if shakes else np.nan
