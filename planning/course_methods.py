"""Methods on the courses: straight lines, knots without a prior, people-like gestures, a denoiser.

What they have in common, drawing, refining and evolving, is that of the benchmark's other tasks.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from planning import baselines as base
from planning import optimizers as opt
from planning.benchmark import Job, Row, rng_for
from planning.courses import KNOWN, TASKS, Courses, make_courses
from planning.diffusion import DiffusionPrior, diffusion_es
from planning.methods import COST, PRIOR, Method
from planning.optimizers import Draw
from planning.places import CHOICE, draw_places, fitting, moved_to
from planning.search import Bend, Objective, cem, descend, ramp, strokes, to_ramp
from train_diffusion_ddim import to_gesture
from trainlib.gestures import PRESSED, SEQ_LEN

if TYPE_CHECKING:
    from evaluation.events import Events

KNOTS = 6  # of gestures without a prior, and of human-like ones that are bent
HUMAN_METHODS = ("human_select", "human_bend", "human_places", "human_es")  # that need a denoiser
HUMAN = 4096  # human-like windows: to draw from, and to compare with
MATCHED = ("path", "deviation")  # in which the plans' nearest human contacts are alike
FREE_OF_PLACE = (
    "frames", "speed_peak", "speed_peak_at", "first_50_ms", "last_50_ms", "shake",
)  # fmt: skip


def human_windows(num: int, seed: int) -> Tensor:
    """Draw windows of human-like gestures that hold a touch-down, (num, L, 3), data units."""
    from augmentation.human import draw_session, render_session  # here: see tasks.draw_gestures

    rng, windows = np.random.default_rng(seed), list[Tensor]()
    while sum(len(part) for part in windows) < num:
        session = draw_session(rng, num)
        drawn = torch.from_numpy(render_session(session, slice(0, num)))
        pressed = drawn[..., 2] > PRESSED
        windows.append(drawn[(pressed[:, 1:] & ~pressed[:, :-1]).any(dim=1)])
    return torch.cat(windows)[:num]


def from_bank(bank: Callable[[], Tensor]) -> Draw:
    """Return a source that takes random rows of a bank, which is made when it is first needed."""
    return lambda num, K, rng: bank()[torch.from_numpy(rng.integers(0, len(bank()), (num, K)))]


# ----------------------------------------------------------------------------------------
# METHODS — run(objective, rng, course, **settings)
# ----------------------------------------------------------------------------------------


def draw_strokes(num: int, K: int, rng: np.random.Generator) -> Tensor:
    """Draw gestures of KNOTS knots that are even in their ranges, (num, K, L, 3)."""
    return strokes(base.sobol(num, K, 4 * KNOTS, rng))


def knots_cem(objective: Objective, rng: np.random.Generator, std: float = 0.3) -> None:
    """CEM along the knots from the middle of their range, times in order."""
    mean = torch.full((objective.num, KNOTS, 4), 0.5)
    mean[..., 2] = torch.linspace(0.1, 0.9, KNOTS)
    population = objective.capacity // opt.rounds_for(objective.budget)
    cem(
        objective, rng, mean.flatten(1), strokes, std=std, population=population,
        elites=max(2, population // 10),
    )  # fmt: skip


def knots_adam(
    objective: Objective, rng: np.random.Generator, share: float = 0.4, lr: float = 0.02
) -> None:
    """Sobol points of the knots; then Adam along them from the best three."""
    z = base.sobol(objective.num, int(share * objective.capacity), 4 * KNOTS, rng)
    best = objective(strokes(z)).argsort(dim=1)[:, :3]
    descend(objective, z[torch.arange(len(z))[:, None], best], strokes, lr)


def bend_adam(
    objective: Objective,
    rng: np.random.Generator,
    draw: Draw,
    course: Courses,
    *,
    share: float = 0.3,
    lr: float = 0.02,
) -> None:
    """Draw; then Adam along knots on the best three, as `Planner` does."""
    starts, _ = opt.shoot_for_starts(objective, rng, draw, share, 3)
    starts = course.paste(starts)
    idle = ~(starts[..., 2] > PRESSED).any(dim=-1)
    starts[idle] = ramp(to_ramp(starts[idle]))  # a touch in the corner
    bend = Bend(starts, KNOTS, ~course.mask)
    descend(objective, bend.z, bend, lr, scale_dim=-2)


def known_draw(prior: DiffusionPrior, course: Courses) -> Draw:
    """Return a source of a denoiser's gestures; those with known frames are drawn with them."""
    if course.known is None:
        return prior.draw

    def draw(num: int, K: int, rng: np.random.Generator) -> Tensor:
        assert course.known is not None
        known = course.known.repeat_interleave(K, dim=0)
        mask = course.mask.expand(len(known), -1)
        seed = int(rng.integers(2**31))
        drawn = prior.sample(len(known), seed, known=known, known_mask=mask)
        return to_gesture(drawn).unflatten(0, (num, K))

    return draw


