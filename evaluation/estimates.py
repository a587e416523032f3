"""Numbers with their intervals: what every table of the evaluation holds.

Every interval is a 95 % percentile bootstrap over sequences. Resamples are the same for all rows
of a table, and a ratio is resampled as a whole, so what is paired stays paired.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 1000
SEED = 20210505


class Estimate(NamedTuple):
    """A number with its 95 % interval, None where there is none, over n sequences."""

    value: float
    ci: tuple[float, float] | None
    n: int


Table = dict[str, dict[str, Estimate]]  # setting -> metric -> estimate


@lru_cache(maxsize=16)
def _resample_counts(n: int) -> FloatArray:
    """How often each of n sequences is drawn in each resample, (RESAMPLES, n)."""
    rng = np.random.default_rng([SEED, n])
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def bootstrap(numerator: npt.ArrayLike, denominator: npt.ArrayLike | None = None) -> Estimate:
    """Estimate sum(numerator)/sum(denominator) over sequences: a mean, weighted mean or ratio.

    Args:
        numerator: (N,), finite.
        denominator: (N,), at least 0; None = ones. Sequences where it is 0 do not count in n.

    Returns:
        The value; no interval below 2 sequences; NaN without any.
    """
    top = np.asarray(numerator, dtype=float)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, dtype=float)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) == 0:
        return Estimate(float("nan"), None, 0)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(value, None, len(top))
    counts = _resample_counts(len(top))
    low, high = np.percentile(counts @ top / (counts @ bottom), [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), len(top))


def shifted(estimate: Estimate, *, by: float = 0.0, scale: float = 1.0) -> Estimate:
    """Return (estimate - by)/scale, scale > 0."""
    value, ci, n = estimate
    return Estimate((value - by) / scale, ci and ((ci[0] - by) / scale, (ci[1] - by) / scale), n)


def verdict(met: bool, controls_that_meet_it: list[str]) -> str:
    """Return "not met", "met", or, where a control meets the line too, "not discriminating"."""
    if not met:
        return "not met"
    return "not discriminating" if controls_that_meet_it else "met"
