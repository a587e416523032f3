"""Tasks for more than a straight line: six courses on an exact simulator of touch.

    around       drag an icon to its goal, around an obstacle: entering it drops the icon there
    fling        rest on a card, then throw it: it flies on by its speed at lift-off
    long_press   hold a button for 400 ms
    double_tap   tap a button twice, shortly, with a short pause
    pattern      draw a line through four dots in their order, and through no other dot
    continued    a drag that began in the window before: its first frames are known

Each has a judge that counts, and a cost that says how far the simulator's state is from the goal;
it has a gradient where the state moves with the finger. A straight gesture of constant speed can
hold a button or go on with a drag, but no more. Success is one half: the contacts of the plans are
also held against contacts of people-like gestures that go as far and bend as much, by the features
of the realism test that do not depend on the place. AUC 0.5: nobody could tell them apart.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from planning.search import CostFn
from planning.world import GRID, LONG_PRESS, SLOP
from train_diffusion_ddim import to_gesture
from trainlib.gestures import FRAME_MS, PRESSED, SEQ_LEN

REACH = 0.05  # of a target: from its centre
OBSTACLE = 0.12  # its radius
PICK_UP = 50  # frames of rest that pick a card up
GLIDE = 0.25  # seconds that a card flies on at its speed at lift-off
LIFT_OFF = 25  # frames whose mean speed that is
FLIGHT = 0.1  # of a thrown card: how far from its goal it may come to rest
SHORT, PAUSE = 75, 100  # frames: longest tap and pause of a double tap
DOTS, STEP, DOT = 3, 0.2, 0.07  # of the pattern: per row, apart, radius
KNOWN = 75  # frames of a drag that began before
JUMP = 0.05  # farthest that a finger moves in a frame: 25 screens per second


@dataclass(frozen=True)
class Courses:
    """N instances of one task.

    Attributes:
        task: of TASKS.
        points: (N, P, 2), screen units; which point is what depends on the task.
        known: (N, L, 3), the frames that every action begins with; None = none.
    """

    task: str
    points: Tensor
    known: Tensor | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def mask(self) -> Tensor:
        """The frames that are known, (L,) bool."""
        return torch.arange(SEQ_LEN) < (0 if self.known is None else KNOWN)

    def paste(self, actions: Tensor) -> Tensor:
        """Put the known frames into actions, (N, ..., L, 3)."""
        if self.known is None:
            return actions
        shape = (len(self), *[1] * (actions.ndim - 3), SEQ_LEN, 3)
        return torch.where(self.mask[:, None], self.known.view(shape), actions)

    def cost_fn(self) -> CostFn:
        """Return the costs of actions, (N, K, L, 3) → (N, K); differentiable."""
        cost = TASKS[self.task].cost

        def costs(actions: Tensor) -> Tensor:
            actions = self.paste(actions)
            K = actions.shape[1]
            return cost(actions.flatten(0, 1), self.points.repeat_interleave(K, 0)).view(-1, K)

        return costs

    def places(self) -> Tensor:
        """Return how likely gestures begin and end in each cell of the screen, (N, 2, GRID, GRID).

        As `changed_places` has it: they begin with equal odds where the screen should change or
        where something is, and end where it should change.
        """
        cells = (self.points.clamp(0, 1) * GRID).long().clamp(max=GRID - 1)
        index = cells[..., 1] * GRID + cells[..., 0]  # (N, P)
        seen = torch.nn.functional.one_hot(index, GRID**2).float()
        changed, content = seen[:, : TASKS[self.task].changed].mean(dim=1), seen.mean(dim=1)
        return torch.stack([(changed + content) / 2, changed], dim=1).unflatten(-1, (GRID, GRID))

    def judge(self, actions: Tensor) -> Tensor:
        """Return which actions, (N, L, 3), do what they should; (N,) bool."""
        actions = self.paste(to_gesture(actions))
        return TASKS[self.task].judge(actions, self.points)


class Contact(NamedTuple):
    """The i-th contact of N actions.

    Attributes:
        exists: (N,) bool.
        first, last: its frames, (N,).
        begin, end: where, (N, 2).
        touched: its frames, (N, L) bool.
        frames: how many, (N,); with the gradient of the press.
        stray: the farthest from its touch-down, (N,).
    """

    exists: Tensor
    first: Tensor
    last: Tensor
    begin: Tensor
    end: Tensor
    touched: Tensor
    frames: Tensor
    stray: Tensor


def contact(actions: Tensor, i: int = 1) -> Contact:
    """Return the i-th contact of actions, (N, L, 3), counted from 1."""
    pressed = actions[..., 2] > PRESSED
    start = pressed & ~torch.nn.functional.pad(pressed[:, :-1], (1, 0))
    touched = (start.cumsum(dim=1) == i) & pressed
    rows, first = torch.arange(len(actions)), touched.int().argmax(dim=1)
    last = SEQ_LEN - 1 - touched.flip(1).int().argmax(dim=1)
    xy = actions[..., :2]
    begin, end = xy[rows, first], xy[rows, last]
    stray = (_length(xy - begin[:, None]) * touched).amax(dim=1)
    frames = (actions[..., 2] * touched).sum(dim=1)
    return Contact(touched.any(dim=1), first, last, begin, end, touched, frames, stray)


def num_contacts(actions: Tensor) -> Tensor:
    """Count the contacts of actions, (N, L, 3); (N,)."""
    pressed = torch.nn.functional.pad(actions[..., 2] > PRESSED, (1, 0))
    return (pressed[:, 1:] & ~pressed[:, :-1]).sum(dim=1)


def _surplus(actions: Tensor, num: int) -> Tensor:
    """Return what contacts beyond `num` cost, (N,): who knows what they do."""
    return 0.05 * (num_contacts(actions) - num).clamp(min=0)


def _length(x: Tensor) -> Tensor:
    """Return lengths, (..., 2) → (...), with a gradient at 0."""
    return (x.square().sum(dim=-1) + 1e-12).sqrt()


def _hit(c: Contact, target: Tensor) -> Tensor:
    """Say softly whether a contact begins on a target, (N, 2); (N,), 1 inside."""
    beyond = _length(c.begin - target) - REACH
    return c.exists * torch.exp(-beyond.clamp(min=0) / REACH)


def _begins_on(c: Contact, target: Tensor) -> Tensor:
    """Return whether a contact begins on a target; (N,) bool."""
    return c.exists & (_length(c.begin - target) <= REACH)


# ----------------------------------------------------------------------------------------
# THE TASKS — points, cost, judge
# ----------------------------------------------------------------------------------------


def _carried(c: Contact, actions: Tensor, obstacle: Tensor) -> Tensor:
    """Return how far a contact carries what it holds until it enters an obstacle, (N, 2)."""
    xy = actions[..., :2]
    clear = torch.sigmoid((_length(xy - obstacle[:, None]) - OBSTACLE) / 0.005)
    alive = (clear * c.touched + ~c.touched).cummin(dim=1).values  # (N, L)
    both = c.touched[:, 1:] & c.touched[:, :-1]
    return ((alive[:, 1:] * both)[..., None] * xy.diff(dim=1)).sum(dim=1)


def _around_cost(actions: Tensor, points: Tensor) -> Tensor:
    icon, goal, obstacle = points.unbind(dim=1)
    c = contact(actions)
    there = icon + _hit(c, icon)[:, None] * _carried(c, actions, obstacle)
    return _length(there - goal)


def _around(actions: Tensor, points: Tensor) -> Tensor:
    icon, goal, obstacle = points.unbind(dim=1)
    c = contact(actions)
    inside = (_length(actions[..., :2] - obstacle[:, None]) < OBSTACLE) & c.touched
    there = icon + c.end - c.begin
    return _begins_on(c, icon) & ~inside.any(dim=1) & (_length(there - goal) <= REACH)


def _flight(c: Contact, actions: Tensor) -> Tensor:
    """Return where a thrown card comes to rest, seen from where it lay, (N, 2)."""
    rows = torch.arange(len(actions))
    before = torch.maximum(c.last - LIFT_OFF, c.first)
    seconds = (c.last - before).clamp(min=1)[:, None] * (FRAME_MS / 1000)
    speed = (c.end - actions[rows, before, :2]) / seconds
    return c.end - c.begin + GLIDE * speed


def _rest(c: Contact, actions: Tensor) -> Tensor:
    """Return how far a contact strays in its first PICK_UP frames, (N,)."""
    age = torch.arange(SEQ_LEN) - c.first[:, None]
    early = c.touched & (age < PICK_UP)
    return (_length(actions[..., :2] - c.begin[:, None]) * early).amax(dim=1)


def _fling_cost(actions: Tensor, points: Tensor) -> Tensor:
    card, goal = points.unbind(dim=1)
    c = contact(actions)
    held = torch.exp(-(_rest(c, actions) - SLOP).clamp(min=0) / SLOP)
    held = held * (c.frames / PICK_UP).clamp(max=1)
    return _length(card + (_hit(c, card) * held)[:, None] * _flight(c, actions) - goal)


def _fling(actions: Tensor, points: Tensor) -> Tensor:
    card, goal = points.unbind(dim=1)
    c = contact(actions)
    held = (_rest(c, actions) < SLOP) & (c.last - c.first + 1 >= PICK_UP)
    there = card + _flight(c, actions)
    return _begins_on(c, card) & held & (_length(there - goal) <= FLIGHT)


def _long_press_cost(actions: Tensor, points: Tensor) -> Tensor:
    c = contact(actions)
    still = torch.exp(-(c.stray - SLOP).clamp(min=0) / SLOP)
    return 1 - _hit(c, points[:, 0]) * still * (c.frames / LONG_PRESS).clamp(max=1)


def _long_press(actions: Tensor, points: Tensor) -> Tensor:
    c = contact(actions)
    return _begins_on(c, points[:, 0]) & (c.stray < SLOP) & (c.last - c.first + 1 >= LONG_PRESS)


def _double_tap_cost(actions: Tensor, points: Tensor) -> Tensor:
    a, b = contact(actions, 1), contact(actions, 2)
    taps = [
        _hit(c, points[:, 0])
        * torch.exp(-(c.stray - SLOP).clamp(min=0) / SLOP)
        * torch.exp(-(c.frames - SHORT).clamp(min=0) / SHORT)
        for c in (a, b)
    ]
    pause = (b.first - a.last - PAUSE).clamp(min=0) / PAUSE
    return 1 - (taps[0] + taps[1] * torch.exp(-pause)) / 2 + _surplus(actions, 2)


def _double_tap(actions: Tensor, points: Tensor) -> Tensor:
    a, b = contact(actions, 1), contact(actions, 2)
    good = num_contacts(actions) == 2
    for c in (a, b):
        good &= _begins_on(c, points[:, 0]) & (c.stray < SLOP) & (c.last - c.first < SHORT)
    return good & (b.first - a.last <= PAUSE)


def _visits(actions: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return how near the finger comes to four dots, each after the one before, and to others.

    Returns: distances (N, 4), of the first from the touch-down, and (N, 5).
    """
    c, distances = contact(actions), []
    allowed = c.touched
    for j in range(4):
        distance = _length(actions[..., :2] - points[:, j, None])
        if j == 0:
            allowed = c.touched & (torch.arange(SEQ_LEN) == c.first[:, None])
        nearest, frame = distance.masked_fill(~allowed, 2.0).min(dim=1)
        distances.append(nearest)
        near = allowed & (distance <= DOT)
        frame = torch.where(near.any(dim=1), near.int().argmax(dim=1), frame)
        allowed = c.touched & (torch.arange(SEQ_LEN) >= frame[:, None])
    far = actions[:, :, None, :2] - points[:, None, 4:]  # (N, L, 5, 2)
    others = _length(far).masked_fill(~c.touched[..., None], 2.0).amin(dim=1)
    return torch.stack(distances, dim=1), others


