"""The scheduler against closed forms, the papers' equations in numpy, and huggingface/diffusers.

Why: a sampler that is slightly wrong still draws plausible gestures. So nothing here is compared
with a recorded number: the true noise must lead back to x_0, a Gaussian must come out with its own
mean and standard deviation at the order of the method, and two independent programs must agree.
Two units: `add_noise`, `step` and `x_T` are in model units [-1, 1], `sample` returns data units.

    python -m pytest tests/test_scheduler.py
"""

import copy
import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import L, make_gestures, press
from torch import nn

from train_diffusion_ddim import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SAMPLERS,
    SPACINGS,
    DDIMScheduler,
    MinimalDiffusionTransformer,
    to_data_units,
    to_model_units,
)
from trainlib import tensors
from trainlib.curves import CURVES_BELOW
from trainlib.errors import UserError

T = 50
X_0 = to_model_units(make_gestures(3)).double()
SHAPE = tuple(X_0.shape)


def numpy_alpha_bar(schedule, num_timesteps):
    """ᾱ from the papers: DDPM sec. 4, betas × 1000/T; 2102.09672 eq. 17: sigma is tan / 2."""
    if schedule == "linear":
        betas = np.linspace(1e-4, 2e-2, num_timesteps) * 1000 / num_timesteps
    elif schedule == "wide_cosine":  # u where log tan(u) is two thirds of log(2 * sigma)
        ends = [math.atan(math.exp(math.log(2 * sigma) / 1.5)) for sigma in (3e-4, 40)]
        sigma = np.tan(np.linspace(*ends, num_timesteps)) ** 1.5 / 2
        betas = 1 - np.append(1, 1 + 4 * sigma[:-1] ** 2) / (1 + 4 * sigma**2)
    else:
        f = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(10**4)]
        betas = np.array([1 - f[i + 1] / f[i] for i in range(num_timesteps)])
    return np.cumprod(1 - np.minimum(betas, 0.999))


def numpy_step(x_0_pred, x_t, bar_t, bar_prev, eta, z):
    """DDIM eq. 12 with the sigma of eq. 16 (their alpha is our ᾱ)."""
    sigma = eta * math.sqrt((1 - bar_prev) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_prev)
    eps = (x_t - math.sqrt(bar_t) * x_0_pred) / math.sqrt(1 - bar_t)
    direction = math.sqrt(max(1 - bar_prev - sigma**2, 0)) * eps
    return math.sqrt(bar_prev) * x_0_pred + direction + sigma * z


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def true_model(scheduler, x_0):
    """The exact output at (x_t, t), with an ᾱ of our own."""

    def model(x_t, t, *_):
        bar = scheduler.alpha_bar(int(t[0]))
        eps = (x_t - math.sqrt(bar) * x_0) / math.sqrt(1 - bar)
        v = math.sqrt(bar) * eps - math.sqrt(1 - bar) * x_0
        return {"epsilon": eps, "v": v, "x0": x_0.expand_as(x_t)}[scheduler.prediction_type]

    return model


def gaussian_model(scheduler, mean, std):
    """E[eps | x_t] for x_0 ~ N(mean, std²)."""

    def model(x_t, t, *_):
        bar = scheduler.alpha_bar(int(t[0]))
        eps = math.sqrt(1 - bar) * (x_t - math.sqrt(bar) * mean) / (bar * std**2 + 1 - bar)
        x_0 = (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        v = math.sqrt(bar) * eps - math.sqrt(1 - bar) * x_0
        return {"epsilon": eps, "v": v, "x0": x_0}[scheduler.prediction_type]

    return model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    options = {"d_model": 16, "nhead": 2, "num_layers": 1, "dim_feedforward": 32}
    return MinimalDiffusionTransformer(3, L, **options).eval().requires_grad_(False)


# ---- tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [10, 100, 1000])
def test_alpha_bar_is_the_papers(schedule, num_timesteps):
    scheduler = DDIMScheduler(num_timesteps, beta_schedule=schedule)
    expected = numpy_alpha_bar(schedule, num_timesteps)
    ours = [scheduler.alpha_bar(t) for t in range(num_timesteps)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    np.testing.assert_allclose(scheduler.alphas_cumprod, expected, rtol=1e-6)
    np.testing.assert_allclose(scheduler.alphas, 1 - scheduler.betas, rtol=1e-5, atol=1e-7)
    sigma = 0.5 * np.sqrt((1 - expected) / expected)
    np.testing.assert_allclose([scheduler.sigma(t) for t in range(num_timesteps)], sigma, rtol=1e-6)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 10, 50, 100, 250, 1000, 4000])
