"""What a training set and a validation set must be before a run starts; numpy alone.

Sets are (N, L, 3) in data units and may be maps of files: they are read some gestures at a time.
"""

from typing import Any

import numpy as np

from trainlib.errors import UserError
from trainlib.gestures import PRESSED

SAME = 5e-4  # two gestures are the same if no number differs by more than this
_ROUNDING = 1e-7  # of float32 in [0, 1]
_ROWS_AT_ONCE = 1024
_PAIRS_AT_ONCE = 1 << 20
_MIXER = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits as good as random


def check_data(x_train: np.ndarray, x_val: np.ndarray, config: Any) -> None:
    """Raise UserError for gestures that a run with these options cannot take, or are in both sets.

    Args:
        x_train: (N, L, 3), data units; x_val likewise.
        x_val: held to all that x_train is held to.
        config: the options data_dir, val_data_dir, seq_len, augment, contacts, allow_overlap.
    """
    for x, where in ((x_train, config.data_dir), (x_val, config.val_data_dir)):
        if len(x) == 0 or x.shape[1:] != (config.seq_len, 3):
            wanted = f"must hold gestures [{config.seq_len}, 3]"
            raise UserError(f"{where} {wanted}, got {list(x.shape)}; set --seq_len")
    if config.augment or config.contacts:
        cure = "zero these frames, or add --no-augment --no-contacts"
        check_idle_is_zero(x_train, config.data_dir, cure)
        check_idle_is_zero(x_val, config.val_data_dir, cure)
    shared = 0 if config.allow_overlap else len(shared_gestures(x_train, x_val))
    if shared:
        where = f"of {config.val_data_dir} are in {config.data_dir} too"
        raise UserError(f"{shared} gestures {where}; separate the sets, or add --allow_overlap")


def check_idle_is_zero(x: np.ndarray, where: str, cure: str = "zero these frames") -> None:
    """Raise UserError, saying `where` and the `cure`, if x or y is not 0 where press is 0."""
    for first in range(0, len(x), _ROWS_AT_ONCE):
        x_axis, y_axis, press = np.moveaxis(x[first : first + _ROWS_AT_ONCE], 2, 0)
        stray = (((x_axis > 0) | (y_axis > 0)) & (press <= PRESSED)).any(axis=1)
        if stray.any():
            example = f"gesture {first + stray.argmax()}"
            raise UserError(f"{where} has x or y above 0 where press is 0 ({example}); {cure}")


def shared_gestures(x_train: np.ndarray, x_val: np.ndarray) -> np.ndarray:
    """Return the rows of x_val that are gestures of x_train too, (n,) int64, in order.

    Two gestures are the same if they press in the same frames and no number differs by more than
    SAME. Windows that are never pressed, or stand still throughout, do not count.

    Candidates for a gesture press in the same frames (by a hash) and have the same mean x while
    pressed, to within SAME: a range of the training set sorted by both. They are compared some at
    a time, and a gesture that is found drops out, so that sets of many copies are as quick.
    """
    train_key, train_traits, _ = _summarise(x_train)
    val_key, val_traits, counts = _summarise(x_val)
    keys, bucket = np.unique(train_key, return_inverse=True)
    place = 2 * bucket + train_traits[:, 0]  # traits lie in [0, 1]: buckets stay apart
    order = np.argsort(place)
    place = place[order]

    val_place = 2 * np.searchsorted(keys, val_key) + val_traits[:, 0]
    margin = SAME + 5e-5  # means are of float32
    low = np.searchsorted(place, val_place - margin)
    high = np.searchsorted(place, val_place + margin, side="right")
    high[~counts] = 0

    found = np.zeros(len(x_val), bool)
    todo = np.flatnonzero(low < high)
    while len(todo):
        each = np.minimum(high[todo] - low[todo], max(_PAIRS_AT_ONCE // len(todo), 1))
        v = np.repeat(todo, each)
        nth = np.arange(len(v)) - np.repeat(np.cumsum(each) - each, each)
        t = order[low[v] + nth]
        near = (abs(train_traits[t] - val_traits[v]) <= margin).all(axis=1)
        found[_same(x_train, x_val, t[near], v[near])] = True
        low[todo] += each
        todo = todo[(low[todo] < high[todo]) & ~found[todo]]
    return np.flatnonzero(found)


def _summarise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what same gestures share, and which gestures count.

    Returns:
        A hash of the pressed frames, (N,) uint64; traits that differ by at most SAME between same
        gestures, (N, 6) float64: mean, first and last x and y while pressed; and (N,) bool.
    """
    N, L, _ = x.shape
    key, traits, counts = np.zeros(N, np.uint64), np.zeros((N, 6)), np.zeros(N, bool)
    for first in range(0, N, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = np.asarray(x[part])
        pressed, xy = rows[..., 2] > PRESSED, rows[..., :2]
        bits = np.packbits(pressed, axis=1)
        words = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
        for word in words.T:
            mixed = (key[part] ^ word) * _MIXER
            key[part] = mixed ^ (mixed >> np.uint64(29))
        num = np.maximum(pressed.sum(axis=1, keepdims=True), 1)
        traits[part, :2] = (pressed[:, None].astype(np.float32) @ xy)[:, 0] / num
        row = np.arange(len(rows))
        traits[part, 2:4] = xy[row, pressed.argmax(axis=1)]
        traits[part, 4:] = xy[row, L - 1 - pressed[:, ::-1].argmax(axis=1)]
        counts[part] = pressed.any(axis=1)
        held = np.flatnonzero(pressed.all(axis=1))
        paths = np.ascontiguousarray(np.moveaxis(xy[held], 2, 1))  # (n, 2, L), six times as fast
        is_still = (np.ptp(paths, axis=2) <= SAME + _ROUNDING).all(axis=1)
        counts[first + held[is_still]] = False
    return key, traits, counts


def _same(x_train: np.ndarray, x_val: np.ndarray, t: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return those rows v of x_val that are the same gestures as rows t of x_train."""
    same = np.zeros(len(v), bool)
    for first in range(0, len(v), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        difference = abs(x_train[t[part]] - x_val[v[part]])
        same[part] = difference.max(axis=(1, 2)) <= SAME + _ROUNDING
    return v[same]
