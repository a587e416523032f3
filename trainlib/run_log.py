"""The record of a run: `metrics.jsonl`, tables, figures, and their W&B mirror.

Everything is written into the run folder first. What is optional (W&B, figures) can neither stop
nor change a run: its first fault is one warning.
"""

import io
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainlib.errors import BROKEN, check_choice, first_line, say
from trainlib.files import disk_faults_named, write_json, write_whole
from trainlib.provenance import provenance

WANDB_MODES = ("auto", "online", "offline", "disabled")
METRICS, TABLE = "metrics.jsonl", "reconstructions.jsonl"


class NullLogger:
    """The log of a process that keeps none: every call does nothing."""

    folder: Any = None  # Path of the run folder
    wandb_id: str | None = None

    def __enter__(self) -> "NullLogger":
        """Return itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Do nothing."""

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def figure(self, step: int, key: str, draw: Callable, *data: Any, **options: Any) -> None:
        """Do nothing."""

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Do nothing."""


class RunLogger(NullLogger):
    """The log of a run in `folder`.

    Args:
        folder: the run folder; made, with figures/, if missing.
        config: the options of the run, JSON values; config.json holds them and `provenance()`.
        name: of the W&B run.
        step: where the run stands; what the folder's logs hold beyond it is cut off, and so is
            what was logged after training.
        wandb_id: of the W&B run to continue.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        name: str = "",
        *,
        step: int = 0,
        wandb_id: str | None = None,
    ) -> None:
        self.folder, self.wandb, self.worker = folder, None, ThreadPoolExecutor(max_workers=1)
        self.draws = True
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp"):  # what a killed run was writing
            path.unlink()
        write_json(folder / "config.json", config | {"made_by": provenance()})
        for path in (folder / METRICS, folder / TABLE):
            _cut_back(path, step)
        mode = resolve_wandb_mode(config["wandb_mode"])
        if mode != "disabled":
            run: Any = {"project": config["wandb_project"], "name": name, "config": config}
            run |= {"dir": str(folder), "mode": mode, "id": wandb_id, "resume": "allow"}
            self.wandb = self._ask_wandb(lambda: _start_wandb(run))

    def __exit__(self, *_: Any) -> None:
        """Finish the W&B run; the files are whole already."""
        if self.wandb:
            self._ask_wandb(self.wandb.finish)

    @property
    def wandb_id(self) -> str | None:  # type: ignore[override]
        """The id of the W&B run, as text, so that a checkpoint can hold it; None without one."""
        wandb_id = getattr(self.wandb, "id", None)
        return None if wandb_id is None else str(wandb_id)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; a value that is not finite becomes null."""
        numbers = {k: v if isinstance(v, int) else float(v) for k, v in values.items()}
        row = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._append(METRICS, [{"step": step, **row}])
        self._mirror(step, lambda _: row)

    def figure(self, step: int, key: str, draw: Callable, *data: Any, **options: Any) -> None:
        """Save what `draw(*data, **options)` returns as figures/{key}_{step}.png, if it can be."""
        if not self.draws:
            return
        path = self.folder / "figures" / f"{key.replace('/', '_')}_{step:06d}.png"
        try:
            png = io.BytesIO()
            draw(*data, **options).savefig(png, format="png", dpi=80)
            write_whole(path, png.getvalue())
        except BROKEN as e:  # no matplotlib, or one that is broken in any way, or a full disk
            self.draws = False
            reason = f"{type(e).__name__}: {first_line(e)}"
            say(f"warning: no figures from here on ({reason})", err=True)
            return
        self._mirror(step, lambda wandb: {key: wandb.Image(str(path))})

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append the plan's reconstruction table to reconstructions.jsonl."""
        self._append(TABLE, [{"step": step, **row} for row in rows])
        columns, data = list(rows[0]), [list(row.values()) for row in rows]
        self._mirror(step, lambda wandb: {"val/reconstruction_table": wandb.Table(columns, data)})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with disk_faults_named(self.folder / name, len(text)), open(self.folder / name, "a") as f:
            f.write(text)

    def _ask_wandb(self, call: Callable[[], Any]) -> Any:
        """Return what W&B answers to a call; its first fault, or 30 s of silence, switch it off."""
        try:
            return self.worker.submit(call).result(timeout=30)
        except BROKEN as e:  # none may stop a run
            reason = "no answer in 30 s" if isinstance(e, TimeoutError) else first_line(e)
            say(f"warning: W&B is off from here on ({type(e).__name__}: {reason})", err=True)
            self.wandb = None

    def _mirror(self, step: int, content: Callable[[Any], dict[str, Any]]) -> None:
        """Log to W&B, if it is on, what `content` makes of the wandb module."""
        if run := self.wandb:
            import wandb

            self._ask_wandb(lambda: run.log(content(wandb), step=step))


def _start_wandb(run: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(**run, settings=wandb.Settings(init_timeout=20, silent=True))


def _cut_back(path: Path, step: int) -> None:
    """Cut off a half-written last line, what is beyond `step`, and scores of a finished run."""
    if path.exists():
        lines = [x for x in path.read_text("utf-8").splitlines() if x.endswith("}")]
        rows = [(x, json.loads(x)) for x in lines]
        kept = [x for x, row in rows if row["step"] <= step and "final/loss" not in row]
        write_whole(path, "".join(f"{x}\n" for x in kept).encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, or of a run folder's; without a half-written last one."""
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    return [json.loads(x) for x in path.read_text("utf-8").splitlines() if x.endswith("}")]


def asked_wandb_mode(mode: str) -> str:
    """Return the mode, in the place of "auto" that of WANDB_MODE; refuse an unknown one."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "auto"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        check_choice("WANDB_MODE", mode, WANDB_MODES)
    return mode


def resolve_wandb_mode(mode: str) -> str:
    """Turn "auto" into online, offline or disabled: WANDB_MODE, a login, a wandb that works."""
    mode = asked_wandb_mode(mode)
    if mode == "disabled":
        return mode
    try:
        import wandb
        from requests.utils import get_netrc_auth  # wandb brings it; its login writes ~/.netrc

        own = os.environ.get("WANDB_BASE_URL")
        hosts = [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]
    except BROKEN as e:  # not installed, or broken in any way
        reason = f"{type(e).__name__}: {first_line(e)}"
        say(f"warning: W&B is off, its package does not work ({reason})", err=True)
        return "disabled"
    if mode == "auto":
        has_login = os.environ.get("WANDB_API_KEY") or any(map(get_netrc_auth, hosts))
        mode = "online" if has_login else "offline"
    return mode
