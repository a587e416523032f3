"""Contacts that return, against Gaussian conditionals of torch.distributions and of linear algebra.

python -m pytest tests/test_returns.py
"""

import math

import pytest
import torch
from torch.distributions import Normal

from trainlib.contact_chain import NEVER
from trainlib.returns import FAR, NEAR, by_neighbours, returned

DEGREES = 4
ALPHA_BAR, OPEN = torch.tensor([[[0.7]]]), torch.tensor([[[False]]])


def contacts(places, noise):
    """c_t of contacts at noisy places, (S, 2), (1, S, 2 * DEGREES), and its variance, (1, S, 1)."""
    c_t = torch.randn(1, len(places), 2, DEGREES, generator=torch.Generator().manual_seed(1))
    c_t[0, :, :, 0] = torch.tensor(places)
    return c_t.flatten(2), torch.tensor(noise)[None, :, None]


def places_of(c_t):
    return c_t.unflatten(2, (2, -1))[..., 0]


def test_two_places_that_are_the_same_are_the_conditional_of_a_gaussian():
    """Of a flat prior, with a gap of std NEAR between the two, given noisy places."""
    c_t, noise = contacts([[0.3, -0.2], [0.32, -0.23]], [4e-4, 9e-4])
    known, less, _ = by_neighbours(c_t, noise, ALPHA_BAR, torch.full((1, 2), 1e4), OPEN, 2)
    gap, flat = ALPHA_BAR.item() * NEAR**2, 100.0
    prior = torch.tensor([[flat, flat], [flat, flat + gap]], dtype=torch.float64)
    gain = prior @ torch.linalg.inv(prior + torch.diag(noise[0, :, 0].double()))
    left = (torch.eye(2, dtype=torch.float64) - gain) @ prior
    expected = gain @ places_of(c_t)[0].double()
    torch.testing.assert_close(places_of(known)[0].double(), expected, atol=1e-5, rtol=0)
    variances = places_of(less)[0, :, 0].double()
    torch.testing.assert_close(variances, left.diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("gap", [(0.01, 0.0), (0.1, -0.05), (0.4, 0.6)])
def test_the_gap_tells_returns_from_others_by_its_density(gap):
    c_t, noise = contacts([[0.1, 0.1], [0.1 + gap[0], 0.1 + gap[1]]], [1e-3, 2e-3])
    prior = torch.tensor([[5.0, -0.4]])  # what is said of the first does not matter
    _, _, log_odds = by_neighbours(c_t, noise, ALPHA_BAR, prior, OPEN, 2)
    stds = ((ALPHA_BAR.item() * std**2 + 3e-3) ** 0.5 for std in (NEAR, FAR))
    near, far = (Normal(0.0, std).log_prob(torch.tensor(gap)).sum() for std in stds)
    torch.testing.assert_close(log_odds, (near - far - 0.4).reshape(1, 1), rtol=1e-4, atol=1e-4)


def test_places_alone_are_corrected():
    c_t, noise = contacts([[0.3, -0.2], [0.32, -0.23]], [1e-3, 1e-3])
    known, less, _ = by_neighbours(c_t, noise, ALPHA_BAR, torch.full((1, 2), 1e4), OPEN, 2)
    is_place = torch.tensor([True, False, False, False]).repeat(2)
    assert torch.equal(known[..., ~is_place], c_t[..., ~is_place])
    assert (known != c_t)[..., is_place].all()
    assert (less[..., ~is_place] == 1e-3).all() and (less[..., is_place] < 1e-3).all()


def test_where_there_is_no_contact_nothing_changes():
    c_t, noise = contacts([[0.3, -0.2], [0.3, -0.2], [0.3, -0.2]], [1e-3, 1e-3, 1e-3])
    prior = torch.tensor([[0.0, NEVER, NEVER]])
    known, less, _ = by_neighbours(c_t, noise, ALPHA_BAR, prior, OPEN, 2)
    assert torch.equal(known, c_t) and (less == 1e-3).all()
    given = c_t[:, :1], noise[:, :1], ALPHA_BAR, prior[:, :1], OPEN, 2
    known, less, log_odds = by_neighbours(*given)
    assert torch.equal(known, c_t[:, :1]) and (less == 1e-3).all() and log_odds.shape == (1, 0)


def test_a_place_between_two_that_are_the_same_keeps_a_third_of_its_noise():
    c_t, noise = contacts([[0.1, 0.4]] * 3, [1e-5, 1e-5, 1e-5])
    given = c_t, noise, torch.zeros(1, 1, 1), torch.full((1, 3), 1e4), OPEN, 2  # no gap at all
    known, less, _ = by_neighbours(*given)
    torch.testing.assert_close(places_of(known), places_of(c_t))
    assert places_of(less)[0, 1].tolist() == pytest.approx([1e-5 / 3] * 2, rel=1e-4)


def test_a_return_is_nearer_than_a_click_may_move():
    c_0, _ = contacts([[0.5, 0.5], [0.53, 0.53], [0.53, 0.59], [0.5, 0.56]], [1.0] * 4)
    assert returned(c_0, 2).tolist() == [[True, False, True]]


@pytest.mark.parametrize("odds", [2.0, -2.0])
def test_where_it_is_decided_a_likely_return_is_certain(odds):
    c_t, noise = contacts([[0.3, -0.2], [0.32, -0.23]], [1e-3, 1e-3])
    evidence = by_neighbours(c_t, noise, ALPHA_BAR, torch.zeros(1, 2), OPEN, 2)[2].item()
    priors = torch.full((1, 2), odds - evidence), torch.full((1, 2), math.copysign(1e4, odds))
    likely, certain = (by_neighbours(c_t, noise, ALPHA_BAR, p, d, 2)[0]
                       for p, d in zip(priors, (~OPEN, OPEN), strict=True))  # fmt: skip
    torch.testing.assert_close(likely, certain)
    open_ = by_neighbours(c_t, noise, ALPHA_BAR, priors[0], OPEN, 2)[0]
    assert (places_of(open_) != places_of(certain)).all()
