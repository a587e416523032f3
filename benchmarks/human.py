"""Compare the human-like gestures with recordings, feature by feature.

    python -m benchmarks.human games.jsonl.xz --user_pattern '(\\d+)$'

The distance of Kolmogorov and Smirnov, sup |F - G|, of the recorded contacts that fit into half a
second and as many generated ones, taps and swipes apart: for the habits as committed, and for
habits fitted to one half of the users, against that half and against the others. What two halves
of the users differ by stands beside it: no fit comes closer to people whom it has not seen. The
rows go to benchmarks/results/human.json and from there into docs/HUMAN_GESTURES.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.fit_human import SWIPES_FROM, fit
from augmentation.human import LONG_MS, Habits, draw_session, render_session
from augmentation.import_touch import ImportOptions, read_recording, users_of
from augmentation.strokes import Stroke, render, whole_windows
from benchmarks.measure import Row, stamp
from benchmarks.report import RESULTS, table
from evaluation.estimates import FloatArray
from evaluation.events import FEATURES, events_of, two_sample_ks
from trainlib.contacts import contacts_of
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import write_json
from trainlib.gesture_files import as_folder
from trainlib.gestures import SEQ_LEN

HUMAN = RESULTS / "human.json"
COMPARED = {
    "duration": "frames",
    "path": "path",
    "deviation": "deviation",
    "speed peak": "speed_peak",
    "last 50 ms": "last_50_ms",
}
NUM_GENERATED = 20_000
HALVES = ("half A", "half B")  # of the users

Sample = Mapping[str, FloatArray]  # taps and swipes: FEATURES of contacts, (n, 14)


def describe(x: np.ndarray) -> Sample:
    """Return the features of the contacts of windows, (N, L, 3), taps and swipes apart."""
    contacts = contacts_of(x)
    features = events_of(x).features[: len(contacts)]  # rows of idle windows follow
    reach = np.array([np.hypot(*(c.xy - c.xy[0]).T).max() for c in contacts])
    return {"taps": features[reach < SWIPES_FROM], "swipes": features[reach >= SWIPES_FROM]}


def recorded(strokes: Sequence[Stroke]) -> Sample:
    """Describe the recorded contacts that fit into a window."""
    whole = [s for s in strokes if not s.fault and s.t[-1] - s.t[0] <= LONG_MS]
    windows, _ = whole_windows(whole, SEQ_LEN, np.random.default_rng(0))
    return describe(render(windows, SEQ_LEN))


def generated(habits: Habits | None) -> Sample:
    """Describe contacts that are drawn with these habits, None for those committed."""
    session = draw_session(np.random.default_rng(0), NUM_GENERATED, whole=True, habits=habits)
    return describe(render_session(session, slice(0, NUM_GENERATED)))


def distances(names: tuple[str, str], samples: tuple[Sample, Sample]) -> list[Row]:
    """Return a row for taps and one for swipes: the KS distance of each feature of two samples."""
    rows = []
    for kind in ("taps", "swipes"):
        a, b = (sample[kind] for sample in samples)
        ks = {}
        for label, feature in COMPARED.items():
            column = FEATURES.index(feature)
            values = [x[~np.isnan(x[:, column]), column] for x in (a, b)]
            ks[label] = round(two_sample_ks(*values), 3)
        rows.append({"contacts": kind, "of": names[0], "against": names[1], "n": len(b), **ks})
    return rows


def compare(strokes: Sequence[Stroke], user_pattern: str) -> list[Row]:
    """Return all rows for recorded contacts of several users."""
    users = users_of([stroke.session for stroke in strokes], user_pattern)
    names = sorted(set(users.values()))
    if len(names) < 2:
        raise UserError("all is of one user; give more files, or --user_pattern")
    halves = [[s for s in strokes if users[s.session] in names[i::2]] for i in (0, 1)]
    samples = [recorded(half) for half in halves]
    rows = distances(("committed habits", "all users"), (generated(None), recorded(strokes)))
    for i in (0, 1):
        sample = generated(fit(halves[i]))
        for j in (i, 1 - i):
            names_of = (f"habits of {HALVES[i]}", HALVES[j])
            rows += distances(names_of, (sample, samples[j]))
    return rows + distances((f"recordings of {HALVES[0]}", HALVES[1]), (samples[0], samples[1]))


def shown(result: Mapping[str, Any]) -> str:
    """Return the rows of the result file as a table, taps first."""
    return table(sorted(result["rows"], key=lambda row: row["contacts"] != "taps"))


def main() -> None:
    """Compare, write the result file and print it."""
    parser = OneLineParser(prog="python -m benchmarks.human", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="recorded touch")
    parser.add_argument("--user_pattern", default="", help="as of augmentation.import_touch")
    options = parser.parse_args()
    paths: list[Path] = [as_folder(file, "a file") for file in options.files]
    strokes = read_recording(paths, ImportOptions(user_pattern=options.user_pattern)).strokes
    rows = compare(strokes, options.user_pattern)
    write_json(HUMAN, stamp() | {"files": [path.name for path in paths], "rows": rows})
    say(shown({"rows": rows}))


if __name__ == "__main__":
    sys.exit(run_program(main))
