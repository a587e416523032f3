"""Search with an evaluation budget: an objective, gestures as a few knots, Adam and CEM along them.

What the planner and every method of the benchmark share. A search plans for I instances at once:
candidates are (I, K, L, 3), their costs (I, K). It spends evaluations of the objective and returns
nothing: its answer is the cheapest candidate that it had evaluated, at every moment.

Whatever a cost function is given is a gesture in the data format: x and y in [0, 1], press 0 or 1,
all zero while idle. A world model has learned from nothing else. The objective rounds candidates;
gradients pass straight through the rounding (Bengio et al., arXiv:1308.3432).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train_diffusion_ddim import to_gesture
from trainlib.gestures import PRESSED, SEQ_LEN

CostFn = Callable[[Tensor], Tensor]  # (I, K, L, 3) → (I, K)
Clock = Callable[[], float]  # seconds since any moment
FORWARD, BACKWARD = 1, 2  # evaluations that they count
FADE = 0.8  # of a price, from search to search
LARGEST = 32  # candidates of one call when the clock decides: what a GPU takes at once
REACH = 0.05  # how far from a draw a gradient of a learned model is trusted, in knots
SHARPNESS = 200.0  # of a press as gradients see it: they reach a few frames beyond its edges


class Prices:
    """Seconds that calls took by their size, from which the next one is priced.

    Between measured sizes a price is interpolated, below them it is the smallest's, and above
    them it grows in proportion, as if nothing ran in parallel.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._old: set[int] = set()  # sizes that were not measured since they were carried

    def add(self, num: int, seconds: float) -> None:
        """Note a call with `num` candidates; a slow one counts at once, a fast one by half."""
        before = seconds if num in self._old else self._seen.get(num, seconds)
        self._seen[num] = max(seconds, (before + seconds) / 2)
        self._old -= {num}

    def carried(self, ratio: float, default: "Prices | None" = None) -> "Prices":
        """Return the prices to begin another search with, times `ratio`.

        The price of a size that the last search did not measure falls from search to search, so
        that one slow call does not deter from it for ever; but not below its default.

        Args:
            ratio: how much slower the machine is than before.
            default: what calls should take of sizes that are not measured; None = by those that
                the last search measured, nothing if there are none.
        """
        prices = Prices()
        if default is None:
            default = Prices()
            default._seen = {n: ratio * s for n, s in self._seen.items() if n not in self._old}
        for num, seconds in self._seen.items():
            prices._seen[num] = ratio * seconds
            if num in self._old:
                usual = min(ratio * seconds, default.upto(num)[-1])
                prices._seen[num] = usual + FADE * (ratio * seconds - usual)
        prices._old = set(prices._seen)
        return prices

    def times(self, factor: float) -> "Prices":
        """Return the same prices, each `factor` times as high."""
        prices = Prices()
        prices._seen = {num: factor * seconds for num, seconds in self._seen.items()}
        return prices

    def upto(self, num: int) -> np.ndarray:
        """Return the seconds of calls with 1 to `num` candidates, (num,); 0 if none is known."""
        sizes = np.arange(1, num + 1)
        if not self._seen:
            return np.zeros(num)
        known = sorted(self._seen)
        prices = np.interp(sizes, known, [self._seen[k] for k in known])
        return prices * np.maximum(sizes / known[-1], 1)

    def __bool__(self) -> bool:
        return bool(self._seen)


def largest_power(fits: np.ndarray) -> int:
    """Return the largest power of two among 1, 2, ..., len(fits) that fits; 0 if none does."""
    return max((2**i for i in range(len(fits).bit_length()) if fits[2**i - 1]), default=0)


