"""Numbers are short and tables line up, as a reader of plain text needs them.

python -m pytest tests/test_tables.py
"""

import math

import pytest

from trainlib.tables import fill_document, format_number, markdown_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (5, "5"), (1.0, "1.00"), (0.9995, "0.9995"), (0.123456, "0.123"),
        (-2.473, "-2.47"), (123.4, "123"), (9.337e-06, "9.34e-6"), (1e-17, "0"),
        (0.0007, "0.000700"), (123456.0, "123,456"), (1234, "1,234"), (999.6, "1000"),
        (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_columns_line_up():
    table = markdown_table(["a", "long head"], [["cell", "x"], ["", "–"]])
    assert table.splitlines() == [
        "| a    | long head |",
        "|------|-----------|",
        "| cell | x         |",
        "|      | –         |",
    ]


def test_a_number_within_a_line_is_filled_in_there(tmp_path):
    path = tmp_path / "document.md"
    text = "| a | <!-- begin x -->{}<!-- end x -->, <!-- begin y -->{}<!-- end y --> |\n"
    path.write_text(text.format("", "old"))
    assert fill_document(path, {"x": "1", "y": "2"}) == {"x", "y"}
    assert path.read_text() == text.format("1", "2")


def test_a_document_is_filled_between_its_marks(tmp_path):
    """By name; a backslash or a group in the text means itself; what has no text stays."""
    path = tmp_path / "document.md"
    text = "a\n<!-- begin x -->\n{}<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
    path.write_text(text.format("old\n"))
    for _ in range(2):
        assert fill_document(path, {"x": r"\1 \n new", "z": "nowhere"}) == {"x"}
        assert path.read_text() == text.format("\n\\1 \\n new\n\n")
