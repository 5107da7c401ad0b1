"""A request that ended two replicas is refused by the third, and noted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from prefill_serve.middleware import attempts
from prefill_serve.middleware.attempts import HEADER, RequestAttempts, TooManyDeaths
from served import Api

NAME = "9add5bba-dd59-478f-9c91-0c4edf851617"


def deaths(folder: Path, count: int) -> Path:
    """What replicas leave that die while they have the request."""
    file = folder / NAME
    file.write_bytes(b"17\n" * count)
    return file


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_request_is_tried_until_it_has_ended_two_replicas(tmp_path: Path, earlier: int) -> None:
    file = deaths(tmp_path, earlier)
    with RequestAttempts(tmp_path).begun(NAME, "r-1"):
        assert file.read_bytes().count(b"\n") == earlier + 1
    assert not file.exists()


def test_the_third_attempt_is_refused_and_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = deaths(tmp_path, 2)
    with pytest.raises(TooManyDeaths), RequestAttempts(tmp_path).begun(NAME, "r-1"):
        pytest.fail("it was begun")
    (record,) = caplog.records
    noted = (record.levelname, record.message, vars(record)["route_id"], vars(record)["deaths"])
    assert noted == ("ERROR", "request ended replicas", "r-1", 2)
    assert not file.exists()


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_one_that_fails_or_whose_caller_leaves_has_ended_no_replica(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), RequestAttempts(tmp_path).begun(NAME, "r-1"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "", "../x", "/etc/passwd", NAME + "0", NAME[:-1] + "/"])
def test_what_is_no_name_of_haproxys_is_not_counted(tmp_path: Path, name: str | None) -> None:
    with RequestAttempts(tmp_path).begun(name, "r-1"):
        assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(attempts.FOLDER, raising=False)
    with RequestAttempts.of_environment().begun(NAME, "r-1"):
        pass


def test_a_folder_that_takes_nothing_stops_no_request(tmp_path: Path) -> None:
    counted = RequestAttempts(tmp_path / "full")
    (tmp_path / "full").rmdir()
    with counted.begun(NAME, "r-1"):
        pass


def test_the_endpoint_answers_500_that_is_not_to_be_repeated(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.client.app, "attempts", RequestAttempts(tmp_path))
    for earlier, status in ((1, 200), (2, 500), (0, 200)):
        deaths(tmp_path, earlier)
        answer = api.post({"prompt": "what is one plus two"}, headers={HEADER: NAME})
        assert answer.status_code == status
    deaths(tmp_path, 2)
    answer = api.post({"prompt": "what is one plus two"}, headers={HEADER: NAME, "x-request-id": "r-2"})
    assert (answer.json()["error"]["code"], answer.headers["x-should-retry"]) == ("replicas_lost", "false")
    assert answer.headers["x-request-id"] == "r-2"
