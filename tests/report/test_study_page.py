"""A study's document, and the page that is drawn of it."""

import math
from dataclasses import asdict

import pytest

from ppo_rlhf.document import DOCUMENT, Chart, Document, Section, Series, Table, read_document
from ppo_rlhf.errors import UserError
from ppo_rlhf.report import write_study
from ppo_rlhf.run import strict_json

SERIES = Series("<one>", [0.0, 1.0, 2.0], [0.5, math.nan, 1.5], notes=["a", "b", "c"])
SECTION = Section("First & last", ["Text."], [Table(["name", "x"], [["a|b", "<1>"]])], [Chart("Curve", (SERIES,))])
WHOLE = Document("A study", ["What it is."], [SECTION, Section("Second", ["More."])])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / DOCUMENT).write_text(strict_json(asdict(WHOLE)), encoding="utf-8")
    return tmp_path


def test_a_document_is_read_as_it_was_written(folder):
    found = read_document(folder)
    assert (found.title, found.text, found.sections[1].title) == ("A study", ["What it is."], "Second")
    (table,), (chart,) = found.sections[0].tables, found.sections[0].charts
    assert table.rows == [["a|b", "<1>"]]
    assert chart.series[0].y == [0.5, pytest.approx(math.nan, nan_ok=True), 1.5]
    assert chart.summary == WHOLE.sections[0].charts[0].summary


def test_markdown_has_the_text_and_the_tables():
    assert WHOLE.markdown == (
        "# A study\n\nWhat it is.\n\n## First & last\n\nText.\n\n"
        "| name | x |\n| --- | --- |\n| a&#124;b | <1> |\n\n## Second\n\nMore.\n"
    )


def test_the_page_shows_the_text_the_tables_and_the_charts_in_one_file(folder):
    path = write_study(folder)
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert "<title>A study</title>" in page
    assert "First &amp; last" in page
    assert "Runs shown" not in page
    assert '<th scope="row">a|b</th><td>&lt;1&gt;</td>' in page
    assert page.count('class="picture"') == 1
    assert "<one>" not in page.split("<script", 1)[0]
    assert "<script src" not in page
    assert "<link" not in page


@pytest.mark.parametrize("text", [None, "{", "[]", '{"title": "A"}', '{"title": "A", "sections": []}'])
def test_a_folder_without_a_document_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / DOCUMENT).write_text(text)
    with pytest.raises(UserError, match="holds no study's page"):
        write_study(tmp_path)
    assert not (tmp_path / "report.html").exists()
