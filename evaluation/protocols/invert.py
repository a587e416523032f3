"""invert: encode gestures as noise by DDIM, decode them again (arXiv:2010.02502, sec. 5.4).

A small error of the round trip proves nothing by itself. A clean gesture lies on a thin set, no
randomness ever enters, and its latent is a faint copy of it: the answer eps = 0, which has learnt
nothing, repeats every gesture exactly. So beside the error the table asks what a copy fails:

    dequantised   it starts from x_0 with noise of START_SIGMA and is scored against that noisy
                  gesture; the first steps of an inversion are where copies come from
                  (arXiv:2410.23530). Only now the latents can be standard normal.
    latents       mean 0, std 1, kurtosis 3, autocorrelation from frame to frame 0 are due. Each
                  step of the encoder shrinks the noise a little, even with the exact score: to a
                  std of 0.5 in 10 steps, 0.87 in 100.
    fresh noise   decoded in place of the latents it must give another gesture: MSE 0.148, twice
                  the variance of the family.
    rounding      a code of unit variance survives rounding gradually; a faint copy is lost.

Which steps. Encoder and decoder visit the same indices: uniform in log sigma from TOP_SIGMA, above
which nothing is decided, to START_SIGMA, so that raw and dequantised trajectories differ by their
start alone. A DDIM step is an Euler step in sigma, and equal ratios spread its error evenly.
Uniform t on the cosine schedule goes from 20 to 3 in one of 10 steps, and below START_SIGMA it
reads the model's own error as noise: its raw round trip errs 3 (N = 10) to 500 times (N = 200) as
much. Many steps share indices: 1,000 take 693 of the 1,000 (cosine); num_steps says how many.
x_0_pred is not clipped on either way: clipping has no inverse.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.estimates import SEED, Estimate, Table, bootstrap
from evaluation.figures import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    Curve,
    Panel,
    draw_panel,
    new_figure,
    scale_by,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import bayes_mean
from train_diffusion_ddim import DDIMScheduler, noise_bank, to_data_units, to_model_units
from trainlib.process import progress
from trainlib.tensors import eval_mode, in_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> output

STEPS = (10, 20, 50, 100, 200, 500, 1000)
# DDIM, table 2: per-number MSE in [0, 1] on the test set of CIFAR-10, rounded to 1e-4.
PAPER_MSE = (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001)
FULL_STEPS = (10, 50)  # where controls are run, and latents replaced and rounded: six decodings
EXACT_STEPS = (10, 20)  # where the exact score is affordable
TOP_SIGMA = 20.0
START_SIGMA = 0.04  # data units; t = 20 of 1000 on the linear schedule, 43 on the cosine one
BITS = (4, 6, 8)
LATENT_RANGE = 4.0  # rounding covers [-4, 4], all but 6e-5 of a standard normal
SEQUENCES = (8, 100)  # fewest and most gestures per trajectory


NOTHING = 1e-10  # a smaller error is that of the arithmetic, and has no place on the axis
COLUMNS = {
    "mse": "MSE, round trip",
    "mse_fresh_noise": "from fresh noise",
    "mse_8_bits": "latents of 8 bits",
    "latent_std": "latent std",
    "latent_kurtosis": "kurtosis",
    "latent_autocorrelation": "autocorrelation",
}


def run(s: Subject, steps: Sequence[int], budget: int, num_exact: int) -> list[Section]:
    """Encode gestures as noise and decode them again."""
    x_0, prior = s.oracle
    size: dict[str, Any] = {"steps": steps, "budget": budget, "num_exact": num_exact}
    table = invert(s.model, s.untrained, s.scheduler, x_0, prior=prior, **size)
    text = (
        "DDIM run backwards turns a gesture into noise, and forwards again into the gesture. A raw "
        "round trip proves nothing: an answer that has learnt nothing (zero eps) repeats every "
        "gesture. Dequantised, it starts from the gesture under a little noise, and the latents "
        "can be what they should: std 1, kurtosis 3, autocorrelation 0. DDIM paper: its table 2, "
        "images."
    )
    title = "Invert: encoded as noise and decoded again"
    caption = "The error alone favours the copy; the latents tell."
    pictures = [Picture("round_trips.png", caption, draw_round_trips, table)]
    return [
        Section(
            "invert", table, title, text, COLUMNS, "round trip, steps", pictures,
            limits=("exact_score",),
        )
    ]  # fmt: skip


class RoundTripScheduler(DDIMScheduler):
    """The schedule of a model with the steps of this protocol, and without clipping.

    Args:
        scheduler: the model's, with the default beta_start and beta_end.
        prediction_type: None = the model's.
    """

    def __init__(self, scheduler: DDIMScheduler, prediction_type: str | None = None) -> None:
        super().__init__(
            scheduler.num_timesteps,
            beta_schedule=scheduler.beta_schedule,
            prediction_type=prediction_type or scheduler.prediction_type,
            clip_sample=False,
        )
        self.to(scheduler.betas.device)

    def timestep_pairs(
        self, num_inference_steps: int, start_t: int | None = None
    ) -> list[tuple[int, int]]:
        """Return at most N steps as (t, t_prev), uniform in log sigma, the last t_prev = -1."""
        sigmas = np.geomspace(TOP_SIGMA, START_SIGMA, num_inference_steps)
        ts = list(dict.fromkeys(self.timestep_at(sigma) for sigma in sigmas.tolist()))
        return list(zip(ts, [*ts[1:], -1], strict=True))


def decode(
    model: Denoiser,
    scheduler: RoundTripScheduler,
    x_T: Tensor,
    num_inference_steps: int,
    start_t: int,
) -> Tensor:
    """Go the way of `DDIMScheduler.invert` back, from x_T to x_t at start_t, eta 0.

    Args:
        model: the denoiser.
        scheduler: of the protocol.
        x_T: latents, (B, L, C), model units.
        num_inference_steps: N, as it was encoded with.
        start_t: where the encoder started: -1, x_0, or one of the indices visited.

    Returns:
        (B, L, C), model units.
    """
    x_t = x_T
    with eval_mode(model):
        for t, t_prev in scheduler.timestep_pairs(num_inference_steps):
            if t <= start_t:
                break
            output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
            x_0_pred = scheduler.predict_x_0(output, x_t, t)
            x_t = scheduler.step(x_0_pred, x_t, t, t_prev)
    return x_t


def exact_score(scheduler: DDIMScheduler, prior: GesturePrior) -> Denoiser:
    """Return the Bayes denoiser in a model's place; all of a batch must share one t."""

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        index = int(t[0])
        noisy = to_data_units(x_t.double() / scheduler.alpha_bar(index) ** 0.5)
        x_0_pred = to_model_units(bayes_mean(noisy, scheduler.sigma(index), prior)).to(x_t)
        return scheduler.target(x_0_pred, scheduler.eps_from_x_0(x_0_pred, x_t, index), index)

    return denoiser