def at_places(draw: Draw, course: Courses, choice: int = CHOICE) -> Draw:
    """Let a source draw `choice` times as many, and move those that fit to the course's places."""
    maps, free = course.places(), ~course.mask

    def moved(num: int, K: int, rng: np.random.Generator) -> Tensor:
        choices = draw(num, K * choice, rng).unflatten(1, (K, choice))
        wanted = [draw_places(of, K, rng) for of in maps]
        fit = torch.stack([fitting(x, w) for x, w in zip(choices, wanted, strict=True)])
        pasted = course.paste(fit).flatten(0, 1)
        return moved_to(pasted, torch.cat(wanted), free).unflatten(0, (num, K))

    return moved


def course_methods(prior: DiffusionPrior | None, human: Callable[[], Tensor]) -> dict[str, Method]:
    """Return the methods; those with a learned prior if there is one.

    Args:
        prior: a denoiser of human-like gestures; None = none.
        human: returns human-like gestures of the generator, (N, L, 3).
    """
    methods = free_methods(base.draw_structured, from_bank(human))
    return methods | (denoiser_methods(prior) if prior is not None else {})


def plain(method: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Let a method be called with a course, of which it knows nothing but the cost."""
    return lambda objective, rng, course: method(objective, rng, **options)


def placed(draw: Draw) -> Callable[..., None]:
    """Return a method that bends draws at the course's places."""

    def run(objective: Objective, rng: np.random.Generator, course: Courses) -> None:
        bend_adam(objective, rng, at_places(draw, course), course)

    return run


def free_methods(lines: Draw, people: Draw) -> dict[str, Method]:
    """Return the methods without a denoiser, from sources of lines and of human-like gestures."""
    return {
        "line_cem": Method("CEM 6-D", COST, plain(opt.cem_ramp, std=0.3)),
        "line_adam": Method(
            "structured draws + Adam 6-D", COST,
            plain(opt.shoot_then_refine, draw=lines, share=0.4, lr=0.02),
        ),
        "knots_select": Method(
            "Sobol, knots", COST, plain(opt.shoot, draw=draw_strokes)
        ),
        "knots_adam": Method("Sobol + Adam, knots", COST, plain(knots_adam)),
        "knots_cem": Method("CEM, knots", COST, plain(knots_cem)),
        "people_select": Method("human-like generator", COST, plain(opt.shoot, draw=people)),
        "people_bend": Method(
            "human-like generator + Adam, knots", COST,
            lambda objective, rng, course: bend_adam(objective, rng, people, course),
        ),
        "line_places": Method(
            "structured draws at places + Adam, knots", COST, placed(lines), sees_tokens=True
        ),
        "people_places": Method(
            "human-like generator at places + Adam, knots", COST, placed(people), sees_tokens=True
        ),
    }  # fmt: skip


def denoiser_methods(prior: DiffusionPrior) -> dict[str, Method]:
    """Return the methods with a denoiser of human-like gestures."""

    def drawn(method: Callable[..., None]) -> Callable[..., None]:
        def run(objective: Objective, rng: np.random.Generator, course: Courses) -> None:
            method(objective, rng, known_draw(prior, course), course)

        return run

    def placed_draws(objective: Objective, rng: np.random.Generator, course: Courses) -> None:
        choice = CHOICE if course.known is None else 1  # a bank knows nothing of known frames
        bend_adam(objective, rng, at_places(known_draw(prior, course), course, choice), course)

    return {
        "human_select": Method(
            "DDIM of human-like, select", PRIOR,
            drawn(lambda objective, rng, draw, _: opt.shoot(objective, rng, draw)),
        ),
        "human_bend": Method("DDIM of human-like + Adam, knots", PRIOR, drawn(bend_adam)),
        "human_places": Method(
            "DDIM of human-like at places + Adam, knots", PRIOR, placed_draws, sees_tokens=True
        ),
        "human_es": Method(
            "Diffusion-ES of human-like", PRIOR, plain(diffusion_es, prior=prior, sigma=0.2)
        ),
    }  # fmt: skip


def course_jobs(methods: Mapping[str, Method], num: int) -> list[Job]:
    """Return the jobs of the stage: every method on every course."""
    return [Job("courses", name, task, 0, num) for name in methods for task in TASKS if num]


# ----------------------------------------------------------------------------------------
# PLAUSIBILITY
# ----------------------------------------------------------------------------------------


def people_events() -> "Events":
    """Return the contacts of people-like gestures that no method draws from."""
    from evaluation.events import events_of  # here: an installed planner comes without them

    return events_of(human_windows(HUMAN, seed=1).numpy())


def told_from_people(plans: Tensor, human: "Events") -> float | None:
    """Return how well a classifier tells contacts of plans from those of people; 0.5: not at all.

    Every contact of the plans, (N, L, 3), is held against one of the human-like contacts that are
    nearest to it in MATCHED, no two against the same one: so it is not the task that tells them
    apart. None with fewer than 20 contacts, or without scikit-learn.
    """
    from evaluation.events import FEATURES, Events, events_of, find_classifier, told_apart

    make_classifier = find_classifier()
    events = events_of(plans.numpy())
    rows = np.flatnonzero(events.features[:, 0] > 0)
    if make_classifier is None or len(rows) < 20:
        return None
    chosen = nearest(events.features[rows], human.features)
    columns = [FEATURES.index(name) for name in FREE_OF_PLACE]
    given = Events(events.window[rows], events.features[rows][:, columns])
    real = Events(np.arange(len(chosen)), human.features[chosen][:, columns])
    return float(np.nanmean(told_apart(given, real, make_classifier)))


def nearest(features: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return rows of `of`, each at most once, that are nearest to `features` in MATCHED."""
    from evaluation.events import FEATURES

    columns = [FEATURES.index(name) for name in MATCHED]
    scale = of[:, columns].std(axis=0)
    a, b = features[:, columns] / scale, of[:, columns] / scale
    distance = ((a[:, None] - b) ** 2).sum(axis=-1)
    chosen = np.empty(len(a), dtype=np.int64)
    for i in range(len(a)):
        chosen[i] = distance[i].argmin()
        distance[:, chosen[i]] = np.inf
    return chosen


def run_course(job: Job, method: Method, human: "Events") -> Row:
    """Plan all instances of a course with one method; judge the answers and how human they are.

    Args:
        job: the line to be made.
        method: as the job names it.
        human: contacts of human-like gestures.
    """
    course = make_courses(job.task, job.instances, job.seed)
    objective = Objective(course.cost_fn(), job.instances, job.budget, [job.budget])
    began = time.perf_counter()
    method.run(objective, rng_for(*job.key), course=course)
    objective.finish()
    plans = course.paste(objective.best)
    solved = "".join("01"[int(bit)] for bit in course.judge(plans))
    shown = plans if course.known is None else plans * (torch.arange(SEQ_LEN) >= KNOWN)[:, None]
    return asdict(job) | {
        "settings": {},
        "used": objective.used,
        "batch_s": round(time.perf_counter() - began, 3),
        "solved": {str(job.budget): solved},
        "model_cost": float(objective.best_cost.mean()),
        "auc": told_from_people(shown, human),
    }
