"""A run in its folder: what is refused, what is resumed, what is saved when, how a step fails.

Why: a folder that is used twice mixes two records; a resumed run that is not the one that was
interrupted must say so; and a run of hours must say in one line why it ended.

    python -m pytest tests/test_run.py
"""

import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import (
    LAST,
    L,
    as_flags,
    assert_same_tree,
    content_of,
    make_gestures,
    read_jsonl,
    without_clock,
)
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from train_diffusion_ddim import lr_at
from trainlib import run
from trainlib.checkpoint import load_checkpoint
from trainlib.errors import UserError
from trainlib.knobs import changed
from trainlib.process import locked_folder
from trainlib.run import failures_named, free_folder, save_if_due
from trainlib.run_log import RunLogger

pytestmark = pytest.mark.usefixtures("no_figures")


def test_nothing_to_resume_starts_from_the_beginning(cli, tiny_flags, tmp_path):
    code, out, _ = cli(*tiny_flags(num_epochs=1, save_dir=tmp_path / "run"), "--resume")
    assert code == 0 and out.startswith("note: nothing to resume")
    assert (tmp_path / "run" / "diffusion_checkpoint_epoch_0.pth").exists()


def test_a_run_without_a_checkpoint_yet_can_be_resumed(cli, tiny_flags, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    code, out, err = cli(*tiny_flags(save_dir=tmp_path, num_epochs=1), "--resume")
    assert code == 0, err
    assert "starting from the beginning" in out
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows if row["step"] == 1] != [1.0]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_resuming_into_the_folder_of_another_run_is_refused(refused, straight_run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refused("--resume", straight_run, "--save_dir", tmp_path)
    assert "another run" in message
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_files_of_the_user_in_the_run_folder_are_left_alone(cli, tiny_flags, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\nnot json\n')
    code, _, err = cli(*tiny_flags(save_dir=tmp_path, num_epochs=1))
    assert code == 0, err
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}\nnot json\n'


OTHER_MODELS = {
    **{"d_model": 32, "num_layers": 2, "nhead": 4, "seq_len": 10, "dim_feedforward": 8},
    **{"patch_size": 10, "adaln": False, "rotary": False, "max_contacts": 2, "shapes": 3},
    **{"num_timesteps": 60, "beta_schedule": "linear", "prediction_type": "epsilon"},
    **{"optimizer": "adamw", "batch_size": 5},
}


@pytest.mark.parametrize("name", ["d_model", "adaln", "prediction_type"])
def test_another_model_is_refused_with_both_values(refused, straight_run, name):
    was = json.loads((straight_run / "config.json").read_text())[name]
    message = refused("--resume", straight_run, *as_flags(**{name: OTHER_MODELS[name]}))
    assert f"--{name}" in message and f"{was} -> {OTHER_MODELS[name]}" in message


def test_all_that_a_checkpoint_fixes_is_checked(tiny_config):
    assert tdd.FIXED == {*OTHER_MODELS, "known_frames", "contacts", "decisive", "context_dim"}
    saved = tiny_config()
    for name, value in OTHER_MODELS.items():
        words = f"--{name} contradicts .*: {getattr(saved, name)} -> {value};"
        with pytest.raises(UserError, match=words):
            changed(saved, {name: value}, tdd.FIXED, "x.pth")


@pytest.mark.parametrize(("name", "value"), [("lr", 0.005), ("seed", 1), ("num_epochs", 7)])
def test_another_run_is_allowed_with_a_warning(cli, straight_run, tmp_path, name, value):
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    code, _, err = cli("--resume", tmp_path, f"--{name}", value)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("warning: ") and f"--{name}" in err and f"-> {value}" in err
    config = load_checkpoint(tmp_path)["config"]
    assert config[name] == value
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/lr" in row]
    expected = [lr_at(row["step"] - 1, 5 * config["num_epochs"], config["lr"]) for row in rows]
    assert [row["train/lr"] for row in rows] == expected and rows[0]["step"] == 16


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_an_explicit_resume_of_nothing_is_refused(refused, tmp_path, what):
    path = tmp_path / "run"
    if what != "missing":
        path.mkdir()
    if what == "damaged":
        (path / LAST).write_bytes(b"PK\x03\x04 not a checkpoint")
    assert str(path) in refused("--resume", path)


def test_a_used_folder_is_refused(refused, straight_run, tiny_flags):
    before = (straight_run / "metrics.jsonl").read_bytes()
    message = refused(*tiny_flags(save_dir=straight_run))
    assert str(straight_run) in message and "--resume" in message
    assert (straight_run / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path, tiny_flags):
    (tmp_path / "file").write_text("")
    assert "--save_dir" in refused(*tiny_flags(save_dir=tmp_path / "file"))


@pytest.mark.parametrize(("save_every", "steps"), [(0.4, range(2, 13, 2)), (1, (5, 10, 12))])
def test_checkpoints_come_at_parts_of_an_epoch(new_state, tmp_path, monkeypatch, save_every, steps):
    state = new_state(total_steps=12, batch_size=2, num_epochs=2, save_every=save_every)
    state.steps_per_epoch, saved = 5, []
    log = RunLogger(tmp_path, asdict(state.config))
    monkeypatch.setattr(run, "save_checkpoint", lambda _, content: saved.append(content["step"]))
    for step in range(1, 13):
        state.step = step
        save_if_due(state, log)
    assert saved == list(steps)


def test_the_final_scores_of_a_resumed_run_replace_the_old(straight_run, cli, tmp_path):
    folder = shutil.copytree(straight_run, tmp_path / "run")
    for name in ("metrics.jsonl", "reconstructions.jsonl"):
        before = without_clock(read_jsonl(folder / name))
        if name == "metrics.jsonl":  # killed while it scored the whole set
            (folder / name).write_text("".join(map("{}\n".format, map(json.dumps, before[:-1]))))
        assert cli("--resume", folder)[0] == 0
        assert without_clock(read_jsonl(folder / name)) == before


def test_resuming_a_finished_run_changes_nothing(cli, straight_run, tmp_path):
    folder = shutil.copytree(straight_run, tmp_path / "run")
    before = content_of(folder / LAST)
    code, out, err = cli("--resume", folder)
    assert code == 0 and "epoch" not in out.split("All")[0], err
    assert_same_tree(content_of(folder / LAST), before)


@pytest.mark.parametrize("num", [1, 8, 11, 20])
def test_data_of_another_size_is_refused_on_resume(refused, straight_run, tmp_path, num):
    """Its epochs have other steps: one would be counted twice, or not at all."""
    shutil.copy(straight_run / "diffusion_checkpoint_epoch_2.pth", tmp_path)
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "a_actions.npy", make_gestures(num, seed=1))
    message = refused("--resume", tmp_path, "--data_dir", tmp_path / "train")
    assert f"had 5 steps, now {math.ceil(num / 2)}" in message and "data set" in message


