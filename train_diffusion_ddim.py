r"""Train a small transformer DDIM that recreates touch gestures, and sample from it.

    # half a minute on a laptop
    python train_diffusion_ddim.py --data_dir test_data_mini/train \
        --val_data_dir test_data_mini/val --batch_size 2 --num_epochs 3 --d_model 32 --device cpu
    # the main job: 5,000 gestures, CUDA if there is one, else under five minutes on two cores
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

Sections: CONFIG, DATASET, SCHEDULER, MODEL, KNOWN FRAMES, METRICS, VALIDATION, RUN RECORD,
TRAINING, CLI.
Papers: DDPM 2006.11239, DDIM 2010.02502, cosine schedule 2102.09672, v-prediction 2202.00512,
Min-SNR 2303.09556, DPM-Solver++ 2211.01095, adaLN-zero 2212.09748, RoPE 2104.09864,
CSDI 2107.03502, EDM2 2312.02696, Muon 2502.16982.
"""

import argparse
import copy
import ctypes
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Model = Callable[..., Tensor]  # model(x_t, t), perhaps with known, known_mask, context
Index = int | Tensor  # one t for the batch, or (B,) int64

SEQ_LEN = 250  # frames: 0.5 s at 500 Hz
CHANNELS = ("x", "y", "press")
ACTION_DIM = len(CHANNELS)
PRESSED = 0.5  # a frame is pressed above this, in data units
PIXEL = 0.001  # of the screen; less is no motion
FLOOR = 1e-8  # keeps ratios and logarithms finite

BETA_SCHEDULES = ("linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v", "x0")
SPACINGS = ("trailing", "leading", "linspace", "log_sigma")
SAMPLERS = ("ddim", "dpmpp")
LOSS_WEIGHTINGS = ("balanced", "min_snr", "none")
OPTIMIZERS = ("muon", "adamw")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def say(text: str, *, err: bool = False) -> None:
    """Print a line to stdout or stderr; a closed or full one costs the line, not the run."""
    stream = sys.stderr if err else sys.stdout
    try:
        if stream:
            print(text, file=stream, flush=True)
    except OSError:  # what print has buffered must not fail again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class UserError(ValueError):
    """A mistake that the user can mend: one line `error: what, where, how to fix`, exit code 2."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError if `value` is none of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise UserError if `value` does not divide `whole`."""
    if value < 1 or whole % value:
        raise UserError(f"{name} must divide {whole_name} = {whole}, got {value}")


# ----------------------------------------------------------------------------------------
# CONFIG
# ----------------------------------------------------------------------------------------
# Each knob is declared once, with type, default, help and range; the CLI is derived from it.


