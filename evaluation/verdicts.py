"""The verdict: every criterion of the plan, judged under a protocol that can judge it.

A criterion is a line for one metric of one table. It is

    met                 the model keeps to the line, and no control does
    not discriminating  the model keeps to the line, but so does a control: it says nothing
    not met             the model does not keep to the line
    not measured        the metric was not measured: no GPU, no record of the training, or a
                        criterion for the eye

The tables are those of the protocols, and of evidence.py what only the verdict asks for.
After the plan's criteria come this project's own: stricter, and about what the plan does not ask.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.distribution import CONTROLS as GENERATE_CONTROLS
from evaluation.distribution import FLOOR_SETTING, judge_samples
from evaluation.estimates import Estimate, Table, verdict
from evaluation.evidence import COMPLEX_FRAMES, LINE_SIGMAS
from evaluation.protocols import PLAN_LINES, is_control

INF = math.inf


class Criterion(NamedTuple):
    """A line of the plan: `metric` in `table` has to lie between low and high.

    `words` are the plan's; `how` says how they are read, where that is open; `said` is the line in
    words, where it is no number. A metric whose line is "yes" is 1 or 0.
    """

    level: str
    words: str
    table: str
    metric: str
    low: float = -INF
    high: float = INF
    how: str = ""
    said: str = ""

    @property
    def line(self) -> str:
        """The line as text."""
        if self.said:
            return self.said
        if self.low > -INF and self.high < INF:
            return f"{self.low:g} to {self.high:g}"
        return f"> {self.low:g}" if self.low > -INF else f"< {self.high:g}"

    def is_met(self, value: float) -> bool:
        """Tell whether a value keeps to the line; NaN does not."""
        return self.low < value < self.high


def _yes(level: str, words: str, table: str, metric: str, how: str = "") -> Criterion:
    return Criterion(level, words, table, metric, low=0.5, how=how, said="yes")


KEY, LIVE, MINIMUM = "Key metrics", "Targets while training", "Minimum viable"
OPTIMAL, BASELINES = "Optimal", "Comparison baselines"
CPU_TEST, GPU_TEST = "Mac CPU test", "CUDA GPU test"
BEYOND = "Beyond the plan"
WHOLE_RUN = "all epochs asked for; a loss that is not finite would have ended the run"
FIFTHS = "share of the fifths of the run whose mean loss is below that of the fifth before"
FARTHEST = "x, y and press; the one farthest from 1"
WORST_SIGMA = f"the largest at noise {', '.join(map(str, LINE_SIGMAS))} of the screen"

CRITERIA = (
    _yes(KEY, "Model trains without errors", "training", "finished", WHOLE_RUN),
    Criterion(
        KEY,
        "Training loss decreases consistently",
        "training",
        "falls",
        low=0.99,
        how=FIFTHS,
        said="all",
    ),
    Criterion(KEY, "SNR > 15dB", "keyframes", "mean_snr_db", low=15),
    Criterion(
        KEY, "Variance ratio 0.5-2.0", "keyframes_groups", "variance_ratio", 0.5, 2, FARTHEST
    ),
    Criterion(KEY, "MSE < 0.02", "keyframes", "mse", high=0.02),
    _yes(KEY, "Visualization shows recognizable patterns", "eye", "patterns"),
    Criterion(LIVE, "val/mean_snr_db (target: >20dB)", "keyframes", "mean_snr_db", low=20),
    Criterion(
        LIVE,
        "val/variance_ratio_x/y (target: 0.8-1.2)",
        "keyframes_groups",
        "variance_ratio",
        0.8,
        1.2,
        FARTHEST,
    ),
    Criterion(
        LIVE,
        "val/smoothness_ratio_x/y (target: <2.0)",
        "keyframes_groups",
        "smoothness_ratio",
        high=2,
        how="x, y and press; the largest",
    ),
    Criterion(LIVE, "val/mse (target: <0.01)", "keyframes", "mse", high=0.01),
    Criterion(
        MINIMUM,
        "Reconstruction MSE < 0.01 for simple click actions",
        "keyframes_groups",
        "mse_click",
        high=0.01,
    ),
    Criterion(
        MINIMUM,
        "Temporal IoU > 0.8 for action timing preservation",
        "keyframes",
        "temporal_iou",
        low=0.8,
    ),
    Criterion(
        MINIMUM,
        "Spatial accuracy > 0.9 within 0.1 normalized coordinate threshold",
        "keyframes",
        "spatial_accuracy",
        low=0.9,
    ),
    Criterion(
        MINIMUM,
        "Training convergence within 100 epochs",
        "training",
        "epochs_to_converge",
        high=101,
        said="≤ 100",
        how="from when on the validation loss is within 10 % of its least value",
    ),
    Criterion(
        OPTIMAL,
        "Reconstruction MSE < 0.005 across all action types",
        "keyframes_groups",
        "mse_worst_type",
        high=0.005,
        how="the type with the largest error",
    ),
    Criterion(
        OPTIMAL,
        "Temporal IoU > 0.9 for complex gesture sequences",
        "keyframes_groups",
        "temporal_iou_complex",
        low=0.9,
        how=f"gestures of {COMPLEX_FRAMES} frames or more, the plan's complex level",
    ),
    Criterion(
        OPTIMAL,
        "Gesture type accuracy > 0.95 for classification preservation",
        "keyframes",
        "gesture_type_accuracy",
        low=0.95,
    ),
    Criterion(
        OPTIMAL,
        "Fast inference < 10ms per sequence on GPU",
        "gpu",
        "ms_per_sequence_alone",
        high=10,
        how="one sequence at a time",
    ),
    Criterion(
        OPTIMAL,
        "Fast inference < 10ms per sequence on GPU",
        "gpu",
        "ms_per_sequence_of_256",
        high=10,
        how="256 sequences at a time",
    ),
    Criterion(
        OPTIMAL,
        "All five lines of reconstruction at once",
        "keyframes_groups",
        "lines_met",
        low=len(PLAN_LINES) - 0.5,
        said=f"all {len(PLAN_LINES)}",
        how="MSE < 0.005, SNR > 20 dB, IoU > 0.9, spatial > 0.9, type > 0.95: lines met",
    ),
    Criterion(
        BASELINES,
        "Direct regression (no diffusion): Should outperform on reconstruction quality",
        "baselines_lines",
        "regression",
        low=1,
        how="keyframes: MSE of the regression / MSE of the model",
    ),
    Criterion(
        BASELINES,
        "VAE reconstruction: Should match or exceed reconstruction fidelity",
        "baselines_lines",
        "vae",
        low=1,
        how="MSE of the VAE / MSE of the model from noise that leaves as many bits; the least",
    ),
    Criterion(
        BASELINES,
        "Random sampling: Should significantly outperform on all metrics",
        "keyframes_groups",
        "metrics_beyond_random",
        low=len(PLAN_LINES) - 0.5,
        said=f"all {len(PLAN_LINES)}",
        how="of the five: those whose interval lies on the better side of a random gesture's",
    ),
    _yes(CPU_TEST, "Model instantiation without errors", "program", "instantiated"),
    _yes(CPU_TEST, "Forward pass produces correct shapes", "program", "shapes_right"),
    Criterion(
        CPU_TEST,
        "Training loss decreases over 3 epochs",
        "training",
        "loss_ratio_3_epochs",
        high=1,
        how="this run: loss of epoch 3 / loss of epoch 1",
    ),
    _yes(
        CPU_TEST,
        "All metrics compute without errors",
        "program",
        "metrics_finite",
        "all are finite",
    ),
    Criterion(
        CPU_TEST, "SNR metrics show reasonable values (>10dB)", "keyframes", "mean_snr_db", low=10
    ),
    _yes(GPU_TEST, "CUDA detection and model moves to GPU", "gpu", "found"),
    Criterion(
        GPU_TEST,
        "GPU memory usage reasonable (<1GB)",
        "gpu",
        "training_memory_gb",
        high=1,
        how="peak of 5 training steps",
    ),
    Criterion(
        GPU_TEST,
        "Forward pass 2x+ faster than CPU",
        "gpu",
        "forward_speedup",
        low=2,
        how="16 sequences",
    ),
    _yes(GPU_TEST, "Training completes without OOM errors", "gpu", "trained", "5 steps"),
    Criterion(
        GPU_TEST,
        "DDIM sampling <1s for small batches",
        "gpu",
        "sampling_s",
        high=1,
        how="8 sequences, 20 steps",
    ),
    Criterion(BEYOND, "Reconstruction MSE", "keyframes", "mse", high=5e-5, said="< 0.00005"),
    Criterion(BEYOND, "SNR, dB", "keyframes", "mean_snr_db", low=40),
    Criterion(BEYOND, "Temporal IoU", "keyframes", "temporal_iou", low=0.999),
    Criterion(BEYOND, "Spatial accuracy", "keyframes", "spatial_accuracy", low=0.995),
    Criterion(BEYOND, "Gesture type accuracy", "keyframes", "gesture_type_accuracy", low=0.98),
    Criterion(
        BEYOND,
        "One-shot denoising: error / the least possible (Bayes)",
        "denoise_lines",
        "r",
        high=1.1,
        how=WORST_SIGMA,
    ),
    Criterion(
        BEYOND,
        "Denoising by DDIM: error / that of the exact score",
        "denoise_lines",
        "r_ddim",
        high=1.1,
        how=WORST_SIGMA,
    ),
)
GENERATE_WORDS = {
    "valid": "Generated gestures are valid",
    "duration_bias": "Their durations are right",
    "type_mix_error": "Each type has its share",
    "coverage": "Real gestures are covered",
    "copy_auc": "No nearer to training than to held-out gestures",
    "share_near_copies": "None is a copy of a training gesture",
    "all_lines": "All of these at once",
}
# Why a table may be missing.
MISSING = {
    "keyframes": "no gesture has a press edge",
    "keyframes_groups": "no gesture has a press edge",
    "training": "no whole metrics.jsonl beside the checkpoint",
    "gpu": "not run on a GPU",
    "baselines_lines": "python -m evaluation.baselines was not run",
    "eye": "for the eye: see the figures and the replay",
}


class Verdict(NamedTuple):
    """A criterion with what came out for a setting of its table.

    `controls` are those that meet it, with their values.
    """

    criterion: Criterion
    setting: str
    estimate: Estimate | None
    verdict: str
    controls: dict[str, float]


def judge(
    tables: Mapping[str, Table], setting: str = "model", criteria: tuple[Criterion, ...] = CRITERIA
) -> list[Verdict]:
    """Hold a setting of the tables against the criteria.

    Args:
        tables: by name; what is missing in them is not measured.
        setting: whose verdict it is: the model, or what stands in its place.
        criteria: the lines.

    Returns:
        A verdict per criterion, in their order.
    """
    return [_judge_one(c, tables.get(c.table, {}), setting) for c in criteria]


def _judge_one(criterion: Criterion, table: Table, setting: str) -> Verdict:
    """Judge one criterion on the table that it is about."""
    estimate = table.get(setting, {}).get(criterion.metric)
    if estimate is None or math.isnan(estimate.value):
        return Verdict(criterion, setting, None, "not measured", {})
    values = {
        name: row[criterion.metric].value
        for name, row in table.items()
        if is_control(name) and name != setting and criterion.metric in row
    }
    also = {name: value for name, value in values.items() if criterion.is_met(value)}
    found = verdict(criterion.is_met(estimate.value), list(also))
    return Verdict(criterion, setting, estimate, found, also)


def judge_generated(table: Table, setting: str) -> list[Verdict]:
    """Return the verdicts of `distribution.judge_samples`; a metric that is NaN is not measured."""
    if setting not in table:
        return []
    found = []
    for metric, row in judge_samples(table, setting).items():
        how = f"real gestures: {row['floor']:.3g}; {setting.replace('_', ' ')}"
        words = GENERATE_WORDS.get(metric, metric)
        line = row["line"].replace(">=", "≥").replace("<=", "≤")
        criterion = Criterion(BEYOND, words, "generate", metric, how=how, said=line)
        estimate = Estimate(row["value"], row["ci"], table[setting]["valid"].n)
        also = row["controls_that_meet_it"]
        # what is no metric is how many lines are met: by these, all
        values = {name: table[name].get(metric, estimate).value for name in also}
        if math.isnan(estimate.value):
            found.append(Verdict(criterion, setting, None, "not measured", {}))
        else:
            found.append(Verdict(criterion, setting, estimate, row["verdict"], values))
    return found


def verdicts_to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Turn verdicts into what results.json holds."""
    rows = []
    for criterion, setting, estimate, found, controls in verdicts:
        value, ci, n = estimate or (None, None, 0)
        rows.append(
            {
                "level": criterion.level,
                "criterion": criterion.words,
                "protocol": criterion.table,
                "setting": setting,
                "metric": criterion.metric,
                "how": criterion.how,
                "line": criterion.line,
                "value": value,
                "ci": ci,
                "n": n,
                "verdict": found,
                "controls_that_meet_it": controls,
            }
        )
    return rows


