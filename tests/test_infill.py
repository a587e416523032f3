"""The exact posterior given a touch-down must be right, and no trivial answer may pass for it.

The posterior is held against fractions worked by hand, gestures that the generator itself draws and
plain loops; answers drawn from it pass, their mean and every control fail.

    python -m pytest tests/test_infill.py
"""

import numpy as np
import pytest
import torch

from augmentation.click_aug import draw_gestures
from evaluation.bayes import GesturePrior
from evaluation.controls import untrained_model
from evaluation.family import validity
from evaluation.protocols import infill
from evaluation.protocols.infill import (
    make_posterior,
    pairwise_rms,
    score_answers,
    score_by_posterior,
)
from evaluation.touch_down import duration_distribution, posterior_mean_gesture, posterior_samples
from train_diffusion_ddim import TrainConfig, build_scheduler
from trainlib.gestures import GESTURE_TYPES as KINDS
from trainlib.known import touch_down
from trainlib.metrics import classify_gestures

L = 40
PRIOR = GesturePrior(L, 3, 12)


def draw(n, prior=PRIOR, seed=0):
    return torch.from_numpy(prior.draw(n, np.random.default_rng(seed))).float()


def answers_like(x_0, num_samples, prior=PRIOR, seed=1):
    return posterior_samples(x_0, prior, num_samples, np.random.default_rng(seed))


def score(answers, x_0, prior=PRIOR):
    exact = make_posterior(x_0, prior, answers.shape[1])
    scores = score_answers(answers, x_0, touch_down(x_0), prior)
    return scores | score_by_posterior(answers, exact, prior)


# ----------------------------------------------------------------------------------------
# POSTERIOR
# ----------------------------------------------------------------------------------------


def test_duration_distribution_by_hand():
    # L = 4, delta_t in 1, 2, 3: there are 4, 3, 2 onsets, so the weights are 1/4, 1/3, 1/2
    shares = duration_distribution(np.array([0, 1, 2, 3]), GesturePrior(4, 1, 3))
    by_hand = [[3 / 13, 4 / 13, 6 / 13]] * 2 + [[3 / 7, 4 / 7, 0], [1, 0, 0]]
    assert np.allclose(shares, by_hand)


@pytest.mark.parametrize("onset", [0, 9, 12])
def test_samples_are_the_generators_gestures_of_that_onset(onset):
    n, L = 400_000, 15
    drawn = draw_gestures(np.random.default_rng(0), n, "mixed", 2, 6, L)
    same = drawn.onset == onset
    x_0 = torch.zeros(1, L, 3)
    x_0[0, onset] = torch.tensor([0.25, 0.75, 1.0])
    own = posterior_samples(x_0, GesturePrior(L, 2, 6), 20_000, np.random.default_rng(1))[0]
    assert torch.equal(own[:, onset], x_0[0, onset].expand(20_000, 3))
    frames = (own[..., 2] > 0.5).sum(dim=1)
    for delta_t in range(2, 7):
        expected = np.mean(drawn.delta_t[same] == delta_t)
        assert (frames == delta_t).double().mean().item() == pytest.approx(expected, abs=0.015)
    move = own[torch.arange(len(own)), onset + frames - 1, :2] - x_0[0, onset, :2]
    moves = (move != 0).double().mean(dim=0)
    assert moves.tolist() == pytest.approx([0.5, 0.5], abs=0.02)  # two of the four types each
    for axis, start in ((0, 0.25), (1, 0.75)):
        end = start + move[move[:, axis] != 0, axis]
        quartiles = torch.quantile(end.double(), torch.tensor([0.25, 0.5, 0.75]).double())
        assert quartiles.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.02)


def test_samples_answer_the_question():
    x_0 = draw(30)
    answers = answers_like(x_0, 5)
    assert answers.shape == (30, 5, L, 3) and answers.dtype == torch.float32
    flat, repeated = answers.flatten(0, 1), x_0.repeat_interleave(5, dim=0)
    given = touch_down(repeated)
    assert torch.equal(touch_down(flat), given)
    assert torch.equal(flat[given], repeated[given])
    assert validity(flat, PRIOR)["valid"].all()


