"""Fit the habits of the human-like gestures to recordings: python -m augmentation.fit_human FILE.

FILE is what `python -m augmentation.import_touch` reads. The habits go to augmentation/human.json:
quantiles and correlations, no contact.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from augmentation.human import FEATURES, HABITS_FILE, KINDS, KNOTS, LONG_MS, FloatArray
from augmentation.import_touch import ImportOptions, read_recording
from augmentation.strokes import Stroke, sample_periods, without_overlaps
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import write_text
from trainlib.gesture_files import as_folder

SWIPES_FROM = 0.02  # a contact that never gets this far from its touch-down is a tap
NEAR = 0.05  # a touch-down this close to the one before, of the same kind, is another go
LONGEST_PAUSE = 3000.0  # ms; longer ones are breaks
ENDS_MS = 50.0  # how far a finger goes in the first and the last is fitted beside the curve
WEIGHT_ENDS = 30.0
RIDGE = 0.01  # pulls the control point of a contact of few samples to the middle of the chord

_GRID = np.geomspace(0.5, 6, 21)
_A, _B = (grid.ravel() for grid in np.meshgrid(_GRID, _GRID))
_STEPS = 400
_MIDDLE = (np.arange(_STEPS)[:, None] + 0.5) / _STEPS
_SPEED = _MIDDLE ** (_A - 1) * (1 - _MIDDLE) ** (_B - 1)
_PROGRESS = np.vstack([np.zeros(len(_A)), np.cumsum(_SPEED, axis=0) / _SPEED.sum(axis=0)])


# ---- the shape of a contact ------------------------------------------------------------


def duration_of(stroke: Stroke) -> float:
    """Return the time from touch-down to lift-off, ms."""
    return float(stroke.t[-1] - stroke.t[0])


def reach_of(stroke: Stroke) -> float:
    """Return the largest distance from the touch-down, share of the screen."""
    return float(np.hypot(*(stroke.xy - stroke.xy[0]).T).max())


def shape_of(stroke: Stroke, period: float) -> FloatArray:
    """Return FEATURES of a contact: the curve and the timing that fit it best, (F,).

    Args:
        stroke: as `read_recording` reads it, its held positions held.
        period: time between two samples, ms.
    """
    t, duration, reach = stroke.t - stroke.t[0], duration_of(stroke), reach_of(stroke)
    even = np.linspace(0, duration, max(round(duration / period), 1) + 1)
    xy = np.stack([np.interp(even, t, axis) for axis in stroke.xy.T], axis=1)
    moved = xy - xy[0]
    changed = np.flatnonzero((np.diff(stroke.xy, axis=0) != 0).any(axis=1))
    if not moved.any():
        still = dict.fromkeys(FEATURES, 0.0) | {"duration": duration, "a": 1.0, "b": 1.0}
        return np.array([*still.values()])
    before, after = t[changed[0]], duration - t[changed[-1] + 1]
    moving = max(duration - before - after, period)

    time = ((even - before) / moving).clip(0, 1)
    s = _PROGRESS[np.rint(time * _STEPS).astype(int)]  # (n, pairs of a and b)
    end, bow = moved[-1], 2 * s * (1 - s)
    rest = moved[:, None] - s[..., None] ** 2 * end  # of the positions, without the control point
    control = np.einsum("ng,ngk->gk", bow, rest) + RIDGE * end / 2
    control /= (np.sum(bow**2, axis=0) + RIDGE)[:, None]
    fitted = s[..., None] ** 2 * end + bow[..., None] * control
    error = np.sum((fitted - moved[:, None]) ** 2, axis=(0, 2)) / (len(xy) * reach**2)
    num = max(round(ENDS_MS / period), 1)
    error += WEIGHT_ENDS * _error_at_ends(fitted, moved[:, None], num)
    best = int(error.argmin())

    chord = np.hypot(*end)
    unit = (end if chord else moved[np.hypot(*moved.T).argmax()]) / (chord or reach)
    x, y = control[best] / reach
    along, aside = x * unit[0] + y * unit[1], y * unit[0] - x * unit[1]
    direction = math.atan2(unit[1], unit[0])
    curve = [reach, chord / reach, along, aside, direction, _A[best], _B[best]]
    return np.array([duration, *curve, before, after])


def _error_at_ends(fitted: FloatArray, moved: FloatArray, num: int) -> FloatArray:
    """Return the squared errors in the share of the path that the first and last samples go."""
    steps = [np.hypot(*np.moveaxis(np.diff(xy, axis=0), -1, 0)) for xy in (fitted, moved)]
    shares = [step / step.sum(axis=0).clip(1e-12, None) for step in steps]
    error = shares[0] - shares[1]
    return error[:num].sum(axis=0) ** 2 + error[-num:].sum(axis=0) ** 2


# ---- habits ----------------------------------------------------------------------------


def fit(strokes: Sequence[Stroke]) -> dict[str, Any]:
    """Return the habits of recorded contacts.

    Args:
        strokes: as `read_recording` reads them, in any order; those with a fault are left out.
    """
    periods = sample_periods(strokes)
    strokes = [s for s in without_overlaps(strokes) if not s.fault and len(s.t) > 1]
    is_swipe = np.array([reach_of(stroke) >= SWIPES_FROM for stroke in strokes])
    duration = np.array([duration_of(stroke) for stroke in strokes])
    is_long = duration > LONG_MS
    habits: dict[str, Any] = {}
    for kind, chosen in zip(KINDS, (~is_swipe, is_swipe), strict=True):
        if min(np.sum(chosen & is_long), np.sum(chosen & ~is_long)) < 2:
            raise UserError(f"too few {kind}s to fit, of at most {LONG_MS:g} ms or longer")
        rows = np.flatnonzero(chosen & ~is_long).tolist()
        shapes = np.array([shape_of(strokes[i], periods[strokes[i].session]) for i in rows])
        habits[kind] = {
            "share": _rounded(chosen.mean()),
            "quantiles": {f: _quantiles(v) for f, v in zip(FEATURES, shapes.T, strict=True)},
            "correlation": _rounded(np.corrcoef([_normal_scores(v) for v in shapes.T]), 3),
            "long_share": _rounded(is_long[chosen].mean()),
            "long_duration": _quantiles(duration[chosen & is_long]),
        }
    return habits | _pauses(strokes, is_swipe)


def _pauses(strokes: Sequence[Stroke], is_swipe: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return the pauses before another go, near the last contact, and before anything else."""
    pairs = list(pairwise(strokes))
    pause = np.array([after.t[0] - before.t[-1] for before, after in pairs])
    distance = np.array([np.hypot(*(after.xy[0] - before.xy[0])) for before, after in pairs])
    follows = np.array([before.session == after.session for before, after in pairs])
    follows &= (pause > 0) & (pause <= LONGEST_PAUSE)
    again = follows & (distance < NEAR) & (is_swipe[1:] == is_swipe[:-1])
    if not again.any() or again.sum() == follows.sum():
        raise UserError("too few contacts follow one another to fit the pauses between them")
    return {
        "pause": _quantiles(pause[follows & ~again]),
        "again": {
            "share": _rounded(again.sum() / follows.sum()),
            "pause": _quantiles(pause[again]),
            "distance": _quantiles(distance[again]),
        },
    }


