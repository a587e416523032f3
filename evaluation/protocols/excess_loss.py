"""excess_loss: the training loss above the irreducible one, by noise level."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.estimates import Estimate, Table, bootstrap, columns_of, shifted
from evaluation.figures import BLUE, METHODS, NOISE_LABEL, Curve, Panel, draw_panel, new_figure
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import bayes_mean, frame_mse
from train_diffusion_ddim import DDIMScheduler, noise_bank, to_data_units, to_model_units
from trainlib.process import progress
from trainlib.tensors import eval_mode, in_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(s: Subject, num: int, num_bins: int) -> list[Section]:
    """Compare the loss with that of the oracle, where it knows gestures."""
    if s.prior is None or not len(s.linear):
        return []
    table = excess_loss(s.model, s.scheduler, s.linear[:num], s.prior, num_bins)
    text = (
        "No network has a smaller training loss than the Bayes denoiser; what is above it can be "
        "learnt."
    )
    caption = "How far the loss is above the least possible one, at each noise level."
    pictures = [Picture("excess_loss.png", caption, draw_excess_loss, table)]
    title = "By noise: the loss above the least possible"
    return [Section("excess_loss", table, title, text, pictures=pictures)]


def excess_loss(
    model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, prior: GesturePrior, num_bins: int = 20
) -> Table:
    """Compare the unconditional, unweighted training loss L(t) with the irreducible one, L*(t).

    L* is the loss of the Bayes denoiser on the same x_t, in the unit of what the model predicts;
    the ratio L/L* does not depend on that unit. Of a model that predicts eps it is MMSE/σ².

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, of the prior; all of them in each bin.
        prior: the distribution of x_0.
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
        best_u = to_model_units(bayes_mean(noisy, scheduler.sigma(t), prior))
        best = scheduler.target(best_u, scheduler.eps_from_x_0(best_u, x_t.double(), t), t)
        target = scheduler.target(u, eps, t)
        loss, least = (frame_mse(answer, target).mean(dim=1).numpy() for answer in (output, best))
        table[f"t_{t}"] = {
            "sigma": Estimate(scheduler.sigma(t), None, len(u)),
            "loss": bootstrap(loss),
            "irreducible_loss": bootstrap(least),
            "excess_loss": bootstrap(loss - least),
            "excess_ratio": bootstrap(loss - least, least),
        }
    return table


def draw_excess_loss(table: Table) -> "Figure":
    """Draw the loss and the least possible one by noise level, and their ratio.

    Args:
        table: of `excess_loss`.
    """
    columns = columns_of(table)
    sigmas = [e.value for e in columns["sigma"]]
    ratio = [shifted(e, by=-1) for e in columns["excess_ratio"]]
    model, bayes = METHODS["model"][1], METHODS["bayes"][1]
    figure = new_figure(13, 4.8)
    left, right = figure.subplots(1, 2)
    unit = "training loss, in the unit of what the model predicts"
    draw_panel(
        left,
        Panel("", unit, log=True),
        [
            Curve(sigmas, columns["loss"], "", model),
            Curve(sigmas, columns["irreducible_loss"], "", bayes),
        ],
    )
    for metric, label, color, shift in (
        ("loss", "model", BLUE, (-8, 8)),
        ("irreducible_loss", "least possible (Bayes)", "black", (8, -10)),
    ):  # where the curves are apart
        place, side = (sigmas[1], columns[metric][1].value), "right" if shift[0] < 0 else "left"
        left.annotate(label, place, shift, textcoords="offset points", color=color, ha=side)
    frame = Panel("", "loss / least possible loss", [(1.1, "goal: 1.1")], [(1, "limit")], log=True)
    draw_panel(right, frame, [Curve(sigmas, ratio, "model", model)])
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xlabel(NOISE_LABEL)
    good = sum(e.value <= 1.1 for e in ratio)
    figure.suptitle(
        f"How much is left to learn?  The loss is within 10 % of the least possible one at {good} "
        f"of {len(ratio)} noise levels  (n = {ratio[0].n} each)",
        fontsize=13,
    )
    return figure
