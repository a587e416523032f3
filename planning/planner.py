"""The planner that VJ2-GUI can call: draw gestures from the denoiser, refine the best, in time.

planner = Planner.load("runs/RUN")
result = planner.plan(cost_fn, budget_ms=500)    # result.actions: float32 [250, 3]
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.optimizers import Objective, cem, descend, ramp, to_ramp
from train_diffusion_ddim import (
    DDIMScheduler,
    UserError,
    generate,
    load_model,
    to_gesture,
    to_model_units,
)

PlanCost = Callable[[Tensor], Tensor]  # actions (B, L, 3), data units → (B,), lower is better
CHUNK = 16  # gestures drawn at a time
SHARE = 0.5  # of the time, for drawing; the rest refines
TOP, LR, STEPS = 3, 0.05, 40  # refinement: of how many, how fast, how long at most
WARM = 0.5  # strength at which the last plan is varied
UNLIMITED = 10**9


class PlanResult(NamedTuple):
    """A plan.

    Attributes:
        actions: float32 (L, 3), data units, press 0 or 1, zero while idle.
        cost: of exactly these actions; NaN without a cost function.
        evaluations: of the cost function; a backward pass counts two.
        milliseconds: wall-clock of the call.
        sampler_ms: one gesture drawn alone with as many steps: the batch-1 latency, measured on
            the first call with this number of steps, outside of its budget.
    """

    actions: Tensor
    cost: float
    evaluations: int
    milliseconds: float
    sampler_ms: float


@dataclass(frozen=True)
class _Request:
    """What one call asks the sampler for, checked; tensors are on the CPU."""

    steps: int
    known: Tensor | None  # (L, 3), with mask (L,), or both None
    mask: Tensor | None
    base: Tensor | None = None  # (L, 3), the action to vary
    strength: float = 1.0  # how far variations leave it
    varied: float = 0.0  # share of the draws that are variations

    def paste(self, actions: Tensor) -> Tensor:
        """Put the known frames into actions (..., L, 3)."""
        if self.known is None or self.mask is None:
            return actions
        return torch.where(self.mask[:, None], self.known, actions)


class Planner:
    """A denoiser as a planner; it remembers its last plan until `reset`.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        sampling: eta and sampler, as of `TrainConfig.sampling`.
        device: where the model lives and where cost functions get their actions.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: DDIMScheduler,
        sampling: dict[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.model, self.scheduler, self.device = model, scheduler, torch.device(device)
        self.sampling = {k: v for k, v in sampling.items() if k != "num_inference_steps"}
        self.seq_len = int(getattr(model, "seq_len", 250))
        self.last: Tensor | None = None
        self._latency: dict[int, float] = {}  # steps → seconds of one gesture alone

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "cpu") -> "Planner":
        """Load a checkpoint or run folder.

        Raises:
            UserError: it cannot be read.
        """
        model, scheduler, config = load_model(checkpoint, device)
        return cls(model, scheduler, config.sampling, device)

    def reset(self) -> None:
        """Forget the last plan, as when the goal has changed."""
        self.last = None

    def plan(
        self,
        cost_fn: PlanCost | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        num_plans: int = 16,
        num_inference_steps: int = 10,
        budget_ms: float = 500,
        seed: int = 0,
    ) -> PlanResult:
        """Plan one action within the budget; at least one gesture is always drawn.

        Half of the time is for drawing `num_plans` gestures, a quarter of them variations of the
        last plan, if there is one. The rest refines the best three along the straight line
        through their ends: by the gradient, or by CEM if the cost has none.

        Args:
            cost_fn: costs of actions (B, L, 3), data units, float32 → (B,); None = the first draw.
            known: frames that the plan must contain, (L, 3), data units; read under known_mask.
            known_mask: (L,) bool, together with `known`.
            init: an action (L, 3) to start from instead of the last plan.
            strength: in (0, 1], how far the draws leave `init`; 1 = pure noise. `init` itself is a
                candidate too.
            num_plans: gestures to draw at most, at least 1.
            num_inference_steps: denoising steps, in [1, T].
            budget_ms: wall-clock, above 0.
            seed: of all noise: same seed, same last plan and time enough, same plan.

        Raises:
            UserError: an argument is out of range or of the wrong shape.
        """
        if not (num_plans >= 1 and budget_ms > 0 and 0 < strength <= 1):
            raise UserError(
                "num_plans must be at least 1, budget_ms above 0 and strength in (0, 1], got "
                f"{num_plans}, {budget_ms}, {strength}"
            )
        request = self._check(num_inference_steps, known, known_mask, init)
        latency = self._measure(num_inference_steps)
        began, rng = time.perf_counter(), np.random.default_rng(seed)
        if init is not None:
            request = replace(request, base=init.cpu().float(), strength=strength, varied=1.0)
        elif self.last is not None and cost_fn is not None:
            request = replace(request, base=self.last, strength=WARM, varied=0.25)
        if cost_fn is None:
            actions, cost, used = self._draw(request, 1, rng)[0], math.nan, 0
        else:
            objective = Objective(self._batched(cost_fn), 1, UNLIMITED, (), budget_ms / 1000)
            deadline = began + SHARE * budget_ms / 1000
            starts = self._draw_all(objective, request, num_plans, deadline, rng)
            self._refine(objective, request, starts, rng)
            actions, cost = objective.best[0], float(objective.best_cost[0])
            used = objective.used
        self.last = actions
        ms = 1000 * (time.perf_counter() - began)
        return PlanResult(actions, cost, used, ms, 1000 * latency)

    def _check(
        self, steps: int, known: Tensor | None, mask: Tensor | None, init: Tensor | None
    ) -> _Request:
        """Return the request; raise UserError unless shapes and steps fit the model."""
        self.scheduler.timestep_pairs(steps)
        if (known is None) != (mask is None):
            raise UserError("known and known_mask must be given together")
        for name, x in (("known", known), ("init", init)):
            if x is not None and x.shape != (self.seq_len, 3):
                raise UserError(f"{name} must be {[self.seq_len, 3]}, got {list(x.shape)}")
        if known is None or mask is None:
            return _Request(steps, None, None)
        if mask.shape != (self.seq_len,) or mask.dtype != torch.bool:
            raise UserError(
                f"known_mask must be bool {[self.seq_len]}, got {mask.dtype} {list(mask.shape)}"
            )
        return _Request(steps, known.cpu().float(), mask.cpu())

    def _measure(self, steps: int) -> float:
        """Return the seconds of one gesture drawn alone; measured once per number of steps."""
        if steps not in self._latency:
            request, rng = _Request(steps, None, None), np.random.default_rng(0)
            self._draw(request, 1, rng)  # warm-up
            began = time.perf_counter()
            self._draw(request, 1, rng)
            self._latency[steps] = time.perf_counter() - began
        return self._latency[steps]

    def _batched(self, cost_fn: PlanCost) -> Callable[[Tensor], Tensor]:
        """Turn a cost function of (B, L, 3) into one of (1, K, L, 3), on the CPU, checked."""

        def batched(actions: Tensor) -> Tensor:
            costs = cost_fn(actions[0].to(self.device))
            if costs.shape != actions.shape[1:2]:
                raise UserError(
                    f"cost_fn must return {list(actions.shape[1:2])}, one cost per action, "
                    f"got {list(costs.shape)}"
                )
            return costs.cpu()[None]

        return batched

    def _draw(self, request: _Request, num: int, rng: np.random.Generator) -> Tensor:
        """Draw gestures, (num, L, 3): variations of the base first, the rest from pure noise."""
        num_varied = 0 if request.base is None else round(request.varied * num)
        parts = []
        for count, base in ((num_varied, request.base), (num - num_varied, None)):
            if not count:
                continue
            shape, steps = (count, self.seq_len, 3), request.steps
            options: dict[str, Any] = {"seed": int(rng.integers(2**31)), **self.sampling}
            if base is not None and request.strength < 1:
                start_t = max(round(request.strength * self.scheduler.num_timesteps) - 1, 0)
                steps = min(max(round(request.strength * steps), 1), start_t + 1)
                eps = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
                x_0 = to_model_units(base).expand(shape).to(self.device)
                x_t, _ = self.scheduler.add_noise(x_0, start_t, eps.to(self.device))
                options |= {"x_T": x_t, "start_t": start_t}
            if request.known is not None and request.mask is not None:
                options["known"] = request.known.to(self.device).expand(shape)
                options["known_mask"] = request.mask.to(self.device).expand(shape[:2])
            parts.append(generate(self.model, self.scheduler, shape, steps, **options))
        return request.paste(to_gesture(torch.cat(parts).cpu()))

    def _draw_all(
        self,
        objective: Objective,
        request: _Request,
        num: int,
        deadline: float,
        rng: np.random.Generator,
    ) -> Tensor:
        """Draw and evaluate until `num` or the deadline; return the best TOP, (1, k, L, 3)."""
        kept, costs = torch.empty(0, self.seq_len, 3), torch.empty(0)
        done, each = 0, 0.0  # gestures drawn, seconds of the dearest
        while done < num and (done == 0 or time.perf_counter() + CHUNK * each < deadline):
            began = time.perf_counter()
            chunk = min(CHUNK, num - done) if done else 1  # one alone: there is a plan at once
            new = self._draw(request, chunk, rng)
            if done == 0 and request.base is not None:
                new = torch.cat([request.paste(to_gesture(request.base))[None], new])
            kept, costs = torch.cat([kept, new]), torch.cat([costs, objective(new[None])[0]])
            order = costs.nan_to_num(nan=math.inf).argsort()[:TOP]
            kept, costs = kept[order], costs[order]
            done += chunk
            each = max(each if chunk == CHUNK else 0, (time.perf_counter() - began) / chunk)
        return kept[None]

    def _refine(
        self, objective: Objective, request: _Request, starts: Tensor, rng: np.random.Generator
    ) -> None:
        """Improve the best draws within the time left; keep what is cheaper once rounded."""
        before, cost_before = objective.best.clone(), objective.best_cost.clone()
        has_press = (starts[..., 2] > 0.5).any(dim=-1)[0]
        if not has_press.any() or not objective.left:
            return
        z = to_ramp(starts[:, has_press])

        def decode(z: Tensor) -> Tensor:
            return request.paste(ramp(z))

        objective.best_cost = torch.full_like(cost_before, math.inf)
        if self._has_gradient(objective, decode(z[:, :1])):
            descend(objective, z, decode, LR, STEPS)
        else:
            cem(objective, rng, z[:, 0], decode, std=0.05, population=CHUNK, elites=4)
        rounded = request.paste(to_gesture(objective.best))
        cost = objective(rounded[None])[:, 0]
        better = bool(cost < cost_before)
        objective.best = rounded if better else before
        objective.best_cost = cost if better else cost_before

    @staticmethod
    def _has_gradient(objective: Objective, actions: Tensor) -> bool:
        """Tell whether the cost can be differentiated; one evaluation."""
        objective.used += 1
        with torch.enable_grad():
            return bool(objective.cost_fn(actions.detach().requires_grad_()).requires_grad)


def token_cost(
    predictor: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, goal_tokens: Tensor
) -> PlanCost:
    """Return the V-JEPA-2-AC energy of actions under a world model, as a cost function.

    Args:
        predictor: `predictor(tokens (B, N, D), actions (B, T, L, 3)) → (B, N, D)`, T = 1 here.
        tokens: of the screen now, (N, D), such as 16 x 16 V-JEPA 2 tokens, N = 256.
        goal_tokens: of the screen wanted, (N, D).
    """
    goal = F.layer_norm(goal_tokens, goal_tokens.shape[-1:])

    def cost_fn(actions: Tensor) -> Tensor:
        now = tokens.expand(len(actions), -1, -1)
        then = predictor(now, actions[:, None])
        return (F.layer_norm(then, then.shape[-1:]) - goal).abs().mean(dim=(1, 2))

    return cost_fn
