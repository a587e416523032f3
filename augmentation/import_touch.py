"""Turn recorded touch into data sets: python -m augmentation.import_touch --help.

    python -m augmentation.import_touch games.jsonl.xz --output_dir data/games \\
        --user_pattern '(\\d+)$' --val_users 5,10,15,20,25

writes data/games/train and data/games/val, and with --held_out also data/games/held_out: windows of
the people trained on that the model does not see, which the realism test needs. docs/RECORDINGS.md
shows the way from a phone. Nothing is left out in silence: what is refused is counted by reason, on
the terminal and in each dataset.json. Exit code 0 done, 1 the disk or the machine failed, 2 bad
input, 130 Ctrl-C; every failure is one line on stderr.
"""

import argparse
import hashlib
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from augmentation.recordings import READERS, format_of
from augmentation.recordings.axes import axes_used, described, screen_axes
from augmentation.recordings.files import Recording, distinct_files
from augmentation.recordings.table import TIME_UNITS, parse_columns
from augmentation.strokes import (
    DUPLICATE,
    Stroke,
    Window,
    hold,
    render,
    sample_periods,
    timeline_windows,
    to_shares,
    whole_windows,
    without_overlaps,
)
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder
from trainlib.gesture_files import (
    ACTIONS,
    BATCHES,
    BYTES_PER_FRAME,
    HELD_OUT,
    MANIFEST_NAME,
    GeneratedDataset,
    Render,
    as_folder,
    check_writable,
    read_manifest,
    write_gestures,
)
from trainlib.gestures import SEQ_LEN
from trainlib.knobs import Knobs, add_flags, as_type, flag
from trainlib.memory import memory_named

