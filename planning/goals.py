"""Planners that were trained with goals: hindsight-relabelled pairs of (now, then) and gesture.

    python -m planning.goals --checkpoint runs/RUN --output_dir runs/goals
    python -m planning.goals --checkpoint runs/RUN --output_dir runs/goals --data_dir data/goals

A gesture of the true generator does something to a scene; what it did is afterwards called the
goal (Andrychowicz et al., arXiv:1707.01495). From such pairs learn: a regression to the gesture; a
regression to its six parameters, at a fixed time; and the denoiser, started from a trained one,
whose context is what that regression answers: where the gesture begins and ends, on average. (Given
the tokens instead, it hardly learnt to use them.) A look-up takes the nearest goal. With --data_dir
the gestures and their goals are also kept as a data set, train/ and val/, for the trainer's
--context_dim.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planning.optimizers import shoot_then_refine
from planning.planner import with_goal
from planning.search import Objective, descend, normal, ramp, to_ramp
from planning.surrogate import draw_transitions
from planning.tasks import UNCHANGED, Instances
from planning.world import FEATURES, GRID, Scenes, State, observe
from train_diffusion_ddim import (
    DDIMScheduler,
    MinimalDiffusionTransformer,
    load_model,
    to_gesture,
    train_loop,
)
from trainlib.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, write_json
from trainlib.gesture_files import write_context, write_gestures
from trainlib.gestures import PRESSED, SEQ_LEN
from trainlib.process import progress
from trainlib.tensors import in_batches

ENDS = 4  # x, y of touch-down and of lift-off
TOUCH_DOWN = 110  # the frame where all gestures begin that the denoiser learns with goals
KEPT = 3  # of the FEATURES of a token, by a fixed random projection
CONTEXT_DIM = 2 * KEPT * GRID**2
CHUNK = 1000
HOLD_OUT = 10  # of as many pairs of the data set, one is for validation


def _reduction() -> Tensor:
    generator = torch.Generator().manual_seed(20170705)
    return torch.randn(FEATURES, KEPT, generator=generator) / FEATURES**0.5


REDUCTION = _reduction()


def goal_context(tokens: Tensor, goal_tokens: Tensor) -> Tensor:
    """Describe (now, then) as one vector: reduced tokens, and their change; (N, CONTEXT_DIM)."""
    now, change = tokens @ REDUCTION, (goal_tokens - tokens) @ REDUCTION
    return torch.cat([now.flatten(1), 2 * change.flatten(1)], dim=1)


def context_of(instances: Instances) -> Tensor:
    """Return the context of each instance, (N, CONTEXT_DIM)."""
    return goal_context(observe(instances.scenes, instances.scenes.state), instances.goal_tokens)


def hindsight_pairs(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `num` pairs of context, (num, CONTEXT_DIM), and gesture, (num, L, 3).

    Gestures that changed nothing are left out; about a fifth of those drawn remain.
    """
    contexts: list[Tensor] = []
    gestures: list[Tensor] = []
    while sum(map(len, gestures)) < num:
        scenes, actions, after = draw_transitions(20 * CHUNK, seed + len(gestures), scenes=2400)
        moved = torch.linalg.vector_norm(after.pos - scenes.pos, dim=-1) > UNCHANGED
        moved |= (after.value - scenes.value).abs() > UNCHANGED
        rows = moved.any(dim=1).nonzero()[:, 0]
        gestures.append(actions[rows])
        contexts.append(_contexts(scenes[rows], State(after.pos[rows], after.value[rows])))
    return torch.cat(contexts)[:num], torch.cat(gestures)[:num]


def _contexts(scenes: Scenes, after: State) -> Tensor:
    return goal_context(observe(scenes, scenes.state), observe(scenes, after))


# ----------------------------------------------------------------------------------------
# LEARNERS
# ----------------------------------------------------------------------------------------


def make_regression(out_features: int, width: int = 256) -> nn.Sequential:
    """Return an MLP from the context to `out_features` numbers."""
    return nn.Sequential(
        nn.Linear(CONTEXT_DIM, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_features),
    )  # fmt: skip


