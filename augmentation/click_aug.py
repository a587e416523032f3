"""Clicks and swipes: draw the parameters, render the frames, write the data set.

The three steps stay apart. `draw_gestures` is the only one that uses randomness; `render` is a
pure function of the parameters, so another velocity profile or a curved path is a change there
and nowhere else; `generate_augmented_dataset` joins the two and hands the result to the folder
writer. The distribution and the format are stated in the package's docstring.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainlib.errors import UserError
from trainlib.gesture_files import GeneratedDataset, Render, as_folder, write_gestures
from trainlib.gestures import GESTURE_TYPES, MOVES, SEQ_LEN
from trainlib.knobs import Knobs, as_type, flag
from trainlib.memory import memory_named

ACTION_TYPES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in MOVES},
    "swipe": ("diagonal",),
    "mixed": tuple(MOVES),
}
# Whether x and y move, by index into GESTURE_TYPES; what does not move keeps its start.
_MOVES = np.array([MOVES.get(name, (False, False)) for name in GESTURE_TYPES])


@dataclass(frozen=True, kw_only=True)
class Recipe(Knobs):
    """All that decides the bytes of a data set; an impossible value raises UserError.

    The generator's command line takes its defaults and its help from here.
    """

    num_sequences: int = flag(5000, "number of sequences", low=1)
    sequence_length: int = flag(SEQ_LEN, "frames per sequence, L", low=1)
    action_type: str = flag("mixed", "which gestures", choices=tuple(ACTION_TYPES))
    min_delta_t: int = flag(5, "shortest touch, frames; 0 = no action", low=0)
    max_delta_t: int = flag(50, "longest touch, frames, included", low=0)
    sequences_per_file: int = flag(100, "sequences per file; the last may hold fewer", low=1)
    seed: int = flag(0, "the same seed gives the same bytes", low=0, high=2**63 - 1)
    split: str = flag("train", "mixed into the seed, so that sets differ under one seed")

    def __post_init__(self) -> None:
        """Convert and check."""
        super().__post_init__()
        if not self.min_delta_t <= self.max_delta_t <= self.sequence_length:
            got = f"{self.min_delta_t}, {self.max_delta_t}, {self.sequence_length}"
            order = "min_delta_t <= max_delta_t <= sequence_length must hold"
            raise UserError(f"{order}, got {got}")
        if not self.split:
            raise UserError("--split must be a non-empty name, got ''")

    def generator(self) -> np.random.Generator:
        """Return the one source of randomness; the gestures do not depend on the files' size."""
        entropy = [self.seed, zlib.crc32(self.split.encode("utf-8", "surrogatepass"))]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


@dataclass(frozen=True)
class Gestures:
    """The parameters of N sequences with one gesture each.

    Attributes:
        kind: index into GESTURE_TYPES, (N,) int8.
        onset: first touched frame, (N,) int64 in [0, L - delta_t].
        delta_t: touched frames, (N,) int64 in [0, L]; 0 = no action.
        start: x, y of the first touched frame, (N, 2) float32 in [0, 1].
        end: x, y of the last touched frame, (N, 2) float32 in [0, 1].
    """

    kind: np.ndarray
    onset: np.ndarray
    delta_t: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        """Return N."""
        return len(self.kind)

    def __getitem__(self, rows: slice) -> "Gestures":
        """Return the gestures of a slice of sequences; the arrays are views."""
        return Gestures(
            self.kind[rows], self.onset[rows], self.delta_t[rows], self.start[rows], self.end[rows]
        )

    def counts(self) -> dict[str, int]:
        """Return the number of sequences per gesture type, delta_t = 0 as "no_action"."""
        acting = self.delta_t > 0
        num = np.bincount(self.kind[acting], minlength=len(GESTURE_TYPES)).tolist()
        named = {name: num[GESTURE_TYPES.index(name)] for name in MOVES}
        return {**named, "no_action": int(np.sum(~acting))}


def draw_gestures(
    rng: np.random.Generator,
    num_sequences: int,
    action_type: str,
    min_delta_t: int,
    max_delta_t: int,
    sequence_length: int = SEQ_LEN,
) -> Gestures:
    """Draw the parameters of N gestures.

    Args:
        rng: the only source of randomness.
        num_sequences: N, at least 1.
        action_type: a key of ACTION_TYPES.
        min_delta_t: shortest touch, frames, in [0, max_delta_t].
        max_delta_t: longest touch, frames, in [min_delta_t, sequence_length]; included.
        sequence_length: L, frames, at least 1.

    Raises:
        UserError: an argument is outside its range; the message carries the value got.
    """
    recipe = Recipe(
        num_sequences=num_sequences,
        action_type=action_type,
        min_delta_t=min_delta_t,
        max_delta_t=max_delta_t,
        sequence_length=sequence_length,
    )
    return _draw(rng, recipe)


