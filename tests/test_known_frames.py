"""Which frames are given: each strategy against a plain loop, and how training masks are drawn.

Why: the headline protocol rests on "both sides of every press edge and nothing else". A frame too
many leaks the answer, a frame too few makes it a guess.

    python -m pytest tests/test_known_frames.py
"""

import pytest
import torch
from conftest import L, make_gestures, press

from train_diffusion_ddim import KNOWN_STRATEGIES, draw_known_mask, has_press_edge, press_edges
from trainlib.known import touch_down
from trainlib.metrics import has_one_press

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
stats = pytest.importorskip("scipy.stats")

P_MIN = 1e-3  # the seeds are fixed, so a correct program always passes
SPANS = {
    # name: (pressed spans, frames at press edges, frames at touch-downs)
    "one": ([(4, 8)], [3, 4, 8, 9], [3, 4]),
    "one frame": ([(4, 4)], [3, 4, 5], [3, 4]),
    "from the first frame": ([(0, 3)], [0, 3, 4], [0]),
    "only the first frame": ([(0, 0)], [0, 1], [0]),
    "to the last frame": ([(15, 19)], [14, 15, 19], [14, 15]),
    "two": ([(2, 4), (10, 12)], [1, 2, 4, 5, 9, 10, 12, 13], [1, 2, 9, 10]),
    "two, a frame apart": ([(2, 4), (6, 8)], [1, 2, 4, 5, 6, 8, 9], [1, 2, 5, 6]),
    "both ends": ([(0, 2), (17, 19)], [0, 2, 3, 16, 17, 19], [0, 16, 17]),
    "idle": ([], [], []),
    "pressed throughout": ([(0, 19)], [], []),
}


def frames(mask):
    return torch.where(mask)[0].tolist()


def loop_edges(pressed, kinds):
    """Both sides of each change of `kinds`; idle before the first and after the last frame."""
    known = set()
    padded = [False, *pressed, False]
    if any(pressed) and not all(pressed):
        for i in range(len(padded) - 1):
            change = {(False, True): "down", (True, False): "up"}.get((padded[i], padded[i + 1]))
            if change in kinds:
                known |= {i - 1, i} & set(range(len(pressed)))
    return sorted(known)


@pytest.mark.parametrize("name", SPANS)
def test_edges_by_hand(name):
    spans, edges, downs = SPANS[name]
    x_0 = press(L, *spans)
    assert frames(press_edges(x_0)[0]) == edges
    assert frames(touch_down(x_0)[0]) == downs
    assert has_press_edge(x_0).tolist() == [bool(edges)]
    assert has_one_press(x_0).tolist() == [len(spans) == 1]


@hypothesis.given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_edges_are_the_loop(rows):
    x_0 = torch.zeros(len(rows), 9, 3)
    x_0[..., 2] = torch.tensor(rows).float()
    for i, row in enumerate(rows):
        assert frames(press_edges(x_0)[i]) == loop_edges(row, {"down", "up"})
        assert frames(touch_down(x_0)[i]) == loop_edges(row, {"down"})


def test_a_gesture_has_about_four_known_frames():
    counts = press_edges(make_gestures(200, 250)).sum(dim=1)
    assert counts.max() == 4 and counts.float().mean() > 3.8


def test_press_is_what_exceeds_one_half():
    x_0 = press(L, (4, 8))
    x_0[..., 2] *= 0.6
    assert frames(press_edges(x_0)[0]) == [3, 4, 8, 9]
    x_0[..., 2] *= 0.5
    assert frames(press_edges(x_0)[0]) == []


@pytest.mark.parametrize("name", KNOWN_STRATEGIES)
def test_a_mask_is_bool_per_frame(name):
    x_0 = make_gestures(7)
    mask = KNOWN_STRATEGIES[name][0](x_0)
    assert mask.shape == (7, L) and mask.dtype == torch.bool


def test_prefix_lengths_are_uniform_from_one_to_all_but_one():
    torch.manual_seed(0)
    mask = KNOWN_STRATEGIES["prefix"][0](torch.zeros(9500, L, 3))
    lengths = mask.sum(dim=1)
    assert torch.equal(mask, torch.arange(L) < lengths[:, None])
    counts = torch.bincount(lengths, minlength=L + 1)
    assert counts[0] == 0 and counts[L] == 0
    assert stats.chisquare(counts[1:L]).pvalue > P_MIN


def test_random_frames_have_a_uniform_share_up_to_a_fifth():
    torch.manual_seed(0)
    mask = KNOWN_STRATEGIES["random_frames"][0](torch.zeros(2000, 2000, 3)).float()
    assert stats.kstest(mask.mean(dim=1), stats.uniform(0, 0.2).cdf).pvalue > P_MIN
    assert abs(mask.mean(dim=0).std() - (0.1 * 0.9 / 2000) ** 0.5) < 1e-3  # all frames alike


@pytest.mark.parametrize("known_share", [0.3, 1.0])
def test_shares_of_the_training_masks(known_share):
    torch.manual_seed(0)
    num, length = 20_000, 250
    x_0 = press(length, (50, 60)).expand(num, length, 3)
    names = ["none", *KNOWN_STRATEGIES]
    counts = dict.fromkeys(names, 0)
    masks, drawn = draw_known_mask(x_0, known_share)
    for mask, i in zip(masks, drawn.tolist(), strict=True):
        known = frames(mask)
        if known == [49, 50, 60, 61]:
            name = "press_edges"
        elif known == [49, 50]:
            name = "touch_down"
        elif not known:
            name = "none"
        elif known == list(range(len(known))):
            name = "prefix"
        else:
            name = "random_frames"
        counts[name] += 1
        assert names[i] == name or (name, names[i]) == ("none", "random_frames")
    shares = {name: known_share * share for name, (_, share) in KNOWN_STRATEGIES.items()}
    # random frames that come out empty: E[(1 - p)^250], p uniform in [0, 0.2)
    empty = (1 - 0.8 ** (length + 1)) / (0.2 * (length + 1)) * shares["random_frames"]
    shares["random_frames"] -= empty
    shares["none"] = 1 - known_share + empty
    observed, expected = list(counts.values()), [num * shares[name] for name in counts]
    assert stats.chisquare(observed, expected).pvalue > P_MIN


def test_a_known_share_of_zero_gives_nothing():
    masks, drawn = draw_known_mask(make_gestures(100), 0.0)
    assert not masks.any() and not drawn.any()


def test_the_shares_of_the_strategies_add_up():
    assert sum(share for _, share in KNOWN_STRATEGIES.values()) == pytest.approx(1)


def test_masks_are_the_gestures_own():
    torch.manual_seed(0)
    x_0 = make_gestures(500)
    masks, _ = draw_known_mask(x_0, 1.0)
    own = (masks == press_edges(x_0)).all(dim=1).float().mean()
    assert abs(own - KNOWN_STRATEGIES["press_edges"][1]) < 0.07
