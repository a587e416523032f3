"""Tables: CSV and its like, a sample a row, columns by name or by number."""

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.recordings.files import (
    LARGEST,
    Recording,
    median_step,
    number_in,
    numbered_lines,
    session_name,
    unreadable,
)
from augmentation.strokes import DUPLICATE, NO_DOWN, NO_LIFT, TIME_BACK, TWO_FINGERS, Axes, Stroke
from trainlib.errors import UserError

FIELDS, NO_STATE, NO_NUMBER = "wrong number of fields", "no touch state", "not a number"
CANCELLED, MIXED = "cancelled", "a code of MotionEvent, where touch was 0 or 1 so far"

NEEDED, OPTIONAL = ("t", "x", "y", "touch"), ("finger", "session", "width", "height")
TIME_UNITS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}  # in ms
_DELIMITERS = ",;\t|"

DOWN, HELD, UP, CANCEL, ON, OFF = "down", "held", "up", "cancel", "on", "off"
SECOND = "second"  # finger, which lands or lifts beside the first
_STATES = {
    **dict.fromkeys(("down", "start", "started", "begin", "began"), DOWN),
    **dict.fromkeys(("held", "hold", "move", "moved", "stationary"), HELD),
    **dict.fromkeys(("up", "end", "ended"), UP),
    **dict.fromkeys(("cancel", "canceled", "cancelled"), CANCEL),
    **dict.fromkeys(("1", "true"), ON),
    **dict.fromkeys(("0", "false"), OFF),
    **dict.fromkeys(("action_pointer_down", "action_pointer_up"), SECOND),
}
_ACTIONS = {"0": DOWN, "1": UP, "2": HELD, "3": CANCEL, "5": SECOND, "6": SECOND}  # MotionEvent's
_CODES = _ACTIONS.keys() - _STATES.keys()  # which tell them from 1 and 0
_LIFTS = (UP, CANCEL, OFF)
_PREFIX = re.compile(r"^(action|touch|pointer|mouse)_?")  # of touchstart, ACTION_MOVE, ...
_HEAD = 1000  # rows that show how many fields a table has, and what its touch states are
_STILL = 0.05  # a tap moves less than this share of the farthest way from tap to tap


def parse_columns(text: str) -> dict[str, str]:
    """Return the column of each role in `t=Timestamp,x=X,...`; UserError if that is not it."""
    if not text:
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {role.strip(): name.strip() for role, _, name in pairs}
    if unknown := sorted(columns.keys() - {*NEEDED, *OPTIONAL}):
        roles = ", ".join((*NEEDED, *OPTIONAL))
        raise UserError(
            f"--columns must be ROLE=NAME,... with roles of {roles}; got {unknown[0]!r}"
        )
    if ("width" in columns) != ("height" in columns):
        raise UserError("--columns must name width and height, or neither")
    numbers = [name for name in columns.values() if name.isdecimal()]
    if strange := [number for number in numbers if not 0 < float(number) < LARGEST]:
        raise UserError(f"--columns counts columns from 1, got {strange[0]:.60}")
    if missing := [role for role in NEEDED if not columns.get(role)]:
        raise UserError(f"--columns must name t, x, y and touch; {missing[0]} is missing")
    return columns


@dataclass
class _Contact:
    """A finger that is down, sample by sample; times as in the file."""

    session: str
    device: str
    fault: str = ""
    t: list[float] = field(default_factory=list)
    xy: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class _Session:
    """Where the rows of a session stand."""

    finger: str | None  # of the contact, or of the last one
    last_t: float = -math.inf
    last_row: Sequence[str] = ()
    contact: _Contact | None = None

    def is_other_finger(self, finger: str | None, state: str, t: float) -> bool:
        """Tell whether a row is of a finger beside the one that is followed.

        Another one is followed once it lands, alone and later. A contact that a second finger
        joins is none of one finger.
        """
        if finger == self.finger and state != SECOND:
            return False
        if self.contact is not None:
            self.contact.fault = self.contact.fault or TWO_FINGERS
        elif state == DOWN and t >= self.last_t:
            self.finger = finger
            return False
        return True


