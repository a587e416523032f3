"""realism: can anything tell generated gestures from real ones, and do they shake?

Two tables, `realism` of gestures generated from nothing and `realism_recreated` of validation
gestures recreated from their press edges. The settings: model_steps_{S}, and beside them

    validation_data   the limit: real gestures, held against other real ones
    interpolation     of recreations: straight lines between the known frames
    jittered_real     real gestures that shake: Gaussian noise with a std of two pixels, a control
    other_users       real gestures of people whom nobody trained on, if the real ones are of others

What is real is what nobody trained on: fresh draws of the generator where dataset.json says how
the data were drawn. Else it is one half of the windows kept out of training, or of the validation
windows if there are none, and the other half is validation_data. All settings of a table hold as
many windows, or fewer.

The metrics are per contact (trainlib.contacts); a click and a swipe are those of the gesture types.

    shake_swipes, shake_all     median `shake` of the swipes, and of all contacts, not rounded
    deviation, deviation_p90    largest distance of a swipe from its chord, share of the screen, not
                                rounded: median and 90th percentile; excess_...: less the real one
    click_excursion             median over clicks of the farthest from touch-down along an axis
    still_clicks                share of the clicks that stay within one pixel of touch-down (on
                                either axis). Short swipes count as clicks, so real ones do not
                                reach 1; still_clicks_of_real is relative to their share
    axis_swipes                 share of horizontal and vertical swipes that keep the other axis
                                within one pixel of touch-down, of which the same is true
    ks_{feature}                Kolmogorov-Smirnov distance of a feature (evaluation.events) to the
                                real ones, rounded to pixels; ks_max is the largest. Of all
                                FEATURES where the distribution is not known
    {shake}_of_allowed          shake_swipes and shake_all over what real gestures allow: 1.5 times
                                their shake, or 0.03 if that is more
    auc                         area under the ROC curve of a classifier, gradient-boosted trees on
                                all FEATURES, rounded to pixels, five-fold: 1/2 if nothing tells the
                                samples from real gestures, 1 if a contact always gives itself away.
                                The interval resamples the samples alone. Where real windows
                                are idle, too, only windows with a touch are compared
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from augmentation.click_aug import draw_gestures, render
from evaluation.controls import OTHER_USERS, VALIDATION_DATA, interpolation
from evaluation.estimates import SEED, Estimate, Table, bootstrap, quantile, shifted
from evaluation.events import (
    FEATURES,
    PIXELS,
    Events,
    deviation,
    events_of,
    find_classifier,
    told_apart,
    two_sample_ks,
)
from evaluation.figures import BLUE, new_figure, strip
from evaluation.protocol import Picture, Section, Subject
from train_diffusion_ddim import generate, has_press_edge, recreate
from trainlib.contacts import Contact, contacts_of, shake
from trainlib.gestures import GESTURE_TYPES, PRESSED, classify_moves
from trainlib.process import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = (1, 2, 4, 10, 20, 50)
JITTER = 2 / PIXELS  # of the control
SHAKE_FACTOR, LEAST_SHAKE = 1.5, 0.03  # of real shake, and of what is allowed anyway
KS_FEATURES = ("path", "deviation", "speed_peak", "first_50_ms", "last_50_ms")
COLUMNS = {
    "auc": "told from real, AUC",
    "shake_swipes": "shake of swipes",
    "deviation": "deviation of swipes",
    "deviation_p90": "its 90th percentile",
    "still_clicks": "still clicks",
    "axis_swipes": "swipes on their axis",
    "ks_max": "KS distance",
}


def run(
    s: Subject, num: int = 1000, num_recreated: int = 500, steps: Sequence[int] = STEPS
) -> list[Section]:
    """Hold generated and recreated gestures against real ones, at several numbers of steps."""
    real, held_out, originals = draw_real(s, num)
    # without a press edge there is nothing to recreate from
    real_edge, originals = (x[has_press_edge(x)] for x in (real, originals))
    originals = originals[:num_recreated]
    others = {} if s.x_others is None else {OTHER_USERS: s.x_others.cpu()[:num]}
    features = KS_FEATURES if s.prior else FEATURES
    shape, settings = s.x_val.shape[1:], sorted({*steps, s.num_inference_steps})
    generated: dict[str, Tensor] = {}
    recreated: dict[str, Tensor] = {}
    for n in progress([n for n in settings if n <= s.scheduler.num_timesteps], "realism"):
        network, given = (s.model, s.scheduler), s.sampling | {"num_inference_steps": n}
        generated[f"model_steps_{n}"] = generate(*network, (len(real), *shape), **given).cpu()
        if len(originals):
            recreated[f"model_steps_{n}"] = recreate(*network, originals, **given).cpu()
    judged, classifier = f"model_steps_{s.num_inference_steps}", find_classifier()
    samples = generated | beside(held_out) | others
    table = realism_table(samples, real, classifier, features)
    caption, shown = "Real and generated strokes, enlarged.", (real, generated[judged])
    pictures = [Picture("realism.png", caption, draw_strokes, *shown, table, judged)]
    if s.prior is None:
        caption = "Where the distributions of real and generated contacts differ."
        events = [events_of(x) for x in shown]
        pictures.append(Picture("marginals.png", caption, draw_marginals, *events))
    sections = [Section("realism", table, TITLE, TEXT, COLUMNS, "samples", pictures, judged=judged)]
    if len(originals):
        recreated |= {"interpolation": interpolation(originals).cpu()} | beside(originals.cpu())
        recreated |= {name: x[has_press_edge(x)] for name, x in others.items()}
        table = realism_table(recreated, real_edge, classifier, features)
        about = (TITLE_RECREATED, TEXT_RECREATED, COLUMNS, "recreations")
        sections.append(Section("realism_recreated", table, *about, judged=judged))
    return sections


TITLE = "Realism: can generated gestures be told from real ones?"
TEXT = (
    "A classifier is shown contacts as a touch screen reports them, in whole pixels, and says "
    "which are real: AUC 0.5 if it cannot know, 1 if it always does. Shake is the change of speed "
    "from frame to frame (2 ms) along an axis, in thousandths of the screen; a pixel is 0.93. The "
    "limit is real gestures held against other real ones."
)
TITLE_RECREATED = "Realism of recreations: the same, given the press edges"
TEXT_RECREATED = "Real gestures recreated from where the finger lands and lifts."


# ----------------------------------------------------------------------------------------
# MEASURE
# ----------------------------------------------------------------------------------------


def draw_real(s: Subject, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return up to `num` real windows, as many other ones, and what is to be recreated.

    The first two are on the CPU. None of the first is among the others.
    """
    rng = np.random.default_rng([SEED, 1])
    if s.recipe is None:
        order = torch.from_numpy(rng.permutation(len(s.unseen))).to(s.unseen.device)
        real, held_out = (s.unseen[rows][:num] for rows in order.tensor_split(2))
        return real.cpu(), held_out.cpu(), held_out
    r = s.recipe
    ranges = r.action_type, r.min_delta_t, r.max_delta_t, r.sequence_length
    drawn = torch.from_numpy(render(draw_gestures(rng, 2 * num, *ranges), r.sequence_length))
    return drawn[:num], drawn[num:], s.x_val


