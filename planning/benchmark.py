"""Run methods on tasks, keep what each instance came to, and count.

A result is one line of results.jsonl per (stage, method, task, seed): written as it comes, so an
interrupted run goes on where it stopped. Stages:

    main         every method, 250 evaluations, 50 instances per seed
    long         some methods, 1,000 and 8,000 evaluations, fewer instances
    temperature  some methods, at other reaches of the gradient
    learned      many methods, with learned world models in place of the soft one (variant)
    batched      every method, 250 calls of up to 32 actions each, as on a GPU
    courses      tasks for more than a straight line, methods of their own (course_methods.py)
    loop         the planner in a closed loop, twice a second, cold and warm (loop.py)
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planning.goals import context_of
from planning.methods import GOAL, Method
from planning.search import Objective
from planning.tasks import TASKS, Instances, base_rate, is_solved, make_instances, model_cost
from planning.world import WorldModel, energy, hard_world, observe, soft_world
from train_diffusion_ddim import to_gesture
from trainlib.errors import UserError
from trainlib.files import write_json
from trainlib.gestures import PRESSED
from trainlib.process import progress

STAGES = ("main", "long", "temperature", "learned", "batched", "courses", "loop")
BUDGET = 250  # evaluations of 2 ms in half a second
MILESTONES = (10, 30, 100, 250)
LONG_MILESTONES = (10, 30, 100, 250, 1000, 8000)
WIDTH = 32  # actions that the stage batched evaluates at the price of one
TUNING_SEED = 1000
LONG_METHODS = ("shoot_true", "adam_raw", "adam_ramp", "cem_raw", "cem_ramp", "true_adam",
                "ddim_select", "ddim_adam")  # fmt: skip
LEARNED_METHODS = (
    "shoot_true", "adam_raw", "cem_ramp", "true_adam", "sobol_axes", "sobol_cma", "structured",
    "structured_adam", "changes", "changes_adam", "changes_trust", "changes_second",
    "changes_penalised", "ddim_select", "ddim_adam", "ddim_trust", "ddim_second", "ddim_denoised",
    "diffusion_es", "diffusion_es_adam", "cfg_ddim", "cfg_ddim_adam", "cfg_ddim_64_adam",
    "cfg_ddim_trust", "nearest_goal", "regress_ends_adam", "regress_jitter", "regress_jitter_adam",
    "regress_jitter_trust", "regress_jitter_second",
)  # fmt: skip
KNOB_METHODS = ("shoot_true", "adam_raw", "cem_ramp", "true_adam", "ddim_select", "ddim_adam")
TEMPERATURES = (0.005, 0.1)
KNOB_TASKS = ("tap_48dp", "slider")
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of the benchmark to run."""

    instances: int = 50  # per seed
    seeds: int = 4
    tuning: int = 10
    bank: int = 8192
    long: tuple[tuple[int, int], ...] = ((1000, 100), (8000, 25))  # (budget, instances)
    extra: int = 100  # instances of the stage temperature
    learned: tuple[tuple[str, int, int], ...] = (  # (world model, instances, budget)
        ("objects_240k", 100, BUDGET), ("objects_60k", 25, BUDGET), ("objects_15k", 25, BUDGET),
        ("tokens_60k", 20, BUDGET),  # it is slow
    )  # fmt: skip
    batched: int = 25  # instances of the stage batched
    courses: int = 100  # instances of a course
    episodes: int = 5  # of the loop
    timed: int = 5  # plans that are timed
    chance: int = 80_000  # gestures of a base rate
    learned_tasks: tuple[str, ...] = tuple(TASKS)


