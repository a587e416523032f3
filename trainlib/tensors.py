"""Tensors: what public functions take, draw, and run in batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainlib.errors import UserError, first_line
from trainlib.knobs import as_type


def is_finite(x: Tensor) -> bool:
    """Tell whether all numbers are finite; without data (meta, export) they are taken to be."""
    return x.is_meta or torch.compiler.is_exporting() or bool(x.isfinite().all())


def require_finite(x: Tensor, words: str) -> None:
    """Raise FloatingPointError with these words for a number that is not finite."""
    if not is_finite(x):
        raise FloatingPointError(words)


def paired(original: Any, reconstructed: Any, wanted: str = "[B, L, 3]") -> tuple[Tensor, Tensor]:
    """Return both as float32 tensors on one device; UserError if their shapes differ, or for NaN.

    Both are of the `wanted` shape, "[B, L, 3]" or "[B, L]"; they are never broadcast.
    """
    try:
        given = (torch.as_tensor(x) for x in (original, reconstructed))
        a, b = (x.detach().float().contiguous() for x in given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"original and reconstructed must be arrays ({first_line(e)})") from None
    has_shape = a.ndim == 2 if wanted == "[B, L]" else a.ndim == 3 and a.shape[2] == 3
    if a.shape != b.shape or not has_shape or not len(a):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(f"original and reconstructed must have one shape {wanted}, got {shapes}")
    b = b.to(a.device)
    if not (is_finite(a) and is_finite(b)):
        raise UserError("original and reconstructed must be finite")
    return a, b


def dtype_of(model: Any, x_T: Any) -> torch.dtype:
    """Return the dtype in which a model samples: of its weights, or without any that of x_T."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    dtypes = [x.dtype for x in (*weights, x_T) if isinstance(x, Tensor) and x.is_floating_point()]
    return dtypes[0] if dtypes else torch.float32


def check_given(
    shape: tuple[int, ...], device: Any, dtype: Any, x_T: Any, known: Any, known_mask: Any
) -> list[Any]:
    """Return what a sample (B, L, C) is given, on its device, of its dtype, the mask as bool.

    That is [x_T or None], or with known frames [x_T or None, known, known_mask].

    Raises:
        UserError: one of them is of another shape or type, or not finite where it is read.
    """
    if (known is None) != (known_mask is None):
        raise UserError("known and known_mask must be given together")
    if not isinstance(shape, Sequence) or len(shape) != 3:
        raise UserError(f"shape must be (B, L, C), got {shape}")
    shape = tuple(as_type("shape", size, int) for size in shape)
    device = as_device(device)
    given: list[Any] = []
    for name, x in (("x_T", x_T), ("known", known), ("known_mask", known_mask)):
        if x is None:
            given += [None] if name == "x_T" else []
            continue
        x, wanted = torch.as_tensor(x), tuple(shape[:2] if name == "known_mask" else shape)
        if (x.dtype == torch.bool) != (name == "known_mask"):
            kind = "bool" if name == "known_mask" else "floats"
            raise UserError(f"{name} must hold {kind}, got {x.dtype}")
        if x.shape != wanted:
            raise UserError(f"{name} must be {list(wanted)}, got {list(x.shape)}")
        given.append(x.to(device, None if name == "known_mask" else dtype))
    if given[0] is not None and not is_finite(given[0]):
        raise UserError("x_T must be finite")
    if len(given) > 1 and not is_finite(torch.where(given[2][..., None], given[1], 0)):
        raise UserError("known must be finite where known_mask is set")
    return given


def as_device(device: Any) -> torch.device:
    """Return a device that this machine has; UserError for any other."""
    try:
        return torch.empty(0, device=device).device
    except Exception as e:  # of many kinds
        raise UserError(f"device {device!r} cannot be used ({first_line(e)}); use cpu") from None


def cost_gradient(cost_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the summed costs of x, NaN if a cost is not finite.

    UserError if the costs do not depend on x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        costs = cost_fn(x)
        gradient = None
        if isinstance(costs, Tensor) and costs.requires_grad:
            (gradient,) = torch.autograd.grad(costs.sum(), x, allow_unused=True)
    if gradient is None:
        raise UserError("cost_fn must return costs, (B,), that can be differentiated by its input")
    return gradient + 0 * costs.detach().sum()


def check_inputs(model: Any, x_t: Tensor, known: Tensor | None, context: Tensor | None) -> None:
    """Raise UserError for what a denoiser was not built for."""
    if x_t.ndim != 3 or x_t.shape[2] != model.action_dim:
        raise UserError(f"x_t must be [B, L, {model.action_dim}], got {[*x_t.shape]}")
    L, longest, width = x_t.shape[1], model.seq_len, model.options["context_dim"]
    if L % model.patch_size or L > longest or (model.rotary and L != longest):
        raise UserError(f"this model takes gestures of {longest} frames, got {L}")
    if known is not None and not model.known_frames:
        raise UserError("this model takes no known frames; build it with known_frames=True")
    if context is not None and context.shape != (len(x_t), width):
        wanted = f"context must be [B, {width}]" if width else "this model takes no context"
        raise UserError(f"{wanted}, got {[*context.shape]}")


def draw_eps(
    shape: tuple[int, ...],
    device: str | torch.device,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw N(0, 1) where the generator is, or without one on `device`; return it on `device`.

    A CPU generator draws the same for every device; on a GPU its own is faster.
    """
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator must be a torch.Generator, got {generator!r}")
    at = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=at, dtype=dtype).to(device)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Hold a module in eval mode without gradients, then restore its mode."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


def in_batches(
    function: Callable[..., Tensor], *arguments: Tensor, batch_size: int = 256
) -> Tensor:
    """Apply `function` to `batch_size` rows of the arguments at a time, to bound the memory."""
    batches = zip(*(a.split(batch_size) for a in arguments), strict=True)
    whole = torch.cat([function(*batch) for batch in batches])
    require_finite(whole, "what the model answers is not finite: did the training diverge?")
    return whole


def model_diagnostics(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the norm of all weights, and the RMS of the features before the output layer."""
    norm = torch.stack([p.norm() for p in model.parameters()]).norm()
    rms: list[Tensor] = []
    layer: Any = model.output_projection
    hook = layer.register_forward_pre_hook(lambda _, h: rms.append(h[0].square().mean().sqrt()))
    with eval_mode(model):
        model(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
    hook.remove()
    return {"model/weight_norm": norm.item(), "model/activation_stats": rms[0].item()}
