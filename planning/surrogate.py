"""A learned world model that sees widgets as objects, and the transitions to learn from.

A 1-D convolution reads the action, an MLP per widget says what becomes of it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from planning.tasks import NUM_WIDGETS, TASKS, draw_gestures, make_instances
from planning.world import KINDS, LIST, Scenes, State, hard_world
from trainlib.gestures import PRESSED

TRAINING_SEED = 2000  # of scenes that no benchmark and no tuning sees


class Transitions(NamedTuple):
    """N actions in scenes, and the state after each on the hard simulator."""

    scenes: Scenes
    actions: Tensor  # (N, L, 3)
    after: State


def draw_transitions(num: int, seed: int, aimed: float = 0.8, scenes: int = 3000) -> Transitions:
    """Draw gestures of the true generator in scenes of all tasks.

    Args:
        num: N.
        seed: of scenes and gestures.
        aimed: share of the gestures that are moved so that they begin on a random widget.
        scenes: number of different scenes.
    """
    rng = np.random.default_rng([TRAINING_SEED, seed])
    parts = [make_instances(t, scenes // len(TASKS), TRAINING_SEED + seed).scenes for t in TASKS]
    pool = Scenes(*(torch.cat([getattr(p, n) for p in parts]) for n in Scenes.__annotations__))
    chosen = pool[torch.from_numpy(rng.integers(0, len(pool), num))]
    actions = draw_gestures(num, rng)
    aim = torch.from_numpy(rng.random(num) < aimed)
    actions[aim] = _aim(chosen[aim], actions[aim], rng)
    return Transitions(chosen, actions, hard_world(chosen, actions))


def _aim(scenes: Scenes, actions: Tensor, rng: np.random.Generator) -> Tensor:
    """Move gestures so that they begin on a random widget and stay on the screen."""
    rows = torch.arange(len(actions))
    widget = torch.from_numpy(rng.integers(0, NUM_WIDGETS, len(actions)))
    inside = torch.from_numpy(rng.uniform(-1, 1, (len(actions), 2))).float()
    target = scenes.pos[rows, widget] + inside * scenes.half[rows, widget]
    pressed = actions[..., 2:] > PRESSED
    begin = actions[rows, pressed[..., 0].int().argmax(dim=1), :2]
    xy = actions[..., :2] + (target - begin)[:, None]
    stays = ((xy >= 0) & (xy <= 1) | ~pressed).all(dim=2).all(dim=1)[:, None, None]
    moved = torch.cat([xy * pressed, actions[..., 2:]], dim=-1)
    return torch.where(stays, moved, actions)


def widget_features(scenes: Scenes) -> Tensor:
    """Describe the widgets of scenes, (N, W, 10 + kinds)."""
    kind = nn.functional.one_hot(scenes.kind, len(KINDS)).float()
    linked = (scenes.link != torch.arange(scenes.link.shape[1])).float()
    numbers = [scenes.value[..., None], linked[..., None]]
    return torch.cat([kind, scenes.pos, scenes.half, scenes.low, scenes.high, *numbers], dim=-1)


def touch_down(actions: Tensor) -> Tensor:
    """Return where actions (N, L, 3) touch down, (N, 2): the mean over touch-downs, softly."""
    press = actions[..., 2]
    down = press * (1 - nn.functional.pad(press[:, :-1], (1, 0)))
    return (down[..., None] * actions[..., :2]).sum(dim=1) / (down.sum(dim=1)[:, None] + 1e-3)


class SurrogateWorld(nn.Module):
    """Predict the change of every widget's position and value; a World.

    Args:
        width: of all hidden layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(3, 32, 10, stride=5), nn.GELU(),
            nn.Conv1d(32, 64, 5, stride=2, padding=2), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * 25, width), nn.GELU(), nn.Linear(width, width),
        )  # fmt: skip
        self.widget = nn.Linear(12 + len(KINDS), width)
        self.head = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, 3),
        )  # fmt: skip

    def change(self, scenes: Scenes, actions: Tensor) -> Tensor:
        """Return the change of (x, y, value) of each widget, (N, W, 3)."""
        action = self.encoder(actions.transpose(1, 2))
        from_centre = (touch_down(actions)[:, None] - scenes.pos) / scenes.half
        every = self.widget(torch.cat([widget_features(scenes), from_centre.tanh()], dim=-1))
        own = self.head(every + action[:, None])
        # a lamp is lit through the buttons that are linked to it
        value = torch.zeros_like(own[..., 2]).scatter_add(1, scenes.link, own[..., 2])
        return torch.cat([own[..., :2], value[..., None]], dim=-1)

    def forward(self, scenes: Scenes, actions: Tensor) -> State:
        """Predict the state after actions (N, L, 3), clamped to [0, 1]."""
        change = self.change(scenes, actions.clamp(0, 1))
        pos = (scenes.pos + change[..., :2]).clamp(scenes.low, scenes.high)
        low = torch.where(scenes.kind == LIST, -1.0, 0.0)
        return State(pos, (scenes.value + change[..., 2]).clamp(low, torch.ones_like(low)))
