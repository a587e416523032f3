"""How a set of generated gestures differs from the exact prior, and from real gestures.

`type_scores` and `pit_scores` hold samples against the closed-form distribution of the family,
`compare_features` and `copy_scores` against real gestures. Data units.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.bayes import GesturePrior
from evaluation.estimates import SEED, Estimate, FloatArray, bootstrap, shifted
from evaluation.family import TOLERANCE, deviations, fit_lines
from trainlib.gestures import CLICK_DISTANCE, GESTURE_TYPES, PRESSED
from trainlib.metrics import classify_gestures, has_one_press

NUM_GAPS = 1000  # training gestures, at most, whose nearest neighbour is sought
BLOCK = 500  # of a two-sample comparison, on either side
SHUFFLES = 199
NEIGHBOURS = 5  # k of density and coverage


# ----------------------------------------------------------------------------------------
# PRIOR — samples against exact marginals
# ----------------------------------------------------------------------------------------


def type_distribution(prior: GesturePrior) -> FloatArray:
    """Return the exact share of each of the plan's types among gestures of a prior, (5,).

    `classify_gestures` sees the move alone, not what was drawn: a short swipe is a click, a flat
    diagonal is horizontal. A coordinate that moves does so by a distance of density 2(1 - d), so
    with r = CLICK_DISTANCE a swipe along an axis is shorter than r with probability 1 - (1 - r)²,
    and a diagonal is

        shorter than r      ∫∫ 4(1 - a)(1 - b) da db over the quarter disc = πr² - 8r³/3 + r⁴/2
        flatter than 1 : 2  ∫ 2(1 - b)(1 - 2b)² db over [0, ½] = 7/24, less the shorter ones
                            among them: the first integral over a sector of angle atan ½
        steeper than 2 : 1  as many

    A gesture of one frame does not move.

    Returns:
        Shares of GESTURE_TYPES, float64; that of "none" is 0.
    """
    r, angle = CLICK_DISTANCE, math.atan(0.5)
    short = 1 - (1 - r) ** 2
    disc = math.pi * r**2 - 8 * r**3 / 3 + r**4 / 2
    sine, cosine = math.sin(angle), math.cos(angle)
    sector = 2 * angle * r**2 - 4 * r**3 / 3 * (sine + 1 - cosine) + r**4 / 2 * sine**2
    wide = 7 / 24 - sector
    of_kind = np.array(  # none, click, horizontal, vertical, diagonal
        [
            [1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, short, 1 - short, 0, 0],
            [0, short, 0, 1 - short, 0],
            [0, disc, wide, wide, 1 - disc - 2 * wide],
        ]
    )
    still = 1 / (prior.max_delta_t - prior.min_delta_t + 1) if prior.min_delta_t == 1 else 0.0
    return still * of_kind[1] + (1 - still) * of_kind[prior.kinds].mean(axis=0)


def type_shares(samples: Tensor) -> dict[str, Estimate]:
    """Return the share of each of the plan's types as share_{type}."""
    types = classify_gestures(samples)
    return {f"share_{name}": bootstrap(types == i) for i, name in enumerate(GESTURE_TYPES)}


def type_scores(samples: Tensor, prior: GesturePrior) -> dict[str, Estimate]:
    """Compare the counts of the plan's types with `type_distribution`."""
    types, due = classify_gestures(samples), type_distribution(prior)
    shares = type_shares(samples)
    excess = {
        f"{name}_minus_law": shifted(share, by=share_due)
        for (name, share), share_due in zip(shares.items(), due.tolist(), strict=True)
    }
    worst = max(abs(estimate.value) for estimate in excess.values())
    scores = shares | excess
    scores["type_mix_error"] = Estimate(worst, None, len(samples))

    counts = torch.bincount(types, minlength=len(GESTURE_TYPES))[1:].double()  # of those that touch
    n, expected = int(counts.sum()), counts.sum() * torch.from_numpy(due[1:])
    # a type that the prior rules out adds infinity if it is there, and no degree of freedom
    chi2 = ((counts - expected) ** 2 / expected)[(counts > 0) | (expected > 0)].sum()
    freedom = torch.tensor((due > 0).sum() - 1.0)
    p = torch.special.gammaincc(freedom / 2, chi2 / 2) if freedom > 0 else (chi2 == 0).double()
    scores["types_chi2"] = Estimate(float(chi2) if n else math.nan, None, n)
    scores["types_p"] = Estimate(float(p) if n else math.nan, None, n)
    return scores


