"""The plan's baselines beside a checkpoint: the same network trained to do something else.

    python -m evaluation.baselines --checkpoint runs/x --output_dir runs/x/baselines

trains them with the checkpoint's options, data, augmentation, optimiser and number of steps, keeps
their weights in the output folder (a second call only evaluates), prints one table across
protocols and writes baselines.md and baselines.json (`read_baselines`). What each method sees:

    diffusion           the checkpoint: given frames, or x_t; a sample of its usual number of steps
    diffusion_one_shot  the checkpoint: x_t, one evaluation, no sampling
    regression          two networks of the checkpoint's size that answer in one evaluation and
                        minimise the MSE of x_0. In keyframes, infill and generate: the given
                        frames alone, drawn in training as for the checkpoint; x_t is zero, t is
                        T - 1. In denoise: x_t at a known, in training random, t; no loss weights
    vae_beta_*          encodes the whole original, decodes a sample of the latent; in generate
                        it decodes noise of the prior
    nearest_training_item   a lookup with what the model sees: the given frames, x_t, the original
    random_training_item    nothing: "random sampling"
    limit               keyframes: interpolation. denoise, infill: the exact posterior mean, of
                        least MSE. generate: the validation set

The weights of the loss on given frames are the checkpoint's: they change which task learns first,
not the minimiser, E[x_0 | given frames]. That mean has the least MSE of all answers (theory says
that regression wins there), but it is no gesture where several fit (diffusion wins validity).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior, mmse
from evaluation.controls import interpolation, nearest, random_training_item
from evaluation.criteria import PLAN_LINES
from evaluation.estimates import (
    Estimate,
    FloatArray,
    Table,
    bootstrap,
    format_estimate,
    tables_from_json,
    tables_to_json,
)
from evaluation.family import deviations, is_linear_gesture, read_prior, validity
from evaluation.report import describe_run, flatten_about
from evaluation.samples import type_scores
from evaluation.scores import add_noise, bayes_mean, measure_latencies, score_recreations
from evaluation.touch_down import posterior_mean_gesture
from train_diffusion_ddim import (
    GRAD_CLIP,
    NUM_TASKS,
    DDIMScheduler,
    DiffusionActionDataset,
    TrainConfig,
    augment,
    build_model,
    build_scheduler,
    denoise_one_shot,
    generate,
    has_press_edge,
    load_model,
    lr_at,
    noise_bank,
    press_edges,
    recreate,
    to_data_units,
    to_model_units,
    touch_down,
    train_step,
)
from trainlib.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, write_json, write_whole
from trainlib.gestures import GESTURE_TYPES
from trainlib.process import DEVICES, pick_device, progress, timer
from trainlib.provenance import describe_machine
from trainlib.state import TrainState, epoch_order
from trainlib.tables import format_number, markdown_table
from trainlib.tensors import eval_mode, in_batches

BASELINES_FORMAT = 1
SIGMAS = (0.1, 0.4, 0.9)  # noise std in data units
LATENT_DIM = 16  # a gesture has at most 7 numbers; a dimension that is not used costs no bits
# A decoder whose error is Gaussian of std s has beta = 2·s² in the ELBO: s = 0.32 and 0.1 here.
BETAS = (0.2, 0.02)
TYPE_SHARES = tuple(f"share_{name}" for name in GESTURE_TYPES)


# ----------------------------------------------------------------------------------------
# BASELINES — the same network, other tasks
# ----------------------------------------------------------------------------------------


class Regression(nn.Module):
    """E[x_0 | given frames] by the denoiser's network: x_t is held at zero and t at T - 1.

    It stands where a denoiser that predicts x_0 stands; sampled in one step, it answers directly.
    """

    known_frames = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x_t: Tensor, t: Tensor, *given: Tensor, **options: bool) -> Any:
        """Map as `MinimalDiffusionTransformer.forward` does, whatever x_t and t are."""
        last = torch.full_like(t, self.network.max_timesteps - 1)
        return self.network(torch.zeros_like(x_t), last, *given, **options)


class GestureVAE(nn.Module):
    """A beta-VAE of two denoisers that share the checkpoint's layers (arXiv:1312.6114).

    The encoder is a denoiser at t = 0 whose output is mapped to the latent; the decoder is one
    that starts from zeros and is conditioned on z by what conditions the checkpoint on t. Zeros are
    alike wherever they are, so positions are added to them: distances alone would not tell.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        config = replace(config, known_frames=False, noise_units=False, rotary=False)  # no noise
        layers = max(1, config.num_layers // 2)
        rest = max(1, config.num_layers - layers)
        self.encoder = build_model(replace(config, num_layers=layers, gates=False))
        decoder: Any = build_model(replace(config, num_layers=rest))
        decoder.timestep_embedding = nn.Linear(LATENT_DIM, config.d_model)
        self.decoder = decoder
        self.shape = (config.seq_len, self.encoder.action_dim)
        self.to_latent = nn.Linear(math.prod(self.shape), 2 * LATENT_DIM)

    def encode(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """Map x_0, (B, L, C), data units, to mean and log variance of z, (B, LATENT_DIM) each."""
        t = torch.zeros(len(x_0), dtype=torch.long, device=x_0.device)
        features = self.encoder(to_model_units(x_0), t).flatten(1)  # (B, L*C)
        mean, log_variance = self.to_latent(features).float().chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Map z, (B, LATENT_DIM), to gestures, (B, L, C), data units, not rounded."""
        return to_data_units(self.decoder(z.new_zeros(len(z), *self.shape), z).float())

    def forward(self, x_0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Send x_0, (B, L, C), data units, through z = mean + std·eps.

        Returns:
            The reconstruction, (B, L, C), data units, and the rate of z, (B,), in nats.
        """
        mean, log_variance = self.encode(x_0)
        z = mean + (0.5 * log_variance).exp() * eps
        return self.decode(z), kl_from_prior(mean, log_variance)


def kl_from_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, I)) of each row, (B,), in nats (1312.6114, app. B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1)


