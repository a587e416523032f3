"""Write a gesture data set: python -m augmentation.generate_click_dataset --help.

Durations are given as a share of the sequence and cut down to whole frames: 0.02 to 0.3 of 250
frames are 5 to 75. Exit code 0 done, 1 the disk or the machine failed, 2 bad input, 130 Ctrl-C;
every failure is one line on stderr.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn, TextIO

from augmentation.click_aug import ACTION_TYPES, SEQUENCE_LENGTH, generate_augmented_dataset
from augmentation.folder import GeneratedDataset


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message alone and exit with code 2."""
        _say(f"error: {message}; see --help", sys.stderr)
        sys.exit(2)


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
        ValueError: pct is not a number in [0, 1].
    """
    if not 0 <= pct <= 1:  # false for NaN as well
        raise ValueError(f"{name} must be in [0, 1], got {pct}")
    return math.floor(Fraction(repr(float(pct))) * sequence_length)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, None for those of the process.

    Returns:
        The exit code.
    """
    options = _make_parser().parse_args(argv)
    began = time.monotonic()
    try:
        made = _generate(options)
    except ValueError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        what = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        _say(f"error: {what}; free some, then repeat the command with --overwrite", sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("error: interrupted; repeat the command with --overwrite", sys.stderr)
        return 130
    _summarise(made, time.monotonic() - began)
    return 0


def _generate(options: argparse.Namespace) -> GeneratedDataset:
    """Turn the shares into frames and write the data set."""
    length = options.sequence_length
    shortest, longest = options.min_delta_t_pct, options.max_delta_t_pct
    if shortest > longest:
        raise ValueError(
            f"--min_delta_t_pct must be <= --max_delta_t_pct, got {shortest}, {longest}"
        )
    return generate_augmented_dataset(
        options.output_dir,
        options.num_sequences,
        frames_from_pct("--min_delta_t_pct", shortest, length),
        frames_from_pct("--max_delta_t_pct", longest, length),
        length,
        options.action_type,
        options.sequences_per_file,
        seed=options.seed,
        split=options.split,
        overwrite=options.overwrite,
        progress=True,
    )


def _summarise(made: GeneratedDataset, wall_s: float) -> None:
    """Print what is in the folder now."""
    manifest = made.manifest
    arguments = manifest["arguments"]
    state = f"written in {wall_s:.1f} s" if made.written else "already complete, nothing to do"
    counts = ", ".join(f"{name} {n}" for name, n in manifest["gesture_counts"].items() if n)
    _say(f"folder:    {made.folder} ({state})")
    _say(
        f"sequences: {arguments['num_sequences']} of {arguments['sequence_length']} frames "
        f"in {len(manifest['files'])} files"
    )
    _say(f"gestures:  {counts}; {arguments['min_delta_t']}-{arguments['max_delta_t']} frames")
    _say(f"seed:      {arguments['seed']}, split {arguments['split']}")


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print ASCII whatever the names of the user's folders; a closed stream is no failure."""
    line = text.replace("\n", " ").encode("ascii", "backslashreplace").decode()
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:  # as in "... | head -1"; the data is written, so the exit code must not change
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _make_parser() -> argparse.ArgumentParser:
    """Return the command line's options."""
    parser = _Parser(
        prog="python -m augmentation.generate_click_dataset",
        description="Write a data set of synthetic touch gestures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="folder to write, made if missing")
    add("--num_sequences", type=int, default=5000, help="number of sequences")
    add("--sequences_per_file", type=int, default=100, help="sequences per .npy file")
    add("--action_type", choices=list(ACTION_TYPES), default="mixed", help="which gestures")
    add("--min_delta_t_pct", type=float, default=0.02, help="shortest touch, share of L")
    add("--max_delta_t_pct", type=float, default=0.20, help="longest touch, share of L")
    add("--sequence_length", type=int, default=SEQUENCE_LENGTH, help="frames, L")
    add("--seed", type=int, default=0, help="non-negative; the same seed gives the same bytes")
    add("--split", help="mixed into the seed; by default the last part of --output_dir")
    add("--overwrite", action="store_true", help="replace the data set in --output_dir")
    return parser


if __name__ == "__main__":
    sys.exit(main())