def flag(default: Any, help: str, **limits: Any) -> Any:
    """Declare a knob: default, `--help` line, and its `choices` or its range `low`, `high`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every knob of a training run; an impossible value raises UserError.

    `TrainConfig()` is the project's best small recipe, what the script runs without arguments.
    """

    # data
    data_dir: str = flag("diffusion_test_data/train", "folder of *_actions.npy to train on")
    val_data_dir: str = flag("diffusion_test_data/val", "folder of *_actions.npy to validate on")
    seq_len: int = flag(SEQ_LEN, "frames per gesture in the files", low=3)
    allow_overlap: bool = flag(False, "allow gestures that are in both sets")
    symmetries: bool = flag(True, "mirror, turn, reverse and shift the training gestures")
    # denoiser
    d_model: int = flag(64, "width", low=1)
    num_layers: int = flag(3, "transformer blocks", low=1)
    nhead: int = flag(4, "attention heads; must divide d_model", low=1)
    dim_feedforward: int = flag(0, "hidden width of the MLPs; 0 = 4 * d_model", low=0)
    dropout: float = flag(0.0, "dropout; synthetic gestures do not need it", low=0, high=0.99)
    patch_size: int = flag(5, "frames per token; must divide seq_len; 1 = the plan's", low=1)
    adaln: bool = flag(True, "condition on t by adaLN-zero; off = the plan's added embedding")
    rotary: bool = flag(True, "positions by rotary attention; off = the plan's sinusoids")
    token_overlap: bool = flag(True, "let each token also read its two neighbours' frames")
    known_frames: bool = flag(True, "take known frames; without them only noise is removed")
    noise_units: bool = flag(True, "let the denoiser also read x, y in units of the noise")
    gates: bool = flag(True, "predict by P(press) and P(x moves), P(y moves); needs x0")
    context_dim: int = flag(0, "width of the goal vectors in *_context.npy; 0 = none", low=0)
    # diffusion
    num_timesteps: int = flag(1000, "T, noise levels in training", low=2)
    beta_schedule: str = flag("cosine", "noise schedule", choices=BETA_SCHEDULES)
    prediction_type: str = flag("x0", "what the net predicts", choices=PREDICTION_TYPES)
    loss_weighting: str = flag("balanced", "of noise levels and tasks", choices=LOSS_WEIGHTINGS)
    snr_gamma: float = flag(5.0, "gamma of Min-SNR weighting", low=1e-12)
    gate_weight: float = flag(2.0, "weight of the gates' cross-entropy", low=0)
    known_share: float = flag(0.15, "share of a batch that sees known frames", low=0, high=1)
    context_dropout: float = flag(0.1, "share of a batch that sees no goal", low=0, high=1)
    # sampling
    num_inference_steps: int = flag(10, "denoising steps, 10-50 for the planner", low=1)
    spacing: str = flag("log_sigma", "where the steps lie on the t axis", choices=SPACINGS)
    sampler: str = flag("dpmpp", "DDIM, or of second order: DPM-Solver++(2M)", choices=SAMPLERS)
    eta: float = flag(1.0, "fresh noise: 0 = none, 1 = DDPM variance", low=0, high=1)
    # optimisation
    batch_size: int = flag(32, "gestures per step, over all processes", low=1)
    num_epochs: int = flag(45, "passes over the training set", low=1)
    lr: float = flag(3e-3, "peak learning rate; linear warm-up, cosine to 0", low=1e-12)
    warmup_steps: int = flag(200, "steps of warm-up, at most a tenth of the run", low=0)
    optimizer: str = flag("muon", "Muon for the blocks, or AdamW for all", choices=OPTIMIZERS)
    weight_decay: float = flag(1e-4, "decoupled weight decay", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm", low=1e-12)
    ema_decay: float = flag(0.999, "EMA of the weights, shorter on short runs", low=0, high=1)
    amp: bool = flag(False, "bf16 autocast in training; worth it where bf16 is native")
    compile: bool = flag(False, "torch.compile the denoiser in training; needs a C++ compiler")
    # run
    seed: int = flag(0, "seeds weights, order, noise and samples", low=0, high=2**31)
    device: str = flag("auto", "auto = CUDA if there is one", choices=("auto", "cpu", "cuda"))
    save_dir: str = flag("", "run folder; empty = a new one under runs/")
    save_every: float = flag(10.0, "epochs, or a part of one, between checkpoints", low=1e-6)
    log_interval: int = flag(20, "steps between lines of metrics.jsonl", low=1)
    val_sequences: int = flag(64, "gestures validated each epoch; all at the end", low=1)
    figure_every: int = flag(10, "epochs between figures", low=1)
    wandb_project: str = flag("action-diffusion-test", "W&B project")
    wandb_mode: str = flag("auto", "auto = online with a login, else offline", choices=WANDB_MODES)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any data is read."""
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            if "choices" in limits:
                check_choice(f"--{f.name}", value, limits["choices"])
            elif isinstance(value, int | float):
                low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
                if not (math.isfinite(value) and low <= value <= high):
                    raise UserError(f"--{f.name} must be in [{low:g}, {high:g}], got {value}")
        check_divides("--nhead", self.nhead, "--d_model", self.d_model)
        check_divides("--patch_size", self.patch_size, "--seq_len", self.seq_len)
        N, T, predicted = self.num_inference_steps, self.num_timesteps, self.prediction_type
        if N > T:
            raise UserError(f"--num_inference_steps must be at most --num_timesteps {T}, got {N}")
        if self.context_dim and self.symmetries:
            raise UserError("--context_dim needs --no-symmetries: a mirrored gesture has no goal")
        if self.gates and predicted != "x0":
            raise UserError(f"--gates needs --prediction_type x0, got {predicted}; add --no-gates")

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


def read_actions(path: Path, seq_len: int) -> np.ndarray:
    """Read one `*_actions.npy` as float32 (N, seq_len, 3); no pickle is ever opened.

    UserError names the file and why it is none.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise ValueError("not a regular file")
        promised = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        if not isinstance(promised, np.memmap):
            raise ValueError("an archive")
        excess = path.stat().st_size - promised.offset - promised.nbytes
        if excess:
            raise ValueError(f"{excess} bytes too many")
        data = np.load(path, allow_pickle=False)
    except Exception as e:  # damage shows as many kinds of exception
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"cannot read {path} as an .npy array ({reason}); regenerate it") from None
    if data.dtype.kind != "f":
        raise UserError(f"{path} must hold floats, got {data.dtype}; convert it to float32")
    if data.shape[1:] not in ((3,), (seq_len, 3)):
        shapes = f"[N*{seq_len}, 3] or [N, {seq_len}, 3], got {list(data.shape)}"
        raise UserError(f"{path} must be {shapes}; set --seq_len or regenerate it")
    rows = data.reshape(-1, 3)
    if len(rows) == 0 or len(rows) % seq_len:
        got = f"{len(rows)} rows, {len(rows) % seq_len} left over"
        raise UserError(f"{path} must hold gestures of {seq_len} frames, got {got}; set --seq_len")
    low, high = float(rows.min()), float(rows.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = np.argwhere(~np.isfinite(rows))
        first = f"row {bad[0][0]}, column {CHANNELS[bad[0][1]]}"
        raise UserError(f"{path} holds {len(bad)} NaN or infinite values, the first in {first}")
    if low < -1e-6 or high > 1 + 1e-6:
        got = f"[{low:g}, {high:g}]"
        raise UserError(f"{path} must lie in [0, 1], got {got}; divide pixels by the screen's size")
    rows = rows.astype(np.float32, order="C", copy=False)
    return rows.clip(0, 1, out=rows).reshape(-1, seq_len, 3)


def memory_limit() -> int:
    """Return the bytes of memory that there are: the machine's, or its container's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def read_all_actions(paths: list[Path], seq_len: int) -> np.ndarray:
    """Read files as one float32 array (N, seq_len, 3), without holding any of it twice.

    More than half of the memory goes through a nameless file into a map of that, paged in by need.
    """
    size, limit = sum(path.stat().st_size for path in paths if path.is_file()), memory_limit()
    if len(paths) == 1 and size <= 0.9 * limit:
        return read_actions(paths[0], seq_len)
    if size > 0.5 * limit:
        return map_all_actions(paths, seq_len, limit)
    # Room for twice as many, should they be float16; memory is taken only where it is written.
    sequences = np.empty((size // (2 * seq_len * 3), seq_len, 3), np.float32)
    count = 0
    for path in paths:
        x = read_actions(path, seq_len)
        sequences[count : count + len(x)] = x
        count += len(x)
    return sequences[:count]


def map_all_actions(paths: list[Path], seq_len: int, limit: int) -> np.ndarray:
    """Copy files into a temporary file that is gone with its map, float32 (N, seq_len, 3)."""
    try:
        with tempfile.TemporaryFile() as copy_of_all:
            for path in paths:
                if path.stat().st_size > 0.5 * limit:
                    raise UserError(f"{path} fills more than half of the memory; split it")
                copy_of_all.write(read_actions(path, seq_len).data)
            return np.memmap(copy_of_all, np.float32).reshape(-1, seq_len, 3)
    except OSError as e:
        place = f"{paths[0].parent} does not fit into memory, nor into {tempfile.gettempdir()}"
        raise UserError(f"{place} ({e.strerror}); set TMPDIR to a larger disk") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_manifest(folder: Path, seq_len: int) -> None:
    """Raise UserError if a folder is not the data set that its dataset.json, if any, describes."""
    path = folder / "dataset.json"
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_bytes())
        listed = {Path(file["name"]).name: file["sha256"] for file in manifest["files"]}
        length = manifest["sequence_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); regenerate the data set") from None
    if length != seq_len:
        raise UserError(f"{path} says {length} frames a gesture, not {seq_len}; set --seq_len")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != digest:
            raise UserError(f"{file} is missing or not what {path} says; regenerate the data set")


class DiffusionActionDataset(Dataset):
    """All gestures of a folder of `*_actions.npy`, in file-name order; UserError for a bad one.

    `sequences` holds them, float32 numpy (N, seq_len, 3), data units.
    """

    def __init__(self, data_dir: str | Path, seq_len: int = SEQ_LEN) -> None:
        self.data_dir, self.seq_len = Path(data_dir), seq_len
        if not self.data_dir.is_dir():
            raise UserError(f"no such folder: {self.data_dir}; check the path")
        self.action_files = sorted(self.data_dir.glob("*_actions.npy"))
        if not self.action_files:
            make = "python -m augmentation.generate_click_dataset"
            raise UserError(f"no *_actions.npy in {self.data_dir}; make some with {make}")
        check_manifest(self.data_dir, seq_len)
        self.sequences = read_all_actions(self.action_files, seq_len)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, idx: int) -> Tensor:
        return torch.from_numpy(self.sequences[idx])


def read_context(data_dir: str | Path, num: int, context_dim: int) -> Tensor:
    """Read the goal vectors beside `num` gestures, all `*_context.npy`; (num, context_dim)."""
    paths = sorted(Path(data_dir).glob("*_context.npy"))
    try:
        context = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
        if context.shape != (num, context_dim) or not np.isfinite(context).all():
            raise ValueError(f"got {context.shape}, or not finite")
    except Exception as e:  # damage shows as many kinds of exception
        needed = f"{num} rows of --context_dim {context_dim}"
        raise UserError(f"{data_dir} must hold *_context.npy with {needed} ({e})") from None
    return torch.from_numpy(context.astype(np.float32))


def draw_symmetry(x_0: Tensor) -> Tensor:
    """Draw an equally likely twin of each gesture; (B, L, 3) → (B, L, 3), data units.

    By coin flips x → 1 - x, y → 1 - y, x ↔ y and frames reversed; then the span from the first to
    the last pressed frame starts anywhere it fits. Generated gestures, zero while idle, have all
    these symmetries; recordings of real screens do not: train those with --no-symmetries.
    """
    B, L, _ = x_0.shape
    coin = torch.rand(B, 4, device=x_0.device) < 0.5
    xy, press = x_0[..., :2], x_0[..., 2:]
    xy = torch.where(coin[:, None, :2], press - xy, xy)  # press - 0 = 0 while idle
    xy = torch.where(coin[:, 2, None, None], xy.flip(2), xy)
    x_0 = torch.cat([xy, press], dim=2)
    x_0 = torch.where(coin[:, 3, None, None], x_0.flip(1), x_0)

    pressed = x_0[..., 2] > PRESSED
    first, after = pressed.int().argmax(1), L - pressed.flip(1).int().argmax(1)
    room = L - (after - first)  # latest onset; first = 0 and after = L without a press: no room
    onset = (torch.rand(B, device=x_0.device) * (room + 1)).long().clamp(max=room)
    frame = (torch.arange(L, device=x_0.device) + (first - onset)[:, None]) % L
    return x_0.gather(1, frame[..., None].expand_as(x_0))


def count_shared(x_train: Tensor, x_val: Tensor) -> int:
    """Return how many gestures of x_val, (N, L, C), are in x_train too; idle ones do not count."""
    known = {hashlib.sha256(x).digest() for x in x_train.numpy()}
    return sum(hashlib.sha256(x).digest() in known for x in x_val.numpy() if x.any())


def all_sequences(loader: DataLoader) -> Tensor:
    """Return a loader's whole data set as one float32 tensor (N, L, 3), in order."""
    dataset: Any = loader.dataset
    return torch.stack([dataset[i] for i in range(len(dataset))])


# ----------------------------------------------------------------------------------------
# SCHEDULER — x_0 → x_t → x_0
# ----------------------------------------------------------------------------------------
# All of diffusion that is not the network. Samplers walk explicit (t, t_prev) pairs, never
# arithmetic on t; t is an int (one index for the batch) or an int64 tensor (B,).


def draw_eps(
    shape: tuple[int, ...],
    device: str | torch.device,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw N(0, 1) where the generator is, or without one on `device`; return it on `device`.

    A CPU generator draws the same for every device; on a GPU its own is faster.
    """
    at = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=at, dtype=dtype).to(device)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Hold a module in eval mode without gradients, then restore its mode."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


class DDIMScheduler(nn.Module):
    """Noise schedule, forward process and samplers; UserError for betas that do not end in noise.

    Args:
        num_timesteps: T, the number of noise levels, at least 2.
        beta_start, beta_end: of the linear schedule at T = 1000; any other T scales them.
        beta_schedule: "linear" (DDPM, sec. 4) or "cosine" (arXiv:2102.09672, eq. 17).
        prediction_type: what the model predicts: "epsilon", "v" (arXiv:2202.00512) or "x0".
        spacing: where N of the T indices lie: "trailing", "leading", "linspace" (named
            as in diffusers), or "log_sigma": uniform in log sigma over SIGMA_RANGE, whose top is
            that of up to 10 steps and grows with N above.
        clip_sample: clip each x_0_pred to [-1, 1]; eps is always derived from x_0_pred.
    """

    # At ten steps this range biases durations and types the least of those tried: below 0.05 a
    # click stands still, above 12 steps are better spent elsewhere. But noise alone lacks the trace
    # of the gesture that x_t has at any finite sigma, and the bias of that goes with 1/sigma: with
    # more than ten steps the top grows with their number (docs/LOG.md).
    SIGMA_RANGE = (12.0, 0.05)

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        *,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        spacing: str = "trailing",
        clip_sample: bool = True,
    ) -> None:
        super().__init__()
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("spacing", spacing, SPACINGS)
        if num_timesteps < 2:
            raise UserError(f"num_timesteps must be at least 2, got {num_timesteps}")
        self.num_timesteps, self.prediction_type = num_timesteps, prediction_type
        self.beta_schedule, self.spacing, self.clip_sample = beta_schedule, spacing, clip_sample

        grid = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        if beta_schedule == "linear":
            ramp = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
            betas = 1000 / num_timesteps * ramp
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
        return self._alpha_bar[t]

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
        T, N = self.num_timesteps if start_t is None else start_t + 1, num_inference_steps
        if not 1 <= T <= self.num_timesteps:
            raise UserError(f"start_t must be in [0, {self.num_timesteps}), got {start_t}")
        if not 1 <= N <= T:
            raise UserError(f"num_inference_steps must be in [1, {T}], got {N}")
        if self.spacing == "trailing":
            ts = [T * (N - i) // N - 1 for i in range(N)]
        elif self.spacing == "leading":
            ts = [(N - 1 - i) * (T // N) for i in range(N)]
        elif self.spacing == "linspace":
            ts = [round((T - 1) * (1 - i / max(N - 1, 1))) for i in range(N)]
        else:
            high = min(self.SIGMA_RANGE[0] * max(N, 10) / 10, self.sigma(T - 1))
            low = min(self.SIGMA_RANGE[1], 0.1 * high)
            sigmas = [high * (low / high) ** (i / max(N - 1, 1)) for i in range(N)]
            ts = [self.timestep_at(sigma) for sigma in sigmas]
        if start_t is not None:
            ts[0] = start_t
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
        if not 0 <= eta <= 1:
            raise UserError(f"eta must be in [0, 1], got {eta}")
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        variance = eta**2 * variance
        # Put into one another, the two are a sum of x_t and x_0_pred: half as many operations.
        # abs: 1 - ᾱ_prev >= σ², but rounding may put their difference just below 0
        noise_kept = (abs(1 - alpha_bar_prev - variance) / (1 - alpha_bar_t)) ** 0.5
        x_prev = noise_kept * x_t + (alpha_bar_prev**0.5 - noise_kept * alpha_bar_t**0.5) * x_0_pred
        if eta > 0:
            z = draw_eps(x_t.shape, x_t.device, generator, x_t.dtype)
            x_prev = x_prev + variance**0.5 * z
        return x_prev

    def ddim_step(
        self, model: Model, x_t: Tensor, t: Tensor, t_prev: Tensor, eta: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Run `model(x_t, t)`, take one `step`; return x_prev, x_0_pred, (B, L, C), model units."""
        with eval_mode(model):
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
        """Walk from noise to x_0, (B, L, C), data units, in N steps; UserError for bad arguments.

        Args:
            model: `model(x_t, t)`, or with known frames `model(x_t, t, known, known_mask)`; it runs
                in `torch.inference_mode` unless there is a cost_fn.
            shape: (B, L, C).
            device: where the model lives.
            num_inference_steps: N, in [1, T].
            eta: 0 = deterministic, 1 = DDPM variance.
            sampler: "ddim", or "dpmpp": DPM-Solver++(2M), arXiv:2211.01095, with eta 0 alg. 2, with
                eta 1 its SDE variant (appendix; diffusers' "sde-dpmsolver++").
            known: (B, L, C), data units; read only where the mask is set.
            known_mask: (B, L) bool; these frames are given and come back unchanged.
            x_T: the start, (B, L, C), model units: noise, or x_t at t = start_t.
            start_t: the index to start from; None = the noisiest of the spacing.
            generator: source of x_T and of z, see `draw_eps`.
            cost_fn: maps x_0_pred (B, L, C), data units, to costs (B,); see `_descend`.
            guidance_scale: data units that x_0_pred moves per unit of the cost's gradient.
        """
        check_choice("sampler", sampler, SAMPLERS)
        if (known is None) != (known_mask is None):
            raise UserError("known and known_mask must be given together")
        pairs = self.timestep_pairs(num_inference_steps, start_t)
        given: tuple[Tensor, ...] = ()
        last: Any = None  # x_0_pred of the step before, and its t
        with torch.inference_mode(cost_fn is None), eval_mode(model):  # a tenth faster at batch 1
            start = draw_eps(shape, device, generator) if x_T is None else x_T
            x_t = start.to(device, copy=True)  # so that the model sees one kind of tensor
            if known is not None and known_mask is not None:
                given = (to_model_units(known.to(x_t)), known_mask.to(device))
            ts = torch.tensor(pairs).to(device, non_blocking=True)[:, :1].expand(-1, len(x_t))
            for (t, t_prev), t_batch in zip(pairs, ts, strict=True):
                x_0_pred = self.predict_x_0(model(x_t, t_batch, *given), x_t, t)
                if cost_fn is not None:
                    x_0_pred = self._descend(x_0_pred, cost_fn, guidance_scale)
                if given:
                    x_0_pred = torch.where(given[1][..., None], given[0], x_0_pred)
                aim = x_0_pred
                if sampler == "dpmpp" and last and t_prev >= 0:
                    aim = self._extrapolate(x_0_pred, t, t_prev, *last)
                last = (x_0_pred, t)
                x_t = self.step(aim, x_t, t, t_prev, eta=eta, generator=generator)
        return to_data_units(x_t)

    def _extrapolate(
        self, x_0_pred: Tensor, t: int, t_prev: int, x_0_last: Tensor, t_last: int
    ) -> Tensor:
        """Return D = x_0_pred + (x_0_pred - x_0_last)/2r of 2M, r = h_last/h in log sigma."""
        h = math.log(self.sigma(t) / self.sigma(t_prev))
        h_last = math.log(self.sigma(t_last) / self.sigma(t))
        return torch.lerp(x_0_last, x_0_pred, 1 + h / (2 * h_last))

    def _descend(self, x_0_pred: Tensor, cost_fn: Any, scale: float) -> Tensor:
        """Move x_0_pred down the gradient of its cost, which does not pass through the model."""
        with torch.enable_grad():
            actions = to_data_units(x_0_pred).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cost_fn(actions).sum(), actions)
        moved = to_model_units(actions.detach() - scale * gradient)
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

        The N pairs of `sample` in reverse; eps is evaluated at the index walked to, unclipped.
        x_0 is (B, L, C), data units; the result, x_T, likewise, in model units. With a start_t
        above -1, x_0 is first noised to it (dequantised; `generator` as of `draw_eps`), and only
        the indices above it are walked.
        """
        eps = draw_eps(x_0.shape, x_0.device, generator).to(x_0)
        x_t, now = self.add_noise(to_model_units(x_0), start_t, eps)[0], start_t
        with eval_mode(model):
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
        return x_t

    @staticmethod
    def get_variance(x: Tensor) -> Tensor:
        """Return the variance over frames of each channel, averaged over the batch; (C,)."""
        return torch.var(x, dim=1).mean(dim=0)


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


class ContextEmbedding(nn.Module):
    """Embed goals, (B, context_dim) → (B, D); a row of zeros is no goal and adds nothing."""

    def __init__(self, context_dim: int, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(context_dim, 4 * d_model)
        self.down = zero_init(nn.Linear(4 * d_model, d_model))  # at first, no goal changes anything

    def forward(self, context: Tensor) -> Tensor:
        """Embed each row."""
        if context.shape[1:] != (self.up.in_features,):
            raise UserError(f"context must be [B, {self.up.in_features}], got {[*context.shape]}")
        return self.down(F.silu(self.up(context))) * (context != 0).any(dim=1, keepdim=True)


def with_goal(model: Model, context: Tensor, scale: float = 1.0) -> Model:
    """Return a model for `sample` that heads for goals, (B, context_dim), w = `scale`.

    (1 - w)·output(no goal) + w·output(goal): classifier-free guidance, arXiv:2207.12598.
    """

    def guided(*arguments: Tensor) -> Tensor:
        output = model(*arguments, context=context)
        return output if scale == 1 else torch.lerp(model(*arguments), output, scale)

    return guided


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
        self.dropout = nn.Dropout(dropout)

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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return torch.addcmul(x + shift, x, scale)


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weights and bias to zero; return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def nearest_known(known: Tensor, known_mask: Tensor) -> Tensor:
    """Tell every frame of its nearest known frames, before (or at) and after (or at) it.

    As (B, L, 2C + 3): both values (0 where there is none), how far along from the one to the other
    the frame lies in [0, 1], and whether each exists. The model then reads a value where it needs
    it, instead of learning to fetch it; so keyframes are learnt in minutes (docs/LOG.md).
    """
    B, L, C = known.shape
    frame = torch.arange(L, device=known.device).expand(B, L)
    before = torch.where(known_mask, frame, -1).cummax(dim=1).values
    after = torch.where(known_mask, frame, L).flip(1).cummin(dim=1).values.flip(1)
    has_before, has_after = before >= 0, after < L
    along = (frame - before) / (after - before).clamp(min=1) * (has_before & has_after)
    given = []
    for index, exists in ((before, has_before), (after, has_after)):
        index = index.clamp(0, L - 1)[..., None].expand(B, L, C)
        given.append(torch.where(exists[..., None], known.gather(1, index), 0.0))
    flags = torch.stack([along, has_before, has_after], dim=-1).to(known.dtype)
    return torch.cat([*given, flags], dim=-1)


def in_noise_units(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Tell every frame how x and y of x_t stand against the noise, on the same scale at every t.

    As (B, L, 2C - 1): the distance of x, y from their mean while pressed, in noise std, limited to
    4; its sum up to the frame over the root of the number of pressed frames, doubled, likewise
    (the CUSUM test for a change of the mean); the probability of a press. Left to x_t alone, where
    slopes shrink with the noise, the denoiser fits lines but draws no clicks (docs/LOG.md).
    The unit is at least 0.1, or the jumps that the limit makes of every swipe drown what is left.
    """
    std = (1 - alpha_bar_t).sqrt().clamp(min=0.1)
    pressed = torch.sigmoid(2 * alpha_bar_t.sqrt() * x_t[..., -1:] / std**2)  # Bayes, for ±1
    frames = pressed.sum(dim=1, keepdim=True) + FLOOR
    mean = (pressed * x_t[..., :-1]).sum(dim=1, keepdim=True) / frames
    residual = pressed * (x_t[..., :-1] - mean) / std
    total = 2 * residual.cumsum(dim=1) / frames**0.5
    limited = 4 * torch.tanh(torch.cat([residual, total], dim=-1) / 4)
    return torch.cat([limited, pressed], dim=-1)


class MinimalDiffusionTransformer(nn.Module):
    """The denoiser: a small bidirectional transformer over the frames of a gesture.

    Options are those of TrainConfig, but for action_dim, C, and max_timesteps, T. beta_schedule is
    the scheduler's, read with `noise_units` only. The attention weights have no dropout.

    With `gates`, to predict x_0 of gestures that are zero while idle, it outputs P(press) for press
    and P(press)·(P(moves)·E[x | moves] + P(rests)·E[x | rests]) for x, likewise y. Trained to tell
    these cases apart too (`gate_loss`), it learns what squared error hardly teaches: that a slope
    within the noise is none.
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
        token_overlap: bool = False,
        noise_units: bool = False,
        beta_schedule: str = "linear",
        gates: bool = False,
        known_frames: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_divides("nhead", nhead, "d_model", d_model)
        check_divides("patch_size", patch_size, "seq_len", seq_len)
        self.action_dim, self.seq_len, self.d_model = action_dim, seq_len, d_model
        self.max_timesteps, self.patch_size = max_timesteps, patch_size
        self.adaln, self.rotary, self.known_frames = adaln, rotary, known_frames
        self.token_overlap, self.noise_units, self.gates = token_overlap, noise_units, gates

        in_channels = action_dim + (2 * action_dim + 3 if known_frames else 0)
        if noise_units:
            in_channels += 2 * (action_dim - 1) + 1
            table = DDIMScheduler(max_timesteps, beta_schedule=beta_schedule).alphas_cumprod
            self.alphas_cumprod = nn.Buffer(table, persistent=False)
        in_features = in_channels * patch_size * (3 if token_overlap else 1)
        self.action_embedding = nn.Linear(in_features, d_model)
        tokens = seq_len // patch_size
        self.pos_encoder = nn.Identity() if rotary else PositionalEncoding(d_model, tokens)
        self.timestep_embedding = TimestepEmbedding(d_model)
        self.layer_norm = nn.LayerNorm(d_model, elementwise_affine=not adaln)
        block, rotary_tokens = AdaLNBlock if adaln else PlanBlock, tokens if rotary else 0
        sizes = d_model, nhead, dim_feedforward, dropout, rotary_tokens
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(num_layers))
        axes = action_dim - 1 if gates else 0  # each also at rest, and a logit of each per token
        self.output_projection = nn.Linear(d_model, (action_dim + axes) * patch_size + axes)
        if adaln:
            zero_init(self.output_projection)
            self.output_modulation = zero_init(nn.Linear(d_model, 2 * d_model))
            self.timestep_mlp = nn.Sequential(
                nn.Linear(d_model, d_model), nn.SiLU(), nn.Linear(d_model, d_model)
            )
        else:
            self.timestep_mlp = nn.Sequential()  # t enters as it is embedded
        self.context_embedding = ContextEmbedding(context_dim, d_model) if context_dim else None

    def check_inputs(self, x_t: Tensor, known: Tensor | None, context: Tensor | None) -> None:
        """Raise UserError for what the network was not built for."""
        L, longest = x_t.shape[1], self.seq_len
        if L % self.patch_size or L > longest or (self.rotary and L != longest):
            raise UserError(f"this model takes gestures of {longest} frames, got {L}")
        if known is not None and not self.known_frames:
            raise UserError("this model takes no known frames; build it with known_frames=True")
        if context is not None and self.context_embedding is None:
            raise UserError("this model takes no goals; train it with --context_dim")

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        return_gates: bool = False,
    ) -> Any:
        """Predict eps, v or x_0 (the scheduler's prediction_type) at (x_t, t): (B, L, C).

        Args:
            x_t: noisy actions, (B, L, C), model units.
            t: diffusion index, (B,) int64 in [0, T).
            known: (B, L, C), model units; read only where the mask is set.
            known_mask: (B, L) bool; None = nothing is known.
            context: (B, context_dim); None, or a row of zeros, = no goal.
            return_gates: also return the logits of P(moves) of each axis and of P(press).
        """
        self.check_inputs(x_t, known, context)
        B, L, C = x_t.shape
        x = x_t
        if self.noise_units:
            x = torch.cat([x_t, in_noise_units(x_t, self.alphas_cumprod[t, None, None])], dim=-1)
        if known is not None and known_mask is not None:
            x = torch.cat([x, nearest_known(known, known_mask)], dim=-1)
        elif self.known_frames:
            x = F.pad(x, (0, 2 * C + 3))  # what nearest_known says of an empty mask

        x = x.reshape(B, L // self.patch_size, self.patch_size * x.shape[-1])  # (B, tokens, ...)
        if self.token_overlap:
            padded = F.pad(x, (0, 0, 1, 1))
            x = torch.cat([padded[:, :-2], x, padded[:, 2:]], dim=-1)
        x = self.pos_encoder(self.action_embedding(x))  # (B, tokens, D)
        t_emb = self.timestep_mlp(self.timestep_embedding(t))  # (B, D)
        if context is not None and self.context_embedding is not None:
            t_emb = t_emb + self.context_embedding(context)
        if self.adaln:
            t_emb = F.silu(t_emb)
        else:
            x = self.layer_norm(x + t_emb[:, None])
        for block in self.blocks:
            x = block(x, t_emb)  # (B, tokens, D)
        if self.adaln:
            shift, scale = self.output_modulation(t_emb)[:, None].chunk(2, dim=-1)
            x = modulate(self.layer_norm(x), shift, scale)
        output = self.output_projection(x)
        if not self.gates:
            return output.reshape(B, L, C)
        moves = output[..., 1 - C :].repeat_interleave(self.patch_size, dim=1)  # (B, L, C - 1)
        output = output[..., : 1 - C].reshape(B, L, 2 * C - 1)
        moving, resting, press = output.split([C - 1, C - 1, 1], dim=-1)
        xy = to_data_units(torch.lerp(resting, moving, torch.sigmoid(moves)))
        probability = torch.sigmoid(press)
        output = to_model_units(torch.cat([probability * xy, probability], dim=-1))
        return (output, torch.cat([moves, press], dim=-1)) if return_gates else output


# ----------------------------------------------------------------------------------------
# KNOWN FRAMES — what is given of x_0
# ----------------------------------------------------------------------------------------
# Each strategy maps gestures (B, L, C), data units, to a mask (B, L) bool of the given frames.


def _press_changes(x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Return touch-downs and lift-offs before frame i = 0..L, (B, L+1) bool; idle outside."""
    pressed = F.pad(x_0[..., 2] > PRESSED, (1, 1))  # (B, L+2)
    before, after = pressed[:, :-1], pressed[:, 1:]
    return after & ~before, before & ~after


def has_press_edge(x_0: Tensor) -> Tensor:
    """Tell which gestures press or lift inside the window; (B, L, C) → (B,) bool."""
    pressed = x_0[..., 2] > PRESSED
    return (pressed[:, 1:] != pressed[:, :-1]).any(dim=1)


def press_edges(x_0: Tensor) -> Tensor:
    """Know the frames on both sides of every touch-down and lift-off, about 4 of 250, if any."""
    touch_down, lift_off = _press_changes(x_0)
    change = touch_down | lift_off
    return (change[:, :-1] | change[:, 1:]) & has_press_edge(x_0)[:, None]


def touch_down(x_0: Tensor) -> Tensor:
    """Know only the frames on both sides of every touch-down; the rest is ambiguous."""
    change, _ = _press_changes(x_0)
    return (change[:, :-1] | change[:, 1:]) & has_press_edge(x_0)[:, None]


def prefix(x_0: Tensor) -> Tensor:
    """Know the first n frames, n uniform in [1, L): continuation."""
    B, L, _ = x_0.shape
    n = torch.randint(1, L, (B, 1), device=x_0.device)
    return torch.arange(L, device=x_0.device) < n


def random_frames(x_0: Tensor) -> Tensor:
    """Know each frame with a probability uniform in [0, 0.2): infilling."""
    B, L, _ = x_0.shape
    probability = 0.2 * torch.rand(B, 1, device=x_0.device)
    return torch.rand(B, L, device=x_0.device) < probability


KNOWN_STRATEGIES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # name: (strategy, its share of the gestures that train with known frames)
    "press_edges": (press_edges, 0.6),
    "touch_down": (touch_down, 0.2),
    "prefix": (prefix, 0.1),
    "random_frames": (random_frames, 0.1),
}


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
# METRICS — x_0 against its own recreation
# ----------------------------------------------------------------------------------------
# Every metric is paired: `reconstructed` must be a recreation of `original`, never an unrelated
# sample. All take data units, (B, L, C), and weigh gestures (or frames) exactly.

GESTURE_TYPES = ("none", "click", "horizontal", "vertical", "diagonal")


def classify_gestures(x: Tensor) -> Tensor:
    """Return indices into GESTURE_TYPES, (B,) int64, by the move from first to last pressed frame.

    Below 0.05 a click; then horizontal if |dx| > 2|dy|, vertical if |dy| > 2|dx|, else diagonal.
    """
    pressed = x[..., 2] > PRESSED  # (B, L)
    L = x.shape[1]
    first = pressed.int().argmax(dim=1)
    last = L - 1 - pressed.flip(1).int().argmax(dim=1)
    rows = torch.arange(len(x), device=x.device)
    dx, dy = (x[rows, last, :2] - x[rows, first, :2]).unbind(dim=-1)
    kind = torch.where(dy.abs() > 2 * dx.abs(), 3, 4)
    kind = torch.where(dx.abs() > 2 * dy.abs(), 2, kind)
    kind = torch.where(torch.hypot(dx, dy) < 0.05, 1, kind)
    return torch.where(pressed.any(dim=1), kind, 0)


def compute_temporal_iou(orig_active: Tensor, recon_active: Tensor) -> float:
    """Return the mean intersection over union of the pressed frames, those above 0.5 of (B, L).

    Two gestures without any press agree: 1.
    """
    a, b = orig_active > PRESSED, recon_active > PRESSED
    intersection, union = (a & b).sum(dim=1), (a | b).sum(dim=1)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0).mean().item()


