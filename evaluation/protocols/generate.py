"""generate: are unconditional samples valid, distributed as the prior says, and new?

The settings: model_steps_{S}, and beside them

    validation_data     the limit: what real gestures score that nobody trained on
    training_items      a memoriser: real gestures, but copies
    one_training_item   a collapsed sampler: always the same, valid gesture
    training_mean, zeros, untrained_model

The metrics, data units. Samples without an answer are left out, and n tells how many are not.

    valid, one_press, ...           `validity` and each of its factors
    press_softness, ...             `deviations`
    mean_duration, duration_bias    frames of the samples that press once; relative to the
                                    training set's mean, less 1
    share_{type}                    of the plan's types; share_{type}_minus_law: of the prior's
                                    (`type_distribution`); type_mix_error is the largest of their
                                    sizes
    types_chi2, types_p             Pearson's test of the type counts of the samples that touch
    ks_{factor}                     Kolmogorov-Smirnov distance of `pit` from U(0, 1); ks_max is
                                    the largest and ks_max_critical its 5 % point, 6 factors
    mmd2, mmd2_p, density, coverage, c2st_1nn      `compare_features`
    nn_distance_ratio, copy_auc, share_near_copies `copy_scores`
    all_lines                       how many of GENERATE_LINES are met

Where the distribution is not known, what is held against it is left out: validity, the types' due
shares, the ks_{factor}; all_lines, too. Windows without a touch are then counted (share_none) and
compared no further, and coverage_of_real is the coverage over that of validation_data. Real are
windows that nobody trained on, and of other people those of `other_users`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.controls import OTHER_USERS, VALIDATION_DATA
from evaluation.criteria import GENERATE_LINES, lines_met
from evaluation.estimates import Estimate, Table, bootstrap, shifted
from evaluation.family import deviations, validity
from evaluation.figures import TYPE_COLORS, TYPE_LABELS, draw_path, draw_phone, new_figure
from evaluation.protocol import Picture, Section, Subject
from evaluation.samples import (
    Reference,
    compare_features,
    copy_scores,
    gesture_features,
    make_reference,
    one_press_frames,
    pit_scores,
    type_scores,
    type_shares,
)
from train_diffusion_ddim import DDIMScheduler, generate
from trainlib.gestures import GESTURE_TYPES, PRESSED
from trainlib.metrics import classify_gestures, has_one_press
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Samples per number of steps; the judged setting takes NUM_JUDGED, for shares within a point.
NUM_SAMPLES: Mapping[int, int] = {2: 1000, 5: 1000, 10: 1000, 20: 500, 50: 500}
NUM_JUDGED = 2000
NUM_UNTRAINED = 200
NUM_REAL = 1000  # windows beside the samples, where the distribution is not known
COLUMNS = {
    "valid": "valid",
    "duration_bias": "duration bias",
    "type_mix_error": "type mix error",
    "ks_max": "KS distance",
    "coverage": "coverage",
    "copy_auc": "copying, AUC",
    "share_near_copies": "near copies",
}
COLUMNS_WITHOUT_PRIOR = {
    "share_none": "no touch",
    "duration_bias": "duration bias",
    "mmd2": "MMD²",
    "coverage": "coverage",
    "copy_auc": "copying, AUC",
    "share_near_copies": "near copies",
}


def run(s: Subject, limit: int | None = None) -> list[Section]:
    """Generate from nothing, trained and untrained, at several numbers of steps."""
    _, L, C = s.x_val.shape
    networks = s.model, s.untrained, s.scheduler
    samples = draw_samples(*networks, s.sampling, shape=(L, C), limit=limit)
    judged = f"model_steps_{s.num_inference_steps}"
    if s.prior is None:
        num_real = 4 * limit if limit else NUM_REAL
        return [_section_without_prior(s, samples, judged, num_real)]
    table = generate_table(samples, s.prior, make_reference(s.x_train, s.x_val))
    drawn = samples[judged].cpu()
    shown = drawn, validity(drawn, s.prior)["valid"], s.num_inference_steps
    text = (
        "Samples have no original to be compared with, so their distribution is held against the "
        "known one of the gestures and against real ones. The limit is what held-out gestures "
        "score (validation data). Copies of the training set are valid, too; the last two columns "
        "tell them from new gestures."
    )
    title = "Generate: from pure noise, given nothing"
    caption = "Unconditional samples, not selected."
    pictures = [Picture("generated_gestures.png", caption, draw_generated, *shown)]
    return [Section("generate", table, title, text, COLUMNS, "samples", pictures, judged=judged)]


def _section_without_prior(
    s: Subject, samples: dict[str, Tensor], judged: str, num_real: int
) -> Section:
    """Hold samples against at most `num_real` real windows, beside those of other people."""
    real = make_reference(touched(s.x_train), touched(s.unseen)[:num_real])
    if s.x_others is not None:
        samples = samples | {OTHER_USERS: s.x_others[:num_real]}
    table = generate_table(samples, None, real)
    due = table[VALIDATION_DATA]["coverage"].value
    for row in table.values():
        row["coverage_of_real"] = shifted(row["coverage"], scale=due or math.nan)
    text = (
        "Samples have no original to be compared with, and their distribution is not known, so "
        "they are held against real windows. The limit is what real windows score that nobody "
        "trained on. Copies of the training set are real, too; the last two columns tell them "
        "from new gestures."
    )
    shown = samples[judged].cpu(), s.unseen.cpu(), s.num_inference_steps
    caption = "Real windows with a touch, and unconditional samples, not selected."
    pictures = [Picture("generated_gestures.png", caption, draw_beside_real, *shown)]
    about = ("Generate: from pure noise, given nothing", text, COLUMNS_WITHOUT_PRIOR, "samples")
    return Section("generate", table, *about, pictures, judged=judged)


def touched(x: Tensor) -> Tensor:
    """Return the windows with a touch, of (B, L, C); all if there are none."""
    rows = (x[..., 2] > PRESSED).any(dim=1)
    return x[rows] if rows.any() else x


# ----------------------------------------------------------------------------------------
# MEASURE
# ----------------------------------------------------------------------------------------


def draw_samples(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    sampling: dict[str, Any],
    *,
    shape: tuple[int, int],
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Draw unconditional samples from the same noise for each number of steps.

    Args:
        model: the denoiser.
        untrained: the same network before training.
        scheduler: their scheduler; settings with more steps than it has are left out.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
        shape: (L, C).
        limit: of samples per setting; None = NUM_SAMPLES.

    Returns:
        "model_steps_{S}", S in NUM_SAMPLES and the judged one, and "untrained_model": samples
        (n, L, C), data units.
    """
    judged = sampling["num_inference_steps"]
    sizes = sorted({**NUM_SAMPLES, judged: NUM_JUDGED}.items())
    asked = {f"model_steps_{s}": (model, s, n) for s, n in sizes if s <= scheduler.num_timesteps}
    asked["untrained_model"] = (untrained, judged, NUM_UNTRAINED)
    samples = {}
    for name in progress(list(asked), "generate"):
        network, steps, n = asked[name]
        given = sampling | {"num_inference_steps": steps}
        samples[name] = generate(network, scheduler, (min(n, limit or n), *shape), **given)
    return samples


