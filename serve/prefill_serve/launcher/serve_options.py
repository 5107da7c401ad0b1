"""Options of `prefill-router serve` and `prefill-router key`."""

from __future__ import annotations

from pydantic import Field

from prefill_router.common.validation import StrictModel
from prefill_router.storage import Uri


class ServeConfig(StrictModel):
    """Start the routing endpoint: POST /v1/route, GET /health, GET /ready, and GET /docs for the rest.

    SIGHUP reloads everything, including the file of --config, and applies whatever can change at run time: routers,
    prices, tolerance, keys and limits.
    """

    router: Uri = Field(description="Router artifact written by `train`")
    host: str = Field("127.0.0.1", description="Address to listen on; any other than loopback requires --keys")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    keys: Uri | None = Field(None, description='Callers: a TOML file of NAME = "sha256:...", see the key command')
    admins: tuple[str, ...] = Field((), description="Caller in --keys that may read all callers' figures; repeatable")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host header to accept besides localhost; repeatable [any, with --keys]",
    )
    pool: Uri | None = Field(
        None,
        description="TOML pool file, with #name if it has several pools, to override prices or drop targets",
    )
    tolerance: float | None = Field(
        None, ge=0.0, le=1.0, description="P(correct) that may be given up for a cheaper target [router's own]"
    )
    replicas: int = Field(1, ge=1, description="Minimum number of replicas")
    max_replicas: int | None = Field(None, ge=1, description="Maximum number of replicas, for autoscaling [--replicas]")
    to_zero: bool = Field(False, description="Scale to zero replicas when idle; the next request waits for one")
    target_work_s: float = Field(
        0.5, gt=0.0, description="Seconds of queued work per replica that autoscaling aims for"
    )
    upscale_delay_s: float = Field(5.0, ge=0.0, description="How long load must be high before replicas are added")
    downscale_delay_s: float = Field(60.0, ge=0.0, description="How long load must be low before replicas are removed")
    threads: int | None = Field(
        None, ge=1, description="CPU cores per replica [the machine's cores divided by replicas]"
    )
    gpus: float | None = Field(None, ge=0.0, description="GPUs per replica [1 if the cluster now has one for each]")
    canary: Uri | None = Field(None, description="Second router, which routes --canary-share of the prompts")
    canary_share: float = Field(0.05, gt=0.0, lt=1.0, description="Share of prompts that the canary routes")
    shadow: Uri | None = Field(None, description="Router whose decisions are logged but not used")
    safe_target: str | None = Field(
        None, min_length=1, description="Target for prompts outside the training distribution"
    )
    safe_beyond: float = Field(
        0.999, gt=0.0, le=1.0, description="A prompt is outside if this share of training prompts is nearer"
    )
    max_wait_s: float = Field(2.0, gt=0.0, description="Requests that would wait longer get 429")
    max_body_bytes: int = Field(1 << 20, ge=1, description="Longer bodies get 413")
    max_messages: int = Field(1024, ge=1, description="Longer conversations get 400")
    max_prompt_tokens: int = Field(32768, ge=1, description="Longer prompts get 413")
    max_batch: int = Field(256, ge=1, description="Requests per POST /v1/route/batch")
    cached_prompts: int = Field(10_000, ge=0, description="Number of prompts whose estimates are cached")
    log_prompts: bool = Field(False, description="Write prompts to the log")
    default_target: str | None = Field(None, min_length=1, description="Target if routing fails [the cheapest]")
    route_timeout_s: float = Field(
        1.0, gt=0.0, description="Time limit for routing a call; then the default target answers"
    )
    stick_margin: float = Field(
        0.05, ge=0.0, le=1.0, description="Gain in P(correct) for which a conversation changes its target"
    )
    explore: float = Field(0.0, ge=0.0, le=1.0, description="Share of prompts sent to a random allowed target")
    budgets: Uri | None = Field(None, description="Spending limits: a TOML file with usd_per_day, [keys] and [hard]")
    feedback: Uri | None = Field(None, description="Folder for the call journal and for outcomes from feedback")
    keep_prompts: bool = Field(False, description="Store prompts in --feedback too, for training a router on them")
    traces: str | None = Field(
        None, min_length=1, description="URL of an OTLP collector, such as http://localhost:4318/v1/traces"
    )


class KeyConfig(StrictModel):
    """Make a bearer key for the endpoint: prints it once and adds its hash to the file of `serve --keys`."""

    name: str = Field(
        min_length=1, pattern=r"^[\w-]+$", description="Name of the caller", json_schema_extra={"positional": True}
    )
    keys: Uri = Field(description="TOML file to add the key's hash to")
