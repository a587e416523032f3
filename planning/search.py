"""Search with an evaluation budget: an objective, the six-parameter ramp, Adam and CEM along it.

What the planner and every method of the benchmark share. A search plans for I instances at once:
candidates are (I, K, L, 3), their costs (I, K). It spends evaluations of the objective and returns
nothing: its answer is the cheapest candidate that it had evaluated, at every moment.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainlib.gestures import PRESSED, SEQ_LEN

CostFn = Callable[[Tensor], Tensor]  # (I, K, L, 3) → (I, K)
FORWARD, BACKWARD = 1, 2  # evaluations that they count


class Objective:
    """A cost function with an evaluation budget, a clock and the best candidate so far.

    Args:
        cost_fn: costs of candidates in data units, (I, K, L, 3) → (I, K).
        num: I.
        budget: evaluations per instance; a forward pass counts one, a backward pass two.
        milestones: evaluations after which to keep the best so far.
        seconds: wall-clock after which nothing is left either.

    Attributes:
        used: evaluations spent per instance.
        best, best_cost: the cheapest candidate, (I, L, 3), and its cost, (I,).
        kept: milestone → (best, best_cost, seconds since the start).
        world_seconds: seconds inside cost_fn and its gradient.
    """

    def __init__(
        self,
        cost_fn: CostFn,
        num: int,
        budget: int,
        milestones: Sequence[int] = (),
        seconds: float = math.inf,
    ) -> None:
        self.cost_fn, self.num, self.budget = cost_fn, num, budget
        self.used, self.world_seconds = 0, 0.0
        plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults
        self.best = torch.zeros(num, SEQ_LEN, 3, **plain)
        self.best_cost = torch.full((num,), math.inf, **plain)
        self.kept: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._pending = sorted(milestones)
        self._start = time.perf_counter()
        self._deadline, self._longest = self._start + seconds, 0.0

    @property
    def left(self) -> int:
        """Evaluations left per instance; 0 when one more call would not end in time."""
        late = time.perf_counter() + self._longest > self._deadline
        return 0 if late else self.budget - self.used

    def __call__(self, actions: Tensor) -> Tensor:
        """Return the costs of candidates, (I, K, L, 3) → (I, K), at one evaluation each."""
        began = time.perf_counter()
        with torch.no_grad():
            costs = self.cost_fn(actions)
        self._add_seconds(time.perf_counter() - began)
        self._record(actions, costs, FORWARD)
        return costs

    def gradient(self, z: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return d cost / d z, like z, for candidates decode(z); three evaluations each.

        Args:
            z: (I, K, ...).
            decode: z → (I, K, L, 3); None = z are actions.
        """
        began = time.perf_counter()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            actions = z if decode is None else decode(z)
            costs = self.cost_fn(actions)
            (gradient,) = torch.autograd.grad(costs.sum(), z)
        self._add_seconds(time.perf_counter() - began)
        self._record(actions.detach(), costs.detach(), FORWARD + BACKWARD)
        return gradient

    def guidance(self, actions: Tensor) -> Tensor:
        """Return costs to be differentiated by a sampler, (I*K, L, 3) → (I*K,); three each.

        The backward pass happens elsewhere: its time is taken to be twice that of the forward.
        """
        began = time.perf_counter()
        batch = actions.unflatten(0, (self.num, -1))
        costs = self.cost_fn(batch)
        self._add_seconds((FORWARD + BACKWARD) * (time.perf_counter() - began))
        self._record(batch.detach(), costs.detach(), FORWARD + BACKWARD)
        return costs.flatten()

    def _add_seconds(self, seconds: float) -> None:
        self.world_seconds += seconds
        self._longest = max(self._longest, seconds)

    def finish(self) -> None:
        """Keep the best so far for the milestones that were not reached."""
        self._keep_until(math.inf)

    def _keep_until(self, used: float) -> None:
        while self._pending and self._pending[0] < used:
            elapsed = time.perf_counter() - self._start
            self.kept[self._pending.pop(0)] = (self.best.clone(), self.best_cost.clone(), elapsed)

    def _record(self, actions: Tensor, costs: Tensor, each: int) -> None:
        K = costs.shape[1]
        assert self.used + K * each <= self.budget, "a method overspent its budget"
        done = 0
        for milestone in [m for m in self._pending if m < self.used + K * each]:
            affordable = (milestone - self.used) // each
            self._improve(actions[:, done:affordable], costs[:, done:affordable])
            done = max(done, affordable)
            self._keep_until(milestone + 1)
        self._improve(actions[:, done:], costs[:, done:])
        self.used += K * each

    def _improve(self, actions: Tensor, costs: Tensor) -> None:
        if costs.shape[1] == 0:
            return
        cost, j = costs.nan_to_num(nan=math.inf, posinf=math.inf).min(dim=1)
        better = cost < self.best_cost
        self.best[better] = actions[better.nonzero()[:, 0], j[better]].float()
        self.best_cost = torch.where(better, cost, self.best_cost)