SPLITS = ("train", "val")
PARTS = (*SPLITS, HELD_OUT)


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Knobs):
    """All but the files that decides the bytes; an impossible value raises UserError."""

    format: str = flag("auto", "of the files; auto goes by their names", choices=("auto", *READERS))
    window: str = flag(
        "auto", "whole: a stroke that fits, at a random onset; timeline: the session as it ran; "
        "auto: as it ran for HDF5, whose segments stay what they are, else whole",
        choices=("auto", "whole", "timeline"),
    )  # fmt: skip
    drop_idle: bool = flag(False, "leave out windows of a timeline without a touch; counted")
    user_pattern: str = flag("", "regular expression; its group is the user in a session's name")
    val_users: str = flag("", "users to validate on, a,b,c; sessions without --user_pattern")
    val_share: float = flag(0.2, "of the users to validate on, if none are listed", low=0, high=0.9)
    held_out: float = flag(
        0.0, "share of the training users' windows to keep out of training, for the realism test",
        low=0, high=0.9,
    )  # fmt: skip
    screen: str = flag("", "WIDTHxHEIGHT in the file's units, where no getevent -p describes it")
    y_axis: str = flag("down", "where y grows", choices=("down", "up"))
    rotate: str = flag("0", "turn clockwise, degrees", choices=("0", "90", "180", "270"))
    columns: str = flag(
        "", "of a table, as t=Timestamp,x=X,y=Y,touch=BTN_TOUCH,finger=FINGER; also session, width "
        "and height (of the screen); names, or numbers from 1 where no row names them",
    )  # fmt: skip
    time_unit: str = flag("auto", "of a table", choices=("auto", *TIME_UNITS))
    report_rate: float = flag(0.0, "Hz, of a getevent log without times; 0 = it has times", low=0)
    sequence_length: int = flag(SEQ_LEN, "frames per window, at 500 Hz", low=1)
    sequences_per_file: int = flag(1000, "windows per file; the last may hold fewer", low=1)
    seed: int = flag(0, "draws onsets, phases, --val_share and --held_out", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        """Convert and check."""
        super().__post_init__()
        parse_columns(self.columns)
        if self.screen:
            screen_axes(self.screen)
        try:
            groups = re.compile(self.user_pattern).groups
        except re.error as e:
            raise UserError(f"--user_pattern is no regular expression ({e})") from None
        if self.user_pattern and groups != 1:
            raise UserError(f"--user_pattern must have one group (...), got {groups}")

    def generator(self, purpose: str) -> np.random.Generator:
        """Return the source of randomness for one purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])


class Part(NamedTuple):
    """The windows of one of the sets, and what the manifest says of them.

    Attributes:
        windows: to render.
        notes: users (sorted; none if they are not known), sessions, contacts (number of each),
            assumed, refused: kind (lines, contacts, windows) and reason to number.
    """

    windows: list[Window]
    notes: dict[str, Any]


def import_touch(
    sources: Iterable[Any],
    output_dir: Any,
    *,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> list[GeneratedDataset]:
    """Write the data sets train, val and held_out of recorded touch into output_dir.

    Args:
        sources: paths of the files.
        output_dir: made if missing.
        overwrite: replace the data sets that are there, and remove those not written now.
        progress: show a bar while writing, on a terminal only.
        options: of ImportOptions.

    Returns:
        The folders and their manifests; no val if nobody is to be validated on, no held_out if
        nothing is to be kept out of training.

    Raises:
        UserError: an option or a file is bad, nothing is left, or a folder is in use; nothing
            has been written.
        OSError: the disk failed or is full.
    """
    chosen, folder = ImportOptions(**options), as_folder(output_dir, "output_dir")
    overwrite = as_type("overwrite", overwrite, bool)
    paths = [as_folder(source, "a source") for source in sources]
    with memory_named("the recordings", "the number of files"):
        recording = read_recording(paths, chosen)
        source = recording.sources
        digest = hashlib.sha256("".join(file["sha256"] for file in source).encode()).hexdigest()
        if chosen.window == "auto":
            chosen = replace(chosen, window="timeline" if recording.frames else "whole")
        parts = split_and_cut(recording, chosen)
        common = {**asdict(chosen), "source_sha256": digest}
        sets = {
            split: {**common, "split": split, "num_sequences": len(part.windows)}
            for split, part in parts.items()
        }
        make_way(folder, sets, overwrite=overwrite)
        made = []
        for split, part in parts.items():

            def draw(part: Part = part) -> tuple[Render, Mapping[str, Any]]:
                notes = {"source": source, **part.notes}
                return lambda rows: render(part.windows[rows], chosen.sequence_length), notes

            dataset = write_gestures(
                folder / split, sets[split], draw, overwrite=overwrite, progress=progress
            )
            made.append(dataset)
    return made


def read_recording(paths: Sequence[Path], options: ImportOptions) -> Recording:
    """Return what files hold, in shares of the screen, held positions held."""
    recording = Recording()
    for path in distinct_files(paths, recording):
        READERS[format_of(path, options)](path, options, recording)
    used = axes_used(recording, options.screen)
    y_up, rotate = options.y_axis == "up", int(options.rotate)
    periods = sample_periods(recording.strokes)
    recording.strokes = [
        hold(
            to_shares(stroke, used[stroke.device][0], y_up=y_up, rotate=rotate),
            periods[stroke.session],
        )
        for stroke in recording.strokes
    ]
    recording.notes.update(dict.fromkeys(described(*known) for known in used.values()))
    return recording


# ---- who is validated on ----------------------------------------------------------------


def split_and_cut(recording: Recording, options: ImportOptions) -> dict[str, Part]:
    """Return the parts by name: train, val and held_out, of which the last two may be missing.

    No user, or session of unknown users, is in both train and val; no contact in two of them.
    UserError if one would be empty.
    """
    sessions = [*recording.frames, *(stroke.session for stroke in recording.strokes)]
    users = users_of(dict.fromkeys(sessions), options.user_pattern)
    val_users = users_to_validate_on(sorted(set(users.values())), options)
    parts = {}
    for split in SPLITS if val_users else SPLITS[:1]:
        of_split = {s: u for s, u in users.items() if (u in val_users) == (split == "val")}
        strokes = [stroke for stroke in recording.strokes if stroke.session in of_split]
        frames = {name: num for name, num in recording.frames.items() if name in of_split}
        windows, refused = cut(strokes, frames, options, options.generator(split))
        if not windows:
            found = recording.refused + refused["contacts"] + refused["windows"]
            reasons = listing(found) or "no contact"
            raise UserError(f"no window is left for {split} ({reasons})")
        notes = {
            "users": sorted(set(of_split.values())) if options.user_pattern else [],
            "sessions": len(of_split),
            "contacts": _num_contacts(windows),
            "assumed": [*recording.notes],
            "refused": {"lines": recording.refused, **refused},
        }
        parts[split] = Part(windows, notes)
    if options.held_out:
        parts |= keep_out(parts["train"], options.held_out, options.generator(HELD_OUT))
    return parts


def _num_contacts(windows: Iterable[Window]) -> int:
    return len({id(stroke) for window in windows for stroke in window.strokes})


def keep_out(train: Part, share: float, rng: np.random.Generator) -> dict[str, Part]:
    """Divide training windows at random into train and held_out; no contact is in both.

    Windows that a contact joins stay together. They are drawn, not whole sessions: a session that
    nobody trained on differs from the others as another user's does, so a classifier would tell
    the real windows of the one from those of the other.

    UserError if one would be empty.
    """
    runs: list[list[Window]] = []
    for window in train.windows:
        joined = runs and {*map(id, window.strokes)} & {*map(id, runs[-1][-1].strokes)}
        if joined:
            runs[-1].append(window)
        else:
            runs.append([window])
    num = max(1, round(share * len(runs)))
    if num == len(runs):
        raise UserError(f"--held_out {share} leaves nothing to train on; give more files")
    drawn = set(rng.permutation(len(runs))[:num].tolist())
    parts = {}
    for split in ("train", HELD_OUT):
        chosen = [run for i, run in enumerate(runs) if (i in drawn) == (split == HELD_OUT)]
        windows = [window for run in chosen for window in run]
        notes = {**train.notes, "contacts": _num_contacts(windows)}
        if split == HELD_OUT:  # what was refused is counted once, with train
            notes["refused"] = {kind: Counter() for kind in notes["refused"]}
        parts[split] = Part(windows, notes)
    return parts


def users_of(sessions: Iterable[str], pattern: str) -> dict[str, str]:
    """Return the user of each session; without a pattern each session is its own."""
    users = {}
    for session in sessions:
        match = re.search(pattern, session) if pattern else None
        if pattern and (match is None or match[1] is None):
            raise UserError(f"--user_pattern {pattern} finds no user in the session {session!r}")
        users[session] = match[1] if match else session
    return users


def users_to_validate_on(users: list[str], options: ImportOptions) -> set[str]:
    """Return the users that are listed, else as many as the share says, drawn, at least one."""
    if options.val_users:
        listed = {name.strip() for name in options.val_users.split(",")}
        if missing := sorted(listed - set(users)):
            there = ", ".join(users[:20]) + ", ..." * (len(users) > 20)
            raise UserError(f"--val_users: nothing of {missing[0]!r}; there are {there}")
        return listed
    num = max(round(options.val_share * len(users)), options.val_share > 0)
    if num and len(users) < 2:
        raise UserError("all is of one user or session; give more files, or pass --val_share 0")
    return set(options.generator("users").permutation(users)[:num].tolist())


# ---- windows ----------------------------------------------------------------------------


def cut(
    strokes: list[Stroke],
    frames: Mapping[str, int],
    options: ImportOptions,
    rng: np.random.Generator,
) -> tuple[list[Window], dict[str, Counter[str]]]:
    """Return the windows of strokes, and the contacts and windows left out, by reason.

    `frames` is the length of sessions whose beginning and end are known.
    """
    once = {(s.session, s.t.tobytes(), s.xy.tobytes()): s for s in strokes}
    contacts = Counter({DUPLICATE: len(strokes) - len(once)})
    strokes, length = list(once.values()), options.sequence_length
    if options.window == "timeline":
        strokes = without_overlaps(strokes)
        drop_idle = options.drop_idle
        windows, left_out = timeline_windows(strokes, frames, length, rng, drop_idle=drop_idle)
    else:
        windows, too_long = whole_windows([s for s in strokes if not s.fault], length, rng)
        contacts, left_out = contacts + too_long, Counter()
    contacts += Counter(stroke.fault for stroke in strokes if stroke.fault)
    return windows, {"contacts": +contacts, "windows": +left_out}  # + drops zeros


# ---- the folder ----------------------------------------------------------------------------


def make_way(folder: Path, sets: Mapping[str, Mapping[str, Any]], *, overwrite: bool) -> None:
    """Check that all data sets can be written, then remove what an earlier import leaves beside.

    Its val or held_out, not written now, may hold people who are trained on now.

    Args:
        folder: of train, val and held_out.
        sets: their arguments for `write_gestures`, by name.
        overwrite: whether data sets that are there may be replaced or removed.

    Raises:
        UserError: one cannot be written, or something would be left beside.
        OSError: the disk is too small for all.
    """
    for split, arguments in sets.items():
        check_writable(folder / split, arguments, overwrite=overwrite)
    left = [files_of_import(folder / split) for split in PARTS if split not in sets]
    left = [files for files in left if files]
    if left and not overwrite:
        what = f"{left[0][0].parent} is of an earlier import and is not written now"
        raise UserError(f"{what}; pass --overwrite to remove it, or choose another folder")
    make_folder(folder)
    check_room(folder, sets.values())
    for files in left:
        for file in files:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # something else is there
            files[0].parent.rmdir()


def files_of_import(folder: Path) -> list[Path]:
    """Return the files of a data set that an import left, finished or not; the manifest first."""
    try:
        manifest = read_manifest(folder)
    except UserError:  # damaged
        manifest = None
    if manifest is None:
        names = [path.name for path in folder.glob(BATCHES)]
    else:
        arguments = manifest.get("arguments")
        is_ours = isinstance(arguments, dict) and "source_sha256" in arguments
        names = [file["name"] for file in manifest["files"] if is_ours]
    return [folder / name for name in (MANIFEST_NAME, *names)] if names else []


def check_room(folder: Path, sets: Iterable[Mapping[str, Any]]) -> None:
    """Raise OSError if data sets do not fit on the disk in place of those that are there."""
    needed = BYTES_PER_FRAME * sum(s["num_sequences"] * s["sequence_length"] for s in sets)
    old = [file for split in PARTS for file in (folder / split).glob(f"*{ACTIONS}")]
    room = shutil.disk_usage(folder).free + sum(file.lstat().st_size for file in old)
    if needed > room:
        what = f"{needed} bytes needed for all data sets, {room} free"
        raise OSError(f"cannot write into {folder}: {what}; make room or give fewer files")


# ---- command line -----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Args:
        argv: the arguments, None for those of the process.
    """
    stopped = "error: interrupted; repeat the command with --overwrite"
    return run_program(lambda: _import(parse_args(argv)), stopped=stopped)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line that are given.

    A pattern may begin with a dash, which argparse would take for an option.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if "--user_pattern" in argv[:-1]:
        place = argv.index("--user_pattern")
        argv[place : place + 2] = ["=".join(argv[place : place + 2])]
    parser = OneLineParser(
        prog="python -m augmentation.import_touch",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("sources", nargs="+", metavar="FILE", help="recorded touch")
    text = "folder of train/, val/ and held_out/ to write"
    parser.add_argument("--output_dir", required=True, help=text)
    add_flags(parser, ImportOptions)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output_dir")
    return parser.parse_args(argv)


def _import(options: argparse.Namespace) -> None:
    """Import and say what is there."""
    began = time.monotonic()
    made = import_touch(**vars(options), progress=True)
    manifests = [dataset.manifest for dataset in made]
    for dataset, said in zip(made, manifests, strict=True):
        users = _num(len(said["users"]), "user") if said["users"] else "users who are not known"
        what = (
            f"{_num(said['contacts'], 'contact')}, {_num(said['sessions'], 'session')} of {users}"
        )
        say(f"{said['split'] + ':':9} {_num(said['count'], 'window')} with {what}")
        say(f"{'':9} {dataset.folder}, {'written' if dataset.written else 'already complete'}")
    if not manifests[0]["users"] and any(said["split"] == "val" for said in manifests):
        say("split:    by session; --user_pattern keeps each user in one of the two")
    for assumption in manifests[0]["assumed"]:
        say(f"assumed:  {assumption}")
    for kind in ("lines", "contacts", "windows"):
        found = [Counter(said["refused"][kind]) for said in manifests]
        refused = found[0] if kind == "lines" else sum(found, Counter())
        say(f"refused:  {kind}: {listing(refused) or 'none'}")
    say(f"time:     {time.monotonic() - began:.1f} s")


def _num(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def listing(reasons: Counter[str]) -> str:
    """Return reasons with their numbers, the most frequent first."""
    return ", ".join(f"{num} {reason}" for reason, num in reasons.most_common())


if __name__ == "__main__":
    sys.exit(main())