def score_samples(
    samples: Tensor, prior: GesturePrior | None, real: Reference
) -> dict[str, Estimate]:
    """Score unconditional samples, (B, L, C), data units, on every metric of the protocol."""
    samples = samples.cpu()
    if prior is None:
        scores = type_shares(samples)
        samples = touched(samples)
    else:
        scores = {name: bootstrap(ok) for name, ok in validity(samples, prior).items()}
    features, once = gesture_features(samples), has_one_press(samples)
    deviation = deviations(samples)
    scores |= {name: bootstrap(value) for name, value in deviation.items()}
    has_touch = (samples[..., 2] > PRESSED).any(dim=1)  # without a touch there is no line
    scores["line_rms"] = bootstrap(deviation["line_rms"], has_touch)
    frames = bootstrap(one_press_frames(samples))
    scores["mean_duration"] = frames
    scores["duration_bias"] = shifted(frames, by=real.mean_duration, scale=real.mean_duration)
    if prior:
        scores |= type_scores(samples, prior) | pit_scores(samples, prior)
    scores |= compare_features((features - real.center) / real.scale, real.compared)
    scores |= copy_scores(features[once], real)
    if prior is None:
        return scores
    met = len(lines_met(scores, GENERATE_LINES))
    return scores | {"all_lines": Estimate(met, None, len(samples))}


