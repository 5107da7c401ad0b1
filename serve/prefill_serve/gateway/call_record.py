"""The record of one finished call, the source of stats, budgets, conversations and feedback."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import uuid4

from prefill_router.common.usage import Usage

# refused: rejected by the upstream or by a hard limit; cancelled: the caller disconnected;
# routed: a decision of POST /v1/route
End = Literal["answered", "failed", "refused", "cancelled", "routed"]

# reported: by the upstream; estimated: from the relayed text; reserved: the amount reserved before the call
CostKind = Literal["reported", "estimated", "reserved"]


@dataclass(frozen=True)
class CallRecord:
    """A finished request. Estimates cover all targets, and are empty if the router made none."""

    request_id: str  # not unique: callers may repeat it
    caller: str  # the caller's name, "" without keys
    at: datetime
    end: End
    target: str | None = None  # the one that answered, or began to
    failed: list[str] = field(default_factory=list)  # targets tried before, without an answer
    is_pinned: bool = False  # the caller named the target
    is_sticky: bool = False  # unrouted, as only this target stores the answer that the call continues
    prompt_id: str | None = None
    prompt: Any = None  # only if prompts are stored
    p_correct: dict[str, float] = field(default_factory=dict)
    expected_cost_usd: dict[str, float] = field(default_factory=dict)
    propensity: float = 1.0
    router_version: str | None = None
    usage: Usage | None = None
    counted_tokens: int = 0  # of the prompt, by the encoder or estimated, without tools and images
    cost_usd: float | None = None
    answer_key: str | None = None  # hex; finds the target that stores the answer, for the next call
    call_id: str = field(default_factory=lambda: uuid4().hex)  # unique
    cost_kind: CostKind = "reported"  # records from before this field are all reported
    lost_usd: dict[str, float] = field(default_factory=dict)  # by target: reserved cost of attempts without an answer
    first_token_s: float | None = None  # from the request to the target; streams only
    answer_s: float | None = None  # to the end of the answer, if the caller took it without delay

    @property
    def alias(self) -> tuple[str, str]:
        """Caller and request id, by which feedback finds the call."""
        return self.caller, self.request_id

    @property
    def reported_usd(self) -> float | None:
        return self.cost_usd if self.cost_kind == "reported" else None

    @property
    def charged_usd(self) -> float:
        """Cost including attempts without an answer."""
        return (self.cost_usd or 0.0) + sum(self.lost_usd.values())

    def to_json(self) -> str:
        fields = asdict(self) | {"at": self.at.isoformat()}
        fields["holder"] = fields.pop("caller")  # the key in existing journals
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str | bytes) -> CallRecord:
        fields = json.loads(line)
        fields["caller"] = fields.pop("holder")
        record = cls(**{"call_id": fields["request_id"], **fields})  # older lines have no call_id
        usage = Usage(*record.usage) if record.usage is not None else None
        return replace(record, at=datetime.fromisoformat(str(record.at)), usage=usage)
