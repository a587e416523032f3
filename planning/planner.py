"""The planner that VJ2-GUI can call: draw gestures from the denoiser, refine the best, in time.

planner = Planner.load("runs/RUN", bank=8192)
result = planner.plan(cost_fn, budget_ms=500)    # result.actions: float32 [250, 3]
"""

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.bank import kept_bank
from planning.places import CHOICE, draw_places, fitting, moved_to
from planning.request import DRAW, VARIATION, Request, integer, plain_copy, require
from planning.search import (
    BACKWARD,
    FORWARD,
    LARGEST,
    Bend,
    Clock,
    Objective,
    Prices,
    cem,
    descend,
    largest_power,
    ramp,
)
from train_diffusion_ddim import (
    DDIMScheduler,
    Model,
    TrainConfig,
    generate,
    load_model,
    takes_known_frames,
    to_gesture,
    to_model_units,
)
from trainlib.errors import UserError, first_line
from trainlib.gestures import PRESSED, SEQ_LEN
from trainlib.memory import is_out_of_memory
from trainlib.tensors import as_device, as_tensor, describe, device_of, dtype_of

Array = Tensor | np.ndarray  # of any real dtype, strides and device; it is copied
PlanCost = Callable[[Tensor], Tensor]  # actions (B, L, 3), data units → (B,), lower is better
NOTHING, LAST = "nothing", "last plan"  # what may make a plan, beside INIT, DRAW, VARIATION
GRADIENT, CEM = "gradient", "CEM"
SHARE = 0.5  # of the time, for drawing; the rest refines
STARTS = 16  # draws that are refined at most
STEPS, MOST_STEPS = 10, 100  # of Adam: as many starts are refined as STEPS are affordable for
FEWEST_STEPS = 3  # where there is no time for as many, all of it is for drawing
KNOTS, LR, STD = 4, 0.01, 0.15  # of a refined gesture; of Adam and of CEM along them
POPULATION, ELITES, EVALUATIONS = 16, 4, 360  # of CEM
WARM, WARM_TURN = 0.5, 4  # strength at which the last plan is varied, by every fourth draw
TIE = 1e-6  # a plan that is better than doing nothing by less, relative, is no better
UNLIMITED = 10**9


def with_goal(model: Model, context: Tensor, scale: float = 1.0) -> Model:
    """Return a model for `sample` that heads for goals, (B, context_dim), w = `scale`.

    (1 - w)·output(no goal) + w·output(goal): classifier-free guidance, arXiv:2207.12598.
    """

    def guided(*arguments: Tensor, **more: Any) -> Tensor:
        output = model(*arguments, context=context, **more)
        return output if scale == 1 else torch.lerp(model(*arguments, **more), output, scale)

    return guided


class PlanResult(NamedTuple):
    """A plan.

    Attributes:
        actions: float32 (L, 3), on the CPU, data units, press 0 or 1, zero while idle.
        cost: of exactly these actions; NaN without a cost function.
        evaluations: of the cost function, one per action; a backward pass counts two.
        milliseconds: wall-clock of the call.
        sampler_ms: of it, what the first gesture took, which is drawn alone: batch-1 latency.
        method: what made the plan: "nothing" (to do is best), "init", "last plan", "draw",
            "variation" (of init or the last plan), "gradient" or "CEM" (which refined a draw).
        reason: what went wrong or was left out, in one line; empty if nothing was.
    """

    actions: Tensor
    cost: float
    evaluations: int
    milliseconds: float
    sampler_ms: float
    method: str
    reason: str


