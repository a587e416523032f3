"""Options: converted to their type or refused in one line, by every door.

Why: a config is made by a command line, a notebook, a sweep with NumPy scalars, or a checkpoint.
What is not of the declared type would end in a traceback, or in a checkpoint that nothing can load.

    python -m pytest tests/test_knobs.py
"""

import argparse
import io
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import train_diffusion_ddim as tdd
from train_diffusion_ddim import TrainConfig
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import UserError
from trainlib.knobs import Knobs, add_flags, changed, checked, flag, knobs_of
from trainlib.state import TrainState


class Kind(str, Enum):  # noqa: UP042, whose members print as their names
    LETTER = "y"


class Number(IntEnum):
    THREE = 3


@dataclass(frozen=True, kw_only=True)
class Options(Knobs):
    """One option of each kind."""

    text: str = flag("a", "any text")
    size: int = flag(4, "a size", low=1)
    rate: float = flag(0.5, "a share", low=0, high=1)
    on: bool = flag(True, "a switch")
    kind: str = flag("x", "one of two", choices=("x", "y"))


TAKEN = {
    # name: (option, value, what it becomes)
    "NumPy integer": ("size", np.int64(3), 3),
    "NumPy unsigned byte": ("size", np.uint8(200), 200),
    "array of no dimensions": ("size", np.array(3), 3),
    "tensor of an integer": ("size", torch.tensor(3), 3),
    "NumPy double": ("rate", np.float64(0.25), 0.25),
    "NumPy single": ("rate", np.float32(0.25), 0.25),
    "NumPy half": ("rate", np.float16(0.25), 0.25),
    "integer for a number": ("rate", 1, 1.0),
    "NumPy integer for a number": ("rate", np.int32(1), 1.0),
    "array of no dimensions for a number": ("rate", np.array(0.25), 0.25),
    "tensor for a number": ("rate", torch.tensor(0.25), 0.25),
    "tensor for a switch": ("on", torch.tensor(False), False),
    "fraction": ("rate", Fraction(1, 4), 0.25),
    "member of an enumeration": ("kind", Kind.LETTER, "y"),
    "member for an integer": ("size", Number.THREE, 3),
    "NumPy bool": ("on", np.bool_(False), False),
    "path": ("text", Path("a/b"), "a/b"),
    "NumPy text": ("text", np.str_("abc"), "abc"),
    "NumPy text of a choice": ("kind", np.str_("y"), "y"),
}
REFUSED = {
    # name: (option, value, words of the message)
    "None": ("size", None, ["integer", "None"]),
    "None for text": ("text", None, ["text", "None"]),
    "None for a switch": ("on", None, ["True or False"]),
    "text for an integer": ("size", "3", ["integer", "'3'"]),
    "text for a number": ("rate", "0.5", ["number", "'0.5'"]),
    "text for a switch": ("on", "no", ["True or False", "'no'"]),
    "number for an integer": ("size", 3.0, ["integer", "3.0"]),
    "NumPy number for an integer": ("size", np.float64(3), ["integer", "float64"]),
    "switch for an integer": ("size", True, ["integer", "True"]),
    "switch for a number": ("rate", np.bool_(True), ["number"]),
    "integer for a switch": ("on", 1, ["True or False", "1"]),
    "integer for text": ("text", 3, ["text", "3"]),
    "bytes for text": ("text", b"a", ["text"]),
    "a null byte": ("text", "a\0b", ["text"]),
    "tensor of a switch for an integer": ("size", torch.tensor(True), ["integer"]),
    "tensor without numbers": ("rate", torch.empty((), device="meta"), ["number"]),
    "list": ("size", [3], ["integer", "[3]"]),
    "array": ("rate", np.array([0.5, 0.5]), ["number", "array"]),
    "complex": ("rate", 0.5 + 0j, ["number"]),
    "decimal": ("rate", Decimal("0.5"), ["number", "Decimal"]),
    "a huge integer": ("size", 10**400, ["[1, 2.14748e+09]", "1329 bits"]),
    "one of too many digits": ("size", -(10**5000), ["[1, 2.14748e+09]"]),
    "the same for text": ("text", 10**5000, ["text"]),
    "the same for a number": ("rate", 10**5000, ["number"]),
    "an integer of 32 bits and one": ("size", 2**31, ["[1, 2.14748e+09]"]),
    "a huge fraction": ("rate", Fraction(10**400), ["number"]),
    "below": ("size", np.int64(0), ["[1, 2.14748e+09]", "got 0"]),
    "above": ("rate", np.float64(1.5), ["[0, 1]", "got 1.5"]),
    "NaN": ("rate", np.float32("nan"), ["[0, 1]", "nan"]),
    "infinite": ("rate", float("inf"), ["[0, 1]", "inf"]),
    "no choice": ("kind", "z", ["x, y", "'z'"]),
    "something long": ("size", "9" * 10_000, ["integer", "..."]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_values_of_a_kind_become_plain(name):
    option, value, expected = TAKEN[name]
    made = getattr(Options(**{option: value}), option)
    assert type(made) is type(expected) and made == expected


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_another_kind_are_refused_in_one_line(name):
    option, value, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        Options(**{option: value})
    message = str(error.value)
    assert message.startswith(f"--{option} must be ") and "\n" not in message
    assert len(message) < 200 and all(word in message for word in words), message


def test_every_option_of_the_trainer_refuses_what_it_is_not():
    for f in fields(TrainConfig):
        for value in (None, object(), [f.default], {}, 1j):
            if value is None and f.default is None:  # undecided
                continue
            with pytest.raises(UserError, match=f"--{f.name} must be"):
                TrainConfig(**{f.name: value})


def test_what_is_undecided_is_left_to_the_constructor():
    def build(augment=False, lr=0.5):
        pass

    assert knobs_of(build, TrainConfig(lr=1.0)) == {"lr": 1.0}
    assert knobs_of(build, TrainConfig(lr=1.0, augment=True)) == {"lr": 1.0, "augment": True}


def test_a_config_of_numpy_scalars_is_saved_and_loaded(tiny_config, tmp_path):
    """The checkpoint of a run that was configured by a sweep."""
    decided = {"augment": False, "sigma_min": 0.01, "max_contacts": 2, "shapes": 4}
    plain = tiny_config(**decided, curve_steps=0)
    kinds = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}
    strange = {name: kinds[type(value)](value) for name, value in asdict(plain).items()}
    config = TrainConfig(**strange)
    assert config == plain
    state = TrainState(tdd.build_model(config), tdd.build_scheduler(config), config, 2, 1)
    save_checkpoint(tmp_path / "diffusion_checkpoint_epoch_0.pth", state.to_checkpoint(0))
    assert tdd.load_model(tmp_path)[2] == plain
    assert all(type(v) in kinds for v in load_checkpoint(tmp_path)["config"].values())


def test_the_command_line_is_made_of_the_options():
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_flags(parser, Options)
    argv = "--text b --size 7 --rate 0.25 --no-on --kind y".split()
    given = vars(parser.parse_args(argv))
    assert given == {"text": "b", "size": 7, "rate": 0.25, "on": False, "kind": "y"}
    assert vars(parser.parse_args([])) == {}
    text = io.StringIO()
    parser.print_help(text)
    for f in fields(Options):
        assert f"{f.metadata['help']} (default: {f.default})" in text.getvalue()


def test_what_a_file_fixes_is_refused_with_both_values():
    saved = Options(size=4, kind="y")
    assert changed(saved, {"size": np.int64(4), "rate": 1.0}, ["size"], "f") == Options(
        size=4, kind="y", rate=1.0
    )
    with pytest.raises(UserError, match=r"--size contradicts the content of f: 4 -> 5"):
        changed(saved, {"size": 5}, ["size", "kind"], "f")
    with pytest.raises(UserError, match="--size must be"):
        changed(saved, {"size": 0}, [], "f")


def test_options_by_the_names_of_arguments():
    def build(size, kind="x", *, other=3):
        """Take two of the options."""

    assert knobs_of(build, Options(size=9)) == {"size": 9, "kind": "x"}


def test_a_checked_value_is_plain_and_in_its_range():
    assert type(checked("n", np.int64(3), int, low=1)) is int
    with pytest.raises(UserError, match=r"n must be in \[1, 5\], got 6"):
        checked("n", 6, int, low=1, high=5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tdd.DDIMScheduler(1000.0), "num_timesteps must be an integer"),
        (lambda: tdd.DDIMScheduler("1000"), "num_timesteps must be an integer"),
        (lambda: tdd.DDIMScheduler(beta_end=None), "beta_end must be a number"),
        (lambda: tdd.DDIMScheduler(beta_schedule=None), "beta_schedule must be text"),
        (lambda: tdd.DDIMScheduler(clip_sample=1), "clip_sample must be True or False"),
        (lambda: tdd.MinimalDiffusionTransformer(d_model=8.0), "d_model must be an integer"),
        (lambda: tdd.MinimalDiffusionTransformer(dropout="0"), "dropout must be a number"),
        (lambda: tdd.MinimalDiffusionTransformer(adaln=None), "adaln must be True or False"),
    ],
)
def test_constructors_refuse_other_types_too(build, words):
    with pytest.raises(UserError, match=words):
        build()


def test_what_is_built_of_numpy_scalars_keeps_plain_options():
    """They go into the checkpoint of the run, which must load."""
    scheduler = tdd.DDIMScheduler(np.int64(100), np.float32(1e-3), clip_sample=np.True_)
    model = tdd.MinimalDiffusionTransformer(d_model=np.int64(8), nhead=np.uint8(2))
    for options in (scheduler.options, model.options):
        assert {type(value) for value in options.values()} <= {bool, int, float, str}
