"""Orthogonal polynomials on evenly spaced points, and what contacts are in them."""

import torch
from torch import Tensor

FLOOR = 1e-12


def legendre_table(max_n: int, degrees: int) -> Tensor:
    """Return orthogonal polynomials on n points for every n; (max_n + 1, max_n, degrees).

    Row n has the discrete Legendre (Gram) polynomials at the middles of n equal parts of [-1, 1],
    of mean square 1, by their three-term recurrence; from degree n on there is none: 0.
    """
    n = torch.arange(max_n + 1, dtype=torch.float64)[:, None]
    i = torch.arange(max_n, dtype=torch.float64)
    s, root = (2 * i + 1 - n) / n.clamp(min=1), torch.zeros_like(n)
    before, last = torch.zeros_like(s), torch.ones_like(s)
    table = [last]
    for k in range(1, degrees):
        rest = s * last - root * before
        root = k * ((n**2 - k**2).clamp(min=0) / (4 * k**2 - 1)).sqrt() / n.clamp(min=1)
        before, last = last, torch.where(n > k, rest / root.clamp(min=FLOOR), 0)
        table.append(last)
    return torch.where((i < n)[..., None], torch.stack(table, dim=-1), 0).float()


def mean_over(member: Tensor) -> Tensor:
    """Return the matrix, (B, S, L), that averages over the frames of each contact.

    member is 1 where a frame is of a contact, (B, L, S).
    """
    return member.mT / member.sum(dim=1)[..., None].clamp(min=1)


def coefficients(mean: Tensor, basis: Tensor, xy: Tensor) -> Tensor:
    """Project x and y, (B, L, axes), on each contact's polynomials; (B, S, axes * degrees).

    mean is `mean_over` of the contacts, basis the polynomials of each frame's, (B, L, degrees).
    """
    return torch.cat([mean @ (x * basis) for x in xy.split(1, dim=-1)], dim=-1)
