"""Orthogonal polynomials on evenly spaced points, and what contacts are in them."""

import torch
import torch.nn.functional as F
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


def split_contacts(pressed: Tensor, table: Tensor, max_contacts: int) -> tuple[Tensor, Tensor]:
    """Split windows, (B, L) bool, into their contacts, runs of pressed frames.

    Returns:
        whose each frame is, (B, L, max_contacts) bool, and the shapes of `table` there,
        (B, L, degrees). Frames of contacts beyond max_contacts are nobody's.
    """
    starts = pressed & ~F.pad(pressed, (1, 0))[:, :-1]
    number, device = starts.cumsum(dim=1) * pressed, pressed.device
    member = number[..., None] == torch.arange(1, max_contacts + 1, device=device)
    n = (member * member.sum(dim=1, keepdim=True)).sum(dim=2)  # of the frame's contact, or 0
    frame = torch.arange(pressed.shape[1], device=device)
    since = frame - torch.where(starts, frame, 0).cummax(dim=1).values
    return member, table[n, since]


def mean_over(member: Tensor) -> Tensor:
    """Return the matrix, (B, S, L), that averages over the frames of each contact.

    member is 1 where a frame is of a contact, (B, L, S).
    """
    return member.mT / member.sum(dim=1)[..., None].clamp(min=1)


def coefficients(mean: Tensor, basis: Tensor, xy: Tensor) -> Tensor:
    """Project x and y, (B, L, axes), on each contact's shapes; (B, S, axes * degrees).

    mean is `mean_over` of the contacts, basis the shapes of each frame's, (B, L, degrees).
    """
    return torch.cat([mean @ (x * basis) for x in xy.split(1, dim=-1)], dim=-1)


def curves_at(c: Tensor, member: Tensor, basis: Tensor) -> Tensor:
    """Return x and y, (B, L, axes), of contacts with coefficients c, (B, S, axes * degrees).

    0 where a frame is of no contact; member is 1 where it is of one, (B, L, S), basis as above.
    """
    own = (member @ c).unflatten(2, (-1, basis.shape[2]))  # (B, L, axes, degrees)
    return (own * basis[:, :, None]).sum(dim=-1)