FULL = Size()
QUICK = Size(
    instances=3, seeds=1, tuning=0, bank=256, long=((1000, 3),), extra=3,
    learned=(("objects_15k", 2, BUDGET), ("tokens_60k", 1, 100)),
    batched=0, courses=1, episodes=0, timed=1, chance=400, learned_tasks=KNOB_TASKS,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One line of the results to be made."""

    stage: str
    method: str
    task: str
    seed: int
    instances: int
    budget: int = BUDGET
    variant: str = ""  # of the world model

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the line."""
        return (self.stage, self.method, self.task, self.seed, self.budget, self.variant)


def plan_jobs(methods: Mapping[str, Method], size: Size) -> list[Job]:
    """Return the jobs of the stages that plan on the GUI world, the main stage first."""
    plain = [name for name, method in methods.items() if not method.second]
    jobs = [
        Job("main", name, task, seed, size.instances)
        for seed in range(size.seeds)
        for name in plain
        for task in TASKS
    ]
    for budget, num in size.long:
        names = [name for name in LONG_METHODS if name in methods]
        jobs += [Job("long", name, task, 0, num, budget) for name in names for task in TASKS]
    known = [name for name in KNOB_METHODS if name in methods]
    for tau in TEMPERATURES:
        jobs += [
            Job("temperature", name, task, 0, size.extra, variant=str(tau))
            for name in known
            for task in KNOB_TASKS
        ]
    known = [name for name in LEARNED_METHODS if name in methods]
    for world_model, num, budget in size.learned:
        jobs += [
            Job("learned", name, task, 0, num, budget, world_model)
            for name in known
            for task in size.learned_tasks
        ]
    if size.batched:
        jobs += [Job("batched", name, task, 0, size.batched) for name in plain for task in TASKS]
    return jobs


def rng_for(*key: Any) -> np.random.Generator:
    """Return the random numbers of a job: a function of its name."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def run_job(
    job: Job,
    method: Method,
    settings: dict[str, Any],
    model: WorldModel,
    second: WorldModel | None = None,
) -> Row:
    """Plan all instances of a job with one method and judge the answers on the hard simulator.

    Args:
        job: the line to be made.
        method: as the job names it.
        settings: of the method.
        model: what the planner asks.
        second: another world model, for a method that takes one.
    """
    instances = make_instances(job.task, job.instances, job.seed)
    milestones = [m for m in LONG_MILESTONES if m <= job.budget]
    width = WIDTH if job.stage == "batched" else 1
    cost_fn = model_cost(instances, model)
    objective = Objective(cost_fn, job.instances, job.budget, milestones, width=width)
    began = time.perf_counter()
    told: dict[str, Any] = goal_of(method, instances)
    if method.second and second is not None:
        told["second_cost"] = model_cost(instances, second)
    method.run(objective, rng_for(*job.key), **settings, **told)
    objective.finish()
    used, batch_s = objective.used, round(time.perf_counter() - began, 3)
    row: Row = asdict(job) | {"settings": settings, "used": used, "batch_s": batch_s}
    return row | judge_answers(instances, objective)


def goal_of(method: Method, instances: Instances) -> dict[str, Tensor]:
    """Return what a method is told beside the cost."""
    told = {"context": context_of(instances)} if method.group == GOAL else {}
    if method.sees_tokens:
        told["tokens"] = observe(instances.scenes, instances.scenes.state)
        told["goal_tokens"] = instances.goal_tokens
    return told


def judge_answers(instances: Instances, objective: Objective) -> Row:
    """Return what the answers are worth: bits of success per instance, costs, plausibility."""
    solved: dict[str, str] = {}
    for milestone, (actions, _, _) in objective.kept.items():
        bits = is_solved(instances, hard_world(instances.scenes, actions))
        solved[str(milestone)] = "".join("01"[int(b)] for b in bits)
    scenes, goal = instances.scenes, instances.goal_tokens
    true_cost = energy(observe(scenes, hard_world(scenes, objective.best)), goal)
    nothing = energy(observe(scenes, scenes.state), goal)
    finite = torch.where(objective.best_cost.isfinite(), objective.best_cost, nothing)
    return {
        "solved": solved,
        "model_cost": float((finite / nothing).mean()),  # 1 = doing nothing, 0 = the goal
        "true_cost": float((true_cost / nothing).mean()),
        "valid": float(is_valid(objective.best).float().mean()),
        "one_press": float((contacts(objective.best) == 1).float().mean()),
        "first_button": first_button(instances, objective.best, objective.kept),
    }


def is_valid(actions: Tensor) -> Tensor:
    """Return which actions, rounded to the data format, are gestures of the family; (N,) bool."""
    from evaluation.bayes import DEFAULT_PRIOR  # here: an installed planner comes without them
    from evaluation.family import validity

    return validity(to_gesture(actions), DEFAULT_PRIOR)["valid"]


def contacts(actions: Tensor) -> Tensor:
    """Count the contacts of actions (N, L, 3); (N,)."""
    pressed = torch.nn.functional.pad(actions[..., 2] > PRESSED, (1, 0))
    return (pressed[:, 1:] & ~pressed[:, :-1]).sum(dim=1)


def first_button(instances: Instances, actions: Tensor, kept: Mapping[int, Any]) -> float | None:
    """Return the share of solved decoys that were solved by the first of the two buttons."""
    if instances.task != "decoy":
        return None
    solved = is_solved(instances, hard_world(instances.scenes, actions))
    start = actions[torch.arange(len(actions)), (actions[..., 2] > PRESSED).int().argmax(dim=1), :2]
    distance = torch.linalg.vector_norm(start[:, None] - instances.scenes.pos[:, 1:3], dim=-1)
    if not solved.any():
        return None
    return float((distance[:, 0] < distance[:, 1])[solved].float().mean())


# ----------------------------------------------------------------------------------------
# STAGES
# ----------------------------------------------------------------------------------------


def tune(methods: Mapping[str, Method], size: Size, path: Path) -> dict[str, dict[str, Any]]:
    """Return the best of each method's trials on the tuning instances; kept in `path`.

    Best is the success over all tasks after 250 evaluations; ties go to the earlier trial.
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    missing = [n for n in methods if n not in found and size.tuning]
    for name in progress(missing, "tuning"):
        method = methods[name]
        rows: list[Row] = []
        for settings in method.trials if len(method.trials) > 1 else ():
            jobs = [Job("tuning", name, t, TUNING_SEED, size.tuning) for t in TASKS]
            done = [run_job(job, method, settings, soft_world) for job in jobs]
            rate = float(np.mean([rate_of(row) for row in done]))
            rows.append({"settings": settings, "success": rate})
        best = max(rows, key=lambda r: r["success"])["settings"] if rows else method.trials[0]
        found[name] = {"best": best, "trials": rows}
        write_json(path, found)
    return {n: found[n]["best"] if n in found else m.trials[0] for n, m in methods.items()}


def rate_of(row: Row, milestone: int | None = None) -> float:
    """Return the success of a result at a milestone, by default the last."""
    bits = row["solved"][str(milestone) if milestone else list(row["solved"])[-1]]
    return bits.count("1") / len(bits)


def read_rows(path: Path) -> list[Row]:
    """Read results.jsonl; a last line cut off by an interruption is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); delete it and measure again") from None


def run_jobs(jobs: Sequence[Job], run: Callable[[Job], Row], path: Path) -> None:
    """Run what is not in `path` yet, line by line.

    Args:
        jobs: the lines to be made.
        run: makes one.
        path: results.jsonl.
    """
    done = {row_key(row) for row in read_rows(path)}
    whole = path.read_text("utf-8") if path.exists() else ""
    if not whole.endswith("\n"):  # cut off the line that an interruption left unfinished
        path.write_text(whole[: whole.rfind("\n") + 1], "utf-8")
    with path.open("a", encoding="utf-8") as file:
        for job in progress([j for j in jobs if j.key not in done], "planning"):
            file.write(json.dumps(run(job)) + "\n")
            file.flush()


def world_models_of(
    job: Job, models: Callable[[str, int], WorldModel], second: bool
) -> list[WorldModel]:
    """Return the world model that a job's planner may ask, and perhaps a second one."""
    if job.stage == "temperature":
        return [partial(soft_world, temperature=float(job.variant))]
    if job.stage == "learned":
        return [models(job.variant, seed) for seed in range(1 + second)]
    return [soft_world]


def row_key(row: Row) -> tuple[Any, ...]:
    """Return the key of the job that made a row."""
    return tuple(row[k] for k in ("stage", "method", "task", "seed", "budget", "variant"))


def measure_base_rates(num: int, path: Path) -> None:
    """Count how many of `num` gestures of the generator solve an instance; kept in `path`."""
    if not path.exists():
        rates = {task: base_rate(task, num) for task in progress(TASKS, "base rates")}
        write_json(path, {"gestures": num, "rates": rates})


def time_methods(
    methods: Mapping[str, Method], settings: Mapping[str, dict[str, Any]], repeats: int, path: Path
) -> None:
    """Time single plans on this thread: the median over `repeats` of seconds, in all and sampler.

    No bank is used; the slider task stands for all: costs do not depend on the task.
    """
    instances = make_instances("slider", 1, TUNING_SEED)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in progress([n for n in methods if n not in found], "timing"):
        rows = [row for row in _timed(methods[name], settings[name], instances, repeats + 1)][1:]
        at = {m: float(np.median([r["at"][m] for r in rows])) for m in rows[0]["at"]}
        found[name] = {"at": at} | {
            k: float(np.median([r[k] for r in rows])) for k in ("total_s", "world_s", "used")
        }
        write_json(path, found)


def _timed(
    method: Method, settings: dict[str, Any], instances: Instances, repeats: int
) -> Iterator[Row]:
    for i in range(repeats):
        objective = Objective(model_cost(instances), 1, BUDGET, MILESTONES)
        began = time.perf_counter()
        method.run(objective, rng_for("timing", i), **settings, **goal_of(method, instances))
        total = time.perf_counter() - began
        objective.finish()
        at = {str(m): min(kept[2], total) for m, kept in objective.kept.items()}
        world_s = objective.world_seconds
        yield {"at": at, "total_s": total, "world_s": world_s, "used": objective.used}