def reconstruct(vae: GestureVAE, x_0: Tensor) -> tuple[Tensor, FloatArray]:
    """Send x_0, (B, L, C), data units, through a sample of the latent, always the same draw.

    Returns:
        The reconstructions, (B, L, C), data units, and the bits that each took, (B,). Only a
        sample costs KL/ln 2 bits; the mean of the latent would say infinitely many.
    """
    eps = noise_bank((len(x_0), LATENT_DIM)).to(x_0)
    with eval_mode(vae):
        answer = in_batches(lambda x, e: vae(x, e)[0], x_0, eps)
        rate = in_batches(lambda x: kl_from_prior(*vae.encode(x)), x_0)
    return answer.clamp(0, 1), rate.double().cpu().numpy() / math.log(2)


def decode_prior(vae: GestureVAE, n: int, seed: int) -> Tensor:
    """Decode n draws of the prior N(0, I) to gestures, (n, L, C), data units."""
    z = torch.randn(n, LATENT_DIM, generator=torch.Generator().manual_seed(seed))
    with eval_mode(vae):
        return in_batches(vae.decode, z.to(next(vae.parameters()))).clamp(0, 1)


def nearest_by_known_frames(x_0: Tensor, known_mask: Tensor, x_train: Tensor) -> Tensor:
    """Return the training gestures that fit the known frames of x_0 best, (B, L, C).

    Args:
        x_0: (B, L, C); read only where the mask is set.
        known_mask: (B, L) bool; without a known frame the answer is the first training gesture.
        x_train: (N, L, C).
    """
    bank = x_train.flatten(1)

    def lookup(x: Tensor, mask: Tensor) -> Tensor:  # Σ m·(x - b)² but for Σ m·x²
        weight = mask[..., None].expand_as(x).flatten(1).to(x)
        return (weight @ (bank**2).T - 2 * (weight * x.flatten(1)) @ bank.T).argmin(dim=1)

    return x_train[in_batches(lookup, x_0, known_mask)]


# ----------------------------------------------------------------------------------------
# TRAINING — by the trainer's own functions
# ----------------------------------------------------------------------------------------

Step = Callable[[TrainState, Tensor], object]