def pit(samples: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Map the factors of gestures through their distribution functions: U(0, 1) under the prior.

    The probability integral transform; a discrete factor is spread evenly over its step by
    v ~ U(0, 1), always the same: duration (D - min + v)/(max - min + 1), onset
    (onset + v)/(L - D + 1). The ends are those of the fitted lines; an end of a gesture that does
    not move is uniform, too.

    Args:
        samples: (B, L, C), data units; each presses once.
        prior: the distribution that they should have.

    Returns:
        duration, onset, x_start, y_start, x_end, y_end, (B,) float64 each; outside [0, 1] if the
        prior cannot draw it.
    """
    fit = fit_lines(samples)
    generator = torch.Generator().manual_seed(SEED)
    v = torch.rand(2, len(samples), generator=generator, dtype=torch.float64).to(fit.start.device)
    durations = prior.max_delta_t - prior.min_delta_t + 1
    (x_start, y_start), (x_end, y_end) = fit.start.T, fit.end.T
    return {
        "duration": (fit.frames - prior.min_delta_t + v[0]) / durations,
        "onset": (fit.onset + v[1]) / (samples.shape[1] - fit.frames + 1),
        "x_start": x_start,
        "y_start": y_start,
        "x_end": x_end,
        "y_end": y_end,
    }


def ks_distance(u: Tensor) -> float:
    """Return sup |F - u| of the empirical distribution F of u, (n,), from U(0, 1); NaN if empty."""
    n = len(u)
    if n == 0:
        return math.nan
    u = u.clamp(0, 1).sort().values
    steps = torch.arange(n + 1, dtype=u.dtype, device=u.device) / n
    return float(torch.maximum(steps[1:] - u, u - steps[:-1]).max())


def pit_scores(samples: Tensor, prior: GesturePrior) -> dict[str, Estimate]:
    """Score the factors of the samples that press once against U(0, 1)."""
    once = samples[has_one_press(samples)]
    n, factors = len(once), pit(once, prior)
    scores = {f"ks_{name}": Estimate(ks_distance(u), None, n) for name, u in factors.items()}
    worst = max(estimate.value for estimate in scores.values())
    # Kolmogorov's asymptotic tail 2·exp(-2nD²), shared by all factors (Bonferroni)
    critical = math.sqrt(math.log(2 * len(factors) / 0.05) / (2 * n)) if n else math.nan
    scores["ks_max"] = Estimate(worst, None, n)
    scores["ks_max_critical"] = Estimate(critical, None, n)
    return scores


# ----------------------------------------------------------------------------------------
# REAL GESTURES — samples against real ones
# ----------------------------------------------------------------------------------------


def gesture_features(samples: Tensor) -> Tensor:
    """Describe samples by what the two-sample metrics compare.

    Args:
        samples: (B, L, C), data units.

    Returns:
        (B, 9) float64: log duration (frames), x and y of the start and of the end, onset
        (frames), length, line residual, press softness.
    """
    fit = fit_lines(samples)
    duration = fit.frames.clamp(min=1).double().log()
    length = (fit.end - fit.start).norm(dim=1)
    softness = deviations(samples)["press_softness"]
    rest = [fit.onset, length, fit.rms, softness]
    return torch.cat([duration[:, None], fit.start, fit.end, torch.stack(rest, dim=1)], dim=1)


def one_press_frames(x: Tensor) -> Tensor:
    """Durations of the gestures that press once, in frames."""
    return (x[has_one_press(x)][..., 2] > PRESSED).sum(dim=1)


class Reference(NamedTuple):
    """Real gestures that generated ones are held against, on the CPU."""

    x_train: Tensor  # (N, L, C), data units
    x_val: Tensor  # (M, L, C): what real data scores
    order: Tensor  # training rows at random, (N,): first the compared ones, last the memoriser's
    mean_duration: float  # of the training gestures that press once, frames
    center: Tensor  # of `gesture_features`, (9,) float64
    scale: Tensor  # their std, TOLERANCE at least, (9,) float64
    compared: Tensor  # features of the training gestures in this order, standardised, (N, 9)
    bank: Tensor  # features of the training gestures that press once, not standardised, (N', 9)
    bank_gaps: Tensor  # distance of up to NUM_GAPS of them to the nearest other one, sorted


def make_reference(x_train: Tensor, x_val: Tensor) -> Reference:
    """Prepare training and validation gestures, (N, L, C), data units."""
    x_train, x_val = x_train.cpu(), x_val.cpu()
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(SEED))
    features = gesture_features(x_train)
    # features that do not vary, like the residual of exact lines, count in units of TOLERANCE
    center, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=TOLERANCE)
    bank = features[order[has_one_press(x_train)[order]]]
    gaps = neighbour_distances(bank[:NUM_GAPS], bank, scale)[:, 1]  # the first is itself
    return Reference(
        x_train,
        x_val,
        order,
        bootstrap(one_press_frames(x_train)).value,
        center,
        scale,
        (features[order] - center) / scale,
        bank,
        gaps.sort().values,
    )


def compare_features(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    """Compare two samples by the distances between and within them, BLOCK of each at a time.

    The reach of a neighbourhood depends on n, so n is BLOCK in every row that has as many; the
    values are means over the blocks.

        mmd2      Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)]/(n(n - 1)) - 2Σ k(x_i, y_j)/n², unbiased;
                  k = Σ_q exp(-d²/(2q·median²)), q = 1/4, 1/2, 1, 2, 4, median distance within y
                  (Gretton et al. 2012, JMLR 13, eq. 3); about 0 if equal, or negative
        mmd2_p    share of SHUFFLES random divisions of x and y together, and of this one, whose
                  mmd2 is as large: below .05, the distributions differ
        density   mean number of balls that an x_j lies in, /k: y_i's reach to its k-th neighbour
                  in y, k = NEIGHBOURS; 1 if equal (Naeem et al. 2020, arXiv:2002.09797)
        coverage  share of these balls that hold an x_j; 1 - 2^-k if equal
        c2st_1nn  share of both whose nearest neighbour is of their own sample, ½ if equal
                  (Lopez-Paz & Oquab 2017, arXiv:1610.06545)

    None has an interval: a bootstrap repeats gestures, and these metrics take a repeat for a near
    neighbour. What chance does is seen in the row of the floor.

    Args:
        x: generated, (n, D), standardised.
        y: real, (m, D); D is any number of features.

    Returns:
        By name, with the number of x compared; NaN if that is not above k.
    """
    n = min(BLOCK, len(x), len(y))
    blocks = min(len(x), len(y)) // n if n > NEIGHBOURS else 0
    parts = [slice(i * n, (i + 1) * n) for i in range(blocks)]
    compared = [_compare_block(x[part], y[part]) for part in parts]
    values = [math.nan] * 5
    if blocks:
        mmd2, *rest = (torch.stack(each).mean(dim=0) for each in zip(*compared, strict=True))
        p = (mmd2 >= mmd2[0]).double().mean()  # its own is among them
        values = [float(value) for value in (mmd2[0], p, *rest)]
    names = ("mmd2", "mmd2_p", "density", "coverage", "c2st_1nn")
    estimates = (Estimate(value, None, n * max(blocks, 1)) for value in values)
    return dict(zip(names, estimates, strict=True))


def _compare_block(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mmd2 with that of shuffles, density, coverage, c2st_1nn of x and y, (n, D) each."""
    n, both = len(x), torch.cat([x, y])
    # the exact differences: small distances decide here, and a matrix product loses them
    distance = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    mmd2 = _mmd2_and_shuffled(distance)
    radius = distance[n:, n:].kthvalue(NEIGHBOURS + 1, dim=1).values  # the first is itself
    inside = (distance[:n, n:] < radius).double()  # (x, y)
    is_x = torch.arange(2 * n) < n
    nearest_is_x = is_x[distance.fill_diagonal_(math.inf).argmin(dim=1)]
    density, coverage = inside.sum(dim=1).mean() / NEIGHBOURS, inside.amax(dim=0).mean()
    return mmd2, density, coverage, (nearest_is_x == is_x).double().mean()


