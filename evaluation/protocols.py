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
    generate    unconditional gestures: validity, type mix, durations, memorisation.

Every interval is a 95 % percentile bootstrap over sequences. Resamples are the same for all rows
of a table, and a ratio is resampled as a whole, so what is paired stays paired.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior, exact_ddim, posterior_mean
from evaluation.controls import LIMITS, Recreation, interpolation, nearest, zeros
from train_diffusion_ddim import (
    GESTURE_TYPES,
    PRESSED,
    DDIMScheduler,
    classify_gestures,
    compute_reconstruction_metrics,
    denoise_one_shot,
    gesture_metrics,
    has_one_press,
    has_press_edge,
    in_batches,
    noise_bank,
    progress,
    to_data_units,
    to_model_units,
)

FloatArray = npt.NDArray[np.float64]

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)  # noise std in data units
RESAMPLES = 1000
SEED = 20210505

# The plan's optimal line: metric -> (the score must be below or above, this value).
PLAN_LINES: dict[str, tuple[str, float]] = {
    "mse": ("<", 0.005),
    "mean_snr_db": (">", 20.0),
    "temporal_iou": (">", 0.9),
    "spatial_accuracy": (">", 0.9),
    "gesture_type_accuracy": (">", 0.95),
}
TOLERANCE = 0.02  # of a valid gesture, share of the screen or of a press


class Estimate(NamedTuple):
    """A number with its 95 % interval, None where there is none, over n sequences."""

    value: float
    ci: tuple[float, float] | None
    n: int


Table = dict[str, dict[str, Estimate]]  # setting -> metric -> estimate


# ----------------------------------------------------------------------------------------
# INTERVALS
# ----------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _resample_counts(n: int) -> FloatArray:
    """How often each of n sequences is drawn in each resample, (RESAMPLES, n)."""
    rng = np.random.default_rng([SEED, n])
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def bootstrap(numerator: npt.ArrayLike, denominator: npt.ArrayLike | None = None) -> Estimate:
    """Estimate sum(numerator)/sum(denominator) over sequences: a mean, weighted mean or ratio.

    Args:
        numerator: (N,), finite.
        denominator: (N,), at least 0; None = ones. Sequences where it is 0 do not count in n.

    Returns:
        The value; no interval below 2 sequences; NaN without any.
    """
    top = np.asarray(numerator, dtype=float)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, dtype=float)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) == 0:
        return Estimate(float("nan"), None, 0)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(value, None, len(top))
    counts = _resample_counts(len(top))
    low, high = np.percentile(counts @ top / (counts @ bottom), [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), len(top))


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
            "verdict": _verdict(metric in met[setting], also),
            "controls_that_meet_it": also,
        }
    also = [name for name in controls if len(met[name]) == len(PLAN_LINES)]
    verdicts["all_lines"] = {
        "line": f"all {len(PLAN_LINES)}",
        "value": len(met[setting]),
        "ci": None,
        "verdict": _verdict(len(met[setting]) == len(PLAN_LINES), also),
        "controls_that_meet_it": also,
    }
    return verdicts


def is_control(setting: str) -> bool:
    """Tell whether a setting is a control: neither the model nor the limit."""
    return not setting.startswith("model") and setting not in LIMITS


def _verdict(met: bool, controls_that_meet_it: list[str]) -> str:
    if not met:
        return "not met"
    return "not discriminating" if controls_that_meet_it else "met"


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


# ----------------------------------------------------------------------------------------
# GENERATE
# ----------------------------------------------------------------------------------------


