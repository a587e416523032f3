"""getevent's text: all three protocols and every dialect give the touches that were made.

Why: each dialect drops, repeats or renames something, and a reader that guesses wrong still gives
touches, only others. The same touches are written in each protocol and must be read back; lines as
they occur, odd ones included, stand beside what is right for them.

    python -m pytest tests/test_getevent.py
"""

import re
import time
from collections import Counter

import numpy as np
import pytest

from augmentation.import_touch import ImportOptions, import_touch, main, read_recording
from augmentation.recordings.files import Recording
from augmentation.recordings.getevent import read_getevent
from trainlib.errors import UserError
from trainlib.gesture_files import read_gestures

TOUCHES = [  # [(t in ms, x, y), ...], the last one when it lifts
    [(1000, 300, 500), (1010, 310, 500), (1020, 310, 520), (1033, 310, 520)],
    [(1500, 310, 900), (1590, 310, 900)],  # x as before: protocol B does not say it again
    [(1700, 310, 900), (1750, 100, 901), (1760, 100, 901)],
]


def event(t, code, value, stamp="[{:12.6f}] /dev/input/event2: "):
    """A line of -lt; `value` a number or UP or DOWN."""
    kind = {"S": "EV_SYN", "A": "EV_ABS", "B": "EV_KEY"}[code[0]]
    value = value if isinstance(value, str) else f"{value & 0xFFFFFFFF:08x}"
    return f"{stamp.format(t / 1000)}{kind:12} {code:20} {value:20}"


def report(t, *events):
    return [event(t, code, value) for code, value in [*events, ("SYN_REPORT", 0)]]


def protocol_a(touches, with_id=True):
    lines = []
    for touch in touches:
        for t, x, y in touch[:-1]:
            said = [("ABS_MT_POSITION_X", x), ("ABS_MT_POSITION_Y", y), ("ABS_MT_PRESSURE", 9)]
            said += [("ABS_MT_TRACKING_ID", 0)] * with_id
            lines += report(t, *said, ("SYN_MT_REPORT", 0))
        lines += report(touch[-1][0], ("SYN_MT_REPORT", 0))
    return lines


def protocol_b(touches, down=True):
    """What has not changed is not said; with BTN_TOUCH and its copies in ABS_X and ABS_Y."""
    lines, last = [], [None, None]
    for number, touch in enumerate(touches):
        for index, (t, *place) in enumerate(touch[:-1]):
            axes = [axis for axis in (0, 1) if place[axis] != last[axis]]
            said = [("ABS_MT_TRACKING_ID", number + 40)] * (index == 0)
            said += [("ABS_MT_POSITION_" + "XY"[axis], place[axis]) for axis in axes]
            said += [("BTN_TOUCH", "DOWN")] * (index == 0 and down)
            said += [("ABS_" + "XY"[axis], place[axis]) for axis in axes]
            if said:
                lines += report(t, *said)
            last = place
        said = [("ABS_MT_TRACKING_ID", -1), *[("BTN_TOUCH", "UP")] * down]
        lines += report(touch[-1][0], *said)
    return lines


def single_touch(touches):
    lines = []
    for touch in touches:
        for index, (t, x, y) in enumerate(touch[:-1]):
            said = [("ABS_X", x), ("ABS_Y", y), *[("BTN_TOUCH", "DOWN")] * (index == 0)]
            lines += report(t, *said)
        lines += report(touch[-1][0], ("BTN_TOUCH", "UP"))
    return lines


def read(tmp_path, lines, name="log.txt", **options):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", newline="")
    recording = Recording()
    read_getevent(path, ImportOptions(**options), recording)
    return recording


def touches_of(recording):
    """The whole touches, as in TOUCHES, the first at 1000 ms; and the faults of the others."""
    whole = [s for s in recording.strokes if not s.fault]
    late = whole[0].t[0] - 1000 if whole else 0
    rows = [
        [(round(t - late, 2), *xy) for t, xy in zip(s.t, s.xy.tolist(), strict=True)] for s in whole
    ]
    return rows, Counter(s.fault for s in recording.strokes if s.fault)


