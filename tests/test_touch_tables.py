"""Tables of samples: the touches in them are read, whatever names, units and dirt they have.

Why: every such file has columns, words and units of its own, and rows that are doubled, late, of
another finger or of no touch at all; a reader that takes them draws jumps that nobody made. Lines
as they occur stand beside what is right for them.

    python -m pytest tests/test_touch_tables.py
"""

import numpy as np
import pytest

from augmentation.import_touch import ImportOptions, import_touch, main, read_recording
from augmentation.recordings import table as tables
from augmentation.recordings.files import Recording
from augmentation.recordings.table import read_table
from trainlib.errors import UserError
from trainlib.gesture_files import read_gestures

TOUCH = [(1000, 10, 20), (1008, 30, 20), (1016, 30, 60), (1025, 30, 60)]  # ms, pixels
WORDS = ["DOWN", "HELD", "HELD", "UP"]


def read(tmp_path, text, name="a.csv", **options):
    """The strokes and the refused lines of a table."""
    path = tmp_path / name
    path.write_text(text)
    recording = Recording()
    read_table(path, ImportOptions(**options), recording)
    return recording.strokes, dict(recording.refused)


def whole(strokes):
    return [np.column_stack([s.t, s.xy]).round(3).tolist() for s in strokes if not s.fault]


def faults(strokes):
    return sorted(s.fault for s in strokes if s.fault)


def table(rows, separator=",", header="t,x,y,touch"):
    lines = [header.replace(",", separator)] * bool(header)
    return "\n".join([*lines, *(separator.join(map(str, row)) for row in rows)]) + "\n"


ROWS = [(*row, word) for row, word in zip(TOUCH, WORDS, strict=True)]

# ---- lines as they occur ---------------------------------------------------------------

BROWSER = """\
s1 1582288978946 360 215 touchend 101 131 0.4 0.4 0 w 1
s1 1582288979096 360 215 touchend 260 70 0.8 0.8 0 w 1
s1 1582288979096 360 215 touchend 260 70 0.8 0.8 0 w 1 1
s1 1582288979106 360 215 touchstart 103 134 0.4 0.4 0 w 1
s1 1582288979150 360 215 touchend 103 134 0.4 0.4 0 w 1
s1 1582288979306 360 215 touchmove 256 101 0.6 0.6 0 w 1
s1 1582288979430 360 215 touchend 102 117 0.4 0.4 0 w 1
s1 1582288979424 360 215 touchmove 102 117 0.4 0.4 0 w 1 1
"""
BROWSER_COLUMNS = "session=1,t=2,width=3,height=4,touch=5,x=6,y=7"

GAME = """\
Timestamp,X,Y,BTN_TOUCH,WIDTH_MAJOR,WIDTH_MINOR,FINGER,CLASS
32.3704,1002,565,DOWN,9,9,0,10
32.3879,1005,565,HELD,10,10,0,10
32.4045,1010,565,HELD,9,9,0,10
32.4131,1013,565,UP,10,10,0,10
603.9704,1272,2364,HELD,9,9,0,10
0.4349,1045,656,HELD,10,10,1,10
0.0,1942,3208,,-420,-420,-420,-420,0
"""
GAME_COLUMNS = "t=Timestamp,x=X,y=Y,touch=BTN_TOUCH,finger=FINGER"


def test_a_browsers_log(tmp_path):
    strokes, lines = read(tmp_path, BROWSER, "a.txt", columns=BROWSER_COLUMNS)
    assert whole(strokes) == [[[1582288979106, 103, 134], [1582288979150, 103, 134]]]
    assert faults(strokes) == ["no touch-down"] * 3  # two lift-offs; a move with its lift-off
    assert lines == {"duplicate": 1, "time going back": 1}


