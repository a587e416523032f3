"""The honest report of a checkpoint.

    python -m evaluation --checkpoint runs/x --data_dir diffusion_test_data/val --output_dir report

writes report.html, results.json, a CSV per table, report.md and figures, and prints the verdict.
What is asked of the model: evaluation/protocols/. What a file holds: evaluation/report.py.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaluation import page, recorded, report
from evaluation.controls import untrained_model
from evaluation.criteria import OTHER, STRAIGHT, headlines, judge, limits_of, summarise
from evaluation.family import is_linear_gesture, read_prior, read_recipe
from evaluation.protocol import Section, Subject
from evaluation.protocols import PROTOCOLS
from evaluation.recorded import read_recorded
from evaluation.replay import make_replay
from train_diffusion_ddim import DiffusionActionDataset, has_press_edge, load_model
from trainlib.checkpoint import load_checkpoint, newest_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder
from trainlib.metrics import recreation_rows
from trainlib.process import DEVICES, pick_device, timer
from trainlib.provenance import describe_machine
from trainlib.run_log import WANDB_MODES, resolve_wandb_mode

QUICK_GESTURES = 64


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m evaluation", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--data_dir", metavar="DIR", help="gestures to judge on; default: the run's val_data_dir")
    add(
        "--output_dir", metavar="DIR", help="files are replaced; default: report/ in the run folder"
    )
    add("--train_data_dir", metavar="DIR", help="default: what the checkpoint was trained on")
    add("--num_inference_steps", type=int, default=10, metavar="N", help="default: 10")
    add("--quick", action="store_true", help="at most 64 gestures; wider intervals")
    names = [protocol.name for protocol in PROTOCOLS]
    add("--only", nargs="+", choices=names, metavar="PROTOCOL", help=f"of {', '.join(names)}")
    add("--device", default="auto", choices=DEVICES, help="default: auto")
    add("--wandb_mode", default="disabled", choices=WANDB_MODES, help="default: disabled")
    add("--wandb_project", metavar="NAME", help="default: that of the checkpoint's run")
    return parser.parse_args(argv)


def load_subject(args: argparse.Namespace) -> Subject:
    """Load and check everything that the protocols need; fill in the folders that args leave open.

    Raises:
        UserError: bad checkpoint, data, device or number of steps, or a folder that cannot be
            written.
    """
    device = pick_device(args.device)
    checkpoint = newest_checkpoint(args.checkpoint)
    model, scheduler, config = load_model(checkpoint, device)
    scheduler.timestep_pairs(args.num_inference_steps)  # raises before any work
    args.data_dir = args.data_dir or config.val_data_dir
    args.train_data_dir = args.train_data_dir or config.data_dir
    num = QUICK_GESTURES if args.quick else None
    sequences = DiffusionActionDataset(args.data_dir, config.seq_len).sequences
    if not Path(args.train_data_dir).is_dir():
        raise UserError(f"no training data in {args.train_data_dir}; set --train_data_dir")
    x_train = DiffusionActionDataset(args.train_data_dir, config.seq_len).sequences
    prior = read_prior(args.data_dir, torch.from_numpy(sequences))
    x_val, unseen, others, args.about_data = sequences[:num], None, None, ""
    if prior is None:
        given = args.data_dir, args.train_data_dir, num
        x_val, unseen, others, args.about_data = read_recorded(sequences, *given)
    on_device = [None if x is None else torch.from_numpy(x).to(device) for x in (unseen, others)]
    folder = make_folder(args.output_dir or checkpoint.parent / "report")
    return Subject(
        checkpoint=checkpoint,
        folders=(checkpoint.parent, folder),
        model=model,
        raw_model=load_model(checkpoint, device, ema=False)[0],
        untrained=untrained_model(config, device),
        scheduler=scheduler,
        config=config,
        sampling=config.sampling | {"num_inference_steps": args.num_inference_steps},
        x_val=torch.from_numpy(x_val).to(device),
        x_train=torch.from_numpy(x_train).to(device),
        prior=prior,
        recipe=read_recipe(args.data_dir, config.seq_len) if prior else None,
        x_unseen=on_device[0],
        x_others=on_device[1],
    )


def describe(args: argparse.Namespace, argv: list[str], s: Subject) -> dict[str, Any]:
    """Return the head of the report."""
    return {
        "checkpoint": str(s.checkpoint),
        "weights": "EMA; model_raw_weights: without",
        "training_seed": s.config.seed,
        "parameters": sum(p.numel() for p in s.model.parameters()),
        "data_dir": args.data_dir,
        "train_data_dir": args.train_data_dir,
        "validation_sequences": len(s.x_val),
        "sequences_without_edge": int((~has_press_edge(s.x_val)).sum()),
        "distribution": "known, straight" if s.prior else "not known",
        "sequences_outside_the_oracles_family": int((~is_linear_gesture(s.x_val)).sum()),
        "sampling": s.sampling | {"spacing": s.config.spacing},
        "quick": args.quick,
        **report.describe_run("evaluation", argv),
        "machine": describe_machine(s.x_val.device),
    }


def run_protocols(
    s: Subject, *, quick: bool, only: Sequence[str] | None = None
) -> tuple[list[Section], dict[str, float]]:
    """Run every protocol, or `only` some; return what they found, and the seconds each took."""
    if s.prior and not len(s.linear):
        say(
            "note: no gesture is of the family that the Bayes oracle knows; its limits are left out"
        )
    sections: list[Section] = []
    seconds = {}
    for protocol in PROTOCOLS:
        if only and protocol.name not in only:
            continue
        passed = timer(s.x_val.device)
        sections += protocol.run(s, **(protocol.quick if quick else protocol.full))
        if s.prior is None:
            sections = [replace(x, limits=limits_of(OTHER, x.limits)) for x in sections]
        seconds[protocol.name] = round(passed(), 1)
        say(f"{protocol.name:12} {seconds[protocol.name]:6.1f} s")
    return sections, seconds


def evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    """Load, run the protocols, judge, and write the report.

    Raises:
        UserError: bad input, or an output folder that cannot be written.
    """
    wandb_mode = resolve_wandb_mode(args.wandb_mode)  # a wrong one is refused before any work
    passed = timer()
    s = load_subject(args)
    sections, seconds = run_protocols(s, quick=args.quick, only=args.only)
    tables = {section.name: section.table for section in sections}
    settings = {section.name: section.judged for section in sections}
    data = STRAIGHT if s.prior else OTHER
    verdicts, rows = judge(tables, settings, data=data), headlines(tables, settings, data)
    if s.prior:
        summary = summarise(verdicts, rows)
    else:
        summary = recorded.summarise(args.about_data, tables, settings)
    if args.only:
        total = len(verdicts)
        verdicts = [v for v in verdicts if v.criterion.table in tables]
        only = f"Only {', '.join(args.only)}: {len(verdicts)} of {total} criteria."
        summary = [only, args.about_data] if args.about_data else [only]
    if args.quick:
        summary.append(f"A quick look at {len(s.x_val)} gestures: the intervals are wide.")
    epoch = load_checkpoint(s.checkpoint)["epoch"]
    rows_shown = has_press_edge(s.x_val) | (s.prior is not None)  # without an edge nothing is given
    paired = s.x_val[rows_shown], s.recreated[rows_shown]
    recreations = recreation_rows(*paired, epoch) if rows_shown.any() else []
    replay = make_replay(s.model, s.scheduler, s.x_val, s.recreated, s.sampling)
    times = {"seconds": seconds, "wall_s": round(passed(), 1)}
    about = describe(args, argv, s) | times
    found = report.Report(about, summary, rows, verdicts, sections, recreations)
    folder = s.folders[-1]
    found = report.write_report(folder, found)
    path = page.write_page(folder, found, replay)
    project = args.wandb_project or s.config.wandb_project
    report.log_to_wandb(found, folder, wandb_mode, project)
    say(f"\n{report.to_text(found)}\n\n{passed():.0f} s; all of it: {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see `run_program` for what it returns."""
    argv = sys.argv[1:] if argv is None else argv
    return run_program(lambda: evaluate(parse_args(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
