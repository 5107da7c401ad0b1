"""The Kubernetes manifests: known kinds, valid keys, and the required settings of each pod."""

from __future__ import annotations

import copy
import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_TOKEN_PATH

from manifests import (
    HAS_KUBERAY,
    INFRA,
    KUBERNETES,
    KUSTOMIZE_KINDS,
    ROOT,
    BadManifest,
    Manifest,
    check,
    cluster_specs,
    groups,
    load_all,
    render,
)
from prefill_jobs import options
from prefill_jobs.cli.command_line import build_app
from prefill_jobs.option_fields import must_be_given
from prefill_router.common.validation import validate
from prefill_serve.launcher.haproxy import environment

needs_kuberay = pytest.mark.skipif(not HAS_KUBERAY, reason="../shared/data/kuberay is missing")

FOLDERS = sorted(
    path.parent
    for path in KUBERNETES.rglob("kustomization.yaml")
    if "kind: Component" not in path.read_text() and path.parent.name not in ("base", "template")
)
JOBS = ("collect", "evaluate", "extract", "label", "probe", "train")
HARDWARE = ("gpu", "cpu", "dev-cpu")


@functools.cache
def files() -> dict[str, list[Manifest]]:
    return {str(path.relative_to(ROOT)): load_all(path.read_text()) for path in sorted(INFRA.rglob("*.y*ml"))}


@functools.cache
def rendered(hardware: str, tmp: Path) -> dict[str, list[Manifest]]:
    """The rendered manifests of each folder for a site with this hardware."""
    tree = tmp / hardware
    shutil.copytree(KUBERNETES, tree)
    site = tree / "site" / "kustomization.yaml"
    text, changes = re.subn(r"\.\./hardware/[\w-]+", f"../hardware/{hardware}", site.read_text(), count=1)
    assert changes == 1
    site.write_text(text)
    return {str(path.relative_to(KUBERNETES)): render(tree / path.relative_to(KUBERNETES)) for path in FOLDERS}


@pytest.fixture(params=HARDWARE)
def applied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    return rendered(request.param, tmp_path_factory.getbasetemp())


def clusters(applied: dict[str, list[Manifest]]) -> list[Manifest]:
    return [manifest for manifests in applied.values() for manifest in manifests if any(cluster_specs(manifest))]


@needs_kuberay
def test_files_are_what_their_kinds_allow() -> None:
    """Checks the files before kustomize combines them, which works without kubectl."""
    num_checked = 0
    for path, manifests in files().items():
        if path.startswith("infra/kubernetes/"):
            for manifest in manifests:
                if manifest.get("kind") not in (*KUSTOMIZE_KINDS, None) and "apiVersion" in manifest:
                    check(manifest)
                    num_checked += 1
    assert num_checked >= 12


@needs_kuberay
@pytest.mark.kubectl
def test_what_is_applied_is_what_its_kind_allows(applied: dict[str, list[Manifest]]) -> None:
    assert {*applied} == {"common", "cluster", "endpoint", "jobs/pipeline", *(f"jobs/{job}" for job in JOBS)}
    for folder, manifests in applied.items():
        for manifest in manifests:
            check(manifest)
            assert manifest["metadata"].get("namespace", "prefill-router") == "prefill-router"
            annotations = manifest["metadata"].get("annotations", {})
            assert "config.kubernetes.io/local-config" not in annotations, folder
    kinds = {folder: sorted(manifest["kind"] for manifest in manifests) for folder, manifests in applied.items()}
    assert kinds["endpoint"] == ["PodDisruptionBudget", "RayService"]
    assert kinds["cluster"] == ["RayCluster"]
    assert all(kinds[f"jobs/{job}"] == ["RayJob"] for job in JOBS)
    assert kinds["jobs/pipeline"] == ["RayCronJob"]