WRITERS = {
    "A": protocol_a,
    "A without ids": lambda touches: protocol_a(touches, with_id=False),
    "A with one DOWN": lambda touches: [event(999, "BTN_TOUCH", "DOWN"), *protocol_a(touches)],
    "B": protocol_b,
    "B without BTN_TOUCH": lambda touches: protocol_b(touches, down=False),
    "single touch": single_touch,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_protocol_gives_the_touches_that_were_made(tmp_path, name):
    recording = read(tmp_path, WRITERS[name](TOUCHES))
    assert touches_of(recording) == (TOUCHES, {})
    assert not recording.refused


NUMBERS = {"EV_SYN": "0000", "EV_KEY": "0001", "EV_ABS": "0003", "UP": "0" * 8}
NUMBERS |= {"SYN_REPORT": "0000", "SYN_MT_REPORT": "0002", "BTN_TOUCH": "014a", "DOWN": "00000001"}
NUMBERS |= {"ABS_X": "0000", "ABS_Y": "0001", "ABS_MT_POSITION_X": "0035", "ABS_MT_SLOT": "002f"}
NUMBERS |= {"ABS_MT_POSITION_Y": "0036", "ABS_MT_TRACKING_ID": "0039", "ABS_MT_PRESSURE": "003a"}
DIALECTS = {
    "no device": lambda line: line.replace(" /dev/input/event2:", ""),
    "CR and blanks": lambda line: line + "   \r",
    "rate": lambda line: line + " rate 114",
    "stray character": lambda line: "0" + line,
    "no blank": lambda line: line.replace("] /dev", "]/dev"),
    "numbers": lambda line: " ".join(NUMBERS.get(word, word) for word in line.split()),
    "indented": lambda line: "   " + line,
    "date": lambda line: re.sub(r"\[ *([\d.]+)", lambda m: f"[2024-04-07 11:47:0{m[1]}", line),
    "no year": lambda line: re.sub(r"\[ *([\d.]+)", lambda m: f"[04-07 11:47:0{m[1]}", line),
    "clock": lambda line: re.sub(r"\[ *([\d.]+)", lambda m: f"[11:47:0{m[1]}", line),
}


@pytest.mark.parametrize("protocol", WRITERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_touches_that_were_made(tmp_path, dialect, protocol):
    lines = [DIALECTS[dialect](line) for line in WRITERS[protocol](TOUCHES)]
    recording = read(tmp_path, lines)
    assert touches_of(recording) == (TOUCHES, {})
    assert not recording.refused


def test_a_log_redirected_by_powershell(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes("\r\n".join(protocol_b(TOUCHES)).encode("utf-16"))
    recording = Recording()
    read_getevent(path, ImportOptions(), recording)
    assert touches_of(recording) == (TOUCHES, {})


def test_without_times_the_rate_of_reports_is_needed(tmp_path):
    bare = [line.split(": ")[1] for line in protocol_a(TOUCHES)]
    with pytest.raises(UserError, match=r"log.txt, line 1: .*--report_rate"):
        read(tmp_path, bare)
    (first, *_), faults = touches_of(read(tmp_path, bare, report_rate=100.0))
    assert [t for t, *_ in first] == [1000, 1010, 1020, 1030] and not faults


# ---- what is no whole touch of one finger ----------------------------------------------


def test_two_fingers_are_refused_also_where_one_stays(tmp_path):
    said = [("ABS_MT_POSITION_X", 5), ("ABS_MT_POSITION_Y", 6)]
    one, two = (("ABS_MT_SLOT", slot) for slot in (0, 1))
    lines = [
        *report(100, ("ABS_MT_TRACKING_ID", 1), *said),
        *report(150, two, ("ABS_MT_TRACKING_ID", 2), *said),
        *report(180, one, ("ABS_MT_TRACKING_ID", -1)),
        *report(190, two, ("ABS_MT_POSITION_X", 7)),
        *report(200, ("ABS_MT_TRACKING_ID", -1)),
        *protocol_b(TOUCHES),
    ]
    recording = read(tmp_path, lines)
    assert touches_of(recording) == (TOUCHES, {"two fingers": 2})
    assert [(s.t[0], s.t[-1]) for s in recording.strokes[:2]] == [(100, 180), (150, 200)]


@pytest.mark.parametrize("with_id", [True, False])
def test_two_fingers_of_protocol_a(tmp_path, with_id):
    def finger(number):
        said = [("ABS_MT_POSITION_X", number), ("ABS_MT_POSITION_Y", 6)]
        return [*said, *[("ABS_MT_TRACKING_ID", number)] * with_id, ("SYN_MT_REPORT", 0)]

    lines = [
        *report(100, *finger(0)),
        *report(150, *finger(0), *finger(1)),
        *report(180, *finger(1)),  # the first has lifted
        *report(200, ("SYN_MT_REPORT", 0)),
        *protocol_a(TOUCHES, with_id),
    ]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {"two fingers": 2})


def test_an_empty_packet_alone_is_a_lift_off(tmp_path):
    """SYN_MT_REPORT without a SYN_REPORT behind it."""
    lines = protocol_a(TOUCHES)
    ends = [i for i in range(1, len(lines)) if "SYN_MT" in lines[i] and "SYN_R" in lines[i - 1]]
    assert len(ends) == 3
    for i in reversed(ends):
        del lines[i + 1]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {})


def test_a_finger_that_follows_another_without_a_lift_off_between(tmp_path):
    """Another tracking id is another finger."""
    place = [("ABS_MT_POSITION_X", 5), ("ABS_MT_POSITION_Y", 6)]
    there = [("ABS_MT_POSITION_X", 900), ("ABS_MT_POSITION_Y", 6)]
    one, two = (("ABS_MT_TRACKING_ID", number) for number in (1, 2))
    due = [[(1000, 5, 6), (1020, 5, 6)], [(1020, 900, 6), (1040, 900, 6)]]
    lift = report(1040, ("ABS_MT_TRACKING_ID", -1))
    lines = [*report(1000, one, *place), *report(1020, two, *there), *lift]
    assert touches_of(read(tmp_path, lines)) == (due, {})
    end, lift = ("SYN_MT_REPORT", 0), report(1040, ("SYN_MT_REPORT", 0))
    lines = [*report(1000, *place, one, end), *report(1020, *there, two, end), *lift]
    assert touches_of(read(tmp_path, lines)) == (due, {})


def test_a_lift_off_by_btn_touch_alone_or_with_a_last_move(tmp_path):
    lines = [line for line in protocol_b(TOUCHES) if "ffffffff" not in line]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {})
    lines = protocol_b(TOUCHES)
    lines.insert(-3, event(1760, "ABS_MT_POSITION_X", 100))
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {})


