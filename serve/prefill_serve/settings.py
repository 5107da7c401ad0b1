"""Settings of the endpoint, as in a Serve config.

`Settings` can change while it runs: a deployment's `user_config`, which replicas apply without a restart. `AppArgs`,
the application's `args`, adds what needs a restart.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from prefill_router.common.validation import Gpus, StrictModel

HOST_NAME = r"^(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)$"

HostName = Annotated[str, StringConstraints(pattern=HOST_NAME)]
Hash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Canary(StrictModel):
    """A second router that answers a share of the prompts, chosen by the prompt's content."""

    router: str = Field(min_length=1)
    share: float = Field(gt=0.0, lt=1.0, description="Share of prompts that the canary routes")


class SafeTarget(StrictModel):
    """Target for prompts outside the training distribution, whatever the router predicts."""

    target: str = Field(min_length=1)
    beyond: float = Field(
        0.999, gt=0.0, le=1.0, description="Out-of-distribution: this share of training prompts is nearer"
    )


class RequestLimits(StrictModel):
    """Limits of one request."""

    body_bytes: int = Field(1 << 20, ge=1, description="Longer bodies get 413")
    messages: int = Field(1024, ge=1, description="Longer conversations get 400")
    prompt_tokens: int = Field(32768, ge=1, description="Longer prompts get 413 (the encoder may truncate sooner)")
    batch: int = Field(256, ge=1, description="Requests per POST /v1/route/batch")
    wait_s: float = Field(2.0, gt=0.0, description="Requests that would wait longer get 429")


class DailyLimits(StrictModel):
    """Budgets in USD per UTC day."""

    usd_per_day: float | None = Field(None, ge=0.0, description="Budget of all callers together")
    keys: dict[str, float] = Field(default_factory=dict, description="Budgets of single callers, by name in `keys`")


class HardLimits(DailyLimits):
    """Hard limits, for named targets too. A call counts with the most that it can cost."""

    answer_tokens: int = Field(4096, ge=1, description="Output token limit for calls that set none")

    def covers(self, caller: str) -> bool:
        """Whether a limit applies to this caller."""
        return self.usd_per_day is not None or caller in self.keys


class Budgets(DailyLimits):
    """Soft limits: calls above them go to cheaper targets. Calls in progress count with their expected cost."""

    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Tolerance over budget [1: the cheapest target]")
    hard: HardLimits = Field(default_factory=HardLimits, description="Limits above which calls get 429")

    @property
    def lowest(self) -> DailyLimits:
        """The lower of the soft and the hard limit, for all callers together and for each."""
        of_all = [usd for usd in (self.usd_per_day, self.hard.usd_per_day) if usd is not None]
        both = [*self.keys.items(), *self.hard.keys.items()]
        keys = {name: min(usd for other, usd in both if other == name) for name, _ in both}
        return DailyLimits(usd_per_day=min(of_all, default=None), keys=keys)


class LedgerSettings(StrictModel):
    folder: str | None = Field(None, min_length=1, description="Folder for journal, outcomes and prompts")
    keep_prompts: bool = Field(False, description="Store prompts too, for training a router on them")
    budgets: Budgets = Budgets()


class GatewaySettings(StrictModel):
    """Settings of the gateway, which sends calls to the upstreams of the pool's targets."""

    default_target: str | None = Field(None, description="Target if routing fails [the cheapest]")
    route_timeout_s: float = Field(1.0, gt=0.0, description="Time limit for routing, before the default target answers")
    stick_margin: float = Field(
        0.05, ge=0.0, le=1.0, description="P(correct) gain that moves a conversation to another target"
    )
    quality_usd: float | None = Field(
        None,
        ge=0.0,
        description="Value of a correct answer in USD: conversations then move where it pays, whatever stick_margin is",
    )
    ledger: LedgerSettings = LedgerSettings()


class Settings(StrictModel):
    router: str = Field(min_length=1, description="Router artifact written by `train`, or a stored baseline")
    pool: str | None = Field(None, description="Pool file (with #name), to override prices or drop targets")
    tolerance: float | None = Field(
        None, ge=0.0, le=1.0, description="Largest P(correct) to give up for a cheaper target [router's own]"
    )
    max_latency_s: float | None = Field(
        None, gt=0.0, description="Excludes targets with longer expected answers, for requests that state no limit"
    )
    canary: Canary | None = None
    shadow: str | None = Field(None, description="A router whose decisions are logged but not used")
    safe: SafeTarget | None = None
    explore: float = Field(0.0, ge=0.0, le=1.0, description="Share of prompts sent to a random allowed target")
    keys: dict[str, Hash] = Field(default_factory=dict, description="SHA-256 of bearer keys, by caller name")
    admins: list[str] = Field(default_factory=list, description="Callers that may read the figures of all callers")
    open: bool = Field(False, description="Answer without a key; only for endpoints on loopback")
    allowed_hosts: list[HostName] = Field(
        default_factory=list, description="Host headers accepted besides localhost [any, if there are keys]"
    )
    limits: RequestLimits = RequestLimits()
    gateway: GatewaySettings | None = Field(None, description="Answer OpenAI calls through the pool's upstreams")
    cached_prompts: int = Field(10_000, ge=0, description="Number of prompts whose estimates are cached")
    log_prompts: bool = Field(False, description="Write prompts to the log")
    watch_s: float | None = Field(
        None, gt=0.0, description="How often to look for a new router at the same path, in seconds [never]"
    )
    revision: int = Field(0, description="Changing it makes replicas reload the same artifacts and files")

    @model_validator(mode="after")
    def _closed_or_open(self) -> Settings:
        if bool(self.keys) == self.open:
            raise ValueError("set keys, or open = true if only this machine can reach the endpoint")
        return self

    @model_validator(mode="after")
    def _admins_have_keys(self) -> Settings:
        if unknown := sorted(set(self.admins) - set(self.keys)):
            raise ValueError(f"admins: {', '.join(unknown)} must be named in keys")
        return self

    def is_admin(self, caller: str) -> bool:
        """Without keys, every caller is the machine's operator."""
        return self.open or caller in self.admins


class Autoscaling(StrictModel):
    """Number of replicas, by queued work per replica."""

    min_replicas: int = Field(1, ge=0, description="0 removes all replicas when idle; the next request waits for one")
    max_replicas: int = Field(ge=1)
    target_work_s: float = Field(0.5, gt=0.0, description="Seconds of queued work per replica; more starts another one")
    upscale_delay_s: float = Field(5.0, ge=0.0, description="How long load must be high before replicas are added")
    downscale_delay_s: float = Field(60.0, ge=0.0, description="How long load must be low before replicas are removed")


class AppArgs(Settings):
    """Arguments of the application in a Serve config file: the first `Settings`, and fields that need a restart."""

    replicas: int = Field(1, ge=1, description="Number of replicas without autoscaling")
    autoscaling: Autoscaling | None = None
    threads: int | None = Field(None, ge=1, description="CPU cores per replica [the machine's cores / replicas]")
    gpus: Gpus | None = Field(None, ge=0.0, description="GPUs per replica [1 if the cluster now has one for each]")
    traces: str | None = Field(None, description="URL of an OTLP collector, such as http://localhost:4318/v1/traces")

    @model_validator(mode="after")
    def _at_least_one(self) -> AppArgs:
        if self.autoscaling and self.autoscaling.min_replicas > self.autoscaling.max_replicas:
            raise ValueError("autoscaling: min_replicas must not exceed max_replicas")
        return self

    @property
    def settings(self) -> Settings:
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas
