"""The chain of contacts: its marginals are those of all sequences, weighed one by one.

python -m pytest tests/test_contact_chain.py
"""

import itertools

import pytest
import torch

from trainlib.contact_chain import (
    ContactChain,
    contact_chain,
    lay_out,
    log_convolution,
    log_sum_exp,
    toeplitz,
)


def weigh(states, log_odds, down, up, count, durations):
    """The log weight of one sequence of presses, by the docstring's words."""
    weight, contacts, L = torch.tensor(0.0), 0, len(states)
    for i, pressed in enumerate(states):
        weight = weight + log_odds[i] * pressed
        if pressed and (i == 0 or not states[i - 1]):
            contacts, since, weight = contacts + 1, i, weight + down[i]
        if pressed and (i == L - 1 or not states[i + 1]):
            stop = i + 1
            weight = weight + (up[stop] if stop < L else 0)
            either = durations[stop - since]
            if since == 0 or stop == L:  # whole, or cut off
                either = torch.logaddexp(either, durations[0])
            weight = weight + either
    return weight + count[contacts] if contacts < len(count) else torch.tensor(-torch.inf)


@pytest.mark.parametrize(("length", "most"), [(1, 1), (2, 1), (6, 1), (7, 2), (8, 4), (13, 3)])
def test_marginals_are_sums_over_all_sequences(length, most):
    torch.manual_seed(0)
    given = [2 * torch.randn(2, length, dtype=torch.float64) for _ in range(3)]
    given.append(torch.randn(2, most + 1, dtype=torch.float64))
    durations = 2 * torch.randn(length + 1, dtype=torch.float64)
    all_states = list(itertools.product([0, 1], repeat=length))
    posterior = torch.sigmoid(contact_chain(*given, durations))
    for row in range(2):
        own = [x[row] for x in given]
        weights = torch.stack([weigh(s, *own, durations).double() for s in all_states])
        expected = torch.softmax(weights, dim=0) @ torch.tensor(all_states).double()
        torch.testing.assert_close(posterior[row], expected, atol=2e-6, rtol=1e-6)


def runs_of(states):
    """The frames of each contact, first and one past the last."""
    edges = [i for i in range(len(states) + 1) if (0, *states)[i] != (*states, 0)[i]]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize(("length", "most"), [(2, 1), (6, 1), (7, 2), (8, 4), (13, 3)])
def test_decided_contacts_are_the_medians_of_their_ends(length, most):
    """The n-th counts if it is likelier than not, from and to where half of its odds are."""
    torch.manual_seed(1)
    given = [torch.randn(4, length, dtype=torch.float64) for _ in range(3)]
    given.append(torch.randn(4, most + 1, dtype=torch.float64))
    durations = torch.randn(length + 1, dtype=torch.float64)
    all_states = list(itertools.product([0, 1], repeat=length))
    decided = contact_chain(*given, durations, decided=True) > 0
    for row in range(4):
        own = [x[row] for x in given]
        weights = torch.stack([weigh(s, *own, durations).double() for s in all_states])
        odds = zip(all_states, torch.softmax(weights, dim=0).tolist(), strict=True)
        odds, expected = list(odds), [False] * length
        for nth in range(most):
            ends = [(runs_of(s)[nth], p) for s, p in odds if len(runs_of(s)) > nth]
            whole = sum(p for _, p in ends)
            for i in range(length):
                begun = sum(p for (first, _), p in ends if first <= i)
                over = sum(p for (_, stop), p in ends if stop <= i)
                expected[i] |= whole > 0.5 and begun > whole / 2 >= over
        assert decided[row].tolist() == expected


def test_a_decided_contact_is_not_lost_between_three_places():
    log_odds, flat = torch.full((1, 60), -3.0), torch.full((1, 60), -5.0)
    for first in (5, 25, 45):
        log_odds[0, first : first + 8] = 3.0
    given = log_odds, flat, flat, torch.tensor([[-1e4, 0.0]]), torch.zeros(61)
    assert not (contact_chain(*given) > 0).any()
    pressed = contact_chain(*given, decided=True)[0] > 0
    assert pressed[25:33].all() and pressed.sum() == 8


