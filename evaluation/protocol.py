"""What a protocol is: a question to a checkpoint, with the answer measured, drawn and worded.

A protocol is a function `run(subject, **size)` that returns sections. evaluation/protocols/ holds
one file for each, and the table of all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from augmentation.click_aug import Recipe
from evaluation.bayes import GesturePrior
from evaluation.controls import LIMITS, is_control
from evaluation.estimates import Table
from evaluation.family import is_linear_gesture
from train_diffusion_ddim import DDIMScheduler, TrainConfig, recreate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the data it is judged on; tensors are on the device, data units.

    Attributes:
        checkpoint: the file.
        folders: where other commands may have left what the report reads, most likely first.
        model: with the weights that are judged.
        raw_model: with those that training goes on from.
        untrained: the same network before training.
        scheduler: of all three.
        config: of the run.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
        x_val: (B, L, C).
        x_train: (N, L, C).
        prior: the distribution of the gestures; None where it is not known (`read_prior`).
        recipe: how x_val was drawn; None where its dataset.json does not say.
        x_unseen: real windows that nobody trained on, of the people trained on where there are
            any, and in their natural proportions, (M, L, C); None if x_val are they.
        x_others: the same of other people, (M', L, C); None if there are none beside x_unseen.
    """

    checkpoint: Path
    folders: tuple[Path, ...]
    model: nn.Module
    raw_model: nn.Module
    untrained: nn.Module
    scheduler: DDIMScheduler
    config: TrainConfig
    sampling: dict[str, Any]
    x_val: Tensor
    x_train: Tensor
    prior: GesturePrior | None
    recipe: Recipe | None = None
    x_unseen: Tensor | None = None
    x_others: Tensor | None = None

    @property
    def unseen(self) -> Tensor:
        """Real windows to hold generated ones against, (M, L, C)."""
        return self.x_val if self.x_unseen is None else self.x_unseen

    @cached_property
    def recreated(self) -> Tensor:
        """x_val recreated from its press edges, (B, L, C)."""
        return recreate(self.model, self.scheduler, self.x_val, **self.sampling)

    @cached_property
    def linear(self) -> Tensor:
        """The gestures of x_val that the Bayes oracle knows, (n, L, C)."""
        return self.x_val[is_linear_gesture(self.x_val)] if self.prior else self.x_val[:0]

    @property
    def oracle(self) -> tuple[Tensor, GesturePrior | None]:
        """The gestures that the oracle knows with their prior; all and None if it knows none."""
        return (self.linear, self.prior) if len(self.linear) else (self.x_val, None)

    @property
    def num_inference_steps(self) -> int:
        """The steps that the model is judged with."""
        return self.sampling["num_inference_steps"]


class Picture:
    """A figure, the file that it is saved to, and one line that says what it shows.

    It is drawn, as `draw(*data)`, when the report is written: nothing is measured with matplotlib.
    """

    def __init__(self, name: str, caption: str, draw: Callable[..., "Figure"], *data: Any) -> None:
        self.name, self.caption, self.draw, self.data = name, caption, draw, data

    @property
    def figure(self) -> "Figure":
        """The figure, drawn again each time."""
        return self.draw(*self.data)


@dataclass(frozen=True)
class Section:
    """A table of a protocol, and how a reader is shown it.

    Attributes:
        name: its key in results.json, and the stem of its CSV.
        table: all that was measured.
        title: a heading; without one the table is judged and written, but not shown.
        text: what is asked, and what the limit is.
        columns: metric -> heading of the metrics that are shown at once; the others are folded
            away. All are, where the figures say it.
        first: heading of the settings.
        pictures: its figures.
        claims: rows of a table in words, each heading -> cell.
        limits: the settings that are limits, or how their names begin.
        judged: the setting that the criteria are about.
    """

    name: str
    table: Table
    title: str = ""
    text: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    first: str = ""
    pictures: Sequence[Picture] = ()
    claims: Sequence[Mapping[str, str]] = ()
    limits: tuple[str, ...] = LIMITS
    judged: str = "model"

    def kind(self, setting: str) -> str:
        """Return whose row it is: "model", "control" or "limit"; "" where all are the model's."""
        if not any(name.startswith("model") for name in self.table):
            return ""
        if setting.startswith(self.limits):
            return "limit"
        return "control" if is_control(setting, self.limits) else "model"

    @property
    def shown(self) -> dict[str, str]:
        """The columns of metrics that were measured."""
        measured = {name for row in self.table.values() for name in row}
        return {name: heading for name, heading in self.columns.items() if name in measured}

    @property
    def other_metrics(self) -> list[str]:
        """The metrics that `columns` leaves out, in their order."""
        metrics = {name: None for row in self.table.values() for name in row}
        return [name for name in metrics if name not in self.columns]


@dataclass(frozen=True)
class Protocol:
    """A row of the table of protocols.

    Attributes:
        name: of its file, and of its time in results.json.
        run: the function of a Subject that returns its sections; its other arguments are sizes.
        full: sizes of a whole report.
        quick: sizes of a quick look.
    """

    name: str
    run: Callable[..., Sequence[Section]]
    full: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
