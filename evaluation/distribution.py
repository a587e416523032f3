"""The generate protocol: are unconditional samples valid, distributed as the law says, and new?

`draw_samples` asks the model, at several numbers of steps; `generate_table` scores its samples
beside real data and controls; `judge_samples` holds one setting against GENERATE_LINES.

    validation_data     the floor: what real gestures score that nobody trained on
    training_items      a memoriser: real gestures, but copies
    one_training_item   a collapsed sampler: always the same, valid gesture
    training_mean, zeros, untrained_model

The metrics, data units. Samples without an answer are left out, and n tells how many are not.

    valid, one_press, ...           `validity` and each of its factors
    press_softness, ...             `deviations`
    mean_duration, duration_bias    frames of the samples that press once; relative to the
                                    training set's mean, less 1
    share_{type}                    of the plan's types; share_{type}_minus_law: of `type_law`;
                                    type_mix_error is the largest of their sizes
    types_chi2, types_p             Pearson's test of the type counts of the samples that touch
    ks_{factor}                     Kolmogorov-Smirnov distance of `pit` from U(0, 1); ks_max is
                                    the largest and ks_max_critical its 5 % point, 6 factors
    mmd2, mmd2_p, density, coverage, c2st_1nn      `compare_features`
    nn_distance_ratio, copy_auc, share_near_copies `copy_scores`
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.bayes import GesturePrior
from evaluation.estimates import SEED, Estimate, FloatArray, Table, bootstrap, shifted, verdict
from train_diffusion_ddim import DDIMScheduler, classify_gestures, generate, has_one_press
from trainlib.gestures import GESTURE_TYPES, PRESSED
from trainlib.process import progress

TOLERANCE = 0.02  # of a valid gesture, share of the screen or of a press
CLICK_DISTANCE = 0.05  # of `classify_gestures`: a shorter move is a click

# Samples per number of steps; the judged setting takes NUM_JUDGED, for shares within a point.
NUM_SAMPLES: Mapping[int, int] = {2: 1000, 5: 1000, 10: 1000, 20: 500, 50: 500}
NUM_JUDGED = 2000
NUM_UNTRAINED = 200
NUM_GAPS = 1000  # training gestures, at most, whose nearest neighbour is sought
BLOCK = 500  # of a two-sample comparison, on either side
SHUFFLES = 199
NEIGHBOURS = 5  # k of density and coverage

FLOOR_SETTING = "validation_data"
MEMORISER = "training_items"
CONTROLS = ("one_training_item", "training_mean", "zeros", "untrained_model")

# metric -> (how the score must lie to it, this value). Fresh real gestures score 0.97 in coverage
# (1 - 2^-k), 0.5 in copy_auc and about 0.02 in share_near_copies.
GENERATE_LINES: Mapping[str, tuple[str, float]] = {
    "valid": (">=", 0.98),
    "duration_bias": ("within ±", 0.05),
    "type_mix_error": ("<=", 0.03),
    "coverage": (">=", 0.95),
    "copy_auc": ("<=", 0.55),
    "share_near_copies": ("<=", 0.05),
}
COPY_METRICS = ("copy_auc", "share_near_copies")


# ----------------------------------------------------------------------------------------
# SAMPLES
# ----------------------------------------------------------------------------------------


def draw_samples(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    sampling: dict[str, Any],
    *,
    shape: tuple[int, int],
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Draw unconditional samples from the same noise for each number of steps.

    Args:
        model: the denoiser.
        untrained: the same network before training.
        scheduler: their scheduler; settings with more steps than it has are left out.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
        shape: (L, C).
        limit: of samples per setting; None = NUM_SAMPLES.

    Returns:
        "model_steps_{S}", S in NUM_SAMPLES and the judged one, and "untrained_model": samples
        (n, L, C), data units.
    """
    judged = sampling["num_inference_steps"]
    sizes = sorted({**NUM_SAMPLES, judged: NUM_JUDGED}.items())
    asked = {f"model_steps_{s}": (model, s, n) for s, n in sizes if s <= scheduler.num_timesteps}
    asked["untrained_model"] = (untrained, judged, NUM_UNTRAINED)
    samples = {}
    for name in progress(list(asked), "generate"):
        network, steps, n = asked[name]
        given = sampling | {"num_inference_steps": steps}
        samples[name] = generate(network, scheduler, (min(n, limit or n), *shape), **given)
    return samples