def compute_spatial_accuracy(
    original: Tensor, reconstructed: Tensor, threshold: float = 0.1
) -> float:
    """Return the share of active frames whose (x, y) lies within `threshold` of the original.

    Active: pressed in either of the two. 1 if there is none.
    """
    active = (original[..., 2] > PRESSED) | (reconstructed[..., 2] > PRESSED)
    if not active.any():
        return 1.0
    distance = torch.linalg.vector_norm((original - reconstructed)[..., :2], dim=-1)
    return (distance < threshold)[active].float().mean().item()


def compute_gesture_type_accuracy(original: Tensor, reconstructed: Tensor) -> float:
    """Return the share of gestures whose type survives, one rule on both sides."""
    same = classify_gestures(original) == classify_gestures(reconstructed)
    return same.float().mean().item()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, 1 where both vanish."""
    return (a + FLOOR) / (b + FLOOR)


def compute_reconstruction_metrics(
    original: Tensor, reconstructed: Tensor, scheduler: DDIMScheduler | None = None
) -> dict[str, float]:
    """Score recreations, (B, L, C), data units, row by row against their originals.

    Returns one finite float per metric, see docs/METRICS.md. The plan passes a scheduler; nothing
    depends on it.
    """
    error = original - reconstructed
    active = (original[..., 2] > PRESSED) | (reconstructed[..., 2] > PRESSED)
    agree = (original[..., 2] > PRESSED) == (reconstructed[..., 2] > PRESSED)
    variance = DDIMScheduler.get_variance
    orig_variance, recon_variance = variance(original), variance(reconstructed)
    variance_ratio = _ratio(recon_variance, orig_variance)
    smoothness_ratio = _ratio(variance(reconstructed.diff(dim=1)), variance(original.diff(dim=1)))
    snr_db = 10 * torch.log10(_ratio((original**2).mean(dim=(1, 2)), (error**2).mean(dim=(1, 2))))
    any_active = bool(active.any())
    scores = {
        "mse": (error**2).mean(),
        "mae": error.abs().mean(),
        "coord_mse": (error[..., :2] ** 2).mean(),
        "press_mse": (error[..., 2] ** 2).mean(),
        "active_coord_mse": (error[..., :2] ** 2)[active].mean() if any_active else 0.0,
        "press_accuracy": agree[active].float().mean() if any_active else 1.0,
        "mean_snr_db": snr_db.mean(),
        "median_snr_db": snr_db.median(),
    }
    for c, name in enumerate("xyp"):
        scores[f"orig_variance_{name}"] = orig_variance[c]
        scores[f"recon_variance_{name}"] = recon_variance[c]
        scores[f"variance_ratio_{name}"] = variance_ratio[c]
        scores[f"smoothness_ratio_{name}"] = smoothness_ratio[c]
    return {name: float(value) for name, value in scores.items()}


def gesture_metrics(original: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Return the plan's three gesture scores: timing, place, type; each in [0, 1]."""
    return {
        "temporal_iou": compute_temporal_iou(original[..., 2], reconstructed[..., 2]),
        "spatial_accuracy": compute_spatial_accuracy(original, reconstructed),
        "gesture_type_accuracy": compute_gesture_type_accuracy(original, reconstructed),
    }