class Objective:
    """A cost function with an evaluation budget, a clock and the best candidate so far.

    Args:
        cost_fn: costs of gestures in the data format, (I, K, L, 3) → (I, K).
        num: I.
        budget: evaluations per instance; a forward pass counts one, a backward pass two.
        milestones: evaluations after which to keep the best so far.
        seconds: wall-clock in which every call should end.
        width: candidates of one call that count as one: 1 for a machine that takes them one after
            the other, more for one that takes as many at once, where depth is what costs.
        prices: `call_prices` of a search before. The first call shows how much slower or faster
            than then all calls are.
        clock: of `seconds`; None = wall-clock.

    Attributes:
        used: evaluations spent per instance.
        best, best_cost: the cheapest candidate, (I, L, 3), the first of equals, and its cost, (I,).
        kept: milestone → (best, best_cost, seconds since the start).
        world_seconds: seconds inside cost_fn and its gradient.
        not_finite: costs that were not finite.
        call_prices: what calls took, by the evaluations of a candidate.
    """

    def __init__(
        self,
        cost_fn: CostFn,
        num: int,
        budget: int,
        milestones: Sequence[int] = (),
        seconds: float = math.inf,
        *,
        width: int = 1,
        prices: dict[int, Prices] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = time.perf_counter if clock is None else clock
        self.cost_fn, self.num, self.budget, self.width = cost_fn, num, budget, width
        self.used, self.world_seconds, self.not_finite = 0, 0.0, 0
        plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults
        self.best = torch.zeros(num, SEQ_LEN, 3, **plain)
        self.best_cost = torch.full((num,), math.inf, **plain)
        self.kept: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._pending = sorted(milestones)
        self._start = self.clock()
        self._deadline = self._start + seconds
        self.call_prices = prices or {FORWARD: Prices(), FORWARD + BACKWARD: Prices()}

    @property
    def left(self) -> int:
        """Evaluations left per instance."""
        return self.budget - self.used

    @property
    def capacity(self) -> int:
        """Candidates per instance that the whole budget can evaluate."""
        return self.budget * self.width

    @property
    def seconds_left(self) -> float:
        """Wall-clock left; infinite without a deadline."""
        return self._deadline - self.clock()

    def prices(self, num: int, each: int = FORWARD) -> np.ndarray:
        """Return what calls with 1 to `num` candidates should take, (num,), seconds.

        A gradient that was never measured is priced by what it counts.
        """
        own = self.call_prices[each]
        return own.upto(num) if own else each * self.call_prices[FORWARD].upto(num)

    def room(self, each: int = FORWARD) -> int:
        """Return how many candidates the next call may hold: within the budget, and in time.

        With a deadline it is a power of two: a model prepares itself for every size it meets.

        Args:
            each: evaluations of a candidate: FORWARD, or with its gradient FORWARD + BACKWARD.
        """
        affordable = self.left // each * self.width
        if math.isinf(self._deadline):
            return affordable
        fits = self.prices(min(affordable, LARGEST), each) <= self.seconds_left
        return largest_power(fits)

    def __call__(self, actions: Tensor) -> Tensor:
        """Return the costs of candidates, (I, K, L, 3) → (I, K), at one evaluation each.

        Candidates are rounded to the data format before.
        """
        began = self.clock()
        actions = to_gesture(actions)
        with torch.no_grad():
            costs = self.cost_fn(actions)
        self._record(actions, costs, FORWARD, self.clock() - began)
        return costs

    def gradient(
        self, z: Tensor, decode: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return costs, (I, K), and d cost / d z of candidates decode(z); three evaluations each.

        RuntimeError, as of torch, if the costs have none; one evaluation each.

        Args:
            z: (I, K, ...).
            decode: z → (I, K, L, 3); None = z are actions. They are rounded to the data format.
        """
        began = self.clock()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            actions = as_gesture(z if decode is None else decode(z))
            costs, each = self.cost_fn(actions), FORWARD
            try:
                (gradient,) = torch.autograd.grad(costs.sum(), z)
                each += BACKWARD
            finally:
                seconds = self.clock() - began
                self._record(actions.detach(), costs.detach(), each, seconds)
        return costs.detach(), gradient

    def guidance(self, actions: Tensor) -> Tensor:
        """Return costs to be differentiated by a sampler, (I*K, L, 3) → (I*K,); three each.

        The actions are rounded to the data format before. The backward pass happens elsewhere: its
        time is taken to be twice that of the forward.
        """
        began = self.clock()
        batch = as_gesture(actions).unflatten(0, (self.num, -1))
        costs = self.cost_fn(batch)
        seconds = (FORWARD + BACKWARD) * (self.clock() - began)
        self._record(batch.detach(), costs.detach(), FORWARD + BACKWARD, seconds)
        return costs.flatten()

    def choose(self, actions: Tensor, cost_fn: CostFn) -> None:
        """Let another cost function choose the answer, among (I, K, L, 3) alone; one each."""
        own, self.cost_fn = self.cost_fn, cost_fn
        self.best_cost = torch.full_like(self.best_cost, math.inf)
        try:
            self(actions)
        finally:
            self.cost_fn = own

    def finish(self) -> None:
        """Keep the best so far for the milestones that were not reached."""
        self._keep_until(math.inf)

    def _keep_until(self, used: float) -> None:
        while self._pending and self._pending[0] < used:
            elapsed = self.clock() - self._start
            self.kept[self._pending.pop(0)] = (self.best.clone(), self.best_cost.clone(), elapsed)

    def _record(self, actions: Tensor, costs: Tensor, each: int, seconds: float) -> None:
        """Count a call that took `seconds`, and keep what is better."""
        K = costs.shape[1]
        used = self.used + math.ceil(K / self.width) * each
        assert used <= self.budget, "a method overspent its budget"
        if self.used == 0:
            known = self.prices(K, each)[-1]
            ratio = seconds / known if known else 1.0
            forward = self.call_prices[FORWARD].carried(ratio)
            each_graded = FORWARD + BACKWARD
            graded = self.call_prices[each_graded].carried(ratio, forward.times(each_graded))
            self.call_prices = {FORWARD: forward, each_graded: graded}
        self.call_prices[each].add(K, seconds)
        self.world_seconds += seconds
        done = 0
        for milestone in [m for m in self._pending if m < used]:
            affordable = (milestone - self.used) // each * self.width
            self._improve(actions[:, done:affordable], costs[:, done:affordable])
            done = max(done, affordable)
            self._keep_until(milestone + 1)
        self._improve(actions[:, done:], costs[:, done:])
        self.used = used

    def _improve(self, actions: Tensor, costs: Tensor) -> None:
        if costs.shape[1] == 0:
            return
        self.not_finite += int((~costs.isfinite()).sum())
        costs = costs.nan_to_num(nan=math.inf, posinf=math.inf)
        j = costs.argmin(dim=1)  # the first of equals
        cost = costs.gather(1, j[:, None])[:, 0]
        better = cost < self.best_cost
        self.best[better] = actions[better.nonzero()[:, 0], j[better]].float()
        self.best_cost = torch.where(better, cost, self.best_cost)


# ----------------------------------------------------------------------------------------
# KNOTS — a few numbers ↔ an action
# ----------------------------------------------------------------------------------------


def as_gesture(x: Tensor) -> Tensor:
    """Round (..., L, 3) to the data format, as `to_gesture` does, and let gradients pass.

    The press has the gradient that it has unrounded; x and y have theirs where it is pressed.
    """
    xy, press = x.split((2, 1), dim=-1)
    pressed = (press > PRESSED).to(x.dtype)
    return torch.cat([xy.clamp(0, 1) * pressed, pressed + (press - press.detach())], dim=-1)


def ramp(z: Tensor) -> Tensor:
    """Turn M knots into an action: one contact, straight from knot to knot; differentiable.

    Args:
        z: (..., 3·M), M times [x, y, time], each in [0, 1]; two knots are the six numbers of a
            straight gesture. Times in another order mean the same as sorted.

    Returns: (..., L, 3), in the data format.
    """
    knots = z.unflatten(-1, (-1, 3))
    xy, times = knots[..., :2], knots[..., 2].sort(dim=-1).values
    passed, press = _timing(times)
    return as_gesture(torch.cat([_along(xy, passed), press[..., None]], dim=-1))


def strokes(z: Tensor) -> Tensor:
    """Turn M knots into an action that may lift in between; differentiable.

    Args:
        z: (..., 4·M), M times [x, y, time, touch], each in [0, 1]. From a knot to the next in time
            the finger moves straight, and is down if the touch of the first is above a half; that
            of the last counts for nothing.

    Returns: (..., L, 3), in the data format.
    """
    knots = z.unflatten(-1, (-1, 4))
    times = knots[..., 2].sort(dim=-1).values
    xy, touch = knots[..., :2], knots[..., :-1, 3]
    passed, _ = _timing(times)
    t = torch.linspace(0, 1, SEQ_LEN, dtype=z.dtype, device=z.device)[:, None]
    begin, end = times[..., None, :-1], times[..., None, 1:]
    inside = torch.minimum(t - begin, end - t) + 0.5 / (SEQ_LEN - 1)  # (..., L, M-1)
    down = torch.sigmoid(SHARPNESS * inside) * torch.sigmoid(20 * (touch[..., None, :] - 0.5))
    press = down.amax(dim=-1)
    return as_gesture(torch.cat([_along(xy, passed), press[..., None]], dim=-1))


def to_ramp(actions: Tensor) -> Tensor:
    """Read the six numbers of `ramp` off the first and last pressed frame; (..., L, 3) → (..., 6).

    An action without a press becomes a touch of half the window in the corner (0, 0).
    """
    pressed = actions[..., 2] > PRESSED
    ends = _ends(pressed)
    xy = _at(actions[..., :2], ends.to(actions.dtype))
    when = ends.to(xy.dtype) / (SEQ_LEN - 1)
    when = torch.where(pressed.any(dim=-1, keepdim=True), when, when.new_tensor([0.25, 0.75]))
    return torch.cat([xy, when[..., None]], dim=-1).flatten(-2)


class Bend:
    """Gestures as functions of M knots: they follow the knots and keep every detail in between.

    Knots lie evenly in time on a gesture, from its first to its last pressed frame. Where they are
    moved, in place or in time, the gesture is too, linearly in between. So the gestures near to a
    draw are like it: curved as it is, with its rests and its contacts.

    Args:
        base: gestures in the data format, (..., L, 3), each pressed somewhere.
        num: M, at least 2.
        free: (L,) bool, the frames that may change; None = all. A contact that enters or leaves
            them is held there.

    Attributes:
        z: the knots where they leave the gestures as they are, (..., M, 3) = [x, y, time], each in
            [0, 1]. The first and the last one take those between along.
    """

    def __init__(self, base: Tensor, num: int, free: Tensor | None = None) -> None:
        pressed = base[..., 2] > PRESSED
        inside = pressed if free is None else pressed & free
        inside = torch.where(inside.any(dim=-1, keepdim=True), inside, pressed)
        ends = _ends(inside)  # (..., 2)
        beyond = ends + torch.tensor([-1, 1], device=base.device)
        within = beyond.clamp(0, SEQ_LEN - 1)
        held = pressed.gather(-1, within) & (within == beyond)  # by a frame that must not change
        self.ends = torch.where(held, within, ends).to(base.dtype)
        self.share = torch.linspace(0, 1, num, dtype=base.dtype, device=base.device)
        frames = self.ends[..., :1] + self.share * self.ends.diff(dim=-1)  # (..., M)
        self.base = hold(base)
        when = frames[..., None] / (SEQ_LEN - 1)
        self.z = torch.cat([_at(self.base[..., :2], frames), when], dim=-1)
        self.is_held = torch.zeros_like(frames, dtype=torch.bool)
        self.is_held[..., [0, -1]] = held
        times = self.z[..., [0, -1], 2]
        limits = torch.tensor([0.0, 1.0], dtype=base.dtype, device=base.device)
        self.limits = torch.where(held, times, limits)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the gestures whose knots are z, (..., M, 3) → (..., L, 3), in the data format."""
        moved = torch.where(self.is_held[..., None], 0, z - self.z)
        first, last = moved[..., :1, :], moved[..., -1:, :]
        inner = moved[..., 1:-1, :] + torch.lerp(first, last, self.share[1:-1, None])
        moved = torch.cat([first, inner, last], dim=-2)
        times = (self.z + moved)[..., 2].clamp(self.limits[..., :1], self.limits[..., 1:])
        passed, press = _timing(times.cummax(dim=-1).values)
        frames = self.ends[..., :1] + passed.mean(dim=-1) * self.ends.diff(dim=-1)  # (..., L)
        base = self.base.expand(*frames.shape, 3)
        path = _at(base[..., :2], frames) + _along(moved[..., :2], passed)
        touched = base[..., 2].gather(-1, frames.detach().round().long())
        return as_gesture(torch.cat([path, (press * touched)[..., None]], dim=-1))


def hold(actions: Tensor) -> Tensor:
    """Let x and y of idle frames, (..., L, 3), be those of the contact before, else of the next."""
    pressed = actions[..., 2] > PRESSED
    frames = torch.arange(pressed.shape[-1], device=actions.device)
    before = torch.where(pressed, frames, -1).cummax(dim=-1).values
    index = torch.where(before < 0, pressed.int().argmax(dim=-1, keepdim=True), before)[..., None]
    xy = actions[..., :2].gather(-2, index.expand(*index.shape[:-1], 2))
    return torch.cat([xy, actions[..., 2:]], dim=-1)


def _ends(marked: Tensor) -> Tensor:
    """Return the first and the last marked frame, (..., L) bool → (..., 2); all if none is."""
    first = marked.int().argmax(dim=-1)
    last = marked.shape[-1] - 1 - marked.flip(-1).int().argmax(dim=-1)
    return torch.stack([first, last], dim=-1)


def _at(xy: Tensor, frames: Tensor) -> Tensor:
    """Read a path between its frames, (..., L, 2) at (..., n), from 0 to L-1 → (..., n, 2)."""
    low = frames.detach().floor()
    index = low.long().clamp(0, SEQ_LEN - 1)[..., None].expand(*frames.shape, 2)
    here, there = xy.gather(-2, index), xy.gather(-2, (index + 1).clamp(max=SEQ_LEN - 1))
    return torch.lerp(here, there, (frames - low)[..., None].expand_as(here))


def _timing(times: Tensor) -> tuple[Tensor, Tensor]:
    """Return what share of each piece between knots has passed, and the press, at every frame.

    Args:
        times: (..., M), ascending; 0 is the first frame, 1 the last.

    Returns: (..., L, M-1), in [0, 1]; (..., L), above PRESSED from the first knot's frame to the
        last's.
    """
    t = torch.linspace(0, 1, SEQ_LEN, dtype=times.dtype, device=times.device)
    begin, gap = times[..., None, :-1], times.diff(dim=-1)[..., None, :]
    passed = ((t[:, None] - begin) / gap.clamp(min=1e-3)).clamp(0, 1)
    half_frame = 0.5 / (SEQ_LEN - 1)
    inside = torch.minimum(t - times[..., :1], times[..., -1:] - t) + half_frame
    return passed, torch.sigmoid(SHARPNESS * inside)


def _along(values: Tensor, passed: Tensor) -> Tensor:
    """Interpolate values at knots, (..., M, 2), where shares (..., L, M-1) of the pieces passed."""
    return values[..., :1, :] + passed @ values.diff(dim=-2)


# ----------------------------------------------------------------------------------------
# SEARCHES
# ----------------------------------------------------------------------------------------


class Adam:
    """Adam on numbers in [0, 1] (Kingma & Ba, arXiv:1412.6980).

    Args:
        z: where to start, (I, R, ...).
        lr: the step.
        scale_dim: numbers along it share a step size, that of the steepest: else rounding errors
            of a gradient that is zero would be taken for directions.
        reach: how far a number may leave its start: a trust region; None = any distance.
    """

    def __init__(
        self, z: Tensor, lr: float, scale_dim: int | None = None, reach: float | None = None
    ) -> None:
        self.z, self.lr, self.scale_dim, self.taken = z.clone(), lr, scale_dim, 0
        self.start, self.reach = z.clone(), math.inf if reach is None else reach
        self.mean, self.square = torch.zeros_like(z), torch.zeros_like(z)

    def step(self, gradient: Tensor) -> None:
        """Move z down a gradient; where it is not finite, z waits."""
        gradient = gradient.nan_to_num(0, 0, 0)
        size, dim = gradient.square(), self.scale_dim
        size = size if dim is None else size.amax(dim=dim, keepdim=True)
        self.taken += 1
        self.mean = torch.lerp(gradient, self.mean, 0.9)
        self.square = torch.lerp(size, self.square, 0.999)
        mean = self.mean / (1 - 0.9**self.taken)
        scale = (self.square / (1 - 0.999**self.taken)).sqrt() + 1e-8
        moved = self.z - self.lr * mean / scale - self.start
        self.z = (self.start + moved.clamp(-self.reach, self.reach)).clamp(0, 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the starts, (I, R') of R."""
        at = torch.arange(len(rows))[:, None], rows
        self.z, self.mean, self.square = self.z[at], self.mean[at], self.square[at]
        self.start = self.start[at]


def descend(
    objective: Objective,
    z: Tensor,
    decode: Callable[[Tensor], Tensor],
    lr: float,
    steps: int | None = None,
    *,
    scale_dim: int | None = None,
    reach: float | None = None,
) -> Tensor | None:
    """Take Adam steps from the starts z, (I, R, ...), within [0, 1], until the budget is spent.

    Args:
        objective: the cost and its budget.
        z: where to start.
        decode: z → actions, (I, R, L, 3).
        lr: of Adam.
        steps: at most; None = no limit.
        scale_dim: of Adam.
        reach: of Adam.

    Returns: where the steps ended, (I, R, ...); None if the first gradient is zero everywhere, so
        that there is no way down.
    """
    adam, taken = Adam(z, lr, scale_dim, reach), 0
    while objective.room(FORWARD + BACKWARD) >= z.shape[1] and taken != steps:
        _, gradient = objective.gradient(adam.z, decode)
        if taken == 0 and not gradient.nan_to_num(0, 0, 0).any():
            return None
        adam.step(gradient)
        taken += 1
    if objective.room() >= z.shape[1]:
        objective(decode(adam.z))
    return adam.z


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
    while K := min(population, objective.room()):
        noise = normal((objective.num, K, *mean.shape[1:]), rng)
        z = (mean[:, None] + spread[:, None] * noise).clamp(0, 1)
        order = objective(decode(z)).argsort(dim=1)[:, : min(elites, K)]
        best = z[torch.arange(objective.num)[:, None], order]  # (I, elites, ...)
        mean = momentum * mean + (1 - momentum) * best.mean(dim=1)
        spread = momentum * spread + (1 - momentum) * best.std(dim=1, correction=0)
