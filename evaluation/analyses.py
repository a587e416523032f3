"""The plan's five analyses, the sampler sweep and the evaluation patterns: the numbers.

Each function takes a model, its scheduler and gestures x_0, (B, L, C) in data units, and returns
a `Table`; analysis_figures.py and sweep_figures.py draw it. A setting "a/b" is the answer of method
b in group a; the methods are `model`, the controls and the limits of evaluation/controls.py.

    quality_by_group        1. by action type and complexity level, and the evaluation patterns
    error_by_frame          2. around touch-down and lift-off
    error_by_step           2. of the x_0 estimate along the denoising steps
    excess_loss             3. the training loss against the least possible one, by t
    sampler_sweep           3. and 6. steps x sampler x eta

Measured elsewhere: what the exact score does with few steps (3., few_steps.py), model size against
quality and latency, and convergence (4. and 5., records.py). `run_analyses` collects all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from augmentation import (
    COMPLEXITY_LEVELS,
    EVAL_PATTERNS,
    SEQUENCE_LENGTH,
    draw_gestures,
    make_pattern,
    render,
)
from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.controls import Recreation, interpolation, nearest_training_item
from evaluation.estimates import Estimate, FloatArray, Table, bootstrap
from evaluation.few_steps import exact_few_steps, read_exact_few_steps, score_durations
from evaluation.protocols import is_linear_gesture, score_recreations
from evaluation.records import read_records
from train_diffusion_ddim import (
    DENOISE_SIGMAS,
    DDIMScheduler,
    classify_gestures,
    denoise_one_shot,
    generate,
    has_one_press,
    has_press_edge,
    noise_bank,
    recreate,
    takes_known_frames,
    to_data_units,
    to_model_units,
)
from trainlib.errors import say
from trainlib.gestures import GESTURE_TYPES, PRESSED
from trainlib.process import progress
from trainlib.tensors import eval_mode, in_batches

LEVEL_SEED = 20210506
SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "eta": 0.0},
    "ddim_eta_1": {"sampler": "ddim", "eta": 1.0},
    "dpmpp": {"sampler": "dpmpp", "eta": 0.0},
    "dpmpp_eta_1": {"sampler": "dpmpp", "eta": 1.0},
}
STEPS = (1, 2, 5, 10, 20, 50)
FRAME_SPAN = {"touch_down": range(-10, 26), "lift_off": range(-25, 11)}  # frames from the edge
FRAME_SIGMA = 0.4  # of the denoise protocol in error_by_frame


@dataclass(frozen=True)
class Budget:
    """How many sequences each analysis takes, at most, and which step counts."""

    quality: int  # per complexity level; three times as many by action type
    frames: int
    trajectory: int
    bins: int
    per_bin: int
    steps: tuple[int, ...]
    swept: int  # recreated, and generated, per sampler and step count
    repeats: int  # of a latency
    exact: int  # of the exact score, where the file does not have it
    exact_steps: tuple[int, ...]


FULL = Budget(128, 256, 128, 20, 48, STEPS, 96, 9, 48, (2, 5, 10))
QUICK = Budget(8, 8, 8, 6, 6, (1, 2, 5, 10), 8, 2, 0, ())


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Squared difference, averaged over the channels; (B, L) float64 on the CPU."""
    return ((a.double() - b.double()) ** 2).mean(dim=2).cpu()


def _mse(a: Tensor, b: Tensor) -> FloatArray:
    """MSE of each sequence, (B,)."""
    return _error(a, b).mean(dim=1).numpy()


def _posterior_mean(noisy: Tensor, sigma: float, prior: GesturePrior) -> Tensor:
    """E[x_0 | noisy] in data units, float64, on the device of `noisy`."""
    return torch.from_numpy(posterior_mean(noisy.cpu().numpy(), sigma, prior)).to(noisy.device)


def _noisy(x_0: Tensor, sigma: float) -> Tensor:
    """x_0 with the noise bank at `sigma`, data units."""
    return x_0 + sigma * noise_bank(x_0.shape).to(x_0)


