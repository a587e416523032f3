"""The table of gesture types: one row says all that the project knows of a type.

Whoever draws, classifies, names or colours gestures reads the table, so a new type is a new row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SEQ_LEN = 250  # frames: 0.5 s at 500 Hz
FRAME_MS = 2.0  # from a frame to the next
CHANNELS = ("x", "y", "press")
ACTION_DIM = len(CHANNELS)
PRESSED = 0.5  # a frame is pressed above this
CLICK_DISTANCE = 0.05  # share of the screen; a shorter move is a click


class Move(NamedTuple):
    """From the first to the last pressed frame of B gestures; arrays of numpy or torch, (B,).

    Attributes:
        pressed: whether the gesture is pressed at all.
        dx, dy: signed, data units.
        distance: sqrt(dx² + dy²).
    """

    pressed: Any
    dx: Any
    dy: Any
    distance: Any


class GestureType(NamedTuple):
    """A row of the table.

    Attributes:
        name: in metric keys, manifests and options.
        label: in figures.
        color: in figures, by its name.
        moves: whether x and y move in the straight gestures that the generator draws of this type;
            None if it draws none.
        matches: whether a move is of this type, if no row above matches; operators alone, so that
            it takes arrays of numpy and of torch.
    """

    name: str
    label: str
    color: str
    moves: tuple[bool, bool] | None
    matches: Callable[[Move], Any]


TABLE = (
    GestureType("none", "no touch", "grey", None, lambda m: ~m.pressed),
    GestureType(
        "click", "click", "vermilion", (False, False), lambda m: m.distance < CLICK_DISTANCE
    ),
    GestureType(
        "horizontal", "horizontal swipe", "blue", (True, False),
        lambda m: abs(m.dx) > 2 * abs(m.dy),
    ),
    GestureType(
        "vertical", "vertical swipe", "green", (False, True),
        lambda m: abs(m.dy) > 2 * abs(m.dx),
    ),
    GestureType("diagonal", "diagonal swipe", "pink", (True, True), lambda m: m.pressed),
)  # fmt: skip

GESTURE_TYPES = tuple(row.name for row in TABLE)
# Of the types that the generator draws, by name: whether x and y move.
MOVES = {row.name: row.moves for row in TABLE if row.moves is not None}


def classify_moves(dx: Any, dy: Any, pressed: Any) -> Any:
    """Return the index into GESTURE_TYPES of each move, (B,) int64: the first row that matches.

    Args:
        dx: from the first to the last pressed frame, (B,), data units, numpy or torch.
        dy: likewise.
        pressed: whether there is a pressed frame, (B,) bool.
    """
    distance = dx.hypot(dy) if hasattr(dx, "hypot") else np.hypot(dx, dy)
    move = Move(pressed, dx, dy, distance)
    kind, is_open = 0, pressed | ~pressed
    for i, row in enumerate(TABLE):
        matches = row.matches(move) & is_open
        kind, is_open = kind + i * matches, is_open & ~matches
    return kind