def test_a_browsers_log_as_gestures(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(BROWSER)
    (made,) = import_touch([path], tmp_path / "out", columns=BROWSER_COLUMNS, val_share=0.0)
    (x,) = read_gestures(made.folder, 250)
    pressed = x[x[:, 2] == 1]
    assert len(pressed) == 22  # 44 ms
    assert made.manifest["refused"]["lines"] == {"duplicate": 1, "time going back": 1}
    np.testing.assert_allclose(pressed[:, :2], [[103 / 359, 134 / 214]] * 22, rtol=1e-6)


def test_a_games_table(tmp_path):
    strokes, lines = read(tmp_path, GAME, columns=GAME_COLUMNS)
    t = [32370.4, 32387.9, 32404.5, 32413.1]
    due = [[t, x, 565] for t, x in zip(t, [1002, 1005, 1010, 1013], strict=True)]
    assert whole(strokes) == [due]
    assert faults(strokes) == ["no touch-down"]
    assert lines == {"two fingers": 1, "no touch state": 1}


def test_a_screen_without_a_size(tmp_path):
    lines = BROWSER.replace("9106 360", "9106 0").replace("9306 360 215", "9306 360 1")
    strokes, refused = read(tmp_path, lines, "a.txt", columns=BROWSER_COLUMNS)
    assert not whole(strokes) and refused["not a number"] == 2


def test_a_row_logged_again_later_with_one_more_field(tmp_path):
    rows = [*ROWS[:2], (1018, *ROWS[1][1:], 1), *ROWS[2:]]
    strokes, lines = read(tmp_path, table(rows))
    assert lines == {"duplicate": 1} and len(whole(strokes)) == 1
    rows = [*ROWS[:2], (1009, 77, 20, "HELD", 1), *ROWS[2:], (1030, 1)]
    strokes, lines = read(tmp_path, table(rows))
    assert lines == {"wrong number of fields": 2}
    assert whole(strokes) == [[list(row) for row in TOUCH]]


def with_finger(rows, finger, late=0):
    return [(t + late, x, y, word, finger) for t, x, y, word in rows]


def test_a_contact_that_a_second_finger_joins_is_none_of_one_finger(tmp_path):
    both = sorted([*with_finger(ROWS, 0), *with_finger(ROWS, 1, late=5)])
    rows = [*both, *with_finger(ROWS, 0, late=500)]
    strokes, lines = read(tmp_path, table(rows, header="t,x,y,touch,finger"))
    assert lines == {"two fingers": 4} and faults(strokes) == ["two fingers"]
    assert whole(strokes) == [[[t + 500, x, y] for t, x, y in TOUCH]]


@pytest.mark.parametrize(
    "words",
    [(0, 2, 5, 2, 1), ("ACTION_DOWN", "ACTION_MOVE", "ACTION_POINTER_DOWN", "ACTION_MOVE", "up")],
)
def test_a_second_finger_without_a_column_of_fingers(tmp_path, words):
    strokes, lines = read(tmp_path, table([(8 * i, 1, 1, word) for i, word in enumerate(words)]))
    assert faults(strokes) == ["two fingers"] and lines == {"two fingers": 1}


def test_a_table_whose_first_row_has_a_field_too_many(tmp_path):
    lines = BROWSER.splitlines()
    lines = [lines[0] + " 1", *lines[1:]]
    strokes, refused = read(tmp_path, "\n".join(lines), "a.txt", columns=BROWSER_COLUMNS)
    assert len(whole(strokes)) == 1 and refused["wrong number of fields"] == 1


def test_another_finger_that_lands_alone_is_followed(tmp_path):
    """As where each contact has a number of its own."""
    rows = [*with_finger(ROWS, 40), *with_finger(ROWS, 41, late=100)]
    strokes, lines = read(tmp_path, table(rows, header="t,x,y,touch,finger"))
    assert not lines and not faults(strokes) and len(whole(strokes)) == 2


def test_a_second_finger_whose_rows_follow_from_time_zero_on(tmp_path):
    rows = [*with_finger(ROWS, 0), *with_finger(ROWS, 1, late=-900)]
    strokes, lines = read(tmp_path, table(rows, header="t,x,y,touch,finger"))
    assert lines == {"two fingers": 4} and not faults(strokes) and len(whole(strokes)) == 1


# ---- names, separators, units ----------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "  "])
def test_separators(tmp_path, separator):
    strokes, lines = read(tmp_path, table(ROWS, separator))
    assert whole(strokes) == [[list(row) for row in TOUCH]] and not lines


@pytest.mark.parametrize("unit, factor", [("s", 1e-3), ("ms", 1), ("us", 1e3), ("ns", 1e6)])
def test_units_of_time_given_or_seen(tmp_path, unit, factor):
    text = table([(factor * t, *rest) for t, *rest in ROWS])
    for time_unit in ("auto", unit):
        strokes, _ = read(tmp_path, text, time_unit=time_unit)
        assert whole(strokes) == [[list(row) for row in TOUCH]]


def test_a_unit_is_seen_where_most_rows_share_their_time_with_another(tmp_path):
    moves = [(1000 + 8 * i, i, j, "HELD") for i in range(20) for j in range(4)]
    rows = [(1000, 0, 0, "DOWN"), *moves, (1200, 1, 1, "UP")]
    ((*_, (last, _, _)),) = whole(read(tmp_path, table(rows))[0])
    assert last == 1200


@pytest.mark.parametrize(
    "words",
    [
        ("touchstart", "touchmove", "touchmove", "touchend"),
        ("ACTION_DOWN", "ACTION_MOVE", "ACTION_MOVE", "ACTION_UP"),
        ("pointerdown", "pointermove", "pointermove", "pointerup"),
        (1, 1, 1, 0),
        ("1.0", "1.0", "1.0", "0.0"),
        ("True", "True", "True", "False"),
        ("down", "held", "Held", "up "),
        (0, 2, 2, 1),  # Android's MotionEvent
        ("0.0", "2.0", "2.0", "1.0"),  # as pandas writes it
    ],
)
def test_words_and_numbers_of_the_touch_state(tmp_path, words):
    rows = [(*row, word) for row, word in zip(TOUCH, words, strict=True)]
    strokes, lines = read(tmp_path, table(rows))
    assert whole(strokes) == [[list(row) for row in TOUCH]] and not lines


def test_idle_rows_are_no_fault_and_a_lift_off_may_lack_its_place(tmp_path):
    rows = [(900, 0, 0, 0), *[(*row, 1) for row in TOUCH[:3]], (1025, "", "", 0), (1030, 0, 0, 0)]
    strokes, lines = read(tmp_path, table(rows))
    assert whole(strokes) == [[list(row) for row in TOUCH]] and not lines and not faults(strokes)


@pytest.mark.parametrize("place", [(0, 0), (-1, 9999), ("", ""), (30, 60)])
@pytest.mark.parametrize("on, off", [(1, 0), ("1.0", "0.0"), ("true", "false")])
def test_a_row_of_no_touch_has_no_place(tmp_path, on, off, place):
    rows = [*[(*row, on) for row in TOUCH[:3]], (1025, *place, off), (1033, *place, off)]
    strokes, lines = read(tmp_path, table(rows))
    assert whole(strokes) == [[list(row) for row in TOUCH]] and not lines


@pytest.mark.parametrize("down, move, up", [("DOWN", "MOVE", "UP"), (0, 2, 1)])
def test_a_lift_off_has_its_place(tmp_path, down, move, up):
    rows = [(*TOUCH[0], down), (*TOUCH[1], move), (1025, 40, 70, up)]
    strokes, _ = read(tmp_path, table(rows))
    assert whole(strokes) == [[*map(list, TOUCH[:2]), [1025, 40, 70]]]


@pytest.mark.parametrize("zero, one, two", [(0, 1, 2), ("0.0", "1.0", "2.0"), (0, 1, 3)])
def test_a_code_that_shows_too_late_that_all_were_codes(tmp_path, monkeypatch, zero, one, two):
    monkeypatch.setattr(tables, "_HEAD", 4)
    taps = [(8 * i, 1, 1, (zero, one)[i % 2]) for i in range(4)]
    with pytest.raises(UserError, match=rf"a.csv, line 6: touch is {two}, a code of MotionEvent"):
        read(tmp_path, table([*taps, (40, 1, 1, two)]))


def test_what_is_taken_for_touched_is_said(tmp_path):
    for words, due in (((1, 1, 1, 0), True), (WORDS, False), ((0, 2, 2, 1), False)):
        rows = [(*row, word) for row, word in zip(TOUCH, words, strict=True)]
        how = places(tmp_path, table(rows), screen="99x99")[1]
        assert ("touch 1 is down, 0 is up" in how) == due


def taps(num, codes=(0, 1), still=1):
    """Taps of 90 ms, one second and at least 100 pixels apart, each with a down and an up."""
    downs = [(1000 * i, 100 * i, 300 * (i % 2)) for i in range(num)]
    ups = [(t + 90, x + still, y) for t, x, y in downs]
    pairs = zip(downs, ups, strict=True)
    return [(*row, code) for pair in pairs for row, code in zip(pair, codes, strict=True)]


@pytest.mark.parametrize("codes", [(0, 1), ("0.0", "1.0")])
@pytest.mark.parametrize("head", [1000, 6, 7])
def test_taps_without_a_move_are_codes_of_motion_event(tmp_path, monkeypatch, codes, head):
    monkeypatch.setattr(tables, "_HEAD", head)
    text = table(taps(6, codes))
    strokes, lines = read(tmp_path, text)
    due = [
        [[1000 * i, 100 * i, y], [1000 * i + 90, 100 * i + 1, y]]
        for i, y in enumerate(3 * [0, 300])
    ]
    assert whole(strokes) == due and not faults(strokes) and not lines
    how = places(tmp_path, text, screen="999x999")[1]
    assert "touch 0 is down, 1 is up" in how and "touch 1 is down" not in how


TAPS = taps(4)


@pytest.mark.parametrize(
    "rows",
    [
        taps(4, (1, 0)),  # as states
        taps(4, still=200),  # swipes from where the last one ended
        TAPS[:-1],  # stopped while nothing touched
        TAPS[1:],
        [*TAPS, (5000, 0, 0, 0), (5010, 0, 0, 0)],  # idle rows
        [*TAPS[:3], (1050, *TAPS[2][1:3], 1), *TAPS[3:]],  # two rows of one touch
        taps(2),  # too few to tell
        [(t, 5, 5, code) for t, _, _, code in TAPS],  # all at one place
        [(t, "", "", code) for t, _, _, code in TAPS[:1]] + TAPS[1:],
    ],
)
def test_ones_and_zeros_that_may_be_states_are(tmp_path, rows):
    how = places(tmp_path, table(rows), screen="999x999")[1]
    assert "touch 1 is down, 0 is up" in how and "touch 0 is down" not in how


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([*ROWS[:3]], "no lift-off"),
        ([*ROWS[:3], (1500, 1, 1, "DOWN"), (1600, 1, 1, "UP")], "no lift-off"),
        ([*ROWS[1:]], "no touch-down"),
        ([*ROWS[:3], (1025, 1, 1, "touchcancel")], "cancelled"),
    ],
)
def test_contacts_that_are_no_whole_ones(tmp_path, rows, reason):
    strokes, _ = read(tmp_path, table(rows))
    assert faults(strokes) == [reason]


