"""Whole jobs as scenarios, with stand-ins that count calls to the encoder or to targets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import httpx
import pytest

from crashes.enumeration import Scenario
from crashes.extraction import check_object, check_store, objects
from crashes.life import Crash, ignore_the_dead
from prefill_jobs.collect import collector
from prefill_jobs.collect.collect_job import CollectManifest, collect
from prefill_jobs.collect.collector import AskTask, CallCounts, ShardCaller
from prefill_jobs.extract import encoder_actor
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.label.label_job import LabelManifest, label
from prefill_jobs.options import CollectConfig, ExtractConfig, LabelConfig
from prefill_router import storage
from prefill_router.activations.commit_log import CommitLog
from prefill_router.collection.answers import ShardPlace, load_states
from prefill_router.collection.journal import CallState
from prefill_router.collection.target_calls import Spent, TargetAnswer, TargetCall
from prefill_router.collection.target_client import Miss
from prefill_router.corpus.reader import content_hash
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder

Options = dict[str, Any]


class Readings:
    """Counts how often encoders read each prompt; an encoder is loaded once for all runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = Counter[str]()
        self._encoders: dict[str, PrefillEncoder] = {}
        self._load, read = PrefillEncoder.load, PrefillEncoder.read

        def counting(encoder: PrefillEncoder, prompts: Any, columns: Any) -> Any:
            self.counts.update(map(content_hash, prompts))
            return read(encoder, prompts, columns)

        patch.setattr(PrefillEncoder, "read", counting)
        patch.setattr(PrefillEncoder, "load", self._loaded)
        patch.setattr(encoder_actor, "measured_peak_flops", lambda *_: 1.0)

    def _loaded(self, spec: EncoderSpec) -> PrefillEncoder:
        if spec.model not in self._encoders:
            self._encoders[spec.model] = self._load(spec)
        return self._encoders[spec.model]


class Reading(Scenario):
    """A job that encodes prompts, in shards of at most `shard_rows`."""

    shard_rows = 4

    def __init__(self, readings: Readings, options: Options, out: str) -> None:
        super().__init__(out)
        self.readings, self.options = readings, {**options, "shard_rows": self.shard_rows}
        readings.counts.clear()
        self.num_crashes = 0

    def check(self) -> None:
        """Only the shard in progress at the crash is read again."""
        self.num_crashes += 1
        self.check_readings()

    def check_readings(self) -> None:
        again = self.readings.counts.total() - len(self.readings.counts)
        assert again <= self.num_crashes * self.shard_rows, "prompts are read again that an object holds"


class Extracting(Reading):
    """The job `extract`."""

    def run(self) -> None:
        extract(ExtractConfig(out=self.out, **self.options))

    def check(self) -> None:
        super().check()
        check_store(self.out)

    def result(self) -> Any:
        self.check_readings()
        return _without(self.out, "summary.json"), len(CommitLog.open(self.out)), set(self.readings.counts)


class Labelling(Reading):
    """The job `label` on a growing log: each of `files` is added once the earlier ones are labelled."""

    def __init__(self, readings: Readings, options: Options, files: Mapping[str, str], out: str) -> None:
        super().__init__(readings, options, out)
        self.files = files
        self.log = Path(options["log"])
        for file in self.log.iterdir():
            file.unlink()

    def run(self) -> None:
        for name, text in self.files.items():
            (self.log / name).write_text(text)
            label(LabelConfig(out=self.out, **self.options))

    def check(self) -> None:
        super().check()
        if (manifest := _manifest(self.out, LabelManifest)) is not None:
            for file in manifest.files:
                check_object(storage.join(self.out, "decisions"), file)

    def result(self) -> Any:
        """The output, without the segments of the commit log and the number of prompts read by the last run."""
        self.check_readings()
        manifest = _manifest(self.out, LabelManifest)
        assert manifest is not None
        found = _without(self.out, "manifest.json", "summary.json")
        return found, manifest.model_copy(update={"computed": 0}), set(self.readings.counts)


