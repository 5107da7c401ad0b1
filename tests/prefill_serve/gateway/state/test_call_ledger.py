"""The ledger, with a folder on this disk."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from prefill_router.corpus import reader
from prefill_router.corpus.reader import Prompt, content_hash
from prefill_router.outcomes import load_outcomes
from prefill_serve.gateway.call_record import CallRecord, Usage
from prefill_serve.gateway.state import call_books
from prefill_serve.gateway.state import call_ledger as module
from prefill_serve.gateway.state.call_ledger import Bid, LocalLedger
from prefill_serve.gateway.state.call_memory import CallMemory, RecentNames
from prefill_serve.gateway.state.feedback import ConflictingFeedback, Feedback, FeedbackDisabled, UnknownRequest
from prefill_serve.gateway.state.ledger_folder import LedgerFolder
from prefill_serve.gateway.state.reservations import Exhausted, Reserved
from prefill_serve.gateway.state.row_files import MOST_FILES
from prefill_serve.settings import Budgets, HardLimits, LedgerSettings

BIDS = [Bid("big", 0.05), Bid("small", 0.01)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.1)
    monkeypatch.setattr(module, "_JOURNAL_S", 0.01)


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


async def opened(folder: Path, **settings: Any) -> LocalLedger:
    ledger = LocalLedger()
    await ledger.configure(LedgerSettings(folder=str(folder), **settings))
    return ledger


async def taken_by(ledger: LocalLedger, ticket: str, caller: str, bids: Sequence[Bid] = BIDS) -> int:
    """The index of the bid that the ledger takes."""
    reserved = await ledger.reserve(ticket, caller, bids)
    assert isinstance(reserved, Reserved)
    return reserved.bid


def served(request_id: str = "r-1", prompt_id: str | None = None, **fields: Any) -> CallRecord:
    usual = {
        "caller": "ann",
        "at": datetime.now(UTC),
        "end": "answered",
        "target": "small",
        "prompt_id": prompt_id or f"prompt of {request_id}",
        "p_correct": {"small": 0.6, "big": 0.9},
        "expected_cost_usd": {"small": 0.01, "big": 0.05},
        "usage": Usage(100, 20, 10),
        "cost_usd": 0.25,
    }
    return CallRecord(request_id=request_id, **{**usual, **fields})


def right(request_id: str = "r-1", **fields: Any) -> Feedback:
    return Feedback(request_id=request_id, correct=True, **fields)


def wrong(request_id: str = "r-1") -> Feedback:
    return Feedback(request_id=request_id, correct=False)


def outcomes(folder: Path) -> list[tuple[Any, ...]]:
    """The stored outcomes, read with DuckDB."""
    files = f"{folder}/outcomes/*.parquet"
    with duckdb.connect() as db:
        return db.execute(
            f"select request_id, prompt_id, target, correct, output_tokens from '{files}' order by request_id"
        ).fetchall()


# --- feedback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"correct": True, "score": 1.0}, {"score": 1.1}, {"correct": True, "output_tokens": -1}, {"wrong": True}],
)
def test_feedback_is_one_of_correct_and_score(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Feedback(request_id="r-1", **fields)


def test_feedback_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        assert await ledger.feedback(right(), "ann")
        assert outcomes(tmp_path) == [("r-1", "prompt of r-1", "small", 1.0, 20)]

    run(scenario)


def test_an_outcome_tells_what_it_takes_to_weigh_it(tmp_path: Path) -> None:
    call = served(propensity=0.05)

    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(call, [])
        await ledger.feedback(Feedback(request_id="r-1", score=0.5, output_tokens=7), "ann")

    run(scenario)
    with duckdb.connect() as db:
        columns = "correct, output_tokens, cost_usd, propensity, epoch(answered_at)"
        rows = db.execute(f"select {columns} from '{tmp_path}/outcomes/*.parquet'")
        assert rows.fetchall() == [(0.5, 7, 0.25, 0.05, pytest.approx(call.at.timestamp()))]


def test_the_same_feedback_again_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> list[bool]:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        tenth = Feedback(request_id="r-1", score=0.1)
        return [await ledger.feedback(tenth, "ann") for _ in range(3)]

    assert run(scenario) == [True, False, False]
    assert len(outcomes(tmp_path)) == 1


def test_a_score_of_one_says_the_same_as_correct(tmp_path: Path) -> None:
    async def scenario() -> bool:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        await ledger.feedback(right(), "ann")
        return await ledger.feedback(Feedback(request_id="r-1", score=1.0), "ann")

    assert not run(scenario)


@pytest.mark.parametrize("other", [wrong(), right(output_tokens=21)])
def test_other_feedback_is_refused_and_the_first_stands(tmp_path: Path, other: Feedback) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        await ledger.feedback(right(), "ann")
        with pytest.raises(ConflictingFeedback, match="r-1"):
            await ledger.feedback(other, "ann")

    run(scenario)
    assert outcomes(tmp_path) == [("r-1", "prompt of r-1", "small", 1.0, 20)]


def test_feedback_that_comes_before_its_call_is_recorded_waits_for_it(tmp_path: Path) -> None:
    async def scenario() -> bool:
        ledger = await opened(tmp_path)
        early = asyncio.create_task(ledger.feedback(right(), "ann"))
        await asyncio.sleep(0.03)
        await ledger.record(served(), [])
        return await early

    assert run(scenario)


@pytest.mark.parametrize(
    ("request_id", "caller"),
    [("nobody's", "ann"), ("r-1", "bob"), ("r-1", ""), ("unanswered", "ann"), ("unrouted", "ann")],
)
def test_a_request_that_one_did_not_make_or_that_had_no_routed_answer_is_unknown(
    tmp_path: Path, request_id: str, caller: str
) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        await ledger.record(served("unanswered", end="failed", target=None), [])
        await ledger.record(CallRecord("unrouted", "ann", datetime.now(UTC), "answered", "small"), [])
        with pytest.raises(UnknownRequest, match=request_id):
            await ledger.feedback(right(request_id), caller)

    run(scenario)
    assert not (tmp_path / "outcomes").exists()


def test_a_decision_that_was_asked_for_alone_can_have_feedback(tmp_path: Path) -> None:
    async def scenario() -> bool:
        ledger = await opened(tmp_path)
        await ledger.record(served(end="routed", usage=None, cost_usd=None), [])
        return await ledger.feedback(right(), "ann")

    assert run(scenario)
    assert outcomes(tmp_path) == [("r-1", "prompt of r-1", "small", 1.0, None)]


def test_without_a_folder_there_is_no_feedback() -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.record(served(), [])
        with pytest.raises(FeedbackDisabled, match="--feedback"):
            await ledger.feedback(right(), "ann")

    run(scenario)


def test_feedback_that_comes_at_once_is_written_together_each_exactly_once(tmp_path: Path) -> None:
    names = [f"r-{i:03d}" for i in range(300)]

    async def scenario() -> list[bool]:
        ledger = await opened(tmp_path)
        for name in names:
            await ledger.record(served(name), [])
        return await asyncio.gather(*(ledger.feedback(right(name), "ann") for name in names))

    assert all(run(scenario))
    assert [row[0] for row in outcomes(tmp_path)] == names
    assert len(list((tmp_path / "outcomes").iterdir())) <= 3


def test_of_equal_feedback_that_comes_at_once_one_is_new(tmp_path: Path) -> None:
    async def scenario() -> list[bool]:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        return await asyncio.gather(*(ledger.feedback(right(), "ann") for _ in range(20)))

    assert sorted(run(scenario)) == [False] * 19 + [True]
    assert len(outcomes(tmp_path)) == 1


def test_a_caller_who_hangs_up_does_not_take_the_feedback_of_others(tmp_path: Path) -> None:
    async def scenario() -> bool:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        hasty = asyncio.create_task(ledger.feedback(right(), "ann"))
        patient = asyncio.create_task(ledger.feedback(right(), "ann"))
        await asyncio.sleep(0)
        hasty.cancel()
        return await patient

    assert run(scenario) is False
    assert len(outcomes(tmp_path)) == 1


def test_where_writing_fails_all_who_wait_are_told_and_can_repeat_it(tmp_path: Path) -> None:
    blocked = tmp_path / "outcomes"

    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served("r-1"), [])
        await ledger.record(served("r-2"), [])
        blocked.write_text("a file where the folder should be")
        given = [right("r-1"), right("r-1"), wrong("r-2")]
        failed = await asyncio.gather(*(ledger.feedback(each, "ann") for each in given), return_exceptions=True)
        assert [isinstance(each, OSError) for each in failed] == [True] * 3
        assert (await ledger.stats("ann")).feedback == 0
        blocked.unlink()
        assert await ledger.feedback(wrong("r-1"), "ann")  # the first left nothing
        assert await ledger.feedback(wrong("r-2"), "ann")

    run(scenario)
    assert [row[3] for row in outcomes(tmp_path)] == [0.0, 0.0]


def test_feedback_is_kept_though_tidying_up_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        (tmp_path / "outcomes").mkdir()
        for i in range(MOST_FILES):
            (tmp_path / "outcomes" / f"{i}.parquet").write_bytes(b"what cannot be merged")
        assert await ledger.feedback(right(), "ann")
        assert not await ledger.feedback(right(), "ann")

    run(scenario)


def test_much_feedback_ends_in_few_files_and_none_is_lost(tmp_path: Path) -> None:
    names = [f"r-{i:03d}" for i in range(MOST_FILES + 6)]

    async def scenario() -> None:
        ledger = await opened(tmp_path)
        for name in names:
            await ledger.record(served(name), [])
            await ledger.feedback(right(name), "ann")

    run(scenario)
    assert [row[0] for row in outcomes(tmp_path)] == names
    assert len(list((tmp_path / "outcomes").iterdir())) == 7


# --- what others read --------------------------------------------------------------------------------------------


def test_training_reads_the_outcomes(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        for i, target in enumerate(["small", "big", "small"]):
            await ledger.record(served(f"r-{i}", prompt_id=f"p-{i // 2}", target=target), [])
            await ledger.feedback(Feedback(request_id=f"r-{i}", score=i / 2), "ann")

    run(scenario)
    got = load_outcomes(str(tmp_path / "outcomes"), ["small", "big"]).align(["p-0", "p-1"])
    assert got.correct.tolist()[0] == [0.0, 0.5]
    assert got.correct[1, 0] == 1.0
    assert got.output_tokens[0].tolist() == [20, 20]


def test_prompts_are_kept_as_a_corpus(tmp_path: Path) -> None:
    chat: Prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Straße 😀"}]
    prompts: list[Prompt] = ["what is 17 * 23?", chat, "what is 17 * 23?"]

    async def scenario() -> None:
        ledger = await opened(tmp_path, keep_prompts=True)
        for i, prompt in enumerate(prompts):
            await ledger.record(served(f"r-{i}", prompt_id=content_hash(prompt), prompt=prompt), [])
            await ledger.feedback(right(f"r-{i}"), "ann")

    run(scenario)
    rows = [row for path in sorted((tmp_path / "prompts").iterdir()) for _, _, row in reader.read(str(path))]
    kept = {row.prompt_id: row.prompt for row in rows if isinstance(row, reader.Row)}
    assert kept == {content_hash(prompt): prompt for prompt in prompts}
    assert len(rows) == 2


def test_a_prompt_is_kept_once_over_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        for name in ("r-1", "r-2"):
            ledger = await opened(tmp_path, keep_prompts=True)
            await ledger.record(served(name, prompt_id="p", prompt="what is 17 * 23?"), [])
            await ledger.feedback(right(name), "ann")
            await ledger.close()

    run(scenario)
    assert len(list((tmp_path / "prompts").iterdir())) == 1


def test_without_feedback_no_prompt_is_kept_as_a_corpus(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served("r-1", prompt="a secret"), [])
        await ledger.record(served("r-2", prompt=None), [])
        await ledger.feedback(right("r-2"), "ann")
        await ledger.close()

    run(scenario)
    assert not (tmp_path / "prompts").exists()


# --- what is remembered ------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_target_and_a_decision_alone_gives_it_none() -> None:
    async def scenario() -> list[str | None]:
        ledger = LocalLedger()
        await ledger.record(served("r-1"), [b"here"])
        await ledger.record(served("r-2", end="routed"), [b"there"])
        await ledger.record(served("r-3", end="failed", target=None), [b"nowhere"])
        return [ledger.conversations.target([key]) for key in (b"here", b"there", b"nowhere")]

    assert run(scenario) == ["small", None, None]


def test_a_spent_budget_shows_at_the_next_call() -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(keys={"ann": 0.5})))
        taken = []
        for name in ("r-1", "r-2"):
            await ledger.record(served(name), [])
            taken.append(await taken_by(ledger, name, "ann"))
            await ledger.record(served(f"{name}, too", cost_usd=0.0), [], name)
        assert taken == [0, 1]
        assert await taken_by(ledger, "t", "bob") == 0

    run(scenario)


def test_what_is_under_way_counts_until_it_is_recorded() -> None:
    bids = [Bid("big", 0.2), Bid("small", 0.01)]

    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(keys={"ann": 0.5})))
        assert [await taken_by(ledger, ticket, "ann", bids) for ticket in "abcd"] == [0, 0, 1, 1]
        assert (await ledger.stats("ann")).reserved_usd == 0.42
        assert (await ledger.stats("bob")).reserved_usd == 0.0
        await ledger.record(served(end="failed", target=None, usage=None, cost_usd=None), [], "a")
        assert [await taken_by(ledger, ticket, "ann", bids) for ticket in "eef"] == [0, 0, 1]  # one reservation for e
        for ticket in "bcdef":
            await ledger.record(served(ticket, cost_usd=0.1), [], ticket)
        stats = await ledger.stats("ann")
        assert (stats.reserved_usd, stats.spent_today_usd) == (0.0, pytest.approx(0.5))

    run(scenario)


def test_where_nobody_has_said_what_a_call_costs_it_is_what_its_target_usually_does() -> None:
    async def scenario() -> list[float]:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(usd_per_day=10.0)))
        await ledger.record(served("r-1", cost_usd=0.2), [])
        await ledger.record(served("r-2", cost_usd=0.4), [])
        reserved = []
        for target in ("small", "new"):
            await ledger.reserve("t", "ann", [Bid(target, None)])
            reserved.append((await ledger.stats("ann")).reserved_usd)
        return reserved

    assert run(scenario) == [pytest.approx(0.3), 0.0]


def test_what_is_reserved_is_at_least_what_the_bid_says_beside_what_was_lost() -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.record(served(cost_usd=0.2), [])
        for bid, usd in [(Bid("small", None, 0.1), 0.2), (Bid("small", None, 0.3), 0.3), (Bid("small", 0.1, 0.3), 0.3)]:
            assert await ledger.reserve("t", "ann", [bid]) == Reserved(0, usd)
            assert await ledger.reserve("t", "ann", [bid._replace(lost_usd=1.0)]) == Reserved(0, usd)
            assert (await ledger.stats("ann")).reserved_usd == pytest.approx(usd + 1.0)

    run(scenario)


def test_what_upstreams_did_not_report_is_not_usual() -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.record(served(cost_usd=0.2), [])
        await ledger.record(served(cost_usd=9.0, cost_kind="reserved", usage=None), [])
        assert await ledger.reserve("t", "ann", [Bid("small", None)]) == Reserved(0, 0.2)

    run(scenario)


# --- hard limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [{"usd_per_day": 0.1}, {"keys": {"ann": 0.1}}])
def test_what_a_hard_limit_has_no_room_for_is_not_reserved(hard: dict[str, Any]) -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(hard=HardLimits(**hard))))
        taken = [await ledger.reserve(f"t-{n}", "ann", BIDS) for n in range(5)]
        assert taken[:2] == [Reserved(0, 0.05)] * 2
        assert all(isinstance(each, Exhausted) and each.retry_after_s == 5 for each in taken[2:])
        await ledger.record(served(cost_usd=0.01), [], "t-0")  # less than its maximum
        assert await ledger.reserve("t-6", "ann", BIDS) == Reserved(1, 0.01)
        assert (await ledger.stats("ann")).reserved_usd == pytest.approx(0.06)

    run(scenario)


def test_a_hard_limit_counts_what_a_call_that_was_lost_may_have_cost() -> None:
    async def scenario() -> None:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(hard=HardLimits(usd_per_day=0.1))))
        assert await ledger.reserve("t", "ann", [Bid("big", 0.08)]) == Reserved(0, 0.08)
        assert isinstance(await ledger.reserve("t", "ann", [Bid("small", 0.03, lost_usd=0.08)]), Exhausted)
        lost = served(end="refused", target=None, usage=None, cost_usd=None, lost_usd={"big": 0.08})
        await ledger.record(lost, [], "t")
        assert isinstance(await ledger.reserve("u", "ann", [Bid("small", 0.03)]), Exhausted)
        assert await ledger.reserve("u", "ann", [Bid("small", 0.01)]) == Reserved(0, 0.01)

    run(scenario)


def test_beyond_a_soft_budget_the_last_bid_is_taken_and_beyond_the_hard_one_none() -> None:
    async def scenario() -> list[Any]:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(budgets=Budgets(usd_per_day=0.05, hard=HardLimits(usd_per_day=0.07))))
        return [await ledger.reserve(f"t-{n}", "ann", BIDS) for n in range(4)]

    taken = run(scenario)
    assert taken[:3] == [Reserved(0, 0.05), Reserved(1, 0.01), Reserved(1, 0.01)]
    assert isinstance(taken[3], Exhausted)


def test_after_a_restart_charges_of_every_kind_count_and_hard_limits_hold(tmp_path: Path) -> None:
    budgets = Budgets(hard=HardLimits(keys={"ann": 1.0}))

    async def scenario() -> None:
        old = await opened(tmp_path, budgets=budgets)
        await old.record(served("r-1", cost_usd=0.3), [])
        await old.record(served("r-2", cost_usd=0.2, cost_kind="estimated", usage=None), [])
        await old.record(served("r-3", end="cancelled", cost_usd=0.25, cost_kind="reserved", usage=None), [])
        await old.record(served("r-4", end="failed", target=None, cost_usd=None, lost_usd={"big": 0.25}), [])
        await old.close()
        new = await opened(tmp_path, budgets=budgets)
        stats = await new.stats("ann")
        assert stats == await old.stats("ann")
        assert stats.spent_today_usd == pytest.approx(1.0)
        assert {kind: each.calls for kind, each in stats.charged.items()} == {
            "reported": 1,
            "estimated": 1,
            "reserved": 2,
        }
        assert isinstance(await new.reserve("t", "ann", BIDS), Exhausted)

    run(scenario)


def test_an_outcome_has_no_cost_that_its_upstream_did_not_report(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(cost_kind="reserved"), [])
        await ledger.feedback(right(output_tokens=7), "ann")

    run(scenario)
    with duckdb.connect() as db:
        assert db.execute(f"select cost_usd from '{tmp_path}/outcomes/*.parquet'").fetchall() == [(None,)]


@pytest.mark.parametrize("folder", [None, "kept"])
def test_hard_limits_that_a_restart_would_forget_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str | None
) -> None:
    hard = HardLimits(usd_per_day=1.0)
    kept = None if folder is None else str(tmp_path / folder)
    with caplog.at_level("WARNING", logger="ray.serve"):
        run(lambda: LocalLedger().configure(LedgerSettings(folder=kept, budgets=Budgets(hard=hard))))
    assert ("--feedback FOLDER" in caplog.text) == (folder is None)


# --- after a restart ---------------------------------------------------------------------------------------------


def test_a_new_ledger_on_the_folder_knows_what_the_old_one_did(tmp_path: Path) -> None:
    async def scenario() -> None:
        old = await opened(tmp_path)
        for name in ("r-1", "r-2"):
            await old.record(served(name), [])
        await old.feedback(Feedback(request_id="r-1", score=0.1), "ann")
        await old.close()

        new = await opened(tmp_path, budgets=Budgets(usd_per_day=0.5))
        assert await new.stats("ann") == await old.stats("ann")
        assert await taken_by(new, "t", "bob") == 1
        assert not await new.feedback(Feedback(request_id="r-1", score=0.1), "ann")
        with pytest.raises(ConflictingFeedback):
            await new.feedback(right("r-1"), "ann")
        assert await new.feedback(right("r-2"), "ann")

    run(scenario)


def test_the_journal_is_written_without_being_asked(tmp_path: Path) -> None:
    async def scenario() -> int:
        old = await opened(tmp_path)
        for i in range(3):
            await old.record(served(f"r-{i}"), [])
            await asyncio.sleep(0.1)
        return (await (await opened(tmp_path)).stats("ann")).calls  # while the old one exists

    assert run(scenario) == 3


def test_what_a_broken_merge_left_twice_counts_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        old = await opened(tmp_path)
        await old.record(served(), [])
        await old.feedback(right(), "ann")
        await old.close()
        for path in [*(tmp_path / "journal").iterdir(), *(tmp_path / "outcomes").iterdir()]:
            path.with_name(f"9{path.name}").write_bytes(path.read_bytes())
        assert await (await opened(tmp_path)).stats("ann") == await old.stats("ann")

    run(scenario)


def test_a_call_of_more_than_a_week_ago_is_forgotten(tmp_path: Path) -> None:
    async def scenario() -> None:
        old = await opened(tmp_path)
        await old.record(served("old", at=datetime.now(UTC) - timedelta(days=8)), [])
        await old.record(served("new"), [])
        await old.close()
        new = await opened(tmp_path)
        assert await new.feedback(right("new"), "ann")
        with pytest.raises(UnknownRequest):
            await new.feedback(right("old"), "ann")

    run(scenario)


def test_of_too_many_calls_the_oldest_is_forgotten(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        ledger.books.memory.most_calls = 2
        for name in ("r-1", "r-2", "r-3"):
            await ledger.record(served(name), [])
        with pytest.raises(UnknownRequest):
            await ledger.feedback(right("r-1"), "ann")
        assert await ledger.feedback(right("r-2"), "ann")
        assert (await ledger.stats("ann")).calls == 3

    run(scenario)


def test_feedback_on_forgotten_calls_is_forgotten_after_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        ledger.books.memory.most_calls = 2
        for i in range(7):
            await ledger.record(served(f"r-{i}"), [])
            assert await ledger.feedback(right(f"r-{i}"), "ann")
        for known in ("r-3", "r-6"):  # an evicted call and a stored one
            assert not await ledger.feedback(right(known), "ann")
        with pytest.raises(UnknownRequest):
            await ledger.feedback(right("r-2"), "ann")
        assert (await ledger.stats("ann")).feedback == 7
        await ledger.close()
        assert (await (await opened(tmp_path)).stats("ann")).feedback == 7

    run(scenario)
    assert len(outcomes(tmp_path)) == 7


@pytest.mark.parametrize("prompt", ["x" * 10_000, [{"role": "user", "content": "x" * 10_000}]])
def test_prompts_that_are_kept_take_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: Prompt
) -> None:
    """Prompts are stored with their calls until feedback arrives, which may be never."""
    monkeypatch.setattr(module, "_UNSAVED_BYTES", 50_000)

    async def scenario() -> None:
        ledger = await opened(tmp_path, keep_prompts=True)
        ledger.books.memory.most_prompt_bytes = 50_000
        monkeypatch.setattr(LedgerFolder, "write_calls", _fail)
        for i in range(50):
            await ledger.record(served(f"r-{i}", prompt=prompt), [])
        assert ledger.books.memory.prompt_bytes <= 50_000
        assert len(ledger._unsaved) == 4
        assert len(ledger.books.memory) == 4
        with pytest.raises(UnknownRequest):
            await ledger.feedback(right("r-45"), "ann")
        assert await ledger.feedback(right("r-46"), "ann")
        await ledger._save()
        assert len(ledger._unsaved) == 4
        monkeypatch.undo()
        await ledger._save()

    run(scenario)


def test_a_ledger_that_is_read_anew_counts_all_calls_and_remembers_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A week of calls may exceed what fits in memory."""

    async def scenario() -> None:
        old = await opened(tmp_path)
        for i in range(5):
            await old.record(served(f"r-{i}"), [])
        await old.close()
        monkeypatch.setattr(call_books, "CallMemory", partial(CallMemory, 2))
        new = await opened(tmp_path)
        assert await new.stats("ann") == await old.stats("ann")
        assert [call.request_id for call in new.books.memory.calls.values()] == ["r-3", "r-4"]
        assert await new.feedback(right("r-4"), "ann")
        with pytest.raises(UnknownRequest):
            await new.feedback(right("r-2"), "ann")

    run(scenario)