# ----------------------------------------------------------------------------------------
# 1. QUALITY — by action type, complexity level, evaluation pattern
# ----------------------------------------------------------------------------------------


def split_by_type(x_0: Tensor) -> dict[str, Tensor]:
    """Group gestures that have a press edge by the plan's rule; empty groups are left out."""
    x_0 = x_0[has_press_edge(x_0)]
    types = classify_gestures(x_0)
    groups = {name: x_0[types == i] for i, name in enumerate(GESTURE_TYPES)}
    return {name: x for name, x in groups.items() if len(x)}


def draw_levels(n: int, length: int) -> dict[str, Tensor]:
    """Draw n mixed gestures of each complexity level of the plan, always the same.

    Args:
        n: gestures per level.
        length: L, frames; a level whose longest gesture does not fit is left out.
    """
    levels = {}
    for i, level in enumerate(COMPLEXITY_LEVELS):
        frames = level["min_delta_t"], level["max_delta_t"]
        if frames[1] <= length:
            rng = np.random.default_rng([LEVEL_SEED, i])
            gestures = draw_gestures(rng, n, "mixed", *frames, length)
            name = f"{level['name']}, {frames[0]}-{frames[1]} frames"
            levels[name] = torch.from_numpy(render(gestures, length))
    return levels


def make_patterns() -> dict[str, Tensor]:
    """Return the plan's evaluation patterns by name, (n, 250, 3) each."""
    return {spec["pattern"]: torch.from_numpy(make_pattern(spec)) for spec in EVAL_PATTERNS}


def quality_by_group(
    groups: Mapping[str, Tensor], recreations: Mapping[str, Recreation]
) -> tuple[Table, dict[str, dict[str, Tensor]]]:
    """Score recreations group by group with the plan's metrics.

    Args:
        groups: by name, gestures (B, L, C), data units.
        recreations: by name, functions x_0 -> recreations.

    Returns:
        The table with a setting "group/method", and the recreations by group and method.
    """
    table: Table = {}
    recreated: dict[str, dict[str, Tensor]] = {}
    for group, x_0 in progress(list(groups.items()), "quality"):
        recreated[group] = {name: function(x_0) for name, function in recreations.items()}
        for name, answer in recreated[group].items():
            table[f"{group}/{name}"] = score_recreations(x_0, answer)
    return table, recreated


# ----------------------------------------------------------------------------------------
# 2. WHERE THE ERROR SITS — frame by frame, step by step
# ----------------------------------------------------------------------------------------


def around_edges(error: Tensor, x_0: Tensor, edge: str) -> dict[int, Estimate]:
    """Average an error over gestures, aligned to where they press or lift.

    Args:
        error: (B, L).
        x_0: (B, L, C), data units; only gestures that press once count.
        edge: "touch_down", offset 0 = the first pressed frame, or "lift_off", 0 = the first
            idle frame after it.

    Returns:
        By offset in frames, the mean over the gestures that have this edge inside the window,
        reach that far, and are there still on the same side of their other edge.
    """
    pressed = (x_0[..., 2] > PRESSED).cpu()
    B, L = pressed.shape
    at = pressed.int().argmax(dim=1)
    if edge == "lift_off":
        at = at + pressed.sum(dim=1)
    usable = has_one_press(x_0).cpu() & (at > 0) & (at < L)
    means = {}
    for offset in FRAME_SPAN[edge]:
        frame = at + offset
        row = torch.arange(B), frame.clamp(0, L - 1)
        same_side = pressed[row] == ((offset >= 0) == (edge == "touch_down"))
        counts = (usable & (frame >= 0) & (frame < L) & same_side).double().numpy()
        means[offset] = bootstrap(error[row].numpy() * counts, counts)
    return means