def _pattern_cost(actions: Tensor, points: Tensor) -> Tensor:
    visited, others = _visits(actions, points)
    missed = (visited - 0.7 * DOT).clamp(min=0).mean(dim=1)
    return missed + (DOT - others).clamp(min=0).sum(dim=1) + _surplus(actions, 1)


def _pattern(actions: Tensor, points: Tensor) -> Tensor:
    visited, others = _visits(actions, points)
    one = num_contacts(actions) == 1
    return one & (visited <= DOT).all(dim=1) & (others > DOT).all(dim=1)


def _continued_cost(actions: Tensor, points: Tensor) -> Tensor:
    c = contact(actions)
    lifted = torch.sigmoid((SEQ_LEN - 1 - c.last) / 2.0)  # a half where it never lifts
    missed = _length(points[:, 0] + c.end - c.begin - points[:, 1])
    jumped = (_jump(c, actions) - JUMP).clamp(min=0)
    return missed + jumped + 0.2 * (1 - lifted) + _surplus(actions, 1)


def _continued(actions: Tensor, points: Tensor) -> Tensor:
    c = contact(actions)
    lifts = (c.last < SEQ_LEN - 1) & (c.last >= KNOWN - 1)
    there = points[:, 0] + c.end - c.begin
    good = lifts & (_length(there - points[:, 1]) <= REACH) & (num_contacts(actions) == 1)
    return good & (_jump(c, actions) <= JUMP)


