"""The exported denoiser samples what the trained one samples.

Why: a planner that runs an export trusts that nothing was lost on the way. The numpy loop of
export/runtime.py is written apart from the scheduler, so each checks the other.

    python -m pytest tests/test_export.py
"""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, L

import train_diffusion_ddim as tdd
from export import __main__ as command
from export import runtime
from export.__main__ import check_parity, describe_schedule, example_inputs, export, main


def tiny_model(**options):
    torch.manual_seed(0)
    config = tdd.TrainConfig(**(TINY | options))
    model = tdd.build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model, tdd.build_scheduler(config)


@pytest.mark.parametrize("prediction_type", tdd.PREDICTION_TYPES)
@pytest.mark.parametrize("known_frames", [True, False])
def test_the_numpy_loop_agrees_with_the_scheduler(prediction_type, known_frames):
    model, scheduler = tiny_model(prediction_type=prediction_type, known_frames=known_frames)
    schedule = json.loads(json.dumps(describe_schedule(model, scheduler, 5)))
    x_T, *given = example_inputs(model, 3)

    def denoise(*arrays):
        return model(*map(torch.from_numpy, arrays)).numpy()

    theirs = runtime.ddim(denoise, schedule, x_T.numpy(), *(a.numpy() for a in given))
    known = dict(zip(("known", "known_mask"), given, strict=False))
    ours = scheduler.sample(model, (3, L, 3), "cpu", 5, x_T=x_T, **known)
    assert np.abs(theirs - ours.numpy()).max() < 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model, its scheduler, and the folder with both denoisers but no compiled sampler."""
    model, scheduler = tiny_model(noise_units=True)
    folder = tmp_path_factory.mktemp("export") / "exported"
    export(model, scheduler, folder, 3, compiled=False)
    return model, scheduler, folder


def test_exported_files_agree(exported):
    differences = check_parity(*exported, 3)
    assert "torch" in differences and max(differences.values()) < 1e-5


def test_parity_sees_a_wrong_schedule(exported, tmp_path):
    model, scheduler, folder = exported
    shutil.copytree(folder, tmp_path / "wrong")
    path = tmp_path / "wrong" / "schedule.json"
    schedule = json.loads(path.read_text())
    schedule["steps"][0]["c"] *= 1.01
    path.write_text(json.dumps(schedule))
    assert min(check_parity(model, scheduler, path.parent, 3).values()) > 1e-4


def test_parity_sees_lost_known_frames(exported, monkeypatch):
    """The largest difference counts, and only the inputs with known frames have one."""
    kept = runtime.given_frames

    def lost(schedule, x_T, known, known_mask):
        values, mask = kept(schedule, x_T, known, known_mask)
        return 0 * values, mask

    monkeypatch.setattr(runtime, "given_frames", lost)
    assert min(check_parity(*exported, 3).values()) > 1e-2


def test_the_folder_needs_nothing_of_ours(exported):
    code = (
        "import sys, numpy as np; from runtime import Sampler;"
        f"x = Sampler('.', 'torch')(np.zeros((2, {L}, 3)));"
        "print(x.shape, 'train_diffusion_ddim' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=exported[2], capture_output=True, text=True)
    assert done.stdout == f"(2, {L}, 3) False\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x_T": np.zeros((1, L + 1, 3))}, "x_T must be"),
        ({"known": np.zeros((1, L, 3))}, "given together"),
        ({"known_mask": np.zeros((1, L), bool)}, "given together"),
        ({"known": np.zeros((1, L, 3)), "known_mask": np.zeros((1, L))}, "known_mask bool"),
        ({"known": np.zeros((L, 3)), "known_mask": np.zeros((1, L), bool)}, "known must be"),
    ],
)
def test_arrays_that_do_not_fit(exported, arguments, words):
    sampler = runtime.Sampler(exported[2], "torch")
    with pytest.raises(ValueError, match=words):
        sampler(**{"x_T": np.zeros((1, L, 3))} | arguments)


def test_engines_that_are_not_here(exported, tmp_path):
    with pytest.raises(ValueError, match="torch"):
        runtime.Sampler(exported[2], "compiled")
    (tmp_path / "schedule.json").write_text("{}")
    with pytest.raises(ValueError, match="by nothing"):
        runtime.Sampler(tmp_path)


def test_known_frames_are_refused_where_they_cannot_be_read(exported):
    schedule = json.loads((exported[2] / "schedule.json").read_text()) | {"known_frames": False}
    x, mask = np.zeros((1, L, 3), np.float32), np.ones((1, L), bool)
    with pytest.raises(ValueError, match="takes no known frames"):
        runtime.ddim(lambda x_t, t: x_t, schedule, x, x, mask)


def test_the_command(straight_run, tmp_path, capsys):
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 0
    out = capsys.readouterr().out
    assert f"one gesture, {TINY['num_inference_steps']} steps" in out
    assert re.search(r"torch +[\d.]+ ms, largest difference \d\.\de[+-]\d\d", out)


@pytest.mark.parametrize("difference", [0.1, math.nan])
def test_an_export_that_differs_is_a_fault(straight_run, tmp_path, capsys, monkeypatch, difference):
    monkeypatch.setattr(command, "export", lambda *a, **k: None)
    monkeypatch.setattr(command, "report", lambda *a: {"torch": difference})
    assert main(["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]) == 1
    assert "differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--checkpoint": "nowhere"}, "nowhere"),
        ({"--output_dir": "here"}, "choose another"),
        ({"--output_dir": "here/file/x"}, "choose another"),
        ({"--num_inference_steps": "0"}, "num_inference_steps must be in"),
        ({"--num_inference_steps": "99"}, "num_inference_steps must be in"),
        ({"--num_inference_steps": "ten"}, "see --help"),
        ({"--steps": "3"}, "see --help"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, straight_run, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    given = {"--checkpoint": str(straight_run), "--output_dir": "exported"} | flags
    assert main([word for pair in given.items() for word in pair]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "exported").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, straight_run):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_denoiser", stop)
    folder = tmp_path / "x"
    assert main(["--checkpoint", str(straight_run), "--output_dir", str(folder)]) == 130
    assert not folder.exists()
