"""Who must win a comparison with the baselines by theory, and whether they did."""

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any, NamedTuple

from evaluation.estimates import Estimate, Table


class Prediction(NamedTuple):
    """Theory: in `metric` the first method beats the second, or, if it is open, either may.

    The names of protocol and methods are prefixes: "vae" means every VAE.
    """

    protocol: str
    metric: str
    first: str
    second: str
    why: str
    is_open: bool = False


MEAN = "the posterior mean has the least MSE; a sample costs up to twice that (arXiv:1711.06077)"
ONE = "regression answers equal questions alike"
BLUR = "where several gestures fit, their mean is none of them"
PREDICTIONS = (
    Prediction(
        *("keyframes", "mse_ratio", "diffusion", "regression"),
        "the given frames determine a linear gesture, so mean and sample are the same",
        is_open=True,
    ),
    Prediction("denoise", "mse_ratio", "diffusion_one_shot", "diffusion", MEAN),
    Prediction("denoise", "mse_ratio", "regression", "diffusion", MEAN),
    Prediction(
        *("denoise", "r", "diffusion_one_shot", "regression"),
        "both estimate the posterior mean; a loss without weights is nearly all of large noise",
        is_open=True,
    ),
    Prediction("denoise_sigma_0.9", "valid", "diffusion", "regression", BLUR),
    Prediction("infill", "mse_ratio", "regression", "diffusion", MEAN),
    Prediction("infill", "valid", "diffusion", "regression", BLUR),
    Prediction("infill", "press_softness", "diffusion", "regression", BLUR),
    Prediction("infill", "type_mix_error", "diffusion", "regression", ONE),
    Prediction("generate", "valid", "diffusion", "regression", BLUR),
    Prediction("generate", "type_mix_error", "diffusion", "regression", ONE),
    Prediction(
        *("generate", "valid", "diffusion", "vae"),
        "the codes of gestures do not fill the prior, and between them the decoder blurs",
    ),
    Prediction(
        *("generate", "share_copies", "diffusion", "random_training_item"),
        "training gestures are valid but not new",
    ),
    Prediction(
        *("reconstruction", "mse_ratio", "vae", "diffusion"),
        "at equal bits: a VAE chooses what it sends, noise does not; neither is optimal",
        is_open=True,
    ),
)
LOWER_IS_BETTER = ("mse", "mse_ratio", "r", "press_softness", "type_mix_error", "share_copies")


def judge_predictions(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Hold every prediction against the tables.

    Returns:
        Rows of protocol, metric, first, second, why, is_open, first_value, second_value, and
        came_out: "yes", "no", or "undecided" where the 95 % intervals overlap (a value without
        one counts as exact); where theory is open, the method that won, or "undecided".
    """
    rows = []
    for p in PREDICTIONS:
        for protocol in (name for name in tables if name.startswith(p.protocol)):
            scores = {m: row[p.metric] for m, row in tables[protocol].items() if p.metric in row}
            for first, second in product(_named(scores, p.first), _named(scores, p.second)):
                a, b = scores[first], scores[second]
                ahead = _is_ahead(a, b, lower=p.metric in LOWER_IS_BETTER)
                words = (first, second) if p.is_open else ("yes", "no")
                row = p._asdict() | {"protocol": protocol, "first": first, "second": second}
                row |= {"first_value": a.value, "second_value": b.value}
                row["came_out"] = "undecided" if ahead is None else words[not ahead]
                rows.append(row)
    return rows


def _named(methods: Collection[str], prefix: str) -> list[str]:
    """Return the method of this name, else all whose names start with it."""
    return [prefix] if prefix in methods else [m for m in methods if m.startswith(prefix)]


def _is_ahead(a: Estimate, b: Estimate, *, lower: bool) -> bool | None:
    """Tell whether a is better than b, None if their intervals overlap."""
    (a_low, a_high), (b_low, b_high) = (e.ci or (e.value, e.value) for e in (a, b))
    if a_high < b_low:
        return lower
    return not lower if b_high < a_low else None
