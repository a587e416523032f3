"""What augmentation/ promises: the distribution of the gestures, the file format, and safe folders.

Why: every number of this project rests on these sequences, and the trainer trusts the folder.
The distribution is tested against its definition (chi-square, Kolmogorov-Smirnov, exact
fractions), never against recorded sums; the folder by killing real writers and by damaging real
files.

    python -m pytest tests/test_augmentation.py
"""

import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import augmentation
from augmentation.click_aug import Gestures, draw_gestures, generate_augmented_dataset, render
from augmentation.generate_click_dataset import frames_from_pct, main
from augmentation.patterns import EVAL_PATTERNS, make_pattern, write_eval_patterns
from augmentation.presets import (
    COMPLEXITY_LEVELS,
    DATASETS,
    generate_preset,
    prepare_diffusion_data,
)
from trainlib.errors import UserError
from trainlib.gestures import MOVES

stats = pytest.importorskip("scipy.stats")

L = 250
P_MIN = 1e-3  # the seeds are fixed, so a right program passes always


def load(folder, sequence_length=L):
    files = sorted(Path(folder).glob("[!.]*_actions.npy"))
    flat = np.concatenate([np.load(file, allow_pickle=False) for file in files])
    return flat.reshape(-1, sequence_length, 3)


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def small(folder, **changes):
    arguments = {"num_sequences": 20, "min_delta_t": 5, "max_delta_t": 50, "sequences_per_file": 8}
    return generate_augmented_dataset(folder, **{**arguments, **changes})


def run_cli(capsys, *argv):
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --------------------------------------------------------------------------------------
# The distribution, read back from the frames of a written set


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """Parameters read off the frames of 20,000 written mixed sequences, 5 to 75 frames."""
    folder = tmp_path_factory.mktemp("set") / "train"
    generate_augmented_dataset(folder, 20_000, 5, 75, seed=11)
    sequences = load(folder)
    touched = sequences[:, :, 2] == 1
    delta_t = touched.sum(axis=1)
    onset = touched.argmax(axis=1)
    row = np.arange(len(sequences))
    start = sequences[row, onset, :2].astype(float)
    end = sequences[row, onset + delta_t - 1, :2].astype(float)
    moves = start != end
    kind = 1 + moves[:, 0] + 2 * moves[:, 1]  # the order of GESTURE_TYPES
    return sequences, Gestures(kind, onset, delta_t, start, end)


def is_uniform(sample):
    return stats.kstest(sample, "uniform").pvalue > P_MIN


def test_frames_are_valid(decoded):
    sequences, gestures = decoded
    assert sequences.dtype == np.float32 and sequences.shape == (20_000, L, 3)
    assert np.all((sequences >= 0) & (sequences <= 1))  # false for NaN
    press = sequences[:, :, 2]
    assert np.all((press == 0) | (press == 1))
    assert not np.any(sequences[press == 0])
    assert not np.any(np.signbit(sequences))
    edges = np.abs(np.diff(np.pad(press, ((0, 0), (1, 1))), axis=1)).sum(axis=1)
    assert np.all(edges == 2), "one touch per sequence, without a gap"
    assert gestures.delta_t.min() == 5 and gestures.delta_t.max() == 75


def test_mixed_types_are_in_equal_parts_and_shuffled(decoded):
    _, gestures = decoded
    assert np.bincount(gestures.kind).tolist() == [0, *[5000] * 4]
    follows = np.histogram2d(gestures.kind[:-1], gestures.kind[1:], bins=4)[0]
    assert stats.chi2_contingency(follows).pvalue > P_MIN
    position = np.arange(20_000) // 1000
    by_position = np.histogram2d(gestures.kind, position, bins=(4, 20))[0]
    assert stats.chi2_contingency(by_position).pvalue > P_MIN


@pytest.mark.parametrize("num_sequences", [1, 2, 5, 10, 4003])
def test_mixed_counts_differ_by_at_most_one(num_sequences):
    gestures = draw_gestures(np.random.default_rng(0), num_sequences, "mixed", 5, 30)
    counts = gestures.counts()
    assert sum(counts.values()) == num_sequences and counts.pop("no_action") == 0
    assert max(counts.values()) - min(counts.values()) <= 1


def test_durations_are_uniform_and_include_both_ends(decoded):
    _, gestures = decoded
    counts = np.bincount(gestures.delta_t, minlength=76)[5:]
    assert len(counts) == 71 and stats.chisquare(counts).pvalue > P_MIN
    by_kind = np.histogram2d(gestures.kind, gestures.delta_t, bins=(4, 10))[0]
    assert stats.chi2_contingency(by_kind).pvalue > P_MIN


