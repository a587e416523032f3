"""Recorded touch becomes gestures: what is read is what was done, and nothing is lost in silence.

Why: an importer that drops, drifts or mixes quietly spoils every number after it. Strokes with
known paths are written as each format has them, and the windows are compared with the path itself;
a timeline is put together again and compared with its session.

    python -m pytest tests/test_import_touch.py
"""

import gzip
import json
import lzma
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from augmentation.import_touch import import_touch, main
from augmentation.strokes import (
    Stroke,
    frames_of,
    hold,
    render,
    sample_periods,
    timeline_windows,
    whole_windows,
)
from trainlib.data_gate import check_data
from trainlib.files import sha256_of
from trainlib.gesture_files import read_gestures
from trainlib.gestures import SEQ_LEN

L = SEQ_LEN


def stroke(t, x, y=0.5, session="s", **more):
    """A stroke through (x, y) at the times t, ms."""
    t, x, y = np.broadcast_arrays(np.asarray(t, float), x, y)
    return Stroke(session, t, np.column_stack([x, y]).astype(float), **more)


def line(session="game-1", down=0, **points):
    """A JSON line of a stroke that moves from (.1, .2) to (.5, .4) in 100 ms."""
    t = down + np.arange(0, 101, 10)
    s = stroke(t, np.linspace(0.1, 0.5, 11), np.linspace(0.2, 0.4, 11))
    points = np.column_stack([s.t, s.xy]).tolist()
    return json.dumps({"source": "here", "session": session, "screen": [9, 9], "points": points})


def players(num=5, strokes=4):
    """Lines of some users with a few strokes each, no two alike."""
    return [line(f"game-{n}", 1000 * k + 7 * n) for n in range(1, num + 1) for k in range(strokes)]


def run(tmp_path, capsys, source, *argv):
    """Import with the command line; return its exit code, stdout and stderr."""
    out = tmp_path / "out"
    code = main([str(source), "--output_dir", str(out), *argv])
    return code, *capsys.readouterr()