def test_a_ledger_that_moves_keeps_its_feedback_and_reservations(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path / "a")
        await ledger.record(served("r-1"), [])
        assert await ledger.feedback(right("r-1"), "ann")
        await ledger.reserve("t", "ann", BIDS)
        before = await ledger.stats("ann")
        await ledger.configure(LedgerSettings(folder=str(tmp_path / "b")))
        assert await ledger.stats("ann") == before
        assert before.reserved_usd > 0
        assert not await ledger.feedback(right("r-1"), "ann")

    run(scenario)


def test_names_that_were_met_are_the_latest() -> None:
    names = RecentNames(2)
    names.update(["a", "b", "a", "c"])
    assert [name in names for name in "abc"] == [True, False, True]


def _fail(*_: Any) -> None:
    raise OSError("no space left")


def test_a_folder_that_is_taken_away_gets_no_more_feedback(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        await ledger.configure(LedgerSettings())
        with pytest.raises(FeedbackDisabled):
            await ledger.feedback(right(), "ann")

    run(scenario)


def test_a_folder_that_comes_back_is_not_counted_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path / "a")
        await ledger.record(served(), [])
        await ledger.configure(LedgerSettings(folder=str(tmp_path / "b")))
        await ledger.configure(LedgerSettings(folder=str(tmp_path / "a")))
        stats = await ledger.stats("ann")
        assert (stats.calls, stats.actual_cost_usd) == (1, 0.25)

    run(scenario)


