"""The list of methods that the benchmark compares, in three classes of what they may know.

cost only      the cost function (some also the true generator of gestures, or the tokens that the
               cost compares, and say so)
learned prior  gestures to learn from, and the cost function
goal trained   pairs of goal and gesture from the simulator, and the cost function
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from planning import baselines as base
from planning import optimizers as opt
from planning.diffusion import (
    DiffusionPrior,
    denoised_descent,
    diffusion_es,
    guided,
    penalised_descent,
)
from planning.goals import (
    GoalPolicy,
    cfg_ddim,
    nearest_goal,
    regress_ends,
    regress_gesture,
    regress_jitter,
)
from planning.search import REACH

COST, PRIOR, GOAL = "cost only", "learned prior", "goal trained"


@dataclass(frozen=True)
class Method:
    """One row of the benchmark.

    Attributes:
        label: its name in tables and figures.
        group: COST, PRIOR or GOAL.
        run: `run(objective, rng, **settings)`; goal-trained ones also take `context`.
        sees_tokens: whether `run` also takes `tokens` and `goal_tokens`, (I, N, D).
        trials: the settings that are tried on the tuning instances; at most four each.
        second: whether `run` also takes `second_cost`, that of another learned world model.
    """

    label: str
    group: str
    run: Callable[..., None]
    trials: tuple[dict[str, Any], ...] = ({},)
    sees_tokens: bool = False
    second: bool = False


def grid(name: str, *values: float) -> tuple[dict[str, Any], ...]:
    """Return one setting per value."""
    return tuple({name: value} for value in values)


REFINE = tuple({"share": s, "lr": lr} for s in (0.2, 0.4) for lr in (0.02, 0.05))
IN_TIME = tuple({"share": s, "lr": lr} for s in (0.2, 0.3) for lr in (0.02, 0.05))
LOCAL_CEM = tuple({"share": s, "std": std} for s in (0.2, 0.4) for std in (0.05, 0.15))
LOCAL_CEM_IN_TIME = tuple({"share": s, "std": std} for s in (0.2, 0.3) for std in (0.05, 0.15))
STEPS = grid("lr", 0.01, 0.03, 0.1, 0.3)
AXES = tuple({"share": s, "step": step} for s in (0.2, 0.4) for step in (0.05, 0.2))
GENERATIONS = tuple({"share": s, "std": std} for s in (0.2, 0.4) for std in (0.05, 0.2))
TRUST = {"reach": REACH, "share": 0.3, "lr": 0.02}  # untuned: the simulator needs none
SECOND = {"share": 0.3, "lr": 0.02}  # untuned: the simulator has no second
JITTER = tuple({"spread": s, "lr": lr} for s in (0.05, 0.15) for lr in (0.02, 0.05))


def cost_methods() -> dict[str, Method]:
    """Return the methods that learn nothing."""
    return {
        "shoot_noise": Method("shooting, noise", COST, partial(opt.shoot, draw=opt.draw_noise)),
        "shoot_true": Method("shooting, true generator", COST, opt.shoot),
        "adam_zeros": Method("Adam raw, 10 steps from zeros", COST, opt.adam_zeros, STEPS),
        "adam_raw": Method("Adam raw, one start", COST, opt.adam_raw, STEPS),
        "adam_raw_8": Method(
            "Adam raw, 8 starts", COST, partial(opt.adam_raw, restarts=8), STEPS
        ),
        "adam_ramp": Method("Adam 6-D, 8 starts", COST, opt.adam_ramp, STEPS),
        "cem_raw": Method("CEM raw", COST, opt.cem_raw, grid("std", 0.03, 0.1, 0.3, 0.5)),
        "cem_ramp": Method("CEM 6-D", COST, opt.cem_ramp, grid("std", 0.15, 0.3, 0.5, 1.0)),
        "mppi": Method("MPPI raw", COST, opt.mppi, grid("std", 0.03, 0.1, 0.2, 0.4)),
        "annealed": Method(
            "annealed, no data", COST, opt.annealed, grid("temperature", 1e-4, 3e-4, 1e-3, 3e-3)
        ),
        "true_adam_raw": Method(
            "true generator + Adam raw", COST, partial(opt.shoot_then_refine, raw=True), REFINE
        ),
        "true_adam": Method("true generator + Adam 6-D", COST, opt.shoot_then_refine, REFINE),
        "true_cem": Method("true generator + CEM 6-D", COST, opt.shoot_then_cem, LOCAL_CEM),
    } | expert_methods()  # fmt: skip


def expert_methods() -> dict[str, Method]:
    """Return what an expert would try first; nothing is learned, two rows look at the tokens."""
    shoot, refine = opt.shoot, opt.shoot_then_refine
    sobol, structured = base.draw_sobol, base.draw_structured
    return {
        "sobol_axes": Method(
            "Sobol + coordinate search 6-D", COST, base.coordinate_search, AXES
        ),
        "sobol_cma": Method("Sobol + CMA-ES 6-D", COST, base.cma_es, GENERATIONS),
        "sobol_adam": Method("Sobol + Adam 6-D", COST, partial(refine, draw=sobol), REFINE),
        "sobol_halving": Method("Sobol + Adam 6-D, halving", COST, base.halving, REFINE),
        "structured": Method("structured draws", COST, partial(shoot, draw=structured)),
        "structured_adam": Method(
            "structured draws + Adam 6-D", COST, partial(refine, draw=structured), REFINE
        ),
        "changes": Method(
            "draws at token changes", COST, base.at_changes(shoot), sees_tokens=True
        ),
        "changes_adam": Method(
            "draws at token changes + Adam 6-D", COST, base.at_changes(refine), REFINE, True
        ),
        "changes_trust": Method(
            "draws at token changes + Adam near", COST, base.at_changes(refine), (TRUST,), True
        ),
        "changes_second": Method(
            "draws at token changes + Adam 6-D, a second chooses",
            COST, base.at_changes(opt.refine_then_choose), (SECOND,), True, True,
        ),
    }  # fmt: skip


def prior_methods(prior: DiffusionPrior) -> dict[str, Method]:
    """Return the methods that use a denoiser of gestures.

    What they draw before they refine is at most what half a second allows on one core.
    """
    draw, scales = prior.draw, (0.3, 1.0, 3.0, 10.0)
    refine, local = opt.shoot_then_refine, opt.shoot_then_cem
    return {
        "ddim_select": Method("DDIM, select", PRIOR, partial(opt.shoot, draw=draw)),
        "ddim_adam_raw": Method(
            "DDIM + Adam raw", PRIOR, partial(refine, draw=draw, raw=True), IN_TIME
        ),
        "ddim_adam": Method("DDIM + Adam 6-D", PRIOR, partial(refine, draw=draw), IN_TIME),
        "ddim_trust": Method("DDIM + Adam near", PRIOR, partial(refine, draw=draw), (TRUST,)),
        "ddim_second": Method(
            "DDIM + Adam 6-D, a second chooses",
            PRIOR,
            partial(opt.refine_then_choose, draw=draw),
            (SECOND,),
            second=True,
        ),
        "ddim_denoised": Method(
            "DDIM + Adam, denoised between",
            PRIOR,
            partial(denoised_descent, prior=prior),
            grid("sigma", 0.02, 0.05, 0.1),
        ),
        "changes_penalised": Method(
            "draws at token changes + Adam 6-D, penalised",
            PRIOR,
            base.at_changes(partial(penalised_descent, prior=prior)),
            grid("weight", 0.1, 1.0, 10.0),
            sees_tokens=True,
        ),
        "ddim_cem": Method("DDIM + CEM 6-D", PRIOR, partial(local, draw=draw), LOCAL_CEM_IN_TIME),
        "ddim_guided": Method(
            "DDIM, guided", PRIOR, partial(guided, prior=prior), grid("scale", *scales)
        ),
        "ddim_guided_smooth": Method(
            "DDIM, guided, smoothed",
            PRIOR,
            partial(guided, prior=prior, smoothing=0.05),
            grid("scale", *scales),
        ),
        "diffusion_es": Method(
            "Diffusion-ES",
            PRIOR,
            partial(diffusion_es, prior=prior),
            grid("sigma", 0.1, 0.2, 0.4, 0.8),
        ),
        "diffusion_es_adam": Method(
            "Diffusion-ES + Adam 6-D",
            PRIOR,
            partial(diffusion_es, prior=prior, sigma=0.2),
            tuple({"refine_share": s, "lr": lr} for s in (0.4, 0.6) for lr in (0.02, 0.05)),
        ),
    }


def goal_methods(policy: GoalPolicy) -> dict[str, Method]:
    """Return the methods that were trained on goals."""
    cfg, ends = partial(cfg_ddim, policy=policy), partial(regress_ends, policy=policy)
    jitter = partial(regress_jitter, policy=policy)
    return {
        "cfg_ddim": Method("DDIM given the goal", GOAL, cfg, grid("scale", 1.0, 1.5, 2.0, 3.0)),
        "cfg_ddim_adam": Method(
            "DDIM given the goal + Adam 6-D", GOAL, partial(cfg, refine=True), STEPS
        ),
        "cfg_ddim_64_adam": Method(
            "DDIM given the goal, 64 draws + Adam 6-D",
            GOAL,
            partial(cfg, num=64, refine=True),
            STEPS,
        ),
        "cfg_ddim_trust": Method(
            "DDIM given the goal + Adam near",
            GOAL,
            partial(cfg, refine=True, reach=REACH),
            grid("lr", 0.02),
        ),
        "regress_gesture": Method(
            "regression to the gesture", GOAL, partial(regress_gesture, policy=policy)
        ),
        "regress_ends": Method("regression to 6 parameters", GOAL, ends),
        "regress_ends_adam": Method(
            "regression to 6 parameters + Adam 6-D", GOAL, partial(ends, refine=True), STEPS
        ),
        "regress_jitter_adam": Method(
            "regression, jittered + Adam 6-D", GOAL, partial(jitter, share=0.3), JITTER
        ),
        "regress_jitter": Method(
            "regression, jittered", GOAL, partial(jitter, method=opt.shoot), grid("spread", 0.1)
        ),
        "regress_jitter_trust": Method("regression, jittered + Adam near", GOAL, jitter, (TRUST,)),
        "regress_jitter_second": Method(
            "regression, jittered + Adam 6-D, a second chooses",
            GOAL,
            partial(jitter, method=opt.refine_then_choose),
            (SECOND,),
            second=True,
        ),
        "nearest_goal": Method("nearest goal", GOAL, partial(nearest_goal, policy=policy)),
    }
