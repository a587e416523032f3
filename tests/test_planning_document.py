"""The statistics and the documents: every number is written from the committed results.

Why: a number that a person typed drifts.

    python -m pytest tests/test_planning_document.py
"""

import shutil
import sys

import pytest
from conftest import ROOT

import planning
from planning import document, tasks
from planning.diffusion import DiffusionPrior
from planning.methods import cost_methods, goal_methods, prior_methods
from planning.shipped import SHIPPED

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (20, 20), (317, 600)])
def test_wilson_agrees_with_scipy(k, n):
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
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
    methods = document.every_method()  # of each row a label, with no run of goals at hand
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
    alone = [line for line in rows if line["method"] != "changes_second"]
    table = document.gradients_table(alone, {"tokens_60k": {"r2": 0.6}}, cost_methods())
    assert "| 75     | 100       | 50   |                  | 1 |" in table, "no second network"
    text = document.learned_tables(rows, cost_methods())
    assert text.startswith("tokens, 60 k:") and "| 75 [30, 95] " in text


def row(stage, method, task, bits, **more):
    """A line of the results: 250 evaluations solve as many."""
    line = {"stage": stage, "method": method, "task": task, "seed": 0, "budget": 250, "variant": ""}
    return {**line, "solved": {"250": bits}, "auc": None, **more}


def test_the_verdict_compares_what_knows_the_same():
    """By hand: ten to nothing is p = 2/2¹⁰; what was given goals is held against its like."""
    rows = [
        row("main", "true_adam", "drag", "0" * 10), row("main", "ddim_adam", "drag", "1" * 10),
        row("main", "cfg_ddim", "drag", "1" * 10), row("main", "nearest_goal", "drag", "1" * 10),
    ]  # fmt: skip
    methods = cost_methods() | prior_methods(DiffusionPrior(None, None, {})) | goal_methods(None)
    made = document.new_blocks(rows, {}, methods)
    assert made["verdict"] == (
        "Exact simulator, without goals: DDIM + Adam 6-D (100 %) beats true generator + Adam 6-D "
        "(0 %), p = 0.002. Exact simulator, given goals: DDIM given the goal (100 %) equals, "
        "within noise, nearest goal (100 %), p = 1. Not measured yet: learned world models, "
        "courses."
    )
    *_, line = made["arenas"].splitlines()
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("exact simulator", "true generator + Adam 6-D: 0 %", "DDIM + Adam 6-D: 100 %"),
        *("DDIM given the goal: 100 %", "10"),
    ]
    assert made["courses"] == made["loop"] == document.NOT_YET


def test_the_shipped_planner_against_its_rivals_by_hand():
    """Ten to nothing on drags, three to four on sliders: intervals apart on drags alone."""
    solved = {  # of drags, of sliders
        "planner": ("1" * 10, "1110"), "true_adam": ("0" * 10, "1111"),
        "sobol_cma": ("0" * 10, "0001"), "ddim_adam": ("1" * 10, "1111"),
    }  # fmt: skip
    rows = [
        row("batched", name, task, bits)
        for name, of in solved.items()
        for task, bits in zip(("drag", "slider"), of, strict=True)
    ]
    methods = SHIPPED | cost_methods() | prior_methods(DiffusionPrior(None, None, {}))
    *_, line = document.new_blocks(rows, {}, methods)["shipped"].splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [  # four instances of each task are paired: 4 + 3 to 0 + 4, only 4 to 1
        *("exact simulator, 32 at a time", "88", "true generator + Adam 6-D", "cost only", "50"),
        *("0.38", "wins drag", "4"),
    ]


def test_courses_and_loop_by_hand():
    """Half of two tasks, a mean AUC of .7; of eight plans the second after a new goal solve all."""
    rows = [
        row("courses", "line_cem", "around", "1100", auc=0.6),
        row("courses", "line_cem", "fling", "0011", auc=0.8),
    ]
    ms = {"ms_median": 400.0, "ms_95": 480.4, "ms_most": 510.0}
    rows += [
        row("loop", "warm", "drag", "01000100", **ms),
        row("loop", "cold", "drag", "0" * 8, **ms),
    ]
    made = document.new_blocks(rows, {}, cost_methods())
    cells = [cell.strip() for cell in made["courses"].splitlines()[-1].strip("|").split("|")]
    assert cells == ["CEM 6-D", "50 [15, 85]", "50 [15, 85]", "50", "0.70", "4"]
    cells = [cell.strip() for cell in made["loop"].splitlines()[2].strip("|").split("|")]
    assert cells == [
        *("drag", "warm", "25 [7, 59]", "0", "100", "0", "0", "400", "480", "510", "8", "0.5")
    ]


@pytest.mark.parametrize("broken", ["matplotlib.figure", "evaluation.figures"])
def test_tables_are_written_without_figures(tmp_path, monkeypatch, capsys, broken):
    """Whatever is wrong with matplotlib, the numbers are written and one line says so."""
    shutil.copy(ROOT / "planning" / "results" / "results.jsonl", tmp_path)
    path = tmp_path / "document.md"
    path.write_text("<!-- begin success -->\n<!-- end success -->\n", "utf-8")
    monkeypatch.setitem(sys.modules, broken, None)
    monkeypatch.delitem(sys.modules, "planning.figures", raising=False)
    monkeypatch.delattr(planning, "figures", raising=False)
    prior = DiffusionPrior(None, None, {})
    methods = SHIPPED | cost_methods() | prior_methods(prior) | goal_methods(None)
    document.write(tmp_path, methods, [path])
    assert "| CEM 6-D " in path.read_text("utf-8") and not list(tmp_path.glob("*.png"))
    err = capsys.readouterr().err
    assert err.startswith("warning: no figures") and err.count("\n") == 1
