"""What README.md and docs/ say is what the committed result files say.

Why: a number that somebody typed is right once. Each stands between markers and is written there by
a command; here each document must be what the commands would write.

    python -m pytest tests/test_documents.py
"""

import re
import shutil

import pytest
from conftest import ROOT

from benchmarks import document, report
from planning import document as planning_document
from planning.diffusion import DiffusionPrior
from planning.methods import cost_methods, goal_methods, prior_methods
from planning.shipped import SHIPPED
from trainlib.tables import fill_document

MARKED = re.compile(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d\s?(dB|%|ms|s|min|minutes|hours)\b|(?<!\d)0?\.\d{2,}|\de-\d")


@pytest.fixture(scope="module")
def made():
    return document.blocks()


@pytest.mark.parametrize("path", document.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_results_say(path, made, tmp_path):
    again = shutil.copy(path, tmp_path / path.name)
    fill_document(again, made)
    assert again.read_text("utf-8") == path.read_text("utf-8"), "run python -m benchmarks.document"


def test_the_benchmarks_say_what_the_results_say(tmp_path):
    report.main(output=tmp_path / "BENCHMARKS.md")
    committed = (ROOT / "docs" / "BENCHMARKS.md").read_text("utf-8")
    assert (tmp_path / "BENCHMARKS.md").read_text("utf-8") == committed


def test_every_marker_has_a_command_and_every_number_a_place(made):
    texts = [path.read_text("utf-8") for path in document.DOCUMENTS]
    begun = {name for text in texts for name in re.findall(r"<!-- begin (\S+) -->", text)}
    assert begun == {match[1] for text in texts for match in MARKED.finditer(text)}
    assert made.keys() <= begun
    prior = DiffusionPrior(None, None, {})
    methods = SHIPPED | cost_methods() | prior_methods(prior) | goal_methods(None)
    planning = planning_document.blocks(ROOT / "planning" / "results", methods)
    assert begun == made.keys() | planning.keys() and not made.keys() & planning.keys()


@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md", "docs/RUN_DIFFUSION_TRAINING.md"])
def test_nobody_typed_a_measured_number(name):
    """Outside the markers and code there is no share, time or decibel."""
    text = CODE.sub("", MARKED.sub("", (ROOT / name).read_text("utf-8")))
    lines = [line.replace("95 % bootstrap", "") for line in text.splitlines()]
    assert not [line for line in lines if MEASURED.search(line)]


def test_a_number_that_drifted_is_seen(made, tmp_path):
    path = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text("utf-8")
    path.write_text(text.replace(made["recreated"], made["recreated"].replace("38", "39")), "utf-8")
    assert path.read_text("utf-8") != text
    fill_document(path, made)
    assert path.read_text("utf-8") == text
