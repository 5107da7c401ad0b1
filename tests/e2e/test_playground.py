"""The playground in a real browser, as one uses it with mouse, keyboard, phone and screen reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from gateway import Gateway, write_pool
from prefill_router.router.artifact import Router
from upstream import Fault, Upstream

pytestmark = [pytest.mark.browser, pytest.mark.slow("a browser")]

# The router thinks more of big here, but not much more.
ASKED = "what is the name of the old town"


@pytest.fixture(scope="module")
def upstreams() -> Iterator[dict[str, Upstream]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}


@pytest.fixture(scope="module")
def gateway(router: str, upstreams: dict[str, Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    prices = {
        t.name: {"input_price": t.input_price, "output_price": t.output_price} for t in Router.load(router).pool.targets
    }
    pool = write_pool(tmp_path_factory.mktemp("playground") / "pool.toml", upstreams, **prices)
    with Gateway(router=router, pool=pool) as gateway:
        yield gateway


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Browser, gateway: Gateway) -> Iterator[Page]:
    """The playground in a window of that width; nothing in it may fail, or ask another host."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith((gateway.url, "data:")) else problems.append(asked.url)
    )
    page.goto(f"{gateway.url}/")
    expect(page.locator("#router")).to_contain_text("2 targets")
    yield page
    page.close()
    assert not problems


def ask(page: Page, text: str = ASKED) -> None:
    page.get_by_label("Text").last.fill(text)
    expect(page.locator("tr.chosen")).to_be_visible()


def chosen(page: Page) -> str:
    return page.locator("tr.chosen th").inner_text().split("\n")[0]


def test_it_shows_what_the_endpoint_says(page: Page, gateway: Gateway) -> None:
    ask(page)
    body = {
        "messages": [{"role": "user", "content": ASKED}],
        "tolerance": float(page.locator("#tolerance").input_value()),
    }
    answer = gateway.post("/v1/route", body).json()
    expect(page.locator("#decision")).to_contain_text(answer["selected_model"])
    assert chosen(page) == answer["selected_model"]
    for name, p in answer["p_correct"].items():
        expect(page.get_by_role("row", name=name)).to_contain_text(f"{100 * p:.1f} %")
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]  # type: ignore[index]


def test_the_choice_follows_the_tolerance(page: Page, gateway: Gateway) -> None:
    slider = page.get_by_role("slider", name="Tolerance")
    slider.fill("0")
    ask(page)
    strict = gateway.post("/v1/route", {"messages": [{"role": "user", "content": ASKED}], "tolerance": 0.0}).json()
    best, other = strict["selected_model"], next(n for n in strict["model_names"] if n != strict["selected_model"])
    assert strict["costs"][strict["model_names"].index(other)] < strict["costs"][strict["model_names"].index(best)]
    expect(page.locator("#decision")).to_contain_text(best)
    before = page.locator("#curve-text").inner_text()
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator("#decision")).to_contain_text(other)
    assert "At tolerance 1.000" in page.locator("#curve-text").inner_text() != before
    page.keyboard.press("Home")
    expect(page.locator("#decision")).to_contain_text(best)


def test_a_curve_of_few_prompts_says_so(page: Page, gateway: Gateway) -> None:
    num = gateway.http.get("/v1/router").json()["num_validation"]
    assert num < 100
    expect(page.locator("#curve-text")).to_contain_text(f"They are {num}, and with fewer than 100 these figures are")


def test_the_tolerance_that_is_shown_is_the_one_that_is_sent(page: Page, gateway: Gateway) -> None:
    slider, shown = page.get_by_role("slider", name="Tolerance"), page.locator("#tolerance-value")
    assert float(shown.inner_text()) == gateway.http.get("/v1/router").json()["tolerance"]
    ask(page)
    with page.expect_request("**/v1/route") as sent:
        slider.fill("0.123456")
    assert shown.inner_text() == "0.123"
    assert sent.value.post_data_json["tolerance"] == 0.123


