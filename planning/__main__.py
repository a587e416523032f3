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
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from planning import benchmark as bench
from planning import document, learned
from planning.bank import kept_bank
from planning.course_methods import (
    HUMAN,
    HUMAN_METHODS,
    course_jobs,
    course_methods,
    human_windows,
    people_events,
    run_course,
)  # fmt: skip
from planning.diffusion import DiffusionPrior
from planning.goals import load_policy
from planning.loop import loop_jobs, run_loop
from planning.methods import Method, cost_methods, goal_methods, prior_methods
from planning.planner import Planner
from planning.shipped import SHIPPED, run_shipped, shipped_jobs
from trainlib.checkpoint import newest_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder, sha256_of, write_json, write_whole
from trainlib.gestures import SEQ_LEN
from trainlib.provenance import ROOT

RESULTS = Path(__file__).parent / "results"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m planning", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="denoiser; default: the newest run under runs/")
    add("--human", metavar="PATH", help="denoiser of human-like gestures; default: runs/human")
    add("--goals", metavar="DIR", help="what python -m planning.goals left; default: runs/goals")
    add("--output_dir", metavar="DIR", help="default: planning/results, or runs/planning_quick")
    add("--quick", action="store_true", help="3 instances or fewer, one seed, no tuning; 2 minutes")
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


def claim_folder(
    folder: Path, checkpoint: Path | None, quick: bool, replace: bool, human: Path | None = None
) -> None:
    """Make the folder, or check that its results are of these checkpoints.

    Results that do not depend on them stay, and so do the learned world models.

    Args:
        folder: of the results.
        checkpoint: the denoiser; None = its results are not touched.
        quick: whether the results are a look only.
        replace: whether to drop results of other checkpoints.
        human: the denoiser of human-like gestures; None = likewise.

    Raises:
        UserError: it cannot be written, its results are of another size, or of another checkpoint
            and `replace` is not set.
    """
    make_folder(folder / "cache")
    mark = folder / "checkpoint.json"
    claimed = json.loads(mark.read_text()) if mark.exists() else {}
    if claimed and claimed.get("quick", False) != quick:
        raise UserError(f"{folder} holds results of another size; choose another --output_dir")
    paths = {"sha256": checkpoint, "human_sha256": human}
    now = {key: sha256_of(path) for key, path in paths.items() if path}
    stale = {key for key, digest in now.items() if claimed.get(key, digest) != digest}
    if stale and not replace:
        raise UserError(
            f"{folder} holds results of another checkpoint; add --replace to drop them, or "
            "choose another --output_dir"
        )
    if stale:
        drop_results(folder, stale)
    path = {"path": checkpoint.name} if checkpoint else {}
    write_json(mark, claimed | path | {"quick": quick} | now)


def drop_results(folder: Path, stale: Collection[str]) -> None:
    """Drop results of checkpoints, by their keys in checkpoint.json."""
    free, path = cost_methods(), folder / "results.jsonl"

    def is_kept(row: bench.Row) -> bool:
        if row.get("stage") == "courses":
            return "human_sha256" not in stale or row["method"] not in HUMAN_METHODS
        return "sha256" not in stale or row["method"] in free

    kept = [row for row in bench.read_rows(path) if is_kept(row)]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    if "sha256" in stale:
        for name in ("tuning.json", "timing.json"):
            if (folder / name).exists():
                content = json.loads((folder / name).read_text())
                write_json(folder / name, {k: v for k, v in content.items() if k in free})
    for key, bank in (("sha256", "bank.npy"), ("human_sha256", "human_bank.npy")):
        if key in stale:
            (folder / "cache" / bank).unlink(missing_ok=True)


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


def find_human(path: str | None) -> Path | None:
    """Return the denoiser of human-like gestures: the one given, else of runs/human if it is there.

    Without one a line says so.
    """
    if path or list(Path("runs/human").glob("diffusion_checkpoint_epoch_*.pth")):
        return newest_checkpoint(path or "runs/human")
    say("note: no denoiser of human-like gestures in runs/human; the courses do without")
    return None


def planned_jobs(
    args: argparse.Namespace, methods: Mapping[str, Method], courses: Mapping[str, Method]
) -> list[bench.Job]:
    """Return the jobs that the options ask for."""
    size = bench.QUICK if args.quick else bench.FULL
    jobs = shipped_jobs(size, [name for name in SHIPPED if name in (args.only or SHIPPED)])
    jobs += bench.plan_jobs(methods, size) + course_jobs(courses, size.courses)
    jobs += [] if args.only else loop_jobs(max(size.episodes, "loop" in (args.stage or ())))
    jobs = [job for job in jobs if not args.stage or job.stage in args.stage]
    return [replace(job, instances=args.instances or job.instances) for job in jobs]


