"""The planner as it is shipped, in the benchmark: half a second by a clock that knows the price.

The other methods count evaluations. `Planner` keeps time instead, so its cost function takes here
what a world model would take elsewhere, 2 ms for one candidate, or for a batch of them: its clock
counts that, in place of what the model of the benchmark takes on this machine. All else, its draws
and its refinement, counts as it comes.
"""

import math
import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planning.benchmark import WIDTH, Job, Row, Size, judge_answers, rng_for
from planning.methods import PRIOR, Method
from planning.places import changed_places
from planning.planner import Planner
from planning.search import BACKWARD, FORWARD, CostFn, Objective
from planning.tasks import TASKS, make_instances, model_cost
from planning.world import WorldModel, observe

BUDGET_MS, PRICE_MS = 500, 2


def _is_run_by_itself(*_: Any) -> None:
    raise AssertionError("the planner keeps its own time: run_shipped runs it")


SHIPPED = {  # as the documents name them
    "planner": Method("Planner, told of token changes", PRIOR, _is_run_by_itself, sees_tokens=True),
    "planner_cost": Method("Planner, the cost alone", PRIOR, _is_run_by_itself),
}


def shipped_jobs(size: Size, names: Collection[str]) -> list[Job]:
    """Return the jobs of the planner in the stages of the other methods."""
    jobs = [("main", seed, size.instances, "") for seed in range(size.seeds)]
    jobs += [("learned", 0, num, name) for name, num, _ in size.learned]
    jobs += [("batched", 0, size.batched, "")] if size.batched else []
    return [
        Job(stage, name, task, seed, num, variant=variant)
        for stage, seed, num, variant in jobs
        for name in names
        for task in (size.learned_tasks if stage == "learned" else TASKS)
    ]


class PricedCost:
    """The cost of one instance at a stated price, and the clock that counts it.

    Args:
        cost_fn: of one instance, (1, K, L, 3) → (1, K).
        width: candidates that take PRICE_MS together.
    """

    def __init__(self, cost_fn: CostFn, width: int) -> None:
        self.cost_fn, self.width, self.correction, self.began = cost_fn, width, 0.0, 0.0

    def clock(self) -> float:
        """Return the seconds since some moment, the price of calls in place of what they took."""
        return time.perf_counter() + self.correction

    def __call__(self, actions: Tensor) -> Tensor:
        """Return the costs of actions, (K, L, 3) → (K,)."""
        self.began = time.perf_counter()
        costs = self.cost_fn(actions[None])[0]
        charge = partial(self._charge, len(actions))
        charge(FORWARD)
        if costs.requires_grad:
            costs.register_hook(lambda _: self._begin())
            actions.register_hook(lambda _: charge(BACKWARD))
        return costs

    def _begin(self) -> None:
        self.began = time.perf_counter()

    def _charge(self, num: int, each: int) -> None:
        price = PRICE_MS / 1000 * each * math.ceil(num / self.width)
        self.correction += price - (time.perf_counter() - self.began)


def run_shipped(
    job: Job,
    planner: Planner,
    model: WorldModel,
    *,
    refine: bool = True,
    budget_ms: float = BUDGET_MS,
    **options: Any,
) -> Row:
    """Plan the instances of a job, one after the other, and judge the plans.

    Args:
        job: the line to be made.
        planner: its clock is another one meanwhile.
        model: what it asks.
        refine: what the rule says of the model (planning/learned.py); else all is for draws.
        budget_ms: of each plan.
        options: of `Planner.plan`, further ones.
    """
    instances = make_instances(job.task, job.instances, job.seed)
    width = WIDTH if job.stage == "batched" else 1
    answers = Objective(model_cost(instances, model), job.instances, job.budget, [job.budget])
    rng, wall = rng_for(*job.key), planner.clock
    used, milliseconds, made = list[int](), list[float](), list[str]()
    try:
        for i in range(job.instances):
            one = instances.rows(slice(i, i + 1))
            cost = PricedCost(model_cost(one, model), width)
            planner.clock = cost.clock
            planner.reset()
            told = dict(options)
            if SHIPPED[job.method].sees_tokens:
                now = observe(one.scenes, one.scenes.state)[0]
                told["places"] = changed_places(now, one.goal_tokens[0])
            seed = int(rng.integers(2**31))
            told |= {} if refine else {"refine": False, "num_plans": job.budget}
            plan = planner.plan(cost, budget_ms=budget_ms, seed=seed, **told)
            answers.best[i], answers.best_cost[i] = plan.actions, plan.cost
            used.append(plan.evaluations)
            milliseconds.append(plan.milliseconds)
            made.append(plan.method)
    finally:
        planner.clock = wall
    answers.finish()
    row: Row = asdict(job) | {"settings": {"refine": refine}, "used": max(used)}
    row |= {"ms_median": float(torch.tensor(milliseconds).median()), "ms_most": max(milliseconds)}
    row |= {"made_by": {method: made.count(method) for method in sorted(set(made))}}
    return row | judge_answers(instances, answers)