@pytest.mark.parametrize("action_type", ["mixed", "swipe", "horizontal", "click"])
def test_mean_by_loops(action_type):
    prior = GesturePrior(12, 1, 5, action_type)
    x_0 = draw(6, prior)
    mean = posterior_mean_gesture(x_0, prior).numpy()
    for gesture, own in zip(x_0.numpy(), mean, strict=True):
        onset = int(np.flatnonzero(gesture[:, 2])[0])
        start, expected, total = gesture[onset, :2], np.zeros((12, 3)), 0.0
        for delta_t in range(1, min(5, 12 - onset) + 1):
            for kind in prior.kinds:
                weight = 1 / (12 - delta_t + 1)
                total += weight
                # uniform ends: the average of both extremes, as frames are linear in the end
                for end in (np.zeros(2), np.ones(2)):
                    name = KINDS[kind]
                    moves = np.array([name in ("horizontal", "diagonal"),
                                      name in ("vertical", "diagonal")])  # fmt: skip
                    stop = np.where(moves, end, start)
                    for i in range(delta_t):
                        along = i / (delta_t - 1) if delta_t > 1 else 0
                        expected[onset + i, :2] += weight / 2 * (start + (stop - start) * along)
                        expected[onset + i, 2] += weight / 2
        assert np.allclose(own, expected / total, atol=1e-6)


def test_mean_of_samples_is_the_mean():
    x_0 = draw(4)
    far = (answers_like(x_0, 20_000).mean(dim=1) - posterior_mean_gesture(x_0, PRIOR)).abs().max()
    assert far < 0.02


def test_the_mean_has_half_the_error_of_a_draw_and_is_no_gesture():
    # x_0 is itself a draw: E|x_0 - x|² = 2·E|x_0 - mean|² for independent draws of one distribution
    x_0 = draw(1000, seed=3)
    mean = posterior_mean_gesture(x_0, PRIOR)[:, None]
    drawn, blurred = score(answers_like(x_0, 4), x_0), score(mean, x_0)
    assert drawn["mse"].value / blurred["mse"].value == pytest.approx(2, rel=0.06)
    assert drawn["valid"].value == 1 and drawn["press_softness"].value == 0
    assert blurred["valid"].value < 0.02 and blurred["press_softness"].value > 0.04
    assert blurred["mean_rms"].value == 0 and blurred["diversity"].value == 0


# ----------------------------------------------------------------------------------------
# SCORES
# ----------------------------------------------------------------------------------------


def test_pairwise_rms_by_hand():
    answers = torch.zeros(2, 3, 4, 3)
    answers[0, 1], answers[0, 2] = 0.3, 0.6  # distances 0.3, 0.3, 0.6
    assert pairwise_rms(answers).tolist() == pytest.approx([0.4, 0], abs=1e-7)
    assert pairwise_rms(answers[:, :1]).tolist() == [0, 0]


def test_seam_is_the_distance_to_where_the_new_frames_lead_back():
    x_0 = draw(8)
    onset = (x_0[..., 2] > 0.5).int().argmax(dim=1)
    shifted = x_0.clone()
    rows = torch.arange(8)
    shifted[rows, onset, 0] += 0.03  # the given frame, off the line of the others
    mask = touch_down(x_0)
    assert infill.seam(x_0[:, None], x_0, mask).value == pytest.approx(0, abs=1e-6)
    assert infill.seam(x_0[:, None], shifted, mask).value == pytest.approx(0.03, abs=1e-6)
    assert infill.seam(torch.zeros(8, 1, L, 3), x_0, mask).n == 0  # nothing pressed, no seam


def test_consistency_looks_at_the_given_frames_alone():
    x_0, mask = draw(4), torch.zeros(4, L, dtype=torch.bool)
    mask[:, :5] = True
    for change, expected in ((0.019, 1.0), (0.021, 0.0)):
        near = x_0[:, None].clone()
        near[:, :, 3, 1] += change
        near[:, :, 5:] = 9
        assert score_answers(near, x_0, mask, PRIOR)["consistent"].value == expected