def round_latents(x_T: Tensor, bits: int) -> Tensor:
    """Round each number to the middle of its cell, 2^bits equal ones over ±LATENT_RANGE."""
    cells = 2**bits
    width = 2 * LATENT_RANGE / cells
    return ((x_T / width).floor().clamp(-cells // 2, cells // 2 - 1) + 0.5) * width


def latent_statistics(x_T: Tensor) -> dict[str, Estimate]:
    """Return mean, std, kurtosis and autocorrelation of latents, (B, L, C), over all numbers.

    A standard normal has 0, 1, 3, 0. The autocorrelation is that of consecutive frames of one
    channel. The intervals take the overall mean, and kurtosis the overall std, as given.
    """
    z = x_T.detach().cpu().double().numpy()
    mean = bootstrap(z.mean(axis=(1, 2)))
    z = z - mean.value
    second, fourth = (z**2).mean(axis=(1, 2)), (z**4).mean(axis=(1, 2))
    neighbours = (z[:, 1:] * z[:, :-1]).mean(axis=(1, 2))
    variance = bootstrap(second)
    ci = variance.ci and (variance.ci[0] ** 0.5, variance.ci[1] ** 0.5)
    return {
        "latent_mean": mean,
        "latent_std": Estimate(variance.value**0.5, ci, variance.n),
        "latent_kurtosis": bootstrap(fourth, second * variance.value),
        "latent_autocorrelation": bootstrap(neighbours, second),
    }


def round_trip(
    model: Denoiser,
    scheduler: RoundTripScheduler,
    x_0: Tensor,
    num_inference_steps: int,
    start_t: int,
    *,
    full: bool,
) -> dict[str, Estimate]:
    """Encode x_0, (B, L, C), data units, and decode it.

    Args:
        model: the denoiser.
        scheduler: of the protocol.
        x_0: the gestures.
        num_inference_steps: N.
        start_t: -1 = raw; else one of the indices visited, and x_0 is noised to it first.
        full: decode fresh noise and rounded latents, too.

    Returns:
        num_steps, the indices visited; mse and median_mse against the start of the trajectory,
        x_t/sqrt(ᾱ_t) in data units; likewise mse_fresh_noise and mse_{4,6,8}_bits; and the
        `latent_statistics`.
    """

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(SEED)

    noise = torch.randn(x_0.shape, generator=generator()).to(x_0)  # what `invert` draws
    x_start, _ = scheduler.add_noise(to_model_units(x_0), start_t, noise)
    x_T = scheduler.invert(model, x_0, num_inference_steps, start_t=start_t, generator=generator())
    latents = {"mse": x_T}
    if full:
        latents["mse_fresh_noise"] = noise_bank(x_T.shape).to(x_T)
        latents |= {f"mse_{bits}_bits": round_latents(x_T, bits) for bits in BITS}

    def decode_all(x: Tensor) -> Tensor:
        return decode(model, scheduler, x, num_inference_steps, start_t)

    decoded = in_batches(decode_all, torch.cat(list(latents.values()))).split(len(x_0))
    steps = [t for t, _ in scheduler.timestep_pairs(num_inference_steps) if t > start_t]
    scores = {"num_steps": Estimate(len(steps), None, len(x_0))}
    for name, x in zip(latents, decoded, strict=True):
        error = (x - x_start).double() / (2 * scheduler.alpha_bar(start_t) ** 0.5)
        each = (error**2).mean(dim=(1, 2)).cpu().numpy()
        scores[name] = bootstrap(each)
        if name == "mse":
            scores["median_mse"] = Estimate(float(np.median(each)), None, len(each))
    return scores | latent_statistics(x_T)


def invert(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    *,
    prior: GesturePrior | None,
    steps: Sequence[int] = STEPS,
    budget: int = 1500,
    num_exact: int = 8,
) -> Table:
    """Score the round trip of x_0, raw and dequantised, by the model, controls and the limit.

    Args:
        model: the denoiser; asked without known frames.
        untrained: the same network before training.
        scheduler: their scheduler.
        x_0: (B, L, C), data units; of the family, if there is a prior.
        prior: the distribution of x_0; None leaves out the exact score.
        steps: the numbers of steps, N; those above T are left out.
        budget: a trajectory of N steps takes the first budget/N gestures, within SEQUENCES.
        num_exact: gestures for the exact score, which is slow; 0 leaves it out.

    Returns:
        Per setting "{who}_{raw or dequantised}_{N}" the scores of `round_trip`; who is model,
        untrained_model, zero_eps (it answers eps = 0) or exact_score. And "ddim_paper_{N}", the
        paper's CIFAR-10 images, mse alone.
    """
    own, copying = RoundTripScheduler(scheduler), RoundTripScheduler(scheduler, "epsilon")
    who: dict[str, tuple[Denoiser, RoundTripScheduler, Sequence[int]]] = {
        "model": (model, own, steps),
        "untrained_model": (untrained, own, FULL_STEPS),
        "zero_eps": (lambda x_t, t: torch.zeros_like(x_t), copying, FULL_STEPS),
    }
    if prior and num_exact:
        who["exact_score"] = (exact_score(own, prior), own, EXACT_STEPS)

    starts = {"raw": -1, "dequantised": own.timestep_at(START_SIGMA)}
    tasks = [
        (name, start, N)
        for name, (_, _, own_steps) in who.items()
        for start in starts
        for N in steps
        if N <= own.num_timesteps and N in own_steps
    ]
    table: Table = {}
    for name, start, N in progress(tasks, "invert"):
        denoiser, its_scheduler, _ = who[name]
        exact = name == "exact_score"
        num = num_exact if exact else max(SEQUENCES[0], min(SEQUENCES[1], budget // N))
        full = N in FULL_STEPS and not exact
        table[f"{name}_{start}_{N}"] = round_trip(
            denoiser, its_scheduler, x_0[:num], N, starts[start], full=full
        )
    paper = dict(zip(STEPS, PAPER_MSE, strict=True))
    return table | {f"ddim_paper_{N}": {"mse": Estimate(mse, None, 0)} for N, mse in paper.items()}


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, tuple[str, dict[str, Any]]] = {  # prefix of a setting: label, style
    "ddim_paper": ("DDIM paper (images)", {"color": GREY, "ls": ":"}),
    "untrained_model_dequantised": ("untrained, dequantised", {"color": ORANGE, "marker": "D"}),
    "zero_eps_raw": ("answering eps = 0, raw", {"color": VERMILION, "marker": "v"}),
    "model_raw": ("model, raw", {"color": BLUE, "ls": "--", "marker": "s"}),
    "model_dequantised": ("model, dequantised", {"color": BLUE, "marker": "o"}),
    "exact_score_dequantised": ("limit (exact score),\ndequantised", {"color": "black"}),
}


def draw_round_trips(table: Table) -> "Figure":
    """Draw the error of the round trip and the spread of the latents against the steps.

    Args:
        table: of `invert`.
    """
    figure = new_figure(13, 4.8)
    panels = {
        "mse": Panel("error of the round trip", "mean squared error", log=True),
        "latent_std": Panel("spread of the latents: 1 is due", "std", limits=[(1, "normal")],
                            log=True),
    }  # fmt: skip
    steps = sorted({int(name.rsplit("_", 1)[1]) for name in table if name.startswith("model")})
    for ax, (metric, panel) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        curves = []
        for prefix, (label, style) in ROUND_TRIPS.items():
            found = {n: table[f"{prefix}_{n}"] for n in steps if f"{prefix}_{n}" in table}
            points = {n: row[metric] for n, row in found.items() if metric in row}
            points = {n: e for n, e in points.items() if e.value > NOTHING}
            if points:
                curves.append(Curve(list(points), list(points.values()), label, style))
        draw_panel(ax, panel, curves)
        scale_by(ax, steps, "steps, each way")
    figure.suptitle("What is left of a gesture that was turned into noise and back?", fontsize=13)
    return figure
