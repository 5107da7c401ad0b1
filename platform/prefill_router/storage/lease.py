"""A lease that keeps one writer at a time on an output: its holder renews it, and others take it over when it expires.

It avoids duplicate work and tells a user who else is writing. Correctness does not depend on it: objects are named by
their content and created only if they do not exist, so that two writers do no harm.

`<output>/_lease/` holds numbered records; the one with the highest number is the lease. Only the process that created
a record changes it. Taking over means creating the next number, which succeeds for one contender. The highest record
is never deleted, not even on release, so that no number is used twice.

A holder counts as dead if its process on this machine has ended, or if its last renewal is `EXPIRES_S` old by the
reader's clock. Clocks are assumed to agree within half a minute. A live holder that is taken for dead notices when it
next renews.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime

from prefill_router import storage
from prefill_router.common import validation
from prefill_router.common.errors import UserError

RENEW_S = 10.0
EXPIRES_S = 60.0
_FOLDER = "_lease"


class Holder(validation.StrictModel):
    """The record of a lease: the process that holds it, and when it was last renewed."""

    id: str
    job: str
    host: str
    machine: str  # distinguishes hosts and containers of the same name
    pid: int
    started: int  # start of the process in clock ticks since boot: pids are reused
    since: AwareDatetime
    renewed: AwareDatetime
    released: bool = False

    @classmethod
    def this_process(cls, job: str) -> Holder:
        now, pid = datetime.now(UTC), os.getpid()
        return cls(
            id=uuid.uuid4().hex,
            job=job,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            started=_started(pid),
            since=now,
            renewed=now,
        )

    @property
    def age_s(self) -> float:
        """Time since the last renewal; 0 if the holder's clock is ahead."""
        return max(0.0, (datetime.now(UTC) - self.renewed).total_seconds())

    @property
    def is_over(self) -> bool:
        return self.released or self.age_s > EXPIRES_S or self._has_ended()

    def _has_ended(self) -> bool:
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return (
            f"host {self.host}, pid {self.pid}, since {self.since.astimezone(UTC):%H:%M:%S} UTC, "
            f"last renewed {self.age_s:.0f} s ago"
        )


class Lease:
    """A lease held from `acquire` until `release` or the end of a `with` block; a thread renews it every `RENEW_S`."""

    def __init__(self, uri: str, number: int, holder: Holder) -> None:
        self._uri, self._number, self._holder = uri, number, holder
        self._lost = ""  # why the lease was lost; empty while it is held
        self._renewed_at = time.monotonic()
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, uri: str, job: str) -> Lease:
        """Acquires the lease on the output at `uri`. Raises UserError if another process, or this one, holds it."""
        holder = Holder.this_process(job)
        while True:
            number, other = _current(uri)
            if other is not None and not other.is_over:
                raise UserError(
                    f"{uri}: another {other.job} is writing here ({other}): wait for it, or choose another --out"
                )
            if _claim(uri, number + 1, holder):
                return cls(uri, number + 1, holder)

    def check(self) -> None:
        """Raises UserError if another process took over, or may have; while renewals succeed, only reads a clock."""
        if not self._lost and self._since_renewal_s > EXPIRES_S:
            try:
                self._renew()  # this process was suspended, or the storage failed
            except OSError as error:
                raise UserError(
                    f"{self._uri}: the lease could not be renewed for {self._since_renewal_s:.0f} s, so another "
                    f"{self._holder.job} may be writing here: run it again when the storage responds: {error}"
                ) from error
        if self._lost:
            raise UserError(self._lost)

    def release(self) -> None:
        """Frees the lease for others. If the storage fails, it is free when it expires."""
        self._ended.set()
        if self._lost or self._since_renewal_s > EXPIRES_S / 2:
            return
        self._thread.join()  # otherwise its last renewal might undo the release
        with suppress(OSError):
            _write(self._uri, self._number, self._holder.model_copy(update={"released": True}))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    @property
    def _since_renewal_s(self) -> float:
        return time.monotonic() - self._renewed_at

    def _keep(self) -> None:
        while not self._lost and not self._ended.wait(RENEW_S):
            with suppress(OSError, UserError):  # `check` raises if this lasts too long
                self._renew()

    def _renew(self) -> None:
        with self._renewing:
            now = time.monotonic()
            number, other = _current(self._uri)
            if number != self._number:
                what = f"another {other.job} has taken over ({other})" if other else "the lease was deleted"
                self._lost = f"{self._uri}: {what}: this {self._holder.job} stops"
                return
            _write(self._uri, self._number, self._holder.model_copy(update={"renewed": datetime.now(UTC)}))
            self._renewed_at = now


def was_held(uri: str) -> bool:
    """Whether a job ever wrote to the output at `uri`."""
    return bool(_numbers(uri))


def _current(uri: str) -> tuple[int, Holder | None]:
    """Returns the highest number and its record, or 0 and None if there never was a lease."""
    while numbers := _numbers(uri):
        with suppress(FileNotFoundError):  # superseded and deleted since
            return max(numbers), _read(uri, max(numbers))
    return 0, None


def _claim(uri: str, number: int, holder: Holder) -> bool:
    """Tries to create record `number`; returns whether the lease is `holder`'s now."""
    if not _create(uri, number, holder):
        return False
    numbers = _numbers(uri)
    if max(numbers, default=0) != number:
        # A process that listed the numbers long ago can create one that was used and deleted since.
        storage.remove(_path(uri, number))
        return False
    for past in set(numbers) - {number}:
        storage.remove(_path(uri, past))
    return True


def _create(uri: str, number: int, holder: Holder) -> bool:
    if storage.create_bytes(_path(uri, number), holder.model_dump_json().encode()):
        return True
    try:
        return _read(uri, number).id == holder.id  # true if the response to the first attempt was lost
    except FileNotFoundError:
        return False


def _numbers(uri: str) -> list[int]:
    stems = (name.removesuffix(".json") for name in storage.list_names(storage.join(uri, _FOLDER)))
    return [int(stem) for stem in stems if stem.isdecimal()]


def _path(uri: str, number: int) -> str:
    return storage.join(uri, _FOLDER, f"{number:06d}.json")


def _read(uri: str, number: int) -> Holder:
    path = _path(uri, number)
    return validation.validate(Holder, storage.read_json(path), path)


def _write(uri: str, number: int, holder: Holder) -> None:
    storage.write_json(_path(uri, number), holder.model_dump(mode="json"))


def _machine() -> str:
    """Identifies this boot of this machine and its pid namespace; empty outside Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it does not run, or outside Linux."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])
