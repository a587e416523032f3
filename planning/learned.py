"""Learned world models: train them, measure how right they are, say what to do with them.

Planners in practice do not ask a simulator but a network, and an optimizer finds where a network
errs. There are two kinds, one that sees widgets (planning/surrogate.py) and one that sees tokens
(planning/predictor.py), learned from transitions of the hard simulator, drawn as they come: most
gestures change nothing. Of each there is a second one, from other weights and other transitions,
that can check what a planner made of the first.

    python -m planning.learned             # train what is missing, print how right they are
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planning.baselines import draw_at_changes
from planning.predictor import TokenPredictor
from planning.surrogate import SurrogateWorld, Transitions, draw_transitions
from planning.tasks import TASKS, judge, make_instances, model_cost
from planning.world import CENTRES, GRID, Scenes, State, WorldModel, as_tokens, observe
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import run_program, say
from trainlib.files import make_folder, write_json
from trainlib.muon import Muon
from trainlib.process import progress
from trainlib.provenance import describe_machine, provenance
from trainlib.tables import markdown_table

CACHE = Path(__file__).parent / "results" / "cache"
LR = 2e-3
SMALL, IDLE = 0.01, 10.0  # change of the tokens that counts by half; weight of none at all
HELD_OUT = 100  # seed of transitions and of instances that nothing was trained on
SELECT, TRUST, GRADIENT = "choose among draws", "gradient near draws", "gradient"
WORTH_NEAR, WORTH = 0.5, 0.9  # R² of change, from where a gradient is trusted near draws; anywhere


@dataclass(frozen=True)
class Recipe:
    """How to train a world model.

    Attributes:
        label: in tables.
        make: the network.
        num: transitions to learn from.
        steps: of AdamW, and of Muon for the matrices of a transformer's blocks.
        batch_size: transitions of a step.
    """

    label: str
    make: Callable[[], nn.Module]
    num: int
    steps: int
    batch_size: int = 256

    def reduced(self) -> "Recipe":
        """Return a recipe of seconds, for a look."""
        return Recipe(self.label, self.make, 200, 10, 32)


RECIPES = {
    "objects_15k": Recipe("objects, 15 k", SurrogateWorld, 15_000, 3000),
    "objects_60k": Recipe("objects, 60 k", SurrogateWorld, 60_000, 3000),
    "objects_240k": Recipe("objects, 240 k", SurrogateWorld, 240_000, 12_000),
    "tokens_60k": Recipe("tokens, 60 k", TokenPredictor, 60_000, 2800, 32),
}


def fit(recipe: Recipe, seed: int) -> nn.Module:
    """Train a world model from transitions of its own."""
    torch.manual_seed(seed)
    transitions = draw_transitions(recipe.num, seed, scenes=min(3000, recipe.num))
    model = recipe.make()
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, LR, weight_decay=1e-4)]
    optimizers += [Muon(matrices, LR, weight_decay=1e-4)] if matrices else []
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, recipe.steps) for optimizer in optimizers
    ]
    for _ in progress(range(recipe.steps), recipe.label):
        rows = torch.randint(0, recipe.num, (recipe.batch_size,))
        loss = _loss(model, transitions, rows)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def _loss(model: nn.Module, transitions: Transitions, rows: Tensor) -> Tensor:
    """Return the error of the change: squared of objects, Huber's of tokens.

    That of tokens is relative to the change that there was: a button covers a hundredth of the
    tokens of a list.
    """
    scenes, actions = transitions.scenes[rows], transitions.actions[rows]
    after = State(transitions.after.pos[rows], transitions.after.value[rows])
    if isinstance(model, TokenPredictor):
        now, then = observe(scenes, scenes.state), observe(scenes, after)
        error = F.smooth_l1_loss(model.after(scenes, actions), then, reduction="none")
        size = (then - now).abs().mean(dim=(1, 2))
        weight = torch.where(size > 0, 1 / (size + SMALL), IDLE)
        return (weight * error.mean(dim=(1, 2))).mean()
    assert isinstance(model, SurrogateWorld)
    change = [after.pos - scenes.pos, (after.value - scenes.value)[..., None]]
    return (model.change(scenes, actions) - torch.cat(change, dim=-1)).square().mean()


def load(name: str, seed: int = 0, folder: Path = CACHE, *, quick: bool = False) -> WorldModel:
    """Return a world model; what was trained once is kept in `folder`.

    Args:
        name: of RECIPES.
        seed: 0, or 1 for the one trained apart.
        folder: of the weights.
        quick: whether to train it for seconds only.
    """
    recipe = RECIPES[name].reduced() if quick else RECIPES[name]
    path = folder / f"{name}_{seed}{'_quick' * quick}.pt"
    if path.exists():
        model = recipe.make()
        model.load_state_dict(load_checkpoint(path)["model_state_dict"])
        model.eval().requires_grad_(False)
    else:
        began = time.process_time()
        model = fit(recipe, seed)
        seconds = time.process_time() - began
        save_checkpoint(path, {"model_state_dict": model.state_dict(), "cpu_s": seconds})
    return model.after if isinstance(model, TokenPredictor) else model


def cpu_seconds(name: str, seed: int, folder: Path, *, quick: bool = False) -> float:
    """Return the processor's seconds that training took."""
    path = folder / f"{name}_{seed}{'_quick' * quick}.pt"
    return float(load_checkpoint(path)["cpu_s"])


# ----------------------------------------------------------------------------------------
# ACCURACY
# ----------------------------------------------------------------------------------------


