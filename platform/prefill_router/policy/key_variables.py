"""API keys of upstreams: which environment variables may be sent to one, and over which connections.

A pool or a router may come from elsewhere. Without these checks one that says `key_env = "AWS_SECRET_ACCESS_KEY"`
would send this machine's own credentials to any host.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from prefill_router.common.addresses import is_loopback

_KEY_NAME = re.compile(r"(\w+_)?(API)?(KEY|TOKEN)(_\w+)?", re.ASCII | re.IGNORECASE)
# Variables of clouds, of Ray, and of what builds, deploys and stores: no model's API takes these.
_OTHERS = [
    "ACTIONS_",
    "AWS_",
    "AZURE_STORAGE_",
    "BUILDKITE_",
    "CARGO_",
    "CI_",
    "CIRCLE_",
    "DOCKER_",
    "GCP_",
    "GH_",
    "GITHUB_",
    "GITLAB_",
    "GPG_",
    "JENKINS_",
    "K8S_",
    "KUBE_",
    "KUBERNETES_",
    "MINIO_",
    "NPM_",
    "PIP_",
    "PYPI_",
    "R2_",
    "RAY_",
    "S3_",
    "SSH_",
    "TWINE_",
    "UV_",
    "VAULT_",
]


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is one that a model provider's key has."""
    owner = next((prefix for prefix in _OTHERS if name.upper().startswith(prefix)), None)
    if owner is not None:
        raise ValueError(f"must not be a variable of {owner}*: copy an upstream's key to a name of its own")
    if not _KEY_NAME.fullmatch(name):
        raise ValueError("must have KEY or TOKEN as a word of its name: call it as EXAMPLE_API_KEY")


def check_transport(base_url: str) -> None:
    """Raises ValueError where a key would be sent over a network in the clear."""
    url = urlsplit(base_url)
    if url.scheme != "https" and not is_loopback(url.hostname or ""):
        raise ValueError(
            f"must not be sent to {url.hostname} over plain http: use https in base_url, or set allow_http = true "
            "within a network that you trust"
        )


def value(name: str) -> str:
    """The key in the environment, without the line's end that a file of secrets brings; empty where there is none."""
    return os.environ.get(name, "").strip()