def beside(real: Tensor) -> dict[str, Tensor]:
    """Return real windows, (B, L, 3), and the same with jitter."""
    generator = torch.Generator().manual_seed(SEED)
    jitter = JITTER * torch.randn(real.shape, generator=generator)
    jitter[..., 2] = 0
    jittered = torch.where(real[..., 2:] > PRESSED, (real + jitter).clamp(0, 1), real)
    return {VALIDATION_DATA: real, "jittered_real": jittered}


def realism_table(
    samples: Mapping[str, Tensor],
    real: Tensor,
    make_classifier: Callable[[], Any] | None,
    features: Sequence[str] = KS_FEATURES,
) -> Table:
    """Score samples by setting, (B, L, 3) each, data units, against real windows, (N, L, 3)."""
    n = min(len(x) for x in (real, *samples.values()))
    due, known = contact_scores(contacts_of(real[:n])), events_of(real[:n])
    idle = (known.of("presses") == 0).any()  # then idle windows tell nothing apart
    table = {}
    for name, x in progress(list(samples.items()), "realism: scores"):
        scores, events = contact_scores(contacts_of(x[:n])), events_of(x[:n])
        for metric in ("deviation", "deviation_p90"):
            scores[f"excess_{metric}"] = shifted(scores[metric], by=due[metric].value)
        share = due["still_clicks"].value
        scores["still_clicks_of_real"] = shifted(scores["still_clicks"], scale=share or np.nan)
        for metric in ("shake_swipes", "shake_all"):
            allowed = max(SHAKE_FACTOR * due[metric].value, LEAST_SHAKE)
            scores[f"{metric}_of_allowed"] = shifted(scores[metric], scale=allowed)
        distances = {f: two_sample_ks(events.of(f), known.of(f)) for f in features}
        distances["max"] = max(distances.values())
        scores |= {f"ks_{f}": Estimate(d, None, len(events.window)) for f, d in distances.items()}
        if make_classifier:
            pair = (events.touched, known.touched) if idle else (events, known)
            told = told_apart(*pair, make_classifier)
            scores["auc"] = bootstrap(told[~np.isnan(told)])
        table[name] = scores
    return table


