"""A learned world model of the user's kind: tokens and an action in, the tokens after it out.

A GRU reads the 250 frames, and modulates (FiLM, arXiv:1709.07871) every block of a transformer over
the 16x16 tokens of the screen, which also attends to moments of the action. Places of tokens and of
the finger have the same embedding, and queries begin as the keys of the same place: what lies under
the finger attends to it from the start. It sees no widgets, and is told nothing of touch-downs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.world import CENTRES, FEATURES, Scenes, observe
from trainlib.gestures import SEQ_LEN

OCTAVES = 5  # of places: from half a period per screen to eight
MOMENT = 10  # frames
SHARP = 1.7  # of attention to places, at first, times torch's default


def waves(xy: Tensor) -> Tensor:
    """Return sines and cosines of places, (..., 2), screen units → (..., 4·OCTAVES)."""
    angles = xy[..., None] * torch.pi * 2.0 ** torch.arange(OCTAVES, device=xy.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(xy.dtype)


def _places() -> Tensor:
    """Return the waves of the tokens' centres, (GRID², 4·OCTAVES), row by row."""
    y, x = torch.meshgrid(CENTRES, CENTRES, indexing="ij")
    return waves(torch.stack([x, y], dim=-1)).flatten(0, 1)


class Attention(nn.Module):
    """Attention of tokens to moments of the action, where it was pressed, or to none.

    Args:
        width: of all.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = (nn.Linear(width, width, bias=False) for _ in range(2))
        with torch.no_grad():
            self.q.weight.mul_(SHARP)
            self.k.weight.copy_(self.q.weight)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.none = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, moments: "Moments") -> Tensor:
        """Return what tokens (B, N, width) see of the action, likewise."""
        k = F.pad(self.k(moments.places), (0, 0, 0, 1))
        v = torch.cat([self.v(moments.values), self.none.expand(len(x), 1, -1)], dim=1)
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in (self.q(x), k, v))
        logits = F.pad((moments.pressed + 1e-3).log(), (0, 1))[:, None, None]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=logits)
        return self.out(seen.transpose(1, 2).flatten(2))


class Moments(NamedTuple):
    """Moments of B actions, of MOMENT frames each.

    Attributes:
        places: where the finger was, embedded, (B, M, width).
        values: what the GRU has made of it by then, likewise.
        pressed: share of the frames, (B, M).
    """

    places: Tensor
    values: Tensor
    pressed: Tensor


class Block(nn.Module):
    """A pre-norm transformer block that looks at the action and is modulated by it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.look = Attention(width, heads)
        self.film = nn.Linear(width, 4 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, action: Tensor, moments: Moments) -> Tensor:
        """Return tokens (B, N, width) under actions (B, width)."""
        width = x.shape[-1:]
        x = x + self.look(F.layer_norm(x, width), moments)
        scale_1, shift_1, scale_2, shift_2 = self.film(action)[:, None].chunk(4, dim=-1)
        h = F.layer_norm(x, width) * (1 + scale_1) + shift_1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(F.layer_norm(x, width) * (1 + scale_2) + shift_2)


class TokenPredictor(nn.Module):
    """Predict the tokens after an action; a world model for `model_cost` and for `token_cost`.

    Args:
        width: of the GRU and of the blocks.
        blocks: how many.
        heads: of attention.
    """

    places: Tensor

    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        features = 3 + 4 * OCTAVES
        self.gru = nn.GRU(features, width, batch_first=True)
        bias = dict(self.gru.named_parameters())["bias_ih_l0"]
        with torch.no_grad():  # so that it remembers for up to a window (arXiv:1804.11188)
            bias[width : 2 * width].uniform_(1, SEQ_LEN - 1).log_()
        self.register_buffer("places", _places(), persistent=False)
        self.embed, self.moment = nn.Linear(FEATURES, width), nn.Linear(features, width)
        self.at = nn.Linear(4 * OCTAVES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, FEATURES)
        nn.init.zeros_(self.head.weight)  # at first nothing changes
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Return what follows z, (B, T, N, D), under actions, (B, T, L, 3); like z."""
        tokens = z.flatten(0, 1)
        frames = actions.flatten(0, 1)
        touched = frames[..., 2:] * waves(frames[..., :2])
        read = torch.cat([frames, touched], dim=-1)
        states, last = self.gru(read)
        moments = self._moments(read, states)
        x = self.embed(tokens) + self.at(self.places)
        for block in self.blocks:
            x = block(x, last[0], moments)
        change = self.head(F.layer_norm(x, x.shape[-1:]))
        return (tokens + change).view_as(z)

    def _moments(self, read: Tensor, states: Tensor) -> Moments:
        """Summarise what the GRU read, (B, L, features), and made of it, (B, L, width)."""
        mean = read.unflatten(1, (-1, MOMENT)).mean(dim=2)
        pressed, width = mean[..., 2:3], states.shape[-1:]
        places = F.layer_norm(self.at(mean[..., 3:] / (pressed + 1e-3)), width)
        seen = F.layer_norm(states[:, MOMENT - 1 :: MOMENT], width) + self.moment(mean)
        return Moments(places, seen, pressed[..., 0])

    def after(self, scenes: Scenes, actions: Tensor) -> Tensor:
        """Return the layer-normalised tokens after actions in scenes, (N, GRID², FEATURES)."""
        z = observe(scenes, scenes.state)
        return F.layer_norm(self(z[:, None], actions[:, None])[:, 0], (FEATURES,))
