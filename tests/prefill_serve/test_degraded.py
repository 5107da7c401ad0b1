"""A router of two encoders on the endpoint, of which one fails, or cannot be loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway import gateway_of_two
from prefill_router.common.errors import UserError
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.predictor.drift import TrainingDistance
from prefill_router.router.artifact import Router
from prefill_serve import sensor_set
from prefill_serve.engine import Engine
from served import Api

CAUSAL, SENTENCE = "tiny_model", "tiny_sentence_encoder"
KINDS: dict[str, type] = {CAUSAL: PrefillEncoder, SENTENCE: SentenceEncoder}


@pytest.fixture
def two(served: Api, router_of_two: str, monkeypatch: pytest.MonkeyPatch) -> Api:
    """An endpoint whose router reads with two encoders. Missing ones are tried again every 10 ms."""
    monkeypatch.setattr(sensor_set, "_PAUSE_S", 0.01)
    monkeypatch.setattr(sensor_set, "_LONGEST_PAUSE_S", 0.01)
    served.configure(router=router_of_two)
    return served


@pytest.fixture(scope="module")
def offline(router_of_two: str) -> Router:
    return Router.load(router_of_two)


class Fault:
    """Makes the forward passes of an encoder fail until it is mended."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.is_mended, kind = False, KINDS[name]
        self.forward: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]
        patch.setattr(kind, "forward", lambda *given: self._forward(*given))

    def _forward(self, *given: Any) -> Any:
        if not self.is_mended:
            raise RuntimeError("CUDA error: out of memory")
        return self.forward(*given)

    def mend(self) -> None:
        """Returns when the encoder is in use again."""
        self.is_mended = True
        until_none_is_missing()


def until_none_is_missing() -> None:
    for thread in threading.enumerate():
        if thread.name == "encoder":
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(params=[CAUSAL, SENTENCE])
def fault(two: Api, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Fault]]:
    """The name of one of the encoders, which fails."""
    fault = Fault(monkeypatch, request.param)
    yield request.param, fault
    fault.mend()


def without(router: Router, prompt: str, name: str) -> tuple[list[float], float]:
    """P(correct) of each target, and the distance from training, by the other encoders alone."""
    features = router.features(router.read(router.tokenize([prompt])), {name})
    owners = [p.column.encoder for p in router.projections for _ in range(p.num_features)]
    own = np.array(owners) != name
    distance = TrainingDistance.of(router.kernel.landmarks[:, own])
    assert distance is not None
    return router.predict_features(features).p_correct[0].tolist(), float(distance(features[:, own])[0])


def test_the_answer_is_that_of_the_router_offline(two: Api, offline: Router) -> None:
    prompts = [f"what is {a} plus {b}" for a in range(12) for b in range(12)]
    expected = offline.predict(prompts).p_correct
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: two.post({"prompt": prompt}).json(), prompts))
    np.testing.assert_allclose([answer["confidences"] for answer in answers], expected, atol=1e-3)
    decision = offline.route(prompts[0])
    metadata = answers[0]["metadata"]
    assert answers[0]["selected_model"] == decision.target
    assert metadata["input_tokens"] == decision.input_tokens
    assert metadata["encoder"] == ", ".join(encoder.spec.model for encoder in offline.encoders.values())
    assert "missing_encoders" not in metadata
    assert two.client.get("/v1/status").json()["missing_encoders"] == {}


def test_a_failing_encoder_fails_no_request(two: Api, offline: Router, fault: tuple[str, Fault]) -> None:
    """64 requests at once. Afterwards the encoder is in use again, and no answer without it is kept."""
    name, broken = fault
    prompts = [f"name the {n} of {name}" for n in range(64)]
    with ThreadPoolExecutor(64) as pool:
        responses = list(pool.map(lambda prompt: two.post({"prompt": prompt}), prompts))
    assert {response.status_code for response in responses} == {200}
    answers = [response.json() for response in responses]
    assert all(answer["metadata"]["missing_encoders"] == [name] for answer in answers)
    assert two.client.get("/ready").status_code == 200
    assert two.client.get("/v1/router").json()["missing_encoders"] == [name]
    assert two.client.get("/v1/status").json()["missing_encoders"] == {name: "RuntimeError: CUDA error: out of memory"}
    assert [two.post({"prompt": f"name {name}"}).json()["metadata"]["is_cached"] for _ in range(2)] == [False, True]
    broken.mend()
    for prompt, degraded in zip(prompts[:5], answers, strict=False):
        p_correct, distance = without(offline, prompt, name)
        assert degraded["confidences"] == pytest.approx(p_correct, abs=1e-3)
        assert degraded["metadata"]["drift"]["distance"] == pytest.approx(distance, rel=0.01)
        answer = two.post({"prompt": prompt}).json()
        assert answer["confidences"] == pytest.approx(offline.predict([prompt]).p_correct[0], abs=1e-3)
        assert not answer["metadata"]["is_cached"]