class _Table:
    """Follows the rows of one table and keeps the strokes that have ended, times as they are."""

    def __init__(
        self, name: str, columns: Mapping[str, int], width: int, states: Mapping[str, str]
    ) -> None:
        self.ended: list[Stroke] = []
        self.words: set[str] = set()  # for states, that were met
        self._name, self._columns, self._width, self._states = name, columns, width, states
        self._last_column = max(columns.values())
        self._sessions: dict[str, _Session] = {}

    def take(self, row: Sequence[str]) -> str:
        """Take a row; return why it is refused, "" if it is not."""
        if len(row) <= self._last_column:
            return FIELDS
        said = {role: row[column].strip() for role, column in self._columns.items()}
        word = _word(said["touch"])
        state = self._states.get(word) or self._states.get(_PREFIX.sub("", word))
        if state is None:
            is_mixed = word in _CODES and self.has_digits and len(row) == self._width
            return MIXED if is_mixed else NO_STATE
        self.words.add(word)
        session = self._sessions.setdefault(said.get("session", ""), _Session(said.get("finger")))
        sizes = [said[role] for role in ("width", "height") if role in said]
        if any(not number_in(size) > 1 for size in sizes):
            return NO_NUMBER
        t, x, y = number_in(said["t"]), number_in(said["x"]), number_in(said["y"])
        if math.isnan(t) or (math.isnan(x + y) and state not in _LIFTS):
            return NO_NUMBER
        if session.is_other_finger(said.get("finger"), state, t):
            return TWO_FINGERS
        if t < session.last_t:
            return TIME_BACK
        if fault := self._fields_fault(row, session.last_row):
            return fault
        session.last_t, session.last_row = t, row
        self._apply(session, said, state, t, (x, y))
        return ""

    @property
    def has_digits(self) -> bool:
        """Whether touch was 1 or 0, and not for MotionEvent's."""
        return self._states is _STATES and not self.words.isdisjoint(("0", "1"))

    def end_all(self) -> None:
        """End the contacts that are left, as without lift-off."""
        for session in self._sessions.values():
            self._end(session, NO_LIFT)

    def _fields_fault(self, row: Sequence[str], last: Sequence[str]) -> str:
        """Return what is wrong with a row's number of fields, or that it is the last one again.

        A row that was logged again may have another time and more fields than the table.
        """
        if row == last:
            return DUPLICATE
        if len(row) == self._width:
            return ""
        t = self._columns["t"]
        again = [*row[:t], *row[t + 1 : self._width]] == [*last[:t], *last[t + 1 :]]
        return DUPLICATE if again else FIELDS

    def _apply(
        self,
        session: _Session,
        said: Mapping[str, str],
        state: str,
        t: float,
        xy: tuple[float, float],
    ) -> None:
        """Move, begin or end the contact of a session."""
        if state == DOWN:
            self._end(session, NO_LIFT)
        contact = session.contact
        if contact is None:
            if state == OFF:
                return
            name = "/".join(part for part in (self._name, said.get("session")) if part)
            device = "x".join(said[role] for role in ("width", "height") if role in said)
            fault = "" if state in (DOWN, ON) else NO_DOWN
            contact = session.contact = _Contact(name, device, fault)
        # A row of no touch shows no finger: its place is zeros, the mouse's or anything.
        is_unknown = state == OFF or math.isnan(sum(xy))
        contact.t.append(t)
        contact.xy.append(contact.xy[-1] if is_unknown and contact.xy else xy)
        if state in _LIFTS:
            self._end(session, CANCELLED if state == CANCEL else "")

    def _end(self, session: _Session, fault: str) -> None:
        """End the contact of a session, if it has one; its first fault counts."""
        if c := session.contact:
            t, xy, fault = np.array(c.t), np.array(c.xy), c.fault or fault
            self.ended.append(Stroke(c.session, t, xy, c.device, fault))
            session.contact = None


# ---- the text ---------------------------------------------------------------------------


