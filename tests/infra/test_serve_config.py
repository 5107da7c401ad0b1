"""Serve config files: Serve ignores misspelt keys silently, so these tests check the keys against its models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from ray._common.utils import import_attr
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from manifests import INFRA, KUBERNETES, load_all, render
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel, validate
from prefill_serve.app import DEPLOYMENT, build_app
from prefill_serve.settings import AppArgs, Settings

FILES = (INFRA / "serve.yaml", KUBERNETES / "endpoint" / "serve.yaml")
Config = dict[str, Any]


def check(config: Config) -> None:
    """Raises ValueError if Serve's models or ours reject a key or a value."""
    ServeDeploySchema.model_validate(config)
    _known(config, ServeDeploySchema)
    for application in config["applications"]:
        _known(application, ServeApplicationSchema)
        if import_attr(application["import_path"]) is not build_app:
            raise ValueError(f"import_path = {application['import_path']}")
        validate(AppArgs, application["args"], "args")
        for deployment in application["deployments"]:
            _known(deployment, DeploymentSchema)
            _known(deployment.get("ray_actor_options", {}), RayActorOptionsSchema)
            if deployment["name"] != DEPLOYMENT:
                raise ValueError(f"deployment {deployment['name']}")
            validate(Settings, deployment["user_config"], "user_config")


def _known(given: Mapping[str, Any], model: type[BaseModel]) -> None:
    for key, value in given.items():
        if key not in model.model_fields:
            raise ValueError(f"{model.__name__} has no {key}")
        annotation = model.model_fields[key].annotation
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
                _known(value, kind)


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(INFRA)))
def config(request: pytest.FixtureRequest) -> Config:
    (config,) = load_all(request.param.read_text())
    return config


def test_serve_and_we_know_every_key(config: Config) -> None:
    check(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("http_option", {}),
        ("http_options.prt", 1),
        ("applications.0.import_paths", "x"),
        ("applications.0.import_path", "prefill_serve.app:build"),
        ("applications.0.args.autoscale", {}),
        ("applications.0.deployments.0.name", "Endpoints"),
        ("applications.0.deployments.0.num_replica", 2),
        ("applications.0.deployments.0.ray_actor_options", {"num_gpu": 1}),
        ("applications.0.deployments.0.user_config.tolerence", 0.1),
    ],
)
def test_what_is_misspelt_is_refused(config: Config, path: str, value: Any) -> None:
    config = copy.deepcopy(config)
    place: Any = config
    *way, last = path.split(".")
    for key in way:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    with pytest.raises((ValueError, UserError, AttributeError)):
        check(config)


def test_what_others_reach_wants_keys(config: Config) -> None:
    is_open = config["http_options"]["host"] not in ("127.0.0.1", "localhost")
    for application in config["applications"]:
        for settings in (application["args"], application["deployments"][0]["user_config"]):
            assert bool(settings.get("keys")) == is_open


def test_replicas_begin_with_what_they_take_over(config: Config) -> None:
    """Otherwise a restarted replica would briefly serve other settings."""
    for application in config["applications"]:
        arguments = AppArgs.model_validate(application["args"])
        assert arguments.settings == Settings.model_validate(application["deployments"][0]["user_config"])


def test_a_pod_holds_a_replica_and_replicas_do_not_take_the_nodes_cores() -> None:
    (config,) = load_all(FILES[1].read_text())
    (template,) = load_all((KUBERNETES / "template" / "cluster.yaml").read_text())
    (container,) = template["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    cores = int(container["resources"]["limits"]["cpu"])
    (application,) = config["applications"]
    options = application["deployments"][0]["ray_actor_options"]
    assert application["args"]["threads"] == options["num_cpus"] < cores < 2 * options["num_cpus"]
    scaling = application["args"]["autoscaling"]
    assert scaling["min_replicas"] >= 2  # one may die without an outage
    assert scaling["max_replicas"] <= template["spec"]["workerGroupSpecs"][0]["maxReplicas"]


@pytest.mark.kubectl
def test_kuberay_gets_it_as_it_is() -> None:
    (service,) = (m for m in render(KUBERNETES / "endpoint") if m["kind"] == "RayService")
    assert service["spec"]["serveConfigV2"] == FILES[1].read_text()


def test_our_models_are_strict() -> None:
    assert issubclass(AppArgs, StrictModel)
    assert issubclass(Settings, StrictModel)
