"""The shapes that contacts have in common: against the curves that they were mixed from.

python -m pytest tests/test_shapes.py
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch

import train_diffusion_ddim as tdd
from trainlib.legendre import legendre_table
from trainlib.run import config_of
from trainlib.shapes import learn_shapes, missed_by, shapes_of

L = 60


def late(s):
    """At rest until the middle, then even motion."""
    return np.maximum(s, 0)


def wave(s):
    return np.sin(3 * np.pi * s)


def windows(motions, count=40, seed=0):
    """Contacts of 20 to 60 frames whose x and y are mixed of motions of [-1, 1], (count, L, 3)."""
    rng, x = np.random.default_rng(seed), np.zeros((count, L, 3), np.float32)
    for row in x:
        n = rng.integers(20, L + 1)
        s = (2 * np.arange(n) + 1 - n) / n
        mixed = rng.uniform(-0.1, 0.1, (2, len(motions))) @ [motion(s) for motion in motions]
        row[:n, :2], row[:n, 2] = 0.5 + mixed.T, 1
    return x


def places(x):
    return [row[row[:, 2] > 0, :2].astype(np.float64) for row in x]


@pytest.mark.parametrize("n", [1, 2, 3, 20, L])
def test_shapes_are_orthogonal_on_every_number_of_frames(n):
    table = shapes_of(windows([late, wave]), 3).double()
    assert table.shape == (L + 1, L, 3) and not table[n, n:].any() and not table[0].any()
    product, kept = table[n].T @ table[n] / n, min(n, 3)
    torch.testing.assert_close(product[:kept, :kept], torch.eye(kept).double(), atol=1e-5, rtol=0)
    assert not product[kept:].any()
    torch.testing.assert_close(table[n, :n, 0], torch.ones(n).double(), atol=1e-6, rtol=0)


def test_contacts_are_made_of_what_they_have_in_common():
    """Three shapes hold what they were mixed from; as many polynomials, by far, do not."""
    table, others = shapes_of(windows([late, wave]), 3), windows([late, wave], seed=1)
    missed = missed_by(table, places(others))
    assert missed.max() < missed_by(legendre_table(L, 3), places(others)).mean() / 20
    backwards = [xy[::-1] for xy in places(others)]
    assert missed_by(table, backwards).mean() > 10 * missed.mean()
    both = shapes_of(windows([late, wave]), 4, reversible=True)  # the wave is its own mirror image
    assert missed_by(both, places(others) + backwards).max() < 3 * missed.max()


@pytest.mark.parametrize("x", [windows([late])[:1], np.zeros((2, L, 3), np.float32)])
def test_few_contacts_or_none_are_followed_by_polynomials(x):
    table = shapes_of(x, 6)
    s = (2 * np.arange(L) + 1 - L) / L
    line = np.stack([s, 1 + s], axis=1)
    assert missed_by(table, [line]).max() < 0.03 and table.isfinite().all()


def test_what_polynomials_miss_is_the_rest_of_a_fit():
    s = (2 * np.arange(50) + 1 - 50) / 50
    xy = np.stack([s**3, np.sign(s)], axis=1)
    missed = missed_by(legendre_table(L, 4), [xy, xy[:4], xy[:1]])
    fit = np.polyval(np.polyfit(s, np.sign(s), 3), s)
    assert missed[0, 1] == pytest.approx(np.sqrt(((fit - np.sign(s)) ** 2).mean()), rel=1e-5)
    assert missed[0, 0] < 1e-6 and missed[1:].max() < 1e-6  # four frames are met by any four
    assert missed_by(legendre_table(L, 4), []).shape == (0, 2)


def test_the_run_of_a_time_without_shapes_has_none():
    kept = {k: v for k, v in asdict(tdd.TrainConfig(seed=3)).items() if k != "shapes"}
    config = config_of({"path": "old.pth", "config": kept}, tdd.TrainConfig)
    assert config.shapes == 0 and config.seed == 3


@pytest.mark.parametrize("augment", [False, True])
def test_shapes_are_reversible_where_training_reverses_gestures(
    augment, no_figures, tiny_config, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(tdd, "learn_shapes", lambda model, x_0, reversible: seen.append(reversible))
    tdd.train(tiny_config(augment=augment, num_epochs=1, save_dir=str(tmp_path)))
    assert seen == [augment]


OPTIONS = {"seq_len": L, "d_model": 16, "num_layers": 1, "nhead": 2, "patch_size": 5}
OPTIONS |= {"dim_feedforward": 16, "beta_schedule": "cosine", "contacts": True}


def test_shapes_come_with_the_weights_and_polynomials_do_not():
    model = tdd.MinimalDiffusionTransformer(**OPTIONS, shapes=3)
    x = windows([late, wave])
    learn_shapes(model, x, False)
    torch.testing.assert_close(model.output_projection.shapes, shapes_of(x, 3))
    other = tdd.MinimalDiffusionTransformer(**OPTIONS, shapes=3)
    other.load_state_dict(model.state_dict())
    learn_shapes(other, windows([wave]), False)  # a student, or a run that goes on
    torch.testing.assert_close(other.output_projection.shapes, shapes_of(x, 3))
    plain = tdd.MinimalDiffusionTransformer(**OPTIONS)
    before = plain.output_projection.shapes.clone()
    learn_shapes(plain, x, False)
    assert torch.equal(plain.output_projection.shapes, before)
    assert "output_projection.shapes" not in plain.state_dict()
