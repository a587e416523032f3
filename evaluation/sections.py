"""The parts of the report: what each asks of the model, measured, drawn and put into words.

A part is a function of a Subject, a Size and the Findings so far; it adds its sections to them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation import (
    analyses,
    analysis_figures,
    baselines,
    distribution,
    evidence,
    figures,
    infill,
    inversion,
    protocol_figures,
    protocols,
)
from evaluation.bayes import GesturePrior
from evaluation.controls import make_controls
from evaluation.estimates import Table
from evaluation.report import Picture, Section
from train_diffusion_ddim import (
    VAL_SEQUENCES,
    DDIMScheduler,
    TrainConfig,
    classify_gestures,
    has_press_edge,
    recreate,
)
from trainlib.errors import UserError, say
from trainlib.gestures import GESTURE_TYPES


@dataclass(frozen=True)
class Size:
    """How many sequences each part takes, at most; None = all, or its own default."""

    validation: int | None
    generated: int | None
    ddim: int
    round_trips: int  # of invert: sequences times steps
    round_trip_steps: tuple[int, ...]
    exact_round_trips: int
    conditions: int  # of infill
    answers: int  # to each
    analyses: analyses.Budget


FULL = Size(
    validation=None,
    generated=None,
    ddim=200,
    round_trips=1500,
    round_trip_steps=inversion.STEPS,
    exact_round_trips=8,
    conditions=infill.NUM_CONDITIONS,
    answers=infill.NUM_SAMPLES,
    analyses=analyses.FULL,
)
QUICK = Size(
    validation=64,
    generated=64,
    ddim=4,
    round_trips=100,
    round_trip_steps=(10, 20, 50),
    exact_round_trips=0,
    conditions=8,
    answers=4,
    analyses=analyses.QUICK,
)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the data it is judged on; tensors are on the device, data units.

    `folders` may hold what other commands have left: records of the run, of baselines.
    """

    folders: tuple[Path, ...]
    model: nn.Module
    raw_model: nn.Module
    untrained: nn.Module
    scheduler: DDIMScheduler
    config: TrainConfig
    sampling: dict[str, Any]
    x_val: Tensor
    x_train: Tensor
    prior: GesturePrior

    @property
    def generated(self) -> str:
        """The setting of the generate protocol that is judged."""
        return f"model_steps_{self.sampling['num_inference_steps']}"


@dataclass
class Findings:
    """What the protocols found: sections in the order of reading, tables that none shows."""

    sections: list[Section] = field(default_factory=list)
    other_tables: dict[str, Table] = field(default_factory=dict)
    recreated: Tensor | None = None  # the model's answers to keyframes, (B, L, C)

    @property
    def tables(self) -> dict[str, Table]:
        """All tables by name."""
        return {s.name: s.table for s in self.sections} | self.other_tables


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


KEYFRAMES_COLUMNS = {
    "mse": "MSE",
    "mean_snr_db": "SNR, dB",
    "temporal_iou": "temporal IoU",
    "spatial_accuracy": "within 0.1",
    "gesture_type_accuracy": "same type",
}


def run_keyframes(s: Subject, size: Size, found: Findings) -> None:
    """Recreate all validation gestures, and have the controls do so."""
    recreations = {
        "model": lambda x_0: recreate(s.model, s.scheduler, x_0, **s.sampling),
        "model_raw_weights": lambda x_0: recreate(s.raw_model, s.scheduler, x_0, **s.sampling),
        **make_controls(s.model, s.untrained, s.scheduler, s.x_train, s.sampling),
    }
    tables, recreated = protocols.keyframes(s.x_val, recreations)
    found.recreated = recreated["model"]
    rows, names = pick_examples(s.x_val, recreated["model"])
    steps = s.sampling["num_inference_steps"]
    drawn = figures.draw_recreated(
        s.x_val[rows].cpu(), recreated["model"][rows].cpu(), names, steps
    )
    picture = Picture(
        "recreated_gestures.png",
        "A typical gesture of each type, and the one recreated worst.",
        drawn,
    )
    titles = {
        "keyframes": f"Keyframes: recreated from pure noise in {steps} steps, given only the "
        "frames where the finger lands and lifts",
        "keyframes_without_edge": "Keyframes of gestures without a press edge",
    }
    texts = {
        "keyframes": "About 4 of 250 frames are known. They determine a straight gesture wholly, "
        "so the limit is the exact answer, which interpolation between them gives.",
        "keyframes_without_edge": "They give the model nothing to go by: they are scored apart.",
    }
    for name, table in tables.items():
        found.sections.append(
            Section(
                name, titles[name], texts[name], table, KEYFRAMES_COLUMNS, "recreated by",
                [picture] if name == "keyframes" else [],
            )
        )  # fmt: skip
    if "keyframes" in tables:
        groups = evidence.group_scores(s.x_val, recreated, tables["keyframes"])
        found.other_tables["keyframes_groups"] = groups


