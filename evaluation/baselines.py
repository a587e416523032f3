"""The plan's baselines beside a checkpoint: the same network trained to do something else.

    python -m evaluation.baselines --checkpoint runs/x --output_dir runs/x/baselines

trains them with the checkpoint's options, data, augmentation, optimizer and number of steps, keeps
their weights in the output folder (a second call only evaluates), prints one table across
protocols and writes baselines.md and baselines.json. What each method sees: `SEES` in
baselines_record.py. The networks: rivals.py. Who should win: theory.py.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.baselines_record import TYPE_SHARES, write_baselines
from evaluation.bayes import GesturePrior, mmse
from evaluation.controls import interpolation, nearest, random_training_item
from evaluation.criteria import PLAN_LINES
from evaluation.estimates import Estimate, FloatArray, Table, bootstrap
from evaluation.family import deviations, is_linear_gesture, read_prior, validity
from evaluation.recorded import choose_windows
from evaluation.report import describe_run
from evaluation.rivals import (
    LATENT_DIM,
    decode_prior,
    mean_scheduler,
    nearest_by_known_frames,
    reconstruct,
    train_or_load,
)
from evaluation.samples import type_scores, type_shares
from evaluation.scores import add_noise, bayes_mean, measure_latencies, score_recreations
from evaluation.touch_down import posterior_mean_gesture
from train_diffusion_ddim import (
    DDIMScheduler,
    DiffusionActionDataset,
    TrainConfig,
    denoise_one_shot,
    generate,
    has_press_edge,
    load_model,
    noise_bank,
    press_edges,
    recreate,
)
from trainlib.checkpoint import load_checkpoint, newest_checkpoint
from trainlib.errors import OneLineParser, UserError, run_program, say
from trainlib.files import make_folder
from trainlib.known import touch_down
from trainlib.metrics import has_one_press
from trainlib.process import DEVICES, pick_device, progress, timer
from trainlib.provenance import describe_machine
from trainlib.tensors import in_batches

SIGMAS = (0.1, 0.4, 0.9)  # noise std in data units


# ----------------------------------------------------------------------------------------
# PROTOCOLS
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The checkpoint, the baselines, and the data that they are judged on.

    Attributes:
        x_0: (B, L, C), data units: gestures with a press edge, of the oracle's family if it
            knows any (`oracle`).
        x0_scheduler: of the regressions, which predict x_0.
        vaes: by setting.
        num_curve: gestures from which the mutual information is computed.
    """

    model: nn.Module
    scheduler: DDIMScheduler
    config: TrainConfig
    x_0: Tensor
    x_val: Tensor
    x_train: Tensor
    prior: GesturePrior | None
    oracle: bool
    x0_scheduler: DDIMScheduler
    regression: nn.Module
    regression_from_x_t: nn.Module
    vaes: dict[str, Any]
    num_generated: int
    num_curve: int

    @property
    def oracles_prior(self) -> GesturePrior:
        """The prior, where the oracle is asked."""
        assert self.prior is not None
        return self.prior


def score_answers(
    x_0: Tensor, answers: Mapping[str, Tensor], prior: GesturePrior | None, limit: str = ""
) -> Table:
    """Score answers to the same question.

    Args:
        x_0: (B, L, C), data units.
        answers: by method, likewise.
        prior: the distribution of x_0; without it valid and type_mix_error are left out.
        limit: the answer whose error r is a multiple of; none if empty.

    Returns:
        method -> the metrics of PLAN_LINES, valid, press_softness, type_mix_error (against the
        prior), mse_ratio = MSE over that of diffusion on the same gestures, and
        r = MSE over the limit's.
    """
    x_0, answers = x_0.cpu(), {name: answer.cpu() for name, answer in answers.items()}
    error = {name: ((x_0 - a).double() ** 2).mean(dim=(1, 2)) for name, a in answers.items()}
    table: Table = {}
    for name, answer in answers.items():
        scores = score_recreations(x_0, answer)
        row = {metric: scores[metric] for metric in PLAN_LINES}
        row["press_softness"] = bootstrap(deviations(answer)["press_softness"])
        if prior:
            row["valid"] = bootstrap(validity(answer, prior)["valid"])
            row["type_mix_error"] = type_scores(answer, prior)["type_mix_error"]
        if "diffusion" in error:
            row["mse_ratio"] = bootstrap(error[name], error["diffusion"])
        if limit:
            row["r"] = bootstrap(error[name], error[limit])
        table[name] = row
    return table


