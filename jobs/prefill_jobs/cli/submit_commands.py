"""`prefill-router submit`: runs a job on a Ray cluster, and shows, follows or stops submitted jobs."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from prefill_jobs.cli.flags import Read, add_command
from prefill_jobs.options import JOBS, SubmitConfig
from prefill_router.common.console import clear, live, say
from prefill_router.common.errors import UserError

if TYPE_CHECKING:
    from prefill_jobs.submit.submission import Submission

_Id = Annotated[str, typer.Argument(help="Submission id of the job")]
_Address = Annotated[
    str | None,
    typer.Option(help="URL of the Ray dashboard, such as http://host:8265 \\[default: RAY_API_SERVER_ADDRESS]"),
]
_QUIET_S = 10.0  # longer than a job that runs is ever silent
_FAILED = ("FAILED", "STOPPED")


def add_submit(app: typer.Typer, jobs: Sequence[str]) -> None:
    """Adds the command group `submit` to `app`, with a command for each of `jobs`."""
    group = typer.Typer(
        help="Run a job on a Ray cluster through its Jobs API. Sends this code and the options, but no secrets.",
        no_args_is_help=True,
    )
    for job in jobs:
        add_command(group, job, {job: JOBS[job], "submit": SubmitConfig}, _submit)
    for name, run in (("status", _status), ("logs", _logs), ("stop", _stop), ("list", _list)):
        group.command(name)(run)
    app.add_typer(group, name="submit")


def _submit(read_job: Read, read_submit: Read) -> None:
    config, submit = read_job(), read_submit()
    if submit.address != "local":
        _run(config, submit)
        return
    if submit.detach:
        raise UserError("--detach: a local Ray ends with this command: omit --detach, or give a cluster's --address")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads both variables when it is imported
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with live("submit: starting"):
        from prefill_jobs.submit.submission import local_head

    with local_head() as address:
        _run(config, submit.model_copy(update={"address": address}), is_local=True)


def _run(config: object, submit: SubmitConfig, *, is_local: bool = False) -> None:
    with live("submit: sending the job"):
        from prefill_jobs.submit import submission

        job = submission.submit(config, submit)  # type: ignore[arg-type]
    say(f"submit: {job.submission_id} at {job.cluster.address}")
    if submit.detach:
        typer.echo(job.submission_id)
    else:
        _follow(job, is_local=is_local)


def _follow(job: Submission, *, is_local: bool = False) -> None:
    log = _Log(job.submission_id)
    try:
        with live(log.waiting):
            job.follow(log.write)
    except KeyboardInterrupt:
        if is_local:
            raise UserError(
                f"{job.submission_id} was stopped with its local Ray: run the command again to resume it"
            ) from None
        again = f"prefill-router submit logs {job.submission_id} --follow"
        raise UserError(
            f"{job.submission_id} is still running: follow it with {again}, or end it with submit stop"
        ) from None


class _Log:
    """Forwards a job's log, and prints a status line if the log has been silent for a while."""

    def __init__(self, submission_id: str) -> None:
        self.submission_id, self._heard_at = submission_id, time.monotonic()

    def write(self, text: str) -> None:
        self._heard_at = time.monotonic()
        clear()
        typer.echo(text, nl=False)

    def waiting(self) -> str:
        quiet_s = time.monotonic() - self._heard_at
        if quiet_s < _QUIET_S:
            return ""
        return f"submit: no new line in the job's log for {quiet_s:.0f} s: see submit status {self.submission_id}"


def _find(submission_id: str, address: str | None) -> Submission:
    from prefill_jobs.submit.submission import Cluster

    return Cluster.at(address).find(submission_id)


def _status(submission_id: _Id, address: _Address = None) -> None:
    """Print a job's status. The exit status is 1 if it failed or was stopped."""
    details = _find(submission_id, address).details
    typer.echo(details.status.value)
    if details.status.value in _FAILED:
        raise typer.Exit(1)


def _logs(
    submission_id: _Id,
    address: _Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow the log until the job ends, and exit with the job's exit status")
    ] = False,
) -> None:
    """Print a job's log."""
    job = _find(submission_id, address)
    if follow:
        _follow(job)
    else:
        typer.echo(job.logs, nl=False)


def _stop(submission_id: _Id, address: _Address = None) -> None:
    """Stop a job. Committed shards stay, and the same job resumes from them."""
    typer.echo(_find(submission_id, address).stop().value)


def _list(address: _Address = None) -> None:
    """Print the cluster's jobs, the latest last: id, status, duration in seconds, command."""
    from prefill_jobs.submit.submission import Cluster

    for job in Cluster.at(address).list():
        end_ms = job.end_time or time.time() * 1000
        seconds = (end_ms - (job.start_time or end_ms)) / 1000
        typer.echo(f"{job.submission_id}  {job.status.value:<9}  {seconds:7.0f} s  {job.entrypoint}")