def test_the_first_fault_of_a_contact_counts(tmp_path):
    place = [("ABS_MT_POSITION_X", 5), ("ABS_MT_POSITION_Y", 6)]
    second = [("ABS_MT_SLOT", 1), ("ABS_MT_TRACKING_ID", 2), *place]
    lines = [*report(10, *place), *report(20, *second)]
    _, faults = touches_of(read(tmp_path, lines))
    assert faults == {"no touch-down": 1, "two fingers": 1}


FAULTS = {
    "no touch-down": [event(10, "ABS_MT_POSITION_X", 4), event(11, "SYN_REPORT", 0)],
    "no touch-down, lifts": report(10, ("ABS_MT_TRACKING_ID", -1)),
    "no touch-down, lifts, single": report(10, ("BTN_TOUCH", "UP")),
    "no position": [
        *report(10, ("ABS_MT_TRACKING_ID", 4), ("ABS_MT_POSITION_X", 4)),
        *report(20, ("ABS_MT_TRACKING_ID", -1)),
    ],
    "events lost": [
        *report(10, ("ABS_MT_TRACKING_ID", 4), ("ABS_MT_POSITION_X", 4), ("ABS_MT_POSITION_Y", 5)),
        event(12, "SYN_DROPPED", 0),
        *report(20, ("ABS_MT_TRACKING_ID", -1)),
    ],
    "no lift-off": report(
        10, *[(f"ABS_MT_POSITION_{axis}", 4) for axis in "XY"], ("BTN_TOUCH", "DOWN")
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_whole_touch_is_refused_by_its_reason(tmp_path, name):
    lines = [*FAULTS[name], *(single_touch if "single" in name else protocol_b)(TOUCHES)]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {name.split(",")[0]: 1})


def test_a_log_that_ends_in_a_touch(tmp_path):
    lines = protocol_b(TOUCHES)[:-3]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES[:2], {"no lift-off": 1})


