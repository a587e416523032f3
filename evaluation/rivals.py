"""The networks that the checkpoint is compared with, and how they are trained.

The weights of the loss on given frames are the checkpoint's: they change which task learns first,
not the minimiser, E[x_0 | given frames]. That mean has the least MSE of all answers (theory says
that regression wins there), but it is no gesture where several fit (diffusion wins validity).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.estimates import FloatArray
from train_diffusion_ddim import (
    GRAD_CLIP,
    NUM_TASKS,
    DDIMScheduler,
    TrainConfig,
    augment,
    build_model,
    build_scheduler,
    lr_at,
    noise_bank,
    to_data_units,
    to_model_units,
    train_step,
)
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import UserError, say
from trainlib.process import progress, timer
from trainlib.shapes import learn_shapes
from trainlib.state import TrainState, epoch_order
from trainlib.tensors import eval_mode, in_batches

FROM_KNOWN_FRAMES = "regression_from_known_frames"  # its file
LATENT_DIM = 16  # a gesture has at most 7 numbers; a dimension that is not used costs no bits
# A decoder whose error is Gaussian of std s has beta = 2·s² in the ELBO: s = 0.32 and 0.1 here.
BETAS = (0.2, 0.02)


# ----------------------------------------------------------------------------------------
# NETWORKS — the same network, other tasks
# ----------------------------------------------------------------------------------------


class Regression(nn.Module):
    """E[x_0 | given frames] by the denoiser's network: x_t is a fixed ramp and t is T - 1.

    The ramp tells frames apart where nothing is known: rotary attention sees distances alone.
    It stands where a denoiser that predicts x_0 stands; sampled in one step, it answers directly.
    """

    known_frames = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x_t: Tensor, t: Tensor, *given: Tensor, **options: bool) -> Any:
        """Map as `MinimalDiffusionTransformer.forward` does, whatever x_t and t are."""
        last = torch.full_like(t, self.network.max_timesteps - 1)
        ramp = torch.linspace(-1, 1, x_t.shape[1]).to(x_t)[:, None].expand_as(x_t)
        return self.network(ramp, last, *given, **options)


class GestureVAE(nn.Module):
    """A beta-VAE of two denoisers that share the checkpoint's layers (arXiv:1312.6114).

    The encoder is a denoiser at t = 0 whose output is mapped to the latent; the decoder is one at
    t = T - 1 that starts from zeros and takes z as its context. Zeros are alike wherever they are,
    so positions are added to them: distances alone would not tell.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        config = replace(config, known_frames=False, rotary=False, augment=False)
        layers = max(1, config.num_layers // 2)
        rest = max(1, config.num_layers - layers)
        plain = replace(config, num_layers=layers, contacts=False, curve_steps=0, context_dim=0)
        self.encoder = build_model(plain)
        self.decoder = build_model(replace(config, num_layers=rest, context_dim=LATENT_DIM))
        if config.contacts:  # z comes by way of tokens alone, which at first tell curves nothing
            head: Any = self.decoder.output_projection
            head.curves.from_tokens.reset_parameters()
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
        x_t, last = z.new_zeros(len(z), *self.shape), self.decoder.max_timesteps - 1
        t = torch.full((len(z),), last, device=z.device)
        return to_data_units(self.decoder(x_t, t, context=z).float())

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


def find_regression(
    folders: Sequence[Path], config: TrainConfig, device: torch.device
) -> tuple[nn.Module, DDIMScheduler] | None:
    """Return the regression from known frames that `train_or_load` left, and its scheduler.

    Args:
        folders: where it may lie, or in a folder baselines of which.
        config: of the checkpoint's run; a regression beside another run is not taken.
        device: where it is put.
    """
    config = replace(config, device="auto")
    for path in (
        place / f"{FROM_KNOWN_FRAMES}.pth" for f in folders for place in (f, f / "baselines")
    ):
        if not path.is_file():
            continue
        content = load_checkpoint(path)
        own = content["config"]
        if {**own, "device": "auto", "data_dir": config.data_dir} != asdict(config):
            say(f"note: {path} belongs to another checkpoint; the regression is left out")
            continue
        network = Regression(build_model(config))
        network.load_state_dict(content["ema_state_dict"])
        return network.to(device).eval().requires_grad_(False), mean_scheduler(config, device)
    return None


def mean_scheduler(config: TrainConfig, device: str | torch.device) -> DDIMScheduler:
    """Return the scheduler of regressions beside a run: they predict x_0, and decide nothing."""
    return build_scheduler(replace(config, prediction_type="x0", curve_steps=0)).to(device)


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
    gestures = x_train.cpu().numpy()
    for part in model.modules():
        learn_shapes(part, gestures, bool(config.augment))
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
    torch.manual_seed(state.step_seed)
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
        FROM_KNOWN_FRAMES: (Regression(build_model(config)), weighted, train_step),
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