def error_by_frame(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    x_train: Tensor,
    *,
    sampling: dict[str, Any],
    prior: GesturePrior,
) -> Table:
    """Compare the error of each frame near an edge, with the edges given and not.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, of the law `prior`.
        x_train: (N, L, C), data units.
        sampling: the arguments of `recreate`.
        prior: the law of x_0.

    Returns:
        Settings "{protocol}/{edge}{offset:+d}" (see `around_edges`) with mse_{method}, the mean
        over the channels: protocol keyframes, recreated by model and nearest_training_item;
        protocol denoise, one-shot from sigma = FRAME_SIGMA, by model and bayes.
    """
    sigma = scheduler.sigma(scheduler.timestep_at(FRAME_SIGMA))
    answers = {
        "keyframes": {
            "model": recreate(model, scheduler, x_0, **sampling),
            "nearest_training_item": nearest_training_item(x_train)(x_0),
        },
        "denoise": {
            "model": denoise_one_shot(model, scheduler, x_0, FRAME_SIGMA),
            "bayes": _posterior_mean(_noisy(x_0, sigma), sigma, prior),
        },
    }
    table: Table = {}
    for protocol, methods in answers.items():
        for method, answer in methods.items():
            error = _error(answer, x_0)
            for edge in FRAME_SPAN:
                for offset, estimate in around_edges(error, x_0, edge).items():
                    row = table.setdefault(f"{protocol}/{edge}{offset:+d}", {})
                    row[f"mse_{method}"] = estimate
    return table


def record_x_0(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    num_inference_steps: int,
    **options: Any,
) -> list[Tensor]:
    """Recreate x_0 and return the x_0 estimate of every step, each (B, L, C), data units.

    Known frames are in their place, as the sampler sets them. Arguments as for `recreate`.
    """
    estimates: list[Tensor] = []

    def keep(_: nn.Module, seen: tuple[Tensor, ...], output: Tensor) -> None:
        x_t, t, *given = seen
        x_0_pred = scheduler.predict_x_0(output, x_t, t)
        if given:
            x_0_pred = torch.where(given[1][..., None], given[0], x_0_pred)
        estimates.append(to_data_units(x_0_pred))

    hook = model.register_forward_hook(keep)
    try:
        recreate(model, scheduler, x_0, num_inference_steps, **options)
    finally:
        hook.remove()
    return [torch.cat(estimates[i::num_inference_steps]) for i in range(num_inference_steps)]


