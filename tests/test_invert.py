"""The round trip must go one way twice, be right where the truth is known, and refuse copies.

For Gaussian data the score, the latents and the error of fresh noise have closed forms; a network
that answers eps = 0 is a copy, and must fail what the table asks beside the error.

    python -m pytest tests/test_invert.py
"""

import math

import numpy as np
import pytest
import torch

from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.controls import untrained_model
from evaluation.protocols import invert as inversion
from evaluation.protocols.invert import (
    START_SIGMA,
    RoundTripScheduler,
    decode,
    latent_statistics,
    round_latents,
    round_trip,
)
from train_diffusion_ddim import (
    PREDICTION_TYPES,
    DDIMScheduler,
    TrainConfig,
    build_scheduler,
    noise_bank,
    to_data_units,
)

SHAPE = (40, 50, 3)


def round_trip_scheduler(beta_schedule="cosine", prediction_type="x0", num_timesteps=1000):
    scheduler = DDIMScheduler(
        num_timesteps, beta_schedule=beta_schedule, prediction_type=prediction_type
    )
    return RoundTripScheduler(scheduler)


def gaussian(mean, std, scheduler, seen=None):
    """The exact denoiser of numbers that are N(mean, std²) in model units; x0-prediction."""

    def denoiser(x_t, t):
        if seen is not None:
            seen.append(int(t[0]))
        alpha_bar = scheduler.alpha_bar(int(t[0]))
        gain = alpha_bar**0.5 * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - alpha_bar**0.5 * mean)

    return denoiser


