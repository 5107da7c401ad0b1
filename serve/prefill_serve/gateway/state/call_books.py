"""The ledger's books: sums over all calls by caller, and the latest calls with their feedback, in bounded memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime

from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.state.accounts import Accounts, Stats
from prefill_serve.gateway.state.call_memory import CallMemory
from prefill_serve.gateway.state.feedback import StoredFeedback
from prefill_serve.gateway.state.reservations import Reservations


class CallBooks:
    """Books of calls. `reservations` are those of the accounts of all callers."""

    def __init__(self, reservations: Reservations | None = None) -> None:
        self.accounts = Accounts(reservations=reservations or Reservations())
        self.memory: CallMemory[StoredFeedback] = CallMemory()
        self.num_feedback: Counter[str] = Counter()  # by caller
        self._accounts_of: defaultdict[str, Accounts] = defaultdict(Accounts)  # by caller

    def book(self, record: CallRecord) -> None:
        self.accounts.book(record)
        self._accounts_of[record.caller].book(record)
        self.memory.add(record)

    def book_all(self, calls: Iterable[CallRecord]) -> None:
        for record in calls:
            self.book(record)

    def adopt(self, others: CallBooks) -> None:
        """Adds the calls in the memory of other books, and their feedback, unless these books have them."""
        self.book_all(record for call_id, record in others.memory.calls.items() if call_id not in self.memory)
        self.num_feedback |= others.num_feedback
        for alias, call_id, given in others.memory.all_feedback():
            if not self.memory.has_feedback(call_id):
                self.memory.add_feedback(alias, call_id, given)

    def stats(self, caller: str | None, now: datetime) -> Stats:
        """The figures of one caller, or of all callers for None."""
        reserved_usd = self.accounts.reservations.usd()
        if caller is None:
            return self.accounts.stats(now, sum(reserved_usd.values()), self.num_feedback.total())
        return self._accounts_of[caller].stats(now, reserved_usd.get(caller, 0.0), self.num_feedback[caller])
