"""The `code` grader: runs an answer's Python code against the row's tests in a sandbox."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from prefill_router.graders.fences import fences
from prefill_router.graders.grade import Grade, Row, is_absent, lacking, missing, references, right, short, wrong
from prefill_router.graders.registry import grader
from prefill_router.graders.sandbox import MIB, Sandbox

_PYTHON = ("python", "py", "python3")
_UNGRADED = ("broken", "killed")


def _check(options: Mapping[str, Any]) -> None:
    Sandbox(unconfined=options["unconfined"])


def _unfit(row: Row, options: Mapping[str, Any]) -> str | None:
    return lacking(row, options["tests"])


@grader("code", check=_check, unfit=_unfit, keeps_time=True)
def code(
    answer: str,
    row: Row,
    *,
    tests: str = "tests",
    entry_point: str = "entry_point",
    setup: str = "setup",
    cpu_s: Annotated[int, Field(ge=1)] = 5,
    wall_s: Annotated[float, Field(gt=0.0)] = 15.0,
    memory_mib: Annotated[int, Field(ge=64)] = 512,
    unconfined: bool = False,
    site_packages: bool = False,
    together: bool = False,
) -> Grade:
    """Scores 1 if all tests pass: asserts, functions test_…, or `check(candidate)` with the row's `entry_point`.

    `tests` is a column with Python source or a list of sources; the source in `setup`, if any, runs before the
    answer's. If the tests cannot run, the grade is missing. Code and tests run in separate processes that exchange
    plain data. Tests that need the code's own objects, such as arrays and coroutines, need `together`: one process, in
    which code can forge a pass. Raises UserError on a machine that cannot confine the code, unless `unconfined`.
    """
    given = [str(test) for test in references(row, tests)]
    name = None if is_absent(row.get(entry_point)) else str(row[entry_point])
    before = "" if is_absent(row.get(setup)) else f"{row[setup]}\n"
    memory_bytes = memory_mib * MIB
    sandbox = Sandbox(
        cpu_s, wall_s, memory_bytes, unconfined=unconfined, site_packages=site_packages, together=together
    )
    verdict = sandbox.run(before + python_of(answer), "\n".join(given), name)
    if verdict.status == "passed":
        return right("passed the tests")
    reason = f"{verdict.status}: {short(verdict.detail, 200)}"
    return missing(reason) if verdict.status in _UNGRADED else wrong(reason)


def python_of(answer: str) -> str:
    """The answer's Python blocks in order, so that later ones override earlier ones, or the answer if it has no block.

    If no block names Python, those that name no language count. Interactive sessions (>>>) are left out.
    """
    blocks = fences(answer)
    if not blocks:
        return answer
    python = [b.text for b in blocks if b.language in _PYTHON] or [b.text for b in blocks if not b.language]
    return "\n".join(textwrap.dedent(text) for text in python if not re.match(r"\s*>>> ", text))
