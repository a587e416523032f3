"""Numbers with their intervals: what every table of the evaluation holds.

Every interval is a 95 % percentile bootstrap over sequences. Resamples are the same for all rows
of a table, and a ratio is resampled as a whole, so what is paired stays paired. That of a quantile
lies between order statistics.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainlib.tables import format_number

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


def quantile(values: npt.ArrayLike, share: float) -> Estimate:
    """Estimate a quantile of N finite values.

    How many of them lie below it is binomial, so its interval is between those of rank
    share·N ± 1.96·sqrt(share·(1 - share)·N). NaN without any value, no interval below two.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if n == 0:
        return Estimate(float("nan"), None, 0)
    reach = 1.96 * math.sqrt(share * (1 - share) * n)
    low, high = (ordered[min(max(round(share * n + d), 0), n - 1)] for d in (-reach, reach))
    ci = (float(low), float(high)) if n > 1 else None
    return Estimate(float(np.quantile(ordered, share)), ci, n)


def shifted(estimate: Estimate, *, by: float = 0.0, scale: float = 1.0) -> Estimate:
    """Return (estimate - by)/scale, scale > 0."""
    value, ci, n = estimate
    return Estimate((value - by) / scale, ci and ((ci[0] - by) / scale, (ci[1] - by) / scale), n)


def columns_of(table: Table) -> dict[str, list[Estimate]]:
    """Turn setting -> metric -> estimate into metric -> estimates."""
    return {
        metric: [row[metric] for row in table.values()] for metric in next(iter(table.values()))
    }


def tables_to_json(tables: Mapping[str, Table]) -> dict[str, Any]:
    """Turn name -> setting -> metric -> estimate into the same with {value, ci, n}."""
    return {
        name: {
            setting: {metric: estimate._asdict() for metric, estimate in row.items()}
            for setting, row in table.items()
        }
        for name, table in tables.items()
    }


def tables_from_json(content: Mapping[str, Any]) -> dict[str, Table]:
    """Turn back what `tables_to_json` made; TypeError, KeyError or AttributeError if it is not."""
    return {
        name: {
            setting: {metric: _estimate(**fields) for metric, fields in row.items()}
            for setting, row in table.items()
        }
        for name, table in content.items()
    }


def _estimate(value: float | None, ci: list[float] | None, n: int) -> Estimate:
    """Turn {value, ci, n} back into an estimate; JSON's null is NaN."""
    low, high = ci or (None, None)
    interval = None if low is None or high is None else (low, high)
    return Estimate(math.nan if value is None else value, interval, n)


def format_estimate(estimate: Estimate | None, *, interval: bool = True) -> str:
    """Return "value [low, high]"."""
    if estimate is None:
        return "–"
    text = format_number(estimate.value)
    return f"{text} {format_interval(estimate)}" if interval and estimate.ci else text


def format_interval(estimate: Estimate) -> str:
    """Return "[low, high]", or "" without an interval."""
    return f"[{', '.join(map(format_number, estimate.ci))}]" if estimate.ci else ""