class Targets:
    """Targets that answer each call with its prompt; the first answers to the prompt `CUT` are billed but lost."""

    CUT = "prompt 1"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reset("")
        patch.setattr(collector, "ask", self.ask)
        patch.setattr(collector, "backoff_s", lambda *_: 0.0)
        patch.setattr(collector, "http_client", partial(httpx.AsyncClient, verify=False))  # certificates load slowly
        patch.setattr(ShardCaller, "_start", partialmethod(_until_death, ShardCaller._start))

    def reset(self, out: str) -> None:
        """Resets the counters, for calls whose answers are stored at `out`."""
        self.out, self.asked, self.billed = out, Counter[str](), Spent()

    async def ask(self, call: TargetCall, _http: httpx.AsyncClient) -> TargetAnswer | Miss:
        await asyncio.sleep(0)
        known = states(self.out).get(call.key)
        assert known is None or known.answer is None, "a call is made again that has an answer"
        self.asked[call.key] += 1
        answer = TargetAnswer(f"{call.target.name}: {call.prompt}", "stop", 10, 5, 0, 0.25)
        self.billed += answer.spent(call)
        if call.prompt == self.CUT and self.asked[call.key] == 1:
            return Miss("the connection failed", may_be_paid=True, retry_after_s=0.0)
        return answer


def _until_death(actor: ShardCaller, start: Callable[[ShardCaller, AskTask], CallCounts], task: AskTask) -> CallCounts:
    """Makes the calls of a shard; if the program dies meanwhile, cancels the rest of its event loop's work."""
    actor._loop.set_exception_handler(ignore_the_dead)
    try:
        return start(actor, task)
    except Crash:
        asyncio.run_coroutine_threadsafe(_cancel_all(), actor._loop).result()
        raise


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Collecting(Scenario):
    """The job `collect`, within a budget that all its runs share."""

    def __init__(self, targets: Targets, options: Options, out: str) -> None:
        super().__init__(out)
        self.targets, self.options, self.budget_usd = targets, options, options["budget_usd"]
        targets.reset(out)

    def run(self) -> None:
        collect(CollectConfig(out=self.out, **self.options))

    def check(self) -> None:
        """The recorded spending covers what targets have billed, and is within the budget."""
        spent = sum((state.spent + state.lost for state in states(self.out).values()), Spent())
        assert self.targets.billed.usd <= spent.usd + 1e-12
        assert spent.usd <= self.budget_usd
        manifest = _manifest(self.out, CollectManifest)
        for file in () if manifest is None else manifest.files:
            check_object(storage.join(self.out, "outcomes"), file)

    def result(self) -> Any:
        """The output, without the number and the cost of attempts that crashes interrupted."""
        self.check()
        manifest = _manifest(self.out, CollectManifest)
        assert manifest is not None
        spending = {name: spent.model_dump(exclude={"lost_usd", "tokens"}) for name, spent in manifest.spending.items()}
        answers = {
            key: replace(state, lost=Spent(), attempts=0, reason=None) for key, state in states(self.out).items()
        }
        assert storage.list_names(storage.join(self.out, "journal")) == []
        return (
            _without(self.out, "manifest.json", "answers"),
            manifest.model_dump(exclude={"spending"}),
            spending,
            answers,
        )


def states(out: str) -> dict[str, CallState]:
    """The recorded states of calls, by key."""
    names = {name.removeprefix("part-").removesuffix(".parquet") for name in storage.list_names(f"{out}/answers")}
    names.update(storage.list_names(f"{out}/journal"))
    return {key: state for name in sorted(names) for key, state in load_states(ShardPlace(out, name)).items()}


def _manifest(out: str, model: type[Any]) -> Any:
    path = storage.join(out, "manifest.json")
    return model.model_validate(storage.read_json(path)) if storage.exists(path) else None


def _without(out: str, *names: str) -> dict[str, bytes]:
    """The objects of an output, without leases, commit logs, and the given file and folder names."""
    left_out = {"_lease", "commits", *names}
    return {name: data for name, data in objects(out).items() if left_out.isdisjoint(name.split("/"))}