# ----------------------------------------------------------------------------------------
# FEATURES — samples → the numbers that make a gesture
# ----------------------------------------------------------------------------------------


class LineFit(NamedTuple):
    """Least-squares lines through x and y over the pressed frames; without any all is 0."""

    onset: Tensor  # first pressed frame, (B,) int64
    frames: Tensor  # how many are pressed, (B,) int64
    start: Tensor  # x, y of the lines at the first pressed frame, (B, 2) float64
    end: Tensor  # and at the last, (B, 2) float64
    rms: Tensor  # root mean squared residual of x and y, (B,) float64


def fit_lines(samples: Tensor) -> LineFit:
    """Fit lines to samples, (B, L, C), data units."""
    pressed = samples[..., 2] > PRESSED
    weight, xy = pressed.double()[..., None], samples[..., :2].double()
    frames, L = pressed.sum(dim=1), samples.shape[1]
    onset, last = pressed.int().argmax(dim=1), L - 1 - pressed.flip(1).int().argmax(dim=1)
    n = frames.clamp(min=1)[:, None, None]
    frame = torch.arange(L, device=samples.device)[None, :, None]
    middle = (weight * frame).sum(dim=1, keepdim=True) / n  # (B, 1, 1)
    mean = (weight * xy).sum(dim=1, keepdim=True) / n  # (B, 1, 2)
    time = frame - middle
    spread = (weight * time**2).sum(dim=1, keepdim=True).clamp(min=1e-6)  # 0 for one frame
    slope = (weight * time * (xy - mean)).sum(dim=1, keepdim=True) / spread  # (B, 1, 2)
    residual = weight * (xy - mean - slope * time)
    start, end = (
        (mean + slope * (at[:, None, None] - middle))[:, 0] * (frames > 0)[:, None]
        for at in (onset, last)
    )
    return LineFit(
        onset, frames, start, end, ((residual**2).sum(dim=(1, 2)) / (2 * n[:, 0, 0])).sqrt()
    )


def deviations(samples: Tensor) -> dict[str, Tensor]:
    """Return how far samples are from gestures of the family, (B,) each, 0 at best.

    press_softness, line_rms and idle_xy are what `validity` holds against TOLERANCE.
    """
    pressed = samples[..., 2] > PRESSED  # (B, L)
    idle_xy = samples[..., :2].abs().mean(dim=-1) * ~pressed
    return {
        "press_softness": (samples[..., 2] - pressed.to(samples)).abs().mean(dim=1),
        "line_rms": fit_lines(samples).rms,
        "idle_xy": idle_xy.sum(dim=1) / (~pressed).sum(dim=1).clamp(min=1),
    }


