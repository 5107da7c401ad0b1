"""The options of `prefill-router serve` and `prefill-router key`."""

from __future__ import annotations

from pydantic import Field

from prefill_router.common.validation import StrictModel
from prefill_router.storage import Uri


class ServeConfig(StrictModel):
    """Start the routing endpoint: POST /v1/route, GET /health, GET /ready, and GET /docs for the rest.

    SIGHUP makes it read everything anew, the file of --config too, and take over what may change while it runs:
    routers, prices, tolerance, keys and limits.
    """

    router: Uri = Field(description="Router artifact that `train` wrote")
    host: str = Field("127.0.0.1", description="Address to listen on; one that others can reach needs --keys")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    keys: Uri | None = Field(None, description='Who may ask: a TOML file of NAME = "sha256:...", see the key command')
    admins: tuple[str, ...] = Field(
        (), description="A name in --keys that sees the figures of all callers; may be given several times"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="A name by which the endpoint may be asked, beside localhost; may be given several times "
        "[with --keys any]",
    )
    pool: Uri | None = Field(
        None,
        description="Other prices, or fewer targets, than the router's: a TOML file, with #name where it has several",
    )
    tolerance: float | None = Field(
        None, ge=0.0, le=1.0, description="Give up at most this much P(correct) for a cheaper target [router's own]"
    )
    replicas: int = Field(1, ge=1, description="Copies of encoder and head, at least")
    max_replicas: int | None = Field(None, ge=1, description="At most so many, as load asks [--replicas]")
    to_zero: bool = Field(False, description="No replica while nobody asks; the next request waits for one")
    target_work_s: float = Field(0.5, gt=0.0, description="Seconds of work that a replica should have at a time")
    upscale_delay_s: float = Field(5.0, ge=0.0, description="How long load must ask for more replicas")
    downscale_delay_s: float = Field(60.0, ge=0.0, description="How long load must ask for fewer")
    threads: int | None = Field(None, ge=1, description="Cores of a replica [the machine's, shared out]")
    gpus: float | None = Field(None, ge=0.0, description="GPUs of a replica [1 if the cluster has them for all now]")
    canary: Uri | None = Field(None, description="A second router, which answers --canary-share of the prompts")
    canary_share: float = Field(0.05, gt=0.0, lt=1.0, description="Share of the prompts that the canary answers")
    shadow: Uri | None = Field(None, description="A router that is asked and logged, and whose answer is not used")
    safe_target: str | None = Field(None, min_length=1, description="Target of prompts unlike those of training")
    safe_beyond: float = Field(0.999, gt=0.0, le=1.0, description="Unlike: this share of training prompts lies nearer")
    max_wait_s: float = Field(2.0, gt=0.0, description="A request that would wait longer is refused with 429")
    max_body_bytes: int = Field(1 << 20, ge=1, description="A longer body is refused with 413")
    max_messages: int = Field(1024, ge=1, description="A longer conversation is refused")
    max_prompt_tokens: int = Field(32768, ge=1, description="A longer prompt is refused with 413")
    max_batch: int = Field(256, ge=1, description="Requests in one of POST /v1/route/batch")
    cached_prompts: int = Field(10_000, ge=0, description="Prompts whose estimates are kept")
    log_prompts: bool = Field(False, description="Write prompts into the log")
    default_target: str | None = Field(None, min_length=1, description="Answers where routing fails [the cheapest]")
    route_timeout_s: float = Field(1.0, gt=0.0, description="For a call's routing; then the default target answers")
    stick_margin: float = Field(0.05, ge=0.0, le=1.0, description="More P(correct) that moves a conversation")
    explore: float = Field(0.0, ge=0.0, le=1.0, description="Share of prompts that go to any target that is allowed")
    budgets: Uri | None = Field(None, description="What may be spent: a TOML file with usd_per_day, [keys] and [hard]")
    feedback: Uri | None = Field(None, description="Folder for calls and the outcomes that feedback makes of them")
    keep_prompts: bool = Field(False, description="Keep prompts in --feedback too, for training on them")
    traces: str | None = Field(None, min_length=1, description="OTLP collector, as http://localhost:4318/v1/traces")


class KeyConfig(StrictModel):
    """Make a bearer key for the endpoint: it is printed once, and its hash goes into the file of `serve --keys`."""

    name: str = Field(
        min_length=1, pattern=r"^[\w-]+$", description="Its holder", json_schema_extra={"positional": True}
    )
    keys: Uri = Field(description="TOML file that the key's hash is added to")
