"""SECURITY.md: linked from the README, with valid links, and consistent with the manifests."""

from __future__ import annotations

import re

from manifests import INFRA, ROOT

TEXT = (INFRA / "SECURITY.md").read_text()
ANCHORS = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", TEXT, re.MULTILINE)}


def test_links_lead_to_sections() -> None:
    links = re.findall(r"\(#([\w-]+)\)", TEXT)
    links += re.findall(r"infra/SECURITY\.md#([\w-]+)", (ROOT / "README.md").read_text())
    assert links
    assert {*links} <= ANCHORS


def test_the_readme_links_to_it_and_it_says_how_to_report() -> None:
    assert "(infra/SECURITY.md)" in (ROOT / "README.md").read_text()
    assert "reporting-a-vulnerability" in ANCHORS
    assert not re.search(r"[\w.]+@[\w.]+\.\w+", TEXT)  # reports go through private advisories only


def test_its_secrets_and_files_are_those_of_the_manifests() -> None:
    manifests = "".join(path.read_text() for path in (INFRA / "kubernetes").rglob("*.yaml"))
    for role in ("jobs", "collect", "endpoint"):
        assert f"prefill-router-{role}" in manifests
        assert f"-{role}`" in TEXT
