"""Idle, contact, idle, contact, ...: what all frames say of each, and how long contacts last."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEVER = -1e6  # log weight of what cannot be
CERTAIN = 1e-6  # probabilities nearer to 0 or 1 are rounding
BLOCK = 12  # frames that are summed up at once


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
    press = torch.cat([log_odds, log_odds.flip(1)])
    down, up = F.pad(down, (0, 1)), F.pad(up, (0, 1))  # before frame 0, ... L - 1, and after all
    begin, end = torch.cat([down, up.flip(1)]), torch.cat([up, down.flip(1)])
    total = F.pad(press.cumsum(dim=1), (1, 0))  # (2B, L + 1)
    never = torch.full_like(count, NEVER)
    never[:, 0] = 0  # without a contact before it the window begins idle
    first = torch.cat([never, count.flip(1)])[..., None]  # (2B, K + 1, 1)
    cut_off, weights = durations[0], toeplitz(durations[1:])

    idle, before, after = first[:, 0].expand_as(total), [], []
    for n in range(1, K + 1):
        before.append(idle[:, :-1])  # n - 1 contacts are over, (2B, L); touch-down is next
        sums = contact_sums((idle + begin - total)[:, :-1], weights, cut_off)
        left = sums + (end + total)[:, 1:]
        after.append(left)  # the n-th is over, too, at frame 1, ... L
        ended = F.pad(torch.logcumsumexp(left, dim=1)[:, :-1], (2, 0), value=NEVER)
        idle = torch.logaddexp(first[:, n], ended)
    past, over = torch.stack(before), torch.stack(after)  # (K, 2B, L)
    starts = past[:, :B] + over[:, B:].flip(0, 2)  # the n-th contact begins at frame 0, ... L - 1
    ends = over[:, :B] + past[:, B:].flip(0, 2)  # it ends before frame 1, ... L

    # Of 0, 1, ... K contacts: a softmax rounds what is certain less than a ratio of two sums.
    exactly = count.T + F.pad(over[:, :B].logsumexp(dim=2), (0, 0, 1, 0))  # (K + 1, B)
    exists = exactly.softmax(dim=0).flip(0).cumsum(dim=0).flip(0)[1:, :, None]  # the n-th
    begun, ended = starts.softmax(dim=2), F.pad(ends.softmax(dim=2), (1, -1))
    begun, ended = begun.cumsum(dim=2), ended.cumsum(dim=2)
    if decided:
        exists, begun, ended = ((x > 0.5).to(x.dtype) for x in (exists, begun, ended))
    pressed = (exists * (begun - ended)).sum(dim=0)
    return pressed.clamp(CERTAIN, 1 - CERTAIN).logit()


class Toeplitz(NamedTuple):
    """Weights of lags, laid out for `log_convolution` in blocks of BLOCK frames."""

    inside: Tensor  # logarithms, from frame to frame of a block, (BLOCK, BLOCK)
    across: Tensor  # over the largest, from all frames to a later block's, (blocks, L, BLOCK)
    largest: Tensor  # its logarithm


def toeplitz(weights: Tensor) -> Toeplitz:
    """Lay out the log weights of lags 0, 1, ... L - 1 for sequences of L."""
    last = len(weights) - 1
    frame = torch.arange(-(-len(weights) // BLOCK) * BLOCK, device=weights.device)
    to, start = frame[:BLOCK], frame[::BLOCK, None, None]
    lag = to[:, None] - to
    inside = torch.where(lag >= 0, weights[lag.clamp(0, last)], NEVER)
    lag, largest = start + to - frame[:, None], weights.detach().amax(dim=0)
    across = (weights - largest).exp()[lag.clamp(0, last)]
    return Toeplitz(inside, torch.where(frame[:, None] < start, across, 0), largest)


def contact_sums(entered: Tensor, weights: Toeplitz, cut_off: Tensor) -> Tensor:
    """Sum over touch-downs at 0, ... L - 1, (N, L), weighed by duration, to lift-offs at 1, ... L.

    In logarithms; a contact from frame 0, or to the window's end, may be cut off.
    """
    from_start, to_end = entered[:, :1], entered.logsumexp(dim=1, keepdim=True)
    cut = torch.cat([from_start.expand_as(entered)[:, 1:], to_end], dim=1)
    return torch.logaddexp(log_convolution(entered, weights), cut + cut_off)


def log_convolution(x: Tensor, weights: Toeplitz) -> Tensor:
    """Return y_j = log Σ_{i<=j} exp(x_i + weights[j - i]) of x, (N, L).

    Whatever range x has: within a block of frames in logarithms, and all that comes from earlier
    blocks as one product of matrices, relative to the largest x there.
    """
    length = x.shape[1]
    blocks = F.pad(x, (0, weights.across.shape[1] - length), value=NEVER).unflatten(1, (-1, BLOCK))
    near = (blocks[:, :, None] + weights.inside).logsumexp(dim=3)
    peak = blocks.detach().amax(dim=2).cummax(dim=1).values
    peak = F.pad(peak[:, :-1], (1, 0), value=NEVER)[..., None]  # of all earlier blocks
    scaled = (blocks.flatten(1)[:, None] - peak).clamp(max=0).exp()  # (N, blocks, L)
    far = (scaled.transpose(0, 1) @ weights.across).transpose(0, 1)
    far = far.clamp(min=torch.finfo(far.dtype).tiny).log() + peak + weights.largest
    return torch.logaddexp(near, far).flatten(1)[:, :length]