def test_every_t_ends_in_noise(schedule, num_timesteps):
    scheduler = DDIMScheduler(num_timesteps, beta_schedule=schedule)
    bar = np.array([scheduler.alpha_bar(t) for t in range(num_timesteps)])
    assert 0 < bar[-1] < 1e-3 and 0 < scheduler.alphas_cumprod[-1] < 1e-3
    assert (np.diff(bar) < 0).all() and (scheduler.betas > 0).all() and (scheduler.betas < 1).all()


def test_index_minus_one_is_x_0():
    scheduler = DDIMScheduler(T)
    assert scheduler.alpha_bar(-1) == 1
    t = torch.tensor([-1, 0, T - 1])
    bar = scheduler.alpha_bar(t)
    assert bar.shape == (3, 1, 1) and bar[0] == 1
    np.testing.assert_allclose(bar.ravel()[1:], numpy_alpha_bar("linear", T)[[0, -1]], rtol=1e-6)
    assert torch.equal(scheduler.add_noise(X_0, -1, noise(0))[0], X_0)


def test_tables_are_float32_buffers_that_move():
    scheduler = DDIMScheduler(T)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(scheduler, name).dtype == torch.float32
        assert getattr(scheduler, name).shape == (T,)
    assert scheduler.to("meta").alphas_cumprod.device.type == "meta"


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_timestep_at_is_the_nearest_by_ratio(schedule):
    scheduler = DDIMScheduler(T, beta_schedule=schedule)
    for sigma in (1e-4, 0.05, 0.2, 0.4, 1.0, 7.0, 1e9):
        distances = [abs(math.log(scheduler.sigma(t) / sigma)) for t in range(T)]
        assert scheduler.timestep_at(sigma) == int(np.argmin(distances))


# ---- timesteps -------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [50, 100, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_decrease_and_are_exactly_n(spacing, num_timesteps):
    scheduler = DDIMScheduler(num_timesteps, spacing=spacing)
    nums = range(1, num_timesteps + 1)
    if num_timesteps == 1000:  # every one of 250 is tried; of these, all that a user would ask for
        nums = [*range(1, 61), *range(100, 1000, 100), 499, 999, 1000]
    for num in nums:
        pairs = scheduler.timestep_pairs(num)
        ts = [t for t, _ in pairs]
        assert len(ts) == num and 0 <= ts[-1] and ts[0] < num_timesteps
        assert [t_prev for _, t_prev in pairs] == [*ts[1:], -1]
        assert all(a > b for a, b in pairwise(ts))
    assert ts == list(range(num_timesteps))[::-1]  # all of them


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_from_start_t(spacing):
    scheduler = DDIMScheduler(T, spacing=spacing)
    for start_t in range(T):
        for num in (1, 2, start_t // 2 + 1, start_t + 1):
            if num > start_t + 1:
                continue
            ts = [t for t, _ in scheduler.timestep_pairs(num, start_t)]
            assert ts[0] == start_t and len(set(ts)) == num and ts == sorted(ts, reverse=True)


def test_spacings_by_definition():
    def ts(num, spacing):
        return [t for t, _ in DDIMScheduler(1000, spacing=spacing).timestep_pairs(num)]

    assert ts(5, "trailing") == [999, 799, 599, 399, 199]
    assert ts(4, "linspace") == [999, 666, 333, 0]
    scheduler = DDIMScheduler(1000, spacing="log_sigma")
    sigmas = [scheduler.sigma(t) for t in ts(5, "log_sigma")]
    high, low = scheduler.sigma_max, scheduler.sigma_min
    expected = np.geomspace(high, low, 5)
    np.testing.assert_allclose(sigmas, expected, rtol=0.03)  # the grid of t is that coarse
    sigmas = [scheduler.sigma(t) for t in ts(20, "log_sigma")]
    # at low noise the grid of t is coarser than the steps
    np.testing.assert_allclose(sigmas, np.geomspace(2 * high, low, 20), rtol=0.15)


@pytest.mark.parametrize(("num", "eta"), [(1, 0.0), (2, 1.0), (10, 0.5)])
def test_the_last_step_alone_asks_for_a_walk_of_curves(num, eta):
    """What the model is asked for, and where; its noise is as fresh as that of the steps."""
    scheduler = DDIMScheduler(
        beta_schedule="wide_cosine", spacing="log_sigma", sigma_min=0.005, curve_steps=8
    )
    asked = []

    def model(x_t, t, **more):
        asked.append((int(t[0]), x_t, more))
        return torch.zeros_like(x_t)

    generator = torch.Generator().manual_seed(5)
    scheduler.sample(model, SHAPE, "cpu", num, eta, generator=generator)
    assert [t for t, *_ in asked] == [t for t, _ in scheduler.timestep_pairs(num)]
    assert [more for *_, more in asked[:-1]] == [{}] * (num - 1)
    steps, its_eta, z = asked[-1][2]["walk"]
    assert (steps, its_eta, z is None) == (8, eta, eta == 0)
    generator = generator.manual_seed(5)
    drawn = [tensors.draw_eps(SHAPE, "cpu", generator) for _ in range(num + 1)]
    assert eta == 0 or torch.equal(z, drawn[num])
    end = scheduler.sigma(asked[-1][0])
    assert end == pytest.approx(12 if num == 1 else CURVES_BELOW, rel=0.03)


@pytest.mark.parametrize("sigma_min", [3e-4, 0.002, 0.05])
def test_the_steps_end_where_the_scheduler_is_told(sigma_min):
    scheduler = DDIMScheduler(beta_schedule="wide_cosine", spacing="log_sigma", sigma_min=sigma_min)
    sigmas = [scheduler.sigma(t) for t, _ in scheduler.timestep_pairs(10)]
    np.testing.assert_allclose(sigmas, np.geomspace(scheduler.sigma_max, sigma_min, 10), rtol=0.08)


def test_the_bias_of_the_start_falls_with_the_number_of_steps():
    """For x_0 ~ N(m, s²) noise alone lacks the mean that x_t has, sqrt(ᾱ)·m = m/(2·sigma) of it.

    Followed exactly, s·m/(2·sigma) of that is left at the end; ten steps follow it roughly. Five
    times the steps begin at five times the sigma.
    """
    m, s = 0.5, 1.0
    scheduler = DDIMScheduler(
        1000, beta_schedule="cosine", prediction_type="x0", spacing="log_sigma", clip_sample=False
    ).double()

    def exact(x_t, t):
        alpha_bar_t = scheduler.alpha_bar(int(t[0]))
        variance = s**2 * alpha_bar_t + 1 - alpha_bar_t
        return (s**2 * alpha_bar_t**0.5 * x_t + (1 - alpha_bar_t) * m) / variance

    def bias(num):
        x_T = noise(5, (1, 1000, 1))
        x_T = (x_T - x_T.mean()) / x_T.std()
        drawn = scheduler.sample(exact, x_T.shape, "cpu", num, x_T=x_T)
        return m - (2 * drawn - 1).mean().item()

    top = scheduler.sigma(scheduler.timestep_pairs(50)[0][0])
    assert bias(50) == pytest.approx(s * m / (2 * top), rel=0.1)
    assert bias(10) > 3 * bias(50)


# ---- forward process and predictions ---------------------------------------------------


def test_add_noise_is_ddpm_eq_4():
    scheduler, eps = DDIMScheduler(T), noise(1)
    bar = numpy_alpha_bar("linear", T)
    x_t, returned = scheduler.add_noise(X_0, 17, eps)
    assert returned is eps
    expected = math.sqrt(bar[17]) * X_0 + math.sqrt(1 - bar[17]) * eps
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-12)
    t = torch.tensor([3, 17, 49])
    x_t, _ = scheduler.add_noise(X_0.float(), t, eps.float())
    for i, each in enumerate(t.tolist()):
        expected, _ = scheduler.add_noise(X_0[i : i + 1], each, eps[i : i + 1])
        torch.testing.assert_close(x_t[i : i + 1].double(), expected, rtol=0, atol=1e-6)


