"""Every metric against a value worked by hand, and against recreations known to be bad.

Why: the plan's press_accuracy gave 1.0 to "always pressed", and its SNR was minus infinity on
an idle gesture. So each key has its value on an example small enough for paper, and each control
(zeros, always pressed, one frame late) its known rank.

    python -m pytest tests/test_metrics.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, make_gestures, press

from train_diffusion_ddim import DDIMScheduler, DiffusionActionDataset
from trainlib.gestures import GESTURE_TYPES
from trainlib.metrics import (
    classify_gestures,
    compute_gesture_type_accuracy,
    compute_reconstruction_metrics,
    compute_spatial_accuracy,
    compute_temporal_iou,
    gesture_metrics,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
hnp = pytest.importorskip("hypothesis.extra.numpy")

# Two gestures of four frames, [x, y, press]; errors are round numbers.
ORIGINAL = torch.tensor(
    [
        [[0.0, 0.0, 0.0], [0.5, 0.5, 1.0], [0.7, 0.5, 1.0], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 1.0], [0.2, 0.2, 1.0]],
    ]
)
RECREATED = torch.tensor(
    [
        [[0.0, 0.0, 0.0], [0.5, 0.5, 1.0], [0.7, 0.5, 1.0], [0.6, 0.0, 1.0]],  # 1 frame too long
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.4, 1.0], [0.2, 0.2, 1.0]],  # y off by 0.2
    ]
)
PLAN_KEYS = {
    *("mse", "mae", "coord_mse", "press_mse", "active_coord_mse", "press_accuracy"),
    *(f"{kind}_{c}" for kind in ("orig_variance", "recon_variance") for c in "xyp"),
    *(f"{kind}_{c}" for kind in ("variance_ratio", "smoothness_ratio") for c in "xyp"),
    "mean_snr_db",
}


@pytest.fixture(scope="module")
def mixed():
    """The first 200 gestures of the project's validation set."""
    data = DiffusionActionDataset(ROOT / "diffusion_test_data" / "val")
    return torch.from_numpy(data.sequences[:200])


def by_hand():
    squares = [0.36 + 1.0, 0.04]  # of the error, per gesture: x 0.6 and press 1; y 0.2
    power = [0.5**2 + 0.5**2 + 0.7**2 + 0.5**2 + 2, 4 * 0.2**2 + 2]
    snr = [10 * math.log10(p / s) for p, s in zip(power, squares, strict=True)]
    return {
        "mse": sum(squares) / 24,
        "mae": (0.6 + 1 + 0.2) / 24,
        "coord_mse": (0.36 + 0.04) / 16,
        "press_mse": 1 / 8,
        "active_coord_mse": (0.36 + 0.04) / (2 * 5),  # 3 + 2 frames pressed in either
        "press_accuracy": 4 / 5,
        "mean_snr_db": sum(snr) / 2,
        "median_snr_db": min(snr),
    }


def test_every_value_by_hand():
    scores = compute_reconstruction_metrics(ORIGINAL, RECREATED)
    for key, value in by_hand().items():
        assert scores[key] == pytest.approx(value, rel=1e-4), key


def test_variances_and_ratios_by_numpy():
    scores = compute_reconstruction_metrics(ORIGINAL, RECREATED)
    a, b = ORIGINAL.double().numpy(), RECREATED.double().numpy()
    for c, name in enumerate("xyp"):
        variances = [x[..., c].var(axis=1, ddof=1).mean() for x in (a, b)]
        roughness = [np.diff(x[..., c], axis=1).var(axis=1, ddof=1).mean() for x in (a, b)]
        assert scores[f"orig_variance_{name}"] == pytest.approx(variances[0], rel=1e-5)
        assert scores[f"recon_variance_{name}"] == pytest.approx(variances[1], rel=1e-5)
        ratio = variances[1] / variances[0]
        assert scores[f"variance_ratio_{name}"] == pytest.approx(ratio, rel=1e-5)
        ratio = roughness[1] / roughness[0]
        assert scores[f"smoothness_ratio_{name}"] == pytest.approx(ratio, rel=1e-5)


