r"""Train a small transformer DDIM that recreates touch gestures, and sample from it.

    # a quick look, on a laptop
    python train_diffusion_ddim.py --data_dir test_data_mini/train \
        --val_data_dir test_data_mini/val --batch_size 2 --num_epochs 3 --d_model 32 --device cpu
    # the main job: 5,000 gestures, on CUDA if there is one
    python train_diffusion_ddim.py

Data: a gesture is float32 [L, 3] = [x, y, press] in [0, 1], L = 250 frames at 500 Hz, all zero
while idle; a file `*_actions.npy` holds N of them as [N*L, 3] or [N, L, 3] (see augmentation/).
Everything public is in these data units; the model alone sees [-1, 1] (`to_model_units`).

Symbols, one meaning each:
    x_0, x_t, x_0_pred   clean gesture, noisy at t, the model's estimate of x_0      (B, L, C)
    eps, t, t_prev       Gaussian noise; diffusion index in [0, T); next one, -1 is x_0
    alphas_cumprod       ᾱ_t: x_t = sqrt(ᾱ_t)·x_0 + sqrt(1 - ᾱ_t)·eps;  ᾱ_{-1} = 1
    sigma                noise std in data units: 0.5·sqrt((1 - ᾱ_t)/ᾱ_t)
    known, known_mask    frames that are given, the rest is recreated                (B, L) bool
    context              vector that says where to go, a goal                        (B, D_context)

Sections: CONFIG, DATASET, SCHEDULER, MODEL, KNOWN FRAMES, VALIDATION, TRAINING, CLI.
What is not the method (files, checkpoints, logs, metrics, figures, Muon) is in trainlib/.
Papers: DDPM 2006.11239, DDIM 2010.02502, cosine schedule 2102.09672, v-prediction 2202.00512,
DPM-Solver++ 2211.01095, adaLN-zero 2212.09748, RoPE 2104.09864, CSDI 2107.03502, EDM 2206.00364,
EDM2 2312.02696, classifier-free guidance 2207.12598, Muon 2502.16982.
"""

import argparse
import hashlib
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainlib import process, tensors
from trainlib.augment import augment
from trainlib.checkpoint import fitting, load_checkpoint, newest_checkpoint
from trainlib.contact_chain import ContactChain, press_evidence
from trainlib.contacts import median_shake
from trainlib.curves import CURVES_BELOW, STILL, CurveDenoiser, CurveWalk, draw_walk
from trainlib.data_gate import check_data
from trainlib.data_rules import POLYNOMIALS, decided_by_data, patch_size_for
from trainlib.errors import OneLineParser, UserError, check_choice, check_divides, run_program, say
from trainlib.figures import log_figures
from trainlib.figures import visualize_action_sequences as visualize_action_sequences
from trainlib.figures import visualize_noise_comparison as visualize_noise_comparison
from trainlib.files import make_folder
from trainlib.gesture_files import read_context, read_gestures, write_actions
from trainlib.gestures import ACTION_DIM, PRESSED, SEQ_LEN
from trainlib.knobs import Knobs, add_flags, changed, checked, flag, knobs_of, options_of
from trainlib.known import KNOWN_STRATEGIES, meet_known, nearest_known, press_edges
from trainlib.known import has_press_edge as has_press_edge
from trainlib.legendre import coefficients, curves_at, legendre_table, mean_over, split_contacts
from trainlib.lessons import CurveLessons, curve_lessons
from trainlib.loaders import all_sequences, batch_size_of
from trainlib.memory import memory_named
from trainlib.metrics import (
    FLOOR,
    compute_reconstruction_metrics,
    generation_metrics,
    gesture_metrics,
    mean_variance,
    recreation_rows,
    recreation_summary,
)
from trainlib.metrics import compute_gesture_type_accuracy as compute_gesture_type_accuracy
from trainlib.metrics import compute_spatial_accuracy as compute_spatial_accuracy
from trainlib.metrics import compute_temporal_iou as compute_temporal_iou
from trainlib.returns import returned
from trainlib.run import config_of, failures_named, open_run, refuse_early, resume_run, save_if_due
from trainlib.run_log import WANDB_MODES, NullLogger
from trainlib.shapes import learn_shapes
from trainlib.state import TrainState, lr_at
from trainlib.summary import end_of_run, epoch_line, generation_line, log_keys
from trainlib.tensors import modulate, zero_init

Model = Callable[..., Tensor]  # model(x_t, t), perhaps with known, known_mask, context
Index = int | Tensor  # one t for the batch, or (B,) int64

BETA_SCHEDULES = ("linear", "cosine", "wide_cosine")
PREDICTION_TYPES = ("epsilon", "v", "x0")
SPACINGS = ("trailing", "linspace", "log_sigma")
SAMPLERS = ("ddim", "dpmpp")
OPTIMIZERS = ("muon", "adamw")


# ----------------------------------------------------------------------------------------
# CONFIG
# ----------------------------------------------------------------------------------------
# Each knob is declared once, with type, default, help and range; the CLI is derived from it.
# docs/LOG.md has the ablation that each of ours is kept for.


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Knobs):
    """Every knob of a training run; an impossible value raises UserError.

    `TrainConfig()` is the project's best small recipe, what the script runs without arguments.
    """

    # data
    data_dir: str = flag("diffusion_test_data/train", "folder of *_actions.npy to train on")
    val_data_dir: str = flag("diffusion_test_data/val", "folder of *_actions.npy to validate on")
    seq_len: int = flag(SEQ_LEN, "frames per gesture in the files", low=3)
    allow_overlap: bool = flag(False, "allow gestures that are in both sets")
    augment: bool | None = flag(None, "mirror, turn, reverse and shift the gestures")
    # denoiser
    d_model: int = flag(64, "width", low=1)
    num_layers: int = flag(3, "transformer blocks", low=1, high=10_000)
    nhead: int = flag(4, "attention heads; must divide d_model", low=1)
    dim_feedforward: int = flag(0, "hidden width of the MLPs; 0 = 4 * d_model", low=0)
    dropout: float = flag(0.0, "dropout; synthetic gestures do not need it", low=0, high=0.99)
    patch_size: int | None = flag(None, "frames per token; divides seq_len; 1 = the plan's", low=1)
    adaln: bool = flag(True, "condition on t by adaLN-zero; off = the plan's added embedding")
    rotary: bool = flag(True, "positions by rotary attention; off = the plan's sinusoids")
    known_frames: bool = flag(True, "take known frames; without them only noise is removed")
    contacts: bool = flag(True, "predict each contact as one curve; needs x0")
    max_contacts: int | None = flag(None, "contacts that a window may hold", low=1, high=10)
    shapes: int | None = flag(None, "shapes of curves, learnt; 0 = polynomials", low=0, high=20)
    decisive: bool = flag(False, "decide what a contact is at any noise, not at its end")
    context_dim: int = flag(0, "width of the goals in *_context.npy; 0 = none", low=0)
    # diffusion
    num_timesteps: int = flag(1000, "T, noise levels in training", low=2, high=1_000_000)
    beta_schedule: str = flag("wide_cosine", "noise schedule", choices=BETA_SCHEDULES)
    prediction_type: str = flag("x0", "what the net predicts", choices=PREDICTION_TYPES)
    balance_loss: bool = flag(True, "weigh noise levels and known frames by their running loss")
    known_share: float = flag(0.15, "share of a batch that sees known frames", low=0, high=1)
    distill: str = flag("", "a trained run; learn to do in one step what it does in many")
    # sampling
    num_inference_steps: int = flag(10, "denoising steps, 10-50 for the planner", low=1)
    spacing: str = flag("log_sigma", "where the steps lie on the t axis", choices=SPACINGS)
    sigma_max: float = flag(12.0, "noise where up to ten steps of log_sigma begin", low=0.1)
    sigma_min: float | None = flag(None, "noise where the steps end", low=1e-5, high=1)
    curve_steps: int | None = flag(None, "of the last step, for curves alone", low=0, high=100)
    lower_order_below: float = flag(0.1, "noise where dpmpp's second order ends", low=0)
    sampler: str = flag("dpmpp", "DDIM, or of second order: DPM-Solver++(2M)", choices=SAMPLERS)
    eta: float = flag(1.0, "fresh noise: 0 = none, 1 = DDPM variance", low=0, high=1)
    # optimisation
    batch_size: int = flag(32, "gestures per step, over all processes", low=1)
    num_epochs: int = flag(30, "passes over the training set", low=1)
    lr: float = flag(3e-3, "peak learning rate; linear warm-up, cosine to 0", low=1e-12)
    optimizer: str = flag("muon", "Muon for matrices, or AdamW for all", choices=OPTIMIZERS)
    amp: bool = flag(False, "bf16 autocast in training; worth it where bf16 is native")
    compile: bool = flag(False, "torch.compile the denoiser in training; needs a C++ compiler")
    # run
    seed: int = flag(0, "seeds weights, order, noise and samples", low=0, high=2**31)
    device: str = flag("auto", "auto = CUDA if there is one", choices=process.DEVICES)
    save_dir: str = flag("", "run folder; empty = a new one under runs/")
    save_every: float = flag(10.0, "epochs, or a part of one, between checkpoints", low=1e-6)
    log_interval: int = flag(20, "steps between lines of metrics.jsonl", low=1)
    wandb_project: str = flag("action-diffusion-test", "W&B project")
    wandb_mode: str = flag("auto", "auto = online with a login, else offline", choices=WANDB_MODES)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any data is read."""
        super().__post_init__()
        check_divides("--nhead", self.nhead, "--d_model", self.d_model)
        check_divides("--patch_size", self.patch_size or 1, "--seq_len", self.seq_len)
        N, T = self.num_inference_steps, self.num_timesteps
        if N > T:
            raise UserError(f"--num_inference_steps must be at most --num_timesteps {T}, got {N}")
        if self.augment and (self.context_dim or self.distill):
            owned = "--context_dim" if self.context_dim else "--distill"
            raise UserError(f"{owned} needs --no-augment: it belongs to a gesture as it is")
        if self.curve_steps and not self.contacts:
            raise UserError(f"--curve_steps {self.curve_steps} needs --contacts")
        if self.contacts and self.prediction_type != "x0":
            predicted = f"--prediction_type x0, got {self.prediction_type}"
            raise UserError(f"--contacts needs {predicted}; add --no-contacts")

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `DDIMScheduler.sample` that a run fixes."""
        names = ("num_inference_steps", "eta", "sampler")
        return {name: getattr(self, name) for name in names}