def fit(
    model: nn.Module, step: Step, x_train: Tensor, config: TrainConfig, num_steps: int, title: str
) -> nn.Module:
    """Train for `num_steps` batches in the order of the checkpoint's run.

    Args:
        model: moved to x_train's device.
        step: updates a state from a batch, (B, L, C), data units, and moves it on by a step.
        x_train: (N, L, C), data units.
        config: of the checkpoint's run.
        num_steps: batches.
        title: of the progress bar.

    Returns:
        The EMA model, in eval mode.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = x_train.device
    scheduler = build_scheduler(config).to(device)
    state = TrainState(model.to(device), scheduler, config, num_steps, NUM_TASKS)
    state.model.train()
    steps_per_epoch = math.ceil(len(x_train) / config.batch_size)
    for i in progress(range(num_steps), title):
        epoch, batch = divmod(i, steps_per_epoch)
        if batch == 0:
            order = epoch_order(len(x_train), config.seed, epoch).to(x_train.device)
            batches = order.split(config.batch_size)
        step(state, x_train[batches[batch]])
    return state.ema


def vae_loss(vae: nn.Module, x_0: Tensor, beta: float) -> Tensor:
    """Return the mean of (squared error + beta·KL)/(L·C) at a fresh sample of the latent."""
    eps = torch.randn(len(x_0), LATENT_DIM, device=x_0.device)
    reconstruction, rate = vae(x_0, eps)
    error = (reconstruction - x_0).square().sum(dim=(1, 2))
    return (error + beta * rate).mean() / x_0[0].numel()


def vae_step(state: TrainState, x_0: Tensor, beta: float) -> None:
    """Update a VAE from one batch x_0, (B, L, C), data units, as `train_step` does a denoiser.

    Raises:
        FloatingPointError: loss or gradient is not finite.
    """
    config = state.config
    torch.manual_seed(config.seed * 1_000_003 + state.step)
    if config.augment:
        x_0 = augment(x_0)
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=config.amp):
        loss = vae_loss(state.model, x_0, beta)
    lr = lr_at(state.step, state.total_steps, config.lr)
    state.model.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), GRAD_CLIP)
    if not torch.isfinite(loss + grad_norm):
        raise FloatingPointError(f"the VAE's loss is {loss:g} at step {state.step}, lr {lr:g}")
    state.update(lr)


def recipes(config: TrainConfig) -> dict[str, tuple[nn.Module, TrainConfig, Step]]:
    """Return what is trained, by file name: an untrained model, its config, and its step."""
    to_x_0 = replace(config, prediction_type="x0", balance_loss=False)
    weighted = replace(to_x_0, balance_loss=config.balance_loss)
    torch.manual_seed(config.seed)
    return {
        "regression_from_known_frames": (Regression(build_model(config)), weighted, train_step),
        "regression_from_x_t": (build_model(config), to_x_0, train_step),
        **{f"vae_beta_{b}": (GestureVAE(config), config, partial(vae_step, beta=b)) for b in BETAS},
    }


def train_or_load(
    folder: Path, x_train: Tensor, config: TrainConfig, num_steps: int
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Return the baselines, from their files in `folder` where there are any; write the others.

    Args:
        folder: an existing folder.
        x_train: (N, L, C), data units, on the device.
        config: of the checkpoint's run.
        num_steps: of each training.

    Returns:
        The models by file name, in eval mode, and the seconds that their training took.

    Raises:
        UserError: a file holds the weights of another checkpoint or number of steps.
    """
    trained, seconds = {}, {}
    mark = {"config": asdict(config), "step": num_steps}
    for name, (model, own_config, step) in recipes(config).items():
        path = folder / f"{name}.pth"
        if path.exists():
            content = load_checkpoint(path)
            if any(content.get(key) != value for key, value in mark.items()):
                raise UserError(
                    f"{path} belongs to another checkpoint, data or number of steps; choose "
                    "another --output_dir"
                )
            model.load_state_dict(content["ema_state_dict"])
        else:
            passed = timer(x_train.device)
            model = fit(model, step, x_train, own_config, num_steps, name)
            content = {"name": name, "ema_state_dict": model.state_dict(), **mark}
            content["train_s"] = round(passed(), 1)
            save_checkpoint(path, content)
        trained[name] = model.to(x_train.device).eval().requires_grad_(False)
        seconds[name] = content["train_s"]
    return trained, seconds


