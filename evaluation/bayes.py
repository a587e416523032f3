"""Exact Bayes oracle of the linear-gesture family: E[x_0 | y], MMSE, exact-score DDIM.

The distribution of the gestures is known, so the best possible denoiser can be computed and every
learned one measured against it. Data units throughout: x, y, press in [0, 1]. A clean sequence x_0
is a window (n = delta_t frames from an onset), a type and, per screen axis, either a constant c or
a ramp from a to b; all of c, a, b are uniform on [0, 1], idle frames are zero. The observation is

    y = x_0 + σ·z,  z ~ N(0, I),    with σ = ½·sqrt((1 - ᾱ)/ᾱ) for x_t = sqrt(ᾱ)·(2·x_0 - 1) + …

Given the window and the type the three channels are independent, so the evidence factorises.
With u_i = i/(n - 1), all sums over the frames of the window, and relative to an idle sequence:

    press     (Σ y_press - n/2)/σ²                                       (a log-evidence)
    constant  Z_0 = ∫ exp((h·c - ½n·c²)/σ²) dc,          h = Σ y_i
    ramp      Z_1 = ∬ exp((p·a + q·b - ½A(a² + b²) - C·ab)/σ²) da db,
              p = Σ(1 - u_i)·y_i,  q = Σ u_i·y_i,
              A = Σ u_i² = n(2n - 1)/(6(n - 1)),  C = Σ u_i(1 - u_i) = n(n - 2)/(6(n - 1))

    P(window, type | y) ∝ prior · exp(press) · Z_{0 or 1}(x axis) · Z_{0 or 1}(y axis)

The posterior mean averages the rendered mean gestures under these weights. Sums over windows come
from cumulative sums over frames, and so does the rendering (difference arrays).

Integrals on [0, 1]: Gauss-Legendre nodes on a stretch of length W = min(1, 14 posterior standard
deviations) that slides inside [0, 1] to hold the mode. W is shared by all windows of one duration;
so, in coordinates d from the middle of the stretch, the ramp's integrand is
exp(g_a·d_j) · K_jk · exp(g_b·d_k) with one kernel K for all: a matrix product. On observations of
the family the means err by less than 1e-11; by 1e-5 if an end is pinned 30 std outside [0, 1].
Windows are skipped only when an upper bound of their evidence (the free maximum of the exponents)
is 40 nats below one exact evidence: together less than 1e-12 of the posterior.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from augmentation.click_aug import ACTION_TYPES, SEQ_LEN, Recipe, draw_gestures, render
from trainlib.gestures import GESTURE_TYPES, MOVES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STRETCH_STDS = 14.0  # ±7 standard deviations leave 3e-12 outside
PRUNE_NATS = 40.0
CHUNK = 32  # sequences at a time: the window tables stay below 100 MB


@dataclass(frozen=True)
class GesturePrior:
    """The distribution of the clean gestures: type, delta_t and onset uniform, coordinates U(0, 1).

    Args:
        sequence_length: frames per sequence, L.
        min_delta_t: shortest gesture in frames, at least 1.
        max_delta_t: longest gesture in frames, inclusive, at most L.
        action_type: a key of ACTION_TYPES; its gesture types come in equal parts.
    Raises:
        ValueError: a duration out of order or range, or an unknown action type.
    """

    sequence_length: int = SEQ_LEN
    min_delta_t: int = 5
    max_delta_t: int = 75
    action_type: str = "mixed"

    def __post_init__(self) -> None:
        """Check the ranges."""
        Recipe(
            sequence_length=self.sequence_length,
            action_type=self.action_type,
            min_delta_t=self.min_delta_t,
            max_delta_t=self.max_delta_t,
        )
        if self.min_delta_t < 1:
            raise ValueError(f"min_delta_t must be at least 1 here, got {self.min_delta_t}")

    @property
    def kinds(self) -> IntArray:
        """The gesture types, (K,), as indices into GESTURE_TYPES."""
        return np.array([GESTURE_TYPES.index(name) for name in ACTION_TYPES[self.action_type]])

    @property
    def moves(self) -> npt.NDArray[np.bool_]:
        """Whether the type moves along x and along y, (K, 2)."""
        return np.array([MOVES[name] for name in ACTION_TYPES[self.action_type]])

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Draw n clean sequences, (n, L, 3) float64, data units."""
        gestures = draw_gestures(
            rng, n, self.action_type, self.min_delta_t, self.max_delta_t, self.sequence_length
        )
        return render(gestures, self.sequence_length).astype(np.float64)