def test_a_pen_that_hovers_does_not_touch(tmp_path):
    hover = [*report(10, ("ABS_X", 5), ("ABS_Y", 6)), *report(20, ("ABS_X", 7))]
    lines = [
        *hover,
        *single_touch(TOUCHES[:1]),
        *report(1100, ("ABS_X", 9)),
        *single_touch(TOUCHES[1:]),
    ]
    assert touches_of(read(tmp_path, lines)) == (TOUCHES, {})


def test_lines_that_go_back_in_time_or_are_none_are_counted(tmp_path):
    lines = protocol_a(TOUCHES)
    lines.insert(9, event(500, "ABS_MT_POSITION_X", 9))
    lines.insert(0, "could not get driver version for /dev/input/mice, Not a typewriter")
    lines += ["^C", "", lines[-1][:40], event(0, "SYN_REPORT", 0).replace("[", "[soon ")]
    lines += [event(0, "SYN_REPORT", 0).replace("0.0", "1e400")]
    recording = read(tmp_path, lines)
    assert touches_of(recording) == (TOUCHES, {})
    assert recording.refused == {"time going back": 1, "not an event": 2, "no time": 2}


def test_other_devices_do_not_disturb(tmp_path):
    lines = []
    for line in protocol_b(TOUCHES):
        lines += [line, line.replace("event2", "event0").replace("EV_", "EV_K").replace("MT_", "")]
    lines += [event(1, "SYN_REPORT", 0).replace("event2", "event5")]  # a clock of its own
    assert touches_of(read(tmp_path, lines))[0] == TOUCHES


# ---- the axes --------------------------------------------------------------------------

DESCRIPTION = """add device 1: /dev/input/event1
  name:     "keys"
  events:
    KEY (0001): 0072  0073
add device 2: /dev/input/event2
  name:     "touchscreen"
  events:
    KEY (0001): 014a
    ABS (0003): {}  : value 0, min 0, max 9, fuzz 0, flat 0, resolution 0
                {}  : value 0, min 100, max 1100, fuzz 0, flat 0, resolution 0
                {}  : value 0, min 0, max 2000, fuzz 0, flat 0, resolution 0
  input props:
    INPUT_PROP_DIRECT
"""
LABELS = ("ABS_MT_SLOT          ", "ABS_MT_POSITION_X    ", "ABS_MT_POSITION_Y    ")
AXES = {"-lp": DESCRIPTION.format(*LABELS), "-p": DESCRIPTION.format("002f", "0035", "0036")}
SINGLE = DESCRIPTION.format("ABS_PRESSURE", "ABS_X", "ABS_Y")
COPIES = "    ABS (0003): ABS_X : value 0, min 0, max 9\n ABS_Y : value 0, min 0, max 9\n"
AXES["-lp, both"] = AXES["-lp"].replace("    ABS (0003): ABS_MT_SLOT", COPIES + "    ABS_MT_SLOT")


def first_places(tmp_path, sources, **options):
    recording = read_recording(sources, ImportOptions(**options))
    how = " ".join(recording.notes)
    return [tuple(s.xy[0].round(6)) for s in recording.strokes], how