# ----------------------------------------------------------------------------------------
# PROTOCOLS
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The checkpoint, the baselines, and the data that they are judged on.

    Attributes:
        x_0: (B, L, C), data units: gestures with a press edge, of the oracle's family if it
            knows any (`oracle`).
        x0_scheduler: of the regressions, which predict x_0.
        vaes: by setting.
        num_curve: gestures from which the mutual information is computed.
    """

    model: nn.Module
    scheduler: DDIMScheduler
    config: TrainConfig
    x_0: Tensor
    x_val: Tensor
    x_train: Tensor
    prior: GesturePrior
    oracle: bool
    x0_scheduler: DDIMScheduler
    regression: nn.Module
    regression_from_x_t: nn.Module
    vaes: dict[str, Any]
    num_generated: int
    num_curve: int


def score_answers(
    x_0: Tensor, answers: Mapping[str, Tensor], prior: GesturePrior, limit: str = ""
) -> Table:
    """Score answers to the same question.

    Args:
        x_0: (B, L, C), data units.
        answers: by method, likewise.
        prior: the distribution of x_0.
        limit: the answer whose error r is a multiple of; none if empty.

    Returns:
        method -> the metrics of PLAN_LINES, valid, press_softness, type_mix_error (against the
        prior), mse_ratio = MSE over that of diffusion on the same gestures, and
        r = MSE over the limit's.
    """
    x_0, answers = x_0.cpu(), {name: answer.cpu() for name, answer in answers.items()}
    error = {name: ((x_0 - a).double() ** 2).mean(dim=(1, 2)) for name, a in answers.items()}
    table: Table = {}
    for name, answer in answers.items():
        scores = score_recreations(x_0, answer)
        row = {metric: scores[metric] for metric in PLAN_LINES}
        row["valid"] = bootstrap(validity(answer, prior)["valid"])
        row["press_softness"] = bootstrap(deviations(answer)["press_softness"])
        row["type_mix_error"] = type_scores(answer, prior)["type_mix_error"]
        if "diffusion" in error:
            row["mse_ratio"] = bootstrap(error[name], error["diffusion"])
        if limit:
            row["r"] = bootstrap(error[name], error[limit])
        table[name] = row
    return table


def add_answers(c: Comparison, known_mask: Tensor, diffusion: Tensor) -> dict[str, Tensor]:
    """Put the baselines, given the frames of x_0 in the mask, beside the checkpoint's answers."""
    shape = (len(c.x_0), *c.x_0.shape[1:])
    given = {"known": c.x_0, "known_mask": known_mask}
    return {
        "diffusion": diffusion,
        "regression": generate(c.regression, c.x0_scheduler, shape, 1, seed=0, **given),
        "nearest_training_item": nearest_by_known_frames(c.x_0, known_mask, c.x_train),
        "random_training_item": random_training_item(c.x_train)(c.x_0),
    }


def run_keyframes(c: Comparison) -> Table:
    """Recreate x_0 from its press edges."""
    recreated = recreate(c.model, c.scheduler, c.x_0, **c.config.sampling)
    answers = add_answers(c, press_edges(c.x_0), recreated)
    if c.oracle:
        answers["limit"] = interpolation(c.x_0)
    return score_answers(c.x_0, answers, c.prior)


def run_infill(c: Comparison) -> Table:
    """Recreate x_0 from its touch-down: when and where it ends is open."""
    mask, shape = touch_down(c.x_0), (len(c.x_0), *c.x_0.shape[1:])
    given = {"known": c.x_0, "known_mask": mask, **c.config.sampling}
    answers = add_answers(c, mask, generate(c.model, c.scheduler, shape, **given))
    if c.oracle:
        mean = in_batches(lambda x: posterior_mean_gesture(x, c.prior), c.x_0, batch_size=64)
        answers["limit"] = mean
    return score_answers(c.x_0, answers, c.prior, "limit" if c.oracle else "")


def denoise_answers(c: Comparison, sigma: float) -> dict[str, Tensor]:
    """Recreate x_0 noised to sigma, data units; all methods see the same x_t."""
    t, x_t, noisy = add_noise(c.scheduler, c.x_0, sigma)
    sampling = c.config.sampling
    sampling["num_inference_steps"] = min(sampling["num_inference_steps"], t + 1)
    generator = torch.Generator().manual_seed(c.config.seed)

    def sample(x: Tensor) -> Tensor:
        given: dict[str, Any] = {"x_T": x, "start_t": t, "generator": generator}
        return c.scheduler.sample(c.model, tuple(x.shape), x.device, **sampling, **given)

    answers = {
        "diffusion": in_batches(sample, x_t),
        "diffusion_one_shot": denoise_one_shot(c.model, c.scheduler, c.x_0, sigma),
        "regression": denoise_one_shot(c.regression_from_x_t, c.x0_scheduler, c.x_0, sigma),
        "nearest_training_item": c.x_train[nearest(noisy, c.x_train)[1]],
        "random_training_item": random_training_item(c.x_train)(c.x_0),
    }
    if c.oracle:
        answers["limit"] = bayes_mean(noisy, c.scheduler.sigma(t), c.prior).to(c.x_0)
    return answers


