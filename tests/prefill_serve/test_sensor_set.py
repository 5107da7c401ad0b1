"""Which encoders of a router are in use while they fail and recover. The encoders are fakes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.tokenization import Tokens
from prefill_serve import sensor_set
from prefill_serve.sensor_set import SensorSet

TOKENS = Tokens([[1, 2]], np.array([2], np.int32))


class FakeSensor:
    """An encoder that raises `error`, or whose activations are all `value`."""

    num_layers = 1
    identity = SimpleNamespace(columns=lambda _layers, _pooling: [ActivationColumn("last", 1)])

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.value, self.num_calls, self.num_loads = 1.0, 0, 0

    def tokenize(self, _prompts: Any) -> Tokens:
        return TOKENS

    def forward(self, _tokens: Tokens, columns: Any) -> tuple[dict[str, Any], None]:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return {column.name: np.full((1, 2), self.value, np.float16) for column in columns}, None


class Encoders:
    """Fakes by name, whose set tries missing ones again each time that `again` is called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fakes = {name: FakeSensor() for name in "abc"}
        self.unloadable: dict[str, Exception] = {}
        self.pauses_s: list[float] = []
        self._rounds = threading.Semaphore(0)
        self._waits = threading.Semaphore(0)
        patch.setattr(sensor_set, "Event", lambda: self)

    def wait(self, pause_s: float) -> bool:
        """Stands for the wait of the background thread."""
        self.pauses_s.append(pause_s)
        self._waits.release()
        assert self._rounds.acquire(timeout=30)
        return False

    def of(self, names: str) -> SensorSet:
        return SensorSet({name: f"models/{name}" for name in names}, self.load)

    def load(self, name: str) -> Any:
        if name in self.unloadable:
            raise self.unloadable[name]
        self.fakes[name].num_loads += 1
        return self.fakes[name]

    def again(self, *, works: bool) -> None:
        """Lets the background thread try once."""
        assert self._waits.acquire(timeout=30)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "encoder"]
        self._rounds.release()
        if works:
            thread.join(30)
        else:
            assert self._waits.acquire(timeout=30)
            self._waits.release()


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> Encoders:
    return Encoders(monkeypatch)


def read(chosen: SensorSet, names: str) -> tuple[set[str], tuple[str, ...]]:
    """The columns read of a prompt that is tokenised for `names`, and the encoders left out."""
    columns = [ActivationColumn("last", 1, name) for name in chosen.sources]
    activations, missing = chosen.read(dict.fromkeys(names, TOKENS), columns)
    return set(activations), missing


def test_all_encoders_read(encoders: Encoders) -> None:
    assert read(encoders.of("ab"), "ab") == ({"a:last_001", "b:last_001"}, ())


@pytest.mark.parametrize("fault", [{"error": RuntimeError("out of memory")}, {"value": np.nan}])
def test_an_encoder_that_fails_is_left_out_of_the_batch(encoders: Encoders, fault: dict[str, Any]) -> None:
    chosen = encoders.of("ab")
    vars(encoders.fakes["a"]).update(fault)
    assert read(chosen, "ab") == ({"b:last_001"}, ("a",))
    assert chosen.missing == ()
    vars(encoders.fakes["a"]).update(error=None, value=1.0)
    assert read(chosen, "ab")[1] == ()


def test_an_encoder_that_keeps_failing_is_not_asked_until_it_works(encoders: Encoders) -> None:
    chosen, fake = encoders.of("ab"), encoders.fakes["a"]
    fake.error = RuntimeError("out of memory")
    for _ in range(10):
        assert read(chosen, "ab") == ({"b:last_001"}, ("a",))
    assert fake.num_calls == 3
    assert chosen.reasons == {"a": "RuntimeError: out of memory"}
    assert list(chosen.tokenize("one")) == ["b"]
    fake.error = None
    encoders.again(works=True)
    assert (chosen.missing, chosen.reasons) == ((), {})
    assert list(chosen.in_use) == ["a", "b"]
    assert read(chosen, "ab")[1] == ()
    assert fake.num_loads == 1  # it was kept


def test_failures_count_in_a_row_only(encoders: Encoders) -> None:
    chosen, fake = encoders.of("ab"), encoders.fakes["a"]
    for error in [RuntimeError("x"), RuntimeError("x"), None] * 3:
        fake.error = error
        read(chosen, "ab")
    assert chosen.missing == ()


def test_pauses_grow_and_an_encoder_that_fails_again_is_loaded_anew(encoders: Encoders) -> None:
    chosen, fake = encoders.of("ab"), encoders.fakes["a"]
    fake.error = RuntimeError("out of memory")
    for _ in range(3):
        read(chosen, "ab")
    for _ in range(8):
        encoders.again(works=False)
    fake.error = None
    encoders.again(works=True)
    assert encoders.pauses_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert fake.num_loads == 9
    assert chosen.missing == ()


def test_an_encoder_that_cannot_be_loaded_is_missing_until_it_can(encoders: Encoders) -> None:
    encoders.unloadable = {"b": UserError("b: encoder fingerprint 1 is not 2")}
    chosen = encoders.of("abc")
    assert chosen.reasons == {"b": "UserError: b: encoder fingerprint 1 is not 2"}
    assert read(chosen, "ac") == ({"a:last_001", "c:last_001"}, ("b",))
    encoders.unloadable = {"b": UserError("no such directory")}
    encoders.again(works=False)
    assert chosen.reasons == {"b": "UserError: no such directory"}
    encoders.unloadable = {}
    encoders.again(works=True)
    assert list(chosen.in_use) == ["a", "b", "c"]
    assert read(chosen, "ac")[1] == ("b",)  # of a prompt that was tokenised before
    assert read(chosen, "abc")[1] == ()


@pytest.mark.parametrize("names", ["a", "ab"])
def test_without_any_encoder_loading_fails(encoders: Encoders, names: str) -> None:
    encoders.unloadable = {name: UserError(f"{name}: no such directory") for name in names}
    with pytest.raises(UserError, match="a: no such directory"):
        encoders.of(names)


def test_without_any_encoder_reading_fails_and_the_last_one_stays_in_use(encoders: Encoders) -> None:
    chosen = encoders.of("ab")
    for fake in encoders.fakes.values():
        fake.error = RuntimeError("out of memory")
    for _ in range(5):
        with pytest.raises(RuntimeError, match="out of memory"):
            read(chosen, "ab")
    assert chosen.missing == ("a",)
    encoders.fakes["b"].error = None
    assert read(chosen, "b") == ({"b:last_001"}, ("a",))
    encoders.fakes["a"].error = None
    encoders.again(works=True)


def test_a_single_encoder_has_nothing_to_give_way_to(encoders: Encoders) -> None:
    chosen = encoders.of("a")
    encoders.fakes["a"].error = RuntimeError("out of memory")
    for _ in range(5):
        with pytest.raises(RuntimeError, match="out of memory"):
            read(chosen, "a")
    encoders.fakes["a"].error, encoders.fakes["a"].value = None, np.nan
    assert read(chosen, "a") == ({"a:last_001"}, ())


def test_no_encoder_is_tried_again_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSensor()
    loads: dict[str, Callable[[], Any]] = {"a": lambda: fake, "b": lambda: 1 / 0}
    chosen = SensorSet({"a": "models/a", "b": "models/b"}, lambda name: loads[name]())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "encoder"]
    chosen.close()
    thread.join(30)
    assert not thread.is_alive()
    assert chosen.reasons == {"b": "ZeroDivisionError: division by zero"}
