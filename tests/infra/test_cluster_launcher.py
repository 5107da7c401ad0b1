"""`ray up infra/cluster.yaml`, validated by Ray and by AWS's API model without starting a machine."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from botocore.session import get_session
from botocore.validate import ParamValidator

from manifests import INFRA, ROOT, load_all


@pytest.fixture
def config() -> dict[str, Any]:
    (config,) = load_all((INFRA / "cluster.yaml").read_text())
    return config


def launch(config: dict[str, Any]) -> None:
    """Runs the checks with which `ray up` begins."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_takes_it(config: dict[str, Any]) -> None:
    launch(config)


@pytest.mark.parametrize("path", ["max_worker", "available_node_types.gpu.min_worker", "auth.ssh_users"])
def test_ray_refuses_what_is_misspelt(config: dict[str, Any], path: str) -> None:
    place = config
    *way, last = path.split(".")
    for key in way:
        place = place[key]
    place[last] = 1
    with pytest.raises(jsonschema.ValidationError):
        launch(config)


def test_aws_takes_its_instances(config: dict[str, Any]) -> None:
    """Validates against botocore's model of the EC2 API, which knows every key."""
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in config["available_node_types"].values():
        request = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).has_errors()
    assert ParamValidator().validate({**request, "InstanceTyp": "g6.xlarge"}, shape).has_errors()


def test_what_it_sends_is_what_it_starts(config: dict[str, Any]) -> None:
    workers = config["available_node_types"]["gpu"]
    assert workers["min_workers"] == 0
    assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
    setup = "\n".join(config["setup_commands"])
    for target, source in config["file_mounts"].items():
        assert target.replace("/home/ubuntu", "~") in setup or source in ("dist", "~/.ray/auth_token")
        assert source in ("dist", "~/.ray/auth_token") or (ROOT / source).is_file()
    assert "dist/*.whl" in setup
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command.startswith(". ~/.ray-env; ")