@pytest.mark.parametrize("described", [*AXES.values(), SINGLE], ids=[*AXES, "single"])
@pytest.mark.parametrize("order", ["in the log", "before", "after", "no device column"])
def test_axes_that_getevent_describes(tmp_path, described, order):
    lines = protocol_b(TOUCHES)
    if order == "no device column":
        lines = [line.replace(" /dev/input/event2:", "") for line in lines]
    log, axes = tmp_path / "log.txt", tmp_path / "axes.txt"
    log.write_text((described if order == "in the log" else "") + "\n".join(lines))
    axes.write_text(described)
    sources = {"in the log": [log], "before": [axes, log]}.get(order, [log, axes])
    places, how = first_places(tmp_path, sources, screen="99x99")
    assert places == [(0.2, 0.25), (0.21, 0.45), (0.21, 0.45)] and "getevent" in how


def test_axes_of_the_screen_or_of_what_was_seen(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("\n".join(protocol_b(TOUCHES)))
    places, how = first_places(tmp_path, [log], screen="1001x2001")
    assert places[0] == (0.3, 0.25) and "--screen" in how
    places, how = first_places(tmp_path, [log])
    assert places[0] == (round(300 / 310, 6), round(500 / 901, 6)) and "largest seen" in how
    recording = read_recording([log], ImportOptions(screen="305x2001"))
    assert [s.fault for s in recording.strokes] == ["outside the screen"] * 3


def test_two_screens_that_are_described_need_a_device_column(tmp_path):
    log = tmp_path / "log.txt"
    other = SINGLE.replace("event2", "event7")
    lines = [line.replace(" /dev/input/event2:", "") for line in protocol_b(TOUCHES)]
    sensor, flat = other, AXES["-p"].replace("event2", "event3").replace("max 1100", "max 100")
    log.write_text(AXES["-p"] + sensor + flat + "\n".join(lines))
    assert first_places(tmp_path, [log])[0][0] == (0.2, 0.25)
    other = AXES["-lp"].replace("event2", "event7")
    log.write_text(AXES["-p"] + other + "\n".join(lines))
    with pytest.raises(UserError, match="which screen"):
        read_recording([log], ImportOptions())
    log.write_text(AXES["-p"] + other + "\n".join(protocol_b(TOUCHES)))
    assert first_places(tmp_path, [log])[0][0] == (0.2, 0.25)


def test_a_log_that_describes_its_screen_has_its_axes(tmp_path):
    """Two phones call their screens alike; each log begins with what its own one spans."""
    lines, wide = protocol_b(TOUCHES[:1]), AXES["-lp"].replace("1100", "2100")
    bare = [line.replace(" /dev/input/event2:", "") for line in lines]
    for log in (lines, bare):
        for name, described in (("a", AXES["-p"]), ("b", wide)):
            (tmp_path / f"{name}.txt").write_text(described + "\n".join(log))
        sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for order, due in ((sources, [0.2, 0.1]), (sources[::-1], [0.1, 0.2])):
            places, how = first_places(tmp_path, order)
            assert places == [(x, 0.25) for x in due]
            assert "x 100 to 1100, " in how and "x 100 to 2100, " in how


@pytest.mark.parametrize(
    "sources", ["axes other log", "other axes log", "other log axes", "both log"]
)
def test_two_screens_of_one_name_are_refused(tmp_path, sources):
    other = AXES["-p"].replace("1100", "2100")
    files = {"axes": AXES["-lp"], "other": other, "both": other + AXES["-lp"]}
    files["log"] = "\n".join(protocol_b(TOUCHES))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        UserError, match=r"screen.* called /dev/input/event2; import them one by one"
    ):
        first_places(tmp_path, [tmp_path / name for name in sources.split()], format="getevent")