def test_add_noise_draws_standard_normal_noise():
    torch.manual_seed(0)
    x_0 = torch.zeros(50, 250, 3)
    x_t, eps = DDIMScheduler(T).add_noise(x_0, torch.full((50,), T - 1))
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert x_t.shape == x_0.shape and abs(x_t.std() - 1) < 0.02


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x_0_undoes_add_noise(prediction_type):
    scheduler = DDIMScheduler(T, prediction_type=prediction_type, clip_sample=False)
    eps = noise(2)
    for t in (0, 20, T - 1):
        x_t, _ = scheduler.add_noise(X_0, t, eps)
        target = scheduler.target(X_0, eps, t)
        torch.testing.assert_close(target, true_model(scheduler, X_0)(x_t, torch.tensor([t])))
        torch.testing.assert_close(scheduler.predict_x_0(target, x_t, t), X_0)
        torch.testing.assert_close(scheduler.eps_from_x_0(X_0, x_t, t), eps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clipping_keeps_x_0_in_range_and_eps_consistent(prediction_type):
    scheduler = DDIMScheduler(T, prediction_type=prediction_type)
    x_t, t = 3 * noise(3), 30
    x_0_pred = scheduler.predict_x_0(5 * noise(4), x_t, t)
    assert x_0_pred.min() == -1 and x_0_pred.max() == 1
    eps = scheduler.eps_from_x_0(x_0_pred, x_t, t)
    torch.testing.assert_close(scheduler.add_noise(x_0_pred, t, eps)[0], x_t)
    free = DDIMScheduler(T, prediction_type=prediction_type, clip_sample=False)
    assert free.predict_x_0(5 * noise(4), x_t, t).abs().max() > 1.5


# ---- one step --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_is_eq_12_and_16(schedule, eta):
    scheduler, bars = DDIMScheduler(T, beta_schedule=schedule), numpy_alpha_bar(schedule, T)
    x_0_pred, x_t = noise(7), noise(8)
    for t, t_prev in [(49, 48), (49, 0), (30, 12), (1, 0), (0, -1), (49, -1)]:
        z = torch.randn(SHAPE, generator=seeded(9), dtype=torch.float64)
        bar_prev = 1.0 if t_prev < 0 else bars[t_prev]
        expected = numpy_step(x_0_pred, x_t, bars[t], bar_prev, eta, z)
        x_prev = scheduler.step(x_0_pred, x_t, t, t_prev, eta=eta, generator=seeded(9))
        torch.testing.assert_close(x_prev, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_of_many_t_is_eq_12_and_16_for_each(eta):
    """Each row steps from its own t to its own t_prev, in float32, as t and t_prev are tensors."""
    scheduler, bars = DDIMScheduler(T), numpy_alpha_bar("linear", T)
    pairs = [(49, 48), (49, 0), (30, 12), (1, 0), (0, -1), (49, -1), (2, 1)]
    t, t_prev = (torch.tensor(column) for column in zip(*pairs, strict=True))
    x_0_pred, x_t = (noise(seed, (len(pairs), L, 3)).float() for seed in (31, 32))
    z = torch.randn(x_t.shape, generator=seeded(33))
    x_prev = scheduler.step(x_0_pred, x_t, t, t_prev, eta=eta, generator=seeded(33))
    for i, (now, then) in enumerate(pairs):
        bar_prev = 1.0 if then < 0 else bars[then]
        row = (a[i].double() for a in (x_0_pred, x_t))
        expected = numpy_step(*row, bars[now], bar_prev, eta, z[i].double())
        torch.testing.assert_close(x_prev[i].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [T, -2, 10**6, 3.0, "3", None])
def test_an_index_that_is_none_is_refused(t):
    with pytest.raises(UserError, match=r"^t must be"):
        DDIMScheduler(T).add_noise(X_0, t)


def test_true_noise_steps_along_the_forward_process():
    scheduler, eps = DDIMScheduler(T), noise(10)
    x_t, _ = scheduler.add_noise(X_0, 40, eps)
    for t_prev in (39, 10, 0, -1):
        expected, _ = scheduler.add_noise(X_0, t_prev, eps)
        torch.testing.assert_close(scheduler.step(X_0, x_t, 40, t_prev), expected)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_eta_1_is_the_ddpm_posterior(schedule):
    # DDPM eq. 6 and 7, from betas
    scheduler, bars = DDIMScheduler(T, beta_schedule=schedule), numpy_alpha_bar(schedule, T)
    x_0, x_t = noise(11), noise(12)
    for t in (1, 2, 25, 48):
        beta = 1 - bars[t] / bars[t - 1]
        mean = math.sqrt(bars[t - 1]) * beta / (1 - bars[t]) * x_0
        mean = mean + math.sqrt(1 - beta) * (1 - bars[t - 1]) / (1 - bars[t]) * x_t
        variance = (1 - bars[t - 1]) / (1 - bars[t]) * beta
        z = torch.randn(SHAPE, generator=seeded(13), dtype=torch.float64)
        x_prev = scheduler.step(x_0, x_t, t, t - 1, eta=1.0, generator=seeded(13))
        torch.testing.assert_close(x_prev, mean + math.sqrt(variance) * z, rtol=1e-6, atol=1e-6)


def test_eta_scales_the_standard_deviation():
    scheduler, zero = DDIMScheduler(T), torch.zeros(SHAPE, dtype=torch.float64)

    def deviation(eta):  # at x_0 = x_t = 0 the mean is 0
        return scheduler.step(zero, zero, 30, 10, eta=eta, generator=seeded(14))

    assert deviation(1.0).std() > 0.1 and deviation(0.0).abs().max() == 0
    for eta in (0.1, 0.5):
        torch.testing.assert_close(deviation(eta), eta * deviation(1.0))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_takes_each_row_to_its_own_t_prev(network, prediction_type):
    scheduler = DDIMScheduler(T, prediction_type=prediction_type)
    x_t = noise(15, (4, L, 3)).float()
    t, t_prev = torch.tensor([49, 10, 0, 30]), torch.tensor([-1, 3, -1, 29])
    x_prev, x_0_pred = scheduler.ddim_step(network, x_t, t, t_prev)
    output = network(x_t, t)
    for i in range(4):
        row = slice(i, i + 1)
        expected_x_0 = scheduler.predict_x_0(output[row], x_t[row], int(t[i]))
        expected = scheduler.step(expected_x_0, x_t[row], int(t[i]), int(t_prev[i]))
        torch.testing.assert_close(x_0_pred[row], expected_x_0, rtol=0, atol=1e-5)
        torch.testing.assert_close(x_prev[row], expected, rtol=0, atol=1e-5)
    assert torch.equal(x_prev[t_prev < 0], x_0_pred[t_prev < 0])


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_step_stays_finite_with_noise(network, eta):
    scheduler = DDIMScheduler(T)
    for t, t_prev in [(49, 48), (49, -1), (1, 0), (0, -1)]:
        x_t = noise(16).float()
        pair = torch.full((3,), t), torch.full((3,), t_prev)
        x_prev, _ = scheduler.ddim_step(network, x_t, *pair, eta)
        assert x_prev.isfinite().all()


# ---- sampling --------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_the_true_noise_leads_back_to_x_0(schedule, prediction_type, spacing):
    # float64: for one step from t = T - 1, 1/sqrt(ᾱ) multiplies the rounding of x_t by up to 1e4
    scheduler = DDIMScheduler(
        T, beta_schedule=schedule, prediction_type=prediction_type, spacing=spacing
    )
    model = true_model(scheduler, X_0)
    for sampler, eta in [("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0.0)]:
        for num in (1, 2, 3, 10, 49, T):
            options = {"sampler": sampler, "x_T": noise(17), "generator": seeded(18)}
            x = scheduler.sample(model, SHAPE, "cpu", num, eta, **options)
            torch.testing.assert_close(x, to_data_units(X_0), rtol=0, atol=1e-5)


def test_float32_leads_back_to_x_0_too():
    scheduler = DDIMScheduler()
    x = scheduler.sample(true_model(scheduler, X_0.float()), SHAPE, "cpu", 10)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, to_data_units(X_0).float(), rtol=0, atol=1e-5)


def test_sample_is_a_chain_of_steps_at_the_pairs(network):
    scheduler, x_T = DDIMScheduler(T, prediction_type="v"), noise(19).float()
    x_t, seen = x_T, []
    for t, t_prev in scheduler.timestep_pairs(7):
        index = torch.full((3,), t), torch.full((3,), t_prev)
        x_t, _ = scheduler.ddim_step(network, x_t, *index)

    def recording(x, t):
        seen.append((t.shape, t.dtype, int(t[0])))
        return network(x, t)

    x = scheduler.sample(recording, SHAPE, "cpu", num_inference_steps=7, x_T=x_T)
    torch.testing.assert_close(x, to_data_units(x_t), rtol=0, atol=1e-4)
    ts = [t for t, _ in scheduler.timestep_pairs(7)]
    assert seen == [((3,), torch.int64, t) for t in ts]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_gaussian_comes_out_at_the_order_of_the_method(prediction_type, sampler):
    # The sampler is affine in x_T, so two starts give its mean and std without Monte Carlo.
    mean, std = 0.3, 0.4
    scheduler = DDIMScheduler(4000, prediction_type=prediction_type, clip_sample=False)
    model, x_T = gaussian_model(scheduler, mean, std), torch.tensor([[[0.0]], [[1.0]]]).double()
    errors, steps = [], np.array([10, 20, 40, 80])
    for num in steps:
        x = scheduler.sample(model, (2, 1, 1), "cpu", int(num), sampler=sampler, x_T=x_T)
        at_0, at_1 = (2 * x - 1).flatten().tolist()
        assert at_0 == pytest.approx(mean, abs=0.35 / num + 0.01)
        errors.append(abs(at_1 - at_0 - std))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert errors[-1] < (0.02 if sampler == "ddim" else 0.002)
    assert 0.8 < order < 1.3 if sampler == "ddim" else order > 1.5


def test_a_gaussian_survives_noisy_sampling():
    scheduler, num = DDIMScheduler(clip_sample=False), 40_000
    model = gaussian_model(scheduler, 0.3, 0.4)
    x = scheduler.sample(model, (num, 1, 1), "cpu", 1000, eta=1.0, generator=seeded(20))
    x = 2 * x - 1
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_invert_then_sample_is_a_round_trip(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    model, x_0, errors = gaussian_model(scheduler, 0.1, 0.5), to_data_units(X_0), []
    for num in (10, 40, 160, 640):
        x_T = scheduler.invert(model, x_0, num)
        x = scheduler.sample(model, SHAPE, "cpu", num, x_T=x_T)
        errors.append((x - x_0).abs().max().item())
    assert errors[-1] < 5e-3
    assert all(b < 0.5 * a for a, b in pairwise(errors))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_invert_leaves_clipping_as_it_was_and_ignores_it(prediction_type):
    clipping = DDIMScheduler(T, prediction_type=prediction_type)
    free = DDIMScheduler(T, prediction_type=prediction_type, clip_sample=False)
    x_0 = to_data_units(X_0)
    x_T = [s.invert(gaussian_model(s, 0.1, 2.0), x_0, 10) for s in (clipping, free)]
    assert torch.equal(*x_T) and clipping.clip_sample and not free.clip_sample


def test_invert_of_a_point_needs_dequantising():
    # x_0 always the same point: raw, nothing random ever enters; noised to start_t, the latent is
    # standard normal, as the DDIM paper's is.
    scheduler = DDIMScheduler(clip_sample=False)
    model, x_0 = gaussian_model(scheduler, 0.4, 1e-3), torch.full((50, 50, 3), 0.7)
    raw = scheduler.invert(model, x_0, 1000)
    noised = scheduler.invert(model, x_0, 1000, start_t=20, generator=seeded(21))
    assert raw.std() < 0.05 and noised.std().item() == pytest.approx(1, abs=0.05)
    again = scheduler.invert(model, x_0, 1000, start_t=20, generator=seeded(21))
    assert torch.equal(noised, again)


def test_start_t_enters_the_chain_there():
    scheduler, seen = DDIMScheduler(T), []
    model = true_model(scheduler, X_0)

    def recording(x_t, t):
        seen.append(int(t[0]))
        return model(x_t, t)

    x_t, _ = scheduler.add_noise(X_0, 23, noise(22))
    x = scheduler.sample(recording, SHAPE, "cpu", 5, x_T=x_t, start_t=23)
    assert seen[0] == 23 and len(seen) == 5
    torch.testing.assert_close(x, to_data_units(X_0))


def test_known_frames_come_back_and_reach_the_model_in_model_units(network):
    scheduler = DDIMScheduler(T)
    known = torch.rand(SHAPE, generator=seeded(23))
    mask = torch.rand(SHAPE[:2], generator=seeded(24)) < 0.3
    seen = []

    def model(x_t, t, known, known_mask):
        seen.append((known, known_mask))
        return network(x_t, t)

    for sampler in SAMPLERS:
        given = {"known": known.where(mask[..., None], torch.nan), "known_mask": mask}
        x = scheduler.sample(model, SHAPE, "cpu", 5, sampler=sampler, **given)
        assert x.isfinite().all()  # what is not known is never read
        torch.testing.assert_close(x[mask], known[mask], rtol=0, atol=1e-6)
        assert (x - known)[~mask].abs().max() > 0.1
    assert len(seen) == 10
    for given, given_mask in seen:
        assert torch.equal(given_mask, mask)
        torch.testing.assert_close(given[mask], 2 * known[mask] - 1)


@pytest.mark.parametrize("given", [False, True])
def test_a_sample_may_be_refined_by_gradients(given):
    """The model runs in inference mode; what comes out must be a tensor like any other."""

    def model(x_t, t, *given):
        assert torch.is_inference_mode_enabled()
        return torch.zeros_like(x_t)

    known = {"known": torch.rand(SHAPE), "known_mask": torch.rand(SHAPE[:2]) < 0.3} if given else {}
    x = DDIMScheduler(T).sample(model, SHAPE, "cpu", 5, **known).requires_grad_()
    x.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_cost_fn_moves_the_sample_down_its_gradient():
    # The net always says c; half the gradient of (a - goal)² then leads exactly to the goal.
    scheduler = DDIMScheduler(T, prediction_type="x0")
    goal = torch.full((L, 3), 0.7)

    def model(x_t, t):
        assert not torch.is_grad_enabled()
        return torch.full_like(x_t, -0.2)

    def cost(actions):
        return ((actions - goal) ** 2).sum(dim=(1, 2))

    free = scheduler.sample(model, SHAPE, "cpu", 5)
    torch.testing.assert_close(free, torch.full(SHAPE, 0.4))
    led = scheduler.sample(model, SHAPE, "cpu", 5, cost_fn=cost, guidance_scale=0.5)
    torch.testing.assert_close(led, goal.expand(SHAPE))
    weak = scheduler.sample(model, SHAPE, "cpu", 5, cost_fn=cost, guidance_scale=0.1)
    torch.testing.assert_close(weak, torch.full(SHAPE, 0.4 + 0.1 * 2 * 0.3))
    far = scheduler.sample(model, SHAPE, "cpu", 5, cost_fn=cost, guidance_scale=100.0)
    assert far.max() == 1  # still within the screen


def test_cost_fn_lowers_the_cost_of_a_network(network):
    scheduler = DDIMScheduler(T)

    def cost(actions):
        return ((actions[:, -1, :2] - 0.9) ** 2).sum(dim=1)

    options = {"num_inference_steps": 10, "x_T": noise(25).float()}
    free = scheduler.sample(network, SHAPE, "cpu", **options)
    led = scheduler.sample(network, SHAPE, "cpu", **options, cost_fn=cost, guidance_scale=0.4)
    assert (cost(led) < 0.5 * cost(free)).all()


def test_known_frames_win_over_the_cost():
    scheduler = DDIMScheduler(T, prediction_type="x0")
    known = press(L, (4, 8))
    mask = torch.zeros(1, L, dtype=torch.bool)
    mask[:, 3:5] = True
    x = scheduler.sample(
        lambda x_t, *_: 0 * x_t,
        (1, L, 3),
        "cpu",
        4,
        known=known,
        known_mask=mask,
        cost_fn=lambda a: a.sum(dim=(1, 2)),
    )
    torch.testing.assert_close(x[mask], known[mask])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_generator_makes_samples_reproducible(network, eta):
    scheduler = DDIMScheduler(T)

    def draw(seed):
        return scheduler.sample(network, SHAPE, "cpu", 4, eta, generator=seeded(seed))

    state = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("below", [0.0, 2.0])
def test_the_second_order_aims_beyond_x_0_pred_at_every_eta(network, below):
    """By hand: D = x_0_pred + (x_0_pred - x_0_last)·h/2h_last in log sigma, but for both ends."""
    scheduler = DDIMScheduler(T, lower_order_below=below)
    x_T, generator = noise(19).float(), seeded(3)
    x_t, last, h_last = x_T, None, None
    for t, t_prev in scheduler.timestep_pairs(5):
        x_0_pred = scheduler.predict_x_0(network(x_t, torch.full((len(x_t),), t)), x_t, t)
        h = math.log(scheduler.sigma(t) / scheduler.sigma(t_prev)) if t_prev >= 0 else None
        is_second = h and h_last and scheduler.sigma(t) >= below
        beyond = (x_0_pred - last) * h / (2 * h_last) if is_second else 0
        x_t = scheduler.step(x_0_pred + beyond, x_t, t, t_prev, eta=0.7, generator=generator)
        last, h_last = x_0_pred, h
    options = {"x_T": x_T, "sampler": "dpmpp", "generator": seeded(3)}
    torch.testing.assert_close(
        scheduler.sample(network, SHAPE, "cpu", 5, 0.7, **options), (x_t + 1) / 2
    )


def test_eta_changes_the_sample_and_stays_in_range(network):
    scheduler = DDIMScheduler(T)
    x = [scheduler.sample(network, SHAPE, "cpu", 4, e, generator=seeded(1)) for e in (0.0, 1.0)]
    assert not torch.equal(*x)
    assert all(0 <= sample.min() and sample.max() <= 1 for sample in x)


def test_sampling_is_in_eval_mode_without_gradients_and_restores_the_mode():
    torch.manual_seed(0)
    layer = nn.Dropout(0.5).train()
    modes = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x_t, t):
            modes.append((self.training, self.inner.training, torch.is_grad_enabled()))
            return self.inner(x_t)

    model = Model().train()
    DDIMScheduler(T).sample(model, SHAPE, "cpu", 2)
    assert modes == [(False, False, False)] * 2 and model.training and layer.training


def test_get_variance_is_over_frames_then_mean_over_gestures():
    x = np.random.default_rng(0).uniform(size=(4, 9, 3)).astype(np.float32)
    expected = x.var(axis=1, ddof=1).mean(axis=0)
    np.testing.assert_allclose(DDIMScheduler(T).get_variance(torch.from_numpy(x)), expected, 1e-5)


# ---- huggingface/diffusers -------------------------------------------------------------

DIFFUSERS_NAME = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def theirs(name, scheduler, **options):
    """A diffusers scheduler with our betas."""
    diffusers = pytest.importorskip("diffusers")
    prediction_type = DIFFUSERS_NAME[scheduler.prediction_type]
    made = getattr(diffusers, name)(
        scheduler.num_timesteps,
        trained_betas=scheduler.betas.tolist(),
        prediction_type=prediction_type,
        **options,
    )
    # The same betas; but their product in float32 is 1e-5 off by t = T, and eps divides by it.
    made.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return made


def assert_same_sample(ours, theirs):
    """Equal to 1e-4 of the largest value; without clipping a random net's grow beyond 1."""
    ours = to_model_units(ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, theirs.abs().max()))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_ddim_agrees_with_diffusers(network, schedule, prediction_type, clip):
    num = 10  # N divides T: there their t_prev is right
    scheduler = DDIMScheduler(
        1000, beta_schedule=schedule, prediction_type=prediction_type, clip_sample=clip
    )
    peer = theirs("DDIMScheduler", scheduler, clip_sample=clip, timestep_spacing="trailing")
    peer.set_timesteps(num)
    assert peer.timesteps.tolist() == [t for t, _ in scheduler.timestep_pairs(num)]
    x = x_T = noise(26)
    double = copy.deepcopy(network).double()
    for t in peer.timesteps:
        x = peer.step(double(x, t.expand(3)), t, x, use_clipped_model_output=True).prev_sample
    ours = scheduler.sample(double, SHAPE, "cpu", num, x_T=x_T)
    assert_same_sample(ours, x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_agrees_with_diffusers_on_any_pairs(network, spacing, eta):
    # Their t_prev is t - T // N, right only if N divides T. With N = T/(t - t_prev) it is ours.
    scheduler, num = DDIMScheduler(T, spacing=spacing), 7
    peer = theirs("DDIMScheduler", scheduler)
    x = x_T = noise(27).float()
    z = seeded(28)
    for t, t_prev in scheduler.timestep_pairs(num):
        peer.num_inference_steps = Fraction(T, t - t_prev)
        output = network(x, torch.full((3,), t))
        options = {"eta": eta, "use_clipped_model_output": True}
        if eta:
            options["variance_noise"] = torch.randn(SHAPE, generator=z)
        x = peer.step(output, t, x, **options).prev_sample.float()
    ours = scheduler.sample(network, SHAPE, "cpu", num, eta, x_T=x_T, generator=seeded(28))
    assert_same_sample(ours, x)


# How x_0 is predicted and clipped depends on neither spacing nor eta, so not every product of them.
DPMPP_CASES = [
    *product(("cosine",), ("v",), SPACINGS, (0, 1), (False, True)),
    *product(BETA_SCHEDULES, PREDICTION_TYPES, ("log_sigma",), (1,), (False,)),
]


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "spacing", "eta", "clip"), dict.fromkeys(DPMPP_CASES)
)
def test_dpmpp_agrees_with_diffusers(network, schedule, prediction_type, spacing, eta, clip):
    num = 12
    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction_type, spacing=spacing, clip_sample=clip
    )
    # Thresholding at 1 is clipping; their own timesteps end elsewhere, so they get ours.
    clipping = {"thresholding": clip, "sample_max_value": 1.0}
    peer = theirs(
        "DPMSolverMultistepScheduler",
        scheduler,
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        **clipping,
    )
    peer.set_timesteps(timesteps=[t for t, _ in scheduler.timestep_pairs(num)])
    bars = torch.tensor([scheduler.alpha_bar(int(t)) for t in peer.timesteps], dtype=torch.double)
    peer.sigmas = torch.cat([((1 - bars) / bars).sqrt(), torch.zeros(1).double()])
    x = x_T = noise(29)
    double, z = copy.deepcopy(network).double(), seeded(30)
    for t in peer.timesteps:
        fresh = {"variance_noise": torch.randn(SHAPE, generator=z, dtype=x.dtype)} if eta else {}
        x = peer.step(double(x, t.expand(3)), t, x, **fresh).prev_sample
    ours = scheduler.sample(
        double, SHAPE, "cpu", num, eta, sampler="dpmpp", x_T=x_T, generator=seeded(30)
    )
    assert_same_sample(ours, x)


