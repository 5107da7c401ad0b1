"""Leases on real storage, contended by threads and processes, and after a SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import prefill_router
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.storage import lease as lease_module
from prefill_router.storage.lease import Holder, Lease

SOURCE_ROOT = str(Path(prefill_router.__file__).parents[1])
# Tries to acquire the lease when it reads a line, prints the result, and releases the lease when its input ends.
CONTENDER = """
import sys
from prefill_router.common.errors import UserError
from prefill_router.storage.lease import Lease
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease.acquire(sys.argv[1], "extract"):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""
Contender = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[Callable[[str], Contender]]:
    """Starts a process that contends for the lease on an output, and waits until it is ready."""
    started: list[Contender] = []

    def start_one(out: str) -> Contender:
        environment = {**os.environ, "PYTHONPATH": SOURCE_ROOT}
        command = [sys.executable, "-c", CONTENDER, out]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        assert answer(process) == "ready"
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def answer(process: Contender) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: Contender) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")


def record_path(out: str, number: int) -> str:
    return storage.join(out, "_lease", f"{number:06d}.json")


def leave_lease(out: str, number: int = 1, **changes: object) -> None:
    """Writes the lease that another process left behind; without `changes`, it is this process's."""
    holder = Holder.this_process("extract").model_copy(update=changes)
    storage.write_json(record_path(out, number), holder.model_dump(mode="json"))


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def numbers(out: str) -> list[str]:
    return storage.list_names(storage.join(out, "_lease"))


def race(out: str, runners: int) -> list[Lease]:
    """Returns the leases acquired by `runners` threads that try at the same time."""
    barrier = threading.Barrier(runners)

    def run(_runner: int) -> Lease | None:
        barrier.wait()
        try:
            return Lease.acquire(out, "extract")
        except UserError:
            return None

    with ThreadPoolExecutor(runners) as pool:
        return [lease for lease in pool.map(run, range(runners)) if lease]


# --- one at a time -----------------------------------------------------------------------------------------------


def test_the_second_contender_is_told_who_holds_the_lease(root: str) -> None:
    leave_lease(root, host="node-7", machine="another", pid=4711, since=datetime(2026, 1, 2, 14, 3, 12, tzinfo=UTC))
    message = (
        r"another extract is writing here \(host node-7, pid 4711, since 14:03:12 UTC, last renewed \d s ago\): "
        r"wait for it, or choose another --out$"
    )
    with pytest.raises(UserError, match=f"^{root}: {message}"):
        Lease.acquire(root, "extract")


def test_a_process_cannot_acquire_its_own_lease_again(root: str) -> None:
    with Lease.acquire(root, "extract"), pytest.raises(UserError, match=f"another extract.* pid {os.getpid()}, "):
        Lease.acquire(root, "extract")


def test_a_released_lease_is_free_at_once(root: str) -> None:
    first = Lease.acquire(root, "extract")
    first.check()
    first.release()
    first.release()
    with Lease.acquire(root, "label") as second:
        second.check()
    with Lease.acquire(root, "extract"):
        pass


def test_an_error_releases_too(root: str) -> None:
    with pytest.raises(ZeroDivisionError), Lease.acquire(root, "extract"):
        raise ZeroDivisionError
    Lease.acquire(root, "extract").release()


def test_only_one_record_is_left_below_the_output(root: str) -> None:
    for _ in range(3):
        Lease.acquire(root, "extract").release()
    assert storage.list_names(root) == ["_lease"]
    assert numbers(root) == ["000003.json"]


def test_of_racing_threads_one_gets_it(root: str) -> None:
    for _ in range(5):
        [winner] = race(root, runners=6)
        winner.check()
        winner.release()


def test_of_racing_processes_one_gets_it(root: str, start: Callable[[str], Contender]) -> None:
    contenders = [start(root) for _ in range(4)]
    for contender in contenders:
        go(contender)
    answers = [answer(contender) for contender in contenders]
    assert answers.count("held") == 1
    winner = contenders[answers.index("held")]
    others = [text for text in answers if text != "held"]
    assert all(f"{root}: another extract is writing here" in text and f"pid {winner.pid}," in text for text in others)


# --- dead holders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reaped", [True, False])
def test_the_lease_of_a_killed_process_is_free_at_once(
    root: str, start: Callable[[str], Contender], is_reaped: bool
) -> None:
    holder = start(root)
    go(holder)
    assert answer(holder) == "held"
    with pytest.raises(UserError, match=f"pid {holder.pid}, "):
        Lease.acquire(root, "extract")
    holder.send_signal(signal.SIGKILL)
    # A child that is not reaped is a zombie, which keeps its pid.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | (0 if is_reaped else os.WNOWAIT))
    with Lease.acquire(root, "extract") as lease:
        lease.check()


