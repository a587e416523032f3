"""What made a result: command line, commit, versions, machine."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def git_commit(folder: Path = ROOT) -> str | None:
    """Return the commit of the repository whose top is `folder`, "-dirty" if its files differ.

    None without git, or if `folder` is no repository of its own: the commit of another, which
    GIT_DIR may name, or which a copy of these files may lie in, is not that of this program.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*argv: str) -> str:
        command = ["git", "-C", str(folder), *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, env=env)
        return done.stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != folder.resolve():
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    """Return when, from which commit, by which command line and versions a result is made."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "argv": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "numpy": version_of("numpy"),
        "torch": version_of("torch"),
    }


def describe_machine(device: Any = None) -> dict[str, Any]:
    """Return the machine that numbers are made on; `device` is the torch.device in use."""
    import torch  # here, since the files of gestures need numpy alone

    is_cuda = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.machine()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": f"{device.type if device is not None else 'cpu'}: {name}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version_of("numpy"),
    }


def processor_name() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