def test_a_conversation_is_read_whole(page: Page) -> None:
    ask(page)
    page.get_by_role("button", name="Add a message").click()
    assert page.get_by_label("Role").last.input_value() == "assistant"
    page.keyboard.type("It is called so.")  # the new message has the focus
    with page.expect_request("**/v1/route") as sent:
        page.keyboard.type(" Indeed.")
    told = sent.value.post_data_json["messages"]
    assert [message["role"] for message in told] == ["user", "assistant"]
    page.get_by_role("button", name="Remove this message").last.click()
    expect(page.get_by_label("Text")).to_have_count(1)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#decision")).to_have_text("Enter a prompt.")


def test_what_send_needs_and_costs_is_said_before_it_is_pressed(page: Page) -> None:
    send, needs = page.get_by_role("button", name="Send"), page.locator("#send-needs")
    expect(send).to_be_disabled()
    expect(needs).to_have_text("Send needs a prompt.")
    ask(page)
    expect(send).to_be_enabled()
    expect(needs).to_contain_text(f"Asks {chosen(page)}, which bills about $0.0")
    page.get_by_role("button", name="Clear").click()
    expect(send).to_be_disabled()


def test_a_name_is_on_one_line(page: Page) -> None:
    def rename(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace('"big"', '"mistralai/mistral-large-2512"'))

    page.route("**/v1/route", rename)
    ask(page)
    rows = page.locator("tbody th").filter(has_text="mistralai/")
    boxes = "const text = document.createRange(); text.selectNode(cell.firstChild); return text.getClientRects().length"
    lines = rows.evaluate(f"(cell) => {{ {boxes} }}")
    assert lines == 1
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]  # type: ignore[index]


def test_an_answer_streams_and_one_that_breaks_off_says_so(page: Page, upstreams: dict[str, Upstream]) -> None:
    ask(page)
    target = chosen(page)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_have_text(f"{target}: {ASKED}")
    expect(page.locator("#served")).to_contain_text(f"{target}, P(correct)")
    upstreams[target].faults(Fault.ERROR_MIDWAY)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#broken")).to_contain_text("The answer failed")
    for upstream in upstreams.values():
        upstream.faults(Fault.ERROR)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#broken")).to_contain_text("502")
    upstreams[target].faults(Fault.STALL)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator("#broken")).to_be_hidden()


def test_an_error_is_readable(page: Page) -> None:
    refused = json.dumps({"error": {"message": "the endpoint is busy: try again in 2 s", "code": "overloaded"}})
    page.route("**/v1/route", lambda route: route.fulfill(status=429, body=refused, content_type="application/json"))
    page.get_by_label("Text").fill(ASKED)
    expect(page.locator("#problem")).to_contain_text("the endpoint is busy")
    page.unroute("**/v1/route")
    page.route("**/v1/route", lambda route: route.abort())
    page.get_by_label("Text").fill(f"{ASKED}?")
    expect(page.locator("#problem")).to_contain_text("does not answer")
    page.unroute("**/v1/route")
    page.get_by_label("Text").fill(ASKED)
    expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ask(page)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text(ASKED)
    page.locator("summary").click()
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_documents_are_legible_and_reachable(browser: Browser, gateway: Gateway, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(f"{gateway.url}/docs")
    for path in ("/v1/route", "/v1/router"):  # one with a body, and one without
        page.get_by_role("button", name=path, exact=False).first.click()
    page.get_by_role("button", name="Try it out").first.click()
    expect(page.get_by_role("button", name="Execute")).to_be_visible()
    found = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []
    page.close()


def test_the_page_is_open_and_runs_no_script_but_its_own(gateway: Gateway, tmp_path: Path) -> None:
    gateway.configure(open=False, keys={"ann": "sha256:" + "0" * 64})
    try:
        for path in ("/", "/playground.js", "/playground.css"):
            answer = httpx.get(gateway.url + path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert httpx.get(f"{gateway.url}/v1/router").status_code == 401
    finally:
        gateway.configure(open=True, keys={})