# ----------------------------------------------------------------------------------------
# RAMP — six numbers ↔ an action
# ----------------------------------------------------------------------------------------


def ramp(z: Tensor, sharpness: float = 1000.0) -> Tensor:
    """Turn six numbers into an action: one contact along a straight line, differentiable.

    Args:
        z: (..., 6) = [x, y, time of touch-down, x, y, time of lift-off], each in [0, 1].
        sharpness: of the press, which is the product of two sigmoids of time. (At 200 six frames
            are half pressed, and count as two touch-downs in the soft world.)

    Returns: (..., L, 3); x and y hold still while idle.
    """
    begin, end = z[..., None, :2], z[..., None, 3:5]
    times = z[..., [2, 5]].sort(dim=-1).values[..., None, :]
    r0, r1 = times[..., 0], times[..., 1]
    t = torch.linspace(0, 1, SEQ_LEN, dtype=z.dtype, device=z.device)
    press = torch.sigmoid(sharpness * (t - r0)) * torch.sigmoid(sharpness * (r1 - t))
    along = ((t - r0) / (r1 - r0 + 1e-3)).clamp(0, 1)[..., None]
    return torch.cat([begin + (end - begin) * along, press[..., None]], dim=-1)


def to_ramp(actions: Tensor) -> Tensor:
    """Read the six numbers of `ramp` off the first and last pressed frame; (..., L, 3) → (..., 6).

    An action without a press becomes a touch of half the window in the corner (0, 0).
    """
    pressed = actions[..., 2] > PRESSED
    L = pressed.shape[-1]
    first = pressed.int().argmax(dim=-1)
    last = L - 1 - pressed.flip(-1).int().argmax(dim=-1)
    frames = torch.stack([first, last], dim=-1)
    index = frames[..., None].expand(*first.shape, 2, 2)
    ends = actions[..., :2].gather(-2, index)  # (..., 2 ends, xy)
    when = (frames.to(ends.dtype) + ends.new_tensor([-0.5, 0.5])) / (L - 1)
    when = torch.where(pressed.any(dim=-1, keepdim=True), when, ends.new_tensor([0.25, 0.75]))
    return torch.cat([ends, when[..., None]], dim=-1).flatten(-2)


# ----------------------------------------------------------------------------------------
# SEARCHES
# ----------------------------------------------------------------------------------------


def descend(
    objective: Objective,
    z: Tensor,
    decode: Callable[[Tensor], Tensor],
    lr: float,
    steps: int | None = None,
) -> None:
    """Take Adam steps from the starts z, (I, R, ...), within [0, 1], until the budget is spent."""
    z = z.clone()
    optimizer = torch.optim.Adam([z], lr=lr)
    price = z.shape[1] * (FORWARD + BACKWARD)
    while objective.left >= price and steps != 0:
        z.grad = objective.gradient(z, decode).nan_to_num(0, 0, 0)  # the others still move
        optimizer.step()
        z.clamp_(0, 1)
        steps = None if steps is None else steps - 1
    if FORWARD * z.shape[1] <= objective.left:
        objective(decode(z))


def normal(shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Draw standard normal numbers, float32."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def cem(
    objective: Objective,
    rng: np.random.Generator,
    mean: Tensor,
    decode: Callable[[Tensor], Tensor],
    *,
    std: float,
    population: int,
    elites: int,
    momentum: float = 0.15,
) -> None:
    """Cross-entropy method from N(mean, std²), mean (I, ...), clamped to [0, 1].

    Mean and std move to those of the elites, but for the share `momentum` (as V-JEPA-2-AC's code).
    """
    spread = torch.full_like(mean, std)
    while objective.left:
        K = min(population, objective.left)
        noise = normal((objective.num, K, *mean.shape[1:]), rng)
        z = (mean[:, None] + spread[:, None] * noise).clamp(0, 1)
        order = objective(decode(z)).argsort(dim=1)[:, : min(elites, K)]
        best = z[torch.arange(objective.num)[:, None], order]  # (I, elites, ...)
        mean = momentum * mean + (1 - momentum) * best.mean(dim=1)
        spread = momentum * spread + (1 - momentum) * best.std(dim=1, correction=0)
