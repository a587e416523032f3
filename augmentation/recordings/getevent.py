"""The touches in the text of Android's `getevent`: multi-touch protocols A and B, single touch.

Protocol A sends every finger in every report, one packet each, ended by SYN_MT_REPORT; an empty
packet means that all have lifted. Protocol B sends changes alone, each for the slot that was named
last; tracking id -1 lifts the slot's finger, and its x and y stay known for the next one that
lands there. Single touch is ABS_X, ABS_Y and BTN_TOUCH. Source: multi-touch-protocol.rst and
event-codes.rst in the Linux kernel's Documentation/input.
"""

import math
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.recordings.axes import find_axes
from augmentation.recordings.files import (
    Recording,
    number_in,
    numbered_lines,
    session_name,
    unreadable,
)
from augmentation.strokes import NO_DOWN, NO_LIFT, TIME_BACK, TWO_FINGERS, Axes, Stroke

LOST, NO_POSITION, NO_EVENT, NO_TIME = "events lost", "no position", "not an event", "no time"

X, Y, ID, SLOT, SINGLE_X, SINGLE_Y, TOUCH, REPORT, PACKET, DROPPED = range(10)
_MULTI = {X, Y, ID, SLOT}
_OF_A_FINGER = {*_MULTI, SINGLE_X, SINGLE_Y}
_KINDS = {  # as `getevent -l` names an event, and its numbers
    ("EV_ABS", "ABS_MT_POSITION_X"): X,
    ("0003", "0035"): X,
    ("EV_ABS", "ABS_MT_POSITION_Y"): Y,
    ("0003", "0036"): Y,
    ("EV_ABS", "ABS_MT_TRACKING_ID"): ID,
    ("0003", "0039"): ID,
    ("EV_ABS", "ABS_MT_SLOT"): SLOT,
    ("0003", "002f"): SLOT,
    ("EV_ABS", "ABS_X"): SINGLE_X,
    ("0003", "0000"): SINGLE_X,
    ("EV_ABS", "ABS_Y"): SINGLE_Y,
    ("0003", "0001"): SINGLE_Y,
    ("EV_KEY", "BTN_TOUCH"): TOUCH,
    ("0001", "014a"): TOUCH,
    ("EV_SYN", "SYN_REPORT"): REPORT,
    ("0000", "0000"): REPORT,
    ("EV_SYN", "SYN_MT_REPORT"): PACKET,
    ("0000", "0002"): PACKET,
    ("EV_SYN", "SYN_DROPPED"): DROPPED,
    ("0000", "0003"): DROPPED,
}
_STATES = {"UP": 0, "DOWN": 1}
_LIFTED = -1  # a tracking id

_EVENT = re.compile(
    r"\s*(?:[^[]{0,8}\[ *([^]]+)\]\s*)?"  # the time, perhaps behind a stray character
    r"(?:(/dev/[^:]+):\s*)?"
    r"(EV_[A-Z]+|[0-9a-f]{4})\s+(\w+)\s+([0-9a-f]{8}|UP|DOWN)\b"
)
_AXIS = re.compile(r"(\w+)\s*: value -?\d+, min (-?\d{1,10}), max (-?\d{1,10})\b")
_DEVICE = re.compile(r"add device \d+: (\S+)")
_HEADER = re.compile(r"\s|add device|remove device|could not get")


@dataclass
class _Contact:
    """A finger that is down, sample by sample."""

    fault: str = ""
    t: list[float] = field(default_factory=list)
    xy: list[tuple[float, ...]] = field(default_factory=list)