def draw_gaussian(mean, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return to_data_units(mean + std * torch.randn(SHAPE, generator=generator))


# ----------------------------------------------------------------------------------------
# STEPS
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_steps_have_equal_ratios_of_sigma_down_to_the_start(beta_schedule):
    scheduler = round_trip_scheduler(beta_schedule)
    for num in (2, 10, 50):
        pairs = scheduler.timestep_pairs(num)
        assert len(pairs) == num and pairs[-1] == (scheduler.timestep_at(START_SIGMA), -1)
        assert [t for t, _ in pairs[1:]] == [t_prev for _, t_prev in pairs[:-1]]
        sigmas = [scheduler.sigma(t) for t, _ in pairs]
        # an index is one of T: the nearest sigma is up to half a step of the schedule away
        assert sigmas[0] == pytest.approx(20, rel=0.06)
        ratios = np.diff(np.log(sigmas))
        assert np.allclose(ratios, math.log(START_SIGMA / 20) / (num - 1), atol=0.07)
    for num in (500, 1000):
        ts = [t for t, _ in scheduler.timestep_pairs(num)]
        assert 400 < len(ts) <= num and ts == sorted(set(ts), reverse=True)


def test_the_start_is_at_least_20_of_1000():
    assert round_trip_scheduler("linear").timestep_at(START_SIGMA) == 20
    assert round_trip_scheduler("cosine").timestep_at(START_SIGMA) == 43


def test_encoder_and_decoder_visit_the_same_indices():
    scheduler, seen = round_trip_scheduler(), []
    model, x_0 = gaussian(0.2, 0.5, scheduler, seen), draw_gaussian(0.2, 0.5)
    start_t = scheduler.timestep_at(START_SIGMA)
    for start in (-1, start_t):
        seen.clear()
        x_T = scheduler.invert(model, x_0, 12, start_t=start)
        there = seen.copy()
        seen.clear()
        decode(model, scheduler, x_T, 12, start)
        assert there == seen[::-1] == sorted(there)
        assert len(there) == (12 if start < 0 else 11) and min(there) > start


def test_decoding_to_x_0_is_sampling():
    scheduler = round_trip_scheduler()
    model, x_T = gaussian(0.2, 0.5, scheduler), noise_bank(SHAPE)
    sampled = scheduler.sample(model, SHAPE, "cpu", 10, x_T=x_T)
    assert torch.equal(to_data_units(decode(model, scheduler, x_T, 10, -1)), sampled)


def test_the_models_own_scheduler_stays_as_it_was():
    config = TrainConfig(d_model=16, num_layers=1, nhead=2, num_timesteps=50)
    scheduler, model = build_scheduler(config), untrained_model(config, "cpu")
    before = scheduler.timestep_pairs(10)
    inversion.invert(model, model, scheduler, torch.zeros(2, 250, 3), prior=None, steps=(10,))
    assert scheduler.clip_sample and scheduler.timestep_pairs(10) == before
    assert RoundTripScheduler(scheduler).alpha_bar(7) == scheduler.alpha_bar(7)


# ----------------------------------------------------------------------------------------
# WHERE THE TRUTH IS KNOWN
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_t", [-1, 43])
def test_the_error_of_a_round_trip_falls_at_second_order_in_its_square(start_t):
    # DDIM is an Euler step: the error halves with twice the steps, the squared error quarters.
    scheduler = round_trip_scheduler()
    model, x_0 = gaussian(0.2, 0.5, scheduler), draw_gaussian(0.2, 0.5)
    few, many = (
        round_trip(model, scheduler, x_0, num, start_t, full=False)["mse"].value
        for num in (50, 100)
    )
    assert few / many == pytest.approx(4, rel=0.2)


def test_fresh_noise_decodes_to_an_unrelated_draw():
    # Two draws of N(mean, std²) differ by 2·std²; model units are twice data units. The
    # dequantised start and what fresh noise ends in have noise of START_SIGMA besides.
    scheduler, std = round_trip_scheduler(), 0.4
    model, x_0 = gaussian(0.1, std, scheduler), draw_gaussian(0.1, std)
    for start_t in (-1, 43, scheduler.timestep_pairs(200)[90][0]):
        extra = 0 if start_t < 0 else 2 * scheduler.sigma(start_t) ** 2
        fresh = round_trip(model, scheduler, x_0, 200, start_t, full=True)["mse_fresh_noise"]
        assert fresh.value == pytest.approx(std**2 / 2 + extra, rel=0.05)
        assert fresh.ci[0] < fresh.value < fresh.ci[1] and fresh.n == SHAPE[0]


def test_only_dequantised_latents_of_points_are_noise():
    # All data are one point: nothing random enters the raw way. Dequantised, the latent is the
    # start's noise, which each Euler step from (k, s) = (sqrt(ᾱ), sqrt(1 - ᾱ)) to the next scales
    # by 1 + k_t/k·(1 - s/s_t) in model units: to almost 1 in many steps.
    scheduler = round_trip_scheduler("linear")
    model, x_0 = gaussian(0.4, 1e-4, scheduler), torch.full(SHAPE, 0.7)
    raw = round_trip(model, scheduler, x_0, 1000, -1, full=False)
    assert raw["latent_std"].value < 0.02
    for num, low in ((10, 0), (1000, 0.95)):
        ts = [t for t, _ in reversed(scheduler.timestep_pairs(num))]
        alpha_bar = np.array([scheduler.alpha_bar(t) for t in ts])
        k, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        std = s[0] * np.prod(1 + k[1:] / k[:-1] * (1 - s[:-1] / s[1:]))
        noised = round_trip(model, scheduler, x_0, num, 20, full=False)
        assert noised["latent_std"].value == pytest.approx(std, rel=0.03) and low < std < 1
        assert noised["latent_kurtosis"].value == pytest.approx(3, abs=0.2)
        assert noised["latent_autocorrelation"].value == pytest.approx(0, abs=0.05)


def test_rounded_latents_of_a_code_lose_what_rounding_takes():
    # The Gaussian decoder is linear: x_0 = mean + std·x_T, so an error of variance width²/12 in a
    # standard normal latent comes out as (std/2)² times that.
    scheduler, std = round_trip_scheduler(), 0.4
    model, x_0 = gaussian(0.0, std, scheduler), draw_gaussian(0.0, std)
    scores = round_trip(model, scheduler, x_0, 400, -1, full=True)
    for bits in (4, 6):
        width = 8 / 2**bits
        assert scores[f"mse_{bits}_bits"].value == pytest.approx(
            (std / 2) ** 2 * width**2 / 12, rel=0.1
        )
    assert scores["mse"].value < scores["mse_8_bits"].value < scores["mse_6_bits"].value


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_exact_score_is_the_posterior_mean_for_every_prediction_type(prediction_type):
    prior = GesturePrior(40, 3, 12)
    scheduler = round_trip_scheduler(prediction_type=prediction_type)
    x_0 = prior.draw(3, np.random.default_rng(0))
    for t in (100, 600):
        noisy = torch.from_numpy(x_0) + scheduler.sigma(t) * noise_bank((3, 40, 3))
        x_t = ((2 * noisy - 1) * scheduler.alpha_bar(t) ** 0.5).float()
        output = inversion.exact_score(scheduler, prior)(x_t, torch.full((3,), t))
        expected = posterior_mean(noisy.numpy(), scheduler.sigma(t), prior)
        answered = to_data_units(scheduler.predict_x_0(output, x_t, t))
        assert np.allclose(answered.numpy(), expected, atol=2e-4)


# ----------------------------------------------------------------------------------------
# STATISTICS
# ----------------------------------------------------------------------------------------


def test_rounding_has_two_to_the_bits_levels():
    x = torch.tensor([-9.0, -4.0, -0.1, 0.0, 0.1, 1.9, 2.5, 3.9, 9.0])
    assert round_latents(x, 2).tolist() == [-3, -3, -1, 1, 1, 1, 3, 3, 3]
    for bits in (4, 6, 8):
        levels = round_latents(torch.linspace(-5, 5, 100_001), bits).unique()
        assert len(levels) == 2**bits and levels.abs().max() == 4 - 4 / 2**bits


def test_statistics_of_known_distributions():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((200, 100, 3))
    ar = np.empty_like(normal)  # x_t = 0.6·x_{t-1} + 0.8·z: unit variance, autocorrelation 0.6
    ar[:, 0] = normal[:, 0]
    for t in range(1, 100):
        ar[:, t] = 0.6 * ar[:, t - 1] + 0.8 * normal[:, t]
    distributions = {  # mean, std, kurtosis, autocorrelation
        "normal": (normal, (0, 1, 3, 0)),
        "uniform": (5 + rng.uniform(-1, 1, normal.shape), (5, 3**-0.5, 1.8, 0)),
        "ar": (ar, (0, 1, 3, 0.6)),
    }
    for name, (x, expected) in distributions.items():
        for estimate, value in zip(
            latent_statistics(torch.from_numpy(x)).values(), expected, strict=True
        ):
            assert estimate.value == pytest.approx(value, abs=0.04), name
            assert estimate.ci[0] < estimate.value < estimate.ci[1] and estimate.n == 200


# ----------------------------------------------------------------------------------------
# THE TABLE
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    config = TrainConfig(seq_len=50, d_model=16, num_layers=1, nhead=2)
    model, prior = untrained_model(config, "cpu"), GesturePrior(50, 3, 15)
    x_0 = torch.from_numpy(prior.draw(12, np.random.default_rng(1))).float()
    return inversion.invert(
        model,
        model,
        build_scheduler(config),
        x_0,
        prior=prior,
        steps=(10, 20),
        budget=90,
        num_exact=2,
    )


def test_table_holds_every_row_with_its_size(table):
    starts = ("raw", "dequantised")
    assert set(table) == {
        *(f"{who}_{s}_{n}" for who in ("model", "exact_score") for s in starts for n in (10, 20)),
        *(f"{who}_{s}_10" for who in ("untrained_model", "zero_eps") for s in starts),
        *(f"ddim_paper_{n}" for n in (10, 20, 50, 100, 200, 500, 1000)),
    }
    assert table["model_raw_10"]["mse"].n == 9  # 90/10
    assert table["model_raw_20"]["mse"].n == 8  # at least
    assert table["exact_score_raw_10"]["mse"].n == 2
    assert table["model_raw_20"]["num_steps"].value == 20
    assert table["model_dequantised_20"]["num_steps"].value == 19
    assert "mse_4_bits" in table["model_raw_10"] and "mse_4_bits" not in table["model_raw_20"]


def test_the_papers_row_is_the_papers():
    # Song et al. 2021, table 2
    paper = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 9e-4, 200: 4e-4, 500: 1e-4, 1000: 1e-4}
    assert dict(zip(inversion.STEPS, inversion.PAPER_MSE, strict=True)) == paper


