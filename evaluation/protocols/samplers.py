"""samplers: what more steps, another solver and eta bring and cost, and what few steps bias."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.criteria import PLAN_LINES, lines_met
from evaluation.estimates import Estimate, Table, shifted
from evaluation.few_steps import exact_few_steps, read_exact_few_steps, score_durations
from evaluation.figures import (
    METHODS,
    PLAN_GOALS,
    SHARE,
    VALID_GOAL,
    Curve,
    Panel,
    draw_panel,
    new_figure,
    scale_by,
)
from evaluation.protocol import Picture, Section, Subject
from evaluation.scores import measure_latencies, score_recreations
from train_diffusion_ddim import (
    DDIMScheduler,
    generate,
    has_press_edge,
    recreate,
    takes_known_frames,
)
from trainlib.gestures import FRAME_MS
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (1, 2, 5, 10, 20, 50)
EXACT_STEPS = (2, 5, 10)  # measured where the file of few_steps.py does not have them
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "eta": 0.0},
    "ddim_eta_1": {"sampler": "ddim", "eta": 1.0},
    "dpmpp": {"sampler": "dpmpp", "eta": 0.0},
    "dpmpp_eta_1": {"sampler": "dpmpp", "eta": 1.0},
}


def run(
    s: Subject, num: int, repeats: int, num_exact: int, steps: Sequence[int] = STEPS
) -> list[Section]:
    """Sweep over samplers and steps, with what the exact score does in as few steps."""
    networks, x_0 = (s.model, s.scheduler), s.x_val[:num]
    title = "By sampler: steps, solver, eta"
    caption = "What more steps and other samplers bring, and cost."
    if s.prior is None:
        x_0 = s.x_val[has_press_edge(s.x_val)][:num]
        if not len(x_0):
            return []
        sweep = sampler_sweep(*networks, x_0, None, steps=steps, repeats=repeats)
        pictures = [Picture("sampler_sweep.png", caption, draw_sampler_sweep, sweep)]
        text = "Gestures recreated from their press edges by each sampler in few and many steps."
        return [Section("sampler_sweep", sweep, title, text, pictures=pictures)]
    sweep = sampler_sweep(*networks, x_0, s.prior, steps=steps, repeats=repeats)
    levels = DDIMScheduler(**(s.scheduler.options | {"curve_steps": 0}))  # exact at each of them
    exact = read_exact_few_steps(levels, s.prior, steps)
    missing = [n for n in EXACT_STEPS if num_exact and f"exact/{n}" not in exact]
    exact |= exact_few_steps(levels, s.prior, missing, num_exact)
    mean_duration = (s.prior.min_delta_t + s.prior.max_delta_t) / 2
    pictures = [
        Picture("sampler_sweep.png", caption, draw_sampler_sweep, sweep),
        Picture(
            "few_step_bias.png",
            "What few steps do to durations, beside the exact score.",
            draw_few_step_bias,
            sweep,
            exact,
            mean_duration,
        ),
    ]
    text = "Few steps bias what is drawn, even with the exact score, which is the limit here."
    return [Section("sampler_sweep", sweep | exact, title, text, pictures=pictures)]


def sampler_sweep(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    prior: GesturePrior | None,
    *,
    steps: Sequence[int] = STEPS,
    repeats: int = 9,
) -> Table:
    """Recreate, generate and time with every sampler and number of steps.

    Args:
        model: the denoiser.
        scheduler: its scheduler.
        x_0: (B, L, C), data units, to recreate from keyframes; as many gestures are generated.
        prior: durations of a valid gesture; without it nothing is generated but to time it.
        steps: numbers of inference steps; those above the noise levels are left out.
        repeats: of the latency.

    Returns:
        Per setting "{name in SAMPLERS}/{steps}": the plan's metrics of the recreations,
        those of `score_durations` for what is generated, and latency_ms at batch 1.
    """
    start_t = scheduler.num_timesteps - 1
    if not takes_known_frames(model):  # `recreate` then starts from less noise
        start_t = scheduler.timestep_at(0.4)
    samplings = {
        f"{name}/{n}": {"num_inference_steps": n, **options}
        for name, options in SAMPLERS.items()
        for n in steps
        if n <= start_t + 1
    }
    B, L, C = x_0.shape
    one = {
        name: partial(generate, model, scheduler, (1, L, C), **sampling)
        for name, sampling in samplings.items()
    }
    latencies = measure_latencies(one, x_0.device, repeats)
    table: Table = {}
    for name in progress(list(samplings), "samplers"):
        row = score_recreations(x_0, recreate(model, scheduler, x_0, **samplings[name]))
        if prior:
            samples = generate(model, scheduler, (B, L, C), **samplings[name])
            row |= score_durations(samples, prior)
        table[name] = row | {"latency_ms": latencies[name]}
    return table


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


def by_steps(table: Table, prefix: str, metric: str) -> dict[int, Estimate]:
    """Pick a metric of the settings "{prefix}{steps}", where there is a value."""
    return {
        int(setting.removeprefix(prefix)): row[metric]
        for setting, row in table.items()
        if setting.startswith(prefix) and metric in row and row[metric].n
    }


def draw_few_step_bias(sweep: Table, exact: Table, mean_duration: float) -> "Figure":
    """Draw the mean duration of generated gestures against the number of steps.

    Args:
        sweep: of `sampler_sweep`.
        exact: of `exact_few_steps`; may be empty.
        mean_duration: of the prior, frames.
    """
    truth, bias = FRAME_MS * mean_duration, ""
    curves = []
    for method in ("ddim_eta_1", "dpmpp", "dpmpp_eta_1", "ddim", "exact"):
        found = by_steps(exact if method == "exact" else sweep, f"{method}/", "mean_duration")
        found = {steps: shifted(e, scale=1 / FRAME_MS) for steps, e in found.items() if steps > 1}
        if found:
            label, style = METHODS[method]
            label += f", n = {min(e.n for e in found.values())}-{max(e.n for e in found.values())}"
            curves.append(Curve(list(found), list(found.values()), label, style))
        if 5 in found:
            who = "even the exact score" if method == "exact" else "the model"
            bias = f": with 5, {who} is off by {found[5].value / truth - 1:+.0%}"
    figure = new_figure(9.5, 5)
    ax = figure.subplots()
    ax.axhspan(0.95 * truth, 1.05 * truth, color="0.94", lw=0)
    ylabel = "mean duration of the generated gestures, ms"
    draw_panel(ax, Panel("", ylabel, [(truth, "truth, ±5 %")], ylim=(0, None)), curves)
    scale_by(ax, sorted({s for curve in curves for s in curve.x}), "denoising steps")
    figure.suptitle(f"Few steps change how long gestures last{bias}", fontsize=13)
    return figure


SWEEP_PANELS = {
    "mse": Panel("recreated: mean squared error", goals=PLAN_GOALS["mse"], log=True),
    "temporal_iou": Panel(
        "recreated: overlap of the presses", goals=PLAN_GOALS["temporal_iou"], ylim=SHARE
    ),
    "gesture_type_accuracy": Panel(
        "recreated: share that keeps its type",
        goals=PLAN_GOALS["gesture_type_accuracy"],
        ylim=SHARE,
    ),
    "valid": Panel("generated: share of valid gestures", goals=VALID_GOAL, ylim=SHARE),
    "duration_bias": Panel("generated: error of the mean duration", goals=[(0.0, "truth")]),
    "latency_ms": Panel("time for one sample, ms (median, quartiles)", log=True),
}


def draw_sampler_sweep(table: Table) -> "Figure":
    """Draw quality and latency against the number of steps, a curve per sampler.

    Args:
        table: of `sampler_sweep`.
    """
    measured = {metric for row in table.values() for metric in row}
    panels = {metric: panel for metric, panel in SWEEP_PANELS.items() if metric in measured}
    rows, columns = (2, 3) if len(panels) > 4 else (1, 4)
    figure = new_figure(5 * columns, 3.8 * rows)
    axes = figure.subplots(rows, columns).flat
    for ax, (metric, panel) in zip(axes, panels.items(), strict=True):
        curves = []
        for method in ("ddim_eta_1", "dpmpp", "dpmpp_eta_1", "ddim"):
            found, (label, style) = by_steps(table, f"{method}/", metric), METHODS[method]
            if found:
                label = label.removeprefix("model, ")
                curves.append(Curve(list(found), list(found.values()), label, style))
        draw_panel(ax, panel, curves)
        scale_by(ax, sorted({s for curve in curves for s in curve.x}), "denoising steps")
    enough = [
        s
        for s in by_steps(table, "ddim/", "mse")
        if len(lines_met(table[f"ddim/{s}"])) == len(PLAN_LINES)
    ]
    answer = "DDIM with none of these recreates"
    if enough:
        ms = table[f"ddim/{enough[0]}"]["latency_ms"].value
        answer = f"DDIM with {enough[0]} step{'s'[: enough[0] - 1]}, in {ms:.2g} ms, recreates"
    n = max(row["mse"].n for row in table.values())
    title = (
        f"How many steps, and which sampler?  {answer} within the plan's optimal line  (n = {n})"
    )
    figure.suptitle(title, fontsize=13)
    return figure