DENOISE_COLUMNS = {
    "r": "error / Bayes limit",
    "r_ddim": "DDIM error / exact DDIM",
    "mse_one_shot": "MSE, one shot",
    "mse_mmse": "its limit",
    "mse_ddim": "MSE, DDIM",
    "mse_exact_ddim": "its limit",
    "mse_identity": "doing nothing",
}


def run_denoise(s: Subject, size: Size, found: Findings) -> None:
    """Denoise the gestures that the oracle knows; all, without the oracle, if it knows none."""
    linear = protocols.is_linear_gesture(s.x_val)
    known, steps = bool(linear.any()), s.sampling["num_inference_steps"]
    table = protocols.denoise(
        s.model,
        s.untrained,
        s.scheduler,
        s.x_val[linear] if known else s.x_val,
        s.x_train,
        prior=s.prior if known else None,
        num_inference_steps=steps,
        num_ddim=size.ddim,
    )
    row = next(iter(table.values()))
    text = (
        "The network sees the gesture under noise of a known std, and answers at once or by DDIM. "
        "The limit is 1: no denoiser has a smaller mean error than the Bayes posterior mean, over "
        f"{row['mse_one_shot'].n} gestures; for DDIM, the same steps with the exact score, over "
        f"{row['mse_ddim'].n}."
    )
    picture = Picture(
        "denoise_curve.png",
        "The error of the model between the Bayes limit and doing nothing.",
        figures.draw_denoise_curve(table, steps),
    )
    columns = {name: title for name, title in DENOISE_COLUMNS.items() if name in row}
    title = "Denoise: recreated from the gesture under noise"
    found.sections.append(Section("denoise", title, text, table, columns, "noise", [picture]))


GENERATE_COLUMNS = {
    "valid": "valid",
    "duration_bias": "duration bias",
    "type_mix_error": "type mix error",
    "ks_max": "KS distance",
    "coverage": "coverage",
    "copy_auc": "copying, AUC",
    "share_near_copies": "near copies",
}


def run_generate(s: Subject, size: Size, found: Findings) -> None:
    """Generate from nothing, trained and untrained, at several numbers of steps."""
    samples = distribution.draw_samples(
        s.model, s.untrained, s.scheduler, s.sampling, shape=(s.x_val.shape[1], s.x_val.shape[2]),
        limit=size.generated,
    )  # fmt: skip
    real = distribution.make_reference(s.x_train, s.x_val)
    table = distribution.generate_table(samples, s.prior, real)
    drawn = samples[s.generated].cpu()
    valid = distribution.validity(drawn, s.prior)["valid"]
    picture = Picture(
        "generated_gestures.png",
        "Unconditional samples, not selected.",
        figures.draw_generated(drawn, valid, s.sampling["num_inference_steps"]),
    )
    text = (
        "Samples have no original to be compared with, so their law is held against the known law "
        "of the gestures and against real ones. The limit is what held-out gestures score "
        "(validation data). Copies of the training set are valid, too; the last two columns tell "
        "them from new gestures."
    )
    title = "Generate: invented from pure noise, given nothing"
    found.sections.append(
        Section("generate", title, text, table, GENERATE_COLUMNS, "samples", [picture])
    )


