"""What may change while the endpoint runs: routers, prices, tolerance, keys and limits.

A Serve config holds it as the deployment's `user_config`. Replicas take it over without a restart.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from prefill_router.common.validation import StrictModel

HOST_NAME = r"^(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)$"

HostName = Annotated[str, StringConstraints(pattern=HOST_NAME)]
Hash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Canary(StrictModel):
    """A second router that answers a share of the prompts; the same prompt always goes the same way."""

    router: str = Field(min_length=1)
    share: float = Field(gt=0.0, lt=1.0)


class SafeTarget(StrictModel):
    """Where prompts go that are unlike those of training, whatever the router says of them."""

    target: str = Field(min_length=1)
    beyond: float = Field(0.999, gt=0.0, le=1.0, description="Share of training prompts that lie nearer")


class RequestLimits(StrictModel):
    """What one request may ask for, and how long it may wait."""

    body_bytes: int = Field(1 << 20, ge=1)
    messages: int = Field(1024, ge=1)
    prompt_tokens: int = Field(32768, ge=1, description="Beyond these 413; beyond the encoder's own, the middle is cut")
    batch: int = Field(256, ge=1, description="Requests in a batch")
    wait_s: float = Field(2.0, gt=0.0, description="A request that would wait longer is refused with 429")


class DailyLimits(StrictModel):
    """USD a day, in UTC."""

    usd_per_day: float | None = Field(None, ge=0.0, description="Of all together")
    keys: dict[str, float] = Field(default_factory=dict, description="Of single keys, by the name of their holder")


class HardLimits(DailyLimits):
    """Limits that no call may exceed, a call to a named target neither. Calls count by the most that they can cost."""

    answer_tokens: int = Field(4096, ge=1, description="Limit of the answer to a call that sets none")

    def covers(self, holder: str) -> bool:
        """Is there a limit for calls of this key?"""
        return self.usd_per_day is not None or holder in self.keys


class Budgets(DailyLimits):
    """Soft limits. What is under way counts by its expected cost."""

    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Of what does not fit [1: the cheapest target]")
    hard: HardLimits = Field(default_factory=HardLimits, description="Limits beyond which calls are refused with 429")

    @property
    def lowest(self) -> DailyLimits:
        """The lower one of a soft and a hard limit, where there are both."""
        of_all = [usd for usd in (self.usd_per_day, self.hard.usd_per_day) if usd is not None]
        both = [*self.keys.items(), *self.hard.keys.items()]
        keys = {name: min(usd for other, usd in both if other == name) for name, _ in both}
        return DailyLimits(usd_per_day=min(of_all, default=None), keys=keys)


class LedgerSettings(StrictModel):
    folder: str | None = Field(None, min_length=1, description="For the journal, the outcomes and the prompts")
    keep_prompts: bool = Field(False, description="Keep the prompts too, so that a router can be trained on them")
    budgets: Budgets = Budgets()


class GatewaySettings(StrictModel):
    """How calls are answered, where targets of the pool have upstreams."""

    default_target: str | None = Field(None, description="Serves where routing fails [the cheapest]")
    route_timeout_s: float = Field(1.0, gt=0.0, description="After this the default target serves")
    stick_margin: float = Field(0.05, ge=0.0, le=1.0, description="More P(correct) that moves a conversation")
    ledger: LedgerSettings = LedgerSettings()


class Settings(StrictModel):
    router: str = Field(min_length=1, description="Router artifact that `train` wrote, or a kept baseline")
    pool: str | None = Field(None, description="Pool file (#name): other prices, or fewer targets, than the router's")
    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Default tolerance [the router's own]")
    canary: Canary | None = None
    shadow: str | None = Field(None, description="A router that is asked and logged, and whose answer is not used")
    safe: SafeTarget | None = None
    explore: float = Field(0.0, ge=0.0, le=1.0, description="Share of prompts that go to any target that is allowed")
    keys: dict[str, Hash] = Field(default_factory=dict, description="Bearer keys' SHA-256, by the name of their holder")
    admins: list[str] = Field(default_factory=list, description="Holders of keys that see the figures of all callers")
    open: bool = Field(False, description="Answer without a key: only where none but the machine's own reach it")
    allowed_hosts: list[HostName] = Field(
        default_factory=list, description="Host headers that are answered beside localhost [with keys any]"
    )
    limits: RequestLimits = RequestLimits()
    gateway: GatewaySettings | None = Field(None, description="Answer calls too, by the upstreams of the pool")
    cached_prompts: int = Field(10_000, ge=0, description="Prompts whose estimates are kept")
    log_prompts: bool = Field(False, description="Write prompts into the log")
    revision: int = Field(0, description="Another one makes replicas read the same artifacts and files anew")

    @model_validator(mode="after")
    def _closed_or_open(self) -> Settings:
        if bool(self.keys) == self.open:
            raise ValueError("give keys, or set open = true where only this machine can reach the endpoint")
        return self

    @model_validator(mode="after")
    def _admins_have_keys(self) -> Settings:
        if unknown := sorted(set(self.admins) - set(self.keys)):
            raise ValueError(f"admins: {', '.join(unknown)} must be among the holders of keys")
        return self

    def is_admin(self, holder: str) -> bool:
        """Without keys every caller is the operator of the machine."""
        return self.open or holder in self.admins
