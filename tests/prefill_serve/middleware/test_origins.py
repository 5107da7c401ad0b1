"""Web pages of other sites against an endpoint without keys, and the programs and pages that may use it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.websockets import WebSocketDisconnect

from prefill_serve.middleware.origins import has_allowed_host, has_json_or_nothing, is_from_own_page
from prefill_serve.settings import Settings
from served import Api

ASKED = {"prompt": "what is one"}
KEY = "pr-key"
KEYS = {"ann": f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"}
CROSS_SITE = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},
    {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
    {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"},
    {"sec-fetch-site": "cross-site"},
]
PLAIN = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]


def operations(api: Api) -> list[tuple[str, str]]:
    """Every documented method and path."""
    paths = api.client.get("/openapi.json").raise_for_status().json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def error(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# --- the Host header -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "localhost.:80",
        "127.0.0.1",
        "127.9.8.7:8000",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_loopback_hosts_are_answered(api: Api, host: str) -> None:
    for method, path in (("GET", "/v1/stats"), ("GET", "/"), ("GET", "/docs")):
        assert api.client.request(method, path, headers={"host": host}).status_code == 200
    assert api.post(ASKED, headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost..",
        "0.0.0.0:8000",
        "10.0.0.7",
        "[fd00::1]",
        "localhost:8000@evil.example",
        "evil.example#localhost",
        "localhost, evil.example",
        "localhost:123456789",
        "",
    ],
)
def test_hosts_that_are_not_this_machines_own_are_refused_on_every_path(api: Api, host: str) -> None:
    """A page that uses DNS rebinding can neither read nor send."""
    paths = [*operations(api), ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere")]
    for method, path in paths:
        if path not in ("/health", "/ready"):
            answer = api.client.request(method, path, headers={"host": host}, json={} if method == "POST" else None)
            assert error(answer) == (403, "host_not_allowed"), (method, path)


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("host", ["10.1.2.3:8000", "prefill-router-serve-svc", "evil.example"])
def test_probes_are_answered_by_any_name_and_tell_nothing(api: Api, path: str, host: str) -> None:
    """Kubernetes probes by the pod's address."""
    assert api.client.get(path, headers={"host": host}).raise_for_status().json() == {"status": "ok"}


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"evil.example"], [b"evil.example", b"localhost"]])
def test_a_request_has_one_host(api: Api, hosts: list[bytes]) -> None:
    """HTTP/1.0 allows requests without a Host."""

    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", host) for host in hosts]
        scope = {"type": "http", "http_version": "1.0", "method": "GET", "path": "/v1/stats", "headers": headers}
        await api.client.app({**scope, "query_string": b""}, receive, send)  # type: ignore[call-arg,arg-type]
        return sent

    assert api.client.portal is not None
    assert api.client.portal.call(ask)[0]["status"] == 403


def test_other_names_are_those_that_the_operator_allows(api: Api, router: str) -> None:
    api.configure(router=router, allowed_hosts=["Router.example.org.", "10.0.0.7", "[fd00::1]"])
    for host in ("router.example.org", "ROUTER.example.org.:8443", "10.0.0.7:8000", "[FD00::1]:8000", "localhost"):
        assert api.client.get("/v1/stats", headers={"host": host}).status_code == 200
    assert error(api.client.get("/v1/stats", headers={"host": "example.org"})) == (403, "host_not_allowed")


@pytest.mark.parametrize("name", ["http://router", "router:8000", "*", "", "a b", "router/"])
def test_an_allowed_host_is_a_name_without_scheme_and_port(router: str, name: str) -> None:
    with pytest.raises(ValidationError, match="allowed_hosts"):
        Settings.model_validate({"router": router, "open": True, "allowed_hosts": [name]})


# --- pages of other sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
def test_pages_of_other_sites_are_refused_on_every_path_of_the_api(api: Api, headers: dict[str, str]) -> None:
    for method, path in operations(api):
        if path.startswith("/v1/"):
            answer = api.client.request(method, path, headers=headers, json=ASKED if method == "POST" else None)
            assert error(answer) == (403, "origin_not_allowed"), (method, path)
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:80"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1"},
        {"sec-fetch-site": "none"},
        {},
    ],
)
def test_its_own_page_its_user_and_programs_may_ask(api: Api, headers: dict[str, str]) -> None:
    assert api.post(ASKED, headers=headers).status_code == 200
    assert api.client.get("/v1/stats", headers=headers).status_code == 200