INVERT_COLUMNS = {
    "mse": "MSE, round trip",
    "mse_fresh_noise": "from fresh noise",
    "mse_8_bits": "latents of 8 bits",
    "latent_std": "latent std",
    "latent_kurtosis": "kurtosis",
    "latent_autocorrelation": "autocorrelation",
}


def run_invert(s: Subject, size: Size, found: Findings) -> None:
    """Encode gestures as noise and decode them again."""
    linear = protocols.is_linear_gesture(s.x_val)
    known = bool(linear.any())
    table = inversion.invert(
        s.model,
        s.untrained,
        s.scheduler,
        s.x_val[linear] if known else s.x_val,
        prior=s.prior if known else None,
        steps=size.round_trip_steps,
        budget=size.round_trips,
        num_exact=size.exact_round_trips,
    )
    text = (
        "DDIM run backwards turns a gesture into noise, and forwards again into the gesture. A raw "
        "round trip proves nothing: an answer that has learnt nothing (zero eps) repeats every "
        "gesture. Dequantised, the walk starts from the gesture under a little noise, and the "
        "latents can be what they should: std 1, kurtosis 3, autocorrelation 0. DDIM paper: its "
        "table 2, images."
    )
    title = "Invert: encoded as noise and decoded again"
    picture = Picture(
        "round_trips.png",
        "The error alone favours the copy; the latents tell.",
        protocol_figures.draw_round_trips(table),
    )
    section = Section(
        "invert", title, text, table, INVERT_COLUMNS, "walk, steps", [picture],
        limits=("exact_score",),
    )  # fmt: skip
    found.sections.append(section)


INFILL_COLUMNS = {
    "consistent_and_valid": "consistent, valid",
    "seam": "seam",
    "mse": "MSE",
    "press_softness": "press softness",
    "diversity_ratio": "diversity / law",
    "type_mix_error": "type mix error",
    "duration_ks": "duration KS",
}


def run_infill(s: Subject, size: Size, found: Findings) -> None:
    """Complete gestures of which the touch-down alone is given."""
    table = infill.infill(
        s.model,
        s.untrained,
        s.scheduler,
        s.x_val,
        s.x_train,
        prior=s.prior,
        sampling=s.sampling,
        num_conditions=size.conditions,
        num_samples=size.answers,
    )
    if not table:
        return
    text = (
        f"{size.answers} answers to each of {min(size.conditions, len(s.x_val))} gestures of which "
        "only the touch-down is known, so many answers are right. The limits are draws from the "
        "exact law, and its mean: the least MSE of all, but no gesture, which is what a regression "
        "tends to."
    )
    title = "Infill: completed from the touch-down alone"
    columns = {name: head for name, head in INFILL_COLUMNS.items() if name in table["model"]}
    pictures = []
    if "diversity_ratio" in columns:
        caption = "Best is where the exact posterior is; a mean and a copy are not diverse."
        drawn = protocol_figures.draw_infill(table)
        pictures.append(Picture("infill.png", caption, drawn))
    section = Section(
        "infill", title, text, table, columns, "answers of", pictures, limits=infill.LIMITS
    )
    found.sections.append(section)


BASELINES_COLUMNS = {
    "mse": "MSE",
    "mse_ratio": "MSE / diffusion's",
    "r": "MSE / limit's",
    "valid": "valid",
    "press_softness": "press softness",
    "gesture_type_accuracy": "same type",
    "type_mix_error": "type mix error",
    "bits": "bits",
    "batch_1_ms": "ms each",
}