def add_answers(c: Comparison, known_mask: Tensor, diffusion: Tensor) -> dict[str, Tensor]:
    """Put the baselines, given the frames of x_0 in the mask, beside the checkpoint's answers."""
    shape = (len(c.x_0), *c.x_0.shape[1:])
    given = {"known": c.x_0, "known_mask": known_mask}
    return {
        "diffusion": diffusion,
        "regression": generate(c.regression, c.x0_scheduler, shape, 1, seed=0, **given),
        "nearest_training_item": nearest_by_known_frames(c.x_0, known_mask, c.x_train),
        "random_training_item": random_training_item(c.x_train)(c.x_0),
    }


def run_keyframes(c: Comparison) -> Table:
    """Recreate x_0 from its press edges."""
    recreated = recreate(c.model, c.scheduler, c.x_0, **c.config.sampling)
    answers = add_answers(c, press_edges(c.x_0), recreated)
    answers["limit" if c.oracle else "interpolation"] = interpolation(c.x_0)
    return score_answers(c.x_0, answers, c.prior)


def run_infill(c: Comparison) -> Table:
    """Recreate x_0 from its touch-down: when and where it ends is open."""
    mask, shape = touch_down(c.x_0), (len(c.x_0), *c.x_0.shape[1:])
    given = {"known": c.x_0, "known_mask": mask, **c.config.sampling}
    answers = add_answers(c, mask, generate(c.model, c.scheduler, shape, **given))
    if c.oracle:
        prior = c.oracles_prior
        mean = in_batches(lambda x: posterior_mean_gesture(x, prior), c.x_0, batch_size=64)
        answers["limit"] = mean
    return score_answers(c.x_0, answers, c.prior, "limit" if c.oracle else "")


def denoise_answers(c: Comparison, sigma: float) -> dict[str, Tensor]:
    """Recreate x_0 noised to sigma, data units; all methods see the same x_t."""
    t, x_t, noisy = add_noise(c.scheduler, c.x_0, sigma)
    sampling = c.config.sampling
    sampling["num_inference_steps"] = min(sampling["num_inference_steps"], t + 1)
    generator = torch.Generator().manual_seed(c.config.seed)

    def sample(x: Tensor) -> Tensor:
        given: dict[str, Any] = {"x_T": x, "start_t": t, "generator": generator}
        return c.scheduler.sample(c.model, tuple(x.shape), x.device, **sampling, **given)

    answers = {
        "diffusion": in_batches(sample, x_t),
        "diffusion_one_shot": denoise_one_shot(c.model, c.scheduler, c.x_0, sigma),
        "regression": denoise_one_shot(c.regression_from_x_t, c.x0_scheduler, c.x_0, sigma),
        "nearest_training_item": c.x_train[nearest(noisy, c.x_train)[1]],
        "random_training_item": random_training_item(c.x_train)(c.x_0),
    }
    if c.oracle:
        answers["limit"] = bayes_mean(noisy, c.scheduler.sigma(t), c.oracles_prior).to(c.x_0)
    return answers


def run_generate(c: Comparison) -> Table:
    """Draw gestures from nothing; regression has but one answer."""
    n, seed, (L, C) = c.num_generated, c.config.seed, c.x_0.shape[1:]
    samples = {
        "diffusion": generate(c.model, c.scheduler, (n, L, C), seed=seed, **c.config.sampling),
        "regression": generate(c.regression, c.x0_scheduler, (1, L, C), 1),
        **{name: decode_prior(vae, n, seed) for name, vae in c.vaes.items()},
        "random_training_item": random_training_item(c.x_train)(c.x_train[:1].expand(n, L, C)),
        "limit": c.x_val,
    }
    return {name: score_samples(x, c) for name, x in samples.items()}


def score_samples(samples: Tensor, c: Comparison) -> dict[str, Estimate]:
    """Score generated gestures, (B, L, C), data units; the type mix is held against the prior's.

    share_copies are those that repeat a training gesture to an RMS of 0.001.
    """
    copies = nearest(samples, c.x_train)[0] < 1e-3
    samples = samples.cpu()
    scores = {
        "one_press": bootstrap(has_one_press(samples)),
        "press_softness": bootstrap(deviations(samples)["press_softness"]),
        "share_copies": bootstrap(copies.cpu()),
    }
    if c.prior is None:
        return scores | type_shares(samples)
    scores["valid"] = bootstrap(validity(samples, c.prior)["valid"])
    types = type_scores(samples, c.prior)
    return scores | {name: types[name] for name in ("type_mix_error", *TYPE_SHARES)}


