"""The verdict: one table of criteria, the plan's and this project's own, and one judge for all.

A criterion is a line for one metric of one table, written as a reader sees it:

    > 20, < 0.005, ≥ 0.98, ≤ 100    the value lies on this side
    within ±0.05, 0.5 to 2          between these (the ends of the second do not count)
    yes, all                        a share, or an answer of 0 or 1, that is 1
    all 5                           a count that reaches this

It is

    met                 the model keeps to the line, and no control does
    not discriminating  the model keeps to the line, but so does a control: it says nothing
    not met             the model does not keep to the line
    not measured        the metric was not measured: no GPU, no record of the training, or a
                        criterion for the eye

A criterion may hold for straight gestures alone, whose distribution is known, or for others alone:
Criterion.data says so.

The tables are those of the protocols. After the plan's criteria come this project's own: stricter,
and about what the plan does not ask. To judge a metric, add its line to CRITERIA.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from augmentation.presets import COMPLEXITY_LEVELS
from evaluation.controls import LIMITS, VALIDATION_DATA, is_control
from evaluation.estimates import Estimate, Table

# The plan's optimal line of each metric of reconstruction.
PLAN_LINES = {
    "mse": "< 0.005",
    "mean_snr_db": "> 20",
    "temporal_iou": "> 0.9",
    "spatial_accuracy": "> 0.9",
    "gesture_type_accuracy": "> 0.95",
}
# What generated gestures should score. Fresh real gestures score 0.97 in coverage (1 - 2^-k), 0.5
# in copy_auc and about 0.02 in share_near_copies.
GENERATE_LINES = {
    "valid": "≥ 0.98",
    "duration_bias": "within ±0.05",
    "type_mix_error": "≤ 0.03",
    "coverage": "≥ 0.95",
    "copy_auc": "≤ 0.55",
    "share_near_copies": "≤ 0.05",
}
# What gestures should score that neither a person nor a classifier tells from real ones.
REALISM_LINES = {
    "auc": "≤ 0.8",
    "shake_swipes": "≤ 0.15",
    "excess_deviation": "≤ 0.0005",
    "excess_deviation_p90": "≤ 0.004",
    "still_clicks_of_real": "≥ 0.97",
}
# What gestures of an unknown distribution should score: they have no exact limit, so they are held
# against real windows and against answers that need no training, or no diffusion.
WITHOUT_PRIOR_LINES = {
    "mse_to_interpolation": "≤ 1",
    "spatial_accuracy_over_interpolation": "≥ 0",
    "energy": "< 1",
    "coverage_of_real": "≥ 0.95",
    "auc": "≤ 0.75",
    "shake_of_allowed": "≤ 1",
}
COMPLEX_FRAMES = next(x["min_delta_t"] for x in COMPLEXITY_LEVELS if x["name"] == "complex")
LINE_SIGMAS = (0.1, 0.2, 0.4, 0.7)  # noise at which denoising is judged, data units


def number_of(line: str) -> float:
    """Return the (last) number of a line."""
    return float(line.split()[-1].lstrip("±"))


def meets(value: float, line: str) -> bool:
    """Tell whether a value keeps to a line; NaN does not."""
    if line in ("yes", "all"):
        return value >= 1
    words, number = line.split(), number_of(line)
    if words[1] == "to":
        return float(words[0]) < value < number
    return {
        "<": value < number,
        ">": value > number,
        "≤": value <= number,
        "≥": value >= number,
        "all": value >= number,
        "within": abs(value) <= number,
    }[words[0]]


def lines_met(scores: Mapping[str, Estimate], lines: Mapping[str, str] = PLAN_LINES) -> list[str]:
    """Return the metrics whose line these scores meet."""
    return [metric for metric, line in lines.items() if meets(scores[metric].value, line)]


class Criterion(NamedTuple):
    """A line of the plan, or of this project, that `metric` in `table` has to keep to.

    `words` are the plan's; `how` says how they are read, where that is open; what is `exempt` is
    no control of this criterion. `data` are the gestures that it holds for; "" is all.
    """

    level: str
    words: str
    table: str
    metric: str
    line: str
    how: str = ""
    exempt: tuple[str, ...] = ()
    data: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Where its number stands."""
        return self.table, self.metric