def run_baselines(s: Subject, size: Size, found: Findings) -> None:
    """Read what `python -m evaluation.baselines` has left, if it has."""
    folders = [place for folder in s.folders for place in (folder, folder / "baselines")]
    paths = [path for folder in folders if (path := folder / "baselines.json").is_file()]
    if not paths:
        return
    try:
        results = baselines.read_baselines(paths[0])
    except UserError as e:
        say(f"note: {e}")
        return
    found.other_tables["baselines_lines"] = evidence.baselines_lines(results["protocols"])
    table = {
        f"{protocol}/{method}": row
        for protocol, rows in results["protocols"].items()
        for method, row in rows.items()
    }
    text = (
        "The same network, data and number of steps, trained to do something else: a regression "
        "that answers at once, and a VAE that sees the original. Theory says who must win where: "
        "a regression in MSE wherever several gestures fit, diffusion in validity. Measured beside "
        f"{results['about']['checkpoint']}, read from {paths[0]}."
    )
    title = "Baselines: regression, VAE, look-up, chance"
    claims = [
        {
            "protocol": p["protocol"],
            "metric": p["metric"],
            "theory": f"{p['first']} {'or' if p['is_open'] else 'beats'} {p['second']}",
            "because": p["why"],
            "came out": p["came_out"],
        }
        for p in results["predictions"]
    ]
    section = Section(
        "baselines", title, text, table, BASELINES_COLUMNS, "protocol/method", claims=claims
    )
    found.sections.append(section)


# Title, text and figures of each analysis; the whole table waits below the figures.
ANALYSES = {
    "quality_by_group": (
        "By gesture: which are hard",
        "The keyframes protocol by action type, and by the plan's levels of complexity.",
        ("quality_by_group.png",),
    ),
    "quality_of_patterns": (
        "Patterns: those that the plan names",
        "The plan's evaluation patterns, recreated from the frames where the finger lands and "
        "lifts. A circle is none of the straight gestures that the model has seen.",
        ("patterns.png",),
    ),
    "error_by_frame": (
        "By frame: where the error sits",
        "The error about touch-down and lift-off, given these frames and not given them.",
        ("error_by_frame.png",),
    ),
    "error_by_step": (
        "By denoising step: how the estimate sharpens",
        "The error of the estimate of x_0 along the way from noise.",
        ("error_by_step.png",),
    ),
    "excess_loss": (
        "By noise: the loss above the least possible",
        "No network has a smaller training loss than the Bayes denoiser; what is above it can be "
        "learnt.",
        ("excess_loss.png",),
    ),
    "sampler_sweep": (
        "By sampler: steps, solver, eta",
        "Few steps bias what is drawn, even with the exact score, which is the limit here.",
        ("sampler_sweep.png", "few_step_bias.png"),
    ),
    "frontier": (
        "By size: quality and latency",
        "Networks of several sizes, trained alike; measured by a command of its own.",
        ("frontier.png",),
    ),
    "convergence": (
        "Convergence: had training come to its end?",
        "The record of the run.",
        ("convergence.png",),
    ),
}


def run_analyses(s: Subject, size: Size, found: Findings) -> None:
    """Make the plan's five analyses, the sweep and the patterns."""
    tables, patterns = analyses.run_analyses(
        s.model,
        s.scheduler,
        s.x_val,
        s.x_train,
        sampling=s.sampling,
        prior=s.prior,
        checkpoint=s.folders[0],
        budget=size.analyses,
    )
    every = max(1, len(s.x_val) // VAL_SEQUENCES)  # as the trainer chooses its subset
    epoch_x_0 = s.x_val[::every][:VAL_SEQUENCES]
    is_whole = size.validation is None
    drawn = analysis_figures.draw_analyses(
        tables,
        patterns,
        num_inference_steps=s.sampling["num_inference_steps"],
        mean_duration=(s.prior.min_delta_t + s.prior.max_delta_t) / 2,
        limits=analyses.denoise_limits(s.scheduler, epoch_x_0, s.prior) if is_whole else {},
    )
    parts = {
        "quality_by_group": ("quality_by_type", "quality_by_level"),
        "sampler_sweep": ("sampler_sweep", "exact_few_steps"),
    }
    for whole, (first, second) in parts.items():
        tables[whole] = tables.pop(first, {}) | tables.pop(second, {})
    for name, (title, text, names) in ANALYSES.items():
        if tables.get(name):
            pictures = [
                Picture(file, analysis_figures.CAPTIONS[file], drawn[file])
                for file in names
                if file in drawn
            ]
            section = Section(name, title, text, tables[name], pictures=pictures)
            found.sections.append(section)


# In the order of the report. Each adds what it finds; later ones may read it.
PARTS = (
    run_keyframes,
    run_denoise,
    run_generate,
    run_infill,
    run_invert,
    run_baselines,
    run_analyses,
)
