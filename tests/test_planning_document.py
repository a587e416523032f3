"""The statistics and the documents: every number is written from the committed results.

Why: a number that a person typed drifts.

    python -m pytest tests/test_planning_document.py
"""

import shutil
import sys

import pytest
from conftest import ROOT
from scipy.stats import binomtest

import planning
from planning import document, tasks
from planning.diffusion import DiffusionPrior
from planning.methods import cost_methods, goal_methods, prior_methods


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (20, 20), (317, 600)])
def test_wilson_agrees_with_scipy(k, n):
    interval = binomtest(k, n).proportion_ci(method="wilson")
    assert document.wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-4)


def test_mcnemar_by_hand():
    """Five wins, one loss: p = 2·(1 + 6)/2⁶."""
    assert document.mcnemar("1111101", "0000011") == (5, 1, pytest.approx(14 / 64))
    assert document.mcnemar("0101", "0101") == (0, 0, 1.0)


def test_the_documents_quote_the_results(tmp_path, capsys):
    """Written again from the committed results they are the same; a missing place is named."""
    results, again = ROOT / "planning" / "results", []
    shutil.copytree(results, tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "cache"))
    for path in document.DOCUMENTS:
        again.append(tmp_path / path.name)
        again[-1].write_text(path.read_text("utf-8"), "utf-8")
    prior = DiffusionPrior(None, None, {})
    methods = cost_methods() | prior_methods(prior) | goal_methods(None)
    document.write(tmp_path / "results", methods, again)
    assert capsys.readouterr().out == "", "every block has a place"
    for path, copy in zip(document.DOCUMENTS, again, strict=True):
        assert copy.read_text("utf-8") == path.read_text("utf-8")
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        path.name for path in results.glob("*.png")
    }
    again[0].write_text(again[0].read_text("utf-8").replace("<!-- begin pairs -->", ""), "utf-8")
    document.write(tmp_path / "results", methods, again)
    assert "no document has a place for the block pairs" in capsys.readouterr().out


def test_the_numbers_of_the_verdict_by_hand():
    """Two of four solved in each of two tasks and none in the others: a third of that."""
    tasks_solved = {"tap_large": "1100", "drag": "0011"}
    rows = [
        {"stage": "main", "method": "cem_ramp", "task": task, "seed": 0,
         "solved": {"250": tasks_solved.get(task, "0000")}}
        for task in tasks.TASKS
    ]  # fmt: skip
    timing = {"cem_ramp": {"total_s": 0.3, "world_s": 0.1, "used": 250}}
    *_, row = document.headline_table(rows, cost_methods(), timing).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("CEM 6-D", "cost only", "17", "50", "0", "0", "0", "50", "0"),
        *("0.30", "0.20", "0.70"),
    ]


def test_the_rule_is_held_against_what_gradients_came_to():
    """Of four instances: three by choosing, two by Adam; R² .6 says "near", which solves all."""
    solved = {"changes": "1110", "changes_trust": "1111", "changes_adam": "0110"}
    rows = [
        {"stage": "learned", "variant": "tokens_60k", "method": name, "task": "drag", "seed": 0,
         "solved": {"250": bits}, "model_cost": 0.25, "true_cost": 0.5}
        for name, bits in {**solved, "changes_second": "1110"}.items()
    ]  # fmt: skip
    table = document.gradients_table(rows, {"tokens_60k": {"r2": 0.6}}, cost_methods())
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells == [
        *("tokens, 60 k", "draws at token changes", "75", "100", "50", "75", "1"),
        *("gradient near draws", "yes"),
    ]
    text = document.learned_tables(rows, cost_methods())
    assert text.startswith("tokens, 60 k:") and "| 75 [30, 95] " in text


@pytest.mark.parametrize("broken", ["matplotlib.figure", "evaluation.figures"])
def test_tables_are_written_without_figures(tmp_path, monkeypatch, capsys, broken):
    """Whatever is wrong with matplotlib, the numbers are written and one line says so."""
    shutil.copy(ROOT / "planning" / "results" / "results.jsonl", tmp_path)
    path = tmp_path / "document.md"
    path.write_text("<!-- begin success -->\n<!-- end success -->\n", "utf-8")
    monkeypatch.setitem(sys.modules, broken, None)
    monkeypatch.delitem(sys.modules, "planning.figures", raising=False)
    monkeypatch.delattr(planning, "figures", raising=False)
    methods = cost_methods() | prior_methods(DiffusionPrior(None, None, {})) | goal_methods(None)
    document.write(tmp_path, methods, [path])
    assert "| CEM 6-D " in path.read_text("utf-8") and not list(tmp_path.glob("*.png"))
    err = capsys.readouterr().err
    assert err.startswith("warning: no figures") and err.count("\n") == 1