def test_a_call_is_kept_in_the_folder_of_its_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path / "a")
        await ledger.record(served(), [])
        await ledger.configure(LedgerSettings(folder=str(tmp_path / "b")))
        await ledger.close()
        kept = [(await (await opened(tmp_path / name)).stats("ann")).calls for name in ("a", "b")]
        assert kept == [1, 0]

    run(scenario)


def test_budgets_change_while_calls_are_remembered(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served(), [])
        await ledger.configure(LedgerSettings(folder=str(tmp_path), budgets=Budgets(usd_per_day=0.1)))
        assert await taken_by(ledger, "t", "ann") == 1
        assert (await ledger.stats("ann")).calls == 1

    run(scenario)


# --- request ids are the callers' own ----------------------------------------------------------------------------


def test_calls_with_one_request_id_are_all_booked_before_and_after_a_restart(tmp_path: Path) -> None:
    """A caller that repeats a request id, or uses another's, still pays for every call."""

    async def scenario() -> None:
        old = await opened(tmp_path)
        for caller in ("ann", "ann", "bob"):
            await old.record(served("same", caller=caller), [])
        await old.close()
        for ledger in (old, await opened(tmp_path)):
            spent = [(await ledger.stats(who)).spent_today_usd for who in ("ann", "bob", "eve", None)]
            assert spent == [0.5, 0.25, 0.0, 0.75]

    run(scenario)