# ----------------------------------------------------------------------------------------
# AT A GLANCE
# ----------------------------------------------------------------------------------------

LINE_NAMES = {
    "mse": "mean squared error",
    "mean_snr_db": "signal to noise, dB",
    "temporal_iou": "timing: overlap of the touches (IoU)",
    "spatial_accuracy": "place: share within 0.1",
    "gesture_type_accuracy": "same type of gesture",
}


class Headline(NamedTuple):
    """A row of the compact table: the model between the best trivial answer and the limit."""

    asked: str
    words: str
    verdict: Verdict
    control_name: str
    control: float
    limit: float | None


def headlines(tables: Mapping[str, Table], verdicts: Sequence[Verdict]) -> list[Headline]:
    """Return the compact table: the five lines of reconstruction, one of noise, one of invention.

    A row whose table is missing is left out.
    """
    table, rows = tables.get("keyframes", {}), []
    for metric, (side, line) in PLAN_LINES.items():
        low, high = (-INF, line) if side == "<" else (line, INF)
        (found,) = judge(tables, criteria=(Criterion("", "", "keyframes", metric, low, high),))
        limit = table["interpolation"][metric].value if "interpolation" in table else None
        asked = "Recreate it from the frames where the finger lands and lifts"
        controls = [name for name in table if is_control(name)]
        rows += _headline(asked, LINE_NAMES[metric], found, table, controls, limit)
    for found in verdicts:
        criterion = found.criterion
        table = tables.get(criterion.table, {})
        if (criterion.table, criterion.metric) == ("denoise_lines", "r"):
            words = "error / the least possible (Bayes), at worst"
            asked = f"Recreate it from noise of {LINE_SIGMAS[0]} to {LINE_SIGMAS[-1]} of the screen"
            controls = [name for name in table if name != "model"]
            rows += _headline(asked, words, found, table, controls, 1)
        if (criterion.table, criterion.metric) == ("generate", "valid"):
            real = table[FLOOR_SETTING]["valid"].value
            controls = [name for name in GENERATE_CONTROLS if name in table]
            words = "share that are valid gestures"
            rows += _headline("Invent one from nothing", words, found, table, controls, real)
    return rows


