"""Clicks and swipes: draw the parameters, render the frames, write the data set.

The three steps stay apart. `draw_gestures` is the only one that uses randomness; `render` is a
pure function of the parameters, so another velocity profile or a curved path is a change there
and nowhere else; `generate_augmented_dataset` joins the two and hands the result to the folder
writer. The distribution and the format are stated in the package's docstring. Gestures as people
make them come from augmentation/human.py, which keeps the same steps.
"""

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from augmentation.human import HABITS_FILE, draw_session, render_session
from trainlib.errors import UserError, check_choice
from trainlib.files import sha256_of
from trainlib.gesture_files import GeneratedDataset, Render, as_folder, write_gestures
from trainlib.gestures import GESTURE_TYPES, MOVES, SEQ_LEN
from trainlib.knobs import Knobs, as_type, flag
from trainlib.memory import memory_named

ACTION_TYPES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in MOVES},
    "swipe": ("diagonal",),
    "mixed": tuple(MOVES),
}
STYLES = ("straight", "human")
HUMAN_KINDS: Mapping[str, tuple[str, ...]] = {
    "click": ("tap",),
    "swipe": ("swipe",),
    "mixed": ("tap", "swipe"),
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
        _check_recipe(self.min_delta_t, self.max_delta_t, self.sequence_length, self.split)

    def generator(self) -> np.random.Generator:
        """Return the one source of randomness; the gestures do not depend on the files' size."""
        return _generator(self.seed, self.split)


@dataclass(frozen=True, kw_only=True)
class HumanRecipe(Knobs):
    """All that decides the bytes of a human-like data set, beside the fitted habits.

    Its limits of a contact have names of their own, so that nobody who reads them in a manifest
    takes the gestures for straight ones.
    """

    style: str = flag("human", "how gestures are drawn", choices=("human",))
    num_sequences: int = flag(5000, "number of sequences", low=1)
    sequence_length: int = flag(SEQ_LEN, "frames per sequence, L", low=1)
    action_type: str = flag("mixed", "which contacts", choices=tuple(HUMAN_KINDS))
    window: str = flag(
        "timeline", "timeline: a session as it runs; whole: one contact each, at a random onset",
        choices=("timeline", "whole"),
    )  # fmt: skip
    shortest: int = flag(1, "shortest contact, frames", low=0)
    longest: int = flag(SEQ_LEN, "longest contact, frames; of a session, L is no limit", low=1)
    sequences_per_file: int = flag(100, "sequences per file; the last may hold fewer", low=1)
    seed: int = flag(0, "the same seed gives the same bytes", low=0, high=2**63 - 1)
    split: str = flag("train", "mixed into the seed, so that sets differ under one seed")

    def __post_init__(self) -> None:
        """Convert and check."""
        super().__post_init__()
        _check_recipe(self.shortest, self.longest, self.sequence_length, self.split)


def _check_recipe(shortest: int, longest: int, length: int, split: str) -> None:
    """Raise UserError for durations that do not fit, or a split without a name."""
    if not shortest <= longest <= length:
        order = "min_delta_t <= max_delta_t <= sequence_length must hold"
        raise UserError(f"{order}, got {shortest}, {longest}, {length}")
    if not split:
        raise UserError("--split must be a non-empty name, got ''")


def _generator(seed: int, split: str) -> np.random.Generator:
    """Return the source of randomness of a data set."""
    entropy = [seed, zlib.crc32(split.encode("utf-8", "surrogatepass"))]
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
    min_delta_t: int | None = None,
    max_delta_t: int | None = None,
    sequence_length: int = SEQ_LEN,
    action_type: str = "mixed",
    sequences_per_file: int = 100,
    *,
    style: str = "straight",
    window: str | None = None,
    seed: int = 0,
    split: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> GeneratedDataset:
    """Write a data set folder: the same arguments, the same bytes; a repeated call does nothing.

    Args:
        output_dir: folder to write, made if missing.
        num_sequences: N, at least 1.
        min_delta_t: shortest touch, frames, in [0, max_delta_t]; 0 = no action. None takes 5, of
            human gestures no limit.
        max_delta_t: longest touch, frames, in [min_delta_t, sequence_length]; included. None takes
            50, of human gestures no limit, as sequence_length itself in a timeline.
        sequence_length: L, frames, at least 1.
        action_type: a key of ACTION_TYPES; of human gestures, one of HUMAN_KINDS.
        sequences_per_file: at least 1; the last file may hold fewer.
        style: "straight", or "human" for gestures as people make them (augmentation/human.py).
        window: of human gestures, "timeline" for a session as it runs, "whole" for one contact in
            each window; None takes the timeline.
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
    given = {
        "num_sequences": num_sequences,
        "sequence_length": sequence_length,
        "action_type": action_type,
        "sequences_per_file": sequences_per_file,
        "seed": seed,
        "split": folder_name(folder) if split is None else split,
    }
    arguments, draw = _plan(style, window, min_delta_t, max_delta_t, given)
    overwrite = as_type("overwrite", overwrite, bool)
    with memory_named("the data set", "--num_sequences"):
        return write_gestures(folder, arguments, draw, overwrite=overwrite, progress=progress)


Draw = Callable[[], tuple[Render, Mapping[str, Any]]]


def _plan(
    style: str, window: Any, shortest: Any, longest: Any, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Draw]:
    """Return all that decides the bytes, and what draws and renders; limits, window may be None.

    UserError if the style has no such thing.
    """
    check_choice("--style", style, STYLES)
    if style == "human":
        length = given["sequence_length"]
        limits = {
            "shortest": 0 if shortest is None else shortest,
            "longest": length if longest is None else longest,
        }
        human = HumanRecipe(**given, **limits, window="timeline" if window is None else window)
        arguments = {**asdict(human), "habits": sha256_of(HABITS_FILE)}
        return arguments, lambda: _draw_human(human)
    if window not in (None, "whole"):
        raise UserError(f"--window {window} needs --style human")
    limits = {"min_delta_t": shortest, "max_delta_t": longest}
    recipe = Recipe(**given, **{name: limit for name, limit in limits.items() if limit is not None})

    def draw() -> tuple[Render, Mapping[str, Any]]:
        gestures = _draw(recipe.generator(), recipe)
        notes = {"gesture_counts": gestures.counts()}
        return lambda rows: render(gestures[rows], recipe.sequence_length), notes

    return asdict(recipe), draw


def _draw_human(recipe: HumanRecipe) -> tuple[Render, Mapping[str, Any]]:
    """Draw the contacts of a data set; return what renders them, and their counts."""
    length = recipe.sequence_length
    session = draw_session(
        _generator(recipe.seed, recipe.split),
        recipe.num_sequences,
        kinds=HUMAN_KINDS[recipe.action_type],
        whole=recipe.window == "whole",
        shortest=recipe.shortest,
        longest=recipe.longest,
        length=length,
    )
    notes = {"contact_counts": session.counts(recipe.num_sequences * length)}
    return lambda rows: render_session(session, rows, length), notes


def folder_name(folder: str | os.PathLike[str]) -> str:
    """Return the last component of a folder's path, "" for the root."""
    return os.path.basename(os.path.abspath(folder))
