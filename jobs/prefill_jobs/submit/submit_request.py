"""The content of a submission: a command line, the files sent with it, and the names of its secrets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property

from prefill_jobs.option_fields import POSITIONAL, SHIPPED, names_in, schema_extra
from prefill_jobs.options import JOBS, SubmitConfig
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel

SECRETS = "PREFILL_ROUTER_SECRETS"  # lists the environment variables that must be set where the job runs
_SOUNDS_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|(^|_)(PASS|CREDS?)(_|$)|_PWD$", re.IGNORECASE
)
# A password in a URL, or a secret parameter of a URL or connection string.
_HOLDS_SECRET = re.compile(
    r"://[^/\s]*:[^/\s]+@|(^|[?&;\s])[\w-]*(passw\w*|pwd|secret|token|signature|accesskey|accountkey)=", re.IGNORECASE
)


@dataclass(frozen=True)
class SubmitRequest:
    """A job's command line and files. `files` go to the job's working directory, where `arguments` name them."""

    job: str
    arguments: list[str]
    files: dict[str, bytes]
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StrictModel, submit: SubmitConfig) -> SubmitRequest:
        """Builds the request from a command's config. Small local files, such as pools, are sent along."""
        arguments: list[str] = []
        files: dict[str, bytes] = {}
        for name, option in type(config).model_fields.items():
            value = getattr(config, name)
            if value == option.default or value is None or value is False:
                continue
            if schema_extra(option).get(SHIPPED):
                value = _shipped(name, str(value), files)
            values = [_as_flag(v) for v in (value if isinstance(value, tuple) else [value])]
            if any(map(_HOLDS_SECRET.search, values)):
                raise UserError(
                    f"{name}: contains a secret, which the dashboard would show: give a URL without credentials"
                )
            flag = [] if schema_extra(option).get(POSITIONAL) else [f"--{name.replace('_', '-')}"]
            arguments += flag if value is True else [*flag, *values]
        return cls(command_of(config), arguments, files, _env(submit))

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "prefill_jobs", self.job, *self.arguments])

    @cached_property
    def digest(self) -> str:
        """Identifies the request: equal requests have equal digests."""
        digest = hashlib.sha256(self.entrypoint.encode())
        for name, data in sorted([*self.files.items(), *((k, v.encode()) for k, v in self.env.items())]):
            digest.update(f"{name}\n{len(data)}\n".encode() + data)
        return digest.hexdigest()


def _as_flag(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def command_of(config: StrictModel) -> str:
    return next(name for name, model in JOBS.items() if model is type(config))


def _shipped(name: str, uri: str, files: dict[str, bytes]) -> str:
    """Adds a local file to `files` and returns its name there; other URIs are returned unchanged."""
    path, separator, part = uri.partition("#")
    if "://" in path:
        return uri
    storage.require(path, "file")
    files[f"{name}.toml"] = storage.read_bytes(path)
    return f"{name}.toml{separator}{part}"


def _env(submit: SubmitConfig) -> dict[str, str]:
    """The job's environment. Raises UserError for a secret's value, which everyone with the dashboard could read."""
    env: dict[str, str] = {}
    for text in submit.env:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UserError(f"env: {name}: must be NAME=VALUE")
        if _SOUNDS_SECRET.search(name) or _HOLDS_SECRET.search(value):
            raise UserError(
                f"env: {name} or its value looks like a secret, which the dashboard would show: use --secrets {name}"
            )
        env[name] = value
    secrets = names_in(submit.secrets)
    if bad := next((name for name in secrets if not re.fullmatch(r"[A-Za-z_]\w*", name)), None):
        raise UserError(
            f"secrets: {bad.partition('=')[0]}: must be the name of an environment variable, without a value"
        )
    return env | ({SECRETS: ",".join(secrets)} if secrets else {})


def require_secrets() -> None:
    """Raises UserError if a variable that the submission requires is not set where the job runs."""
    for name in names_in(os.environ.get(SECRETS)):
        if not os.environ.get(name):
            raise UserError(f"secret {name} is not set on the cluster: set this variable on its nodes")