def contact_scores(contacts: Sequence[Contact]) -> dict[str, Estimate]:
    """Return the metrics that need no real gestures; data units, not rounded.

    Contacts of one or two frames say nothing of either and are left out.
    """
    seen = [c for c in contacts if len(c.xy) > 2]
    swipes, clicks = ([c.xy for c in seen if c.moves == moves] for moves in (True, False))
    deviations = [deviation(xy) for xy in swipes]
    excursions = np.array([_reach(xy).max() for xy in clicks])
    dx, dy = np.array([xy[-1] - xy[0] for xy in swipes]).reshape(-1, 2).T
    types = classify_moves(dx, dy, np.ones(len(swipes), dtype=bool))
    reach = np.array([_reach(xy) for xy in swipes]).reshape(-1, 2)
    horizontal, vertical = (types == GESTURE_TYPES.index(t) for t in ("horizontal", "vertical"))
    strayed = np.concatenate([reach[horizontal, 1], reach[vertical, 0]])
    return {
        "shake_swipes": quantile([shake(xy) for xy in swipes], 0.5),
        "shake_all": quantile([shake(c.xy) for c in seen], 0.5),
        "deviation": quantile(deviations, 0.5),
        "deviation_p90": quantile(deviations, 0.9),
        "click_excursion": quantile(excursions, 0.5),
        "still_clicks": bootstrap(excursions <= 1 / PIXELS),
        "axis_swipes": bootstrap(strayed <= 1 / PIXELS),
    }


