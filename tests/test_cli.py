"""The command line beyond its options: samples from a checkpoint, streams that fail, the terminal.

Why: `--sample` is how a user gets gestures out; they must be a function of the seed, in the format
that the loader reads, and never of weights that were trained for something else. And no terminal,
however poor, may cost a run.

    python -m pytest tests/test_cli.py
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LAST, ROOT, SCRIPT, L, make_gestures, python

import train_diffusion_ddim as tdd


@pytest.fixture(scope="module")
def pressing(straight_run, tmp_path_factory):
    """A checkpoint whose weights are so random that its samples press; the tiny run's are idle."""
    content = torch.load(straight_run / LAST, weights_only=True)
    torch.nn.init.normal_(content["ema_state_dict"]["output_projection.weight"])
    path = tmp_path_factory.mktemp("pressing") / LAST
    torch.save(content, path)
    return path


def sample(cli, checkpoint, folder, *argv, num=6):
    code, out, err = cli("--sample", num, "--checkpoint", checkpoint, "--output_dir", folder, *argv)
    assert code == 0 and err == "", err
    path = folder / "samples_actions.npy"
    assert str(path) in out
    return path


def test_samples_are_gestures_that_the_loader_reads(cli, pressing, tmp_path):
    path = sample(cli, pressing, tmp_path / "new" / "folder")
    x = tdd.DiffusionActionDataset(path.parent, L).sequences
    assert x.shape == (6, L, 3)
    assert set(np.unique(x[..., 2])) == {0, 1} and not x[x[..., 2] == 0].any()


def test_the_seed_decides(cli, pressing, tmp_path):
    def content(name, *argv):
        return sample(cli, pressing, tmp_path / name, *argv).read_bytes()

    first = content("a", "--seed", 3)
    assert content("b", "--seed", 3) == first
    assert content("c", "--seed", 4) != first
    assert content("d", "--seed", 3, "--num_inference_steps", 7) != first
    assert content("e", "--seed", 3, "--sampler", "ddim") != first
    assert content("f", "--seed", 3, "--eta", 0) != first


def test_known_frames_are_kept(cli, pressing, tmp_path, data):
    known = tdd.DiffusionActionDataset(data / "train", L).sequences[:6]
    for strategy in ("press_edges", "prefix"):
        flags = "--known_data_dir", data / "train", "--known_strategy", strategy, "--seed", 5
        path = sample(cli, pressing, tmp_path / strategy, *flags)
        torch.manual_seed(5)
        mask = tdd.KNOWN_STRATEGIES[strategy][0](torch.from_numpy(known)).numpy()
        x = np.load(path).reshape(6, L, 3)
        assert mask.any()
        np.testing.assert_allclose(x[mask], known[mask], atol=1e-6)
        assert not np.allclose(x[~mask], known[~mask], atol=0.01)


def test_mistakes_in_sampling(refused, cli, straight_run, tmp_path, data):
    args = ["--sample", 6, "--checkpoint", straight_run, "--output_dir", tmp_path]
    message = refused("--sample", 99, *args[2:], "--known_data_dir", data / "train")
    assert "10" in message and "99" in message
    assert "no/such" in refused(*args[:3], "no/such", *args[4:])
    assert "1001" in refused(*args, "--num_inference_steps", 1001)
    assert "--no_such" in refused(*args, "--no_such")
    assert cli(*args)[0] == 0
    assert "exists" in refused(*args)


@pytest.mark.parametrize("flag", [("--d_model", 32), ("--prediction_type", "x0")])
def test_a_flag_that_the_weights_contradict(refused, straight_run, tmp_path, flag):
    # The denoiser was trained for one prediction type: another would draw nonsense in silence.
    args = ["--sample", 2, "--checkpoint", straight_run, "--output_dir", tmp_path]
    message = refused(*args, *flag)
    assert flag[0] in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--checkpoint", "--output_dir", "--known_data_dir"])
def test_a_sampling_flag_without_sample_does_not_start_a_training(refused, flag):
    assert flag in refused(flag, "x")


def test_no_stdout_and_stderr_cost_lines_and_not_the_run(replace_package, tiny_flags, tmp_path):
    """Closed; the fault lab has them full, and a pipe that nobody reads. A warning is lost, too."""
    path = replace_package("matplotlib", "raise ImportError('no figures')")
    argv = [str(a) for a in tiny_flags(save_dir=tmp_path / "run", num_epochs=1)]
    shell = ["bash", "-c", '"$@" >&- 2>&-', "bash"]
    script = [sys.executable, str(ROOT / "train_diffusion_ddim.py")]
    env = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(path)}
    done = subprocess.run([*shell, *script, *argv], env=env)
    assert done.returncode == 0
    assert list((tmp_path / "run").glob("diffusion_checkpoint_epoch_*.pth"))


def test_help_speaks_ascii_to_a_terminal_without_greek():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_diffusion_ddim.py"), "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0 and done.stdout.isascii()


def test_an_ascii_terminal_is_enough(tmp_path, tiny_flags):
    flags = tiny_flags(num_epochs=1, save_dir=tmp_path / "run")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "DISPLAY": None}
    done = python(SCRIPT, *flags, **ascii_only, MPLBACKEND="TkAgg")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "figures").glob("*.png"))


def test_data_that_moves_while_idle_is_refused_unless_the_recipe_allows_it(
    refused, cli, no_figures, tiny_flags, tmp_path
):
    x_0 = make_gestures(4).numpy()
    x_0[0, 0, 0] = 0.5  # hovers
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a_actions.npy", x_0)
    flags = tiny_flags(save_dir=tmp_path / "run", data_dir=tmp_path / "data", num_epochs=1)
    assert "--no-augment" in refused(*flags, "--augment")
    code, _, err = cli(*flags, "--no-augment", "--no-contacts")
    assert code == 0, err
