"""`collect` against upstreams that fail on request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from collected import asked_twice, billed_usd, is_right, outcomes, write_pool_of, write_prompts
from prefill_jobs.collect.collect_job import CollectManifest, collect
from prefill_jobs.options import CollectConfig
from prefill_router.common.errors import UserError
from prefill_router.corpus.quarantine import read_quarantine
from upstream import _ERRORS, Fault, Upstream

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def upstreams() -> Iterator[dict[str, Upstream]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}


def collected(folder: Path, pool: str, **options: Any) -> CollectManifest:
    corpus = folder / "corpus.jsonl"
    given = {"grader": "exact", "max_output_tokens": 50, **options}
    return collect(CollectConfig(corpus=str(corpus), pool=pool, out=str(folder / "out"), **given))


def test_every_outcome_is_right_whatever_the_upstreams_do(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 60)
    for upstream in upstreams.values():
        upstream.retry_after_s, upstream.slow_s = 0, 0.3
        faults = (Fault.RATE_LIMIT, Fault.ERROR, Fault.HANG, Fault.CUT, Fault.SLOW_HEAD, Fault.RESET, Fault.NOT_JSON)
        upstream.faults(*faults, Fault.ERROR_FIRST, Fault.EMPTY, Fault.STALL, rate=0.3)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams, timeout_s=5.0)
    manifest = collected(tmp_path, pool, attempts=12)
    found = outcomes(tmp_path / "out")
    assert (manifest.outcomes, manifest.graded, manifest.missing) == (120, 120, 0)
    assert len({(row["prompt_id"], row["target"]) for row in found}) == len(found) == 120
    assert all((row["correct"] == 1.0) == is_right(row["prompt_id"], row["target"]) for row in found)
    assert all(row["output_tokens"] > 0 for row in found)
    assert not any(asked_twice(upstream) for upstream in upstreams.values())
    said = sum(spending.cost_usd for spending in manifest.spending.values())
    lost = sum(spending.lost_usd for spending in manifest.spending.values())
    assert said <= billed_usd(pool, upstreams) <= said + lost
    assert sum(row["cost_usd"] for row in found) == pytest.approx(said)

    for upstream in upstreams.values():
        upstream.calls.clear()
    again = collected(tmp_path, pool, regrade=True, grader="regex", grader_options=str(regex_options(tmp_path)))
    assert (again.outcomes, again.graded) == (120, 120)
    assert {row["correct"] for row in outcomes(tmp_path / "out")} == {1.0}
    assert collected(tmp_path, pool).spending == manifest.spending
    assert not upstreams["big"].calls


def regex_options(folder: Path) -> Path:
    path = folder / "grader.toml"
    path.write_text('pattern = "what is .*"\nreference = "prompt"\n')
    return path


def test_a_budget_is_never_exceeded_and_more_of_it_goes_on(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 80)
    for upstream in upstreams.values():
        upstream.retry_after_s = 0
        upstream.faults(Fault.CUT, Fault.ERROR, Fault.RESET_MIDWAY, rate=0.2)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    budget = 0.005
    first = collected(tmp_path, pool, budget_usd=budget)
    assert first.left_out > 0
    assert 0 < first.outcomes < 160
    spent = sum(spending.cost_usd + spending.lost_usd for spending in first.spending.values())
    assert billed_usd(pool, upstreams) <= spent <= budget
    assert spent > 0.8 * budget
    second = collected(tmp_path, pool, budget_usd=budget)
    assert billed_usd(pool, upstreams) <= budget
    assert second.outcomes >= first.outcomes
    last = collected(tmp_path, pool, budget_usd=10.0, attempts=12)
    assert (last.outcomes, last.missing, last.left_out) == (160, 0, 0)
    assert not any(asked_twice(upstream) for upstream in upstreams.values())
    with_tokens = collected(tmp_path, pool, budget_tokens=1)
    assert with_tokens.outcomes == 160


def test_a_call_that_fails_is_missing_and_is_made_again(
    upstreams: dict[str, Upstream], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 10)
    upstreams["small"].faults(Fault.NOT_FOUND, rate=1.0)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    manifest = collected(tmp_path, pool)
    said = capsys.readouterr().err
    assert "10 calls failed (most often small: status 404 model_not_found)" in said
    assert (manifest.outcomes, manifest.missing) == (10, 10)
    assert len(upstreams["small"].completions) == 10  # a retry would fail too
    assert {row["target"] for row in outcomes(tmp_path / "out")} == {"big"}
    upstreams["small"].faults()
    assert collected(tmp_path, pool).outcomes == 20
    assert len(upstreams["big"].completions) == 10


def test_rate_limits_hold(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 40)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams, requests_per_minute=600.0, concurrency=3)
    for upstream in upstreams.values():
        upstream.first_byte_s = 0.05
    collected(tmp_path, pool)
    for upstream in upstreams.values():
        came = sorted(call.came_s for call in upstream.completions)
        assert len(came) == 40
        for num_later in range(1, 40):  # ten start per second; three in flight may arrive together
            windows = [last - first for first, last in zip(came, came[num_later:], strict=False)]
            assert min(windows) > 0.1 * (num_later - 3) - 0.01
        moments = [(call.came_s, 1) for call in upstream.completions]
        moments += [(call.came_s + call.took_s, -1) for call in upstream.completions]
        num_open = 0
        for _, change in sorted(moments):
            num_open += change
            assert num_open <= 3


def test_a_pause_that_an_upstream_asks_for_is_made(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 20)
    upstreams["small"].faults(None, None, Fault.RATE_LIMIT)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams, concurrency=1)
    assert collected(tmp_path, pool, targets="small").missing == 0
    calls = upstreams["small"].completions
    refused = next(i for i, call in enumerate(calls) if call.status == 429)
    assert calls[refused + 1].came_s - calls[refused].came_s > 0.95


def test_a_corpus_that_grew_and_repeats_pays_for_new_prompts_alone(
    upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    write_prompts(tmp_path / "corpus.jsonl", 10)
    collected(tmp_path, pool, shard_rows=8)
    text = write_prompts(tmp_path / "corpus.jsonl", 14).read_text()
    (tmp_path / "corpus.jsonl").write_text(text + text.splitlines()[0].replace('"p0"', '"p0-again"') + "\n")
    manifest = collected(tmp_path, pool, shard_rows=8)
    assert (manifest.outcomes, manifest.missing) == (30, 0)
    assert len(upstreams["big"].completions) == 14
    assert {row["prompt_id"] for row in outcomes(tmp_path / "out")} >= {"p0", "p0-again", "p13"}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prompts_that_no_grader_could_grade_are_not_paid_for(
    upstreams: dict[str, Upstream], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    rows = [{"prompt_id": f"p{i}", "prompt": f"Capital {i}?", "reference": "x"} for i in range(4)]
    write_rows(tmp_path, [{**row, "reference": "Paris", "choices": None} for row in rows])
    with pytest.raises(UserError) as refused:
        collected(tmp_path, pool, grader="choice")
    assert "corpus.jsonl: grader choice can grade none of 4 prompts" in str(refused.value)
    assert 'p0: the row has no "choices", and its reference Paris is not a letter' in str(refused.value)
    assert not upstreams["big"].calls

    unfit = {**rows[3], "reference": None}
    write_rows(tmp_path, [*rows[:3], unfit, {**rows[3], "prompt_id": "again"}, {"prompt": "?"}])
    manifest = collected(tmp_path, pool)
    assert len(upstreams["big"].completions) == 4  # the second to last row has the prompt of a row without a reference
    said = capsys.readouterr().err
    assert 'collect: 2 prompts cannot be graded and are not sent (p3: the row has no "reference")' in said
    assert (manifest.missing, manifest.graded) == (0, 8)
    bad = [(row.row, row.reason) for row in read_quarantine(str(tmp_path / "out"))]
    assert bad == [(3, 'the row has no "reference"'), (5, 'the row has no "reference"')]

    write_rows(tmp_path, rows)  # existing answers are graded once the corpus is fixed
    with pytest.raises(UserError, match=r'can grade none of 4 prompts \(p0: the row has no "tests"'):
        collected(tmp_path, pool, grader="code", regrade=True)
    assert collected(tmp_path, pool, regrade=True).graded == 8
    assert len(upstreams["big"].completions) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "huge"}, 'targets: "huge" is not in the pool: big, small'),
        ({"grader": "exat"}, 'unknown grader "exat", did you mean "exact"?'),
        ({"grader": None, "regrade": True}, "regrade: requires a grader: give --grader"),
    ],
)
def test_what_cannot_be_is_one_line(
    upstreams: dict[str, Upstream], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 2)
    with pytest.raises(UserError) as refused:
        collected(tmp_path, write_pool_of(tmp_path / "pool.toml", upstreams), **options)
    assert message in str(refused.value)


def test_a_target_that_cannot_be_asked_is_one_line(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 2)
    pool = Path(write_pool_of(tmp_path / "pool.toml", upstreams, key_env="NO_SUCH_API_KEY"))
    with pytest.raises(UserError, match='target "big": NO_SUCH_API_KEY is not set on the workers'):
        collected(tmp_path, str(pool))
    pool.write_text('[[pool]]\nname = "big"\ninput_price = 1.0\noutput_price = 1.0\n')
    with pytest.raises(UserError, match='target "big" has no upstream'):
        collected(tmp_path, str(pool))


def test_what_an_upstream_quotes_is_kept_nowhere(
    upstreams: dict[str, Upstream], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows an error code that is a word, and never the key, neither in messages nor in files."""
    key = "sk_live_Secret"
    monkeypatch.setenv("BIG_API_KEY", key)
    monkeypatch.setitem(_ERRORS, Fault.UNAUTHORIZED, (401, "error", "live_Secret", None, f"No such key: {key}."))
    write_prompts(tmp_path / "corpus.jsonl", 2)
    upstreams["big"].quotes = f" of {key} and org-Secret"
    upstreams["big"].faults(Fault.UNAUTHORIZED, Fault.NOT_FOUND)
    pool = write_pool_of(tmp_path / "pool.toml", {"big": upstreams["big"]}, key_env="BIG_API_KEY")
    collected(tmp_path, pool, attempts=1)
    said = capsys.readouterr()
    assert "big: status 40" in said.err
    answers = [row for file in (tmp_path / "out" / "answers").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["reason"] for row in answers) == ["status 401 [redacted]", "status 404 model_not_found"]
    assert "Secret" not in said.out + said.err
    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in kept if b"Secret" in path.read_bytes()]


