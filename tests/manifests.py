"""Validates manifests without a cluster, by the schemas of Kubernetes and KubeRay, and rejects unknown keys."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
VERSION = "1.34"  # of Kubernetes
_KUBERAY = ROOT.parent / "shared" / "data" / "kuberay" / "crds-v1.json.gz"

HAS_KUBERAY = _KUBERAY.is_file()
KUBECTL = shutil.which("kubectl")
KUSTOMIZE_KINDS = ("Kustomization", "Component")

Manifest = dict[str, Any]


class BadManifest(Exception):  # noqa: N818 - a finding
    """An invalid manifest."""


def load_all(text: str) -> list[Manifest]:
    """The documents of a YAML text. Raises BadManifest for a duplicate key, of which PyYAML would take the last."""
    return [document for document in yaml.load_all(text, _UniqueKeys) if document is not None]


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if len(keys) != len(set(keys)):
            raise BadManifest(f"{node.start_mark}: duplicate key")
        return super().construct_mapping(node, deep)


def check(manifest: Manifest) -> None:
    """Raises BadManifest if the manifest's kind is unknown or its content is invalid."""
    if manifest["apiVersion"].startswith("ray.io/"):
        crd = _crds().get(manifest["kind"])
        if crd is None or crd["apiVersion"] != manifest["apiVersion"]:
            raise BadManifest(f"{manifest['apiVersion']} {manifest['kind']} is not known")
        _check(manifest, crd["openAPIV3Schema"])
        for template in _pod_templates(manifest["spec"]):  # KubeRay embeds the pod schema of an older release
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
            if template["spec"]["containers"]:
                check({**pod, "spec": template["spec"]})
        return
    try:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        raise BadManifest(str(error)) from None


def _check(value: Any, schema: dict[str, Any]) -> None:
    errors = sorted(jsonschema.Draft7Validator(schema).iter_errors(value), key=lambda error: list(error.path))
    if errors:
        raise BadManifest(f"{'.'.join(map(str, errors[0].path))}: {errors[0].message}")


@functools.cache
def _crds() -> dict[str, Any]:
    crds = json.loads(gzip.decompress(_KUBERAY.read_bytes()))
    for crd in crds.values():
        crd["openAPIV3Schema"]["properties"]["metadata"] = _METADATA
        _close(crd["openAPIV3Schema"])
    return crds  # type: ignore[no-any-return]


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {"type": "object", "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}}}
_METADATA["properties"] |= {"labels": _TEXTS, "annotations": _TEXTS}  # type: ignore[operator]


def _close(schema: Any) -> None:
    """Converts a schema from Kubernetes' dialect to JSON Schema that rejects unknown keys."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if not isinstance(schema, dict):
        return
    is_object = isinstance(schema.get("properties"), dict)
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    children = {**schema, **schema.get("properties", {})} if is_object else schema
    for name, child in children.items():
        if name != "properties":
            _close(child)


def cluster_specs(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The spec of the manifest's Ray cluster, if it has one."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayCluster":
        yield spec
    spec = spec.get("jobTemplate", spec)
    yield from (spec[key] for key in ("rayClusterSpec", "rayClusterConfig") if key in spec)


def _pod_templates(spec: Any) -> Iterator[dict[str, Any]]:
    for cluster in cluster_specs({"kind": "RayCluster" if "headGroupSpec" in spec else "", "spec": spec}):
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster.get("workerGroupSpecs", []))


def groups(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The pod specs of a manifest's Ray cluster, by group."""
    found = {}
    for cluster in cluster_specs(manifest):
        found["head"] = cluster["headGroupSpec"]["template"]["spec"]
        found |= {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return found


def render(folder: Path) -> list[Manifest]:
    """The manifests that `kubectl apply -k` would apply."""
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_all(done.stdout)
