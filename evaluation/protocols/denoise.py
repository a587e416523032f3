"""denoise: recreate gestures from x_t at known noise, at once and by DDIM.

R = MSE / MMSE of the Bayes oracle on the same x_t for one-shot prediction, and R_ddim = MSE / MSE
of DDIM with the exact score over the same timesteps. The limit of both is 1.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior, exact_ddim
from evaluation.controls import nearest, zeros
from evaluation.criteria import LINE_SIGMAS
from evaluation.estimates import Estimate, Table, bootstrap
from evaluation.figures import (
    BLUE,
    GREY,
    METHODS,
    NOISE_LABEL,
    Curve,
    Panel,
    draw_panel,
    new_figure,
    scale_by,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import add_noise, bayes_mean, sequence_mse, to_numpy
from train_diffusion_ddim import DDIMScheduler, denoise_one_shot
from trainlib.process import progress
from trainlib.tensors import in_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)  # noise std in data units
COLUMNS = {
    "r": "error / Bayes limit",
    "r_ddim": "DDIM error / exact DDIM",
    "mse_one_shot": "MSE, one shot",
    "mse_mmse": "its limit",
    "mse_ddim": "MSE, DDIM",
    "mse_exact_ddim": "its limit",
    "mse_identity": "doing nothing",
}


def run(s: Subject, num_ddim: int) -> list[Section]:
    """Denoise the gestures that the oracle knows; all, without the oracle, if it knows none."""
    x_0, prior = s.oracle
    networks, steps = (s.model, s.untrained), s.num_inference_steps
    table = denoise(
        *networks, s.scheduler, x_0, s.x_train, prior=prior, num_inference_steps=steps,
        num_ddim=num_ddim,
    )  # fmt: skip
    row = next(iter(table.values()))
    text = (
        "The network sees the gesture under noise of a known std, and answers at once or by DDIM. "
        "The limit is 1: no denoiser has a smaller mean error than the Bayes posterior mean, over "
        f"{row['mse_one_shot'].n} gestures; for DDIM, the same steps with the exact score, over "
        f"{row['mse_ddim'].n}."
    )
    caption = "The error of the model between the Bayes limit and doing nothing."
    if prior is None:
        text = (
            "The network sees the gesture under noise of a known std, and answers at once or by "
            "DDIM. The least possible error is not known for these gestures."
        )
        caption = "The error of the model beside doing nothing."
    title = "Denoise: recreated from the gesture under noise"
    picture = Picture("denoise_curve.png", caption, draw_denoise_curve, table, steps)
    shown = Section("denoise", table, title, text, COLUMNS, "noise", [picture])
    return [shown, Section("denoise_lines", denoise_lines(table))]


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
        prior: the distribution of x_0; None leaves out what needs it.
        num_inference_steps: of both DDIMs, eta 0.
        num_ddim: sequences that DDIM is run on; the exact score is slow.

    Returns:
        Per setting "sigma_{sigma}": mse_{one_shot, mmse, zeros, ...}, r, mse_ddim,
        mse_exact_ddim, r_ddim. Everything of one setting sees the same x_t.
    """
    table: Table = {}
    for sigma in progress(SIGMAS, "denoise"):
        t, x_t, noisy = add_noise(scheduler, x_0, sigma)
        answers = {
            "one_shot": denoise_one_shot(model, scheduler, x_0, sigma),
            "identity": noisy,
            "zeros": zeros(x_0),
            "training_mean": x_train.mean(dim=0).expand_as(x_0),
            "nearest_training_item": x_train[nearest(noisy, x_train)[1]],
            "untrained_model": denoise_one_shot(untrained, scheduler, x_0, sigma),
        }
        errors = {name: sequence_mse(x_0, answer) for name, answer in answers.items()}
        few, steps = x_t[:num_ddim], min(num_inference_steps, t + 1)
        errors["ddim"] = sequence_mse(x_0[:num_ddim], _ddim(model, scheduler, few, t, steps))
        if prior:
            mean = bayes_mean(noisy, scheduler.sigma(t), prior)
            errors["mmse"] = sequence_mse(x_0, mean)
            exact = _exact_ddim(scheduler, few, t, steps, prior)
            errors["exact_ddim"] = sequence_mse(x_0[:num_ddim], exact.to(x_0.device))
        row = {f"mse_{name}": bootstrap(error) for name, error in errors.items()}
        if prior:
            row["r"] = bootstrap(errors["one_shot"], errors["mmse"])
            row["r_ddim"] = bootstrap(errors["ddim"], errors["exact_ddim"])
        table[f"sigma_{sigma}"] = row
    return table


