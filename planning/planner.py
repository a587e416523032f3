"""The planner that VJ2-GUI can call: draw gestures from the denoiser, refine the best, in time.

planner = Planner.load("runs/RUN")
result = planner.plan(cost_fn, budget_ms=500)    # result.actions: float32 [250, 3]
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.search import FORWARD, Objective, cem, descend, ramp, to_ramp
from train_diffusion_ddim import DDIMScheduler, Model, load_model, to_gesture, to_model_units
from trainlib.errors import UserError, first_line
from trainlib.gestures import SEQ_LEN

Array = Tensor | np.ndarray  # of any real dtype, strides and device; it is copied
PlanCost = Callable[[Tensor], Tensor]  # actions (B, L, 3), data units → (B,), lower is better
CHUNK = 16  # gestures drawn at a time
SHARE = 0.5  # of the time, for drawing; the rest refines
TOP = 3  # are refined
LR, STD = 0.05, 0.15  # of Adam and of CEM, as tuned for the benchmark
REFINEMENT = 360  # evaluations that it may take
WARM, WARM_SHARE = 0.5, 0.25  # strength at which the last plan is varied, for how many draws
UNLIMITED = 10**9


def with_goal(model: Model, context: Tensor, scale: float = 1.0) -> Model:
    """Return a model for `sample` that heads for goals, (B, context_dim), w = `scale`.

    (1 - w)·output(no goal) + w·output(goal): classifier-free guidance, arXiv:2207.12598.
    """

    def guided(*arguments: Tensor) -> Tensor:
        output = model(*arguments, context=context)
        return output if scale == 1 else torch.lerp(model(*arguments), output, scale)

    return guided


class PlanResult(NamedTuple):
    """A plan.

    Attributes:
        actions: float32 (L, 3), on the CPU, data units, press 0 or 1, zero while idle.
        cost: of exactly these actions; NaN without a cost function.
        evaluations: of the cost function, one per action; a backward pass counts two.
        milliseconds: wall-clock of the call.
        sampler_ms: of it, what the first gesture took, which is drawn alone: batch-1 latency.
    """

    actions: Tensor
    cost: float
    evaluations: int
    milliseconds: float
    sampler_ms: float


def _require(condition: bool, text: str, got: Any) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(f"{text}, got {got}")


def _describe(x: Any) -> str:
    """Name the type of an argument; of an array, dtype and shape."""
    is_array = isinstance(x, Tensor | np.ndarray)
    return f"{x.dtype} {list(x.shape)}" if is_array else type(x).__name__


def _integer(name: str, value: Any, least: int) -> int:
    """Return an argument as an int of at least `least`, or raise UserError."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    _require(is_integer, f"{name} must be an integer", _describe(value))
    value = int(value)
    shown = value if value.bit_length() < 64 else f"one of {value.bit_length()} bits"
    _require(value >= least, f"{name} must be at least {least}", shown)
    _require(value < 2**63, f"{name} must be below 2**63", shown)
    return value