def runner_of(
    args: argparse.Namespace,
    folder: Path,
    checkpoint: Path,
    methods: Mapping[str, Method],
    courses: Mapping[str, Method],
    prior: DiffusionPrior,
) -> Callable[[bench.Job], bench.Row]:
    """Return what runs a job of any stage; what a stage needs is made when it is first met."""
    size = bench.QUICK if args.quick else bench.FULL
    settings = functools.cache(lambda: settings_of(folder, methods, size))
    models = functools.cache(partial(learned.load, folder=folder / "cache", quick=args.quick))
    people = functools.cache(people_events)

    @functools.cache
    def planner() -> Planner:
        loaded = Planner.load(checkpoint)
        loaded.bank = prior.bank
        return loaded

    def run(job: bench.Job) -> bench.Row:
        if job.stage == "courses":
            return run_course(job, courses[job.method], people())
        if job.stage == "loop":
            return run_loop(job, planner())
        if job.method in SHIPPED:
            (world,) = bench.world_models_of(job, models, second=False)
            measured = document.read_json(folder / "accuracy.json").get(job.variant)
            refine = measured is None or learned.advice(measured["r2"]) != learned.SELECT
            return run_shipped(job, planner(), world, refine=refine)
        method = methods[job.method]
        worlds = bench.world_models_of(job, models, method.second)
        return bench.run_job(job, method, settings()[job.method], *worlds)

    return run


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Do it all."""
    check_options(args)
    torch.set_num_threads(args.threads)
    size = bench.QUICK if args.quick else bench.FULL
    checkpoint = find_checkpoint(args.checkpoint)
    prior, human = load_prior(checkpoint), find_human(args.human)
    people = load_prior(human) if human else None
    known = known_methods(prior, args.goals)
    courses = course_methods(people, functools.cache(partial(human_windows, HUMAN, seed=0)))
    unknown = sorted(set(args.only or ()) - {*known, *courses, *SHIPPED})
    if unknown:
        raise UserError(
            f"--only knows {', '.join([*known, *courses, *SHIPPED])}; got {', '.join(unknown)}"
        )
    methods, courses = ({n: m for n, m in of.items() if n in (args.only or of)}
                        for of in (known, courses))  # fmt: skip
    folder = Path(args.output_dir or ("runs/planning_quick" if args.quick else RESULTS))
    jobs = planned_jobs(args, methods, courses)
    on_courses = [job.stage == "courses" for job in jobs]
    reads = None if all(on_courses) else checkpoint, human if any(on_courses) else None
    claim_folder(folder, reads[0], args.quick, args.replace or args.quick, reads[1])
    for path, of, name in zip(reads, (prior, people), ("bank.npy", "human_bank.npy"), strict=True):
        if path and of:
            of.bank = kept_bank(folder / "cache" / name, size.bank, partial(of.sample, seed=0))
    if worlds := {job.variant: None for job in jobs if job.stage == "learned"}:
        path, cache = folder / "accuracy.json", folder / "cache"
        say(learned.accuracy_table(learned.measure(worlds, path, cache, quick=args.quick)))
    runner = runner_of(args, folder, checkpoint, methods, courses, prior)
    bench.run_jobs(jobs, runner, folder / "results.jsonl")
    if any(job.stage == "main" for job in jobs):
        measure_rest(folder, prior, methods, size)
    about = learned.made_where() | {"command": " ".join(["python -m planning", *argv])}
    about |= {"checkpoint": checkpoint.name}
    write_json(folder / "about.json", about)
    say(document.summary(folder, document.every_method()))
    if args.document:
        document.write(folder, document.every_method())


def measure_rest(
    folder: Path, prior: DiffusionPrior, methods: Mapping[str, Method], size: bench.Size
) -> None:
    """Time single plans, which draw afresh, and count base rates."""
    bank, prior.bank = prior.bank, None
    plain = {name: method for name, method in methods.items() if not method.second}
    settings = settings_of(folder, methods, size)
    bench.time_methods(plain, settings, size.timed, folder / "timing.json")
    prior.bank = bank
    bench.measure_base_rates(size.chance, folder / "base_rates.json")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    stopped = "stopped; the same command goes on from here"
    return run_program(lambda: run(parse_args(argv), argv), stopped=stopped)


if __name__ == "__main__":
    sys.exit(main())