KEY, LIVE, MINIMUM = "Key metrics", "Targets while training", "Minimum viable"
OPTIMAL, BASELINES = "Optimal", "Comparison baselines"
CPU_TEST, GPU_TEST = "Mac CPU test", "CUDA GPU test"
BEYOND = "Beyond the plan"
STRAIGHT, OTHER = "straight gestures", "gestures of an unknown distribution"
WHOLE_RUN = "all epochs asked for; a loss that is not finite would have ended the run"
FIFTHS = "share of the fifths of the run whose mean loss is below that of the fifth before"
FARTHEST = "x, y and press; the one farthest from 1"
CONVERGED = "from when on the validation loss is within 10 % of its least value"
COMPLEX = f"gestures of {COMPLEX_FRAMES} frames or more, the plan's complex level"
FIVE = "MSE < 0.005, SNR > 20 dB, IoU > 0.9, spatial > 0.9, type > 0.95: lines met"
BEYOND_RANDOM = "of the five: those whose interval lies on the better side of a random gesture's"
EQUAL_BITS = "MSE of the VAE / MSE of the model from noise that leaves as many bits; the least"
WORST_SIGMA = f"the largest at noise {', '.join(map(str, LINE_SIGMAS))} of the screen"
FAST = "Fast inference < 10ms per sequence on GPU"
ALL_FIVE = f"all {len(PLAN_LINES)}"
LINES = ("interpolation",)  # what is itself the measure is no control
CONTINUE_RIVALS = ("hold_last_position", "nearest_training_item", "regression")
REAL = ("training_items",)  # copies of real gestures are real: a control only where copying counts
RIVAL_WORDS = {
    "interpolation": "straight lines",
    "hold_last_position": "holding the last position",
    "nearest_training_item": "the nearest training gesture",
    "nearest_training_items": "as many of the nearest training gestures",
    "regression": "the regression",
}
# fmt: off
CRITERIA = (
    Criterion(KEY, "Model trains without errors", "training", "finished", "yes", WHOLE_RUN),
    Criterion(KEY, "Training loss decreases consistently", "training", "falls", "all", FIFTHS),
    Criterion(KEY, "SNR > 15dB", "keyframes", "mean_snr_db", "> 15"),
    Criterion(KEY, "Variance ratio 0.5-2.0",
              "keyframes_groups", "variance_ratio", "0.5 to 2", FARTHEST),
    Criterion(KEY, "MSE < 0.02", "keyframes", "mse", "< 0.02"),
    Criterion(KEY, "Visualization shows recognizable patterns", "eye", "patterns", "yes"),
    Criterion(LIVE, "val/mean_snr_db (target: >20dB)", "keyframes", "mean_snr_db", "> 20"),
    Criterion(LIVE, "val/variance_ratio_x/y (target: 0.8-1.2)",
              "keyframes_groups", "variance_ratio", "0.8 to 1.2", FARTHEST),
    Criterion(LIVE, "val/smoothness_ratio_x/y (target: <2.0)",
              "keyframes_groups", "smoothness_ratio", "< 2", "x, y and press; the largest"),
    Criterion(LIVE, "val/mse (target: <0.01)", "keyframes", "mse", "< 0.01"),
    Criterion(MINIMUM, "Reconstruction MSE < 0.01 for simple click actions",
              "keyframes_groups", "mse_click", "< 0.01"),
    Criterion(MINIMUM, "Temporal IoU > 0.8 for action timing preservation",
              "keyframes", "temporal_iou", "> 0.8"),
    Criterion(MINIMUM, "Spatial accuracy > 0.9 within 0.1 normalized coordinate threshold",
              "keyframes", "spatial_accuracy", "> 0.9"),
    Criterion(MINIMUM, "Training convergence within 100 epochs",
              "training", "epochs_to_converge", "≤ 100", CONVERGED),
    Criterion(OPTIMAL, "Reconstruction MSE < 0.005 across all action types",
              "keyframes_groups", "mse_worst_type", "< 0.005", "the type with the largest error"),
    Criterion(OPTIMAL, "Temporal IoU > 0.9 for complex gesture sequences",
              "keyframes_groups", "temporal_iou_complex", "> 0.9", COMPLEX),
    Criterion(OPTIMAL, "Gesture type accuracy > 0.95 for classification preservation",
              "keyframes", "gesture_type_accuracy", "> 0.95"),
    Criterion(OPTIMAL, FAST, "gpu", "ms_per_sequence_alone", "< 10", "one sequence at a time"),
    Criterion(OPTIMAL, FAST, "gpu", "ms_per_sequence_of_256", "< 10", "256 sequences at a time"),
    Criterion(OPTIMAL, "All five lines of reconstruction at once",
              "keyframes_groups", "lines_met", ALL_FIVE, FIVE),
    Criterion(BASELINES,
              "Direct regression (no diffusion): Should outperform on reconstruction quality",
              "baselines_lines", "regression", "> 1",
              "keyframes: MSE of the regression / MSE of the model"),
    Criterion(BASELINES, "VAE reconstruction: Should match or exceed reconstruction fidelity",
              "baselines_lines", "vae", "> 1", EQUAL_BITS, (), STRAIGHT),
    Criterion(BASELINES, "Random sampling: Should significantly outperform on all metrics",
              "keyframes_groups", "metrics_beyond_random", ALL_FIVE, BEYOND_RANDOM),
    Criterion(CPU_TEST, "Model instantiation without errors", "program", "instantiated", "yes"),
    Criterion(CPU_TEST, "Forward pass produces correct shapes", "program", "shapes_right", "yes"),
    Criterion(CPU_TEST, "Training loss decreases over 3 epochs",
              "training", "loss_ratio_3_epochs", "< 1",
              "this run: loss of epoch 3 / loss of epoch 1"),
    Criterion(CPU_TEST, "All metrics compute without errors",
              "program", "metrics_finite", "yes", "all are finite"),
    Criterion(CPU_TEST, "SNR metrics show reasonable values (>10dB)",
              "keyframes", "mean_snr_db", "> 10"),
    Criterion(GPU_TEST, "CUDA detection and model moves to GPU", "gpu", "found", "yes"),
    Criterion(GPU_TEST, "GPU memory usage reasonable (<1GB)",
              "gpu", "training_memory_gb", "< 1", "peak of 5 training steps"),
    Criterion(GPU_TEST, "Forward pass 2x+ faster than CPU",
              "gpu", "forward_speedup", "> 2", "16 sequences"),
    Criterion(GPU_TEST, "Training completes without OOM errors",
              "gpu", "trained", "yes", "5 steps"),
    Criterion(GPU_TEST, "DDIM sampling <1s for small batches",
              "gpu", "sampling_s", "< 1", "8 sequences, 20 steps"),
    *(Criterion(BEYOND, words, "keyframes", metric, line, "", (), STRAIGHT)
      for words, metric, line in (
        ("Reconstruction MSE", "mse", "< 0.00005"),
        ("SNR, dB", "mean_snr_db", "> 40"),
        ("Temporal IoU", "temporal_iou", "> 0.999"),
        ("Spatial accuracy", "spatial_accuracy", "> 0.995"),
        ("Gesture type accuracy", "gesture_type_accuracy", "> 0.98"),
    )),
    *(Criterion(BEYOND, words, "keyframes", metric, WITHOUT_PRIOR_LINES[metric], "", LINES, OTHER)
      for words, metric in (
        ("Recreated as closely as by straight lines: MSE / theirs", "mse_to_interpolation"),
        ("Spatial accuracy, less that of straight lines", "spatial_accuracy_over_interpolation"),
    )),
    *(Criterion(BEYOND, f"{words}: energy score / that of {RIVAL_WORDS[rival]}", table,
                f"energy_to_{rival}", WITHOUT_PRIOR_LINES["energy"], "", (), OTHER)
      for table, words, rivals in (
        ("infill_press_edges", "Recreated from press edges", ("interpolation", "regression")),
        ("continue_50", "Continued from 50 frames", CONTINUE_RIVALS),
        ("continue_125", "Continued from 125 frames", CONTINUE_RIVALS),
    ) for rival in rivals),
    Criterion(BEYOND, "One-shot denoising: error / the least possible (Bayes)",
              "denoise_lines", "r", "< 1.1", WORST_SIGMA, (), STRAIGHT),
    Criterion(BEYOND, "Denoising by DDIM: error / that of the exact score",
              "denoise_lines", "r_ddim", "< 1.1", WORST_SIGMA, (), STRAIGHT),
    *(Criterion(BEYOND, words, "generate", metric, GENERATE_LINES[metric], "", exempt, data)
      for words, metric, exempt, data in (
        ("Generated gestures are valid", "valid", REAL, STRAIGHT),
        ("Their durations are right", "duration_bias", REAL, ""),
        ("Each type has its share", "type_mix_error", REAL, STRAIGHT),
        ("Real gestures are covered", "coverage", REAL, STRAIGHT),
        ("No nearer to training than to held-out gestures", "copy_auc", (), ""),
        ("None is a copy of a training gesture", "share_near_copies", (), ""),
    )),
    Criterion(BEYOND, "Real gestures are covered: coverage / that of real windows", "generate",
              "coverage_of_real", WITHOUT_PRIOR_LINES["coverage_of_real"], "", REAL, OTHER),
    Criterion(BEYOND, "All of these at once",
              "generate", "all_lines", f"all {len(GENERATE_LINES)}", "", (), STRAIGHT),
    *(Criterion(BEYOND, f"{words} {what}", table, metric, WITHOUT_PRIOR_LINES[line], "", (), OTHER)
      for table, words in (("realism", "Generated"), ("realism_recreated", "Recreated"))
      for what, metric, line in (
        ("contacts told from real ones by a classifier, AUC", "auc", "auc"),
        ("swipes: shake / what real ones allow", "shake_swipes_of_allowed", "shake_of_allowed"),
        ("contacts: shake / what real ones allow", "shake_all_of_allowed", "shake_of_allowed"),
    )),
    *(Criterion(BEYOND, words, "realism", metric, REALISM_LINES[metric], "", (), STRAIGHT)
      for words, metric in (
        ("A classifier tells generated from real gestures, AUC", "auc"),
        ("Generated swipes do not shake, thousandths of the screen", "shake_swipes"),
        ("They are as straight as real ones: largest deviation, median", "excess_deviation"),
        ("The same, 90th percentile", "excess_deviation_p90"),
        ("Clicks stay within a pixel as often as real ones, ratio", "still_clicks_of_real"),
    )),
    *(Criterion(BEYOND, words, "realism_recreated", metric, REALISM_LINES[metric], "", (), STRAIGHT)
      for words, metric in (
        ("A classifier tells recreated from real gestures, AUC", "auc"),
        ("Recreated swipes do not shake, thousandths of the screen", "shake_swipes"),
    )),
)
# fmt: on
# Why a table may be missing.
MISSING = {
    "keyframes": "no gesture has a press edge",
    "keyframes_groups": "no gesture has a press edge",
    "training": "no whole metrics.jsonl beside the checkpoint",
    "gpu": "not run on a GPU",
    "baselines_lines": "python -m evaluation.baselines was not run",
    "realism": "no swipe, no click, or no scikit-learn",
    "realism_recreated": "no press edge, no swipe, or no scikit-learn",
    "eye": "for the eye: see the figures and the replay",
    "infill_press_edges": "no gesture has a press edge",
    "continue_50": "hardly a window begins or ends pressed",
    "continue_125": "hardly a window begins or ends pressed",
    "energy_to_regression": "python -m evaluation.baselines was not run",
}


