"""Shell completion: the script is run by bash itself; no shell but bash is at hand in every environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

from command import Command

# Prints what a press of Tab after each line offers.
_PRESS_TAB = """
source "$1"
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
    _prefill_router
    echo "${COMPREPLY[*]}"
done
"""
_OFFERED = {
    "prefill-router ex": "extract",
    "prefill-router submit li": "list",
    "prefill-router submit ext": "extract",
    "prefill-router extract --cor": "--corpus",
    "prefill-router submit extract --submission": "--submission-id",
    "prefill-router serve --watch": "--watch-s",
    "prefill-router collect --sample-by a": "active",
    "prefill-router submit train --recipe ": "best published",
    "prefill-router completion f": "fish",
    "prefill-router extract --corpus ": "",  # files, which are bash's own default
    "prefill-router extract --overwrite --lay": "--layers",
}


def test_bash_completes_commands_flags_and_values(command: Command, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(command("completion", "bash").out)
    done = subprocess.run(
        ["bash", "-uc", _PRESS_TAB, "-", script],
        input="".join(f"{line}\n" for line in _OFFERED),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    assert dict(zip(_OFFERED, done.stdout.splitlines(), strict=True)) == _OFFERED


def test_zsh_reads_the_script_of_bash(command: Command) -> None:
    bash, zsh = command("completion", "bash").out, command("completion", "zsh").out
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh.removesuffix(bash)


def test_fish_has_a_line_for_each_flag_with_its_help(command: Command) -> None:
    lines = command("completion", "fish").out.splitlines()
    assert all(line.startswith("complete -c prefill-router -n '") and line.endswith("'") for line in lines)
    (sampling,) = (line for line in lines if "-l sample-by" in line and "from collect; and not" in line)
    assert "-x -a 'random stratified active' -d 'Sampling: random" in sampling
    (corpus,) = (line for line in lines if "-l corpus" in line and "from extract; and not" in line)
    assert " -r -d 'Prompts: Parquet, Arrow" in corpus