DEFAULT_PRIOR = GesturePrior()


@dataclass(frozen=True)
class _Posterior:
    """M surviving (sequence, window) pairs; axis 0 of the means is (x, y)."""

    sequence: IntArray  # (M,)
    onset: IntArray  # (M,)
    delta_t: IntArray  # (M,)
    probability: FloatArray  # (K types, M), sums to 1 per sequence
    constant: FloatArray  # (2, M), E[c | window]
    start: FloatArray  # (2, M), E[a | window]
    end: FloatArray  # (2, M), E[b | window]


# ----------------------------------------------------------------------------------------
# INTEGRALS — Z_0 and Z_1 of all windows of one duration, with the posterior means
# ----------------------------------------------------------------------------------------


def _stretch(std: float) -> tuple[FloatArray, FloatArray, float]:
    """Nodes about 0 and weights (K,) that resolve a Gaussian of this std on [0, 1]; half-width."""
    half = min(1.0, STRETCH_STDS * std) / 2
    # Nodes at most 0.9 std apart: sampling a Gaussian at spacing d errs by about exp(-2π²/d²).
    node, weight = np.polynomial.legendre.leggauss(8 + int(np.ceil(3.4 * half / std)))
    return node * half, weight * half, half


def _tilt(slope: FloatArray, offset: FloatArray) -> tuple[FloatArray, FloatArray]:
    """exp(slope·offset) per node, (..., M, K), scaled to at most 1, and the log of the scale."""
    log_scale = np.abs(slope) * offset[-1]
    return np.exp(slope[..., None] * offset - log_scale[..., None]), log_scale


def _constant(h: FloatArray, n: float) -> tuple[FloatArray, FloatArray]:
    """Log Z_0 and E[c], shaped as h; h and n come divided by σ²."""
    offset, weight, half = _stretch(n**-0.5)
    centre = np.clip(h / n, half, 1 - half)
    tilt, log_scale = _tilt(h - n * centre, offset)
    kernel = weight * np.exp(-0.5 * n * offset**2)
    total, first = np.moveaxis(tilt @ np.stack([kernel, kernel * offset], axis=1), -1, 0)
    log_z = (h - 0.5 * n * centre) * centre + log_scale + np.log(total)
    return log_z, centre + first / total