def criteria_for(data: str) -> list[Criterion]:
    """Return the criteria of STRAIGHT gestures, or of OTHER ones."""
    return [c for c in CRITERIA if c.data in ("", data)]


class Verdict(NamedTuple):
    """A criterion with what came out for a setting of its table.

    `controls` are those that meet it, with their values; `real` is what held-out gestures score,
    where the table says.
    """

    criterion: Criterion
    setting: str
    estimate: Estimate | None
    verdict: str
    controls: dict[str, float]
    real: float | None = None

    @property
    def how(self) -> str:
        """How the criterion is read, and what it is held against."""
        if self.real is None:
            return self.criterion.how
        return f"real gestures: {self.real:.3g}; {self.setting.replace('_', ' ')}"


def judge(
    tables: Mapping[str, Table],
    settings: Mapping[str, str] | None = None,
    criteria: Sequence[Criterion] | None = None,
    data: str = STRAIGHT,
) -> list[Verdict]:
    """Hold one setting of each table against the criteria.

    Args:
        tables: by name; what is missing in them is not measured.
        settings: table -> the setting whose verdict it is; where nothing is said, "model".
        criteria: the lines; None = those for `data`.
        data: what the tables are of; the interpolation is a limit of STRAIGHT gestures alone.

    Returns:
        A verdict per criterion, in their order.
    """
    judged = settings or {}
    return [
        _judge_one(c, tables.get(c.table, {}), judged.get(c.table, "model"), data)
        for c in (criteria_for(data) if criteria is None else criteria)
    ]


