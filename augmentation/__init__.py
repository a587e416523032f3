"""Touch gestures, drawn and recorded, and the file format that the trainer reads.

The contract with the trainer is the format below, not an import: any program that writes it
can feed the trainer, and the trainer reads nothing else.

One sequence
    float32 [L, 3] = [x, y, press] per frame, L = 250 frames at 500 Hz = 0.5 s.
    x and y are screen fractions in [0, 1]; press is exactly 0 or 1.
    Frames without a touch are all zero, so a sequence without a gesture is all zeros.
    A gesture is one touch of delta_t frames: press is 1 on the frames onset ... onset+delta_t-1.
        click       the finger rests on one point
        horizontal  straight and even from start to end, y fixed; both ends are shown
        vertical    the same with x fixed
        diagonal    the same with both free
    A swipe of one frame shows its start; delta_t = 0 is no action.

The distribution of a generated set
    delta_t is a uniform integer in [min_delta_t, max_delta_t], both ends included; the onset is
    uniform over 0 ... L - delta_t; free coordinates are independent and uniform on [0, 1).
    action_type names the gestures: one of the four above, "swipe" (= diagonal), or "mixed"
    (the four in equal parts, counts differing by at most one, in random order).

Gestures as people make them (style="human", off by default)
    Taps, swipes, drags and long presses of augmentation/human.py in the same format. window
    "timeline" cuts a session as it runs into windows, which may begin, end or stay pressed, hold
    several contacts or none; "whole" puts one contact of at most L frames into each, its onset
    uniform. In the manifest, shortest and longest limit a contact, in place of min_delta_t and
    max_delta_t, contact_counts is in place of gesture_counts, and habits is the SHA-256 of the
    fitted table.

Recorded gestures (augmentation/import_touch.py)
    Windows "whole" and "timeline" as above. In the manifest, source lists the files with their
    SHA-256; users, sessions and contacts count what the windows show, assumed says in words what
    the files do not, and refused counts lines, contacts and windows by reason.

A folder
    batch_000000_actions.npy, batch_000001_actions.npy, ...: little-endian float32 [N*L, 3], the
    sequences one after the other, no pickle. Their order is the sorted order of the names.
    dataset.json, written last, so that a folder without it is an unfinished one:
        format           1
        count            number of sequences
        sequence_length  L
        seed, split      what the random stream was made from; null for hand-made sets
        arguments        everything that decides the bytes; the same arguments give the same bytes
        gesture_counts   sequences per gesture, delta_t = 0 counted as no_action
        files            a list of {name, rows, sha256}
    README.md and hidden files may lie beside them and are never touched.
"""

from augmentation.click_aug import (
    ACTION_TYPES,
    Gestures,
    draw_gestures,
    generate_augmented_dataset,
    render,
)
from augmentation.patterns import EVAL_PATTERNS, make_pattern, write_eval_patterns
from augmentation.presets import (
    COMPLEXITY_LEVELS,
    DATASETS,
    HUMAN_DATASETS,
    generate_preset,
    prepare_diffusion_data,
)
from trainlib.gesture_files import MANIFEST_NAME, GeneratedDataset

__all__ = [
    "ACTION_TYPES",
    "COMPLEXITY_LEVELS",
    "DATASETS",
    "EVAL_PATTERNS",
    "HUMAN_DATASETS",
    "MANIFEST_NAME",
    "GeneratedDataset",
    "Gestures",
    "draw_gestures",
    "generate_augmented_dataset",
    "generate_preset",
    "make_pattern",
    "prepare_diffusion_data",
    "render",
    "write_eval_patterns",
]