def test_links_of_other_sites_lead_to_its_pages(api: Api) -> None:
    for path in ("/", "/docs"):
        headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert api.client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_its_pages_are_shown_in_no_frame(api: Api, path: str) -> None:
    """Nor can a page overlay them to capture clicks that spend money."""
    assert "frame-ancestors 'none'" in api.client.get(path).headers["content-security-policy"]


@pytest.mark.parametrize("is_open", [True, False])
def test_a_browser_that_asks_first_is_not_let_through(api: Api, router: str, is_open: bool) -> None:
    api.configure(router=router, open=is_open, keys={} if is_open else KEYS)
    headers = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
        "access-control-request-private-network": "true",
    }
    for _, path in operations(api):
        answer = api.client.options(path, headers=headers)
        assert answer.status_code >= 400
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_there_are_no_websockets(api: Api) -> None:
    for path in ("/", "/v1/route", "/v1/chat/completions"):
        with (
            pytest.raises(WebSocketDisconnect),
            api.client.websocket_connect(path, headers={"origin": "https://evil.example"}),
        ):
            pass


# --- content types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", PLAIN)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_body_must_be_json_wherever_one_is_taken(api: Api, router: str, content_type: str, is_open: bool) -> None:
    """With keys too: another content type is a mistake, and pages have no key."""
    posts = [path for method, path in operations(api) if method == "POST"]
    api.configure(router=router, open=is_open, keys={} if is_open else KEYS)
    headers = {"authorization": f"Bearer {KEY}", **({"content-type": content_type} if content_type else {})}
    for body in (b'{"prompt": "what is one"}', iter([b'{"prompt": "what is one"}'])):
        for path in posts:
            answer = api.client.post(path, content=body, headers=headers)
            assert error(answer) == (415, "unsupported_media_type"), path
    assert len(posts) == 7


def test_with_keys_any_name_and_any_page_may_ask(api: Api, router: str) -> None:
    """Pages have no key unless the user gave them one; proxies use their own Host."""
    api.configure(router=router, open=False, keys=KEYS)
    for headers in ({"host": "router.example.org"}, *CROSS_SITE):
        assert api.post(ASKED, headers={"authorization": f"Bearer {KEY}", **headers}).status_code == 200
        assert error(api.post(ASKED, headers=headers)) == (401, "invalid_api_key")


def test_with_keys_too_names_that_are_allowed_are_the_only_ones(api: Api, router: str) -> None:
    api.configure(router=router, open=False, keys=KEYS, allowed_hosts=["router.example.org"])
    headers = {"authorization": f"Bearer {KEY}"}
    assert api.post(ASKED, headers={**headers, "host": "router.example.org"}).status_code == 200
    assert error(api.post(ASKED, headers={**headers, "host": "evil.example"})) == (403, "host_not_allowed")


# --- what headers say ----------------------------------------------------------------------------------------------


def test_no_host_is_allowed_by_its_length(api: Api) -> None:
    assert not has_allowed_host(Headers({"host": "a" * 100_000}), [])


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        ("router.example.org", "https://router.example.org", True),
        ("router.example.org:443", "https://router.example.org", True),
        ("router.example.org", "https://router.example.org:8443", False),
        ("LOCALHOST:8000", "http://localhost:8000", True),
        ("localhost:8000", "http://localhost", False),
        ("localhost", "ftp://localhost", False),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("localhost:8000", "http://localhost:8000/", False),
        ("localhost:8000", "http://localhost:8000@evil.example", False),
        ("", "http://", False),
    ],
)
def test_an_origin_is_compared_with_the_host(host: str, origin: str, is_own: bool) -> None:
    assert is_from_own_page(Headers({"host": host, "origin": origin})) is is_own


@pytest.mark.parametrize(
    ("content_types", "is_json"),
    [
        (["application/json"], True),
        (["Application/JSON; charset=utf-8"], True),
        (["application/vnd.api+json"], True),
        (["text/plain; application/json"], False),
        (["text/plain, application/json"], False),
        (["application/jsonx"], False),
        (["application/json", "text/plain"], False),
        ([], False),
    ],
)
def test_content_types_that_are_json(content_types: list[str], is_json: bool) -> None:
    types = [(b"content-type", value.encode()) for value in content_types]
    for length in ((b"content-length", b"2"), (b"transfer-encoding", b"chunked")):
        assert has_json_or_nothing(Headers(raw=[length, *types])) is is_json
    assert has_json_or_nothing(Headers(raw=[(b"content-length", b"0"), *types]))