@pytest.mark.parametrize("scale", [1.0, 50.0, 3000.0])
def test_a_convolution_in_logarithms_is_its_sum_at_any_scale(scale):
    """Weights of 40 would overflow, and an x that rises by thousands underflow."""
    torch.manual_seed(2)
    x = scale * torch.randn(2, 40, dtype=torch.float64)
    x[1] = scale * torch.arange(40.0)
    weights = 40 * torch.randn(40, dtype=torch.float64).clamp(-1, 1)
    y = log_convolution(x, lay_out(weights))
    for j in range(40):
        expected = torch.logsumexp(x[:, : j + 1] + weights[torch.arange(j, -1, -1)], dim=1)
        torch.testing.assert_close(y[:, j], expected)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_sum_in_logarithms_is_torchs_with_its_gradient(scale):
    x = (scale * torch.randn(3, 40, 5)).requires_grad_()
    ours, theirs = log_sum_exp(x, dim=1), torch.logsumexp(x, dim=1)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_a_toeplitz_matrix_holds_each_lag_on_its_diagonal():
    matrix = toeplitz(torch.tensor([1.0, 2.0, 3.0]), -9.0)
    assert matrix.tolist() == [[1, 2, 3], [-9, 1, 2], [-9, -9, 1]]


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_single_precision_is_enough(scale):
    """Evidence of thousands of nats a frame, as at low noise: float64's within its rounding."""
    torch.manual_seed(0)
    log_odds = torch.full((4, 250), -scale)
    log_odds[:, 100:140] = scale
    log_odds = log_odds + 0.3 * scale * torch.randn(4, 250)
    given = [log_odds, *(torch.randn(2, 4, 250) - 3), torch.randn(4, 4), 3 * torch.randn(251)]
    single = torch.sigmoid(contact_chain(*given))
    exact = torch.sigmoid(contact_chain(*(x.double() for x in given)))
    torch.testing.assert_close(single.double(), exact, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_long_windows_of_strong_evidence_stay_finite(scale):
    torch.manual_seed(0)
    given = [
        (scale * torch.randn(3, 250)).requires_grad_(),
        torch.zeros(3, 250),
        torch.zeros(3, 250),
    ]
    posterior = contact_chain(*given, torch.zeros(3, 4), torch.randn(251))
    torch.sigmoid(posterior).sum().backward()
    assert posterior.isfinite().all() and given[0].grad.isfinite().all()


def test_of_two_contacts_the_likelier_one_is_kept_where_there_is_one():
    log_odds = torch.full((1, 60), -3.0)
    log_odds[0, 10:20], log_odds[0, 40:45] = 3.0, 3.0
    flat, one = torch.full((1, 60), -5.0), torch.tensor([[-1e4, 0.0, -1e4]])
    pressed = contact_chain(log_odds, flat, flat, one, torch.zeros(61))[0] > 0
    assert pressed[10:20].all() and pressed.sum() == 10
    both = contact_chain(log_odds, flat, flat, torch.zeros(1, 3), torch.zeros(61))[0] > 0
    assert both.sum() == 15


def test_contacts_that_the_window_cuts_off_have_no_duration():
    log_odds, flat = torch.full((1, 50), 4.0), torch.full((1, 50), -5.0)
    never = torch.full((51,), -100.0)
    never[0] = 0  # cut off
    chain = contact_chain(log_odds, flat, flat, torch.zeros(1, 2), never)
    assert (chain > 0).all()
    log_odds[0, 20] = -1e3  # from frame 0, and to the end
    pressed = contact_chain(log_odds, flat, flat, torch.zeros(1, 3), never)[0] > 0
    assert pressed.sum() == 49


def test_what_is_never_cut_off_has_a_whole_duration_at_the_border_too():
    """Evidence for the last three frames, where contacts last eight and none is cut off."""
    log_odds, flat = torch.full((1, 40), -2.0), torch.full((1, 40), -1.0)
    log_odds[0, 37:] = 3.0
    durations = torch.full((41,), -50.0)
    durations[8] = 0
    count = torch.tensor([[-50.0, 0.0]])
    pressed = contact_chain(log_odds, flat, flat, count, durations)[0] > 0
    assert pressed[32:].all() and pressed.sum() == 8


def test_a_duration_that_never_occurs_is_not_drawn_however_the_evidence_is_spread():
    """Weak evidence for 4 frames, of which the ends are uncertain: of 8 or more there is none."""
    log_odds, flat = torch.full((1, 40), -0.5), torch.full((1, 40), -1.0)
    log_odds[0, 18:22] = 1.0
    durations = torch.where(torch.arange(41) < 8, -50.0, 0.0)
    chain = contact_chain(log_odds, flat, flat, torch.tensor([[-50.0, 0.0]]), durations)
    assert torch.sigmoid(chain).sum() >= 8


def test_what_holds_of_any_window_is_learnt_a_rate_faster():
    """A window without a contact never occurs: weak evidence against all frames does not win."""
    chain = ContactChain(30, 1)
    given = [torch.full((1, 30), -2.0), *torch.full((2, 1, 30), -1.0), torch.tensor([[0.5, 0.0]])]
    assert torch.sigmoid(chain(*given)).sum() < 1
    chain.counts.data[0], chain.durations.data[:9] = -1.0, -1.0
    weights = torch.tensor([0.5 - chain.RATE, 0]), torch.zeros(31)
    weights[1][:9] = -chain.RATE
    expected = contact_chain(*given[:3], weights[0][None], weights[1])
    torch.testing.assert_close(chain(*given), expected)
    assert torch.sigmoid(chain(*given)).sum() >= 8.9
    chain(*given).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in chain.parameters())
