"""Ways to train a denoiser of gestures: ours, and two that a user would pick instead.

The peers are trained by their own code and stock recipe, on gestures that are padded to 256 frames
inside the network, since it halves them; only the learning rate is a choice.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from benchmarks.peers import import_torchvision
from benchmarks.training import our_state
from trainlib.gestures import ACTION_DIM, SEQ_LEN

FRAMES = 256  # a length that halves eight times


class Padded(nn.Module):
    """A network over (B, C, 256) as a denoiser of gestures, (B, L, C), L at most 256."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        """Predict as the network does; what the peers pass beside x_t and t is left out."""
        L = x_t.shape[1]
        output = self.network(F.pad(x_t.mT, (0, FRAMES - L)), t)
        return (output if isinstance(output, Tensor) else output.sample).mT[:, :L]


class Recipe:
    """A training: call `step` as often as `total_steps` says, then judge what `trained` returns."""

    LEARNING_RATES: tuple[float, ...] = ()  # the stock one first

    def __init__(self, x_train: Tensor, lr: float, total_steps: int, **size: Any) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """Take one training step."""
        raise NotImplementedError

    def trained(self) -> tuple[nn.Module, tdd.DDIMScheduler, dict[str, Any]]:
        """Return the averaged denoiser, its noise schedule, and the sampling it is meant for."""
        raise NotImplementedError


def batches_of(x_train: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Return batches of gestures without end, each epoch in a new order."""
    while True:
        for rows in torch.randperm(len(x_train)).split(batch_size):
            yield x_train[rows]


class Ours(Recipe):
    """The default recipe of this project, its schedules sized for the steps that there are."""

    LEARNING_RATES = (3e-3, 1.5e-3)

    def __init__(self, x_train: Tensor, lr: float, total_steps: int, **size: Any) -> None:
        self.x_train, self.state = x_train, our_state(x_train, lr=lr, **size)
        self.state.total_steps = total_steps
        self.rows: Iterator[Tensor] = iter(())

    def step(self) -> None:
        """Take one training step."""
        rows = next(self.rows, None)
        if rows is None:
            self.rows = iter(self.state.batches(len(self.x_train)))
            rows = next(self.rows)
        self.state.model.train()
        tdd.train_step(self.state, self.x_train[rows])

    def trained(self) -> tuple[nn.Module, tdd.DDIMScheduler, dict[str, Any]]:
        """Return the EMA weights."""
        return self.state.ema, self.state.scheduler, self.state.config.sampling


class Lucidrains(Recipe):
    """Unet1D of denoising-diffusion-pytorch, by its README: v, cosine, Adam, two batches of 32."""

    LEARNING_RATES = (8e-5, 4e-4)

    def __init__(self, x_train: Tensor, lr: float, total_steps: int, **size: Any) -> None:
        import_torchvision()
        from denoising_diffusion_pytorch import GaussianDiffusion1D, Unet1D
        from ema_pytorch import EMA

        torch.manual_seed(0)
        size = {"dim": 64, "dim_mults": (1, 2, 4, 8)} | size
        self.diffusion = GaussianDiffusion1D(
            Padded(Unet1D(channels=ACTION_DIM, **size)),
            seq_length=SEQ_LEN,
            timesteps=1000,
            objective="pred_v",
            channels=ACTION_DIM,
            self_condition=False,
            channel_first=False,
        )
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=lr, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        self.batches = batches_of(x_train, 32)

    def step(self) -> None:
        """Take one step of its Trainer1D: gradients of two batches, clipped to 1."""
        self.diffusion.train()
        for _ in range(2):
            (self.diffusion(next(self.batches)) / 2).backward()
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def trained(self) -> tuple[nn.Module, tdd.DDIMScheduler, dict[str, Any]]:
        """Return the EMA weights; its sampler is DDIM with eta 0, as ours where that is asked."""
        scheduler = tdd.DDIMScheduler(beta_schedule="cosine", prediction_type="v")
        return self.ema.ema_model.model, scheduler, {"sampler": "ddim", "eta": 0.0}


class Diffusers(Recipe):
    """UNet1DModel of diffusers, as its unconditional example trains: eps, linear, AdamW, EMA."""

    LEARNING_RATES = (1e-4, 5e-4)

    def __init__(self, x_train: Tensor, lr: float, total_steps: int, **size: Any) -> None:
        import_torchvision()
        from diffusers import DDPMScheduler, UNet1DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        standard: dict[str, Any] = {"block_out_channels": (64, 128, 128), "layers_per_block": 2}
        size = standard | size
        extra = size["block_out_channels"][0]  # channels of the embedded t, beside the gesture's
        network: Any = UNet1DModel(
            sample_size=FRAMES,
            in_channels=ACTION_DIM,
            out_channels=ACTION_DIM,
            time_embedding_type="positional",
            extra_in_channels=extra,
            **size,
        )
        self.model = Padded(network)
        self.noise: Any = DDPMScheduler(num_train_timesteps=1000)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        warmup = min(500, total_steps // 10)  # the example's 500 would be all of a short run
        schedule: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": total_steps}
        self.decay = get_scheduler("cosine", self.optimizer, **schedule)
        options: dict[str, Any] = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0}
        self.ema = EMAModel(self.model.parameters(), power=0.75, **options)
        self.batches = batches_of(x_train, 16)

    def step(self) -> None:
        """Take one step of the example's loop."""
        x_0 = tdd.to_model_units(next(self.batches))
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
        x_t = self.noise.add_noise(x_0, eps, t)
        F.mse_loss(self.model(x_t, t), eps).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.decay.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def trained(self) -> tuple[nn.Module, tdd.DDIMScheduler, dict[str, Any]]:
        """Return the EMA weights; its schedule is the linear one, its sampler DDIM with eta 0."""
        averaged = copy.deepcopy(self.model)
        self.ema.copy_to(averaged.parameters())
        return averaged, tdd.DDIMScheduler(), {"sampler": "ddim", "eta": 0.0}


RECIPES: dict[str, Callable[..., Recipe]] = {
    "ours": Ours,
    "denoising-diffusion-pytorch, Unet1D": Lucidrains,
    "diffusers, UNet1DModel": Diffusers,
}
