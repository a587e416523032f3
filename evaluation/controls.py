"""Controls: answers to the keyframes protocol that no good score may be given to, and its limit.

Each is a function x_0 -> recreations, (B, L, C) to (B, L, C) in data units, and stands in the
tables where the model stands. A line that a control meets says nothing about a model.

    zeros                   the empty gesture
    training_mean           the best answer that ignores the original
    random_training_item    a real gesture, but another one
    nearest_training_item   a lookup that sees the whole original
    given_frames_alone      the known frames, and no touch in between
    untrained_model         the same network with the weights it starts from
    shuffled_condition      the model, given the known frames of another gesture
    interpolation           not a control but the limit: between two consecutive known frames a
                            straight line, outside them the nearest one; exact for every linear
                            gesture with a press edge. On gestures that need not be linear it is
                            a control like any other
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train_diffusion_ddim import (
    DDIMScheduler,
    TrainConfig,
    build_model,
    nearest_known,
    press_edges,
    recreate,
)

Recreation = Callable[[Tensor], Tensor]

VALIDATION_DATA = "validation_data"  # what held-out gestures score: the limit of generated ones
OTHER_USERS = "other_users"  # what real gestures of people score whom nobody trained on
LIMITS = ("interpolation", VALIDATION_DATA, OTHER_USERS)
CONTROL_SEED = 20210504


def is_control(setting: str, limits: Sequence[str] = LIMITS) -> bool:
    """Tell whether a setting is a control: neither the model nor a limit."""
    return not setting.startswith("model") and setting not in limits


def zeros(x_0: Tensor) -> Tensor:
    """Answer with no gesture at all."""
    return torch.zeros_like(x_0)


def training_mean(x_train: Tensor) -> Recreation:
    """Answer with the mean of the training set."""
    return lambda x_0: x_train.mean(dim=0).expand_as(x_0)


def random_training_item(x_train: Tensor) -> Recreation:
    """Answer with a training gesture drawn at random, always the same draw."""

    def recreation(x_0: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(CONTROL_SEED)
        rows = torch.randint(len(x_train), (len(x_0),), generator=generator)
        return x_train[rows.to(x_train.device)]

    return recreation


def nearest_training_item(x_train: Tensor) -> Recreation:
    """Answer with the training gesture of least MSE to what is shown."""
    return lambda x_0: x_train[nearest(x_0, x_train)[1]]


def nearest(x: Tensor, bank: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """Find each row's nearest neighbour.

    Args:
        x: (N, ...), float32.
        bank: (M, ...), of the same row shape.
        chunk: rows of x per matrix product, to bound the memory.

    Returns:
        Root mean squared difference to the neighbour, (N,), and its row in the bank, (N,).
    """
    flat = bank.flatten(1)
    norm = (flat**2).sum(dim=1)
    # |a - b|² = |a|² - 2ab + |b|², and |a|² does not decide; the distance itself is taken
    # from the difference, because the product rounds small ones away
    rows = torch.cat([(norm - 2 * q.flatten(1) @ flat.T).argmin(dim=1) for q in x.split(chunk)])
    return ((x - bank[rows]) ** 2).flatten(1).mean(dim=1).sqrt(), rows


def interpolate(known: Tensor, known_mask: Tensor) -> Tensor:
    """Join consecutive known frames by straight lines; outside them hold the nearest.

    Args:
        known: (B, L, C); read only where the mask is set.
        known_mask: (B, L) bool; without any known frame the answer is zero.

    Returns:
        (B, L, C).
    """
    C = known.shape[-1]
    before, after, flags = nearest_known(known, known_mask).split([C, C, 3], dim=-1)
    along, has_before, has_after = flags.unbind(dim=-1)
    share = torch.where(has_before > 0, along, has_after)[..., None]  # of `after`
    return before + (after - before) * share


def interpolation(x_0: Tensor) -> Tensor:
    """Answer with the interpolation between the press edges of x_0."""
    return interpolate(x_0, press_edges(x_0))


def given_frames_alone(x_0: Tensor) -> Tensor:
    """Answer with the known frames and zeros: what a score owes to the question alone."""
    return torch.where(press_edges(x_0)[..., None], x_0, 0.0)


def untrained_model(config: TrainConfig, device: str | torch.device) -> nn.Module:
    """Build the network that `config` describes, with the weights it would start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config).to(device).eval().requires_grad_(False)


def make_controls(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    x_train: Tensor,
    sampling: dict[str, Any],
) -> dict[str, Recreation]:
    """Return all controls and the limit by name.

    Args:
        model: the trained denoiser.
        untrained: the same network before training.
        scheduler: their scheduler.
        x_train: (N, L, C), data units, on the model's device.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
    """
    return {
        "zeros": zeros,
        "training_mean": training_mean(x_train),
        "random_training_item": random_training_item(x_train),
        "nearest_training_item": nearest_training_item(x_train),
        "given_frames_alone": given_frames_alone,
        "untrained_model": lambda x_0: recreate(untrained, scheduler, x_0, **sampling),
        "shuffled_condition": lambda x_0: recreate(model, scheduler, x_0.roll(1, 0), **sampling),
        "interpolation": interpolation,
    }
