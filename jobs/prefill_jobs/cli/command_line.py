"""The `prefill-router` command. Every flag, with its help, is a field of the command's config model.

Exit status: 0 on success; 1 after an error; 2 after a usage error. Each is one line on stderr. A submitted job that
fails sets its own exit status.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from botocore.exceptions import BotoCoreError

from prefill_jobs.cli.commands import COMMANDS
from prefill_jobs.cli.flags import Read, add_command
from prefill_jobs.cli.ray_commands import refuse_ray_commands
from prefill_jobs.cli.submit_commands import add_submit
from prefill_jobs.cli.usage_errors import TyperUsageError, usage_error
from prefill_jobs.options import JOBS, command_options
from prefill_jobs.submit.submit_request import require_secrets
from prefill_router.common.console import live, say
from prefill_router.common.errors import UserError

_PROGRAM = "prefill-router"
_HELP = "Routes each prompt to the cheapest model that will answer it, by a small LLM's prefill activations."


def main(arguments: list[str] | None = None) -> None:
    """Runs `arguments`, by default those of the process, and exits. Errors are one line on stderr."""
    with _reported():
        refuse_ray_commands(sys.argv[1:] if arguments is None else arguments)
        require_secrets()
        try:
            sys.exit(build_app()(arguments, prog_name=_PROGRAM, standalone_mode=False))
        except TyperUsageError as error:
            raise usage_error(error, _PROGRAM) from None


@contextmanager
def _reported() -> Iterator[None]:
    """Prints a user's error as one line and exits."""
    try:
        yield
    except (UserError, OSError, BotoCoreError) as error:
        say(f"prefill-router: {' '.join(str(error).split())}")
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name=_PROGRAM,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(help=_HELP)(_root)
    for name, run in _JOBS.items():
        add_command(app, name, {name: JOBS[name]}, partial(_run_job, name, run))
    add_submit(app, [name for name in _JOBS if name not in _LOCAL])
    for entry in entry_points(group="prefill_router.commands"):
        add_command(app, entry.name, {entry.name: command_options()[entry.name]}, partial(_run_entry, entry))
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        others = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
        typer.echo(f"prefill-router {version('prefill-router')} (Python {platform.python_version()}, {others})")
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """The options of `prefill-router` itself."""


def _run_job(name: str, run: Callable[[Any], None], read: Read) -> None:
    # Errors are reported inside the command, because click exits silently on a broken pipe or connection.
    with _reported(), live(f"{name}: running"):
        try:
            run(read())
        except KeyboardInterrupt:
            say(f"{name}: interrupted: the same command goes on from what is finished")
            raise


def _run_entry(entry: EntryPoint, read: Read) -> None:
    with _reported():
        with live(f"{entry.name}: starting"):
            run = entry.load()
        run(read)


def _completion(config: Any) -> None:
    from prefill_jobs.cli.completion import completion

    typer.echo(completion(typer.main.get_command(build_app()), config.shell), nl=False)


_JOBS = {**COMMANDS, "completion": _completion}
_LOCAL = ("demo", "quickstart", "inspect", "clean", "completion")  # cannot be submitted to a cluster
