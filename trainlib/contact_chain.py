"""Idle, contact, idle, contact, ...: what all frames say of each, and how long contacts last."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainlib.tensors import exp_below_0

NEVER = -1e6  # log weight of what cannot be
CERTAIN = 1e-6  # probabilities nearer to 0 or 1 are rounding
BLOCK = 12  # frames that are summed up at once


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Return log Σ exp(x) along a dimension, up to terms of less than the smallest float.

    As torch.logsumexp, whose exp takes fifty times as long where it underflows, as it does here
    nearly everywhere, and which evaluates it once more for the gradient.
    """
    peak = x.detach().amax(dim=dim, keepdim=True)
    return exp_below_0(x - peak).sum(dim=dim).log() + peak.squeeze(dim)


def press_evidence(x_t: Tensor, place: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return log p(x_t | pressed at `place`) - log p(x_t | idle) of each frame by itself, (B, L).

    Gaussian noise around √ᾱ·(place, 1) or √ᾱ·(-1, ..., -1), of variance 1 - ᾱ, at least 0.01.
    """
    pressed = F.pad(place, (0, 1), value=1.0)
    root, noise = alpha_bar_t.sqrt(), (1 - alpha_bar_t).clamp(min=0.01)
    return (root / noise * (pressed + 1) * (x_t - root / 2 * (pressed - 1))).sum(dim=-1)


class ContactChain(nn.Module):
    """`contact_chain` with learnt weights of what holds of any window of length L.

    They are how many contacts there are, at most K, and how long they last; learnt RATE times as
    fast as other weights, since what never occurs, as a window without a contact may, must weigh
    more than all that single frames say.
    """

    RATE = 60.0

    def __init__(self, L: int, K: int) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(K + 1))  # of `count`, log weights / RATE
        self.durations = nn.Parameter(torch.zeros(L + 1))  # likewise

    def forward(
        self, log_odds: Tensor, down: Tensor, up: Tensor, count: Tensor, decided: bool = False
    ) -> Tensor:
        """Return the posterior log odds of a press, (B, L), in the type of what is given."""
        counts, durations = ((self.RATE * x).to(count.dtype) for x in (self.counts, self.durations))
        return contact_chain(log_odds, down, up, count + counts, durations, decided)


def contact_chain(
    log_odds: Tensor,
    down: Tensor,
    up: Tensor,
    count: Tensor,
    durations: Tensor,
    decided: bool = False,
) -> Tensor:
    """Return the posterior log odds of a press, (B, L), of at most K contacts in a window.

    The marginals of a hidden semi-Markov model (Rabiner 1989, sec. IV.D) by forward-backward: of
    every run of contacts, apart by an idle frame or more, the weight is the product of all below.
    Both directions are one pass over twice the batch, since a window read from its end is a window.

    Args:
        log_odds: of a press, what each frame says by itself, (B, L).
        down: log weight of a touch-down at the frame, (B, L).
        up: log weight of a lift-off before the frame, (B, L).
        count: log weight of 0, 1, ... K contacts, (B, K + 1).
        durations: log weight of 1, ... L frames from touch-down to lift-off, and before it that of
            a contact that the window cuts off, however long, (L + 1,). What touches the border of
            the window may be either.
        decided: whether the contacts that are likelier than not count as certain, each from where
            it has begun to where it has ended, by the medians of both. So one is never lost, as it
            is where its frames are spread over places of which none has half of all odds.
    """
    B, K = log_odds.shape[0], count.shape[1] - 1  # not len: export traces it
    total = log_odds.cumsum(dim=1)  # up to the frame and with it
    begin = down - (total - log_odds)  # (B, L), of a contact from this frame on
    end = F.pad(up[:, 1:], (0, 1)) + total  # of one up to this frame
    enter, leave = torch.cat([begin, end.flip(1)]), torch.cat([end, begin.flip(1)])  # (2B, L)
    never = torch.full_like(count, NEVER)
    never[:, 0] = 0  # without a contact before it the window begins idle
    first = torch.cat([never, count.flip(1)])[..., None]  # (2B, K + 1, 1)
    cut_off, weights = durations[0], lay_out(durations[1:])

    idle = first[:, 0].expand_as(enter)
    before: list[Tensor] = []
    after: list[Tensor] = []
    for n in range(1, K + 1):
        if n > 1:
            ended = F.pad(torch.logcumsumexp(after[-1], dim=1)[:, :-2], (2, 0), value=NEVER)
            idle = torch.logaddexp(first[:, n - 1], ended)
        before.append(idle)  # n - 1 contacts are over, (2B, L); touch-down is next
        after.append(contact_sums(idle + enter, weights, cut_off) + leave)  # the n-th is over, too
    past, over = torch.stack(before), torch.stack(after)  # (K, 2B, L)

    # Of 0, 1, ... K contacts: a softmax rounds what is certain less than a ratio of two sums.
    exactly = count.T + F.pad(log_sum_exp(over[:, :B], dim=2), (0, 0, 1, 0))  # (K + 1, B)
    exists = exactly.softmax(dim=0).flip(0).cumsum(dim=0).flip(0)[1:, :, None]  # the n-th
    starts = past[:, :B] + over[:, B:].flip(0, 2)  # the n-th contact begins at frame 0, ... L - 1
    ends = over[:, :B] + past[:, B:].flip(0, 2)  # it ends before frame 1, ... L
    passed = torch.stack([starts, ends]).softmax(dim=3).cumsum(dim=3)
    if decided:
        exists, passed = ((x > 0.5).to(x.dtype) for x in (exists, passed))
    begun, ended = passed[0], F.pad(passed[1], (1, -1))
    pressed = (exists * (begun - ended)).sum(dim=0)
    return pressed.clamp(CERTAIN, 1 - CERTAIN).logit()


class Lags(NamedTuple):
    """Weights of lags, laid out for `log_convolution` of sequences of L in blocks of BLOCK."""

    inside: Tensor  # logarithms, from frame to frame of a block, (BLOCK, BLOCK)
    across: Tensor  # over the largest, from earlier blocks to each one's, (blocks, L, BLOCK)
    largest: Tensor  # its logarithm


def toeplitz(values: Tensor, otherwise: float) -> Tensor:
    """Return the matrix of values[j - i], (n, n), and of `otherwise` where j < i."""
    n = len(values)
    return F.pad(values, (n - 1, 0), value=otherwise).unfold(0, n, 1).flip(0)


def lay_out(weights: Tensor) -> Lags:
    """Lay out the log weights of lags 0, 1, ... L - 1; L is filled up to whole blocks."""
    missing, largest = -len(weights) % BLOCK, weights.detach().amax(dim=0)
    inside = toeplitz(F.pad(weights, (0, missing))[:BLOCK], NEVER)
    across = toeplitz(F.pad((weights - largest).exp(), (0, missing)), 0)
    frame = torch.arange(len(across), device=weights.device)
    across = across * (frame[:, None] < frame - frame % BLOCK)
    return Lags(inside, across.unflatten(1, (-1, BLOCK)).transpose(0, 1), largest)


def contact_sums(entered: Tensor, weights: Lags, cut_off: Tensor) -> Tensor:
    """Sum over touch-downs at 0, ... L - 1, (N, L), weighed by duration, to lift-offs at 1, ... L.

    In logarithms; a contact from frame 0, or to the window's end, may be cut off.
    """
    from_start, to_end = entered[:, :1], log_sum_exp(entered, dim=1)[:, None]
    cut = torch.cat([from_start.expand_as(entered)[:, 1:], to_end], dim=1)
    return torch.logaddexp(log_convolution(entered, weights), cut + cut_off)


def log_convolution(x: Tensor, weights: Lags) -> Tensor:
    """Return y_j = log Σ_{i<=j} exp(x_i + weights[j - i]) of x, (N, L).

    Whatever range x has: within a block of frames in logarithms, and all that comes from earlier
    blocks as one product of matrices, relative to the largest x there.
    """
    length, size = x.shape[1], weights.across.shape[1]
    blocks = F.pad(x, (0, size - length), value=NEVER).unflatten(1, (-1, BLOCK))
    near = log_sum_exp(blocks[..., None] + weights.inside, dim=2)
    peak = blocks.detach().amax(dim=2).cummax(dim=1).values
    peak = F.pad(peak[:, :-1], (1, 0), value=NEVER)[..., None]  # of all earlier blocks
    scaled = exp_below_0(blocks.flatten(1)[:, None] - peak)  # later blocks are not heard
    far = (scaled.transpose(0, 1) @ weights.across).transpose(0, 1)  # (N, blocks, BLOCK)
    far = far.clamp(min=torch.finfo(far.dtype).tiny).log() + (peak + weights.largest)
    return torch.logaddexp(near, far).flatten(1)[:, :length]