def accuracy(model: WorldModel, num: int = 2000, draws: int = 32) -> dict[str, float]:
    """Measure a world model on what it has not seen.

    Args:
        model: the world model.
        num: transitions.
        draws: gestures of an instance that are ranked.

    Returns:
        r2: 1 - squared error of the tokens / that of saying that nothing changes.
        changed: mean absolute error of the tokens of widgets that changed.
        identity: the same of saying that nothing changes.
        unchanged: that of widgets that did not change.
        auc: how often a gesture that solves an instance costs less than one that does not.
    """
    scenes, actions, after = draw_transitions(num, HELD_OUT, scenes=num)
    now, then = observe(scenes, scenes.state), observe(scenes, after)
    with torch.no_grad():
        predicted = as_tokens(scenes, model(scenes, actions))
    is_changed = (after.pos != scenes.pos).any(-1) | (after.value != scenes.value)  # (N, W)
    cover = (_covered(scenes, scenes.state) | _covered(scenes, after)).float()  # (N, W, GRID²)
    error, change = ((x - then).abs().mean(dim=-1) for x in (predicted, now))  # (N, GRID²)
    of_widget, identity = (
        (cover @ e[..., None])[..., 0] / cover.sum(dim=-1) for e in (error, change)
    )
    moved = (now - then).square().sum()
    return {
        "r2": float(1 - (predicted - then).square().sum() / moved),
        "changed": float(of_widget[is_changed].mean()),
        "identity": float(identity[is_changed].mean()),
        "unchanged": float(of_widget[~is_changed].mean()),
        "auc": ranking_auc(model, max(1, num // 200), draws),
    }


def _covered(scenes: Scenes, state: State) -> Tensor:
    """Return which tokens widgets cover, (N, W, GRID²) bool; at least the one at their centre."""
    half = scenes.half.clamp(min=0.5 / GRID)
    inside = (CENTRES - state.pos[..., None]).abs() <= half[..., None]  # (N, W, 2, GRID)
    return (inside[..., 1, :, None] & inside[..., 0, None, :]).flatten(2)


def ranking_auc(model: WorldModel, num: int, draws: int) -> float:
    """Return how well costs rank gestures by success: the area under the ROC curve.

    The mean over `num` instances of every task that some of the draws at token changes solve and
    others do not; NaN if there is none.
    """
    found: list[float] = []
    for task in TASKS:
        instances, rng = make_instances(task, num, HELD_OUT), np.random.default_rng(HELD_OUT)
        tokens = observe(instances.scenes, instances.scenes.state)
        told = {"tokens": tokens, "goal_tokens": instances.goal_tokens}
        actions = draw_at_changes(num, draws, rng, **told)
        with torch.no_grad():
            costs = model_cost(instances, model)(actions)
        solved = torch.stack([judge(instances, actions[:, k]) for k in range(draws)], dim=1)
        pairs = [(c[s], c[~s]) for c, s in zip(costs, solved, strict=True)]
        found += [auc(low, high) for low, high in pairs if len(low) and len(high)]
    return float(np.mean(found)) if found else float("nan")


def auc(low: Tensor, high: Tensor) -> float:
    """Return how often a number of `low` is below one of `high`; ties count half."""
    less, same = low[:, None] < high, low[:, None] == high
    return float((less.double() + same.double() / 2).mean())


def advice(r2: float) -> str:
    """Say from the R² of change whether gradients are worth their evaluations.

    The bounds were set before the benchmark ran, from a trial on another network.
    """
    return GRADIENT if r2 >= WORTH else TRUST if r2 >= WORTH_NEAR else SELECT


COLUMNS = {
    "r2": "R² of change",
    "changed": "error, changed",
    "identity": "if nothing changed",
    "unchanged": "error, unchanged",
    "auc": "AUC of ranking",
}


def accuracy_table(measured: Mapping[str, Any]) -> str:
    """Return a row per world model: how right it is, and the rule's advice."""
    rows = [
        [
            RECIPES[name].label,
            *(f"{row[c]:.3f}" for c in COLUMNS),
            f"{row['cpu_s']:.0f}",
            advice(row["r2"]),
        ]
        for name, row in measured.items()
    ]
    return markdown_table(["world model", *COLUMNS.values(), "CPU seconds", "rule"], rows)


def made_where() -> dict[str, Any]:
    """Return when, where and from which commit results are made; not the path of the checkout."""
    made = provenance() | {"machine": describe_machine()}
    return {key: value for key, value in made.items() if key != "argv"}


def measure(
    names: Iterable[str], path: Path, folder: Path = CACHE, *, quick: bool = False
) -> dict[str, dict[str, Any]]:
    """Train what is missing in `folder`, measure what is missing in the file `path`; return it."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in [n for n in names if n not in known]:
        model = load(name, 0, folder, quick=quick)
        seconds = cpu_seconds(name, 0, folder, quick=quick)
        found = accuracy(model, *((60, 8) if quick else ()))
        known[name] = found | {"cpu_s": seconds, "seed": 0} | made_where()
        write_json(path, known)
    return known


def main(argv: list[str] | None = None) -> int:
    """Train and measure the world models that are named, by default all; return the exit code."""
    names = (sys.argv[1:] if argv is None else argv) or list(RECIPES)

    def run() -> None:
        torch.set_num_threads(1)
        make_folder(CACHE)
        say(accuracy_table(measure(names, CACHE.parent / "accuracy.json")))

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main())
