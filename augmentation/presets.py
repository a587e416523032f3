"""Named data sets: the test plan's, its complexity levels, and gestures as people make them."""

import os
from collections.abc import Mapping
from typing import Any

from augmentation.click_aug import generate_augmented_dataset
from trainlib.errors import check_choice, say
from trainlib.gesture_files import GeneratedDataset, as_folder

COMPLEXITY_LEVELS: tuple[Mapping[str, Any], ...] = (
    {"name": "simple", "min_delta_t": 5, "max_delta_t": 15},
    {"name": "medium", "min_delta_t": 10, "max_delta_t": 40},
    {"name": "complex", "min_delta_t": 20, "max_delta_t": 80},
)

# The plan leaves the durations of these three open; they are those of its own training folders
# with the same gestures (prepare_diffusion_data).
DATASETS: tuple[Mapping[str, Any], ...] = (
    {
        "name": "clicks_only",
        "action_type": "click",
        "num_sequences": 5000,
        "min_delta_t": 5,
        "max_delta_t": 30,
    },
    {
        "name": "swipes_only",
        "action_type": "swipe",
        "num_sequences": 5000,
        "min_delta_t": 10,
        "max_delta_t": 50,
    },
    {
        "name": "mixed_actions",
        "action_type": "mixed",
        "num_sequences": 10000,
        "min_delta_t": 5,
        "max_delta_t": 40,
    },
)

HUMAN_DATASETS: tuple[Mapping[str, Any], ...] = (
    {"name": "human_session"},
    {"name": "human_contacts", "window": "whole"},
    {"name": "human_taps", "window": "whole", "action_type": "click"},
    {"name": "human_swipes", "window": "whole", "action_type": "swipe"},
)

# Folder of prepare_diffusion_data -> the data set that it holds.
_PREPARED: Mapping[str, Mapping[str, Any]] = {
    "train_clicks": DATASETS[0],
    "train_swipes": DATASETS[1],
    "train_mixed": DATASETS[2],
    "val_mixed": {**DATASETS[2], "num_sequences": 1000},
}


def generate_preset(
    name: str,
    root: str | os.PathLike[str] = "diffusion_data",
    *,
    num_sequences: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> GeneratedDataset:
    """Write the data set or complexity level of this name to root/name.

    Args:
        name: of an entry of DATASETS, COMPLEXITY_LEVELS or HUMAN_DATASETS; a level holds mixed
            gestures.
        root: parent folder, made if missing.
        num_sequences: None takes the entry's number, else 5000.
        seed: a non-negative integer.
        overwrite: replace the data set that is there.

    Returns:
        The folder, its manifest, and whether anything was written.

    Raises:
        UserError: the name is unknown, or as generate_augmented_dataset.
        OSError: the disk failed or is full.
    """
    human = [{**preset, "style": "human"} for preset in HUMAN_DATASETS]
    presets = {preset["name"]: preset for preset in (*DATASETS, *COMPLEXITY_LEVELS, *human)}
    check_choice("name", name, tuple(presets))
    arguments = {"num_sequences": 5000, **presets[name]}
    del arguments["name"]
    if num_sequences is not None:
        arguments["num_sequences"] = num_sequences
    return generate_augmented_dataset(
        as_folder(root, "root") / name, **arguments, seed=seed, overwrite=overwrite
    )


def prepare_diffusion_data(
    root: str | os.PathLike[str] = "diffusion_data", *, seed: int = 0, overwrite: bool = False
) -> None:
    """Write the plan's three training sets and its validation set; finished ones are kept.

    Args:
        root: parent folder of train_clicks, train_swipes, train_mixed and val_mixed.
        seed: a non-negative integer.
        overwrite: replace the data sets that are there.

    Raises:
        UserError: as generate_augmented_dataset.
        OSError: the disk failed or is full.
    """
    for folder, preset in _PREPARED.items():
        arguments = {key: value for key, value in preset.items() if key != "name"}
        say(f"Generating {folder}...")
        made = generate_augmented_dataset(
            as_folder(root, "root") / folder, **arguments, seed=seed, overwrite=overwrite
        )
        if not made.written:
            say("  already complete, nothing to do")
