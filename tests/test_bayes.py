"""The Bayes oracle against plain loops, closed forms and its own defining properties.

Every "times optimal" in the reports divides by this oracle, so it is checked by independent means:
loops over windows and types with the endpoints summed on a fine grid, the closed-form prior mean,
the tower property, the error as the noise vanishes, published MMSE values, symmetry,
and exact-score sampling that must return gestures.

    python -m pytest tests/test_bayes.py
"""

import itertools
import math

import numpy as np
import pytest

from augmentation.click_aug import ACTION_TYPES
from evaluation import bayes
from evaluation.bayes import GesturePrior, exact_ddim, mmse, noise_std, posterior_mean

MOVES = {"click": (0, 0), "horizontal": (1, 0), "vertical": (0, 1), "diagonal": (1, 1)}
SHORT = GesturePrior(sequence_length=12, min_delta_t=2, max_delta_t=5)
FULL = GesturePrior()


def observe(prior, n, sigma, seed):
    """Clean gestures and noisy observations of them."""
    rng = np.random.default_rng(seed)
    x_0 = prior.draw(n, rng)
    return x_0, x_0 + sigma * rng.standard_normal(x_0.shape)


def grid_axis(y, onset, delta_t, sigma, moving, points=161):
    """One axis by Simpson's rule: log-evidence against an idle axis, and the mean signal (L,)."""
    c = np.linspace(0, 1, points)
    simpson = np.array([1, *[4, 2] * (points // 2 - 1), 4, 1]) / (3 * (points - 1))
    a, b = np.meshgrid(c, c, indexing="ij")
    weight = np.outer(simpson, simpson)
    if not moving:
        a, b, weight = c, c, simpson
    log_likelihood = np.zeros_like(a)
    signal = {}
    for i in range(delta_t):
        signal[onset + i] = a + (b - a) * (i / (delta_t - 1) if delta_t > 1 else 0)
        residual = y[onset + i] - signal[onset + i]
        log_likelihood += (y[onset + i] ** 2 - residual**2) / (2 * sigma**2)
    top = log_likelihood.max()
    density = weight * np.exp(log_likelihood - top)
    mean = np.zeros(len(y))
    for frame, value in signal.items():
        mean[frame] = (density * value).sum() / density.sum()
    return top + np.log(density.sum()), mean


def brute_mean(y, sigma, prior):
    """Posterior mean (L, 3) by plain loops over types and windows."""
    length, log_weights, means = prior.sequence_length, [], []
    for delta_t in range(prior.min_delta_t, prior.max_delta_t + 1):
        for onset in range(length - delta_t + 1):
            press = np.zeros(length)
            press[onset : onset + delta_t] = 1
            log_ratio = ((y[:, 2] ** 2 - (y[:, 2] - press) ** 2) / (2 * sigma**2)).sum()
            axis = {
                (k, moving): grid_axis(y[:, k], onset, delta_t, sigma, moving)
                for k, moving in itertools.product((0, 1), (0, 1))
            }
            for name in ACTION_TYPES[prior.action_type]:
                (log_z_x, x_mean), (log_z_y, y_mean) = (axis[k, MOVES[name][k]] for k in (0, 1))
                log_weights.append(log_ratio + log_z_x + log_z_y - np.log(length - delta_t + 1))
                means.append(np.stack([x_mean, y_mean, press], axis=1))
    weights = np.exp(np.array(log_weights) - max(log_weights))
    return np.average(means, axis=0, weights=weights)


def prior_mean(prior):
    """Mean clean gesture (L, 3): the press probability per frame; every coordinate averages ½."""
    press = np.zeros(prior.sequence_length)
    durations = range(prior.min_delta_t, prior.max_delta_t + 1)
    for delta_t in durations:
        onsets = prior.sequence_length - delta_t + 1
        for onset in range(onsets):
            press[onset : onset + delta_t] += 1 / (len(durations) * onsets)
    return np.stack([press / 2, press / 2, press], axis=1)


# --- against plain loops ------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.15, 0.5, 1.0, 3.0, 30.0])
def test_posterior_mean_equals_brute_force(sigma):
    _, y = observe(SHORT, 2, sigma, seed=1)
    want = [brute_mean(sequence, sigma, SHORT) for sequence in y]
    np.testing.assert_allclose(posterior_mean(y, sigma, SHORT), want, atol=2e-6)


@pytest.mark.parametrize("action_type", ["click", "vertical", "swipe", "mixed"])
def test_posterior_mean_equals_brute_force_for_every_action_type(action_type):
    prior = GesturePrior(10, 1, 3, action_type)  # includes the one-frame gesture
    _, y = observe(prior, 2, 0.3, seed=2)
    want = [brute_mean(sequence, 0.3, prior) for sequence in y]
    np.testing.assert_allclose(posterior_mean(y, 0.3, prior), want, atol=2e-6)


def test_posterior_mean_on_observations_far_from_the_family():
    rng = np.random.default_rng(3)
    y = np.stack([rng.normal(0.5, 1, (12, 3)), np.full((12, 3), 1.5), np.zeros((12, 3))])
    want = [brute_mean(sequence, 0.2, SHORT) for sequence in y]
    np.testing.assert_allclose(posterior_mean(y, 0.2, SHORT), want, atol=1e-5)


def test_posterior_mean_follows_an_endpoint_pinned_to_the_edge():
    # An end far outside [0, 1] is pinned and drags the mean of the other end by many stds.
    prior = GesturePrior(5, 5, 5, "swipe")
    ramp = np.linspace(0.5, 2.0, 5)
    y = np.stack([ramp, 1 - ramp[::-1], np.ones(5)], axis=1)
    want = [grid_axis(y[:, k], 0, 5, 0.04, moving=True, points=1281)[1] for k in (0, 1)]
    got = posterior_mean(y[None], 0.04, prior)[0]
    np.testing.assert_allclose(got[:, :2].T, want, atol=1e-4)


def test_posterior_mean_stays_finite_when_the_noise_is_badly_understated():
    _, y = observe(FULL, 4, 1.0, seed=4)
    for sigma in (1e-4, 1e-2):
        mean = posterior_mean(100 * y, sigma)
        assert np.isfinite(mean).all()
        assert -1e-6 < mean.min() and mean.max() < 1 + 1e-6


def test_pruning_changes_nothing(monkeypatch):
    _, y = observe(FULL, 4, 0.5, seed=5)
    pruned = posterior_mean(y, 0.5)
    monkeypatch.setattr(bayes, "PRUNE_NATS", np.inf)
    np.testing.assert_allclose(pruned, posterior_mean(y, 0.5), atol=1e-12)


# --- closed forms and limits --------------------------------------------------------------


def test_infinite_noise_leaves_the_prior_mean():
    _, y = observe(FULL, 2, 1e7, seed=7)
    np.testing.assert_allclose(posterior_mean(y, 1e7), [prior_mean(FULL)] * 2, atol=1e-5)


def test_vanishing_noise_costs_three_free_coordinates():
    # click 2, horizontal and vertical 3, diagonal 4 free coordinates: 3σ² on average of 750.
    value, error = mmse(0.02, 400, np.random.default_rng(8))
    assert abs(value - 0.004 * 0.02**2) < 4 * error
    assert error < 0.05 * value


@pytest.mark.parametrize(
    ("sigma", "published"), [(0.2, 0.00018), (0.4, 0.0011), (0.7, 0.0039), (0.9, 0.0058)]
)
def test_mmse_agrees_with_an_independent_estimate(sigma, published):
    # The published values come from 96 draws each: an error of about 1/12 per estimate.
    value, error = mmse(sigma, 150, np.random.default_rng(10))
    assert abs(value - published) < 4 * math.hypot(error, error * math.sqrt(150 / 96))


def test_large_noise_error_is_the_prior_variance():
    energy = []  # E Σ x_0², by duration; each axis is constant or a ramp with probability ½
    for n in range(FULL.min_delta_t, FULL.max_delta_t + 1):
        u = np.arange(n) / (n - 1)
        ramp = ((1 - u) ** 2 + u**2) / 3 + 2 * u * (1 - u) / 4
        energy.append(n + (n / 3 + ramp.sum()))
    variance = (np.mean(energy) - (prior_mean(FULL) ** 2).sum()) / 750
    assert variance == pytest.approx(0.073, abs=5e-4)
    value, error = mmse(1e3, 120, np.random.default_rng(11))
    assert abs(value - variance) < 4 * error


# --- defining properties ------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_tower_property_and_calibrated_error(sigma):
    x_0, y = observe(FULL, 150, sigma, seed=13)
    mean = posterior_mean(y, sigma)
    totals = mean.mean(axis=1)  # (N, 3): time-averaged channels
    error = totals.std(axis=0) / np.sqrt(len(y))
    assert (np.abs(totals.mean(axis=0) - prior_mean(FULL).mean(axis=0)) < 4 * error).all()
    # E⟨x_0 - m, m⟩ = 0: the error is orthogonal to the estimate.
    inner = ((x_0 - mean) * mean).mean(axis=(1, 2))
    assert abs(inner.mean()) < 4 * inner.std() / np.sqrt(len(y))


def test_swapping_the_axes_swaps_the_estimate():
    _, y = observe(FULL, 4, 0.5, seed=14)
    swapped = posterior_mean(y[..., [1, 0, 2]], 0.5)
    np.testing.assert_allclose(posterior_mean(y, 0.5)[..., [1, 0, 2]], swapped, atol=1e-12)


def test_reversing_time_reverses_the_estimate():
    _, y = observe(FULL, 4, 0.5, seed=15)
    np.testing.assert_allclose(
        posterior_mean(y, 0.5)[:, ::-1], posterior_mean(y[:, ::-1], 0.5), atol=1e-10
    )


def test_estimates_do_not_depend_on_the_batch():
    _, y = observe(SHORT, bayes.CHUNK + 3, 0.4, seed=16)
    alone = np.concatenate([posterior_mean(y[i : i + 1], 0.4, SHORT) for i in range(len(y))])
    np.testing.assert_allclose(posterior_mean(y, 0.4, SHORT), alone, atol=1e-12)


# --- exact-score sampling -----------------------------------------------------------------


def linear_table(num_timesteps=1000):
    """ᾱ of the linear schedule, 1e-4 to 0.02."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, num_timesteps))


def test_exact_ddim_from_noise_returns_gestures():
    x_T = np.random.default_rng(18).standard_normal((6, 250, 3))
    x_0 = exact_ddim(x_T, linear_table(), range(999, -1, -27))
    pressed = x_0[..., 2] > 0.5
    runs = (np.diff(pressed, axis=1, prepend=False).sum(axis=1) + 1) // 2
    assert (runs == 1).all()
    assert ((pressed.sum(axis=1) >= 5) & (pressed.sum(axis=1) <= 75)).all()
    assert np.abs(x_0 - posterior_mean(x_0, 0.02)).max() < 0.1


def test_exact_ddim_is_one_bayes_step_from_a_given_x_t():
    alpha_bar, t = linear_table(), 300
    x_0, _ = observe(FULL, 3, 0.0, seed=19)
    eps = np.random.default_rng(20).standard_normal(x_0.shape)
    x_t = np.sqrt(alpha_bar[t]) * (2 * x_0 - 1) + np.sqrt(1 - alpha_bar[t]) * eps
    y = (x_t / np.sqrt(alpha_bar[t]) + 1) / 2
    want = posterior_mean(y, noise_std(alpha_bar[t]))
    np.testing.assert_allclose(exact_ddim(x_t, alpha_bar, [t]), want, atol=1e-12)
    assert ((exact_ddim(x_t, alpha_bar, [300, 200, 100, 20]) - x_0) ** 2).mean() < 0.01


# --- bad input ----------------------------------------------------------------------------


def test_bad_input_is_named():
    y = np.zeros((2, 250, 3))
    with pytest.raises(ValueError, match=r"got \(2, 100, 3\)"):
        posterior_mean(y[:, :100], 1.0)
    with pytest.raises(ValueError, match="1 non-finite"):
        posterior_mean(np.where(np.arange(1500).reshape(y.shape) == 7, np.nan, y), 1.0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        posterior_mean(y, 0.0)
    with pytest.raises(ValueError, match="must decrease strictly"):
        exact_ddim(y, linear_table(), [10, 20])
    with pytest.raises(ValueError, match="must decrease strictly"):
        exact_ddim(y, linear_table(), [1000, 20])
    with pytest.raises(ValueError, match="n must be at least 2"):
        mmse(1.0, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="got 9, 4, 250"):
        GesturePrior(min_delta_t=9, max_delta_t=4)
    with pytest.raises(ValueError, match="at least 1 here, got 0"):
        GesturePrior(min_delta_t=0)
    with pytest.raises(ValueError, match="action_type must be one of"):
        GesturePrior(action_type="pinch")
    assert posterior_mean(y[:0], 1.0).shape == (0, 250, 3)
