"""Damaged and hostile files: flipped bits, cuts, payloads that want to run, fuzzed bytes."""

import io
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import train_diffusion_ddim as tdd
from tests.conftest import L, flipped, make_gestures
from tests.faults.lab import LAST, Lab, end_state, fault, tensors_of, wait
from trainlib.checkpoint import load_checkpoint
from trainlib.errors import UserError
from trainlib.gesture_files import read_actions

SLOWEST = 2  # seconds that reading a bad file may take


def in_a_child(lab: Lab, cases: list[bytes], path: Path, read: Callable[[], str]) -> Iterator[str]:
    """Write each case to `path` and call `read` in a child; yield why it was not survived.

    `read` returns the same; a crash, a hang or another exception than UserError is reported too.
    """
    log = lab.folder / "cases"
    first = 0
    while first < len(cases):
        log.write_text("")
        pid = os.fork()
        if not pid:
            with open(log, "a", buffering=1) as f:
                for case in cases[first:]:
                    path.write_bytes(case)
                    signal.setitimer(signal.ITIMER_PROF, 5 * SLOWEST)
                    began = time.process_time()  # a busy machine is no slow reader
                    try:
                        reason = read()
                    except UserError as e:
                        good = str(path) in str(e) and "\n" not in str(e)
                        reason = "" if good else f"the message: {e}"
                    except BaseException as e:
                        reason = f"{type(e).__name__}: {e}"
                    if time.process_time() - began > SLOWEST:
                        reason = f"took {time.process_time() - began:.1f} s"
                    f.write(json.dumps(reason) + "\n")
            os._exit(0)
        code = wait(pid, 3600)
        reasons = [json.loads(line) for line in log.read_text().splitlines()]
        yield from reasons
        first += len(reasons)
        if code:
            first += 1
            yield f"ended by {code}"


def checkpoint_cases(lab: Lab, cases: list[bytes]) -> Iterator[str]:
    """Load each case as a checkpoint: equal to the good one, or refused."""
    good = tensors_of(lab.straight / LAST)
    path = lab.new().with_suffix(".pth")

    def read() -> str:
        return "" if tensors_of(path) == good else "another content was loaded"

    return in_a_child(lab, cases, path, read)


# ---- checkpoints -------------------------------------------------------------------------


@fault("one bit of a checkpoint flipped: nothing else is ever loaded", quick=60, long=1000)
def flips(lab: Lab, num: int) -> Iterator[str]:
    good = (lab.straight / LAST).read_bytes()
    places = [(lab.rng.integers(len(good)), lab.rng.integers(8)) for _ in range(num)]
    return checkpoint_cases(lab, [flipped(good, *place) for place in places])


@fault("the same, in the archive's table of contents", quick=60, long=10_000)
def flips_in_the_directory(lab: Lab, num: int) -> Iterator[str]:
    good = (lab.straight / LAST).read_bytes()
    with zipfile.ZipFile(lab.straight / LAST) as archive:
        first = archive.start_dir
    places = [(lab.rng.integers(first, len(good)), lab.rng.integers(8)) for _ in range(num)]
    return checkpoint_cases(lab, [flipped(good, *place) for place in places])


@fault("a damaged checkpoint in front of a whole one, in one file", quick=10, long=200)
def two_in_one(lab: Lab, num: int) -> Iterator[str]:
    good = (lab.straight / LAST).read_bytes()
    places = [(lab.rng.integers(len(good)), lab.rng.integers(8)) for _ in range(num)]
    return checkpoint_cases(lab, [flipped(good, *place) + good for place in places])


@fault("a checkpoint cut at any length is refused by name, exit 2", quick=2, long=51)
def cuts(lab: Lab, num: int) -> Iterator[str]:
    good, folder = (lab.straight / LAST).read_bytes(), lab.copy()
    for length in [0, *lab.rng.integers(1, len(good), num - 1)]:
        (folder / LAST).write_bytes(good[:length])
        code = wait(lab.fork(["--resume", str(folder / LAST)]))
        fine = code == 2 and lab.output().count("\n") == 1 and LAST in lab.output()
        yield "" if fine else f"{length} bytes: {code}, {lab.output()[-300:]}"


@fault("the same, with --resume FOLDER: warned of, and the one before it goes on", quick=2, long=51)
def cuts_and_fall_back(lab: Lab, num: int) -> Iterator[str]:
    good = (lab.straight / LAST).read_bytes()
    for length in [0, *lab.rng.integers(1, len(good), num - 1)]:
        folder = lab.copy()
        (folder / LAST).write_bytes(good[:length])
        code = wait(lab.fork([*lab.flags(folder), "--resume"]))
        warned = lab.output().startswith("warning: ") and LAST in lab.output()
        same = code == 0 and end_state(folder) == lab.digest
        yield "" if warned and same else f"{length} bytes: {code}, {lab.output()[-300:]}"
        shutil.rmtree(folder)