def run_generate(c: Comparison) -> Table:
    """Draw gestures from nothing; regression has but one answer."""
    n, seed, (L, C) = c.num_generated, c.config.seed, c.x_0.shape[1:]
    samples = {
        "diffusion": generate(c.model, c.scheduler, (n, L, C), seed=seed, **c.config.sampling),
        "regression": generate(c.regression, c.x0_scheduler, (1, L, C), 1),
        **{name: decode_prior(vae, n, seed) for name, vae in c.vaes.items()},
        "random_training_item": random_training_item(c.x_train)(c.x_train[:1].expand(n, L, C)),
        "limit": c.x_val,
    }
    return {name: score_samples(x, c) for name, x in samples.items()}


def score_samples(samples: Tensor, c: Comparison) -> dict[str, Estimate]:
    """Score generated gestures, (B, L, C), data units; the type mix is held against the prior's.

    share_copies are those that repeat a training gesture to an RMS of 0.001.
    """
    copies = nearest(samples, c.x_train)[0] < 1e-3
    samples = samples.cpu()
    valid, types = validity(samples, c.prior), type_scores(samples, c.prior)
    return {
        **{name: bootstrap(valid[name]) for name in ("valid", "one_press")},
        "press_softness": bootstrap(deviations(samples)["press_softness"]),
        **{name: types[name] for name in ("type_mix_error", *TYPE_SHARES)},
        "share_copies": bootstrap(copies.cpu()),
    }


def information(sigmas: FloatArray, mmse_values: FloatArray, num_values: int) -> FloatArray:
    """Return the bits that x_0 + sigma·z tells of x_0, (N,) (arXiv:cs/0412108, theorem 1).

        I(sigma) = num_values·∫ mmse(s)/s³ ds from sigma to infinity, in nats

    Args:
        sigmas: noise std, (N,), strictly decreasing from where mmse is nearly the variance.
        mmse_values: mean squared error per value of the posterior mean, (N,).
        num_values: values of x_0, L·C.
    """
    density = num_values * mmse_values / sigmas**2  # nats per unit of -ln sigma
    steps = 0.5 * (density[1:] + density[:-1]) * -np.diff(np.log(sigmas))
    return (0.5 * density[0] + np.concatenate([[0.0], np.cumsum(steps)])) / math.log(2)


def noise_information(prior: GesturePrior, n: int) -> tuple[FloatArray, FloatArray]:
    """Return noise levels, data units, descending, and the bits that they leave, over n draws."""
    sigmas = np.geomspace(16, 0.003, 32)
    title = "mutual information"
    values = [mmse(s, n, np.random.default_rng(0), prior)[0] for s in progress(sigmas, title)]
    return sigmas, information(sigmas, np.array(values), prior.sequence_length * 3)


def run_reconstruction(c: Comparison) -> dict[str, Table]:
    """Send x_0 through each VAE, and through the noise that leaves as many bits of it.

    The least noise of the schedule bounds those bits; they are stated, as is sigma. The lookup
    sees x_0 whole and sends the number of a training gesture. Without the oracle the information
    that noise leaves is not known, and diffusion has no part in this.
    """
    tables = {}
    sigmas, curve = noise_information(c.prior, c.num_curve) if c.oracle else (np.ones(1),) * 2
    for name, vae in c.vaes.items():
        answer, rate = reconstruct(vae, c.x_0)
        sigma = float(np.interp(rate.mean(), curve, sigmas))
        sigma = c.scheduler.sigma(c.scheduler.timestep_at(sigma))
        seen = denoise_answers(c, sigma) if c.oracle else {}
        answers = {k: v for k, v in seen.items() if k.startswith("diffusion")} | {
            name: answer,
            "nearest_training_item": c.x_train[nearest(c.x_0, c.x_train)[1]],
        }
        table = score_answers(c.x_0, answers, c.prior)
        told = Estimate(float(np.interp(-sigma, -sigmas, curve)), None, c.num_curve)
        number = Estimate(math.log2(len(c.x_train)), None, len(c.x_train))
        bits = {name: bootstrap(rate), "nearest_training_item": number}
        for method, row in table.items():
            row["bits"] = bits.get(method, told)
            if method not in bits:
                row["sigma"] = Estimate(sigma, None, c.num_curve)
        tables[f"reconstruction_{name}"] = table
    return tables


