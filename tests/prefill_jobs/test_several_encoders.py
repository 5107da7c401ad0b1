"""Jobs with several encoders: a causal LM and a sentence encoder, from extraction to decisions, without Ray."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from command import Command, Result
from prefill_jobs.evaluate.evaluate_job import FoldEvaluation
from prefill_jobs.extract.extract_cost import extraction_cost
from prefill_jobs.extract.extract_job import each_encoder, extract
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.predictions import predict_graded
from prefill_jobs.label.label_job import label
from prefill_jobs.options import ExtractConfig, LabelConfig
from prefill_jobs.train import sensor_choice
from prefill_jobs.train.probe_job import load_probes
from prefill_jobs.train.sensor_choice import SensorOption, SensorTrial
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.joined_stores import JoinedStores, open_stores
from prefill_router.common.errors import UserError
from prefill_router.encoder.encoder_spec import EncoderSize
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.router.artifact import Router
from tiny import CHAT_TEMPLATE, save_tiny_model

pytestmark = pytest.mark.usefixtures("in_process")

LLM, SENTENCE = "tiny_model", "tiny_sentence_encoder"
COLUMNS = {f"{LLM}:last_002", f"{LLM}:mean_002", f"{SENTENCE}:sentence_002"}


@pytest.fixture(scope="module")
def encoders(tiny_model: Path, tiny_sentence_encoder: Path) -> str:
    return f"{tiny_model},{tiny_sentence_encoder}"


@pytest.fixture(scope="module")
def stores(encoders: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory, in_process: None) -> Path:
    """A store of each encoder over the small corpus."""
    out = tmp_path_factory.mktemp("stores")
    extract(extraction(encoders, small_data, out, layers="all"))
    return out


def extraction(encoders: str, small_data: Path, out: Path, **options: Any) -> ExtractConfig:
    fields = {"corpus": str(small_data / "corpus.parquet"), "layers": "2", "shard_rows": 100, **options}
    return ExtractConfig(encoder=encoders, out=str(out), **fields)


@pytest.fixture
def every_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes training keep every encoder, whatever it adds."""
    monkeypatch.setattr(sensor_choice, "choose_options", keep_all)


def keep_all(options: Sequence[SensorOption], *_: object) -> list[SensorTrial]:
    """Every encoder at its greatest depth."""
    return [SensorTrial(option, True, 0.0, 0.0, 0.0) for option in {o.encoder: o for o in options}.values()]


def summaries(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]


# --- extract -----------------------------------------------------------------------------------------------------


def test_each_encoder_has_a_store(
    encoders: str, small_data: Path, tiny_sentence_encoder: Path, tmp_path: Path, command: Command
) -> None:
    corpus, options = small_data / "corpus.parquet", {"layers": "2", "limit": 20, "shard_rows": 15}
    result = command("extract", corpus=corpus, encoder=encoders, out=tmp_path / "out", **options)
    assert result.status == 0, result.err
    for name, num_columns in ((LLM, 2), (SENTENCE, 1)):
        assert re.search(rf"^{tmp_path}/out/{name}: 20 prompts, \d+ tokens, {num_columns} columns$", result.out, re.M)
    assert "prompts were longer than the encoder's max_tokens: their end was cut out" in result.out
    assert [summary["computed"] for summary in summaries(result)] == [20, 20]
    assert f"{tiny_sentence_encoder} is a sentence encoder: --layers and --pooling do not apply to it" in result.err
    store = ActivationStore.open(f"{tmp_path}/out/{SENTENCE}")
    assert (store.manifest.columns, store.num_shards, store.is_sample) == (["sentence_002"], 2, True)
    _, stored = store.read(0, store.columns)
    prompts = pq.read_table(corpus)["prompt"].to_pylist()[:15]
    embedded = SentenceEncoder.load(str(tiny_sentence_encoder)).embed(prompts)
    np.testing.assert_allclose(stored["sentence_002"], embedded, atol=2e-3)

    again = command("extract", corpus=corpus, encoder=encoders, out=tmp_path / "out", **options)
    assert [summary["reused"] for summary in summaries(again)] == [20, 20]


def test_a_job_that_died_in_its_second_store_resumes_there(encoders: str, small_data: Path, tmp_path: Path) -> None:
    config = extraction(encoders, small_data, tmp_path / "out", limit=20, shard_rows=5)
    extract(config)
    second = tmp_path / "out" / SENTENCE
    (second / "manifest.json").unlink()
    next((second / "commits").glob("*.json")).unlink()
    with pytest.raises(UserError, match=f"{second}: no finished extraction here"):
        open_stores(str(tmp_path / "out"))
    assert [summary.work.prompts for summary in extract(config).values()] == [0, 5]
    joined, _ = open_stores(str(tmp_path / "out"))
    assert isinstance(joined, JoinedStores)
    assert {column.name for column in joined.columns} == COLUMNS