def test_an_answer_that_one_failure_degraded_is_not_kept(two: Api, fault: tuple[str, Fault]) -> None:
    name, broken = fault
    body = {"prompt": f"name the river of {name}"}
    assert two.post(body).json()["metadata"]["missing_encoders"] == [name]
    broken.is_mended = True
    second = two.post(body).json()["metadata"]
    assert "missing_encoders" not in second
    assert not second["is_cached"]


def test_missing_encoders_are_logged_and_counted(
    two: Api, fault: tuple[str, Fault], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, broken = fault
    counted: list[str] = []
    monkeypatch.setattr(two.endpoint.metrics.degraded, "inc", lambda _count, tags: counted.append(tags["encoder"]))
    with caplog.at_level("INFO", "ray.serve"):
        for n in range(4):
            two.post({"prompt": f"what is {n} of {name}"})
        two.settle()
        broken.mend()
    assert counted == [name] * 4
    said = [(record.message, record.encoder) for record in caplog.records if hasattr(record, "encoder")]
    assert said == [
        *[("an encoder failed on a batch", name)] * 2,
        ("an encoder is missing", name),
        ("an encoder is in use again", name),
    ]
    routed = [record.missing_encoders for record in caplog.records if hasattr(record, "missing_encoders")]
    assert routed == [[name]] * 4


def test_each_encoder_has_a_distance_of_its_own(two: Api, offline: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    observed: dict[str, float] = {}
    monkeypatch.setattr(
        two.endpoint.metrics.own_distance, "observe", lambda value, tags: observed.update({tags["encoder"]: value})
    )
    two.post({"prompt": "name a big old river"})
    two.settle()
    assert observed == {
        CAUSAL: pytest.approx(without(offline, "name a big old river", SENTENCE)[1], rel=0.01),
        SENTENCE: pytest.approx(without(offline, "name a big old river", CAUSAL)[1], rel=0.01),
    }


def changed(router: Router, names: list[str], out: Path) -> str:
    """The router, as if some of its encoders were others now."""
    encoders = {
        name: identity.model_copy(update={"fingerprint": "another"}) if name in names else identity
        for name, identity in router.encoders.items()
    }
    replace(router, encoders=encoders).save(str(out))
    return str(out)


@pytest.mark.parametrize("name", [CAUSAL, SENTENCE])
def test_an_encoder_that_is_not_the_one_of_training_is_missing(
    two: Api, offline: Router, tmp_path: Path, name: str
) -> None:
    two.configure(router=changed(offline, [name], tmp_path / "router"))
    answer = two.post({"prompt": "name a river"}).json()
    assert answer["metadata"]["missing_encoders"] == [name]
    assert answer["confidences"] == pytest.approx(without(offline, "name a river", name)[0], abs=1e-3)
    assert "is not another" in two.client.get("/v1/status").json()["missing_encoders"][name]


def test_settings_without_any_encoder_are_refused(two: Api, offline: Router, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fingerprint"):
        two.configure(router=changed(offline, [CAUSAL, SENTENCE], tmp_path / "router"))
    assert two.post({"prompt": "name a river"}).status_code == 200


def test_an_engine_that_does_not_warm_up_is_closed(
    two: Api, router: str, monkeypatch: pytest.MonkeyPatch, offline: Router
) -> None:
    closed: list[dict[str, str]] = []

    async def close(engine: Engine) -> None:
        closed.append(dict(engine.sensors.sources))

    monkeypatch.setattr(Engine, "close", close)
    fault = Fault(monkeypatch, CAUSAL)
    with pytest.raises(RuntimeError, match="out of memory"):
        two.configure(router=router)
    two.settle()
    fault.is_mended = True
    assert closed == [{"": offline.encoders[CAUSAL].spec.model}]
    assert two.post({"prompt": "name a river"}).status_code == 200


def test_a_router_of_one_encoder_fails_with_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(monkeypatch, CAUSAL)
    answers = [api.post({"prompt": f"what is the sum of {n}"}) for n in range(5)]
    assert {answer.status_code for answer in answers} == {500}
    fault.is_mended = True
    assert api.post({"prompt": "what is the sum of 0"}).status_code == 200


def test_the_gateway_names_missing_encoders(
    router_of_two: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with gateway_of_two(router_of_two, tmp_path) as (gateway, _), httpx.Client(base_url=gateway.url) as client:
        body = {"model": "auto", "messages": [{"role": "user", "content": "name a river"}]}
        assert "x-router-missing-encoders" not in client.post("/v1/chat/completions", json=body).headers
        Fault(monkeypatch, SENTENCE)
        body["messages"] = [{"role": "user", "content": "name a town"}]
        answer = client.post("/v1/chat/completions", json=body).raise_for_status()
        assert answer.headers["x-router-missing-encoders"] == SENTENCE
