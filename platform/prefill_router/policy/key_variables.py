"""Checks which environment variables may be sent to an upstream as its API key, and over which connections.

A pool or router file may come from a third party. Without these checks, a file with
`key_env = "AWS_SECRET_ACCESS_KEY"` would send this machine's credentials to any host.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from prefill_router.common.addresses import is_loopback

_KEY_NAME = re.compile(r"(\w+_)?(API)?(KEY|TOKEN)(_\w+)?", re.ASCII | re.IGNORECASE)
# Variables of clouds, Ray, CI, deployment and storage tools, which no model API accepts as a key.
_RESERVED = re.compile(
    "(ACTIONS|AWS|AZURE_STORAGE|BUILDKITE|CARGO|CI|CIRCLE|DOCKER|GCP|GH|GITHUB|GITLAB|GPG|JENKINS|K8S|KUBE|KUBERNETES"
    "|MINIO|NPM|PIP|PYPI|R2|RAY|S3|SSH|TWINE|UV|VAULT)_",
    re.ASCII | re.IGNORECASE,
)


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a plausible name for a model provider's key."""
    if reserved := _RESERVED.match(name):
        raise ValueError(
            f"must not be one of the {reserved[0].upper()}* variables: copy the upstream's key to another name"
        )
    if not _KEY_NAME.fullmatch(name):
        raise ValueError("must have KEY or TOKEN as a word in its name, such as EXAMPLE_API_KEY: rename the variable")


def check_transport(base_url: str) -> None:
    """Raises ValueError if a key would be sent over a network unencrypted."""
    url = urlsplit(base_url)
    if url.scheme != "https" and not is_loopback(url.hostname or ""):
        raise ValueError(
            f"must not be sent to {url.hostname} over plain http: use https in base_url, or set allow_http = true "
            "if you trust the network"
        )


def value(name: str) -> str:
    """Reads a key from the environment, without the newline of a secrets file; empty if the variable is unset."""
    return os.environ.get(name, "").strip()
