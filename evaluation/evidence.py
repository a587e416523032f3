"""Evidence for the verdict that no protocol makes, as tables: setting -> metric -> `Estimate`.

keyframes_groups    the plan's own groups of gestures, and its criteria of several metrics
denoise_lines       the worst of the denoise protocol over LINE_SIGMAS
training            what metrics.jsonl tells of the run
baselines_lines     the comparisons that the plan asks for
program, gpu        the plan's two local tests, on the checkpoint's network
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from augmentation.presets import COMPLEXITY_LEVELS
from evaluation.estimates import Estimate, FloatArray, Table, bootstrap
from evaluation.protocols import PLAN_LINES, lines_met
from train_diffusion_ddim import (
    NUM_TASKS,
    DDIMScheduler,
    TrainConfig,
    build_model,
    classify_gestures,
    compute_temporal_iou,
    has_press_edge,
    recreate,
    train_step,
)
from trainlib.checkpoint import load_checkpoint
from trainlib.gestures import GESTURE_TYPES, PRESSED
from trainlib.state import TrainState

COMPLEX_FRAMES = next(x["min_delta_t"] for x in COMPLEXITY_LEVELS if x["name"] == "complex")
LINE_SIGMAS = (0.1, 0.2, 0.4, 0.7)  # data units
CONVERGED = 1.1  # the validation loss stays below this multiple of its least value


def group_scores(x_0: Tensor, recreated: Mapping[str, Tensor], keyframes: Table) -> Table:
    """Score recreations by the plan's groups of gestures, and by its criteria of many metrics.

    Args:
        x_0: (B, L, C), data units.
        recreated: by setting, likewise.
        keyframes: their scores, of `protocols.keyframes`.

    Returns:
        Per setting: mse_{type} and the largest, mse_worst_type; temporal_iou_complex;
        variance_ratio, the one farthest from 1 by ratio; smoothness_ratio, the largest; lines_met
        of PLAN_LINES; and where there is a random_training_item, metrics_beyond_random.
    """
    scored = has_press_edge(x_0)
    x, types = x_0[scored], classify_gestures(x_0[scored])
    is_complex = (x[..., 2] > PRESSED).sum(dim=1) >= COMPLEX_FRAMES
    table: Table = {}
    for setting, scores in keyframes.items():
        y = recreated[setting][scored]
        error = ((x.double() - y.double()) ** 2).mean(dim=(1, 2)).cpu().numpy()
        of_type = {
            f"mse_{name}": bootstrap(error[(types == i).cpu().numpy()])
            for i, name in enumerate(GESTURE_TYPES)
            if (types == i).any()
        }
        pressed = (x[is_complex][..., 2] > PRESSED, y[is_complex][..., 2] > PRESSED)
        table[setting] = {
            **of_type,
            "mse_worst_type": max(of_type.values(), key=lambda e: e.value),
            "temporal_iou_complex": bootstrap(_each_iou(*pressed)),
            "variance_ratio": max(_ratios(scores, "variance"), key=lambda e: _far(e.value)),
            "smoothness_ratio": max(_ratios(scores, "smoothness"), key=lambda e: e.value),
            "lines_met": Estimate(len(lines_met(scores)), None, len(x)),
        }
        if "random_training_item" in keyframes:
            beyond = metrics_beyond(scores, keyframes["random_training_item"])
            table[setting]["metrics_beyond_random"] = Estimate(beyond, None, len(x))
    return table


def _each_iou(p: Tensor, q: Tensor) -> FloatArray:
    """Temporal IoU gesture by gesture, (B,)."""
    pairs = zip(p.split(1), q.split(1), strict=True)
    return np.array([compute_temporal_iou(*pair) for pair in pairs])


def _ratios(scores: Mapping[str, Estimate], name: str) -> list[Estimate]:
    return [scores[f"{name}_ratio_{channel}"] for channel in "xyp"]


def _far(ratio: float) -> float:
    return abs(math.log(max(ratio, 1e-12)))


def metrics_beyond(scores: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> int:
    """Count the PLAN_LINES metrics whose interval lies wholly on the better side of another's."""
    count = 0
    for metric, (side, _) in PLAN_LINES.items():
        a, b = scores[metric].ci, other[metric].ci
        if a and b:
            count += a[1] < b[0] if side == "<" else a[0] > b[1]
    return count


def denoise_lines(denoise: Table) -> Table:
    """Take the worst of a denoise table over LINE_SIGMAS, of the model and of trivial answers.

    Returns:
        Per setting r; of "model" r_ddim, too. Empty without the Bayes limit.
    """
    rows = [denoise[f"sigma_{sigma}"] for sigma in LINE_SIGMAS if f"sigma_{sigma}" in denoise]
    if not rows or "r" not in rows[0]:
        return {}
    table = {
        "model": {name: max((row[name] for row in rows), key=lambda e: e.value)
                  for name in ("r", "r_ddim")},
    }  # fmt: skip
    for name in ("identity", "zeros", "training_mean", "nearest_training_item", "untrained_model"):
        r = max(row[f"mse_{name}"].value / row["mse_mmse"].value for row in rows)
        table[name] = {"r": Estimate(r, None, rows[0]["r"].n)}
    return table