@needs_kuberay
@pytest.mark.kubectl
@pytest.mark.parametrize(
    ("folder", "path", "value"),
    [
        ("endpoint", "spec.upgradeStrategie", {"type": "NewCluster"}),
        ("endpoint", "spec.rayClusterConfig.enableInTreeAutoscaler", True),
        ("endpoint", "spec.rayClusterConfig.headGroupSpec.template.spec.serviceAcountName", "x"),
        ("endpoint", "spec.rayClusterConfig.autoscalerOptions.version", "v3"),
        ("endpoint", "metadata.label", {}),
        ("jobs/train", "spec.backoffLimits", 3),
        ("jobs/train", "spec.ttlSecondsAfterFinished", "600"),
        ("jobs/train", "spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 0),
        ("jobs/train", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limit", {}),
        ("jobs/pipeline", "spec.shedule", "0 * * * *"),
        ("jobs/pipeline", "spec.jobTemplate.backoffLimits", 3),
        ("jobs/pipeline", "spec.jobTemplate.rayClusterSpec.workerGroupSpecs.0.minReplica", 0),
        ("cluster", "kind", "RayKluster"),
    ],
)
def test_what_is_misspelt_is_refused(folder: str, path: str, value: Any, tmp_path_factory: Any) -> None:
    manifests = rendered("gpu", tmp_path_factory.getbasetemp())[folder]
    manifest = copy.deepcopy(next(m for m in manifests if m["apiVersion"] == "ray.io/v1"))
    *way, last = path.split(".")
    place: Any = manifest
    for key in way:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    with pytest.raises(BadManifest):
        check(manifest)


def test_what_is_misspelt_in_kubernetes_own_kinds_is_refused() -> None:
    (manifest,) = files()["infra/kubernetes/endpoint/pdb.yaml"]
    check(manifest)
    with pytest.raises(BadManifest, match="minAvailabel"):
        check({**manifest, "spec": {**manifest["spec"], "minAvailabel": 1}})
    with pytest.raises(BadManifest, match="duplicate key"):
        load_all("a: 1\na: 2\n")


@pytest.mark.kubectl
def test_jobs_are_commands_with_all_that_these_want(applied: dict[str, list[Manifest]]) -> None:
    import typer

    router_toml = KUBERNETES / "common" / "router.toml"
    known = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
    for job in JOBS:
        (manifest,) = applied[f"jobs/{job}"]
        assert manifest["metadata"]["name"] == job
        program, name, *flags = shlex.split(manifest["spec"]["entrypoint"])
        assert (program, name) == ("prefill-router", job)
        assert known[job].make_context(job, flags).params["config"] == "/etc/prefill-router/router.toml"
        values = options.load_command(str(router_toml), job)
        assert not [key for key in options.JOBS[job].model_fields if must_be_given(options.JOBS[job], key, values)]
        validate(options.JOBS[job], values, job)
    (config,) = (m for m in applied["common"] if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "prefill-router")
    assert config["data"] == {path.name: path.read_text() for path in (router_toml, router_toml.with_name("loop.toml"))}


@pytest.mark.kubectl
def test_the_loop_is_a_pipeline_with_all_that_it_wants(applied: dict[str, list[Manifest]]) -> None:
    """Its job differs from the others only by what it runs, and in that no failed round is repeated."""
    (manifest,) = applied["jobs/pipeline"]
    (job,) = applied["jobs/train"]
    template = manifest["spec"]["jobTemplate"]
    assert {key: value for key, value in template.items() if job["spec"].get(key) != value} == {
        "entrypoint": "prefill-router pipeline /etc/prefill-router/loop.toml",
        "backoffLimit": 0,
    }
    assert all(field.isdecimal() or field.strip("*/0123456789") == "" for field in manifest["spec"]["schedule"].split())
    values = options.load_command(str(KUBERNETES / "common" / "loop.toml"), "pipeline")
    config = validate(options.PipelineConfig, values, "pipeline")
    (endpoint,) = files()["infra/kubernetes/endpoint/serve.yaml"]
    assert config.publish == endpoint["applications"][0]["args"]["router"]
    assert endpoint["applications"][0]["args"]["watch_s"]


@pytest.mark.kubectl
def test_pods_may_do_nothing_that_they_need_not(applied: dict[str, list[Manifest]]) -> None:
    for manifest in clusters(applied):
        for name, pod in groups(manifest).items():
            (container,) = pod["containers"]
            for security in (pod["securityContext"], container["securityContext"]):
                assert security["runAsNonRoot"]
                assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["securityContext"]["runAsUser"] == 1000  # the image's
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert pod["serviceAccountName"] == ("ray-head" if name == "head" else "ray-worker")
            assert pod["automountServiceAccountToken"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert all("secrets" not in mount["mountPath"] for mount in container["volumeMounts"])
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert writable == {"/home/ray", "/tmp"}
            assert all("value" not in variable for variable in container.get("env", []))
        (autoscaler,) = (spec["autoscalerOptions"] for spec in cluster_specs(manifest))
        assert autoscaler["securityContext"] == container["securityContext"]
        assert autoscaler["volumeMounts"][0]["mountPath"] == str(Path(IN_CLUSTER_TOKEN_PATH).parent)


@pytest.mark.kubectl
def test_each_role_has_a_secret_of_its_own(applied: dict[str, list[Manifest]]) -> None:
    """Only pods that call upstreams have the upstreams' keys. Endpoint and jobs can use different bucket keys."""
    roles = {"endpoint": "endpoint", "jobs/collect": "collect"}
    for folder, manifests in applied.items():
        for manifest in manifests:
            for pod in groups(manifest).values():
                sources = pod["containers"][0]["envFrom"]
                secrets = [source["secretRef"]["name"] for source in sources if "secretRef" in source]
                assert secrets == [f"prefill-router-{roles.get(folder, 'jobs')}"]
    readme = (INFRA / "README.md").read_text()
    assert all(f"secret generic prefill-router-{role}" in readme for role in ("jobs", "collect", "endpoint"))


@pytest.mark.kubectl
def test_pods_have_the_memory_they_ask_for(applied: dict[str, list[Manifest]]) -> None:
    for manifest in clusters(applied):
        for pod in groups(manifest).values():
            resources = pod["containers"][0]["resources"]
            for resource in {"memory", "nvidia.com/gpu"} & {*resources["limits"]}:
                assert resources["requests"][resource] == resources["limits"][resource]
            assert "memory" in resources["limits"]


@pytest.mark.kubectl
def test_clusters_grow_and_shrink_and_answer_only_with_a_token(applied: dict[str, list[Manifest]]) -> None:
    for manifest in clusters(applied):
        (spec,) = cluster_specs(manifest)
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert {pod["restartPolicy"] for pod in groups(manifest).values()} == {"Never"}  # required by autoscaler v2
        assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            is_endpoint = manifest["kind"] == "RayService"
            assert (group["minReplicas"] == 0) != is_endpoint


@pytest.mark.kubectl
def test_gpus_are_where_there_are_some_and_a_job_wants_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp()
    with_gpus = {
        folder for folder, ms in rendered("gpu", root).items() if any("gpu" in groups(manifest) for manifest in ms)
    }
    assert with_gpus == {"cluster", "jobs/pipeline", *(f"jobs/{job}" for job in JOBS if job != "collect")}
    for hardware in ("cpu", "dev-cpu"):
        for manifest in clusters(rendered(hardware, root)):
            assert {*groups(manifest)} == {"head", "cpu"}


@pytest.mark.kubectl
def test_the_endpoint_is_upgraded_and_drained_without_a_gap(applied: dict[str, list[Manifest]]) -> None:
    (service,) = (m for m in applied["endpoint"] if m["kind"] == "RayService")
    (budget,) = (m for m in applied["endpoint"] if m["kind"] == "PodDisruptionBudget")
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    (spec,) = cluster_specs(service)
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] >= 2
    assert "maxUnavailable" not in budget["spec"]  # Kubernetes rejects it for the pods of custom resources
    labels = {**workers["template"]["metadata"]["labels"], "ray.io/node-type": "worker"}
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.kubectl
def test_networks_are_closed_but_for_what_is_listed(applied: dict[str, list[Manifest]]) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in applied["common"] if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    doors = {}
    for spec in policies.values():
        for rule in spec.get("ingress", []):
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    (namespace,) = peer["namespaceSelector"]["matchLabels"].values()
                    doors[namespace] = [port["port"] for port in rule["ports"]]
                else:
                    assert peer["podSelector"]["matchLabels"]
    assert doors == {"ingress-nginx": [8000], "kuberay-system": [8265, 8000], "monitoring": [8080]}
    selected = {*policies["ray"]["podSelector"]["matchLabels"].items()}
    for manifest in clusters(applied):
        (spec,) = cluster_specs(manifest)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert selected <= {*group["template"]["metadata"]["labels"].items()}


@pytest.mark.kubectl
def test_what_pods_refer_to_is_there(applied: dict[str, list[Manifest]]) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in applied["common"]}
    for manifest in clusters(applied):
        for name, pod in groups(manifest).items():
            assert ("ServiceAccount", pod["serviceAccountName"]) in names
            for source in pod["containers"][0]["envFrom"]:
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in names
                else:
                    assert source["secretRef"]["optional"]
            mounts = [*pod["containers"][0]["volumeMounts"]]
            if name == "head":
                mounts += next(cluster_specs(manifest))["autoscalerOptions"]["volumeMounts"]
            assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}


def test_pods_have_the_environment_of_prefill_router_serve() -> None:
    lines = (KUBERNETES / "common" / "ray.env").read_text().splitlines()
    pods = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    ours = environment(Path("/nowhere"))
    assert {*ours} <= {*pods}
    places = {name for name in ours if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE", "_HTTP_PORT"))}
    assert {name: pods[name] for name in {*ours} - places} == {name: ours[name] for name in {*ours} - places}


def test_no_secret_lies_in_a_file() -> None:
    for path, manifests in files().items():
        assert all(manifest.get("kind") != "Secret" for manifest in manifests), path
        assert not re.search(r"AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{20}|PRIVATE KEY", (ROOT / path).read_text()), path


def test_yaml_round_trips() -> None:
    """YAML parses no value of a manifest differently from its text, such as `no`, `on` or 08."""
    for path, manifests in files().items():
        assert list(yaml.safe_load_all(yaml.safe_dump_all(manifests))) == manifests, path