def test_sessions_are_apart_and_the_next_may_begin_without_a_lift_off(tmp_path):
    rows = [("a", *row) for row in ROWS[:3]] + [("b", *row) for row in ROWS]
    strokes, lines = read(tmp_path, table(rows, header="session,t,x,y,touch"))
    assert [(s.session.rpartition("/")[2], s.fault) for s in strokes] == [
        ("b", ""),
        ("a", "no lift-off"),
    ]
    assert not lines


@pytest.mark.parametrize(
    "row, reason",
    [
        (("x", 1, 1, "HELD"), "not a number"),
        ((1e300, 1, 1, "HELD"), "not a number"),
        ((1017, "1\r", 1, "HELD\x00"), "no touch state"),
        ((1017, "", 1, "HELD"), "not a number"),
        ((1017, 1, "nan", "HELD"), "not a number"),
        ((1017, 1, 1, "HOVER"), "no touch state"),
        ((1017, 1, 1, ""), "no touch state"),
        ((1010, 1, 1, "HELD"), "time going back"),
        ((1017, 1), "wrong number of fields"),
        (ROWS[2], "duplicate"),
    ],
)
def test_refused_rows_change_nothing(tmp_path, row, reason):
    strokes, lines = read(tmp_path, table([*ROWS[:3], row, ROWS[3]]))
    assert lines == {reason: 1}
    assert whole(strokes) == [[list(row) for row in TOUCH]]


