"""Gestures whose distribution is not known: recordings, and the human-like generator.

Which windows are judged, what real windows generated ones are held against, and the first screen
of the report: what was recorded, what the model can do with it, and who is better at what.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.controls import OTHER_USERS, VALIDATION_DATA
from evaluation.criteria import RIVAL_WORDS
from evaluation.estimates import SEED, Table
from trainlib.contacts import contacts_of
from trainlib.errors import UserError, say
from trainlib.gesture_files import HELD_OUT, read_gestures, read_manifest
from trainlib.gestures import PRESSED
from trainlib.tables import format_number

NUM_WINDOWS = 1000  # with a touch, that are judged at most
Windows = npt.NDArray[np.float32]


class Recorded(NamedTuple):
    """What is judged, and what generated windows are held against; (N, L, 3), data units.

    Attributes:
        judged: windows with a touch that recreations are paired with, in random order.
        unseen: real windows that nobody trained on, in their natural proportions; likewise.
        others: the same of people whom nobody trained on; None if unseen are theirs.
        about: what the data are, in words.
    """

    judged: Windows
    unseen: Windows
    others: Windows | None
    about: str


def choose_windows(x: Windows, num: int | None = None) -> Windows:
    """Return at most `num` of the windows with a touch, at random; None is NUM_WINDOWS.

    If none has a touch, of all. Always the same draw.
    """
    touched = np.flatnonzero((x[..., 2] > PRESSED).any(axis=1))
    rows = np.random.default_rng(SEED).permutation(touched if len(touched) else len(x))
    return x[rows[: num or NUM_WINDOWS]]


def read_recorded(
    val: Windows, data_dir: str, train_data_dir: str, num: int | None = None
) -> Recorded:
    """Choose `num` windows with a touch to judge, and find what was kept out of training.

    Args:
        val: all windows of data_dir, (N, L, 3).
        data_dir: the windows that recreations are judged on.
        train_data_dir: what the model was trained on; held_out may lie beside it.
        num: of `choose_windows`.
    """
    judged, rng = choose_windows(val, num), np.random.default_rng(SEED)
    manifest, train_manifest = _manifest(data_dir), _manifest(train_data_dir)
    held_out = read_held_out(Path(train_data_dir), val.shape[1])
    unseen, others = (val, None) if held_out is None else (held_out, rng.permutation(val))
    said = [describe_data(val, manifest, train_manifest)]
    said.append(f"Judged are {_num(len(judged), 'window')} with a touch, drawn at random.")
    against = "the validation windows"
    if held_out is not None:
        people = "people trained on that were kept out of training"
        against = f"{_num(len(held_out), 'window')} of the {people}"
    elif not is_human_like(manifest):
        against += ", since none of the people trained on were kept out (import_touch --held_out)"
    said.append(f"Generated gestures are held against {against}.")
    return Recorded(judged, rng.permutation(unseen), others, " ".join(said))


def _manifest(folder: str | Path) -> dict[str, Any]:
    """Return what dataset.json says, nothing where there is none or it is damaged."""
    try:
        return read_manifest(Path(folder)) or {}
    except UserError:
        return {}


def read_held_out(train_data_dir: Path, length: int) -> Windows | None:
    """Return the windows that were kept out of training, (M, L, 3); None if there are none.

    They are of the same import as the training windows, or else may have been trained on: then a
    note says that they are left out.
    """
    folder = train_data_dir.parent / HELD_OUT
    if not folder.is_dir():
        return None
    made = [_manifest(f).get("arguments", {}) for f in (folder, train_data_dir)]
    own, train = ({**m, "split": "", "num_sequences": 0} for m in made)
    if own != train or made[0].get("split") != HELD_OUT:
        say(f"note: {folder} is not of the import of {train_data_dir}; it is left out")
        return None
    return read_gestures(folder, length)


# ----------------------------------------------------------------------------------------
# IN WORDS
# ----------------------------------------------------------------------------------------


def window_shares(x: Windows) -> dict[str, float]:
    """Return how windows are pressed, (N, L, 3): contacts, a number, and shares of the windows."""
    pressed = x[..., 2] > PRESSED
    contacts = contacts_of(x)
    presses = np.bincount([c.window for c in contacts], minlength=len(x))
    shares = {
        "begin pressed": pressed[:, 0],
        "end pressed": pressed[:, -1],
        "are pressed throughout": pressed.all(axis=1),
        "hold several contacts": presses > 1,
        "hold no touch": presses == 0,
    }
    return {"contacts": len(contacts), **{k: float(v.mean()) for k, v in shares.items()}}


def is_human_like(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the human-like generator drew the windows of a manifest."""
    return manifest.get("arguments", {}).get("style") == "human"


def describe_data(
    x: Windows, manifest: Mapping[str, Any], train_manifest: Mapping[str, Any]
) -> str:
    """Say what windows are, from themselves and from what the manifests tell of them."""
    shares = window_shares(x)
    contacts = manifest.get("contacts", shares.pop("contacts"))
    shares.pop("contacts", None)
    who = f" of {_num(len(manifest['users']), 'user')}" if manifest.get("users") else ""
    source = "Recorded touch" if manifest.get("source") else "Gestures of an unknown source"
    source = "Human-like gestures, drawn" if is_human_like(manifest) else source
    files = [file.get("name", "") for file in manifest.get("source", [])]
    source += f" ({', '.join(files)})" if 0 < len(files) < 4 else ""
    counts = f"{_num(contacts, 'contact')}{who} in {_num(len(x), 'window')} of {x.shape[1]} frames"
    parts = [f"{_share(value)} {what}" for what, value in shares.items()]
    text = f"{source}: {counts}. Of the windows {', '.join(parts[:-1])}, and {parts[-1]}."
    if train_manifest.get("users"):
        text += f" The model was trained on {_num(train_manifest['count'], 'window')} of "
        text += f"{_num(len(train_manifest['users']), 'other user')}."
    return text