def validity(samples: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Tell which samples are gestures of the family, factor by factor.

    Args:
        samples: (B, L, C), data units, not rounded.
        prior: its durations are the allowed ones.

    Returns:
        (B,) bool each:
            one_press           the pressed frames are one run
            duration_in_range   there are min_delta_t ... max_delta_t of them
            press_binary        mean |press - (press > 0.5)| over all frames < 0.02
            straight_and_even   RMS distance of x and y from their least-squares lines over the
                                pressed frames < 0.02
            idle_at_zero        mean |x|, |y| over the other frames < 0.02
            valid               all of these
    """
    frames = (samples[..., 2] > PRESSED).sum(dim=1)
    deviation = deviations(samples)
    factors = {
        "one_press": has_one_press(samples),
        "duration_in_range": (prior.min_delta_t <= frames) & (frames <= prior.max_delta_t),
        "press_binary": deviation["press_softness"] < TOLERANCE,
        "straight_and_even": (deviation["line_rms"] < TOLERANCE) & (frames > 0),
        "idle_at_zero": deviation["idle_xy"] < TOLERANCE,
    }
    return factors | {"valid": torch.stack(list(factors.values())).all(dim=0)}


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


# ----------------------------------------------------------------------------------------
# THE LAW — samples against exact marginals
# ----------------------------------------------------------------------------------------


def type_law(prior: GesturePrior) -> FloatArray:
    """Return the exact share of each of the plan's types among gestures of a law, (5,).

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


def type_scores(samples: Tensor, prior: GesturePrior) -> dict[str, Estimate]:
    """Compare the counts of the plan's types with `type_law`."""
    types, law = classify_gestures(samples), type_law(prior)
    shares = {name: bootstrap(types == i) for i, name in enumerate(GESTURE_TYPES)}
    excess = {
        f"share_{name}_minus_law": shifted(share, by=share_by_law)
        for (name, share), share_by_law in zip(shares.items(), law.tolist(), strict=True)
    }
    worst = max(abs(estimate.value) for estimate in excess.values())
    scores = {f"share_{name}": share for name, share in shares.items()} | excess
    scores["type_mix_error"] = Estimate(worst, None, len(samples))

    counts = torch.bincount(types, minlength=len(GESTURE_TYPES))[1:].double()  # of those that touch
    n, expected = int(counts.sum()), counts.sum() * torch.from_numpy(law[1:])
    # a type that the law rules out adds infinity if it is there, and no degree of freedom
    chi2 = ((counts - expected) ** 2 / expected)[(counts > 0) | (expected > 0)].sum()
    freedom = torch.tensor((law > 0).sum() - 1.0)
    p = torch.special.gammaincc(freedom / 2, chi2 / 2) if freedom > 0 else (chi2 == 0).double()
    scores["types_chi2"] = Estimate(float(chi2) if n else math.nan, None, n)
    scores["types_p"] = Estimate(float(p) if n else math.nan, None, n)
    return scores


def pit(samples: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Map the factors of gestures through their distribution functions: U(0, 1) under the law.

    The probability integral transform; a discrete factor is spread evenly over its step by
    v ~ U(0, 1), always the same: duration (D - min + v)/(max - min + 1), onset
    (onset + v)/(L - D + 1). The ends are those of the fitted lines; an end of a gesture that does
    not move is uniform, too.

    Args:
        samples: (B, L, C), data units; each presses once.
        prior: the law.

    Returns:
        duration, onset, x_start, y_start, x_end, y_end, (B,) float64 each; outside [0, 1] if the
        law cannot draw it.
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
        bootstrap(_one_press_frames(x_train)).value,
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
                  (Gretton et al. 2012, JMLR 13, eq. 3); about 0 for equal laws, may be negative
        mmd2_p    share of SHUFFLES random divisions of x and y together, and of this one, whose
                  mmd2 is as large: below .05, the laws differ
        density   mean number of balls that an x_j lies in, /k: y_i's reach to its k-th neighbour
                  in y, k = NEIGHBOURS; 1 for equal laws (Naeem et al. 2020, arXiv:2002.09797)
        coverage  share of these balls that hold an x_j; 1 - 2^-k for equal laws
        c2st_1nn  share of both whose nearest neighbour is of their own sample, ½ for equal laws
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
    as the trainer may show it (`draw_symmetry`): a copy of a twin is a copy.

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


# ----------------------------------------------------------------------------------------
# THE TABLE
# ----------------------------------------------------------------------------------------


def score_samples(samples: Tensor, prior: GesturePrior, real: Reference) -> dict[str, Estimate]:
    """Score unconditional samples, (B, L, C), data units, on every metric of the protocol."""
    samples = samples.cpu()
    features, once = gesture_features(samples), has_one_press(samples)
    scores = {name: bootstrap(ok) for name, ok in validity(samples, prior).items()}
    deviation = deviations(samples)
    scores |= {name: bootstrap(value) for name, value in deviation.items()}
    touched = (samples[..., 2] > PRESSED).any(dim=1)  # without a touch there is no line
    scores["line_rms"] = bootstrap(deviation["line_rms"], touched)
    frames = bootstrap(_one_press_frames(samples))
    scores["mean_duration"] = frames
    scores["duration_bias"] = shifted(frames, by=real.mean_duration, scale=real.mean_duration)
    scores |= type_scores(samples, prior) | pit_scores(samples, prior)
    scores |= compare_features((features - real.center) / real.scale, real.compared)
    return scores | copy_scores(features[once], real)


def _one_press_frames(x: Tensor) -> Tensor:
    """Durations of the gestures that press once, in frames."""
    return (x[has_one_press(x)][..., 2] > PRESSED).sum(dim=1)


def generate_table(samples: Mapping[str, Tensor], prior: GesturePrior, real: Reference) -> Table:
    """Score samples beside real data and what copies it.

    Args:
        samples: by setting, unconditional samples, (B, L, C), data units.
        prior: the law of the gestures.
        real: training and validation gestures.

    Returns:
        The samples' settings, the floor, and the controls.
    """
    n = len(real.x_val)
    copies = real.x_train[real.order[-n:]]
    one = copies[:1].expand(n, -1, -1)
    controls = {
        FLOOR_SETTING: real.x_val,
        MEMORISER: copies,
        "one_training_item": one,
        "training_mean": real.x_train.mean(dim=0, keepdim=True).expand_as(one),
        "zeros": torch.zeros_like(one),
    }
    settings = progress([*samples.items(), *controls.items()], "generate: scores")
    return {name: score_samples(x, prior, real) for name, x in settings}


def meets_line(scores: Mapping[str, Estimate], metric: str) -> bool:
    """Tell whether a score meets its line of GENERATE_LINES; NaN does not."""
    value, (side, line) = scores[metric].value, GENERATE_LINES[metric]
    if side == ">=":
        return value >= line
    return (value if side == "<=" else abs(value)) <= line


def judge_samples(table: Table, setting: str = "model_steps_10") -> dict[str, dict[str, Any]]:
    """Hold a setting of the generate table against GENERATE_LINES, as `protocols.judge` does.

    Copies of real data are real data, so the memoriser is a control only where copying counts:
    for COPY_METRICS and for all lines together.

    Returns:
        Per metric: line, value, ci, floor (the value of the validation data), verdict and
        controls_that_meet_it; last all_lines, whose values are how many lines are met.
    """
    met = {name: [m for m in GENERATE_LINES if meets_line(row, m)] for name, row in table.items()}
    controls = [name for name in CONTROLS if name in table]
    verdicts = {}
    for metric, (side, line) in GENERATE_LINES.items():
        against = [*controls, MEMORISER] if metric in COPY_METRICS else controls
        also = [name for name in against if metric in met[name]]
        verdicts[metric] = {
            "line": f"{side} {line:g}".replace("± ", "±"),
            "value": table[setting][metric].value,
            "ci": table[setting][metric].ci,
            "floor": table[FLOOR_SETTING][metric].value,
            "verdict": verdict(metric in met[setting], also),
            "controls_that_meet_it": also,
        }
    also = [name for name in [*controls, MEMORISER] if len(met[name]) == len(GENERATE_LINES)]
    verdicts["all_lines"] = {
        "line": f"all {len(GENERATE_LINES)}",
        "value": len(met[setting]),
        "ci": None,
        "floor": len(met[FLOOR_SETTING]),
        "verdict": verdict(len(met[setting]) == len(GENERATE_LINES), also),
        "controls_that_meet_it": also,
    }
    return verdicts