def test_several_encoders_are_checked_before_the_first_one_reads(
    encoders: str, tiny_model: Path, small_data: Path, tmp_path: Path, command: Command
) -> None:
    given = {"corpus": small_data / "corpus.parquet", "out": tmp_path / "out"}
    for bad, message in (
        ({"encoder": f"{tiny_model},/no/such/encoder"}, "encoder /no/such/encoder: no such directory"),
        ({"encoder": f"{encoders},{tiny_model}"}, f"names {tiny_model} more than once: give each encoder once"),
        ({"encoder": f"{tiny_model},"}, "must be an encoder, or several separated by single commas"),
        ({"encoder": encoders, "layers": "5"}, "layer 5 is out of range"),
    ):
        result = command("extract", **{**given, **bad})
        assert (result.status, message in result.err) == (1, True), result.err
        assert not (tmp_path / "out").exists()
    extract(extraction(str(tiny_model), small_data, tmp_path / "out", limit=5))
    with pytest.raises(UserError, match="has the store of a single encoder: choose another folder"):
        extract(extraction(encoders, small_data, tmp_path / "out", limit=5))


def test_costs_are_of_all_encoders_together(
    encoders: str, small_data: Path, tiny_sentence_encoder: Path, tmp_path: Path
) -> None:
    config = extraction(encoders, small_data, tmp_path / "out")
    first, second = (extraction_cost(each, None) for each in each_encoder(config))
    both = first + second
    assert (both.prompts, both.tokens) == (240, first.tokens + second.tokens)
    assert (both.flops, both.bytes) == (first.flops + second.flops, first.bytes + second.bytes)
    loaded, size = SentenceEncoder.load(str(tiny_sentence_encoder)), EncoderSize.of(str(tiny_sentence_encoder))
    assert size == EncoderSize(loaded.num_layers, loaded.identity.hidden_size, loaded.cost, "sentence")


# --- train, inspect, evaluate, compare ---------------------------------------------------------------------------


def test_a_router_of_two_reads_prompts_as_its_stores_have_them(
    router_of_two: str, stores: Path, small_data: Path, command: Command
) -> None:
    router = Router.load(router_of_two)
    assert router.format == 2
    assert list(router.encoders) == [LLM, SENTENCE]
    given = (str(small_data / "outcomes.parquet"), str(small_data / "pool.toml"))
    predicted = predict_graded(router, GradedStore.open(str(stores), *given, ignore_unknown=False))
    prompts = pq.read_table(small_data / "corpus.parquet")["prompt"].to_pylist()
    shards = (prompts[:100], prompts[100:200], prompts[200:])  # other batches round bfloat16 otherwise
    expected = np.concatenate([router.predict(shard).p_correct for shard in shards])
    np.testing.assert_allclose(predicted.prediction.p_correct, expected, atol=1e-3)
    shown = command("inspect", router_of_two).out
    assert "format 2" in shown
    assert "sentence_002 (" in shown


def test_a_probe_reads_a_folder_of_stores(stores: Path, small_data: Path, tmp_path: Path, command: Command) -> None:
    given = {"outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml"}
    result = command("probe", activations=stores, **given, out=tmp_path)
    assert result.status == 0, result.err
    probed = {(Path(probe.encoder).name, probe.column.name) for probe in load_probes(str(tmp_path))}
    of_llm = {(LLM, f"{pooling}_{layer:03d}") for pooling in ("last", "mean") for layer in range(5)}
    assert probed == of_llm | {(SENTENCE, "sentence_002")}


def test_an_evaluation_shows_what_each_encoder_adds(
    router_of_two: str, stores: Path, small_data: Path, tmp_path: Path, command: Command
) -> None:
    outcomes = small_data / "outcomes.parquet"
    result = command("evaluate", router=router_of_two, activations=stores, outcomes=outcomes, out=tmp_path, draws=20)
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "report.json").read_text())
    standings = {standing["name"]: standing for standing in report["standings"]}
    assert {name for name in standings if name.startswith("without")} == {f"without {LLM}", f"without {SENTENCE}"}
    value, low, high = standings[f"without {LLM}"]["router_less_this"]["mdp_auccc"]
    assert low <= value <= high
    assert f"in MDP-AUCCC x 1000: {LLM} adds " in result.out
    page = (tmp_path / "report.html").read_text()
    assert f"without {SENTENCE}" in page
    assert "features predicted\nfrom the others" in page


def test_a_router_without_an_encoder_decides_as_the_endpoint_does(
    router_of_two: str, stores: Path, small_data: Path
) -> None:
    router = Router.load(router_of_two)
    given = (str(small_data / "outcomes.parquet"), str(small_data / "pool.toml"))
    graded = GradedStore.open(str(stores), *given, ignore_unknown=False)
    predicted = predict_graded(router, graded, with_features=True)
    is_held_out = np.arange(len(predicted.keys)) < 50
    trial = FoldEvaluation(router, predicted, graded.groups, None, is_held_out)
    assert isinstance(graded.store, JoinedStores)
    _, activations = graded.store.of(router.encoders).read(0, router.columns)
    own = {name: values for name, values in activations.items() if name.startswith(LLM)}
    expected = router.predict_features(router.features(own, missing={SENTENCE}))
    for ours, theirs in zip(
        (trial._without(SENTENCE).p_correct, trial._without(SENTENCE).expected_output_tokens), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs[:50], rtol=1e-5)