def test_the_summary_counts_a_refused_line_once(tmp_path, capsys):
    rows = [(name, *row) for name in "ab" for row in [*ROWS, ROWS[-1]]]
    path = tmp_path / "a.csv"
    path.write_text(table(rows, header="session,t,x,y,touch"))
    assert main([str(path), "--output_dir", str(tmp_path / "out"), "--val_share", "0.01"]) == 0
    out, err = capsys.readouterr()
    assert "refused:  lines: 2 duplicate\n" in out and "val:      1 window with 1 contact" in out
    assert err == ""


# ---- the screen ------------------------------------------------------------------------


def places(tmp_path, text, **options):
    path = tmp_path / "a.csv"
    path.write_text(text)
    recording = read_recording([path], ImportOptions(**options))
    how = " ".join(recording.notes)
    return recording.strokes[0].xy[[0, -1]].round(6).tolist(), how


def test_pixels_or_shares(tmp_path):
    text = table(ROWS)
    assert places(tmp_path, text, screen="41x81")[0] == [[0.25, 0.25], [0.75, 0.75]]
    xy, how = places(tmp_path, text)
    assert xy == [[round(1 / 3, 6), round(1 / 3, 6)], [1, 1]] and "largest seen" in how
    text = table([(t, x / 100, y / 100, word) for t, x, y, word in ROWS])
    xy, how = places(tmp_path, text)
    assert xy == [[0.1, 0.2], [0.3, 0.6]] and "shares" in how