def test_keys_are_the_plans():
    scores = compute_reconstruction_metrics(ORIGINAL, RECREATED)
    assert set(scores) >= PLAN_KEYS and len(PLAN_KEYS) == 19
    assert all(type(value) is float for value in scores.values())


def test_gesture_scores_by_hand():
    assert compute_temporal_iou(ORIGINAL[..., 2], RECREATED[..., 2]) == pytest.approx(
        (2 / 3 + 1) / 2
    )
    assert compute_spatial_accuracy(ORIGINAL, RECREATED) == pytest.approx(3 / 5)
    assert compute_spatial_accuracy(ORIGINAL, RECREATED, threshold=0.25) == pytest.approx(4 / 5)
    # 0.2 to the right against 0.5 down; still against 0.2 down; and a third that is right
    three = [torch.cat([x, ORIGINAL[:1]]) for x in (ORIGINAL, RECREATED)]
    assert compute_gesture_type_accuracy(*three) == pytest.approx(1 / 3)
    assert list(gesture_metrics(ORIGINAL, RECREATED).values()) == pytest.approx([5 / 6, 0.6, 0.0])


@pytest.mark.parametrize("device_scheduler", [DDIMScheduler(50), DDIMScheduler()])
def test_the_scheduler_changes_nothing(device_scheduler):
    plain = compute_reconstruction_metrics(ORIGINAL, RECREATED)
    assert compute_reconstruction_metrics(ORIGINAL, RECREATED, device_scheduler) == plain


def test_perfect(mixed):
    scores = compute_reconstruction_metrics(mixed, mixed)
    assert scores["mse"] == scores["mae"] == scores["active_coord_mse"] == 0
    assert scores["press_accuracy"] == 1 and scores["mean_snr_db"] > 60
    for c in "xyp":
        assert scores[f"variance_ratio_{c}"] == scores[f"smoothness_ratio_{c}"] == 1
    assert set(gesture_metrics(mixed, mixed).values()) == {1.0}


def test_zeros(mixed):
    scores = compute_reconstruction_metrics(mixed, torch.zeros_like(mixed))
    assert scores["mse"] == pytest.approx((mixed**2).mean().item(), rel=1e-5)
    assert scores["mean_snr_db"] == pytest.approx(0, abs=1e-3)
    assert scores["press_accuracy"] == 0
    gestures = gesture_metrics(mixed, torch.zeros_like(mixed))
    assert gestures["temporal_iou"] == gestures["gesture_type_accuracy"] == 0


def test_always_pressed_does_not_pass(mixed):
    pressed = mixed.clone()
    pressed[..., 2] = 1
    scores = compute_reconstruction_metrics(mixed, pressed)
    share = (mixed[..., 2] > 0.5).float().mean().item()
    assert scores["press_accuracy"] == pytest.approx(share, rel=1e-4) and share < 0.25
    iou = gesture_metrics(mixed, pressed)["temporal_iou"]
    assert iou == pytest.approx((mixed[..., 2] > 0.5).float().mean(dim=1).mean().item(), rel=1e-4)


def test_one_frame_late(mixed):
    # n pressed frames: the overlap is n - 1 of n + 1; on the mixed set IoU 0.926, MSE 0.0044
    late = mixed.roll(1, dims=1)
    late[:, 0] = 0
    scores = compute_reconstruction_metrics(mixed, late) | gesture_metrics(mixed, late)
    n = (mixed[..., 2] > 0.5).sum(dim=1)
    inside = (mixed[:, -1, 2] == 0).float()  # else the last frame is lost, not moved
    expected = ((n - 1) / (n + inside)).mean().item()
    assert scores["temporal_iou"] == pytest.approx(expected, rel=1e-5)
    assert scores["temporal_iou"] == pytest.approx(0.926, abs=0.02)
    assert scores["mse"] == pytest.approx(0.0044, abs=0.0008)


def test_two_gestures_without_any_press_agree():
    idle, touched = torch.zeros(1, 9, 3), press(9, (2, 5))
    assert gesture_metrics(idle, idle) == dict.fromkeys(gesture_metrics(idle, idle), 1.0)
    assert gesture_metrics(idle, touched)["temporal_iou"] == 0
    both = torch.cat([idle, touched]), torch.cat([idle, touched])
    assert gesture_metrics(*both)["temporal_iou"] == 1