def _ramp(
    p: FloatArray, q: FloatArray, A: float, C: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Log Z_1, E[a] and E[b], shaped as p; p, q, A and C come divided by σ²."""
    offset, weight, half = _stretch((A / (A * A - C * C)) ** 0.5)
    # Mode in the box: free mode of a, then coordinate ascent (one factor (C/A)² ≤ ¼ per round).
    a = np.clip((A * p - C * q) / (A * A - C * C), 0, 1)
    b = np.clip((q - C * a) / A, 0, 1)
    a = np.clip((p - C * b) / A, half, 1 - half)
    b = np.clip(b, half, 1 - half)
    tilt_a, log_scale_a = _tilt(p - A * a - C * b, offset)
    tilt_b, log_scale_b = _tilt(q - C * a - A * b, offset)
    square, cross = offset[:, None] ** 2 + offset**2, offset[:, None] * offset
    kernel = np.outer(weight, weight) * np.exp(-0.5 * A * square - C * cross)
    joint_a = tilt_a * (tilt_b @ kernel)  # (..., M, K), unnormalised density of a at the nodes
    total = joint_a.sum(axis=-1)
    mean_a = a + joint_a @ offset / total
    mean_b = b + np.einsum("...k,...k->...", tilt_b * offset, tilt_a @ kernel) / total
    log_z = p * a + q * b - 0.5 * A * (a * a + b * b) - C * a * b
    return log_z + log_scale_a + log_scale_b + np.log(total), mean_a, mean_b


def _axis_integrals(
    h: FloatArray, q: FloatArray, delta_t: IntArray, sigma: float
) -> tuple[FloatArray, FloatArray]:
    """All integrals of M windows sorted by delta_t; h and q are (2, M), one row per axis.

    Returns log Z, (2 kinds, 2 axes, M), and the means of c, a and b, (3, 2 axes, M).
    """
    log_z, mean = np.empty((2, *h.shape)), np.empty((3, *h.shape))
    groups = np.flatnonzero(np.diff(delta_t, prepend=-1))
    for lo, hi in pairwise([*groups, delta_t.size]):
        rows, n = np.s_[:, lo:hi], int(delta_t[lo])
        h_n, q_n = h[rows] / sigma**2, q[rows] / sigma**2
        log_z[0][rows], mean[0][rows] = _constant(h_n, n / sigma**2)
        if n == 1:  # a ramp of one frame shows its start only
            log_z[1][rows], mean[1:, :, lo:hi] = log_z[0][rows], mean[0][rows]
            continue
        A, C = np.array([n * (2 * n - 1), n * (n - 2)]) / (6 * (n - 1) * sigma**2)
        log_z[1][rows], mean[1][rows], mean[2][rows] = _ramp(h_n - q_n, q_n, A, C)
    return log_z, mean


# ----------------------------------------------------------------------------------------
# POSTERIOR — y → P(window, type | y)
# ----------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _windows(prior: GesturePrior) -> tuple[IntArray, IntArray, FloatArray]:
    """Duration, onset and log prior of every window, (W,) each, sorted by duration."""
    durations = np.arange(prior.min_delta_t, prior.max_delta_t + 1)
    onsets = prior.sequence_length - durations + 1  # where it fits
    delta_t = np.repeat(durations, onsets)
    onset = np.concatenate([np.arange(count) for count in onsets])
    return delta_t, onset, -np.log(durations.size * onsets[delta_t - prior.min_delta_t])


def _window_sums(
    y: FloatArray, delta_t: IntArray, onset: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Σ y_press (W, N), h = Σ y_i (2, W, N) and q = Σ u_i·y_i (2, W, N) of every window."""
    frames_first = y.transpose(2, 1, 0)  # (3, L, N)
    frame = np.arange(y.shape[1])[:, None]
    integral = np.pad(np.cumsum(frames_first, axis=1), ((0, 0), (1, 0), (0, 0)))
    moment = np.pad(np.cumsum(frames_first[:2] * frame, axis=1), ((0, 0), (1, 0), (0, 0)))
    total = integral[:, onset + delta_t] - integral[:, onset]
    q = moment[:, onset + delta_t] - moment[:, onset] - onset[:, None] * total[:2]
    return total[2], total[:2], q / np.maximum(delta_t - 1, 1)[:, None]


def _posterior(y: FloatArray, sigma: float, prior: GesturePrior) -> _Posterior:
    """Weigh every window and type of a chunk of observations (N, L, 3)."""
    delta_t, onset, log_prior = _windows(prior)
    press, h, q = _window_sums(y, delta_t, onset)
    base = log_prior[:, None] + (press - 0.5 * delta_t[:, None]) / sigma**2  # (W, N)
    x_kind, y_kind = prior.moves.astype(int).T  # 0 constant, 1 ramp

    def weigh(window: IntArray, sequence: IntArray) -> tuple[FloatArray, FloatArray]:
        at = np.s_[:, window, sequence]
        log_z, mean = _axis_integrals(h[at], q[at], delta_t[window], sigma)
        return base[at[1:]] + log_z[x_kind, 0] + log_z[y_kind, 1], mean  # (K, M), (3, 2, M)

    # Free maximum of the exponents: 1 and 2u - 1 are orthogonal, Σ(2u - 1)² = n(n+1)/(3(n-1)).
    n = delta_t[:, None].astype(float)
    fit = h**2 / n + (2 * q - h) ** 2 * (3 * (n - 1) / (n * (n + 1)))
    bound = base + fit.sum(axis=0) / (2 * sigma**2)

    best = bound.argmax(axis=0)
    order = np.argsort(best)  # the integrals want windows sorted by duration
    reference = np.empty(len(y))
    reference[order] = weigh(best[order], order)[0].max(axis=0)

    window, sequence = np.nonzero(bound >= reference - PRUNE_NATS)
    log_weight, mean = weigh(window, sequence)
    top = np.full(len(y), -np.inf)
    np.maximum.at(top, sequence, log_weight.max(axis=0))
    weight = np.exp(log_weight - top[sequence])
    weight /= np.bincount(sequence, weight.sum(axis=0))[sequence]
    return _Posterior(sequence, onset[window], delta_t[window], weight, *mean)


def _posterior_chunks(
    x_noisy: npt.ArrayLike, sigma: float, prior: GesturePrior
) -> Iterator[tuple[int, _Posterior]]:
    """Check the input, then yield (sequences in the chunk, their posterior)."""
    y = np.asarray(x_noisy, dtype=np.float64)
    if y.ndim != 3 or y.shape[1:] != (prior.sequence_length, 3) or not np.isfinite(y).all():
        raise ValueError(
            f"x_noisy must be finite, (N, {prior.sequence_length}, 3), got {y.shape}"
            f" with {np.count_nonzero(~np.isfinite(y))} non-finite values"
        )
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    for lo in range(0, len(y), CHUNK):
        chunk = y[lo : lo + CHUNK]
        yield len(chunk), _posterior(chunk, sigma, prior)


# ----------------------------------------------------------------------------------------
# ORACLES — what a perfect model would answer
# ----------------------------------------------------------------------------------------


def _render_mean(posterior: _Posterior, n: int, prior: GesturePrior) -> FloatArray:
    """Average of the rendered mean gestures, (n, L, 3), by difference arrays over frames."""
    mass = posterior.probability.sum(axis=0)  # (M,)
    moving = prior.moves.T @ posterior.probability  # (2, M)
    start = moving * posterior.start + (mass - moving) * posterior.constant
    end = moving * posterior.end + (mass - moving) * posterior.constant
    slope = (end - start) / np.maximum(posterior.delta_t - 1, 1)
    cells = (prior.sequence_length + 1) * n
    touch_down = posterior.onset * n + posterior.sequence
    lift_off = touch_down + posterior.delta_t * n

    def spread(value: FloatArray) -> FloatArray:  # (M,) → sum over the windows at a frame, (L, n)
        jump = np.bincount(touch_down, value, cells) - np.bincount(lift_off, value, cells)
        return jump.reshape(-1, n).cumsum(axis=0)[:-1]

    frame = np.arange(prior.sequence_length)[:, None]
    position = [
        spread(start[axis] - slope[axis] * posterior.onset) + spread(slope[axis]) * frame
        for axis in (0, 1)
    ]
    return np.stack([*position, spread(mass)], axis=-1).swapaxes(0, 1)


def posterior_mean(
    x_noisy: npt.ArrayLike, sigma: float, prior: GesturePrior = DEFAULT_PRIOR
) -> FloatArray:
    """The Bayes denoiser E[x_0 | x_0 + σ·z = x_noisy], which no denoiser beats in MSE.

    Args:
        x_noisy: observations, (N, L, 3), any float, data units: (x_t/sqrt(ᾱ) + 1)/2.
        sigma: noise std in data units, > 0; one for the batch (see noise_std).
        prior: the distribution of the gestures.
    Returns:
        (N, L, 3) float64, in [0, 1] up to rounding.
    Raises:
        ValueError: wrong shape, a non-finite value, or sigma not positive.
    """
    means = [_render_mean(p, n, prior) for n, p in _posterior_chunks(x_noisy, sigma, prior)]
    return np.concatenate([np.empty((0, prior.sequence_length, 3)), *means])


def exact_ddim(
    x_T: npt.ArrayLike,
    alphas_cumprod: npt.ArrayLike,
    timesteps: Sequence[int],
    prior: GesturePrior = DEFAULT_PRIOR,
) -> FloatArray:
    """Deterministic DDIM with the exact score (Song et al. 2021, arXiv:2010.02502, eq. 12, η = 0).

        x_prev = sqrt(ᾱ_prev)·E[u | x_t] + sqrt(1 - ᾱ_prev)·eps,  u = 2·x_0 - 1

    Args:
        x_T: noisy sequences at t = timesteps[0], (N, L, 3), model units.
        alphas_cumprod: the ᾱ table, (T,), each in (0, 1).
        timesteps: indices to visit, strictly decreasing in [0, T); the last step lands on x_0.
        prior: the distribution of the gestures.
    Returns:
        x_0, (N, L, 3) float64, data units.
    Raises:
        ValueError: timesteps out of order or range, or a bad x_T (as posterior_mean).
    """
    alpha_bar = np.append(np.asarray(alphas_cumprod, dtype=np.float64), 1.0)  # [-1] is x_0
    visited = [int(t) for t in timesteps] + [-1]
    if len(visited) < 2 or visited[0] >= alpha_bar.size - 1 or min(np.diff(visited) * -1) < 1:
        raise ValueError(
            f"timesteps must decrease strictly within [0, {alpha_bar.size - 1}), got {visited[:-1]}"
        )
    x_t = np.asarray(x_T, dtype=np.float64)
    for t, t_prev in pairwise(visited):
        scale, noise = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
        u_pred = 2 * posterior_mean((x_t / scale + 1) / 2, noise_std(alpha_bar[t]), prior) - 1
        eps_pred = (x_t - scale * u_pred) / noise
        x_t = np.sqrt(alpha_bar[t_prev]) * u_pred + np.sqrt(1 - alpha_bar[t_prev]) * eps_pred
    return (x_t + 1) / 2


# ----------------------------------------------------------------------------------------
# BOUNDS — what no model can beat
# ----------------------------------------------------------------------------------------


def noise_std(alpha_bar: float) -> float:
    """σ in data units of x_t at ᾱ in (0, 1): ½·sqrt((1 - ᾱ)/ᾱ)."""
    return float(0.5 * np.sqrt((1 - alpha_bar) / alpha_bar))


def mmse(
    sigma: float, n: int, rng: np.random.Generator, prior: GesturePrior = DEFAULT_PRIOR
) -> tuple[float, float]:
    """Minimum mean squared error at noise σ, averaged over n draws of x_0 and z.

    Args:
        sigma: noise std in data units, > 0.
        n: sequences to draw, at least 2.
        rng: source of gestures and noise.
        prior: the distribution of the gestures.
    Returns:
        The mean over sequences of mean((x_0 - E[x_0 | y])²), data units squared, and its
        standard error.
    Raises:
        ValueError: n below 2, or sigma not positive.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    x_0 = prior.draw(n, rng)
    x_0_pred = posterior_mean(x_0 + sigma * rng.standard_normal(x_0.shape), sigma, prior)
    error = ((x_0 - x_0_pred) ** 2).mean(axis=(1, 2))
    return float(error.mean()), float(error.std(ddof=1) / np.sqrt(n))