class _CostError(Exception):
    """The cost function failed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(_named(cause))
        self.cause = cause


def _named(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"


class _Search:
    """The state of one search: the objective, what made its best candidate, what went wrong.

    Args:
        cost_fn: the cost function, (K, L, 3) → (K,).
        device: where it gets its actions.
        seconds: until when.
        prices: what calls of the cost took before.
        clock: of `seconds`; None = wall-clock.
    """

    def __init__(
        self,
        cost_fn: PlanCost,
        device: torch.device,
        seconds: float,
        prices: dict[int, Prices] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.cost_fn, self.device = cost_fn, device
        self.objective = Objective(
            self._costs, 1, UNLIMITED, (), seconds, prices=prices, clock=clock
        )
        self.method, self.reasons, self.calls = "", list[str](), 0
        self.idle: tuple[Tensor, float] | None = None  # doing nothing, and its cost

    def _costs(self, actions: Tensor) -> Tensor:
        """Call the cost function, (1, K, L, 3) → (1, K), on the CPU; what is not finite is NaN.

        It gets a copy, which it may change in place.
        """
        self.calls += 1
        shape = actions.shape[1:2]
        try:
            costs = self.cost_fn(actions[0].to(self.device, copy=True))
            shaped = isinstance(costs, Tensor) and costs.shape == shape and not costs.is_complex()
            wanted = f"cost_fn must return a tensor {list(shape)}, one cost per action"
            require(shaped, wanted, describe(costs))
            costs = costs.cpu().float()[None]
        except Exception as e:
            raise _CostError(e) from e
        return torch.where(costs.isfinite(), costs, math.nan)

    @property
    def best_cost(self) -> float:
        """The cost of the best candidate so far; infinite without any."""
        return float(self.objective.best_cost[0])

    @contextmanager
    def by(self, method: str) -> Iterator[None]:
        """Note that `method` made the best candidate, if a better one is found inside."""
        before = self.best_cost
        try:
            yield
        finally:
            if self.best_cost < before:
                self.method = method

    def evaluate(self, actions: Tensor, kinds: list[str]) -> Tensor:
        """Return the costs of actions (K, L, 3) made in K ways, infinite for NaN, (K,)."""
        before = self.best_cost
        costs = self.objective(actions[None])[0].nan_to_num(nan=math.inf)
        if self.best_cost < before:
            self.method = kinds[int(costs.argmin())]
        if self.idle is None:
            self.idle = actions[0], float(costs[0])
        return costs

    def answer(self) -> tuple[Tensor, float, str]:
        """Return the plan, its cost and what made it: nothing, if nothing is as good."""
        cost, used = self.best_cost, self.objective.used
        require(math.isfinite(cost), "cost_fn must give finite costs", f"none in {used}")
        idle, idle_cost = self.idle or (None, math.nan)
        if idle is not None and idle_cost - cost <= TIE * abs(idle_cost) < math.inf:
            return idle, idle_cost, NOTHING
        return self.objective.best[0], cost, self.method


class Planner:
    """A denoiser as a planner; it remembers its last plan, unless to do nothing, until `reset`.

    Every call draws new noise: calls are as many tries, and planners of one seed that are called
    alike plan alike. One call runs at a time: another thread waits for its turn, from which its
    budget counts; to plan in two threads at once, load two planners.

    Args:
        model: the denoiser, of 250 frames.
        scheduler: its scheduler.
        sampling: num_inference_steps, eta and sampler, as of `TrainConfig.sampling`.
        device: where the model lives and where cost functions get their actions.
        bank: gestures drawn beforehand, (N, L, 3), data units; None = draw while planning.
        seed: of all noise, at least 0.
        clock: seconds, by which budgets are kept; None = wall-clock.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: DDIMScheduler,
        sampling: dict[str, Any],
        device: str | torch.device = "cpu",
        *,
        bank: Tensor | None = None,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.model, self.scheduler, self.device = model, scheduler, torch.device(device)
        self.num_inference_steps = sampling.get("num_inference_steps", 10)
        self.sampling = {k: v for k, v in sampling.items() if k != "num_inference_steps"}
        self.bank, self.seed, self.calls = None, integer("seed", seed, 0), 0
        if bank is not None:
            num = len(bank) if np.ndim(bank) == 3 else -1
            self.bank = to_gesture(plain_copy("bank", bank, (num, SEQ_LEN, 3)).float())
        self.last: Tensor | None = None
        self.resets = 0
        self.clock = time.perf_counter if clock is None else clock
        self._prices, self._lock = Prices(), threading.RLock()
        self._cost_prices: dict[int, Prices] | None = None
        self._was_only = False  # the first call of the cost, in the last search

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        *,
        bank: int = 0,
        seed: int = 0,
    ) -> "Planner":
        """Load a checkpoint or run folder, and run once what is slow the first time.

        Args:
            checkpoint: the file or the folder.
            device: of the denoiser and of the actions that cost functions get.
            bank: gestures to draw beforehand, 8192 say; they are drawn once per checkpoint and
                kept in a file beside it.
            seed: of all noise, at least 0.

        Raises:
            UserError: it cannot be read, its gestures do not have 250 frames, or no such device.
            FloatingPointError: what it draws is not finite.
        """
        is_path = isinstance(checkpoint, str | os.PathLike)
        require(is_path, "checkpoint must be a path", describe(checkpoint))
        named = isinstance(device, str | torch.device)
        require(named, "device must be a name or torch.device", describe(device))
        device = as_device(device)
        num = integer("bank", bank, 0)
        model, scheduler, config = load_model(checkpoint, device)
        wanted = f"{checkpoint} cannot plan: its gestures must have {SEQ_LEN} frames"
        require(config.seq_len == SEQ_LEN, wanted, config.seq_len)
        planner = cls(model, scheduler, config.sampling, device, seed=seed)
        request = Request(
            None, None, None, 1, None, 1, 1, planner.num_inference_steps, math.inf, (0,)
        )
        for size in (1, 1, LARGEST):  # the first of all is slow
            planner._timed_draw(request, [DRAW] * size)
        if num:
            place = Path(checkpoint) if os.path.isdir(checkpoint) else Path(checkpoint).parent
            path = place / f"bank_{num}_{_fingerprint(model, config)}.npy"

            def draw(num: int) -> Tensor:
                return generate(model, scheduler, (num, SEQ_LEN, 3), **config.sampling).cpu()

            planner.bank = kept_bank(path, num, draw)
        return planner

    def warm_up(self, cost_fn: PlanCost) -> None:
        """Call a cost with every number of actions that a plan may, twice, and take its gradients.

        Compiled models and libraries prepare for every size that they meet, for seconds perhaps;
        and the first plan then knows which sizes fit into its time.
        """
        _require_cost(cost_fn)
        with self._lock, torch.inference_mode(False):
            objective = _Search(cost_fn, self.device, math.inf, clock=self.clock).objective
            for size in 2 * [2**i for i in range(LARGEST.bit_length())]:
                z = torch.full((1, size, 6), 0.5, dtype=torch.float32)
                try:
                    objective(ramp(z))
                except _CostError as e:
                    raise e.cause from None
                if size <= STARTS:
                    with suppress(Exception):  # plans say so, if there is none
                        objective.gradient(z, ramp)
            self._cost_prices = objective.call_prices

    def reset(self) -> None:
        """Forget the last plan: the goal has changed, or the plan has been carried out.

        A plan that is being made meanwhile will not be remembered.
        """
        self.resets += 1
        self.last = None

    def plan(
        self,
        cost_fn: PlanCost | None = None,
        *,
        known: Array | None = None,
        known_mask: Array | None = None,
        init: Array | None = None,
        strength: float = 1.0,
        goal: Array | None = None,
        guidance: float = 1.0,
        places: Array | None = None,
        num_plans: int = 128,
        refine: bool = True,
        num_inference_steps: int | None = None,
        budget_ms: float = 500,
        seed: int | None = None,
    ) -> PlanResult:
        """Plan one action within the budget; at least one gesture is drawn and two are evaluated.

        Half of the time is for evaluating `num_plans` gestures: none at all, the last plan, if
        there is one, and draws, every fourth a variation of it. The rest refines the best along
        four knots, which move in place and time: by the gradient, or by CEM where the cost has
        none. No call of the cost is begun that should not end in time by what calls have taken.
        If the cost fails once it has answered, the best plan so far comes back and says why.

        Args:
            cost_fn: costs of actions (B, L, 3), data units, float32 → (B,); None = the first
                draw. B is at most 32. An action whose cost is not finite is never chosen.
            known: frames that the plan must contain, (L, 3), data units, as gestures are: press 0
                or 1, zero while idle; read under known_mask.
            known_mask: (L,) bool, together with `known`.
            init: an action (L, 3), data units, to start from instead of the last plan; a candidate.
            strength: in (0, 1], how far the draws leave `init`; 1 = pure noise.
            goal: where to, (context_dim,), not all zeros, as trained with `--context_dim`.
            guidance: weight of the goal in the draws, see `with_goal`; 1 = as trained.
            places: where gestures may begin and end, two maps of weights, (2, rows, columns), as
                of `changed_places`: draws are moved there. None = they stay.
            num_plans: gestures to draw at most, at least 1. They come from the bank, if there is
                one, but for variations and where there is a goal or a known contact.
            refine: False = all time is for draws: a world model that errs is better only chosen by.
            num_inference_steps: denoising steps, in [1, T]; None = those of the run.
            budget_ms: wall-clock, above 0, perhaps infinite.
            seed: of the noise of this call, at least 0; None = new noise at every call.

        Raises:
            UserError: an argument has a wrong type, shape or range, or no cost is finite.
            FloatingPointError: what the denoiser draws is not finite.
            Exception: whatever cost_fn raises when it is called for the first time.
        """
        _require_cost(cost_fn, or_none=True)
        with self._lock, torch.inference_mode(False):  # in which no cost would have a gradient
            began = self.clock()
            noise = (self.seed, self.calls) if seed is None else (integer("seed", seed, 0),)
            steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
            request = Request(
                known, known_mask, init, strength, goal, guidance, num_plans, steps, budget_ms,
                noise, places, refine,
            )  # fmt: skip
            self._require_fits(request)
            return self._plan(cost_fn, request, began)

    def _require_fits(self, request: Request) -> None:
        """Raise UserError for what this denoiser cannot do, also where a bank would hide it."""
        most, steps = self.scheduler.num_timesteps, request.num_inference_steps
        require(steps <= most, f"num_inference_steps must be in [1, {most}]", steps)
        if request.known is not None and not takes_known_frames(self.model):
            raise UserError("this denoiser takes no known frames")

    def _plan(self, cost_fn: PlanCost | None, request: Request, began: float) -> PlanResult:
        """Do what `plan` promises; the call came in at `began`."""
        self.calls, resets = self.calls + 1, self.resets
        self._prices = self._prices.carried(1)
        request.take_from(self.bank)
        if request.init is None and self.last is not None and cost_fn is not None:
            request.vary(self.last, WARM, WARM_TURN, LAST)
        kinds = request.next_kinds(1)
        first = self._timed_draw(request, kinds)
        now = self.clock()
        sampler_ms, seconds = 1000 * (now - began), began + request.budget_ms / 1000 - now
        actions, cost, used, method, reason = first[0], math.nan, 0, kinds[0], ""
        if cost_fn is not None:
            search = _Search(cost_fn, self.device, seconds, self._cost_prices, self.clock)
            self._search(search, request, first, kinds)
            actions, cost, method = search.answer()
            self._cost_prices, self._was_only = search.objective.call_prices, search.calls == 1
            used, reason = search.objective.used, "; ".join(search.reasons)
        if resets == self.resets:  # none came from another thread, nor from the cost
            self.last = None if method == NOTHING else actions.clone()
        milliseconds = 1000 * (self.clock() - began)
        return PlanResult(actions, cost, used, milliseconds, sampler_ms, method, reason)

    def _search(self, search: _Search, request: Request, first: Tensor, kinds: list[str]) -> None:
        """Draw and refine until the time is over or the cost fails.

        Args:
            search: its state.
            request: what to draw, how often, how long.
            first: the draw that has been made, (1, L, 3).
            kinds: what it is.
        """
        try:
            self._refine(search, request, self._evaluate_draws(search, request, first, kinds))
        except _CostError as e:
            if not math.isfinite(search.best_cost):
                raise e.cause from None
            search.reasons.append(f"cost_fn failed in its call {search.calls}: {e}")
        except Exception as e:
            if not is_out_of_memory(e) or not math.isfinite(search.best_cost):
                raise
            search.reasons.append(f"ended where memory did: {_named(e)}")
        if search.objective.not_finite:
            search.reasons.append(f"{search.objective.not_finite} costs were not finite")

    def _draw(self, request: Request, kinds: list[str]) -> Tensor:
        """Draw gestures of these kinds, (len(kinds), L, 3)."""
        drawn = torch.empty(len(kinds), SEQ_LEN, 3, dtype=torch.float32)
        for kind in set(kinds):
            rows = [i for i, k in enumerate(kinds) if k == kind]
            drawn[rows] = self._draw_one_kind(request, kind, len(rows))
        return request.paste(drawn)

    def _draw_one_kind(self, request: Request, kind: str, num: int) -> Tensor:
        """Draw gestures from noise, from the bank or around `init`, (num, L, 3)."""
        if kind == DRAW and request.places is not None:
            return self._draw_at_places(request, num)
        if kind == DRAW and request.bank is not None:
            return request.from_bank(num)
        return self._sample(request, kind, num)

    def _draw_at_places(self, request: Request, num: int) -> Tensor:
        """Draw gestures and move them to where they may begin and end, (num, L, 3)."""
        wanted = draw_places(request.places, num, request.streams[4])
        if request.bank is not None:
            drawn = fitting(request.from_bank(num, CHOICE), wanted)
        else:
            drawn = self._sample(request, DRAW, num)
        return moved_to(request.paste(drawn), wanted, request.free)

    def _sample(self, request: Request, kind: str, num: int) -> Tensor:
        """Draw gestures from noise or around `init`, (num, L, 3)."""
        shape, steps = (num, SEQ_LEN, 3), request.num_inference_steps
        x_T = request.eps(kind, num).to(self.device)
        generator = torch.Generator("cpu").manual_seed(int(request.streams[2].integers(2**31)))
        options: dict[str, Any] = {"generator": generator, **self.sampling}
        model: Model = self.model
        if request.goal is not None:
            context = request.goal.to(self.device).expand(num, -1)
            model = with_goal(model, context, request.guidance)
        if kind == VARIATION:
            start_t = max(round(request.strength * self.scheduler.num_timesteps) - 1, 0)
            steps = min(max(round(request.strength * steps), 1), start_t + 1)
            x_0 = to_model_units(request.init).expand(shape).to(self.device)
            x_T, _ = self.scheduler.add_noise(x_0, start_t, x_T)
            options["start_t"] = start_t
        if request.known is not None:
            options["known"] = request.known.to(self.device).expand(shape)
            options["known_mask"] = request.known_mask.to(self.device).expand(shape[:2])
        sample = self.scheduler.sample(model, shape, self.device, steps, x_T=x_T, **options)
        return to_gesture(sample.cpu())

    def _timed_draw(self, request: Request, kinds: list[str]) -> Tensor:
        """Draw as `_draw` does and note how long it took, but for what the bank gave."""
        began = self.clock()
        drawn = self._draw(request, kinds)
        num = kinds.count(VARIATION) if request.bank is not None else len(kinds)
        if num:
            self._prices.add(num, self.clock() - began)
        return drawn

    def _prices_of_draws(self, request: Request, most: int, drawn: int) -> np.ndarray:
        """Return what 1 to `most` draws should take, (most,), seconds, `drawn` of them made."""
        sizes = (np.arange(1, most + 1) - drawn).clip(0)
        if request.bank is not None:
            sizes = -(-sizes // request.varied) if request.varied else 0 * sizes
        return np.concatenate([[0.0], self._prices.upto(most)])[sizes]

    def _evaluate_draws(
        self, search: _Search, request: Request, first: Tensor, kinds: list[str]
    ) -> Tensor:
        """Draw and evaluate until all are drawn or the time for it is over.

        Args:
            search: its state.
            request: what to draw, how often, how long.
            first: the draw that has been made, (1, L, 3).
            kinds: what it is.

        Returns: the best STARTS that touch a frame that is free, best first, (k, L, 3).
        """
        new, labels = request.paste(torch.zeros_like(first)), [NOTHING]
        size, is_only = self._first_size(search, request)
        gives_way = is_only and size == 2 and request.source == LAST and self._was_only
        if request.init is not None and not gives_way:
            new = torch.cat([new, request.paste(request.init)[None]])
            labels = [NOTHING, request.source]
        left, reserved, kept = request.num_plans, 0.0, first[:0]
        num = min(size - len(new), left)
        costs = search.objective.best_cost[:0]
        while True:
            if num:
                more = request.next_kinds(num - len(first))
                new = torch.cat([new, first])
                if more:
                    new = torch.cat([new, self._timed_draw(request, more)])
                labels, first, kinds, left = [*labels, *kinds, *more], first[:0], [], left - num
            price = search.objective.prices(len(new))[-1]
            if labels[0] != NOTHING and price > search.objective.seconds_left:
                return kept  # drawing took longer than it should
            kept, costs = torch.cat([kept, new]), torch.cat([costs, search.evaluate(new, labels)])
            kept, costs = _best_starts(kept, costs, request.free)
            if labels[0] == NOTHING:
                reserved = self._time_to_refine(search, request)
            num = self._next_size(search, request, min(left, LARGEST), len(first), reserved)
            if num < 1:
                return kept
            new, labels = first[:0], []

    @staticmethod
    def _time_to_refine(search: _Search, request: Request) -> float:
        """Return the seconds to keep for refinement: none where a gradient takes too long."""
        if not request.refine:
            return 0.0
        seconds = (1 - SHARE) * request.budget_ms / 1000
        price = search.objective.prices(1, FORWARD + BACKWARD)[0]
        return seconds if FEWEST_STEPS * price <= seconds < math.inf else 0.0

    def _first_size(self, search: _Search, request: Request) -> tuple[int, bool]:
        """Return how many candidates the first call of the cost holds, and if it is the only one.

        Two; but where there is no time for another call, by what calls took before, as many as fit,
        without variations where there is a bank.
        """
        costs, left = search.objective.prices(LARGEST), search.objective.seconds_left
        if costs[0] + costs[1] <= left:
            return 2, False
        if request.bank is not None:
            request.varied = 0
        fits = costs + self._prices_of_draws(request, LARGEST, 2) <= left
        return max(largest_power(fits), 2), True

    def _next_size(
        self, search: _Search, request: Request, most: int, drawn: int, reserved: float
    ) -> int:
        """Return how many draws can be made and evaluated in time, `most` at most.

        The first `drawn` have been made. Where there is a bank, but no time for variations, there
        will be none.
        """
        most = min(most, search.objective.room())
        left = search.objective.seconds_left - reserved
        costs, draws = search.objective.prices(most), self._prices_of_draws(request, most, drawn)
        if most and request.bank is not None and costs[0] <= left < costs[0] + draws[0]:
            request.varied, draws = 0, 0 * draws
        fits = costs + draws <= left
        return most if fits.all() else largest_power(fits)

    def _refine(self, search: _Search, request: Request, starts: Tensor) -> None:
        """Improve the best draws, (k, L, 3), along their knots within the time left."""
        objective, each = search.objective, FORWARD + BACKWARD
        if not len(starts) or not request.refine:
            return
        prices = objective.prices(len(starts), each)
        if objective.room(each) < 1:
            search.reasons.append(f"not refined: a gradient takes {1000 * prices[0]:.0f} ms")
            return
        num = max(largest_power(prices * STEPS <= objective.seconds_left), 1)

        def decoded(bend: Bend) -> Callable[[Tensor], Tensor]:
            return lambda z: request.paste(bend(z))

        bend = Bend(starts[None, :num], KNOTS, request.free)
        try:
            with search.by(GRADIENT):
                way = descend(objective, bend.z, decoded(bend), LR, MOST_STEPS, scale_dim=-2)
            if way is not None:
                return
            why = "its gradient is zero"
        except Exception as e:  # of any kind: a backward pass may be the user's own
            why = f"it has no gradient ({e if isinstance(e, _CostError) else _named(e)})"
        search.reasons.append(f"refined by CEM, not by the gradient of the cost: {why}")
        objective.budget = objective.used + EVALUATIONS
        bend = Bend(starts[None, :1], KNOTS, request.free)
        with search.by(CEM):
            cem(
                objective, request.streams[3], bend.z[:, 0], decoded(bend), std=STD,
                population=POPULATION, elites=ELITES,
            )  # fmt: skip


def _fingerprint(model: nn.Module, config: TrainConfig) -> str:
    """Name what was loaded; a run folder may have a newer checkpoint by now."""
    digest = hashlib.sha256(repr(config).encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _require_cost(cost_fn: Any, *, or_none: bool = False) -> None:
    fits = callable(cost_fn) or (or_none and cost_fn is None)
    require(fits, "cost_fn must be a function", describe(cost_fn))


def _best_starts(actions: Tensor, costs: Tensor, free: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the cheapest STARTS of actions (K, L, 3) that touch a free frame, and their costs."""
    pressed = actions[..., 2] > PRESSED
    touches = (pressed if free is None else pressed & free).any(dim=1) & costs.isfinite()
    actions, costs = actions[touches], costs[touches]
    order = costs.argsort()[:STARTS]
    return actions[order], costs[order]


def token_cost(
    predictor: Callable[[Tensor, Tensor], Tensor],
    tokens: Array,
    goal_tokens: Array,
    *,
    batch_size: int = 32,
    channels: int = 3,
) -> PlanCost:
    """Return the V-JEPA-2-AC energy of actions under a world model, as a cost function.

    It can be differentiated also where the caller is in `torch.inference_mode`. Tokens and actions
    are given to the predictor in its dtype and on its device, which are those of its weights, or
    if it has none those of `tokens`; they are dense copies, its own to view and to change in place.
    Tokens are compared in float32.

    Args:
        predictor: `predictor(z (B, T, N, D), actions (B, T, L, 3)) → (B, T, N, D)`, T = 1 here;
            a module, compiled or not, or any function.
        tokens: of the screen now, (N, D), such as 16 x 16 V-JEPA 2 tokens, N = 256.
        goal_tokens: of the screen wanted, (N, D).
        batch_size: actions that the predictor is given at a time, at most.
        channels: of the actions, 3 at most; 2 for a predictor that takes x and y alone,
            (B, T, L, 2).

    Raises:
        UserError: the two differ in shape, or (from the cost function) what is predicted does.
    """
    require(callable(predictor), "predictor must be a function", describe(predictor))
    batch_size, channels = integer("batch_size", batch_size, 1), integer("channels", channels, 1)
    require(channels <= 3, "channels must be at most 3", channels)
    with torch.inference_mode(False):
        now, goal = as_tensor("tokens", tokens).clone(), as_tensor("goal_tokens", goal_tokens)
        wanted = f"goal_tokens must be like tokens, (N, D) = {list(now.shape)}"
        require(now.ndim == 2 and goal.shape == now.shape, wanted, describe(goal_tokens))
        dtype, device = dtype_of(predictor, now), device_of(predictor, now)
        z = now.to(device, dtype)
        goal = F.layer_norm(goal.to(device, torch.float32), now.shape[-1:])

    def energy(actions: Tensor) -> Tensor:
        wanted = (len(actions), 1, *z.shape)
        given = actions[:, None, :, :channels].to(device, dtype, copy=True).contiguous()
        with _differentiable(predictor, given):
            then = predictor(z.expand(wanted).clone(memory_format=torch.contiguous_format), given)
        fits = isinstance(then, Tensor) and then.shape == wanted and not then.is_complex()
        require(fits, f"predictor must return {list(wanted)}", describe(then))
        then = F.layer_norm(then[:, 0].float(), z.shape[-1:])
        return (then - goal).abs().mean(dim=(1, 2))

    return lambda actions: torch.cat([energy(part) for part in actions.split(batch_size)])


class _WithoutCudnn:
    """Switch cuDNN off, for the process, while any thread is inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._switched = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._switched.enter_context(torch.backends.cudnn.flags(enabled=False))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switched.close()


_without_cudnn = _WithoutCudnn()


def _differentiable(predictor: Any, actions: Tensor) -> Any:
    """Do without cuDNN where it would refuse: recurrent layers in eval mode have no backward."""
    is_module = isinstance(predictor, nn.Module) and not predictor.training
    if actions.requires_grad and is_module:
        if any(isinstance(module, nn.RNNBase) for module in predictor.modules()):
            return _without_cudnn
    return nullcontext()