def _judge_one(criterion: Criterion, table: Table, setting: str, data: str) -> Verdict:
    """Judge one criterion on the table that it is about."""
    metric, row = criterion.metric, table.get(setting, {})
    real = table.get(VALIDATION_DATA, {}).get(metric)
    found = Verdict(criterion, setting, None, "not measured", {}, real and real.value)
    if metric not in row or math.isnan(row[metric].value):
        return found
    also = {
        name: score.value
        for name, score in control_scores(table, criterion, setting, data).items()
        if meets(score.value, criterion.line)
    }
    verdict = "not met"
    if meets(row[metric].value, criterion.line):
        verdict = "not discriminating" if also else "met"
    return found._replace(estimate=row[metric], verdict=verdict, controls=also)


def limits_of(data: str, limits: Sequence[str] = LIMITS) -> tuple[str, ...]:
    """Return those of the limits that are limits of STRAIGHT, or of OTHER, gestures."""
    return tuple(name for name in limits if data == STRAIGHT or name not in LINES)


def control_scores(
    table: Table, criterion: Criterion, setting: str, data: str = STRAIGHT
) -> dict[str, Estimate]:
    """Return what the controls of a criterion's table score."""
    return {
        name: row[criterion.metric]
        for name, row in table.items()
        if is_control(name, limits_of(data))
        and name not in (setting, *criterion.exempt)
        and criterion.metric in row
    }


