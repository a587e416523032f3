"""Checkpoints: whole or refused, inert, found by their exact names, of this format or the last.

Why: hours of training lie in one file. It must survive a crash while it is written, a flipped bit
must be refused rather than trained on, opening it must never run code from it, and a backup copy
beside it must not be taken for the newest.

    python -m pytest tests/test_checkpoint.py
"""

import io
import os
import pickle
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import LAST, assert_same_tree, flipped

from trainlib.checkpoint import (
    CHECKPOINT_FORMAT,
    find_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    newest_valid,
    save_checkpoint,
)
from trainlib.errors import UserError


@pytest.fixture
def checkpoint(straight_run, tmp_path):
    return shutil.copy(straight_run / LAST, tmp_path / LAST)


def test_a_checkpoint_holds_plain_types_only(checkpoint):
    def check(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) in (str, int), path
                check(inner, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner, f"{path}[]")
        else:
            plain = str, int, float, bool, type(None), torch.Tensor
            assert type(value) in plain or isinstance(value, torch.Tensor), (path, type(value))

    content = torch.load(checkpoint, weights_only=True)
    of_the_plan = {"epoch", "model_state_dict", "optimizer_state_dict", "loss"}
    assert of_the_plan | {"ema_state_dict", "config", "step", "format"} <= set(content)
    weights = ("model_state_dict", "ema_state_dict")
    check({k: dict(v) if k in weights else v for k, v in content.items()}, "root")
    assert content["epoch"] == 5 and content["step"] == 30


def test_round_trip(tmp_path, checkpoint):
    content = load_checkpoint(checkpoint)
    content.pop("path")
    save_checkpoint(tmp_path / "again.pth", content)
    again = load_checkpoint(tmp_path / "again.pth")
    again.pop("path")
    assert_same_tree(content, again)


def test_the_newest_is_the_highest_epoch_whatever_its_date(tmp_path):
    for i, epoch in enumerate((100, 9, 20)):
        path = tmp_path / f"diffusion_checkpoint_epoch_{epoch}.pth"
        path.touch()
        os.utime(path, (i, i))
    assert newest_checkpoint(tmp_path).name == "diffusion_checkpoint_epoch_100.pth"
    assert newest_checkpoint(path) == path
    for nothing in (tmp_path / "no", tmp_path / "no.pth"):
        with pytest.raises(UserError, match=str(nothing)):
            newest_checkpoint(nothing)


def test_a_flipped_bit_is_never_loaded(checkpoint, tmp_path):
    good, rng = checkpoint.read_bytes(), np.random.default_rng(0)
    reference = torch.load(checkpoint, weights_only=True)
    refused = 0
    for _ in range(100):
        path = tmp_path / "flipped.pth"
        path.write_bytes(flipped(good, rng.integers(len(good)), rng.integers(8)))
        try:
            content = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # padding, or a field of the archive that nobody reads
            content.pop("path")
            assert_same_tree(content, reference)
    assert refused > 50


@pytest.mark.parametrize("damage", ["folder", "prefix"])
def test_what_was_checked_is_what_is_loaded(tmp_path, damage):
    """Where torch's reader of archives would take other bytes than Python's.

    An entry marked as a folder it leaves unset; of two archives in one file it reads the first.
    """
    content = {"format": CHECKPOINT_FORMAT, "a": torch.rand(1000), "b": torch.rand(1000)}
    path = tmp_path / "x.pth"
    torch.save(content, path)
    good = path.read_bytes()
    if damage == "folder":
        (entry,) = re.finditer(rb"PK\x01\x02.{42}x/data/1", good, re.DOTALL)
        path.write_bytes(flipped(good, entry.start() + 38, 4))  # 0x10 of its external attributes
    else:
        path.write_bytes(flipped(good, good.index(content["b"].numpy().tobytes()), 4) + good)
    read = torch.load(path, weights_only=True)
    assert not torch.equal(read["b"], content["b"])  # or this test shows nothing
    assert_same_tree(load_checkpoint(path), content | {"path": path})


def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    good = checkpoint.read_bytes()
    for length in [0, 1, 100, *np.random.default_rng(0).integers(0, len(good), 20)]:
        path = tmp_path / "cut.pth"
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_checkpoint(path)