def _ddim(model: nn.Module, scheduler: DDIMScheduler, x_t: Tensor, t: int, steps: int) -> Tensor:
    """Sample from x_t at t to x_0 in data units, eta 0."""

    def sample(x: Tensor) -> Tensor:
        return scheduler.sample(model, tuple(x.shape), x.device, steps, x_T=x, start_t=t)

    return in_batches(sample, x_t)


def _exact_ddim(
    scheduler: DDIMScheduler, x_t: Tensor, t: int, steps: int, prior: GesturePrior
) -> Tensor:
    """Sample over the same timesteps with the exact score."""
    alphas_cumprod = [scheduler.alpha_bar(i) for i in range(scheduler.num_timesteps)]
    timesteps = [t for t, _ in scheduler.timestep_pairs(steps, t)]
    return torch.from_numpy(exact_ddim(to_numpy(x_t), alphas_cumprod, timesteps, prior))


def denoise_lines(table: Table) -> Table:
    """Take the worst of a denoise table over LINE_SIGMAS, of the model and of trivial answers.

    Returns:
        Per setting r; of "model" r_ddim, too. Empty without the Bayes limit.
    """
    rows = [table[f"sigma_{sigma}"] for sigma in LINE_SIGMAS if f"sigma_{sigma}" in table]
    if not rows or "r" not in rows[0]:
        return {}
    lines = {
        "model": {name: max((row[name] for row in rows), key=lambda e: e.value)
                  for name in ("r", "r_ddim")},
    }  # fmt: skip
    for name in ("identity", "zeros", "training_mean", "nearest_training_item", "untrained_model"):
        r = max(row[f"mse_{name}"].value / row["mse_mmse"].value for row in rows)
        lines[name] = {"r": Estimate(r, None, rows[0]["r"].n)}
    return lines


CURVES: Mapping[str, tuple[str, dict[str, Any]]] = {  # metric: (label, style)
    "mse_zeros": ("answering zeros", {"color": GREY, "ls": ":"}),
    "mse_identity": ("leaving the noise in", {"color": GREY, "ls": "--"}),
    "mse_nearest_training_item": METHODS["nearest_training_item"],
    "mse_exact_ddim": ("limit of DDIM", {"color": "black", "ls": "--"}),
    "mse_ddim": ("model, DDIM", {"color": BLUE, "ls": "--", "marker": "s"}),
    "mse_one_shot": ("model, one shot", {"color": BLUE, "marker": "o"}),
    "mse_mmse": ("limit of any model\n(Bayes)", {"color": "black"}),
}


def draw_denoise_curve(table: Table, num_inference_steps: int) -> "Figure":
    """Draw error against noise, between the limit and doing nothing, and its ratio to the limit.

    Args:
        table: of `denoise`; without a limit the ratio is left out.
        num_inference_steps: of DDIM.
    """
    sigmas = [float(setting.removeprefix("sigma_")) for setting in table]

    def curves(metrics: Mapping[str, str]) -> list[Curve]:  # metric -> its key of CURVES
        return [
            Curve(sigmas, [row[metric] for row in table.values()], *CURVES[key])
            for metric, key in metrics.items()
            if all(metric in row for row in table.values())
        ]

    ratios = curves({"r_ddim": "mse_ddim", "r": "mse_one_shot"})
    goal, limit = [(1.1, "goal: 1.1")], [(1, "limit")]
    panels = [
        (Panel("", "mean squared error", log=True), curves({m: m for m in CURVES})),
        (Panel("", "error / least possible error", goal, limit, log=True), ratios),
    ][: 2 if ratios else 1]
    figure = new_figure(6.5 * len(panels) + 1, 5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (panel, lines) in zip(axes, panels, strict=True):
        draw_panel(ax, panel, lines)
        scale_by(ax, sigmas, NOISE_LABEL)
    found = ""
    if ratios:
        worst = max(e.value for e in ratios[-1].estimates)
        found = f"  In one shot with at most {worst:.2f} times the least possible error"
    figure.suptitle(
        f"How well are noisy gestures recreated?{found}  (DDIM: {num_inference_steps} steps)",
        fontsize=13,
    )
    return figure