def test_a_process_that_got_the_number_of_a_dead_one_is_not_it(root: str) -> None:
    leave_lease(root, started=1)
    Lease.acquire(root, "extract").release()


def test_a_process_number_of_another_machine_says_nothing(root: str, start: Callable[[str], Contender]) -> None:
    """Containers may share a host's name, but not its pids."""
    ended = start(root)
    ended.kill()
    ended.wait()
    leave_lease(root, machine="another", pid=ended.pid)
    with pytest.raises(UserError, match="is writing here"):
        Lease.acquire(root, "extract")


def test_a_holder_that_has_not_renewed_for_a_minute_is_dead(root: str) -> None:
    leave_lease(root, machine="another", renewed=ago(50))
    with pytest.raises(UserError, match=r"last renewed 5\d s ago"):
        Lease.acquire(root, "extract")
    leave_lease(root, machine="another", renewed=ago(61))
    Lease.acquire(root, "extract").release()


def test_a_clock_that_is_ahead_is_alive(root: str) -> None:
    leave_lease(root, machine="another", renewed=ago(-20))
    with pytest.raises(UserError, match="last renewed 0 s ago"):
        Lease.acquire(root, "extract")


def test_of_many_that_find_it_expired_one_gets_it(root: str) -> None:
    leave_lease(root, number=7, machine="another", renewed=ago(100))
    [winner] = race(root, runners=8)
    winner.check()
    assert numbers(root) == ["000008.json"]


def test_a_contender_with_an_outdated_view_gets_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender is suspended after it saw a free lease; meanwhile, one holder released it and another acquired it."""
    look = lease_module._current
    Lease.acquire(root, "extract").release()
    with Lease.acquire(root, "extract") as lease:
        views = iter([(0, None)])
        monkeypatch.setattr(lease_module, "_current", lambda out: next(views, None) or look(out))
        with pytest.raises(UserError, match="is writing here"):
            Lease.acquire(root, "extract")
        assert numbers(root) == ["000002.json"]
        lease.check()


def test_a_lost_response_to_the_creation_does_not_lose_the_lease(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = storage.create_bytes
    monkeypatch.setattr(storage, "create_bytes", lambda *arguments: create(*arguments) and False)
    with Lease.acquire(root, "extract") as lease:
        lease.check()


# --- live holders ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)


def wait_until(happened: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except UserError:
        return True
    return False


def test_a_lease_is_renewed_while_it_is_held(quick: None, root: str) -> None:
    def renewed() -> datetime:
        return Holder.model_validate(storage.read_json(record_path(root, 1))).renewed

    with Lease.acquire(root, "extract") as lease:
        first = renewed()
        wait_until(lambda: renewed() > first)
        lease.check()


def test_a_holder_that_was_taken_for_dead_finds_out(quick: None, root: str) -> None:
    lease = Lease.acquire(root, "extract")
    leave_lease(root, number=2, host="node-7")
    wait_until(lambda: is_lost(lease))
    with pytest.raises(UserError, match=f"^{root}: another extract has taken over .*node-7.*: this extract stops"):
        lease.check()
    lease.release()
    assert not Holder.model_validate(storage.read_json(record_path(root, 2))).released


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_suspended_holder_checks_the_lease_before_it_continues(
    root: str, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    lease = Lease.acquire(root, "extract")
    monkeypatch.setattr(lease_module, "EXPIRES_S", 0.0)
    if is_taken:
        leave_lease(root, number=2)
    assert is_lost(lease) is is_taken
    lease.release()


def test_a_lease_whose_record_is_deleted_is_lost(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease.acquire(root, "extract")
    storage.remove(storage.join(root, "_lease"))
    lease.check()
    monkeypatch.setattr(lease_module, "EXPIRES_S", 0.0)
    with pytest.raises(UserError, match="the lease was deleted"):
        lease.check()
    lease.release()


def test_storage_may_fail_for_a_while(quick: None, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    def fail(*_arguments: object) -> None:
        failures.append(time.monotonic())
        raise OSError("storage is away")

    with Lease.acquire(root, "extract") as lease:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "list_names", fail)
            wait_until(lambda: len(failures) > 2)
            lease.check()
            patch.setattr(lease_module, "EXPIRES_S", 0.0)  # simulates a failure of a minute
            with pytest.raises(UserError, match=r"could not be renewed for .*: storage is away"):
                lease.check()
        lease.check()  # no other process has taken over
