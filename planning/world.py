"""A GUI world of a few widgets: a soft model that has gradients, and a hard simulator that judges.

Screen units: x and y in [0, 1], frames of 2 ms. A scene is a handful of widgets; an action is a
gesture sequence (L, 3) as everywhere in this project. Both worlds map (scene, action) to the state
after the action. The soft one is what planners may ask and differentiate,

    down_t = p_t·(1 - p_{t-1}),  hit_w = Σ_t down_t·Π_axis min(1, 2·σ((core_w - |xy_t - pos_w|)/τ))
    m = Σ_t p_t·p_{t-1}·(xy_t - xy_{t-1}),  tap = σ((slop - |m|)/(τ/2))
    button, toggle: value moves by hit·tap;  slider, icon: pos by hit·(1 - tap)·m;  list: value

and the temperature τ sets how far beyond a widget's edge its gradient reaches; a hit is certain in
the core, which ends τ/2 (at most half way) inside the edge. Idle frames take x and y of the contact
before or after, so that zeros there are no motion. The hard one counts:
contacts one after the other, the widget under the touch-down, slop, long press; it alone decides
about success. Planners compare states as V-JEPA-2-AC does (arXiv:2506.09985): the energy is the
mean absolute difference of layer-normalised tokens, here a 16x16 grid of 16 features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from planning.search import hold
from trainlib.gestures import PRESSED

KINDS = ("button", "toggle", "slider", "list", "icon", "lamp")
BUTTON, TOGGLE, SLIDER, LIST, ICON, LAMP = range(len(KINDS))
SLOP = 0.04  # a contact that strays less from its touch-down is a tap
LONG_PRESS = 200  # frames: a tap held as long, 400 ms, is none
TEMPERATURE = 0.02  # τ, screen units
GRID, FEATURES = 16, 16  # tokens per axis; their width
BLUR = 0.03  # softness of a widget's edge in the observation, about half a token


class State(NamedTuple):
    """What an action can change: positions (N, W, 2) and values (N, W) of the widgets."""

    pos: Tensor
    value: Tensor


@dataclass(frozen=True)
class Scenes:
    """N scenes of W widgets each.

    Attributes:
        kind: (N, W) int64, index into KINDS.
        pos: centres, (N, W, 2), screen units.
        half: half of width and height, (N, W, 2).
        low: lowest position that a drag can reach, (N, W, 2); low = high = pos cannot move.
        high: highest, likewise.
        value: (N, W): pressed or on 0..1, scroll offset -1..1, 0 elsewhere.
        link: (N, W) int64, the widget whose value a tap changes; mostly the widget itself.
    """

    kind: Tensor
    pos: Tensor
    half: Tensor
    low: Tensor
    high: Tensor
    value: Tensor
    link: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: Any) -> "Scenes":
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def state(self) -> State:
        """The state before any action."""
        return State(self.pos, self.value)


World = Callable[[Scenes, Tensor], State]  # scenes (N), actions (N, L, 3) → the state after
WorldModel = Callable[[Scenes, Tensor], State | Tensor]  # the state or the tokens after


def value_range(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest value by kind, each like `kind`."""
    high = torch.ones_like(kind, dtype=torch.float32)
    return torch.where(kind == LIST, -high, 0 * high), high


def soft_world(scenes: Scenes, actions: Tensor, temperature: float = TEMPERATURE) -> State:
    """Predict the state after an action by the formulae above; differentiable.

    Args:
        scenes: N scenes.
        actions: (N, L, 3), data units; clamped to [0, 1].
        temperature: τ, above 0, screen units.
    """
    xy, press = hold(actions.clamp(0, 1)).split((2, 1), dim=-1)
    press = press[..., 0]  # (N, L)
    before = F.pad(press[:, :-1], (1, 0))
    down = press * (1 - before)
    distance = (xy[:, None] - scenes.pos[:, :, None]).abs()  # (N, W, L, 2)
    core = scenes.half - (scenes.half / 2).clamp(max=temperature / 2)
    inside = (2 * torch.sigmoid((core[:, :, None] - distance) / temperature)).clamp(max=1)
    hit = torch.einsum("nl,nwl->nw", down, inside[..., 0] * inside[..., 1]).clamp(max=1)
    m = ((press * before)[:, 1:, None] * xy.diff(dim=1)).sum(dim=1)  # (N, 2)
    length = (m.square().sum(dim=-1) + 1e-8).sqrt()
    tap = torch.sigmoid((SLOP - length) / (temperature / 2))[:, None]

    pos = (scenes.pos + (hit * (1 - tap))[..., None] * m[:, None]).clamp(scenes.low, scenes.high)
    tapped = hit * tap * (scenes.kind == BUTTON)
    tapped = tapped + hit * tap * (1 - 2 * scenes.value) * (scenes.kind == TOGGLE)
    scrolled = hit * (1 - tap) * m[:, 1:] * (scenes.kind == LIST)
    value = scenes.value + scrolled
    value = value.scatter_add(1, scenes.link, tapped)
    return State(pos, value.clamp(*value_range(scenes.kind)))


