"""Write a gesture data set: python -m augmentation.generate_click_dataset --help.

Durations are given as a share of the sequence and cut down to whole frames: 0.02 to 0.3 of 250
frames are 5 to 75. Exit code 0 done, 1 the disk or the machine failed, 2 bad input, 130 Ctrl-C;
every failure is one line on stderr.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any

from augmentation.click_aug import STYLES, HumanRecipe, Recipe, generate_augmented_dataset
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.gesture_files import GeneratedDataset

# Shortest and longest touch, share of the sequence; of a human timeline, 1 is no limit.
PCT_LIMITS = {"straight": (0.02, 0.20), "human": (0.0, 1.0)}


def frames_from_pct(name: str, pct: float, sequence_length: int) -> int:
    """Return a share of the sequence in whole frames, cut down.

    Args:
        name: the option, for the message.
        pct: share in [0, 1].
        sequence_length: frames.

    Returns:
        floor(pct·sequence_length) of the decimal number as written: 0.29 of 100 is 29, although
        the product of the floats is 28.999999999999996.

    Raises:
        UserError: pct is not a number in [0, 1].
    """
    if not 0 <= pct <= 1:  # false for NaN as well
        raise UserError(f"{name} must be in [0, 1], got {pct}")
    return math.floor(Fraction(repr(float(pct))) * sequence_length)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Args:
        argv: the arguments, None for those of the process.
    """
    stopped = "error: interrupted; repeat the command with --overwrite"
    return run_program(lambda: _generate(_make_parser().parse_args(argv)), stopped=stopped)


def _generate(options: argparse.Namespace) -> None:
    """Turn the shares into frames, write the data set and say what is there."""
    began = time.monotonic()
    given = vars(options).copy()
    default = PCT_LIMITS[options.style]
    shortest = given.pop("min_delta_t_pct", default[0])
    longest = given.pop("max_delta_t_pct", default[1])
    if shortest > longest:
        raise UserError(
            f"--min_delta_t_pct must be <= --max_delta_t_pct, got {shortest}, {longest}"
        )
    length = options.sequence_length
    made = generate_augmented_dataset(
        min_delta_t=frames_from_pct("--min_delta_t_pct", shortest, length),
        max_delta_t=frames_from_pct("--max_delta_t_pct", longest, length),
        progress=True,
        **given,
    )
    _summarise(made, time.monotonic() - began)


def _summarise(made: GeneratedDataset, wall_s: float) -> None:
    """Print what is in the folder now."""
    manifest = made.manifest
    arguments = manifest["arguments"]
    state = f"written in {wall_s:.1f} s" if made.written else "already complete, nothing to do"
    counted = manifest.get("gesture_counts") or manifest["contact_counts"]
    counts = ", ".join(f"{name} {n}" for name, n in counted.items() if n)
    limits = [arguments.get(name) for name in ("min_delta_t", "max_delta_t")]
    if None in limits:
        limits = [arguments[name] for name in ("shortest", "longest")]
    say(f"folder:    {made.folder} ({state})")
    say(
        f"sequences: {arguments['num_sequences']} of {arguments['sequence_length']} frames "
        f"in {len(manifest['files'])} files"
    )
    say(f"gestures:  {counts}; {limits[0]}-{limits[1]} frames")
    say(f"seed:      {arguments['seed']}, split {arguments['split']}")


def _make_parser() -> argparse.ArgumentParser:
    """Return the command line's options."""
    parser = OneLineParser(
        prog="python -m augmentation.generate_click_dataset",
        description="Write a data set of synthetic touch gestures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="folder to write, made if missing")
    for f in fields(Recipe):
        if f.name not in ("min_delta_t", "max_delta_t", "split"):
            kind: Any = f.type
            choices = f.metadata.get("choices")
            add(
                f"--{f.name}",
                type=kind,
                choices=choices,
                default=f.default,
                help=f.metadata["help"],
            )
    add("--style", choices=STYLES, default="straight", help="how gestures are drawn")
    window = {f.name: f for f in fields(HumanRecipe)}["window"].metadata
    text = f"of human gestures; {window['help']} (default: timeline)"
    add("--window", choices=window["choices"], default=argparse.SUPPRESS, help=text)
    for end, name in enumerate(("min", "max")):
        text = f"{('shortest', 'longest')[end]} touch, share of L"
        defaults = ", ".join(f"{style} {limits[end]}" for style, limits in PCT_LIMITS.items())
        add(
            f"--{name}_delta_t_pct",
            type=float,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {defaults})",
        )
    add("--split", help="mixed into the seed; by default the last part of --output_dir")
    add("--overwrite", action="store_true", help="replace the data set in --output_dir")
    return parser


if __name__ == "__main__":
    sys.exit(main())