def test_types_seen_counts_each_once():
    x_0, kinds = draw(1), {}
    for x in draw(200, seed=5):
        kinds.setdefault(int(classify_gestures(x[None])), x)
    answers = torch.stack([kinds[1], kinds[1], kinds[4], torch.zeros(L, 3)])[None]
    scores = score_answers(answers, x_0, touch_down(x_0), PRIOR)
    assert scores["types_seen"].value == 2
    assert infill.type_shares(answers).tolist() == [0.25, 0.5, 0, 0, 0.25]


def test_durations_are_held_against_their_distribution():
    x_0 = draw(60)
    exact = score(answers_like(x_0, 16), x_0)
    assert exact["duration_ks"].value < 1.63 / 960**0.5  # 1 % point of Kolmogorov's distribution
    short, long = x_0[:, None].clone(), x_0[:, None].clone()
    short[..., 2], long[..., 2] = 0, 1  # 0 and L frames, which the prior cannot draw
    for answers in (short, long):
        assert score(answers, x_0)["duration_ks"].value == pytest.approx(1)


# ----------------------------------------------------------------------------------------
# THE TABLE
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    """Return f(x_0, **changes): the table of a random network."""
    config = TrainConfig(seq_len=L, d_model=16, num_layers=1, nhead=2, num_inference_steps=3)
    model, scheduler = untrained_model(config, "cpu"), build_scheduler(config)
    options = {"prior": PRIOR, "sampling": config.sampling, "num_samples": 8}

    def ask(x_0, model=model, **changes):
        x_train = draw(100, seed=8)
        return infill.infill(model, model, scheduler, x_0, x_train, **{**options, **changes})

    return ask


@pytest.fixture(scope="module")
def table(asked):
    return asked(draw(30, seed=7))


def is_refused(scores):
    """Whether a row fails what draws from the posterior pass."""
    good = scores["consistent_and_valid"].value > 0.9
    diverse = 0.9 < scores["diversity_ratio"].value < 1.1
    return not (good and diverse and scores["duration_ks"].value < 0.12)


def test_draws_from_the_posterior_pass_and_everything_else_is_refused(table):
    assert [name for name in table if not is_refused(table[name])] == ["exact_posterior"]
    assert table["exact_posterior"]["diversity_ratio"].value == 1
    assert table["exact_posterior"]["types_seen"].value > 3
    assert table["one_training_item"]["valid"].value == 1  # so validity alone says nothing
    assert table["pasted_training_items"]["consistent"].value == 1  # nor does consistency
    assert table["random_training_items"]["consistent"].value < 0.2
    assert set(infill.LIMITS) < set(table)
    assert min(row["mse"].value for row in table.values()) == table["exact_mean"]["mse"].value


def test_the_sampler_is_given_the_frames(table):
    assert table["untrained_model"]["consistent"].value == 1
    assert table["shuffled_condition"]["consistent"].value < 0.2


def test_table_counts_gestures(asked):
    table = asked(draw(30), num_conditions=5)
    assert all(row["valid"].n == 5 for row in table.values())
    assert table["model"]["duration_ks"].n == 5 * 8


def test_gestures_outside_the_family_have_no_posterior(asked):
    bent = draw(4)
    bent[..., :2] = bent[..., :2] ** 3
    diagonal = classify_gestures(draw(4)) > 1
    table = asked(bent[diagonal])
    assert "exact_posterior" not in table and table["model"]["valid"].n == int(diagonal.sum())


def test_what_cannot_be_asked_is_empty(asked):
    assert asked(torch.zeros(3, L, 3)) == {}
    config = TrainConfig(
        seq_len=L, d_model=16, num_layers=1, nhead=2, known_frames=False, num_inference_steps=3
    )
    assert asked(draw(3), model=untrained_model(config, "cpu")) == {}