def written(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def packed(name, content):
    """Bytes as a file of this name holds them."""
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    return pack(content)


def imported(path, tmp_path, **options):
    """The gestures of all parts, and the manifest of the first."""
    options = {"val_share": 0.0} | options
    made = import_touch([path], tmp_path / "out", **options)
    x = np.concatenate([read_gestures(d.folder, d.manifest["sequence_length"]) for d in made])
    return x, made[0].manifest


# ---- from reports to frames ------------------------------------------------------------


def test_a_stroke_is_pressed_from_touch_down_until_lift_off_and_linear_between_samples():
    s = stroke([100, 108, 120], [0.1, 0.3, 0.9], [0.5, 0.5, 0.2])
    windows, refused = whole_windows([s], 40, np.random.default_rng(0))
    (x,) = render(windows, 40)
    onset = -windows[0].first
    assert not refused
    assert np.flatnonzero(x[:, 2]).tolist() == list(range(onset, onset + 10))  # 20 ms
    time = np.arange(10) * 2.0
    due = np.where(time <= 8, 0.1 + 0.2 * time / 8, 0.3 + 0.6 * (time - 8) / 12)
    np.testing.assert_allclose(x[onset : onset + 10, 0], due, atol=1e-6)
    due = np.where(time <= 8, 0.5, 0.5 - 0.3 * (time - 8) / 12)
    np.testing.assert_allclose(x[onset : onset + 10, 1], due, atol=1e-6)
    assert not x[x[:, 2] == 0].any()


@pytest.mark.parametrize(
    "t, frames",
    [
        ([0, 500], (0, 250)),
        ([0, 44], (0, 22)),
        ([0, 42.7], (0, 22)),
        ([1, 43.7], (1, 22)),
        ([3], (2, 3)),  # falls between two frames
        ([3.2, 3.9], (2, 3)),
        ([1582288979106, 1582288979150], (791144489553, 791144489575)),
        ([1000 * 32.3704, 1000 * 32.4131], (16186, 16207)),
    ],
)
def test_frames_of_a_stroke(t, frames):
    assert frames_of(stroke(t, 0.5), 0) == frames


def test_a_stroke_that_fits_exactly_and_one_that_does_not():
    fits, too_long = stroke([0, 500], 0.5), stroke([0, 500.1], 0.5)
    windows, refused = whole_windows([fits, too_long], L, np.random.default_rng(0))
    assert [w.strokes for w in windows] == [[fits]] and windows[0].first == 0
    assert refused == {"longer than the window": 1}


def test_onsets_are_uniform_where_the_stroke_fits():
    strokes = [stroke([0, 20], 0.5)] * 4000
    windows, _ = whole_windows(strokes, 15, np.random.default_rng(0))
    counts = np.bincount([-w.first for w in windows], minlength=6)
    assert len(counts) == 6
    assert ((counts - 4000 / 6) ** 2 / (4000 / 6)).sum() < 20.5  # chi-square, p = .001


def test_silence_means_held_and_no_drift():
    t = [0, 10, 20, 30, 130, 140]
    s = stroke(t, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    (period,) = sample_periods([s]).values()
    assert period == 10
    held = hold(s, period)
    time = np.arange(0, 140, 1.0)
    due = np.interp(time, [0, 30, 120, 140], [0.1, 0.4, 0.4, 0.6])
    np.testing.assert_allclose(np.interp(time, held.t, held.xy[:, 0]), due, atol=1e-12)
    regular = stroke(np.arange(6) * 10, np.arange(6) / 10)
    assert hold(regular, 10).t.tolist() == regular.t.tolist()
    assert hold(stroke([0, 20, 45], [0, 1, 2]), 10).t.tolist() == [0, 20, 35, 45]


def test_rounding_of_times_adds_no_frame():
    t = 1000 * np.arange(0.1, 10, 0.1)
    late = [stroke([a, 1000 * (a / 1000 + 0.5)], 0.5) for a in t.tolist()]
    assert max(s.t[1] - s.t[0] for s in late) > 500
    assert {frames_of(s, s.t[0]) for s in late} == {(0, 250)}


def test_a_session_of_short_strokes_has_the_period_of_the_others():
    long, tap = stroke(np.arange(9) * 8, 0.5, session="a"), stroke([0, 90], 0.5, session="b")
    assert sample_periods([long, tap]) == {"a": 8, "b": 8}
    assert sample_periods([tap]) == {"b": pytest.approx(1000 / 60)}


def session_of(rng, num):
    """Contacts with pauses, some longer than a window; none overlap."""
    strokes, now = [], 0.0
    for _ in range(num):
        now += rng.choice([3, 90, 700, 2000]) * rng.uniform(0.5, 1)
        t = now + np.cumsum(rng.uniform(4, 12, rng.integers(1, 120)))
        strokes.append(stroke(t, rng.uniform(size=len(t)), rng.uniform(size=len(t))))
        now = t[-1]
    return strokes


def test_a_timeline_put_together_is_the_session():
    rng = np.random.default_rng(1)
    strokes = session_of(rng, 40)
    windows, refused = timeline_windows(strokes, {}, L, np.random.default_rng(2))
    x = render(windows, L).reshape(-1, 3)
    assert not +refused
    origin = windows[0].origin
    assert 0 <= strokes[0].t[0] - origin < 2 * L  # the first window holds the first touch-down
    time = origin + 2.0 * np.arange(len(x))
    assert time[-1] + 2 - strokes[-1].t[-1] < 2 * L  # and the last the last lift-off
    due = np.zeros_like(x)
    for s in strokes:
        inside = (time >= s.t[0] - 1e-6) & (time < s.t[-1] - 1e-6)
        if not inside.any():  # between two frames: the next one
            inside[np.flatnonzero(time >= s.t[0])[0]] = True
        for axis in (0, 1):
            due[inside, axis] = np.interp(time[inside], s.t, s.xy[:, axis])
        due[inside, 2] = 1
    np.testing.assert_allclose(x, due, atol=1e-6)


def test_a_timeline_shows_nothing_around_a_contact_that_was_refused():
    good, bad = stroke([0, 100], 0.5), stroke([2600, 2700], 0.5, fault="two fingers")
    late = stroke([5000, 5100], 0.5)
    windows, refused = timeline_windows([good, bad, late], {}, L, np.random.default_rng(0))
    assert refused["around a refused contact"] in (1, 2) and len(windows) in (9, 10)
    for w in windows:
        begin = w.origin + 2 * w.first
        assert not (begin < 2700 and begin + 500 > 2600)


def test_times_that_make_a_session_last_for_ever_are_bad_input(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join([line(), line(down=1.6e12)]))
    for argv in (["--drop_idle"], []):
        code, _, err = run(
            tmp_path, capsys, path, "--window", "timeline", "--val_share", "0", *argv
        )
        assert code == 2 and "the session game-1 lasts 444444 hours; check its times" in err
    assert run(tmp_path, capsys, path, "--window", "whole", "--val_share", "0")[0] == 0


def test_a_contact_that_ends_at_the_border_is_not_in_the_next_window():
    s = stroke([400, 500], 0.5)
    rng = np.random.default_rng(0)
    windows, refused = timeline_windows([s], {"s": 2 * L}, L, rng, drop_idle=True)
    assert [w.first for w in windows] == [0] and refused["idle"] == 1


# ---- JSON lines ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    text = "\r\n".join([*players(1, 3), "", ""]).encode()
    path = written(tmp_path, f"a.jsonl{suffix}", packed(suffix, text))
    x, manifest = imported(path, tmp_path)
    assert x.shape == (3, L, 3) and manifest["refused"]["contacts"] == {}
    for gesture in x:
        pressed = gesture[gesture[:, 2] == 1]
        np.testing.assert_allclose(pressed[:, 0], 0.1 + 0.4 * np.arange(50) / 50, atol=1e-6)
        np.testing.assert_allclose(pressed[:, 1], 0.2 + 0.2 * np.arange(50) / 50, atol=1e-6)


def test_dirty_strokes_are_counted(tmp_path):
    outside = {"session": "s", "points": [[0, 0.5, 0.5], [10, 1.2, 0.5]]}
    back = {"session": "s", "points": [[10, 0.5, 0.5], [0, 0.5, 0.5]]}
    long = {"session": "s", "points": [[0, 0.5, 0.5], [900, 0.5, 0.5]]}
    rows = [line(), line(), *map(json.dumps, (outside, back, long))]
    x, manifest = imported(written(tmp_path, "a.jsonl", "\n".join(rows)), tmp_path)
    assert len(x) == 1
    assert manifest["refused"]["contacts"] == {
        "duplicate": 1,
        "outside the screen": 1,
        "time going back": 1,
        "longer than the window": 1,
    }


@pytest.mark.parametrize(
    "bad",
    [
        *("{", "[]", "3", "null", "[" * 100_000, "\x00\xff", '{"session": "s"}'),
        *('{"points": 3}', '{"points": []}', '{"points": [[0, 1]]}'),
        *('{"points": [[0, 1, 1], [0, 1]]}', '{"points": [[0, 1, NaN]]}'),
        *('{"points": [[0, 1, "a"]]}', '{"points": [[1e300, 1, 1]]}'),
        *(f'{{"points": [[0, {number}, 1]]}}' for number in (400 * "9", 5000 * "9", "1e400")),
    ],
)
def test_an_unreadable_line_is_named_and_nothing_written(tmp_path, capsys, bad):
    path = written(tmp_path, "a.jsonl", "\n".join([line(), line(down=200), bad, line(down=400)]))
    code, out, err = run(tmp_path, capsys, path)
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    assert re.fullmatch(rf"error: {re.escape(str(path))}, line 3: .*\n", err)


@pytest.mark.parametrize("scale, step", [(1e-3, "0.01"), (1e3, "")])
def test_times_in_seconds_are_bad_input(tmp_path, capsys, scale, step):
    rows = [json.loads(line(down=1000 * k)) for k in range(4)]
    for row in rows:
        row["points"] = [[scale * t, x, y] for t, x, y in row["points"]]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    code, _, err = run(tmp_path, capsys, path, "--val_share", "0", "--sequence_length", "60000")
    assert err == (f"error: {path}: t must be in ms, but its median step is 0.01\n" if step else "")
    assert code == (2 if step else 0)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_file_that_is_cut_off_is_named(tmp_path, capsys, pack):
    path = written(tmp_path, "a.jsonl.z", pack("\n".join(players(9, 9)).encode())[:-9])
    code, _, err = run(tmp_path, capsys, path, "--format", "json")
    assert code == 2 and re.fullmatch(rf"error: {re.escape(str(path))}, line \d+: .*\n", err)


# ---- who is validated on ---------------------------------------------------------------


def users(tmp_path, part):
    manifest = json.loads((tmp_path / "out" / part / "dataset.json").read_text())
    return manifest["users"], manifest["sessions"], manifest["count"]


def test_listed_users_are_validated_on_and_nobody_is_in_both(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join(players(7)))
    argv = ["--user_pattern", r"-(\d+)$", "--val_users", "5,2"]
    code, out, _ = run(tmp_path, capsys, path, *argv)
    assert code == 0 and "20 windows with 20 contacts, 5 sessions of 5 users" in out
    assert users(tmp_path, "val") == (["2", "5"], 2, 8)
    assert users(tmp_path, "train") == (["1", "3", "4", "6", "7"], 5, 20)


def test_a_user_with_several_sessions_stays_in_one_part(tmp_path):
    rows = [line(f"{game}-{n}", 500 * k) for k, game in enumerate("abc") for n in range(10)]
    path = written(tmp_path, "a.jsonl", "\n".join(rows))
    import_touch([path], tmp_path / "out", user_pattern=r"-(\d+)$", val_share=0.3)
    (train, *_), (val, num_sessions, count) = users(tmp_path, "train"), users(tmp_path, "val")
    assert len(val) == 3 and (num_sessions, count) == (9, 9)
    assert sorted(train + val) == [str(n) for n in range(10)]


def test_unknown_users_are_split_by_session_and_it_is_said(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    code, out, _ = run(tmp_path, capsys, path)
    assert code == 0 and "split:    by session" in out and "users who are not known" in out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--user_pattern", "("], "no regular expression"),
        (["--user_pattern"], "--user_pattern"),
        (["--user_pattern", "x"], "one group"),
        (["--user_pattern", r"(\d{3})"], "finds no user in the session 'game-1'"),
        (["--val_users", "game-1,game-77"], "game-77"),
        (["--val_users", "game-1,game-2,game-3,game-4,game-5"], "no window is left for train"),
        (["--window", "half"], "window"),
        (["--held_out", "1.1"], "held_out"),
        (["--held_out", "0.9", "--val_users", "game-1,game-2,game-3,game-4"], "to train on"),
        (["--screen", f"{400 * '9'}x9"], "--screen"),
        (["--screen", f"9x{5000 * '9'}"], "--screen"),
        (["--sequence_length", "0"], "sequence_length"),
        (["--sequence_length", "49"], "longer than the window"),
        (["--format", "getevent.txt"], "format"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, argv, words):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    code, out, err = run(tmp_path, capsys, path, *argv)
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: .*\n", err) and words in err


def test_windows_kept_out_of_training_are_of_its_users_and_all_are_there(tmp_path):
    taps = [
        {"session": f"game-{n}", "points": [[500 * k + t, n / 9, k / 20] for t in (0, 80)]}
        for n in range(1, 6)
        for k in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, taps)))
    options = {"user_pattern": r"(\d+)$", "val_users": "5"}
    whole = import_touch([tmp_path / "a.jsonl"], tmp_path / "whole", **options)
    made = import_touch([tmp_path / "a.jsonl"], tmp_path / "out", held_out=0.25, **options)
    train, val, kept = (dataset.manifest for dataset in made)
    assert [m["split"] for m in (train, val, kept)] == ["train", "val", "held_out"]
    assert (train["count"], val["count"], kept["count"]) == (60, 20, 20)
    assert (train["contacts"], kept["contacts"]) == (60, 20)
    assert kept["users"] == train["users"] == ["1", "2", "3", "4"]
    assert kept["refused"] == {"lines": {}, "contacts": {}, "windows": {}}
    x = [{w.tobytes() for w in read_gestures(d.folder, L)} for d in (*made, whole[0], whole[1])]
    assert not x[0] & x[2] and x[0] | x[2] == x[3] and x[1] == x[4]


def test_a_contact_that_crosses_a_border_is_not_kept_out_in_part(tmp_path):
    long = [
        json.dumps({"session": "s", "points": [[2000 * k, 0.1, 0.2], [2000 * k + 800, 0.3, 0.4]]})
        for k in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(long))
    options = {"val_share": 0.0, "window": "timeline", "drop_idle": True, "held_out": 0.5}
    made = import_touch([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    assert [d.manifest["contacts"] for d in made] == [10, 10]
    for dataset in made:
        x = read_gestures(dataset.folder, L)
        down = x[..., 2].sum()
        assert down == 10 * 400 and len(x) > 10  # ten contacts of 800 ms, none cut short


def test_one_session_cannot_be_split(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join(players(1)))
    code, _, err = run(tmp_path, capsys, path)
    assert code == 2 and "one user or session" in err
    assert run(tmp_path, capsys, path, "--val_share", "0")[0] == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train"]


# ---- what is written -------------------------------------------------------------------


def test_the_trainer_takes_both_parts(tmp_path):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    train, val = import_touch([path], tmp_path / "out", window="timeline")

    class Config:
        data_dir, val_data_dir, seq_len = train.folder, val.folder, L
        augment, contacts, allow_overlap = True, True, False

    check_data(read_gestures(train.folder, L), read_gestures(val.folder, L), Config)


def test_the_same_import_again_does_nothing_and_another_is_refused(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    first, second = (import_touch([path], tmp_path / "out") for _ in range(2))
    assert [d.written for d in first] == [True, True]
    assert [d.written for d in second] == [False, False]
    assert [d.manifest for d in first] == [d.manifest for d in second]
    code, _, err = run(tmp_path, capsys, path, "--seed", "1")
    assert code == 2 and "holds another data set (seed 0 -> 1" in err
    assert run(tmp_path, capsys, path, "--seed", "1", "--overwrite")[0] == 0


def left_of(tmp_path):
    return sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("manifest", ["there", "none", "damaged"])
def test_sets_of_an_earlier_import_are_not_left_beside_a_new_one(tmp_path, capsys, manifest):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    assert run(tmp_path, capsys, path, "--held_out", "0.2")[0] == 0
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "out" / "held_out" / "notes.txt").touch()
    if manifest != "there":  # killed while it wrote val
        (tmp_path / "out" / "val" / "dataset.json").unlink()
    if manifest == "damaged":
        (tmp_path / "out" / "val" / "dataset.json").write_text("{")
    before = left_of(tmp_path)
    code, _, err = run(tmp_path, capsys, path, "--val_share", "0")
    assert code == 2 and f"{tmp_path / 'out' / 'val'} is of an earlier import" in err
    assert err.count("\n") == 1 and left_of(tmp_path) == before
    assert run(tmp_path, capsys, path, "--val_share", "0", "--overwrite")[0] == 0
    train = ["train", "train/batch_000000_actions.npy", "train/dataset.json"]
    assert left_of(tmp_path) == ["held_out", "held_out/notes.txt", *train]
    assert users(tmp_path, "train")[1:] == (5, 20)


def test_a_set_of_others_beside_is_left_alone(tmp_path, capsys):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    for name, manifest in (("val", None), ("held_out", {"seed": 3}), ("held_out", 3)):
        (tmp_path / "out" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name / "x_actions.npy").touch()
        if manifest:
            content = {"sequence_length": L, "files": [{"name": "x_actions.npy", "sha256": ""}]}
            content["arguments"] = manifest
            (tmp_path / "out" / name / "dataset.json").write_text(json.dumps(content))
        assert run(tmp_path, capsys, path, "--val_share", "0", "--overwrite")[0] == 0
        assert f"{name}/x_actions.npy" in left_of(tmp_path)


@pytest.mark.parametrize("argv", [[], ["--overwrite"]])
def test_nothing_is_written_if_one_of_the_sets_cannot_be(tmp_path, capsys, argv):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    (tmp_path / "out" / "val").mkdir(parents=True)
    (tmp_path / "out" / "val" / "x_actions.npy").touch()
    code, out, err = run(tmp_path, capsys, path, *argv)
    assert code == 2 and "val" in err and err.count("\n") == 1 and out == ""
    assert left_of(tmp_path) == ["val", "val/x_actions.npy"]


def test_the_disk_must_have_room_for_all_sets(tmp_path, capsys, monkeypatch):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    free = 20 * L * 12 - 1  # the larger one alone would fit
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    code, _, err = run(tmp_path, capsys, path)
    assert code == 1 and f"{20 * L * 12} bytes needed for all data sets, {free} free" in err
    assert left_of(tmp_path) == []


def test_the_same_bytes_under_two_names_are_refused(tmp_path, capsys):
    text = "\n".join(players(5))
    one, two = (written(tmp_path, f"{name}.jsonl", text) for name in "ab")
    code = main([str(one), str(two), "--output_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 2 and not (tmp_path / "out").exists()
    assert err == f"error: {one} and {two} hold the same; leave one out\n"


@pytest.mark.parametrize("names", [("a.jsonl", "a.jsonl.gz"), ("a.jsonl.xz", "a.jsonl.gz")])
def test_a_file_and_its_packed_copy_beside_it_count_once(tmp_path, capsys, names):
    text = "\n".join(players(5)).encode()
    paths = [written(tmp_path, name, packed(name, text)) for name in names]
    argv = [*map(str, paths), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert f"assumed:  {names[1]} is left out, as {names[0]} holds the same\n" in out
    assert "16 windows with 16 contacts" in out and "refused:  contacts: none" in out
    manifest = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert manifest["source"] == [{"name": names[0], "sha256": sha256_of(paths[0])}]


def test_a_packed_file_that_holds_something_else_is_read_too(tmp_path):
    lines = players(2)
    paths = [
        written(tmp_path, name, packed(name, "\n".join(lines[k::2]).encode()))
        for k, name in enumerate(("a.jsonl", "a.jsonl.gz"))
    ]
    made = import_touch(paths, tmp_path / "out", val_share=0.0)
    assert made[0].manifest["contacts"] == len(lines)
    assert [file["name"] for file in made[0].manifest["source"]] == ["a.jsonl", "a.jsonl.gz"]


@pytest.mark.parametrize("name", ["b.jsonl.gz", "old/a.jsonl.gz"])
def test_a_packed_copy_under_another_name_is_refused(tmp_path, capsys, name):
    text = "\n".join(players(5)).encode()
    (tmp_path / "old").mkdir()
    one, two = (written(tmp_path, name, packed(name, text)) for name in ("a.jsonl", name))
    assert main([str(one), str(two), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {one} and {two} hold the same; leave one out\n"


@pytest.mark.parametrize("name", ["csv", "json", "getevent", "hdf5"])
def test_a_pipe_must_be_saved_first(tmp_path, capsys, name):
    end, other = os.pipe()
    os.close(other)
    code, _, err = run(tmp_path, capsys, f"/dev/fd/{end}", "--format", name)
    os.close(end)
    due = f"error: /dev/fd/{end} is not a regular file; save it to a file first\n"
    assert (code, err) == (2, due)


def test_the_manifest_names_source_arguments_and_counts(tmp_path):
    path = written(tmp_path, "a.jsonl", "\n".join(players(5)))
    made = import_touch([path], tmp_path / "out", window="timeline", drop_idle=True)
    for dataset in made:
        manifest = dataset.manifest
        assert manifest["source"] == [{"name": "a.jsonl", "sha256": sha256_of(path)}]
        assert manifest["arguments"]["window"] == "timeline"
        x = read_gestures(dataset.folder, L)
        assert manifest["count"] == len(x) and x[..., 2].any(axis=1).all()
        assert manifest["refused"]["windows"]["idle"] > 0


def test_a_timeline_of_two_contacts_at_once_is_refused(tmp_path):
    rows = [line(down=0), line(down=50), line(down=100), line(down=5000)]  # the third in time
    path = written(tmp_path, "a.jsonl", "\n".join(rows))
    x, manifest = imported(path, tmp_path, window="timeline", drop_idle=True)
    assert manifest["refused"]["contacts"] == {"two fingers": 1}
    assert manifest["refused"]["windows"]["around a refused contact"] in (1, 2)
    assert (np.diff(x[..., 2], axis=1) > 0).sum() <= 1


def test_importing_speed(tmp_path):
    """Ten thousand contacts in ten seconds of one core."""
    path = written(tmp_path, "a.jsonl", "\n".join(players(20, 50)))
    began = time.process_time()
    import_touch([path], tmp_path / "out")
    assert time.process_time() - began < 10 * 1000 / 10_000


def test_a_missing_file_or_an_unknown_suffix(tmp_path, capsys):
    code, _, err = run(tmp_path, capsys, tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in err
    code, _, err = run(tmp_path, capsys, written(tmp_path, "a.doc", "x"))
    assert code == 2 and "a.doc" in err


# ---- HDF5 ------------------------------------------------------------------------------


def actions(num, *more, seed=0):
    """Segments [num, *more, L, 3]; some idle, some pressed at the border, throughout or twice."""
    rng = np.random.default_rng(seed)
    x = np.zeros((num, *more, L, 3), np.float32)
    for segment in x.reshape(-1, L, 3):
        for _ in range(rng.integers(0, 3)):
            first, stop = sorted(rng.choice([0, *rng.integers(0, L, 3), L], 2, replace=False))
            segment[first:stop, :2] = rng.uniform(size=(stop - first, 2))
            segment[first:stop, 2] = 1
    return x


def hdf5(tmp_path, x, name="a.h5", key="actions"):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / name, "w") as file:
        file[key] = x
    return tmp_path / name


@pytest.mark.parametrize("more", [(), (4,)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_segments_of_hdf5_stay_what_they_are(tmp_path, more, kind):
    x = actions(12, *more)
    found, manifest = imported(hdf5(tmp_path, x.astype(kind)), tmp_path)
    np.testing.assert_array_equal(found, x.reshape(-1, L, 3))
    assert manifest["sessions"] == 12 and not any(manifest["refused"].values())


def test_idle_segments_are_left_out_on_request_and_counted(tmp_path):
    x = actions(30)
    idle = ~x[..., 2].any(axis=1)
    found, manifest = imported(hdf5(tmp_path, x), tmp_path, drop_idle=True)
    np.testing.assert_array_equal(found, x[~idle])
    assert manifest["refused"]["windows"] == {"idle": idle.sum()} and idle.any()


def test_contacts_of_hdf5_as_whole_windows_go_on_from_segment_to_segment(tmp_path):
    x = np.zeros((1, 2, L, 3), np.float32)
    x[0, 0, L - 20 :] = x[0, 1, :30] = [0.25, 0.5, 1]
    (found,), _ = imported(hdf5(tmp_path, x), tmp_path, window="whole")
    assert found[:, 2].sum() == 50 and (found[found[:, 2] == 1, :2] == [0.25, 0.5]).all()


def test_contacts_that_a_session_of_hdf5_cuts_are_no_whole_ones(tmp_path):
    x = np.zeros((4, L, 3), np.float32)
    for segment, (first, stop) in zip(x, [(0, L), (100, L), (0, 30), (1, L - 1)], strict=True):
        segment[first:stop] = [0.25, 0.5, 1]
    (found,), manifest = imported(hdf5(tmp_path, x), tmp_path, window="whole")
    assert found[:, 2].sum() == L - 2
    assert manifest["refused"]["contacts"] == {"no touch-down": 2, "no lift-off": 1}


def test_hdf5_rows_are_split_and_all_are_there(tmp_path):
    x = actions(20, 2)
    train, val = import_touch([hdf5(tmp_path, x)], tmp_path / "out", val_share=0.25)
    assert (train.manifest["sessions"], val.manifest["sessions"]) == (15, 5)
    found = np.concatenate([read_gestures(d.folder, L) for d in (train, val)])
    assert sorted(map(bytes, found)) == sorted(map(bytes, x.reshape(-1, L, 3)))


def test_dirty_hdf5(tmp_path):
    x = actions(6)
    x[:, :, 2] = 0
    x[0, 10:20] = [0.5, 0.5, 0]  # a place where nothing is pressed
    x[1, 10:20] = [1.5, 0.5, 1]
    x[2, 10:20] = [np.nan, 0.5, 1]
    x[3, 10:20] = [0.5, 0.5, 1]
    x[4:] = 0
    found, manifest = imported(hdf5(tmp_path, x), tmp_path)
    due = np.zeros((4, L, 3), np.float32)
    due[1, 10:20] = [0.5, 0.5, 1]
    np.testing.assert_array_equal(found, due)
    assert manifest["refused"]["contacts"] == {"outside the screen": 2}
    assert manifest["refused"]["windows"] == {"around a refused contact": 2}
    assert any("x and y set to 0" in note for note in manifest["assumed"])


@pytest.mark.parametrize(
    "x, words",
    [
        (np.zeros((L, 3)), "actions must be [N, L, 3] or [N, T, L, 3], got [250, 3]"),
        (np.zeros((0, L, 3)), "got [0, 250, 3]"),
        (np.zeros((2, L, 2)), "got [2, 250, 2]"),
        (np.full((2, L, 3), 0.5), "press must be 0 or 1, got 0.5 in actions[0], frame 0"),
        (np.full((2, L, 3), np.nan), "press must be 0 or 1, got nan"),
        (np.full((2, L, 3), b"a"), "actions must hold numbers, got |S1"),
        (np.zeros((2, L, 3), complex), "actions must hold numbers, got complex128"),
    ],
)
def test_bad_hdf5_is_one_line(tmp_path, capsys, x, words):
    code, _, err = run(tmp_path, capsys, hdf5(tmp_path, x))
    assert code == 2 and words in err and err.count("\n") == 1


def test_hdf5_without_actions_damaged_or_without_h5py(tmp_path, capsys, monkeypatch):
    code, _, err = run(tmp_path, capsys, hdf5(tmp_path, actions(2), key="moves"))
    assert code == 2 and "holds moves, no dataset 'actions'" in err
    path = hdf5(tmp_path, actions(40))
    content = path.read_bytes()
    header = content.index(b"TREE")
    for damaged in (content[:-5000], content[:header] + bytes(40) + content[header + 40 :]):
        path.write_bytes(damaged)
        code, _, err = run(tmp_path, capsys, path)
        assert code == 2 and f"cannot read {path} as HDF5" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "h5py", None)
    code, _, err = run(tmp_path, capsys, path)
    assert code == 2 and "pip install h5py" in err and err.count("\n") == 1