def test_feedback_by_an_id_is_on_the_callers_latest_call_before_and_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        old = await opened(tmp_path)
        await old.record(served("same", "first"), [])
        assert await old.feedback(right("same"), "ann")
        await old.record(served("same", "of bob", caller="bob"), [])
        await old.record(served("same", "second"), [])
        assert await old.feedback(wrong("same"), "ann")
        await old.close()
        for ledger in (old, await opened(tmp_path)):
            assert not await ledger.feedback(wrong("same"), "ann")
            with pytest.raises(ConflictingFeedback):
                await ledger.feedback(right("same"), "ann")
            assert [(await ledger.stats(who)).feedback for who in ("ann", "bob", None)] == [2, 0, 2]

    run(scenario)
    assert sorted(row[1:4] for row in outcomes(tmp_path)) == [("first", "small", 1.0), ("second", "small", 0.0)]
    got = load_outcomes(str(tmp_path / "outcomes"), ["small"]).align(["first", "second"])
    assert got.correct[:, 0].tolist() == [1.0, 0.0]


def test_of_feedback_that_comes_twice_before_its_call_one_is_new(tmp_path: Path) -> None:
    async def scenario() -> list[bool]:
        ledger = await opened(tmp_path)
        early = [asyncio.create_task(ledger.feedback(right(), "ann")) for _ in range(2)]
        await asyncio.sleep(0)
        await ledger.record(served(), [])
        return await asyncio.gather(*early)

    assert sorted(run(scenario)) == [False, True]
    assert len(outcomes(tmp_path)) == 1


