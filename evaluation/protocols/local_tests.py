"""local_tests: the plan's two local tests, on a Mac's CPU and on a GPU, for the loaded network."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.estimates import Estimate, Table
from evaluation.protocol import Section, Subject
from evaluation.scores import measure_latencies
from train_diffusion_ddim import (
    NUM_TASKS,
    DDIMScheduler,
    TrainConfig,
    build_model,
    has_press_edge,
    recreate,
    train_step,
)
from trainlib.metrics import compute_reconstruction_metrics, gesture_metrics
from trainlib.state import TrainState


def run(s: Subject) -> list[Section]:
    """Answer the CPU test, and the GPU test where the network is on a GPU."""
    sections = [Section("program", program_table(s.model, s.x_val, s.recreated))]
    if s.x_val.is_cuda:
        table = gpu_table(s.model, s.scheduler, s.x_train[:256], s.config, s.sampling)
        sections.append(Section("gpu", table))
    return sections


def program_table(model: nn.Module, x_0: Tensor, recreated: Tensor) -> Table:
    """Answer the plan's CPU test; x_0 and what the model made of it are (B, L, C), data units."""
    with torch.no_grad():
        t = torch.zeros(len(x_0[:2]), dtype=torch.int64, device=x_0.device)
        shape = model(x_0[:2], t).shape
    checks = {"instantiated": True, "shapes_right": shape == x_0[:2].shape}
    edge = has_press_edge(x_0)
    if edge.any():
        pair = x_0[edge], recreated[edge]
        metrics = compute_reconstruction_metrics(*pair) | gesture_metrics(*pair)
        checks["metrics_finite"] = all(map(math.isfinite, metrics.values()))
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
    x = x_0.repeat(-(-256 // len(x_0)), 1, 1)[:256]
    t = torch.zeros(16, dtype=torch.int64, device=x.device)
    few, (_, L, C) = (x[:16].cpu(), t.cpu()), x.shape
    on_cpu = build_model(config).eval()
    sample = partial(scheduler.sample, model, (8, L, C), x.device, num_inference_steps=20)
    calls: dict[str, Callable[[], object]] = {
        "cpu": lambda: on_cpu(*few),
        "gpu": lambda: model(x[:16], t),
        "sampling": sample,
        "alone": lambda: recreate(model, scheduler, x[:1], **sampling),
        "together": lambda: recreate(model, scheduler, x, **sampling),
    }
    with torch.no_grad():
        ms = {name: e.value for name, e in measure_latencies(calls, x.device, 5).items()}
    scores = {"found": 1.0} | train_on_gpu(x_0, scheduler, config)
    scores["forward_speedup"] = ms["cpu"] / ms["gpu"]
    scores["sampling_s"] = ms["sampling"] / 1000
    scores["ms_per_sequence_alone"] = ms["alone"]
    scores["ms_per_sequence_of_256"] = ms["together"] / 256
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