# ----------------------------------------------------------------------------------------
# DATASET — files → x_0
# ----------------------------------------------------------------------------------------
# The set is one tensor and a batch is an index: in memory (3 kB a gesture), or paged in from disk.


def to_model_units(x: Tensor) -> Tensor:
    """Map data units [0, 1] to the [-1, 1] that the model sees."""
    return 2 * x - 1


def to_data_units(x: Tensor) -> Tensor:
    """Map model units [-1, 1] back to data units [0, 1]."""
    return (x + 1) / 2


def to_gesture(x: Tensor) -> Tensor:
    """Round a sample (..., L, 3) to the data format: in [0, 1], press 0 or 1, zero while idle."""
    pressed = (x[..., 2:] > PRESSED).to(x.dtype)
    return torch.cat([x[..., :2].clamp(0, 1), torch.ones_like(pressed)], dim=-1) * pressed


class DiffusionActionDataset(Dataset):
    """All gestures of a folder of `*_actions.npy`, in file-name order; UserError for a bad one.

    `sequences` holds them, float32 numpy (N, seq_len, 3), data units.
    """

    def __init__(self, data_dir: str | Path, seq_len: int = SEQ_LEN) -> None:
        self.data_dir, self.seq_len = Path(data_dir), seq_len
        self.sequences = read_gestures(self.data_dir, seq_len)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, idx: int) -> Tensor:
        return torch.from_numpy(self.sequences[idx])


# ----------------------------------------------------------------------------------------
# SCHEDULER — x_0 → x_t → x_0
# ----------------------------------------------------------------------------------------
# All of diffusion that is not the network. Samplers walk explicit (t, t_prev) pairs, never
# arithmetic on t; t is an int (one index for the batch) or an int64 tensor (B,).


