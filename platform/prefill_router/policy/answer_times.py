"""Times of answers: seconds to the first token by prompt length, and output tokens per second, of each target.

Decayed averages of what one process sees. A target is unknown until it has answered a few calls, and again if it has
not been asked for a while, since a constraint would otherwise exclude it for ever. Until then the pool's `ttft_s` and
`tokens_per_s` apply, if it states them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from prefill_router.policy.pool import Target

_KEPT = 0.95  # of the earlier calls' weight after each call: an average is of about the last 20
_LEAST = 5  # calls before an average is used
_STALE_S = 600.0  # since the last call, until an average is forgotten
_LENGTHS = (256, 1024, 4096, 16384, 65536)  # upper bounds of the buckets of prompt tokens; the last bucket has none


class MeasuredTimes(NamedTuple):
    """Seconds of one answer from the request on; `first_s` is None for an answer in one piece."""

    first_s: float | None
    whole_s: float


class ExpectedTimes(NamedTuple):
    """Expected seconds of one answer; None if unknown."""

    first_s: float | None
    whole_s: float | None


@dataclass
class _Ratio:
    """A decayed average: the sum of `over` by the sum of `under`."""

    over: float = 0.0
    under: float = 0.0
    num: int = 0
    at_s: float = 0.0

    def add(self, over: float, under: float, now_s: float) -> None:
        if now_s - self.at_s > _STALE_S:
            self.over, self.under, self.num = 0.0, 0.0, 0
        self.over, self.under = _KEPT * self.over + over, _KEPT * self.under + under
        self.num, self.at_s = self.num + 1, now_s

    def mean(self, now_s: float) -> float | None:
        is_known = self.num >= _LEAST and self.under > 0.0 and now_s - self.at_s <= _STALE_S
        return self.over / self.under if is_known else None


class TargetTimes:
    """Times of one target. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._first = [_Ratio() for _ in range(len(_LENGTHS) + 1)]
        self._rest = _Ratio()  # seconds per output token after the first
        self._whole = _Ratio()  # seconds per output token of answers in one piece

    def add(self, input_tokens: float, output_tokens: int, measured: MeasuredTimes) -> None:
        """Adds an answer of at least one token."""
        now_s = self._clock()
        if measured.first_s is None:
            self._whole.add(measured.whole_s, output_tokens, now_s)
        else:
            self._first[bisect_left(_LENGTHS, input_tokens)].add(measured.first_s, 1.0, now_s)
            self._rest.add(max(measured.whole_s - measured.first_s, 0.0), output_tokens, now_s)

    def first_s(self, input_tokens: float) -> float | None:
        """Mean seconds to the first token of prompts of this length, or of the nearest length that is known."""
        here, now_s = bisect_left(_LENGTHS, input_tokens), self._clock()
        nearest = sorted(range(len(self._first)), key=lambda bucket: abs(bucket - here))
        return next((mean for bucket in nearest if (mean := self._first[bucket].mean(now_s)) is not None), None)

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second after the first token; of answers in one piece if none is streamed."""
        now_s = self._clock()
        token_s = self._rest.mean(now_s) or self._whole.mean(now_s)
        return 1.0 / token_s if token_s else None

    def expected(self, target: Target, input_tokens: float, output_tokens: float) -> ExpectedTimes:
        """The expected times of an answer. Answers in one piece are used only while no streamed ones are known."""
        first_s, token_s = self.first_s(input_tokens), self._rest.mean(self._clock())
        in_one_piece_s = self._whole.mean(self._clock())
        if first_s is None and in_one_piece_s is not None:
            return ExpectedTimes(target.ttft_s, output_tokens * in_one_piece_s)
        first_s = target.ttft_s if first_s is None else first_s
        if token_s is None and target.tokens_per_s is not None:
            token_s = 1.0 / target.tokens_per_s
        whole_s = None if first_s is None or token_s is None else first_s + output_tokens * token_s
        return ExpectedTimes(first_s, whole_s)


class AnswerTimes:
    """Times of all targets, by name."""

    def __init__(self) -> None:
        self._targets: dict[str, TargetTimes] = {}

    def of(self, target: str) -> TargetTimes:
        return self._targets.setdefault(target, TargetTimes())
