"""A closed loop: two plans a second on a screen that changes, each going on from the last.

Every step plans one window, 500 ms, of which the first frames are the tail of the last plan: they
are being carried out while the planner thinks, so they are known. Of the plan all frames but its
own tail are carried out. A contact that is held over counts from where the finger is. Between
steps the widget that should change drifts; every few steps there is a new goal. Cold, the planner
forgets its last plan at every step; warm, it starts from it.
"""

from dataclasses import asdict, replace

import numpy as np
import torch

from planning.benchmark import Job, Row, rng_for
from planning.places import changed_places
from planning.planner import PlanCost, Planner
from planning.search import CostFn
from planning.tasks import Instances, is_solved, make_instances, model_cost
from planning.world import LIST, Scenes, State, hard_world, observe
from trainlib.gestures import SEQ_LEN

TAIL = 25  # frames of a plan that are left for the next one to begin with: 50 ms
STEPS = 20  # plans of an episode: ten seconds
NEW_GOAL = 4  # steps from goal to goal
DRIFT = 0.02  # standard deviation of what the widget moves by itself between steps
LOOP_TASKS = ("scroll", "slider", "drag")
MODES = ("cold", "warm")


def new_goal(scenes: Scenes, rng: np.random.Generator) -> State:
    """Draw where the first widget of a scene (N = 1) should be next: elsewhere than now."""
    pos, value = scenes.pos.clone(), scenes.value.clone()
    if scenes.kind[0, 0] == LIST:
        sign = -1 if value[0, 0] > 0 else 1
        value[0, 0] += sign * rng.uniform(0.1, 0.6)
        return State(pos, value)
    low, high = scenes.low[0, 0].numpy(), scenes.high[0, 0].numpy()
    while True:
        place = torch.from_numpy(rng.uniform(low, high)).float()
        if torch.linalg.vector_norm(place - scenes.pos[0, 0]) >= 0.2:
            pos[0, 0] = place
            return State(pos, value)


def drifted(scenes: Scenes, rng: np.random.Generator) -> Scenes:
    """Let the first widget of a scene (N = 1) move a little by itself."""
    moved = torch.from_numpy(DRIFT * rng.standard_normal(2)).float()
    pos, value = scenes.pos.clone(), scenes.value.clone()
    if scenes.kind[0, 0] == LIST:
        value[0, 0] = (value[0, 0] + moved[0]).clamp(-1, 1)
    pos[0, 0] = torch.clamp(pos[0, 0] + moved, scenes.low[0, 0], scenes.high[0, 0])
    return replace(scenes, pos=pos, value=value)


def towards(task: str, scenes: Scenes, goal: State) -> Instances:
    """Return the instance of a step: the first widget to its goal, the others as they are now."""
    pos, value = scenes.pos.clone(), scenes.value.clone()
    pos[:, 0], value[:, 0] = goal.pos[:, 0], goal.value[:, 0]
    wanted = State(pos, value)
    return Instances(task, scenes, wanted, observe(scenes, wanted))


def _of_one(cost_fn: CostFn) -> PlanCost:
    """Return the cost function of the one instance that there is, (K, L, 3) → (K,)."""
    return lambda actions: cost_fn(actions[None])[0]


def run_episode(
    planner: Planner, task: str, seed: int, *, warm: bool, budget_ms: float, steps: int = STEPS
) -> tuple[str, list[float]]:
    """Plan and act `steps` times.

    Returns: whether the goal was reached after each step, "0110…"; milliseconds of each plan.
    """
    rng, executed = rng_for("loop", task, seed), SEQ_LEN - TAIL
    scenes = make_instances(task, 1, seed).scenes
    known, mask = torch.zeros(SEQ_LEN, 3), torch.arange(SEQ_LEN) < TAIL
    planner.reset()
    bits, milliseconds = "", []
    for step in range(steps):
        if step % NEW_GOAL == 0:
            goal = new_goal(scenes, rng)
        if not warm:
            planner.reset()
        instances = towards(task, scenes, goal)
        cost_fn = model_cost(instances)
        prefix = (known, mask) if step else (None, None)
        places = changed_places(observe(scenes, scenes.state)[0], instances.goal_tokens[0])
        plan = planner.plan(
            _of_one(cost_fn), budget_ms=budget_ms, known=prefix[0], known_mask=prefix[1],
            places=places,
        )  # fmt: skip
        milliseconds.append(plan.milliseconds)
        after = hard_world(scenes, plan.actions[None, :executed])
        bits += "01"[int(is_solved(instances, after))]
        known = torch.cat([plan.actions[executed:], torch.zeros(executed, 3)])
        scenes = drifted(replace(scenes, pos=after.pos, value=after.value), rng)
    return bits, milliseconds


def loop_jobs(episodes: int) -> list[Job]:
    """Return the jobs of the stage: cold and warm on every task."""
    return [Job("loop", m, task, 0, episodes) for m in MODES for task in LOOP_TASKS if episodes]


def run_loop(job: Job, planner: Planner, budget_ms: float = 500) -> Row:
    """Run the episodes of a job, whose method is cold or warm."""
    bits, milliseconds = "", list[float]()
    for i in range(job.instances):
        warm = job.method == "warm"
        found = run_episode(planner, job.task, job.seed + i, warm=warm, budget_ms=budget_ms)
        bits, milliseconds = bits + found[0], milliseconds + found[1]
    return asdict(job) | {
        "settings": {},
        "solved": {str(job.budget): bits},
        "by_step": [bits[i::STEPS].count("1") / job.instances for i in range(STEPS)],
        "ms_median": float(np.median(milliseconds)),
        "ms_95": float(np.quantile(milliseconds, 0.95)),
        "ms_most": max(milliseconds),
    }
