"""A learned world model of the user's kind: tokens and an action in, the tokens after it out.

A GRU reads the 250 frames, and modulates (FiLM, arXiv:1709.07871) every block of a transformer over
the 16x16 tokens of the screen. It sees no widgets, and is told nothing of touches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.world import CENTRES, FEATURES, Scenes, observe
from trainlib.gestures import SEQ_LEN

OCTAVES = 5  # of the places of tokens: from half a period per screen to eight


def waves(xy: Tensor) -> Tensor:
    """Return sines and cosines of places, (..., 2), screen units → (..., 4·OCTAVES)."""
    angles = xy[..., None] * torch.pi * 2.0 ** torch.arange(OCTAVES, device=xy.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(xy.dtype)


def _places() -> Tensor:
    """Return the waves of the tokens' centres, (GRID², 4·OCTAVES), row by row."""
    y, x = torch.meshgrid(CENTRES, CENTRES, indexing="ij")
    return waves(torch.stack([x, y], dim=-1)).flatten(0, 1)


class Block(nn.Module):
    """A pre-norm transformer block whose norms are scaled and shifted by the action."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.film = nn.Linear(width, 4 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        """Return tokens (B, N, width) under actions (B, width)."""
        scale_1, shift_1, scale_2, shift_2 = self.film(action)[:, None].chunk(4, dim=-1)
        width = x.shape[-1:]
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
        self.gru = nn.GRU(3 + 4 * OCTAVES, width, batch_first=True)
        bias = dict(self.gru.named_parameters())["bias_ih_l0"]
        with torch.no_grad():  # so that it remembers for up to a window (arXiv:1804.11188)
            bias[width : 2 * width].uniform_(1, SEQ_LEN - 1).log_()
        self.register_buffer("places", _places(), persistent=False)
        self.embed = nn.Linear(FEATURES, width)
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
        action = self.gru(torch.cat([frames, touched], dim=-1))[1][0]
        x = self.embed(tokens) + self.at(self.places)
        for block in self.blocks:
            x = block(x, action)
        change = self.head(F.layer_norm(x, x.shape[-1:]))
        return (tokens + change).view_as(z)

    def after(self, scenes: Scenes, actions: Tensor) -> Tensor:
        """Return the layer-normalised tokens after actions in scenes, (N, GRID², FEATURES)."""
        z = observe(scenes, scenes.state)
        return F.layer_norm(self(z[:, None], actions[:, None])[:, 0], (FEATURES,))