def test_onsets_are_uniform_where_the_touch_fits(decoded):
    _, gestures = decoded
    room = L - gestures.delta_t + 1
    assert gestures.onset.min() == 0 and np.any(gestures.onset == room - 1)
    u = (gestures.onset + np.random.default_rng(0).random(20_000)) / room  # randomised PIT
    assert is_uniform(u)
    for lo in range(5, 75, 10):  # also given the duration
        assert is_uniform(u[(gestures.delta_t >= lo) & (gestures.delta_t < lo + 10)])


def test_onsets_on_a_tiny_window():
    gestures = draw_gestures(np.random.default_rng(1), 30_000, "click", 2, 3, 4)
    pairs = list(zip(gestures.delta_t.tolist(), gestures.onset.tolist(), strict=True))
    expected = {(2, 0): 5000, (2, 1): 5000, (2, 2): 5000, (3, 0): 7500, (3, 1): 7500}
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert counts.keys() == expected.keys()
    observed = [counts[pair] for pair in expected]
    assert stats.chisquare(observed, list(expected.values())).pvalue > P_MIN


def test_coordinates_are_uniform_and_independent(decoded):
    _, gestures = decoded
    for axis in (0, 1):
        moves = np.isin(gestures.kind, [2 + axis, 4])
        assert is_uniform(gestures.start[:, axis])
        assert is_uniform(gestures.end[moves, axis])
        assert np.array_equal(gestures.start[~moves, axis], gestures.end[~moves, axis])
        pair = gestures.start[moves, axis], gestures.end[moves, axis]
        assert stats.spearmanr(*pair).pvalue > P_MIN
    assert stats.spearmanr(gestures.start[:, 0], gestures.start[:, 1]).pvalue > P_MIN
    diagonal = gestures.end[gestures.kind == 4]
    assert stats.spearmanr(diagonal[:, 0], diagonal[:, 1]).pvalue > P_MIN
    for other in (gestures.onset, gestures.delta_t):
        assert stats.spearmanr(gestures.start[:, 0], other).pvalue > P_MIN


@pytest.mark.parametrize(
    ("action_type", "allowed"), [*((name, {name}) for name in MOVES), ("swipe", {"diagonal"})]
)
def test_action_types(action_type, allowed):
    counts = draw_gestures(np.random.default_rng(0), 50, action_type, 5, 30).counts()
    assert {name for name, n in counts.items() if n} == allowed


# --------------------------------------------------------------------------------------
# Rendering


def frames_by_definition(gestures, i, sequence_length):
    """One sequence, frame by frame, in exact fractions."""
    start = [Fraction(float(v)) for v in gestures.start[i]]
    end = [Fraction(float(v)) for v in gestures.end[i]]
    delta_t = int(gestures.delta_t[i])
    sequence = [[Fraction(0)] * 3 for _ in range(sequence_length)]
    for k in range(delta_t):
        share = Fraction(k, delta_t - 1) if delta_t > 1 else Fraction(0)
        point = [s + (e - s) * share for s, e in zip(start, end, strict=True)]
        sequence[int(gestures.onset[i]) + k] = [*point, Fraction(1)]
    return np.array([[float(v) for v in frame] for frame in sequence])


def test_every_sequence_is_its_parameters():
    rng = np.random.default_rng(5)
    for length, low, high in ((250, 0, 60), (250, 250, 250), (7, 0, 7), (1, 0, 1)):
        gestures = draw_gestures(rng, 40, "mixed", low, high, length)
        sequences = render(gestures, length)
        assert sequences.shape == (40, length, 3) and sequences.dtype == np.float32
        for i, sequence in enumerate(sequences):
            exact = frames_by_definition(gestures, i, length)
            np.testing.assert_allclose(sequence, exact, rtol=2**-23, atol=0)  # last bit
            if gestures.delta_t[i]:
                onset, last = gestures.onset[i], gestures.onset[i] + gestures.delta_t[i] - 1
                assert np.array_equal(sequence[onset, :2], gestures.start[i])
                if last > onset:
                    assert np.array_equal(sequence[last, :2], gestures.end[i])


def test_render_holds_clicks_and_fixed_coordinates_to_the_bit():
    gestures = draw_gestures(np.random.default_rng(6), 400, "mixed", 30, 30)
    sequences = render(gestures)
    for kind, axis in ((1, 0), (1, 1), (2, 1), (3, 0)):
        held = sequences[gestures.kind == kind]
        values = held[held[:, :, 2] == 1][:, axis].reshape(-1, 30)
        assert np.array_equal(values, np.repeat(values[:, :1], 30, axis=1))


