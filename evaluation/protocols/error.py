"""error: where the error sits, frame by frame around the edges and along the denoising steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.controls import nearest_training_item
from evaluation.estimates import Estimate, Table, bootstrap, columns_of
from evaluation.figures import (
    METHODS,
    PLAN_GOALS,
    Curve,
    Panel,
    draw_panel,
    label_right,
    new_figure,
    strip,
    values_of,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import bayes_mean, frame_mse, noisy, record_steps
from train_diffusion_ddim import DDIMScheduler, denoise_one_shot, recreate, takes_known_frames
from trainlib.gestures import FRAME_MS, PRESSED
from trainlib.metrics import has_one_press
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAME_SPAN = {"touch_down": range(-10, 26), "lift_off": range(-25, 11)}  # frames from the edge
FRAME_SIGMA = 0.4  # of the denoise protocol in error_by_frame


def run(s: Subject, num_frames: int, num_steps: int) -> list[Section]:
    """Take the error of the gestures that the oracle knows apart; nothing if it knows none."""
    if s.prior is None or not len(s.linear):
        return []
    known: dict[str, Any] = {"sampling": s.sampling, "prior": s.prior}
    x_0 = s.linear[:num_frames]
    by_frame = error_by_frame(s.model, s.scheduler, x_0, s.x_train, **known)
    by_step = error_by_step(s.model, s.scheduler, s.linear[:num_steps], **known)
    frame_picture = Picture(
        "error_by_frame.png",
        "Where in a gesture the error sits, with its edges given and not.",
        draw_error_by_frame,
        by_frame,
    )
    step_picture = Picture(
        "error_by_step.png",
        "How the estimate of the gesture sharpens from step to step.",
        draw_error_by_step,
        by_step,
    )
    return [
        Section(
            "error_by_frame",
            by_frame,
            "By frame: where the error sits",
            "The error about touch-down and lift-off, given these frames and not given them.",
            pictures=[frame_picture],
        ),
        Section(
            "error_by_step",
            by_step,
            "By denoising step: how the estimate sharpens",
            "The error of the estimate of x_0 along the way from noise.",
            pictures=[step_picture],
        ),
    ]


# ----------------------------------------------------------------------------------------
# MEASURE
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
        x_0: (B, L, C), data units, of the prior.
        x_train: (N, L, C), data units.
        sampling: the arguments of `recreate`.
        prior: the distribution of x_0.

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
            "bayes": bayes_mean(noisy(x_0, sigma), sigma, prior),
        },
    }
    table: Table = {}
    for protocol, methods in answers.items():
        for method, answer in methods.items():
            error = frame_mse(answer, x_0)
            for edge in FRAME_SPAN:
                for offset, estimate in around_edges(error, x_0, edge).items():
                    row = table.setdefault(f"{protocol}/{edge}{offset:+d}", {})
                    row[f"mse_{method}"] = estimate
    return table


def _mse(a: Tensor, b: Tensor) -> np.ndarray:
    """MSE of each sequence, (B,)."""
    return frame_mse(a, b).mean(dim=1).numpy()


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
    options |= {"num_inference_steps": num_inference_steps}
    passes = record_steps(model, scheduler, lambda: recreate(model, scheduler, x_0, **options))
    estimates = [estimate for *_, estimate in passes]
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
        x_0: (B, L, C), data units, of the prior.
        sampling: the arguments of `recreate`.
        prior: the distribution of x_0.

    Returns:
        Per setting "step_{i}", from 1: sigma, the noise that the step starts from; mse_model;
        mse_shuffled_condition, with the known frames of another gesture; mse_bayes, the least
        error at this noise for who knows no frame, over the first quarter of the gestures.
    """
    start_t = None if takes_known_frames(model) else scheduler.timestep_at(0.4)
    pairs = scheduler.timestep_pairs(sampling["num_inference_steps"], start_t)
    trajectories = {
        "mse_model": record_x_0(model, scheduler, x_0, **sampling),
        "mse_shuffled_condition": record_x_0(model, scheduler, x_0.roll(1, 0), **sampling),
    }
    few, table = x_0[: -(-len(x_0) // 4)], {}
    for i, (t, _) in enumerate(progress(pairs, "denoising steps")):
        sigma = scheduler.sigma(t)
        row = {"sigma": Estimate(sigma, None, len(x_0))}
        row |= {name: bootstrap(_mse(x[i], x_0)) for name, x in trajectories.items()}
        row["mse_bayes"] = bootstrap(_mse(bayes_mean(noisy(few, sigma), sigma, prior), few))
        table[f"step_{i + 1}"] = row
    return table


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


FRAME_ROWS = {  # protocol: (label, methods, smallest RMS error drawn)
    "keyframes": ("edges given\n(keyframes)", ("nearest_training_item", "model"), 1e-4),
    "denoise": (f"edges not given\n(one shot, noise {FRAME_SIGMA:g})", ("model", "bayes"), 1e-3),
}
GIVEN = (-1.5, 0.5)  # the frames on both sides of an edge, in frames from it


def draw_error_by_frame(table: Table) -> "Figure":
    """Draw the RMS error of each frame around touch-down and lift-off.

    Args:
        table: of `error_by_frame`.
    """
    figure = new_figure(13, 6.6)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (protocol, (label, methods, smallest)) in zip(axes, FRAME_ROWS.items(), strict=True):
        row[0].set_yscale("log")
        for ax, edge in zip(row, ("touch_down", "lift_off"), strict=True):
            ends = _draw_edge(ax, table, f"{protocol}/{edge}", methods, smallest)
            if edge == "touch_down":
                row[0].set_ylim(bottom=smallest)
                label_right(ax, ends)
        row[0].set_ylabel(f"{label}\nRMS error, share of the screen", fontsize=10)
    for ax, title in zip(axes[0], ("touch-down", "lift-off"), strict=True):
        ax.set_title(f"around {title}", fontsize=11)
        ax.axvspan(*(FRAME_MS * end for end in GIVEN), color="0.8", lw=0)
        place = (FRAME_MS * sum(GIVEN) / 2, 1.3e-4)
        ax.annotate("given:\nerror 0", place, ha="center", fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("time from the edge, ms  (a frame is 2 ms)")
    n = max(row["mse_model"].n for row in table.values())
    at_edge, inside = (table[f"denoise/touch_down+{k}"]["mse_model"].value for k in (0, 20))
    title = "Where in a gesture is the error?"
    if at_edge > 0 and inside > 0:  # not if no gesture is that long
        times = f"{(at_edge / inside) ** 0.5:.1f} times as large at an edge as 40 ms inside"
        title += f"  If the edges are not given, it is {times}"
    figure.suptitle(f"{title}  (n = {n})", fontsize=13)
    return figure


def _draw_edge(
    ax: "Axes", table: Table, prefix: str, methods: Sequence[str], smallest: float
) -> list[tuple[float, str, str]]:
    """Draw RMS errors around one edge; return the labels of their right ends."""
    offsets = [int(s.removeprefix(prefix)) for s in table if s.startswith(prefix)]
    ms, ends = FRAME_MS * np.array(offsets), []
    after = "touch_down" in prefix
    ax.set_xlim(ms[0], ms[-1])
    ax.axvspan(-0.5 * FRAME_MS, ms[-1] if after else ms[0], color="0.95", lw=0)
    ax.text(
        0.97 if after else 0.03, 0.93, "finger down", ha="right" if after else "left", fontsize=8,
        color="0.35", transform=ax.transAxes,
    )  # fmt: skip
    for method in methods:
        estimates = [table[f"{prefix}{offset:+d}"][f"mse_{method}"] for offset in offsets]
        rms = np.sqrt(values_of(estimates))
        rms[:, rms[0] < smallest] = np.nan  # zeros have no place on a log axis
        label, style = METHODS[method]
        ax.plot(ms, rms[0], **{"lw": 1.8, "ms": 3.5, **style})
        ax.fill_between(ms, rms[1], rms[2], color=style["color"], alpha=0.15, lw=0)
        ends.append((float(rms[0][-1]), label, style["color"]))
    ax.grid(color="0.9", axis="y")
    strip(ax)
    return ends


def draw_error_by_step(table: Table) -> "Figure":
    """Draw the error of the x_0 estimate along the denoising steps.

    Args:
        table: of `error_by_step`.
    """
    columns, steps = columns_of(table), range(1, len(table) + 1)
    no_frame = "the best who sees the noisy gesture\nbut no known frame (Bayes)"
    curves = {
        "mse_shuffled_condition": METHODS["shuffled_condition"],
        "mse_bayes": (no_frame, METHODS["bayes"][1]),
        "mse_model": METHODS["model"],
    }
    figure = new_figure(9.5, 5)
    ax = figure.subplots()
    ylabel = "mean squared error of the x_0 estimate"
    draw_panel(
        ax,
        Panel("", ylabel, PLAN_GOALS["mse"], log=True),
        [Curve(steps, columns[metric], *method) for metric, method in curves.items()],
    )
    sigmas = [f"{i}\n{e.value:.2g}" for i, e in zip(steps, columns["sigma"], strict=True)]
    ax.set_xticks(steps, sigmas)
    ax.set_xlabel(
        "denoising step, and the noise that it starts from (std, share of the screen);\n"
        "the limit, interpolation between the known frames, is 0 at every step"
    )
    model = columns["mse_model"]
    figure.suptitle(
        f"What {len(steps)} denoising steps do: the error of the estimate goes from "
        f"{model[0].value:.1e} to {model[-1].value:.1e}  (n = {model[0].n})",
        fontsize=13,
    )
    return figure
