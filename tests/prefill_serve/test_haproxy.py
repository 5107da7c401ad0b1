"""HAProxy itself is run in e2e/test_serving.py; here is what is made of Serve's config."""

from __future__ import annotations

import json
from pathlib import Path

from ray.serve._private import haproxy_templates

from prefill_serve import haproxy

CONFIG = """
global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    option redispatch 1
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
frontend prometheus
    bind :0
frontend http_frontend
    bind 127.0.0.1:8000
listen stats
  bind *:8404
"""


def test_nothing_but_the_endpoint_is_bound_for_others() -> None:
    mended = haproxy.mended(CONFIG, Path("/tmp/x"))
    binds = [line.strip() for line in mended.splitlines() if line.strip().startswith("bind")]
    assert binds == ["bind /tmp/x/0.sock mode 600", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"]
    assert "mode 666" not in mended


def test_requests_are_held_whole_and_errors_are_ours() -> None:
    mended = haproxy.mended(CONFIG, Path("/tmp/x"))
    assert "    option redispatch 1\n    option http-buffer-request\n" in mended
    assert mended.count("/tmp/x/503.http") == 2
    head, _, body = haproxy.error_file().partition("\r\n\r\n")
    assert "retry-after: 2" in head
    assert f"content-length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == "unavailable"


def test_serve_still_writes_what_is_mended() -> None:
    """If Serve's own words change, what is here would be left out in silence."""
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for words in (
        "    bind :{{ config.metrics_port }}\n",
        "  bind *:{{ config.stats_port }}\n",
        " mode 666 level admin",
        "    option redispatch 1\n",
        "    errorfile 503 {{ config.error_file_path }}\n",
    ):
        assert words in template
