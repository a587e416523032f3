"""The chain of contacts: its marginals are those of all sequences, weighed one by one.

python -m pytest tests/test_contact_chain.py
"""

import itertools

import pytest
import torch

from trainlib.contact_chain import contact_chain, memoryless_chain


def weigh(states, log_odds, down, up, count):
    """The log weight of one sequence of presses, by the docstring's words."""
    weight, contacts, before = 0.0, 0, 0
    for i, pressed in enumerate(states):
        weight = weight + log_odds[i] * pressed
        if pressed and not before:
            contacts, weight = contacts + 1, weight + down[i]
        if before and not pressed:
            weight = weight + up[i]
        before = pressed
    return weight + count[contacts] if contacts < len(count) else torch.tensor(-torch.inf)


@pytest.mark.parametrize(("length", "most"), [(1, 1), (2, 1), (6, 1), (7, 2), (8, 4)])
def test_marginals_are_sums_over_all_sequences(length, most):
    torch.manual_seed(0)
    given = [2 * torch.randn(2, length, dtype=torch.float64) for _ in range(3)]
    given.append(torch.randn(2, most + 1, dtype=torch.float64))
    all_states = list(itertools.product([0, 1], repeat=length))
    posterior = torch.sigmoid(memoryless_chain(*given))
    for row in range(2):
        weights = torch.stack([weigh(s, *(x[row] for x in given)).double() for s in all_states])
        expected = torch.softmax(weights, dim=0) @ torch.tensor(all_states).double()
        torch.testing.assert_close(posterior[row], expected)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_long_windows_of_strong_evidence_stay_finite(scale):
    torch.manual_seed(0)
    given = [
        (scale * torch.randn(3, 250)).requires_grad_(),
        torch.zeros(3, 250),
        torch.zeros(3, 250),
    ]
    posterior = contact_chain(*given, torch.zeros(3, 4), torch.randn(250))
    torch.sigmoid(posterior).sum().backward()
    assert posterior.isfinite().all() and given[0].grad.isfinite().all()


def test_of_two_contacts_the_likelier_one_is_kept_where_there_is_one():
    log_odds = torch.full((1, 60), -3.0)
    log_odds[0, 10:20], log_odds[0, 40:45] = 3.0, 3.0
    flat, one = torch.full((1, 60), -5.0), torch.tensor([[-1e4, 0.0, -1e4]])
    pressed = memoryless_chain(log_odds, flat, flat, one)[0] > 0
    assert pressed[10:20].all() and pressed.sum() == 10
    both = memoryless_chain(log_odds, flat, flat, torch.zeros(1, 3))[0] > 0
    assert both.sum() == 15


@pytest.mark.parametrize("known", ["touch-down", "lift-off"])
def test_a_duration_weighs_what_the_words_say_where_one_end_is_certain(known):
    """Against all sequences of one contact, each with the weight of its duration."""
    torch.manual_seed(1)
    L, at = 9, 4
    log_odds, down, up = 0.5 * torch.randn(3, 1, L, dtype=torch.float64)
    durations, count = 2 * torch.randn(L).double(), torch.tensor([[-1e4, 0.0]]).double()
    (down if known == "touch-down" else up)[0, at] = 60.0
    posterior = torch.sigmoid(contact_chain(log_odds, down, up, count, durations))[0]
    weights, presses = [], []
    for first, after in itertools.combinations(range(L + 1), 2):
        pressed = torch.tensor([first <= i < after for i in range(L)]).double()
        weight = weigh(pressed.bool().tolist(), log_odds[0], down[0], up[0], count[0])
        if first > 0 and after < L:  # the window does not cut it off
            weight = weight + durations[after - first]
        weights.append(weight)
        presses.append(pressed)
    expected = torch.softmax(torch.stack(weights), dim=0) @ torch.stack(presses)
    torch.testing.assert_close(posterior, expected, atol=1e-6, rtol=0)


def test_contacts_that_the_window_cuts_off_have_no_duration():
    log_odds, flat = torch.full((1, 50), 4.0), torch.full((1, 50), -5.0)
    never = torch.full((50,), -100.0)
    chain = contact_chain(log_odds, flat, flat, torch.zeros(1, 2), never)
    assert (chain > 0).all()
