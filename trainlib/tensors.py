"""Tensors: what public functions take, draw, and run in batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainlib.errors import UserError, first_line
from trainlib.gestures import ACTION_DIM
from trainlib.knobs import checked
from trainlib.memory import memory_named


def is_finite(x: Tensor) -> bool:
    """Tell whether all numbers are finite; without data (meta, export) they are taken to be."""
    return x.is_meta or torch.compiler.is_exporting() or bool(x.isfinite().all())


def require_finite(x: Tensor, words: str) -> None:
    """Raise FloatingPointError with these words for a number that is not finite."""
    if not is_finite(x):
        raise FloatingPointError(words)


def describe(x: Any) -> str:
    """Name the type of an argument; of an array, dtype and shape too."""
    if not isinstance(x, Tensor | np.ndarray):
        return type(x).__name__
    kind = "" if type(x) in (Tensor, np.ndarray) else f"{type(x).__name__} of "
    return f"{kind}{x.dtype} {list(x.shape)}"


def as_tensor(name: str, x: Any) -> Tensor:
    """Return real numbers as a dense tensor without gradient; UserError for anything else.

    They may be a list, or an array or tensor of any strides, dtype and byte order.
    """
    given = describe(x)
    with suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(x, Tensor | np.ma.MaskedArray):
            array = np.asarray(x)
            if array.dtype.kind in "biuf":
                x = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    if not isinstance(x, Tensor) or x.is_complex() or x.layout != torch.strided:
        raise UserError(f"{name} must be a dense array of real numbers, got {given}")
    return x.detach().contiguous()


def gestures(
    x: Any,
    name: str = "x_0",
    *,
    model: Any = None,
    channels: tuple[int, ...] = (ACTION_DIM,),
    least: int = 1,
) -> Tensor:
    """Return gestures (B, L, 3), or (B, L) without `channels`, as a tensor in a model's dtype.

    UserError if they are of another shape, or fewer than `least`, or not finite.
    """
    x_0 = as_tensor(name, x)
    fits = x_0.ndim == 2 + len(channels) and x_0.shape[2:] == channels and x_0.shape[1] > 0
    if not fits or len(x_0) < least:
        wanted = f"[{', '.join(map(str, ('B', 'L', *channels)))}]"
        raise UserError(f"{name} must be {wanted}, got {describe(x_0)}")
    if not is_finite(x_0):
        raise UserError(f"{name} must be finite")
    return x_0.to(dtype_of(model, x))


def paired(original: Any, reconstructed: Any, **channels: Any) -> tuple[Tensor, Tensor]:
    """Return both as `gestures`, float32, on one device; UserError if their shapes differ."""
    words = "original and reconstructed"
    a, b = (gestures(x, words, **channels).float() for x in (original, reconstructed))
    if a.shape != b.shape:
        raise UserError(f"{words} must have one shape, got {list(a.shape)} and {list(b.shape)}")
    return a, b.to(a.device)


def device_of(model: Any, x_T: Any) -> torch.device:
    """Return where a model samples: where its weights are, or without any where x_T is."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next((x.device for x in (*weights, x_T) if isinstance(x, Tensor)), torch.device("cpu"))