def baselines_lines(baselines: Mapping[str, Table]) -> Table:
    """Take from the baselines' tables what the plan compares: their MSE over the model's.

    Args:
        baselines: the protocols of `baselines.read_baselines`.

    Returns:
        Of "model": regression, in keyframes; vae, the least at equal bits.
    """
    scores = {}
    regression = baselines.get("keyframes", {}).get("regression", {})
    if "mse_ratio" in regression:
        scores["regression"] = regression["mse_ratio"]
    ratios = [
        row["mse_ratio"]
        for name, table in baselines.items()
        if name.startswith("reconstruction") and "diffusion" in table
        for method, row in table.items()
        if method.startswith("vae")
    ]
    if ratios:
        scores["vae"] = min(ratios, key=lambda e: e.value)
    return {"model": scores} if scores else {}


def training_table(checkpoint: str) -> Table:
    """Read how the training went, up to a checkpoint, from the metrics.jsonl beside it.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest one.

    Returns:
        Of "model", over epochs: finished, falls, loss_ratio_3_epochs, epochs_to_converge as the
        criteria have them; empty without a record.
    """
    content = load_checkpoint(checkpoint)
    try:
        lines = (content["path"].parent / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["step"] <= content["step"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another program
        return {}
    loss = _series(rows, "train/epoch_loss")
    val_loss = _series(rows, "val/loss")
    if len(loss) != content["epoch"] + 1 or len(val_loss) != len(loss):
        return {}
    n = len(loss)
    finished = n == content["config"]["num_epochs"] and np.isfinite(loss).all()
    scores: dict[str, float] = {"finished": int(finished)}
    if n > 1:
        parts = [part.mean() for part in np.array_split(loss, min(5, n))]
        scores["falls"] = float((np.diff(parts) < 0).mean())
        above = np.flatnonzero(val_loss > CONVERGED * val_loss.min())
        scores["epochs_to_converge"] = int(above[-1]) + 2 if len(above) else 1
    if n > 2:
        scores["loss_ratio_3_epochs"] = float(loss[2] / loss[0])
    return {"model": {name: Estimate(value, None, n) for name, value in scores.items()}}


def _series(rows: list[dict[str, Any]], key: str) -> FloatArray:
    """One value per epoch; null reads as NaN."""
    return np.array([row[key] for row in rows if key in row and "val/epoch" in row], dtype=float)


def program_table(model: nn.Module, x_0: Tensor, keyframes: Table) -> Table:
    """Answer the plan's CPU test for a loaded network; x_0 is (B, L, C), data units."""
    with torch.no_grad():
        t = torch.zeros(len(x_0[:2]), dtype=torch.int64, device=x_0.device)
        shape = model(x_0[:2], t).shape
    checks = {"instantiated": True, "shapes_right": shape == x_0[:2].shape}
    if "model" in keyframes:
        checks["metrics_finite"] = all(math.isfinite(e.value) for e in keyframes["model"].values())
    return {"model": {name: Estimate(int(ok), None, 1) for name, ok in checks.items()}}


def gpu_table(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    config: TrainConfig,
    sampling: dict[str, Any],
) -> Table:
    """Answer the plan's GPU test for a network on a GPU, and time its recreations.

    Args:
        model: the denoiser, on a GPU.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, on the GPU; repeated to 256.
        config: of the network and its training.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.

    Returns:
        Of "model": found, training_memory_gb, trained, forward_speedup, sampling_s,
        ms_per_sequence_alone, ms_per_sequence_of_256.
    """
    scores = {"found": 1.0} | train_on_gpu(x_0, scheduler, config)
    x = x_0.repeat(-(-256 // len(x_0)), 1, 1)[:256]
    t = torch.zeros(16, dtype=torch.int64, device=x.device)
    on_cpu = build_model(config).eval()
    with torch.no_grad():
        slow = timed(lambda: on_cpu(x[:16].cpu(), t.cpu()))
        scores["forward_speedup"] = slow / timed(lambda: model(x[:16], t))
    shape = (8, *x.shape[1:])
    scores["sampling_s"] = timed(
        lambda: scheduler.sample(model, shape, x.device, num_inference_steps=20)
    )
    alone = timed(lambda: recreate(model, scheduler, x[:1], **sampling))
    together = timed(lambda: recreate(model, scheduler, x, **sampling))
    scores |= {"ms_per_sequence_alone": 1e3 * alone, "ms_per_sequence_of_256": 1e3 * together / 256}
    return {"model": {name: Estimate(value, None, 1) for name, value in scores.items()}}


def train_on_gpu(x_0: Tensor, scheduler: DDIMScheduler, config: TrainConfig) -> dict[str, float]:
    """Take 5 training steps of a fresh network; return `trained` and the peak of the memory."""
    torch.cuda.reset_peak_memory_stats()
    state = TrainState(build_model(config).to(x_0.device), scheduler, config, 5, NUM_TASKS)
    batch = x_0[: config.batch_size]
    try:
        for _ in range(5):
            train_step(state, batch)
    except torch.cuda.OutOfMemoryError:
        return {"trained": 0.0, "training_memory_gb": math.inf}
    return {"trained": 1.0, "training_memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def timed(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median wall-clock seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))
