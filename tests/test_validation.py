"""The protocols that the loop runs: what the model is given, the fixed noise, exact averages.

Why: the plan scored unconditional samples against unrelated originals, with new noise and three
batches each time. Here the keyframes protocol must hand over the press edges and nothing else,
two validations must give the same numbers, and no number may depend on a batch size.

    python -m pytest tests/test_validation.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import L, make_gestures, press
from torch import nn
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from train_diffusion_ddim import (
    DENOISE_SIGMAS,
    DDIMScheduler,
    comprehensive_evaluation,
    denoise_one_shot,
    generate,
    generation_metrics,
    noise_bank,
    press_edges,
    recreate,
    to_data_units,
    to_model_units,
    validate,
    validation_loss,
)
from trainlib.errors import UserError
from trainlib.metrics import compute_reconstruction_metrics, gesture_metrics
from trainlib.tensors import in_batches

X_0 = make_gestures(5)
SAMPLING = {"num_inference_steps": 3, "eta": 0.0, "sampler": "ddim"}


class Oracle(nn.Module):
    """A denoiser that knows x_0 of every gesture of a set, by the frames that are given."""

    def __init__(self, scheduler, x_0, known_frames=True):
        super().__init__()
        self.scheduler, self.x_0, self.known_frames = scheduler, to_model_units(x_0), known_frames
        self.seen, self.weight = [], nn.Parameter(torch.zeros(1))
        self.output_projection = nn.Identity()

    def forward(self, x_t, t, known=None, known_mask=None):
        self.seen.append((x_t, t, known, known_mask))
        x_0 = self.x_0[: len(x_t)]
        eps = self.scheduler.eps_from_x_0(x_0, x_t, t)
        return self.output_projection(self.scheduler.target(x_0, eps, t))


@pytest.fixture(scope="module")
def network(tiny_config):
    """A random net with its scheduler."""
    config = tiny_config()
    torch.manual_seed(0)
    model = tdd.build_model(config).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model, tdd.build_scheduler(config)


def test_the_noise_bank_is_the_same_standard_normal_numbers():
    bank = noise_bank((100, 250, 3))
    assert torch.equal(bank, noise_bank((100, 250, 3)))
    assert abs(bank.mean()) < 0.01 and abs(bank.std() - 1) < 0.01
    state = torch.get_rng_state()
    noise_bank((3, 3, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_keyframes_hand_over_the_press_edges_and_nothing_else(network):
    model, scheduler = network
    hidden = X_0.where(press_edges(X_0)[..., None], torch.rand(X_0.shape))
    hidden[..., 2] = X_0[..., 2]  # so that the edges stay where they are
    assert not torch.equal(hidden, X_0)
    recreated = recreate(model, scheduler, X_0, 3)
    assert torch.equal(recreate(model, scheduler, hidden, 3), recreated)
    edges = press_edges(X_0)
    torch.testing.assert_close(recreated[edges], X_0[edges], rtol=0, atol=1e-6)


def test_keyframes_start_from_pure_fixed_noise():
    scheduler = DDIMScheduler(50)
    model = Oracle(scheduler, X_0)
    recreated = recreate(model, scheduler, X_0, 4)
    torch.testing.assert_close(recreated, X_0, rtol=0, atol=1e-5)
    x_t, t, known, mask = model.seen[0]
    assert torch.equal(x_t, noise_bank(X_0.shape)) and len(model.seen) == 4
    assert t.tolist() == [scheduler.timestep_pairs(4)[0][0]] * 5
    assert torch.equal(mask, press_edges(X_0))
    torch.testing.assert_close(known[mask], 2 * X_0[mask] - 1)


def test_a_model_without_known_frames_starts_from_the_noised_gesture():
    scheduler = DDIMScheduler(50)
    model = Oracle(scheduler, X_0, known_frames=False)
    torch.testing.assert_close(recreate(model, scheduler, X_0, 2), X_0, rtol=0, atol=1e-5)
    x_t, t, known, mask = model.seen[0]
    start_t = scheduler.timestep_at(0.4)
    assert known is None and mask is None and t.tolist() == [start_t] * 5
    expected, _ = scheduler.add_noise(to_model_units(X_0), start_t, noise_bank(X_0.shape))
    torch.testing.assert_close(x_t, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_an_oracle_has_no_error(prediction_type):
    scheduler = DDIMScheduler(50, prediction_type=prediction_type)
    model = Oracle(scheduler, X_0)
    scores, recreated = validate(model, scheduler, X_0, SAMPLING)
    torch.testing.assert_close(recreated, X_0, rtol=0, atol=1e-5)
    assert scores["mse"] < 1e-10 and scores["loss"] < 1e-10 and scores["mean_snr_db"] > 60
    assert scores["temporal_iou"] == scores["gesture_type_accuracy"] == 1
    for sigma in DENOISE_SIGMAS:
        assert scores[f"denoise_mse_sigma_{sigma}"] < 1e-10
    assert scores["noise_reduction"] == pytest.approx(10 * math.log10(0.4**2 / 1e-8), abs=1e-3)


def test_denoise_noises_to_sigma_in_data_units():
    # A net that returns 0 for eps keeps the noise: x_0_pred = x_t / sqrt(ᾱ), error sigma²
    scheduler = DDIMScheduler(clip_sample=False)
    x_0 = make_gestures(50, 250)
    zero = nn.Module()
    zero.forward = lambda x_t, t, *_: torch.zeros_like(x_t)
    for sigma in DENOISE_SIGMAS:
        x = denoise_one_shot(zero, scheduler, x_0, sigma)
        assert ((x - x_0) ** 2).mean().item() == pytest.approx(sigma**2, rel=0.02)
    loss = validation_loss(zero, scheduler, x_0)
    assert loss == pytest.approx((noise_bank(x_0.shape) ** 2).mean().item(), rel=1e-5)


def test_the_validation_loss_spreads_t_evenly():
    scheduler = DDIMScheduler(50)
    model = Oracle(scheduler, X_0)
    validation_loss(model, scheduler, X_0)
    assert model.seen[0][1].tolist() == [5, 15, 25, 35, 45]


def test_gestures_without_an_edge_are_counted_and_not_scored(network):
    model, scheduler = network
    idle, held = torch.zeros(1, L, 3), press(L, (0, L - 1))
    x_0 = torch.cat([X_0, idle, held])
    scores, recreated = validate(model, scheduler, x_0, SAMPLING)
    assert scores["sequences_without_edge"] == 2 and recreated.shape == x_0.shape
    expected = compute_reconstruction_metrics(X_0, recreated[:5])
    expected |= gesture_metrics(X_0, recreated[:5])
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, rel=1e-6), key
    nothing, _ = validate(model, scheduler, torch.cat([idle, held]), SAMPLING)
    assert nothing["sequences_without_edge"] == 2 and "mse" not in nothing
    assert math.isfinite(nothing["loss"])


def test_two_validations_agree_and_touch_no_other_randomness(network):
    model, scheduler = network
    model.train()
    state = torch.get_rng_state()
    first, x = validate(model, scheduler, X_0, SAMPLING)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    again, y = validate(model, scheduler, X_0, SAMPLING)
    model.eval()
    first.pop("time_per_sample"), again.pop("time_per_sample")
    assert first == again and torch.equal(x, y)


def test_scores_do_not_depend_on_the_batch_size(network, monkeypatch):
    model, scheduler = network
    whole, x = validate(model, scheduler, X_0, SAMPLING)
    monkeypatch.setattr(in_batches, "__kwdefaults__", {"batch_size": 2})
    parts, y = validate(model, scheduler, X_0, SAMPLING)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    for key in whole.keys() - {"time_per_sample"}:
        assert parts[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-4), key


def test_noise_reduction_and_time(network):
    model, scheduler = network
    scores, _ = validate(model, scheduler, X_0, SAMPLING)
    expected = 10 * math.log10(0.4**2 / scores["denoise_mse_sigma_0.4"])
    assert scores["noise_reduction"] == pytest.approx(expected)
    assert 0 < scores["time_per_sample"] < 10


def test_validation_uses_the_samplers_options(network):
    model, scheduler = network
    few, many = (
        validate(model, scheduler, X_0, SAMPLING | {"num_inference_steps": n})[1] for n in (1, 10)
    )
    dpmpp = validate(model, scheduler, X_0, SAMPLING | {"sampler": "dpmpp"})[1]
    ddim = validate(model, scheduler, X_0, SAMPLING)[1]
    assert not torch.equal(few, many) and not torch.equal(ddim, dpmpp)


def test_generate_is_a_function_of_its_seed(network):
    model, scheduler = network
    shape = (6, L, 3)
    first = generate(model, scheduler, shape, 3, seed=1)
    assert torch.equal(generate(model, scheduler, shape, 3, seed=1), first)
    assert not torch.equal(generate(model, scheduler, shape, 3, seed=2), first)
    assert first.shape == shape and 0 <= first.min() and first.max() <= 1
    known = make_gestures(6)
    mask = press_edges(known)
    given = generate(model, scheduler, shape, 3, seed=1, known=known, known_mask=mask)
    torch.testing.assert_close(given[mask], known[mask], rtol=0, atol=1e-6)


def test_generation_metrics_by_hand():
    click, two = press(L, (2, 5)), press(L, (2, 5), (9, 12))
    swipe = press(L, (3, 7))
    swipe[0, 7, 0] += 0.4
    scores = generation_metrics(torch.cat([click, two, swipe, torch.zeros(1, L, 3)]))
    expected = {
        "one_press": 0.5,
        "share_none": 0.25,
        "share_click": 0.5,
        "share_horizontal": 0.25,
        "share_vertical": 0.0,
        "share_diagonal": 0.0,
    }
    # the swipe of 5 frames rests, then jumps by .4: along x the second differences are 0, 0, .4
    assert scores.pop("shake") == pytest.approx(1000 * 0.4 / 6)
    assert scores == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_comprehensive_evaluation_is_per_gesture(network, batch_size):
    model, scheduler = network
    loader = DataLoader(list(X_0), batch_size)
    scores = comprehensive_evaluation(model, scheduler, loader, "cpu", 3)
    recreated = recreate(model, scheduler, X_0, 3)
    mse = ((X_0 - recreated) ** 2).mean(dim=(1, 2)).tolist()
    iou = [gesture_metrics(X_0[i : i + 1], recreated[i : i + 1])["temporal_iou"] for i in range(5)]
    names = "reconstruction_quality action_timing_accuracy spatial_accuracy".split()
    names.append("gesture_type_preservation")
    assert set(scores) == {f"{name}_{kind}" for name in names for kind in ("mean", "std")}
    assert scores["reconstruction_quality_mean"] == pytest.approx(np.mean(mse), rel=1e-5)
    assert scores["reconstruction_quality_std"] == pytest.approx(np.std(mse), rel=1e-5)
    assert scores["action_timing_accuracy_mean"] == pytest.approx(np.mean(iou), rel=1e-5)


def test_recreations_with_eta_are_the_same_twice():
    model = tdd.MinimalDiffusionTransformer(
        seq_len=60, d_model=16, nhead=2, num_layers=1, known_frames=True
    ).eval()
    scheduler, x_0 = tdd.DDIMScheduler(100), make_gestures(2, length=60)
    first, second = (tdd.recreate(model, scheduler, x_0, 3, eta=1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_gestures_without_an_edge_earn_no_score():
    idle = DataLoader(list(torch.zeros(2, 250, 3)))
    with pytest.raises(UserError, match="press edge"):
        tdd.comprehensive_evaluation(torch.nn.Identity(), tdd.DDIMScheduler(), idle, "cpu")


def test_units_of_what_comes_back():
    scheduler = DDIMScheduler(50)
    x = denoise_one_shot(Oracle(scheduler, X_0), scheduler, X_0, 0.4)
    torch.testing.assert_close(x, to_data_units(to_model_units(X_0)), rtol=0, atol=1e-5)
