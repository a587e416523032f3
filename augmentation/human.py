"""Gestures as people make them: taps, swipes, drags and long presses, from touch-down to lift-off.

A contact is one or several legs without a lift-off between them. A leg is a quadratic Bezier curve

    p(s) = start + 2s(1-s)·control + s²·end

that the finger follows, between two rests, at the speed of a beta density times some noise,
s'(t) ~ t^(a-1)·(1-t)^(b-1): even at a = b = 1, a large b stops, a small one flicks. A tap is a leg
that hardly leaves its pixel. What lasts longer than half a second is a chain of legs: a long press
of taps, a long drag of swipes and rests.

human.json holds the habits: for each of FEATURES the quantiles and for each pair the correlation,
which make a Gaussian copula, and the pauses. `python -m augmentation.fit_human` fits them to
recorded contacts; no recorded contact is in it.

A touch screen samples at 30 to 240 Hz and reports whole pixels, if any changed; a silent sample
repeats the one before it. Touch-down and lift-off are samples too, so a contact lasts a whole
number of periods. Between samples the frames are linear.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainlib.gestures import FRAME_MS, SEQ_LEN

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Shapes = dict[str, FloatArray]  # for each of FEATURES a number per leg
Habits = Mapping[str, Any]

LONG_MS = 500.0  # contacts longer than this are chains of legs

KINDS = ("tap", "swipe")
FEATURES = (
    "duration",  # ms
    "reach",  # the largest distance from the touch-down, share of the screen
    "chord",  # the distance from touch-down to lift-off, share of the reach
    "along",  # where the control point is in the direction of the chord, share of the reach
    "aside",  # and at right angles to it
    "direction",  # of the chord, radians
    "a",  # of the beta density
    "b",
    "rest_before",  # ms
    "rest_after",
)
KNOTS = np.linspace(-3, 3, 25)  # quantiles are stored at these of a standard normal number

RATES_HZ, RATE_SHARES = (30, 60, 90, 120, 180, 240), (0.02, 0.1, 0.08, 0.5, 0.1, 0.2)
SCREENS = ((720, 1600), (1080, 2400), (1440, 3200), (4096, 4096))  # the last counts sensor steps
LEG_MS = 400.0  # of a chain, at most on average
REST_SHARE = 0.45  # of the legs of a long drag
SPEED_NOISE = 0.3  # standard deviation of the log of a sample's speed
SMOOTHED_OVER = 6  # samples

_NOISES = 1 << 16  # speeds are drawn once; each leg starts somewhere among them
_Z = np.linspace(-5, 5, 2001)
_PHI = np.array([statistics.NormalDist().cdf(z) for z in _Z])

HABITS_FILE = Path(__file__).with_name("human.json")


@dataclass(frozen=True)
class Session:
    """C contacts in the order of time, and the S legs of all of them, one after the other.

    Attributes:
        down: time of the touch-down, (C,), ms since the first frame, a multiple of FRAME_MS.
        up: of the lift-off, likewise; a frame is pressed if down <= its time < up.
        kind: index into KINDS, (C,).
        rate: samples per second, (C,).
        screen: pixels of width and height, (C, 2).
        first: the first leg of each contact, and S, (C + 1,).
        duration: of a leg, (S,), ms; those of a contact fill it.
        start: x and y, (S, 2), in [0, 1].
        control: point of the curve, relative to the start, (S, 2).
        end: likewise.
        timing: a and b, (S, 2).
        rests: before and after the curve, (S, 2), ms.
        speeds: factors of the speed of a sample, (_NOISES,).
        speeds_at: where in `speeds` a leg begins, (S,).
    """

    down: FloatArray
    up: FloatArray
    kind: IntArray
    rate: FloatArray
    screen: FloatArray
    first: IntArray
    duration: FloatArray
    start: FloatArray
    control: FloatArray
    end: FloatArray
    timing: FloatArray
    rests: FloatArray
    speeds: FloatArray
    speeds_at: IntArray

    def counts(self, num_frames: int) -> dict[str, int]:
        """Return how many contacts of each kind so many frames show, and how many are long."""
        seen = (self.up > 0) & (self.down < num_frames * FRAME_MS)
        num = np.bincount(self.kind[seen], minlength=len(KINDS)).tolist()
        num_long = int(np.sum(seen & (self.up - self.down > LONG_MS)))
        return {**dict(zip(KINDS, num, strict=True)), "longer_than_500_ms": num_long}


# ---- draw ------------------------------------------------------------------------------


def draw_session(
    rng: np.random.Generator,
    num_windows: int,
    *,
    kinds: Sequence[str] = KINDS,
    whole: bool = False,
    shortest: int = 0,
    longest: int = SEQ_LEN,
    length: int = SEQ_LEN,
    habits: Habits | None = None,
) -> Session:
    """Draw the contacts of N windows that follow one another.

    Args:
        rng: the only source of randomness.
        num_windows: N, at least 1.
        kinds: of KINDS, those that there are.
        whole: each window holds one contact, its onset uniform where it fits; else contacts and
            pauses follow one another as in a session, and the windows cut them where they may.
        shortest: contact, frames, in [0, longest].
        longest: likewise, at least 1, in [shortest, length]; of a session, `length` is no limit.
        length: frames of a window, L.
        habits: as `fit_human` fits them; None takes those of human.json.
    """
    habits = habits or json.loads(HABITS_FILE.read_text("utf-8"))
    # Enough for a session: a contact and its pause last longer, on average.
    C = num_windows if whole else int(num_windows * length * FRAME_MS / LONG_MS) + 10
    unlimited = not whole and longest == length
    contacts = _draw_contacts(rng, C, kinds, habits, whole, with_chains=unlimited)
    kind, _, leader, chain_ms = contacts
    num_legs = np.ceil(chain_ms / LEG_MS).clip(1, None).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(num_legs)])
    contact = np.repeat(np.arange(C), num_legs)

    rests = (chain_ms[contact] > 0) & (rng.random(len(contact)) < REST_SHARE)
    limits = np.array([max(shortest, 1), np.inf if unlimited else longest])
    shapes = _draw_shapes(rng, np.where(rests, 0, kind[contact]), limits * FRAME_MS, habits)
    rate = rng.choice(np.array(RATES_HZ, np.float64), C, p=RATE_SHARES)[leader]
    total_ms = np.where(chain_ms > 0, chain_ms, shapes["duration"][first[:-1]])
    frames = _count_frames(total_ms, rate, limits)
    weights = rng.uniform(0.5, 1.5, len(contact))
    weights /= np.add.reduceat(weights, first[:-1])[contact]
    onset = _draw_onsets(rng, frames, contacts.again, habits, length if whole else 0)
    start, control, end = _place(rng, shapes, first, contacts, habits)
    return Session(
        down=FRAME_MS * onset.astype(np.float64),
        up=FRAME_MS * (onset + frames).astype(np.float64),
        kind=kind,
        rate=rate,
        screen=rng.choice(np.array(SCREENS, np.float64), C)[leader],
        first=first,
        duration=weights * FRAME_MS * frames[contact],
        start=start,
        control=control,
        end=end,
        timing=np.stack([shapes["a"], shapes["b"]], axis=1),
        rests=np.stack([shapes["rest_before"], shapes["rest_after"]], axis=1),
        speeds=_draw_speeds(rng),
        speeds_at=rng.integers(0, _NOISES, len(contact)),
    )


class _Contacts(NamedTuple):
    """What is drawn of contacts first, (C,) each.

    Attributes:
        kind: index into KINDS.
        again: whether it is another go at the last one's place, of its kind.
        leader: the last contact that is none, perhaps itself.
        chain_ms: how long a chain lasts; 0 for a contact of one leg.
    """

    kind: IntArray
    again: BoolArray
    leader: IntArray
    chain_ms: FloatArray


def _draw_contacts(
    rng: np.random.Generator,
    num: int,
    kinds: Sequence[str],
    habits: Habits,
    whole: bool,
    with_chains: bool,
) -> _Contacts:
    """Draw the kinds of contacts and who follows whom; whole windows have no chains or others."""
    share = np.array([habits[name]["share"] if name in kinds else 0 for name in KINDS])
    long_share = np.array([habits[name]["long_share"] for name in KINDS])
    if not with_chains:
        share, long_share = share * (1 - long_share), np.zeros(len(KINDS))
    again = (rng.random(num) < habits["again"]["share"]) & (not whole)
    again[0] = False
    leader = np.maximum.accumulate(np.where(again, 0, np.arange(num)))
    kind = rng.choice(len(KINDS), num, p=share / share.sum())[leader]
    chain_ms = _draw_by([habits[name]["long_duration"] for name in KINDS], kind, rng)
    is_chain = rng.random(num) < long_share[kind]
    return _Contacts(kind, again, leader, np.where(is_chain, chain_ms, 0))


def _draw_by(quantiles: Sequence[Any], which: IntArray, rng: np.random.Generator) -> FloatArray:
    """Draw a number of each row's distribution; `which` is its index into the quantiles."""
    z = rng.standard_normal(len(which))
    drawn = np.stack([np.interp(z, KNOTS, knots) for knots in quantiles])
    return drawn[which, np.arange(len(which))]