def test_a_screen_that_nothing_describes_does_not_get_the_axes_of_another(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(AXES["-p"].replace("event2", "event7") + "\n".join(protocol_b(TOUCHES)))
    with pytest.raises(
        UserError, match=r"event7\? nothing describes /dev/input/event2; .*--screen"
    ):
        first_places(tmp_path, [log])
    places, how = first_places(tmp_path, [log], screen="1001x2001")
    assert places[0] == (0.3, 0.25) and "--screen" in how


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_description_of_too_many_digits_is_none(tmp_path, digits):
    log = tmp_path / "log.txt"
    log.write_text(AXES["-lp"].replace("1100", digits * "9") + "\n".join(protocol_b(TOUCHES)))
    assert "largest seen" in first_places(tmp_path, [log])[1]


# ---- lines as they occur ---------------------------------------------------------------


def test_odd_lines_as_they_occur(tmp_path):
    lines = [
        "[    5123.100001] /dev/input/event2: EV_ABS       ABS_MT_TRACKING_ID   0000002a  rate 114",
        "[    5123.100001] /dev/input/event2: EV_ABS       ABS_MT_POSITION_X    00002d16",
        "[    5123.100001] /dev/input/event2: EV_ABS       ABS_MT_POSITION_Y    00000010",
        "[    5123.100001] /dev/input/event2: EV_SYN       SYN_REPORT           00000000   rate 0",
        "0[    5123.200000] /dev/input/event2: EV_ABS       ABS_MT_SLOT          00000000",
        "[    5123.200010] /dev/input/event2: 0003 0039 ffffffff",
        "[    5123.200020] /dev/input/event2: 0000 0000 00000000",
    ]
    (stroke,) = read(tmp_path, lines).strokes
    assert (stroke.session, stroke.fault) == ((tmp_path / "log").as_posix(), "")
    np.testing.assert_allclose(stroke.t, [5123100.001, 5123200.020])
    assert stroke.xy.tolist() == [[0x2D16, 16], [0x2D16, 16]]


def test_a_wall_clock_without_a_blank(tmp_path):
    head = "[2024-04-07 11:47:18.607]/dev/input/event2: "
    lines = [line.split(": ")[1] for line in protocol_b(TOUCHES)]
    later = head.replace("18.607", "18.700")
    stamps = [head] * (len(lines) - 3) + [later] * 3
    recording = read(tmp_path, [stamp + line for stamp, line in zip(stamps, lines, strict=True)])
    assert recording.strokes[-1].t[-1] - recording.strokes[-1].t[0] == pytest.approx(93)


@pytest.mark.parametrize("text", ["", "hello\n", "\x00\x01\xff", "x,y,press\n1,2,3\n"])
def test_what_is_no_log_is_named(tmp_path, capsys, text):
    path = tmp_path / "log.txt"
    path.write_text(text)
    assert main([str(path), "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}, line 1: ") and err.count("\n") == 1


def test_from_a_log_to_gestures(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(AXES["-lp"] + "\n".join(protocol_b(TOUCHES)))
    (made,) = import_touch([path], tmp_path / "out", val_share=0.0)
    x = read_gestures(made.folder, 250)
    assert x[..., 2].sum(axis=1).tolist() == [17, 45, 30]  # 33, 90 and 60 ms
    onset = x[0, :, 2].argmax()
    time = 1000 + 2 * np.arange(17)
    due = np.interp(time, [1000, 1010, 1020, 1033], [0.2, 0.21, 0.21, 0.21])
    np.testing.assert_allclose(x[0, onset : onset + 17, 0], due, atol=1e-6)
    assert made.manifest["assumed"] == ["x 100 to 1100, y 0 to 2000, from getevent -p"]


def test_reading_speed(tmp_path):
    """Ten thousand contacts of 50 reports in ten seconds of one core."""
    touch = [(8 * i, 5 + i, 7 + i) for i in range(50)]
    touches = [[(1000 * n + t, x, y) for t, x, y in touch] for n in range(500)]
    lines, seconds = protocol_b(touches), []
    for _ in range(8):  # the quickest: what else the machine does is not the reader's
        began = time.process_time()
        assert len(read(tmp_path, lines).strokes) == 500
        seconds.append(time.process_time() - began)
    assert min(seconds) < 10 * 500 / 10_000
