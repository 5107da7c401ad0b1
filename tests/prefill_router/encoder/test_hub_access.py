"""Without access to the hub a cached encoder loads, and any other is one error, without the library's retries."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ports import free_port
from prefill_router.common.errors import UserError
from prefill_router.encoder import checkpoint, hub_access
from tiny import save_tiny_model

COMMIT = "a" * 40
PAUSES = [hub_access._PAUSE_S] * (hub_access._TRIES - 1)


@pytest.fixture
def slept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of this thread, in a process whose hub is a closed port and whose cache is empty."""
    pauses: list[float] = []
    this, sleep = threading.current_thread(), time.sleep  # other tests may have left threads, such as Ray's, that sleep

    def pause(seconds: float) -> None:
        pauses.append(seconds) if threading.current_thread() is this else sleep(seconds)

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_access, "getproxies", dict)
    monkeypatch.setattr(time, "sleep", pause)
    hub_access._say_unreachable.cache_clear()
    return pauses


def load(model: str) -> checkpoint.Checkpoint:
    return checkpoint.load_causal_lm(model, None, torch.float32)


@pytest.mark.parametrize("read", [checkpoint.is_sentence_model, checkpoint.check_causal_lm, checkpoint.fetch, load])
def test_an_encoder_that_is_not_in_the_cache_is_one_error(slept: list[float], read: Callable[[str], object]) -> None:
    with pytest.raises(UserError) as error:
        read("org/tiny")
    assert str(error.value).startswith(
        f"encoder org/tiny: {constants.ENDPOINT} cannot be reached (Connection refused), and the cache of this machine "
        "does not have it: check the network, or name a directory"
    )
    assert slept == PAUSES
    assert not constants.HF_HUB_OFFLINE


def test_a_name_that_is_not_found_is_told(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(*_: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", not_found)
    with pytest.raises(UserError, match=r"cannot be reached \(Temporary failure in name resolution\)"):
        checkpoint.fetch("org/tiny")


@pytest.fixture
def cached(slept: list[float], tmp_path: Path) -> None:
    """A model of the hub in the cache, at one commit."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    save_tiny_model(repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_of_the_hub_is_identified_by_its_commit(cached: None, revision: str | None) -> None:
    """transformers no longer keeps it in the config."""
    loaded = checkpoint.load_causal_lm("org/tiny", revision, torch.float32)
    assert (loaded.weights_id, loaded.revision) == (f"org/tiny@{COMMIT}", COMMIT)


def test_an_encoder_in_the_cache_loads(cached: None, slept: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Each optional file that the cache lacks was asked for six times."""
    assert not checkpoint.is_sentence_model("org/tiny")
    assert load("org/tiny").model.config.num_hidden_layers == 4
    assert slept == 2 * PAUSES
    assert not constants.HF_HUB_OFFLINE
    said = f"{constants.ENDPOINT} cannot be reached (Connection refused): encoders are read from the cache"
    assert capsys.readouterr().err.count(said) == 1


def test_a_hub_that_may_be_reached_is_asked(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        with hub_access.cache_if_unreachable("org/tiny"):
            assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub_access, "getproxies", lambda: {"http": "http://proxy.example"})
    with hub_access.cache_if_unreachable("org/tiny"):
        assert not constants.HF_HUB_OFFLINE
    assert slept == []
