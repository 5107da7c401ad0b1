"""The evaluation and label reports in a real browser: they fit desktop and phone, print, and fetch nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from prefill_router.evaluation.contenders import Contender, HeldOut, evaluate, oracle, scoring
from prefill_router.evaluation.learning_curve import learning_curve
from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.selection import choose
from prefill_router.query_log.aggregates import Lines, Tally
from prefill_router.reports import label_page
from prefill_router.reports.evaluation_page import render_html

pytestmark = [pytest.mark.browser, pytest.mark.slow("a browser")]

NAMES = ("a-provider/a-model-with-a-rather-long-name-2026-11-25", "medium", "small")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    p, expected = rng.random((300, 3)), rng.uniform(50, 300, (300, 3))
    held_out = HeldOut(
        rng.integers(10, 300, 300), (rng.random((300, 3)) < p).astype(np.float32), rng.integers(5, 400, (300, 3)) * 1.0
    )
    prices = (2.0, 0.5, 0.1)
    targets = tuple(Target(name=n, input_price=c, output_price=4 * c) for n, c in zip(NAMES, prices, strict=True))
    rivals = [
        *(Contender(f"r{i}", f"baseline number {i}", rng.random((300, 3)), expected, 0.1) for i in range(6)),
        *(Contender(n, f"always {n}", np.tile(np.eye(3)[i], (300, 1)), expected, 0.0) for i, n in enumerate(NAMES)),
        oracle(held_out, expected),
    ]
    router = Contender("router", "prefill router", p, expected, 0.05)
    pool = Pool(name="pool", targets=targets)
    result = evaluate(pool, "v1", held_out, router, rivals, num_draws=40)
    x = rng.random((640, 3)).astype(np.float32)
    y = (rng.random(x.shape) < x).astype(np.float32)
    learning = learning_curve(x, y, p.astype(np.float32), scoring(pool, held_out, router, num_draws=40))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(replace(result, learning=learning)))
    return path


@pytest.fixture(scope="module")
def label_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    p, cost = rng.random((300, 3)), rng.random((300, 3)) * [4e-3, 8e-4, 1e-4]
    nobody = np.full(300, -1)
    drift, paid = rng.random(300).astype(np.float32), np.full(300, np.nan)
    lines = Lines(rng.integers(1, 90, 300), p, cost, drift, choose(p, cost, 0.02), nobody, paid)
    tally = Tally.of(lines, {"team": ["a" if i % 3 else "b" for i in range(300)]}, np.ones((300, 3), bool))
    pool = Pool(name="pool", targets=tuple(Target(name=name, input_price=1.0, output_price=4.0) for name in NAMES))
    path = tmp_path_factory.mktemp("label") / "report.html"
    path.write_text(label_page.render_html(label_page.LabelReport("v1", pool, 0.02, None, tally, 0, {"Log": "log"})))
    return path


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The report in a window of that width; fails on console errors and on requests other than the page itself."""
    yield from opened(browser, report, request.param)


@pytest.fixture
def label(page: Page, browser: Browser, label_report: Path) -> Iterator[Page]:
    """The label report in a window as wide as the other's."""
    assert page.viewport_size is not None
    yield from opened(browser, label_report, page.viewport_size["width"])


def opened(browser: Browser, report: Path, width: int) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []

    def refuse(route: Route) -> None:
        if route.request.url == report.as_uri():
            route.continue_()
        else:
            problems.append(route.request.url)
            route.abort()

    page.route("**/*", refuse)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert problems == []


def test_nothing_is_wider_than_the_window(page: Page, label: Page) -> None:
    for each in (page, label):
        assert each.viewport_size is not None
        assert each.evaluate("document.documentElement.scrollWidth") == each.viewport_size["width"]


def test_points_of_the_cost_curves_are_read_by_pointer_and_keyboard(page: Page, label: Page) -> None:
    for each, quality in ((page, "accuracy"), (label, "expected accuracy")):
        points = each.locator(".tip").filter(visible=True)
        told = points.last.locator("text")  # nothing is drawn over the last
        expect(told).to_be_hidden()
        points.last.focus()
        expect(told).to_be_visible()
        points.first.focus()
        expect(told).to_be_hidden()
        points.last.locator("use").hover()
        expect(told).to_be_visible()
        assert f"{quality} " in (told.text_content() or "")
        assert "tolerance " in (points.first.text_content() or "")


def test_figures_explain_themselves_on_demand(page: Page) -> None:
    meaning = page.locator("details").first.locator("p")
    expect(meaning).to_be_hidden()
    page.get_by_text("How to read this").first.click()
    expect(meaning).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(page: Page, label: Page, scheme: str) -> None:
    for each in (page, label):
        each.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        each.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        found = Axe().run(each).response["violations"]
        assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []


def test_each_plot_is_shown_once_in_the_size_of_the_window(page: Page) -> None:
    shown = [box for svg in page.locator("svg").all() if (box := svg.bounding_box())]
    assert page.viewport_size is not None
    assert len(shown) == 6
    assert all(0.8 * min(page.viewport_size["width"], 1000) < box["width"] for box in shown)


def test_text_is_large_enough_to_read(page: Page) -> None:
    read = "[...document.querySelectorAll('p, td, th, figcaption, small')].map(e => getComputedStyle(e).fontSize)"
    assert min(float(size.removesuffix("px")) for size in page.evaluate(read)) >= 10


def test_the_verdict_is_visible_without_scrolling(page: Page) -> None:
    box = page.locator(".verdict").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 900


def test_it_prints(page: Page, tmp_path: Path) -> None:
    data = page.pdf(format="A4")
    assert data.startswith(b"%PDF")
    assert 2 <= data.count(b"/Type /Page\n") <= 12
