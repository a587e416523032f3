"""The protocols: what a checkpoint is asked, and how its answers are scored.

Each protocol is a pure function of a model, its scheduler and validation gestures x_0, (B, L, C)
in data units, and returns a `Table`: setting -> metric -> `Estimate`. The metrics are those of
the trainer; this file adds the limits, the intervals and the verdict.

    keyframes   recreate x_0 from pure noise, given only its press edges (about 4 of 250 frames);
                paired with x_0. A gesture without a press edge gives nothing to go by: those are
                scored in a table of their own.
    denoise     x_0 noised to sigma; one-shot prediction, R = MSE/MMSE of the Bayes oracle on the
                same x_t; and DDIM from there, R_ddim = MSE/MSE of DDIM with the exact score over
                the same timesteps. The limit of both is 1.
    generate    unconditional gestures: validity, distribution, memorisation: distribution.py.

The intervals: estimates.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior, exact_ddim, posterior_mean
from evaluation.controls import LIMITS, Recreation, interpolation, nearest, zeros
from evaluation.distribution import (  # noqa: F401 - generate: this module names all protocols
    deviations,
    draw_samples,
    generate_table,
    judge_samples,
    make_reference,
    score_samples,
    validity,
)
from evaluation.estimates import Estimate, FloatArray, Table, bootstrap, verdict
from train_diffusion_ddim import (
    DDIMScheduler,
    compute_reconstruction_metrics,
    denoise_one_shot,
    gesture_metrics,
    has_one_press,
    has_press_edge,
    noise_bank,
    to_data_units,
    to_model_units,
)
from trainlib.gestures import PRESSED
from trainlib.process import progress
from trainlib.tensors import in_batches

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)  # noise std in data units

# The plan's optimal line: metric -> (the score must be below or above, this value).
PLAN_LINES: dict[str, tuple[str, float]] = {
    "mse": ("<", 0.005),
    "mean_snr_db": (">", 20.0),
    "temporal_iou": (">", 0.9),
    "spatial_accuracy": (">", 0.9),
    "gesture_type_accuracy": (">", 0.95),
}


def _numpy(x: Tensor) -> FloatArray:
    return x.detach().cpu().numpy().astype(float)


def _sequence_mse(a: Tensor, b: Tensor) -> FloatArray:
    """MSE of each sequence, (B,)."""
    return _numpy(((a.double() - b.double()) ** 2).mean(dim=(1, 2)))


# ----------------------------------------------------------------------------------------
# KEYFRAMES
# ----------------------------------------------------------------------------------------


def sequence_scores(x_0: Tensor, recreated: Tensor) -> dict[str, FloatArray]:
    """Score gesture by gesture the metrics of PLAN_LINES, (B,) each."""
    rows = []
    for pair in zip(x_0.split(1), recreated.split(1), strict=True):
        scores = compute_reconstruction_metrics(*pair) | gesture_metrics(*pair)
        rows.append([scores[name] for name in PLAN_LINES])
    return dict(zip(PLAN_LINES, np.array(rows).T, strict=True))


def score_recreations(x_0: Tensor, recreated: Tensor) -> dict[str, Estimate]:
    """Score recreations of x_0, both (B, L, C), data units: every metric of the plan.

    The values are the trainer's, over all gestures at once; those of PLAN_LINES have intervals.
    """
    values = compute_reconstruction_metrics(x_0, recreated) | gesture_metrics(x_0, recreated)
    scores = {name: Estimate(value, None, len(x_0)) for name, value in values.items()}
    active = (x_0[..., 2] > PRESSED) | (recreated[..., 2] > PRESSED)
    for name, each in sequence_scores(x_0, recreated).items():
        # spatial accuracy is a share of frames, so a gesture weighs as many as it has active
        weight = _numpy(active.sum(dim=1)) if name == "spatial_accuracy" else np.ones(len(each))
        scores[name] = scores[name]._replace(ci=bootstrap(each * weight, weight).ci)
    return scores


def keyframes(x_0: Tensor, recreations: Mapping[str, Recreation]) -> tuple[dict[str, Table], dict]:
    """Score the model, the controls and the limit as recreations of x_0.

    Args:
        x_0: (B, L, C), data units.
        recreations: by name, functions x_0 -> recreations.

    Returns:
        The table of the gestures with a press edge, `keyframes`, and of the others,
        `keyframes_without_edge`, where there are any; and all recreations by name.
    """
    scored = has_press_edge(x_0)
    groups = {"keyframes": scored, "keyframes_without_edge": ~scored}
    tables: dict[str, Table] = {name: {} for name, rows in groups.items() if rows.any()}
    recreated = {}
    for setting in progress(list(recreations), "keyframes"):
        recreated[setting] = recreations[setting](x_0)
        for name, table in tables.items():
            rows = groups[name]
            table[setting] = score_recreations(x_0[rows], recreated[setting][rows])
    return tables, recreated


def lines_met(scores: Mapping[str, Estimate]) -> list[str]:
    """Return the metrics of PLAN_LINES whose line these scores meet."""
    return [
        name
        for name, (side, line) in PLAN_LINES.items()
        if (scores[name].value < line if side == "<" else scores[name].value > line)
    ]


def judge(table: Table, setting: str = "model") -> dict[str, dict[str, Any]]:
    """Hold a setting of the keyframes table against the plan's lines.

    Returns:
        Per metric: line, value, ci, the controls that meet the line, and the verdict: "not met",
        "met", or instead of "met" "not discriminating" where a control meets it too. The last
        entry, all_lines, is about the lines together; its value is how many are met.
    """
    met = {name: lines_met(scores) for name, scores in table.items()}
    controls = [name for name in table if is_control(name) and name != setting]
    verdicts = {}
    for metric, (side, line) in PLAN_LINES.items():
        also = [name for name in controls if metric in met[name]]
        verdicts[metric] = {
            "line": f"{side} {line:g}",
            "value": table[setting][metric].value,
            "ci": table[setting][metric].ci,
            "verdict": verdict(metric in met[setting], also),
            "controls_that_meet_it": also,
        }
    also = [name for name in controls if len(met[name]) == len(PLAN_LINES)]
    verdicts["all_lines"] = {
        "line": f"all {len(PLAN_LINES)}",
        "value": len(met[setting]),
        "ci": None,
        "verdict": verdict(len(met[setting]) == len(PLAN_LINES), also),
        "controls_that_meet_it": also,
    }
    return verdicts


def is_control(setting: str) -> bool:
    """Tell whether a setting is a control: neither the model nor the limit."""
    return not setting.startswith("model") and setting not in LIMITS


# ----------------------------------------------------------------------------------------
# DENOISE
# ----------------------------------------------------------------------------------------


def is_linear_gesture(x_0: Tensor) -> Tensor:
    """Tell which gestures are one straight, even press with an edge, (B,) bool.

    Exactly those that the interpolation between their press edges repeats.
    """
    same = (x_0 - interpolation(x_0)).abs().amax(dim=(1, 2)) < 1e-4
    return has_one_press(x_0) & has_press_edge(x_0) & same


def read_prior(data_dir: str | Path, x_0: Tensor) -> GesturePrior:
    """Return the law of the gestures: from dataset.json, else from the gestures themselves.

    Args:
        data_dir: folder of the gestures.
        x_0: the gestures, (B, L, C), data units.
    """
    length = x_0.shape[1]
    try:
        law = json.loads((Path(data_dir) / "dataset.json").read_text("utf-8"))["arguments"]
        low, high, kind = law["min_delta_t"], law["max_delta_t"], law["action_type"]
        return GesturePrior(length, max(1, low), high, kind)
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another program
        pass
    one = x_0[has_one_press(x_0)]
    if not len(one):
        return GesturePrior(length, 1, length)
    frames = (one[..., 2] > PRESSED).sum(dim=1)
    pressed = (one[..., 2] > PRESSED)[..., None]
    moves = (  # a coordinate moves if it is not the same on all pressed frames
        torch.where(pressed, one[..., :2], -1).amax(1)
        - torch.where(pressed, one[..., :2], 2).amin(1)
        > 1e-6
    )
    kinds = {tuple(row) for row in moves.tolist()}
    named = {
        (False, False): "click",
        (True, False): "horizontal",
        (False, True): "vertical",
        (True, True): "diagonal",
    }
    kind = named[kinds.pop()] if len(kinds) == 1 else "mixed"
    return GesturePrior(length, int(frames.min()), int(frames.max()), kind)


def denoise(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    x_train: Tensor,
    *,
    prior: GesturePrior | None,
    num_inference_steps: int = 10,
    num_ddim: int = 200,
) -> Table:
    """Score one-shot prediction and DDIM from x_0 noised to each of SIGMAS.

    Args:
        model: the denoiser.
        untrained: the same network before training.
        scheduler: their scheduler.
        x_0: (B, L, C), data units; of the family, if there is a prior.
        x_train: (N, L, C), data units.
        prior: the law of x_0; None leaves out what needs it.
        num_inference_steps: of both DDIMs, eta 0.
        num_ddim: sequences that DDIM is run on; the exact score is dear.

    Returns:
        Per setting "sigma_{sigma}": mse_{one_shot, mmse, zeros, ...}, r, mse_ddim,
        mse_exact_ddim, r_ddim. Everything of one setting sees the same x_t.
    """
    table: Table = {}
    for sigma in progress(SIGMAS, "denoise"):
        t = scheduler.timestep_at(sigma)
        x_t, _ = scheduler.add_noise(to_model_units(x_0), t, noise_bank(x_0.shape).to(x_0))
        noisy = to_data_units(x_t / scheduler.alpha_bar(t) ** 0.5)
        answers = {
            "one_shot": denoise_one_shot(model, scheduler, x_0, sigma),
            "identity": noisy,
            "zeros": zeros(x_0),
            "training_mean": x_train.mean(dim=0).expand_as(x_0),
            "nearest_training_item": x_train[nearest(noisy, x_train)[1]],
            "untrained_model": denoise_one_shot(untrained, scheduler, x_0, sigma),
        }
        errors = {name: _sequence_mse(x_0, answer) for name, answer in answers.items()}
        few, steps = x_t[:num_ddim], min(num_inference_steps, t + 1)
        errors["ddim"] = _sequence_mse(x_0[:num_ddim], _ddim(model, scheduler, few, t, steps))
        if prior:
            mean = posterior_mean(_numpy(noisy), scheduler.sigma(t), prior)
            errors["mmse"] = _sequence_mse(x_0, torch.from_numpy(mean).to(x_0.device))
            exact = _exact_ddim(scheduler, few, t, steps, prior)
            errors["exact_ddim"] = _sequence_mse(x_0[:num_ddim], exact.to(x_0.device))
        row = {f"mse_{name}": bootstrap(error) for name, error in errors.items()}
        if prior:
            row["r"] = bootstrap(errors["one_shot"], errors["mmse"])
            row["r_ddim"] = bootstrap(errors["ddim"], errors["exact_ddim"])
        table[f"sigma_{sigma}"] = row
    return table


def _ddim(model: nn.Module, scheduler: DDIMScheduler, x_t: Tensor, t: int, steps: int) -> Tensor:
    """Walk from x_t at t to x_0 in data units, eta 0."""

    def sample(x: Tensor) -> Tensor:
        return scheduler.sample(model, tuple(x.shape), x.device, steps, x_T=x, start_t=t)

    return in_batches(sample, x_t)


def _exact_ddim(
    scheduler: DDIMScheduler, x_t: Tensor, t: int, steps: int, prior: GesturePrior
) -> Tensor:
    """Walk the same timesteps with the exact score."""
    table = [scheduler.alpha_bar(i) for i in range(scheduler.num_timesteps)]
    walk = [t for t, _ in scheduler.timestep_pairs(steps, t)]
    return torch.from_numpy(exact_ddim(_numpy(x_t), table, walk, prior))