def test_routers_of_one_and_of_two_encoders_are_compared_on_their_own_stores(
    router_of_two: str, router: str, activations: str, stores: Path, small_data: Path, tmp_path: Path, command: Command
) -> None:
    outcomes, given = small_data / "outcomes.parquet", f"{activations},{stores}/{SENTENCE}"
    extracted = f"{router_of_two} {router}".split()
    result = command("compare", *extracted, activations=given, outcomes=outcomes, out=tmp_path, draws=20)
    assert result.status == 0, result.err
    assert f"{router_of_two} minus {router}:" in result.out
    missing = command("compare", *extracted, activations=activations, outcomes=outcomes, out=tmp_path, draws=20)
    assert missing.status == 1
    assert "no store of its encoder" in missing.err


# --- label -------------------------------------------------------------------------------------------------------


@pytest.fixture
def picky(router_of_two: str, tmp_path: Path) -> str:
    """The router with a causal LM whose template refuses the prompt "no town"."""
    refusing = "{% if 'no town' in messages[0]['content'] %}{{ raise_exception('no towns') }}{% endif %}"
    encoder = PrefillEncoder.load(str(save_tiny_model(tmp_path / "model", chat_template=refusing + CHAT_TEMPLATE)))
    loaded = Router.load(router_of_two)
    replace(loaded, encoders={**loaded.encoders, LLM: encoder.identity}).save(str(tmp_path / "picky"))
    return str(tmp_path / "picky")


def decisions(out: Path) -> list[dict[str, Any]]:
    rows = [row for file in (out / "decisions").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["row"])


def test_a_log_is_labelled_as_the_router_predicts(picky: str, tmp_path: Path) -> None:
    """The log has a repeated prompt, one that both encoders truncate, and one that the causal LM refuses."""
    prompts = [*(f"what is one plus {i}" for i in range(8)), "two " * 300, "no town", "what is one plus 3"]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def labelled(**options: Any) -> tuple[int, int]:
        manifest = label(LabelConfig(router=picky, log=str(log), out=str(tmp_path / "out"), **options))
        return manifest.computed, manifest.quarantined

    assert labelled() == (9, 1)
    router, found = Router.load(picky), decisions(tmp_path / "out")
    assert [row["row"] for row in found] == [*range(9), 10]
    expected = router.predict(prompts[:9]).p_correct  # as one batch, like the shard
    np.testing.assert_allclose([list(row["p_correct"].values()) for row in found[:9]], expected, atol=1e-3)
    assert found[9]["p_correct"] == found[3]["p_correct"]
    lengths = router.tokenize(prompts[:9])[LLM].full_lengths.tolist()  # of the first encoder, before truncation
    assert [row["input_tokens"] for row in found[:9]] == lengths

    shutil.rmtree(tmp_path / "out")
    kept = str(tmp_path / "kept")
    assert labelled(activations=kept) == (10, 1)  # the sentence encoder reads the refused prompt too
    assert decisions(tmp_path / "out") == found
    assert [store.uri for store in open_stores(kept)[0].stores.values()] == [f"{kept}/{LLM}", f"{kept}/{SENTENCE}"]
    shutil.rmtree(tmp_path / "out")
    assert labelled(activations=kept) == (0, 1)  # nothing is read again
    assert decisions(tmp_path / "out") == found


# --- pipeline ----------------------------------------------------------------------------------------------------


def test_a_pipeline_publishes_a_router_of_two(
    every_encoder: None, encoders: str, small_data: Path, tmp_path: Path, command: Command
) -> None:
    data = {name: small_data / file for name, file in (("corpus", "corpus.parquet"), ("outcomes", "outcomes.parquet"))}
    file = tmp_path / "router.toml"
    file.write_text("[extract]\nshard_rows = 120\n[train]\nmax_epochs = 4\nseeds = 2\nkeep = 1\n")
    places = {name: tmp_path / name for name in ("out", "publish")}
    given = {**data, **places, "pool": small_data / "pool.toml", "encoder": encoders, "sample": 150, "draws": 20}
    plan = command("pipeline", str(file), "--plan", **given)
    assert "sample: would run, 150 prompts" in plan.err
    first = command("pipeline", str(file), **given)
    assert first.status == 0, first.err
    assert "extract: 240 prompts, 90 of them computed; 240 prompts, 90 of them computed" in first.err
    router = Router.load(str(tmp_path / "publish"))
    assert list(router.encoders) == [LLM, SENTENCE]
    stored = ActivationStore.open(f"{tmp_path}/out/activations/{LLM}").columns
    assert {column.unnamed for column in router.columns if column.encoder == LLM} <= set(stored)
    second = command("pipeline", str(file), **given)
    assert "pipeline: all steps are up to date" in second.err