def has_one_press(x: Tensor) -> Tensor:
    """Tell which samples press exactly once; (B, L, C) → (B,) bool."""
    return _press_changes(x)[0].sum(dim=1) == 1


# ----------------------------------------------------------------------------------------
# VALIDATION — the protocols that the loop runs
# ----------------------------------------------------------------------------------------
# keyframes: from pure noise, given only the press edges of x_0. denoise: from x_0 noised to
# sigma, in one step. generate: from pure noise, given nothing. The noise is always the same.

DENOISE_SIGMAS = (0.2, 0.4, 0.7)  # noise std in data units
NOISE_BANK_SEED = 20210503


def noise_bank(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the same standard normal numbers for every run, model and device; on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_BANK_SEED))


def in_batches(function: Model, *arguments: Tensor, batch_size: int = 256) -> Tensor:
    """Apply `function` to `batch_size` rows of the arguments at a time, to bound the memory."""
    batches = zip(*(a.split(batch_size) for a in arguments), strict=True)
    return torch.cat([function(*batch) for batch in batches])


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
    generator = torch.Generator().manual_seed(seed)
    if x_T is None:
        x_T = draw_eps(shape, next(model.parameters()).device, generator)

    def sample(x_T: Tensor, known: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"known": known, "known_mask": mask, "generator": generator}
        shape, N = tuple(x_T.shape), num_inference_steps
        return scheduler.sample(model, shape, x_T.device, N, x_T=x_T, **given, **options)

    return in_batches(sample, x_T, *(a for a in (known, known_mask) if a is not None))


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
    x_T = noise_bank(x_0.shape).to(x_0)
    start: dict[str, Any] = {"known": x_0, "known_mask": press_edges(x_0)}
    if not takes_known_frames(model):
        start = {"start_t": scheduler.timestep_at(0.4)}
        x_T, _ = scheduler.add_noise(to_model_units(x_0), start["start_t"], x_T)
    start |= {"x_T": x_T, "seed": NOISE_BANK_SEED + 1}  # the seed of z, if eta > 0
    return generate(model, scheduler, x_0.shape, num_inference_steps, **start, **options)


def denoise_one_shot(model: Model, scheduler: DDIMScheduler, x_0: Tensor, sigma: float) -> Tensor:
    """Noise x_0 to `sigma` (data units), predict it in one step; (B, L, C), data units."""
    t = scheduler.timestep_at(sigma)

    def predict(x: Tensor, eps: Tensor) -> Tensor:
        x_t, _ = scheduler.add_noise(to_model_units(x), t, eps)
        output = model(x_t, torch.full((len(x),), t, device=x.device))
        return to_data_units(scheduler.predict_x_0(output, x_t, t))

    with eval_mode(model):
        return in_batches(predict, x_0, noise_bank(x_0.shape).to(x_0))