class DDIMScheduler(nn.Module):
    """Noise schedule, forward process and samplers; UserError for betas that do not end in noise.

    Args:
        num_timesteps: T, the number of noise levels, at least 2.
        beta_start, beta_end: of the linear schedule at T = 1000; any other T scales them.
        beta_schedule: "linear" (DDPM, sec. 4), "cosine" (arXiv:2102.09672, eq. 17), or
            "wide_cosine": that has a sigma of tan(u)/2, u uniform; here it is tan(u)^1.5/2, from
            0.0003 to 40, so that fine motion is learnt, too.
        prediction_type: what the model predicts: "epsilon", "v" (arXiv:2202.00512) or "x0".
        spacing: where N of the T indices lie: "trailing", "linspace" (named as in diffusers), or
            "log_sigma": uniform in log sigma from sigma_max, which is that of up to 10 steps and
            grows with N above, to sigma_min. Noise alone lacks the trace of a gesture that x_t has
            at any finite sigma, a bias that goes with 1/sigma; more steps can afford more.
        sigma_max: where "log_sigma" begins, data units.
        sigma_min: where it ends; what moves less is not told from rest.
        lower_order_below: noise where steps of second order end, data units: what is decided
            there, extrapolated, would be decided too soon.
        curve_steps: if not 0, the last step is at CURVES_BELOW, and from there curves of contacts
            go on to sigma_min in so many steps without the rest of the model; see ContactHead.
        clip_sample: clip each x_0_pred to [-1, 1]; eps is always derived from x_0_pred.
    """

    WIDE_SIGMAS, WIDER = (3e-4, 40.0), 1.5

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        *,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        spacing: str = "trailing",
        sigma_max: float = 12.0,
        sigma_min: float = 0.005,
        lower_order_below: float = 0.0,
        curve_steps: int = 0,
        clip_sample: bool = True,
    ) -> None:
        super().__init__()
        self.options = options_of(locals())
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("spacing", spacing, SPACINGS)
        num_timesteps = checked("num_timesteps", num_timesteps, int, low=2, high=1_000_000)
        beta_start, beta_end = (checked("beta", b, float, low=0) for b in (beta_start, beta_end))
        self.num_timesteps, self.prediction_type = num_timesteps, prediction_type
        self.beta_schedule, self.spacing, self.clip_sample = beta_schedule, spacing, clip_sample
        self.sigma_max = checked("sigma_max", sigma_max, float, low=1e-6)
        self.sigma_min = checked("sigma_min", sigma_min, float, low=1e-6)
        self.lower_order_below = checked("lower_order_below", lower_order_below, float, low=0)
        self.curve_steps = checked("curve_steps", curve_steps, int, low=0)

        grid = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        if beta_schedule == "linear":
            ramp = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
            betas = 1000 / num_timesteps * ramp
        elif beta_schedule == "wide_cosine":
            low, high = (math.atan((2 * sigma) ** (1 / self.WIDER)) for sigma in self.WIDE_SIGMAS)
            u = torch.linspace(low, high, num_timesteps, dtype=torch.float64)
            sigma = torch.tan(u) ** self.WIDER / 2
            betas = 1 - 1 / (1 + 4 * sigma**2) * F.pad(1 + 4 * sigma**2, (1, 0), value=1.0)[:-1]
        else:
            f = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        betas = betas.clamp(max=0.999)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        last = alphas_cumprod[-1].item()
        if not 0 < last < 1e-3:
            raise UserError(f"alphas_cumprod must end below 0.001, got {last:.3g}; raise beta_end")
        # Float64, for int indices. The last entry makes index -1 mean x_0: ᾱ = 1, sigma = 0.
        self._alpha_bar = [*alphas_cumprod.tolist(), 1.0]
        self._sigma = [0.5 * math.sqrt(1 / alpha_bar - 1) for alpha_bar in self._alpha_bar]
        self.betas = nn.Buffer(betas.float(), persistent=False)
        self.alphas = nn.Buffer((1 - betas).float(), persistent=False)
        self.alphas_cumprod = nn.Buffer(alphas_cumprod.float(), persistent=False)

    def alpha_bar(self, t: Index) -> Any:
        """Return ᾱ_t, with ᾱ_{-1} = 1: a float for an int, (B, 1, 1) for a tensor (B,)."""
        if isinstance(t, Tensor):
            alpha_bar_t = self.alphas_cumprod.to(t.device)[t]
            return torch.where(t < 0, 1.0, alpha_bar_t)[:, None, None]
        return self._alpha_bar[checked("t", t, int, low=-1, high=self.num_timesteps - 1)]

    def sigma(self, t: int) -> float:
        """Return the noise std of x_t / sqrt(ᾱ_t) in data units: 0.5·sqrt((1 - ᾱ_t)/ᾱ_t)."""
        return self._sigma[t]

    def timestep_at(self, sigma: float) -> int:
        """Return the t whose `sigma(t)` is nearest to `sigma` by ratio."""
        T = self.num_timesteps
        above = bisect_left(self._sigma, sigma, hi=T - 1)
        below = max(above - 1, 0)
        return above if sigma**2 > self.sigma(above) * self.sigma(below) else below

    def timestep_pairs(
        self, num_inference_steps: int, start_t: int | None = None
    ) -> list[tuple[int, int]]:
        """Return the N steps as (t, t_prev), strictly decreasing, the last t_prev = -1.

        The first t is start_t, by default the noisiest of the spacing; N is in [1, start_t + 1].
        """
        T = self.num_timesteps
        if start_t is not None:
            T = checked("start_t", start_t, int, low=0, high=T - 1) + 1
        N = checked("num_inference_steps", num_inference_steps, int, low=1, high=T)
        if self.spacing == "trailing":
            ts = [T * (N - i) // N - 1 for i in range(N)]
        elif self.spacing == "linspace":
            ts = [round((T - 1) * (1 - i / max(N - 1, 1))) for i in range(N)]
        else:
            high = min(self.sigma_max * max(N, 10) / 10, self.sigma(T - 1))
            low = min(CURVES_BELOW if self.curve_steps else self.sigma_min, 0.1 * high)
            sigmas = [high * (low / high) ** (i / max(N - 1, 1)) for i in range(N)]
            ts = [self.timestep_at(sigma) for sigma in sigmas]
        if start_t is not None:
            ts[0] = T - 1
        # Rounding may collide at many steps: make it strictly decreasing within [0, T).
        ts[0] = max(ts[0], N - 1)
        for i in range(1, N):
            ts[i] = max(min(ts[i], ts[i - 1] - 1), N - 1 - i)
        return list(zip(ts, [*ts[1:], -1], strict=True))

    def add_noise(
        self, x_0: Tensor, t: Index, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x_t = sqrt(ᾱ_t)·x_0 + sqrt(1 - ᾱ_t)·eps, and eps (DDPM eq. 4).

        x_0 is (B, L, C), model units; t in [-1, T), an int or (B,) int64; noise is eps, like x_0,
        drawn if None.
        """
        eps = torch.randn_like(x_0) if noise is None else noise
        alpha_bar_t = self.alpha_bar(t)
        return alpha_bar_t**0.5 * x_0 + (1 - alpha_bar_t) ** 0.5 * eps, eps

    def target(self, x_0: Tensor, eps: Tensor, t: Index) -> Tensor:
        """Return what the model should output at t, (B, L, C), by `prediction_type`."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "x0":
            return x_0
        alpha_bar_t = self.alpha_bar(t)
        return alpha_bar_t**0.5 * eps - (1 - alpha_bar_t) ** 0.5 * x_0

    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Index, *, clip: bool = True) -> Tensor:
        """Turn the model's output at (x_t, t) into x_0_pred, clipped if `clip_sample`."""
        alpha_bar_t = self.alpha_bar(t)
        tensors.check_output(output, x_t)
        if self.prediction_type == "epsilon":
            x_0_pred = (x_t - (1 - alpha_bar_t) ** 0.5 * output) / alpha_bar_t**0.5
        elif self.prediction_type == "v":
            x_0_pred = alpha_bar_t**0.5 * x_t - (1 - alpha_bar_t) ** 0.5 * output
        else:
            x_0_pred = output
        return x_0_pred.clamp(-1, 1) if clip and self.clip_sample else x_0_pred

    def eps_from_x_0(self, x_0_pred: Tensor, x_t: Tensor, t: Index) -> Tensor:
        """Return the noise that leads from x_0_pred to x_t; so the two always agree."""
        alpha_bar_t = self.alpha_bar(t)
        return (x_t - alpha_bar_t**0.5 * x_0_pred) / (1 - alpha_bar_t) ** 0.5

    def step(
        self,
        x_0_pred: Tensor,
        x_t: Tensor,
        t: Index,
        t_prev: Index,
        *,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One reverse step x_t → x_prev (DDIM eq. 12 and 16).

            x_prev = sqrt(ᾱ_prev)·x_0_pred + sqrt(1 - ᾱ_prev - σ²)·eps_pred + σ·z
            eps_pred = (x_t - sqrt(ᾱ_t)·x_0_pred)/sqrt(1 - ᾱ_t)
            σ = eta·sqrt((1 - ᾱ_prev)/(1 - ᾱ_t))·sqrt(1 - ᾱ_t/ᾱ_prev)

        Args:
            x_0_pred: estimate of x_0, (B, L, C), model units; x_t and the result likewise.
            x_t: noisy actions.
            t: current index in [0, T), an int or (B,) int64.
            t_prev: target index in [-1, t), likewise; -1 lands on x_0.
            eta: 0 = deterministic, 1 = the variance of the DDPM posterior.
            generator: source of z, see `draw_eps`.
        """
        eta = checked("eta", eta, float, low=0, high=1)
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        variance = eta**2 * variance  # σ², eq. 16
        eps_pred = self.eps_from_x_0(x_0_pred, x_t, t)
        # abs: 1 - ᾱ_prev >= σ², but rounding may put their difference just below 0
        direction = abs(1 - alpha_bar_prev - variance) ** 0.5 * eps_pred  # that points to x_t
        x_prev = alpha_bar_prev**0.5 * x_0_pred + direction  # eq. 12
        if eta > 0:
            z = tensors.draw_eps(x_t.shape, x_t.device, generator, x_t.dtype)
            x_prev = x_prev + variance**0.5 * z
        return x_prev

    def ddim_step(
        self, model: Model, x_t: Tensor, t: Tensor, t_prev: Tensor, eta: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Run `model(x_t, t)`, take one `step`; return x_prev, x_0_pred, (B, L, C), model units."""
        with tensors.eval_mode(model):
            x_0_pred = self.predict_x_0(model(x_t, t), x_t, t)
            return self.step(x_0_pred, x_t, t, t_prev, eta=eta), x_0_pred

    def sample(
        self,
        model: Model,
        shape: tuple[int, ...],
        device: str | torch.device,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        *,
        sampler: str = "ddim",
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        x_T: Tensor | None = None,
        start_t: int | None = None,
        generator: torch.Generator | None = None,
        cost_fn: Callable[[Tensor], Tensor] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Denoise in N steps: noise → x_0, (B, L, C), data units.

        Args:
            model: `model(x_t, t)`, with known frames `model(x_t, t, known, known_mask)`.
            shape: (B, L, C).
            device: where the model lives.
            num_inference_steps: N, in [1, T].
            eta: 0 = deterministic, 1 = DDPM variance.
            sampler: "ddim"; "dpmpp", DPM-Solver++(2M), arXiv:2211.01095, its SDE variant at eta 1.
            known: (B, L, C), data units; read only where the mask is set.
            known_mask: (B, L) bool; these frames are given and come back unchanged.
            x_T: the start, (B, L, C), model units: noise, or x_t at t = start_t.
            start_t: the index to start from; None = the noisiest of the spacing.
            generator: source of x_T and of z, see `draw_eps`.
            cost_fn: maps x_0_pred (B, L, C), data units, to costs (B,); see `apply_guidance`.
            guidance_scale: data units that x_0_pred moves per unit of the cost's gradient.

        UserError for a bad argument, FloatingPointError for a sample that is not finite.
        """
        check_choice("sampler", sampler, SAMPLERS)
        x_t, *given = tensors.given_tensors(model, shape, device, generator, x_T, known, known_mask)
        pairs = self.timestep_pairs(num_inference_steps, start_t)
        x_0_last: Any = None  # of the step before
        t_last: int | None = None
        with torch.inference_mode(cost_fn is None), tensors.eval_mode(model):  # a tenth faster
            if given:
                given[0] = to_model_units(given[0])
            ts = torch.tensor(pairs).to(device, non_blocking=True)[:, :1].expand(-1, len(x_t))
            for (t, t_prev), t_batch in zip(pairs, ts, strict=True):
                walk = draw_walk(self.curve_steps if t_prev < 0 else 0, eta, x_t, generator)
                x_0_pred = self.predict_x_0(model(x_t, t_batch, *given, **walk), x_t, t)
                if cost_fn is not None:
                    x_0_pred = self.apply_guidance(x_0_pred, cost_fn, guidance_scale)
                if given:
                    x_0_pred = torch.where(given[1][..., None], given[0], x_0_pred)
                beyond = self.extrapolation(t, t_prev, t_last) if sampler == "dpmpp" else 0.0
                aim = torch.lerp(x_0_last, x_0_pred, 1 + beyond) if beyond else x_0_pred
                x_0_last, t_last = x_0_pred, t
                x_t = self.step(aim, x_t, t, t_prev, eta=eta, generator=generator)
            tensors.require_finite(x_t, "the sample is not finite: did the training diverge?")
        return to_data_units(x_t)

    def extrapolation(self, t: int, t_prev: int, t_last: int | None) -> float:
        """Return 1/2r, r = h_last/h in log sigma, of 2M, D = x_0_pred + (x_0_pred - x_0_last)/2r.

        0 = first order: of the first step, of the last, and below `lower_order_below`.
        """
        if t_last is None or t_prev < 0 or self.sigma(t) < self.lower_order_below:
            return 0.0
        h, h_last = (math.log(self.sigma(a) / self.sigma(b)) for a, b in ((t, t_prev), (t_last, t)))
        return h / (2 * h_last)

    def apply_guidance(self, x_0_pred: Tensor, cost_fn: Any, scale: float) -> Tensor:
        """Move x_0_pred down the gradient of its cost, which does not pass through the model."""
        actions = to_data_units(x_0_pred).detach()
        scale = checked("guidance_scale", scale, float)
        moved = to_model_units(actions - scale * tensors.cost_gradient(cost_fn, actions))
        return moved.clamp(-1, 1) if self.clip_sample else moved

    def invert(
        self,
        model: Model,
        x_0: Tensor,
        num_inference_steps: int = 50,
        *,
        start_t: int = -1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Encode x_0 as the noise from which `sample` leads back to it (DDIM sec. 4.3, eta 0).

        The N pairs of `sample` in reverse; eps is evaluated at the index stepped to, unclipped.
        x_0 is (B, L, C), data units; the result, x_T, likewise, in model units. With a start_t
        above -1, x_0 is first noised to it (dequantised; `generator` as of `draw_eps`), and only
        the indices above it are stepped through.
        """
        x_0 = tensors.gestures(x_0, model=model)
        eps = tensors.draw_eps(x_0.shape, x_0.device, generator).to(x_0)
        x_t, now = self.add_noise(to_model_units(x_0), start_t, eps)[0], start_t
        with tensors.eval_mode(model):
            for t, _ in reversed(self.timestep_pairs(num_inference_steps)):
                if t <= now:
                    continue
                eps_pred = output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
                if self.prediction_type != "epsilon":
                    x_0_pred = self.predict_x_0(output, x_t, t, clip=False)
                    eps_pred = self.eps_from_x_0(x_0_pred, x_t, t)
                alpha_bar_now = self.alpha_bar(now)
                x_0_pred = (x_t - (1 - alpha_bar_now) ** 0.5 * eps_pred) / alpha_bar_now**0.5
                x_t, now = self.add_noise(x_0_pred, t, eps_pred)[0], t
        tensors.require_finite(x_t, "the latent is not finite: did the training diverge?")
        return x_t

    get_variance = staticmethod(mean_variance)  # the plan has it here


# ----------------------------------------------------------------------------------------
# MODEL — output(x_t, t | known frames)
# ----------------------------------------------------------------------------------------
# The plan's constructor builds the plan's transformer; each improvement is a named option.


class PositionalEncoding(nn.Module):
    """Add the sinusoidal encoding of each position (arXiv:1706.03762, sec. 3.5).

    Any width d_model, sequences of at most max_len.
    """

    def __init__(self, d_model: int, max_len: int = 300) -> None:
        super().__init__()
        i = torch.arange((d_model + 1) // 2)
        angle = torch.arange(max_len)[:, None] * torch.exp(-math.log(10000.0) * 2 * i / d_model)
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(angle)
        pe[0, :, 1::2] = torch.cos(angle)[:, : d_model // 2]
        self.pe = nn.Buffer(pe, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to the same, L at most max_len."""
        return x + self.pe[:, : x.shape[1]]


class TimestepEmbedding(nn.Module):
    """Embed t as sines and cosines of geometric frequencies: (B,) → (B, dim), any dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, half = dim, dim // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / max(half - 1, 1))
        self.frequency = nn.Buffer(frequency, persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (B,) int64 or float to (B, dim) float32; an odd dim ends in a zero."""
        angle = timesteps[:, None].float() * self.frequency
        return F.pad(torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1), (0, self.dim % 2))


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention, without dropout on its weights (4x slower on a CPU).

    With `rotary_tokens`, the length L, queries and keys are turned by angles that grow with their
    place (RoPE, arXiv:2104.09864, eq. 34), so that a product sees their distance alone; here from
    one radian a token down to one radian in all.
    """

    def __init__(self, d_model: int, nhead: int, rotary_tokens: int = 0) -> None:
        super().__init__()
        self.nhead, self.rotary_tokens, half = nhead, rotary_tokens, d_model // nhead // 2
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        if rotary_tokens:
            check_divides("2 * nhead, with rotary positions,", 2 * nhead, "d_model", d_model)
            frequency = rotary_tokens ** (-torch.arange(half) / max(half - 1, 1))
            angle = torch.arange(rotary_tokens)[:, None] * frequency
            self.cos = nn.Buffer(angle.cos().repeat(1, 2), persistent=False)
            self.sin = nn.Buffer(torch.cat([-angle.sin(), angle.sin()], dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.nhead, D // self.nhead).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, nhead, L, D/nhead)
        if self.rotary_tokens:
            qk = qkv[:2]
            swapped = qk.roll(D // self.nhead // 2, dims=-1)
            q, k = torch.addcmul(qk * self.cos, swapped, self.sin)
        if torch.is_autocast_enabled("cpu"):  # the fused one's backward is slow there in bf16
            h = (q * (D // self.nhead) ** -0.5 @ k.mT).softmax(dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)  # (B, nhead, L, D/nhead)
        return self.out(h.transpose(1, 2).reshape(B, L, D))


class PlanBlock(nn.Module):
    """The plan's encoder layer: post-norm, GELU. It does not use t_emb: t is already in x."""

    has_affine_norms = True

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, rotary_tokens: int = 0
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, nhead, rotary_tokens)
        self.norm_1 = nn.LayerNorm(d_model, elementwise_affine=self.has_affine_norms)
        self.norm_2 = nn.LayerNorm(d_model, elementwise_affine=self.has_affine_norms)
        self.up = nn.Linear(d_model, dim_feedforward)
        self.down = nn.Linear(dim_feedforward, d_model)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()  # whose call is cheaper

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        x = self.norm_1(x + self.dropout(self.attention(x)))
        h = self.down(self.dropout(F.gelu(self.up(x))))
        return self.norm_2(x + self.dropout(h))


class AdaLNBlock(PlanBlock):
    """DiT block: pre-norm, shifted, scaled and gated by t_emb (arXiv:2212.09748, fig. 3)."""

    has_affine_norms = False

    def __init__(self, d_model: int, *sizes: Any) -> None:
        super().__init__(d_model, *sizes)
        self.modulation = zero_init(nn.Linear(d_model, 6 * d_model))  # starts as the identity

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        """Map (B, L, D), t_emb (B, D), to (B, L, D)."""
        m = self.modulation(t_emb)[:, None].chunk(6, dim=-1)  # 6 x (B, 1, D)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = m
        h = self.attention(modulate(self.norm_1(x), shift_1, scale_1))
        x = torch.addcmul(x, gate_1, self.dropout(h))
        h = F.gelu(self.up(modulate(self.norm_2(x), shift_2, scale_2)))
        return torch.addcmul(x, gate_2, self.dropout(self.down(self.dropout(h))))


class Decisions(NamedTuple):
    """What a ContactHead takes for true; to be trained by cross-entropy, too, and in practice."""

    log_odds: Tensor  # of a press, (B, L)
    gates: Tensor  # log odds that a coefficient is not 0, (B, S, axes * degrees)
    member: Tensor  # 1 where a frame is of a contact, (B, L, S)
    basis: Tensor  # the shapes of the frame's contact there, (B, L, degrees)
    returns: Tensor  # log odds that a contact is where the one before was, (B, S - 1)
    practice: Tensor  # loss of the curves of x_0 at many noise levels, (B,); 0 = none


class ContactHead(nn.Module):
    """Read x_0 off the tokens and x_t: which frames are pressed, and each contact as one curve.

    Presses: every frame testifies by the likelihood of its noisy numbers, pressed against idle, and
    by its token; a chain of at most S contacts, which knows how many there are and how long they
    last, weighs all that together, so no contact falls apart or is lost.

    Curves: a contact is a run of frames with P(press) > 1/2; its x and y are polynomials of time or
    made of `shapes` that the training set has in common. In x_t their coefficients are those of x_0
    in noise of variance (1 - ᾱ_t)/n, n frames; a CurveDenoiser says what they are in x_0. So errors
    shrink with the noise, and none makes a curve shake. At the last step the likelier answers are
    taken for true: an average of two gestures is none. With a `walk` the presses are decided there,
    and curves go on to sigma_min by themselves: what is fine or rests is settled little by little.
    What samples in one step must be `decisive`: outside of training all is decided, at any noise.
    """

    SURE = 30.0  # log odds of a frame that is known; sums of more are rounded too far
    decisive = False

    def __init__(
        self, d_model: int, table: Tensor, patch_size: int, axes: int, S: int, levels: DDIMScheduler
    ) -> None:
        super().__init__()
        log_snr = [-2 * math.log(2 * levels.sigma(t)) for t in range(levels.num_timesteps)]
        self.log_snr = nn.Buffer(torch.tensor(log_snr, dtype=torch.float32), persistent=False)
        self.certain = (2 * 2 * levels.sigma_min) ** 2  # 1 - ᾱ_t at twice that sigma
        self.patch_size, self.max_contacts = patch_size, S
        Linear = tensors.WideLinear
        self.frames = zero_init(Linear(d_model, 3 * patch_size))  # log odds of a press, down, up
        self.frames.bias.data.view(patch_size, 3)[:, 1:] = -3  # changes are rare
        self.window = zero_init(Linear(d_model, S + 1))  # how many contacts
        self.chain = ContactChain(table.shape[1], S)
        self.place = zero_init(Linear(d_model, axes))  # x, y of the token if it is pressed
        self.curves = CurveDenoiser(d_model, axes, table.shape[2])
        self.shapes = table  # of curves: polynomials, or kept with the weights and learnt

    def forward(
        self,
        tokens: Tensor,
        x_t: Tensor,
        t: Tensor,
        known: Tensor | None,
        known_mask: Tensor | None,
        made_of: tuple[Any, ...] | None = None,
        walk: CurveWalk | None = None,
    ) -> tuple[Tensor, Decisions]:
        """Return x_0, (B, L, C), model units, and the decisions that it rests on.

        tokens is (B, L/patch_size, D), all else as the denoiser's, but none of half precision.
        """
        log_snr = self.log_snr[t, None, None].to(x_t.dtype)
        alpha_bar_t = torch.sigmoid(log_snr)
        place = self.place(tokens).repeat_interleave(self.patch_size, dim=1)  # (B, L, axes)
        own, down, up = self.frames(tokens).unflatten(2, (-1, 3)).flatten(1, 2).unbind(dim=2)
        own = own + press_evidence(x_t, place, alpha_bar_t).clamp(-self.SURE, self.SURE)
        if known is not None and known_mask is not None:
            own = torch.where(known_mask, self.SURE * known[..., -1], own)
        is_sure = walk is not None or (self.decisive and not self.training)
        log_odds = self.chain(own, down, up, self.window(tokens.mean(dim=1)), is_sure)
        split = split_contacts(log_odds > 0, self.shapes, self.max_contacts)
        member, basis = (x.to(x_t.dtype) for x in split)

        mean = mean_over(member)  # (B, S, L)
        c_t = coefficients(mean, basis, x_t[..., :-1])
        of_contact = mean.unflatten(2, (-1, self.patch_size)).sum(dim=3) @ tokens
        n = member.sum(dim=1)[..., None]
        decided_below = 2.0 if is_sure and not walk else self.certain
        asked = c_t, of_contact, log_snr, n, decided_below, known_mask
        c, gates, returns = self.curves.walk(*asked, by=walk)

        xy = curves_at(c, member, basis) + place * (1 - member.sum(dim=2, keepdim=True))
        if known is not None and known_mask is not None:
            xy = meet_known(xy, known, known_mask)
        probability = torch.sigmoid(log_odds)[..., None]
        if is_sure:
            probability = (probability > 0.5).to(xy.dtype)
        x_0 = torch.cat([probability * (xy + 1), 2 * probability], dim=-1) - 1  # zero while idle
        practice = self.practise(t, *made_of) if made_of else torch.zeros_like(log_odds[:, 0])
        return x_0, Decisions(log_odds, gates, member, basis, returns, practice)

    def practise(
        self, t: Tensor, x_0: Tensor, eps: Tensor, lessons: CurveLessons | None = None
    ) -> Tensor:
        """Return the loss of the curves of x_0, (B, L, C), model units, at many noise levels.

        Of a decisive head, whose answers are no means, that of its lessons at t.
        """
        if lessons is not None:
            return self.curves.learn(lessons, self.log_snr[t], self.certain)
        if self.decisive:
            return torch.zeros_like(x_0[:, 0, 0])
        member, basis = split_contacts(x_0[..., -1] > 0, self.shapes, self.max_contacts)
        c_0 = coefficients(mean_over(member.to(x_0.dtype)), basis, x_0[..., :-1])
        n = member.sum(dim=1)[..., None]
        return self.curves.practise(c_0, n, eps[..., :-1], t, self.log_snr, self.certain)


class MinimalDiffusionTransformer(nn.Module):
    """The denoiser: a small bidirectional transformer over the frames of a gesture.

    Options are those of TrainConfig, but for action_dim, C, and max_timesteps, T. beta_schedule and
    sigma_min are the scheduler's, read with `contacts` only. The attention weights have no dropout.

    With `contacts`, to predict x_0 of gestures that are zero while idle, its output is that of a
    ContactHead, else linear in the tokens.
    """

    def __init__(
        self,
        action_dim: int = ACTION_DIM,
        seq_len: int = SEQ_LEN,
        d_model: int = 128,
        nhead: int = 4,
        num_layers: int = 4,
        dim_feedforward: int = 256,
        dropout: float = 0.1,
        max_timesteps: int = 1000,
        *,
        patch_size: int = 1,
        adaln: bool = False,
        rotary: bool = False,
        contacts: bool = False,
        max_contacts: int = 3,
        shapes: int = 0,
        decisive: bool = False,
        beta_schedule: str = "linear",
        sigma_min: float = 0.005,
        known_frames: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.options = options_of(locals())
        check_divides("nhead", nhead, "d_model", d_model)
        check_divides("patch_size", patch_size, "seq_len", seq_len)
        self.action_dim, self.seq_len, self.d_model = action_dim, seq_len, d_model
        self.max_timesteps, self.patch_size, self.contacts = max_timesteps, patch_size, contacts
        self.adaln, self.rotary, self.known_frames = adaln, rotary, known_frames
        in_channels = action_dim + (2 * action_dim + 3 if known_frames else 0)
        self.action_embedding = nn.Linear(in_channels * patch_size, d_model)
        tokens = seq_len // patch_size
        self.pos_encoder = nn.Identity() if rotary else PositionalEncoding(d_model, tokens)
        self.timestep_embedding = TimestepEmbedding(d_model)
        self.layer_norm = nn.LayerNorm(d_model, elementwise_affine=not adaln)
        block, rotary_tokens = AdaLNBlock if adaln else PlanBlock, tokens if rotary else 0
        sizes = d_model, nhead, dim_feedforward, dropout, rotary_tokens
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(num_layers))
        if contacts:
            levels = DDIMScheduler(max_timesteps, beta_schedule=beta_schedule, sigma_min=sigma_min)
            table = nn.Buffer(legendre_table(seq_len, shapes or POLYNOMIALS), persistent=shapes > 0)
            shape = d_model, table, patch_size, action_dim - 1, max_contacts
            head: Any = ContactHead(*shape, levels)
            head.decisive = decisive
            head.curves.by_noise_alone = decisive and max_contacts == 1 and not context_dim
        else:
            head = nn.Linear(d_model, action_dim * patch_size)
        self.output_projection = zero_init(head) if adaln and not contacts else head
        if adaln:
            self.output_modulation = zero_init(nn.Linear(d_model, 2 * d_model))
            self.timestep_mlp = nn.Sequential(
                nn.Linear(d_model, d_model), nn.SiLU(), nn.Linear(d_model, d_model)
            )
        else:
            self.timestep_mlp = nn.Sequential()  # t enters as it is embedded
        self.context_mlp = None
        if context_dim:  # at first, no context changes anything
            down = zero_init(nn.Linear(4 * d_model, d_model))
            self.context_mlp = nn.Sequential(nn.Linear(context_dim, 4 * d_model), nn.SiLU(), down)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        made_of: tuple[Any, ...] | None = None,
        walk: CurveWalk | None = None,
    ) -> Any:
        """Predict eps, v or x_0 (the scheduler's prediction_type) at (x_t, t): (B, L, C).

        Args:
            x_t: noisy actions, (B, L, C), model units.
            t: diffusion index, (B,) int64 in [0, T).
            known: (B, L, C), model units; read only where the mask is set.
            known_mask: (B, L) bool; None = nothing is known.
            context: (B, context_dim); None, or a row of zeros, = no goal.
            made_of: x_0, model units, and eps of x_t, perhaps CurveLessons: also return the
                Decisions, to be trained; with `contacts`.
            walk: of curves, in the last step of a sample, see ContactHead.
        """
        tensors.check_inputs(self, x_t, known, context)
        B, L, C = x_t.shape
        x = x_t
        if known is not None and known_mask is not None:
            x = torch.cat([x_t, nearest_known(known, known_mask)], dim=-1)
        elif self.known_frames:
            x = F.pad(x_t, (0, 2 * C + 3))  # what nearest_known says of an empty mask

        x = x.reshape(B, L // self.patch_size, self.patch_size * x.shape[-1])  # (B, tokens, ...)
        x = self.pos_encoder(self.action_embedding(x))  # (B, tokens, D)
        t_emb = self.timestep_mlp(self.timestep_embedding(t).to(x_t.dtype))  # (B, D)
        if context is not None and self.context_mlp is not None:  # a row of zeros adds nothing
            given = (context != 0).any(dim=1, keepdim=True)
            t_emb = t_emb + self.context_mlp(context) * given
        if self.adaln:
            t_emb = F.silu(t_emb)
        else:
            x = self.layer_norm(x + t_emb[:, None])
        for block in self.blocks:
            x = block(x, t_emb)  # (B, tokens, D)
        if self.adaln:
            shift, scale = self.output_modulation(t_emb)[:, None].chunk(2, dim=-1)
            x = modulate(self.layer_norm(x), shift, scale)
        if not self.contacts:
            return self.output_projection(x).reshape(B, L, C)
        wide = torch.promote_types(x_t.dtype, torch.float32)  # contacts need it
        with tensors.full_precision(x_t):
            more = known, known_mask, made_of, walk
            output, decisions = self.output_projection(x.to(wide), x_t.to(wide), t, *more)
        output = output.to(x_t.dtype)
        return output if made_of is None else (output, decisions)


def build_model(config: TrainConfig) -> MinimalDiffusionTransformer:
    """Build the denoiser that `config` describes, float32."""
    options = knobs_of(MinimalDiffusionTransformer, config)
    options.setdefault("patch_size", patch_size_for(config.seq_len))
    options["dim_feedforward"] = config.dim_feedforward or 4 * config.d_model
    with memory_named("the model", "--d_model, --num_layers or --dim_feedforward"):
        return MinimalDiffusionTransformer(max_timesteps=config.num_timesteps, **options).float()


def build_scheduler(config: TrainConfig) -> DDIMScheduler:
    """Build the scheduler that `config` describes."""
    return DDIMScheduler(**knobs_of(DDIMScheduler, config))


def load_model(
    path: str | Path, device: str | torch.device = "cpu", *, ema: bool = True
) -> tuple[MinimalDiffusionTransformer, DDIMScheduler, TrainConfig]:
    """Load the denoiser of a checkpoint, or a run folder's newest, with its scheduler and config.

    In eval mode; with the averaged weights, or without `ema` the raw ones.
    """
    content, device = load_checkpoint(path), tensors.as_device(device)
    config = config_of(content, TrainConfig)
    model = build_model(config)
    with fitting(content["path"]):
        model.load_state_dict(content["ema_state_dict" if ema else "model_state_dict"])
    model.eval().requires_grad_(False)
    return model.to(device), build_scheduler(config).to(device), config


# ----------------------------------------------------------------------------------------
# KNOWN FRAMES — what is given of x_0
# ----------------------------------------------------------------------------------------
# The strategies, and how often training follows each, are in trainlib/known.py.


def draw_known_mask(x_0: Tensor, known_share: float) -> tuple[Tensor, Tensor]:
    """Draw for each gesture what training gives of it: (B, L) bool, and the strategy, (B,) int64.

    Strategy 0 is nothing, i the i-th of KNOWN_STRATEGIES.
    """
    masks = [torch.zeros_like(x_0[..., 2], dtype=torch.bool)]
    masks += [strategy(x_0) for strategy, _ in KNOWN_STRATEGIES.values()]
    shares = [known_share * share for _, share in KNOWN_STRATEGIES.values()]
    weights = torch.tensor([1 - known_share, *shares]).to(x_0.device, non_blocking=True)
    drawn = torch.multinomial(weights, len(x_0), replacement=True)
    return torch.stack(masks)[drawn, torch.arange(len(x_0), device=x_0.device)], drawn


# ----------------------------------------------------------------------------------------
# VALIDATION — the protocols that the loop runs
# ----------------------------------------------------------------------------------------
# keyframes: from pure noise, given only the press edges of x_0. denoise: from x_0 noised to
# sigma, in one step. generate: from pure noise, given nothing. The noise is always the same.

DENOISE_SIGMAS = (0.2, 0.4, 0.7)  # noise std in data units
NOISE_BANK_SEED = 20210503


def noise_bank(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the same standard normal numbers for every run, model and device; on the CPU."""
    return tensors.draw_eps(tuple(shape), "cpu", torch.Generator().manual_seed(NOISE_BANK_SEED))


def takes_known_frames(model: Any) -> bool:
    """Tell whether a denoiser, perhaps wrapped for several processes, accepts known frames."""
    return bool(getattr(getattr(model, "module", model), "known_frames", False))


def generate(
    model: nn.Module,
    scheduler: DDIMScheduler,
    shape: tuple[int, ...],
    num_inference_steps: int = 10,
    *,
    seed: int = 0,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    x_T: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Sample gestures (B, L, C), data units, in batches; they are not rounded (see `to_gesture`).

    All noise is of `seed`, the same on every device, or starts at x_T, (B, L, C), model units.
    `known`, `known_mask` and further options are those of `DDIMScheduler.sample`.
    """
    generator = torch.Generator().manual_seed(checked("seed", seed, int, low=0))
    start = model, shape, tensors.device_of(model, x_T), generator
    all_given = tensors.given_tensors(*start, x_T, known, known_mask)

    def sample(x_T: Tensor, known: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"known": known, "known_mask": mask, "generator": generator}
        shape, N = tuple(x_T.shape), num_inference_steps
        return scheduler.sample(model, shape, x_T.device, N, x_T=x_T, **given, **options)

    return tensors.in_batches(sample, *all_given)


def recreate(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    num_inference_steps: int = 10,
    **options: Any,
) -> Tensor:
    """Recreate gestures x_0, (B, L, C), data units, by the keyframes protocol; see `generate`.

    A model without known frames starts instead from x_0 noised to sigma = 0.4, so that its
    recreations, too, are paired with their originals.
    """
    x_0 = tensors.gestures(x_0, model=model)
    x_T = noise_bank(x_0.shape).to(x_0)
    start: dict[str, Any] = {"known": x_0, "known_mask": press_edges(x_0)}
    if not takes_known_frames(model):
        start = {"start_t": scheduler.timestep_at(0.4)}
        x_T, _ = scheduler.add_noise(to_model_units(x_0), start["start_t"], x_T)
    start |= {"x_T": x_T, "seed": NOISE_BANK_SEED + 1}  # the seed of z, if eta > 0
    return generate(model, scheduler, x_0.shape, num_inference_steps, **start, **options)


def denoise_one_shot(model: Model, scheduler: DDIMScheduler, x_0: Tensor, sigma: float) -> Tensor:
    """Noise x_0 to `sigma` (data units), predict it in one step; (B, L, C), data units."""
    t, x_0 = scheduler.timestep_at(sigma), tensors.gestures(x_0, model=model)

    def predict(x: Tensor, eps: Tensor) -> Tensor:
        x_t, _ = scheduler.add_noise(to_model_units(x), t, eps)
        output = model(x_t, torch.full((len(x),), t, device=x.device))
        return to_data_units(scheduler.predict_x_0(output, x_t, t))

    with tensors.eval_mode(model):
        return tensors.in_batches(predict, x_0, noise_bank(x_0.shape).to(x_0))


def validation_loss(model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor) -> float:
    """Return the unweighted, unconditional training loss at fixed noise and evenly spread t."""
    x_0 = tensors.gestures(x_0, model=model)
    B, T = len(x_0), scheduler.num_timesteps
    t = (torch.arange(B, device=x_0.device) * T + T // 2) // B
    x, eps = to_model_units(x_0), noise_bank(x_0.shape).to(x_0)
    x_t, _ = scheduler.add_noise(x, t, eps)
    with tensors.eval_mode(model):
        return F.mse_loss(tensors.in_batches(model, x_t, t), scheduler.target(x, eps, t)).item()


def validate(
    model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, sampling: dict[str, Any]
) -> tuple[dict[str, float], Tensor]:
    """Score the keyframes and denoise protocols on x_0, (B, L, C), data units.

    Returns the scores, without prefix, and the recreations, like x_0.
    """
    x_0 = tensors.gestures(x_0, model=model)
    seconds = process.timer(x_0.device)
    recreated = recreate(model, scheduler, x_0, **sampling)
    scores = {"time_per_sample": seconds() / len(x_0)}
    scored = has_press_edge(x_0)  # the others give the model nothing to go by
    scores["sequences_without_edge"] = float((~scored).sum())
    if scored.any():
        scores |= compute_reconstruction_metrics(x_0[scored], recreated[scored], scheduler)
        scores |= gesture_metrics(x_0[scored], recreated[scored])
        scores["shake"] = median_shake(recreated[scored].cpu())
    scores["loss"] = validation_loss(model, scheduler, x_0)
    for sigma in DENOISE_SIGMAS:
        mse = F.mse_loss(denoise_one_shot(model, scheduler, x_0, sigma), x_0).item()
        scores[f"denoise_mse_sigma_{sigma}"] = mse
    remaining = max(scores[f"denoise_mse_sigma_{DENOISE_SIGMAS[1]}"], FLOOR)
    scores["noise_reduction"] = 10 * math.log10(DENOISE_SIGMAS[1] ** 2 / remaining)
    return scores, recreated


def comprehensive_evaluation(
    model: nn.Module,
    scheduler: DDIMScheduler,
    test_loader: DataLoader,
    device: str | torch.device,
    num_inference_steps: int = 10,
) -> dict[str, float]:
    """Recreate the gestures of any loader, (L, C), data units, in N steps; score them one by one.

    Returns `{name}_mean` and `{name}_std` over gestures for reconstruction_quality (MSE),
    action_timing_accuracy (IoU), spatial_accuracy and gesture_type_preservation.
    """
    x_0 = all_sequences(test_loader).to(tensors.as_device(device))
    x_0 = x_0[has_press_edge(x_0)]  # the others give the model nothing to go by
    if len(x_0) == 0:
        raise UserError("no gesture of the test set has a press edge; nothing can be recreated")
    return recreation_summary(x_0, recreate(model, scheduler, x_0, num_inference_steps))


# ----------------------------------------------------------------------------------------
# TRAINING
# ----------------------------------------------------------------------------------------
# Learning rate, data order and every random draw are pure functions of (seed, epoch, step), so
# a resumed run repeats the uninterrupted one without any saved random state.

GRAD_CLIP = 1.0  # largest gradient norm
NUM_T_BINS = 20  # of t, in which the loss is balanced
DECISION_WEIGHT = 2.0  # of their cross-entropy, beside the squared error
NUM_TASKS = (1 + len(KNOWN_STRATEGIES)) * NUM_T_BINS
LESSON_STEPS = 20  # in which a teacher makes a gesture of noise
CONTEXT_DROPOUT = 0.1  # share of a batch that sees no context
VAL_SEQUENCES = 64  # gestures validated each epoch; all at the end
FIGURE_EVERY = 10  # epochs between figures


class Drawn(NamedTuple):
    """All that a training step draws for a batch of gestures; its loss is a function of it."""

    t: Tensor  # (B,) int64 in [0, T)
    eps: Tensor  # (B, L, C), N(0, 1)
    known_mask: Tensor  # (B, L) bool, the frames that are given
    task: Tensor  # (B,) int64 in [0, NUM_TASKS): known-frame strategy and bin of t
    context: Tensor | None  # (B, D_context); a row of zeros is no goal
    curves: CurveLessons | None = None  # for a student


def draw(x_0: Tensor, T: int, known_share: float, context: Tensor | None = None) -> Drawn:
    """Draw t, noise, known frames, and which contexts are dropped, for gestures (B, L, C)."""
    B, device = len(x_0), x_0.device
    # one t per stratum of T/B: less variance than independent draws
    u = (torch.randperm(B, device=device) + torch.rand(B, device=device)) / B
    t = (u * T).long().clamp(max=T - 1)
    eps = torch.randn_like(x_0)
    known_mask, strategy = draw_known_mask(x_0, known_share)
    if context is not None:
        context = context * (torch.rand(B, 1, device=device) >= CONTEXT_DROPOUT)
    return Drawn(t, eps, known_mask, strategy * NUM_T_BINS + NUM_T_BINS * t // T, context)


def draw_lessons(
    teacher: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, drawn: Drawn, seed: int = 0
) -> tuple[Tensor, Drawn]:
    """Let a trained denoiser make a gesture of all noise drawn: one is a function of the other.

    It knows the frames and goals that were drawn for gestures x_0, (N, L, C), data units. Returns
    what it made, likewise, and for `drawn` the t where it began and the eps with which `add_noise`
    leads from a gesture to its noise there, and below along the straight path between the two
    (arXiv:2101.02388 for the pairs, 2209.03003 for the path).
    """

    def make(x_T: Tensor, known: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"known": known, "known_mask": mask} if mask.any() else {}
        start = partial(teacher, context=context), tuple(x_T.shape), x_T.device, LESSON_STEPS
        return to_gesture(scheduler.sample(*start, sampler="dpmpp", x_T=x_T, **given))

    goals = [] if drawn.context is None else [drawn.context]
    made = tensors.in_batches(make, drawn.eps, x_0, drawn.known_mask, *goals)
    made, curves = curve_lessons(teacher, scheduler, LESSON_STEPS, made, drawn, seed)
    start_t, _ = scheduler.timestep_pairs(LESSON_STEPS)[0]
    eps = scheduler.eps_from_x_0(to_model_units(made), drawn.eps, start_t)
    return made, drawn._replace(t=torch.full_like(drawn.t, start_t), eps=eps, curves=curves)


def draw_lesson(lessons: Drawn, rows: Tensor, T: int, seed: int) -> Drawn:
    """Take rows of `draw_lessons`, half at the t where the teacher began, half below it."""
    generator = torch.Generator().manual_seed(seed)
    u, is_start = torch.rand(2, len(rows), generator=generator).to(rows.device)
    t = torch.where(is_start < 0.5, lessons.t[rows], (u * lessons.t[rows]).long())
    task = lessons.task[rows] // NUM_T_BINS * NUM_T_BINS + NUM_T_BINS * t // T
    goals = None if lessons.context is None else lessons.context[rows]
    curves = lessons.curves and lessons.curves.at(rows)
    return Drawn(t, lessons.eps[rows], lessons.known_mask[rows], task, goals, curves)


def per_sample_loss(
    scheduler: DDIMScheduler, output: Tensor, x_0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Return the mean squared error of a model's output at x_t, (B,); x_0 in data units."""
    target = scheduler.target(to_model_units(x_0), eps, t)
    return (output.float() - target).square().mean(dim=(1, 2))


def decision_loss(decisions: Decisions, x_0: Tensor) -> Tensor:
    """Score decisions by their cross-entropy, in nats; (B,). x_0 is (B, L, C), data units.

    Of presses, mean over frames; of which coefficients of x_0 are not 0, mean over axes and over
    the contacts that are pressed throughout, summed over degrees; and of which such contacts return
    to where the one before was, summed.
    """
    log_odds, gates, member, basis, returns, _ = decisions
    pressed, entropy = (x_0[..., 2] > PRESSED).to(gates.dtype), F.binary_cross_entropy_with_logits
    press = entropy(log_odds, pressed, reduction="none").mean(dim=1)
    mean, axes = mean_over(member), ACTION_DIM - 1
    c_0 = coefficients(mean, basis, x_0[..., :axes])
    moves, again = (x.to(gates.dtype) for x in (c_0.abs() > STILL, returned(c_0, axes)))
    motion = entropy(gates, moves, reduction="none").sum(dim=2) / axes  # (B, S)
    right = ((mean @ pressed[..., None])[..., 0] > 0.999).to(gates.dtype)
    back = entropy(returns, again, reduction="none") * right[:, 1:] * right[:, :-1]
    return press + (motion * right).sum(dim=1) / right.sum(dim=1).clamp(min=1) + back.sum(dim=1)


def balanced_weight(task_loss: Tensor, loss: Tensor, task: Tensor) -> Tensor:
    """Weigh each gesture by the inverse running loss of its task, and update that; (B,).

    The irreducible loss differs a hundredfold between noise levels, and given known frames it
    vanishes; unweighted, the noise of the largest drowns the rest. Tasks of equal size are EDM2's
    uncertainty weighting (arXiv:2312.02696) with a table in place of its network.
    """
    count = torch.zeros_like(task_loss).index_add_(0, task, torch.ones_like(loss))
    mean = torch.zeros_like(task_loss).index_add_(0, task, loss) / count.clamp(min=1)
    task_loss.lerp_(mean, 0.02 * (count > 0).float())
    return 1 / (task_loss[task] + 1e-6)


def train_step(
    state: TrainState, x_0: Tensor, context: Tensor | None = None, drawn: Drawn | None = None
) -> dict[str, Any]:
    """Do one step on a batch: data → t → x_t → output → loss → update; return scalars to log.

    x_0 (B, L, C), data units, and the goals `context` (B, D_context) are the whole batch, and so is
    what is drawn (or `drawn` in its place); each process then takes its rows. FloatingPointError
    if loss or gradient is not finite; the weights are then untouched.
    """
    config, scheduler, B = state.config, state.scheduler, len(x_0)
    torch.manual_seed(state.step_seed)
    if config.augment:
        x_0 = augment(x_0)
    drawn = drawn or draw(x_0, scheduler.num_timesteps, config.known_share, context)
    rows = process.own_rows()
    x_0, t, eps = x_0[rows], drawn.t[rows], drawn.eps[rows]

    x_t, _ = scheduler.add_noise(to_model_units(x_0), t, eps)
    given: dict[str, Any] = {}
    if takes_known_frames(state.model):
        given = {"known": to_model_units(x_0), "known_mask": drawn.known_mask[rows]}
    if drawn.context is not None:
        given["context"] = drawn.context[rows]
    if config.contacts:
        given["made_of"] = to_model_units(x_0), eps, drawn.curves and drawn.curves.at(rows)
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=config.amp):
        output = state.forward(x_t, t, **given)
    output, decisions = output if config.contacts else (output, None)
    loss = per_sample_loss(scheduler, output, x_0, eps, t)
    entropy = practice = torch.zeros_like(loss)
    if decisions is not None:
        entropy, practice = decision_loss(decisions, x_0), decisions.practice
    losses = process.gather_rows(loss.detach(), B)  # of the whole batch
    weight = torch.ones_like(losses)
    if config.balance_loss:
        weight = balanced_weight(state.task_loss, losses, drawn.task)
    total = (weight[rows] * loss + DECISION_WEIGHT * entropy + practice).sum()
    total = total * process.process_rank()[1] / B

    state.model.zero_grad(set_to_none=True)
    total.backward()  # processes average their gradients
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), GRAD_CLIP)
    mean_loss, lr = losses.mean(), lr_at(state.step, state.total_steps, config.lr)
    if not torch.isfinite(mean_loss + grad_norm):
        found = f"loss {mean_loss:g}, gradient norm {grad_norm:g}"
        raise FloatingPointError(f"{found} at step {state.step}, lr {lr:g}; lower --lr")
    state.update(lr)
    scalars = {"train/loss": mean_loss, "train/grad_norm": grad_norm, "train/lr": lr}
    return scalars | ({"train/decision_loss": entropy.detach().mean()} if config.contacts else {})


def validate_epoch(
    state: TrainState, x_val: Tensor, log: NullLogger, scalars: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Validate the EMA weights on a subset; log, print one line; return it and its recreations."""
    config, seconds = state.config, process.timer()
    x_0 = x_val[:: max(1, len(x_val) // VAL_SEQUENCES)][:VAL_SEQUENCES]
    scores, recreated = validate(state.ema, state.scheduler, x_0, config.sampling)
    scalars |= {"val/epoch": state.epoch - 1, "val/epoch_s": seconds()}
    scalars |= tensors.model_diagnostics(state.ema, to_model_units(x_0)) | log_keys("val", scores)
    log.scalars(state.step, scalars)
    say(epoch_line(state.epoch, config.num_epochs, scalars))
    return x_0, recreated


def train_epochs(
    state: TrainState,
    x_train: Tensor,
    x_val: Tensor,
    context: Tensor | None,
    log: NullLogger,
    lessons: Drawn | None = None,
) -> None:
    """Train from where the run stands to its end, validating the EMA weights every epoch."""
    config, T = state.config, state.scheduler.num_timesteps
    while state.step < state.total_steps:
        epoch, seconds = state.epoch, process.timer()
        state.model.train()
        for batch in process.progress(state.batches(len(x_train)), f"epoch {epoch + 1}"):
            with failures_named(config, batch):
                goals = None if context is None else context[batch]
                drawn = lessons and draw_lesson(lessons, batch, T, state.step_seed)
                scalars = train_step(state, x_train[batch], goals, drawn)
            state.loss_sum += scalars["train/loss"] * len(batch)
            is_last = state.step % state.steps_per_epoch == 0
            if state.step % config.log_interval == 0 or is_last:
                scalars["train/epoch"] = state.step / state.steps_per_epoch
                log.scalars(state.step, scalars)
            if not is_last:
                save_if_due(state, log)

        scalars = {"train/epoch_loss": state.loss_sum.item() / len(x_train)}
        scalars["train/epoch_s"] = seconds()
        draws = epoch % FIGURE_EVERY == 0 or state.step == state.total_steps
        if log.folder:
            x_0, recreated = validate_epoch(state, x_val, log, scalars)
            if draws:
                log.table(state.step, recreation_rows(x_0, recreated, epoch))
        save_if_due(state, log)
        if log.folder and draws:
            noisy = x_0 + DENOISE_SIGMAS[1] * noise_bank(x_0.shape).to(x_0)
            log_figures(log, state.step, f"epoch {epoch}:", x_0, recreated, noisy)


def finish_run(state: TrainState, x_val: Tensor, log: NullLogger) -> None:
    """Score the whole validation set, print where everything is, and what to do with it."""
    config = state.config
    scores, _ = validate(state.ema, state.scheduler, x_val, config.sampling)
    shape = (256, config.seq_len, ACTION_DIM)
    generated = generation_metrics(generate(state.ema, state.scheduler, shape, **config.sampling))
    log.scalars(state.step, log_keys("final", scores) | log_keys("generate", generated))
    say(end_of_run(config, newest_checkpoint(config.save_dir), len(x_val), scores, generated))


def train_loop(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_train: Tensor,
    x_val: Tensor,
    config: TrainConfig,
    resume: dict[str, Any] | None = None,
    context: Tensor | None = None,
    lessons: Drawn | None = None,
    why: Sequence[str] = (),
) -> nn.Module:
    """Train on gestures, validate every epoch, leave a run folder; return the EMA model.

    Args:
        model: the denoiser; the run is on its device, where its scheduler is, too.
        scheduler: what model and scheduler are, they know better than the config.
        x_train: (N, L, C), data units, on the CPU; UserError if the run cannot take them.
        x_val: likewise, gestures that are not in x_train.
        config: all else.
        resume: a loaded checkpoint to continue; {} = there may be a run without one.
        context: goals beside x_train, (N, D_context); validation is without.
        lessons: of a teacher that made x_train, see `draw_lessons`.
        why: lines to print, of what the data have decided.
    """
    options = getattr(model, "options", {}) | getattr(scheduler, "options", {})
    config = replace(config, **{k: v for k, v in options.items() if hasattr(config, k)})
    config, more = decided_by_data(config, x_train.numpy())
    check_data(x_train.numpy(), x_val.numpy(), config)
    learn_shapes(model, x_train.numpy(), bool(config.augment))
    steps_per_epoch = math.ceil(len(x_train) / config.batch_size)
    state = TrainState(model, scheduler, config, steps_per_epoch * config.num_epochs, NUM_TASKS)
    state.data_sha256 = hashlib.sha256(x_train.numpy().data).hexdigest()
    if resume:
        state.restore(resume)
    x_train, x_val = x_train.to(state.device), x_val.to(state.device)
    context = None if context is None else context.to(state.device)
    name = f"d{config.d_model}_l{config.num_layers}_h{config.nhead}"
    with open_run(state, name, resume) as log:
        if log.folder:
            count = f"{sum(p.numel() for p in model.parameters()):,} parameters on {state.device}"
            count += f", {len(x_train)} + {len(x_val)} gestures, run folder {log.folder}"
            say("\n".join([*why, *more, count]))
        train_epochs(state, x_train, x_val, context, log, lessons)
        if log.folder:
            finish_run(state, x_val, log)
        if state.stop.number:  # came while the end was scored
            raise KeyboardInterrupt(state.stop.number)
    return state.ema


def train_diffusion_model(
    model: nn.Module,
    scheduler: DDIMScheduler,
    train_loader: DataLoader,
    val_loader: DataLoader,
    num_epochs: int = 100,
    lr: float = 1e-4,
    device: str | torch.device = "cuda",
    log_interval: int = 100,
    save_dir: str | Path = "checkpoints",
    *,
    config: TrainConfig | None = None,
) -> nn.Module:
    """Train, validate every epoch, leave a run folder `save_dir`; return the EMA model.

    The plan's training loop. Of the loaders the gestures are used, and the batch size; the order
    is f(seed, epoch). `lr` is the peak, `log_interval` the steps between lines of metrics.jsonl,
    `config` every other knob. Of a compiled or parallel model what is inside it is trained.
    """
    given: dict[str, Any] = {"num_epochs": num_epochs, "lr": lr, "log_interval": log_interval}
    given |= {"batch_size": batch_size_of(train_loader), "save_dir": save_dir}
    config = config or TrainConfig()
    if not (isinstance(config, TrainConfig) and isinstance(scheduler, DDIMScheduler)):
        raise UserError("config must be a TrainConfig, scheduler a DDIMScheduler")
    config, model = replace(config, **given), tensors.to_train(model, device)
    x_train, x_val = all_sequences(train_loader), all_sequences(val_loader)
    return train_loop(model, scheduler.to(device), x_train, x_val, config)


def train(config: TrainConfig, resume: dict[str, Any] | None = None) -> nn.Module:
    """Do a whole run, as the command line does; see `train_loop`. Returns the EMA model."""
    device = process.pick_device(config.device)
    refuse_early(config, resume)  # before any data is read
    process.join_processes(device)
    x_train = torch.from_numpy(DiffusionActionDataset(config.data_dir, config.seq_len).sequences)
    x_val = torch.from_numpy(DiffusionActionDataset(config.val_data_dir, config.seq_len).sequences)
    config, why = decided_by_data(config, x_train.numpy())
    torch.manual_seed(config.seed)
    model, scheduler = build_model(config).to(device), build_scheduler(config).to(device)
    context = lessons = None
    if config.context_dim:
        context = torch.from_numpy(read_context(config.data_dir, len(x_train), config.context_dim))
    if config.distill:
        teacher, _, theirs = load_model(config.distill, device)
        levels = build_scheduler(replace(theirs, curve_steps=0)).to(device)
        with fitting(Path(config.distill)):
            model.load_state_dict(teacher.state_dict())
        say(f"{config.distill} makes {len(x_train)} gestures of noise, in {LESSON_STEPS} steps")
        x_train, context = x_train.to(device), None if context is None else context.to(device)
        drawn = draw(x_train, levels.num_timesteps, config.known_share, context)
        x_train, lessons = draw_lessons(teacher, levels, x_train, drawn, config.seed)
    given: dict[str, Any] = {"resume": resume, "context": context, "lessons": lessons, "why": why}
    return train_loop(model, scheduler, x_train.cpu(), x_val, config, **given)


# ----------------------------------------------------------------------------------------
# CLI
# ----------------------------------------------------------------------------------------
# Flags that are not given are absent, so that a resumed run defaults to its own config.

PRESETS: dict[str, dict[str, Any]] = {  # flags that are given win over them
    "smoke": {  # does it run at all
        **{"data_dir": "test_data_mini/train", "val_data_dir": "test_data_mini/val"},
        **{"d_model": 32, "num_layers": 2, "batch_size": 2, "num_epochs": 3, "device": "cpu"},
    },
    "cpu": {},  # the defaults
    "gpu": {  # the best recipe
        **{"d_model": 96, "num_layers": 4, "patch_size": 5},
        **{"num_epochs": 70, "lr": 2e-3, "known_share": 0.1},
    },
}


STUDENT: dict[str, Any] = {  # of --distill, where its teacher's are not its own
    **{"num_inference_steps": 1, "sampler": "ddim", "eta": 0.0, "decisive": True, "sigma_min": 0.3},
    **{"augment": False, "curve_steps": 0, "batch_size": 64, "num_epochs": 12, "lr": 2e-3},
    "save_dir": "",
}

FIXED = {  # what a checkpoint fixes: the network, what that predicts, and how far a step goes
    *("max_contacts", "shapes", "patch_size"),  # by the data
    *(knobs_of(MinimalDiffusionTransformer, TrainConfig()).keys() - {"dropout"}),
    *("num_timesteps", "prediction_type", "optimizer", "batch_size"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; flags that were not given are absent from the result."""
    parser = OneLineParser(description=__doc__, argument_default=argparse.SUPPRESS)
    training = parser.add_argument_group("training")
    training.add_argument("--preset", choices=PRESETS, help="a quick look, the defaults, the best")
    add_flags(training, TrainConfig)
    resume = "continue a checkpoint or run folder (default: --save_dir); flags are its own or given"
    training.add_argument("--resume", nargs="?", const="", metavar="PATH", help=resume)
    sampling = parser.add_argument_group("sampling, instead of training")
    sampling.add_argument("--sample", type=int, metavar="N", help="write N gestures")
    sampling.add_argument("--checkpoint", metavar="PATH", help="checkpoint or run folder")
    sampling.add_argument("--output_dir", metavar="DIR", help="where to write samples_actions.npy")
    sampling.add_argument("--known_data_dir", metavar="DIR", help="gestures to recreate")
    sampling.add_argument(
        "--known_strategy", choices=KNOWN_STRATEGIES, help="which frames are given"
    )
    return parser.parse_args(argv)


def new_config(given: dict[str, Any]) -> TrainConfig:
    """Return the config of a new run; where another teaches it, its steps begin where those do."""
    teacher = given.get("distill")
    if not teacher:
        return TrainConfig(**given)
    theirs = config_of(load_checkpoint(teacher), TrainConfig)
    start: dict[str, Any] = {"known_share": 0.25 * theirs.known_frames}
    start["sigma_max"] = theirs.sigma_max * LESSON_STEPS / 10
    return changed(theirs, STUDENT | start | given, FIXED - STUDENT.keys(), teacher)


def sample_to_file(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Write `--sample N` gestures from a checkpoint as samples_actions.npy."""
    num = args.sample
    if "checkpoint" not in args or "output_dir" not in args or num < 1:
        raise UserError("--sample N needs N >= 1, --checkpoint and --output_dir")
    if "known_strategy" in args and "known_data_dir" not in args:
        raise UserError("--known_strategy needs --known_data_dir")
    device = process.pick_device(given.get("device", "auto"))
    model, _, trained = load_model(args.checkpoint, device)
    config = changed(trained, given, FIXED, args.checkpoint)
    known: dict[str, Any] = {}
    if "known_data_dir" in args:
        x_0 = torch.from_numpy(read_gestures(args.known_data_dir, config.seq_len))
        if len(x_0) < num:
            raise UserError(f"{args.known_data_dir} holds {len(x_0)} gestures, not {num}")
        torch.manual_seed(config.seed)
        strategy, _ = KNOWN_STRATEGIES[getattr(args, "known_strategy", "press_edges")]
        known = {"known": x_0[:num], "known_mask": strategy(x_0[:num])}
    path = make_folder(args.output_dir) / "samples_actions.npy"
    if path.exists():
        raise UserError(f"{path} exists; choose another --output_dir")
    scheduler, shape = build_scheduler(config).to(device), (num, config.seq_len, ACTION_DIM)
    with memory_named(f"--sample {num}", "it"):
        samples = generate(model, scheduler, shape, seed=config.seed, **config.sampling, **known)
    write_actions(path, to_gesture(samples).cpu().numpy())
    say(f"{num} gestures in {path}\n{generation_line(generation_metrics(samples))}")


def run_command_line(argv: list[str] | None) -> None:
    """Do what the command line asks."""
    args = parse_args(argv)
    own = {k: v for k, v in vars(args).items() if hasattr(TrainConfig, k)}
    given = PRESETS[getattr(args, "preset", "cpu")] | own
    stray = vars(args).keys() - own - {"preset", "resume"}
    if "sample" in args:
        sample_to_file(args, given)
    elif stray:
        raise UserError(f"--{min(stray)} goes with --sample N; add it or drop the flag")
    elif "resume" in args:
        config, content = resume_run(TrainConfig, given, args.resume, FIXED)
        train(config or new_config(given), content)
    else:
        train(new_config(given))
    process.leave_processes()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    stopped = "stopped; --resume RUN_FOLDER continues from its last checkpoint"
    return run_program(lambda: run_command_line(argv), stopped=stopped)


if __name__ == "__main__":
    os._exit(main())  # all is written; the exit hooks of W&B might wait for ever
