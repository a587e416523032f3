"""The methods of the benchmark that only ask the world model what an action costs.

A method is a function `method(objective, rng, **settings)`, a search as in planning/search.py.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from planning.search import CostFn, Objective, cem, descend, normal, ramp, to_ramp
from planning.tasks import draw_true
from trainlib.gestures import SEQ_LEN

Draw = Callable[[int, int, np.random.Generator], Tensor]  # I, K, rng → (I, K, L, 3)
ROUND = 50  # candidates at a time, at least


def round_of(objective: Objective) -> int:
    """Return how many candidates a method without rounds of its own evaluates at a time."""
    return max(ROUND, 4 * objective.width)


def starts_of(objective: Objective, top: int) -> int:
    """Return from how many starts to descend: more than `top` where a call takes many at once."""
    return max(top, 3 * objective.width // 4)


def draw_noise(num: int, K: int, rng: np.random.Generator) -> Tensor:
    """Draw white noise, uniform in [0, 1], (num, K, L, 3)."""
    return torch.from_numpy(rng.random((num, K, SEQ_LEN, 3), dtype=np.float32))


def as_action(z: Tensor) -> Tensor:
    """Decode raw actions: they are their own parameters."""
    return z


def shoot(objective: Objective, rng: np.random.Generator, draw: Draw = draw_true) -> None:
    """Evaluate random actions."""
    while K := min(round_of(objective), objective.room()):
        objective(draw(objective.num, K, rng))


def adam_zeros(objective: Objective, rng: np.random.Generator, lr: float = 0.1) -> None:
    """Ten Adam steps on the raw action from small noise around zero, as the planner does today."""
    start = 0.1 * normal((objective.num, 1, SEQ_LEN, 3), rng).abs()
    descend(objective, start, as_action, lr, steps=10)


def adam_raw(
    objective: Objective, rng: np.random.Generator, lr: float = 0.03, restarts: int = 1
) -> None:
    """Adam on the raw action from random gestures, `restarts` of them side by side."""
    descend(objective, draw_true(objective.num, restarts, rng), as_action, lr)


def adam_ramp(
    objective: Objective, rng: np.random.Generator, lr: float = 0.03, restarts: int = 8
) -> None:
    """Adam on the six parameters from uniform starts."""
    z = torch.from_numpy(rng.random((objective.num, restarts, 6), dtype=np.float32))
    descend(objective, z, ramp, lr)


def rounds_for(budget: int) -> int:
    """Return the rounds of CEM: 5 for what half a second buys, 10 beyond, as published."""
    return 5 if budget <= 250 else 10


def cem_raw(
    objective: Objective, rng: np.random.Generator, std: float = 0.1, elite_share: float = 0.1
) -> None:
    """CEM on the raw action around a random gesture."""
    population = objective.capacity // rounds_for(objective.budget)
    elites = max(2, round(elite_share * population))
    mean = draw_true(objective.num, 1, rng)[:, 0]
    cem(objective, rng, mean, as_action, std=std, population=population, elites=elites)


def cem_ramp(
    objective: Objective, rng: np.random.Generator, std: float = 0.3, elite_share: float = 0.1
) -> None:
    """CEM on the six parameters from the middle of their range."""
    population = objective.capacity // rounds_for(objective.budget)
    elites = max(2, round(elite_share * population))
    mean = torch.full((objective.num, 6), 0.5)
    cem(objective, rng, mean, ramp, std=std, population=population, elites=elites)


def mppi(
    objective: Objective, rng: np.random.Generator, std: float = 0.1, temperature: float = 1e-3
) -> None:
    """MPPI: weigh actions with smooth noise by exp(-cost/temperature), five rounds.

    Williams et al., arXiv:1509.01149; around a random gesture; noise smoothed over 20 ms.
    """
    mean = draw_true(objective.num, 1, rng)[:, 0]
    while K := min(round_of(objective), objective.room()):
        noise = normal((objective.num * K, 3, SEQ_LEN + 9), rng)
        noise = torch.nn.functional.avg_pool1d(noise, 10, stride=1) * 10**0.5
        noise = noise.transpose(1, 2).unflatten(0, (objective.num, K))
        mean = _softmin_mean(objective, (mean[:, None] + std * noise).clamp(0, 1), temperature)


def annealed(
    objective: Objective, rng: np.random.Generator, lowest: float = 0.05, temperature: float = 1e-3
) -> None:
    """Model-based diffusion without data: weighted means under falling noise, from noise.

    Pan et al., arXiv:2407.01573: it has the noise schedule of a diffusion, but no learned prior.
    """
    mean = draw_noise(objective.num, 1, rng)[:, 0]
    rounds = math.ceil(objective.capacity / round_of(objective))
    for std in 0.5 * (lowest / 0.5) ** (np.arange(rounds) / max(rounds - 1, 1)):
        K = min(round_of(objective), objective.room())
        z = mean[:, None] + float(std) * normal((objective.num, K, SEQ_LEN, 3), rng)
        mean = _softmin_mean(objective, z.clamp(0, 1), temperature)


def _softmin_mean(objective: Objective, z: Tensor, temperature: float) -> Tensor:
    """Evaluate actions (I, K, L, 3); return their mean weighted by exp(-cost/temperature)."""
    weight = torch.softmax(-objective(z) / temperature, dim=1)
    return torch.einsum("ik,iklc->ilc", weight, z)


def shoot_then_refine(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_true,
    *,
    share: float = 0.4,
    top: int = 3,
    lr: float = 0.03,
    raw: bool = False,
    reach: float | None = None,
) -> None:
    """Spend a share of the budget on random actions, then take Adam steps from the best `top`.

    The steps go along the six parameters of each, or along the raw action, no farther than `reach`.
    """
    starts, _ = shoot_for_starts(objective, rng, draw, share, starts_of(objective, top))
    z, decode = (starts, as_action) if raw else (to_ramp(starts), ramp)
    descend(objective, z, decode, lr, reach=reach)


def refine_then_choose(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_true,
    *,
    second_cost: CostFn,
    share: float = 0.4,
    top: int = 4,
    lr: float = 0.03,
) -> None:
    """Refine as `shoot_then_refine` does, and let a second world model choose.

    It chooses among the draws that were refined and what became of them.
    """
    starts, _ = shoot_for_starts(objective, rng, draw, share, starts_of(objective, top))
    kept = math.ceil(2 * starts.shape[1] / objective.width)
    objective.budget -= kept
    z = descend(objective, to_ramp(starts), ramp, lr)
    objective.budget += kept
    ends = starts if z is None else ramp(z)
    objective.choose(torch.cat([starts, ends], dim=1), second_cost)


def shoot_then_cem(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw = draw_true,
    *,
    share: float = 0.4,
    std: float = 0.1,
) -> None:
    """Spend a share of the budget on random actions, then CEM on the ramp around the best."""
    starts, _ = shoot_for_starts(objective, rng, draw, share, top=1)
    mean = to_ramp(starts[:, 0])
    population = max(objective.room() // rounds_for(objective.budget), 10)
    elites = max(3, population // 10)
    cem(objective, rng, mean, ramp, std=std, population=population, elites=elites)


def shoot_for_starts(
    objective: Objective, rng: np.random.Generator, draw: Draw, share: float, top: int
) -> tuple[Tensor, Tensor]:
    """Evaluate share·budget random actions; return the cheapest `top`, (I, top, L, 3), costs."""
    starts, cheapest = torch.empty(objective.num, 0, SEQ_LEN, 3), torch.empty(objective.num, 0)
    wanted = max(math.ceil(top / objective.width), int(share * objective.budget))
    while K := min(
        round_of(objective), objective.room(), (wanted - objective.used) * objective.width
    ):
        new = draw(objective.num, K, rng)
        starts, cheapest = torch.cat([starts, new], 1), torch.cat([cheapest, objective(new)], 1)
        order = cheapest.argsort(dim=1)[:, :top]
        starts = starts[torch.arange(objective.num)[:, None], order]
        cheapest = cheapest.gather(1, order)
    return starts, cheapest
