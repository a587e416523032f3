"""A contact that returns to where the one before it was, as the second of a double tap."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainlib.gestures import CLICK_DISTANCE

NEAR, FAR = 0.03, 0.6  # std of the gap along an axis, of returns and of others; model units


def by_neighbours(
    c_t: Tensor, noise: Tensor, alpha_bar_t: Tensor, prior: Tensor, decided: Tensor, axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct noisy places by those of the contacts before and after, as far as they are the same.

    For noisy places y_1, y_2 of variances v_1, v_2, where y_2 returns to y_1 but for a gap s,

        E[place_1] = y_1 + w·(y_2 - y_1),  Var = v_1·(1 - w),  w = v_1/(v_1 + v_2 + s²)

    and for y_2 likewise; w counts by the probability of a return, as the gap tells it. Without this
    two taps at one place are never drawn: it saves a denoiser too little squared error to learn it.

    Args:
        c_t: coefficients of contacts in x_t, (B, S, axes * degrees); a place is those of degree 0.
        noise: their variance, (B, S, 1).
        alpha_bar_t: (B, 1, 1).
        prior: log odds that a contact returns, before the gap is seen, (B, S).
        decided: whether the likelier answer counts in place of its probability, (B, 1, 1) bool.
        axes: x, y.

    Returns:
        c_t; its noise, (B, S, axes * degrees), or of single contacts as it was; and the log odds of
        a return of all contacts but the first, (B, S - 1).
    """
    if c_t.shape[1] == 1:
        return c_t, noise, prior[:, 1:]
    c_t = c_t.unflatten(2, (axes, -1))
    gap, both = c_t[..., 0].diff(dim=1), noise[:, 1:] + noise[:, :-1]
    near, far = alpha_bar_t * NEAR**2 + both, alpha_bar_t * FAR**2 + both
    evidence = ((far / near).log() + gap.square() * (1 / far - 1 / near)).sum(dim=2) / 2
    log_odds = prior[:, 1:] + evidence
    share = torch.where(decided[..., 0], log_odds > 0, torch.sigmoid(log_odds))[..., None] / near
    before, after = share * noise[:, 1:], share * noise[:, :-1]  # w of the later, of the earlier
    shift = F.pad(after * gap, (0, 0, 0, 1)) - F.pad(before * gap, (0, 0, 1, 0))
    settled = F.pad(after, (0, 0, 0, 1)) + F.pad(before, (0, 0, 1, 0))
    settled = settled.clamp(max=2 / 3)  # three places that are the same
    degrees = (0, c_t.shape[3] - 1)
    c_t = c_t + F.pad(shift[..., None], degrees)
    noise = noise[..., None] * (1 - F.pad(settled[..., None].expand(-1, -1, axes, 1), degrees))
    return c_t.flatten(2), noise.flatten(2), log_odds


def returned(c_0: Tensor, axes: int) -> Tensor:
    """Tell which contacts but the first are where the one before was, (B, S - 1) bool.

    c_0 is (B, S, axes * degrees), data units.
    """
    return c_0.unflatten(2, (axes, -1))[..., 0].diff(dim=1).norm(dim=2) < CLICK_DISTANCE
