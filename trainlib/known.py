"""Known frames: which are given of a gesture, and what they tell all others."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainlib.gestures import PRESSED

# Each strategy maps gestures (B, L, C), data units, to a mask (B, L) bool of the given frames.


def _press_changes(x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Return touch-downs and lift-offs before frame i = 0..L, (B, L+1) bool; idle outside."""
    pressed = F.pad(x_0[..., 2] > PRESSED, (1, 1))  # (B, L+2)
    before, after = pressed[:, :-1], pressed[:, 1:]
    return after & ~before, before & ~after


def has_press_edge(x_0: Tensor) -> Tensor:
    """Tell which gestures press or lift inside the window; (B, L, C) → (B,) bool."""
    pressed = x_0[..., 2] > PRESSED
    return (pressed[:, 1:] != pressed[:, :-1]).any(dim=1)


def press_edges(x_0: Tensor) -> Tensor:
    """Know the frames on both sides of every touch-down and lift-off, about 4 of 250, if any."""
    touch_down, lift_off = _press_changes(x_0)
    change = touch_down | lift_off
    return (change[:, :-1] | change[:, 1:]) & has_press_edge(x_0)[:, None]


def touch_down(x_0: Tensor) -> Tensor:
    """Know only the frames on both sides of every touch-down; the rest is ambiguous."""
    change, _ = _press_changes(x_0)
    return (change[:, :-1] | change[:, 1:]) & has_press_edge(x_0)[:, None]


def prefix(x_0: Tensor) -> Tensor:
    """Know the first n frames, n uniform in [1, L): continuation."""
    B, L, _ = x_0.shape
    n = torch.randint(1, L, (B, 1), device=x_0.device)
    return torch.arange(L, device=x_0.device) < n


def random_frames(x_0: Tensor) -> Tensor:
    """Know each frame with a probability uniform in [0, 0.2): infilling."""
    B, L, _ = x_0.shape
    probability = 0.2 * torch.rand(B, 1, device=x_0.device)
    return torch.rand(B, L, device=x_0.device) < probability


KNOWN_STRATEGIES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # name: (strategy, its share of the gestures that train with known frames)
    "press_edges": (press_edges, 0.6),
    "touch_down": (touch_down, 0.2),
    "prefix": (prefix, 0.1),
    "random_frames": (random_frames, 0.1),
}


def nearest_known(known: Tensor, known_mask: Tensor) -> Tensor:
    """Tell every frame of its nearest known frames, before (or at) and after (or at) it.

    As (B, L, 2C + 3): both values (0 where there is none), how far along from the one to the other
    the frame lies in [0, 1], and whether each exists. The model then reads a value where it needs
    it, instead of learning to fetch it; so keyframes are learnt in minutes (docs/LOG.md).
    """
    B, L, C = known.shape
    frame = torch.arange(L, device=known.device).expand(B, L)
    before = torch.where(known_mask, frame, -1).cummax(dim=1).values
    after = torch.where(known_mask, frame, L).flip(1).cummin(dim=1).values.flip(1)
    has_before, has_after = before >= 0, after < L
    along = (frame - before).to(known) / (after - before).clamp(min=1) * (has_before & has_after)
    given = []
    for index, exists in ((before, has_before), (after, has_after)):
        index = index.clamp(0, L - 1)[..., None].expand(B, L, C)
        given.append(torch.where(exists[..., None], known.gather(1, index), 0.0))
    flags = torch.stack([along, has_before, has_after], dim=-1).to(known.dtype)
    return torch.cat([*given, flags], dim=-1)


def meet_known(xy: Tensor, known: Tensor, known_mask: Tensor) -> Tensor:
    """Let a curve, (B, L, C - 1), pass through the known frames that are pressed.

    Each frame is shifted by what the nearest of them, before and after, lack; interpolated.
    """
    misses = nearest_known(known[..., :-1] - xy, known_mask & (known[..., -1] > 0))
    axes = xy.shape[-1]
    before, after, along, has_before, _ = misses.split([axes, axes, 1, 1, 1], dim=-1)
    return xy + torch.where(has_before > 0, torch.lerp(before, after, along), after)
