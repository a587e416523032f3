"""Planners with a learned prior: a trained denoiser that knows gestures, but no goal.

`DiffusionPrior.draw` is a drop-in for the true generator, so that select and refine are the very
same functions for both.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planning.optimizers import Draw, shoot_for_starts, starts_of
from planning.search import BACKWARD, FORWARD, Bend, Objective, descend, ramp, to_ramp
from train_diffusion_ddim import DDIMScheduler, generate, load_model, to_gesture, to_model_units
from trainlib.gestures import PRESSED, SEQ_LEN


@dataclass
class DiffusionPrior:
    """A denoiser as a source of gestures.

    Attributes:
        model, scheduler: as of `load_model`.
        sampling: num_inference_steps, eta, sampler.
        bank: gestures (N, L, 3) drawn beforehand; `draw` then takes random rows of it. They do
            not depend on the instance, and 8,000 of them serve 200 instances as well as 50,000.
    """

    model: nn.Module
    scheduler: DDIMScheduler
    sampling: dict[str, Any]
    bank: Tensor | None = None

    @classmethod
    def load(cls, checkpoint: str) -> "DiffusionPrior":
        """Load a checkpoint or run folder, on the CPU."""
        model, scheduler, config = load_model(checkpoint)
        return cls(model, scheduler, config.sampling)

    def sample(self, num: int, seed: int, **options: Any) -> Tensor:
        """Draw from the sampler, (num, L, 3), not rounded; options as of `generate`."""
        shape, given = (num, SEQ_LEN, 3), {**self.sampling, **options}
        return generate(self.model, self.scheduler, shape, seed=seed, **given)

    def draw(self, num: int, K: int, rng: np.random.Generator) -> Tensor:
        """Draw gestures (num, K, L, 3), rounded to the data format."""
        if self.bank is None:
            return to_gesture(self.sample(num * K, int(rng.integers(2**31)))).unflatten(0, (num, K))
        return self.bank[torch.from_numpy(rng.integers(0, len(self.bank), (num, K)))]

    def mutate(self, x_0: Tensor, sigma: float, steps: int, seed: int) -> Tensor:
        """Noise gestures x_0, (N, L, 3), data units, to sigma and sample from there."""
        start_t = self.scheduler.timestep_at(sigma)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        x_t, _ = self.scheduler.add_noise(to_model_units(x_0), start_t, eps)
        options = {"num_inference_steps": steps, "x_T": x_t, "start_t": start_t}
        return to_gesture(self.sample(len(x_0), seed, **options))


def guided(
    objective: Objective,
    rng: np.random.Generator,
    prior: DiffusionPrior,
    *,
    scale: float = 1.0,
    smoothing: float = 0.0,
) -> None:
    """Guide the sampler down the cost's gradient at x_0_pred; evaluate what comes out.

    Args:
        objective: the cost and its budget; every gradient counts three.
        rng: source of noise.
        prior: the denoiser.
        scale: data units that x_0_pred moves per unit of gradient.
        smoothing: if above 0, the gradient is the mean over 4 copies with as much noise on x and y,
            to see past plateaus (loss-guided diffusion, Song et al., ICML 2023).
    """
    steps = int(prior.sampling["num_inference_steps"])
    copies = 4 if smoothing else 1

    def price(K: int) -> int:
        graded, plain = (math.ceil(num / objective.width) for num in (K * copies, K))
        return steps * graded * (FORWARD + BACKWARD) + plain * FORWARD

    K = max(K for K in range(1, objective.capacity) if price(K) <= objective.budget)
    seed = int(rng.integers(2**31))
    generator = torch.Generator().manual_seed(seed)

    def cost_fn(actions: Tensor) -> Tensor:
        if not smoothing:
            return objective.guidance(actions)
        blur = smoothing * torch.randn(len(actions), copies, 1, 2, generator=generator)
        many = torch.cat([actions[:, None, :, :2] + blur, actions[:, None, :, 2:].expand(
            -1, copies, -1, -1)], dim=-1)  # fmt: skip
        return objective.guidance(many.flatten(0, 1)).view(-1, copies).mean(dim=1)

    shape = (objective.num * K, SEQ_LEN, 3)
    x_T = torch.randn(shape, generator=generator)
    sample = prior.scheduler.sample(
        prior.model, shape, "cpu", **prior.sampling, x_T=x_T, generator=generator,
        cost_fn=cost_fn, guidance_scale=scale,
    )  # fmt: skip
    objective(to_gesture(sample).unflatten(0, (objective.num, K)))


def diffusion_es(
    objective: Objective,
    rng: np.random.Generator,
    prior: DiffusionPrior,
    *,
    sigma: float = 0.4,
    elites: int = 5,
    steps: int = 2,
    refine_share: float = 0.0,
    lr: float = 0.02,
) -> None:
    """Evolve gestures whose mutations are partial noising and denoising (arXiv:2402.06559).

    A fifth of the budget is drawn from the prior; each later fifth mutates the best so far.

    Args:
        objective: the cost and its budget.
        rng: source of noise.
        prior: the denoiser.
        sigma: noise of a mutation, data units.
        elites: gestures that survive a round.
        steps: denoising steps of a mutation.
        refine_share: of the budget, kept for Adam steps on the ramps of the best three.
        lr: of these steps.
    """
    population = objective.capacity // 5
    parents, costs = shoot_for_starts(objective, rng, prior.draw, 0.2, elites)
    rows = torch.arange(objective.num)[:, None]
    kept = int(refine_share * objective.capacity)
    while objective.room() >= population + kept:
        chosen = torch.from_numpy(rng.integers(0, elites, (objective.num, population)))
        seed = int(rng.integers(2**31))
        children = prior.mutate(parents[rows, chosen].flatten(0, 1), sigma, steps, seed)
        children = children.unflatten(0, (objective.num, population))
        pool = torch.cat([parents, children], 1)
        pool_costs = torch.cat([costs, objective(children)], 1)
        order = pool_costs.argsort(dim=1)[:, :elites]
        parents, costs = pool[rows, order], pool_costs.gather(1, order)
    if kept:
        descend(objective, to_ramp(parents[:, :3]), ramp, lr)


def penalised_descent(
    objective: Objective,
    rng: np.random.Generator,
    prior: DiffusionPrior,
    draw: Draw,
    *,
    share: float = 0.4,
    top: int = 3,
    lr: float = 0.02,
    sigma: float = 0.1,
    weight: float = 1.0,
) -> None:
    """Draw; then Adam from the best, at a cost that grows as the denoiser finds a gesture odd.

    The penalty is the mean squared distance from what becomes of the gesture when it is noised to
    sigma and denoised; its gradient takes that for given, as score distillation does (Poole et al.,
    arXiv:2209.14988). Draws are evaluated without.

    Args:
        objective: the cost and its budget; the penalty counts nothing.
        rng: source of noise.
        prior: the denoiser.
        draw: source of gestures.
        share: of the budget, for drawing.
        top: gestures that are refined.
        lr: of Adam.
        sigma: noise, data units.
        weight: of the penalty.
    """
    starts, _ = shoot_for_starts(objective, rng, draw, share, starts_of(objective, top))
    seed, own = int(rng.integers(2**31)), objective.cost_fn

    def penalised(actions: Tensor) -> Tensor:
        plain = actions.detach().flatten(0, 1)
        denoised = prior.mutate(plain, sigma, 1, seed).view_as(actions)
        return own(actions) + weight * (actions - denoised).square().mean(dim=(2, 3))

    objective.cost_fn = penalised
    try:
        descend(objective, to_ramp(starts), ramp, lr)
    finally:
        objective.cost_fn = own


def denoised_descent(
    objective: Objective,
    rng: np.random.Generator,
    prior: DiffusionPrior,
    *,
    share: float = 0.3,
    top: int = 3,
    knots: int = 4,
    lr: float = 0.02,
    every: int = 4,
    sigma: float = 0.05,
) -> None:
    """Draw; then from the best `top`, turn by turn, a few Adam steps and a little denoising.

    What the gradient makes of a gesture is noised to sigma and denoised, so that it stays one.

    Args:
        objective: the cost and its budget.
        rng: source of noise.
        prior: the denoiser.
        share: of the budget, for drawing.
        top: gestures that are refined.
        knots: of `Bend`, along which the steps go.
        lr: of Adam.
        every: steps between two denoisings.
        sigma: noise, data units.
    """
    x, _ = shoot_for_starts(objective, rng, prior.draw, share, top)
    while objective.room(FORWARD + BACKWARD) >= top:
        bend = Bend(x, knots)
        z = descend(objective, bend.z, bend, lr, every, scale_dim=-2)
        moved = x if z is None else to_gesture(bend(z))
        clean = prior.mutate(moved.flatten(0, 1), sigma, 2, int(rng.integers(2**31)))
        clean = clean.unflatten(0, moved.shape[:2])
        x = torch.where((clean[..., 2] > PRESSED).any(dim=-1)[..., None, None], clean, moved)
    if objective.room() >= top:
        objective(x)
