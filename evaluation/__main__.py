"""The honest report of a checkpoint.

    python -m evaluation --checkpoint runs/x --data_dir diffusion_test_data/val --output_dir report

writes results.json, a CSV per protocol, report.md and three figures, and prints the main tables.
What is asked of the model: evaluation/protocols.py. What a file holds: evaluation/report.py.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation import figures, protocols, report
from evaluation.bayes import GesturePrior
from evaluation.controls import make_controls, untrained_model
from train_diffusion_ddim import (
    GESTURE_TYPES,
    DDIMScheduler,
    DiffusionActionDataset,
    OneLineParser,
    TrainConfig,
    UserError,
    classify_gestures,
    generate,
    has_press_edge,
    load_model,
    newest_checkpoint,
    pick_device,
    recreate,
)


@dataclass(frozen=True)
class Size:
    """How many sequences each protocol takes, at most; None = all."""

    validation: int | None
    generated: int
    ddim: int


FULL = Size(validation=None, generated=1000, ddim=200)
QUICK = Size(validation=64, generated=64, ddim=8)

CAPTIONS = {
    "recreated_gestures.png": "A typical gesture of each type, and the one recreated worst.",
    "denoise_curve.png": "The error of the model between the Bayes limit and doing nothing.",
    "generated_gestures.png": "Unconditional samples, not selected.",
}


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the data it is judged on; tensors are on the device, data units."""

    model: nn.Module
    raw_model: nn.Module
    untrained: nn.Module
    scheduler: DDIMScheduler
    config: TrainConfig
    sampling: dict[str, Any]
    x_val: Tensor
    x_train: Tensor
    prior: GesturePrior


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="python -m evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--data_dir", required=True, metavar="DIR", help="gestures to judge the model on")
    add("--output_dir", required=True, metavar="DIR", help="report folder; replaces its files")
    add("--train_data_dir", metavar="DIR", help="default: what the checkpoint was trained on")
    add("--num_inference_steps", type=int, default=10, metavar="N", help="default: 10")
    add("--quick", action="store_true", help="at most 64 gestures; wider intervals")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    return parser.parse_args(argv)


def load_subject(args: argparse.Namespace, size: Size) -> Subject:
    """Load and check everything that the protocols need.

    Raises:
        UserError: bad checkpoint, data, device or number of steps.
    """
    device = pick_device(args.device)
    model, scheduler, config = load_model(args.checkpoint, device)
    scheduler.timestep_pairs(args.num_inference_steps)  # raises before any work
    x_val = DiffusionActionDataset(args.data_dir, config.seq_len).sequences[: size.validation]
    train_data_dir = args.train_data_dir or config.data_dir
    if not Path(train_data_dir).is_dir():
        raise UserError(f"no training data in {train_data_dir}; set --train_data_dir")
    x_train = DiffusionActionDataset(train_data_dir, config.seq_len).sequences
    x_0 = torch.from_numpy(x_val).to(device)
    return Subject(
        model,
        load_model(args.checkpoint, device, ema=False)[0],
        untrained_model(config, device),
        scheduler,
        config,
        config.sampling | {"num_inference_steps": args.num_inference_steps},
        x_0,
        torch.from_numpy(x_train).to(device),
        protocols.read_prior(args.data_dir, x_0),
    )


def run_keyframes(s: Subject) -> tuple[dict[str, protocols.Table], Tensor]:
    """Recreate all validation gestures; return the tables and the model's recreations."""
    recreations = {
        "model": lambda x_0: recreate(s.model, s.scheduler, x_0, **s.sampling),
        "model_raw_weights": lambda x_0: recreate(s.raw_model, s.scheduler, x_0, **s.sampling),
        **make_controls(s.model, s.untrained, s.scheduler, s.x_train, s.sampling),
    }
    tables, recreated = protocols.keyframes(s.x_val, recreations)
    return tables, recreated["model"]


def run_denoise(s: Subject, size: Size) -> protocols.Table:
    """Denoise the gestures that the oracle knows; all, without the oracle, if it knows none."""
    linear = protocols.is_linear_gesture(s.x_val)
    known = bool(linear.any())
    return protocols.denoise(
        s.model,
        s.untrained,
        s.scheduler,
        s.x_val[linear] if known else s.x_val,
        s.x_train,
        prior=s.prior if known else None,
        num_inference_steps=s.sampling["num_inference_steps"],
        num_ddim=size.ddim,
    )


