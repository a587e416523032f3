"""Contacts as a touch screen reports them, in numbers; and how two sets of them differ.

A touch screen reports whole pixels, so coordinates are rounded to 1/PIXELS of either axis before
two sets are compared: below that nobody could tell.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.estimates import SEED, FloatArray
from trainlib.contacts import contacts_of, shake
from trainlib.errors import first_line, say
from trainlib.gestures import FRAME_MS

PIXELS = 1080  # of either axis
RATE = 1000 / FRAME_MS  # frames per second
ENDS = 25  # frames: 50 ms
FOLDS = 5

FEATURES = (
    "presses",  # contacts in the same window; an idle window is one row of 0, the rest NaN
    "frames",
    "onset",  # frames
    "x_start",
    "y_start",
    "x_end",
    "y_end",
    "path",  # length
    "deviation",  # the largest distance from the chord, or from its ends beyond them
    "speed_peak",  # screens per second
    "speed_peak_at",  # share of the duration
    "first_50_ms",  # mean speed, screens per second
    "last_50_ms",
    "shake",  # thousandths of the screen per frame²
)


def rounded(xy: FloatArray) -> FloatArray:
    """Round coordinates to the pixels of a touch screen."""
    return np.round(np.asarray(xy, dtype=np.float64) * PIXELS) / PIXELS


def deviation(xy: FloatArray) -> float:
    """Return the largest distance of a contact, (n, 2), from its chord, a segment."""
    moved, chord = xy - xy[0], xy[-1] - xy[0]
    length = chord @ chord
    along = np.clip(moved @ chord / length, 0, 1) if length else np.zeros(len(xy))
    return float(np.hypot(*(moved - along[:, None] * chord).T).max())


class Events(NamedTuple):
    """The contacts of a set of windows.

    Attributes:
        window: the row of the window, (N,) int64.
        features: FEATURES, (N, 14) float64; NaN for what a contact is too short to have.
    """

    window: npt.NDArray[np.int64]
    features: FloatArray

    def of(self, name: str) -> FloatArray:
        """Return one feature of the contacts that have it."""
        values = self.features[:, FEATURES.index(name)]
        return values[~np.isnan(values)]

    @property
    def touched(self) -> "Events":
        """The contacts, without the idle windows."""
        rows = self.features[:, 0] > 0
        return Events(self.window[rows], self.features[rows])


def events_of(x: npt.ArrayLike) -> Events:
    """Describe the contacts of gestures, (B, L, 3), data units, rounded to pixels."""
    x = np.asarray(x, dtype=np.float64).copy()
    x[..., :2] = rounded(x[..., :2])
    contacts = contacts_of(x)
    presses = np.bincount([c.window for c in contacts], minlength=len(x))
    rows = [[presses[c.window], *_describe(c.onset, c.xy)] for c in contacts]
    idle = np.flatnonzero(presses == 0)
    rows += [[0] + [np.nan] * (len(FEATURES) - 1)] * len(idle)
    window = np.array([*(c.window for c in contacts), *idle], dtype=np.int64)
    return Events(window, np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES)))


def _describe(onset: int, xy: FloatArray) -> list[float]:
    """Return the features of a contact, without the first."""
    speed = RATE * np.hypot(*np.diff(xy, axis=0).T)
    if len(speed):
        at = speed.argmax()
        speeds = [speed[at], (at + 0.5) / len(speed), speed[:ENDS].mean(), speed[-ENDS:].mean()]
    else:
        speeds = [np.nan] * 4
    ends = [*xy[0], *xy[-1]]
    return [len(xy), onset, *ends, speed.sum() / RATE, deviation(xy), *speeds, shake(xy)]


def two_sample_ks(a: FloatArray, b: FloatArray) -> float:
    """Return sup |F_a - F_b| of two empirical distribution functions; NaN if one is empty."""
    if not len(a) or not len(b):
        return np.nan
    at = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


# ----------------------------------------------------------------------------------------
# CLASSIFIER
# ----------------------------------------------------------------------------------------


def find_classifier() -> Callable[[], Any] | None:
    """Return what makes a classifier; None, and a line that says so, without scikit-learn."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except Exception as e:  # missing, or broken in any way
        what = "note: no classifier in the realism test, only shake and KS distances"
        why = f"scikit-learn cannot be imported ({type(e).__name__}: {first_line(e)})"
        say(f"{what}: {why}; pip install -r requirements.txt")
        return None
    return lambda: HistGradientBoostingClassifier(
        max_iter=100, early_stopping=False, random_state=0
    )


def told_apart(a: Events, b: Events, make_classifier: Callable[[], Any]) -> FloatArray:
    """Return for each contact of `a` the share of those of `b` that a classifier puts below it.

    Their mean is the area under the ROC curve (AUC): 1/2 if nothing tells the two apart, 1 if
    anything does. Each fifth of the windows is judged by a classifier trained on the others, and
    compared within itself; a tie counts half.

    Args:
        a: what should pass for real; no more windows than b.
        b: real contacts.
        make_classifier: of `find_classifier`.

    Returns:
        (N,) in [0, 1], NaN where a fold is empty or holds one side alone.
    """
    folds = [_folds(events.window, seed) for seed, events in enumerate((a, b))]
    shares = np.full(len(a.window), np.nan)
    for fold in range(FOLDS):
        out_a, out_b = (f == fold for f in folds)
        kept = [a.features[~out_a], b.features[~out_b]]
        if not (len(kept[0]) and len(kept[1]) and out_a.any() and out_b.any()):
            continue
        train, side = np.concatenate(kept), np.repeat([1, 0], [len(x) for x in kept])
        known = ~np.isnan(train).all(axis=0)  # scikit-learn cannot take a feature without a value
        fitted = make_classifier().fit(train[:, known], side)
        score_a, score_b = (
            fitted.decision_function(x[:, known]) for x in (a.features[out_a], b.features[out_b])
        )
        ranks = [np.searchsorted(np.sort(score_b), score_a, side=s) for s in ("left", "right")]
        shares[out_a] = (ranks[0] + ranks[1]) / (2 * len(score_b))
    return shares


def _folds(window: Sequence[int] | npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Deal windows into FOLDS of one size, at random; a window's contacts stay together."""
    num = max(window, default=-1) + 1
    order = np.random.default_rng([SEED, seed]).permutation(num)
    return (np.argsort(order) % FOLDS)[window]
