"""Where on the screen a gesture for a goal may begin and end, and drawn gestures moved there.

Tokens that should change say where, whatever a world model knows of gestures:
`planner.plan(cost_fn, places=changed_places(tokens, goal_tokens))`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from planning.search import Bend, to_ramp
from trainlib.errors import UserError
from trainlib.gestures import PRESSED
from trainlib.tensors import as_tensor, describe

STAYS = 0.02  # a gesture whose ends are nearer than this is a touch: moved as a whole
CHOICE = 16  # gestures of which the one is moved that needs it least


def changed_places(tokens: Tensor | np.ndarray, goal_tokens: Tensor | np.ndarray) -> Tensor:
    """Return how likely a gesture begins and ends in each token, (2, G, G), each map of sum 1.

    It begins with equal odds where tokens differ from those wanted, or where something is: where
    they differ from the median token. It ends where they differ from those wanted. What the median
    token differs by is noise, and is taken off.

    Args:
        tokens: of the screen now, (G², D), row by row.
        goal_tokens: of the screen wanted, likewise.

    Raises:
        UserError: they are no square screens of one shape.
    """
    now = as_tensor("tokens", tokens).detach().cpu().double()
    goal = as_tensor("goal_tokens", goal_tokens).detach().cpu().double()
    side = math.isqrt(now.shape[0]) if now.ndim == 2 else 0
    if goal.shape != now.shape or now.ndim != 2 or side**2 != len(now) or not side:
        raise UserError(
            "tokens and goal_tokens must be alike and of a square screen, (G², D), got "
            f"{describe(tokens)} and {describe(goal_tokens)}"
        )
    change, content = change_and_content(now[None], goal[None])
    both = torch.stack([(change + content)[0] / 2, change[0]])
    return both.view(2, side, side).float()


def change_and_content(tokens: Tensor, goal_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh tokens by how they differ from those wanted, and from the median token.

    Args:
        tokens: of the screens now, (I, N, D).
        goal_tokens: of the screens wanted, likewise.

    Returns: two times (I, N), each of sum 1; even where nothing differs.
    """
    change = (goal_tokens - tokens).abs().sum(dim=-1)
    content = (tokens - tokens.median(dim=1, keepdim=True).values).abs().sum(dim=-1)
    above = [(x - x.median(dim=1, keepdim=True).values).clamp(min=0) for x in (change, content)]
    shares = [(x + 1e-12) / (x + 1e-12).sum(dim=1, keepdim=True) for x in above]
    return shares[0], shares[1]


def choose_cells(weight: Tensor, u: Tensor) -> Tensor:
    """Choose cells by weight, (I, n), with u in [0, 1), (I, K) → index, (I, K)."""
    below = (weight.double().cumsum(dim=1) / weight.double().sum(dim=1, keepdim=True)).contiguous()
    return torch.searchsorted(below, u.double().contiguous()).clamp(max=weight.shape[1] - 1)


def inside_cells(cell: Tensor, u: Tensor, rows: int, columns: int) -> Tensor:
    """Return places in cells, (..., 2), screen units, from index (...) and u, (..., 2)."""
    corner = torch.stack([cell % columns, cell // columns], dim=-1)
    return (corner + u) / torch.tensor([columns, rows])


def draw_places(places: Tensor, num: int, rng: np.random.Generator) -> Tensor:
    """Draw where gestures begin and end by their maps, (2, rows, columns) → (num, 2, 2)."""
    u = torch.from_numpy(rng.random((num, 2, 3), dtype=np.float32))
    cell = choose_cells(places.flatten(1), u[..., 0].T).T
    return inside_cells(cell, u[..., 1:], *places.shape[1:])


def fitting(choices: Tensor, wanted: Tensor) -> Tensor:
    """Choose gestures that need little moving; of as many touches as there are.

    Args:
        choices: (num, C, L, 3).
        wanted: where they shall begin and end, (num, 2, 2).

    Returns: (num, L, 3): the first of each row if it is a touch; else the one whose way from end to
        end is most like the way wanted.
    """
    ends = to_ramp(choices).unflatten(-1, (2, 3))[..., :2]
    ways = ends.diff(dim=-2)[..., 0, :]  # (num, C, 2)
    touches = torch.linalg.vector_norm(ways, dim=-1) < STAYS
    off = torch.linalg.vector_norm(ways - wanted.diff(dim=1), dim=-1)
    best = off.masked_fill(touches, math.inf).argmin(dim=1)
    best = torch.where(touches[:, 0], 0, best)
    return choices[torch.arange(len(choices)), best]


def moved_to(actions: Tensor, wanted: Tensor, free: Tensor | None = None) -> Tensor:
    """Move gestures, (num, L, 3), so that they begin and end where it is wanted, (num, 2, 2).

    In between they follow, with all their detail. Touches move as a whole, an end that is held by
    frames which are not free stays, and what touches nowhere is left.

    Args:
        actions: in the data format.
        wanted: screen units.
        free: (L,) bool, the frames that may change; None = all.
    """
    touching = (actions[..., 2] > PRESSED).any(dim=-1)
    if not touching.any():
        return actions
    bend = Bend(actions[touching], 2, free)
    z, (begin, end) = bend.z.clone(), wanted[touching].unbind(dim=1)
    way, held = z[:, 1, :2] - z[:, 0, :2], bend.is_held[:, :1]
    stays = (torch.linalg.vector_norm(way, dim=-1, keepdim=True) < STAYS) & ~held
    z[..., :2] = torch.stack([begin, torch.where(stays, begin + way, end)], dim=1)
    moved = actions.clone()
    moved[touching] = bend(z)
    return moved
