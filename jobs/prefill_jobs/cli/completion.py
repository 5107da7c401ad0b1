"""Shell completion as a static script, made from the command line itself: a press of Tab starts no Python.

The script completes commands, flags, and values of flags that allow only some. Elsewhere the shell completes files.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from prefill_jobs.options import command_options

_GROUP = "submit"  # the command that has commands of its own
_BASH = """\
_prefill_router() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= words= values=
    (( COMP_CWORD > 1 )) && command=${{COMP_WORDS[1]}}
    [[ $command == {group} ]] && (( COMP_CWORD > 2 )) && command="{group} ${{COMP_WORDS[2]}}"
    case "$command" in
{commands}
    esac
    if [[ $before == -* && " $values " == *" $before "* ]]; then
        case "$command $before" in
{choices}
            *) words= ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _prefill_router prefill-router
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit }
autoload -U +X bashcompinit && bashcompinit
"""


@dataclass(frozen=True)
class _Flag:
    name: str
    help: str
    takes_value: bool
    choices: tuple[str, ...]


def completion(root: Any, shell: str) -> str:
    """Returns the script for a shell, `bash`, `zsh` or `fish`, that completes the click group `root`."""
    flags = {name: list(_flags(name, command)) for name, command in _commands(root)}
    if shell == "fish":
        return "".join(_fish(root, flags))
    return (_ZSH if shell == "zsh" else "") + _bash(root, flags)


def _commands(root: Any) -> Iterator[tuple[str, Any]]:
    """Yields every command that takes flags with its name, as in `submit extract`."""
    for name, command in root.commands.items():
        if name == _GROUP:
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


def _flags(name: str, command: Any) -> Iterator[_Flag]:
    """Yields the flags of a command, and the values of its argument, if it allows only some, as flags of their own."""
    models = [command_options()[table] for table in name.split() if table in command_options()]
    fields = {key: field for model in models for key, field in model.model_fields.items()}
    for parameter in command.params:
        kind = getattr(fields.get(parameter.name), "annotation", None)
        choices = tuple(value for value in get_args(kind) if isinstance(value, str))
        if parameter.param_type_name == "option":
            yield _Flag(parameter.opts[0], parameter.help or "", not parameter.is_flag, choices)
        else:
            yield from (_Flag(value, parameter.help or "", False, ()) for value in choices)
    yield _Flag("--help", "Show help and exit.", False, ())


def _bash(root: Any, flags: Mapping[str, list[_Flag]]) -> str:
    words = {"": [*root.commands, "--version", "--help"], _GROUP: [*root.commands[_GROUP].commands, "--help"]}
    lines = [f"        {shlex.quote(name)}) words={shlex.quote(' '.join(each))} ;;" for name, each in words.items()]
    choices = []
    for name, all_flags in flags.items():
        names = shlex.quote(" ".join(flag.name for flag in all_flags))
        values = shlex.quote(" ".join(flag.name for flag in all_flags if flag.takes_value))
        lines.append(f"        {shlex.quote(name)}) words={names} values={values} ;;")
        choices += [
            f"            {shlex.quote(f'{name} {flag.name}')}) words={shlex.quote(' '.join(flag.choices))} ;;"
            for flag in all_flags
            if flag.choices
        ]
    return _BASH.format(group=_GROUP, commands="\n".join(lines), choices="\n".join(choices))


def _fish(root: Any, flags: Mapping[str, list[_Flag]]) -> Iterator[str]:
    yield from _fish_commands("__fish_use_subcommand", root.commands)
    inner = root.commands[_GROUP].commands
    yield from _fish_commands(
        f"__fish_seen_subcommand_from {_GROUP}; and not __fish_seen_subcommand_from {' '.join(inner)}", inner
    )
    for name, all_flags in flags.items():
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        when += "" if name.startswith(_GROUP) else f"; and not __fish_seen_subcommand_from {_GROUP}"
        for flag in all_flags:
            name = flag.name.removeprefix("--")
            line = f"complete -c prefill-router -n {_quoted(when)} {'-f -a' if name == flag.name else '-l'} {name}"
            if flag.choices:
                line += f" -x -a {_quoted(' '.join(flag.choices))}"
            elif flag.takes_value:
                line += " -r"
            yield f"{line} -d {_quoted(flag.help)}\n"


def _fish_commands(when: str, commands: Mapping[str, Any]) -> Iterator[str]:
    for name, command in commands.items():
        text = " ".join((command.help or "").split("\n\n")[0].split())
        yield f"complete -c prefill-router -n {_quoted(when)} -f -a {name} -d {_quoted(text)}\n"


def _quoted(text: str) -> str:
    """Quotes text for fish, in which backslashes and single quotes are escaped within single quotes."""
    return "'" + text.replace("\\[", "[").replace("\\", "\\\\").replace("'", "\\'") + "'"