def validation_loss(model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor) -> float:
    """Return the unweighted, unconditional training loss at fixed noise and evenly spread t."""
    B, T = len(x_0), scheduler.num_timesteps
    t = (torch.arange(B, device=x_0.device) * T + T // 2) // B
    x, eps = to_model_units(x_0), noise_bank(x_0.shape).to(x_0)
    x_t, _ = scheduler.add_noise(x, t, eps)
    with eval_mode(model):
        return F.mse_loss(in_batches(model, x_t, t), scheduler.target(x, eps, t)).item()


def validate(
    model: nn.Module, scheduler: DDIMScheduler, x_0: Tensor, sampling: dict[str, Any]
) -> tuple[dict[str, float], Tensor]:
    """Score the keyframes and denoise protocols on x_0, (B, L, C), data units.

    Returns the scores, without prefix, and the recreations, like x_0.
    """
    start = time.perf_counter()
    recreated = recreate(model, scheduler, x_0, **sampling)
    if x_0.is_cuda:
        torch.cuda.synchronize()
    scores = {"time_per_sample": (time.perf_counter() - start) / len(x_0)}
    scored = has_press_edge(x_0)  # the others give the model nothing to go by
    scores["sequences_without_edge"] = float((~scored).sum())
    if scored.any():
        scores |= compute_reconstruction_metrics(x_0[scored], recreated[scored], scheduler)
        scores |= gesture_metrics(x_0[scored], recreated[scored])
    scores["loss"] = validation_loss(model, scheduler, x_0)
    for sigma in DENOISE_SIGMAS:
        mse = F.mse_loss(denoise_one_shot(model, scheduler, x_0, sigma), x_0).item()
        scores[f"denoise_mse_sigma_{sigma}"] = mse
    middle = DENOISE_SIGMAS[1]
    remaining = max(scores[f"denoise_mse_sigma_{middle}"], FLOOR)
    scores["noise_reduction"] = 10 * math.log10(middle**2 / remaining)
    return scores, recreated


def generation_metrics(samples: Tensor) -> dict[str, float]:
    """Return the share of samples with exactly one press, and of each gesture type."""
    types = classify_gestures(samples)
    shares = {f"share_{n}": (types == i).float().mean() for i, n in enumerate(GESTURE_TYPES)}
    shares["one_press"] = has_one_press(samples).float().mean()
    return {k: float(v) for k, v in shares.items()}


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
    x_0 = all_sequences(test_loader).to(device)
    x_0 = x_0[has_press_edge(x_0)]  # the others give the model nothing to go by
    if len(x_0) == 0:
        raise UserError("no gesture of the test set has a press edge; nothing can be recreated")
    recreated = recreate(model, scheduler, x_0, num_inference_steps)
    gestures = [gesture_metrics(*p) for p in zip(x_0.split(1), recreated.split(1), strict=True)]
    results = {
        "reconstruction_quality": ((x_0 - recreated) ** 2).mean(dim=(1, 2)).tolist(),
        "action_timing_accuracy": [g["temporal_iou"] for g in gestures],
        "spatial_accuracy": [g["spatial_accuracy"] for g in gestures],
        "gesture_type_preservation": [g["gesture_type_accuracy"] for g in gestures],
    }
    means = {f"{name}_mean": float(np.mean(v)) for name, v in results.items()}
    return means | {f"{name}_std": float(np.std(v)) for name, v in results.items()}


# ----------------------------------------------------------------------------------------
# RUN RECORD — metrics, figures, checkpoints
# ----------------------------------------------------------------------------------------
# Everything is written into the run folder first; W&B mirrors it and can never stop a run.


def make_panels(columns: dict, rows: int, width: float, height: float) -> tuple["Figure", list]:
    """Return a figure with a row per gesture and its panels: axes, gesture, column, actions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 1 + height * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False, sharex=True)
    for ax in axes[-1]:
        ax.set_xlabel("frame (2 ms)")
    panels = []
    for i, row in enumerate(axes):
        for ax, (label, data) in zip(row, columns.items(), strict=True):
            panels.append((ax, i, label, np.asarray(data[i])))
    return figure, panels


def visualize_action_sequences(
    original: Any,
    reconstructed: Any,
    noisy: Any,
    title_prefix: str = "",
    max_samples: int = 4,
    *,
    known_mask: Any = None,
) -> "Figure":
    """Draw original, noisy and recreated gestures side by side, at most max_samples rows.

    They are (B, L, C), data units, arrays or CPU tensors; the frames of `known_mask`, (B, L) bool,
    are marked with dots. The Figure belongs to no window and needs no closing.
    """
    columns = {"original": original, "noisy": noisy, "recreated": reconstructed}
    figure, panels = make_panels(columns, min(max_samples, len(original)), 15, 2.2)
    for ax, i, label, actions in panels:
        pressed = np.asarray(original[i])[:, 2] > PRESSED
        frames = np.arange(len(pressed))
        ax.fill_between(frames, 0, 1, where=pressed, color="0.9", label="pressed in original")
        for c, color in enumerate(("tab:blue", "tab:green", "tab:red")):
            ax.plot(frames, actions[:, c], color=color, lw=1.2, label=CHANNELS[c])
        if label != "noisy":
            ax.set_ylim(-0.1, 1.1)
            if known_mask is not None:
                known = np.flatnonzero(np.asarray(known_mask[i]))
                ax.plot(known, actions[known], "k.", ms=6, label="known frames")
        ax.set_title(f"{title_prefix} {label} {i + 1}".strip(), fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def visualize_noise_comparison(
    original: Any, reconstructed: Any, noisy: Any, title_prefix: str = "", max_samples: int = 4
) -> "Figure":
    """Draw |error| frame by frame on one log scale; else as `visualize_action_sequences`."""
    from matplotlib.colors import LogNorm

    columns = {"noisy": noisy, "recreated": reconstructed}
    figure, panels = make_panels(columns, min(max_samples, len(original)), 13, 1.4)
    for ax, i, label, actions in panels:
        error = np.abs(actions - np.asarray(original[i])).T  # (C, L)
        image = ax.imshow(error.clip(1e-3), norm=LogNorm(1e-3, 1), cmap="magma", aspect="auto")
        rmse = np.sqrt(np.mean(error**2))
        ax.set_title(f"{title_prefix} {label} {i + 1}, RMSE {rmse:.3f}".strip(), fontsize=10)
        ax.set_yticks(range(ACTION_DIM), CHANNELS)
    figure.colorbar(image, ax=figure.axes, label="|error|, share of the screen")
    return figure


class RunLogger:
    """The record of a run: `metrics.jsonl`, figures, the reconstruction table, a W&B mirror.

    What `folder` holds beyond `step`, where the run stands, is cut off, and so are final scores;
    `wandb_id` is the W&B run to continue.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, step: int = 0, wandb_id: str | None = None
    ) -> None:
        self.folder, self.wandb, self.worker = folder, None, ThreadPoolExecutor(max_workers=1)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp"):  # what a killed run was writing
            path.unlink()
        content = json.dumps(asdict(config) | {"made_by": provenance()}, indent=2) + "\n"
        write_whole(folder / "config.json", content.encode())
        for path in (folder / "metrics.jsonl", folder / "reconstructions.jsonl"):
            if path.exists():
                lines = [x for x in path.read_text("utf-8").splitlines() if x.endswith("}")]
                rows = [(x, json.loads(x)) for x in lines]
                kept = [x for x, row in rows if row["step"] <= step and "final/loss" not in row]
                write_whole(path, "".join(f"{x}\n" for x in kept).encode())
        mode = resolve_wandb_mode(config.wandb_mode)
        if mode != "disabled":
            import wandb

            name = f"diffusion_d{config.d_model}_l{config.num_layers}_h{config.nhead}"
            run: Any = {"project": config.wandb_project, "name": name, "config": asdict(config)}
            run |= {"dir": str(folder), "mode": mode, "id": wandb_id, "resume": "allow"}
            run["settings"] = wandb.Settings(init_timeout=20, silent=True)
            self.wandb = self._ask_wandb(lambda: wandb.init(**run))

    def _ask_wandb(self, call: Callable[[], Any]) -> Any:
        """Return what W&B answers to a call; its first fault, or 30 s of silence, switch it off."""
        try:
            return self.worker.submit(call).result(timeout=30)
        except Exception as e:  # of many kinds, and none may stop a run
            reason = (str(e) or "no answer in 30 s").splitlines()[0]
            say(f"warning: W&B is off from here on ({type(e).__name__}: {reason})", err=True)
            self.wandb = None

    def _mirror(self, step: int, content: Callable[[Any], dict[str, Any]]) -> None:
        """Log to W&B, if it is on, what `content` makes of the wandb module."""
        if run := self.wandb:
            import wandb

            self._ask_wandb(lambda: run.log(content(wandb), step=step))

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with disk_faults_named(self.folder / name), open(self.folder / name, "a") as f:
            f.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append one object to metrics.jsonl; a value that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._append("metrics.jsonl", [{"step": step, **row}])
        self._mirror(step, lambda _: row)

    def figure(self, step: int, key: str, draw: Callable, *data: Any, **options: Any) -> None:
        """Draw a figure and save it as figures/{key}_{step}.png; without matplotlib, do not."""
        try:
            figure = draw(*data, **options)
        except ImportError:
            return
        path = self.folder / "figures" / f"{key.replace('/', '_')}_{step:06d}.png"
        figure.savefig(path, dpi=80)
        self._mirror(step, lambda wandb: {key: wandb.Image(str(path))})

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append the plan's reconstruction table to reconstructions.jsonl."""
        self._append("reconstructions.jsonl", [{"step": step, **row} for row in rows])
        columns, data = list(rows[0]), [list(row.values()) for row in rows]
        self._mirror(step, lambda wandb: {"val/reconstruction_table": wandb.Table(columns, data)})

    def close(self) -> None:
        """Finish the W&B run; the files are whole already."""
        if self.wandb:
            self._ask_wandb(self.wandb.finish)


