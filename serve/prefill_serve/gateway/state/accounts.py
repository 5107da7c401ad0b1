"""Accounts: actual and expected cost of calls, the cost of single targets instead, and today's budgets."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil, inf
from typing import get_args

from pydantic import Field

from prefill_router.common.validation import StrictModel
from prefill_router.policy.answer_times import MeasuredTimes, TargetTimes
from prefill_serve.gateway.call_record import CallRecord, CostKind
from prefill_serve.gateway.state.reservations import Exhausted, Reservations
from prefill_serve.settings import Budgets, DailyLimits, HardLimits

_SOON_S = 5  # until some calls in progress have ended


class TargetStats(StrictModel):
    """Figures of one target."""

    answered: int
    failed: int = Field(description="Calls that it did not answer, whether or not another target did")
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    actual_cost_usd: float = Field(description="From the upstream's usage and the pool's prices, or as charged")
    expected_cost_usd: float = Field(description="Expected cost of the same answers")
    first_token_s: float | None = Field(
        None, description="Seconds to the first token of streams with a usual prompt, a decayed average"
    )
    tokens_per_s: float | None = Field(None, description="Output tokens per second after it, a decayed average")


class Charged(StrictModel):
    """Calls and cost of one kind."""

    calls: int = Field(description="Answers, and billable attempts without an answer")
    cost_usd: float


class Saving(StrictModel):
    """The expected cost of the routed calls if one target had answered all."""

    target: str
    expected_cost_usd: float
    saved_usd: float = Field(description="Minus the expected cost of the calls as routed")


class Stats(StrictModel):
    """Figures of one caller's calls, or of all callers', since the oldest stored call."""

    since: datetime | None
    calls: int
    answered: int
    failed: int
    cancelled: int = Field(description="Calls whose caller disconnected before the end")
    sticky: int = Field(description="Calls sent without routing to the target that stores the answer they continue")
    by_default: int = Field(description="Calls answered by the default target, as routing failed or timed out")
    unmetered: int = Field(description="Calls answered without a reported usage")
    actual_cost_usd: float
    charged: dict[CostKind, Charged] = Field(
        description="Actual cost by kind: reported by upstreams, estimated from relayed text, or as reserved"
    )
    expected_cost_usd: float = Field(description="Expected cost of answers that were routed and metered")
    metered_cost_usd: float = Field(description="Actual cost of the same answers")
    against_dearest: Saving | None
    against_best_single: Saving | None = Field(description="The target with the highest mean P(correct)")
    targets: dict[str, TargetStats]
    spent_today_usd: float = Field(description="Today, in UTC")
    reserved_usd: float = Field(description="Expected cost of calls in progress")
    feedback: int = Field(description="Number of recorded outcomes")
    price_sources: dict[str, str] = Field(
        {}, description="Name and table of prices that were taken from one, by target"
    )


@dataclass
class _Sums:
    answered: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    actual_usd: float = 0.0
    metered: int = 0
    metered_usd: float = 0.0
    expected_usd: float = 0.0
    times: TargetTimes = field(default_factory=lambda: TargetTimes(clock=float))  # never stale

    @property
    def usual_input_tokens(self) -> float:
        return self.input_tokens / max(self.metered, 1)


@dataclass
class Accounts:
    """Sums over calls. Each call is booked once; its reservation is ended separately."""

    since: datetime | None = None
    ends: Counter[str] = field(default_factory=Counter)
    sticky: int = 0
    by_default: int = 0
    unmetered: int = 0
    expected_usd: float = 0.0
    metered_usd: float = 0.0
    routed_usd: float = 0.0
    reservations: Reservations = field(default_factory=Reservations)
    charged_calls: Counter[CostKind] = field(default_factory=Counter)
    charged_usd: defaultdict[CostKind, float] = field(default_factory=lambda: defaultdict(float))
    _targets: defaultdict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    _would_cost: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _p_correct: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _day: str = ""
    _spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def book(self, record: CallRecord) -> None:
        self.since = min(self.since or record.at, record.at)
        self.ends[record.end] += 1
        for target in record.failed:
            self._targets[target].failed += 1
        for target, usd in record.lost_usd.items():
            self._charge(target, usd, "reserved")
        self._spend(record)
        if record.target is None or record.end == "routed":
            return
        sums = self._targets[record.target]
        sums.failed += record.end == "failed"
        if record.usage is not None:
            sums.input_tokens += record.usage.input_tokens
            sums.output_tokens += record.usage.output_tokens
            sums.cached_tokens += record.usage.cached_tokens
            sums.cache_write_tokens += record.usage.cache_write_tokens
        if record.cost_usd is not None:
            self._charge(record.target, record.cost_usd, record.cost_kind)
        if record.end == "answered":
            sums.answered += 1
            self.sticky += record.is_sticky
            self.by_default += not (record.p_correct or record.is_pinned or record.is_sticky)
            if record.answer_s is not None and record.usage is not None and record.usage.output_tokens:
                measured = MeasuredTimes(record.first_token_s, record.answer_s)
                sums.times.add(record.usage.input_tokens, record.usage.output_tokens, measured)
            if record.reported_usd is None:
                self.unmetered += 1
            else:
                sums.metered += 1
                sums.metered_usd += record.reported_usd
            if record.p_correct:
                self._compare(record, sums, record.expected_cost_usd[record.target])

    def _charge(self, target: str, usd: float, kind: CostKind) -> None:
        self._targets[target].actual_usd += usd
        self.charged_calls[kind] += 1
        self.charged_usd[kind] += usd

    def _compare(self, record: CallRecord, sums: _Sums, expected_usd: float) -> None:
        """Adds the expected cost of an answer and of all targets instead."""
        self.routed_usd += expected_usd
        for target, p in record.p_correct.items():
            self._p_correct[target] += p
            self._would_cost[target] += record.expected_cost_usd[target]
        if record.reported_usd is not None:
            self.expected_usd += expected_usd
            self.metered_usd += record.reported_usd
            sums.expected_usd += expected_usd

    def _spend(self, record: CallRecord) -> None:
        if (day := record.at.astimezone(UTC).date().isoformat()) > self._day:
            self._day = day
            self._spent.clear()
        if day == self._day:
            self._spent[record.caller] += record.charged_usd

    def spent_today(self, now: datetime) -> dict[str, float]:
        return dict(self._spent) if now.astimezone(UTC).date().isoformat() == self._day else {}

    def usual_usd(self, target: str) -> float:
        """Mean reported cost of a target's answers; 0 before the first."""
        sums = self._targets[target] if target in self._targets else _Sums()
        return sums.metered_usd / max(sums.metered, 1)

    def fits(self, usd: float, limits: DailyLimits, caller: str, now: datetime) -> bool:
        """Whether an amount fits today's budgets of the caller and of all callers, including reservations.

        A call that costs nothing fits, also where more than a budget is spent.
        """
        if not usd:
            return True
        taken = Counter(self.spent_today(now))
        taken.update(self.reservations.usd())
        of_all = inf if limits.usd_per_day is None else limits.usd_per_day
        return taken[caller] + usd <= limits.keys.get(caller, inf) and taken.total() + usd <= of_all

    def exhausted(self, usd: float, limits: HardLimits, caller: str, now: datetime) -> Exhausted:
        """The limit that a call exceeds, and when to retry: at midnight UTC, or soon if reservations alone fill it."""
        spent = self.spent_today(now)
        key: str | None = caller
        limit_usd = limits.keys.get(caller, inf)
        spent_usd, reserved_usd = spent.get(caller, 0.0), self.reservations.usd().get(caller, 0.0)
        if limits.usd_per_day is not None and spent_usd + reserved_usd + usd <= limit_usd:
            key, limit_usd = None, limits.usd_per_day
            spent_usd, reserved_usd = sum(spent.values()), sum(self.reservations.usd().values())
        until = now + timedelta(seconds=_SOON_S)
        if spent_usd + usd > limit_usd:
            until = datetime.combine(now.astimezone(UTC).date() + timedelta(days=1), datetime.min.time(), UTC)
        after_s = ceil((until - now).total_seconds())
        return Exhausted(key, limit_usd, limit_usd - spent_usd - reserved_usd, usd, until, after_s)

    def shares(self, budgets: Budgets, now: datetime) -> dict[str | None, float]:
        """Share of today's budget that each caller with one has spent; None: all callers together."""
        spent, lowest = self.spent_today(now), budgets.lowest
        shares: dict[str | None, float] = {who: _share(spent.get(who, 0.0), usd) for who, usd in lowest.keys.items()}
        if lowest.usd_per_day is not None:
            shares[None] = _share(sum(spent.values()), lowest.usd_per_day)
        return shares

    def stats(self, now: datetime, reserved_usd: float, num_feedback: int) -> Stats:
        """The figures of all booked calls."""
        targets = {
            name: TargetStats(
                answered=sums.answered,
                failed=sums.failed,
                input_tokens=sums.input_tokens,
                output_tokens=sums.output_tokens,
                cached_tokens=sums.cached_tokens,
                cache_write_tokens=sums.cache_write_tokens,
                actual_cost_usd=sums.actual_usd,
                expected_cost_usd=sums.expected_usd,
                first_token_s=sums.times.first_s(sums.usual_input_tokens),
                tokens_per_s=sums.times.tokens_per_s,
            )
            for name, sums in sorted(self._targets.items())
        }
        return Stats(
            since=self.since,
            calls=self.ends.total(),
            answered=self.ends["answered"],
            failed=self.ends["failed"],
            cancelled=self.ends["cancelled"],
            sticky=self.sticky,
            by_default=self.by_default,
            unmetered=self.unmetered,
            actual_cost_usd=sum(sums.actual_usd for sums in self._targets.values()),
            charged={
                kind: Charged(calls=self.charged_calls[kind], cost_usd=self.charged_usd[kind])
                for kind in get_args(CostKind)
            },
            expected_cost_usd=self.expected_usd,
            metered_cost_usd=self.metered_usd,
            against_dearest=self._against(self._would_cost),
            against_best_single=self._against(self._p_correct),
            targets=targets,
            spent_today_usd=sum(self.spent_today(now).values()),
            reserved_usd=reserved_usd,
            feedback=num_feedback,
        )

    def _against(self, measure: dict[str, float]) -> Saving | None:
        if not measure:
            return None
        target = max(measure, key=measure.__getitem__)
        would_usd = self._would_cost[target]
        return Saving(target=target, expected_cost_usd=would_usd, saved_usd=would_usd - self.routed_usd)


def _share(spent_usd: float, budget_usd: float) -> float:
    return spent_usd / budget_usd if budget_usd > 0.0 else 1.0