def test_a_folder_of_before_calls_had_ids_of_their_own_is_read(tmp_path: Path) -> None:
    """Older outcomes lack the caller; the journal has it."""

    async def scenario() -> None:
        old = await opened(tmp_path)
        for name in ("r-1", "r-2"):
            await old.record(served(name), [])
        await old.feedback(right("r-1"), "ann")
        await old.close()
        for path in (tmp_path / "journal").iterdir():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            new = ("call_id", "answer_key")
            path.write_text("".join(json.dumps({k: v for k, v in x.items() if k not in new}) + "\n" for x in lines))
        for path in (tmp_path / "outcomes").iterdir():
            pq.write_table(pq.read_table(path).drop_columns(["caller", "call_id"]), path)
        new_ledger = await opened(tmp_path)
        assert await new_ledger.stats("ann") == await old.stats("ann")
        assert not await new_ledger.feedback(right("r-1"), "ann")
        assert await new_ledger.feedback(right("r-2"), "ann")
        with pytest.raises(UnknownRequest):
            await new_ledger.feedback(right("r-1"), "")

    run(scenario)
    assert load_outcomes(str(tmp_path / "outcomes"), ["small"]).correct.sum() == 2.0


def test_an_answer_is_found_by_its_caller_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> list[str | None]:
        old = await opened(tmp_path)
        await old.record(served(answer_key=b"answer".hex()), [b"answer"])
        await old.close()
        new = await opened(tmp_path)
        return [await new.target_of_answer(key) for key in (b"answer", b"nobody's")]

    assert run(scenario) == ["small", None]