def test_other_data_of_the_same_size_is_said(cli, straight_run, tmp_path):
    shutil.copy(straight_run / LAST, tmp_path)
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "a_actions.npy", make_gestures(10, seed=7))
    code, _, err = cli("--resume", tmp_path, "--data_dir", tmp_path / "train")
    assert code == 0 and err == "warning: the training data is not that of the checkpoint\n"


# ---- two at once, or twice -------------------------------------------------------------


def test_runs_of_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(free_folder, ["x"] * 40))
    assert len(set(folders)) == 40 and all(folder.is_dir() for folder in folders)
    assert str(min(folders)) == "runs/20260101-000000_x"


@pytest.mark.parametrize("what", ["a file", "below a file", "a dangling link"])
def test_a_place_for_runs_that_cannot_be_made_is_refused(monkeypatch, tmp_path, what):
    monkeypatch.chdir(tmp_path)
    if what == "a dangling link":
        (tmp_path / "runs").symlink_to(tmp_path / "gone" / "deep")
    else:
        (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="give --save_dir"):
        free_folder("x/y" if what == "below a file" else "x")


def library(folder, **changes):
    """The library's loop on six gestures."""
    torch.manual_seed(0)
    sizes = {"seq_len": L, "d_model": 16, "nhead": 2, "num_layers": 1, "dim_feedforward": 32}
    model = tdd.MinimalDiffusionTransformer(**sizes)
    loaders = (DataLoader(list(make_gestures(6, seed=i)), batch_size=3) for i in (1, 2))
    return tdd.train_diffusion_model(
        model, tdd.DDIMScheduler(50), *loaders, 1, 1e-3, "cpu", 1, folder, **changes
    )


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A folder that the library has trained into."""
    folder = tmp_path_factory.mktemp("used") / "run"
    library(folder)
    return folder


def visible(folder):
    """The files of a folder but for its lock."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("door", "left"),  # what is looked for is the same behind every door
    [
        ("library", "metrics.jsonl"),
        ("library", "diffusion_checkpoint_epoch_0.pth"),
        ("library", "*"),
        ("train", "*"),
        ("command line", "*"),
    ],
)
def test_a_folder_that_holds_a_run_is_refused_by_every_door(
    used, tiny_config, tiny_flags, refused, tmp_path, left, door
):
    folder = shutil.copytree(used, tmp_path / "run")
    for path in folder.iterdir():
        if path.is_file() and not path.match(left):
            path.unlink()
    before = sorted(visible(folder))
    if door == "command line":
        assert "holds a run" in refused(*tiny_flags(save_dir=folder))
    else:
        start = library if door == "library" else lambda f: tdd.train(tiny_config(save_dir=f))
        with pytest.raises(UserError, match="holds a run"):
            start(str(folder))
    assert sorted(visible(folder)) == before