def error_by_step(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    *,
    sampling: dict[str, Any],
    prior: GesturePrior,
) -> Table:
    """Score the x_0 estimate of each denoising step in the keyframes protocol.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, of the law `prior`.
        sampling: the arguments of `recreate`.
        prior: the law of x_0.

    Returns:
        Per setting "step_{i}", from 1: sigma, the noise that the step starts from; mse_model;
        mse_shuffled_condition, with the known frames of another gesture; mse_bayes, the least
        error at this noise for who knows no frame, over the first quarter of the gestures.
    """
    start_t = None if takes_known_frames(model) else scheduler.timestep_at(0.4)
    pairs = scheduler.timestep_pairs(sampling["num_inference_steps"], start_t)
    walks = {
        "mse_model": record_x_0(model, scheduler, x_0, **sampling),
        "mse_shuffled_condition": record_x_0(model, scheduler, x_0.roll(1, 0), **sampling),
    }
    few, table = x_0[: -(-len(x_0) // 4)], {}
    for i, (t, _) in enumerate(progress(pairs, "denoising steps")):
        sigma = scheduler.sigma(t)
        row = {"sigma": Estimate(sigma, None, len(x_0))}
        row |= {name: bootstrap(_mse(walk[i], x_0)) for name, walk in walks.items()}
        row["mse_bayes"] = bootstrap(_mse(_posterior_mean(_noisy(few, sigma), sigma, prior), few))
        table[f"step_{i + 1}"] = row
    return table


# ----------------------------------------------------------------------------------------
# 3. NOISE — the loss above the least possible one
# ----------------------------------------------------------------------------------------


def excess_loss(
    model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, prior: GesturePrior, num_bins: int = 20
) -> Table:
    """Compare the unconditional, unweighted training loss L(t) with the least possible L*(t).

    L* is the loss of the Bayes denoiser on the same x_t, in the unit of what the model predicts;
    the ratio L/L* does not depend on that unit. `bayes.irreducible_loss` is its closed form for
    a model that predicts eps.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, of the law `prior`; all of them in each bin.
        prior: the law of x_0.
        num_bins: bins of equal width in t, each represented by its middle.

    Returns:
        Per setting "t_{t}": sigma, loss, irreducible_loss, excess_loss X = L - L*,
        excess_ratio X/L*.
    """
    T, table = scheduler.num_timesteps, {}
    u, eps = to_model_units(x_0), noise_bank(x_0.shape).to(x_0)
    for i in progress(range(num_bins), "excess loss"):
        t = (2 * i + 1) * T // (2 * num_bins)
        x_t, _ = scheduler.add_noise(u, t, eps)
        with eval_mode(model):
            output = in_batches(model, x_t, torch.full((len(u),), t, device=u.device))
        noisy = to_data_units(x_t.double() / scheduler.alpha_bar(t) ** 0.5)
        best_u = to_model_units(_posterior_mean(noisy, scheduler.sigma(t), prior))
        best = scheduler.target(best_u, scheduler.eps_from_x_0(best_u, x_t.double(), t), t)
        target = scheduler.target(u, eps, t)
        loss, least = _mse(output, target), _mse(best, target)
        table[f"t_{t}"] = {
            "sigma": Estimate(scheduler.sigma(t), None, len(u)),
            "loss": bootstrap(loss),
            "irreducible_loss": bootstrap(least),
            "excess_loss": bootstrap(loss - least),
            "excess_ratio": bootstrap(loss - least, least),
        }
    return table


def denoise_limits(scheduler: DDIMScheduler, x_0: Tensor, prior: GesturePrior) -> dict[str, float]:
    """Score the Bayes denoiser on what the trainer's denoise_mse_sigma_* are measured on.

    Args:
        scheduler: of the run.
        x_0: the gestures that it validates each epoch, (B, L, C), data units.
        prior: the law of x_0.

    Returns:
        Sigma, as in the name of the metric -> MSE; nothing if a gesture is not of the law.
    """
    if not is_linear_gesture(x_0).all():
        return {}
    limits = {}
    for level in DENOISE_SIGMAS:
        sigma = scheduler.sigma(scheduler.timestep_at(level))
        limits[str(level)] = float(
            _mse(_posterior_mean(_noisy(x_0, sigma), sigma, prior), x_0).mean()
        )
    return limits


# ----------------------------------------------------------------------------------------
# 3. AND 6. STEPS — sampler, eta, latency
# ----------------------------------------------------------------------------------------


def measure_latencies(
    model: nn.Module,
    scheduler: DDIMScheduler,
    shape: tuple[int, int, int],
    samplings: Mapping[str, dict[str, Any]],
    repeats: int,
) -> dict[str, Estimate]:
    """Time the generation of one batch in several ways, in ms.

    The ways take turns, so that another load on the machine hits all of them alike; the first
    round is not counted.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        shape: (B, L, C) of the batch.
        samplings: by name, arguments of `DDIMScheduler.sample`.
        repeats: rounds that count, n of the estimates.

    Returns:
        By name, the median, and the quartiles in the place of an interval.
    """
    wall_ms: dict[str, list[float]] = {name: [] for name in samplings}
    for _ in progress(range(repeats + 1), "latency"):
        for name, sampling in samplings.items():
            started = time.perf_counter()
            generate(model, scheduler, shape, **sampling).cpu()  # .cpu() waits for a GPU
            wall_ms[name].append(1000 * (time.perf_counter() - started))
    latencies = {}
    for name, ms in wall_ms.items():
        low, median, high = np.percentile(ms[1:], [25, 50, 75])
        latencies[name] = Estimate(float(median), (float(low), float(high)), repeats)
    return latencies


def sampler_sweep(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    prior: GesturePrior,
    *,
    steps: Sequence[int] = STEPS,
    repeats: int = 9,
) -> Table:
    """Recreate, generate and time with every sampler and number of steps.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, to recreate from keyframes; as many gestures are generated.
        prior: durations of a valid gesture.
        steps: numbers of inference steps; those above the noise levels are left out.
        repeats: of the latency.

    Returns:
        Per setting "{name in SAMPLER_OPTIONS}/{steps}": the plan's metrics of the recreations,
        those of `score_durations` for what is generated, and latency_ms at batch 1.
    """
    start_t = scheduler.num_timesteps - 1
    if not takes_known_frames(model):  # `recreate` then starts from less noise
        start_t = scheduler.timestep_at(0.4)
    samplings = {
        f"{name}/{n}": {"num_inference_steps": n, **options}
        for name, options in SAMPLER_OPTIONS.items()
        for n in steps
        if n <= start_t + 1
    }
    B, L, C = x_0.shape
    latencies = measure_latencies(model, scheduler, (1, L, C), samplings, repeats)
    table: Table = {}
    for name in progress(list(samplings), "samplers"):
        row = score_recreations(x_0, recreate(model, scheduler, x_0, **samplings[name]))
        samples = generate(model, scheduler, (B, L, C), **samplings[name])
        row |= score_durations(samples, prior)
        table[name] = row | {"latency_ms": latencies[name]}
    return table


# ----------------------------------------------------------------------------------------
# ALL OF THEM
# ----------------------------------------------------------------------------------------


def run_analyses(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    x_train: Tensor,
    *,
    sampling: dict[str, Any],
    prior: GesturePrior,
    checkpoint: str | Path,
    budget: Budget = FULL,
) -> tuple[dict[str, Table], dict[str, tuple[Tensor, Tensor]]]:
    """Make all tables; what cannot be made is left out, with a note on stdout.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: validation gestures, (B, L, C), data units.
        x_train: training gestures, (N, L, C), data units.
        sampling: the arguments of `recreate` that the model is judged with.
        prior: the law of x_0.
        checkpoint: a checkpoint or run folder, for the record of its training.
        budget: sizes.

    Returns:
        The tables by name, and the evaluation patterns by name: gestures and recreations on the
        CPU.
    """
    recreations = make_recreations(model, scheduler, x_train, sampling)
    groups = {
        "quality_by_type": split_by_type(x_0[: 3 * budget.quality]),
        "quality_by_level": draw_levels(budget.quality, x_0.shape[1]),
        "quality_of_patterns": make_patterns() if x_0.shape[1] == SEQUENCE_LENGTH else {},
    }
    tables: dict[str, Table] = {}
    for name, group in groups.items():
        on_device = {key: x.to(x_0.device) for key, x in group.items()}
        tables[name], recreated = quality_by_group(on_device, recreations)
    patterns = {
        name: (x, recreated[name]["model"].cpu())
        for name, x in groups["quality_of_patterns"].items()
    }
    linear = x_0[is_linear_gesture(x_0)]
    if len(linear):
        known: dict[str, Any] = {"sampling": sampling, "prior": prior}
        rows = linear[: budget.frames]
        tables["error_by_frame"] = error_by_frame(model, scheduler, rows, x_train, **known)
        rows = linear[: budget.trajectory]
        tables["error_by_step"] = error_by_step(model, scheduler, rows, **known)
        rows = linear[: budget.per_bin]
        tables["excess_loss"] = excess_loss(model, scheduler, rows, prior, budget.bins)
    else:
        say("note: no gesture is of the family that the Bayes oracle knows; three figures less")
    tables["sampler_sweep"] = sampler_sweep(
        model, scheduler, x_0[: budget.swept], prior, steps=budget.steps, repeats=budget.repeats
    )
    exact = read_exact_few_steps(scheduler, prior, budget.steps)
    missing = [n for n in budget.exact_steps if f"exact/{n}" not in exact]
    tables["exact_few_steps"] = exact | exact_few_steps(scheduler, prior, missing, budget.exact)
    tables |= read_records(checkpoint)
    return {name: table for name, table in tables.items() if table}, patterns


def make_recreations(
    model: nn.Module, scheduler: DDIMScheduler, x_train: Tensor, sampling: dict[str, Any]
) -> dict[str, Recreation]:
    """Return the model, a control and the limit, as `quality_by_group` takes them."""
    return {
        "model": lambda x_0: recreate(model, scheduler, x_0, **sampling),
        "nearest_training_item": nearest_training_item(x_train),
        "interpolation": interpolation,
    }
