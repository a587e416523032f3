"""Metrics of gestures, (B, L, C), data units; those of recreations are paired with originals.

Every paired metric takes `original` and a recreation of it, never an unrelated sample, and weighs
gestures (or frames) exactly.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainlib import tensors
from trainlib.contacts import median_shake
from trainlib.gestures import GESTURE_TYPES, PRESSED, classify_moves

FLOOR = 1e-8  # keeps ratios and logarithms finite


def mean_variance(x: Tensor) -> Tensor:
    """Return the variance over frames of each channel, averaged over the batch; (C,)."""
    return torch.var(x, dim=1).mean(dim=0)


def classify_gestures(x: Tensor) -> Tensor:
    """Return indices into GESTURE_TYPES, (B,) int64, by the move from first to last pressed frame.

    The rule is that of `classify_moves`.
    """
    x = tensors.gestures(x, "x", least=0)
    pressed, L = x[..., 2] > PRESSED, x.shape[1]  # (B, L)
    first = pressed.int().argmax(dim=1)
    last = L - 1 - pressed.flip(1).int().argmax(dim=1)
    rows = torch.arange(len(x), device=x.device)
    dx, dy = (x[rows, last, :2] - x[rows, first, :2]).unbind(dim=-1)
    return classify_moves(dx, dy, pressed.any(dim=1))


def compute_temporal_iou(orig_active: Tensor, recon_active: Tensor) -> float:
    """Return the mean intersection over union of the pressed frames, those above 0.5 of (B, L).

    Two gestures without any press agree: 1.
    """
    a, b = (x > PRESSED for x in tensors.paired(orig_active, recon_active, channels=()))
    intersection, union = (a & b).sum(dim=1), (a | b).sum(dim=1)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0).mean().item()


def compute_spatial_accuracy(
    original: Tensor, reconstructed: Tensor, threshold: float = 0.1
) -> float:
    """Return the share of active frames whose (x, y) lies within `threshold` of the original.

    Active: pressed in either of the two. 1 if there is none.
    """
    original, reconstructed = tensors.paired(original, reconstructed)
    active = (original[..., 2] > PRESSED) | (reconstructed[..., 2] > PRESSED)
    if not active.any():
        return 1.0
    distance = torch.linalg.vector_norm((original - reconstructed)[..., :2], dim=-1)
    return (distance < threshold)[active].float().mean().item()


def compute_gesture_type_accuracy(original: Tensor, reconstructed: Tensor) -> float:
    """Return the share of gestures whose type survives, one rule on both sides."""
    original, reconstructed = tensors.paired(original, reconstructed)
    same = classify_gestures(original) == classify_gestures(reconstructed)
    return same.float().mean().item()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, 1 where both vanish."""
    return (a + FLOOR) / (b + FLOOR)


def compute_reconstruction_metrics(
    original: Tensor, reconstructed: Tensor, scheduler: Any = None
) -> dict[str, float]:
    """Score recreations, (B, L, C), data units, row by row against their originals.

    Returns one finite float per metric, see docs/METRICS.md. The plan passes a scheduler; nothing
    depends on it.
    """
    original, reconstructed = tensors.paired(original, reconstructed)
    error = original - reconstructed
    active = (original[..., 2] > PRESSED) | (reconstructed[..., 2] > PRESSED)
    agree = (original[..., 2] > PRESSED) == (reconstructed[..., 2] > PRESSED)
    orig_variance, recon_variance = mean_variance(original), mean_variance(reconstructed)
    variance_ratio = _ratio(recon_variance, orig_variance)
    jumps = (mean_variance(x.diff(dim=1)) for x in (reconstructed, original))
    smoothness_ratio = _ratio(*jumps)
    snr_db = 10 * torch.log10(_ratio((original**2).mean(dim=(1, 2)), (error**2).mean(dim=(1, 2))))
    any_active = bool(active.any())
    scores = {
        "mse": (error**2).mean(),
        "mae": error.abs().mean(),
        "coord_mse": (error[..., :2] ** 2).mean(),
        "press_mse": (error[..., 2] ** 2).mean(),
        "active_coord_mse": (error[..., :2] ** 2)[active].mean() if any_active else 0.0,
        "press_accuracy": agree[active].float().mean() if any_active else 1.0,
        "mean_snr_db": snr_db.mean(),
        "median_snr_db": snr_db.median(),
    }
    for c, name in enumerate("xyp"):
        scores[f"orig_variance_{name}"] = orig_variance[c]
        scores[f"recon_variance_{name}"] = recon_variance[c]
        scores[f"variance_ratio_{name}"] = variance_ratio[c]
        scores[f"smoothness_ratio_{name}"] = smoothness_ratio[c]
    return {name: float(value) for name, value in scores.items()}