def _mmd2_and_shuffled(distance: Tensor) -> Tensor:
    """Return mmd2 from all distances, (2n, 2n), then that of SHUFFLES random divisions."""
    n = len(distance) // 2
    above = torch.triu_indices(n, n, offset=1)
    median = distance[n:, n:][above[0], above[1]].median().clamp(min=1e-12)
    term = torch.exp(-(distance**2) / (8 * median**2))  # q = 4; each square halves q
    kernel = term.clone()
    for _ in range(4):
        term = term**2
        kernel += term
    kernel.fill_diagonal_(0)
    # with signs s, + for one half and - for the other, sᵀKs = within - across
    generator = torch.Generator().manual_seed(SEED)
    shuffled = [torch.randperm(2 * n, generator=generator) for _ in range(SHUFFLES)]
    sign = torch.where(torch.stack([torch.arange(2 * n), *shuffled]) < n, 1.0, -1.0).to(kernel)
    form = ((sign @ kernel) * sign).sum(dim=1)
    within, across = (kernel.sum() + form) / 2, (kernel.sum() - form) / 2
    return within / (n * (n - 1)) - across / n**2


def neighbour_distances(x: Tensor, bank: Tensor, scale: Tensor, chunk: int = 128) -> Tensor:
    """Find the distances to the two nearest gestures of a bank, or to their symmetric twins.

    Compared are duration, start and end. A twin is mirrored, turned, reversed or moved in time,
    as the trainer may show it (`augment`): a copy of a twin is a copy.

    Args:
        x: `gesture_features`, (B, 9).
        bank: the same of the bank, (N, 9).
        scale: what a difference of 1 is in each feature, (9,).
        chunk: rows of x at a time, to bound the memory.

    Returns:
        (B, 2) float32, ascending; infinite beyond the N-th.
    """
    twins = [x[:, :5]]
    for flip in (_mirror_x, _mirror_y, _swap_axes, _reverse):
        twins += [flip(twin) for twin in twins]
    queries = (torch.stack(twins) / scale[:5]).float()  # (16, B, 5)
    bank = (bank[:, :5] / scale[:5]).float()
    nearest = [torch.full((0, 2), math.inf)]
    for rows in queries.split(chunk, dim=1):
        each = torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=0)
        two = each.topk(min(2, len(bank)), dim=1, largest=False).values
        nearest.append(F.pad(two, (0, 2 - two.shape[1]), value=math.inf))
    return torch.cat(nearest)