gestures = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(4, 6), st.just(3)),
    elements=st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0]),
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(gestures, st.sampled_from(["same", "zeros", "ones", "constant", "flipped"]))
def test_always_finite_and_in_range(x, other):
    original = torch.from_numpy(x)
    recreated = {
        "same": original,
        "zeros": torch.zeros_like(original),
        "ones": torch.ones_like(original),
        "constant": original[:, :1].expand_as(original),
        "flipped": original.flip(1),
    }[other]
    for pair in ((original, recreated), (recreated, original)):
        scores = compute_reconstruction_metrics(*pair)
        assert all(math.isfinite(value) for value in scores.values()), scores
        shares = [scores["press_accuracy"], *gesture_metrics(*pair).values()]
        assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("split", [1, 3, 7])
def test_a_mean_over_gestures_does_not_depend_on_batching(split):
    # Per gesture: mse, iou and type are means over gestures, so batches weighted by size add up.
    x, y = make_gestures(10, seed=1), make_gestures(10, seed=2)
    whole = compute_reconstruction_metrics(x, y) | gesture_metrics(x, y)
    parts = []
    for a, b in zip(x.split(split), y.split(split), strict=True):
        parts.append((len(a), compute_reconstruction_metrics(a, b) | gesture_metrics(a, b)))
    means = "mse mae coord_mse press_mse mean_snr_db temporal_iou gesture_type_accuracy".split()
    for key in [*means, "orig_variance_x", "recon_variance_p"]:
        weighted = sum(n * scores[key] for n, scores in parts) / 10
        assert whole[key] == pytest.approx(weighted, rel=1e-5), key
    # Frames, not gestures, are weighed here.
    active = ((x[..., 2] > 0.5) | (y[..., 2] > 0.5)).sum(dim=1)
    frames = [sum(active[i : i + split]).item() for i in range(0, 10, split)]
    for key in ("active_coord_mse", "press_accuracy", "spatial_accuracy"):
        weighted = sum(f * s[key] for f, (_, s) in zip(frames, parts, strict=True)) / sum(frames)
        assert whole[key] == pytest.approx(weighted, rel=1e-5), key


def plan_type(seq):
    """The plan's classify_gesture, word for word in numpy."""
    active = np.where(seq[:, 2] > 0.5)[0]
    if len(active) == 0:
        return "none"
    start, end = seq[active[0], :2], seq[active[-1], :2]
    if np.linalg.norm(end - start) < 0.05:
        return "click"
    dx, dy = abs(end[0] - start[0]), abs(end[1] - start[1])
    if dx > 2 * dy:
        return "horizontal"
    return "vertical" if dy > 2 * dx else "diagonal"


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(gestures)
def test_types_are_the_plans_rule(x):
    types = [GESTURE_TYPES[i] for i in classify_gestures(torch.from_numpy(x))]
    assert types == [plan_type(seq) for seq in x]


@pytest.mark.parametrize(
    ("move", "kind"),
    [
        ((0.0, 0.0), "click"),
        ((0.049, 0.0), "click"),
        ((0.03, 0.035), "click"),
        ((0.051, 0.0), "horizontal"),
        ((-0.3, 0.1), "horizontal"),
        ((0.1, -0.3), "vertical"),
        ((0.25, 0.125), "diagonal"),  # exactly twice is not more than twice
        ((0.125, 0.25), "diagonal"),
        ((-0.2, 0.2), "diagonal"),
    ],
)
def test_types_by_hand(move, kind):
    x = press(9, (2, 6))
    x[0, 2, :2] = torch.tensor([0.5, 0.5])
    x[0, 6, :2] = torch.tensor([0.5, 0.5]) + torch.tensor(move)
    assert GESTURE_TYPES[classify_gestures(x)[0]] == kind == plan_type(x[0].numpy())
    assert classify_gestures(torch.zeros(1, 9, 3)).tolist() == [0]
