"""The `prefill-router` command line, run in this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from prefill_jobs.cli.command_line import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class Command:
    """`command("extract", corpus="c.jsonl", out="o")` runs `prefill-router extract --corpus c.jsonl --out o`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, name: str, *flags: str, **options: object) -> Result:
        arguments = [name, *flags]
        for key, value in options.items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = self.capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)
