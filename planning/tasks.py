"""The tasks: what a planner is asked to do, drawn at phone scale, and when it has been done.

Every instance is a scene of five widgets that do not overlap and a goal state that differs from it
in one of them. It is solved if that widget is where the goal has it, within the task's tolerance,
and every other widget is as it was. Instances are a function of (task, seed) alone, so that all
methods meet the same ones.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from planning.search import CostFn
from planning.world import (
    BUTTON,
    ICON,
    LAMP,
    LIST,
    SLIDER,
    TOGGLE,
    Scenes,
    State,
    World,
    WorldModel,
    as_tokens,
    energy,
    hard_world,
    observe,
    soft_world,
)
from trainlib.errors import UserError

NUM_WIDGETS = 5
SIZES = {  # width and height as shares of a screen of 411 x 914 dp; 48 dp are .117 x .0525
    BUTTON: (0.117, 0.0525),
    TOGGLE: (0.117, 0.0525),
    SLIDER: (0.12, 0.06),  # the handle; its track spans the screen
    LIST: (0.9, 0.7),
    ICON: (0.14, 0.065),
    LAMP: (0.1, 0.05),
}
LARGE_BUTTON = (0.3, 0.08)
TRACK = (0.1, 0.9)  # x of a slider's handle
DURATIONS = (5, 75)  # frames of the true generator's gestures: shortest, longest
CHUNK = 512  # candidates at a time: their intermediate values stay near the processor
UNCHANGED = 0.02  # other widgets may differ by as much


@dataclass(frozen=True)
class Task:
    """A task: the widget that must change, the company it needs, and how exact it must be."""

    kind: int
    size: tuple[float, float]
    tolerance: float  # of the value, or of the position as a distance
    needs: tuple[int, ...] = ()  # kinds of widgets that are always there


TASKS = {
    "tap_large": Task(BUTTON, LARGE_BUTTON, 0.05),
    "tap_48dp": Task(BUTTON, SIZES[BUTTON], 0.05),
    "scroll": Task(LIST, SIZES[LIST], 0.05, (BUTTON, BUTTON, TOGGLE, TOGGLE)),
    "slider": Task(SLIDER, SIZES[SLIDER], 0.05),
    "drag": Task(ICON, SIZES[ICON], 0.08),
    "decoy": Task(LAMP, SIZES[LAMP], 0.05, (BUTTON, BUTTON)),  # either button lights the lamp
}


class Instances(NamedTuple):
    """N instances of one task; the widget that must change is the first."""

    task: str
    scenes: Scenes
    goal: State
    goal_tokens: Tensor  # (N, tokens, features)

    def rows(self, rows: slice | Tensor) -> "Instances":
        """Return some of the instances."""
        goal = State(self.goal.pos[rows], self.goal.value[rows])
        return Instances(self.task, self.scenes[rows], goal, self.goal_tokens[rows])


class Widget(NamedTuple):
    """One widget as it is drawn: the rectangle that it keeps free is `room`."""

    kind: int
    pos: np.ndarray
    half: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def room(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of all that it may cover; an icon only where it is."""
        low, high = (self.pos, self.pos) if self.kind == ICON else (self.low, self.high)
        return low - self.half, high + self.half


def _draw_widget(kind: int, size: tuple[float, float], rng: np.random.Generator) -> Widget:
    """Draw a widget at a random place on the screen."""
    half = np.array(size) / 2
    pos = rng.uniform(half, 1 - half)
    low, high = pos.copy(), pos.copy()
    if kind == SLIDER:
        pos[0] = rng.uniform(*TRACK)
        low[0], high[0] = TRACK
    elif kind == ICON:
        low, high = half, 1 - half
    return Widget(kind, pos, half, low, high)


def _overlap(a: Widget, b: Widget) -> bool:
    """Return whether two widgets want the same place."""
    (a_low, a_high), (b_low, b_high) = a.room, b.room
    return bool(np.all((a_low < b_high) & (b_low < a_high)))


def _draw_scene(task: Task, rng: np.random.Generator) -> list[Widget]:
    """Draw the widgets of an instance, the one that must change first."""
    others = (BUTTON, TOGGLE, SLIDER, ICON)
    while True:
        widgets = [_draw_widget(task.kind, task.size, rng)]
        kinds = [*task.needs, *rng.choice(others, NUM_WIDGETS - 1 - len(task.needs))]
        for kind in kinds:
            for _ in range(50):
                new = _draw_widget(int(kind), SIZES[int(kind)], rng)
                if not any(_overlap(new, w) for w in widgets):
                    widgets.append(new)
                    break
        if len(widgets) == NUM_WIDGETS:
            return widgets


