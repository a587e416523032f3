"""A run in its folder: the lock, the log, the signals, what is saved when, how a step fails."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainlib.checkpoint import (
    CHECKPOINT_NAME,
    find_checkpoints,
    fitting,
    newest_valid,
    save_checkpoint,
)
from trainlib.errors import UserError, first_line, say
from trainlib.knobs import changed
from trainlib.memory import memory_named
from trainlib.process import locked_folder, process_rank
from trainlib.run_log import METRICS, NullLogger, RunLogger, asked_wandb_mode
from trainlib.state import TrainState


def refuse_early(config: Any, resume: dict[str, Any] | None) -> None:
    """Raise, before any data is read, the UserErrors of `open_run`; leave nothing behind.

    In use is the one thing that a folder may still become.
    """
    asked_wandb_mode(config.wandb_mode)
    if not config.save_dir:
        return
    folder = Path(config.save_dir)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise UserError(f"cannot write into --save_dir {folder} ({e}); choose another") from None
    check_is_free(folder, resume)


def check_is_free(folder: Path, resume: dict[str, Any] | None) -> None:
    """Raise UserError if a folder holds a run that is not resumed."""
    if resume is None and ((folder / METRICS).exists() or find_checkpoints(folder)):
        raise UserError(f"{folder} holds a run; add --resume or choose another --save_dir")


@contextmanager
def open_run(state: TrainState, name: str, resume: dict[str, Any] | None) -> Iterator[NullLogger]:
    """Hold a run's folder, log and stop signal; the processes behind the first have no log.

    Args:
        state: the run; its config names the folder (save_dir "" = a new one under runs/, which
            it names from then on) and the W&B options.
        name: for the new folder and for W&B.
        resume: the checkpoint that it continues; {} = there may be a run in the folder; None =
            there must be none.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a run that is not resumed.
    """
    if process_rank()[0]:
        with state.stop.caught():
            yield NullLogger()
        return
    folder = Path(state.config.save_dir) if state.config.save_dir else free_folder(name)
    with locked_folder(folder):
        check_is_free(folder, resume)
        state.config = replace(state.config, save_dir=str(folder))
        where: dict[str, Any] = {"step": state.step, "wandb_id": (resume or {}).get("wandb_id")}
        with RunLogger(folder, asdict(state.config), name, **where) as log, state.stop.caught():
            yield log


def free_folder(name: str) -> Path:
    """Make a new folder under runs/, named by the time; another one for each of several starts."""
    base = f"runs/{time.strftime('%Y%m%d-%H%M%S')}_{name}"
    for number in range(1, 1000):
        folder = Path(base if number == 1 else f"{base}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as e:
            raise UserError(f"cannot make {folder} ({e}); give --save_dir") from None
        return folder
    raise UserError(f"{base} and its like exist; give --save_dir")


def save_if_due(state: TrainState, log: NullLogger) -> None:
    """At a step's edge save what is due; if a signal asks any process for it, save and stop.

    KeyboardInterrupt carries the signal's number. Weights that are not finite are never saved.
    """
    stop = state.stop.agreed(state.device)
    every = max(1, round(state.config.save_every * state.steps_per_epoch))
    if log.folder and (stop or state.step % every == 0 or state.step == state.total_steps):
        if not all(p.isfinite().all() for p in state.model.parameters()):
            raise FloatingPointError(f"weights are not finite at step {state.step}; lower --lr")
        epoch = (state.step - 1) // state.steps_per_epoch
        path = log.folder / CHECKPOINT_NAME.format(epoch)
        save_checkpoint(path, state.to_checkpoint(epoch, log.wandb_id))
    if stop:
        raise KeyboardInterrupt(stop)


@contextmanager
def failures_named(config: Any, batch: Tensor) -> Iterator[None]:
    """Give what ends a step, on these gestures, the words that an error line needs."""
    try:
        with memory_named(f"--batch_size {config.batch_size}"):
            yield
    except FloatingPointError as e:
        gestures = ", ".join(map(str, batch.tolist()))
        raise FloatingPointError(f"{e}; the batch was gestures {gestures}") from None
    except (MemoryError, UserError):
        raise
    except Exception as e:
        if not config.compile:
            raise
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"--compile does not work here ({reason}); add --no-compile") from None


def config_of(content: dict[str, Any], config_class: type) -> Any:
    """Return the config of a loaded checkpoint; UserError if this version has no such run."""
    with fitting(content["path"]):
        return config_class(**({"shapes": 0, "curve_steps": 0} | content["config"]))  # older runs


def resume_run(
    config_class: type, given: dict[str, Any], path: str, fixed: Iterable[str]
) -> tuple[Any, dict[str, Any]]:
    """Return the config of a resumed run, its own but for what is given, and its checkpoint.

    None and {} where `path` is the given save_dir and holds no run yet. UserError if one of the
    `fixed` options is given another value.
    """
    path = path or given.get("save_dir", "")
    if not path:
        raise UserError("--resume needs a PATH, or a --save_dir to look in")
    if path == given.get("save_dir") and not find_checkpoints(path):
        say(f"note: nothing to resume in {path}; starting from the beginning")
        return None, {}
    content = newest_valid(path)
    folder = content["path"].parent
    saved = replace(config_of(content, config_class), save_dir=str(folder))
    config = changed(saved, given, fixed, content["path"])
    if bool(config.distill) != bool(saved.distill):
        raise UserError(
            f"a run is a student from its first step; --resume {path} without --distill"
        )
    other = Path(config.save_dir)
    if (other / METRICS).exists() and not other.samefile(folder):
        raise UserError(f"{other} holds another run; choose a new --save_dir")
    for name in ("lr", "seed", "num_epochs"):
        if getattr(config, name) != getattr(saved, name):
            change = f"--{name} {getattr(saved, name)} -> {getattr(config, name)}"
            say(f"warning: {change}: not the run that was interrupted", err=True)
    return config, content
