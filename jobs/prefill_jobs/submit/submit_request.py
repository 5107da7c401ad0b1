"""What a submission asks of a cluster: a command line, the files that go with it, and the names of its secrets."""

from __future__ import annotations

import hashlib
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

SECRETS = "PREFILL_ROUTER_SECRETS"  # names the variables that the job must find where it runs
_SOUNDS_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|(^|_)(PASS|CREDS?)(_|$)|_PWD$", re.IGNORECASE
)
# A URL's password, and a parameter of a URL or of a connection string.
_HOLDS_SECRET = re.compile(
    r"://[^/\s]*:[^/\s]+@|(^|[?&;\s])[\w-]*(passw\w*|pwd|secret|token|signature|accesskey|accountkey)=", re.IGNORECASE
)


@dataclass(frozen=True)
class SubmitRequest:
    """`files` go into the job's working directory; `arguments` name them there."""

    job: str
    arguments: list[str]
    files: dict[str, bytes]
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StrictModel, submit: SubmitConfig) -> SubmitRequest:
        """A command's config as its command line. Small files that lie here, such as pools, are sent along."""
        arguments: list[str] = []
        files: dict[str, bytes] = {}
        for name, option in type(config).model_fields.items():
            value = getattr(config, name)
            if value == option.default or value is None or value is False:
                continue
            if schema_extra(option).get(SHIPPED):
                value = _shipped(name, str(value), files)
            values = [str(v) for v in (value if isinstance(value, tuple) else [value])]
            if any(map(_HOLDS_SECRET.search, values)):
                raise UserError(f"{name}: holds a secret, which would show on the dashboard: give a URL without one")
            flag = [] if schema_extra(option).get(POSITIONAL) else [f"--{name.replace('_', '-')}"]
            arguments += flag if value is True else [*flag, *values]
        return cls(command_of(config), arguments, files, _env(submit))

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "prefill_jobs", self.job, *self.arguments])

    @cached_property
    def digest(self) -> str:
        """The same for the same request."""
        digest = hashlib.sha256(self.entrypoint.encode())
        for name, data in sorted([*self.files.items(), *((k, v.encode()) for k, v in self.env.items())]):
            digest.update(f"{name}\n{len(data)}\n".encode() + data)
        return digest.hexdigest()


def command_of(config: StrictModel) -> str:
    return next(name for name, model in JOBS.items() if model is type(config))


def _shipped(name: str, uri: str, files: dict[str, bytes]) -> str:
    """Takes a file that lies here among `files`, and returns what it is called there; other URIs stay as they are."""
    path, separator, part = uri.partition("#")
    if "://" in path:
        return uri
    storage.require(path, "file")
    files[f"{name}.toml"] = storage.read_bytes(path)
    return f"{name}.toml{separator}{part}"


def _env(submit: SubmitConfig) -> dict[str, str]:
    """Raises UserError for a secret's value: it would be read by all who see the cluster's dashboard."""
    env: dict[str, str] = {}
    for text in submit.env:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UserError(f"env: {name}: must be NAME=VALUE")
        if _SOUNDS_SECRET.search(name) or _HOLDS_SECRET.search(value):
            raise UserError(
                f"env: {name} is or holds a secret, which would show on the dashboard: use --secrets {name}"
            )
        env[name] = value
    secrets = names_in(submit.secrets)
    if bad := next((name for name in secrets if not re.fullmatch(r"[A-Za-z_]\w*", name)), None):
        raise UserError(
            f"secrets: {bad.partition('=')[0]}: give names of variables alone; values never leave the cluster"
        )
    return env | ({SECRETS: ",".join(secrets)} if secrets else {})


def require_secrets() -> None:
    """Raises UserError where a variable that the submission named is not set where the job runs."""
    for name in names_in(os.environ.get(SECRETS)):
        if not os.environ.get(name):
            raise UserError(f"secret {name} is not set on the cluster: set it in the environment of its nodes")
