"""The GPU benchmark on a CPU: every stage runs, and a command that was cut goes on.

Why: GPU time is short, so nothing of it may be tried there for the first time. What only a GPU
can show is left out: the numbers, and what its graphs capture.

    python -m pytest tests/test_gpu.py
"""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, python

from benchmarks import gpu, gpu_stages, report
from benchmarks.gpu_lines import LINES

QUICK = ["--device", "cpu", "--quick"]
SLOW = dict.fromkeys(("plan", "epoch", "tests"), pytest.mark.slow)
ABSENT = ("wandb", "hypothesis", "sklearn", "h5py", "scipy", "diffusers", "cma", "pytest_timeout")


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in LINES])
def test_every_stage_answers_its_lines(name):
    found = gpu.measure_stage(name, gpu_stages.Place(torch.device("cpu"), True, 60.0))
    assert list(found) == list(LINES[name])
    for line, value in found.items():
        if isinstance(value, dict):  # a spread
            value = value["median"]
        assert "memory" in line or value == "yes" or (value >= 0 or "dB" in line), (line, value)
    if name == "agreement":  # the CPU agrees with itself
        assert set(found.values()) == {0.0}


def test_what_cannot_be_made_is_said_in_words():
    def fails():
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    words = gpu_stages.tried(fails)
    assert words == "no: RuntimeError: operation not permitted"
    place = gpu_stages.Place(torch.device("cpu"), True, 60.0)
    times, same = place.milliseconds({"works": lambda: None, "not": words})
    assert times["median"] >= 0 and same == words


@pytest.fixture
def stages(monkeypatch):
    """The names of the stages in the order that they ran in; each answers 1 on every line."""
    ran = []

    def run_stage(name, args, limit_s):
        ran.append(name)
        return dict.fromkeys(LINES[name], 1)

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    return ran


def test_a_command_that_was_cut_goes_on(stages, monkeypatch, tmp_path, capsys):
    """Cut by Ctrl-C, by its time, by a stage that failed; a finished one is not measured again."""
    names, answer = list(LINES), gpu.run_stage
    flags = [*QUICK, "--output_dir", str(tmp_path)]

    def cut(name, *rest):
        if name == names[2]:
            raise KeyboardInterrupt
        return answer(name, *rest)

    monkeypatch.setattr(gpu, "run_stage", cut)
    assert gpu.main(flags) == 130 and stages == names[:2]
    monkeypatch.setattr(gpu, "run_stage", answer)
    assert gpu.main([*flags, "--limit_s", "10"]) == 0 and stages == names[:2]
    assert "the time is up" in capsys.readouterr().out
    monkeypatch.setattr(
        gpu, "run_stage", lambda *a: answer(*a) if a[0] != names[3] else "stopped after 60 s"
    )
    assert gpu.main(flags) == 1 and stages == names[:3] + names[4:]
    assert f"{names[3]} failed" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "run_stage", answer)
    stages.clear()
    assert gpu.main(flags) == 0 and gpu.main(flags) == 0 and stages == [names[3]]
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert {name: list(lines) for name, lines in LINES.items()} == {
        name: list(found["stages"][name]) for name in LINES
    }


def test_another_commit_is_measured_from_the_start(stages, monkeypatch, tmp_path):
    flags = [*QUICK, "--output_dir", str(tmp_path)]
    assert gpu.main(flags) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"commit": "another"}))
    assert gpu.main(flags) == 0 and stages == 2 * list(LINES)
    path.write_text("{half a file")
    assert gpu.main(flags) == 0 and stages == 3 * list(LINES)


def test_a_stage_that_hangs_is_stopped_with_its_children(monkeypatch, tmp_path):
    """The process that it started is gone with it."""
    pid = tmp_path / "pid"
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '60']);"
    code += f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    hanging = tmp_path / "python"
    hanging.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "$CODE"\n')
    hanging.chmod(0o755)
    monkeypatch.setenv("CODE", code)
    monkeypatch.setattr(gpu.sys, "executable", str(hanging))
    assert gpu.run_stage("plan", gpu.parse_args(QUICK), 3.0) == "stopped after 3 s"
    with open(f"/proc/{pid.read_text()}/stat") as stat:  # not yet waited for by init: a zombie
        assert stat.read().split()[2] == "Z"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--limit_s", "0", *QUICK], "--limit_s must be above 0"),
        (["--stage", "plan", *QUICK], "go together"),
        (["--stage", "speed", *QUICK], "see --help"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([*flags, "--output_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_the_document_waits_for_a_gpu(stages, tmp_path):
    """A rehearsal is not a measurement; a result of a CUDA device is, the newest of them."""

    def section():
        report.main(tmp_path, tmp_path / "BENCHMARKS.md")
        text = (tmp_path / "BENCHMARKS.md").read_text("utf-8")
        return text[text.index("## On a GPU") :]

    num = sum(map(len, LINES.values()))
    assert section().count("not measured") == num
    assert gpu.main([*QUICK, "--output_dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert section().count("not measured") == num
    result = json.loads(path.read_text())
    del result["stages"]["preset"]
    result["stages"]["plan"] = "stopped after 60 s"
    ms = {"median": 12.34, "quartile_1": 12.0, "quartile_3": math.pi}
    result["stages"]["training"] = {line: ms for line in LINES["training"]}
    result["machine"]["device"] = "cuda: NVIDIA H200"
    (tmp_path / "gpu-h200.json").write_text(json.dumps(result))
    text = section()
    assert text.count("not measured") == len(LINES["preset"]) and "NVIDIA H200" in text
    assert text.count("stopped after 60 s") == len(LINES["plan"])
    assert text.count("12.3 (12.0 - 3.14)") == len(LINES["training"])


@pytest.mark.slow
def test_the_command(tmp_path):
    done = python("-m", "benchmarks.gpu", *QUICK, "--output_dir", tmp_path, timeout=290)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert all(isinstance(found, dict) for found in json.loads(path.read_text())["stages"].values())


@pytest.mark.slow
def test_gpu_tests_run_without_the_packages_of_development(tmp_path):
    """As on a machine that has torch, numpy, matplotlib, tqdm and pytest alone."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-m", "gpu and not slow", "-p", "no:cacheprovider", {str(ROOT / "tests")!r}]))
"""
    done = python("-c", code, timeout=290, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0 and "deselected" in done.stdout, done.stdout