def information(sigmas: FloatArray, mmse_values: FloatArray, num_values: int) -> FloatArray:
    """Return the bits that x_0 + sigma·z tells of x_0, (N,) (arXiv:cs/0412108, theorem 1).

        I(sigma) = num_values·∫ mmse(s)/s³ ds from sigma to infinity, in nats

    Args:
        sigmas: noise std, (N,), strictly decreasing from where mmse is nearly the variance.
        mmse_values: mean squared error per value of the posterior mean, (N,).
        num_values: values of x_0, L·C.
    """
    density = num_values * mmse_values / sigmas**2  # nats per unit of -ln sigma
    steps = 0.5 * (density[1:] + density[:-1]) * -np.diff(np.log(sigmas))
    return (0.5 * density[0] + np.concatenate([[0.0], np.cumsum(steps)])) / math.log(2)


def noise_information(prior: GesturePrior, n: int) -> tuple[FloatArray, FloatArray]:
    """Return noise levels, data units, descending, and the bits that they leave, over n draws."""
    sigmas = np.geomspace(16, 0.003, 32)
    title = "mutual information"
    values = [mmse(s, n, np.random.default_rng(0), prior)[0] for s in progress(sigmas, title)]
    return sigmas, information(sigmas, np.array(values), prior.sequence_length * 3)


def run_reconstruction(c: Comparison) -> dict[str, Table]:
    """Send x_0 through each VAE, and through the noise that leaves as many bits of it.

    The least noise of the schedule bounds those bits; they are stated, as is sigma. The lookup
    sees x_0 whole and sends the number of a training gesture. Without the oracle the information
    that noise leaves is not known, and diffusion has no part in this.
    """
    tables = {}
    sigmas, curve = (
        noise_information(c.oracles_prior, c.num_curve) if c.oracle else (np.ones(1),) * 2
    )
    for name, vae in c.vaes.items():
        answer, rate = reconstruct(vae, c.x_0)
        sigma = float(np.interp(rate.mean(), curve, sigmas))
        sigma = c.scheduler.sigma(c.scheduler.timestep_at(sigma))
        seen = denoise_answers(c, sigma) if c.oracle else {}
        answers = {k: v for k, v in seen.items() if k.startswith("diffusion")} | {
            name: answer,
            "nearest_training_item": c.x_train[nearest(c.x_0, c.x_train)[1]],
        }
        table = score_answers(c.x_0, answers, c.prior)
        told = Estimate(float(np.interp(-sigma, -sigmas, curve)), None, c.num_curve)
        number = Estimate(math.log2(len(c.x_train)), None, len(c.x_train))
        bits = {name: bootstrap(rate), "nearest_training_item": number}
        for method, row in table.items():
            row["bits"] = bits.get(method, told)
            if method not in bits:
                row["sigma"] = Estimate(sigma, None, c.num_curve)
        tables[f"reconstruction_{name}"] = table
    return tables


def run_cost(c: Comparison) -> Table:
    """Count parameters, and time the answer to one gesture: a sample, a pass, a lookup."""
    one = c.x_0[:1]
    shape, mask = (1, *one.shape[1:]), press_edges(one)
    eps = noise_bank((1, LATENT_DIM)).to(one)
    sampling = c.config.sampling
    calls: dict[str, Callable[[], object]] = {
        "diffusion": lambda: generate(c.model, c.scheduler, shape, **sampling),
        "diffusion_one_shot": lambda: denoise_one_shot(c.model, c.scheduler, one, 0.4),
        "regression": lambda: generate(c.regression, c.x0_scheduler, shape, 1),
        **{name: lambda v=vae: v(one, eps) for name, vae in c.vaes.items()},  # type: ignore[misc]
        "nearest_training_item": lambda: nearest_by_known_frames(one, mask, c.x_train),
    }
    networks = {"diffusion": c.model, "regression": c.regression, **c.vaes}
    latencies = measure_latencies(calls, one.device, repeats=20)
    table = {name: {"batch_1_ms": latency} for name, latency in latencies.items()}
    for name, network in networks.items():
        parameters = sum(p.numel() for p in network.parameters())
        table[name]["parameters"] = Estimate(parameters, None, 1)
    return table


