"""Clicks and swipes: draw the parameters, render the frames, write the data set.

The three steps stay apart. `draw_gestures` is the only one that uses randomness; `render` is a
pure function of the parameters, so another velocity profile or a curved path is a change there
and nowhere else; `generate_augmented_dataset` joins the two and hands the result to the folder
writer. The law and the format are stated in the package's docstring.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from augmentation.folder import GeneratedDataset, claim_folder, write_dataset

SEQUENCE_LENGTH = 250  # frames, 0.5 s at 500 Hz

GESTURE_TYPES = ("click", "horizontal", "vertical", "diagonal")
ACTION_TYPES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in GESTURE_TYPES},
    "swipe": ("diagonal",),
    "mixed": GESTURE_TYPES,
}
# Whether x and y move, per gesture type; a coordinate that does not move keeps its start.
_MOVES = np.array([[False, False], [True, False], [False, True], [True, True]])


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
        per_kind = np.bincount(self.kind[acting], minlength=len(GESTURE_TYPES))
        named = dict(zip(GESTURE_TYPES, per_kind.tolist(), strict=True))
        return {**named, "no_action": int(np.sum(~acting))}


def draw_gestures(
    rng: np.random.Generator,
    num_sequences: int,
    action_type: str,
    min_delta_t: int,
    max_delta_t: int,
    sequence_length: int = SEQUENCE_LENGTH,
) -> Gestures:
    """Draw the parameters of a data set.

    Args:
        rng: the only source of randomness.
        num_sequences: N, at least 1.
        action_type: a key of ACTION_TYPES.
        min_delta_t: shortest touch, frames, in [0, max_delta_t].
        max_delta_t: longest touch, frames, in [min_delta_t, sequence_length]; included.
        sequence_length: L, frames, at least 1.

    Returns:
        N gestures.

    Raises:
        ValueError: an argument is outside its range; the message carries the value got.
    """
    check_arguments(num_sequences, action_type, min_delta_t, max_delta_t, sequence_length)
    kinds = [GESTURE_TYPES.index(name) for name in ACTION_TYPES[action_type]]
    kind = rng.permutation(np.resize(np.array(kinds, dtype=np.int8), num_sequences))
    delta_t = rng.integers(min_delta_t, max_delta_t, size=num_sequences, endpoint=True)
    onset = rng.integers(0, sequence_length - delta_t, endpoint=True)
    # float32 uniforms are multiples of 2^-24, so end - start is exact and a swipe lands on
    # its end to the last bit.
    start = rng.random((num_sequences, 2), dtype=np.float32)
    end = np.where(_MOVES[kind], rng.random((num_sequences, 2), dtype=np.float32), start)
    return Gestures(kind, onset, delta_t, start, end)


def render(gestures: Gestures, sequence_length: int = SEQUENCE_LENGTH) -> np.ndarray:
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
    sequence_length: int = SEQUENCE_LENGTH,
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
        ValueError: an argument is out of range, or (DatasetFolderError) the folder is in use.
        OSError: the disk failed or is full; no manifest was written.
    """
    law = (num_sequences, action_type, min_delta_t, max_delta_t, sequence_length)
    check_arguments(*law)
    _check_integer("sequences_per_file", sequences_per_file, low=1)
    _check_integer("seed", seed, low=0)
    split = _split_name(output_dir, split)
    arguments = {
        "num_sequences": int(num_sequences),
        "sequence_length": int(sequence_length),
        "action_type": action_type,
        "min_delta_t": int(min_delta_t),
        "max_delta_t": int(max_delta_t),
        "sequences_per_file": int(sequences_per_file),
        "seed": int(seed),
        "split": split,
    }
    folder, finished = claim_folder(output_dir, arguments, overwrite=overwrite)
    if finished is not None:
        return GeneratedDataset(folder, finished, written=False)
    gestures = draw_gestures(_split_generator(seed, split), *law)
    render_rows = partial(_render_rows, gestures, sequence_length)
    notes = {"gesture_counts": gestures.counts()}
    manifest = write_dataset(folder, arguments, render_rows, notes=notes, progress=progress)
    return GeneratedDataset(folder, manifest, written=True)


def _render_rows(gestures: Gestures, sequence_length: int, rows: slice) -> np.ndarray:
    """Render some rows of a data set."""
    return render(gestures[rows], sequence_length)


def _split_name(output_dir: str | os.PathLike[str], split: str | None) -> str:
    """Return the split, by default the last component of the folder's path; never empty."""
    name = Path(os.path.abspath(output_dir)).name if split is None else split
    if not name:
        raise ValueError("split must be a non-empty name, got ''")
    return name


def _split_generator(seed: int, split: str) -> np.random.Generator:
    """Return the one generator of a data set; its gestures do not depend on the files' size."""
    entropy = [int(seed), zlib.crc32(split.encode())]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def check_arguments(
    num_sequences: int, action_type: str, min_delta_t: int, max_delta_t: int, sequence_length: int
) -> None:
    """Raise ValueError for arguments outside the ranges that draw_gestures states."""
    if action_type not in ACTION_TYPES:
        raise ValueError(
            f"action_type must be one of {', '.join(ACTION_TYPES)}, got {action_type!r}"
        )
    _check_integer("num_sequences", num_sequences, low=1)
    _check_integer("sequence_length", sequence_length, low=1)
    _check_integer("min_delta_t", min_delta_t, low=0)
    _check_integer("max_delta_t", max_delta_t, low=0)
    if not min_delta_t <= max_delta_t <= sequence_length:
        raise ValueError(
            "min_delta_t <= max_delta_t <= sequence_length must hold, got "
            f"{min_delta_t}, {max_delta_t}, {sequence_length}"
        )


def _check_integer(name: str, value: object, *, low: int) -> None:
    """Refuse what is not an integer >= low; a bool or a float is a mistake, not a count."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