# ---- mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "score"}, "score"),
        ({"spacing": "karras"}, "karras"),
        ({"num_timesteps": 1}, "1"),
        ({"num_timesteps": 0}, "0"),
        ({"num_timesteps": 100, "beta_end": 1e-3}, "beta_end"),
    ],
)
def test_a_bad_schedule_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        DDIMScheduler(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_inference_steps": 0}, "got 0"),
        ({"num_inference_steps": -3}, "got -3"),
        ({"num_inference_steps": T + 1}, f"{T}.*got {T + 1}"),
        ({"start_t": T}, f"got {T}"),
        ({"start_t": -1}, "got -1"),
        ({"start_t": 3}, r"\[1, 4\], got 5"),
        ({"eta": -0.1}, "-0.1"),
        ({"eta": 1.1}, "1.1"),
        ({"eta": math.nan}, "nan"),
        ({"sampler": "euler"}, "euler"),
        ({"known": torch.zeros(SHAPE)}, "known_mask"),
        ({"known_mask": torch.ones(SHAPE[:2], dtype=torch.bool)}, "known_mask"),
    ],
)
def test_bad_sampling_is_refused_with_its_value(options, words):
    with pytest.raises(UserError, match=words):
        DDIMScheduler(T).sample(
            lambda x, t: x, SHAPE, "cpu", **{"num_inference_steps": 5, **options}
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_generator_of_the_cpu_draws_alike_for_the_gpu_and_its_own_is_taken(network):
    scheduler = DDIMScheduler(T)
    here = scheduler.sample(network, SHAPE, "cpu", 5, 1.0, generator=seeded(1))
    network = copy.deepcopy(network).cuda()
    there = scheduler.sample(network, SHAPE, "cuda", 5, 1.0, generator=seeded(1))
    torch.testing.assert_close(here, there.cpu(), rtol=0, atol=1e-3)
    own = torch.Generator("cuda").manual_seed(1)
    assert scheduler.sample(network, SHAPE, "cuda", 5, 1.0, generator=own).is_cuda