@pytest.mark.parametrize("name", ["file", "file/run", "n" * 300])
def test_a_folder_that_cannot_be_is_refused_before_any_data_is_read(
    tiny_flags, refused, tmp_path, name
):
    (tmp_path / "file").write_text("")
    said = refused(*tiny_flags(save_dir=tmp_path / name, data_dir=tmp_path / "no data"))
    assert f"cannot write into --save_dir {tmp_path / name}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_refused_early_leaves_no_folder(tiny_flags, refused, tmp_path):
    assert "no data" in refused(*tiny_flags(save_dir=tmp_path / "run", data_dir="no data"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("door", ["library", "train", "command line"])
def test_a_folder_that_is_in_use_is_refused_by_every_door(
    tiny_config, tiny_flags, refused, tmp_path, door
):
    with locked_folder(tmp_path):
        if door == "command line":
            assert f"in use by process {os.getpid()}" in refused(*tiny_flags(save_dir=tmp_path))
        else:
            start = library if door == "library" else lambda f: tdd.train(tiny_config(save_dir=f))
            with pytest.raises(UserError, match="in use by process"):
                start(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".pid"}


# ---- how a step fails ------------------------------------------------------------------

FAILURES = {
    # name: (compile, what a step raises, what it becomes, words of the message)
    "numbers": (False, FloatingPointError("loss nan"), FloatingPointError, "gestures 3, 1, 4"),
    "memory": (False, RuntimeError("not enough memory: you tried"), MemoryError, "--batch_size 3"),
    "memory of a GPU": (False, torch.OutOfMemoryError("CUDA out of memory"), MemoryError, "lower"),
    "memory, compiled": (True, MemoryError(), MemoryError, "--batch_size 3"),
    "no compiler": (True, RuntimeError("No working C++ compiler found"), UserError, "--no-compile"),
    "noexec": (True, ImportError("failed to map segment"), UserError, "--no-compile"),
    "a compiler that fails": (True, OSError(13, "Permission denied"), UserError, "--no-compile"),
    "numbers, compiled": (True, FloatingPointError("x"), FloatingPointError, "gestures"),
    "a fault of ours": (False, KeyError("ours"), KeyError, "ours"),
    "a mistake": (True, UserError("theirs"), UserError, "^theirs$"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_step_that_fails_says_what_to_change(tiny_config, name):
    compiled, error, kind, words = FAILURES[name]
    config = tiny_config(compile=compiled, batch_size=3)
    with (
        pytest.raises(kind, match=words) as raised,
        failures_named(config, torch.tensor([3, 1, 4])),
    ):
        raise error
    assert "\n" not in str(raised.value)
