"""The exact posterior given the touch-down: onset and start are known, type, duration, end are not.

    p(delta_t | onset) ∝ 1/(L - delta_t + 1) where onset + delta_t <= L, the prior's 1/#onsets;
    types in equal parts; the end uniform along the axes that move

It is sampled, and averaged in closed form. Its mean is what a regression tends to.
"""

import numpy as np
import torch
from torch import Tensor

from augmentation.click_aug import Gestures, render
from evaluation.bayes import GesturePrior
from evaluation.estimates import FloatArray
from trainlib.gestures import PRESSED


def duration_distribution(onset: np.ndarray, prior: GesturePrior) -> FloatArray:
    """Return P(delta_t | onset), (n, durations of the prior), rows sum to 1.

    Args:
        onset: first touched frame, (n,) int, at most L - min_delta_t.
        prior: the distribution of the gestures.
    """
    delta_t = np.arange(prior.min_delta_t, prior.max_delta_t + 1)
    L = prior.sequence_length
    weight = (onset[:, None] + delta_t <= L) / (L - delta_t + 1)
    return weight / weight.sum(axis=1, keepdims=True)


def read_touch_down(x_0: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the first touched frame, (n,), and x, y there, (n, 2), of gestures that touch."""
    onset = (x_0[..., 2] > PRESSED).int().argmax(dim=1)
    start = x_0[torch.arange(len(x_0), device=x_0.device), onset, :2]
    return onset.cpu().numpy(), start.cpu().numpy()


def posterior_samples(
    x_0: Tensor, prior: GesturePrior, num_samples: int, rng: np.random.Generator
) -> Tensor:
    """Draw gestures that touch down when and where x_0 does.

    Args:
        x_0: gestures of the prior, (n, L, C), data units; their touch-down alone is read.
        prior: the distribution of the gestures.
        num_samples: K.
        rng: the source of randomness.

    Returns:
        (n, K, L, C) float32, on the device of x_0.
    """
    onset, start = read_touch_down(x_0)
    cumulative = duration_distribution(onset, prior).cumsum(axis=1)
    u = rng.random((len(onset), num_samples, 1))
    delta_t = prior.min_delta_t + (cumulative[:, None, :-1] <= u).sum(axis=2).ravel()
    pick = rng.integers(len(prior.kinds), size=delta_t.size)
    start, onset = start.repeat(num_samples, axis=0), onset.repeat(num_samples)
    end = np.where(prior.moves[pick], rng.random(start.shape, dtype=np.float32), start)
    drawn = render(Gestures(prior.kinds[pick], onset, delta_t, start, end), prior.sequence_length)
    return torch.from_numpy(drawn).to(x_0.device).unflatten(0, (len(x_0), num_samples))


def posterior_mean_gesture(x_0: Tensor, prior: GesturePrior) -> Tensor:
    """Return the mean of the gestures that touch down when and where x_0 does, (n, L, C).

    Frames are linear in the end, so the mean over ends and types is the gesture to the mean end,
    ½ where an axis moves.
    """
    onset, start = read_touch_down(x_0)
    durations = duration_distribution(onset, prior)
    n, D = durations.shape
    end = start + prior.moves.mean(axis=0).astype(np.float32) * (0.5 - start)
    delta_t = np.tile(np.arange(prior.min_delta_t, prior.max_delta_t + 1), n)
    start, end, onset = (each.repeat(D, axis=0) for each in (start, end, onset))
    gestures = Gestures(np.zeros(n * D, np.int8), onset, delta_t, start, end)
    rendered = render(gestures, prior.sequence_length).reshape(n, D, prior.sequence_length, -1)
    return torch.from_numpy(np.einsum("nd,ndlc->nlc", durations, rendered)).to(x_0)
