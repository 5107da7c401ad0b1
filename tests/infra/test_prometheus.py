"""Alerts, scrape configs and dashboards: valid, and using exported metrics."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from manifests import INFRA, load_all
from prefill_jobs.runtime.job_metrics import CollectMetrics, JobMetrics, TrainMetrics
from prefill_router.common.gauges import KeptGauge
from prefill_serve.endpoint_metrics import Metrics
from prefill_serve.gateway.gateway_metrics import BudgetMetrics, GatewayMetrics, MemoryMetrics
from prometheus import DASHBOARDS, PROMTOOL, metrics_in, panels

FOLDER = INFRA / "prometheus"
# Ray's own metrics. test_watch sees all of them except those of GPUs.
RAYS = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_gram_available",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_object_store_memory",
    "ray_resources",
    "ray_serve_autoscaling_desired_replicas",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_replica_healthy",
    "ray_train_report_total_blocked_time_s",
    "ray_train_worker_group_start_total_time_s",
}
_SELECTOR = re.compile(r"(ray_prefill_router_\w+)\{([^}]*)\}")


@cache
def ours() -> dict[str, set[str]]:
    """Our metrics by their names in Prometheus, each with its labels."""
    found = {}
    for group in (
        Metrics(),
        GatewayMetrics(),
        BudgetMetrics(),
        MemoryMetrics(),
        JobMetrics("extract"),
        TrainMetrics(),
        CollectMetrics(),
    ):
        for member in vars(group).values():
            metric = member.gauge if isinstance(member, KeptGauge) else member
            if isinstance(metric, Metric):
                labels = set(metric.info["tag_keys"])
                name = f"ray_{metric.info['name']}"
                if isinstance(metric, Histogram):
                    found |= {f"{name}_sum": labels, f"{name}_count": labels, f"{name}_bucket": labels | {"le"}}
                else:
                    assert isinstance(metric, (Counter, Gauge))
                    found[f"{name}_total" if isinstance(metric, Counter) else name] = labels
    return found


def alerts() -> Iterator[dict[str, Any]]:
    (rules,) = load_all((FOLDER / "alerts.yml").read_text())
    for group in rules["groups"]:
        yield from group["rules"]


def expressions() -> dict[str, str]:
    asked = {f"alert {alert['alert']}": alert["expr"] for alert in alerts()}
    for name, panel in panels():
        asked |= {f"{name} {target['refId']}": target["expr"] for target in panel["targets"]}
    return asked


def test_what_is_watched_is_exported() -> None:
    for name, expression in expressions().items():
        unknown = metrics_in(expression) - {*ours()} - RAYS - {"up"}
        assert not unknown, name
        assert metrics_in(expression), name


def test_labels_that_are_matched_are_there() -> None:
    for name, expression in expressions().items():
        for metric, matchers in _SELECTOR.findall(expression):
            assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= ours()[metric], name


def test_all_that_we_export_is_watched() -> None:
    asked = set().union(*map(metrics_in, expressions().values()))
    families = {re.sub("_(sum|count|bucket)$", "", name) for name in ours()}
    assert families == {re.sub("_(sum|count|bucket)$", "", name) for name in asked & {*ours()}}


def test_a_name_that_is_not_exported_is_found() -> None:
    assert metrics_in('sum(rate(ray_prefill_router_reqests_total{status="ray_x"}[5m]))') - {*ours()}


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tested = (FOLDER / "alerts_test.yml").read_text()
    for alert in alerts():
        assert {*alert["annotations"]} == {"summary", "remedy"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f'alertname="{alert["alert"]}"' in tested


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_takes_it(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments[:-1], FOLDER / arguments[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout


@pytest.mark.prometheus
def test_an_alert_that_never_fires_is_found(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text().replace("> 900", "> 90000"))
    (tmp_path / "alerts_test.yml").write_text((FOLDER / "alerts_test.yml").read_text())
    assert promtool("test", "rules", tmp_path / "alerts_test.yml").returncode != 0


@pytest.mark.prometheus
def test_the_config_for_kubernetes_but_for_its_discovery(tmp_path: Path) -> None:
    """Debian's Prometheus lacks Kubernetes discovery, so its keys are compared with a list."""
    import yaml

    (config,) = load_all((FOLDER / "kubernetes.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["prefill-router"]}}
    scrape["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
    (tmp_path / "kubernetes.yml").write_text(yaml.safe_dump(config))
    done = promtool("check", "config", tmp_path / "kubernetes.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    (ours,) = load_all((FOLDER / "prometheus.yml").read_text())
    assert (
        scrape["job_name"] == ours["scrape_configs"][0]["job_name"] == "ray"
    )  # the alert NothingScraped uses this name


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)


def test_dashboards_are_grafanas() -> None:
    """Checks the keys of Grafana's dashboard schema 39."""
    uids = set()
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        uids.add(dashboard["uid"])
        known = "uid title tags schemaVersion editable refresh time templating panels".split()  # noqa: SIM905
        assert {*dashboard} == {*known}
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        assert "datasource" in variables
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        used = set(re.findall(r"\$\{?(\w+)", path.read_text())) - {"__rate_interval", "__all"}
        assert used == variables
    assert len(uids) == len(DASHBOARDS) == 4


def test_every_panel_has_a_title_a_unit_and_a_description() -> None:
    places: dict[str, set[tuple[int, int]]] = {}
    for name, panel in panels():
        keys = {"id", "type", "title", "description", "gridPos", "datasource", "fieldConfig", "targets"}
        assert {*panel} == keys, name
        assert panel["title"], name
        assert panel["description"].endswith("."), name
        assert panel["fieldConfig"]["defaults"]["unit"], name
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, name
        box = panel["gridPos"]
        cells = {(box["x"] + dx, box["y"] + dy) for dx in range(box["w"]) for dy in range(box["h"])}
        taken = places.setdefault(name.split(":")[0], set())
        assert not cells & taken, name
        assert max(x for x, _ in cells) < 24, name
        taken |= cells


def test_grafana_finds_them() -> None:
    (sources,) = load_all((INFRA / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    (providers,) = load_all((INFRA / "grafana/provisioning/dashboards/prefill-router.yml").read_text())
    assert [provider["type"] for provider in providers["providers"]] == ["file"]