@pytest.mark.parametrize("delta_t", [0, 1, L])
def test_boundary_durations(tmp_path, delta_t):
    made = small(tmp_path / "set", min_delta_t=delta_t, max_delta_t=delta_t)
    sequences = load(made.folder)
    assert np.all(sequences[:, :, 2].sum(axis=1) == delta_t)
    if delta_t == 0:
        assert not sequences.any()
    counts = made.manifest["gesture_counts"]
    assert counts["no_action"] == (20 if delta_t == 0 else 0) and sum(counts.values()) == 20


# --------------------------------------------------------------------------------------
# Reproducibility


def test_same_arguments_same_bytes(tmp_path):
    small(tmp_path / "a" / "train")
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    small(tmp_path / "b" / "train")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert state == np.random.get_state()[1].tolist(), "the global stream was used"


def test_other_split_or_seed_shares_no_gesture(tmp_path):
    runs = [("train", 0), ("val", 0), ("train", 1)]
    seen = set()
    for split, seed in runs:
        made = small(tmp_path / str(seed) / split, num_sequences=1000, seed=seed)
        gestures = {sequence.tobytes() for sequence in load(made.folder)}
        assert len(gestures) == 1000 and not gestures & seen
        seen |= gestures
    named = small(tmp_path / "elsewhere", num_sequences=1000, split="train")
    original = load(tmp_path / "0" / "train")
    # Not even one touched point is the same, so no gesture is there shifted in time either.
    assert np.array_equal(load(named.folder), original)
    points = {tuple(point) for point in original[original[:, :, 2] == 1][:, :2].tolist()}
    other = load(tmp_path / "0" / "val")
    shared = [p for p in other[other[:, :, 2] == 1][:, :2].tolist() if tuple(p) in points]
    assert not shared