def run_cost(c: Comparison) -> Table:
    """Count parameters, and time the answer to one gesture: a sample, a pass, a lookup."""
    one = c.x_0[:1]
    shape, mask = (1, *one.shape[1:]), press_edges(one)
    eps = noise_bank((1, LATENT_DIM)).to(one)
    sampling = c.config.sampling
    calls: dict[str, Callable[[], object]] = {
        "diffusion": lambda: generate(c.model, c.scheduler, shape, **sampling),
        "diffusion_one_shot": lambda: denoise_one_shot(c.model, c.scheduler, one, 0.4),
        "regression": lambda: generate(c.regression, c.x0_scheduler, shape, 1),
        **{name: lambda v=vae: v(one, eps) for name, vae in c.vaes.items()},  # type: ignore[misc]
        "nearest_training_item": lambda: nearest_by_known_frames(one, mask, c.x_train),
    }
    networks = {"diffusion": c.model, "regression": c.regression, **c.vaes}
    latencies = measure_latencies(calls, one.device, repeats=20)
    table = {name: {"batch_1_ms": latency} for name, latency in latencies.items()}
    for name, network in networks.items():
        parameters = sum(p.numel() for p in network.parameters())
        table[name]["parameters"] = Estimate(parameters, None, 1)
    return table


def run_all(c: Comparison) -> dict[str, Table]:
    """Run every protocol: protocol -> method -> metric -> estimate."""
    tables = {"keyframes": run_keyframes(c)}
    for sigma in progress(SIGMAS, "denoise"):
        limit = "limit" if c.oracle else ""
        answers = denoise_answers(c, sigma)
        tables[f"denoise_sigma_{sigma}"] = score_answers(c.x_0, answers, c.prior, limit)
    tables |= {"infill": run_infill(c), "generate": run_generate(c)}
    return tables | run_reconstruction(c) | {"cost": run_cost(c)}


# ----------------------------------------------------------------------------------------
# THEORY — who must win, and whether they did
# ----------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Theory: in `metric` the first method beats the second, or, if it is open, either may.

    The names of protocol and methods are prefixes: "vae" means every VAE.
    """

    protocol: str
    metric: str
    first: str
    second: str
    why: str
    is_open: bool = False


MEAN = "the posterior mean has the least MSE; a sample costs up to twice that (arXiv:1711.06077)"
ONE = "regression answers equal questions alike"
BLUR = "where several gestures fit, their mean is none of them"
PREDICTIONS = (
    Prediction(
        *("keyframes", "mse_ratio", "diffusion", "regression"),
        "the given frames determine a linear gesture, so mean and sample are the same",
        is_open=True,
    ),
    Prediction("denoise", "mse_ratio", "diffusion_one_shot", "diffusion", MEAN),
    Prediction("denoise", "mse_ratio", "regression", "diffusion", MEAN),
    Prediction(
        *("denoise", "r", "diffusion_one_shot", "regression"),
        "both estimate the posterior mean; a loss without weights is nearly all of large noise",
        is_open=True,
    ),
    Prediction("denoise_sigma_0.9", "valid", "diffusion", "regression", BLUR),
    Prediction("infill", "mse_ratio", "regression", "diffusion", MEAN),
    Prediction("infill", "valid", "diffusion", "regression", BLUR),
    Prediction("infill", "press_softness", "diffusion", "regression", BLUR),
    Prediction("infill", "type_mix_error", "diffusion", "regression", ONE),
    Prediction("generate", "valid", "diffusion", "regression", BLUR),
    Prediction("generate", "type_mix_error", "diffusion", "regression", ONE),
    Prediction(
        *("generate", "valid", "diffusion", "vae"),
        "the codes of gestures do not fill the prior, and between them the decoder blurs",
    ),
    Prediction(
        *("generate", "share_copies", "diffusion", "random_training_item"),
        "training gestures are valid but not new",
    ),
    Prediction(
        *("reconstruction", "mse_ratio", "vae", "diffusion"),
        "at equal bits: a VAE chooses what it sends, noise does not; neither is optimal",
        is_open=True,
    ),
)
LOWER_IS_BETTER = ("mse", "mse_ratio", "r", "press_softness", "type_mix_error", "share_copies")


def judge_predictions(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Hold every prediction against the tables.

    Returns:
        Rows of protocol, metric, first, second, why, is_open, first_value, second_value, and
        came_out: "yes", "no", or "undecided" where the 95 % intervals overlap (a value without
        one counts as exact); where theory is open, the method that won, or "undecided".
    """
    rows = []
    for p in PREDICTIONS:
        for protocol in (name for name in tables if name.startswith(p.protocol)):
            scores = {m: row[p.metric] for m, row in tables[protocol].items() if p.metric in row}
            for first, second in product(_named(scores, p.first), _named(scores, p.second)):
                a, b = scores[first], scores[second]
                ahead = _is_ahead(a, b, lower=p.metric in LOWER_IS_BETTER)
                words = (first, second) if p.is_open else ("yes", "no")
                row = p._asdict() | {"protocol": protocol, "first": first, "second": second}
                row |= {"first_value": a.value, "second_value": b.value}
                row["came_out"] = "undecided" if ahead is None else words[not ahead]
                rows.append(row)
    return rows


