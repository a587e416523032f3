"""Muon: step matrices along the orthogonal factor of their momentum (arXiv:2502.16982)."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainlib.errors import UserError

FLOOR = 1e-8  # keeps the zero matrix finite
# Weights inside blocks, and those of curves that see no tokens; of a denoiser within another, too.
MATRICES = re.compile(
    r"(?:^|\.)(blocks\.(?!.*modulation)|output_projection\.curves\.(from_x_t|hidden|out)\.)"
)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices, (B, m, n), near 1; their singular vectors stay.

    Five steps of the Newton-Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ, with the coefficients
    of kellerjordan.github.io/posts/muon.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=FLOOR)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, scaled to the RMS of AdamW's steps (sec. 2.2).

    So it takes AdamW's learning rate. As torch.optim.Muon, but in float32 and matrices of one shape
    together, which takes less time, and far less where the processor has no bfloat16
    (docs/BENCHMARKS.md).

    Args:
        params: matrices, (m, n) each.
        lr: learning rate.
        weight_decay: decoupled, times lr.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here passes a closure
        """Update the matrices that have a gradient."""
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        trained = [p for p in group["params"] if p.grad is not None]
        for shape in {p.shape for p in trained}:
            params = [p for p in trained if p.shape == shape]
            grads = torch.stack([p.grad for p in params])
            averages = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(averages, grads.unbind(), 1 - momentum)
            update = newton_schulz(grads.lerp(torch.stack(averages), momentum)).unbind()
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-0.2 * lr * max(shape) ** 0.5)


def make_optimizers(
    model: nn.Module, lr: float, weight_decay: float, *, muon: bool
) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights; with `muon` Muon for the matrices of MATRICES instead."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and MATRICES.search(name)
        (matrices if is_matrix and muon else others).append(p)
    try:
        adamw = torch.optim.AdamW(others, lr, weight_decay=weight_decay, fused=True)
    except OSError as e:  # torch's first optimizer makes the compiler's cache folder
        cure = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        raise UserError(f"torch cannot make its cache folder ({e}); {cure}") from None
    return [adamw, Muon(matrices, lr, weight_decay)] if matrices else [adamw]
