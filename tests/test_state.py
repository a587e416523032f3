"""What a run holds: its average of the weights, and a checkpoint that takes up where it stood.

Why: an average with the wrong memory judges other weights than were trained; a checkpoint that
loses a buffer of the optimizer resumes another run.

    python -m pytest tests/test_state.py
"""

import pytest

from trainlib.state import ema_decay_at


def test_the_ema_forgets_its_start():
    decays = [ema_decay_at(step, 10_000, 0.999) for step in range(10_000)]
    assert decays[0] == 0 and decays[-1] == 0.998 and decays == sorted(decays)
    assert decays[90] == pytest.approx(1 - 10 / 100)
    assert max(ema_decay_at(step, 10**6, 0.9) for step in range(1000)) == 0.9
    assert ema_decay_at(9, 10, 0.999) == 0  # a run of ten steps is not averaged
