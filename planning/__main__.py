"""The planning benchmark: cost-only, learned-prior and goal-trained planners on the GUI world.

    python -m planning --checkpoint runs/RUN          # everything; goes on where it stopped
    python -m planning --quick                        # two minutes, a look at all parts
    python -m planning --stage learned --instances 20 # one stage alone

writes results.jsonl (a line per method, task and seed), accuracy.json (of the learned world
models), tuning.json, timing.json, base_rates.json and about.json into --output_dir; with --document
also the numbers and figures of docs/PLANNING.md and of the README's planning section.
"""

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from planning import benchmark as bench
from planning import document, learned
from planning.bank import kept_bank
from planning.diffusion import DiffusionPrior
from planning.goals import load_policy
from planning.methods import Method, cost_methods, goal_methods, prior_methods
from trainlib.checkpoint import newest_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, sha256_of, write_json, write_whole
from trainlib.gestures import SEQ_LEN
from trainlib.provenance import ROOT, describe_machine, provenance

RESULTS = Path(__file__).parent / "results"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m planning", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="denoiser; default: the newest run under runs/")
    add("--goals", metavar="DIR", help="what python -m planning.goals left; default: runs/goals")
    add("--output_dir", metavar="DIR", help="default: planning/results, or runs/planning_quick")
    add("--quick", action="store_true", help="10 instances, one seed, no tuning; under 2 minutes")
    add("--stage", nargs="+", choices=bench.STAGES, help="run these stages only")
    add("--instances", type=int, metavar="N", help="instead of each stage's own number")
    add("--only", nargs="+", metavar="METHOD", help="run these methods only")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch; default: 1")
    add("--replace", action="store_true", help="drop results of another checkpoint")
    add("--document", action="store_true", help="rewrite the tables and figures of the document")
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be, before any work."""
    if not (ROOT / "evaluation").is_dir():
        raise UserError("the benchmark is not installed with the planner; run it from a checkout")
    if args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    if args.instances is not None and args.instances < 1:
        raise UserError(f"--instances must be at least 1, got {args.instances}")
    if args.quick and args.document:
        raise UserError("--document shows the whole benchmark: drop it, or --quick")


def find_checkpoint(path: str | None) -> Path:
    """Return the checkpoint to use: the one given, else that of the newest run under runs/.

    What `planning.goals` left there is no such run.
    """
    if path:
        return newest_checkpoint(path)
    found = sorted(Path("runs").glob("*/diffusion_checkpoint_epoch_*.pth"))
    found = [file for file in found if not (file.parent / "seconds.json").exists()]
    if not found:
        raise UserError(
            "no --checkpoint given and none under runs/; train one first: "
            "python train_diffusion_ddim.py"
        )
    return newest_checkpoint(max(found, key=lambda p: p.stat().st_mtime).parent)


def claim_folder(folder: Path, checkpoint: Path, quick: bool, replace: bool) -> None:
    """Make the folder, or check that its results are of this checkpoint.

    Cost-only results do not depend on it and stay.

    Raises:
        UserError: it cannot be written, its results are of another size, or of another checkpoint
            and `replace` is not set.
    """
    make_folder(folder / "cache")
    digest = sha256_of(checkpoint)
    mark = folder / "checkpoint.json"
    rows_path = folder / "results.jsonl"
    claimed = json.loads(mark.read_text()) if mark.exists() else {}
    if claimed and claimed.get("quick", False) != quick:
        raise UserError(f"{folder} holds results of another size; choose another --output_dir")
    if claimed and claimed["sha256"] != digest:
        if not replace:
            raise UserError(
                f"{folder} holds results of another checkpoint; add --replace to drop them, or "
                "choose another --output_dir"
            )
        free = cost_methods()
        kept = [row for row in bench.read_rows(rows_path) if row["method"] in free]
        write_whole(rows_path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        for name in ("tuning.json", "timing.json"):
            if not (folder / name).exists():
                continue
            content = json.loads((folder / name).read_text())
            write_json(folder / name, {k: v for k, v in content.items() if k in free})
        for old in (folder / "cache").glob("*"):
            old.unlink()
    write_json(mark, {"path": checkpoint.name, "sha256": digest, "quick": quick})


def load_prior(checkpoint: Path) -> DiffusionPrior:
    """Load the denoiser.

    Raises:
        UserError: it cannot be read, or its gestures do not have 250 frames.
    """
    prior = DiffusionPrior.load(str(checkpoint))
    if prior.model.seq_len != SEQ_LEN:
        raise UserError(
            f"{checkpoint} draws {prior.model.seq_len} frames, the tasks take {SEQ_LEN}"
        )
    return prior


def known_methods(prior: DiffusionPrior, goals: str | None) -> dict[str, Method]:
    """Return all methods, those trained on goals if they are there."""
    methods = cost_methods() | prior_methods(prior)
    folder = Path(goals or "runs/goals")
    if goals or (folder / "seconds.json").exists():
        return methods | goal_methods(load_policy(folder))
    say(f"note: no goal-trained methods: nothing in {folder}; see planning.goals --help")
    return methods


def settings_of(folder: Path, methods: Mapping[str, Method], size: bench.Size) -> dict[str, Any]:
    """Return the settings of each method: tuned here, or as tuned for the committed results."""
    own = folder / "tuning.json"
    return bench.tune(methods, size, own if size.tuning or own.exists() else RESULTS / own.name)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Do it all."""
    check_options(args)
    torch.set_num_threads(args.threads)
    size = bench.QUICK if args.quick else bench.FULL
    checkpoint = find_checkpoint(args.checkpoint)
    prior = load_prior(checkpoint)
    known = known_methods(prior, args.goals)
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        raise UserError(f"--only knows {', '.join(known)}; got {', '.join(unknown)}")
    methods = {name: known[name] for name in args.only or known}
    folder = Path(args.output_dir or ("runs/planning_quick" if args.quick else RESULTS))
    claim_folder(folder, checkpoint, args.quick, args.replace or args.quick)
    cache = folder / "cache"
    prior.bank = kept_bank(cache / "bank.npy", size.bank, lambda num: prior.sample(num, seed=0))
    settings = settings_of(folder, methods, size)
    jobs = bench.plan_jobs(methods, size, args.stage or bench.STAGES, args.instances)
    quick, rows_path = args.quick, folder / "results.jsonl"
    if worlds := {job.variant: None for job in jobs if job.stage == "learned"}:
        say(learned.accuracy_table(
            learned.measure(worlds, folder / "accuracy.json", cache, quick=quick)
        ))  # fmt: skip
    models = functools.cache(partial(learned.load, folder=cache, quick=quick))
    bench.run_jobs(jobs, methods, settings, models, rows_path)
    if "main" in (args.stage or bench.STAGES):
        bank, prior.bank = prior.bank, None
        plain = {name: method for name, method in methods.items() if not method.second}
        bench.time_methods(plain, settings, size.timed, folder / "timing.json")
        prior.bank = bank
        bench.measure_base_rates(size.chance, folder / "base_rates.json")
    about = provenance() | {"command": " ".join(["python -m planning", *argv])}
    about |= {"machine": describe_machine(), "checkpoint": checkpoint.name}
    write_json(folder / "about.json", about)
    say(document.summary(folder, known))
    if args.document:
        document.write(folder, known)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    stopped = "stopped; the same command goes on from here"
    return run_program(lambda: run(parse_args(argv), argv), stopped=stopped)


if __name__ == "__main__":
    sys.exit(main())