def dtype_of(model: Any, x_T: Any) -> torch.dtype:
    """Return the dtype in which a model samples: of its weights, or without any that of x_T."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    dtypes = [x.dtype for x in (*weights, x_T) if isinstance(x, Tensor) and x.is_floating_point()]
    return dtypes[0] if dtypes else torch.float32


def given_tensors(
    model: Any, shape: Any, device: Any, generator: Any, x_T: Any, known: Any, known_mask: Any
) -> list[Tensor]:
    """Return what a sample (B, L, C) is given, on its device, in the model's dtype, masks as bool.

    That is [x_T], drawn if None, or with known frames [x_T, known, known_mask].

    Raises:
        UserError: one of them is of another shape or type, or not finite where it is read.
    """
    if not isinstance(shape, Iterable) or len(shape := tuple(shape)) != 3:
        raise UserError(f"shape must be (B, L, C), got {shape}")
    shape = tuple(checked("shape", size, int, low=0) for size in shape)
    device, dtype = as_device(device, empty=True), dtype_of(model, x_T)
    if (known is None) != (known_mask is None):
        raise UserError("known and known_mask must be given together")
    if x_T is None:
        with memory_named(f"a sample of {list(shape)}", "its shape"):
            x_T = draw_eps(shape, device, generator)
    given: list[Tensor] = []
    for name, x in (("x_T", x_T), ("known", known), ("known_mask", known_mask)):
        if x is None:
            break
        x, is_mask = as_tensor(name, x), name == "known_mask"
        if (x.dtype == torch.bool) != is_mask:
            raise UserError(f"{name} must hold {'bool' if is_mask else 'floats'}, got {x.dtype}")
        if x.shape != (wanted := shape[:2] if is_mask else shape):
            raise UserError(f"{name} must be {list(wanted)}, got {list(x.shape)}")
        given.append(x.to(device, None if is_mask else dtype))
    if not is_finite(given[0]):
        raise UserError("x_T must be finite")
    if len(given) > 1 and not is_finite(torch.where(given[2][..., None], given[1], 0)):
        raise UserError("known must be finite where known_mask is set")
    return given


def as_device(device: Any, *, empty: bool = False) -> torch.device:
    """Return a device that this machine has; UserError for any other.

    With `empty`, "meta" will do, whose tensors hold no numbers.
    """
    try:
        x = torch.empty(1, device=torch.device(device))
        if not empty:
            x.cpu()
        return x.device
    except Exception as e:  # of many kinds
        raise UserError(f"device {device!r} cannot be used ({first_line(e)}); use cpu") from None


def cost_gradient(cost_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the summed costs of x, NaN if a cost is not finite.

    UserError if the costs do not depend on x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        costs = cost_fn(x) if callable(cost_fn) else cost_fn
        if not isinstance(costs, Tensor) or costs.shape != x.shape[:1]:
            wanted = f"a function that returns a tensor [{len(x)}], one cost per action"
            raise UserError(f"cost_fn must be {wanted}, got {describe(costs)}")
        gradient = None
        if costs.requires_grad:
            (gradient,) = torch.autograd.grad(costs.sum(), x, allow_unused=True)
    if gradient is None:
        raise UserError("cost_fn must return costs that can be differentiated by its input")
    return gradient + 0 * costs.detach().sum()


def to_train(model: Any, device: Any) -> Any:
    """Return, on a device, the module to train inside a compiled or a parallel one.

    UserError if it is none, or has no float32 weights that learn.
    """
    inner = model
    while inner is not None:
        model, inner = inner, getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    if any(p.dtype != torch.float32 or p.is_meta for p in weights):
        raise UserError("model must hold float32 weights; use model.float()")
    if not any(p.requires_grad for p in weights) or not hasattr(model, "output_projection"):
        raise UserError(f"model must be a denoiser whose weights learn, got {type(model).__name__}")
    return model.to(as_device(device))


def check_output(output: Any, x_t: Tensor) -> None:
    """Raise UserError if what a model returned for x_t is not like it; it is never broadcast."""
    if not isinstance(output, Tensor) or output.shape != x_t.shape:
        wanted = f"the model must return a tensor {list(x_t.shape)}"
        raise UserError(f"{wanted}, got {describe(output)}")


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, where it is on, for the device of x."""
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


class WideLinear(nn.Linear):
    """A linear layer that computes in the type of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def check_inputs(model: Any, x_t: Tensor, known: Tensor | None, context: Tensor | None) -> None:
    """Raise UserError for what a denoiser was not built for."""
    if x_t.ndim != 3 or x_t.shape[2] != model.action_dim:
        raise UserError(f"x_t must be [B, L, {model.action_dim}], got {[*x_t.shape]}")
    weight = model.action_embedding.weight
    if (x_t.dtype, x_t.device) != (weight.dtype, weight.device):
        wanted = f"this model takes {weight.dtype} on {weight.device}"
        raise UserError(f"{wanted}, got {x_t.dtype} on {x_t.device}; use model.to(device, dtype)")
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


def exp_below_0(x: Tensor) -> Tensor:
    """Return exp(min(x, 0)), a normal float: for smaller ones a CPU takes fifty times as long."""
    return x.clamp(min=math.log(torch.finfo(x.dtype).tiny) + 1, max=0).exp()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return torch.addcmul(x + shift, x, scale)


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weights and bias to zero; return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
