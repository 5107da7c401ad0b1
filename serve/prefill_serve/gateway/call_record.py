"""What became of one call: the record that stats, budgets, conversations and feedback are made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import uuid4

# refused: the upstream, or a hard limit, did not take the call; cancelled: the caller hung up;
# routed: a decision alone was asked for
End = Literal["answered", "failed", "refused", "cancelled", "routed"]

# reported: by the upstream; estimated: from what was relayed; reserved: what had been set aside
CostKind = Literal["reported", "estimated", "reserved"]


class Usage(NamedTuple):
    """Tokens that an upstream bills; the cached ones are among the input."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Served:
    """One request, once it has ended. Estimates are of all targets, and empty where none were made."""

    request_id: str  # the caller's: other callers, and later calls, may have the same
    holder: str  # of the key, "" without one
    at: datetime
    end: End
    target: str | None = None  # that answered, or began to
    failed: list[str] = field(default_factory=list)  # targets that were asked in vain
    is_pinned: bool = False  # the caller named the target
    is_sticky: bool = False  # the target keeps the answer that the call goes on from, and no other was asked for
    prompt_id: str | None = None
    prompt: Any = None  # only where prompts are kept
    p_correct: dict[str, float] = field(default_factory=dict)
    expected_cost_usd: dict[str, float] = field(default_factory=dict)
    propensity: float = 1.0
    router_version: str | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    answer_key: str | None = None  # by which the caller's next call finds the target that keeps the answer, as hex
    call_id: str = field(default_factory=lambda: uuid4().hex)  # no other call has the same
    cost_kind: CostKind = "reported"  # also of records that were written before there were others
    lost_usd: dict[str, float] = field(default_factory=dict)  # by target: for attempts without an answer, as reserved

    @property
    def alias(self) -> tuple[str, str]:
        """What the caller knows the call by."""
        return self.holder, self.request_id

    @property
    def reported_usd(self) -> float | None:
        return self.cost_usd if self.cost_kind == "reported" else None

    @property
    def charged_usd(self) -> float:
        """With what attempts without an answer may have cost."""
        return (self.cost_usd or 0.0) + sum(self.lost_usd.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"at": self.at.isoformat()})

    @classmethod
    def from_json(cls, line: str | bytes) -> Served:
        fields = json.loads(line)
        served = cls(**{"call_id": fields["request_id"], **fields})  # lines of before had no other id
        usage = Usage(*served.usage) if served.usage is not None else None
        return replace(served, at=datetime.fromisoformat(str(served.at)), usage=usage)