class Canary:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


class Importer(Canary):
    """A pickle that asks for another module."""

    def __reduce__(self) -> tuple:
        return __import__("subprocess").call, (["mkdir", self.path],)


class Evaluator(Canary):
    """A pickle that evaluates text."""

    def __reduce__(self) -> tuple:
        return eval, (f"__import__('os').mkdir({self.path!r})",)


def saved(content: object, **options: object) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(payload: bytes, name: str = "data.pkl", **more: bytes) -> bytes:
    """Return a container as torch writes them, around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"archive/{name}", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
        for extra, content in more.items():
            archive.writestr(f"archive/{extra}", content)
    return buffer.getvalue()


def scripted() -> bytes:
    """Return a TorchScript archive."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def payloads(good: dict, canary: Path) -> dict[str, bytes]:
    """Return hostile checkpoints by name."""
    bomb = Canary(canary)
    with_config = {**good, "config": {**good["config"], "data_dir": bomb}}
    adamw, muon = good["optimizer_state_dict"]
    in_optimizer = {**good, "optimizer_state_dict": [{**adamw, "state": bomb}, muon]}
    objects = np.array([bomb], dtype=object)
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(good["step"]))
        archive.writestr("archive/data/0", bytes(200_000_000))
    return {
        "reduce": saved(bomb),
        "in the dictionary": saved({**good, "model_state_dict": bomb}),
        "in the config": saved(with_config),
        "in the optimizer": saved(in_optimizer),
        "as a key": saved({**good, "more": [(1, bomb)]}),
        "eval": saved(Evaluator(canary)),
        "subprocess": saved(Importer(canary)),
        "numpy objects": saved({**good, "more": objects}),
        "raw pickle": pickle.dumps(bomb),
        "old protocol": pickle.dumps(bomb, protocol=0),
        "legacy format": saved(bomb, _use_new_zipfile_serialization=False),
        "by hand": zipped(pickle.dumps(bomb)),
        "beside a good pickle": zipped(pickle.dumps(1), constants=pickle.dumps(bomb)),
        "a module": saved(torch.nn.Linear(2, 2)),
        "TorchScript": scripted(),
        "zip bomb": deflated.getvalue(),
    }


@fault("hostile checkpoints: exit 2, no code of theirs runs", quick=16, long=16)
def hostile_checkpoints(lab: Lab, num: int) -> Iterator[str]:
    canary = lab.folder / "canary"
    good = torch.load(lab.straight / LAST, weights_only=True)
    for name, payload in [*payloads(good, canary).items()][:num]:
        path = lab.new().with_suffix(".pth")
        path.write_bytes(payload)
        (reason,) = in_a_child(lab, [payload], path, lambda p=path: load_checkpoint(p) and "")
        try:
            load_checkpoint(path)
            reason = "loaded"
        except UserError:
            pass
        yield f"{name}: {reason or 'it ran'}" if reason or canary.exists() else ""


def mutate(good: bytes, rng: np.random.Generator) -> bytes:
    """Damage bytes in one of many ways: overwrite, cut out, insert, repeat, swap, zero."""
    case = bytearray(good)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(case)))
        if rng.random() < 0.5:  # near an end is where formats keep what matters
            at = (
                min(at % 600, len(case) - 1)
                if rng.random() < 0.5
                else max(0, len(case) - 1 - at % 4000)
            )
        size = int(rng.choice([1, 2, 4, 8, 64, 1000]))
        piece = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        kind = rng.integers(6)
        if kind == 0:
            case[at : at + size] = piece[: len(case[at : at + size])]
        elif kind == 1:
            del case[at : at + size]
        elif kind == 2:
            case[at:at] = piece
        elif kind == 3:
            case[at:at] = case[at : at + size]
        elif kind == 4:
            case[at : at + size] = bytes(len(case[at : at + size]))
        else:
            case[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**31, 2**32 - 1])))
        if not case:
            return b""
    return bytes(case)


@fault("fuzzed checkpoints: the same content or one line", quick=100, long=2000)
def fuzzed_checkpoints(lab: Lab, num: int) -> Iterator[str]:
    good = (lab.straight / LAST).read_bytes()
    return checkpoint_cases(lab, [mutate(good, lab.rng) for _ in range(num)])


