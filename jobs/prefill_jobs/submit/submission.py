"""Jobs on a Ray cluster, through its Jobs API: sent with their code and config, followed, stopped, listed.

submission = submit(ExtractConfig(...), SubmitConfig(address="http://ray-head:8265"))
submission.follow()
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.cluster_utils import Cluster as RayCluster
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_fixed

from prefill_jobs.options import SubmitConfig
from prefill_jobs.runtime import local_ray
from prefill_jobs.submit.submit_request import SubmitRequest
from prefill_jobs.submit.wheel import write_wheel
from prefill_router.common.addresses import is_loopback
from prefill_router.common.console import say, silent_stderr
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel

_REQUEST = "prefill_router_request"  # in a job's metadata: its request's digest
_POLL_S = 0.5
_PATIENCE_S = 120.0  # with a head that does not answer
for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)  # they tell of uploads and closed connections
_AWAY = (ConnectionError, requests.RequestException, aiohttp.ClientError, TimeoutError)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster by its dashboard's address. Raises UserError where nothing answers, or not to us."""

    address: str

    @classmethod
    def at(cls, address: str | None) -> Cluster:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address:
            raise UserError("address: give the cluster's dashboard, as http://host:8265, or local")
        if not re.match(r"https?://", address):
            raise UserError(f'address = "{address}", must be the dashboard\'s, as http://host:8265, or local')
        cluster = cls(address)
        _ = cluster.client
        return cluster

    @property
    def client(self) -> JobSubmissionClient:
        try:
            return JobSubmissionClient(self.address, headers=_token(self.address))
        except _AWAY:
            raise UserError(f"{self.address}: no Ray dashboard answers there") from None
        except AuthenticationError as error:
            raise UserError(
                f"{self.address}: {_first_line(error)}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's"
            ) from None
        except RuntimeError as error:
            raise UserError(f"{self.address}: {_first_line(error)}") from None

    def find(self, submission_id: str) -> Submission:
        """Raises UserError where there is no such job."""
        submission = Submission(self, submission_id)
        _ = submission.details
        return submission

    def list(self) -> list[JobDetails]:
        """The jobs that were submitted, the latest last."""
        jobs = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)