def _jump(c: Contact, actions: Tensor) -> Tensor:
    """Return how far a contact moves in a frame, at most, (N,): a finger cannot be elsewhere."""
    both = c.touched[:, 1:] & c.touched[:, :-1]
    return (_length(actions[..., :2].diff(dim=1)) * both).amax(dim=1)


class Task(NamedTuple):
    """A task: its points, (P, 2), from random numbers; its cost; its judge.

    Of its points the first `changed` are where the screen should change; all can be seen.
    """

    draw: Callable[[np.random.Generator], np.ndarray]
    cost: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], Tensor]
    changed: int


def _draw_pair(
    rng: np.random.Generator, least: float, most: float, inside: float = 0.1
) -> np.ndarray:
    """Draw two points on the screen, `least` to `most` apart; (2, 2)."""
    while True:
        begin = rng.uniform(0.1, 0.9, 2)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(least, most)
        end = begin + length * np.array([np.cos(angle), np.sin(angle)])
        if np.all((end >= inside) & (end <= 1 - inside)):
            return np.stack([begin, end])


def _draw_around(rng: np.random.Generator) -> np.ndarray:
    """Draw icon, goal and, between them, the obstacle, which leaves room on either side."""
    while True:
        pair = _draw_pair(rng, 0.4, 0.6)
        middle = pair.mean(axis=0)
        if np.all((middle > 0.25) & (middle < 0.75)):
            return np.stack([*pair, middle])