def test_the_border_of_the_screen(tmp_path):
    """A pixel beyond it is rounding, more is not on the screen."""
    for x, due in ((31, ""), (31.1, "outside the screen"), (-1, ""), (-2, "outside the screen")):
        path = tmp_path / "a.csv"
        path.write_text(table([*ROWS[:1], (1008, x, 20, "HELD"), *ROWS[2:]]))
        recording = read_recording([path], ImportOptions(screen="31x81"))
        assert recording.strokes[0].fault == due
        assert recording.strokes[0].xy.min() >= 0 and recording.strokes[0].xy.max() <= 1


@pytest.mark.parametrize(
    "options, due",
    [
        ({"y_axis": "up"}, [[0.25, 0.75], [0.75, 0.25]]),
        ({"rotate": "90"}, [[0.75, 0.25], [0.25, 0.75]]),  # the top edge becomes the right one
        ({"rotate": "180"}, [[0.75, 0.75], [0.25, 0.25]]),
        ({"rotate": "270"}, [[0.25, 0.75], [0.75, 0.25]]),
        ({"y_axis": "up", "rotate": "90"}, [[0.25, 0.25], [0.75, 0.75]]),
    ],
)
def test_y_up_and_a_turned_screen(tmp_path, options, due):
    assert places(tmp_path, table(ROWS), screen="41x81", **options)[0] == due


def test_a_corner_is_turned_clockwise(tmp_path):
    text = table([(t, 0, 0, word) for t, _, _, word in ROWS])  # top left
    corners = [
        places(tmp_path, text, screen="41x81", rotate=r)[0][0] for r in ("0", "90", "180", "270")
    ]
    assert corners == [[0, 0], [1, 0], [1, 1], [0, 1]]


# ---- what cannot be read ---------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        *("t", "=", "width=1", "t=a,x=b,y=c", "t=a,x=b,y=c,touch="),
        *("t=0,x=1,y=2,touch=3", "t=1,x=2,y=3,touch=00", f"t=1,x=2,y=3,touch={5000 * '9'}"),
        *("t=a,x=b,y=c,touch=d,z=e", "t=1,x=2,y=3,touch=4,width=5"),
    ],
)
def test_bad_columns_are_one_line(columns):
    with pytest.raises(UserError, match="--columns"):
        ImportOptions(columns=columns)


@pytest.mark.parametrize(
    "text, columns, words",
    [
        ("", "", "line 1: no column for t"),
        ("a,b\n1,2\n", "", "line 1: no column for t in a, b"),
        ("\n\nt,x,y\n1,2,3\n", "", "line 3: no column for touch"),
        ("t,x,y,touch\n1,2,3,UP\n", "t=T,x=x,y=y,touch=touch", "no column for t in"),
        ("\n1,2,3\n4,5,6\n", "t=1,x=2,y=3,touch=9", "line 2: no column 9, only 3"),
        ("", "t=1,x=2,y=3,touch=4", "line 1: no column 4, only 0"),
        ("1,2,3,4\n", "t=1,x=2,y=3,touch=²", "line 1: no column for touch in 1, 2, 3, 4"),
    ],
)
def test_a_table_without_its_columns_is_named(tmp_path, capsys, text, columns, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    argv = ["--columns", columns] if columns else []
    assert main([str(path), "--output_dir", str(tmp_path / "out"), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}, line ") and words in err
    assert err.count("\n") == 1
