"""What a result says of its making: the commit of this program or none, versions, machine.

Why: a number whose commit is that of another repository cannot be made again. Programs start from
git hooks, which set GIT_DIR, and copies of them lie inside other repositories.

    python -m pytest tests/test_provenance.py
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, python

from trainlib.provenance import describe_machine, git_commit, provenance, version_of


def git(folder, *argv):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null"]
    command = ["git", "-C", str(folder), *identity, *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, and its name."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "script.py").touch()
    for argv in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        git(folder, *argv)
    return folder, git(folder, "rev-parse", "HEAD")


def test_the_commit_is_named_with_a_sign_of_changes(repository, tmp_path, monkeypatch):
    folder, head = repository
    assert git_commit(tmp_path) is None  # no repository
    assert git_commit(folder) == head
    (folder / "script.py").write_text("changed")
    assert git_commit(folder) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit(folder) is None  # no git


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"])
def test_what_a_hook_sets_changes_nothing(repository, tmp_path, monkeypatch, variable):
    """As in a hook of another repository, or with one that does not exist."""
    folder, head = repository
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv(variable, str(ROOT / ".git"))
    assert git_commit(folder) == head
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize("depth", [1, 3])
def test_a_copy_within_another_repository_has_no_commit(repository, depth):
    folder, _ = repository
    copy = folder.joinpath(*"abc"[:depth])
    copy.mkdir(parents=True)
    assert git_commit(copy) is None


def test_a_repository_without_a_commit_or_with_a_link_to_it(repository, tmp_path):
    folder, head = repository
    (tmp_path / "link").symlink_to(folder)
    assert git_commit(tmp_path / "link") == head
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert git_commit(empty) is None


def test_a_worktree_has_its_own(repository, tmp_path):
    folder, _ = repository
    git(folder, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "second")
    assert git_commit(tmp_path / "tree") == git(tmp_path / "tree", "rev-parse", "HEAD")


def test_what_is_said_of_versions_and_the_machine():
    made = provenance()
    assert made["argv"] == sys.argv and made["commit"] == git_commit(ROOT)
    assert made["numpy"] == np.__version__ and version_of("no-such-package") is None
    machine = describe_machine(torch.device("cpu"))
    assert machine["device"].startswith("cpu: ") and machine["torch"] == torch.__version__


def test_provenance_from_another_folder_is_of_this_program(repository):
    folder, _ = repository
    code = (
        "import os, sys; os.chdir(sys.argv[1]);"
        "from trainlib.provenance import git_commit; print(git_commit())"
    )
    done = python("-c", code, folder, GIT_DIR=str(folder / ".git"))
    assert done.stdout == f"{git_commit(ROOT)}\n", done.stderr
