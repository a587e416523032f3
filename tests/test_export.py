"""The exported denoiser samples what the trained one samples.

Why: a planner that runs an export trusts that nothing was lost on the way. The numpy loop of
export/runtime.py is written apart from the scheduler, so each checks the other.

    python -m pytest tests/test_export.py
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, L

import train_diffusion_ddim as tdd
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


def test_the_folder_needs_nothing_of_ours(exported):
    code = (
        "import sys, numpy as np; from runtime import Sampler;"
        f"x = Sampler('.', 'torch')(np.zeros((2, {L}, 3)));"
        "print(x.shape, 'train_diffusion_ddim' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=exported[2], capture_output=True, text=True)
    assert done.stdout == f"(2, {L}, 3) False\n", done.stderr


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["--checkpoint", "nowhere", "--output_dir", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "x").exists()