def test_a_folder_that_cannot_be_read_leaves_the_old_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that are refused change nothing: calls stay in the journal, and feedback is taken."""

    async def scenario() -> None:
        ledger = await opened(tmp_path / "a")
        with monkeypatch.context() as patch:
            patch.setattr(LedgerFolder, "read_calls", _fail)
            with pytest.raises(OSError, match="no space left"):
                await ledger.configure(LedgerSettings(folder=str(tmp_path / "b")))
        await ledger.record(served(), [])
        assert await ledger.feedback(right(), "ann")
        await ledger.close()
        assert (await (await opened(tmp_path / "a")).stats("ann")).calls == 1

    run(scenario)


def test_a_call_that_ends_while_a_new_folder_is_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, read_on = threading.Event(), threading.Event()
    read = LedgerFolder.read_calls

    def slow(self: LedgerFolder, since: datetime) -> Any:
        reading.set()
        read_on.wait(30)
        return read(self, since)

    async def scenario() -> None:
        ledger = await opened(tmp_path / "a")
        with monkeypatch.context() as patch:
            patch.setattr(LedgerFolder, "read_calls", slow)
            moving = asyncio.create_task(ledger.configure(LedgerSettings(folder=str(tmp_path / "b"))))
            await asyncio.to_thread(reading.wait, 30)
            await ledger.record(served(), [])
            read_on.set()
            await moving
        await ledger.close()
        kept = [(await (await opened(tmp_path / name)).stats("ann")).calls for name in ("a", "b")]
        assert sum(kept) == 1

    run(scenario)


def test_a_call_that_is_recorded_twice_counts_once(tmp_path: Path) -> None:
    """A replica that got no answer in time cannot know that its record arrived."""

    async def scenario() -> None:
        ledger, record = await opened(tmp_path), served()
        await ledger.record(record, [])
        await ledger.record(record, [])
        stats = await ledger.stats("ann")
        assert (stats.calls, stats.actual_cost_usd) == (1, 0.25)

    run(scenario)


def test_a_ledger_that_runs_on_forgets_old_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only one that starts: its journal would grow for as long as it runs."""

    async def scenario() -> None:
        ledger = await opened(tmp_path)
        await ledger.record(served("r-1"), [])
        await ledger.close()
        later = datetime.now(UTC) + timedelta(days=30)
        monkeypatch.setattr(module, "_now", lambda: later)
        await ledger.record(served("r-2", at=later), [])
        await ledger.close()

    run(scenario)
    assert len(list((tmp_path / "journal").iterdir())) == 1
