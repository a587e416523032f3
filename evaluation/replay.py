"""The data of the page's replay: how the model recreates some gestures, step by step.

Per gesture the original, what the network was shown at each step (x_t) and what it then took x_0
for, in two tasks: from pure noise given the frames at the press edges (keyframes), and from x_t
noised to SIGMA (denoise). x_0 and its estimates are uint16 over [0, 1], x_t is uint8 over
X_T_RANGE, little-endian, base64, (frames, channels) row by row.
"""

import base64
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.scores import record_steps
from train_diffusion_ddim import (
    DDIMScheduler,
    has_press_edge,
    noise_bank,
    press_edges,
    takes_known_frames,
    to_data_units,
    to_model_units,
)
from trainlib.gestures import GESTURE_TYPES
from trainlib.metrics import classify_gestures

SIGMA = 0.4  # data units
X_T_RANGE = (-1.0, 2.0)  # data units; noise beyond it is clipped
RANKS = ("best", "better than 3 in 4", "typical", "worse than 3 in 4", "worst")


def pick_gestures(x_0: Tensor, recreated: Tensor) -> tuple[Tensor, list[str]]:
    """Choose gestures to replay: of each type five from the best recreated to the worst.

    Args:
        x_0: (B, L, C), data units; those without a press edge are not chosen.
        recreated: likewise.

    Returns:
        Their rows, (N,), and a name for each.
    """
    error = ((x_0 - recreated) ** 2).mean(dim=(1, 2))
    types = classify_gestures(x_0)
    rows: list[int] = []
    names: list[str] = []
    for kind, name in enumerate(GESTURE_TYPES):
        of_kind = torch.nonzero((types == kind) & has_press_edge(x_0))[:, 0]
        ranked = of_kind[error[of_kind].argsort()].tolist()
        places = np.linspace(0, len(ranked) - 1, len(RANKS)).round().astype(int)
        for place, rank in dict(zip(places.tolist(), RANKS, strict=True)).items():
            if ranked:
                rows.append(ranked[place])
                names.append(f"{name}, {rank} of {len(ranked)}")
    return torch.tensor(rows, dtype=torch.int64, device=x_0.device), names


def make_replay(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    recreated: Tensor,
    sampling: dict[str, Any],
) -> dict[str, Any] | None:
    """Record how the model recreates some gestures; the replay's data, None without a gesture.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units.
        recreated: by the keyframes protocol, likewise; it decides which gestures are shown.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
    """
    rows, names = pick_gestures(x_0, recreated)
    if not names:
        return None
    x, eps = x_0[rows], noise_bank(x_0.shape)[rows.cpu()].to(x_0)
    tasks = []
    if takes_known_frames(model):
        known = {"known": x, "known_mask": press_edges(x)}
        steps = trace(model, scheduler, eps, **sampling, **known)
        title = "from noise, given where the finger lands and lifts"
        tasks.append({"title": title, **_task(x, scheduler, steps, known["known_mask"])})
    t = scheduler.timestep_at(SIGMA)
    x_t, _ = scheduler.add_noise(to_model_units(x), t, eps)
    num = min(sampling["num_inference_steps"], t + 1)
    steps = trace(model, scheduler, x_t, start_t=t, **sampling | {"num_inference_steps": num})
    title = f"from the gesture under noise of {SIGMA} of the screen"
    tasks.append({"title": title, **_task(x, scheduler, steps, torch.zeros_like(x[..., 0]))})
    return {
        "names": names,
        "frames": x.shape[1],
        "range": X_T_RANGE,
        "x_0": [_encode(gesture, np.uint16, (0, 1)) for gesture in x],
        "tasks": tasks,
    }


def trace(
    model: nn.Module, scheduler: DDIMScheduler, x_T: Tensor, **options: Any
) -> list[tuple[int, Tensor, Tensor]]:
    """Sample from x_T, (B, L, C), model units, and keep each step; see `record_steps`.

    `options` are those of `DDIMScheduler.sample`. The last estimate is what it returns.
    """
    shape, device = tuple(x_T.shape), x_T.device
    sample = partial(scheduler.sample, model, shape, device, x_T=x_T, **options)
    return record_steps(model, scheduler, sample)


def _task(
    x_0: Tensor, scheduler: DDIMScheduler, steps: list[tuple[int, Tensor, Tensor]], given: Tensor
) -> dict[str, Any]:
    """Encode a trace of x_0, gesture by gesture; `given` is (B, L), nonzero where known."""
    ts, x_ts, estimates = zip(*steps, strict=True)
    x_t, estimate = torch.stack(x_ts, 1), torch.stack(estimates, 1)  # (B, N, L, C)
    rms = ((estimate - x_0[:, None]) ** 2).mean(dim=(2, 3)).sqrt()
    return {
        "sigmas": [float(f"{scheduler.sigma(t):.3g}") for t in ts],
        "given": [torch.nonzero(mask)[:, 0].tolist() for mask in given],
        "rms": [[float(f"{value:.3g}") for value in row] for row in rms],
        "x_t": [_encode(to_data_units(x), np.uint8, X_T_RANGE) for x in x_t],
        "estimate": [_encode(x, np.uint16, (0, 1)) for x in estimate],
    }


def _encode(x: Tensor, dtype: Any, limits: tuple[float, float]) -> str:
    """Round a tensor to the integers of an unsigned dtype, spread over `limits`; base64."""
    low, high = limits
    share = ((x.double().cpu().numpy() - low) / (high - low)).clip(0, 1)
    whole = np.round(share * np.iinfo(dtype).max).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(whole.tobytes()).decode("ascii")