def asked_wandb_mode(mode: str) -> str:
    """Return the mode, in the place of "auto" that of WANDB_MODE; refuse an unknown one."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "auto"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        check_choice("WANDB_MODE", mode, WANDB_MODES)
    return mode


def resolve_wandb_mode(mode: str) -> str:
    """Turn "auto" into online, offline or disabled: WANDB_MODE, a login, a wandb that imports."""
    mode = asked_wandb_mode(mode)
    if mode == "disabled":
        return mode
    try:
        import wandb
        from requests.utils import get_netrc_auth  # wandb brings it; its login writes ~/.netrc
    except ImportError:
        say("note: wandb does not import; the run folder holds all that it would show")
        return "disabled"
    if mode == "auto":
        own = os.environ.get("WANDB_BASE_URL")
        hosts = [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]
        has_login = os.environ.get("WANDB_API_KEY") or any(map(get_netrc_auth, hosts))
        mode = "online" if has_login else "offline"
    return mode


def log_recreations(log: RunLogger, step: int, epoch: int, x_0: Tensor, recreated: Tensor) -> None:
    """Log the reconstruction table, and the two figures with one gesture of each type."""
    types, recreated_types = classify_gestures(x_0), classify_gestures(recreated)
    table: list[dict[str, Any]] = []
    for i, pair in enumerate(zip(x_0.split(1), recreated.split(1), strict=True)):
        scores = gesture_metrics(*pair)
        row = {"epoch": epoch, "sample_id": i, "original_type": GESTURE_TYPES[types[i]]}
        row["reconstructed_type"] = GESTURE_TYPES[recreated_types[i]]
        row["timing_accuracy"] = scores["temporal_iou"]
        row["spatial_accuracy"] = scores["spatial_accuracy"]
        row["overall_quality"] = sum(scores.values()) / len(scores)
        table.append(row)
    log.table(step, table)

    first_of_type = [int((types == kind).int().argmax()) for kind in types.unique()]
    noisy = x_0 + DENOISE_SIGMAS[1] * noise_bank(x_0.shape).to(x_0)
    *three, known = (a[first_of_type].cpu() for a in (x_0, recreated, noisy, press_edges(x_0)))
    drawn = *three, f"epoch {epoch}:"
    log.figure(step, "val/reconstructions", visualize_action_sequences, *drawn, known_mask=known)
    log.figure(step, "val/noise_comparison", visualize_noise_comparison, *drawn)


@contextmanager
def disk_faults_named(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Give a fault of the disk, in writing `path`, the words that an error line needs."""
    try:
        yield
    except OSError as e:
        free = shutil.disk_usage(path.parent).free
        fault = f"{e.strerror} ({num_bytes} bytes needed, {free} free)"
        cure = "the checkpoints before it are whole: make room, then --resume"
        raise OSError(f"cannot write {path}: {fault}; {cure}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that `path` is at every moment, even of a power cut, the old or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_faults_named(path, len(content)):
        try:
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def git_commit() -> str | None:
    """Return the commit of the working tree, "-dirty" if it differs; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    """Return what made a run beside its config: command line, commit, versions."""
    versions = {"python": sys.version, "numpy": np.__version__, "torch": torch.__version__}
    return {"argv": sys.argv, "commit": git_commit(), **versions}


CHECKPOINT_FORMAT = 5


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` is at every moment the old file or the new one, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def checked_archive(path: Path) -> io.BytesIO:
    """Read a zip file anew from entries that passed their CRC; zipfile.BadZipFile if one fails.

    torch.load checks none, and of a damaged file it may read other bytes than those checked here.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as rewritten:
        if any(entry.compress_type for entry in archive.infolist()):  # small files can be huge
            raise zipfile.BadZipFile("compressed")
        for entry in archive.infolist():
            rewritten.writestr(entry.filename, archive.read(entry))
    checked.seek(0)
    return checked


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a run folder's newest; its CRCs are checked, no code from it runs.

    Returns what `TrainState.to_checkpoint` wrote, and its `path`; UserError if it is missing,
    damaged, foreign, or of another version's format.
    """
    path = newest_checkpoint(path)
    try:
        content = torch.load(checked_archive(path), map_location="cpu", weights_only=True)
    except Exception as e:  # damage shows as many kinds of exception
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} is no intact checkpoint ({reason}); use an older one") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is no checkpoint of this trainer")
    made = content["format"]
    if made != CHECKPOINT_FORMAT:
        age = "a newer" if made > CHECKPOINT_FORMAT else "an older"
        reason = f"has format {made}, this version's is {CHECKPOINT_FORMAT}"
        raise UserError(f"{path} was made by {age} version: it {reason}; load it with that one")
    return content | {"path": path}


def checkpoints_of(path: str | Path) -> list[Path]:
    """Return `path` if it is a file, else the run folder's checkpoints, highest epoch first."""
    path = Path(path)
    found = [path] if path.is_file() else [*path.glob("diffusion_checkpoint_epoch_*.pth")]
    if not found:
        raise UserError(f"no diffusion_checkpoint_epoch_*.pth at {path}; check the path")
    return sorted(found, key=lambda p: (len(p.name), p.name), reverse=True)  # longer is higher


def newest_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a file, else the run folder's checkpoint of the highest epoch."""
    return checkpoints_of(path)[0]


def knobs_of(constructor: Callable[..., Any], config: TrainConfig) -> dict[str, Any]:
    """Return the knobs that have the name of an argument of `constructor`."""
    names = inspect.signature(constructor).parameters
    return {name: value for name, value in asdict(config).items() if name in names}


def build_model(config: TrainConfig) -> MinimalDiffusionTransformer:
    """Build the denoiser that `config` describes."""
    options = knobs_of(MinimalDiffusionTransformer, config)
    options["dim_feedforward"] = config.dim_feedforward or 4 * config.d_model
    return MinimalDiffusionTransformer(max_timesteps=config.num_timesteps, **options)


def build_scheduler(config: TrainConfig) -> DDIMScheduler:
    """Build the scheduler that `config` describes."""
    return DDIMScheduler(**knobs_of(DDIMScheduler, config))


def load_model(
    path: str | Path, device: str | torch.device = "cpu", *, ema: bool = True
) -> tuple[MinimalDiffusionTransformer, DDIMScheduler, TrainConfig]:
    """Load the denoiser of a checkpoint, or a run folder's newest, with its scheduler and config.

    In eval mode; with the averaged weights, or without `ema` the raw ones.
    """
    content = load_checkpoint(path)
    try:
        config = TrainConfig(**content["config"])
        model = build_model(config)
        model.load_state_dict(content["ema" if ema else "model"])
    except Exception as e:  # what is missing or strange shows as many kinds of exception
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{content['path']} does not fit this version ({reason})") from None
    model.eval().requires_grad_(False)
    return model.to(device), build_scheduler(config).to(device), config


# ----------------------------------------------------------------------------------------
# TRAINING
# ----------------------------------------------------------------------------------------
# Learning rate, data order and every random draw are pure functions of (seed, epoch, step), so
# a resumed run repeats the uninterrupted one without any saved random state.


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to 0."""
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_at(step: int, total_steps: int, ema_decay: float) -> float:
    """Return the EMA decay of a step: it remembers at most a tenth of the steps so far.

    Nor more than a twentieth of the run, so that a short run is not averaged with its start.
    """
    return min(ema_decay, 1 - 10 / (10 + step), max(0.0, 1 - 20 / total_steps))


def epoch_order(num: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's gestures, (num,) int64."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num))


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices, (B, m, n), near 1; their singular vectors stay.

    Five steps of the Newton-Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ, with the coefficients
    of kellerjordan.github.io/posts/muon.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=FLOOR)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Step matrices along the orthogonal factor of their momentum (arXiv:2502.16982, sec. 2).

    Scaled to the RMS of AdamW's steps, so that it takes the same learning rate. As torch.optim.Muon
    with Nesterov's momentum, but in float32 and matrices of one shape together, which takes less
    time, and far less where the processor has no bfloat16 (docs/LOG.md).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here passes a closure
        """Update the matrices that have a gradient."""
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        trained = [p for p in group["params"] if p.grad is not None]
        for shape in {p.shape for p in trained}:
            params = [p for p in trained if p.shape == shape]
            grads = torch.stack([p.grad for p in params])
            averages = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(averages, grads.unbind(), 1 - momentum)
            update = orthogonal_factor(grads.lerp(torch.stack(averages), momentum)).unbind()
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-0.2 * lr * max(shape) ** 0.5)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights; or Muon for the blocks' matrices, AdamW for the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and name.startswith("blocks.") and "modulation" not in name
        (matrices if is_matrix and config.optimizer == "muon" else others).append(p)
    lr, decay = config.lr, config.weight_decay
    adamw = torch.optim.AdamW(others, lr, weight_decay=decay, fused=True)
    return [adamw, Muon(matrices, lr, decay)] if matrices else [adamw]


NOISE_LEVELS = 20  # bins of t in which the loss is balanced
NUM_TASKS = (1 + len(KNOWN_STRATEGIES)) * NOISE_LEVELS


class TrainState:
    """A run in progress: what is trained, and where it stands.

    `step` counts the steps done of `total_steps`; `unseen` the gestures that the epoch in progress
    has still to see, 0 between epochs; `loss_sum` adds up its losses so far, over gestures;
    `caught` holds the signals that ask the run to stop.
    """

    def __init__(
        self, model: nn.Module, scheduler: DDIMScheduler, config: TrainConfig, total_steps: int
    ) -> None:
        self.model, self.scheduler, self.config = model, scheduler, config
        self.total_steps, self.step, self.unseen = total_steps, 0, 0
        self.steps_per_epoch = total_steps // config.num_epochs
        self.data_sha256: str | None = None
        self.caught: list[int] = []
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(model, config)
        device = next(model.parameters()).device
        self.task_loss = torch.ones(NUM_TASKS, device=device)  # running mean loss of each task
        self.loss_sum = torch.zeros((), device=device)
        self.forward: Any = torch.compile(model) if config.compile else model
        if process_rank()[1] > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    def to_checkpoint(self, epoch: int, wandb_id: str | None) -> dict[str, Any]:
        """Return what `save_checkpoint` writes: plain types and tensors only."""
        return {
            "format": CHECKPOINT_FORMAT,
            "epoch": epoch,
            "step": self.step,
            "unseen": self.unseen,
            "loss_sum": self.loss_sum,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "task_loss": self.task_loss,
            "config": asdict(self.config),
            "data_sha256": self.data_sha256,
            "wandb_id": wandb_id,
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take up what `load_checkpoint` returned, at the same gesture under any batch size."""
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["weight_decay"] = self.config.weight_decay
        self.task_loss.copy_(content["task_loss"])
        self.loss_sum.copy_(content["loss_sum"])
        self.unseen = content["unseen"]
        left = min(math.ceil(self.unseen / self.config.batch_size), self.steps_per_epoch)
        self.step = (content["epoch"] + 1) * self.steps_per_epoch - left
        if content["data_sha256"] not in (None, self.data_sha256):
            say("warning: the training data is not that of the checkpoint", err=True)


def gesture_losses(
    model: Model,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    config: TrainConfig,
    rows: slice = slice(None),
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise a batch x_0, (B, L, C), data units; predict; compare.

    `rows` is the share of this process; all else is drawn for the whole batch, so that it does not
    depend on the number of processes. Returns the mean squared error of each gesture of the share,
    (b,); of the whole batch, (B,) int64, the task, a pair of known-frame strategy and noise level
    in [0, NUM_TASKS), and t; and the `gate_loss` of the share, (b,), 0 without gates.
    """
    B, T = len(x_0), scheduler.num_timesteps
    # one t per stratum of T/B: less variance than independent draws
    u = (torch.randperm(B, device=x_0.device) + torch.rand(B, device=x_0.device)) / B
    t = (u * T).long().clamp(max=T - 1)
    eps = torch.randn_like(x_0)
    known_mask, drawn = draw_known_mask(x_0, config.known_share)
    options: dict[str, Any] = {"return_gates": True} if config.gates else {}
    if context is not None:
        kept = torch.rand(B, 1, device=x_0.device) >= config.context_dropout
        options["context"] = (context * kept)[rows]
    task = drawn * NOISE_LEVELS + t * NOISE_LEVELS // T

    x, eps, known_mask = to_model_units(x_0)[rows], eps[rows], known_mask[rows]
    x_t, _ = scheduler.add_noise(x, t[rows], eps)
    if rows.start:  # seeded alike, all processes would drop the same out; the CPU uses 32 bits
        torch.manual_seed(torch.initial_seed() + rows.start * 2_654_435_761)
    given = (x, known_mask) if takes_known_frames(model) else ()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        output = model(x_t, t[rows], *given, **options)
    output, logits = output if config.gates else (output, None)
    loss = (output.float() - scheduler.target(x, eps, t[rows])).square().mean(dim=(1, 2))
    entropy = torch.zeros_like(loss) if logits is None else gate_loss(logits.float(), x_0[rows])
    return loss, task, t, entropy


def gate_loss(logits: Tensor, x_0: Tensor) -> Tensor:
    """Score logits of P(x moves), P(y moves), P(press), (B, L, 3), against x_0, data units.

    Returns, in nats, the cross-entropy of motion, mean over axes and pressed frames, plus that of
    press, mean over frames; (B,).
    """
    pressed = x_0[..., 2:] > PRESSED
    high = torch.where(pressed, x_0[..., :2], -1).amax(dim=1, keepdim=True)
    low = torch.where(pressed, x_0[..., :2], 2).amin(dim=1, keepdim=True)
    moves = (high - low > PIXEL).expand(-1, x_0.shape[1], -1)
    truth = torch.cat([moves, pressed], dim=-1).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    motion = (entropy[..., :2].mean(dim=2) * pressed[..., 0]).sum(dim=1)
    return motion / pressed.sum(dim=(1, 2)).clamp(min=1) + entropy[..., 2].mean(dim=1)


def balanced_weight(task_loss: Tensor, loss: Tensor, task: Tensor) -> Tensor:
    """Weigh each gesture by the inverse running loss of its task, and update that; (B,).

    The loss that nothing can reduce differs a hundredfold between noise levels, and given known
    frames it vanishes; unweighted, the noise of the largest drowns the rest. Tasks of equal size
    are EDM2's uncertainty weighting (arXiv:2312.02696) with a table in place of its network.
    """
    ones = torch.ones_like(loss)
    count = torch.zeros_like(task_loss).index_add_(0, task, ones)
    mean = torch.zeros_like(task_loss).index_add_(0, task, loss) / count.clamp(min=1)
    task_loss.lerp_(mean, 0.02 * (count > 0))
    return 1 / (task_loss[task] + 1e-6)


def min_snr_weight(scheduler: DDIMScheduler, t: Tensor, gamma: float) -> Tensor:
    """Return the Min-SNR weight of each t, (B,) (arXiv:2303.09556, sec. 3.4).

    In x_0 space it is min(snr, gamma), whatever is predicted.
    """
    alpha_bar_t = scheduler.alpha_bar(t)[:, 0, 0]
    snr = alpha_bar_t / (1 - alpha_bar_t)
    divisor = {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisor[scheduler.prediction_type]


def train_step(state: TrainState, x_0: Tensor, context: Tensor | None = None) -> dict[str, Any]:
    """Update weights and EMA from one batch x_0, (B, L, C), data units; return scalars to log.

    FloatingPointError if loss or gradient is not finite; the weights are then untouched.
    """
    config, scheduler = state.config, state.scheduler
    rank, world = process_rank()
    rows = slice(rank, None, world)
    torch.manual_seed(config.seed * 1_000_003 + state.step)  # of all that a step draws
    if config.symmetries:
        x_0 = draw_symmetry(x_0)
    loss, task, t, entropy = gesture_losses(state.forward, scheduler, x_0, config, rows, context)
    whole_loss = torch.zeros(len(x_0), device=x_0.device)
    whole_loss[rows] = loss.detach()
    if world > 1:
        torch.distributed.all_reduce(whole_loss)
    weight = torch.ones_like(whole_loss)
    if config.loss_weighting == "balanced":
        weight = balanced_weight(state.task_loss, whole_loss, task)
    elif config.loss_weighting == "min_snr":
        weight = min_snr_weight(scheduler, t, config.snr_gamma)
    state.model.zero_grad(set_to_none=True)
    total = (weight[rows] * loss + config.gate_weight * entropy).sum()
    (total * world / len(x_0)).backward()  # processes average their gradients
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    mean_loss, lr = whole_loss.mean(), lr_at(state.step, state.total_steps, config)
    if not torch.isfinite(mean_loss + grad_norm):
        found = f"loss {mean_loss:g}, gradient norm {grad_norm:g}"
        raise FloatingPointError(f"{found} at step {state.step}, lr {lr:g}; lower --lr")
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    decay = ema_decay_at(state.step, state.total_steps, config.ema_decay)
    with torch.no_grad():
        averages: list[Tensor] = list(state.ema.parameters())
        torch._foreach_lerp_(averages, list[Tensor](state.model.parameters()), 1 - decay)
    state.step += 1
    scalars = {"train/loss": mean_loss, "train/grad_norm": grad_norm, "train/lr": lr}
    return scalars | ({"train/gate_loss": entropy.detach().mean()} if config.gates else {})


def process_rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def progress(items: Iterable, title: str) -> Iterable:
    """Wrap an iterable in a progress bar, on a terminal and with tqdm only."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, title, disable=None if sys.stderr else True, leave=False)


@contextmanager
def caught_signals(caught: list[int]) -> Iterator[None]:
    """Let SIGINT and SIGTERM only be noted in `caught`; a second SIGINT ends the process.

    Under torchrun it does not: there each Ctrl-C comes twice, from the terminal and the launcher.
    """

    def note(number: int, _: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    may = threading.current_thread() is threading.main_thread()  # no other may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if may else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_or_stop(state: TrainState, log: RunLogger | None) -> None:
    """At a step's edge: save what is due; if a signal asks any process for it, save and stop.

    KeyboardInterrupt carries the signal's number. Weights that are not finite are never saved.
    """
    stop = max(state.caught, default=0)
    if process_rank()[1] > 1:
        asked = torch.tensor(stop, device=state.task_loss.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        stop = int(asked)
    every = max(1, round(state.config.save_every * state.steps_per_epoch))
    if log and (stop or state.step % every == 0 or state.step == state.total_steps):
        if not all(p.isfinite().all() for p in state.model.parameters()):
            raise FloatingPointError(f"weights are not finite at step {state.step}; lower --lr")
        epoch = (state.step - 1) // state.steps_per_epoch
        path = log.folder / f"diffusion_checkpoint_epoch_{epoch}.pth"
        save_checkpoint(path, state.to_checkpoint(epoch, getattr(log.wandb, "id", None)))
    if stop:
        raise KeyboardInterrupt(stop)


def train_epoch(
    state: TrainState, x_train: Tensor, log: RunLogger | None, context: Tensor | None = None
) -> float:
    """Train to the end of the epoch of `state`; return its mean loss. Ranks but 0 have no log."""
    config = state.config
    epoch = state.step // state.steps_per_epoch
    order = epoch_order(len(x_train), config.seed, epoch).to(x_train.device)
    if not state.unseen:
        state.unseen = len(order)
        state.loss_sum.zero_()
    batches = order[-state.unseen :].split(config.batch_size)
    title = f"epoch {epoch + 1}/{config.num_epochs}"
    state.model.train()
    for batch in progress(batches, title) if log else batches:
        try:
            scalars = train_step(state, x_train[batch], None if context is None else context[batch])
        except FloatingPointError as e:
            gestures = ", ".join(map(str, batch.tolist()))
            raise FloatingPointError(f"{e}; the batch was gestures {gestures}") from None
        except torch.OutOfMemoryError as e:
            raise MemoryError(f"--batch_size {config.batch_size} does not fit ({e})") from None
        state.unseen = max(0, state.unseen - len(batch))
        state.loss_sum += scalars["train/loss"] * len(batch)
        if log and state.step % config.log_interval == 0:
            scalars["train/epoch"] = state.step / state.steps_per_epoch
            log.scalars(state.step, {k: float(v) for k, v in scalars.items()})
        if state.unseen:
            save_or_stop(state, log)
    return state.loss_sum.item() / len(x_train)


def finish_epoch(state: TrainState, x_val: Tensor, log: RunLogger, scalars: dict) -> None:
    """Validate the EMA weights on a subset; log, print one line, perhaps draw."""
    config, started = state.config, time.perf_counter()
    epoch = state.step // state.steps_per_epoch
    x_0 = x_val[:: max(1, len(x_val) // config.val_sequences)][: config.val_sequences]
    scores, recreated = validate(state.ema, state.scheduler, x_0, config.sampling)
    scalars |= {"val/epoch": epoch - 1, "val/epoch_s": time.perf_counter() - started}
    scalars |= model_diagnostics(state.ema, x_0) | log_keys("val", scores)
    log.scalars(state.step, scalars)
    say(
        f"epoch {epoch:{len(str(config.num_epochs))}}/{config.num_epochs}  "
        f"loss {scalars['train/epoch_loss']:.4f}  val {scores['loss']:.4f}  {score_line(scores)}  "
        f"{scalars['train/epoch_s']:.1f}+{scalars['val/epoch_s']:.1f} s"
    )
    if (epoch - 1) % config.figure_every == 0 or epoch == config.num_epochs:
        log_recreations(log, state.step, epoch - 1, x_0, recreated)


def finish_run(state: TrainState, x_val: Tensor, log: RunLogger) -> None:
    """Score the whole validation set, print where everything is, and what to do with it."""
    config = state.config
    scores, _ = validate(state.ema, state.scheduler, x_val, config.sampling)
    shape = (256, config.seq_len, ACTION_DIM)
    generated = generation_metrics(generate(state.ema, state.scheduler, shape, **config.sampling))
    log.scalars(state.step, log_keys("final", scores) | log_keys("generate", generated))
    denoised = [f"{scores[f'denoise_mse_sigma_{s}']:.5f} at {s}" for s in DENOISE_SIGMAS]
    checkpoint = newest_checkpoint(log.folder)
    say(f"""
All {len(x_val)} validation gestures, {config.num_inference_steps} steps, EMA weights:
  keyframes  {score_line(scores)}
  denoise    mse by sigma: {", ".join(denoised)}
  generate   {generation_line(generated)}

Run folder: {log.folder}
  resume    python train_diffusion_ddim.py --resume {log.folder}
  evaluate  python -m evaluation --checkpoint {checkpoint} --data_dir {config.val_data_dir} \\
                --output_dir {log.folder}/report
  sample    python train_diffusion_ddim.py --sample 32 --checkpoint {checkpoint} \\
                --output_dir {log.folder}/samples""")


def score_line(scores: dict[str, float]) -> str:
    """Return the headline scores of the keyframes protocol as one line."""
    if "mse" not in scores:
        return "(no gesture has a press edge)"
    return (
        f"mse {scores['mse']:.1e}  snr {scores['mean_snr_db']:.1f} dB  "
        f"iou {scores['temporal_iou']:.3f}  spatial {scores['spatial_accuracy']:.3f}  "
        f"type {scores['gesture_type_accuracy']:.3f}"
    )


def generation_line(scores: dict[str, float]) -> str:
    """Return the scores of generated gestures as one line."""
    mix = ", ".join(f"{name} {scores[f'share_{name}']:.2f}" for name in GESTURE_TYPES)
    return f"one press {scores['one_press']:.3f}; {mix}"


def log_keys(split: str, scores: dict[str, float]) -> dict[str, float]:
    """Name scores as they are logged: `{split}/...`, two of them `sampling/...` as in the plan."""
    sampling = ("time_per_sample", "noise_reduction")
    return {f"{'sampling' if k in sampling else split}/{k}": v for k, v in scores.items()}


def model_diagnostics(model: nn.Module, x_0: Tensor) -> dict[str, float]:
    """Return the norm of all weights, and the RMS of the features before the output layer."""
    norm = torch.stack([p.norm() for p in model.parameters()]).norm()
    rms: list[Tensor] = []
    layer: Any = model.output_projection
    hook = layer.register_forward_pre_hook(lambda _, x: rms.append(x[0].square().mean().sqrt()))
    with eval_mode(model):
        model(to_model_units(x_0), torch.zeros(len(x_0), dtype=torch.long, device=x_0.device))
    hook.remove()
    return {"model/weight_norm": norm.item(), "model/activation_stats": rms[0].item()}


def describe(model: nn.Module, scheduler: DDIMScheduler, config: TrainConfig) -> TrainConfig:
    """Return `config` with the architecture and noise that the objects themselves have."""
    options = {k: v for k, v in getattr(model, "options", {}).items() if hasattr(config, k)}
    options |= {name: getattr(scheduler, name) for name in knobs_of(DDIMScheduler, config)}
    return replace(config, **options)


def train_loop(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_train: Tensor,
    x_val: Tensor,
    config: TrainConfig,
    resume: dict[str, Any] | None = None,
    context: Tensor | None = None,
) -> nn.Module:
    """Train on gestures (N, L, C), validate every epoch, leave a run folder; return the EMA model.

    All tensors and modules are on one device; `resume` is a loaded checkpoint to continue;
    `context` are goals beside the gestures, (N, context_dim). Validation is without goals.
    """
    config = describe(model, scheduler, config)
    steps_per_epoch = math.ceil(len(x_train) / config.batch_size)
    state = TrainState(model, scheduler, config, steps_per_epoch * config.num_epochs)
    state.data_sha256 = hashlib.sha256(x_train.cpu().numpy().data).hexdigest()
    log, resume = None, resume or {}
    if resume:
        state.restore(resume)
    if process_rank()[0] == 0:
        at = resume.get("step", 0), resume.get("wandb_id")
        log = RunLogger(Path(config.save_dir), config, *at)
        count = f"{sum(p.numel() for p in model.parameters()):,} parameters on {x_train.device}"
        say(f"{count}, {len(x_train)} + {len(x_val)} gestures, run folder {log.folder}")
    with closing(log) if log else nullcontext():
        with caught_signals(state.caught):
            while state.step < state.total_steps:
                started = time.perf_counter()
                scalars = {"train/epoch_loss": train_epoch(state, x_train, log, context)}
                scalars["train/epoch_s"] = time.perf_counter() - started
                if log:
                    finish_epoch(state, x_val, log, scalars)
                save_or_stop(state, log)
        if log:
            finish_run(state, x_val, log)
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

    The plan's training loop. Of the loaders the data sets are used, and the batch size; the order
    is f(seed, epoch). `lr` is the peak, `log_interval` the steps between lines of metrics.jsonl,
    `config` every other knob.
    """
    given: dict[str, Any] = {"num_epochs": num_epochs, "lr": lr, "log_interval": log_interval}
    given |= {"batch_size": train_loader.batch_size or 1, "save_dir": str(save_dir)}
    config = replace(config or TrainConfig(), **given)
    x_train, x_val = all_sequences(train_loader).to(device), all_sequences(val_loader).to(device)
    return train_loop(model.to(device), scheduler.to(device), x_train, x_val, config)


# ----------------------------------------------------------------------------------------
# CLI
# ----------------------------------------------------------------------------------------
# Flags that are not given are absent, so that a resumed run defaults to its own config.


PRESETS: dict[str, dict[str, Any]] = {  # flags that are given win over them
    "smoke": {  # seconds: does it run at all
        **{"data_dir": "test_data_mini/train", "val_data_dir": "test_data_mini/val"},
        **{"d_model": 32, "num_layers": 2, "batch_size": 2, "num_epochs": 3, "device": "cpu"},
    },
    "cpu": {},  # minutes on two cores: the defaults
    "gpu": {  # the best recipe: seconds on a GPU each epoch, an hour in all on one core
        **{"d_model": 96, "num_layers": 4, "num_epochs": 280, "lr": 2e-3, "known_share": 0.1}
    },
}


class OneLineParser(argparse.ArgumentParser):
    """Report a mistake as UserError, so that it ends in one line like all others."""

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; flags that were not given are absent from the result."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    training = parser.add_argument_group("training")
    presets = "smoke: seconds; cpu: the defaults; gpu: the best recipe"
    training.add_argument("--preset", choices=PRESETS, help=presets)
    for f in fields(TrainConfig):
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "choices": f.metadata.get("choices")}
        training.add_argument(f"--{f.name}", **options)
    resume = "continue a checkpoint or run folder (default: --save_dir); flags are its own or given"
    training.add_argument("--resume", nargs="?", const="", metavar="PATH", help=resume)
    sampling = parser.add_argument_group("sampling, instead of training")
    sampling.add_argument("--sample", type=int, metavar="N", help="write N gestures")
    sampling.add_argument("--checkpoint", metavar="PATH", help="checkpoint or run folder")
    sampling.add_argument("--output_dir", metavar="DIR", help="where to write samples_actions.npy")
    sampling.add_argument("--known_data_dir", metavar="DIR", help="gestures to recreate")
    frames = "which of their frames are given (default: press_edges)"
    sampling.add_argument("--known_strategy", choices=[*KNOWN_STRATEGIES], help=frames)
    return parser.parse_args(argv)


def pick_device(name: str) -> torch.device:
    """Return the device that --device names; an explicit cuda never becomes cpu."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or auto")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_same_model(config: TrainConfig, saved: dict[str, Any], path: str | Path) -> None:
    """Raise UserError if a flag contradicts what a checkpoint holds, trained as `saved`."""
    fixed = knobs_of(MinimalDiffusionTransformer, config)
    for name in (*fixed, "num_timesteps", "prediction_type", "optimizer"):
        now = getattr(config, name)
        if now != saved[name] and name != "dropout":
            change = f"--{name} contradicts the content of {path}: {saved[name]} -> {now}"
            raise UserError(f"{change}; drop the flag or train anew")


def newest_intact(path: str) -> dict[str, Any]:
    """Load a checkpoint, or the newest of a run folder that is intact, with a warning if older."""
    *newer, oldest = checkpoints_of(path)
    for candidate in newer:
        try:
            return load_checkpoint(candidate)
        except UserError as e:
            say(f"warning: {e}; going back to the one before", err=True)
    return load_checkpoint(oldest)


def resume_run(given: dict[str, Any], path: str) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the config of a resumed run, its own but for what is given, and its checkpoint."""
    path = path or given.get("save_dir", "")
    if not path:
        raise UserError("--resume needs a PATH, or a --save_dir to look in")
    if path == given.get("save_dir") and not [*Path(path).glob("diffusion_checkpoint_epoch_*.pth")]:
        say(f"note: nothing to resume in {path}; starting afresh")
        return TrainConfig(**given), {}
    content = newest_intact(path)
    folder = content["path"].parent
    saved = content["config"] | {"save_dir": str(folder)}
    try:
        config = TrainConfig(**saved | given)
    except TypeError as e:
        raise UserError(f"{content['path']} does not fit this version ({e})") from None
    other = Path(config.save_dir)
    if (other / "metrics.jsonl").exists() and not other.samefile(folder):
        raise UserError(f"{other} holds another run; choose a new --save_dir")
    check_same_model(config, saved, content["path"])
    for name in ("lr", "weight_decay", "batch_size", "seed", "num_epochs"):
        if getattr(config, name) != saved[name]:
            change = f"--{name} {saved[name]} -> {getattr(config, name)}"
            say(f"warning: {change}: not the run that was interrupted", err=True)
    return config, content


@contextmanager
def locked_run_folder(folder: Path, *, resuming: bool) -> Iterator[None]:
    """Make the run folder and hold its lock; refuse one that is in use or holds another run.

    The kernel frees the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as e:
        raise UserError(f"cannot write into --save_dir {folder} ({e}); choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            user = f"process {lock.read()}"
            raise UserError(f"{folder} is in use by {user}; choose another --save_dir") from None
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        if not resuming and (folder / "metrics.jsonl").exists():
            raise UserError(f"{folder} holds a run; add --resume or choose another --save_dir")
        yield


def join_processes(device: torch.device) -> None:
    """Under torchrun, join the other processes of the run; else do nothing."""
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        return
    if sys.platform == "linux":  # ask for SIGTERM when a launcher dies, which leaves no orphan
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=10))


def train(config: TrainConfig, resume: dict[str, Any] | None = None) -> nn.Module:
    """Do a whole run, as the command line does; return the EMA model in eval mode.

    `resume` is a loaded checkpoint to continue, empty for a run that has none yet. UserError for
    bad data, device or folder.
    """
    device = pick_device(config.device)
    asked_wandb_mode(config.wandb_mode)  # refused before any data is read
    join_processes(device)
    torch.manual_seed(config.seed)
    model, scheduler = build_model(config).to(device), build_scheduler(config).to(device)
    x_train, x_val = (
        torch.from_numpy(DiffusionActionDataset(folder, config.seq_len).sequences)
        for folder in (config.data_dir, config.val_data_dir)
    )
    strays = ((x[..., 2:] <= PRESSED) & (x[..., :2] > 0) for x in x_train.split(4096))
    if (config.symmetries or config.gates) and any(bool(s.any()) for s in strays):
        cure = "zero these frames, or add --no-symmetries --no-gates"
        raise UserError(f"{config.data_dir} has x or y above 0 where press is 0; {cure}")
    shared = 0 if config.allow_overlap else count_shared(x_train, x_val)
    if shared:
        where = f"of {config.val_data_dir} are in {config.data_dir} too"
        raise UserError(f"{shared} gestures {where}; separate the sets, or add --allow_overlap")
    context = None
    if config.context_dim:
        context = read_context(config.data_dir, len(x_train), config.context_dim).to(device)
    name = f"_d{config.d_model}_l{config.num_layers}_h{config.nhead}"
    folder = Path(config.save_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}{name}")
    config = replace(config, save_dir=str(folder))
    x_train, x_val = x_train.to(device), x_val.to(device)
    is_first, resuming = process_rank()[0] == 0, resume is not None
    with locked_run_folder(folder, resuming=resuming) if is_first else nullcontext():
        return train_loop(model, scheduler, x_train, x_val, config, resume, context)


def sample_to_file(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Write `--sample N` gestures from a checkpoint as samples_actions.npy."""
    num = args.sample
    if "checkpoint" not in args or "output_dir" not in args or num < 1:
        raise UserError("--sample N needs N >= 1, --checkpoint and --output_dir")
    path = Path(args.output_dir) / "samples_actions.npy"
    if path.exists():
        raise UserError(f"{path} exists; choose another --output_dir")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make --output_dir {path.parent} ({e}); choose another") from None
    device = pick_device(given.get("device", "auto"))
    model, _, trained = load_model(args.checkpoint, device)
    config = replace(trained, **given)
    check_same_model(config, asdict(trained), args.checkpoint)
    known: dict[str, Any] = {}
    if "known_data_dir" in args:
        known_set = DiffusionActionDataset(args.known_data_dir, config.seq_len)
        x_0 = torch.from_numpy(known_set.sequences)
        if len(x_0) < num:
            raise UserError(f"{args.known_data_dir} holds {len(x_0)} gestures, not {num}")
        torch.manual_seed(config.seed)
        strategy, _ = KNOWN_STRATEGIES[getattr(args, "known_strategy", "press_edges")]
        known = {"known": x_0[:num], "known_mask": strategy(x_0[:num])}
    scheduler = build_scheduler(config).to(device)
    shape = (num, config.seq_len, ACTION_DIM)
    samples = generate(model, scheduler, shape, seed=config.seed, **config.sampling, **known)
    np.save(path, to_gesture(samples).cpu().numpy().reshape(-1, ACTION_DIM))
    say(f"{num} gestures in {path}\n{generation_line(generation_metrics(samples))}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Greek letters
    try:
        args = parse_args(argv)
        own = {k: v for k, v in vars(args).items() if hasattr(TrainConfig, k)}
        given = PRESETS[getattr(args, "preset", "cpu")] | own
        stray = vars(args).keys() - own - {"preset", "resume"}
        if "sample" in args:
            sample_to_file(args, given)
        elif stray:
            raise UserError(f"--{min(stray)} goes with --sample N; add it or drop the flag")
        elif "resume" in args:
            train(*resume_run(given, args.resume))
        else:
            train(TrainConfig(**given))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as e:
        say(f"error: {e}", err=True)
        return 2
    except (FloatingPointError, OSError, MemoryError) as e:
        say(f"error: {e or 'out of memory'}", err=True)
        return 1
    except KeyboardInterrupt as e:
        say("stopped; --resume RUN_FOLDER continues from its last checkpoint", err=True)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is written; the exit hooks of W&B might wait for ever
