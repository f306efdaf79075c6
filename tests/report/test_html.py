from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from angelslim.base.errors import DataError
from angelslim.report.html import render_html, write_html
from angelslim.report.record import RunRecord

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Collects tags, attributes and visible text, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_is_one_self_contained_file(three, tmp_path, count):
    path = write_html(three[:count], tmp_path / "out" / "report.html")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    text = path.read_text("utf-8")
    page = Page(text)
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "poster", "data")]
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http" not in text and "@import" not in text
    assert page.tags.count("script") == 1 and "link" not in page.tags and "img" not in page.tags
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_the_whole_record(record):
    page = Page(render_html([record]))
    for layer in record.layers:
        assert layer.name in page.text
    for words in (
        record.command,
        record.scheme,
        record.format,
        record.warnings[0],
        "shares its weight with the embedding",
        "compression.quantization.name",
        "recipes/fp8_static.yaml",
        "torch 2.13.0",
        "ab" * 32,
        "913 MB",
        "9.871",
        "-3.0 points from 100.0",
        "within the noise of 99.5",
        "+0.3 % from 9.842",
        "1.58x smaller than 11.67 MB",
    ):
        assert words in page.text, words


def test_every_text_of_the_record_is_escaped(record, make_record):
    for name in ("method", "model", "model_type", "scheme", "format", "command"):
        setattr(record, name, f"{name}{EVIL}")
    record.skipped = {EVIL: EVIL}
    record.config = {EVIL: {EVIL: EVIL}}
    record.provenance = {f"{EVIL}.{EVIL}": EVIL}
    record.versions = record.hashes = {EVIL: EVIL}
    record.warnings = [EVIL]
    record.layers = [
        replace(record.layers[0], name=f"model.layers.0.{EVIL}", scheme=EVIL),
        *record.layers[1:],
    ]
    for scores in (record.before, record.after):
        scores[1] = replace(scores[1], metric=EVIL, unit=EVIL)
    for records in ([record], [record, make_record()]):
        text = render_html(records)
        assert "<script>alert" not in text
        page = Page(text)
        assert page.tags.count("script") == 1
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert page.text.count("<script>alert('x')</script>") > 10


def test_equal_records_give_equal_bytes(record, tmp_path):
    (tmp_path / "run.json").write_text(record.to_json())
    first = render_html([record])
    assert render_html([RunRecord.from_json(record.to_json())]) == first
    code = (
        "import sys; from pathlib import Path; from angelslim.report.compare import compare;"
        "compare([Path(sys.argv[1])], Path(sys.argv[1]) / 'other.html')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert (tmp_path / "other.html").read_text("utf-8") == first


def test_what_was_not_measured_is_said(record, make_record):
    bare = replace(
        make_record(evaluated=False), layers=[], skipped={}, config={}, hashes={}, command="", warnings=[]
    )
    page = Page(render_html([bare]))
    assert page.text.count("not evaluated") == 3
    assert "The command was not recorded." in page.text
    assert "Every linear layer was quantized." in page.text
    half = Page(render_html([replace(record, before=[])]))
    assert "not evaluated before" in half.text


def test_several_runs_have_one_comparison_and_a_section_each(three):
    page = Page(render_html(three))
    assert "3 runs compared" in page.text
    assert [value for name, value in page.attributes if name == "id" and value.startswith("run-")] == [
        "run-1",
        "run-2",
        "run-3",
    ]
    assert "int4_gptq: 2 of 64 samples" in page.text
    assert page.text.count("against size") == 2


def test_mixed_schemes_get_a_column(record):
    assert "Scheme</button>" not in render_html([record])
    record.layers[3] = replace(record.layers[3], scheme="W int8 per-channel")
    text = render_html([record])
    assert "Scheme</button>" in text and "W int8 per-channel" in text


def test_no_run_is_an_error():
    with pytest.raises(DataError, match="no run"):
        render_html([])


def test_a_failed_write_leaves_the_old_file(record, tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_html([record], path)
    assert path.read_text() == "old"