def _num(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _share(value: float) -> str:
    """Return a share in words; a rare one is not said to be none."""
    if value in (0, 1):
        return "none" if value == 0 else "all"
    if not 0.01 <= value < 0.995:
        return "under 1 %" if value < 0.01 else "nearly all"
    return f"{value:.0%}".replace("%", " %")


class Duel(NamedTuple):
    """The model against a simple answer in one task."""

    task: str
    rival: str
    own: float
    other: float
    ratio_ci: tuple[float, float] | None
    unit: str

    @property
    def outcome(self) -> str:
        """Who is better, if the interval of the ratio says so: "model", "rival" or "open"."""
        if not self.other:  # the rival makes no error
            return "rival" if self.own > 0 else "open"
        low, high = self.ratio_ci or (self.own / self.other,) * 2
        return "model" if high < 1 else "rival" if low > 1 else "open"

    @property
    def words(self) -> str:
        """The rival and its error."""
        return f"{self.rival} ({format_number(self.other)})"


OUTCOMES = {
    "model": "better than",
    "rival": "worse than",
    "open": "neither better nor worse, for sure, than",
}
GUESSES = (  # table, metric, task
    ("keyframes", "mse", "One answer given the press edges"),
    ("infill_press_edges", "mse_of_mean", "The mean of many answers given the press edges"),
)
TASKS = {
    "infill_press_edges": "Many answers given the press edges",
    "continue_50": "Going on after 50 frames",
    "continue_125": "Going on after 125 frames",
}


def duels(tables: Mapping[str, Table]) -> list[Duel]:
    """Hold the model's errors against those of simple answers, in all tables that have both."""
    found = []
    for name, metric, task in GUESSES:
        rows = tables.get(name, {})
        if metric in rows.get("model", {}):
            own, other = (rows[who][metric].value for who in ("model", "interpolation"))
            ci = rows["model"][f"{metric}_to_interpolation"].ci
            found.append(Duel(task, RIVAL_WORDS["interpolation"], own, other, ci, "MSE"))
    for name, task in TASKS.items():
        rows = tables.get(name, {})
        for rival, words in RIVAL_WORDS.items():
            if rival in rows:
                own, other = (rows[who]["energy_score"].value for who in ("model", rival))
                ci = rows["model"][f"energy_to_{rival}"].ci
                found.append(Duel(task, words, own, other, ci, "energy score"))
    return found


def summarise(about: str, tables: Mapping[str, Table], settings: Mapping[str, str]) -> list[str]:
    """Return the first screen: the answer, the data, what the model can do, who is better at what.

    Args:
        about: of `Recorded`.
        tables: by name.
        settings: table -> the setting that is judged.
    """
    held = duels(tables)
    outcomes = [d.outcome for d in held]
    answer = "Nothing could be judged beside simple answers: no table has any."
    if held:
        answer = (
            f"In {outcomes.count('model')} of {len(held)} comparisons with simple answers this "
            f"model is better, in {outcomes.count('rival')} worse."
        )
    compared = [
        _describe_task([d for d in held if d.task == task])
        for task in dict.fromkeys(d.task for d in held)
    ]
    if held and not any(d.rival == RIVAL_WORDS["regression"] for d in held):
        compared.append(
            "No regression was trained to compare with: python -m evaluation.baselines."
        )
    invented = _describe_invention(tables, settings)
    return [answer, about, *invented, *compared]


def _describe_task(held: Sequence[Duel]) -> str:
    """Say whom the model is better than at a task, with the error of each."""
    parts = [
        f"{words} {', '.join(d.words for d in held if d.outcome == outcome)}"
        for outcome, words in OUTCOMES.items()
        if any(d.outcome == outcome for d in held)
    ]
    first = held[0]
    own = format_number(first.own)
    return f"{first.task} ({first.unit} {own}): the model is {'; '.join(parts)}."


def _describe_invention(tables: Mapping[str, Table], settings: Mapping[str, str]) -> list[str]:
    """Say whether generated contacts can be told from real ones, and whether they shake."""
    table, judged = tables.get("realism", {}), settings.get("realism", "")
    own, limit, other = (table.get(name, {}) for name in (judged, VALIDATION_DATA, OTHER_USERS))
    sentences = []
    if "auc" in own and own["auc"].n:
        beside = f"real from real {limit['auc'].value:.2f}"
        if other:
            beside += f", other people's from real {other['auc'].value:.2f}"
        auc = f"{own['auc'].value:.2f}"
        sentences.append(
            f"A classifier tells invented contacts from real ones: AUC {auc} ({beside})."
        )
    if own:
        shakes = (format_number(row["shake_all"].value) for row in (own, limit))
        sentences.append(
            "Invented contacts shake by {}, real ones by {} thousandths of the screen a "
            "frame.".format(*shakes)
        )
    return [" ".join(sentences)] if sentences else []