def run_generate(s: Subject, size: Size) -> tuple[protocols.Table, Tensor]:
    """Generate; return the table and the model's samples."""
    shape = (size.generated, *s.x_val.shape[1:])
    samples = {
        name: generate(model, s.scheduler, shape, **s.sampling)
        for name, model in {"model": s.model, "untrained_model": s.untrained}.items()
    }
    real = protocols.make_reference(s.x_train, s.x_val)
    return protocols.generate_table(samples, s.prior, real), samples["model"]


def pick_examples(x_0: Tensor, recreated: Tensor) -> tuple[Tensor, list[str]]:
    """Return rows to show: of each type the one of median error, and the worst of all."""
    error = ((x_0 - recreated) ** 2).mean(dim=(1, 2))
    error = torch.where(has_press_edge(x_0), error, -1.0)
    types = classify_gestures(x_0)
    rows, names = [], []
    for kind, name in enumerate(GESTURE_TYPES):
        of_kind = torch.nonzero((types == kind) & (error >= 0))[:, 0]
        if len(of_kind):
            rows.append(of_kind[error[of_kind].argsort()[len(of_kind) // 2]])
            names.append(figures.TYPE_LABELS[name])
    rows.append(error.argmax())
    names.append(f"the worst of {int((error >= 0).sum())}")
    return torch.stack(rows), names


def save_figures(
    s: Subject, folder: Path, recreated: Tensor, samples: Tensor, denoised: protocols.Table
) -> dict[str, str]:
    """Draw and save the figures; return their captions by file name."""
    steps = s.sampling["num_inference_steps"]
    rows, names = pick_examples(s.x_val, recreated)
    valid = protocols.validity(samples, s.prior)["valid"]
    drawn = {
        "recreated_gestures.png": figures.draw_recreated(
            s.x_val[rows].cpu(), recreated[rows].cpu(), names, steps
        ),
        "denoise_curve.png": figures.draw_denoise_curve(denoised, steps),
        "generated_gestures.png": figures.draw_generated(samples.cpu(), valid.cpu(), steps),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=110)
    return {name: CAPTIONS[name] for name in drawn}


def describe(args: argparse.Namespace, argv: list[str], s: Subject) -> dict[str, Any]:
    """Return the head of the report."""
    return {
        "checkpoint": str(newest_checkpoint(args.checkpoint)),
        "weights": "EMA; model_raw_weights: without",
        "parameters": sum(p.numel() for p in s.model.parameters()),
        "data_dir": args.data_dir,
        "train_data_dir": args.train_data_dir or s.config.data_dir,
        "validation_sequences": len(s.x_val),
        "sequences_without_edge": int((~has_press_edge(s.x_val)).sum()),
        "sequences_outside_the_oracles_family": int((~protocols.is_linear_gesture(s.x_val)).sum()),
        "sampling": s.sampling | {"spacing": s.config.spacing},
        "quick": args.quick,
        **report.describe_run(argv),
        "machine": report.describe_machine(s.x_val.device),
    }


def evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    """Do it all.

    Raises:
        UserError: bad input, or an output folder that cannot be written.
    """
    started, size = time.perf_counter(), QUICK if args.quick else FULL
    s = load_subject(args, size)
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
    except OSError as e:
        raise UserError(f"cannot write into --output_dir {folder} ({e}); choose another") from None

    tables, recreated = run_keyframes(s)
    tables["denoise"] = run_denoise(s, size)
    tables["generate"], samples = run_generate(s, size)
    verdicts = protocols.judge(tables["keyframes"]) if "keyframes" in tables else {}
    captions = save_figures(s, folder, recreated, samples, tables["denoise"])
    about = describe(args, argv, s) | {"wall_s": round(time.perf_counter() - started, 1)}
    report.write_report(folder, about, verdicts, tables, captions)
    print(report.summary(verdicts, tables))
    print(f"\n{about['wall_s']:.0f} s; all tables in {folder / 'report.md'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        evaluate(parse_args(argv), argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