def gesture_metrics(original: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Return the plan's three gesture scores: timing, place, type; each in [0, 1]."""
    original, reconstructed = tensors.paired(original, reconstructed)
    return {
        "temporal_iou": compute_temporal_iou(original[..., 2], reconstructed[..., 2]),
        "spatial_accuracy": compute_spatial_accuracy(original, reconstructed),
        "gesture_type_accuracy": compute_gesture_type_accuracy(original, reconstructed),
    }


def recreation_rows(x_0: Tensor, recreated: Tensor, epoch: int) -> list[dict[str, Any]]:
    """Return the plan's reconstruction table, a row per gesture."""
    x_0, recreated = tensors.paired(x_0, recreated)
    types, recreated_types = classify_gestures(x_0), classify_gestures(recreated)
    rows: list[dict[str, Any]] = []
    for i, pair in enumerate(zip(x_0.split(1), recreated.split(1), strict=True)):
        scores = gesture_metrics(*pair)
        row = {"epoch": epoch, "sample_id": i, "original_type": GESTURE_TYPES[types[i]]}
        row["reconstructed_type"] = GESTURE_TYPES[recreated_types[i]]
        row["timing_accuracy"] = scores["temporal_iou"]
        row["spatial_accuracy"] = scores["spatial_accuracy"]
        row["overall_quality"] = sum(scores.values()) / len(scores)
        rows.append(row)
    return rows


def has_one_press(x: Tensor) -> Tensor:
    """Tell which samples press exactly once; (B, L, C) → (B,) bool."""
    pressed = tensors.gestures(x, "x", least=0)[..., 2] > PRESSED
    return (F.pad(pressed.int(), (1, 0)).diff(dim=1) == 1).sum(dim=1) == 1


def recreation_summary(x_0: Tensor, recreated: Tensor) -> dict[str, float]:
    """Return the plan's `{name}_mean` and `{name}_std` over recreations, see METRICS.md."""
    x_0, recreated = tensors.paired(x_0, recreated)
    rows = recreation_rows(x_0, recreated, epoch=0)
    results: dict[str, list] = {
        "reconstruction_quality": ((x_0 - recreated) ** 2).mean(dim=(1, 2)).tolist(),
        "action_timing_accuracy": [row["timing_accuracy"] for row in rows],
        "spatial_accuracy": [row["spatial_accuracy"] for row in rows],
        "gesture_type_preservation": [r["original_type"] == r["reconstructed_type"] for r in rows],
    }
    means = {f"{name}_mean": float(np.mean(v)) for name, v in results.items()}
    return means | {f"{name}_std": float(np.std(v)) for name, v in results.items()}


def generation_metrics(samples: Tensor) -> dict[str, float]:
    """Return the share of samples with exactly one press and of each type, and their shake."""
    samples = tensors.gestures(samples, "samples")
    types = classify_gestures(samples)
    shares = {f"share_{n}": (types == i).float().mean() for i, n in enumerate(GESTURE_TYPES)}
    shares["one_press"] = has_one_press(samples).float().mean()
    return {k: float(v) for k, v in shares.items()} | {"shake": median_shake(samples.cpu())}
