"""The denoiser of curves against closed forms: what it sees, what it practises, what it learns.

python -m pytest tests/test_curves.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from train_diffusion_ddim import DDIMScheduler
from trainlib import tensors
from trainlib.curves import CurveDenoiser, CurveWalk
from trainlib.lessons import CurveLessons
from trainlib.muon import make_optimizers

T = 50
LOG_SNR = torch.linspace(8, -8, T)
AXES, DEGREES = 2, 8
NUMBERS = AXES * DEGREES


def test_waves_are_means_over_the_noise():
    """E[sin ω(y + s·z)] over 200,000 draws of z, of two contacts of 3 and 40 frames."""
    torch.manual_seed(0)
    curves = CurveDenoiser(4, AXES, DEGREES)
    c_t, alpha_bar_t = torch.randn(1, 2, NUMBERS), torch.tensor(0.8)
    own = (1 - alpha_bar_t) / torch.tensor([3.0, 40.0])[None, :, None]
    waves = curves.waves(c_t, own, alpha_bar_t.view(1, 1, 1)).unflatten(2, (AXES, -1))
    z = torch.randn(200_000)
    for contact in range(2):
        for axis in range(AXES):
            place = c_t[0, contact, axis * DEGREES] / alpha_bar_t.sqrt()
            y = place + (own[0, contact, 0] / alpha_bar_t).sqrt() * z
            for k in range(curves.WAVES):
                angle = math.pi * 2**k * y
                expected = torch.stack([angle.sin().mean(), angle.cos().mean()])
                seen = waves[0, contact, axis, [k, curves.WAVES + k]]
                torch.testing.assert_close(seen, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("contacts", [1, 2])
def test_a_walk_is_what_the_scheduler_does_with_curves(contacts, eta, monkeypatch):
    """DDIM at its noise levels; of two contacts, too, which see each other."""
    torch.manual_seed(2)
    curves = CurveDenoiser(4, AXES, DEGREES)
    torch.nn.init.normal_(curves.out.weight, std=0.1)
    scheduler = DDIMScheduler(20_000, beta_schedule="wide_cosine", prediction_type="x0")
    scheduler.clip_sample = False
    c_T, tokens = torch.randn(3, contacts, NUMBERS) / 20, torch.randn(3, contacts, 4)
    n = torch.tensor([40.0, 7.0])[:contacts].expand(3, -1)[..., None]
    first, last = scheduler.timestep_at(0.05), scheduler.timestep_at(0.005)
    end = scheduler.sigma(last)
    level = torch.full((3, 1, 1), -2 * math.log(2 * scheduler.sigma(first)))
    given = tokens, level, n, (4 * end) ** 2
    torch.testing.assert_close(curves.walk(c_T, *given), curves(c_T, *given))
    z = torch.randn(3, 3, contacts, NUMBERS)
    steps_z = iter(z.unbind(dim=1))
    monkeypatch.setattr(tensors, "draw_eps", lambda *_: next(steps_z) / n.sqrt())
    sigmas = torch.logspace(math.log10(scheduler.sigma(first)), math.log10(end), 4)
    levels, c_t = [scheduler.timestep_at(float(sigma)) for sigma in sigmas], c_T
    for t, t_prev in zip(levels, [*levels[1:], -1], strict=True):
        level = torch.full((3, 1, 1), -2 * math.log(2 * scheduler.sigma(t)))
        c_0 = curves(c_t, tokens, level, n, (4 * end) ** 2)[0]
        c_t = scheduler.step(c_0, c_t, t, t_prev, eta=eta if t_prev >= 0 else 0)
    by = CurveWalk(4, eta, z if eta else None)
    walked = curves.walk(c_T, *given, by=by)[0]
    torch.testing.assert_close(walked, c_t, atol=1e-4, rtol=0)
    assert (c_t - curves(c_T, *given)[0]).abs().max() > 1e-3  # they matter


def test_a_walk_takes_as_many_steps_as_it_has_noise_for():
    """Of gestures of few frames; what noise is left over is not read."""
    curves, c_T = CurveDenoiser(4, AXES, DEGREES), torch.randn(3, 1, NUMBERS)
    torch.nn.init.normal_(curves.out.weight, std=0.1)
    given = None, torch.full((3, 1, 1), 3.0), torch.full((3, 1, 1), 9.0), 1e-4
    z = torch.randn(3, 2 * NUMBERS + 1)
    short = curves.walk(c_T, *given, by=CurveWalk(9, 1.0, z))
    torch.testing.assert_close(short, curves.walk(c_T, *given, by=CurveWalk(3, 1.0, z)))
    z[:, -1] = torch.nan
    torch.testing.assert_close(short, curves.walk(c_T, *given, by=CurveWalk(9, 1.0, z)))


def practise(curves, c_0, n, eps, t):
    return curves.practise(c_0, n, eps, t, LOG_SNR, 0.0)


def test_practice_is_the_loss_of_denoising_at_its_levels():
    """By hand: two levels, 7 and 32; of two windows the second has a contact more."""
    torch.manual_seed(1)
    curves = CurveDenoiser(4, AXES, DEGREES)
    torch.nn.init.normal_(curves.out.weight, std=0.1)
    c_0 = torch.randn(2, 2, NUMBERS) / 3
    c_0[:, :, 3] = 0  # does not move
    n, eps = torch.tensor([[10.0, 0.0], [25.0, 4.0]])[..., None], torch.randn(2, 2 * NUMBERS)
    loss = practise(curves, c_0, n, eps, torch.tensor([7, 7]))
    for row, contacts in enumerate([1, 2]):
        expected = 0
        for i, level in enumerate([7, 7 + T // 2]):
            a, noise = torch.sigmoid(LOG_SNR[level]), eps[row, i * NUMBERS : (i + 1) * NUMBERS]
            given = n[row, :contacts][None]
            std = ((1 - a) / given).sqrt()
            c_t = a.sqrt() * c_0[row, :contacts][None] + std * noise
            c, gates, _ = curves(c_t, None, LOG_SNR[level].view(1, 1, 1), given, 0.0)
            error = (c - c_0[row, :contacts]).square() * (a / std**2 + 1 / 0.6**2)
            moves = (c_0[row, :contacts].abs() > 1e-4).float()[None]
            entropy = F.binary_cross_entropy_with_logits(gates, moves, reduction="none")
            expected = expected + error.mean(dim=2) + entropy.sum(dim=2) / AXES
        torch.testing.assert_close(loss[row], expected.mean() / 2, rtol=1e-5, atol=0)


def test_a_window_without_a_contact_or_without_noise_teaches_nothing():
    curves, c_0 = CurveDenoiser(4, AXES, DEGREES), torch.randn(3, 1, NUMBERS)
    none, some = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    assert not practise(curves, c_0, none, torch.randn(3, 99), torch.zeros(3).long()).any()
    assert not practise(curves, c_0, some, torch.randn(3, 15), torch.zeros(3).long()).any()
    assert practise(curves, c_0, some, torch.randn(3, 16), torch.zeros(3).long()).all()


@pytest.fixture
def student():
    torch.manual_seed(3)
    curves = CurveDenoiser(4, AXES, DEGREES)
    for layer in (curves.out, curves.from_tokens):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(curves.from_tokens.bias)  # a trained one is not 0 either
    curves.by_noise_alone = True
    return curves


def test_a_student_hears_tokens_where_frames_are_known_alone(student):
    """Elsewhere it says what it does without any, and learns nothing from what it says."""
    c_t, tokens, n = torch.randn(2, 1, NUMBERS), torch.randn(2, 1, 4), torch.full((2, 1, 1), 9.0)
    known_mask = torch.tensor([[False, True, False], [False, False, False]])
    given = LOG_SNR[[30, 30]].view(2, 1, 1), n, 0.0
    c, gates, _ = student(c_t, tokens, *given, known_mask)
    deaf, deaf_gates, _ = student(c_t, None, *given)
    torch.testing.assert_close(c[1], deaf[1])
    torch.testing.assert_close(gates[1], deaf_gates[1])
    assert ((c[0] - deaf[0]).abs() > 1e-4).any()
    torch.testing.assert_close(student(c_t, tokens, *given)[0], deaf)  # nothing is known
    for x in (c, gates):
        told, untold = (
            torch.autograd.grad(x[row].sum(), student.from_x_t.weight, retain_graph=True)[0].norm()
            for row in (0, 1)
        )
        assert told > 0 and untold == 0
    student.by_noise_alone = False
    torch.testing.assert_close(student(c_t, tokens, *given)[0][0], c[0])


def test_the_loss_of_lessons_is_that_of_their_curves_at_one_level(student):
    """By hand; the second of two lessons has no contact."""
    c_0, eps = torch.randn(1, 2, 1, NUMBERS) / 3, torch.randn(1, 2, 1, NUMBERS)
    n, level = torch.tensor([12.0, 0.0]).view(1, 2, 1, 1), 33
    loss = student.learn(CurveLessons(c_0, eps, n), LOG_SNR[[level]], 0.0)
    a = torch.sigmoid(LOG_SNR[level])
    c_t = a.sqrt() * c_0[:, 0] + ((1 - a) / 12).sqrt() * eps[:, 0]
    c, gates, _ = student(c_t, None, LOG_SNR[level].view(1, 1, 1), n[:, 0], 0.0)
    relative = 0.4 / (c_0[:, 0].square() + 0.02**2)
    error = (c - c_0[:, 0]).square() * (a / ((1 - a) / 12) + 1 / 0.6**2 + relative)
    moves = (c_0[:, 0].abs() > 1e-4).float()
    entropy = F.binary_cross_entropy_with_logits(gates, moves, reduction="none")
    expected = 10 * (error.mean() + entropy.sum() / AXES)
    torch.testing.assert_close(loss, expected[None], rtol=1e-5, atol=0)


def test_it_learns_where_the_buttons_are(two_buttons):
    """Touched at x = ±0.5 alone, E[x | y] = 0.5·tanh(0.5·y/v) in noise of variance v.

    A bell of the same mean and variance, y·0.25/(0.25 + v), is at least twice as far from that.
    """
    level, y = T // 2, torch.linspace(-0.6, 0.6, 25)
    a, n = torch.sigmoid(LOG_SNR[level]), torch.full((25, 1, 1), 16.0)
    v = (1 - a) / a / 16
    c_t = torch.zeros(25, 1, NUMBERS)
    c_t[..., 0] = a.sqrt() * y[:, None]
    c, _, _ = two_buttons(c_t, None, LOG_SNR[level].expand(25, 1, 1), n, 0.0)
    exact, bell = 0.5 * torch.tanh(0.5 * y / v), y * 0.25 / (0.25 + v)
    assert (c[:, 0, 0] - exact).norm() < (bell - exact).norm() / 2


@pytest.fixture
def two_buttons():
    torch.manual_seed(0)
    curves = CurveDenoiser(4, AXES, DEGREES)
    head = torch.nn.ModuleDict({"curves": curves})
    within = torch.nn.ModuleDict({"output_projection": head})
    optimizers = make_optimizers(within, 0, 0.0, muon=True)
    for step in range(500):
        c_0 = torch.zeros(32, 1, NUMBERS)
        c_0[..., 0] = torch.randint(2, (32, 1)) - 0.5
        given = torch.randn(32, 250, 2), torch.randint(T, (32,))
        loss = practise(curves, c_0, torch.full((32, 1, 1), 16.0), *given).mean()
        curves.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 500)
            optimizer.step()
    return curves.eval()