def _draw_shapes(
    rng: np.random.Generator, kind: IntArray, limits: FloatArray, habits: Habits
) -> Shapes:
    """Draw the shapes of legs of these kinds, (S,), durations within limits, ms."""
    shapes = np.empty((len(FEATURES), len(kind)))
    for index, name in enumerate(KINDS):
        rows, quantiles = np.flatnonzero(kind == index), habits[name]["quantiles"]
        z = rng.standard_normal((len(rows), len(FEATURES)))
        low, high = np.interp(np.interp(limits, quantiles["duration"], KNOTS), _Z, _PHI)
        z[:, 0] = np.interp(low + (high - low) * rng.random(len(rows)), _PHI, _Z)
        z = z @ np.linalg.cholesky(habits[name]["correlation"]).T  # the first column stays
        for column, feature in enumerate(FEATURES):
            shapes[column, rows] = np.interp(z[:, column], KNOTS, quantiles[feature])
    return dict(zip(FEATURES, shapes, strict=True))


def _count_frames(duration: FloatArray, rate: FloatArray, limits: FloatArray) -> IntArray:
    """Return the frames, within limits, of contacts that last whole sample periods, (C,)."""
    periods = np.rint(duration * rate / 1000).clip(1, None)
    frames = np.ceil(periods * 1000 / rate / FRAME_MS - 1e-6)
    return frames.clip(limits[0], limits[1]).astype(np.int64)