def _named(methods: Collection[str], prefix: str) -> list[str]:
    """Return the method of this name, else all whose names start with it."""
    return [prefix] if prefix in methods else [m for m in methods if m.startswith(prefix)]


def _is_ahead(a: Estimate, b: Estimate, *, lower: bool) -> bool | None:
    """Tell whether a is better than b, None if their intervals overlap."""
    (a_low, a_high), (b_low, b_high) = (e.ci or (e.value, e.value) for e in (a, b))
    if a_high < b_low:
        return lower
    return not lower if b_high < a_low else None


# ----------------------------------------------------------------------------------------
# RECORD — baselines.json, baselines.md
# ----------------------------------------------------------------------------------------

SHOWN = {
    "keyframes": (*PLAN_LINES, "mse_ratio"),
    "denoise": ("mse", "r", "mse_ratio", "valid"),
    "infill": ("mse", "r", "mse_ratio", "valid", "press_softness", "type_mix_error"),
    "generate": (
        *("valid", "one_press", "press_softness", "type_mix_error"),
        *(*TYPE_SHARES, "share_copies"),
    ),
    "reconstruction": ("bits", "sigma", "mse", "mse_ratio", "valid"),
    "cost": ("parameters", "batch_1_ms"),
}


def read_baselines(path: Path) -> dict[str, Any]:
    """Read baselines.json.

    Returns:
        format; about; protocols: protocol -> method -> metric -> Estimate; predictions: the rows
        of `judge_predictions`.

    Raises:
        UserError: missing, no JSON, or not of this format.
    """
    try:
        results = json.loads(path.read_text("utf-8"))
        if results["format"] != BASELINES_FORMAT:
            raise ValueError(f"format {results['format']}")
        results["protocols"] = tables_from_json(results["protocols"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"cannot read {path} ({e}); run python -m evaluation.baselines") from None
    return results


def theory_of(prediction: Mapping[str, Any]) -> str:
    """Return a prediction in words."""
    verb = "or" if prediction["is_open"] else "beats"
    return f"{prediction['first']} {verb} {prediction['second']}"


def baselines_table(tables: Mapping[str, Table], *, interval: bool = True) -> str:
    """Return the one table across protocols: a metric a row, a method a column."""
    methods = list(dict.fromkeys(method for table in tables.values() for method in table))
    methods.sort(key=_column)
    rows = []
    for protocol, table in tables.items():
        for metric in SHOWN[protocol.split("_")[0]]:
            cells = [table.get(method, {}).get(metric) for method in methods]
            shown = [format_estimate(cell, interval=interval) for cell in cells]
            if any(cells):
                rows.append([protocol, metric, *shown])
    return markdown_table(["protocol", "metric", *methods], rows)


def _column(method: str) -> int:
    """Return where a method stands in the table."""
    order = ("diffusion", "diffusion_one_shot", "regression", "vae", "nearest", "random", "limit")
    return max(i for i, name in enumerate(order) if method.startswith(name))


def predictions_table(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Return theory beside outcome, a comparison a row."""
    rows = []
    for p in predictions:
        values = [math.nan if p[k] is None else p[k] for k in ("first_value", "second_value")]
        numbers = " : ".join(format_number(value) for value in values)
        rows.append([p["protocol"], p["metric"], theory_of(p), p["why"], numbers, p["came_out"]])
    header = ["protocol", "metric", "theory", "because", "values", "came out"]
    return markdown_table(header, rows)


def baselines_markdown(results: Mapping[str, Any]) -> str:
    """Return baselines.md from what `read_baselines` returned."""
    about = flatten_about(results["about"])
    sees = (__doc__ or "").split("What each method sees:")[1]
    pages = [
        f"# Baselines beside {results['about']['checkpoint']}",
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        f"What each method sees:\n{sees.rstrip()}",
        "## All protocols, with 95 % intervals",
        "r is the MSE over that of the limit, mse_ratio over that of diffusion, both on the same "
        "gestures; sigma is the noise that leaves as many bits of x_0 as the VAE sends.",
        baselines_table(results["protocols"]),
        "## Theory and outcome",
        predictions_table(results["predictions"]),
    ]
    return "\n\n".join(pages) + "\n"


def write_baselines(folder: Path, about: dict[str, Any], tables: dict[str, Table]) -> str:
    """Write baselines.json and baselines.md into an existing folder; return what to print."""
    results = {
        "format": BASELINES_FORMAT,
        "about": about,
        "protocols": tables_to_json(tables),
        "predictions": judge_predictions(tables),
    }
    write_json(folder / "baselines.json", results)
    read = read_baselines(folder / "baselines.json")
    write_whole(folder / "baselines.md", baselines_markdown(read).encode())
    table = baselines_table(read["protocols"], interval=False)
    return f"{table}\n\n{predictions_table(read['predictions'])}"


# ----------------------------------------------------------------------------------------
# CLI
# ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="python -m evaluation.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--output_dir", required=True, metavar="DIR", help="weights and tables; resumes from them")
    add("--data_dir", metavar="DIR", help="gestures to judge on; default: the run's")
    add("--train_data_dir", metavar="DIR", help="default: the run's")
    add("--num_steps", type=int, metavar="N", help="of each training; default: the checkpoint's")
    add("--quick", action="store_true", help="20 steps, at most 64 gestures: no result")
    add("--device", default="auto", choices=DEVICES, help="default: auto")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Comparison, dict[str, Any]]:
    """Load the checkpoint and its data, train or load the baselines.

    Returns:
        The comparison, and what is to be said about its making.

    Raises:
        UserError: bad checkpoint, data, folder or number of steps.
    """
    device = pick_device(args.device)
    model, scheduler, config = load_model(args.checkpoint, device)
    if not config.known_frames:
        raise UserError(f"{args.checkpoint} takes no known frames; train one with --known_frames")
    config = replace(config, data_dir=args.train_data_dir or config.data_dir)
    num_steps = args.num_steps
    if num_steps is None:
        num_steps = 20 if args.quick else load_checkpoint(args.checkpoint)["step"]
    if num_steps < 1:
        raise UserError(f"--num_steps must be at least 1, got {num_steps}")
    data_dir = args.data_dir or config.val_data_dir
    sequences = DiffusionActionDataset(data_dir, config.seq_len).sequences
    x_val = torch.from_numpy(sequences[: 64 if args.quick else None]).to(device)
    train_set = DiffusionActionDataset(config.data_dir, config.seq_len)
    linear, edge = is_linear_gesture(x_val), has_press_edge(x_val)
    if not edge.any():
        raise UserError(f"no gesture in {data_dir} has a press edge; nothing can be recreated")
    folder = make_folder(args.output_dir)
    x_train = torch.from_numpy(train_set.sequences).to(device)
    trained, train_s = train_or_load(folder, x_train, config, num_steps)
    comparison = Comparison(
        model=model,
        scheduler=scheduler,
        config=config,
        x_0=x_val[linear if linear.any() else edge],
        x_val=x_val,
        x_train=x_train,
        prior=read_prior(data_dir, x_val),
        oracle=bool(linear.any()),
        x0_scheduler=build_scheduler(replace(config, prediction_type="x0")).to(device),
        regression=trained["regression_from_known_frames"],
        regression_from_x_t=trained["regression_from_x_t"],
        vaes={name: vae for name, vae in trained.items() if name.startswith("vae")},
        num_generated=64 if args.quick else 1000,
        num_curve=8 if args.quick else 64,
    )
    about = {
        "num_steps": num_steps,
        "data_dir": data_dir,
        "train_data_dir": config.data_dir,
        "validation_sequences": len(x_val),
        "paired_sequences": len(comparison.x_0),
        "train_s": train_s,
        "quick": args.quick,
    }
    return comparison, about


def compare(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, judge, write and print.

    Raises:
        UserError: bad input, or an output folder that cannot be written.
    """
    passed = timer()
    comparison, making = prepare(args)
    tables = run_all(comparison)
    about = {
        "checkpoint": str(newest_checkpoint(args.checkpoint)),
        "seed": comparison.config.seed,
        "sampling": comparison.config.sampling,
        **making,
        **describe_run("evaluation.baselines", argv),
        "machine": describe_machine(comparison.x_0.device),
        "wall_s": round(passed(), 1),
    }
    folder = Path(args.output_dir)
    say(write_baselines(folder, about, tables))
    say(f"\n{about['wall_s']:.0f} s; with intervals in {folder / 'baselines.md'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see `run_program` for what it returns."""
    argv = sys.argv[1:] if argv is None else argv
    return run_program(lambda: compare(parse_args(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