class _Device:
    """Follows the reports of one input device."""

    def __init__(self) -> None:
        self.ended: list[_Contact] = []
        self.last_t = -math.inf
        self._down: dict[int, _Contact] = {}  # by slot, or by finger in protocol A
        self._place: dict[int, list[float]] = defaultdict(lambda: [math.nan, math.nan])  # x, y
        self._events: list[tuple[int, int]] = []  # since the last packet or report
        self._packets: list[int] = []  # fingers that protocol A has sent since the last report
        self._slot = 0
        self._is_multi = self._is_lost = False

    def feed(self, kind: int, value: int, t: float) -> None:
        """Take an event at the time t, ms."""
        self.last_t = t
        if kind in _OF_A_FINGER:  # most are
            self._is_multi = self._is_multi or kind in _MULTI
            self._events.append((kind, value))
        elif kind == REPORT:
            if not self._is_lost:
                self._report(t)
            self._is_lost = False
            self._events.clear()
            self._packets.clear()
        elif kind == TOUCH:
            if value:  # it only comes where no finger is down
                self.end_all(NO_LIFT)
            self._events.append((kind, value))
        elif kind == PACKET:
            self._packet(t)
            self._events.clear()
        else:
            self.end_all(LOST)
            self._is_lost = True

    def end_all(self, fault: str) -> None:
        """End all contacts at their last sample, as no whole ones."""
        for contact in self._down.values():
            self._keep(contact, fault)
        self._down.clear()

    def _packet(self, t: float) -> None:
        """Take one finger of protocol A, or the news that none is down."""
        said = dict(self._events)
        if said.keys() & _MULTI:
            finger = said.get(ID, len(self._packets))
            self._packets.append(finger)
            x, y = self._place[finger]
            self._place[finger] = [said.get(X, x), said.get(Y, y)]
        elif not self._packets:
            self._lift([*self._down], t)

    def _report(self, t: float) -> None:
        """Take the end of a report: all that it says holds from the time t, ms."""
        touch = dict(self._events).get(TOUCH)
        if self._packets:
            self._lift([finger for finger in self._down if finger not in self._packets], t)
            for finger in self._packets:
                self._down.setdefault(finger, _Contact())
            changed = self._packets
        else:
            changed = self._changes(touch, t)
        for key in changed:
            self._down[key].t.append(t)
            self._down[key].xy.append(tuple(self._place[key]))
        if len(self._down) > 1:
            for contact in self._down.values():
                contact.fault = contact.fault or TWO_FINGERS
        if touch == 0:
            self._lift([*self._down], t)

    def _changes(self, touch: int | None, t: float) -> list[int]:
        """Take a report of protocol B or of single touch; return what is down and in it."""
        changed = set()
        for kind, value in self._events if self._is_multi else map(_as_multi, self._events):
            if kind == SLOT:
                self._slot = value
            elif kind in (X, Y):
                self._place[self._slot][kind] = value
                changed.add(self._slot)
            elif kind == ID:
                if value == _LIFTED or self._slot in self._down:
                    self._lift([self._slot], t)
                    changed.discard(self._slot)
                if value != _LIFTED:
                    self._down[self._slot] = _Contact()
                    changed.add(self._slot)
        if self._is_multi:
            for slot in changed - self._down.keys():
                self._down[slot] = _Contact("" if touch else NO_DOWN)
        return [slot for slot in changed if slot in self._down]  # a single pen may hover

    def _lift(self, keys: list[int], t: float) -> None:
        """End contacts at the time t, where they are."""
        for key in keys:
            contact = self._down.pop(key, None) or _Contact(NO_DOWN)
            contact.t.append(t)
            contact.xy.append(contact.xy[-1] if contact.xy else tuple(self._place[key]))
            self._keep(contact, "")

    def _keep(self, contact: _Contact, fault: str) -> None:
        """Note a contact that has ended; its first fault counts."""
        contact.fault = contact.fault or fault
        if not contact.t:
            contact.t, contact.xy = [self.last_t], [(math.nan, math.nan)]
        self.ended.append(contact)


def _as_multi(event: tuple[int, int]) -> tuple[int, int]:
    """Return an event of single touch as one of protocol B."""
    kind, value = event
    if kind == TOUCH:
        return ID, 0 if value else _LIFTED
    return {SINGLE_X: X, SINGLE_Y: Y}[kind], value