def _reach(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how far a contact, (n, 2), gets from touch-down along each axis, (2,)."""
    return np.abs(xy - xy[0]).max(axis=0)


# ----------------------------------------------------------------------------------------
# DRAW
# ----------------------------------------------------------------------------------------

NUM_STROKES = 4  # of clicks, and of swipes
FIRST = 50  # of each, that they are chosen from
WINDOW = 44  # pixels that a cell shows


def draw_strokes(real: Tensor, generated: Tensor, table: Table, judged: str) -> "Figure":
    """Draw clicks and swipes of both, enlarged until single pixels are seen."""
    figure = new_figure(14, 4.6, layout=None)
    widths = [*[1] * NUM_STROKES, 0.12, *[1] * NUM_STROKES]
    place = {"left": 0.105, "right": 0.99, "bottom": 0.02, "top": 0.77}
    grid = figure.add_gridspec(
        2, len(widths), width_ratios=widths, wspace=0.08, hspace=0.1, **place
    )
    sides = ("real", real, "0.2"), ("generated", generated, BLUE)
    for row, (name, x, color) in enumerate(sides):
        for moves in (False, True):
            for i, xy in enumerate(_steadiest(contacts_of(x), moves)):
                cell = grid[row, i + moves * (NUM_STROKES + 1)]
                _draw_stroke(figure.add_subplot(cell), xy, color)
        figure.text(0.012, 0.565 - 0.385 * row, name, fontsize=14, weight="bold", color=color)
    for at, words in ((0.318, "clicks: the finger rests"), (0.775, "swipes: the middle part")):
        figure.text(at, 0.79, words, fontsize=12, ha="center")
    mine, limit = (table[name]["shake_swipes"].value for name in (judged, VALIDATION_DATA))
    title = "Enlarged to pixels"
    if mine == mine and limit == limit:
        pixels = [_in_pixels(value) for value in (mine, limit)]
        title += ": generated swipes shake by {} pixels a frame, real ones by {}".format(*pixels)
    figure.text(0.5, 0.925, title, ha="center", fontsize=15)
    words = (
        f"A cell is {WINDOW} of {PIXELS} pixels, a dot is the finger at a frame of 2 ms. Shown are "
        f"the stillest clicks and the slowest swipes of the first {FIRST} of either side."
    )
    figure.text(0.5, 0.87, words, ha="center", fontsize=10, color="0.35")
    return figure


def _in_pixels(shake: float) -> str:
    """Return a shake in pixels a frame, to a digit or, below it, to two that count."""
    pixels = shake * PIXELS / 1000
    return f"{pixels:.2g}" if 0.001 < pixels < 0.05 else f"{pixels:.1f}"


def _steadiest(contacts: Sequence[Contact], moves: bool) -> list[npt.NDArray[np.float64]]:
    """Return the slowest of the first swipes, or the stillest of the first clicks."""
    first = [c.xy for c in contacts if c.moves == moves and len(c.xy) > 2][:FIRST]
    order = (
        (lambda xy: np.hypot(*(xy[-1] - xy[0])) / len(xy))
        if moves
        else (lambda xy: _reach(xy).max())
    )
    return sorted(first, key=order)[:NUM_STROKES]


def _draw_stroke(ax: "Axes", xy: npt.NDArray[np.float64], color: str) -> None:
    """Draw a contact, (n, 2), around its middle, on a grid of pixels."""
    pixels = xy * PIXELS
    middle = np.round(pixels[len(xy) // 2])
    ax.plot(*(pixels - middle).T, "-o", color=color, lw=1.2, ms=4, mew=0)
    half = WINDOW / 2
    ax.set_xlim(-half, half)
    ax.set_ylim(half, -half)
    ax.set_aspect("equal")
    ax.set_xticks(np.arange(-half, half) + 0.5, minor=True)
    ax.set_yticks(np.arange(-half, half) + 0.5, minor=True)
    ax.grid(which="minor", color="0.92", lw=0.5)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    ax.spines[:].set_color("0.7")


MARGINALS = {  # feature: heading
    "frames": "duration, frames",
    "onset": "onset, frame",
    "x_start": "x of touch-down",
    "y_start": "y of touch-down",
    "path": "path, screens",
    "deviation": "distance from the chord, screens",
    "speed_peak": "highest speed, screens/s",
    "last_50_ms": "speed of the last 50 ms, screens/s",
}
LONG_TAILED = ("path", "deviation", "speed_peak", "last_50_ms")


def draw_marginals(real: Events, generated: Events) -> "Figure":
    """Draw the distribution function of contact features, of real and of generated windows."""
    figure = new_figure(14, 6.2)
    distances = {}
    for ax, (name, heading) in zip(figure.subplots(2, 4).flat, MARGINALS.items(), strict=True):
        sides = ("real", real.of(name), "0.2", 4), ("generated", generated.of(name), BLUE, 1.6)
        for label, values, color, lw in sides:
            shares = np.arange(1, len(values) + 1) / max(len(values), 1)
            ax.step(np.sort(values), shares, where="post", color=color, lw=lw, label=label)
        distances[name] = two_sample_ks(real.of(name), generated.of(name))
        if name in LONG_TAILED:
            ax.set_xscale("symlog", linthresh=0.01)
        ax.set_ylim(0, 1)
        ax.set_title(f"{heading}\nKS distance {distances[name]:.2f}", fontsize=10)
        strip(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    farthest = max(distances, key=lambda name: np.nan_to_num(distances[name]))
    title = "Do generated contacts have the distribution of real ones?  Share of contacts below"
    figure.suptitle(f"{title}; farthest off: {MARGINALS[farthest].split(',')[0]}", fontsize=13)
    return figure
