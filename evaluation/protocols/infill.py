"""infill: the rest of a gesture from a few given frames that do not determine it.

Given the touch-down alone, onset and start are known and the rest is open: type, duration, end.
A paired error cannot judge that. The exact posterior can (evaluation/touch_down.py), and where
there is none, the energy score. So gestures whose distribution is not known are asked more:

    infill              given the touch-down
    infill_press_edges  given the press edges: 16 recreations in the place of one
    continue_50, _125   windows that begin or end pressed, given so many frames

The rows: K answers to each of n gestures. `exact_posterior` and `exact_mean` are limits: draws from
it, and its mean, which is what a regression tends to. The mean has the least MSE of all answers,
half that of a draw, and is no gesture: its press fades out.

    model                    the trained denoiser, the given frames known
    untrained_model          the same network before training
    shuffled_condition       the model, given the frames of another gesture
    one_training_item        always the same real gesture: valid, without diversity
    random_training_items    real gestures that ignore the question
    pasted_training_items    the same with the given frames put in, so that consistency is free
    nearest_training_items   the K that are nearest to the given frames, likewise put in
    interpolation            straight lines between the given frames, held outside them; in
                             continue, hold_last_position
    training_mean, zeros
  where the distribution is not known:
    nearest_training_item    the first of the nearest_training_items
    regression               of python -m evaluation.baselines, if it was run

The metrics, over the answers of each gesture first, then over gestures:

    consistent             share of the answers within TOLERANCE of all given frames; free to who
                           puts them in, as the sampler does
    seam                   distance of a given pressed frame from where the next two, if pressed and
                           not given, lead back to; 0 if what is new continues what is given
    valid                  `validity`, and its factors; consistent_and_valid: both in one answer
    press_softness         `deviations`
    mse                    against the gesture that the frames were taken from
    mse_of_mean            of the mean of the answers, which has the least if they are right; where
                           the distribution is not known
    energy_score           `energy_score`, share of the screen: how far the answers are from the
                           gesture, less half of how far they are from each other. The distribution
                           of the gestures has the least (Gneiting & Raftery 2007, JASA 102)
    distance               its first term; that of a single answer is its energy score
    temporal_iou           of the presses
    diversity              mean RMS distance between two answers
    types_seen             how many of the plan's types are among the K answers
    mean_duration          frames
  where the distribution is not known, of all but the rivals:
    energy_to_{rival}      energy_score over the rival's: interpolation, hold_last_position,
                           nearest_training_item, regression, and nearest_training_items
    mse_of_mean_to_interpolation
  with the exact posterior, for touch_down:
    diversity_ratio        to that of exact_posterior
    mean_rms               distance of the mean answer from exact_mean; with K draws it cannot
                           vanish, and exact_posterior shows how near one gets
    type_mix_error         largest distance of a type's share from its share there
    duration_ks            Kolmogorov-Smirnov distance of the durations from theirs
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior
from evaluation.controls import interpolate
from evaluation.estimates import SEED, Estimate, FloatArray, Table, bootstrap
from evaluation.family import TOLERANCE, deviations, is_linear_gesture, validity
from evaluation.figures import BLUE, ORANGE, new_figure, strip
from evaluation.protocol import Picture, Section, Subject
from evaluation.rivals import find_regression, nearest_by_known_frames
from evaluation.samples import ks_distance
from evaluation.scores import sequence_mse
from evaluation.touch_down import (
    duration_distribution,
    posterior_mean_gesture,
    posterior_samples,
    read_touch_down,
)
from train_diffusion_ddim import (
    DDIMScheduler,
    generate,
    has_press_edge,
    press_edges,
    takes_known_frames,
)
from trainlib.gestures import GESTURE_TYPES, PRESSED
from trainlib.known import touch_down
from trainlib.metrics import classify_gestures
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUTH_SAMPLES = 64  # per condition, of the posterior that shares of types are held against
LIMITS = ("exact_posterior", "exact_mean")
CONTINUED = (50, 125)  # frames given
LEAST_SHARE = 0.05  # of the windows; a question to fewer is not put
ENSEMBLE = "nearest_training_items"  # many answers without a network: a rival, and a control
RIVALS = ("interpolation", "hold_last_position", "nearest_training_item", "regression")
ENERGY_COLUMNS = {
    "energy_score": "energy score",
    "distance": "mean distance",
    "mse": "MSE",
    "mse_of_mean": "MSE of their mean",
    "temporal_iou": "temporal IoU",
    "diversity": "diversity",
}
COLUMNS = {
    "consistent_and_valid": "consistent, valid",
    "seam": "seam",
    "mse": "MSE",
    "press_softness": "press softness",
    "diversity_ratio": "diversity / exact",
    "type_mix_error": "type mix error",
    "duration_ks": "duration KS",
}


def run(s: Subject, num_conditions: int, num_samples: int, num_asked: int) -> list[Section]:
    """Complete gestures of which the touch-down alone is given; `num_asked` if no more is known."""
    if s.prior is None:
        return run_without_prior(s, num_asked, num_samples)
    networks = s.model, s.untrained, s.scheduler
    size: dict[str, Any] = {"num_conditions": num_conditions, "num_samples": num_samples}
    table = infill(*networks, s.x_val, s.x_train, prior=s.prior, sampling=s.sampling, **size)
    if not table:
        return []
    text = (
        f"{num_samples} answers to each of {min(num_conditions, len(s.x_val))} gestures of which "
        "only the touch-down is known, so many answers are right. The limits are draws from the "
        "exact posterior, and its mean: the least MSE of all, but no gesture, which is what a "
        "regression tends to."
    )
    pictures = []
    if "diversity_ratio" in table["model"]:
        caption = "Best is where the exact posterior is; a mean and a copy are not diverse."
        pictures.append(Picture("infill.png", caption, draw_infill, table))
    title = "Infill: completed from the touch-down alone"
    return [Section("infill", table, title, text, COLUMNS, "answers of", pictures, limits=LIMITS)]


class Question(NamedTuple):
    """What is given of gestures whose distribution is not known.

    Attributes:
        title: of its section.
        given: gestures (B, L, C) -> the given frames, (B, L) bool.
        asked: gestures -> those that it is asked of, (B,) bool.
        lines: what the interpolation between the given frames is called.
    """

    title: str
    given: Callable[[Tensor], Tensor]
    asked: Callable[[Tensor], Tensor]
    lines: str = "interpolation"


def is_cut_off(x_0: Tensor) -> Tensor:
    """Tell which windows begin or end pressed, (B,) bool."""
    return (x_0[:, [0, -1], 2] > PRESSED).any(dim=1)


def _first_frames(num: int) -> Callable[[Tensor], Tensor]:
    return lambda x: (torch.arange(x.shape[1], device=x.device) < num).expand(x.shape[:2])


QUESTIONS = {
    "infill_press_edges": Question(
        "Recreate: many answers, given the press edges", press_edges, has_press_edge
    ),
    **{
        f"continue_{num}": Question(
            f"Continue: the first {num} frames given", _first_frames(num), is_cut_off,
            "hold_last_position",
        )
        for num in CONTINUED
    },
    "infill": Question(
        "Infill: completed from the touch-down alone", touch_down, has_press_edge
    ),
}  # fmt: skip


def run_without_prior(s: Subject, num_asked: int, num_samples: int) -> list[Section]:
    """Put the QUESTIONS, and judge the answers by their energy score."""
    if not takes_known_frames(s.model):
        return []
    regression = find_regression(s.folders, s.config, s.x_val.device)
    sections = []
    for name, question in QUESTIONS.items():
        known_mask = question.given(s.x_val)
        is_open = ((s.x_val[..., 2] > PRESSED) & ~known_mask).any(dim=1)
        rows = torch.nonzero(is_open & question.asked(s.x_val))[:, 0]
        if len(rows) < LEAST_SHARE * len(s.x_val) or not len(rows):
            continue
        rows = rows[:num_asked]
        x_0, known_mask = s.x_val[rows], known_mask[rows]
        answers = network_answers(
            s.model, None, s.scheduler, x_0, known_mask, num_samples=num_samples,
            sampling=s.sampling,
        )  # fmt: skip
        answers |= trivial_answers(x_0, known_mask, s.x_train, num_samples)
        answers = {question.lines if k == "interpolation" else k: v for k, v in answers.items()}
        nearest = nearest_by_known_frames(x_0, known_mask, s.x_train)
        nearest = torch.where(known_mask[..., None], x_0, nearest)[:, None]
        answers["nearest_training_item"] = lambda item=nearest: item  # type: ignore[misc]
        if regression:
            shape: Any = tuple(x_0.shape)
            answer = generate(*regression, shape, 1, known=x_0, known_mask=known_mask)[:, None]
            answers["regression"] = lambda item=answer: item  # type: ignore[misc]
        table = energy_table(answers, x_0, known_mask, name)
        text = (
            f"{num_samples} answers to each of {len(rows)} gestures. Energy score: mean distance "
            "of x, y from the gesture over its pressed frames, share of the screen, less half of "
            "the mean distance between two answers; a single answer is scored by its distance. "
            "Less is better."
        )
        about = (question.title, text, ENERGY_COLUMNS, "answers of")
        sections.append(Section(name, table, *about, limits=LIMITS))
    return sections


def energy_table(
    answers: dict[str, Callable[[], Tensor]], x_0: Tensor, known_mask: Tensor, title: str
) -> Table:
    """Score answers by name, (n, K, L, C) each, and hold their energy scores against the rivals'.

    Args:
        answers: data units; functions, so that one is in memory at a time.
        x_0: the gestures, (n, L, C).
        known_mask: the given frames, (n, L) bool.
        title: of the progress bar.
    """
    table: Table = {}
    energy: dict[str, FloatArray] = {}
    of_mean: dict[str, FloatArray] = {}
    for name in progress(list(answers), title):
        answered = answers[name]()
        table[name] = score_answers(answered, x_0, known_mask, None)
        energy[name], _ = energy_score(answered, x_0)
        of_mean[name] = sequence_mse(x_0, answered.mean(dim=1))
        table[name]["mse_of_mean"] = bootstrap(of_mean[name])
    for name, row in table.items():
        for rival in (*RIVALS, ENSEMBLE):
            if rival in energy and name not in (rival, *RIVALS):
                row[f"energy_to_{rival}"] = bootstrap(energy[name], energy[rival])
        if "interpolation" in table and name not in RIVALS:
            ratio = bootstrap(of_mean[name], of_mean["interpolation"])
            row["mse_of_mean_to_interpolation"] = ratio
    return table


# ----------------------------------------------------------------------------------------
# ANSWERS — K to each condition, (n, K, L, C), data units
# ----------------------------------------------------------------------------------------


def network_answers(
    model: nn.Module,
    untrained: nn.Module | None,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    known_mask: Tensor,
    *,
    num_samples: int,
    sampling: dict[str, Any],
) -> dict[str, Callable[[], Tensor]]:
    """Return what asks the networks; arguments as in `infill`, the untrained one is optional."""

    def ask(network: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        known, mask = (a.repeat_interleave(num_samples, dim=0) for a in (x, mask))
        shape: Any = tuple(known.shape)
        answers = generate(network, scheduler, shape, known=known, known_mask=mask, **sampling)
        return answers.unflatten(0, (len(x), num_samples))

    answers = {"model": lambda: ask(model, x_0, known_mask)}
    if untrained:
        answers["untrained_model"] = lambda: ask(untrained, x_0, known_mask)
    shuffled = x_0.roll(1, 0), known_mask.roll(1, 0)
    return answers | {"shuffled_condition": lambda: ask(model, *shuffled)}


def trivial_answers(
    x_0: Tensor, known_mask: Tensor, x_train: Tensor, num_samples: int
) -> dict[str, Callable[[], Tensor]]:
    """Return the controls that need no network; arguments as in `infill`."""
    shape = (len(x_0), num_samples, *x_0.shape[1:])
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(x_train), shape[:2], generator=generator).to(x_train.device)

    def put_in(answers: Tensor) -> Tensor:
        return torch.where(known_mask[:, None, :, None], x_0[:, None], answers)

    def nearest_items() -> Tensor:
        rows = []
        for x, mask in zip(x_0, known_mask, strict=True):
            error = ((x_train[:, mask] - x[mask]) ** 2).sum(dim=(1, 2))
            rows.append(error.argsort()[:num_samples])
        return x_train[torch.stack(rows)]

    return {
        "one_training_item": lambda: x_train[0].expand(shape),
        "random_training_items": lambda: x_train[drawn],
        "pasted_training_items": lambda: put_in(x_train[drawn]),
        "nearest_training_items": lambda: put_in(nearest_items()),
        "interpolation": lambda: interpolate(x_0, known_mask)[:, None].expand(shape),
        "training_mean": lambda: x_train.mean(dim=0).expand(shape),
        "zeros": lambda: torch.zeros(shape, device=x_0.device),
    }


# ----------------------------------------------------------------------------------------
# SCORES
# ----------------------------------------------------------------------------------------


def pairwise_rms(answers: Tensor) -> FloatArray:
    """Return the mean RMS distance between two of the answers, (n,); 0 for a single answer."""
    n, K = answers.shape[:2]
    flat = answers.reshape(n, K, -1).double()
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.sum(dim=(1, 2)) / max(K * (K - 1), 1) / flat.shape[2] ** 0.5
    return mean.cpu().numpy()


def energy_score(answers: Tensor, x_0: Tensor) -> tuple[FloatArray, FloatArray]:
    """Score K answers to each of n gestures as a distribution (Gneiting & Raftery 2007, eq. 21).

        mean_i |s_i - x| - 1/2 mean_{i≠j} |s_i - s_j|

    |.| is the Euclidean distance of x, y, averaged over the frames that are pressed in x; what an
    answer says of an idle frame counts as it stands.

    Args:
        answers: s, (n, K, L, C), data units.
        x_0: x, (n, L, C); each is pressed somewhere.

    Returns:
        The score, and its first term alone, (n,) each, share of the screen.
    """
    pressed = (x_0[..., 2] > PRESSED).double()
    weight = pressed / pressed.sum(dim=1, keepdim=True)  # (n, L)
    xy, K = answers[..., :2].double(), answers.shape[1]

    def distance(a: Tensor, b: Tensor) -> Tensor:  # (n, K, L, 2) → (n, K)
        return ((a - b).norm(dim=-1) * weight[:, None]).sum(dim=2)

    error = distance(xy, x_0[:, None, :, :2].double()).mean(dim=1)
    spread = sum(distance(xy, xy.roll(shift, dims=1)).mean(dim=1) for shift in range(1, K))
    score = error - spread / max(2 * (K - 1), 1)
    return score.cpu().numpy(), error.cpu().numpy()


def seam(answers: Tensor, x_0: Tensor, known_mask: Tensor) -> Estimate:
    """Estimate how far a given frame lies from where the two new ones after it lead back to."""
    pressed, xy = answers[..., 2] > PRESSED, answers[..., :2]
    given = known_mask & (x_0[..., 2] > PRESSED)
    joint = (given[:, :-2] & ~known_mask[:, 1:-1] & ~known_mask[:, 2:])[:, None]
    joint = joint & pressed[:, :, 1:-1] & pressed[:, :, 2:]  # (n, K, L - 2)
    gap = (x_0[:, None, :-2, :2] - 2 * xy[:, :, 1:-1] + xy[:, :, 2:]).norm(dim=-1)
    return bootstrap((gap * joint).sum(dim=(1, 2)).cpu(), joint.sum(dim=(1, 2)).cpu())


def score_answers(
    answers: Tensor, x_0: Tensor, known_mask: Tensor, prior: GesturePrior | None
) -> dict[str, Estimate]:
    """Score answers, (n, K, L, C), data units, to known frames of x_0, (n, L, C).

    Args:
        answers: not rounded.
        x_0: the gestures that the frames were taken from.
        known_mask: the given frames, (n, L) bool.
        prior: durations of a valid gesture; None leaves out what is valid.
    """
    flat, by_condition = answers.flatten(0, 1), answers.shape[:2]

    def mean(each: Tensor) -> Estimate:
        return bootstrap(each.reshape(by_condition).double().mean(dim=1).cpu())

    error = answers - x_0[:, None]
    wrong = error.abs().amax(dim=-1) * known_mask[:, None]
    consistent = wrong.amax(dim=-1) < TOLERANCE  # (n, K)
    factors = validity(flat, prior) if prior else {}
    both = (
        {"consistent_and_valid": consistent & factors["valid"].reshape(by_condition)}
        if prior
        else {}
    )
    energy, distance = energy_score(answers, x_0)
    pressed, pressed_0 = answers[..., 2] > PRESSED, (x_0[..., 2] > PRESSED)[:, None]
    union = (pressed | pressed_0).sum(dim=2)  # not 0: each gesture is pressed
    types = classify_gestures(flat).reshape(by_condition)
    seen = [(types == kind).any(dim=1) for kind in range(1, len(GESTURE_TYPES))]
    return {
        "consistent": mean(consistent),
        "seam": seam(answers, x_0, known_mask),
        **{name: mean(ok) for name, ok in (both | factors).items()},
        "press_softness": mean(deviations(flat)["press_softness"]),
        "mse": mean((error**2).mean(dim=(2, 3))),
        "energy_score": bootstrap(energy),
        "distance": bootstrap(distance),
        "temporal_iou": mean((pressed & pressed_0).sum(dim=2) / union),
        "diversity": bootstrap(pairwise_rms(answers)),
        "types_seen": bootstrap(torch.stack(seen).sum(dim=0).cpu()),
        "mean_duration": mean((flat[..., 2] > PRESSED).sum(dim=1)),
    }


class Posterior(NamedTuple):
    """What the exact posterior says of n conditions."""

    duration: FloatArray  # P(delta_t | onset), (n, D), from the shortest on
    samples: Tensor  # as many draws as there are answers, (n, K, L, C)
    mean: Tensor  # (n, L, C)
    type_shares: FloatArray  # of GESTURE_TYPES, over all conditions


def make_posterior(x_0: Tensor, prior: GesturePrior, num_samples: int) -> Posterior:
    """Sample and average the gestures that touch down when and where x_0, (n, L, C), does."""
    rng = np.random.default_rng(SEED)
    truth = posterior_samples(x_0, prior, TRUTH_SAMPLES, rng)
    return Posterior(
        duration_distribution(read_touch_down(x_0)[0], prior),
        posterior_samples(x_0, prior, num_samples, rng),
        posterior_mean_gesture(x_0, prior),
        type_shares(truth),
    )


def type_shares(answers: Tensor) -> FloatArray:
    """Return the share of each of GESTURE_TYPES among answers, (n, K, L, C)."""
    types = classify_gestures(answers.flatten(0, 1)).cpu().numpy()
    return np.bincount(types, minlength=len(GESTURE_TYPES)) / types.size


def score_by_posterior(
    answers: Tensor, exact: Posterior, prior: GesturePrior
) -> dict[str, Estimate]:
    """Score answers, (n, K, L, C), data units, against the exact posterior of their conditions."""
    n, K = answers.shape[:2]
    mean_error = ((answers.mean(dim=1) - exact.mean) ** 2).mean(dim=(1, 2)).sqrt()
    mix_error = np.abs(type_shares(answers) - exact.type_shares).max()
    # F(delta_t) of a discrete distribution, spread evenly over its steps, is uniform
    steps = np.pad(exact.duration.cumsum(axis=1), ((0, 0), (1, 0)))  # (n, D + 1)
    frames = (answers[..., 2] > PRESSED).sum(dim=2).cpu().numpy() - prior.min_delta_t
    low, high = (
        np.take_along_axis(steps, np.clip(frames + i, 0, steps.shape[1] - 1), axis=1)
        for i in (0, 1)
    )
    u = low + (high - low) * np.random.default_rng(SEED).random(low.shape)
    return {
        "diversity_ratio": bootstrap(pairwise_rms(answers), pairwise_rms(exact.samples)),
        "mean_rms": bootstrap(mean_error.cpu()),
        "type_mix_error": Estimate(float(mix_error), None, n * K),
        "duration_ks": Estimate(ks_distance(torch.from_numpy(u.ravel())), None, n * K),
    }


def infill(
    model: nn.Module,
    untrained: nn.Module,
    scheduler: DDIMScheduler,
    x_0: Tensor,
    x_train: Tensor,
    *,
    prior: GesturePrior,
    sampling: dict[str, Any],
    num_conditions: int = 32,
    num_samples: int = 16,
) -> Table:
    """Ask for K answers to the given frames of each of some gestures, and score them.

    Args:
        model: the denoiser.
        untrained: the same network before training.
        scheduler: their scheduler.
        x_0: gestures, (B, L, C), data units; the first of the prior's family are taken, without
            any the first with a press edge, and then nothing is held against the posterior.
        x_train: (N, L, C), data units.
        prior: the distribution of the gestures.
        sampling: the arguments of `DDIMScheduler.sample` that the model is judged with.
        num_conditions: most gestures, n.
        num_samples: answers to each, K.

    Returns:
        The settings and metrics of this module's docstring; empty if no gesture has a press edge
        or the model takes no known frames.
    """
    family = is_linear_gesture(x_0) & validity(x_0, prior)["duration_in_range"]
    rows = family if family.any() else has_press_edge(x_0)
    if not rows.any() or not takes_known_frames(model):
        return {}
    x_0 = x_0[rows][:num_conditions]
    known_mask = touch_down(x_0)
    answers = network_answers(
        model, untrained, scheduler, x_0, known_mask, num_samples=num_samples, sampling=sampling
    )
    answers |= trivial_answers(x_0, known_mask, x_train, num_samples)
    posterior = make_posterior(x_0, prior, num_samples) if family.any() else None
    if posterior:
        mean = posterior.mean[:, None].expand_as(posterior.samples)
        answers |= {"exact_posterior": lambda: posterior.samples, "exact_mean": lambda: mean}
    table: Table = {}
    for name in progress(list(answers), "infill"):
        answered = answers[name]()
        table[name] = score_answers(answered, x_0, known_mask, prior)
        if posterior:
            table[name] |= score_by_posterior(answered, posterior, prior)
    return table


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------


def draw_infill(table: Table) -> "Figure":
    """Draw who answers with valid gestures, and how diverse the answers are.

    Args:
        table: of `infill`, with the exact posterior.
    """
    figure = new_figure(8.5, 5)
    ax = figure.subplots()
    places: dict[tuple[float, float], list[str]] = {}
    for name, row in table.items():
        spread, good = row["diversity_ratio"], row["consistent_and_valid"]
        color = BLUE if name == "model" else "black" if name.startswith("exact") else ORANGE
        ax.errorbar(
            spread.value, good.value, color=color, marker="o", ms=7, lw=1.2,
            xerr=spread.ci and [[spread.value - spread.ci[0]], [spread.ci[1] - spread.value]],
            yerr=good.ci and [[good.value - good.ci[0]], [good.ci[1] - good.value]],
        )  # fmt: skip
        place = (round(spread.value, 1), round(good.value, 1))
        places.setdefault(place, []).append(name.replace("_", " "))
    for (x, y), names in places.items():
        text = "\n".join(names)
        ax.annotate(text, (x, y), (9, 5), textcoords="offset points", fontsize=8, va="bottom")
    ax.set_xlim(-0.1, None)
    ax.set_ylim(-0.05, 1.15)
    ax.set_xlabel("diversity of the answers, 1 is that of the exact posterior")
    ax.set_ylabel("share of answers that keep the touch-down and are valid")
    ax.grid(color="0.93")
    strip(ax)
    figure.suptitle("Given the touch-down alone: gestures, and different ones?", fontsize=13)
    return figure
