"""Contacts are split as they were made, and their shake is that of closed forms.

python -m pytest tests/test_contacts.py
"""

import math

import numpy as np
import pytest
from conftest import ROOT, python

from trainlib.contacts import contacts_of, median_shake, shake


def window(*touches, length=250):
    """One gesture (length, 3) with a touch for each (onset, xy)."""
    x = np.zeros((length, 3))
    for onset, xy in touches:
        x[onset : onset + len(xy)] = np.column_stack([xy, np.ones(len(xy))])
    return x


def line(n, start=(0.1, 0.2), end=(0.9, 0.6)):
    return np.linspace(start, end, n)


def test_contacts_of_windows_that_hold_several_or_none_or_are_cut():
    touches = [(0, line(3)), (10, line(5)), (245, line(5, (0.5, 0.5), (0.5, 0.51)))]
    throughout = window((0, line(250)))
    found = contacts_of(np.stack([window(*touches), window(), throughout]))
    assert [(c.window, c.onset, len(c.xy)) for c in found] == [
        *((0, onset, len(xy)) for onset, xy in touches),
        (2, 0, 250),
    ]
    for contact, (_, xy) in zip(found, touches, strict=False):
        np.testing.assert_array_equal(contact.xy, xy)
    assert [c.moves for c in found] == [True, True, False, True]
    assert contacts_of(np.zeros((0, 250, 3))) == []


def test_a_frame_is_pressed_above_one_half():
    x = window((5, line(20)))
    x[10, 2] = 0.5
    assert [(c.onset, len(c.xy)) for c in contacts_of(x[None])] == [(5, 5), (11, 14)]


def test_shake_of_a_line_is_nothing():
    assert shake(line(75)) == pytest.approx(0, abs=1e-10)
    assert shake(np.full((9, 2), 0.3)) == 0
    assert math.isnan(shake(line(2))) and math.isnan(shake(line(1)))


def test_shake_of_a_parabola_and_of_an_arc():
    frame = np.arange(30)
    assert shake(np.column_stack([0.0005 * frame**2, 0 * frame])) == pytest.approx(0.5)
    # on a circle the second difference is (2 - 2 cos w) times the radius, towards its centre
    radius, w = 0.3, 2 * np.pi / 360
    angle = w * np.arange(361)
    circle = 0.5 + radius * np.column_stack([np.cos(angle), np.sin(angle)])
    inner = np.abs(np.column_stack([np.cos(angle), np.sin(angle)])[1:-1])
    assert shake(circle) == pytest.approx(1000 * radius * (2 - 2 * np.cos(w)) * inner.mean())
    assert shake(circle) == pytest.approx(1000 * radius * w**2 * 2 / np.pi, rel=0.01)


def test_shake_of_white_jitter():
    """x_{i+1} - 2x_i + x_{i-1} of independent N(0, s²) is N(0, 6s²): mean size s·sqrt(12/π)."""
    s = 0.002
    xy = line(20000) + s * np.random.default_rng(0).standard_normal((20000, 2))
    assert shake(xy) == pytest.approx(1000 * s * math.sqrt(12 / math.pi), rel=0.02)


def test_shake_of_a_rounded_line():
    """On a grid of pixels the second differences are whole; along a diagonal of slope 1/2, -1 to 1.

    x moves by one pixel a frame: 0. y by half a pixel, rounded 0 1 1 2 2 3 ...: one pixel each.
    """
    frame = np.arange(40)
    xy = np.floor(np.column_stack([frame, 0.5 * frame + 0.5])) / 1080
    assert shake(xy) == pytest.approx(1000 * 0.5 / 1080)


def test_median_shake_is_of_swipes_alone():
    bent = line(30).copy()
    bent[15:, 1] += 0.1  # second differences of .1 at two of 28 frames, on one of two axes
    trembling_click = np.full((20, 2), 0.5) + 0.001 * (np.arange(20) % 2)[:, None]
    x = np.stack([window((3, line(30)), (100, trembling_click)), window((9, bent)), window()])
    assert median_shake(x[:1]) == pytest.approx(0, abs=1e-9)
    assert median_shake(x) == pytest.approx(1000 * 0.2 / 56 / 2)  # halfway between 0 and bent
    assert math.isnan(median_shake(x[2:]))


def test_contacts_need_no_torch():
    code = "import sys, trainlib.contacts; assert 'torch' not in sys.modules"
    assert python("-c", code, PYTHONPATH=str(ROOT)).returncode == 0