def run_all(c: Comparison) -> dict[str, Table]:
    """Run every protocol: protocol -> method -> metric -> estimate."""
    tables = {"keyframes": run_keyframes(c)}
    for sigma in progress(SIGMAS, "denoise"):
        limit = "limit" if c.oracle else ""
        answers = denoise_answers(c, sigma)
        tables[f"denoise_sigma_{sigma}"] = score_answers(c.x_0, answers, c.prior, limit)
    tables |= {"infill": run_infill(c), "generate": run_generate(c)}
    return tables | run_reconstruction(c) | {"cost": run_cost(c)}


# ----------------------------------------------------------------------------------------
# CLI
# ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m evaluation.baselines", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--output_dir", required=True, metavar="DIR", help="weights and tables; resumes from them")
    add("--data_dir", metavar="DIR", help="gestures to judge on; default: the run's")
    add("--train_data_dir", metavar="DIR", help="default: the run's")
    add("--num_steps", type=int, metavar="N", help="of each training; default: the checkpoint's")
    add("--quick", action="store_true", help="20 steps, at most 64 gestures: no result")
    add("--device", default="auto", choices=DEVICES, help="default: auto")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Comparison, dict[str, Any]]:
    """Load the checkpoint and its data, train or load the baselines.

    Returns:
        The comparison, and what is to be said about its making.

    Raises:
        UserError: bad checkpoint, data, folder or number of steps.
    """
    device = pick_device(args.device)
    model, scheduler, config = load_model(args.checkpoint, device)
    if not config.known_frames:
        raise UserError(f"{args.checkpoint} takes no known frames; train one with --known_frames")
    config = replace(config, data_dir=args.train_data_dir or config.data_dir)
    num_steps = args.num_steps
    if num_steps is None:
        num_steps = 20 if args.quick else load_checkpoint(args.checkpoint)["step"]
    if num_steps < 1:
        raise UserError(f"--num_steps must be at least 1, got {num_steps}")
    data_dir = args.data_dir or config.val_data_dir
    sequences = DiffusionActionDataset(data_dir, config.seq_len).sequences
    num = 64 if args.quick else None
    prior = read_prior(data_dir, torch.from_numpy(sequences))
    if prior is None:
        sequences = choose_windows(sequences, num)
    x_val = torch.from_numpy(sequences[:num]).to(device)
    train_set = DiffusionActionDataset(config.data_dir, config.seq_len)
    linear, edge = is_linear_gesture(x_val), has_press_edge(x_val)
    oracle = prior is not None and bool(linear.any())
    if not edge.any():
        raise UserError(f"no gesture in {data_dir} has a press edge; nothing can be recreated")
    folder = make_folder(args.output_dir)
    x_train = torch.from_numpy(train_set.sequences).to(device)
    trained, train_s = train_or_load(folder, x_train, config, num_steps)
    comparison = Comparison(
        model=model,
        scheduler=scheduler,
        config=config,
        x_0=x_val[linear if oracle else edge],
        x_val=x_val,
        x_train=x_train,
        prior=prior,
        oracle=oracle,
        x0_scheduler=mean_scheduler(config, device),
        regression=trained["regression_from_known_frames"],
        regression_from_x_t=trained["regression_from_x_t"],
        vaes={name: vae for name, vae in trained.items() if name.startswith("vae")},
        num_generated=64 if args.quick else 1000,
        num_curve=8 if args.quick else 64,
    )
    about = {
        "num_steps": num_steps,
        "data_dir": data_dir,
        "train_data_dir": config.data_dir,
        "validation_sequences": len(x_val),
        "paired_sequences": len(comparison.x_0),
        "train_s": train_s,
        "quick": args.quick,
    }
    return comparison, about


def compare(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, judge, write and print.

    Raises:
        UserError: bad input, or an output folder that cannot be written.
    """
    passed = timer()
    comparison, making = prepare(args)
    tables = run_all(comparison)
    about = {
        "checkpoint": str(newest_checkpoint(args.checkpoint)),
        "seed": comparison.config.seed,
        "sampling": comparison.config.sampling,
        **making,
        **describe_run("evaluation.baselines", argv),
        "machine": describe_machine(comparison.x_0.device),
        "wall_s": round(passed(), 1),
    }
    folder = Path(args.output_dir)
    say(write_baselines(folder, about, tables))
    say(f"\n{about['wall_s']:.0f} s; with intervals in {folder / 'baselines.md'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see `run_program` for what it returns."""
    argv = sys.argv[1:] if argv is None else argv
    return run_program(lambda: compare(parse_args(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