def _draw_pattern(rng: np.random.Generator) -> np.ndarray:
    """Draw a grid of nine dots; four neighbours in their order first, the others after them."""
    corner = rng.uniform(0.15, 0.85 - (DOTS - 1) * STEP, 2)
    way = [rng.integers(0, DOTS, 2)]
    while len(way) < 4:
        new = way[-1] + rng.integers(-1, 2, 2)
        seen = any(np.array_equal(new, dot) for dot in way)
        if np.all((new >= 0) & (new < DOTS)) and not seen:
            way.append(new)
        elif seen and rng.random() < 0.1:  # nowhere to go: begin again
            way = [rng.integers(0, DOTS, 2)]
    dots = [np.array([x, y]) for x in range(DOTS) for y in range(DOTS)]
    others = [dot for dot in dots if not any(np.array_equal(dot, d) for d in way)]
    return corner + STEP * np.array([*way, *others])


TASKS = {
    "around": Task(_draw_around, _around_cost, _around, 2),
    "fling": Task(lambda rng: _draw_pair(rng, 0.8, 1.6, -2.0), _fling_cost, _fling, 2),
    "long_press": Task(
        lambda rng: rng.uniform(0.1, 0.9, (1, 2)), _long_press_cost, _long_press, 1
    ),
    "double_tap": Task(
        lambda rng: rng.uniform(0.1, 0.9, (1, 2)), _double_tap_cost, _double_tap, 1
    ),
    "pattern": Task(_draw_pattern, _pattern_cost, _pattern, 4),
    "continued": Task(lambda rng: _draw_pair(rng, 0.3, 0.6), _continued_cost, _continued, 2),
}  # fmt: skip


def make_courses(task: str, num: int, seed: int) -> Courses:
    """Draw `num` instances of a task; the first n are the same for every num >= n."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    points = torch.from_numpy(np.array([TASKS[task].draw(rng) for _ in range(num)])).float()
    return Courses(task, points, _began(points) if task == "continued" else None)


def _began(points: Tensor) -> Tensor:
    """Return gestures that are on their way from the first point to the second, (N, L, 3).

    From frame 25 as a hand would move: by the minimum-jerk profile of a reach of 300 ms, which at
    the end of the known frames has gone a fifth of the way.
    """
    frame = torch.arange(SEQ_LEN)
    u = ((frame - 25) / 150).clamp(0, 1)
    gone = u**3 * (10 - 15 * u + 6 * u**2)
    path = points[:, :1] + gone[:, None] * (points[:, 1:] - points[:, :1])
    pressed = (frame >= 25).float().expand(len(points), -1)
    x = torch.cat([path * pressed[..., None], pressed[..., None]], dim=-1)
    return x * (frame < KNOWN)[:, None]