def verdicts_to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Turn verdicts into what results.json holds."""
    rows = []
    for verdict in verdicts:
        criterion, (value, ci, n) = verdict.criterion, verdict.estimate or (None, None, 0)
        rows.append(
            {
                "level": criterion.level,
                "criterion": criterion.words,
                "protocol": criterion.table,
                "setting": verdict.setting,
                "metric": criterion.metric,
                "how": verdict.how,
                "line": criterion.line,
                "value": value,
                "ci": ci,
                "n": n,
                "verdict": verdict.verdict,
                "controls_that_meet_it": verdict.controls,
            }
        )
    return rows


# ----------------------------------------------------------------------------------------
# AT A GLANCE
# ----------------------------------------------------------------------------------------

FROM_FRAMES = "Recreate it from the frames where the finger lands and lifts"
FROM_NOISE = f"Recreate it from noise of {LINE_SIGMAS[0]} to {LINE_SIGMAS[-1]} of the screen"
FROM_NOTHING = "Invent one from nothing"
GO_ON = "Go on with it from its first frames"
LIKE_REAL = "Invent one that nobody can tell from a real one"
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


def headlines(
    tables: Mapping[str, Table], settings: Mapping[str, str] | None = None, data: str = STRAIGHT
) -> list[Headline]:
    """Return the compact table: the model between the best trivial answer and the limit.

    A row whose table is missing is left out.
    """
    found = []
    for asked, words, criterion in headline_rows(data):
        table, metric = tables.get(criterion.table, {}), criterion.metric
        (verdict,) = judge(tables, settings, [criterion], data)
        controls = control_scores(table, criterion, verdict.setting, data)
        if verdict.estimate is None or not controls:
            continue
        best = (min if criterion.line[0] in "<≤" else max)(
            controls, key=lambda name: controls[name].value
        )
        limits = [table[n][metric].value for n in limits_of(data) if metric in table.get(n, {})]
        limit = 1.0 if criterion.table == "denoise_lines" else limits[0] if limits else None
        found.append(Headline(asked, words, verdict, best, controls[best].value, limit))
    return found


def _shorter(words: str) -> str:
    """Return what a criterion of OTHER gestures is called below a heading that says the task."""
    words = words.removeprefix("Recreated from press edges: ").replace("Continued from", "after")
    return words.replace("energy score / that of", "energy score over")


def headline_rows(data: str) -> list[tuple[str, str, Criterion]]:
    """Return what is asked, in which words, and the criterion: five lines of the plan and others.

    Of STRAIGHT gestures one of noise and three of invention, of OTHER ones what recreation and
    continuation are worth beside simple answers.
    """
    own = {c.key: c for c in criteria_for(data)}
    auc = (LIKE_REAL, "a classifier's AUC; 0.5 if it cannot tell", own["realism", "auc"])
    if data == OTHER:
        asked = {"keyframes": FROM_FRAMES, "infill_press_edges": FROM_FRAMES}
        rows = [
            (asked.get(c.table, GO_ON), _shorter(c.words), c)
            for c in own.values()
            if c.data == OTHER and c.table.startswith((*asked, "continue"))
        ]
        real, shake = own["generate", "coverage_of_real"], "shake_swipes_of_allowed"
        return [
            *rows,
            (FROM_NOTHING, "coverage / that of real windows", real),
            auc,
            (LIKE_REAL, "shake / what real swipes allow", own["realism", shake]),
        ]
    plans = [
        (FROM_FRAMES, LINE_NAMES[metric], Criterion("", "", "keyframes", metric, line))
        for metric, line in PLAN_LINES.items()
    ]
    ratio = "error / the least possible (Bayes), at worst"
    words = "shake, thousandths of the screen a frame"
    return [
        *plans,
        (FROM_NOISE, ratio, own["denoise_lines", "r"]),
        (FROM_NOTHING, "share that are valid gestures", own["generate", "valid"]),
        auc,
        (LIKE_REAL, words, own["realism", "shake_swipes"]),
    ]


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
    values = {row.asked: row.verdict.estimate.value for row in rows if row.verdict.estimate}
    rest = []
    if FROM_NOISE in values:
        times = f"{values[FROM_NOISE]:.{2 if values[FROM_NOISE] < 10 else 0}f}"
        rest.append(f"Under noise its error is at most {times} times the least possible.")
    if FROM_NOTHING in values:
        share = f"{values[FROM_NOTHING]:.0%}"
        rest.append(f"Of the gestures that it generates from nothing, {share} are valid.")
    for row in rows:
        if row.asked == LIKE_REAL and row.verdict.criterion.metric == "auc":
            auc = f"{row.verdict.estimate.value:.2f}" if row.verdict.estimate else "unknown"
            beside = f" (real from real: {row.limit:.2f})" if row.limit is not None else ""
            rest.append(f"A classifier tells them from real ones with an AUC of {auc}{beside}.")
    return [answer, " ".join(rest)] if rest else [answer]
