"""Files appear whole or not at all, and a disk that fails is named.

Why: half a checkpoint, half a table or half a sample is worse than none: it is read. A killed write
must leave the old file; a full disk must leave no temporary file and a line with path and bytes.

    python -m pytest tests/test_files.py
"""

import hashlib
import json
import math
import os

import numpy as np
import pytest

from trainlib.errors import UserError
from trainlib.files import (
    disk_faults_named,
    finite_or_null,
    make_folder,
    sha256_of,
    write_json,
    write_text,
    write_whole,
)

FULL = OSError(28, "No space left on device")


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"", b"x" * 100_000, b"short"):
        write_whole(path, content)
        assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "builtins.open"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_disk_that_fails_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, failing, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)

    def fail(*_, **__):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match=r"a\.bin.*No space.*\(7 bytes needed, \d+ free\); del"):
            write_whole(path, b"content", cure="delete something")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


def test_an_interruption_leaves_the_old_file_too(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and path.read_bytes() == b"old"


def test_a_folder_that_is_gone_is_named_too(tmp_path):
    with pytest.raises(OSError, match="gone"):
        write_whole(tmp_path / "gone" / "a.bin", b"x")
    with pytest.raises(OSError, match="gone"), disk_faults_named(tmp_path / "gone" / "a.bin"):
        raise FULL


def test_json_is_strict(tmp_path):
    content = {
        "a": [1.5, math.nan, -math.inf],
        "b": {"c": (1, "x", None, True)},
        "d": np.float64(2),
    }
    write_json(tmp_path / "a.json", content)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, None], "b": {"c": [1, "x", None, True]}, "d": 2.0}
    assert finite_or_null(math.inf) is None and finite_or_null(10**400) == 10**400


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


@pytest.mark.parametrize("what", ["a file", "below a file", "a dangling link", "a long name"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, what):
    path = tmp_path / "x"
    if what == "a dangling link":
        path.symlink_to(tmp_path / "gone" / "deep")
    elif what == "a long name":
        path = tmp_path / ("x" * 300)
    else:
        path.write_text("")
    with pytest.raises(UserError, match="--save_dir") as error:
        make_folder(path / "below" if what == "below a file" else path, "--save_dir")
    assert "\n" not in str(error.value)


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = make_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b" and not [*folder.iterdir()]
    assert make_folder(folder) == folder


def test_names_that_are_not_utf_8_become_escapes(tmp_path):
    write_text(tmp_path / "report.md", "runs/\udcff ü")
    assert (tmp_path / "report.md").read_bytes() == "runs/\\udcff ü".encode()
