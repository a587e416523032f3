"""The family of gestures that the exact prior describes: who belongs, and how far off others are.

A gesture of the family is one straight, even press: the finger lands, moves linearly and lifts.
GesturePrior (evaluation/bayes.py) says how long it lasts and in which directions it moves. Whether
a data set is of the family at all, `read_prior` decides.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from augmentation.click_aug import Recipe
from evaluation.bayes import GesturePrior
from evaluation.controls import interpolation
from train_diffusion_ddim import has_press_edge
from trainlib.errors import UserError
from trainlib.gesture_files import MANIFEST_NAME
from trainlib.gestures import PRESSED
from trainlib.metrics import has_one_press

TOLERANCE = 0.02  # of a valid gesture, share of the screen or of a press


def is_linear_gesture(x_0: Tensor) -> Tensor:
    """Tell which gestures are one straight, even press with an edge, (B,) bool.

    Exactly those that the interpolation between their press edges repeats.
    """
    same = (x_0 - interpolation(x_0)).abs().amax(dim=(1, 2)) < 1e-4
    return has_one_press(x_0) & has_press_edge(x_0) & same


def read_recipe(data_dir: str | Path, length: int) -> Recipe | None:
    """Return what dataset.json says of how gestures of `length` frames were drawn.

    None where it does not say, or was written by another program.
    """
    try:
        made = json.loads((Path(data_dir) / MANIFEST_NAME).read_text("utf-8"))["arguments"]
        said = {name: made[name] for name in ("action_type", "min_delta_t", "max_delta_t")}
        return Recipe(**said, sequence_length=length)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_prior(data_dir: str | Path, x_0: Tensor) -> GesturePrior | None:
    """Return the prior of the gestures; None where their distribution is not known.

    The one rule for what may be asked of a data set. Its dataset.json decides: only the generator
    of straight gestures names their type and durations there, neither an import of recordings nor
    the human-like generator does. Without a dataset.json the gestures decide, and the prior is
    guessed of them if every touch among them is of the family.

    Args:
        data_dir: folder of the gestures.
        x_0: the gestures, (B, L, C), data units.
    """
    length = x_0.shape[1]
    made = read_recipe(data_dir, length)
    if made and made.max_delta_t > 0:
        return GesturePrior(length, max(1, made.min_delta_t), made.max_delta_t, made.action_type)
    one = x_0[(x_0[..., 2] > PRESSED).any(dim=1)]
    says_otherwise = (Path(data_dir) / MANIFEST_NAME).exists()
    if says_otherwise or not len(one) or not is_linear_gesture(one).all():
        return None
    frames = (one[..., 2] > PRESSED).sum(dim=1)
    pressed = (one[..., 2] > PRESSED)[..., None]
    moves = (  # a coordinate moves if it is not the same on all pressed frames
        torch.where(pressed, one[..., :2], -1).amax(1)
        - torch.where(pressed, one[..., :2], 2).amin(1)
        > 1e-6
    )
    kinds = {tuple(row) for row in moves.tolist()}
    named = {
        (False, False): "click",
        (True, False): "horizontal",
        (False, True): "vertical",
        (True, True): "diagonal",
    }
    kind = named[kinds.pop()] if len(kinds) == 1 else "mixed"
    return GesturePrior(length, int(frames.min()), int(frames.max()), kind)


def known_prior(data_dir: str | Path, x_0: Tensor) -> GesturePrior:
    """Return `read_prior` where nothing can be said without it; UserError if there is none."""
    prior = read_prior(data_dir, x_0)
    if prior is None:
        raise UserError(f"{data_dir} must hold straight gestures, whose distribution is known")
    return prior


class LineFit(NamedTuple):
    """Least-squares lines through x and y over the pressed frames; without any all is 0."""

    onset: Tensor  # first pressed frame, (B,) int64
    frames: Tensor  # how many are pressed, (B,) int64
    start: Tensor  # x, y of the lines at the first pressed frame, (B, 2) float64
    end: Tensor  # and at the last, (B, 2) float64
    rms: Tensor  # root mean squared residual of x and y, (B,) float64


def fit_lines(samples: Tensor) -> LineFit:
    """Fit lines to samples, (B, L, C), data units."""
    pressed = samples[..., 2] > PRESSED
    weight, xy = pressed.double()[..., None], samples[..., :2].double()
    frames, L = pressed.sum(dim=1), samples.shape[1]
    onset, last = pressed.int().argmax(dim=1), L - 1 - pressed.flip(1).int().argmax(dim=1)
    n = frames.clamp(min=1)[:, None, None]
    frame = torch.arange(L, device=samples.device)[None, :, None]
    middle = (weight * frame).sum(dim=1, keepdim=True) / n  # (B, 1, 1)
    mean = (weight * xy).sum(dim=1, keepdim=True) / n  # (B, 1, 2)
    time = frame - middle
    spread = (weight * time**2).sum(dim=1, keepdim=True).clamp(min=1e-6)  # 0 for one frame
    slope = (weight * time * (xy - mean)).sum(dim=1, keepdim=True) / spread  # (B, 1, 2)
    residual = weight * (xy - mean - slope * time)
    start, end = (
        (mean + slope * (at[:, None, None] - middle))[:, 0] * (frames > 0)[:, None]
        for at in (onset, last)
    )
    return LineFit(
        onset, frames, start, end, ((residual**2).sum(dim=(1, 2)) / (2 * n[:, 0, 0])).sqrt()
    )


def deviations(samples: Tensor) -> dict[str, Tensor]:
    """Return how far samples are from gestures of the family, (B,) each, 0 at best.

    press_softness, line_rms and idle_xy are what `validity` holds against TOLERANCE.
    """
    pressed = samples[..., 2] > PRESSED  # (B, L)
    idle_xy = samples[..., :2].abs().mean(dim=-1) * ~pressed
    return {
        "press_softness": (samples[..., 2] - pressed.to(samples)).abs().mean(dim=1),
        "line_rms": fit_lines(samples).rms,
        "idle_xy": idle_xy.sum(dim=1) / (~pressed).sum(dim=1).clamp(min=1),
    }


def validity(samples: Tensor, prior: GesturePrior) -> dict[str, Tensor]:
    """Tell which samples are gestures of the family, factor by factor.

    Args:
        samples: (B, L, C), data units, not rounded.
        prior: its durations are the allowed ones.

    Returns:
        (B,) bool each:
            one_press           the pressed frames are one run
            duration_in_range   there are min_delta_t ... max_delta_t of them
            press_binary        mean |press - (press > 0.5)| over all frames < 0.02
            straight_and_even   RMS distance of x and y from their least-squares lines over the
                                pressed frames < 0.02
            idle_at_zero        mean |x|, |y| over the other frames < 0.02
            valid               all of these
    """
    frames = (samples[..., 2] > PRESSED).sum(dim=1)
    deviation = deviations(samples)
    factors = {
        "one_press": has_one_press(samples),
        "duration_in_range": (prior.min_delta_t <= frames) & (frames <= prior.max_delta_t),
        "press_binary": deviation["press_softness"] < TOLERANCE,
        "straight_and_even": (deviation["line_rms"] < TOLERANCE) & (frames > 0),
        "idle_at_zero": deviation["idle_xy"] < TOLERANCE,
    }
    return factors | {"valid": torch.stack(list(factors.values())).all(dim=0)}