def test_the_copy_has_no_error_and_fails_all_else(table):
    for start in ("raw", "dequantised"):
        copy = table[f"zero_eps_{start}_10"]
        assert copy["mse"].value < 1e-12  # better than any model
        assert copy["latent_std"].value < 0.1  # due: 1
        assert copy["latent_kurtosis"].value > 4  # due: 3
        assert copy["latent_autocorrelation"].value > 0.8  # due: 0
        assert copy["mse_fresh_noise"].value > 1  # due: 0.148
        assert copy["mse_4_bits"].value > 1


def test_the_untrained_network_is_no_code(table):
    for start in ("raw", "dequantised"):
        row = table[f"untrained_model_{start}_10"]
        assert row["mse"].value > 0.005 or row["latent_kurtosis"].value > 4


def test_the_exact_score_has_a_small_error(table):
    assert table["exact_score_raw_20"]["mse"].value < 0.001
    assert table["exact_score_dequantised_20"]["mse"].value < 0.002


def test_steps_beyond_the_schedule_and_a_missing_prior_are_left_out():
    config = TrainConfig(d_model=16, num_layers=1, nhead=2, num_timesteps=20)
    model = untrained_model(config, "cpu")
    table = inversion.invert(
        model, model, build_scheduler(config), torch.zeros(2, 250, 3), prior=None
    )
    own = {name for name in table if not name.startswith("ddim_paper")}
    assert {int(name.split("_")[-1]) for name in own} == {10, 20}
    other = inversion.invert(
        model, model, build_scheduler(config), torch.zeros(2, 250, 3), prior=None, steps=(7,)
    )
    assert "model_raw_7" in other  # any number of steps may be asked for
    assert not any(name.startswith("exact_score") for name in own)