def _headline(
    asked: str,
    words: str,
    found: Verdict,
    table: Table,
    controls: Sequence[str],
    limit: float | None,
) -> list[Headline]:
    """Return the row of a verdict with its best control; none if it was not measured."""
    metric = found.criterion.metric
    values = {name: table[name][metric].value for name in controls if metric in table[name]}
    if found.estimate is None or not values:
        return []
    smaller_is_better = found.criterion.high < INF
    best = (min if smaller_is_better else max)(values, key=lambda name: values[name])
    return [Headline(asked, words, found, best, values[best], limit)]


def summarise(verdicts: Sequence[Verdict], rows: Sequence[Headline]) -> list[str]:
    """Return the verdict as sentences: the answer, then what it rests on."""
    lines = [row.verdict for row in rows if row.verdict.criterion.table == "keyframes"]
    missed = [line for line in lines if line.verdict == "not met"]
    if not lines:
        answer = "Nothing could be judged: no gesture has a press edge, so none says what it is."
    elif missed:
        names = ", ".join(line.criterion.metric for line in missed)
        answer = (
            f"No: this model misses {len(missed)} of the plan's {len(lines)} criteria ({names}) "
            "when it recreates gestures from the frames where the finger lands and lifts."
        )
    else:
        together = next(v for v in verdicts if v.criterion.metric == "lines_met")
        also = "; but so does " if together.controls else "; no trivial answer does"
        answer = (
            f"Yes: given only the frames where the finger lands and lifts, this model recreates "
            f"gestures closely enough for all {len(lines)} of the plan's criteria{also}"
            f"{', '.join(together.controls)}."
        )
    rest = []
    for row in rows:
        value = row.verdict.estimate.value if row.verdict.estimate else math.nan
        if row.verdict.criterion.table == "denoise_lines":
            times = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            rest.append(f"Under noise its error is at most {times} times the least possible.")
        if row.verdict.criterion.table == "generate":
            rest.append(f"Of the gestures that it invents from nothing, {value:.0%} are valid.")
    return [answer, " ".join(rest)] if rest else [answer]
