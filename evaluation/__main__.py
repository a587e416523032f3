"""The honest report of a checkpoint.

    python -m evaluation --checkpoint runs/x --data_dir diffusion_test_data/val --output_dir report

writes report.html, results.json, a CSV per table, report.md and figures, and prints the verdict.
What is asked of the model: evaluation/protocols.py. What a file holds: evaluation/report.py.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evaluation import evidence, page, protocols, report, verdicts
from evaluation.controls import untrained_model
from evaluation.estimates import Table
from evaluation.sections import FULL, PARTS, QUICK, Findings, Size, Subject
from train_diffusion_ddim import DiffusionActionDataset, has_press_edge, load_model
from trainlib.checkpoint import load_checkpoint, newest_checkpoint
from trainlib.errors import OneLineParser, UserError
from trainlib.process import pick_device
from trainlib.run_log import WANDB_MODES, resolve_wandb_mode


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
    add("--data_dir", metavar="DIR", help="gestures to judge on; default: the run's val_data_dir")
    add(
        "--output_dir", metavar="DIR", help="files are replaced; default: report/ in the run folder"
    )
    add("--train_data_dir", metavar="DIR", help="default: what the checkpoint was trained on")
    add("--num_inference_steps", type=int, default=10, metavar="N", help="default: 10")
    add("--quick", action="store_true", help="at most 64 gestures; wider intervals")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    add("--wandb_mode", default="disabled", choices=WANDB_MODES, help="default: disabled")
    add("--wandb_project", metavar="NAME", help="default: that of the checkpoint's run")
    return parser.parse_args(argv)


def make_folder(args: argparse.Namespace) -> Path:
    """Return the report's folder, made if missing.

    Raises:
        UserError: it cannot be written.
    """
    beside = newest_checkpoint(args.checkpoint).parent / "report"
    folder = Path(args.output_dir or beside)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
    except OSError as e:
        raise UserError(f"cannot write into --output_dir {folder} ({e}); choose another") from None
    return folder


def load_subject(args: argparse.Namespace, size: Size) -> Subject:
    """Load and check everything that the parts need; fill in the folders that args leave open.

    Raises:
        UserError: bad checkpoint, data, device or number of steps.
    """
    device = pick_device(args.device)
    model, scheduler, config = load_model(args.checkpoint, device)
    scheduler.timestep_pairs(args.num_inference_steps)  # raises before any work
    args.data_dir = args.data_dir or config.val_data_dir
    args.train_data_dir = args.train_data_dir or config.data_dir
    x_val = DiffusionActionDataset(args.data_dir, config.seq_len).sequences[: size.validation]
    if not Path(args.train_data_dir).is_dir():
        raise UserError(f"no training data in {args.train_data_dir}; set --train_data_dir")
    x_train = DiffusionActionDataset(args.train_data_dir, config.seq_len).sequences
    x_0 = torch.from_numpy(x_val).to(device)
    return Subject(
        (newest_checkpoint(args.checkpoint).parent, make_folder(args)),
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


def describe(args: argparse.Namespace, argv: list[str], s: Subject) -> dict[str, Any]:
    """Return the head of the report."""
    return {
        "checkpoint": str(newest_checkpoint(args.checkpoint)),
        "weights": "EMA; model_raw_weights: without",
        "parameters": sum(p.numel() for p in s.model.parameters()),
        "data_dir": args.data_dir,
        "train_data_dir": args.train_data_dir,
        "validation_sequences": len(s.x_val),
        "sequences_without_edge": int((~has_press_edge(s.x_val)).sum()),
        "sequences_outside_the_oracles_family": int((~protocols.is_linear_gesture(s.x_val)).sum()),
        "sampling": s.sampling | {"spacing": s.config.spacing},
        "quick": args.quick,
        **report.describe_run(argv),
        "machine": report.describe_machine(s.x_val.device),
    }


def other_evidence(args: argparse.Namespace, s: Subject, found: Findings) -> dict[str, Table]:
    """Return the tables that only the verdict needs: training, program, gpu."""
    keyframes = found.tables.get("keyframes", {})
    tables = {
        "training": evidence.training_table(args.checkpoint),
        "program": evidence.program_table(s.model, s.x_val, keyframes),
        "denoise_lines": evidence.denoise_lines(found.tables.get("denoise", {})),
    }
    if s.x_val.is_cuda:
        tables["gpu"] = evidence.gpu_table(
            s.model, s.scheduler, s.x_train[:256], s.config, s.sampling
        )
    return tables


def evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    """Do it all.

    Raises:
        UserError: bad input, or an output folder that cannot be written.
    """
    started, size = time.perf_counter(), QUICK if args.quick else FULL
    wandb_mode = resolve_wandb_mode(args.wandb_mode)  # a wrong one is refused before any work
    s = load_subject(args, size)
    folder = s.folders[-1]
    found, seconds = Findings(), {}
    for part in PARTS:
        began = time.perf_counter()
        part(s, size, found)
        seconds[part.__name__.removeprefix("run_")] = round(time.perf_counter() - began, 1)
        print(f"{list(seconds)[-1]:12} {list(seconds.values())[-1]:6.1f} s", flush=True)
    found.other_tables |= other_evidence(args, s, found)
    judged = verdicts.judge(found.tables)
    judged += verdicts.judge_generated(found.tables.get("generate", {}), s.generated)
    rows = verdicts.headlines(found.tables, judged)
    recreations: list[dict[str, Any]] = []
    replay = None
    if found.recreated is not None:
        epoch = load_checkpoint(args.checkpoint)["epoch"]
        recreations = report.reconstruction_rows(s.x_val, found.recreated, epoch)
        replay = page.make_replay(s.model, s.scheduler, s.x_val, found.recreated, s.sampling)
    about = describe(args, argv, s) | {"seconds": seconds}
    about["wall_s"] = round(time.perf_counter() - started, 1)
    summary = verdicts.summarise(judged, rows)
    if args.quick:
        summary.append(f"A quick look at {len(s.x_val)} gestures: the intervals are wide.")
    whole = report.Report(
        about, summary, rows, judged, found.sections, found.other_tables,
        recreations,
    )  # fmt: skip
    report.write_report(folder, whole)
    path = page.write_page(folder, whole, replay)
    report.log_to_wandb(whole, folder, wandb_mode, args.wandb_project or s.config.wandb_project)
    print(f"\n{report.to_text(whole)}\n\n{time.perf_counter() - started:.0f} s; all of it: {path}")


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
