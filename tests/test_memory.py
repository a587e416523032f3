"""The memory that a process may use is seen wherever it is limited, and its lack is recognised.

Why: a data set that is larger than its container is paged in from disk instead of being read, and a
batch that does not fit ends in one line, only if both are noticed. Groups are folders written here;
that the real ones are read is shown by `ulimit`, and by a mount where the test may make one.

    python -m pytest tests/test_memory.py
"""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from trainlib import memory
from trainlib.errors import UserError
from trainlib.memory import is_out_of_memory, memory_limit, memory_named

MB = 1 << 20
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
ASK = "from trainlib.memory import memory_limit; print(memory_limit())"

GROUPS = {
    # name: (/proc/self/cgroup, files, the limit)
    "version 2": ("0::/\n", {"memory.max": "200"}, 200),
    "version 2, nested": ("0::/a/b\n", {"a/b/memory.max": "300"}, 300),
    "version 2, the group around": (
        "0::/system.slice/job_7/step_0\n",
        {
            "system.slice/job_7/step_0/memory.max": "max",
            "system.slice/job_7/memory.max": "100",
            "system.slice/memory.max": "250",
        },
        100,
    ),
    "version 2 beside version 1": ("1:cpu:/\n0::/a\n", {"unified/a/memory.max": "120"}, 120),
    "version 1": ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "200"}, 200),
    "version 1, nested": (
        "5:cpu,memory:/slurm/job_1\n",
        {
            "memory/slurm/job_1/memory.limit_in_bytes": "9223372036854771712",
            "memory/slurm/memory.limit_in_bytes": "90",
        },
        90,
    ),
    "no limit": ("0::/a\n", {"memory.max": "max", "a/memory.max": "max"}, None),
    "another's group": ("0::/a\n4:memory:/a\n", {"b/memory.max": "1", "memory.max": "400"}, 400),
    "a container that does not see its own path": ("0::/../x\n", {"memory.max": "150"}, 150),
    "no groups": ("", {}, None),
    "a damaged file": ("0::/a\nnonsense\n", {"a/memory.max": "", "memory.max": "70"}, 70),
}


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups(tmp_path, monkeypatch, name):
    cgroup, files, expected = GROUPS[name]
    for file, limit in files.items():
        path = tmp_path / "fs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit if limit in ("max", "") else f"{int(limit) * MB}\n")
    (tmp_path / "cgroup").write_text(cgroup)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_process_limits", lambda: [])
    assert memory_limit() == min(MACHINE, MACHINE if expected is None else expected * MB)


@pytest.mark.parametrize("option", ["-v", "-d"])
def test_limits_of_the_shell(option):
    command = f'ulimit {option} 4000000; exec {sys.executable} -c "{ASK}"'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) <= 4_000_000 * 1024, done.stderr


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_limits_where_the_system_mounts_them(file):
    command = (
        f"mount -t tmpfs tmpfs /sys/fs/cgroup && mkdir -p $(dirname /sys/fs/cgroup/{file}) && "
        f'echo 209715200 > /sys/fs/cgroup/{file} && {sys.executable} -c "{ASK}"'
    )
    mounted = subprocess.run(
        ["unshare", "-m", "bash", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    if mounted.returncode and not mounted.stdout:
        pytest.skip(f"no mount of its own: {mounted.stderr.strip()[-100:]}")
    assert mounted.stdout == "209715200\n", mounted.stderr


TOO_LARGE = {
    "an allocation": lambda: torch.empty(10**15),
    "a size": lambda: torch.empty(10**11, 10**11),
    "a layer": lambda: torch.nn.Linear(64, 10**18),
    "a product": lambda: torch.ones(1, 1).expand(2**31, 1) @ torch.ones(1, 1).expand(1, 2**31),
    "numpy": lambda: np.empty(10**15),
    "numpy's size": lambda: np.empty((10**12, 10**12)),
    "Python": lambda: bytearray(10**18),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_errors_of_what_does_not_fit(name):
    with pytest.raises((MemoryError, RuntimeError, ValueError)) as error:
        TOO_LARGE[name]()
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (UserError("the data set is out of memory"), False),
        (ValueError("x must be in [0, 1]"), False),
        (KeyError("not enough memory"), False),
    ],
    ids=str,
)
def test_errors_by_their_words(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_does_not_fit_is_named(name):
    with pytest.raises(MemoryError, match=r"^the model does not fit .*; lower --d_model$") as error:
        with memory_named("the model", "--d_model"):
            TOO_LARGE[name]()
    assert "\n" not in str(error.value)


def test_other_errors_keep_their_kind():
    for other in (KeyError("x"), RuntimeError("shapes cannot be multiplied"), UserError("x")):
        with pytest.raises(type(other)):
            with memory_named("the model"):
                raise other