def _draw_goal(widgets: list[Widget], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw where and at which value the first widget should end."""
    first, *others = widgets
    if first.kind == LIST:
        return first.pos, rng.choice([-1, 1]) * rng.uniform(0.1, 0.6)
    if first.kind not in (SLIDER, ICON):
        return first.pos, 1.0
    least = 0.15 if first.kind == SLIDER else 0.2
    while True:
        pos = rng.uniform(first.low, first.high)
        there = Widget(first.kind, pos, first.half, pos, pos)
        is_far = np.linalg.norm(pos - first.pos) >= least
        if is_far and not any(_overlap(there, w) for w in others):
            return pos, 0.0


def make_instances(task: str, num: int, seed: int) -> Instances:
    """Draw `num` instances of a task; the first n are the same for every num >= n."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    drawn = [_draw_scene(TASKS[task], rng) for _ in range(num)]
    goals = [_draw_goal(widgets, rng) for widgets in drawn]

    def gather(name: str) -> Tensor:
        return torch.tensor(np.array([[getattr(w, name) for w in ws] for ws in drawn])).float()

    kind = gather("kind").long()
    link = torch.arange(NUM_WIDGETS).expand(num, -1).clone()
    if task == "decoy":
        link[:, 1:3] = 0  # the two buttons that every decoy scene has
    value = torch.zeros(num, NUM_WIDGETS)
    value[kind == TOGGLE] = torch.from_numpy(
        rng.integers(0, 2, int((kind == TOGGLE).sum()))
    ).float()
    scenes = Scenes(kind, gather("pos"), gather("half"), gather("low"), gather("high"), value, link)
    pos, value = scenes.pos.clone(), scenes.value.clone()
    pos[:, 0] = torch.tensor(np.array([g[0] for g in goals])).float()
    value[:, 0] = torch.tensor([g[1] for g in goals])
    goal = State(pos, value)
    return Instances(task, scenes, goal, observe(scenes, goal))


def is_solved(instances: Instances, state: State) -> Tensor:
    """Return which instances a state solves; (N,) bool."""
    error_pos = torch.linalg.vector_norm(state.pos - instances.goal.pos, dim=-1)  # (N, W)
    error = torch.maximum(error_pos, (state.value - instances.goal.value).abs())
    solved = error[:, 0] <= TASKS[instances.task].tolerance
    return solved & (error[:, 1:] <= UNCHANGED).all(dim=1)


def judge(instances: Instances, actions: Tensor, world: World = hard_world) -> Tensor:
    """Return which actions, (N, L, 3), solve their instances on the hard simulator; (N,) bool."""
    return is_solved(instances, world(instances.scenes, actions))


def model_cost(instances: Instances, model: WorldModel = soft_world) -> CostFn:
    """Return the energy between what `model` predicts of an action and the goal, as a CostFn."""

    def cost_fn(actions: Tensor) -> Tensor:
        num, K = actions.shape[:2]
        rows = torch.arange(num).repeat_interleave(K)
        costs = []
        for row, action in zip(rows.split(CHUNK), actions.flatten(0, 1).split(CHUNK), strict=True):
            scenes = instances.scenes[row]
            tokens = as_tokens(scenes, model(scenes, action))
            costs.append(energy(tokens, instances.goal_tokens[row]))
        return torch.cat(costs).view(num, K)

    return cost_fn


def draw_gestures(num: int, rng: np.random.Generator) -> Tensor:
    """Draw gestures of the true generator, (num, L, 3), data units."""
    try:
        from augmentation import click_aug  # here: an installed planner comes without it
    except ImportError:
        raise UserError("the true generator is not installed; run this from a checkout") from None
    drawn = click_aug.draw_gestures(rng, num, "mixed", *DURATIONS)
    return torch.from_numpy(click_aug.render(drawn))


def draw_true(num: int, K: int, rng: np.random.Generator) -> Tensor:
    """Draw gestures of the true generator, (num, K, L, 3)."""
    return draw_gestures(num * K, rng).unflatten(0, (num, K))


def base_rate(task: str, num: int, seed: int = 0, chunk: int = 4000) -> float:
    """Return the share of `num` gestures of the generator that solve an instance by chance."""
    rng, solved, chunk = np.random.default_rng(seed), 0, min(chunk, num)
    instances = make_instances(task, chunk, seed)
    for _ in range(0, num, chunk):
        solved += int(judge(instances, draw_gestures(chunk, rng)).sum())
    return solved / num
