"""The programs to compare with: the plan's loop as it is written, and three libraries' samplers.

The plan (docs/diffusion_test_plan.md) asks for nn.TransformerEncoder with dropout 0.1, batches
from a DataLoader with four workers, AdamW, gradient clipping, `.item()` on every step, and after
each epoch a loss and ten sampling steps on three validation batches.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import train_diffusion_ddim as tdd
from trainlib.gestures import ACTION_DIM, SEQ_LEN


class PlanNetwork(nn.Module):
    """The plan's denoiser out of torch's own encoder, attention dropout included.

    `known_frames` appends the known values and their mask to the input, (C + 1) channels, the
    least that lets it take part in the keyframes protocol.
    """

    def __init__(
        self,
        d_model: int = 64,
        nhead: int = 4,
        num_layers: int = 3,
        *,
        dim_feedforward: int = 256,
        seq_len: int = SEQ_LEN,
        known_frames: bool = False,
    ) -> None:
        super().__init__()
        self.known_frames = known_frames
        channels = ACTION_DIM + (ACTION_DIM + 1 if known_frames else 0)
        self.action_embedding = nn.Linear(channels, d_model)
        self.pos_encoder = tdd.PositionalEncoding(d_model, seq_len)
        self.timestep_embedding = tdd.TimestepEmbedding(d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, dim_feedforward, dropout=0.1, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers)
        self.output_projection = nn.Linear(d_model, ACTION_DIM)
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(
        self, x_t: Tensor, t: Tensor, known: Tensor | None = None, known_mask: Tensor | None = None
    ) -> Tensor:
        """Predict eps, (B, L, C), as `MinimalDiffusionTransformer.forward` does."""
        x = x_t
        if self.known_frames:
            if known is None or known_mask is None:
                known, known_mask = x_t, torch.zeros_like(x_t[..., 0], dtype=torch.bool)
            mask = known_mask[..., None].to(x_t)
            x = torch.cat([x_t, known * mask, mask], dim=-1)
        x = self.pos_encoder(self.action_embedding(x)) + self.timestep_embedding(t)[:, None]
        return self.output_projection(self.transformer(self.layer_norm(x)))


class Gestures(Dataset):
    """Gestures (N, L, 3), data units, one numpy row at a time, as the plan's data set has them."""

    def __init__(self, x_0: np.ndarray) -> None:
        self.sequences = x_0

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Tensor:
        """Return one gesture, (L, 3)."""
        return torch.from_numpy(self.sequences[index])