def _number(name: str, value: Any) -> float:
    """Return an argument as a float, or raise UserError."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    _require(is_number, f"{name} must be a number", _describe(value))
    try:
        return float(value)
    except OverflowError:  # an integer too large for any float
        return math.copysign(math.inf, value > 0 or -1)


def _plain_copy(name: str, x: Any, shape: tuple[int, ...] | str) -> Tensor:
    """Return a copy of a tensor or numpy array: dense, on the CPU, bool or float32, no gradient.

    Args:
        name: of the argument.
        x: of any strides, real dtype, byte order and device.
        shape: wanted; a word stands for any one-dimensional shape.

    Raises:
        UserError: it is something else.
    """
    given = _describe(x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and not np.ma.isMaskedArray(x):
        x = torch.from_numpy(np.array(x, bool if x.dtype.kind == "b" else np.float64, order="C"))
    is_real = isinstance(x, Tensor) and not x.is_complex()
    is_dense = is_real and x.layout == torch.strided and not x.is_meta
    fits = is_dense and (x.ndim == 1 if isinstance(shape, str) else x.shape == shape)
    wanted = f"[{shape}]" if isinstance(shape, str) else list(shape)
    _require(fits, f"{name} must be a real, dense tensor or array {wanted}", given)
    dtype = torch.bool if x.dtype == torch.bool else torch.float32
    return x.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


@dataclass
class _Request:
    """The arguments of one call, checked; the arrays are copies, float32 or bool, on the CPU."""

    known: Any
    known_mask: Any
    init: Any  # the action to vary
    strength: float  # how far variations leave it
    goal: Any
    guidance: float
    num_plans: int
    num_inference_steps: int
    budget_ms: float
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("num_plans", 1), ("num_inference_steps", 1), ("seed", 0)):
            setattr(self, name, _integer(name, getattr(self, name), least))
        for name in ("strength", "budget_ms", "guidance"):
            setattr(self, name, _number(name, getattr(self, name)))
        _require(self.budget_ms > 0, "budget_ms must be above 0", self.budget_ms)
        _require(0 < self.strength <= 1, "strength must be in (0, 1]", self.strength)
        _require(
            self.init is not None or self.strength == 1,
            "strength below 1 needs an init to stay near to",
            self.strength,
        )
        if self.init is not None:
            self.init = _plain_copy("init", self.init, (SEQ_LEN, 3)).float()
            low, high = self.init.min().item(), self.init.max().item()  # NaN if any number is
            _require(low >= 0 and high <= 1, "init must be in [0, 1]", f"{low} to {high}")
        self._check_goal()
        self._check_known()
        self.rng = np.random.default_rng(self.seed)
        self.varied = float(self.init is not None)  # share of the draws that vary `init`

    def _check_goal(self) -> None:
        """Check goal and guidance."""
        _require(abs(self.guidance) <= 1000, "guidance must be in [-1000, 1000]", self.guidance)
        if self.goal is None:
            _require(self.guidance == 1, "guidance needs a goal to weigh", self.guidance)
            return
        self.goal = _plain_copy("goal", self.goal, "context_dim").float()
        _require(bool(self.goal.isfinite().all()), "goal must be finite", self.goal.tolist())
        _require(bool(self.goal.any()), "goal must not be all zeros, which is no goal", "zeros")

    def _check_known(self) -> None:
        """Check the known frames; what the mask leaves out becomes zero."""
        if self.known is None and self.known_mask is None:
            return
        if self.known is None or self.known_mask is None:
            raise UserError("known and known_mask must be given together")
        known = _plain_copy("known", self.known, (SEQ_LEN, 3)).float()
        mask = _plain_copy("known_mask", self.known_mask, (SEQ_LEN,))
        is_mask = mask.dtype == torch.bool
        _require(is_mask, "known_mask must be bool", _describe(self.known_mask))
        self.known_mask, frames = mask, known[mask]
        if not torch.equal(frames, to_gesture(frames)):
            raise UserError(
                "known frames must have x and y in [0, 1] and press 0 or 1, and be zero while idle"
            )
        self.known = torch.where(mask[:, None], known, 0)

    def paste(self, actions: Tensor) -> Tensor:
        """Put the known frames into actions (..., L, 3)."""
        if self.known is None:
            return actions
        return torch.where(self.known_mask[:, None], self.known, actions)


class Planner:
    """A denoiser as a planner; it remembers its last plan until `reset`.

    Args:
        model: the denoiser, of 250 frames.
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
        self.last: Tensor | None = None

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "cpu") -> "Planner":
        """Load a checkpoint or run folder, and run once what is slow the first time.

        Raises:
            UserError: it cannot be read, its gestures do not have 250 frames, or no such device.
            FloatingPointError: what it draws is not finite.
        """
        is_path = isinstance(checkpoint, str | os.PathLike)
        _require(is_path, "checkpoint must be a path", _describe(checkpoint))
        named = isinstance(device, str | torch.device)
        _require(named, "device must be a name or torch.device", _describe(device))
        try:
            torch.zeros(1, device=device).cpu()
        except (AssertionError, RuntimeError) as e:
            raise UserError(f"device {str(device)!r} cannot be used ({first_line(e)})") from None
        model, scheduler, config = load_model(checkpoint, device)
        wanted = f"{checkpoint} cannot plan: its gestures must have {SEQ_LEN} frames"
        _require(config.seq_len == SEQ_LEN, wanted, config.seq_len)
        planner = cls(model, scheduler, config.sampling, device)
        planner.plan()
        planner.reset()
        torch.optim.Adam([torch.zeros(1)])  # the first one imports for a second
        return planner

    def reset(self) -> None:
        """Forget the last plan, as when the goal has changed."""
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
        num_plans: int = 16,
        num_inference_steps: int = 10,
        budget_ms: float = 500,
        seed: int = 0,
    ) -> PlanResult:
        """Plan one action within the budget; at least one gesture is always drawn.

        Half of the time is for drawing `num_plans` gestures, a quarter of them variations of the
        last plan, if there is one. The rest refines the best three along the straight line
        through their ends: by the gradient, or by CEM where the cost has none, as in
        `torch.inference_mode`.

        Args:
            cost_fn: costs of actions (B, L, 3), data units, float32 → (B,); None = the first
                draw. An action whose cost is not finite is never chosen.
            known: frames that the plan must contain, (L, 3), data units, as gestures are: press 0
                or 1, zero while idle; read under known_mask.
            known_mask: (L,) bool, together with `known`.
            init: an action (L, 3), data units, to start from instead of the last plan; itself a
                candidate.
            strength: in (0, 1], how far the draws leave `init`; 1 = pure noise.
            goal: where to, (context_dim,), not all zeros, as the denoiser was trained on with
                `--context_dim`.
            guidance: weight of the goal in the draws, see `with_goal`; 1 = as trained.
            num_plans: gestures to draw at most, at least 1.
            num_inference_steps: denoising steps, in [1, T].
            budget_ms: wall-clock, above 0, perhaps infinite.
            seed: of all noise, at least 0: same seed, last plan and time enough, same plan; another
                one at each call brings other draws.

        Raises:
            UserError: an argument has a wrong type, shape or range, or no cost is finite.
            FloatingPointError: what the denoiser draws is not finite.
        """
        began = time.perf_counter()
        _require(cost_fn is None or callable(cost_fn), "cost_fn must be a function", cost_fn)
        request = _Request(
            known, known_mask, init, strength, goal, guidance, num_plans, num_inference_steps,
            budget_ms, seed,
        )  # fmt: skip
        if init is None and self.last is not None and cost_fn is not None:
            request.init, request.strength, request.varied = self.last, WARM, WARM_SHARE
        first = self._draw(request, 1)
        sampler_s = time.perf_counter() - began
        actions, cost, used = first[0], math.nan, 0
        if cost_fn is not None:
            actions, cost, used = self._search(cost_fn, request, first, began)
        self.last = actions.clone()
        milliseconds = 1000 * (time.perf_counter() - began)
        return PlanResult(actions, cost, used, milliseconds, 1000 * sampler_s)

    def _search(
        self, cost_fn: PlanCost, request: _Request, first: Tensor, began: float
    ) -> tuple[Tensor, float, int]:
        """Draw more and refine until the time is over; return the actions, their cost, evaluations.

        Args:
            cost_fn: what to minimise.
            request: what to draw, how often, how long.
            first: the draw that has been made, (1, L, 3).
            began: when the call did.
        """
        seconds = request.budget_ms / 1000 - (time.perf_counter() - began)
        objective = Objective(self._batched(cost_fn), 1, UNLIMITED, (), seconds)
        starts = self._draw_all(objective, request, first, began)
        self._refine(objective, request, starts)
        cost, used = float(objective.best_cost[0]), objective.used
        _require(math.isfinite(cost), "cost_fn must give finite costs", f"none in {used}")
        return objective.best[0], cost, used

    def _batched(self, cost_fn: PlanCost) -> Callable[[Tensor], Tensor]:
        """Turn a cost function of (B, L, 3) into one of (1, K, L, 3), on the CPU, checked.

        It gets a copy, which it may change in place; what is not finite becomes NaN.
        """

        def batched(actions: Tensor) -> Tensor:
            costs = cost_fn(actions[0].to(self.device, copy=True))
            shape = actions.shape[1:2]
            shaped = isinstance(costs, Tensor) and costs.shape == shape and not costs.is_complex()
            wanted = f"cost_fn must return a tensor {list(shape)}, one cost per action"
            _require(shaped, wanted, _describe(costs))
            costs = costs.cpu().float()[None]
            return torch.where(costs.isfinite(), costs, math.nan)

        return batched

    def _draw(self, request: _Request, num: int) -> Tensor:
        """Draw gestures, (num, L, 3): variations of `init` first, the rest from pure noise."""
        num_varied = round(request.varied * num)
        parts = []
        for count, base in ((num_varied, request.init), (num - num_varied, None)):
            if not count:
                continue
            shape, steps = (count, SEQ_LEN, 3), request.num_inference_steps
            generator = torch.Generator("cpu").manual_seed(int(request.rng.integers(2**31)))
            options: dict[str, Any] = {"generator": generator, **self.sampling}
            model: Model = self.model
            if request.goal is not None:
                context = request.goal.to(self.device).expand(count, -1)
                model = with_goal(model, context, request.guidance)
            if base is not None and request.strength < 1:
                start_t = max(round(request.strength * self.scheduler.num_timesteps) - 1, 0)
                steps = min(max(round(request.strength * steps), 1), start_t + 1)
                eps = torch.from_numpy(request.rng.standard_normal(shape, dtype=np.float32))
                x_0 = to_model_units(base).expand(shape).to(self.device)
                x_t, _ = self.scheduler.add_noise(x_0, start_t, eps.to(self.device))
                options |= {"x_T": x_t, "start_t": start_t}
            if request.known is not None:
                options["known"] = request.known.to(self.device).expand(shape)
                options["known_mask"] = request.known_mask.to(self.device).expand(shape[:2])
            parts.append(self.scheduler.sample(model, shape, self.device, steps, **options))
        return request.paste(to_gesture(torch.cat(parts).cpu()))

    def _draw_all(
        self, objective: Objective, request: _Request, first: Tensor, began: float
    ) -> Tensor:
        """Draw and evaluate until all are drawn or the time for it is over.

        Args:
            objective: the cost and its budget.
            request: what to draw, how often, how long.
            first: the draw that has been made, (1, L, 3).
            began: when the call did.

        Returns: the best TOP, (1, k, L, 3).
        """
        deadline = began + SHARE * request.budget_ms / 1000
        new, num, left = first, 1, request.num_plans - 1
        if request.init is not None:
            new = torch.cat([request.paste(to_gesture(request.init))[None], first])
        kept, costs = first[:0], objective.best_cost[:0]
        while True:
            kept, costs = torch.cat([kept, new]), torch.cat([costs, objective(new[None])[0]])
            order = costs.nan_to_num(nan=math.inf, posinf=math.inf).argsort()[:TOP]
            kept, costs = kept[order], costs[order]
            now = time.perf_counter()
            each = (now - began) / num  # seconds per gesture; less in a larger chunk
            num = int(min(CHUNK, left, (deadline - now) / each))
            if num < 1:
                return kept[None]
            new, began, left = self._draw(request, num), now, left - num

    def _refine(self, objective: Objective, request: _Request, starts: Tensor) -> None:
        """Improve the best draws within the time left; keep what is cheaper once rounded."""
        before, cost_before = objective.best.clone(), objective.best_cost.clone()
        has_press = (starts[..., 2] > 0.5).any(dim=-1)[0]
        if not has_press.any() or not objective.left:
            return
        z = to_ramp(starts[:, has_press])

        def decode(z: Tensor) -> Tensor:
            return request.paste(ramp(z))

        objective.best_cost = torch.full_like(cost_before, math.inf)
        objective.budget = objective.used + REFINEMENT
        if self._has_gradient(objective, z[:, :1], decode):
            descend(objective, z, decode, LR)
        else:
            cem(objective, request.rng, z[:, 0], decode, std=STD, population=CHUNK, elites=4)
        objective.budget = UNLIMITED
        rounded = request.paste(to_gesture(objective.best))
        cost = objective(rounded[None])[:, 0]
        better = bool(cost < cost_before)
        objective.best = rounded if better else before
        objective.best_cost = cost if better else cost_before

    @staticmethod
    def _has_gradient(objective: Objective, z: Tensor, decode: Callable[[Tensor], Tensor]) -> bool:
        """Return whether the cost has a gradient at decode(z), z (1, K, 6), that leads anywhere."""
        try:
            gradient = objective.gradient(z, decode)
        except RuntimeError:  # torch's word for none; any other reason will show again
            objective.used += FORWARD * z.shape[1]
            return False
        return bool(gradient.isfinite().all() and gradient.any())


def token_cost(
    predictor: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, goal_tokens: Tensor
) -> PlanCost:
    """Return the V-JEPA-2-AC energy of actions under a world model, as a cost function.

    Args:
        predictor: `predictor(tokens (B, N, D), actions (B, T, L, 3)) → (B, N, D)`, T = 1 here.
        tokens: of the screen now, (N, D), such as 16 x 16 V-JEPA 2 tokens, N = 256.
        goal_tokens: of the screen wanted, (N, D).

    Raises:
        UserError: the two differ in shape, or (from the cost function) what is predicted does.
    """
    shape = tokens.shape
    same = len(shape) == 2 and goal_tokens.shape == shape
    _require(
        same, f"goal_tokens must be like tokens, (N, D) = {list(shape)}", _describe(goal_tokens)
    )
    goal = F.layer_norm(goal_tokens, shape[-1:])

    def cost_fn(actions: Tensor) -> Tensor:
        then = predictor(tokens.expand(len(actions), *shape), actions[:, None])
        wanted = (len(actions), *shape)
        _require(then.shape == wanted, f"predictor must return {list(wanted)}", _describe(then))
        return (F.layer_norm(then, shape[-1:]) - goal).abs().mean(dim=(1, 2))

    return cost_fn