def train_regression(
    context: Tensor, target: Tensor, steps: int, seed: int = 0, batch_size: int = 256
) -> nn.Sequential:
    """Fit target, (N, F), by mean squared error."""
    torch.manual_seed(seed)
    model = make_regression(target.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in progress(range(steps), "regression"):
        rows = torch.randint(0, len(target), (batch_size,))
        loss = (model(context[rows]) - target[rows]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def canonical(gestures: Tensor) -> Tensor:
    """Return where gestures begin and end, (N, ENDS): their time does not matter to the goal."""
    return to_ramp(gestures)[:, [0, 1, 3, 4]]


def at_fixed_time(ends: Tensor) -> Tensor:
    """Return the six parameters of gestures of 60 ms from their ends, (..., ENDS) → (..., 6)."""
    begin, end = ends.clamp(0, 1).split(2, dim=-1)
    times = torch.tensor([0.44, 0.56]).expand(*ends.shape[:-1], 2)
    return torch.cat([begin, times[..., :1], end, times[..., 1:]], dim=-1)


def to_fixed_time(gestures: Tensor) -> Tensor:
    """Shift gestures, (N, L, 3), in time, so that all touch down at TOUCH_DOWN."""
    first = (gestures[..., 2] > PRESSED).int().argmax(dim=1)
    frames = torch.arange(SEQ_LEN) - TOUCH_DOWN + first[:, None]  # of the gesture as it was
    inside = (frames >= 0) & (frames < SEQ_LEN)
    frames = frames.clamp(0, SEQ_LEN - 1)[..., None].expand_as(gestures)
    return gestures.gather(1, frames) * inside[..., None]


def as_goal(ends: Tensor) -> Tensor:
    """Scale ends, (N, ENDS), data units, to a goal vector of about unit variance."""
    return 4 * (ends - 0.5)


def train_denoiser(
    checkpoint: Path, goal: Tensor, gestures: Tensor, epochs: int, save_dir: Path
) -> None:
    """Train the denoiser of `checkpoint` further with goals, through the script's own loop."""
    plain, scheduler, config = load_model(checkpoint)
    config = replace(
        config, context_dim=ENDS, augment=False, allow_overlap=True, num_epochs=epochs,
        save_every=epochs, save_dir=str(save_dir), wandb_mode="disabled", lr=1e-3,
        known_share=0.05, device="cpu",
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = MinimalDiffusionTransformer(**{**plain.options, "context_dim": ENDS})
    model.load_state_dict(plain.state_dict(), strict=False)
    train_loop(model, scheduler, gestures, gestures[:64], config, context=goal)


@dataclass
class GoalPolicy:
    """What was trained on goals.

    Attributes:
        model, scheduler, sampling: the denoiser, whose goal is `as_goal(to_ends_net(context))`.
        to_gesture_net: context → (N, L·3).
        to_ends_net: context → (N, ENDS).
        context, gestures: the pairs themselves, for the look-up.
    """

    model: MinimalDiffusionTransformer
    scheduler: DDIMScheduler
    sampling: dict
    to_gesture_net: nn.Module
    to_ends_net: nn.Module
    context: Tensor
    gestures: Tensor

    def sample(self, context: Tensor, K: int, rng: np.random.Generator, scale: float) -> Tensor:
        """Draw K gestures for each goal, (I, CONTEXT_DIM) → (I, K, L, 3)."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

        def draw(rows: Tensor) -> Tensor:
            shape = (len(rows), SEQ_LEN, 3)
            model = with_goal(self.model, rows, scale)
            return self.scheduler.sample(model, shape, "cpu", **self.sampling, generator=generator)

        goal = as_goal(self.to_ends_net(context))
        drawn = in_batches(draw, goal.repeat_interleave(K, dim=0))
        return to_gesture(drawn).unflatten(0, (len(context), K))


def cfg_ddim(
    objective: Objective,
    rng: np.random.Generator,
    policy: GoalPolicy,
    context: Tensor,
    *,
    num: int = 8,
    scale: float = 1.0,
    refine: bool = False,
    lr: float = 0.03,
    reach: float | None = None,
) -> None:
    """Draw `num` gestures for the goal and keep the best, perhaps after Adam steps on the ramp."""
    drawn = policy.sample(context, num, rng, scale)
    order = objective(drawn).argsort(dim=1)[:, :3]
    if refine:
        best = drawn[torch.arange(objective.num)[:, None], order]
        descend(objective, to_ramp(best), ramp, lr, reach=reach)


def regress_gesture(
    objective: Objective, rng: np.random.Generator, policy: GoalPolicy, context: Tensor
) -> None:
    """Answer with the regression to the gesture."""
    objective(policy.to_gesture_net(context).view(-1, 1, SEQ_LEN, 3).clamp(0, 1))


def regress_ends(
    objective: Objective,
    rng: np.random.Generator,
    policy: GoalPolicy,
    context: Tensor,
    *,
    refine: bool = False,
    lr: float = 0.03,
) -> None:
    """Answer with the regression to the six parameters, perhaps after Adam steps from there."""
    z = at_fixed_time(policy.to_ends_net(context))[:, None]
    if refine:
        descend(objective, z, ramp, lr)
    else:
        objective(ramp(z))


def regress_jitter(
    objective: Objective,
    rng: np.random.Generator,
    policy: GoalPolicy,
    context: Tensor,
    *,
    spread: float = 0.1,
    method: Callable[..., None] = shoot_then_refine,
    **settings: Any,
) -> None:
    """Let a method draw gestures around the regression's six parameters, N(0, spread²).

    The first draw is the regression's own answer.
    """
    z = at_fixed_time(policy.to_ends_net(context))[:, None]

    def draw(num: int, K: int, rng: np.random.Generator) -> Tensor:
        noise = spread * normal((num, K, 6), rng)
        noise[..., [2, 5]] = 0  # their time does not matter to the goal
        noise[:, 0] *= float(objective.used > 0)
        return ramp((z + noise).clamp(0, 1))

    method(objective, rng, draw, **settings)


def nearest_goal(
    objective: Objective,
    rng: np.random.Generator,
    policy: GoalPolicy,
    context: Tensor,
    num: int = 8,
) -> None:
    """Evaluate the gestures of the `num` nearest training goals."""
    found = torch.cdist(context, policy.context).topk(num, dim=1, largest=False).indices
    objective(policy.gestures[found])


# ----------------------------------------------------------------------------------------
# COMMAND
# ----------------------------------------------------------------------------------------


def write_split(folder: Path, goal: Tensor, gestures: Tensor, notes: dict[str, Any]) -> None:
    """Write goals, (N, ENDS), and gestures, (N, L, 3), in the format that the trainer reads."""
    size = {"num_sequences": len(goal), "sequence_length": SEQ_LEN, "sequences_per_file": 1000}
    write_gestures(folder, notes | size, lambda: (lambda rows: gestures[rows].numpy(), {}))
    write_context(folder, goal.numpy())


def write_dataset(folder: Path, goal: Tensor, gestures: Tensor, notes: dict[str, Any]) -> None:
    """Write train/ and val/; every tenth pair is held out."""
    held_out = torch.arange(len(goal)) % HOLD_OUT == 0
    for split, rows in (("train", ~held_out), ("val", held_out)):
        write_split(folder / split, goal[rows], gestures[rows], notes | {"split": split})
    say(
        f"data set in {folder}; train on it: python train_diffusion_ddim.py "
        f"--context_dim {ENDS} --no-augment --data_dir {folder / 'train'} "
        f"--val_data_dir {folder / 'val'}"
    )


def train_all(args: argparse.Namespace) -> None:
    """Draw the pairs and train everything; leaves a run folder, the regressions and the pairs."""
    folder = make_folder(args.output_dir)
    began, seconds = time.perf_counter(), {}
    context, gestures = hindsight_pairs(args.pairs, seed=1)
    seconds["pairs"] = time.perf_counter() - began
    nets = {}
    for name, target in (("gesture", gestures.flatten(1)), ("ends", canonical(gestures))):
        start = time.perf_counter()
        nets[name] = train_regression(context, target, args.steps)
        save_checkpoint(folder / f"{name}.pt", {"model_state_dict": nets[name].state_dict()})
        seconds[name] = time.perf_counter() - start
    goal, shifted = as_goal(nets["ends"](context)), to_fixed_time(gestures)
    if args.data_dir:
        write_dataset(
            Path(args.data_dir), goal, shifted, {"pairs": args.pairs, "steps": args.steps}
        )
    start = time.perf_counter()
    train_denoiser(args.checkpoint, goal, shifted, args.epochs, folder)
    seconds["denoiser"] = time.perf_counter() - start
    np.save(folder / "context.npy", context.half().numpy())
    np.save(folder / "gestures.npy", gestures.half().numpy())
    write_json(folder / "seconds.json", seconds)
    say(f"seconds: { {k: round(v) for k, v in seconds.items()} }")


def load_policy(folder: Path) -> GoalPolicy:
    """Load what `train_all` left.

    Raises:
        UserError: it is not there.
    """
    if not (folder / "seconds.json").exists():
        raise UserError(
            f"no goal-trained models in {folder}; train them: "
            f"python -m planning.goals --checkpoint runs/RUN --output_dir {folder}"
        )
    model, scheduler, config = load_model(folder)
    nets = []
    for name, width in (("gesture", SEQ_LEN * 3), ("ends", ENDS)):
        net = make_regression(width)
        net.load_state_dict(load_checkpoint(folder / f"{name}.pt")["model_state_dict"])
        nets.append(net.eval().requires_grad_(False))
    context, gestures = (
        torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)).float()
        for name in ("context", "gestures")
    )
    return GoalPolicy(model, scheduler, config.sampling, nets[0], nets[1], context, gestures)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; UserError for options that cannot be."""
    parser = OneLineParser(prog="python -m planning.goals", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="denoiser to start from")
    add("--output_dir", required=True, metavar="DIR", help="where to keep it all")
    add("--data_dir", metavar="DIR", help="also write the pairs as a data set, into a new folder")
    add("--pairs", type=int, default=24_000, metavar="N", help="default: 24000")
    add("--epochs", type=int, default=5, metavar="N", help="of the denoiser; default: 5")
    add("--steps", type=int, default=4000, metavar="N", help="of a regression; default: 4000")
    args = parser.parse_args(argv)
    for name, least in (("pairs", 2), ("epochs", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def run(args: argparse.Namespace) -> None:
    """Check what is there, then train."""
    torch.set_num_threads(1)
    args.checkpoint = newest_checkpoint(args.checkpoint)
    load_checkpoint(args.checkpoint)  # raises before any work
    if args.data_dir and any(make_folder(args.data_dir, "--data_dir").iterdir()):
        raise UserError(f"--data_dir {args.data_dir} is not empty; choose another")
    train_all(args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
