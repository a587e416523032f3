"""What is trained, its average, its optimizers, and where the run stands."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainlib.checkpoint import fitting
from trainlib.errors import UserError, say
from trainlib.muon import make_optimizers
from trainlib.process import StopSignal, process_rank

WEIGHT_DECAY = 1e-4  # decoupled, times the learning rate
WARMUP_STEPS = 200  # at most a tenth of the run
EMA_DECAY = 0.999  # of the average of the weights, less on short runs


def lr_at(step: int, total_steps: int, peak: float, warmup_steps: int = WARMUP_STEPS) -> float:
    """Return the learning rate of a step: linear warm-up to `peak`, then cosine to 0."""
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_at(step: int, total_steps: int, ema_decay: float = EMA_DECAY) -> float:
    """Return the EMA decay of a step: it remembers at most a tenth of the steps so far.

    Nor more than a twentieth of the run, so that a short run is not averaged with its start.
    """
    return min(ema_decay, 1 - 10 / (10 + step), max(0.0, 1 - 20 / total_steps))


def epoch_order(num: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's gestures, (num,) int64."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num))


class TrainState:
    """A run in progress: what is trained, and where it stands.

    `step` counts the steps done of `total_steps`; `loss_sum` adds up the losses of the epoch in
    progress, over gestures; `task_loss` is the running mean loss of each task. `scheduler` is only
    carried along, `config` a dataclass with num_epochs, batch_size, lr, optimizer, compile
    and seed.
    """

    def __init__(
        self, model: nn.Module, scheduler: Any, config: Any, total_steps: int, num_tasks: int
    ) -> None:
        self.model, self.scheduler, self.config = model, scheduler, config
        self.step, self.total_steps, self.num_sequences = 0, total_steps, 0
        self.steps_per_epoch = total_steps // config.num_epochs
        self.data_sha256: str | None = None
        self.stop = StopSignal()
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        is_muon = config.optimizer == "muon"
        self.optimizers = make_optimizers(model, config.lr, WEIGHT_DECAY, muon=is_muon)
        self.device = next(model.parameters()).device
        self.task_loss = torch.ones(num_tasks, device=self.device, dtype=torch.float32)
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32)
        self.forward: Any = torch.compile(model) if config.compile else model
        if process_rank()[1] > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    def update(self, lr: float) -> None:
        """Step the weights along their gradients, and the EMA after them."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        decay = ema_decay_at(self.step, self.total_steps)
        averages: list[Tensor] = list(self.ema.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, list[Tensor](self.model.parameters()), 1 - decay)
        self.step += 1

    @property
    def step_seed(self) -> int:
        """The seed of all that the next step draws."""
        return int(self.config.seed) * 1_000_003 + self.step

    @property
    def epoch(self) -> int:
        """The epochs done."""
        return self.step // self.steps_per_epoch

    def batches(self, num: int) -> Sequence[Tensor]:
        """Return what is left of the epoch, of `num` gestures: batches of row numbers, int64."""
        done, self.num_sequences = self.step % self.steps_per_epoch, num
        if not done:
            self.loss_sum.zero_()
        order = epoch_order(num, self.config.seed, self.epoch).to(self.device)
        return order.split(self.config.batch_size)[done:]

    def to_checkpoint(self, epoch: int, wandb_id: str | None = None) -> dict[str, Any]:
        """Return what `save_checkpoint` writes: plain types and tensors only.

        The plan's names where it has one: training goes on from `model_state_dict`, what is judged
        is `ema_state_dict`; `loss` is the mean of the epoch so far, `optimizers` names each entry
        of `optimizer_state_dict`.
        """
        seen = (self.step - epoch * self.steps_per_epoch) * self.config.batch_size
        seen = min(seen, self.num_sequences)  # the last batch may be smaller
        return {
            "epoch": epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "loss": self.loss_sum.item() / max(seen, 1),
            "loss_sum": self.loss_sum,
            "task_loss": self.task_loss,
            "model_state_dict": self.model.state_dict(),
            "ema_state_dict": self.ema.state_dict(),
            "optimizers": [type(o).__name__.lower() for o in self.optimizers],
            "optimizer_state_dict": [o.state_dict() for o in self.optimizers],
            "config": asdict(self.config),
            "data_sha256": self.data_sha256,
            "wandb_id": wandb_id,
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take up what `load_checkpoint` returned; UserError if the data has another size now."""
        path = content["path"]
        with fitting(path):
            before = content["steps_per_epoch"]
            self.model.load_state_dict(content["model_state_dict"])
            self.ema.load_state_dict(content["ema_state_dict"])
            states = content["optimizer_state_dict"]
            for optimizer, saved in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(saved)
            self.task_loss.copy_(content["task_loss"])
            self.loss_sum.copy_(content["loss_sum"])
            self.step = content["step"]
        if before != self.steps_per_epoch:
            change = f"{before} steps, now {self.steps_per_epoch}"
            raise UserError(f"an epoch of {path} had {change}; restore its data set")
        if content.get("data_sha256") not in (None, self.data_sha256):
            say("warning: the training data is not that of the checkpoint", err=True)
