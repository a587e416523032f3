"""The exported sampler draws what the run draws, within chance.

Why: numbers that agree for given noise say nothing of noise that is drawn wrongly; shares of ten
thousand draws do. The exporter's own tests are in test_export.

    python -m pytest tests/test_exported.py
"""

import json
import math

import pytest
import torch
from conftest import make_gestures

from benchmarks import exported, measure
from evaluation.bayes import GesturePrior

PRIOR = GesturePrior(20, 3, 10)


def test_standard_errors_between_two_shares():
    a, b = (torch.arange(100) < k for k in (50, 60))
    expected = -0.1 / math.sqrt(0.55 * 0.45 * (1 / 100 + 1 / 100))
    assert exported.z_score(a, b) == pytest.approx(expected)
    assert exported.z_score(a, a[:50]) < 0 and exported.z_score(a[:10], b[:10]) == 0


def test_equal_sets_are_within_chance_and_others_are_not():
    """Gestures against others of one prior, and against the same of which a tenth is idle."""
    sets = {"a": make_gestures(400, seed=1), "b": make_gestures(400, seed=2)}
    sets["c"] = sets["b"].clone()
    sets["c"][::10] = 0
    a, b, c = exported.compare_sets(sets, PRIOR)
    assert a["largest z"] == a["KS of frames"] == 0 and a["one press"] == a["valid"] == 1
    assert b["largest z"] < exported.CHANCE < c["largest z"]
    assert c["none"] == 0.1 and c["one press"] == 0.9 and 0.05 < c["KS of frames"] < 0.2


def result_of(run, tmp_path, *flags):
    flags = ["--checkpoint", str(run), "--compiled", "0", "--output_dir", str(tmp_path), *flags]
    options = exported.OPTIONS
    assert measure.main("exported", exported.__doc__, exported.measure, options, flags) == 0
    (path,) = tmp_path.glob("exported-*.json")
    return json.loads(path.read_text())


def test_every_engine_has_its_row(straight_run, tmp_path):
    result = result_of(straight_run, tmp_path, "--num", "20")
    rows = result["tables"][0]["rows"]
    assert [row[""] for row in rows][:2] == ["sample()", "sample(), other noise"]
    assert rows[-1][""] == "export, torch" and rows[-1]["difference for given noise"] < 1e-5
    assert result["arguments"]["checkpoint"] == straight_run.name


def test_without_a_checkpoint_it_says_so(capsys):
    flags, options = [], exported.OPTIONS
    assert measure.main("exported", "", exported.measure, options, flags) == 2
    assert "--checkpoint names a checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_draws_have_the_runs_own_shares(straight_run, tmp_path):
    for row in result_of(straight_run, tmp_path)["tables"][0]["rows"]:
        assert row["n"] == 10_000 and row["largest z"] < exported.CHANCE
        assert row["KS of frames"] < 1.95 * math.sqrt(2 / 10_000)  # p = .001