def _draw(rng: np.random.Generator, recipe: Recipe) -> Gestures:
    """Draw the parameters of a data set's gestures."""
    N = recipe.num_sequences
    kinds = [GESTURE_TYPES.index(name) for name in ACTION_TYPES[recipe.action_type]]
    kind = rng.permutation(np.resize(np.array(kinds, dtype=np.int8), N))
    delta_t = rng.integers(recipe.min_delta_t, recipe.max_delta_t, size=N, endpoint=True)
    onset = rng.integers(0, recipe.sequence_length - delta_t, endpoint=True)
    # float32 uniforms are multiples of 2^-24, so end - start is exact and a swipe lands on
    # its end to the last bit.
    start = rng.random((N, 2), dtype=np.float32)
    end = np.where(_MOVES[kind], rng.random((N, 2), dtype=np.float32), start)
    return Gestures(kind, onset, delta_t, start, end)


def render(gestures: Gestures, sequence_length: int = SEQ_LEN) -> np.ndarray:
    """Turn gesture parameters into frames.

        x(frame) = start + (end - start)·(frame - onset) / (delta_t - 1)   while touched, else 0

    Args:
        gestures: N gestures that fit into sequence_length.
        sequence_length: L, frames.

    Returns:
        [x, y, press], (N, L, 3) float32, x and y in [0, 1], press 0 or 1.
    """
    delta_t = gestures.delta_t[:, None]
    frame = np.arange(sequence_length) - gestures.onset[:, None]  # (N, L), 0 at touch-down
    touched = (frame >= 0) & (frame < delta_t)
    progress = np.clip(frame / np.maximum(delta_t - 1, 1), 0.0, 1.0)  # even speed

    sequences = np.empty((len(gestures), sequence_length, 3), dtype=np.float32)
    for axis in (0, 1):
        start = gestures.start[:, axis, None].astype(np.float64)
        shift = gestures.end[:, axis, None] - start
        np.multiply(start + shift * progress, touched, out=sequences[:, :, axis])
    sequences[:, :, 2] = touched
    return sequences


def generate_augmented_dataset(
    output_dir: str | os.PathLike[str],
    num_sequences: int,
    min_delta_t: int,
    max_delta_t: int,
    sequence_length: int = SEQ_LEN,
    action_type: str = "mixed",
    sequences_per_file: int = 100,
    *,
    seed: int = 0,
    split: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> GeneratedDataset:
    """Write a data set folder: the same arguments, the same bytes; a repeated call does nothing.

    Args:
        output_dir: folder to write, made if missing.
        num_sequences: N, at least 1.
        min_delta_t: shortest touch, frames, in [0, max_delta_t]; 0 = no action.
        max_delta_t: longest touch, frames, in [min_delta_t, sequence_length]; included.
        sequence_length: L, frames, at least 1.
        action_type: a key of ACTION_TYPES.
        sequences_per_file: at least 1; the last file may hold fewer.
        seed: a non-negative integer.
        split: mixed into the seed, so that "train" and "val" differ under one seed; None takes
            the last component of output_dir.
        overwrite: replace the data set that is there; only its own files are removed.
        progress: show a bar, on a terminal only.

    Returns:
        The folder, its manifest, and whether anything was written.

    Raises:
        UserError: an argument is out of range, or the folder is in use.
        OSError: the disk failed or is full; no manifest was written.
        MemoryError: the parameters of so many sequences do not fit.
    """
    folder = as_folder(output_dir, "output_dir")
    recipe = Recipe(
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        action_type=action_type,
        min_delta_t=min_delta_t,
        max_delta_t=max_delta_t,
        sequences_per_file=sequences_per_file,
        seed=seed,
        split=folder_name(folder) if split is None else split,
    )

    def draw() -> tuple[Render, Mapping[str, Any]]:
        gestures = _draw(recipe.generator(), recipe)
        notes = {"gesture_counts": gestures.counts()}
        return lambda rows: render(gestures[rows], recipe.sequence_length), notes

    overwrite = as_type("overwrite", overwrite, bool)
    with memory_named("the data set", "--num_sequences"):
        return write_gestures(folder, asdict(recipe), draw, overwrite=overwrite, progress=progress)


def folder_name(folder: str | os.PathLike[str]) -> str:
    """Return the last component of a folder's path, "" for the root."""
    return os.path.basename(os.path.abspath(folder))