class Canary:
    """A pickle that leaves a trace when opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def as_zip(payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "in the optimizer", "raw pickle", "legacy", "zip"])
def test_a_malicious_checkpoint_is_inert(checkpoint, tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    content = torch.load(checkpoint, weights_only=True)
    if form == "torch":
        torch.save({"format": 1, "model": Canary(canary)}, path)
    elif form == "in the optimizer":
        content["optimizer_state_dict"][0]["state"] = Canary(canary)
        torch.save(content, path)
    elif form == "legacy":
        torch.save({"x": Canary(canary)}, path, _use_new_zipfile_serialization=False)
    else:
        payload = pickle.dumps(Canary(canary))
        path.write_bytes(payload if form == "raw pickle" else as_zip(payload))
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_checkpoint(path)
    assert not canary.exists()
    if form == "torch":
        torch.load(path, weights_only=False)  # the canary does sing when it is opened
        assert canary.exists()


@pytest.mark.parametrize(("step", "age"), [(-2, "an older"), (1, "a newer")])
def test_formats_of_other_versions_are_refused(checkpoint, tmp_path, step, age):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"format": CHECKPOINT_FORMAT + step}, tmp_path / "other.pth")
    words = f"{age} version.*format {CHECKPOINT_FORMAT + step}.*{CHECKPOINT_FORMAT}"
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, torch.zeros(3)], ids=str)
def test_files_of_other_programs_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_file(checkpoint, monkeypatch, failing):
    before = checkpoint.read_bytes()

    def fail(*args, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match=r"epoch_5\.pth.*No space.*\d+ bytes needed, \d+ free"):
        save_checkpoint(checkpoint, {"format": 1})
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [LAST]


# ---- names -----------------------------------------------------------------------------

NOT_OURS = [
    "diffusion_checkpoint_epoch_9_backup.pth",
    "diffusion_checkpoint_epoch_9 (1).pth",
    "diffusion_checkpoint_epoch_9 copy.pth",
    "Copy of diffusion_checkpoint_epoch_9.pth",
    "diffusion_checkpoint_epoch_9.pth.bak",
    "diffusion_checkpoint_epoch_9.pth~",
    "diffusion_checkpoint_epoch_9.PTH",
    "diffusion_checkpoint_epoch_009.pth",
    "diffusion_checkpoint_epoch_.pth",
    "diffusion_checkpoint_epoch_-9.pth",
    "diffusion_checkpoint_epoch_9.0.pth",
    "diffusion_checkpoint_epoch_٩.pth",
    "diffusion_checkpoint_epoch_9.pth\n",
    "diffusion_checkpoint_epoch_best.pth",
    ".diffusion_checkpoint_epoch_9.pth",
    "._diffusion_checkpoint_epoch_9.pth",
    ".diffusion_checkpoint_epoch_9.pth.tmp",
    "model.pth",
]


@pytest.mark.parametrize("name", NOT_OURS, ids=ascii)
def test_a_file_that_only_looks_like_a_checkpoint_is_not_the_newest(tmp_path, capsys, name):
    ours = tmp_path / "diffusion_checkpoint_epoch_1.pth"
    for path in (ours, tmp_path / "diffusion_checkpoint_epoch_0.pth", tmp_path / name):
        path.touch()
    assert newest_checkpoint(tmp_path) == ours and len(find_checkpoints(tmp_path)) == 2
    assert (name in capsys.readouterr().err) == (not name.endswith(".tmp"))
    assert newest_checkpoint(tmp_path / name) == tmp_path / name  # unless it is asked for
    ours.unlink()
    (tmp_path / "diffusion_checkpoint_epoch_0.pth").unlink()
    with pytest.raises(UserError, match="check the path"):
        newest_checkpoint(tmp_path)


def test_a_resumed_run_goes_back_to_the_newest_that_is_whole(checkpoint, tmp_path, capsys):
    for epoch in (6, 7):
        (tmp_path / f"diffusion_checkpoint_epoch_{epoch}.pth").write_bytes(b"PK\x03\x04" * epoch)
    assert newest_valid(tmp_path)["path"] == checkpoint
    err = capsys.readouterr().err
    assert err.count("going back to the one before") == 2 == err.count("\n")
    with pytest.raises(UserError, match=r"epoch_7\.pth"):
        load_checkpoint(tmp_path)  # what is judged or sampled is never an older one in silence


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),  # opening it would wait for ever
        lambda path: path.symlink_to("/nowhere"),
        lambda path: path.symlink_to(path.name),
    ],
)
def test_what_is_no_file_is_no_checkpoint(checkpoint, tmp_path, capsys, make):
    make(tmp_path / "diffusion_checkpoint_epoch_8.pth")
    assert load_checkpoint(tmp_path)["path"] == newest_valid(tmp_path)["path"] == checkpoint
    assert "ignored" in capsys.readouterr().err


def test_a_renamed_copy_is_not_the_newest(checkpoint, tmp_path, capsys):
    copy = shutil.copy(checkpoint, tmp_path / "diffusion_checkpoint_epoch_12.pth")
    for path in (copy, tmp_path):
        with pytest.raises(UserError, match=r"epoch_12\.pth is a renamed copy: it holds epoch 5"):
            load_checkpoint(path)
    assert newest_valid(tmp_path)["path"] == checkpoint
    assert load_checkpoint(shutil.copy(checkpoint, tmp_path / "best.pth"))["epoch"] == 5


# ---- strange content ------------------------------------------------------------------


STRANGE = {
    "nothing else": lambda c: {"format": c["format"]},
    "no config": lambda c: {k: v for k, v in c.items() if k != "config"},
    "a config that is none": lambda c: c | {"config": 3},
    "a config of other options": lambda c: c | {"config": {"alpha": 1}},
    "a config of other values": lambda c: c | {"config": c["config"] | {"lr": "fast"}},
    "other weights": lambda c: c | {key: {"w": torch.zeros(2)} for key in WEIGHTS},
    "weights of another size": lambda c: c | {"config": c["config"] | {"d_model": 32}},
    "weights that are none": lambda c: c | dict.fromkeys(WEIGHTS),
    "no optimizers": lambda c: {k: [] if k.startswith("optimizer") else v for k, v in c.items()},
    "no steps": lambda c: {k: v for k, v in c.items() if k != "step"},
}  # fmt: skip
WEIGHTS = ("model_state_dict", "ema_state_dict")


@pytest.mark.parametrize("name", STRANGE)
def test_a_checkpoint_with_strange_content_is_refused_in_one_line(
    refused, checkpoint, tmp_path, name
):
    made = torch.load(checkpoint, weights_only=True)
    torch.save(STRANGE[name](made), checkpoint)
    message = refused("--resume", checkpoint)
    assert "does not fit this version" in message and LAST in message
