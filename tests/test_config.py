"""Every knob is declared once, becomes a flag, and refuses what cannot work in one line.

Why: a mistake must cost the user seconds, not a finished run; and `--help`, TrainConfig and
config.json must agree.

    python -m pytest tests/test_config.py
"""

import inspect
import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
from conftest import ROOT, SCRIPT, as_flags, python

import train_diffusion_ddim as tdd
from train_diffusion_ddim import TrainConfig, parse_args
from trainlib.errors import UserError
from trainlib.knobs import kind_of
from trainlib.process import pick_device

EXTRA_FLAGS = {
    *("help", "preset", "resume"),
    *("sample", "checkpoint", "output_dir", "known_data_dir", "known_strategy"),
}
PLAN_FLAGS = (
    "data_dir val_data_dir batch_size num_epochs lr d_model num_layers nhead wandb_project "
    "save_dir device"
).split()

BAD_VALUES = [
    *(("lr", value) for value in ("0", "-1e-3", "nan", "inf", "-inf", "1e400", "fast")),
    *(("batch_size", value) for value in ("0", "-2", "2.5", "nan", "")),
    *(("d_model", value) for value in ("0", "-8", "30")),
    *(("nhead", value) for value in ("0", "5", "-2")),
    *(("num_layers", value) for value in ("0", "-1")),
    *(("patch_size", value) for value in ("0", "3", "251")),
    *(("seq_len", value) for value in ("0", "1")),
    *(("dropout", value) for value in ("-0.1", "1", "nan")),
    *(("num_timesteps", value) for value in ("0", "1", "-5", "9")),
    *(("num_inference_steps", value) for value in ("0", "-1", "1001")),
    *(("eta", value) for value in ("-0.5", "1.5", "nan")),
    *(("known_share", value) for value in ("-0.1", "1.1")),
    *((name, "-1") for name in ("seed", "dim_feedforward", "context_dim")),
    *((name, "0") for name in ("save_every", "log_interval", "num_epochs")),
    *((name, "best") for name in ("device", "beta_schedule", "prediction_type", "spacing")),
    *((name, "best") for name in ("sampler", "optimizer", "wandb_mode")),
]


def test_flags_are_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    options = re.findall(r"^  (?:-h, )?--(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert len(options) == len(set(options))
    assert set(options) == {f.name for f in fields(TrainConfig)} | EXTRA_FLAGS
    assert set(options) >= set(PLAN_FLAGS)


def test_every_field_has_help_and_survives_the_command_line():
    config = TrainConfig(
        augment=True, sigma_min=0.01, max_contacts=2, shapes=4, curve_steps=3, patch_size=5
    )  # by default these are None, by the data
    given = vars(parse_args(as_flags(**asdict(config))))
    assert TrainConfig(**given) == config
    for f in fields(TrainConfig):
        assert f.metadata["help"], f.name
        assert type(given[f.name]) is kind_of(f), f.name


def test_absent_flags_are_absent():
    assert vars(parse_args([])) == {}
    assert vars(parse_args(["--lr", "1e-3", "--no-adaln"])) == {"lr": 1e-3, "adaln": False}


def test_a_preset_is_flags_that_given_flags_win_over(monkeypatch):
    configs = []
    monkeypatch.setattr(tdd, "train", configs.append)
    for name in tdd.PRESETS:
        assert tdd.main(["--preset", name, "--lr", "0.5"]) == 0
    assert configs == [TrainConfig(**{**flags, "lr": 0.5}) for flags in tdd.PRESETS.values()]
    assert configs[1] == TrainConfig(lr=0.5)


def test_the_smoke_preset_trains_in_seconds(cli, tmp_path):
    code, out, err = cli("--preset", "smoke", "--num_epochs", 1, "--save_dir", tmp_path / "run")
    assert code == 0 and "epoch 1/1" in out, err


def test_the_default_run_has_data():
    config = TrainConfig()
    assert list((ROOT / config.data_dir).glob("*_actions.npy"))
    assert list((ROOT / config.val_data_dir).glob("*_actions.npy"))


def test_config_is_frozen_and_checked_again():
    config = TrainConfig()
    with pytest.raises(FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(UserError, match="-3"):
        replace(config, batch_size=-3)


def test_sampling_is_what_sample_takes():
    names = set(inspect.signature(tdd.DDIMScheduler.sample).parameters)
    config = TrainConfig(num_inference_steps=7, eta=0.5, sampler="ddim")
    assert set(config.sampling) <= names
    assert config.sampling["num_inference_steps"] == 7 and config.sampling["eta"] == 0.5


@pytest.mark.parametrize(("option", "value"), BAD_VALUES)
def test_bad_values_are_one_line_before_any_data_is_read(refused, tmp_path, option, value):
    nothing = tmp_path / "no_such_folder"
    message = refused("--data_dir", nothing, "--save_dir", tmp_path / "run", f"--{option}", value)
    assert f"--{option}" in message and str(nothing) not in message
    assert "unrecognized" not in message
    if value not in ("1e400", "-1e-3", "-inf"):  # the last looks like an option
        assert value in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_inference_steps", "11", "--num_timesteps", "10"], ["11", "10"]),
        (["--context_dim", "2", "--augment"], ["--no-augment"]),
        (["--seq_len", "249", "--patch_size", "5"], ["--patch_size", "5", "249"]),
        (["--curve_steps", "8", "--no-contacts"], ["--curve_steps 8", "--contacts"]),
        (["--contacts", "--prediction_type", "v"], ["--contacts", "got v", "--no-contacts"]),
        (["--d_model", "32", "--nhead", "5"], ["--nhead", "32", "5"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--d_mod", "32"], ["--d_mod"]),  # no guessing
        (["stray"], ["stray"]),
        (["--lr"], ["--lr"]),
        (["--resume"], ["--save_dir"]),
        (["--sample", "4"], ["--checkpoint"]),
        (["--sample", "0", "--checkpoint", "x", "--output_dir", "y"], ["N >= 1"]),
        (["--data_dir", "no/such/folder", "--device", "cpu"], ["no/such/folder"]),
    ],
)
def test_mistakes_name_what_to_fix(refused, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    message = refused(*argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_never_silently_becomes_cpu(refused, tmp_path):
    message = refused("--device", "cuda", "--save_dir", tmp_path / "run")
    assert "--device cpu" in message
    assert pick_device("auto") == torch.device("cpu")


def test_a_bogus_wandb_mode_of_the_environment(refused, monkeypatch, tiny_flags, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    assert "bogus" in refused(*tiny_flags(save_dir=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_python_callers_get_the_same_check(value):
    with pytest.raises(UserError, match="--lr"):
        TrainConfig(lr=value)
    assert issubclass(UserError, ValueError)


def test_from_a_shell(tmp_path):
    done = python(SCRIPT, "--nhead", "7", "--save_dir", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: --nhead .*7\n", done.stderr)