def generate_table(
    samples: Mapping[str, Tensor], prior: GesturePrior | None, real: Reference
) -> Table:
    """Score samples beside real data and what copies it.

    Args:
        samples: by setting, unconditional samples, (B, L, C), data units.
        prior: the distribution of the gestures, if it is known.
        real: training and validation gestures.

    Returns:
        The samples' settings, the floor, and the controls.
    """
    n = len(real.x_val)
    copies = real.x_train[real.order[-n:]]
    one = copies[:1].expand(n, -1, -1)
    controls = {
        VALIDATION_DATA: real.x_val,
        "training_items": copies,
        "one_training_item": one,
        "training_mean": real.x_train.mean(dim=0, keepdim=True).expand_as(one),
        "zeros": torch.zeros_like(one),
    }
    settings = progress([*samples.items(), *controls.items()], "generate: scores")
    return {name: score_samples(x, prior, real) for name, x in settings}


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


def draw_generated(samples: Tensor, valid: Tensor, num_inference_steps: int) -> "Figure":
    """Draw up to 32 samples as paths on a phone, with a strip that shows when the finger is down.

    Args:
        samples: (B, L, C), the first of them are drawn.
        valid: (B,) bool.
        num_inference_steps: what a sample took.
    """
    share, shown = float(valid.float().mean()), samples[:32]
    notes = ["" if ok else "not valid" for ok in valid[:32]]
    title = f"Gestures that the model generates from noise in {num_inference_steps} steps"
    first = f"The first {len(shown)} of {len(samples)}, not selected; {share:.0%} of all are valid."
    return _draw_phones(shown, notes, title, first)


def draw_beside_real(samples: Tensor, real: Tensor, num_inference_steps: int) -> "Figure":
    """Draw 16 real windows, (M, L, C), and below them 16 samples, (B, L, C), likewise."""
    rows = [x[:16] for x in (touched(real), samples)]
    notes = ["real"] * len(rows[0]) + ["generated"] * len(rows[1])
    title = f"Real gestures above, generated ones below, from noise in {num_inference_steps} steps"
    first = f"The first {len(rows[1])} of {len(samples)} samples, not selected."
    return _draw_phones(torch.cat(rows), notes, title, first)


def _draw_phones(x: Tensor, notes: Sequence[str], title: str, first: str) -> "Figure":
    """Draw gestures, (n, L, C), eight in a row, with a note each."""
    columns, rows = 8, -(-len(x) // 8)
    height = 2.75 * rows + 1.5
    figure = new_figure(1.5 * columns, height, layout=None)
    below, above = 0.6 / height, 1 - 0.8 / height
    place = {"left": 0.02, "right": 0.98, "bottom": below, "top": above}
    grid = figure.add_gridspec(rows, columns, wspace=0.25, hspace=0.15, **place)
    types = classify_gestures(x)
    for i, (sample, note) in enumerate(zip(x.numpy(), notes, strict=True)):
        cell = grid[i // columns, i % columns].subgridspec(2, 1, height_ratios=(14, 1), hspace=0.06)
        color = TYPE_COLORS[GESTURE_TYPES[types[i]]]
        ax, failed = figure.add_subplot(cell[0]), note == "not valid"
        draw_phone(ax, 2.0, ec="black" if failed else "0.55", ls=":" if failed else "-")
        draw_path(ax, sample, color, lw=2.2)
        ax.text(0.5, 0.96, note, ha="center", fontsize=8, color="black")
        _draw_press_strip(figure.add_subplot(cell[1]), sample, color)
    for i, (name, color) in enumerate(TYPE_COLORS.items()):
        style: dict[str, Any] = {"fontsize": 11, "weight": "bold", "ha": "center"}
        figure.text(0.1 + 0.2 * i, 0.25 / height, f"●  {TYPE_LABELS[name]}", color=color, **style)
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", fontsize=15)
    subtitle = (
        "path of the finger on the screen, ○ touch-down, ● lift-off; the bar below shows when in "
        f"0.5 s the finger is down.  {first}"
    )
    figure.text(0.5, 1 - 0.57 / height, subtitle, ha="center", fontsize=9.5, color="0.35")
    return figure


def _draw_press_strip(ax: "Axes", x: np.ndarray, color: str) -> None:
    """Draw when the finger is down, left to right."""
    from matplotlib.colors import ListedColormap

    down = (x[None, :, 2] > PRESSED).astype(float)
    extent = (-0.03, 1.03, 0, 1)  # as wide as the phone
    colors = ListedColormap(["0.90", color])
    ax.imshow(down, cmap=colors, extent=extent, aspect="auto", interpolation="none", vmin=0, vmax=1)
    ax.set_xlim(-0.06, 1.06)
    ax.axis("off")
