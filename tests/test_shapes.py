"""The shapes that contacts have in common: against the curves that they were mixed from.

python -m pytest tests/test_shapes.py
"""

import numpy as np
import pytest
import torch

import train_diffusion_ddim as tdd
from trainlib.shapes import learn_shapes, missed_by_polynomials, shapes_of

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


def left_by(table, xy):
    """What the shapes of a table leave of places, (n, 2)."""
    basis = table[len(xy), : len(xy)].double().numpy()
    return xy - basis @ (basis.T @ xy) / len(xy)


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
    x = windows([late, wave])
    table = shapes_of(x, 3)
    contacts = [row[row[:, 2] > 0, :2].astype(np.float64) for row in windows([late, wave], seed=1)]
    left = np.array([np.sqrt((left_by(table, xy) ** 2).mean()) for xy in contacts])
    assert left.max() < missed_by_polynomials(contacts, 3).mean() / 20


@pytest.mark.parametrize("x", [windows([late])[:1], np.zeros((2, L, 3), np.float32)])
def test_few_contacts_or_none_are_followed_by_polynomials(x):
    table = shapes_of(x, 6)
    s = (2 * np.arange(L) + 1 - L) / L
    line = np.stack([s, 1 + s], axis=1)
    assert np.abs(left_by(table, line)).max() < 0.05 and table.isfinite().all()


def test_what_polynomials_miss_is_the_rest_of_a_fit():
    s = (2 * np.arange(50) + 1 - 50) / 50
    xy = np.stack([s**3, np.sign(s)], axis=1)
    x, y = missed_by_polynomials([xy, xy[:4]], 4)[0]  # four frames are met by any four
    fit = np.polyval(np.polyfit(s, np.sign(s), 3), s)
    assert x < 1e-12 and y == pytest.approx(np.sqrt(((fit - np.sign(s)) ** 2).mean()))
    assert missed_by_polynomials([], 4).shape == (0, 2)


OPTIONS = {"seq_len": L, "d_model": 16, "num_layers": 1, "nhead": 2, "patch_size": 5}
OPTIONS |= {"dim_feedforward": 16, "beta_schedule": "cosine", "contacts": True}


def test_shapes_come_with_the_weights_and_polynomials_do_not():
    model = tdd.MinimalDiffusionTransformer(**OPTIONS, shapes=3)
    x = windows([late, wave])
    learn_shapes(model, x)
    torch.testing.assert_close(model.output_projection.shapes, shapes_of(x, 3))
    other = tdd.MinimalDiffusionTransformer(**OPTIONS, shapes=3)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.output_projection.shapes, shapes_of(x, 3))
    plain = tdd.MinimalDiffusionTransformer(**OPTIONS)
    before = plain.output_projection.shapes.clone()
    learn_shapes(plain, x)
    assert torch.equal(plain.output_projection.shapes, before)
    assert "output_projection.shapes" not in plain.state_dict()