# ---- the text ---------------------------------------------------------------------------


def read_getevent(path: Path, options: Any, recording: Recording) -> None:
    """Read the touches of `getevent -lt` or `-t` text, and the axes that `-lp` or `-p` describes.

    Lines may lack the device, or end in a rate (-r); a time is in seconds, or a date with a time.
    Without times, `--report_rate` says how often reports come.
    """
    devices: dict[str, _Device] = defaultdict(_Device)
    ranges: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    described, num_reports = "", 0
    for number, line in numbered_lines(path):
        event = _EVENT.match(line)
        if event is None:
            if added := _DEVICE.match(line):
                described = added[1]
            elif axis := _AXIS.search(line):
                kind = _KINDS.get(("EV_ABS", axis[1]), _KINDS.get(("0003", axis[1]), -1))
                span = int(axis[2]), int(axis[3])
                if ranges[described].setdefault(kind, span) != span and kind >= 0:
                    why = f"another screen is called {described}; import them one by one"
                    raise unreadable(path, number, why)
            elif line and not _HEADER.match(line):
                recording.refused[NO_EVENT] += 1
            continue
        stamp, name, type_, code, value = event.groups()
        kind = _KINDS.get((type_, code), -1)
        if kind < 0:  # not of a touch
            continue
        if stamp:
            t = _milliseconds(stamp)
        elif options.report_rate:
            t = 1000 * num_reports / options.report_rate
            num_reports += kind == REPORT
        else:
            cure = "record with getevent -lt, or pass --report_rate"
            raise unreadable(path, number, f"the event has no time; {cure}")
        device = devices[name or ""]
        if not t >= device.last_t:  # a time that cannot be read is NaN
            recording.refused[TIME_BACK if t < device.last_t else NO_TIME] += 1
        else:
            device.feed(kind, _number(value), t)
    if not devices and not ranges:
        raise unreadable(path, 1, "holds no event of a touch screen as getevent prints it")
    multi = {name: known for name, known in ranges.items() if X in known}
    own = {}
    for name, known in (multi or ranges).items():  # ABS_X may be of a sensor
        if axes := _axes(known):
            own[name, axes] = "from getevent -p"
    recording.axes |= own
    for name, device in devices.items():
        device.end_all(NO_LIFT)
        found = find_axes(name, own)
        where = found[0] if found else name
        recording.strokes += (_stroke(c, session_name(path), where) for c in device.ended)


@lru_cache(maxsize=1024)
def _number(value: str) -> int:
    """Return the value of an event: UP, DOWN, or 32 bits with a sign."""
    if value in _STATES:
        return _STATES[value]
    number = int(value, 16)
    return number - (1 << 32) if number >> 31 else number


@lru_cache(maxsize=64)  # the events of a report have one time
def _milliseconds(stamp: str) -> float:
    """Return a time in seconds, or of a day, in ms; NaN if it is neither."""
    seconds = number_in(stamp)
    for date in ("", "2000-", "2000-01-01 ") if math.isnan(seconds) else ():  # what it may lack
        with suppress(ValueError):
            seconds = datetime.fromisoformat(date + stamp.strip()).replace(tzinfo=UTC).timestamp()
            break
    return 1000 * seconds


def _stroke(contact: _Contact, session: str, device: str | Axes) -> Stroke:
    """Return a contact that has ended as a stroke."""
    xy = np.array(contact.xy)
    fault = contact.fault or (NO_POSITION if np.isnan(xy).any() else "")
    return Stroke(session, np.array(contact.t), xy, device, fault)


def _axes(ranges: dict[int, tuple[int, int]]) -> Axes | None:
    """Return the axes that a device describes; None without x and y."""
    for x, y in ((X, Y), (SINGLE_X, SINGLE_Y)):
        if x in ranges and y in ranges and all(low < high for low, high in (ranges[x], ranges[y])):
            return Axes(*ranges[x], *ranges[y])
    return None
