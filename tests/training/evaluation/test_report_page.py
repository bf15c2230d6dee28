"""The page and the plot of a handmade report in which every text is hostile."""

from __future__ import annotations

import copy
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from hyperrt.training.evaluation import report_page, report_plots

EVIL = '"><script>alert(1)</script>'
REPORT = {
    "protocol": "dreambench",
    "not_comparable_because": [f"prompts={EVIL}"],
    "settings": {"images": 4, "kappa": 1.25, "only": [EVIL], "limit": None},
    "bundle": {"name": EVIL, "family": "tiny", "precision": "fp32"},
    "commit": "abc",
    "figures": {"dino": {"mean": 0.5, "low": 0.25, "high": 0.75, "subjects": 2}},
    "real": {"dino": {"mean": 0.875, "low": 0.8, "high": 0.9, "subjects": 2}},
    "calibration": {
        "dino": {
            "leave_self_out": 0.875, "with_self": 0.9, "published": 0.774, "difference": 0.101,
            "agrees": False, "note": "",
        }
    },
    "absent": {"clip": EVIL},
    "left_out": [[EVIL, EVIL]],
    "missing_subjects": ["vase"],
    "pictures": 1,
    "missing_pictures": 3,
    "prompts": [{"template": EVIL, "pictures": 1, "scores": {"dino": 0.5, "clip_t": None}}],
    "subjects": [
        {
            "name": "javascript:a%2F b", "noun": EVIL, "pack": "dreambench-live", "photos": ["00.png"],
            "left_out": [[EVIL, EVIL]], "reason": "", "scores": {"dino": 0.5},
            "pictures": [{"file": "03-0.png", "number": 3, "image": 0, "seed": 42, "scores": {"dino": 0.5}}],
        },
        {
            "name": "vase", "noun": "vase", "pack": "dreambench-objects", "photos": [], "left_out": [],
            "reason": EVIL, "scores": {}, "pictures": [],
        },
    ],
    "paper": {
        "tables": [
            {
                "title": "T 4", "columns": ["method", "dino", "clip_t"], "doubt": "",
                "rows": [["A & B", 0.7, 0.3], ["Real", 0.8, None]],
            },
            {
                "title": "T 10", "columns": ["kappa", "clip_t", "dino"], "rows": [[1.6, 0.297, 0.696]],
                "doubt": f"it was drawn with {EVIL}", "note": f"A is of {EVIL}",
            },
        ]
    },
}  # fmt: skip


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(report_page.page(REPORT, "../drawn", "photos", "figures.png"))


def test_hostile_text_is_escaped(page):
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not page.open
    assert "".join(page.text).count("<script>alert(1)</script>") == 14


def test_links_are_relative_and_escaped(page):
    links = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert "../drawn/javascript%3Aa%252F%20b/03-0.png" in links
    assert "photos/javascript%3Aa%252F%20b/00.png" in links
    assert not [link for link in links if ":" in link or link.startswith("/")]


def test_scores_stand_beside_those_of_the_paper_and_of_real_photos(page):
    text = " ".join(page.text)
    for words in (
        "A & B",
        "0.700",
        "This run",
        "0.500",
        "0.250 to 0.750",
        "0.875",
        "it does not agree",
        "vase",
    ):
        assert words in text
    assert text.count("This run") == text.count("This run has no row here: it was drawn with") + 1 == 2
    assert "A is of " in text
    assert "a " + REPORT["subjects"][0]["noun"] + " on a cobblestone street" in "".join(page.text)


def test_a_page_without_scores_says_so():
    report = copy.deepcopy(REPORT) | {"figures": {}, "calibration": {}, "bundle": None}
    text = " ".join(Reader(report_page.page(report, "pictures", "photos")).text)
    assert "Nothing was scored" in text and "This run" not in text


def test_the_plot_is_a_picture_and_needs_scores(tmp_path):
    pytest.importorskip("matplotlib")
    assert report_plots.write(tmp_path / "figures.png", REPORT)
    with Image.open(tmp_path / "figures.png") as picture:
        wide = picture.width
    assert report_plots.write(tmp_path / "half.png", REPORT | {"paper": {"tables": []}})
    with Image.open(tmp_path / "half.png") as picture:
        assert 2 * picture.width == pytest.approx(wide, abs=2)
    assert not report_plots.write(tmp_path / "none.png", REPORT | {"figures": {}})
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not report_plots.write(tmp_path / "figures.png", REPORT)