def hard_world(scenes: Scenes, actions: Tensor) -> State:
    """Simulate an action contact by contact, as a touch screen would.

    A contact belongs to the widget under its touch-down until it lifts (or the action ends). If it
    never strays by SLOP it is a tap, or, held for LONG_PRESS frames, a long press, which does
    nothing; else it drags by last minus first position.

    Args:
        scenes: N scenes.
        actions: (N, L, 3), data units; pressed above 0.5.
    """
    xy, pressed = actions[..., :2].clamp(0, 1), actions[..., 2] > PRESSED
    start = pressed & ~F.pad(pressed[:, :-1], (1, 0))
    contact = start.cumsum(dim=1) * pressed  # (N, L): 0 = idle, i = the i-th contact
    pos, value = scenes.pos.clone(), scenes.value.clone()
    for i in range(1, int(contact.max()) + 1 if len(scenes) else 1):
        rows = (contact == i).any(dim=1).nonzero()[:, 0]
        now = State(pos[rows], value[rows])
        pos[rows], value[rows] = _one_contact(scenes[rows], now, xy[rows], contact[rows] == i)
    return State(pos, value)


def _one_contact(scenes: Scenes, state: State, xy: Tensor, touched: Tensor) -> State:
    """Apply one contact, the frames `touched` (n, L) of the path xy (n, L, 2), to `state`."""
    n, L = touched.shape
    rows = torch.arange(n)
    first = touched.int().argmax(dim=1)
    last = L - 1 - touched.flip(1).int().argmax(dim=1)
    begin = xy[rows, first]
    stray = torch.linalg.vector_norm(xy - begin[:, None], dim=-1) * touched
    is_tap = stray.amax(dim=1) < SLOP
    is_long = last - first + 1 >= LONG_PRESS
    under = ((begin[:, None] - state.pos).abs() <= scenes.half).all(dim=-1)  # (n, W)
    owner = F.one_hot(under.int().argmax(dim=1), under.shape[1]).bool() & under

    dragged = owner & ~is_tap[:, None]
    m = (xy[rows, last] - begin)[:, None]  # (n, 1, 2)
    pos = (state.pos + dragged[..., None] * m).clamp(scenes.low, scenes.high)
    value = state.value + dragged * m[..., 1] * (scenes.kind == LIST)
    tapped = (owner & (is_tap & ~is_long)[:, None]).to(value.dtype)
    change = tapped * (scenes.kind == BUTTON)
    change = change + tapped * (1 - 2 * state.value) * (scenes.kind == TOGGLE)
    value = value.scatter_add(1, scenes.link, change)
    return State(pos, value.clamp(*value_range(scenes.kind)))


# ----------------------------------------------------------------------------------------
# OBSERVATION — state → tokens → energy
# ----------------------------------------------------------------------------------------


def _fixed_projection() -> tuple[Tensor, Tensor]:
    """Return the fixed random map of widget features, (9, FEATURES), and the empty token."""
    generator = torch.Generator().manual_seed(20250611)
    weights = torch.randn(len(KINDS) + 4, FEATURES, generator=generator)
    return weights[1:], weights[0]


PROJECTION, EMPTY = _fixed_projection()
CENTRES = (torch.arange(GRID) + 0.5) / GRID


def observe(scenes: Scenes, state: State) -> Tensor:
    """Render states as layer-normalised tokens, (N, GRID², FEATURES), row by row of the screen.

    A token is the empty token plus, by the share of it that a widget covers, that widget's
    features: its kind and its value, by a fixed random projection.
    """
    edge = (scenes.half[..., None] - (CENTRES - state.pos[..., None]).abs()) / BLUR
    cover_x, cover_y = torch.sigmoid(edge).unbind(dim=2)  # (N, W, GRID) each
    cover = (cover_y[..., :, None] * cover_x[..., None, :]).flatten(2)  # (N, W, GRID²)
    v = 2 * state.value
    looks = PROJECTION[scenes.kind] + torch.stack([v, v.sin(), 1 - v.cos()], -1) @ PROJECTION[-3:]
    tokens = torch.baddbmm(EMPTY.expand(len(scenes), GRID**2, -1), cover.transpose(1, 2), looks)
    return F.layer_norm(tokens, (FEATURES,))


def as_tokens(scenes: Scenes, after: State | Tensor) -> Tensor:
    """Return the tokens of what a world model says, (N, GRID², FEATURES)."""
    return after if isinstance(after, Tensor) else observe(scenes, after)


def energy(tokens: Tensor, goal_tokens: Tensor) -> Tensor:
    """Return the mean absolute difference of tokens, (N, GRID², FEATURES) each; (N,)."""
    return (tokens - goal_tokens).abs().mean(dim=(1, 2))
