"""The options of a program as a frozen dataclass: each declared once, checked by every door.

    @dataclass(frozen=True, kw_only=True)
    class Config(Knobs):
        lr: float = flag(1e-3, "peak learning rate", low=1e-12)

`Config(lr=...)` converts and checks, `add_flags(parser, Config)` makes the command line of it.
"""

import argparse
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any, get_args

from trainlib.errors import UserError, check_choice

LARGEST = 2**31 - 1  # of an integer whose range says no less


def flag(default: Any, help: str, **limits: Any) -> Any:
    """Declare an option: default, `--help` line, and its `choices` or its range `low`, `high`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Base of a config: every field becomes its declared type, or UserError says what it must be.

    So a config holds plain bool, int, float and str, whatever it was made from: a command line, a
    checkpoint, NumPy scalars, paths.
    """

    def __post_init__(self) -> None:
        """Convert and check every field; one whose default is None may stay undecided."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                value = checked(f"--{f.name}", value, kind_of(f), **f.metadata)
            object.__setattr__(self, f.name, value)


def kind_of(f: Field) -> Any:
    """Return the type of a field, K of one declared as K | None."""
    kinds = [kind for kind in get_args(f.type) if kind is not type(None)]
    return kinds[0] if kinds else f.type


def checked(name: str, value: Any, kind: Any, **limits: Any) -> Any:
    """Return `value` as a plain `kind`; UserError if it is none, or not in its range."""
    value = as_type(name, value, kind)
    check_range(name, value, **limits)
    return value


def as_type(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as a plain bool, int, float or str; UserError if it is nothing of the kind.

    NumPy scalars, and arrays and tensors without dimensions, are what they hold.
    """
    given = value
    try:
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        is_bool = isinstance(value, bool)
        if kind is bool and is_bool:
            return value
        if kind is int and not is_bool:
            return operator.index(value)
        if kind is float and not is_bool and isinstance(value, Real):
            return float(value)
        if kind is str:
            text = os.fspath(value)
            if isinstance(text, str) and "\0" not in text:
                return "".join(text)  # str() of a member of an enumeration may be its name
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    names = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
    raise UserError(f"{name} must be {names[kind]}, got {_shown(given)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # as of an integer of too many digits
        text = "one without text"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def check_range(
    name: str, value: Any, *, choices: Any = None, low: Any = None, high: Any = None, **_: Any
) -> None:
    """Raise UserError if a value is not one of `choices`, or not finite and in [low, high]."""
    if choices is not None:
        check_choice(name, value, choices)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low = -math.inf if low is None else low
        high = (LARGEST if isinstance(value, int) else math.inf) if high is None else high
        if not (low <= value <= high and abs(value) != math.inf):
            bits = value.bit_length() if isinstance(value, int) else 0
            got = f"one of {bits} bits" if bits > 1000 else f"{value:g}"
            raise UserError(f"{name} must be in [{low:g}, {high:g}], got {got}")


def add_flags(parser: Any, config: type[Knobs]) -> None:
    """Add a flag for each field; those not given are absent if the parser has SUPPRESS."""
    for f in fields(config):
        default, kind = "by the data" if f.default is None else f.default, kind_of(f)
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {default})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": f.metadata.get("choices")}
        parser.add_argument(f"--{f.name}", **options)


def options_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in the locals() of a constructor, as plain values of their types.

    UserError for a value that is nothing of its type. The constructor must use `super()`, which
    puts its class there.
    """
    declared = inspect.signature(given["__class__"]).parameters.values()
    return {p.name: as_type(p.name, given[p.name], p.annotation) for p in declared}


def knobs_of(constructor: Callable[..., Any], config: Any) -> dict[str, Any]:
    """Return the decided fields of `config` that have the name of an argument of `constructor`."""
    names, given = inspect.signature(constructor).parameters, asdict(config)
    return {k: value for k, value in given.items() if k in names and value is not None}


def changed(saved: Any, given: dict[str, Any], fixed: Iterable[str], path: Any) -> Any:
    """Return `saved` with what is given; UserError if that changes what the file `path` fixes."""
    config = replace(saved, **given)
    for name in fixed:
        before, now = getattr(saved, name), getattr(config, name)
        if now != before:
            change = f"--{name} contradicts the content of {path}: {before} -> {now}"
            raise UserError(f"{change}; drop the flag or start a new run")
    return config
