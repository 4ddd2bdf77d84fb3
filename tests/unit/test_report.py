"""The report: one self-contained page, nothing a name contains becomes markup, every section draws, and odd input holds."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from maple.errors import DataError
from maple.evaluate import figures
from maple.evaluate.harness import CatalogueStats, Evaluation, Relevant, Segmentation, evaluate
from maple.evaluate.report import evaluation_sections
from maple.evaluate.run_sections import (
    TuningRun,
    examples_section,
    features_section,
    ingest_section,
    latency_section,
    timeline_section,
    tuning_section,
)
from maple.hashing import rng
from maple.page import Card, CardsBlock, Cell, FactsBlock, FigureBlock, Section, TableBlock, TextBlock, render

HOSTILE = "<script>alert('x')</script>\"' onload=a & $\\bad$ {{ 7*7 }} 日本語 ]]> -->"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Every tag and attribute of a page; complains where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.tags if name in attributes]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


USERS, ITEMS = 60, 30


def models(names: tuple[str, ...] = ("popular", "ours"), categories: bool = True, segments: bool = True) -> dict[str, Evaluation]:
    wanted = rng(0, "wanted").integers(0, ITEMS, USERS).astype(np.int32)
    relevant = Relevant(np.arange(USERS, dtype=np.int32), np.arange(USERS + 1), wanted, 1_600_000_000_000_000, 1_700_000_000_000_000)
    stats = CatalogueStats(np.arange(ITEMS), ITEMS, categories=np.arange(ITEMS, dtype=np.int32) % 3 if categories else None)
    split = {HOSTILE: Segmentation(("light", HOSTILE), (np.arange(USERS) % 2).astype(np.int32))} if segments else None
    out = {}
    for place, name in enumerate(names):
        scores = rng(place, "scores").random((USERS, ITEMS))
        scores[np.arange(USERS) % 4 < place, wanted[np.arange(USERS) % 4 < place]] = 2.0
        lists = np.argsort(-scores, axis=1)[:, :5].astype(np.int32)
        out[name] = evaluate(
            lambda rows, lists=lists: lists[rows], relevant, catalogue=stats, ks=(5,), segments=split, bootstrap=50, notes={"n": name}
        )  # type: ignore[misc]
    return out


def everything(name: str) -> list[Section]:
    """Each kind of section, with ``name`` in every place that takes text."""
    found = models(("popular", name))
    trials = [
        figures.Trial(0, 0.1, name),
        figures.Trial(1, None, name),
        figures.Trial(2, 0.3, "TPE"),
        figures.Trial(3, float("nan"), "TPE"),
    ]
    return [
        *evaluation_sections(found, "popular"),
        ingest_section(10, 7, {name: 2, "zero price": 1}, converted={name: 4}),
        features_section([(name, name, name)]),
        tuning_section([TuningRun(name, name, trials, {name: name})]),
        latency_section([(name, 1.0, 2.0), ("total", 2.0, 5.0)], note=name),
        examples_section([Card(name, name, ((name, name),), (name,))], note=name),
        timeline_section([(name, 0.0, 1.5), ("train", 1.5, 10.0)]),
        Section(
            name, (TextBlock(name), FactsBlock(((name, name, name),)), TableBlock(name, (name,), ((Cell(name, name, name, "best"),),)))
        ),
    ]


@functools.cache
def ordinary() -> str:
    """A page with everything on it and no malice in it."""
    return render("t", everything("ours"))


def test_hostile_names_stay_text_everywhere() -> None:
    html = render(HOSTILE, everything(HOSTILE), subtitle=HOSTILE, facts=[(HOSTILE, HOSTILE)], footer=HOSTILE)
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "img", "form", "foreignobject", "b"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script" not in html
    assert page.text.count("<script>alert('x')</script>") > 25
    assert "49" not in re.findall(r"\$ (\S+) 日本語", page.text)  # templates in names are not evaluated


def test_markup_that_does_not_come_from_a_drawing_is_escaped() -> None:
    html = render("t", [Section("s", (FigureBlock("c", "<svg onload=alert(1)>"),))])  # type: ignore[arg-type]
    assert "svg" not in {tag for tag, _ in Page(html).tags}


def test_the_page_asks_nothing_of_the_outside() -> None:
    html = ordinary()
    page = Page(html)
    for reference in page.values("href") + page.values("src") + page.values("xlink:href"):
        assert reference.startswith("#"), reference
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert "http" not in re.sub(r"http-equiv", "", html)
    policy = [attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    html = ordinary()
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for wanted in [*page.values("href"), *re.findall(r"url\((#[^)]+)\)", html)]:
        assert wanted[1:] in ids
    for wanted in page.values("aria-labelledby"):
        assert set(wanted.split()) <= set(ids)


def test_plots_and_tables_are_described_for_screen_readers() -> None:
    page = Page(ordinary())
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) >= 7
    assert all(drawing["role"] == "img" and drawing["aria-labelledby"] for drawing in drawings)
    titles = [tag for tag, _ in page.tags].count("title")
    assert titles == len(drawings) + 1
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(attributes.get("scope") in {"col", "row"} for attributes in headers)
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table")


def test_colours_follow_the_page_and_no_sentinel_is_left() -> None:
    html = ordinary()
    assert not re.search(r"#[ab]0000\d", html)
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", html))
    defined = set(re.findall(r"--([a-z0-9]+):", html))
    assert used <= defined
    dark = html[html.index("prefers-color-scheme: dark") :]
    for name in defined:
        assert f"--{name}:" in dark, name


def test_the_numbers_on_the_page_are_those_of_the_evaluations() -> None:
    found = models()
    page = Page(render("t", evaluation_sections(found, "popular")))
    for evaluation in found.values():
        for name in ("ndcg@5", "recall@5", "hit@5", "coverage@5", "diversity@5"):
            assert f"{evaluation.means[name]:.4f}" in page.text, name
        low, high = evaluation.intervals["ndcg@5"]
        assert f"{low:.4f}–{high:.4f}" in page.text
    lift = found["ours"].means["ndcg@5"] / found["popular"].means["ndcg@5"] - 1
    assert f"{lift:+.1%}" in page.text
    assert "Over 60 test users, ours has the highest ndcg@5" in page.text
    assert "2020-09-13 12:26 UTC to 2023-11-14 22:13 UTC" in page.text


def test_one_model_no_segments_no_categories() -> None:
    sections = evaluation_sections(models(("only",), categories=False, segments=False), "only")
    assert [section.title for section in sections] == ["Results", "Beyond accuracy", "Protocol"]
    page = Page(render("t", sections))
    assert "diversity@5" not in page.text


def test_many_models_and_chosen_metrics() -> None:
    found = models(tuple(f"model {number}" for number in range(12)))
    page = Page(render("t", evaluation_sections(found, "model 3", ["recall@5", "coverage@5"])))
    assert "model 11" in page.text
    assert "precision@5" not in page.text


def test_wrong_requests_are_named() -> None:
    found = models()
    with pytest.raises(DataError, match="baseline 'pop' is not among"):
        evaluation_sections(found, "pop")
    with pytest.raises(DataError, match="at least one accuracy metric"):
        evaluation_sections(found, "popular", ["coverage@5"])
    with pytest.raises(DataError, match="unknown metric 'x@5'"):
        evaluation_sections(found, "popular", ["x@5"])


def test_sections_of_nothing_still_render() -> None:
    trials = [figures.Trial(0, None, "random")]
    sections = [
        ingest_section(0, 0, {}), features_section([]), tuning_section([TuningRun("als", "ndcg@20", trials, {})]), latency_section([]),
        examples_section([]), timeline_section([]), Section("cards", (CardsBlock((Card("new user", "", ()),)),)),
    ]  # fmt: skip
    assert "new user" in Page(render("t", sections)).text
    assert "nav" not in {tag for tag, _ in Page(render("t", sections[:1])).tags}


def test_the_same_input_gives_the_same_bytes() -> None:
    found = models()
    assert render("t", evaluation_sections(found, "popular")) == render("t", evaluation_sections(found, "popular"))


def test_names_of_close_points_are_spread_in_the_scatter() -> None:
    points = {"a": (0.5, 4.00), "b": (0.5, 4.01), "far": (0.0, 4.005)}
    placed = {name: height for name, _, height in figures._spread(points, 0.55, 0.1)}
    assert abs(placed["a"] - placed["b"]) >= 0.1 - 1e-9
    assert placed["far"] == 4.005