def asked(upstream: Upstream) -> set[str]:
    return {call.body["messages"][-1]["content"] for call in upstream.completions}


def test_a_sample_grows_and_keeps_what_was_asked(upstreams: dict[str, Upstream], router: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 60)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    first = collected(tmp_path, pool, sample=10)
    assert (first.outcomes, first.missing) == (20, 0)
    drawn = asked(upstreams["big"])
    assert len(drawn) == 10
    second = collected(tmp_path, pool, sample=25, sample_by="active", router=router)
    assert (second.outcomes, second.missing) == (50, 0)
    assert drawn < asked(upstreams["big"])
    assert len(upstreams["big"].completions) == len(asked(upstreams["big"])) == 25
    with pytest.raises(UserError, match=r"sample_by = active: .* give --router"):
        collected(tmp_path, pool, sample=30, sample_by="active")
    with pytest.raises(UserError, match=r"column category is missing: .* --stratum"):
        collected(tmp_path, pool, sample=30, sample_by="stratified")
    third = collected(tmp_path, pool, sample=30, sample_by="stratified", stratum="reference")
    assert third.outcomes == 60


def test_a_judge_is_asked_within_the_budget_and_once(upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    write_prompts(tmp_path / "corpus.jsonl", 6)
    pool = write_pool_of(tmp_path / "pool.toml", upstreams)
    options = tmp_path / "judge.toml"
    options.write_text('rubric = """\nIs it right?\nGRADE: 0.75\n"""\n')  # this judge echoes it
    judging = {"grader": "judge", "judge": "big", "grader_options": str(options)}
    manifest = collected(tmp_path, pool, targets="small", **judging)
    assert (manifest.outcomes, manifest.graded) == (6, 6)
    assert {row["correct"] for row in outcomes(tmp_path / "out")} == {0.75}
    assert len(upstreams["big"].completions) == 12  # each judged in both orders
    assert manifest.spending["big"].answers == 12
    again = collected(tmp_path, pool, targets="small", regrade=True, **judging)
    assert (again.graded, len(upstreams["big"].completions)) == (6, 12)
    write_prompts(tmp_path / "corpus.jsonl", 8)
    spent = sum(spending.cost_usd for spending in again.spending.values())
    tight = collected(tmp_path, pool, targets="small", budget_usd=spent + 1e-4, **judging)
    assert (tight.outcomes, tight.graded) == (8, 6)
    assert tight.left_out == 4
    with pytest.raises(UserError, match='judge = "huge", must be a target of'):
        collected(tmp_path, pool, grader="judge", judge="huge")
    with pytest.raises(UserError, match=r"grader = judge: .* give --judge"):
        collected(tmp_path, pool, grader="judge")