def _quantiles(values: FloatArray) -> list[float]:
    """Return the quantiles at KNOTS of a standard normal number."""
    shares = [statistics.NormalDist().cdf(z) for z in KNOTS]
    return [float(f"{value:.4g}") for value in np.quantile(values, shares)]


def _normal_scores(values: FloatArray) -> FloatArray:
    """Return the standard normal number of each value's rank; those of ties in random order."""
    order = np.lexsort((np.random.default_rng(0).random(len(values)), values))
    scores = np.empty(len(values))
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    scores[order] = [statistics.NormalDist().inv_cdf(rank) for rank in ranks]
    return scores


def _rounded(value: Any, digits: int = 4) -> Any:
    """Return plain numbers with few decimals."""
    return np.round(value, digits).tolist()


# ---- command line ----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_program(lambda: _fit_files(argv))


def _fit_files(argv: Sequence[str] | None) -> None:
    """Fit the habits and write them."""
    parser = OneLineParser(prog="python -m augmentation.fit_human", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="recorded touch")
    parser.add_argument("--output", default=str(HABITS_FILE), help="default: %(default)s")
    options = parser.parse_args(argv)
    paths = [as_folder(file, "a file") for file in options.files]
    recording = read_recording(paths, ImportOptions(window="whole"))
    text = json.dumps(fit(recording.strokes), indent=1)
    in_rows = re.sub(r"\[[^][]*\]", lambda row: " ".join(row[0].split()), text)
    write_text(Path(options.output), in_rows + "\n")
    say(f"{options.output}: the habits of {len(recording.strokes)} contacts")


if __name__ == "__main__":
    sys.exit(main())