@fault("fuzzed pickles with right CRCs: loaded or one line, no crash", quick=50, long=1000)
def fuzzed_pickles(lab: Lab, num: int) -> Iterator[str]:
    content = torch.load(lab.straight / LAST, weights_only=True)
    unread = ("optimizer_state_dict", "model_state_dict")
    content = {k: v for k, v in content.items() if k not in unread}
    buffer = io.BytesIO(saved(content))
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    cases = []
    for _ in range(num):
        case = io.BytesIO()
        with zipfile.ZipFile(case, "w") as archive:
            for name, data in {**parts, pickled: mutate(parts[pickled], lab.rng)}.items():
                archive.writestr(name, data)
        cases.append(case.getvalue())
    path = lab.new().with_suffix(".pth")
    return in_a_child(lab, cases, path, lambda: tdd.load_model(path) and "")


# ---- data --------------------------------------------------------------------------------


@fault("fuzzed .npy: numpy's own reading or one line", quick=200, long=2000)
def fuzzed_arrays(lab: Lab, num: int) -> Iterator[str]:
    rows = make_gestures(4).numpy().reshape(-1, 3)
    kinds = [rows, rows.astype(">f8"), np.asfortranarray(rows), rows.reshape(4, L, 3)]
    goods = []
    for array in kinds:
        buffer = io.BytesIO()
        np.save(buffer, array)
        goods.append(buffer.getvalue())
    path = lab.new().with_name("fuzz_actions.npy")

    def read() -> str:
        x = read_actions(path, L)
        by_numpy = np.load(path, allow_pickle=False).reshape(-1, L, 3)
        same = np.abs(x - by_numpy).max() < 2e-6
        return "" if same and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1 else "changed"

    return in_a_child(lab, [mutate(goods[i % 4], lab.rng) for i in range(num)], path, read)


def data_folders(lab: Lab) -> dict[str, Callable[[Path], None]]:
    """Return, by name, how to spoil a data folder that holds x_actions.npy."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": (10**11, 3)}).encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117) + b"\n"

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            (folder / "x_actions.npy").unlink()
            make(folder / "x_actions.npy")

        return spoil

    def appended(path: Path) -> None:
        with open(path / "x_actions.npy", "ab") as f:
            f.write(b"\0")

    def manifest(**changes: object) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            entry = {"name": "x_actions.npy", "rows": 24 * L, "sha256": "0" * 64}
            content = {"format": 1, "sequence_length": L, "files": [entry], **changes}
            (folder / "dataset.json").write_text(json.dumps(content))

        return spoil

    gone = {"name": "gone_actions.npy", "rows": 1, "sha256": ""}
    return {
        "a pipe": replaced(os.mkfifo),
        "a folder": replaced(Path.mkdir),
        "a dangling link": replaced(lambda p: p.symlink_to("gone")),
        "a link to itself": replaced(lambda p: p.symlink_to(p.name)),
        "a device": replaced(lambda p: p.symlink_to("/dev/zero")),
        "no bytes": replaced(Path.touch),
        "a byte too many": appended,
        "a terabyte promised": replaced(lambda p: p.write_bytes(header + bytes(2400))),
        "no file at all": lambda folder: (folder / "x_actions.npy").unlink(),
        "a manifest of other lengths": manifest(sequence_length=L + 5),
        "a manifest whose file is missing": manifest(files=[gone]),
        "a manifest of other bytes": manifest(),
        "a damaged manifest": manifest(files=3),
        "a manifest that is cut": lambda folder: (folder / "dataset.json").write_text('{"fo'),
    }


@fault("spoilt data folders: exit 2 in one line, no hang", quick=14, long=14)
def spoilt_folders(lab: Lab, num: int) -> Iterator[str]:
    for name, spoil in [*data_folders(lab).items()][:num]:
        folder = shutil.copytree(lab.folder / "train", lab.new())
        spoil(folder)
        run = lab.new()
        code = wait(lab.fork(lab.flags(run, data_dir=folder)), 60)
        good = code == 2 and lab.output().count("\n") == 1 and str(folder) in lab.output()
        yield "" if good and not run.exists() else f"{name}: {code}, {lab.output()[-300:]}"


@fault("training data in the validation set: the same folder, a link, a copy, one gesture",
       quick=4, long=4)  # fmt: skip
def leaks(lab: Lab, num: int) -> Iterator[str]:
    train, link, copied, one = lab.folder / "train", lab.new(), lab.new(), lab.new()
    link.symlink_to(train)
    shutil.copytree(train, copied)
    shutil.copytree(lab.folder / "val", one)
    np.save(one / "y_actions.npy", np.load(train / "x_actions.npy")[L : 2 * L])
    for folder in (train, link, copied, one)[:num]:
        code = wait(lab.fork(lab.flags(lab.new(), val_data_dir=folder)))
        refused = code == 2 and "--allow_overlap" in lab.output()
        flags = lab.flags(lab.new(), val_data_dir=folder, num_epochs=1, allow_overlap=True)
        code = wait(lab.fork(flags))
        yield "" if refused and code == 0 else f"{folder}: {refused}, then {code}"
