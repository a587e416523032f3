"""What several protocols share: noised gestures, paired scores, the Bayes answer, latencies."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.criteria import PLAN_LINES
from evaluation.estimates import Estimate, FloatArray, bootstrap
from train_diffusion_ddim import DDIMScheduler, noise_bank, to_data_units, to_model_units
from trainlib.gestures import PRESSED
from trainlib.metrics import compute_reconstruction_metrics, gesture_metrics
from trainlib.process import progress, timer


def to_numpy(x: Tensor) -> FloatArray:
    """Return a tensor as a float64 array."""
    return x.detach().cpu().numpy().astype(float)


# ----------------------------------------------------------------------------------------
# NOISE — x_0 → x_t, and the best that can be said of it
# ----------------------------------------------------------------------------------------


def add_noise(scheduler: DDIMScheduler, x_0: Tensor, sigma: float) -> tuple[int, Tensor, Tensor]:
    """Noise x_0, (B, L, C), data units, to the index nearest to sigma, always by the same noise.

    Returns:
        t, x_t in model units, and x_t/sqrt(ᾱ_t) in data units.
    """
    t = scheduler.timestep_at(sigma)
    x_t, _ = scheduler.add_noise(to_model_units(x_0), t, noise_bank(x_0.shape).to(x_0))
    return t, x_t, to_data_units(x_t / scheduler.alpha_bar(t) ** 0.5)


def noisy(x_0: Tensor, sigma: float) -> Tensor:
    """Return x_0 with the noise bank at exactly this std, data units."""
    return x_0 + sigma * noise_bank(x_0.shape).to(x_0)


def bayes_mean(noisy: Tensor, sigma: float, prior: GesturePrior) -> Tensor:
    """E[x_0 | noisy] in data units, float64, on the device of `noisy`."""
    return torch.from_numpy(posterior_mean(noisy.cpu().numpy(), sigma, prior)).to(noisy.device)


def record_steps(
    model: nn.Module, scheduler: DDIMScheduler, call: Callable[[], object]
) -> list[tuple[int, Tensor, Tensor]]:
    """Make a call that samples, and return what the model sees and says of x_0 in each pass.

    Returns:
        Per pass: t, x_t in model units, and the estimate of x_0 in data units, with the known
        frames in their place as the sampler sets them; (B, L, C) each.
    """
    passes: list[tuple[int, Tensor, Tensor]] = []

    def keep(_: nn.Module, seen: tuple[Tensor, ...], output: Tensor) -> None:
        x_t, ts, *given = seen
        t = int(ts[0])
        x_0_pred = scheduler.predict_x_0(output, x_t, t)
        if given:
            x_0_pred = torch.where(given[1][..., None], given[0], x_0_pred)
        passes.append((t, x_t, to_data_units(x_0_pred)))

    hook = model.register_forward_hook(keep)
    try:
        call()
    finally:
        hook.remove()
    return passes


# ----------------------------------------------------------------------------------------
# SCORES
# ----------------------------------------------------------------------------------------


def frame_mse(a: Tensor, b: Tensor) -> Tensor:
    """Squared difference, averaged over the channels; (B, L) float64 on the CPU."""
    return ((a.double() - b.double()) ** 2).mean(dim=2).cpu()


def sequence_mse(a: Tensor, b: Tensor) -> FloatArray:
    """MSE of each sequence, (B,)."""
    return to_numpy(((a.double() - b.double()) ** 2).mean(dim=(1, 2)))


def sequence_scores(x_0: Tensor, recreated: Tensor) -> dict[str, FloatArray]:
    """Score gesture by gesture the metrics of PLAN_LINES, (B,) each."""
    rows = []
    for pair in zip(x_0.split(1), recreated.split(1), strict=True):
        scores = compute_reconstruction_metrics(*pair) | gesture_metrics(*pair)
        rows.append([scores[name] for name in PLAN_LINES])
    return dict(zip(PLAN_LINES, np.array(rows).T, strict=True))


def score_recreations(x_0: Tensor, recreated: Tensor) -> dict[str, Estimate]:
    """Score recreations of x_0, both (B, L, C), data units: every metric of the plan.

    The values are the trainer's, over all gestures at once; those of PLAN_LINES have intervals.
    """
    values = compute_reconstruction_metrics(x_0, recreated) | gesture_metrics(x_0, recreated)
    scores = {name: Estimate(value, None, len(x_0)) for name, value in values.items()}
    active = (x_0[..., 2] > PRESSED) | (recreated[..., 2] > PRESSED)
    for name, each in sequence_scores(x_0, recreated).items():
        # spatial accuracy is a share of frames, so a gesture weighs as many as it has active
        weight = to_numpy(active.sum(dim=1)) if name == "spatial_accuracy" else np.ones(len(each))
        scores[name] = scores[name]._replace(ci=bootstrap(each * weight, weight).ci)
    return scores


def measure_latencies(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Estimate]:
    """Time calls, in ms.

    They take turns, so that another load on the machine hits all of them alike; the first round
    is not counted.

    Args:
        calls: by name.
        device: that they compute on; each time ends when it has finished.
        repeats: rounds that count, n of the estimates.

    Returns:
        By name, the median, and the quartiles in the place of an interval.
    """
    wall_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in progress(range(repeats + 1), "latency"):
        for name, call in calls.items():
            seconds = timer(device)
            call()
            wall_ms[name].append(1000 * seconds())
    latencies = {}
    for name, ms in wall_ms.items():
        low, median, high = np.percentile(ms[1:], [25, 50, 75])
        latencies[name] = Estimate(float(median), (float(low), float(high)), repeats)
    return latencies