class PlanLoop:
    """The plan's training loop, one step at a time; the workers fetch ahead meanwhile.

    Args:
        model: a denoiser that predicts eps.
        x_0: gestures (N, L, 3), data units.
        batch_size: of the plan's command.
        lr: of the plan's command.
        known_frames: train given the press edges, in [-1, 1]; else the plan's task, in [0, 1].
        num_workers: of the DataLoader.
    """

    def __init__(
        self,
        model: nn.Module,
        x_0: np.ndarray,
        batch_size: int = 64,
        lr: float = 2e-4,
        *,
        known_frames: bool = False,
        num_workers: int = 4,
    ) -> None:
        self.model, self.known_frames = model, known_frames
        self.scheduler = tdd.DDIMScheduler()
        self.loader = DataLoader(
            Gestures(x_0), batch_size=batch_size, shuffle=True, num_workers=num_workers
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=50)
        self.batches: Iterator[Tensor] = iter(self.loader)

    def next_batch(self) -> Tensor:
        """Return the next batch; after the last one lower the learning rate and start again."""
        batch = next(self.batches, None)
        if batch is None:
            self.decay.step()
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def step(self) -> float:
        """Take one training step; return its loss."""
        self.model.train()
        x_0 = self.next_batch()
        given: tuple[Tensor, ...] = ()
        if self.known_frames:
            given = (tdd.to_model_units(x_0), tdd.press_edges(x_0))
            x_0 = given[0]
        t = torch.randint(0, self.scheduler.num_timesteps, (len(x_0),))
        x_t, eps = self.scheduler.add_noise(x_0, t)
        loss = F.mse_loss(self.model(x_t, t, *given), eps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def validate(self, x_val: Tensor, batch_size: int = 64) -> None:
        """Do what the plan does after every epoch: three batches, a loss and ten steps each."""
        self.model.eval()
        with torch.no_grad():
            for x_0 in x_val.split(batch_size)[:3]:
                t = torch.randint(0, self.scheduler.num_timesteps, (len(x_0),))
                x_t, eps = self.scheduler.add_noise(x_0, t)
                F.mse_loss(self.model(x_t, t), eps).item()
                sampled = self.scheduler.sample(self.model, tuple(x_0.shape), "cpu", 10)
                tdd.compute_reconstruction_metrics(x_0, sampled)


def diffusers_sampler(
    model: nn.Module, scheduler: tdd.DDIMScheduler, shape: tuple[int, ...], steps: int
) -> Callable[[Tensor], Tensor]:
    """Return x_T → x_0 (model units) by diffusers' DDIMScheduler, as its pipelines drive it."""
    from diffusers import DDIMScheduler

    prediction = {"x0": "sample", "v": "v_prediction"}.get(scheduler.prediction_type, "epsilon")
    theirs: Any = DDIMScheduler(
        num_train_timesteps=scheduler.num_timesteps,
        trained_betas=scheduler.betas.numpy(),
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )

    @torch.no_grad()
    def sample(x_t: Tensor) -> Tensor:
        theirs.set_timesteps(steps)
        for t in theirs.timesteps:
            output = model(x_t, t.expand(len(x_t)))
            x_t = theirs.step(output, t, x_t, use_clipped_model_output=True).prev_sample
        return x_t

    return sample


def import_torchvision() -> None:
    """Import torchvision even where its operators do not load, beside a CPU-only torch.

    denoising-diffusion-pytorch and diffusers import it, but their one-dimensional diffusion uses
    none of it. Without it nothing happens.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.append(library)  # they live as long as their library


OPERATORS: list[torch.library.Library] = []


def lucidrains_sampler(
    model: nn.Module, scheduler: tdd.DDIMScheduler, shape: tuple[int, ...], steps: int
) -> Callable[[Tensor], Tensor]:
    """Return a sampler by lucidrains' GaussianDiffusion1D; it draws its own x_T."""
    import_torchvision()
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch_1d as peer

    peer.tqdm = lambda items, **_: items  # a progress bar would count against it
    objectives = {"x0": "pred_x0", "v": "pred_v", "epsilon": "pred_noise"}
    theirs = peer.GaussianDiffusion1D(
        model,
        seq_length=shape[1],
        timesteps=scheduler.num_timesteps,
        sampling_timesteps=steps,
        objective=objectives[scheduler.prediction_type],
        beta_schedule="cosine",
        channels=shape[2],
        self_condition=False,
        channel_first=False,
    )
    return lambda x_t: theirs.sample(batch_size=len(x_t))


def azula_sampler(
    model: nn.Module, scheduler: tdd.DDIMScheduler, shape: tuple[int, ...], steps: int
) -> Callable[[Tensor], Tensor]:
    """Return x_T → x_0 (model units) by azula's DDIMSampler; its denoiser is x_0_pred, clipped."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import CosineSchedule
    from azula.sample import DDIMSampler

    class Wrapped(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.schedule = model, CosineSchedule()

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            index = (t * (scheduler.num_timesteps - 1)).long().expand(len(x_t))
            return DiracPosterior(self.backbone(x_t, index).clamp(-1, 1))

    return DDIMSampler(Wrapped(), steps=steps, silent=True)


SAMPLERS = {
    "diffusers": diffusers_sampler,
    "denoising-diffusion-pytorch": lucidrains_sampler,
    "azula": azula_sampler,
}
