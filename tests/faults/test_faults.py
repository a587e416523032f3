"""The quick part of the fault lab: each fault once or a few times; `make faults` tries hundreds.

Why: that a crash loses nothing is only known of a run that was killed. The faults are real and come
from outside; see lab.py. Where strace, unshare or root is missing, a test says so and is skipped.

    python -m pytest tests/faults
"""

import tempfile
from pathlib import Path

import pytest

from tests.faults import damage, death, surroundings  # noqa: F401  their faults enter the list
from tests.faults.lab import FAULTS, Lab, Skipped


@pytest.fixture(scope="module")
def lab():
    with tempfile.TemporaryDirectory() as folder:
        yield Lab(Path(folder))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.quick], ids=lambda f: f.title)
def test_survived(lab, fault):
    try:
        reasons = [*fault.tries(lab, fault.quick)]
    except Skipped as e:
        pytest.skip(str(e))
    assert reasons and not any(reasons), [reason for reason in reasons if reason]
