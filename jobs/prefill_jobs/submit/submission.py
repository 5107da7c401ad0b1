"""Submits jobs to a Ray cluster through its Jobs API, with their code and config; follows, stops and lists them.

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
from prefill_router.common.console import live, say, silent_stderr
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel

_REQUEST = "prefill_router_request"  # metadata key with the digest of a job's request
_POLL_S = 0.5
_PATIENCE_S = 120.0  # how long the head may be unreachable
for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)  # they log uploads and closed connections
_AWAY = (ConnectionError, requests.RequestException, aiohttp.ClientError, TimeoutError)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, given its dashboard's URL. Raises UserError if it is unreachable or refuses the token."""

    address: str

    @classmethod
    def at(cls, address: str | None) -> Cluster:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address:
            raise UserError(
                "--address is missing: give the URL of the Ray dashboard, such as http://host:8265, or local"
            )
        if not re.match(r"https?://", address):
            raise UserError(
                f'address = "{address}", must be the URL of the Ray dashboard, such as http://host:8265, or local'
            )
        cluster = cls(address)
        _ = cluster.client
        return cluster

    @property
    def client(self) -> JobSubmissionClient:
        try:
            return JobSubmissionClient(self.address, headers=_token(self.address))
        except _AWAY:
            raise UserError(f"{self.address}: no Ray dashboard answers: check the address and that Ray runs") from None
        except AuthenticationError as error:
            raise UserError(
                f"{self.address}: {_first_line(error)}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's"
            ) from None
        except RuntimeError as error:
            raise UserError(f"{self.address}: {_first_line(error)}") from None

    def find(self, submission_id: str) -> Submission:
        """Finds a submitted job. Raises UserError if there is none with this id."""
        submission = Submission(self, submission_id)
        _ = submission.details
        return submission

    def list(self) -> list[JobDetails]:
        """The submitted jobs, the latest last."""
        jobs = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)


@dataclass(frozen=True)
class Submission:
    """A submitted job."""

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
        """Stops the job and waits until it has ended. An ended job keeps its status."""
        if not self.details.status.is_terminal():
            self.cluster.client.stop_job(self.submission_id)
        return self._ended().status

    def follow(self, write: Callable[[str], Any] = sys.stdout.write) -> None:
        """Passes the job's log to `write` as it grows, until the job ends. Reconnects after a lost connection.

        Raises JobFailedError if the job did not succeed, and UserError if the head stays unreachable.
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
                        f"{self.cluster.address}: does not answer ({_first_line(error)}); the job may still run: see "
                        f"prefill-router submit logs {self.submission_id}"
                    ) from None
                await asyncio.sleep(_POLL_S)

    def _ended(self) -> JobDetails:
        while not (details := self.details).status.is_terminal():
            time.sleep(_POLL_S)
        return details


class JobFailedError(UserError):
    """A job failed or was stopped; `exit_code` is the job's exit status, or 1."""

    def __init__(self, submission_id: str, details: JobDetails) -> None:
        code = details.driver_exit_code
        self.exit_code = code if code is not None and 0 < code < 128 else 1
        said = "" if details.status == JobStatus.STOPPED else f": {_first_line(details.message or '')}"
        super().__init__(f"{submission_id}: {details.status.value}{said}")


def _token(address: str) -> dict[str, str]:
    """Headers with Ray's token for a dashboard on this machine; none for another machine, which may not be trusted.

    Once a token file exists, which `ray.init` creates, each `ray start` of this user requires the token, but Ray's
    client does not send it unless RAY_AUTH_MODE is set.
    """
    if "RAY_AUTH_MODE" in os.environ or not is_loopback(urlsplit(address).hostname or ""):
        return {}
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    token = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def submit(config: StrictModel, to: SubmitConfig) -> Submission:
    """Submits the job of `config` to a cluster, and returns once the cluster has accepted it.

    If a job with the same submission id and the same request exists, that job is returned. Raises UserError if its
    request differs, if the cluster is unreachable, or if an option has a secret's value.
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
            if known := _known(submission, request):  # submitted concurrently
                return known
            raise UserError(f"{cluster.address}: {_first_line(error)}") from None
    return submission


@retry(
    retry=retry_if_exception_message(match=".*No available agent"),  # while the head starts
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
            f"submission-id {submission.submission_id} belongs to another job ({details.entrypoint}): choose another id"
        )
    return submission


def _new_id(job: str) -> str:
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def local_head() -> Iterator[str]:
    """Runs a Ray head on this machine until the block ends; yields its dashboard's URL.

    It listens on loopback and requires a random token. SIGTERM ends it like Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    local_ray.set_environment()
    os.environ.pop("RAY_ADDRESS", None)
    # Makes `python` in a job the interpreter of this process.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    head = RayCluster()
    try:
        with live("submit: starting a Ray head on this machine"), local_ray.private(), silent_stderr():
            # Free ports: another Ray may occupy the default ones, and a head without its agent accepts no job.
            node = head.add_node(include_dashboard=True, dashboard_port=0, dashboard_agent_listen_port=0)
        say(f"submit: started a Ray head on this machine, {node.webui_url}")
        yield f"http://{node.webui_url}"
    finally:
        with live("submit: stopping the Ray head"), silent_stderr():
            head.shutdown()  # type: ignore[no-untyped-call]