def validity(samples: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Tell which samples are gestures of the family, factor by factor.

    Args:
        samples: (B, L, C), data units, not rounded.
        prior: its durations are the allowed ones.

    Returns:
        (B,) bool each:
            one_press           the pressed frames are one run
            duration_in_range   there are min_delta_t ... max_delta_t of them
            press_binary        mean |press - (press > 0.5)| over all frames < 0.02
            straight_and_even   RMS distance of x and y from their least-squares lines over the
                                pressed frames < 0.02
            idle_at_zero        mean |x|, |y| over the other frames < 0.02
            valid               all of these
    """
    frames = (samples[..., 2] > PRESSED).sum(dim=1)
    deviation = deviations(samples)
    factors = {
        "one_press": has_one_press(samples),
        "duration_in_range": (prior.min_delta_t <= frames) & (frames <= prior.max_delta_t),
        "press_binary": deviation["press_softness"] < TOLERANCE,
        "straight_and_even": (deviation["line_rms"] < TOLERANCE) & (frames > 0),
        "idle_at_zero": deviation["idle_xy"] < TOLERANCE,
    }
    return factors | {"valid": torch.stack(list(factors.values())).all(dim=0)}


def deviations(samples: Tensor) -> dict[str, Tensor]:
    """Return how far samples are from gestures of the family, (B,) each, 0 at best.

    press_softness, line_rms and idle_xy are what `validity` holds against TOLERANCE.
    """
    pressed = samples[..., 2] > PRESSED  # (B, L)
    idle_xy = samples[..., :2].abs().mean(dim=-1) * ~pressed
    return {
        "press_softness": (samples[..., 2] - pressed.to(samples)).abs().mean(dim=1),
        "line_rms": _line_rms(samples),
        "idle_xy": idle_xy.sum(dim=1) / (~pressed).sum(dim=1).clamp(min=1),
    }


def _line_rms(samples: Tensor) -> Tensor:
    """RMS residual of x and y about their lines over the pressed frames, (B,); 0 without any."""
    weight = (samples[..., 2:] > PRESSED).to(samples)  # (B, L, 1)
    n = weight.sum(dim=1, keepdim=True).clamp(min=1)
    frame = torch.arange(samples.shape[1], device=samples.device)[None, :, None]
    xy = samples[..., :2]
    time = frame - (weight * frame).sum(dim=1, keepdim=True) / n
    residual = xy - (weight * xy).sum(dim=1, keepdim=True) / n
    spread = (weight * time**2).sum(dim=1, keepdim=True).clamp(min=1e-6)
    residual = residual - time * (weight * time * residual).sum(dim=1, keepdim=True) / spread
    return ((weight * residual**2).sum(dim=(1, 2)) / (2 * n[:, 0, 0])).sqrt()


class Reference(NamedTuple):
    """Real gestures that generated ones are held against, (N, L, C) each, data units."""

    x_train: Tensor
    train: Tensor  # as many of them as `held_out` has
    held_out: Tensor  # one half of the validation set
    queries: Tensor  # the other half: what real data scores


def make_reference(x_train: Tensor, x_val: Tensor) -> Reference:
    """Split the validation set, and draw as many training gestures as are held out."""
    order = torch.randperm(len(x_val), generator=torch.Generator().manual_seed(SEED))
    queries, held_out = x_val[order.to(x_val.device)].tensor_split(2)
    held_out = held_out if len(held_out) else queries  # a set of one gesture is both
    rows = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(SEED))
    return Reference(x_train, x_train[rows[: len(held_out)].to(x_train.device)], held_out, queries)


def score_samples(samples: Tensor, prior: GesturePrior, real: Reference) -> dict[str, Estimate]:
    """Score unconditional samples, (B, L, C), data units: `generate`'s metrics.

    Truth is the training set by the same rules; type_mix_error is the largest of the
    |share_*_minus_truth|. nn_distance_ratio = mean RMS distance to the
    nearest training gesture over that to the nearest held-out one: 1 for new gestures, 0 for
    copies; share_near_copies are the samples that lie less than half as far from training data.
    """
    scores = {name: bootstrap(_numpy(ok)) for name, ok in validity(samples, prior).items()}
    deviation = deviations(samples)
    scores |= {name: bootstrap(_numpy(value)) for name, value in deviation.items()}
    touched = _numpy((samples[..., 2] > PRESSED).any(dim=1))  # without a touch there is no line
    scores["line_rms"] = bootstrap(_numpy(deviation["line_rms"]), touched)
    truth_types = classify_gestures(real.x_train)
    types = classify_gestures(samples)
    worst = 0.0
    for i, name in enumerate(GESTURE_TYPES):
        share = bootstrap(_numpy(types == i))
        truth = float((truth_types == i).float().mean())
        scores[f"share_{name}"] = share
        scores[f"share_{name}_minus_truth"] = _shifted(share, truth)
        worst = max(worst, abs(share.value - truth))
    scores["type_mix_error"] = Estimate(worst, None, len(samples))
    truth_frames = _one_press_frames(real.x_train)
    frames = bootstrap(_one_press_frames(samples))
    scores["mean_duration"] = frames
    truth = float(truth_frames.mean()) if len(truth_frames) else float("nan")
    scores["duration_bias"] = _shifted(frames, truth, scale=truth)
    to_train, to_held_out = (_numpy(nearest(samples, bank)[0]) for bank in real[1:3])
    scores["nn_distance_ratio"] = bootstrap(to_train, to_held_out)
    scores["share_nearer_to_train"] = bootstrap(to_train < to_held_out)
    scores["share_near_copies"] = bootstrap(to_train < 0.5 * to_held_out)
    return scores


def _shifted(estimate: Estimate, by: float, scale: float = 1.0) -> Estimate:
    """Return (estimate - by)/scale."""
    ci = estimate.ci and tuple((end - by) / scale for end in estimate.ci)
    return Estimate((estimate.value - by) / scale, ci, estimate.n)  # type: ignore[arg-type]


def _one_press_frames(x: Tensor) -> FloatArray:
    """Durations of the gestures that press once, in frames."""
    return _numpy((x[has_one_press(x)][..., 2] > PRESSED).sum(dim=1))


def generate_table(samples: Mapping[str, Tensor], prior: GesturePrior, real: Reference) -> Table:
    """Score samples beside real data and what copies it.

    Args:
        samples: by setting, unconditional samples, (B, L, C), data units.
        prior: durations of a valid gesture.
        real: training and held-out gestures.

    Returns:
        The samples' settings, and `validation_data` (the floor), `training_items` (drawn from
        the reference: a memoriser), `one_training_item` (a collapsed sampler), `training_mean`,
        `zeros`.
    """
    n = len(real.queries)
    one = real.train[:1].expand(n, -1, -1)
    controls = {
        "validation_data": real.queries,
        "training_items": real.train[:n],
        "one_training_item": one,
        "training_mean": real.x_train.mean(dim=0, keepdim=True).expand_as(one),
        "zeros": torch.zeros_like(one),
    }
    return {name: score_samples(x, prior, real) for name, x in {**samples, **controls}.items()}
