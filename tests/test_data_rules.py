"""What the training set decides, and what is said of it.

python -m pytest tests/test_data_rules.py
"""

import numpy as np
import pytest
from conftest import L, make_gestures

from train_diffusion_ddim import TrainConfig
from trainlib.data_rules import COARSEST, CURVE_STEPS, FINEST, SHAPES, decided_by_data


def swipes(angle, length=0.3, count=8):
    """Windows that swipe at an angle to the x axis, (count, L, 3)."""
    x, n = np.zeros((count, L, 3)), L - 4
    along = length * np.linspace(0, 1, n)
    x[:, 2 : 2 + n] = np.stack([0.3 + along * np.cos(angle), 0.3 + along * np.sin(angle), along], 1)
    x[:, 2 : 2 + n, 2] = 1
    return x.astype(np.float32)


@pytest.mark.parametrize(("axis_swipes", "augment"), [(0, False), (3, False), (4, True), (8, True)])
def test_half_of_the_swipes_along_an_axis_turn_augmentation_on(axis_swipes, augment):
    x = np.concatenate([swipes(0.0)[:axis_swipes], swipes(0.3)[axis_swipes:]])
    config, why = decided_by_data(TrainConfig(), x)
    assert config.augment is augment
    said = f"augmentation {'on' if augment else 'off'}: {axis_swipes / 8:.0%} of the swipes"
    assert why[0].startswith(said)


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_asked_for_is_kept(asked):
    given = {"sigma_min": 0.002, "max_contacts": 2, "shapes": 4, "curve_steps": 3, "patch_size": 5}
    config = TrainConfig(augment=asked, **given)
    assert decided_by_data(config, swipes(0.0)) == (config, [])


@pytest.mark.parametrize(
    ("given", "owned"), [({"context_dim": 2}, "goal"), ({"distill": "x"}, "lesson")]
)
def test_what_belongs_to_a_gesture_is_not_mirrored(given, owned):
    config, why = decided_by_data(TrainConfig(**given), swipes(0.0))
    assert config.augment is False and f"a mirrored gesture has no {owned}" in why[0]


@pytest.mark.parametrize(
    ("length", "sigma_min"), [(0.3, COARSEST), (0.02, 0.002), (0.012, 0.0012), (1e-4, FINEST)]
)
def test_the_steps_end_at_a_tenth_of_small_motions(length, sigma_min):
    config, why = decided_by_data(TrainConfig(), swipes(0.0, length))
    assert config.sigma_min == pytest.approx(sigma_min, rel=0.02)
    assert f"end at sigma {sigma_min:g}:" in why[2]


@pytest.mark.parametrize("bent", [False, True])
def test_contacts_that_polynomials_miss_have_shapes_of_their_own(bent):
    """Swipes that rest for two thirds and then leave at once, by 0.3 of the screen."""
    x, n = swipes(0.0), L - 4
    if bent:
        x[:, 2 : 2 + n, 0] = 0.3 + 0.3 * (np.arange(n) > 2 * n // 3)
    config, why = decided_by_data(TrainConfig(), x)
    assert config.shapes == (SHAPES if bent else 0)
    plain, _ = decided_by_data(TrainConfig(contacts=False), x)
    assert (config.curve_steps, plain.shapes, plain.curve_steps) == (CURVE_STEPS, 0, 0)
    said = f"contacts are {'of 6 shapes of their own' if bent else 'polynomials'}: polynomials miss"
    assert why[3].startswith(said)


def taps(num):
    """A window with so many taps."""
    x = np.zeros((1, L, 3), np.float32)
    for first in range(1, 4 * num, 4):
        x[0, first : first + 2] = 1
    return x


@pytest.mark.parametrize(
    ("windows", "most"),
    [([0], 1), ([1], 1), ([2, 1], 2), ([3] + [1] * 99, 3), ([2] + [1] * 1999, 1), ([5, 0], 3)],
)
def test_windows_hold_as_many_contacts_as_all_but_rare_ones(windows, most):
    config, why = decided_by_data(TrainConfig(), np.concatenate([taps(num) for num in windows]))
    assert config.max_contacts == most
    share = sum(num <= most for num in windows) / len(windows)
    assert why[1].startswith(f"{most} contact") and f"{share:.1%} of the windows" in why[1]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_curves_go_on_alone_where_windows_hold_one_contact(most):
    config, why = decided_by_data(TrainConfig(max_contacts=most), swipes(0.0))
    assert config.curve_steps == (CURVE_STEPS if most == 1 else 0)
    assert any("curves end in 12 steps of their own" in line for line in why) is (most == 1)


@pytest.mark.parametrize(("length", "patch_size"), [(250, 10), (125, 5), (24, 2), (249, 1)])
def test_tokens_divide_the_window(length, patch_size):
    x = np.zeros((1, length, 3), np.float32)
    assert decided_by_data(TrainConfig(seq_len=length), x)[0].patch_size == patch_size


@pytest.mark.parametrize("x", [np.zeros((3, L, 3), np.float32), make_gestures(1).numpy()[:0]])
def test_windows_without_a_touch_decide_too(x):
    config, _ = decided_by_data(TrainConfig(), x)
    assert config.augment is False and config.sigma_min == COARSEST