def read_table(path: Path, options: Any, recording: Recording) -> None:
    """Read rows of samples, separated by commas, semicolons, tabs, bars or blanks.

    The first row names the columns, unless `--columns` gives numbers, from 1.
    """
    rows = _rows(path)
    number, first = next(rows, (1, []))
    columns = parse_columns(options.columns)
    head = [*islice(rows, _HEAD)]
    if columns and all(name.isdecimal() for name in columns.values()):
        columns_at = {role: int(name) - 1 for role, name in columns.items()}
        head.insert(0, (number, first))
        width = Counter(len(row) for _, row in head).most_common(1)[0][0]
        if (last := max(columns_at.values()) + 1) > width:
            raise unreadable(path, number, f"no column {last}, only {width}; check --columns")
    else:
        columns_at = _named(columns, [name.strip() for name in first], path, number)
        width = len(first)
    whole = [row for _, row in head if len(row) == width]
    is_taps = _is_taps(whole, columns_at, is_cut=len(head) >= _HEAD)
    has_codes = not _CODES.isdisjoint(_word(row[columns_at["touch"]]) for row in whole)
    states = _ACTIONS if is_taps or has_codes else _STATES
    table = _Table(session_name(path), columns_at, width, states)
    for number, row in chain(head, rows):
        fault = table.take(row)
        if fault == MIXED:
            got = f"touch is {row[columns_at['touch']]}, {MIXED}"
            raise unreadable(path, number, f"{got}; write DOWN, MOVE and UP instead")
        if fault:
            recording.refused[fault] += 1
    table.end_all()
    if table.has_digits:
        recording.notes["touch 1 is down, 0 is up; no other code of MotionEvent is there"] = None
    if is_taps:
        recording.notes["touch 0 is down, 1 is up: each 0 has a 1 after it at its place"] = None
    unit = options.time_unit
    if unit == "auto":
        unit = _likely_unit(table.ended)
        recording.notes[f"times in {unit}, going by the steps between samples"] = None
    recording.strokes += (s._replace(t=TIME_UNITS[unit] * s.t) for s in table.ended)
    for size in {str(stroke.device) for stroke in table.ended} - {""}:
        x_size, y_size = map(float, size.split("x"))
        recording.axes[size, Axes(0, x_size - 1, 0, y_size - 1)] = "by the columns"


def _is_taps(rows: Sequence[Sequence[str]], columns: Mapping[str, int], *, is_cut: bool) -> bool:
    """Tell whether 0 and 1 are MotionEvent's down and up, of taps alone, which have no other code.

    Each 0 is then followed by a 1 at nearly its place, and the next 0 is elsewhere. As states of
    touch they would be contacts that begin where the last one ended, without a row of a move.

    Args:
        rows: the first of a table, all whole.
        columns: by role.
        is_cut: whether more rows may follow, so that the last tap may lack its 1.
    """
    sessions: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in rows:
        word, x, y = (row[columns[role]] for role in ("touch", "x", "y"))
        session = row[columns["session"]] if "session" in columns else ""
        sessions[session].append((_word(word), number_in(x), number_in(y)))
    moves: list[float] = []  # within a tap
    ways: list[float] = []  # from a tap to the next
    for samples in sessions.values():
        if is_cut and samples[-1][0] == "0":
            samples.pop()
        if [word for word, *_ in samples] != ["0", "1"] * (len(samples) // 2):
            return False
        steps = [math.dist(a, b) for (_, *a), (_, *b) in pairwise(samples)]
        moves += steps[::2]
        ways += steps[1::2]
    return len(ways) > 1 and all(move < _STILL * max(ways) for move in moves)


def _named(
    columns: Mapping[str, str], header: Sequence[str], path: Path, number: int
) -> dict[str, int]:
    """Return where the columns are; without any, those that bear the names of their roles."""
    if not columns:
        columns = {role: role for role in (*NEEDED, *OPTIONAL) if role in (*NEEDED, *header)}
    if missing := [role for role, name in columns.items() if name not in header]:
        why = f"no column for {missing[0]} in {', '.join(header) or 'nothing'}; set --columns"
        raise unreadable(path, number, why)
    return {role: header.index(name) for role, name in columns.items()}


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not blank, with the numbers of their lines."""
    delimiter = ""
    for number, line in numbered_lines(path):
        if not line:
            continue
        delimiter = delimiter or next((d for d in _DELIMITERS if d in line), " ")
        yield number, _fields(line, delimiter)


def _fields(line: str, delimiter: str) -> list[str]:
    """Split a row, at any number of blanks or at a delimiter that is not in quotes."""
    if delimiter == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # damaged; take() will say of what
        return line.split(delimiter)


@lru_cache(1000)
def _word(text: str) -> str:
    """Return a touch state as its tables have it: small letters, or digits for a whole number."""
    number = number_in(text)
    return str(int(number)) if number.is_integer() else text.strip().lower()


def _likely_unit(strokes: list[Stroke]) -> str:
    """Return the unit in which the steps between samples are between 1 and 1000 ms."""
    step = median_step(strokes)
    if math.isnan(step):
        return "ms"
    return next((u for u, high in (("s", 1), ("ms", 1e3), ("us", 1e6)) if step < high), "ns")