@pytest.mark.parametrize("sequences_per_file", [1, 7, 100, 1000])
def test_sequences_do_not_depend_on_the_files(tmp_path, sequences_per_file):
    reference = small(tmp_path / "a" / "train", num_sequences=30, sequences_per_file=30)
    other = small(tmp_path / "b" / "train", num_sequences=30, sequences_per_file=sequences_per_file)
    assert load(reference.folder).tobytes() == load(other.folder).tobytes()
    assert len(other.manifest["files"]) == -(-30 // sequences_per_file)


def test_more_frames_than_are_rendered_at_once(tmp_path):
    small(tmp_path / "a" / "s", num_sequences=3, sequence_length=120_000, sequences_per_file=3)
    small(tmp_path / "b" / "s", num_sequences=3, sequence_length=120_000, sequences_per_file=1)
    assert np.array_equal(load(tmp_path / "a" / "s", 120_000), load(tmp_path / "b" / "s", 120_000))


@pytest.mark.parametrize("name", ["test_data_mini", "diffusion_test_data"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_committed_data_is_reproduced(tmp_path, capsys, name, split):
    committed = ROOT / name / split
    commands = (ROOT / name / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(rf"^python -m (.*{name}/{split} .*)$", commands, re.MULTILINE)
    argv = command.split()[1:]
    argv[argv.index("--output_dir") + 1] = str(tmp_path / split)
    assert run_cli(capsys, *argv)[0] == 0
    assert contents(tmp_path / split) == contents(committed)


# --------------------------------------------------------------------------------------
# The folder


def test_files_and_manifest(tmp_path):
    made = small(tmp_path / "train", seed=3)
    assert made.written
    names = [f"batch_{i:06d}_actions.npy" for i in range(3)]
    assert sorted(os.listdir(made.folder)) == [*names, "dataset.json"]
    manifest = json.loads((made.folder / "dataset.json").read_text())
    assert manifest == made.manifest
    assert (manifest["format"], manifest["count"], manifest["sequence_length"]) == (1, 20, L)
    assert (manifest["seed"], manifest["split"]) == (3, "train")
    assert [entry["rows"] for entry in manifest["files"]] == [8 * L, 8 * L, 4 * L]
    for name, entry in zip(names, manifest["files"], strict=True):
        data = (made.folder / name).read_bytes()
        assert entry["name"] == name
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        array = np.load(made.folder / name, allow_pickle=False)
        assert array.dtype == np.dtype("<f4") and array.shape == (entry["rows"], 3)
        saved = io.BytesIO()
        np.save(saved, array)
        assert saved.getvalue() == data
    assert made.manifest["gesture_counts"] == dict.fromkeys(MOVES, 5) | {"no_action": 0}


def test_the_same_call_again_does_nothing(tmp_path):
    made = small(tmp_path / "train")
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    again = small(tmp_path / "train")
    assert not again.written and again.manifest == made.manifest
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    moved = made.folder.rename(tmp_path / "moved")
    assert not small(moved, split="train").written


@pytest.mark.parametrize(
    "change",
    [
        {"num_sequences": 9},
        {"seed": 1},
        {"split": "other"},
        {"min_delta_t": 6},
        {"max_delta_t": 49},
        {"action_type": "click"},
        {"sequences_per_file": 4},
        {"sequence_length": 100},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_data_set_is_refused_then_replaced(tmp_path, change):
    folder = tmp_path / "train"
    small(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=rf"{next(iter(change))} .*--overwrite"):
        small(folder, **change)
    assert contents(folder) == before
    small(folder, **change, overwrite=True)
    small(tmp_path / "fresh" / "train", **change)
    assert contents(folder) == contents(tmp_path / "fresh" / "train")


def flip_a_bit(folder):
    path = folder / "batch_000001_actions.npy"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def edit_manifest(**changes):
    def edit(folder):
        manifest = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**manifest, **changes}))

    return edit


def put_manifest(data):
    return lambda folder: (folder / "dataset.json").write_bytes(data)


DAMAGE = {
    "bit flip": flip_a_bit,
    "file missing": lambda folder: (folder / "batch_000000_actions.npy").unlink(),
    "file cut": lambda folder: os.truncate(folder / "batch_000002_actions.npy", 500),
    "no manifest": lambda folder: (folder / "dataset.json").unlink(),
    "empty manifest": put_manifest(b""),
    "list manifest": put_manifest(b"[]"),
    "null manifest": put_manifest(b"null"),
    "bare manifest": put_manifest(b"{}"),
    "binary manifest": put_manifest(bytes(range(256))),
    "deep manifest": put_manifest(b"[" * 100_000),
    "files not a list": edit_manifest(files=3),
    "files of numbers": edit_manifest(files=[1, 2]),
    "no files": edit_manifest(files=[]),
    "arguments not a dict": edit_manifest(arguments=[]),
    "another format": edit_manifest(format=2),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_then_repaired(tmp_path, damage):
    folder = tmp_path / "train"
    small(folder)
    before = contents(folder)
    damage(folder)
    damaged = contents(folder)
    with pytest.raises(UserError, match="--overwrite"):
        small(folder)
    assert contents(folder) == damaged
    if damage is DAMAGE["no files"]:  # the batch files are nobody's: not ours to remove
        with pytest.raises(UserError, match="move it away"):
            small(folder, overwrite=True)
        return
    assert small(folder, overwrite=True).written
    assert contents(folder) == before


def test_files_of_others_are_never_removed(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("README.md", ".gitignore", ".hidden_actions.npy", "notes_actions.npy.bak"):
        (folder / name).write_text("keep")
    (folder / ".batch_000009_actions.npy.tmp").write_text("left by a kill")
    assert small(folder).written
    assert not (folder / ".batch_000009_actions.npy.tmp").exists()
    assert small(folder, overwrite=True).written
    for name in ("README.md", ".gitignore", ".hidden_actions.npy", "notes_actions.npy.bak"):
        assert (folder / name).read_text() == "keep"

    for foreign in ("batch_000099_actions.npy", "mine_actions.npy"):
        (folder / foreign).write_text("keep")
        before = contents(folder)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"{foreign}.*move it away"):
                small(folder, overwrite=overwrite)
        assert contents(folder) == before
        (folder / foreign).unlink()

    victim = tmp_path / "batch_000000_actions.npy"
    victim.write_text("keep")
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["files"].append({"name": "../batch_000000_actions.npy", "rows": 1, "sha256": ""})
    (folder / "dataset.json").write_text(json.dumps(manifest))
    small(folder, overwrite=True)
    assert victim.read_text() == "keep"


def test_foreign_data_without_a_manifest_is_kept(tmp_path):
    (tmp_path / "mine_actions.npy").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UserError):
            small(tmp_path, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["mine_actions.npy"]


WRITER = """
import sys
from augmentation import generate_augmented_dataset
generate_augmented_dataset(
    sys.argv[1], 12000, 5, 50, sequences_per_file=400, overwrite=True)
"""


def test_kill_9_leaves_whole_files_and_an_overwrite_restores_the_bytes(tmp_path):
    kills, mid_write = 5, 0
    writer = [sys.executable, "-c", WRITER]
    subprocess.run([*writer, str(tmp_path / "a" / "train")], cwd=ROOT, check=True)
    reference = contents(tmp_path / "a" / "train")
    folder = tmp_path / "b" / "train"
    delay = random.Random(0)
    for _ in range(kills):
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen([*writer, str(folder)], cwd=ROOT)
        while process.poll() is None and not (folder.is_dir() and os.listdir(folder)):
            time.sleep(0.001)
        time.sleep(delay.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name, digest in contents(folder).items():
            if not name.endswith(".tmp"):
                assert reference[name] == digest, f"{name} is not whole"
        if not (folder / "dataset.json").exists():
            mid_write += 1
            if any(name.endswith(".npy") for name in os.listdir(folder)):
                with pytest.raises(UserError, match="--overwrite"):
                    generate_augmented_dataset(folder, 12000, 5, 50, sequences_per_file=400)
        generate_augmented_dataset(folder, 12000, 5, 50, sequences_per_file=400, overwrite=True)
        assert contents(folder) == reference
    assert mid_write >= kills // 2, "the kills came too late to show anything"


def test_two_writers_at_once_mix_nothing(tmp_path):
    """One wins; the other, while it writes or after, ends in one line."""
    sizes = ["--num_sequences", "3000", "--sequences_per_file", "10"]
    for seed in (0, 1):
        subprocess.run(plan_command(tmp_path / str(seed) / "d", *sizes, "--seed", str(seed)),
                       cwd=ROOT, stdout=subprocess.DEVNULL, check=True)  # fmt: skip
    for attempt in range(3):
        folder = tmp_path / f"try{attempt}" / "d"
        commands = [plan_command(folder, *sizes, "--seed", str(seed)) for seed in (0, 1)]
        running = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for command in commands
        ]
        errors = [process.communicate()[1].decode() for process in running]
        codes = [process.returncode for process in running]
        assert sorted(codes) == [0, 2], errors
        winner = codes.index(0)
        assert re.fullmatch(r"error: .*(is writing|another data set).*\n", errors[1 - winner])
        assert contents(folder) == contents(tmp_path / str(winner) / "d")


def test_the_manifest_is_last_and_after_all_data_is_on_disk(tmp_path, monkeypatch):
    events = []
    for name in ("replace", "fsync"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real):
            what = args[-1] if name == "replace" else os.readlink(f"/proc/self/fd/{args[0]}")
            events.append((name, Path(what).name))
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    made = small(tmp_path / "train")
    files = [entry["name"] for entry in made.manifest["files"]]
    assert events == [
        *(("replace", name) for name in files),
        *(("fsync", name) for name in files),
        ("fsync", "train"),
        ("fsync", ".dataset.json.tmp"),
        ("replace", "dataset.json"),
        ("fsync", "train"),
    ]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_disk_error_leaves_no_partial_file_and_no_manifest(
    tmp_path, monkeypatch, capsys, failing
):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        code, _, err = run_cli(capsys, "--output_dir", tmp_path / "d", "--num_sequences", 4)
    assert code == 1 and re.fullmatch(
        r"error: .*batch_0+_actions.npy: Input/output error .*\n", err
    )
    assert "12000 bytes" in err or "12128 bytes" in err
    assert not [name for name in os.listdir(tmp_path / "d") if "json" in name or "tmp" in name]


def test_a_full_disk_ends_with_code_1(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "augmentation.generate_click_dataset", "--output_dir"]
    command += [str(tmp_path / "d"), "--num_sequences", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*batch_000000_actions\.npy.*--overwrite\n", done.stderr)
    assert os.listdir(tmp_path / "d") == []


def test_no_memory_ends_with_code_1_and_removes_nothing(tmp_path):
    folder = small(tmp_path / "d").folder
    before = contents(folder)
    sizes = ["--num_sequences", "20000000", "--sequence_length", "10", "--max_delta_t_pct", "1"]
    command = plan_command(folder, *sizes, "--overwrite")
    shell = ["bash", "-c", 'ulimit -v 400000; exec "$@"', "bash", *command]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: the data set does not fit .*; lower --num_sequences\n", done.stderr
    )
    assert contents(folder) == before


def test_a_set_that_cannot_fit_removes_nothing(tmp_path, capsys):
    small(tmp_path / "d")
    before = contents(tmp_path / "d")
    terabytes = ("--num_sequences", 2 * 10**9, "--sequences_per_file", 10**8, "--overwrite")
    code, _, err = run_cli(capsys, "--output_dir", tmp_path / "d", *terabytes)
    assert code == 1 and re.fullmatch(r"error: .*6000000000000 bytes needed, .*\n", err)
    assert contents(tmp_path / "d") == before


def test_an_interrupt_is_one_line_and_code_130(tmp_path, monkeypatch, capsys):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("augmentation.generate_click_dataset._generate", interrupt)
    code, _, err = run_cli(capsys, "--output_dir", tmp_path / "d")
    assert code == 130 and re.fullmatch(r"error: .*\n", err)


def test_a_folder_that_may_not_be_written_is_bad_input(capsys):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "d"
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:  # root ignores file modes
            os.setresuid(65534, 65534, 0)
        try:
            code, _, err = run_cli(capsys, "--output_dir", folder)
            below, _, err_below = run_cli(capsys, "--output_dir", folder / "below")
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
        assert (code, below) == (2, 2)
        for line in (err, err_below):
            assert re.fullmatch(r"error: .*Permission denied.*; choose another\n", line)


# --------------------------------------------------------------------------------------
# Bad arguments


BAD_OPTIONS = [
    ("--num_sequences", 0),
    ("--num_sequences", -5),
    ("--num_sequences", "ten"),
    ("--num_sequences", "1e3"),
    ("--num_sequences", 2.5),
    ("--sequences_per_file", 0),
    ("--sequences_per_file", -1),
    ("--sequence_length", 0),
    ("--sequence_length", -250),
    ("--min_delta_t_pct", "nan"),
    ("--min_delta_t_pct", -0.1),
    ("--min_delta_t_pct", 0.21),
    ("--min_delta_t_pct", 0.201),  # as many frames as the maximum of 0.20, yet not what was meant
    ("--max_delta_t_pct", 1.01),
    ("--max_delta_t_pct", "inf"),
    ("--max_delta_t_pct", "nan"),
    ("--max_delta_t_pct", "1e400"),
    ("--max_delta_t_pct", 0.019),
    ("--action_type", "tap"),
    ("--action_type", ""),
    ("--seed", -1),
    ("--seed", "x"),
    ("--split", ""),
    ("--output_dir", ""),
    ("--output_dir", "/dev/null"),
    ("--output_dir", "/dev/null/x"),
    ("--output_dir", "/"),
    ("--output_dir", "x" * 300),
    ("--unknown", 1),
    ("--num", 5),
]


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(capsys, "--output_dir", "d", option, value)
    assert code == 2 and out == ""
    assert re.fullmatch(r"error: [ -~]+\n", err)
    assert option == "--output_dir" or option.lstrip("-") in err
    assert os.listdir(tmp_path) == []


def test_missing_output_dir_and_too_many_files(tmp_path, capsys):
    assert run_cli(capsys)[0] == 2
    too_many = ("--num_sequences", 1_000_001, "--sequences_per_file", 1)
    enormous = ("--sequence_length", 10**9)  # would not fit, should the check be missing
    code, _, err = run_cli(capsys, "--output_dir", tmp_path / "d", *too_many, *enormous)
    assert code == 2 and "sequences_per_file" in err and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_sequences": 5.0},
        {"num_sequences": True},
        {"num_sequences": None},
        {"num_sequences": 2**31},
        {"num_sequences": np.float64(20)},
        {"sequences_per_file": np.bool_(True)},
        {"min_delta_t": -1},
        {"min_delta_t": 51},
        {"min_delta_t": 5.5},
        {"max_delta_t": 251},
        {"max_delta_t": float("nan")},
        {"max_delta_t": np.array([50])},
        {"sequence_length": "250"},
        {"action_type": None},
        {"action_type": ["click"]},
        {"action_type": "Click"},
        {"seed": 1.5},
        {"seed": 2**63},
        {"split": 3},
        {"split": "a\0b"},
        {"overwrite": "no"},
        {"overwrite": None},
    ],
    ids=str,
)
def test_bad_values_from_python(tmp_path, change):
    with pytest.raises(UserError, match=f"{next(iter(change))}.*got") as error:
        small(tmp_path / "d", **change)
    assert os.listdir(tmp_path) == [] and "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["", None, 3, b"", "a\0b", ["x"], np.float64(1)], ids=str)
def test_bad_folders_from_python(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (small, write_eval_patterns):
        with pytest.raises(UserError, match="output_dir"):
            call(folder)
    with pytest.raises(UserError, match="root"):
        generate_preset("simple", folder)
    assert os.listdir(tmp_path) == []


def test_values_of_other_types_are_converted(tmp_path):
    plain = small(tmp_path / "a" / "train", seed=3)
    converted = small(
        os.fsencode(tmp_path / "b" / "train"), num_sequences=np.int64(20), min_delta_t=np.uint8(5),
        max_delta_t=np.array(50), sequences_per_file=np.int16(8), seed=np.uint64(3),
        split=np.str_("train"), action_type=np.str_("mixed"), overwrite=np.bool_(False),
    )  # fmt: skip
    assert contents(plain.folder) == contents(tmp_path / "b" / "train")
    assert not small(converted.folder, seed=3).written


def test_percentages_are_cut_to_frames():
    assert [frames_from_pct("p", pct, 250) for pct in (0, 0.02, 0.2, 0.3, 1)] == [0, 5, 50, 75, 250]
    for length in (100, 250, 1000):
        for percent in range(101):
            assert frames_from_pct("p", percent / 100, length) == percent * length // 100
    assert frames_from_pct("p", 0.0199999, 250) == 4


# --------------------------------------------------------------------------------------
# The plan's commands and snippets


def plan_command(output_dir, *options):
    command = [sys.executable, "-m", "augmentation.generate_click_dataset"]
    return [*command, "--output_dir", str(output_dir), *options]


def test_the_plans_command_from_a_plain_shell(tmp_path):
    command = plan_command(
        tmp_path / "d\u00e4ta" / "train", "--num_sequences", "10", "--sequences_per_file", "10",
        "--action_type", "mixed",
    )  # fmt: skip
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode("ascii")
    assert "\r" not in out
    for fact in ("10 of 250 frames in 1 files", "click 3", "vertical 2", "seed:      0", " s)"):
        assert fact in out
    again = subprocess.run(command, cwd=ROOT, capture_output=True, env=env, text=True)
    assert again.returncode == 0 and "already complete, nothing to do" in again.stdout


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for more, code in (((), 0), ((), 0), (("--seed", "1"), 2)):
        command = plan_command(folder, "--num_sequences", "4", *more)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, env=env)
        assert done.returncode == code and b"Traceback" not in done.stderr
        assert (done.stdout + done.stderr).isascii()
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    other = small(tmp_path / "other", num_sequences=4, split=os.fsdecode(b"\xff\xfe"))
    assert np.array_equal(load(folder), load(other.folder))


@pytest.mark.parametrize("stdout", ["closed pipe", "/dev/full"])
def test_a_lost_stdout_does_not_fail_a_written_set(tmp_path, stdout):
    if stdout == "closed pipe":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = os.open(stdout, os.O_WRONLY)
    command = plan_command(tmp_path / "d", "--num_sequences", "4")
    done = subprocess.run(command, cwd=ROOT, stdout=target, stderr=subprocess.PIPE)
    os.close(target)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "d" / "dataset.json").exists()


def test_defaults_of_the_command(tmp_path, capsys):
    assert run_cli(capsys, "--output_dir", tmp_path / "d")[0] == 0
    arguments = json.loads((tmp_path / "d" / "dataset.json").read_text())["arguments"]
    assert arguments == {
        "num_sequences": 5000,
        "sequence_length": 250,
        "action_type": "mixed",
        "min_delta_t": 5,
        "max_delta_t": 50,
        "sequences_per_file": 100,
        "seed": 0,
        "split": "d",
    }


def test_prepare_diffusion_data_as_in_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare_diffusion_data()
    expected = {
        "train_clicks": (5000, "click", 5, 30),
        "train_swipes": (5000, "swipe", 10, 50),
        "train_mixed": (10000, "mixed", 5, 40),
        "val_mixed": (1000, "mixed", 5, 40),
    }
    assert set(os.listdir("diffusion_data")) == set(expected)
    keys = ("num_sequences", "action_type", "min_delta_t", "max_delta_t")
    for name, values in expected.items():
        manifest = json.loads(Path("diffusion_data", name, "dataset.json").read_text())
        assert tuple(manifest["arguments"][key] for key in keys) == values
    prepare_diffusion_data()
    assert capsys.readouterr().out.count("already complete") == 4


def test_presets_are_the_plans(tmp_path):
    assert [(d["name"], d["action_type"], d["num_sequences"]) for d in DATASETS] == [
        ("clicks_only", "click", 5000),
        ("swipes_only", "swipe", 5000),
        ("mixed_actions", "mixed", 10000),
    ]
    assert list(COMPLEXITY_LEVELS) == [
        {"min_delta_t": 5, "max_delta_t": 15, "name": "simple"},
        {"min_delta_t": 10, "max_delta_t": 40, "name": "medium"},
        {"min_delta_t": 20, "max_delta_t": 80, "name": "complex"},
    ]
    for preset in (*DATASETS, *COMPLEXITY_LEVELS):
        made = generate_preset(preset["name"], tmp_path, num_sequences=40, seed=2)
        assert made.folder == tmp_path / preset["name"]
        touched = load(made.folder)[:, :, 2].sum(axis=1)
        assert np.all((touched >= preset["min_delta_t"]) & (touched <= preset["max_delta_t"]))
        action_type = preset.get("action_type", "mixed")
        assert made.manifest["arguments"]["action_type"] == action_type
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'hard'"):
        generate_preset("hard", tmp_path)


def test_eval_patterns_by_definition(tmp_path):
    made = write_eval_patterns(tmp_path / "patterns")
    sequences = load(made.folder)
    assert made.manifest["patterns"] == [
        "center_click",
        *["corner_clicks"] * 4,
        "horizontal_swipe",
        "diagonal_swipe",
        "circle_approximation",
    ]
    assert [spec["pattern"] for spec in EVAL_PATTERNS] == list(
        dict.fromkeys(made.manifest["patterns"])
    )
    assert not np.any(sequences[sequences[:, :, 2] == 0])
    paths = []
    for sequence, delta_t in zip(sequences, [10] * 5 + [50, 50, 75], strict=True):
        frames = np.flatnonzero(sequence[:, 2])
        assert len(frames) == delta_t and np.all(np.diff(frames) == 1)
        assert abs(frames[0] - (L - 1 - frames[-1])) <= 1  # in the middle of the window
        paths.append(sequence[frames, :2].astype(float))
    held = [(0.5, 0.5), (0.1, 0.1), (0.9, 0.9), (0.1, 0.9), (0.9, 0.1)]
    for path, point in zip(paths, held, strict=False):
        np.testing.assert_allclose(path, [point] * 10, atol=1e-7)
    ramp = np.arange(50) / 49
    np.testing.assert_allclose(paths[5], np.stack([0.2 + 0.6 * ramp, 0 * ramp + 0.5], 1), atol=1e-7)
    np.testing.assert_allclose(paths[6], np.stack([0.1 + 0.8 * ramp] * 2, 1), atol=1e-7)
    offset = paths[7] - 0.5
    np.testing.assert_allclose(np.hypot(*offset.T), 0.3, atol=4e-4)
    turned = np.unwrap(np.arctan2(offset[:, 1], offset[:, 0]))
    np.testing.assert_allclose(turned, 2 * np.pi * np.arange(75) / 74, atol=1e-3)
    assert not write_eval_patterns(tmp_path / "patterns").written


def test_a_swipe_pattern_is_what_the_generator_draws():
    swipe = make_pattern({"pattern": "diagonal_swipe", "start": (0.25, 0.125), "end": (0.75, 1)})
    gestures = Gestures(
        np.array([4]), np.array([100]), np.array([50]),
        np.array([[0.25, 0.125]], np.float32), np.array([[0.75, 1.0]], np.float32),
    )  # fmt: skip
    np.testing.assert_allclose(swipe, render(gestures), rtol=2**-23)


@pytest.mark.parametrize(
    "spec",
    [
        {"pattern": "spiral"},
        {},
        {"pattern": "center_click", "x": 1.5},
        {"pattern": "center_click", "x": float("nan")},
        {"pattern": "center_click", "delta_t": 0},
        {"pattern": "circle_approximation", "radius": 0.6},
        {"pattern": "diagonal_swipe", "delta_t": 251},
        {"pattern": "diagonal_swipe", "delta_t": 50.0},
        {"pattern": "diagonal_swipe", "delta_t": True},
        {"pattern": "center_click", "z": 1},
        {"pattern": ["center_click"]},
        {"pattern": "corner_clicks", "positions": [(0.1, None)]},
    ],
    ids=str,
)
def test_bad_patterns(spec):
    with pytest.raises(UserError, match="got"):
        make_pattern(spec)


def test_importing_is_pure_and_light():
    program = (
        "import sys, augmentation; "
        "print(sorted({'torch', 'tqdm', 'wandb', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert all(hasattr(augmentation, name) for name in augmentation.__all__)


def test_writing_speed(tmp_path):
    """A million sequences in a minute on one core, with a factor 5 for a busy machine."""
    began = time.monotonic()
    generate_augmented_dataset(tmp_path / "d", 20_000, 5, 75)
    assert time.monotonic() - began < 5 * 60 * 20_000 / 1_000_000