def _draw_speeds(rng: np.random.Generator) -> FloatArray:
    """Draw factors of the speed, (_NOISES,), that change smoothly."""
    z = rng.standard_normal(_NOISES + SMOOTHED_OVER - 1)
    mean = np.convolve(z, np.full(SMOOTHED_OVER, SMOOTHED_OVER**-0.5), "valid")
    return np.exp(SPEED_NOISE * mean)


def _draw_onsets(
    rng: np.random.Generator, frames: IntArray, again: BoolArray, habits: Habits, length: int
) -> IntArray:
    """Draw the first frames of contacts, (C,): one in each `length`, or after pauses."""
    if length:
        return np.arange(len(frames)) * length + rng.integers(0, length - frames, endpoint=True)
    pauses = [habits["pause"], habits["again"]["pause"]]
    pause = np.rint(_draw_by(pauses, again.astype(np.int64), rng) / FRAME_MS).astype(np.int64)
    onset = np.cumsum(pause.clip(1, None) + frames) - frames
    return onset - rng.integers(0, onset[min(8, len(onset) - 1)], endpoint=True)


def _place(
    rng: np.random.Generator, shapes: Shapes, first: IntArray, contacts: _Contacts, habits: Habits
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Put contacts where they fit on the screen; return start, control and end of their legs.

    The touch-down is uniform, or near that of the leader; a chain that would be larger than the
    screen shrinks.
    """
    C = len(first) - 1
    contact = np.repeat(np.arange(C), np.diff(first))
    unit = np.stack([np.cos(shapes["direction"]), np.sin(shapes["direction"])], axis=1)
    normal = unit[:, ::-1] * [-1, 1]
    reach = shapes["reach"][:, None]
    end = reach * shapes["chord"][:, None] * unit
    control = reach * (shapes["along"][:, None] * unit + shapes["aside"][:, None] * normal)
    start = np.cumsum(end, axis=0) - end
    start -= start[first[:-1]][contact]

    corners = np.stack([start, start + control, start + end])
    low = np.minimum.reduceat(corners.min(axis=0), first[:-1])
    high = np.maximum.reduceat(corners.max(axis=0), first[:-1])
    scale = 1 / (high - low).max(axis=1, keepdims=True).clip(1, None)
    low, high = low * scale, high * scale
    start, control, end = (scale[contact] * part for part in (start, control, end))

    down = -low + (1 - (high - low)) * rng.random((C, 2))
    angle = rng.uniform(-np.pi, np.pi, C)
    distance = np.interp(rng.standard_normal(C), KNOTS, habits["again"]["distance"])
    near = down[contacts.leader] + distance[:, None] * np.stack(
        [np.cos(angle), np.sin(angle)], axis=1
    )
    down = np.where(contacts.again[:, None], near.clip(-low, 1 - high), down)
    return start + down[contact], control, end


# ---- render ----------------------------------------------------------------------------


def render_session(session: Session, windows: slice, length: int = SEQ_LEN) -> np.ndarray:
    """Turn windows of a session into frames.

    Args:
        session: as `draw_session` draws it.
        windows: a slice of them, without a step.
        length: frames of a window, L.

    Returns:
        [x, y, press], (N, L, 3) float32, x and y in [0, 1], press 0 or 1, all 0 while idle.
    """
    begin, num = windows.start * length, (windows.stop - windows.start) * length
    seen = slice(
        int(np.searchsorted(session.up, begin * FRAME_MS, "right")),
        int(np.searchsorted(session.down, (begin + num) * FRAME_MS)),
    )
    x = np.zeros((num, 3), np.float32)
    if seen.start < seen.stop:
        edges = np.stack([session.down[seen], session.up[seen]]) / FRAME_MS - begin
        low, high = edges.astype(np.int64).clip(0, num)
        frames = np.repeat(low, high - low) + _count(high - low)
        time, xy = _samples(session, seen)
        for axis in (0, 1):
            x[frames, axis] = np.interp((begin + frames) * FRAME_MS, time, xy[:, axis])
        x[frames, 2] = 1
    return x.reshape(-1, length, 3)


def _count(num: IntArray) -> IntArray:
    """Return 0, 1, ... num[0] - 1, 0, 1, ... num[1] - 1, and so on."""
    return np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)


def _samples(session: Session, contacts: slice) -> tuple[FloatArray, FloatArray]:
    """Return the samples of a slice of contacts, one after the other: times, ms, and x and y.

    A contact has one at its touch-down, then one at the end of each of its sample periods, which
    are stretched a little so that a leg holds a whole number of them.
    """
    legs = slice(session.first[contacts.start], session.first[contacts.stop])
    num_legs = np.diff(session.first[contacts.start : contacts.stop + 1])
    contact = np.repeat(np.arange(contacts.start, contacts.stop), num_legs)
    duration = session.duration[legs]
    num = np.rint(duration * session.rate[contact] / 1000).clip(1, None).astype(np.int64)
    leg, index = np.repeat(np.arange(len(num)), num), _count(num)
    period = duration / num

    s = _progress(session, legs, num)[:, None]
    curve = 2 * s * (1 - s) * session.control[legs][leg] + s**2 * session.end[legs][leg]
    begin = session.down[contact] + np.cumsum(duration) - duration
    before = np.concatenate([[0], np.cumsum(num_legs)])[:-1]  # the first leg of each contact
    begin -= (begin[before] - session.down[contacts])[contact - contacts.start]
    time, xy = (begin[leg] + period[leg] * (index + 1)), session.start[legs][leg] + curve

    at = (np.cumsum(num) - num)[before]
    time = np.insert(time, at, session.down[contacts])
    xy = np.insert(xy, at, session.start[legs][before], axis=0)
    of_contact = np.insert(contact[leg], at, np.arange(contacts.start, contacts.stop))
    pixels = session.screen[of_contact] - 1
    return time, np.rint(xy * pixels) / pixels


def _progress(session: Session, legs: slice, num: IntArray) -> FloatArray:
    """Return s at the end of each sample period of a slice of legs, which have `num` of them."""
    leg, index = np.repeat(np.arange(len(num)), num), _count(num)
    rests = session.rests[legs] / session.duration[legs][:, None]
    rests *= np.minimum(1, (1 - 1 / num) / rests.sum(axis=1).clip(1e-9, None))[:, None]
    moving = 1 - rests.sum(axis=1)
    edges = np.stack([index, index + 1]) / num[leg]
    before, after = ((edges - rests[leg, 0]) / moving[leg]).clip(0, 1)
    middle = ((before + after) / 2).clip(1e-3, 1 - 1e-3)
    a, b = session.timing[legs][leg].T
    speed = middle ** (a - 1) * (1 - middle) ** (b - 1)
    speed *= session.speeds[(session.speeds_at[legs][leg] + index) % _NOISES]
    done = np.cumsum(speed * (after - before))
    last = np.cumsum(num) - 1
    start = np.concatenate([[0], done[last[:-1]]])
    return (done - start[leg]) / (done[last] - start)[leg]
