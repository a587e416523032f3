"""The quick part of the fault lab: each fault once or a few times; `make faults` tries hundreds.

Why: that a crash loses nothing is only known of a run that was killed. The faults are real and come
from outside; see lab.py. Where strace, unshare or root is missing, a test says so and is skipped.

    python -m pytest tests/faults
"""

import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
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


def test_the_document_lists_the_faults_of_the_lab():
    lines = (ROOT / "docs" / "FAULTS.md").read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]  # the first names the columns
    titles = [row.removeprefix("| ").partition(" | ")[0] for row in rows]
    assert titles == [fault.title for fault in FAULTS], "run make faults"
