"""Symmetries of generated gestures."""

import torch
from torch import Tensor

from trainlib.gestures import PRESSED


def augment(x_0: Tensor) -> Tensor:
    """Draw an equally likely twin of each gesture; (B, L, 3) → (B, L, 3), data units.

    By coin flips x → 1 - x, y → 1 - y, x ↔ y and frames reversed; then the span from the first to
    the last pressed frame starts anywhere it fits. Generated gestures, zero while idle, have all
    these symmetries; recordings of real screens do not.
    """
    B, L, _ = x_0.shape
    coin = torch.rand(B, 4, device=x_0.device) < 0.5
    xy, press = x_0[..., :2], x_0[..., 2:]
    xy = torch.where(coin[:, None, :2], press - xy, xy)  # press - 0 = 0 while idle
    xy = torch.where(coin[:, 2, None, None], xy.flip(2), xy)
    x_0 = torch.cat([xy, press], dim=2)
    x_0 = torch.where(coin[:, 3, None, None], x_0.flip(1), x_0)

    pressed = x_0[..., 2] > PRESSED
    first, after = pressed.int().argmax(1), L - pressed.flip(1).int().argmax(1)
    room = L - (after - first)  # latest onset; first = 0 and after = L without a press: no room
    onset = (torch.rand(B, device=x_0.device) * (room + 1)).long().clamp(max=room)
    frame = (torch.arange(L, device=x_0.device) + (first - onset)[:, None]) % L
    return x_0.gather(1, frame[..., None].expand_as(x_0))