# of duration, x_start, y_start, x_end, y_end, (B, 5)
def _mirror_x(twin: Tensor) -> Tensor:
    return torch.stack([twin[:, 0], 1 - twin[:, 1], twin[:, 2], 1 - twin[:, 3], twin[:, 4]], dim=1)


def _mirror_y(twin: Tensor) -> Tensor:
    return _swap_axes(_mirror_x(_swap_axes(twin)))


def _swap_axes(twin: Tensor) -> Tensor:
    return twin[:, [0, 2, 1, 4, 3]]


def _reverse(twin: Tensor) -> Tensor:
    return twin[:, [0, 3, 4, 1, 2]]


def copy_scores(features: Tensor, real: Reference) -> dict[str, Estimate]:
    """Tell copies of training gestures from new ones by `neighbour_distances`.

        nn_distance_ratio   mean distance of a sample to the nearest training gesture, over that
                            of a training gesture to the nearest other one: 1 for new gestures,
                            0 for copies
        copy_auc            probability that the sample is the nearer of the two: ½ for new
                            gestures, 1 for copies (Meehan et al. 2020, arXiv:2004.05675)
        share_near_copies   share of the samples less than a third as far from their nearest
                            training gesture as from the second (Gu et al. 2023, arXiv:2310.02664)

    A new gesture is as far from the training set as its members are from each other: the floor's
    row shows it. The intervals resample the samples alone.

    Args:
        features: `gesture_features` of samples that press once, (B, 9).
        real: the training gestures.
    """
    first, second = neighbour_distances(features, real.bank, real.scale).T.contiguous()
    nearer = torch.searchsorted(real.bank_gaps, first)
    as_near = torch.searchsorted(real.bank_gaps, first, right=True)
    gaps = len(real.bank_gaps)
    mean_gap = float(real.bank_gaps.mean())
    return {
        "nn_distance_ratio": shifted(bootstrap(first), scale=mean_gap or math.nan),
        "copy_auc": bootstrap(1 - (nearer + as_near) / (2 * max(gaps, 1))),
        "share_near_copies": bootstrap(first < second / 3),
    }
