"""Methods that an expert would try first; none of them is trained.

They search the six numbers of a straight gesture (`ramp`), from points that cover them evenly; or
draw gestures where the screens now and as wanted say that something is or should change.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planning.optimizers import Draw, shoot_for_starts
from planning.places import change_and_content, choose_cells, inside_cells
from planning.search import BACKWARD, FORWARD, Adam, Objective, ramp, to_ramp
from planning.world import GRID
from trainlib.errors import UserError
from trainlib.gestures import SEQ_LEN

SHORTEST, LONGEST = 0.02, 0.3  # of a drawn gesture, as shares of the window
TAPS = 0.4  # share of drawn gestures that do not move


def sobol(num: int, K: int, dim: int, rng: np.random.Generator) -> Tensor:
    """Cover [0, 1]^dim evenly, each instance by a shift of its own, (num, K, dim)."""
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=int(rng.integers(2**31)))
    shift = torch.from_numpy(rng.random((num, 1, dim), dtype=np.float32))
    return (engine.draw(K, dtype=torch.float32) + shift) % 1


def draw_sobol(num: int, K: int, rng: np.random.Generator) -> Tensor:
    """Draw straight gestures whose six numbers are even in their ranges, (num, K, L, 3)."""
    return ramp(sobol(num, K, 6, rng))


def draw_structured(num: int, K: int, rng: np.random.Generator) -> Tensor:
    """Draw taps and swipes of plausible lengths, evenly in all they differ in, (num, K, L, 3)."""
    u = sobol(num, K, 7, rng)
    begin, end, is_tap = u[..., :2], u[..., 2:4], u[..., 4:5] < TAPS
    return ramp(_timed(begin, torch.where(is_tap, begin, end), u[..., 5:]))


def _timed(begin: Tensor, end: Tensor, u: Tensor) -> Tensor:
    """Join ends, (..., 2) each, to six numbers; u, (..., 2) in [0, 1), says when and how long.

    Both are at whole frames, so that gestures begin and end exactly where they should.
    """
    share = SHORTEST + (LONGEST - SHORTEST) * u[..., 1:]
    times = torch.cat([u[..., :1] * (1 - share), share], dim=-1)
    first, last = (times * (SEQ_LEN - 1)).round().cumsum(dim=-1).split(1, dim=-1)
    return torch.cat([begin, first / (SEQ_LEN - 1), end, last / (SEQ_LEN - 1)], dim=-1)


def coordinate_search(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_sobol,
    *,
    share: float = 0.4,
    step: float = 0.1,
) -> None:
    """Spend a share of the budget on draws; then move the best along one of six axes at a time.

    A step either way, whichever is cheaper; it is halved after six axes without an improvement.
    """
    starts, costs = shoot_for_starts(objective, rng, draw, share, 1)
    z, cost = to_ramp(starts[:, 0]), costs[:, 0]
    steps, improved = torch.full_like(cost, step), torch.zeros_like(cost, dtype=torch.bool)
    axis, rows = 0, torch.arange(objective.num)
    while objective.room() >= 2:
        both = z[:, None].repeat(1, 2, 1)
        both[..., axis] += steps[:, None] * torch.tensor([1.0, -1.0])
        both = both.clamp(0, 1)
        found, j = objective(ramp(both)).nan_to_num(nan=math.inf).min(dim=1)
        better = found < cost
        z = torch.where(better[:, None], both[rows, j], z)
        cost, improved = torch.where(better, found, cost), improved | better
        axis = (axis + 1) % 6
        if axis == 0:
            steps = torch.where(improved, steps, steps / 2)
            improved = torch.zeros_like(improved)


def cma_es(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_sobol,
    *,
    share: float = 0.4,
    std: float = 0.1,
    restarts: int = 5,
) -> None:
    """Spend a share of the budget on draws; then CMA-ES along the six numbers of the best.

    Hansen, arXiv:1604.00772, by his package; a run that has converged starts again from the next
    best draw.

    Args:
        objective: the cost and its budget.
        rng: source of noise.
        draw: the draws.
        share: of the budget, for drawing.
        std: of the first generation.
        restarts: draws to start again from, at most.

    Raises:
        UserError: the package `cma` is missing.
    """
    try:
        import cma
    except ImportError:
        raise UserError("CMA-ES needs the package cma: pip install cma") from None
    starts = to_ramp(shoot_for_starts(objective, rng, draw, share, restarts)[0])
    population = 9 if objective.width == 1 else objective.width
    options = {"bounds": [0, 1], "popsize": population, "verbose": -9}

    def begin(z: Tensor) -> "cma.CMAEvolutionStrategy":
        seed = int(rng.integers(1, 2**31))
        return cma.CMAEvolutionStrategy(z.double().numpy(), std, {**options, "seed": seed})

    runs, tried = [begin(z[0]) for z in starts], [1] * objective.num
    while objective.room() >= population:
        asked = [run.ask() for run in runs]
        z = torch.from_numpy(np.array(asked)).float()
        costs = objective(ramp(z)).nan_to_num(nan=1e9).double().numpy()
        for i, (run, points, cost) in enumerate(zip(runs, asked, costs, strict=True)):
            run.tell(points, list(cost))
            if run.stop() and tried[i] < restarts:
                runs[i], tried[i] = begin(starts[i, tried[i]]), tried[i] + 1


def halving(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_sobol,
    *,
    share: float = 0.3,
    lr: float = 0.03,
    starts: int = 8,
) -> None:
    """Spend a share of the budget on draws; then Adam from the best, half of them at a time.

    Successive halving (Jamieson & Talwalkar, arXiv:1502.07943): rounds of equal budget, after each
    of which the cheaper half goes on, until one is left.
    """
    best = shoot_for_starts(objective, rng, draw, share, max(starts, objective.width))[0]
    adam, each = Adam(to_ramp(best), lr), FORWARD + BACKWARD
    for rounds_left in range(best.shape[1].bit_length(), 0, -1):
        R = adam.z.shape[1]
        until = objective.used + objective.left // rounds_left
        costs = None
        while objective.used + math.ceil(R / objective.width) * each <= until:
            costs, gradient = objective.gradient(adam.z, ramp)
            adam.step(gradient)
        if costs is not None and R > 1:
            adam.keep(costs.nan_to_num(nan=math.inf).argsort(dim=1)[:, : R // 2])
    if objective.room() >= adam.z.shape[1]:
        objective(ramp(adam.z))


def draw_at_changes(
    num: int, K: int, rng: np.random.Generator, *, tokens: Tensor, goal_tokens: Tensor
) -> Tensor:
    """Draw gestures from where the screen should change, or where something is, to a change.

    Args:
        num: I.
        K: draws for each.
        rng: source of noise.
        tokens: of the screens now, (I, GRID², features), row by row.
        goal_tokens: of the screens wanted, likewise.

    Returns: (num, K, L, 3). Half of them touch down in a token that differs from that wanted, by
        how much it does, the others in one by how much it differs from the median token; TAPS of
        all stay there, the others end in a token that differs from that wanted.
    """
    change, content = change_and_content(tokens, goal_tokens)
    u = sobol(num, K, 10, rng)
    at_change = choose_cells(change, u[..., 0])
    first = torch.where(u[..., 1] < 0.5, at_change, choose_cells(content, u[..., 2]))
    last = choose_cells(change, u[..., 3])
    begin = inside_cells(first, u[..., 4:6], GRID, GRID)
    end = inside_cells(last, u[..., 6:8], GRID, GRID)
    is_tap = torch.from_numpy(rng.random((num, K, 1), dtype=np.float32)) < TAPS
    return ramp(_timed(begin, torch.where(is_tap, begin, end), u[..., 8:]))


def at_changes(method: Callable[..., None]) -> Callable[..., None]:
    """Let a method that draws do it by `draw_at_changes`; it takes the tokens too."""

    def run(
        objective: Objective,
        rng: np.random.Generator,
        *,
        tokens: Tensor,
        goal_tokens: Tensor,
        **settings: Any,
    ) -> None:
        draw = partial(draw_at_changes, tokens=tokens, goal_tokens=goal_tokens)
        method(objective, rng, draw=draw, **settings)

    return run