@dataclass(frozen=True)
class Submission:
    """A job on a cluster."""

    cluster: Cluster
    submission_id: str

    @property
    def details(self) -> JobDetails:
        try:
            return self.cluster.client.get_job_info(self.submission_id)
        except RuntimeError as error:
            if "404" in str(error):
                raise UserError(f"{self.submission_id}: no such job at {self.cluster.address}") from None
            raise UserError(f"{self.cluster.address}: {_first_line(error)}") from None

    @property
    def logs(self) -> str:
        return str(self.cluster.client.get_job_logs(self.submission_id))

    def stop(self) -> JobStatus:
        """Asks the job to end, and waits until it has. One that has ended stays as it is."""
        if not self.details.status.is_terminal():
            self.cluster.client.stop_job(self.submission_id)
        return self._ended().status

    def follow(self, write: Callable[[str], Any] = sys.stdout.write) -> None:
        """Hands the job's log to `write` as it grows, until the job has ended. A lost connection is taken up again.

        Raises JobFailedError where the job did not succeed, UserError where the head stays away.
        """
        details = asyncio.run(self._follow(write))
        if details.status != JobStatus.SUCCEEDED:
            raise JobFailedError(self.submission_id, details)

    async def _follow(self, write: Callable[[str], Any]) -> JobDetails:
        written, lost_at = 0, None
        while True:
            try:
                position = 0
                async for text in self.cluster.client.tail_job_logs(self.submission_id):  # from its beginning
                    new = text[max(0, written - position) :]
                    position += len(text)
                    written, lost_at = max(written, position), None
                    if new:
                        write(new)
                return self._ended()
            except (*_AWAY, RuntimeError, UserError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _PATIENCE_S:
                    raise UserError(
                        f"{self.cluster.address}: does not answer ({_first_line(error)}); the job may go on: see "
                        f"prefill-router submit logs {self.submission_id}"
                    ) from None
                await asyncio.sleep(_POLL_S)

    def _ended(self) -> JobDetails:
        while not (details := self.details).status.is_terminal():
            time.sleep(_POLL_S)
        return details


class JobFailedError(UserError):
    """A job that failed or was stopped; `exit_code` is its own, or 1."""

    def __init__(self, submission_id: str, details: JobDetails) -> None:
        code = details.driver_exit_code
        self.exit_code = code if code is not None and 0 < code < 128 else 1
        said = "" if details.status == JobStatus.STOPPED else f": {_first_line(details.message or '')}"
        super().__init__(f"{submission_id}: {details.status.value}{said}")


def _token(address: str) -> dict[str, str]:
    """Headers with Ray's token, for a dashboard of this machine.

    Once the file of a token exists, which `ray.init` makes, each `ray start` of this user asks for it, but Ray's client
    does not send it unless RAY_AUTH_MODE says so. Neither does this one to another machine, which may be anybody's.
    """
    if "RAY_AUTH_MODE" in os.environ or not is_loopback(urlsplit(address).hostname or ""):
        return {}
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    token = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def submit(config: StrictModel, to: SubmitConfig) -> Submission:
    """Sends a job to a cluster: `config` says which, as that of the command. Returns once the cluster has taken it.

    A submission id that is known there is not run again: the job that has it is returned, where it is the same
    request. Raises UserError where it is another, where no cluster answers, and for a secret's value.
    """
    request = SubmitRequest.of(config, to)
    cluster = Cluster.at(to.address)
    submission = Submission(cluster, to.submission_id or _new_id(request.job))
    if to.submission_id and (known := _known(submission, request)):
        return known
    with tempfile.TemporaryDirectory() as folder:
        try:
            _send(cluster.client, submission.submission_id, request, to, Path(folder))
        except RuntimeError as error:
            if known := _known(submission, request):  # somebody else was faster
                return known
            raise UserError(f"{cluster.address}: {_first_line(error)}") from None
    return submission


@retry(
    retry=retry_if_exception_message(match=".*No available agent"),  # as long as the head is young
    stop=stop_after_delay(_PATIENCE_S),
    wait=wait_fixed(_POLL_S),
    reraise=True,
)
def _send(client: JobSubmissionClient, name: str, request: SubmitRequest, to: SubmitConfig, folder: Path) -> None:
    write_wheel(folder)
    for file, data in request.files.items():
        (folder / file).write_bytes(data)
    client.submit_job(
        entrypoint=request.entrypoint,
        submission_id=name,
        runtime_env={"working_dir": str(folder), "env_vars": request.env},
        metadata={_REQUEST: request.digest},
        entrypoint_num_cpus=to.driver_cpus,
        entrypoint_memory=None if to.driver_memory_gib is None else int(to.driver_memory_gib * 2**30),
    )


def _known(submission: Submission, request: SubmitRequest) -> Submission | None:
    try:
        details = submission.details
    except UserError:
        return None
    if (details.metadata or {}).get(_REQUEST) != request.digest:
        raise UserError(
            f"submission-id {submission.submission_id} is that of another job ({details.entrypoint}): choose another"
        )
    return submission


def _new_id(job: str) -> str:
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def local_head() -> Iterator[str]:
    """A Ray of this machine's own for as long as the block lasts; yields its dashboard's address.

    It listens on loopback, and answers those alone who know a token that is made for it.
    SIGTERM ends it, as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    local_ray.set_environment()
    os.environ.pop("RAY_ADDRESS", None)
    # A job's `python` is to be that of this process.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    head = RayCluster()
    try:
        with local_ray.private(), silent_stderr():
            # Ports that are free: another Ray may have the usual ones, and a head without its agent takes no job.
            node = head.add_node(include_dashboard=True, dashboard_port=0, dashboard_agent_listen_port=0)
        say(f"submit: a Ray head on this machine, {node.webui_url}")
        yield f"http://{node.webui_url}"
    finally:
        with silent_stderr():
            head.shutdown()  # type: ignore[no-untyped-call]
