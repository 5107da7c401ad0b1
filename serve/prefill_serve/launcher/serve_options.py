"""Options of `prefill-router serve` and `prefill-router key`."""

from __future__ import annotations

from copy import copy
from typing import Annotated, Any, get_args

from pydantic import Field, StringConstraints

from prefill_router.common.validation import StrictModel
from prefill_router.storage import Uri
from prefill_serve.settings import AppArgs

_NonEmpty = Annotated[str, StringConstraints(min_length=1)]
_SETTING = "setting"  # in a field's schema: the path of the flag's setting in AppArgs


def _flag(path: str, **changes: Any) -> Any:
    """A flag with the default, limits and description of the setting at `path` in AppArgs, except for `changes`."""
    *groups, name = path.split(".")
    model: Any = AppArgs
    for group in groups:
        kind = model.model_fields[group].annotation
        model = next((part for part in get_args(kind) if hasattr(part, "model_fields")), kind)
    field = copy(model.model_fields[name])
    for attribute, value in {**changes, "json_schema_extra": {_SETTING: path}}.items():
        setattr(field, attribute, value)
    return field


class ServeConfig(StrictModel):
    """Start the routing endpoint: POST /v1/route, GET /health, GET /ready, and GET /docs for the rest.

    SIGHUP reloads everything, including the file of --config, and applies whatever can change at run time: routers,
    prices, tolerance, keys and limits.
    """

    router: Uri = _flag("router")
    host: str = Field("127.0.0.1", description="Address to listen on; any other than loopback requires --keys")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    keys: Uri | None = Field(None, description='Callers: a TOML file of NAME = "sha256:...", see the key command')
    admins: tuple[str, ...] = _flag(
        "admins",
        default=(),
        default_factory=None,
        description="Caller in --keys that may read all callers' figures; repeatable",
    )
    allowed_hosts: tuple[str, ...] = _flag(
        "allowed_hosts",
        default=(),
        default_factory=None,
        description="Host header to accept besides localhost; repeatable [any, with --keys]",
    )
    pool: Uri | None = _flag(
        "pool", description="TOML pool file (#name selects one of several), to override prices or drop targets"
    )
    tolerance: float | None = _flag("tolerance")
    max_latency_s: float | None = _flag("max_latency_s")
    replicas: int = _flag("replicas", description="Minimum number of replicas")
    max_replicas: int | None = Field(None, ge=1, description="Maximum number of replicas, for autoscaling [--replicas]")
    to_zero: bool = Field(False, description="Scale to zero replicas when idle; the next request waits for one")
    target_work_s: float = _flag("autoscaling.target_work_s")
    upscale_delay_s: float = _flag("autoscaling.upscale_delay_s")
    downscale_delay_s: float = _flag("autoscaling.downscale_delay_s")
    threads: int | None = _flag("threads")
    gpus: float | None = _flag("gpus")
    canary: Uri | None = _flag(
        "canary.router", default=None, description="Second router, for --canary-share of the prompts"
    )
    canary_share: float = _flag("canary.share", default=0.05)
    shadow: Uri | None = _flag("shadow")
    watch_s: float | None = _flag("watch_s")
    safe_target: str | None = _flag("safe.target", default=None, description="Target for out-of-distribution prompts")
    safe_beyond: float = _flag("safe.beyond")
    max_wait_s: float = _flag("limits.wait_s")
    max_body_bytes: int = _flag("limits.body_bytes")
    max_messages: int = _flag("limits.messages")
    max_prompt_tokens: int = _flag("limits.prompt_tokens")
    max_batch: int = _flag("limits.batch")
    cached_prompts: int = _flag("cached_prompts")
    log_prompts: bool = _flag("log_prompts")
    default_target: _NonEmpty | None = _flag("gateway.default_target")
    route_timeout_s: float = _flag("gateway.route_timeout_s")
    stick_margin: float = _flag("gateway.stick_margin")
    quality_usd: float | None = _flag("gateway.quality_usd")
    explore: float = _flag("explore")
    budgets: Uri | None = Field(None, description="Spending limits: a TOML file with usd_per_day, [keys] and [hard]")
    feedback: Uri | None = Field(None, description="Folder for the call journal and for outcomes from feedback")
    keep_prompts: bool = _flag(
        "gateway.ledger.keep_prompts", description="Store prompts in --feedback too, for training"
    )
    traces: _NonEmpty | None = _flag("traces")

    def arguments(self) -> dict[str, Any]:
        """The settings of all flags that have one, nested as in AppArgs."""
        nested: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if isinstance(extra := field.json_schema_extra, dict) and _SETTING in extra:
                *groups, key = str(extra[_SETTING]).split(".")
                place = nested
                for group in groups:
                    place = place.setdefault(group, {})
                place[key] = getattr(self, name)
        return nested


class KeyConfig(StrictModel):
    """Make a bearer key for the endpoint: prints it once and adds its hash to the file of `serve --keys`."""

    name: str = Field(
        min_length=1,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Name of the caller",
        json_schema_extra={"positional": True},
    )
    keys: Uri = Field(description="TOML file to add the key's hash to")
